"""Steps that a plan reads, against the same steps read by torch operations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nfi_monitor import Monitor
from nfi_monitor.measure import planned_steps
from nfi_monitor.native import library

pytestmark = pytest.mark.skipif(library.library() is None, reason=f"no C library: {library.missing()}")

Change = Callable[[int, nn.Sequential, torch.optim.Optimizer], object]
STEPS = 12


def train(
    planned: bool,
    change: Change = lambda step, model, optimizer: None,
    make: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW,
    *,
    width: int = 32,
    classes: int = 7,
    dtype: torch.dtype = torch.float32,
    bias: bool = True,
    **options: Any,
) -> tuple[Monitor, nn.Sequential, list[bool]]:
    """Train with every step read. Returns which steps a plan has read, too."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, classes, bias=bias)).to(dtype)
    optimizer = make(model.parameters(), **{"lr": 1e-2, **options})
    by_plan: list[bool] = []
    with pytest.MonkeyPatch.context() as patch:
        if not planned:
            patch.setattr(planned_steps, "plan_for", lambda reader: None)
        after = planned_steps.PlannedSteps.after

        def counted(*given: Any) -> Any:
            read = after(*given)
            by_plan[-1] = read is not None
            return read

        patch.setattr(planned_steps.PlannedSteps, "after", counted)
        with Monitor(model, optimizer, console=False, every=1) as monitor:
            for step in range(STEPS):
                rows = 64 if step < 8 else 48
                x, y = torch.randn(rows, 8).to(dtype), torch.randint(classes, (rows,))
                optimizer.zero_grad()
                loss = F.cross_entropy(model(x), y)
                monitor.observe_loss(loss)
                loss.backward()
                by_plan.append(False)
                change(step, model, optimizer)
                optimizer.step()
                del loss  # its graph remembers the parameters' sizes
    return monitor, model, by_plan


def same(first: Monitor, second: Monitor, dtype: torch.dtype) -> None:
    unit = torch.finfo(dtype).eps
    assert set(first.history) == set(second.history)
    for name in first.history:
        (steps, known), (others, found) = first.history[name], second.history[name]
        assert steps.tolist() == others.tolist(), name
        near = 1e5 if "curvature" in name or "align" in name or "match" in name else 3e3
        assert found == pytest.approx(known, rel=near * unit, abs=1e3 * unit, nan_ok=True), name


def grouped(params: Any, **options: Any) -> torch.optim.Optimizer:
    """Return an optimizer with rates, ε and betas of its own for each tensor."""
    kinds = zip((1e-2, 0.0, 1e-3, 1e-3), (1e-8, 1e-3, 1e-8, 1e-5), (0.999, 0.99, 0.9, 0.95), strict=True)
    groups = [
        {"params": [param], "lr": lr, "eps": eps, "betas": (0.9, beta)}
        for param, (lr, eps, beta) in zip(params, kinds, strict=True)
    ]
    return torch.optim.AdamW(groups, **options)


OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw": {},
    "double": {"dtype": torch.float64},
    "no bias": {"bias": False},
    "one output": {"classes": 1},
    "a sample of the coordinates": {"width": 3000, "classes": 40},
    "a large head": {"width": 300, "classes": 400},
    "amsgrad": {"make": torch.optim.Adam, "amsgrad": True},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
    "groups": {"make": grouped},
    "nadam": {"make": torch.optim.NAdam},
}


@pytest.mark.parametrize("case", OPTIMIZERS)
def test_a_plan_reads_what_torch_reads(case: str) -> None:
    given = OPTIMIZERS[case]
    first, model, none = train(False, **given)
    second, other, used = train(True, **given)
    assert not any(none)
    assert all(used[1:]) and not used[0], "the first step has no second moment yet"
    assert all(map(torch.equal, model.parameters(), other.parameters()))
    assert library.fault() == ""
    same(first, second, given.get("dtype", torch.float32))


