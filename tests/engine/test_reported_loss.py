"""A loss that the loop reports and nobody trains on is said; every usual way to report one is quiet."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo import compiled_autograd

from nfi_monitor import Monitor

K = 7
Step = Callable[[nn.Module, Tensor, Tensor, Callable[[Tensor], object]], None]


def train(step: Step, *, watch: bool = True) -> tuple[Monitor | None, dict[str, Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, K))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    monitor = Monitor(model, optimizer, console=False, every=1) if watch else None
    for _ in range(8):
        x, y = torch.randn(12, 6), torch.randint(0, K, (12,))
        step(model, x, y, (lambda loss: None) if monitor is None else monitor.observe_loss)
        optimizer.step()
        optimizer.zero_grad()
    if monitor is not None:
        monitor.close()
    return monitor, model.state_dict()


def _preferences(z: Tensor, y: Tensor) -> Tensor:
    logs = z.log_softmax(-1)
    return -F.logsigmoid(logs.gather(1, y[:, None]) - logs.gather(1, (y[:, None] + 1) % K)).mean()


def cross_entropy_beside_preferences(model: nn.Module, x: Tensor, y: Tensor, report: Callable) -> None:
    z = model(x)
    _preferences(z, y).backward()
    report(F.cross_entropy(z, y))


def reported_before(model: nn.Module, x: Tensor, y: Tensor, report: Callable) -> None:
    z = model(x)
    report(F.cross_entropy(z, y))
    (z - y[:, None] / K).square().mean().backward()


def a_metric_of_the_loss(model: nn.Module, x: Tensor, y: Tensor, report: Callable) -> None:
    z = model(x)
    F.cross_entropy(z, y, label_smoothing=0.1).backward()
    report(F.cross_entropy(z, y))


def of_its_own_pass(model: nn.Module, x: Tensor, y: Tensor, report: Callable) -> None:
    report(F.cross_entropy(model(x), y))
    _preferences(model(x), y).backward()


UNTRAINED = [cross_entropy_beside_preferences, reported_before, a_metric_of_the_loss, of_its_own_pass]


@pytest.mark.parametrize("step", UNTRAINED)
def test_a_loss_that_nobody_trains_on_is_said_and_left_out(step: Step) -> None:
    monitor, state = train(step)
    assert monitor is not None
    [note] = [note for note in monitor.notes if note.code == "loss_not_trained"]
    assert "observe_loss gets" in note.message and "Report the loss that trains" in note.message
    assert len(monitor.history["loss"][0]) < 3, "the first steps, which show it"
    assert "failed" not in " ".join(note.code for note in monitor.notes)
    _, bare = train(step, watch=False)
    assert all(torch.equal(state[name], bare[name]) for name in bare)


def after(model: nn.Module, x: Tensor, y: Tensor, report: Callable) -> None:
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    report(loss)


def before(model: nn.Module, x: Tensor, y: Tensor, report: Callable) -> None:
    loss = F.cross_entropy(model(x), y)
    report(loss)
    (loss * 2.0**10).backward()


def a_share(model: nn.Module, x: Tensor, y: Tensor, report: Callable) -> None:
    for rows in (slice(0, 6), slice(6, 12)):
        loss = F.cross_entropy(model(x[rows]), y[rows])
        (loss / 2).backward()
        report(loss * 1.0)


def each_row(model: nn.Module, x: Tensor, y: Tensor, report: Callable) -> None:
    losses = F.cross_entropy(model(x), y, reduction="none")
    losses.sum().backward()
    report(torch.where(losses.isfinite(), losses, 0.0).mean())


def kept_graph(model: nn.Module, x: Tensor, y: Tensor, report: Callable) -> None:
    loss = F.cross_entropy(model(x), y)
    loss.backward(retain_graph=True)
    report(loss)


def a_part(model: nn.Module, x: Tensor, y: Tensor, report: Callable) -> None:
    z = model(x)
    loss = F.cross_entropy(z, y)
    (loss + 0.1 * z.square().mean()).backward()
    report(loss)


def assigned(model: nn.Module, x: Tensor, y: Tensor, report: Callable) -> None:
    loss = F.cross_entropy(model(x), y)
    parameters = list(model.parameters())
    for parameter, grad in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
        parameter.grad = grad
    report(loss)


def a_number(model: nn.Module, x: Tensor, y: Tensor, report: Callable) -> None:
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    report(loss.detach())


def two_losses(model: nn.Module, x: Tensor, y: Tensor, report: Callable) -> None:
    first, second = F.cross_entropy(model(x), y), F.cross_entropy(model(-x), y)
    first.backward()
    second.backward()
    report(torch.stack([first, second]).mean())


def checkpointed(model: nn.Module, x: Tensor, y: Tensor, report: Callable) -> None:
    z = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)
    loss = F.cross_entropy(z, y)
    loss.backward()
    report(loss)


def kept_graph_before_a_penalty(model: nn.Module, x: Tensor, y: Tensor, report: Callable) -> None:
    z = model(x)
    loss = F.cross_entropy(z, y)
    loss.backward(retain_graph=True)
    report(loss)
    (1e-3 * z.square().mean()).backward()


def gradients_cleared_after_the_report(model: nn.Module, x: Tensor, y: Tensor, report: Callable) -> None:
    loss = F.cross_entropy(model(x), y)
    report(loss)
    model.zero_grad(set_to_none=False)
    loss.backward()


def without_autograd(model: nn.Module, x: Tensor, y: Tensor, report: Callable) -> None:
    named = dict(model.named_parameters())
    grads = torch.func.grad(lambda given: F.cross_entropy(torch.func.functional_call(model, given, x), y))(
        named
    )
    for name, parameter in named.items():
        parameter.grad = grads[name].detach()
    report(F.cross_entropy(model(x), y))


QUIET = [
    after,
    before,
    a_share,
    each_row,
    kept_graph,
    a_part,
    assigned,
    a_number,
    two_losses,
    checkpointed,
    kept_graph_before_a_penalty,
    gradients_cleared_after_the_report,
    without_autograd,
]


@pytest.mark.parametrize("step", QUIET)
def test_a_loss_that_is_trained_is_reported_quietly(step: Step) -> None:
    monitor, state = train(step)
    assert monitor is not None and "loss_not_trained" not in {note.code for note in monitor.notes}
    _, bare = train(step, watch=False)
    assert all(torch.equal(state[name], bare[name]) for name in bare)


@pytest.mark.parametrize("kept", [False, True])
def test_a_loss_that_is_reported_after_its_step_is_trained(kept: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, K))
    optimizer = torch.optim.Adam(model.parameters())
    with Monitor(model, optimizer, console=False) as monitor:
        for _ in range(8):
            loss = F.cross_entropy(model(torch.randn(12, 6)), torch.randint(0, K, (12,)))
            loss.backward(retain_graph=kept)
            optimizer.step()
            optimizer.zero_grad()
            monitor.observe_loss(loss)
        assert len(monitor.history["loss"][0]) == 7
    assert not monitor.notes


class Spiky:
    """Trains a cross-entropy, and reports a metric that jumps by 1000 at step 60."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, K))
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-2, betas=(0.9, 0.95))
        self.x, self.y = torch.randn(24, 6), torch.randint(0, K, (24,))

    def steps(self, monitor: Monitor, first: int, last: int) -> None:
        for step in range(first, last):
            z = self.model(self.x)
            monitor.observe_loss(F.mse_loss(z, torch.zeros_like(z)) * (1e-4 if step < 60 else 1e3))
            F.cross_entropy(z, self.y).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()


