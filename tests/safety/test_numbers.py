"""Whatever numbers a training is made of, nothing is raised and no reading leaves its documented range.

NaN is in it only for the reasons that the catalogue gives, at steps whose own numbers give them.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from nfi_monitor import Monitor
from nfi_monitor.capture.sampling import row_stride
from nfi_monitor.quantities import QUANTITIES, Undefined
from tests.safety.table import Shown

DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
POISONS = (math.nan, math.inf, -math.inf, 1e-45, -1e-40, 6e-8, 65_504.0, 1e30, 3e38, -3e38, 0.0)
LOSSES = (
    "mean",
    "sum",
    "float",
    "smoothed",
    "soft",
    "squared",
    "binary",
    "z",
    "nothing",
    "negative",
    "one row",
)
OPTIMIZERS = ("AdamW", "fused", "amsgrad", "SGD", "RMSprop", "Adafactor")


@dataclass(frozen=True)
class Case:
    """One small training."""

    seed: int
    shape: str  # of the module
    classes: int
    dtype: str
    autocast: bool
    rows: tuple[tuple[int, ...], ...]  # of the micro-batches of each step
    weights: float  # the head's, times this
    inputs: float
    poisoned: tuple[tuple[str, int, float], ...]  # where, at which step, with what
    ignored: float  # share of targets that are −100
    loss: str
    optimizer: str
    lr: float
    eps: float
    told: str  # what observe_loss is given
    frozen: bool
    probe: bool


def magnitudes() -> st.SearchStrategy[float]:
    return st.one_of(st.sampled_from((1.0, 0.0, 30.0, 1e-38, 1e-20, 1e4, 1e20, 1e37)), st.floats(1e-3, 1e3))


cases = st.builds(
    Case,
    seed=st.integers(0, 2**31),
    shape=st.sampled_from(("linear", "no bias", "deep", "tokens", "normed", "shared")),
    classes=st.one_of(st.integers(1, 12), st.sampled_from((1, 2, 3, 30, 64, 257, 1000, 50_000))),
    dtype=st.sampled_from(tuple(DTYPES)),
    autocast=st.booleans(),
    rows=st.lists(
        st.lists(st.sampled_from((0, 1, 2, 3, 5, 9)), min_size=1, max_size=2).map(tuple),
        min_size=1,
        max_size=3,
    ).map(tuple),
    weights=magnitudes(),
    inputs=magnitudes(),
    poisoned=st.lists(
        st.tuples(
            st.sampled_from(("inputs", "weight", "gradient", "moment", "all gradients")),
            st.integers(0, 1),
            st.sampled_from(POISONS),
        ),
        max_size=2,
    ).map(tuple),
    ignored=st.sampled_from((0.0, 0.0, 0.5, 1.0)),
    loss=st.sampled_from(LOSSES),
    optimizer=st.sampled_from(OPTIMIZERS),
    lr=st.sampled_from((1e-3, 0.0, 1.0, 1e4, 1e-30)),
    eps=st.sampled_from((1e-8, 0.0, 1e-30, 1.0)),
    told=st.sampled_from(("tensor", "nothing", "number", "nan", "inf", "vector")),
    frozen=st.booleans(),
    probe=st.booleans(),
)


class Tokens(nn.Module):
    """[B, d] → [B, 2, K]: two rows of each input."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(6, 6), nn.Linear(6, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.stack([x, self.body(x)], 1))


def model_of(case: Case) -> nn.Module:
    modules: dict[str, nn.Module] = {
        "linear": nn.Sequential(nn.Linear(6, case.classes)),
        "no bias": nn.Sequential(nn.Linear(6, case.classes, bias=False)),
        "deep": nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, case.classes)),
        "tokens": Tokens(case.classes),
        "normed": nn.Sequential(nn.LayerNorm(6), nn.Linear(6, case.classes)),
        "shared": nn.Sequential(*[nn.Linear(6, 6)] * 2, nn.Linear(6, case.classes)),
    }
    model = modules[case.shape].to(DTYPES[case.dtype])
    with torch.no_grad():
        list(model.modules())[-1].weight.mul_(case.weights)
    return model


def optimizer_of(case: Case, model: nn.Module) -> torch.optim.Optimizer:
    parameters = [p for p in model.parameters() if p.requires_grad]
    if case.optimizer == "SGD":
        return torch.optim.SGD(parameters, lr=case.lr, momentum=0.9)
    if case.optimizer == "RMSprop":
        return torch.optim.RMSprop(parameters, lr=case.lr, eps=case.eps)
    if case.optimizer == "Adafactor":
        return torch.optim.Adafactor(parameters, lr=case.lr)
    options = {"fused": {"fused": True}, "amsgrad": {"amsgrad": True}}.get(case.optimizer, {})
    return torch.optim.AdamW(parameters, lr=case.lr, eps=case.eps, betas=(0.9, 0.95), **options)


