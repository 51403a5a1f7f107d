"""Optimizers that are no ``torch.optim.Optimizer`` are watched, and never end a training."""

from __future__ import annotations

import copy
import pickle
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nfi_monitor import Monitor
from nfi_monitor.capture.foreign_optimizer import ForeignOptimizer, adapt
from nfi_monitor.capture.head import find_head
from nfi_monitor.capture.unwrap import choose, watchable
from nfi_monitor.errors import MonitorError
from nfi_monitor.integrations.attach import Attachment
from nfi_monitor.remedies import Autopilot
from tests.runs import batch, mlp

STEPS = 6


class OwnSGD:
    """A user's class with parameter groups, and no state."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        self.param_groups = [{"params": list(params), "lr": lr}]

    def step(self) -> str:
        with torch.no_grad():
            for group in self.param_groups:
                for param in group["params"]:
                    param -= group["lr"] * param.grad
        return "stepped"

    def zero_grad(self) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                param.grad = None


class Plain:
    """A user's class with nothing but a list of parameters and a rate."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        self.held, self.lr = list(params), lr

    def step(self) -> None:
        with torch.no_grad():
            for param in self.held:
                param -= self.lr * param.grad

    def zero_grad(self) -> None:
        for param in self.held:
            param.grad = None


class HoldsTheModel(Plain):
    """Reaches its parameters through the model."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.lr = model, 0.1

    @property
    def held(self) -> list[nn.Parameter]:  # type: ignore[override]
        return list(self.model.parameters())


class Averaging:
    """As fastai's: groups made anew at each access, and an average of squares under another name."""

    def __init__(self, params: Any) -> None:
        self.lists, self.hypers = [tuple(params)], [{"lr": 1e-2, "sqr_mom": 0.9, "eps": 1e-5}]
        self.state: dict[Any, dict[str, Any]] = defaultdict(dict)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        pairs = zip(self.lists, self.hypers, strict=True)
        return [{"params": params, **hyper} for params, hyper in pairs]

    def step(self) -> None:
        with torch.no_grad():
            for group in self.param_groups:
                for param in group["params"]:
                    state = self.state[param]
                    average = state.setdefault("sqr_avg", torch.zeros_like(param))
                    state["step"] = state.get("step", 0) + 1
                    average.mul_(group["sqr_mom"]).addcmul_(
                        param.grad, param.grad, value=1 - group["sqr_mom"]
                    )
                    root = (average / (1 - group["sqr_mom"] ** state["step"])).sqrt() + group["eps"]
                    param.addcdiv_(param.grad, root, value=-group["lr"])

    def zero_grad(self) -> None:
        for param in self.lists[0]:
            param.grad = None


class Tuples(OwnSGD):
    """As TorchOpt's: a group is a tuple of parameters."""

    def __init__(self, params: Any) -> None:
        self.param_groups = [tuple(params)]  # type: ignore[list-item]

    def step(self) -> None:  # type: ignore[override]
        with torch.no_grad():
            for param in self.param_groups[0]:
                param -= 0.1 * param.grad  # type: ignore[misc,operator,attr-defined]

    def zero_grad(self) -> None:
        for param in self.param_groups[0]:
            param.grad = None  # type: ignore[attr-defined]


class Reassigned(OwnSGD):
    """Its step is an attribute of the object."""

    def __init__(self, params: Any) -> None:
        super().__init__(params)
        self.step = self._go  # type: ignore[method-assign]

    def _go(self) -> str:
        return OwnSGD.step(self)


class Passing:
    """Passes everything on to the optimizer inside, also what is assigned."""

    def __init__(self, inner: Any) -> None:
        vars(self)["inner"] = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["inner"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.inner, name, value)


MAKE: dict[str, Callable[[nn.Module], Any]] = {
    "own groups": lambda model: OwnSGD(model.parameters()),
    "a list of parameters": lambda model: Plain(model.parameters()),
    "the model": HoldsTheModel,
    "groups made anew": lambda model: Averaging(model.parameters()),
    "groups of tuples": lambda model: Tuples(model.parameters()),
    "step as an attribute": lambda model: Reassigned(model.parameters()),
    "passed on": lambda model: Passing(OwnSGD(model.parameters())),
}


def train(make: Callable[[nn.Module], Any], *, watched: bool) -> tuple[list[Tensor], Monitor | None, Any]:
    model = mlp()
    optimizer = make(model)
    monitor = Monitor(model, optimizer, console=False, every=1) if watched else None
    inputs, targets = batch()
    for _ in range(STEPS):
        loss = F.cross_entropy(model(inputs), targets)
        if monitor is not None:
            monitor.observe_loss(loss)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    if monitor is not None:
        monitor.close()
    return [param.detach() for param in model.parameters()], monitor, optimizer


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE.keys())
def test_an_optimizer_that_is_not_torchs_is_watched_and_changes_nothing(make: Callable[..., Any]) -> None:
    alone, _, _ = train(make, watched=False)
    trained, monitor, optimizer = train(make, watched=True)
    assert all(map(torch.equal, alone, trained))
    assert monitor is not None and monitor.step == STEPS
    for name in ("loss", "zero_sum_violation", "gradient_norm", "weight_norm"):
        assert len(monitor.history[name][0]) == STEPS, name
    codes = [note.code for note in monitor.notes]
    assert "optimizer_not_torch" in codes and not any(code.startswith("failed") for code in codes)
    own = vars(optimizer).get("step")
    assert own is None or own == optimizer._go  # as it was before