def test_a_jump_of_a_loss_that_nobody_trains_on_is_no_slingshot() -> None:
    run = Spiky()
    with Monitor(run.model, run.optimizer, console=False, every=1) as monitor:
        run.steps(monitor, 0, 90)
    assert monitor.alerts == [] and [note.code for note in monitor.notes] == ["loss_not_trained"]
    assert "The loss at the head is judged instead" in monitor.notes[0].message


def test_a_resumed_run_knows_that_nobody_trains_on_the_reported_loss() -> None:
    run = Spiky()
    with Monitor(run.model, run.optimizer, console=False, every=1) as monitor:
        run.steps(monitor, 0, 59)
        state = monitor.state_dict()
    with Monitor(run.model, run.optimizer, console=False, every=1) as monitor:
        monitor.load_state_dict(state)
        run.steps(monitor, 59, 90)
        assert monitor.alerts == [] and len(monitor.history["loss"][0]) == 0
        for _ in range(3):
            z = run.model(run.x)
            monitor.observe_loss(F.cross_entropy(z, run.y).item())
            F.cross_entropy(z, run.y).backward()
            run.optimizer.step()
    with Monitor(run.model, run.optimizer, console=False, every=1) as monitor:  # a corrected loop
        monitor.load_state_dict(state)
        for _ in range(3):
            loss = F.cross_entropy(run.model(run.x), run.y)
            monitor.observe_loss(loss)
            loss.backward()
            run.optimizer.step()
        assert len(monitor.history["loss"][0]) >= 2


@pytest.mark.parametrize(
    ("loss", "got"),
    [
        (None, "got NoneType"),
        ("0.5", "got a str"),
        ([torch.tensor(1.0)], "got list"),
        ({"loss": 1.0}, "got dict"),
        (1j, "got complex"),
        (torch.tensor(1j), "got a complex tensor"),
        (torch.empty(0), "got an empty tensor"),
        (nn.CrossEntropyLoss(), "got CrossEntropyLoss"),
    ],
)
def test_what_is_no_loss_is_said_once_and_costs_nothing_else(loss: object, got: str) -> None:
    def step(model: nn.Module, x: Tensor, y: Tensor, report: Callable) -> None:
        report(loss)
        F.cross_entropy(model(x), y).backward()

    monitor, state = train(step)
    assert monitor is not None
    [note] = monitor.notes
    assert note.code == "loss_unusable" and got in note.message
    assert len(monitor.history["head_loss"][0]) == 8 and len(monitor.history["loss"][0]) == 0
    _, bare = train(step, watch=False)
    assert all(torch.equal(state[name], bare[name]) for name in bare)


def test_one_wrong_report_costs_one_loss() -> None:
    calls = iter(range(100))

    def step(model: nn.Module, x: Tensor, y: Tensor, report: Callable) -> None:
        loss = F.cross_entropy(model(x), y)
        report(None if next(calls) == 4 else loss)
        loss.backward()

    monitor, _ = train(step)
    assert monitor is not None and [note.code for note in monitor.notes] == ["loss_unusable"]
    assert monitor.history["loss"][0].tolist() == [1, 2, 3, 4, 6, 7, 8]


def test_a_compiled_backward_pass_is_not_broken_by_a_report() -> None:
    """Compiled autograd traces the hooks: what they call must not be the graph's nodes."""

    def step(model: nn.Module, x: Tensor, y: Tensor, report: Callable) -> None:
        loss = F.cross_entropy(model(x), y)
        report(loss)
        with compiled_autograd._enable(torch.compile(backend="eager", fullgraph=True)):
            loss.backward()

    monitor, state = train(step)
    assert monitor is not None and len(monitor.history["loss"][0]) == 8
    assert [note.code for note in monitor.notes] == ["head_never_fired"]
    _, bare = train(step, watch=False)
    assert all(torch.equal(state[name], bare[name]) for name in bare)
