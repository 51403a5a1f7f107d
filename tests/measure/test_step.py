"""All quantities of one real optimizer step, against the formulas in float64."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from nfi_monitor.capture.head import find_head
from nfi_monitor.capture.optimizer import OptimizerReader
from nfi_monitor.measure.memory import Memory
from nfi_monitor.measure.native_step import step_statistics
from nfi_monitor.measure.step import with_non_finite
from nfi_monitor.quantities import QUANTITIES
from tests.measure import reference as ref

pytestmark = pytest.mark.usefixtures("both_ways")

SLOW = settings(deadline=None, derandomize=True, max_examples=12)


class Net(nn.Module):
    def __init__(self, width: int, classes: int, bias: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.body = nn.Linear(6, width, dtype=dtype)
        self.head = nn.Linear(width, classes, bias=bias, dtype=dtype)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.relu(self.body(x))
        return self.head(h), h


class Run:
    """Train a few steps with the reader around each; keep what is needed to compute the truth."""

    def __init__(self, model: Net, optimizer: torch.optim.Optimizer, seed: int) -> None:
        self.model, self.optimizer = model, optimizer
        self.reader = OptimizerReader(optimizer, find_head(model, "head"))
        self.generator = torch.Generator().manual_seed(seed)
        self.memory, self.taken = None, 0

    def step(self) -> dict[str, float]:
        self.taken += 1
        dtype = self.model.head.weight.dtype
        x = torch.randn(12, 6, generator=self.generator).to(dtype)
        classes = self.model.head.out_features
        y = torch.randint(classes, (12,), generator=self.generator)
        logits, h = self.model(x)
        self.optimizer.zero_grad()
        F.cross_entropy(logits, y).backward()
        self.h = h.detach()
        self.grads = [p.grad.detach().clone() for p in self.model.parameters()]
        self.before = [p.detach().clone() for p in self.model.parameters()]
        start = self.reader.before(self.taken)
        self.optimizer.step()
        update = self.reader.after(start, self.taken)
        self.after = [p.detach().clone() for p in self.model.parameters()]
        values, self.memory = step_statistics(update, self.h, self.h.mean(0), self.memory, self.taken)
        return {name: float(value) for name, value in values.items()}


def flat(tensors: list[Tensor]) -> np.ndarray:
    return np.concatenate([t.double().flatten().numpy() for t in tensors])


def names(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters()]


def check_against_formulas(run: Run, steps: int, betas: tuple[float, float], eps: float, lr: float) -> None:
    truth = ref.Adam64(lr, betas, eps, 0.0)
    last = None
    for _ in range(steps):
        found = run.step()
        before, after, grad = flat(run.before), flat(run.after), flat(run.grads)
        truth.step(before, grad)
        root = truth.root()
        position = names(run.model).index("head.weight")
        edges = np.cumsum([0] + [t.numel() for t in run.grads])
        parts = [slice(a, b) for a, b in itertools.pairwise(edges)]
        rms = [math.sqrt(np.mean(grad[p] ** 2 / np.maximum(root[p], eps) ** 2)) for p in parts]
        head = parts[position]
        weight_update = run.after[position].double() - run.before[position].double()
        bias_update = None
        if run.model.head.bias is not None:
            where = names(run.model).index("head.bias")
            bias_update = run.after[where].double() - run.before[where].double()
        largest, displacement_rms = ref.logit_displacement(weight_update, bias_update, run.h)
        weight, features = run.after[position].double().numpy(), run.h.double().numpy()
        w_mean, h_mean = weight.mean(0), features.mean(0)
        weight_grad = run.grads[position].double().numpy()
        expected = {
            "gradient_norm": np.linalg.norm(grad),
            "update_rms": np.sqrt(np.mean((after - before) ** 2)),
            "weight_norm": np.linalg.norm(after),
            "relative_update": max(
                np.linalg.norm((after - before)[p]) / np.linalg.norm(after[p])
                for p, tensor in zip(parts, run.after, strict=True)
                if tensor.ndim > 1
            ),
            "predicted_reduction": -grad @ (after - before),
            "rms_t_max": max(rms),
            "rms_t_head": rms[position],
            "sqrt_exp_avg_sq_median": ref.lower_median(root.tolist()),
            "sqrt_exp_avg_sq_mean": root.mean(),
            "head_sqrt_exp_avg_sq_median": ref.lower_median(root[head].tolist()),
            "head_sqrt_exp_avg_sq_mean": root[head].mean(),
            "effective_learning_rate": lr / (ref.lower_median(root[head].tolist()) + eps),
            "logit_displacement": largest,
            "logit_displacement_rms": displacement_rms,
            "head_weight_norm": np.linalg.norm(weight),
            "classifier_mean_norm": np.linalg.norm(w_mean),
            "feature_mean_norm": np.linalg.norm(h_mean),
            "mean_alignment": w_mean @ h_mean / np.linalg.norm(w_mean) / np.linalg.norm(h_mean),
            "zero_sum_violation_weight": np.abs(weight_grad.sum(0)).sum() / np.abs(weight_grad).sum(),
        }
        if bias_update is not None:
            bias_grad = run.grads[where].double().numpy()
            expected["zero_sum_violation_bias"] = abs(bias_grad.sum()) / np.abs(bias_grad).sum()
        if last is not None:
            s, y, preconditioner = before - last[0], grad - last[1], last[2]
            expected["secant_curvature"] = lr * (s @ y) / (s @ (preconditioner * s))
            expected["gradient_alignment"] = (
                grad @ last[1] / max(np.linalg.norm(grad) * np.linalg.norm(last[1]), 1e-37)
            )
            logits = weight @ (h_mean - last[3])
            expected["feature_displacement"] = np.abs(logits - logits.mean()).max()
            if len(features) > 1:
                expected["row_match"] = ref.row_match(features, last[4])
        last = (before, grad, root + eps, h_mean, features)
        assert set(found) == set(expected)
        assert set(found) <= set(QUANTITIES)
        unit = ref.UNIT[run.h.dtype]
        weights = np.abs(after).max()
        for name, value in expected.items():
            # Differences of weights carry an ulp of the weights, violations an ulp of 1.
            absolute = 16 * unit
            if name in (
                "update_rms", "relative_update", "logit_displacement", "logit_displacement_rms",
                "feature_displacement",
            ):  # fmt: skip
                absolute = 4 * unit * weights * (1 + np.abs(features).sum(1).max())
            if name == "predicted_reduction":  # the update carries an ulp of the weights
                absolute = 4 * unit * (np.abs(grad) @ np.abs(before))
            if name == "secant_curvature":
                # Gradients carry an ulp of themselves, the step one of the weights.
                size = abs(s) @ (abs(grad) + abs(grad - y)) + abs(before) @ abs(y)
                size += abs(value) / lr * (abs(before) @ (preconditioner * abs(s)))
                absolute = 8 * unit * lr * size / (s @ (preconditioner * s))
            # float32 coordinates of sqrt(v̂): β2^t and the square root; 1 − β2 itself is off by 2⁻²⁴/(1 − β2).
            from_second_moment = "exp_avg" in name or "effective" in name
            relative = unit * (2e4 if from_second_moment else 256)
            assert found[name] == pytest.approx(value, rel=relative, abs=absolute), name


@SLOW
@given(
    seed=st.integers(0, 2**32 - 1),
    classes=st.sampled_from([2, 3, 11]),
    bias=st.booleans(),
    betas=st.sampled_from([(0.9, 0.95), (0.9, 0.999)]),
    decay=st.sampled_from([0.0, 0.1]),
    implementation=st.sampled_from(["foreach", "fused", "plain"]),
)
def test_every_quantity_of_a_real_adamw_step_equals_its_formula(
    seed, classes, bias, betas, decay, implementation
):
    torch.manual_seed(seed)
    model = Net(7, classes, bias, torch.float32)
    switches = {"foreach": implementation == "foreach", "fused": implementation == "fused"}
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-2, betas=betas, eps=1e-8, weight_decay=decay, **switches
    )
    check_against_formulas(Run(model, optimizer, seed), 3, betas, 1e-8, 1e-2)


def test_every_quantity_of_a_float64_model_equals_its_formula():
    model = Net(7, 5, True, torch.float64)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    check_against_formulas(Run(model, optimizer, 0), 3, (0.9, 0.999), 1e-8, 1e-2)


def test_quantities_of_a_float64_model_that_is_sampled():
    """Sampling weights are float32, the coordinates float64."""
    model = Net(7000, 5, True, torch.float64)
    run = Run(model, torch.optim.Adam(model.parameters(), lr=1e-2), 0)
    found = run.step()
    assert found["weight_norm"] == pytest.approx(np.linalg.norm(flat(run.after)), rel=0.05)


def test_a_sampled_float32_model_is_estimated_within_a_few_percent():
    model = Net(7000, 5, True, torch.float32)
    run = Run(model, torch.optim.Adam(model.parameters(), lr=1e-2), 0)
    run.step()
    found = run.step()
    assert found["weight_norm"] == pytest.approx(np.linalg.norm(flat(run.after)), rel=0.05)
    moved = flat(run.after) - flat(run.before)
    assert found["update_rms"] == pytest.approx(math.sqrt(np.mean(moved**2)), rel=0.05)
    assert found["gradient_norm"] == pytest.approx(np.linalg.norm(flat(run.grads)), rel=0.05)


def test_groups_with_their_own_beta2_and_eps_are_each_read_with_theirs():
    torch.manual_seed(0)
    model = Net(7, 5, True, torch.float32)
    groups = [
        {"params": model.body.parameters(), "betas": (0.9, 0.9), "eps": 1e-3},
        {"params": model.head.parameters(), "betas": (0.9, 0.999), "eps": 1e-8, "lr": 3e-3},
    ]
    run = Run(model, torch.optim.AdamW(groups, lr=1e-2), 0)
    body, head = ref.Adam64(1e-2, (0.9, 0.9), 1e-3, 0), ref.Adam64(3e-3, (0.9, 0.999), 1e-8, 0)
    for _ in range(2):
        found = run.step()
        body.step(flat(run.before[:2]), flat(run.grads[:2]))
        head.step(flat(run.before[2:]), flat(run.grads[2:]))
    root = head.root()[: model.head.weight.numel()]
    assert found["head_sqrt_exp_avg_sq_mean"] == pytest.approx(root.mean(), rel=1e-4)
    assert found["effective_learning_rate"] == pytest.approx(
        3e-3 / (ref.lower_median(root.tolist()) + 1e-8), rel=1e-4
    )
    both = np.concatenate([body.root(), head.root()])
    assert found["sqrt_exp_avg_sq_mean"] == pytest.approx(both.mean(), rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_groups_with_their_own_rate_each_count_with_theirs_in_the_curvature(dtype):
    torch.manual_seed(0)
    model = Net(7, 5, True, dtype)
    rates = (1e-4, 1e-2)
    groups = [
        {"params": part.parameters(), "lr": lr}
        for part, lr in zip((model.body, model.head), rates, strict=True)
    ]
    run = Run(model, torch.optim.AdamW(groups), 0)
    lr = np.repeat(rates, [sum(p.numel() for p in part.parameters()) for part in (model.body, model.head)])
    truth, last = ref.Adam64(0.0, (0.9, 0.999), 1e-8, 0.0), None
    for _ in range(3):
        found = run.step()
        before, grad = flat(run.before), flat(run.grads)
        truth.step(before, grad)
        if last is not None:
            s, y = before - last[0], grad - last[1]
            expected = (s @ y) / (s @ (last[2] / lr * s))
            assert found["secant_curvature"] == pytest.approx(
                expected, rel=2e-3 if dtype is torch.float32 else 1e-6
            )
            assert found["effective_learning_rate"] == pytest.approx(
                rates[1] / (ref.lower_median(truth.root()[-40:-5].tolist()) + 1e-8), rel=1e-3
            )
        last = (before, grad, truth.root() + 1e-8)


def test_groups_that_have_one_rate_are_read_as_one_group():
    readings = []
    for several in (False, True):
        torch.manual_seed(0)
        model = Net(7, 5, True, torch.float32)
        parts = [list(model.body.parameters()), list(model.head.parameters())]
        groups = [{"params": part} for part in parts] if several else parts[0] + parts[1]
        run = Run(model, torch.optim.AdamW(groups, lr=1e-2), 0)
        readings.append([run.step() for _ in range(3)])
    assert repr(readings[0]) == repr(readings[1])


def test_layers_of_one_size_that_take_turns_are_not_compared_with_each_other():
    torch.manual_seed(0)
    layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
    optimizer = torch.optim.Adam(layers.parameters(), lr=1e-2)
    reader, memory, compared = OptimizerReader(optimizer, None), None, []
    for step, turn in enumerate([0, 0, 1, 0, 0, 1, 1], 1):
        optimizer.zero_grad()
        layers[turn](torch.randn(4, 8)).square().mean().backward()
        start = reader.before(step)
        optimizer.step()
        if memory is not None and step % 2:  # a resume changes nothing of it
            memory = Memory.from_state(json.loads(json.dumps(memory.state_dict())), torch.device("cpu"))
        values, memory = step_statistics(reader.after(start, step), None, None, memory, step)
        if "secant_curvature" in values:
            assert "gradient_alignment" in values
            compared.append(step)
    assert compared == [2, 5, 7]


def test_a_step_that_an_earlier_version_saved_is_compared_with_the_next():
    model = Net(7, 5, True, torch.float32)
    run = Run(model, torch.optim.Adam(model.parameters()), 0)
    run.step()
    state = run.memory.state_dict()
    del state["layout"]
    run.memory = Memory.from_state(state, torch.device("cpu"))
    assert "secant_curvature" in run.step()


def test_an_optimizer_without_a_second_moment_shows_the_rest():
    model = Net(7, 5, True, torch.float32)
    run = Run(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), 0)
    run.step()
    found = run.step()
    assert not [name for name in found if "exp_avg_sq" in name or "rms_t" in name]
    assert {"logit_displacement", "weight_norm", "zero_sum_violation_weight", "secant_curvature"} <= set(
        found
    )


def test_the_curvature_needs_two_steps_in_a_row():
    model = Net(7, 5, True, torch.float32)
    run = Run(model, torch.optim.Adam(model.parameters(), lr=1e-2), 0)
    assert "secant_curvature" not in run.step()
    run.taken += 1  # a step that was not measured
    assert "secant_curvature" not in run.step()
    assert "secant_curvature" in run.step()


@pytest.mark.parametrize("kind", ["channels_last", "transposed"])
def test_parameters_that_are_not_contiguous_are_read_anew_each_step(kind):
    torch.manual_seed(0)
    if kind == "channels_last":
        module = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        x = torch.randn(2, 3, 5, 5)
    else:
        module = nn.Linear(3, 4)
        module.weight = nn.Parameter(torch.randn(3, 4).T)
        x = torch.randn(2, 3)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    reader = OptimizerReader(optimizer, None)
    for step in range(1, 4):
        optimizer.zero_grad()
        module(x).square().mean().backward()
        before = flat([p.detach() for p in module.parameters()])
        start = reader.before(step)
        optimizer.step()
        update = reader.after(start, step)
        np.testing.assert_array_equal(update.before.numpy(), before)
        np.testing.assert_array_equal(update.after.numpy(), flat([p.detach() for p in module.parameters()]))
        moments = [optimizer.state[p]["exp_avg_sq"] for p in module.parameters()]
        np.testing.assert_array_equal(update.exp_avg_sq.numpy(), flat(moments))


def test_a_gradient_that_is_not_finite_shows_in_its_norm():
    for poison in (math.nan, math.inf):
        model = Net(7, 5, True, torch.float32)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        run = Run(model, optimizer, 0)
        run.step()
        F.cross_entropy(model(torch.randn(3, 6))[0], torch.tensor([0, 1, 2])).backward()
        model.head.weight.grad[0, 0] = poison
        start = run.reader.before(2)
        optimizer.step()
        values, _ = step_statistics(run.reader.after(start, 2), None, None, run.memory, 2)
        assert not math.isfinite(values["gradient_norm"])


@pytest.mark.parametrize("norm", [0.0, 1.5, math.inf, math.nan])
def test_non_finite_gradients_are_those_whose_norm_is_not_finite(norm: float) -> None:
    grad = np.array([norm, 1.0])
    found = with_non_finite({"gradient_norm": float(np.sqrt((grad**2).sum()))})
    assert found["non_finite_gradients"] == float(not np.isfinite(grad).all())
    assert "non_finite_gradients" not in with_non_finite({"loss": norm})
