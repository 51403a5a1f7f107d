"""What is measured around a step of every optimizer of torch's, against computations of its own."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from nfi_monitor.capture.head import find_head
from nfi_monitor.capture.optimizer import OptimizerReader
from nfi_monitor.detect.situation import RunContext
from nfi_monitor.engine.run_info import read_context
from nfi_monitor.measure.memory import Memory
from nfi_monitor.measure.native_step import step_statistics
from tests.measure import reference as ref

pytestmark = pytest.mark.usefixtures("both_ways")

optim = torch.optim
Params = Any

# --- the stability limit --------------------------------------------------------------------------------


def spectral_radius(a: float, momentum: float, dampening: float, nesterov: bool) -> float:
    """Of the map (w, m) → (w, m) of one step on a quadratic of lr · curvature ``a``, where lr · m is kept."""
    kept = np.array([a * (1 - dampening), momentum])  # m' of (w, m)
    moved = momentum * kept + np.array([a * (1 - dampening), 0.0]) if nesterov else kept
    return float(np.abs(np.linalg.eigvals(np.array([np.array([1.0, 0.0]) - moved, kept]))).max())


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("dampening", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9, 0.99])
def test_the_limit_is_where_the_step_on_a_quadratic_stops_to_contract(momentum, dampening, nesterov):
    limit = RunContext(momentum=momentum, dampening=dampening, nesterov=nesterov).stability_limit
    assert spectral_radius(0.999 * limit, momentum, dampening, nesterov) < 1.0
    assert spectral_radius(1.001 * limit, momentum, dampening, nesterov) > 1.0


@pytest.mark.parametrize("beta1", [0.0, 0.5, 0.9])
def test_adams_limit_is_that_of_an_average(beta1):
    average = RunContext(momentum=beta1, dampening=beta1).stability_limit
    assert RunContext(beta1=beta1).stability_limit == pytest.approx(average, rel=1e-12)
    assert RunContext(beta1=beta1).stability_limit == pytest.approx(2 * (1 + beta1) / (1 - beta1), rel=1e-12)


NEARLY_1 = 1.0 - 1e-13
LARGE = 1_000_000.0
QUADRATIC: dict[str, tuple[Callable[[Params], Optimizer], dict[str, float]]] = {
    "sgd": (lambda p: optim.SGD(p, 0.1), {}),
    "heavy ball": (lambda p: optim.SGD(p, 0.1, momentum=0.9), {}),
    "dampened": (lambda p: optim.SGD(p, 0.1, momentum=0.9, dampening=0.5), {}),
    "nesterov": (lambda p: optim.SGD(p, 0.1, momentum=0.9, nesterov=True), {}),
    "dampening without momentum": (lambda p: optim.SGD(p, 0.1, dampening=0.5), {}),
    "asgd": (lambda p: optim.ASGD(p, 0.1, lambd=0.0), {"eta": 0.03}),
    "rmsprop": (lambda p: optim.RMSprop(p, 0.1, alpha=NEARLY_1), {"square_avg": 4.0}),
    "rmsprop with momentum": (
        lambda p: optim.RMSprop(p, 0.1, alpha=NEARLY_1, momentum=0.8), {"square_avg": 4.0},
    ),
    "centred rmsprop": (
        lambda p: optim.RMSprop(p, 0.1, alpha=NEARLY_1, centered=True), {"square_avg": 4.0, "grad_avg": 1.0},
    ),
    "adagrad": (lambda p: optim.Adagrad(p, 0.1, lr_decay=1e-6), {"sum": 9.0, "step": LARGE}),
    "adadelta": (
        lambda p: optim.Adadelta(p, 0.1, rho=NEARLY_1), {"square_avg": 4.0, "acc_delta": 0.25},
    ),
    "adam": (lambda p: optim.Adam(p, 0.1, betas=(0.9, NEARLY_1)), {"exp_avg_sq": 4e-7, "step": LARGE}),
    "adamax": (lambda p: optim.Adamax(p, 0.1, betas=(0.9, NEARLY_1)), {"exp_inf": 3.0, "step": LARGE}),
    "nadam": (
        lambda p: optim.NAdam(p, 0.1, betas=(0.9, NEARLY_1)),
        {"exp_avg_sq": 4e-7, "step": LARGE, "mu_product": 0.0},
    ),
}  # fmt: skip
"""Optimizer, and a state that its steps hardly change: then each is a linear map."""


def descend(name: str, curvature: float, steps: int = 300) -> tuple[float, RunContext, float]:
    """Return the measured curvature, the context, and the growth of the distance over half of the steps."""
    make, state = QUADRATIC[name]
    weight = nn.Parameter(torch.full((3,), 1e-60, dtype=torch.float64))
    optimizer = make([weight])
    weight.grad = torch.zeros_like(weight)
    optimizer.step()  # makes the state
    for entry, value in state.items():
        optimizer.state[weight][entry].fill_(value)
    reader, memory = OptimizerReader(optimizer, None), None
    distances = []
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        (0.5 * curvature * weight.square().sum()).backward()
        start = reader.before(step)
        optimizer.step()
        update = reader.after(start, step)
        values, memory = step_statistics(update, None, None, memory, step)
        distances.append(float(weight.detach().abs().max()))
    context = read_context(None, reader)
    late, early = (max(distances[place : place + 20]) for place in (steps - 20, steps // 2))
    return float(values["secant_curvature"]), context, late / early


@pytest.mark.parametrize("name", QUADRATIC)
def test_the_measured_curvature_crosses_the_limit_where_a_quadratic_diverges(name):
    found, context, _ = descend(name, 1.0, steps=3)
    steepest = context.stability_limit / found  # the curvature at which the limit is reached
    for share, diverges in ((0.97, False), (1.03, True)):
        found, context, growth = descend(name, share * steepest)
        assert found / context.stability_limit == pytest.approx(share, rel=1e-3)
        assert (growth > 1.0) == diverges, growth


# --- a small network ----------------------------------------------------------------------------------------


class Truth:
    """P of each optimizer from the gradients alone, with float64 arithmetic of its own."""

    def __init__(self) -> None:
        self.v = self.mean = self.sum = self.largest = self.moved = 0.0
        self.steps = 0

    def step(self, grad: np.ndarray, moved: np.ndarray) -> None:
        """``moved``: what the weights have moved by over the rate, as Adadelta remembers it."""
        self.steps += 1
        self.v = 0.9 * self.v + 0.1 * grad**2
        self.mean = 0.9 * self.mean + 0.1 * grad
        self.sum = self.sum + grad**2
        self.largest = np.maximum(0.9 * self.largest, np.abs(grad) + 1e-8)
        self.moved = 0.9 * self.moved + 0.1 * moved**2


EPS = 1e-6
OPTIMIZERS: dict[str, tuple[Callable[[Params], Optimizer], Callable[[Truth], Any]]] = {
    "sgd": (lambda p: optim.SGD(p, 1e-3), lambda t: 1.0),
    "nesterov": (lambda p: optim.SGD(p, 1e-3, momentum=0.9, nesterov=True), lambda t: 1.0),
    "asgd": (lambda p: optim.ASGD(p, 1e-3), lambda t: 1.0),
    "rmsprop": (lambda p: optim.RMSprop(p, 1e-3, alpha=0.9, eps=EPS), lambda t: np.sqrt(t.v) + EPS),
    "centred": (
        lambda p: optim.RMSprop(p, 1e-3, alpha=0.9, eps=EPS, centered=True, momentum=0.5),
        lambda t: np.sqrt(t.v - t.mean**2) + EPS,
    ),
    "adagrad": (
        lambda p: optim.Adagrad(p, 1e-3, lr_decay=0.1, eps=EPS),
        lambda t: (np.sqrt(t.sum) + EPS) * (1 + 0.1 * (t.steps - 1)),
    ),
    "adadelta": (
        lambda p: optim.Adadelta(p, 1e-3, rho=0.9, eps=EPS), lambda t: np.sqrt((t.v + EPS) / (t.moved + EPS)),
    ),
    "adamax": (
        lambda p: optim.Adamax(p, 1e-3, betas=(0.8, 0.9)), lambda t: t.largest * (1 - 0.8**t.steps),
    ),
}  # fmt: skip
"""Optimizer and its P. The gradients are those of a network in float64."""
WITHOUT_METRIC = {
    "rprop": lambda p: optim.Rprop(p, 1e-3),
    "adafactor": lambda p: optim.Adafactor(p, 1e-3),
}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(6, 9).double(), nn.Linear(9, 4).double()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.body(x))
        return self.head(h), h


def flat(tensors: Any) -> np.ndarray:
    return np.concatenate([tensor.detach().double().flatten().numpy() for tensor in tensors])


class Trained:
    """A few steps on the same rows, with all that a computation of its own needs."""

    def __init__(self, make: Callable[[Params], Optimizer]) -> None:
        torch.manual_seed(3)
        self.model = Net()
        self.x, self.y = torch.randn(12, 6).double(), torch.randint(4, (12,))
        self.optimizer = make(self.model.parameters())
        self.reader = OptimizerReader(self.optimizer, find_head(self.model, "head"))
        self.memory: Memory | None = None

    def loss(self, *params: Tensor) -> Tensor:
        names = [name for name, _ in self.model.named_parameters()]
        logits, _ = torch.func.functional_call(self.model, dict(zip(names, params, strict=True)), self.x)
        return F.cross_entropy(logits, self.y)

    def step(self, number: int) -> dict[str, float]:
        logits, features = self.model(self.x)
        self.optimizer.zero_grad()
        F.cross_entropy(logits, self.y).backward()
        self.before = flat(self.model.parameters())
        self.params = [param.detach().clone() for param in self.model.parameters()]
        self.grad = flat(param.grad for param in self.model.parameters())
        self.features = features.detach()
        start = self.reader.before(number)
        self.optimizer.step()
        update = self.reader.after(start, number)
        assert update is not None
        values, self.memory = step_statistics(
            update, self.features, self.features.mean(0), self.memory, number
        )
        self.after = flat(self.model.parameters())
        return {name: float(value) for name, value in values.items()}

    def curved(self, before: list[Tensor], step: np.ndarray) -> float:
        """Return sᵀHs along a step, by products with the exact Hessian at both ends and in the middle."""
        parts = torch.from_numpy(step).split([param.numel() for param in before])
        along = [part.view_as(param) for part, param in zip(parts, before, strict=True)]
        found = []
        for share in (0.0, 0.5, 1.0):
            at = tuple(param + share * part for param, part in zip(before, along, strict=True))
            _, product = torch.autograd.functional.hvp(self.loss, at, tuple(along))
            found.append(float(step @ flat(product)))
        return (found[0] + 4 * found[1] + found[2]) / 6  # Simpson's rule


@pytest.mark.parametrize("name", [*OPTIMIZERS, *WITHOUT_METRIC])
def test_two_steps_of_every_optimizer_show_alignment_rows_swing_and_curvature(name):
    make, metric = OPTIMIZERS.get(name) or (WITHOUT_METRIC[name], None)
    run, truth, last = Trained(make), Truth(), None
    for number in range(1, 6):
        found = run.step(number)
        moved = run.after - run.before
        assert found["update_rms"] == pytest.approx(np.sqrt(np.mean(moved**2)), rel=1e-9)
        if last is not None:
            grad, params, before, divided_by, features = last
            step = run.before - before
            size = np.linalg.norm(grad) * np.linalg.norm(run.grad)
            assert found["gradient_alignment"] == pytest.approx(run.grad @ grad / size, rel=1e-9)
            assert found["row_match"] == pytest.approx(
                ref.row_match(run.features.numpy(), features.numpy()), rel=1e-9
            )
            logits = run.model.head.weight.detach() @ (run.features.mean(0) - features.mean(0))
            swing = float((logits - logits.mean()).abs().max())
            assert found["feature_displacement"] == pytest.approx(swing, rel=1e-6)
            if metric is None:
                assert "secant_curvature" not in found
            else:
                exact = 1e-3 * run.curved(params, step) / (step @ (divided_by * step))
                assert found["secant_curvature"] == pytest.approx(exact, rel=1e-4)
        truth.step(run.grad, moved / 1e-3)
        divided_by = None if metric is None else metric(truth)
        last = run.grad, run.params, run.before, divided_by, run.features


def test_rmsprops_average_is_a_second_moment_that_needs_no_correction():
    run, truth = Trained(lambda p: optim.RMSprop(p, 1e-3, alpha=0.9, eps=EPS)), Truth()
    for number in range(1, 4):
        found = run.step(number)
        truth.step(run.grad, run.grad)
    root, head = np.sqrt(truth.v), slice(63, 99)
    assert found["sqrt_exp_avg_sq_mean"] == pytest.approx(root.mean(), rel=1e-9)
    assert found["head_sqrt_exp_avg_sq_mean"] == pytest.approx(root[head].mean(), rel=1e-9)
    ratio = run.grad[head] / np.maximum(root[head], EPS)
    assert found["rms_t_head"] == pytest.approx(math.sqrt(np.mean(ratio**2)), rel=1e-9)
    assert run.reader.has_second_moment() is True and run.reader.betas_or_assumed()[1] == 0.9


@pytest.mark.parametrize("kind", ["adadelta", "adagrad", "adamax", "sgd"])
def test_other_averages_are_no_second_moment(kind):
    run = Trained(OPTIMIZERS[kind][0])
    found = run.step(1)
    assert run.reader.has_second_moment() is False
    assert not [name for name in found if "exp_avg_sq" in name or "rms_t" in name]


def test_groups_with_their_own_rates_and_settings_are_each_read_with_theirs():
    def make(params: Params) -> Optimizer:
        body, bias, *head = params
        return optim.Adagrad(
            [
                {"params": [body, bias], "lr": 2e-3, "eps": 1e-2},
                {"params": head, "lr": 1e-3, "lr_decay": 0.5},
            ]
        )

    run = Trained(make)
    split, last, total = 63, None, 0.0
    for number in range(1, 4):
        found = run.step(number)
        if last is not None:
            grad, before, divided_by = last
            step, change = run.before - before, run.grad - grad
            assert found["secant_curvature"] == pytest.approx(step @ change / (step @ (divided_by * step)))
        total = total + run.grad**2
        body = (np.sqrt(total[:split]) + 1e-2) / 2e-3
        head = (np.sqrt(total[split:]) + 1e-10) * (1 + 0.5 * (number - 1)) / 1e-3
        last = run.grad, run.before, np.concatenate([body, head])


@pytest.mark.parametrize("switched", ["off", "on", "by group"])
def test_amsgrad_divides_by_what_its_group_says_at_this_step(switched):
    """The maximum stays in the state, as it was, when amsgrad is switched off."""

    def make(params: Params) -> Optimizer:
        body, bias, *head = params
        groups = [{"params": [body, bias]}, {"params": head}]
        return optim.Adam(groups, 1e-2, betas=(0.9, 0.99), amsgrad=switched != "on")

    run = Trained(make)
    for number in range(1, 7):
        if number == 4:
            for group in run.optimizer.param_groups[1 if switched == "by group" else 0 :]:
                group["amsgrad"] = switched == "on"
            for state in run.optimizer.state.values():
                state["max_exp_avg_sq"] = 9 * state["exp_avg_sq"]
        found = run.step(number)
    names = ["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq" for group in run.optimizer.param_groups]
    states = [*run.optimizer.state.values()]
    divided = [
        state[name] / (1 - 0.99**6) for state, name in zip(states, sorted(names * 2)[::-1], strict=True)
    ]
    root = np.sqrt(flat(divided))
    assert found["sqrt_exp_avg_sq_mean"] == pytest.approx(root.mean(), rel=1e-9)
    ratio = run.grad[63:99] / np.maximum(root[63:99], 1e-8)
    assert found["rms_t_head"] == pytest.approx(math.sqrt(np.mean(ratio**2)), rel=1e-9)


def test_a_saved_step_without_a_metric_is_compared_with_the_next():
    run = Trained(WITHOUT_METRIC["rprop"])
    run.step(1)
    assert run.memory is not None
    run.memory = Memory.from_state(run.memory.state_dict(), torch.device("cpu"))
    assert "gradient_alignment" in run.step(2)


@pytest.mark.parametrize(
    ("make", "limit"),
    [
        (lambda p: optim.SGD(p, 0.1), 2.0),
        (lambda p: optim.SGD(p, 0.1, momentum=0.9), 3.8),
        (lambda p: optim.SGD(p, 0.1, momentum=0.5, nesterov=True), 1.5),
        (lambda p: optim.RMSprop(p, 0.1), 2.0),
        (lambda p: optim.RMSprop(p, 0.1, momentum=0.9), 3.8),
        (lambda p: optim.Adagrad(p, 0.1), 2.0),
        (lambda p: optim.Adadelta(p, 0.1), 2.0),
        (lambda p: optim.ASGD(p, 0.1), 2.0),
        (lambda p: optim.Adam(p, 0.1), 38.0),
        (lambda p: optim.Adamax(p, 0.1), 38.0),
        (lambda p: optim.NAdam(p, 0.1), 38.0 / 2.8),
    ],
)
def test_the_detector_is_told_the_limit_of_the_optimizer(make, limit):
    reader = OptimizerReader(make(Net().parameters()), None)
    assert read_context(None, reader).stability_limit == pytest.approx(limit)