def test_the_rate_and_an_average_of_squares_are_read() -> None:
    _, monitor, _ = train(MAKE["groups made anew"], watched=True)
    assert monitor is not None and monitor.tau == pytest.approx(10)
    assert monitor.history["learning_rate"][1].tolist() == pytest.approx([1e-2] * STEPS)
    rms = monitor.history["rms_t_max"][1]
    assert len(rms) and rms[-1] == pytest.approx(1.0, abs=1.0)
    assert "no_second_moment" not in [note.code for note in monitor.notes]
    _, plain, _ = train(MAKE["own groups"], watched=True)
    assert plain is not None and "rms_t_max" not in plain.history
    assert plain.history["learning_rate"][1].tolist() == pytest.approx([0.1] * STEPS)


def test_the_object_is_copied_and_pickled_without_the_monitor() -> None:
    model = mlp()
    optimizer = OwnSGD(model.parameters())
    with Monitor(model, optimizer, console=False) as monitor:
        assert monitor.optimizer is optimizer and monitor.watches(nn.Module(), optimizer)
        copied = copy.deepcopy(optimizer)
        saved = pickle.dumps(optimizer)
        assert b"nfi_monitor" not in saved
        for other in (copied, pickle.loads(saved)):
            for param in other.param_groups[0]["params"]:
                param.grad = torch.ones_like(param)
            before = other.param_groups[0]["params"][0].clone()
            assert other.step() == "stepped"
            assert not torch.equal(before, other.param_groups[0]["params"][0])
        assert monitor.step == 0


def test_an_error_in_the_step_is_the_users_own_and_what_step_returns_is_returned() -> None:
    class Failing(OwnSGD):
        def step(self) -> str:
            raise ZeroDivisionError("mine")

    model = mlp()
    failing, fine = Failing(model.parameters()), OwnSGD(model.parameters())
    with Monitor(model, failing, console=False), pytest.raises(ZeroDivisionError, match="mine"):
        failing.step()
    F.cross_entropy(model(batch()[0]), batch()[1]).backward()
    with Monitor(model, fine, console=False):
        assert fine.step() == "stepped"


def test_a_step_that_was_wrapped_again_is_left_alone() -> None:
    model = mlp()
    optimizer = OwnSGD(model.parameters())
    monitor = Monitor(model, optimizer, console=False)
    inner = optimizer.step
    optimizer.step = lambda: inner()  # type: ignore[method-assign]
    F.cross_entropy(model(batch()[0]), batch()[1]).backward()
    optimizer.step()
    assert monitor.step == 1
    monitor.close()
    assert optimizer.step() == "stepped"
    with Monitor(model, optimizer, console=False) as again:
        assert optimizer.step() == "stepped" and again.step == 1


def test_a_torch_optimizer_inside_is_preferred_and_of_several_the_heads() -> None:
    model = mlp()
    inner = torch.optim.Adam(model.parameters())

    class Engine(nn.Module):
        """As DeepSpeed's: a module with its own step."""

        def __init__(self) -> None:
            super().__init__()
            self.module, self.optimizer = model, inner

        def step(self) -> None: ...

    class HalfPrecision(OwnSGD):
        """As apex's: groups of its own, and the optimizer inside."""

        def __init__(self) -> None:
            super().__init__(model.parameters())
            self.optimizer = inner

    assert choose(Engine(), None) is inner
    assert choose(HalfPrecision(), None) is inner
    body, last = OwnSGD(model[:4].parameters()), OwnSGD(model[4].parameters())
    chosen = choose([body, last], find_head(model))
    assert isinstance(chosen, ForeignOptimizer) and chosen.original is last
    (one,) = watchable(Passing(body))
    assert isinstance(one, ForeignOptimizer)


@pytest.mark.parametrize("wrong", [None, 3, "adam", nn.Linear(2, 2), OwnSGD, object(), [], torch.zeros(2)])
def test_what_makes_no_steps_is_refused_before_the_first_step(wrong: Any) -> None:
    assert adapt(wrong) is None
    with pytest.raises(TypeError, match=r"Pass the optimizer whose step\(\) updates the model"):
        Monitor(mlp(), wrong, console=False)


def test_an_adapter_attaches_all_the_same_and_says_so(tmp_path: Path) -> None:
    class Dummy:
        """As accelerate's for DeepSpeed: it stands for an optimizer that is made later."""

    attachment = Attachment(console=False, run_dir=None, on_alert=Autopilot())
    monitor = attachment.open(mlp(), Dummy(), directory=tmp_path)
    assert {"no_optimizer", "no_autopilot"} <= {note.code for note in monitor.notes}
    attachment.close()
    attachment = Attachment(console=False, run_dir=None, on_alert=Autopilot())
    model = mlp()
    monitor = attachment.open(model, OwnSGD(model.parameters()), directory=tmp_path)
    assert {"optimizer_not_torch", "no_autopilot"} <= {note.code for note in monitor.notes}
    attachment.close()


def test_what_needs_a_torch_optimizer_says_so() -> None:
    model = mlp()
    optimizer = OwnSGD(model.parameters())
    with Monitor(model, optimizer, console=False, snapshots=1 << 20) as monitor:
        with pytest.raises(MonitorError, match=r"OwnSGD is no torch\.optim\.Optimizer"):
            monitor.take_snapshot()
        with pytest.raises(MonitorError, match=r"OwnSGD is no torch\.optim\.Optimizer"):
            monitor.replay(lambda step: None)
        with pytest.raises(TypeError, match=r"torch\.optim\.Optimizer is needed here, got OwnSGD"):
            Autopilot().attach(monitor)
