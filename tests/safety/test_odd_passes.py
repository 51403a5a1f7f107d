"""A pass of other tensors through the watched model costs at most one reading, and changes no bit."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call, grad, hessian, jacrev, jvp, stack_module_state, vmap
from torch.utils.flop_counter import FlopCounterMode

from nfi_monitor import Monitor
from nfi_monitor.capture import devices
from nfi_monitor.capture.head_probe import HeadProbe
from tests.runs import batch, differences, mlp, snapshot
from tests.safety.table import Shown

STEPS, AT = 12, 4
X, Y = batch(24)


def loss_of(model: nn.Module, inputs: torch.Tensor = X) -> torch.Tensor:
    return F.cross_entropy(model(inputs), Y[: len(inputs)])


def meta(model: nn.Module) -> None:
    weights = {name: p.detach().to("meta").requires_grad_() for name, p in model.named_parameters()}
    functional_call(model, weights, (torch.zeros(3, 12, device="meta"),)).sum().backward()


def fake(model: nn.Module) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        weights = {name: nn.Parameter(mode.from_tensor(p.detach())) for name, p in model.named_parameters()}
        output = functional_call(model, weights, (mode.from_tensor(X),))
    output.sum().backward()


def fake_step(model: nn.Module) -> None:
    """As a tool that estimates the memory of a training step does."""
    (optimizer,) = OPTIMIZERS
    with FakeTensorMode(allow_non_fake_inputs=True):
        before = [parameter.grad for parameter in model.parameters()]
        for parameter in model.parameters():
            parameter.grad = None
        optimizer.step()
        for parameter, gradient in zip(model.parameters(), before, strict=True):
            parameter.grad = gradient


OPTIMIZERS: list[torch.optim.Optimizer] = []


def ensemble(model: nn.Module) -> None:
    weights, buffers = stack_module_state([mlp() for _ in range(3)])

    def call(weights: Any, buffers: Any, inputs: torch.Tensor) -> torch.Tensor:
        return functional_call(model, (weights, buffers), (inputs,))

    vmap(call, (0, 0, None))(weights, buffers, X).sum().backward()
    vmap(grad(lambda *given: call(*given).sum()), (0, 0, None))(weights, buffers, X)


def derivatives(model: nn.Module) -> None:
    weights = dict(model.named_parameters())
    jacrev(lambda weights: functional_call(model, weights, (X[:2],)))(weights)
    hessian(lambda weights: functional_call(model, weights, (X[:2],)).sum())(weights)
    jvp(model, (X,), (X,))


def exported(model: nn.Module) -> None:
    torch.export.export(model, (X,))
    torch.export.export(model, (X,), strict=True)


def symbolic(model: nn.Module) -> None:
    torch.fx.symbolic_trace(model)
    torch.fx.symbolic_trace(nn.Sequential(model))


def proxies(model: nn.Module) -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    for mode in ("real", "fake"):
        graph = make_fx(lambda inputs: model(inputs), tracing_mode=mode, _allow_non_fake_inputs=True)(X)
        assert "clone" not in str(graph.graph), "what the monitor computes is no part of the user's graph"


def torchscript(model: nn.Module) -> None:
    torch.jit.trace(model, X)
    torch.jit.script(model)


def no_gradients(model: nn.Module) -> None:
    with torch.inference_mode():
        model(X)
    with torch.no_grad():
        model(X)


def autocast(model: nn.Module) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss_of(model).backward()


def float64(model: nn.Module) -> None:
    model.double()(X.double()).sum().backward()
    model.float()


def counted(model: nn.Module) -> None:
    def count(one: nn.Module) -> int:
        with FlopCounterMode(display=False) as counter:
            loss_of(one).backward()
        return counter.get_total_flops()

    assert count(model) == count(copy.deepcopy(model)), "the monitor's own work is counted as the model's"


def shapes(model: nn.Module) -> None:
    for inputs in (X[:0], X[0], X.reshape(2, 3, 4, 12)):
        model(inputs).sum().backward()


def nested(model: nn.Module) -> None:
    jagged = torch.nested.nested_tensor([X[:3], X[:5]], layout=torch.jagged)
    model(jagged).values().sum().backward()


def compiled(model: nn.Module) -> None:
    torch._dynamo.reset()
    loss_of(torch.compile(model, backend="eager", fullgraph=True)).backward()


def second_order(model: nn.Module) -> None:
    gradients = torch.autograd.grad(loss_of(model), list(model.parameters()), create_graph=True)
    torch.stack([gradient.pow(2).sum() for gradient in gradients]).sum().backward()


Odd = Callable[[nn.Module], None]
ODD: tuple[Odd, ...] = (
    meta, fake, fake_step, ensemble, derivatives, exported, symbolic, proxies, torchscript, no_gradients,
    autocast, float64, counted, shapes, nested, compiled, second_order,
)  # fmt: skip


def train(odd: dict[int, Odd], *, watch: bool) -> tuple[Any, Monitor | None]:
    """``odd``: passes by the number of steps before them."""
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    monitor = Monitor(model, optimizer, console=False, every=1) if watch else None
    OPTIMIZERS[:] = [optimizer]
    if monitor is not None:
        monitor.observe_outputs()
    for number in range(STEPS):
        if number in odd:
            odd[number](model)
            optimizer.zero_grad()
        loss = loss_of(model)
        if monitor is not None:
            monitor.observe_loss(loss)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    if monitor is not None:
        monitor.close()
    return snapshot(model, optimizer), monitor


@pytest.mark.parametrize("odd", ODD, ids=lambda odd: odd.__name__)
@pytest.mark.filterwarnings("ignore")
def test_an_odd_pass_costs_at_most_one_reading_and_changes_no_bit(odd: Odd) -> None:
    result, monitor = train({AT: odd}, watch=True)
    assert monitor is not None
    assert not differences(train({AT: odd}, watch=False)[0], result)
    assert not monitor.notes
    steps = monitor.history["live_fraction"][0].tolist()
    assert len(steps) >= STEPS - 1 and steps[AT + 1 :] == list(range(AT + 2, STEPS + 1))
    assert monitor.history["loss"][0].tolist() == list(range(1, STEPS + 1))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_several_odd_passes_of_a_run_cost_one_reading_each(shown: Shown) -> None:
    chance = random.Random(0)
    for number in range(300):
        odd = {at: chance.choice(ODD) for at in chance.sample(range(STEPS), 4)}
        told = {at: one.__name__ for at, one in sorted(odd.items())}
        result, monitor = train(odd, watch=True)
        assert monitor is not None
        assert not differences(train(odd, watch=False)[0], result), (number, told)
        assert not monitor.notes, (number, told, monitor.notes)
        missed = set(range(1, STEPS + 1)) - set(monitor.history["live_fraction"][0].astype(int).tolist())
        assert missed <= {at + 1 for at in odd}, (number, told, missed)
        assert monitor.history["loss"][0].tolist() == list(range(1, STEPS + 1)), (number, told)
    shown("odd passes", 4 * 300, "odd passes in 300 trainings")


def test_an_error_in_one_pass_costs_one_reading_and_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    watch, calls = HeadProbe._watch, []

    def broken(self: HeadProbe, *args: Any, **kwargs: Any) -> None:
        calls.append(1)
        if len(calls) == AT:
            raise MemoryError("short once")
        watch(self, *args, **kwargs)

    monkeypatch.setattr(HeadProbe, "_watch", broken)
    _, monitor = train({}, watch=True)
    assert monitor is not None
    assert monitor.history["live_fraction"][0].tolist() == [n for n in range(1, STEPS + 1) if n != AT]
    (note,) = monitor.notes
    assert note.code == "failed_rows" and note.step == AT - 1
    assert "left out of this reading" in note.message and "MemoryError: short once" in note.message


def test_rows_on_another_device_take_over_where_no_others_come() -> None:
    """A first pass on another device (a test of the model before it is moved) is not the run's device."""
    from nfi_monitor.capture.head_probe import Rows
    from nfi_monitor.measure.accumulator import RowAccumulator

    def rows(device: str) -> Rows:
        return Rows(*(torch.rand(4, 3).to(device) for _ in range(2)), features=None, total=4)

    accumulator = RowAccumulator()
    seen = []
    for step, given in enumerate((["meta"], ["cpu"], ["cpu"], ["meta", "cpu"], ["cpu"]), start=1):
        for device in given:
            accumulator.add(rows(device))
        found = [flat for one in accumulator.late for flat in one.flat]
        found += [] if accumulator.sums is None else [accumulator.sums]
        seen.append(found[0].device.type if found else None)
        accumulator.clear(step + 1)
    assert seen == ["meta", None, "cpu", "cpu", "cpu"]
    assert accumulator.devices == [torch.device("cpu"), torch.device("meta")], "which is said once"


def test_a_tensor_is_readable_only_in_the_plain_run() -> None:
    assert devices.is_readable(X) and devices.is_readable(nn.Parameter(X))
    assert not devices.is_readable(X.to("meta"))
    with FakeTensorMode():
        assert not devices.is_readable(X)
    with FlopCounterMode(display=False):
        assert devices.is_readable(X)
    vmap(lambda row: row if not devices.is_readable(row) else pytest.fail("inside vmap"))(X)


def test_another_default_device_changes_no_number() -> None:
    """``torch.set_default_device``: what the monitor makes from numbers is on the host all the same."""

    def history(device: str) -> dict[str, list[float]]:
        model = mlp()
        optimizer = torch.optim.AdamW(model.parameters())
        with Monitor(model, optimizer, console=False, every=1, overhead_budget=None) as monitor:
            for _ in range(4):
                optimizer.zero_grad()
                with torch.device(device):
                    loss = loss_of(model)
                    loss.backward()
                    monitor.observe_loss(loss.item())
                    optimizer.step()
        assert not monitor.notes, monitor.notes
        return {name: monitor.history[name][1].tolist() for name in monitor.history}

    assert history("meta") == history("cpu")