def loss_of(case: Case, logits: Tensor) -> Tensor:
    """Of logits [N, K]."""
    targets = torch.randint(0, case.classes, logits.shape[:1])
    targets[torch.rand(len(targets)) < case.ignored] = -100
    soft = torch.rand(logits.shape).to(logits.dtype)
    if case.loss == "soft":
        return F.cross_entropy(logits, soft)
    if case.loss == "squared":
        return F.mse_loss(logits, soft)
    if case.loss == "binary":
        return F.binary_cross_entropy_with_logits(logits, soft)
    if case.loss == "nothing":
        return logits.sum() * 0.0
    if case.loss == "one row":
        return F.cross_entropy(logits[:1], targets[:1])
    if case.loss == "float":
        logits = logits.float()
    reduction = "sum" if case.loss == "sum" else "mean"
    loss = F.cross_entropy(
        logits, targets, reduction=reduction, label_smoothing=0.1 * (case.loss == "smoothed")
    )
    if case.loss == "z":
        return loss + logits.logsumexp(-1).square().mean()
    return -loss if case.loss == "negative" else loss


def poison(case: Case, where: str, step: int, model: nn.Module, tensor: Any) -> None:
    """Put the case's bad numbers into ``tensor`` (a tensor or a list of them), the first entry of each."""
    for place, at, number in case.poisoned:
        if place == where and at == step:
            for one in tensor if isinstance(tensor, list) else [tensor]:
                if one is not None and one.numel():
                    with torch.no_grad():
                        one.view(-1)[0] = number


LARGE, TINY = 1e12, 1e-15
"""Beyond these a product of a few numbers, or a square, may be Inf or 0 in float32."""
OF_TWO_STEPS = (
    "secant_curvature", "gradient_alignment", "feature_displacement", "margin_displacement", "row_match",
)  # fmt: skip


def largest(tensor: Tensor) -> float:
    """Not compared as it is: in float16 the bounds above are Inf and 0."""
    return float(tensor.detach().abs().max()) if tensor.numel() else 0.0