def schedule(step: int, model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
    optimizer.param_groups[0]["lr"] *= 0.8
    optimizer.param_groups[0]["betas"] = (0.9, 0.99 if step < 6 else 0.95)


def frozen(step: int, model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
    if step % 4 == 3:
        model[0].weight.grad = None


def loaded(step: int, model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
    if step == 5:
        optimizer.load_state_dict(optimizer.state_dict())


def moved(step: int, model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
    if step == 5:
        for param in model.parameters():
            param.data = param.data.clone()


def strided(step: int, model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
    if step % 3 == 0:
        model[0].weight.grad = model[0].weight.grad.t().contiguous().t()


def by_tensor(step: int, model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
    if step == 5:
        optimizer.param_groups[0]["lr"] = torch.tensor(1e-3)


def other_moments(step: int, model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
    if step > 4:
        state = optimizer.state[model[0].weight]
        state["exp_avg_sq"] = state["exp_avg_sq"].clone()


@pytest.mark.parametrize("change", [schedule, frozen, loaded, moved, strided, by_tensor, other_moments])
def test_a_plan_sees_what_changes_between_steps(change: Change) -> None:
    first, model, _ = train(False, change)
    second, other, used = train(True, change)
    assert any(used)
    assert all(map(torch.equal, model.parameters(), other.parameters()))
    assert library.fault() == ""
    same(first, second, torch.float32)


def decays(step: int, model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
    optimizer.param_groups[0]["weight_decay"] = 0.3 if step in (5, 6) else 0.0


def switched_off(step: int, model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
    optimizer.param_groups[0]["amsgrad"] = step < 5


def switched_on(step: int, model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
    if step == 5:
        optimizer.param_groups[0]["amsgrad"] = True
        for state in optimizer.state.values():
            state["max_exp_avg_sq"] = 4 * state["exp_avg_sq"]


@pytest.mark.parametrize(
    ("change", "options", "used_at"),
    [
        (decays, {}, {1, 2, 3, 4, 7, 8, 9, 10, 11}),
        (switched_off, {"amsgrad": True}, {*range(1, 12)} - {5}),
        (switched_on, {}, {*range(1, 12)} - {5}),
    ],
)
def test_a_plan_ends_when_the_step_gets_another_gradient_or_moment(
    change: Change, options: dict[str, Any], used_at: set[int]
) -> None:
    """Decay that is coupled, and the maximum of the moments, switched in the run."""
    first, model, _ = train(False, change, torch.optim.Adam, **options)
    second, other, used = train(True, change, torch.optim.Adam, **options)
    assert {step for step, read in enumerate(used) if read} == used_at
    assert all(map(torch.equal, model.parameters(), other.parameters()))
    assert library.fault() == ""
    same(first, second, torch.float32)


def test_a_plan_reads_no_step_by_another_gradient_than_that_of_the_loss() -> None:
    given = {"maximize": True, "lr": 1e-4}
    first, model, _ = train(False, **given)
    second, other, used = train(True, **given)
    assert not any(used)
    assert all(map(torch.equal, model.parameters(), other.parameters()))
    same(first, second, torch.float32)


def test_memory_that_is_gone_is_not_read() -> None:
    def free(step: int, model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
        if step > 4:
            optimizer.state[model[0].weight]["exp_avg_sq"].untyped_storage().resize_(0)
            model[0].weight.grad = None  # the optimizer must not read it either

    monitor, _, used = train(True, free)
    assert any(used[:5])
    assert not [note for note in monitor.notes if note.code.startswith("failed")]


@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("planned", [True, False])
def test_a_gradient_of_another_size_is_not_read_beyond_its_end(planned: bool, layer: int) -> None:
    """``grad.data`` may be of any size, and Adam broadcasts it."""

    def broadcast(step: int, model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
        if step == 5:
            model[layer].weight.grad.data = model[layer].weight.grad.mean().reshape(1, 1)

    monitor, _, used = train(planned, broadcast)
    assert not used[5] and any(used) is planned
    steps, values = monitor.history["gradient_norm"]
    assert steps.tolist() == [step for step in range(1, STEPS + 1) if step != 6]
    assert all(0 < value < 10 for value in values)
    assert [note.code for note in monitor.notes] == ["failed_optimizer"]


def prune(model: nn.Sequential, optimizer: torch.optim.Optimizer, kept: int = 8) -> None:
    """Keep the first hidden units: the parameters stay the same objects, and get other sizes."""
    for param, dim in ((model[0].weight, 0), (model[0].bias, 0), (model[2].weight, 1)):
        state = optimizer.state[param]
        for name in ("exp_avg", "exp_avg_sq"):
            state[name] = state[name].narrow(dim, 0, kept).clone()
        gradient = param.grad.narrow(dim, 0, kept).clone()
        param.grad = None
        param.data = param.data.narrow(dim, 0, kept).clone()
        param.grad = gradient


@pytest.mark.parametrize("planned", [True, False])
def test_pruned_parameters_are_not_read_beyond_their_end(planned: bool) -> None:
    norms: list[float] = []

    def change(step: int, model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
        if step == 5:  # the first step with fewer hidden units
            prune(model, optimizer)
        norms.append(sum(float(param.grad.double().square().sum()) for param in model.parameters()) ** 0.5)

    monitor, _, used = train(planned, change)
    assert all(used[6:]) is planned
    steps, values = monitor.history["gradient_norm"]
    assert steps.tolist() == [*range(1, STEPS + 1)]
    assert values.tolist() == pytest.approx(norms, rel=1e-5)
    assert not monitor.alerts
    assert {note.code for note in monitor.notes} <= {"state_unreadable"}  # of the pass before


def test_a_parameter_that_is_viewed_in_another_way_is_read_anew() -> None:
    """Its memory stays where it was, so addresses alone do not show it."""
    norms: list[float] = []

    def change(step: int, model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
        if step == 5:
            prune(model, optimizer)  # to eight inputs and eight hidden units
            model[0].weight.data = model[0].weight.data.t()
        norms.append(sum(float(param.grad.double().square().sum()) for param in model.parameters()) ** 0.5)

    monitor, _, _ = train(True, change)
    _, values = monitor.history["gradient_norm"]
    assert values.tolist() == pytest.approx(norms, rel=1e-5)


def test_an_error_in_the_library_leaves_the_step_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    real = library.library()

    class Broken:
        def __getattr__(self, name: str) -> Any:
            return (lambda address: 1) if name == "nfi_after" else getattr(real, name)

    first, _, _ = train(False)
    monkeypatch.setattr(library, "library", Broken)
    monkeypatch.setattr(library._state, "fault", "")
    monkeypatch.setattr(library._state, "failures", 0)
    second, _, used = train(True)
    assert not any(used)
    assert [note.code for note in second.notes] == ["library_failed"]
    same(first, second, torch.float32)


@pytest.mark.parametrize("level", [0, 1, 2])
def test_each_instruction_set_gives_the_same_steps(level: int) -> None:
    with library.at_level(level) as available:
        if not available:
            pytest.skip("not on this processor")
        same(train(False)[0], train(True)[0], torch.float32)