class Excuses:
    """Why a NaN may stand at a step, told from the training's own numbers."""

    def __init__(self) -> None:
        self._steps: list[set[Undefined]] = []
        self._losses: list[bool] = []
        self._begin()

    def _begin(self) -> None:
        self._steps.append(set())
        self._losses.append(False)
        self._features: list[Tensor] = []
        self._gradients: list[Tensor] = []  # of the logits
        self._before: list[Tensor] = []

    def _read(self, tensors: Iterable[Tensor | None]) -> None:
        for tensor in tensors:
            if tensor is not None and not largest(tensor) <= LARGE:  # NaN neither
                self._steps[-1].add(Undefined.INPUT)

    def forward(self, features: Tensor, logits: Tensor) -> None:
        self._read([features, logits])
        if not logits.requires_grad:  # the probe batch
            return
        self._features.append(features.detach().reshape(-1, features.shape[-1]))
        logits.register_hook(self._gradients.append)

    def loss(self, told: Any) -> None:
        self._losses[-1] |= not largest(torch.as_tensor(told)) <= LARGE

    def before(self, model: nn.Module) -> None:
        """The optimizer's step."""
        parameters = list(model.parameters())
        self._read([*parameters, *(parameter.grad for parameter in parameters), *self._gradients])
        live = torch.cat([gradient.reshape(-1, gradient.shape[-1]).any(-1) for gradient in self._gradients])
        # The rows of wide heads are sampled: the sample may hold none that is live.
        sampled = any(
            row_stride(part.numel() // part.shape[-1], part.shape[-1]) > 1 for part in self._gradients
        )
        if not live.any() or (sampled and not live.all()):
            self._steps[-1].add(Undefined.NO_ROWS)
        rows = torch.cat(self._features).double()
        # Rows that underflowed count, too: the mean is one of the two, or of something between.
        means = torch.stack([*rows, rows.mean(0), rows[live].mean(0)])
        # Where all rows are alike, there is no correlation over the rows.
        rounding = 8 * torch.finfo(self._features[0].dtype).eps * largest(rows)
        alike = largest(rows - rows.mean(0)) <= max(TINY, rounding)
        if alike or (means.norm(dim=-1) < TINY).any():
            self._steps[-1].add(Undefined.NO_DIRECTION)
        self._before = [parameter.detach().clone() for parameter in parameters]

    def after(self, model: nn.Module, head: nn.Linear, optimizer: torch.optim.Optimizer) -> None:
        parameters = [parameter.detach() for parameter in model.parameters()]
        state = [value for state in optimizer.state.values() for value in state.values()]
        self._read([*parameters, *(value for value in state if isinstance(value, Tensor))])
        if head.weight.detach().double().mean(0).norm() < TINY:
            self._steps[-1].add(Undefined.NO_DIRECTION)
        if not any(largest(a - b) >= TINY for a, b in zip(parameters, self._before, strict=True)):
            self._steps[-1].add(Undefined.STILL)
        self._begin()

    def of(self, name: str, step: int) -> set[Undefined]:
        """Steps count from 1."""
        if name == "loss":
            return {Undefined.INPUT} if self._losses[step - 1] else set()
        found = self._steps[step - 1]
        return found | self._steps[step - 2] if name in OF_TWO_STEPS and step > 1 else found


def train(case: Case, monitored: bool) -> tuple[Monitor | None, Excuses]:
    torch.manual_seed(case.seed)
    model = model_of(case)
    head = list(model.modules())[-1]
    if case.frozen and case.shape in ("deep", "tokens", "shared"):
        for parameter in head.parameters():
            parameter.requires_grad_(False)
    optimizer = optimizer_of(case, model)
    dtype = DTYPES[case.dtype]
    monitor = None
    if monitored:
        probe = (torch.randn(2, 6).to(dtype), torch.zeros((2, 2) if case.shape == "tokens" else 2).long())
        monitor = Monitor(
            model, optimizer, console=False, every=1, head=head, probe=probe if case.probe else None
        )
        assert monitor.closed is False
    excuses = Excuses()
    head.register_forward_hook(lambda _, given, logits: excuses.forward(given[0], logits))
    torch.manual_seed(case.seed)
    for step, parts in enumerate(case.rows):
        optimizer.zero_grad()
        poison(case, "weight", step, model, head.weight)
        for count in parts:
            inputs = (torch.randn(count, 6) * case.inputs).to(dtype)
            poison(case, "inputs", step, model, inputs)
            with torch.autocast("cpu", torch.bfloat16, enabled=case.autocast):
                logits = model(inputs)
                loss = loss_of(case, logits.reshape(-1, case.classes))
            told = {"tensor": loss, "number": 0.5, "nan": math.nan, "inf": torch.tensor(math.inf)}
            told["vector"] = torch.tensor([1.0, math.nan, 3e38])
            if monitor is not None and case.told in told:
                monitor.observe_loss(told[case.told])
                excuses.loss(told[case.told])
            loss.backward()
        gradients = [parameter.grad for parameter in model.parameters()]
        poison(case, "gradient", step, model, gradients[-1])
        poison(case, "all gradients", step, model, gradients)
        excuses.before(model)
        optimizer.step()
        excuses.after(model, head, optimizer)
        moments = [
            state[name] for state in optimizer.state.values() for name in state if name == "exp_avg_sq"
        ]
        poison(case, "moment", step, model, moments)
    if monitor is not None:
        monitor.close()
    return monitor, excuses


def check(case: Case) -> int:
    """The readings that were looked at."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            monitor, excuses = train(case, monitored=True)
        except Exception as error:
            try:
                train(case, monitored=False)
            except type(error):
                reject()  # no training to begin with: float16 or an empty batch where torch takes none
            raise
    assert monitor is not None
    failed = [note.message for note in monitor.notes if note.code.startswith("failed")]
    assert failed == []
    assert monitor.step == len(case.rows)
    count = 0
    for name in monitor.history:
        low, high = QUANTITIES[name].within
        for step, value in zip(*(column.tolist() for column in monitor.history[name]), strict=True):
            excused = math.isnan(value) and excuses.of(name, step) & set(QUANTITIES[name].nan)
            told = f"{name} = {value!r} at step {step} is not in [{low}, {high}]"
            assert excused or low <= value <= high, told
            count += 1
    return count


RELAXED = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]


@settings(max_examples=150, derandomize=True, database=None, suppress_health_check=RELAXED)
@given(cases)
def test_no_training_makes_the_monitor_raise_or_leave_its_ranges(case: Case) -> None:
    check(case)


def test_every_quantity_has_a_range_and_a_share_is_one() -> None:
    for name, quantity in QUANTITIES.items():
        low, high = quantity.within
        assert low < high, name
        assert (quantity.unit == "fraction") <= (quantity.within == (0.0, 1.0)), name
        assert ("norm" in name) <= (low == 0.0), name


def test_a_sample_without_any_row_of_the_loss_has_no_mean_feature() -> None:
    given = {"shape": "linear", "dtype": "float32", "weights": 1.0, "inputs": 1.0, "ignored": 0.0, "lr": 1e-3}
    given |= {"classes": 50_000, "rows": ((9,),), "loss": "one row", "optimizer": "AdamW", "eps": 1e-8}
    check(Case(seed=0, autocast=False, poisoned=(), told="tensor", frozen=False, probe=False, **given))


def test_a_probe_batch_whose_logits_overflow_has_no_margins() -> None:
    given = {"shape": "tokens", "dtype": "float16", "weights": 1e4, "inputs": 1.0, "ignored": 0.0, "lr": 1e-3}
    given |= {"classes": 2, "rows": ((1,), (0,)), "loss": "mean", "optimizer": "SGD", "eps": 1e-8}
    check(Case(seed=0, autocast=False, poisoned=(), told="tensor", frozen=False, probe=True, **given))


@pytest.mark.slow
def test_twenty_thousand_trainings_do_not_make_it_raise_or_leave_its_ranges(shown: Shown) -> None:
    counts = []

    @settings(max_examples=20_000, database=None, suppress_health_check=RELAXED)
    @given(cases)
    def many(case: Case) -> None:
        counts.append(check(case))

    many()
    assert len(counts) >= 20_000 and sum(counts) > 500_000
    shown("numbers", 20_000, "random trainings")
