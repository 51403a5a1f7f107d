"""What is tried: trainings that slingshot for a known reason, and remedies, each as a user would apply it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from nfi_monitor import remedies
from nfi_monitor.capture.head import find_head
from tests.benchmarks.detection import data, losses, setups
from tests.benchmarks.detection.families import EDGE, FAMILIES, NUMERIC, SECOND_MOMENT, Family
from tests.benchmarks.detection.training import Training

SEEDS = tuple(range(5))


@dataclass(frozen=True)
class Case:
    """A family of the detection benchmark, and what is tried on it."""

    family: Family
    mechanism: str
    slingshots: int = 2  # of a run, that are gone back to
    only: tuple[str, ...] = ()  # remedies, where a step is too dear for all of them

    def remedies(self) -> list[Remedy]:
        fitting = [remedy for remedy in REMEDIES.values() if remedy.fits(self.family)]
        return [remedy for remedy in fitting if not self.only or remedy.name in self.only]

    def pilots(self) -> list[str]:
        if self.mechanism != NUMERIC:
            return ["Autopilot"]
        return ["Autopilot (at imminent)"] if self.only else list(PILOTS)


def cases(names: list[str] | None = None) -> list[Case]:
    """All, or those of these families. Raises ValueError for others."""
    known = {case.family.name: case for case in _cases()}
    unknown = [name for name in names or () if name not in known]
    if unknown:
        raise ValueError(f"No family {', '.join(unknown)} here. Known: {', '.join(known)}.")
    return [known[name] for name in (names or known)]


def _cases() -> list[Case]:
    """The smallest families of each mechanism that slingshot at all.

    Hinge parity under strong decay is registered as second moment in the detection benchmark; its gradients
    turn against each other at each slingshot, and replays find that holding the second moment averts none:
    here it stands for the edge of stability.  (The two families that are registered as such do not slingshot
    by W. Wu's rule.)
    """
    losses = (
        "zero_sum_cross_entropy", "project_zero_sum", "zero_sum_cross_entropy + cool_down",
        "zero_sum_cross_entropy + raise_epsilon (1e-5)",
    )  # fmt: skip
    rates = ("zero_sum_cross_entropy", "cool_down (for good)", "clip_update_rms")
    decayed = replace(FAMILIES["survives-float64-quick"], steps=450)
    hinge = replace(FAMILIES["parity-hinge-95"], steps=1500)  # a slingshot every hundred steps
    return [
        Case(FAMILIES["division-17"], NUMERIC),
        Case(FAMILIES["transformer-13"], NUMERIC, slingshots=1, only=losses),
        Case(FAMILIES["parity-hinge-99"], SECOND_MOMENT),
        Case(hinge, EDGE),
        Case(decayed, EDGE, slingshots=0, only=rates),
    ]


MECHANISMS = (NUMERIC, SECOND_MOMENT, EDGE)


# --- what a family is ------------------------------------------------------------------------------


def _builder(family: Family) -> tuple[Callable[..., Training], dict[str, Any]]:
    build = family.build
    assert isinstance(build, partial)
    return build.func, dict(build.keywords)


def has_classes(family: Family) -> bool:
    """Whether its loss is a cross-entropy over classes; hinge has one output."""
    return not _builder(family)[1].get("hinge", False)


def held_out(family: Family, seed: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets [N] that the training does not see. Raises KeyError for a builder not known here."""
    build, options = _builder(family)
    if build in (setups.modular_mlp, setups.modular_transformer):
        p = options["p"]
        operation = options.get("operation", "/")
        pairs, y = data.modular(p, operation, seed=seed, share=1.0)
        seen = len(data.modular(p, operation, seed=seed)[1])  # the first half of the same order
        pairs, y = pairs[seen:], y[seen:]
        if build is setups.modular_mlp:
            return data.one_hot_pairs(pairs, p), y
        sign, equals = torch.full((len(y),), p), torch.full((len(y),), p + 1)
        return torch.stack([pairs[:, 0], sign, pairs[:, 1], equals], dim=1), y
    if build is setups.sparse_parity:
        return data.parity(2000, options.get("bits", 40), options.get("relevant", 3), seed=seed + 10_000)
    if build in (setups.digits_mlp, setups.smoothed_digits):
        x, y = data.digits(None, seed=seed)
        seen = options.get("rows", 200)
        return x[seen:], y[seen:]
    raise KeyError(f"No held-out rows are known for {build.__name__}.")


# --- the remedies -----------------------------------------------------------------------------------


class Exchange(TorchFunctionMode):
    """While it is open, ``F.cross_entropy`` is ``loss``: the family's own code stays as it is."""

    def __init__(self, loss: Callable[..., Tensor]) -> None:
        super().__init__()
        self._loss = loss

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.cross_entropy:
            return func(*args, **kwargs)
        # torch hands on its deprecated arguments, too.
        return self._loss(*args, **{name: kwargs[name] for name in kwargs if name not in _DEPRECATED})


_DEPRECATED = ("size_average", "reduce")


def exchange_loss(training: Training, loss: Callable[..., Tensor]) -> None:
    """From the next step on."""
    own = training.loss

    def exchanged(training: Training, batch: Any, monitor: Any) -> Tensor:
        with Exchange(loss):
            return own(training, batch, monitor)

    training.loss = exchanged


@dataclass(frozen=True)
class Remedy:
    """``apply(training, τ)`` switches it on, from the next optimizer step on."""

    name: str
    """As in :mod:`nfi_monitor.remedies`, several joined by " + "; with options in brackets."""
    apply: Callable[[Training, float], object]
    needs_classes: bool = True
    from_start: bool = True
    from_alarm: bool = True

    def fits(self, family: Family) -> bool:
        return not self.needs_classes or has_classes(family)


def _loss(function: Callable[..., Tensor]) -> Callable[[Training, float], object]:
    return lambda training, tau: exchange_loss(training, function)


def _stablemax(
    input: Tensor, target: Tensor, weight: None = None, label_smoothing: float = 0.0, **options: Any
) -> Tensor:
    """No family that it is tried on has weights or smoothing."""
    return remedies.experimental.stablemax_cross_entropy(input, target, **options)


def _with_z_loss(input: Tensor, target: Tensor, **options: Any) -> Tensor:
    return F.cross_entropy(input, target, **options) + remedies.experimental.z_loss(input)


def _head(training: Training) -> torch.nn.Module:
    return find_head(training.model, training.watch.get("head")).module


def _briefly(tau: float) -> int:
    """What the advice says: about 2 τ steps."""
    return max(10, round(2 * tau))


def _zero_sum_and_cool(training: Training, tau: float) -> None:
    exchange_loss(training, remedies.zero_sum_cross_entropy)
    remedies.cool_down(training.optimizer, 0.1, _briefly(tau))


def _zero_sum_and_epsilon(training: Training, tau: float) -> None:
    exchange_loss(training, remedies.zero_sum_cross_entropy)
    remedies.raise_epsilon(training.optimizer, 1e-5)


REMEDIES = {
    remedy.name: remedy
    for remedy in (
        Remedy("zero_sum_cross_entropy", _loss(remedies.zero_sum_cross_entropy)),
        Remedy("float64_cross_entropy", _loss(remedies.float64_cross_entropy)),
        Remedy("project_zero_sum", lambda t, tau: remedies.project_zero_sum(_head(t))),
        Remedy("zero_sum_cross_entropy + cool_down", _zero_sum_and_cool, from_start=False),
        Remedy("zero_sum_cross_entropy + raise_epsilon (1e-5)", _zero_sum_and_epsilon, from_start=False),
        Remedy("cool_down", lambda t, tau: remedies.cool_down(t.optimizer, 0.1, _briefly(tau)),
               needs_classes=False, from_start=False),
        Remedy("cool_down (for good)", lambda t, tau: remedies.cool_down(t.optimizer, 0.1, None),
               needs_classes=False),
        Remedy("raise_epsilon (1e-6)", lambda t, tau: remedies.raise_epsilon(t.optimizer, 1e-6),
               needs_classes=False),
        Remedy("raise_epsilon (1e-5)", lambda t, tau: remedies.raise_epsilon(t.optimizer, 1e-5),
               needs_classes=False),
        Remedy("clip_update_rms", lambda t, tau: remedies.experimental.clip_update_rms(t.optimizer),
               needs_classes=False),
        Remedy("reset_second_moment", lambda t, tau: remedies.experimental.reset_second_moment(t.optimizer),
               needs_classes=False, from_start=False),
        Remedy("center_classifier",
               lambda t, tau: remedies.experimental.center_classifier(t.model, t.optimizer),
               from_alarm=False),
        Remedy("center_features", lambda t, tau: remedies.experimental.center_features(_head(t)),
               from_alarm=False),
        Remedy("z_loss", _loss(_with_z_loss), from_alarm=False),
        Remedy("stablemax_cross_entropy", _loss(_stablemax), from_alarm=False),
        Remedy("orthogonal_gradients", lambda t, tau: remedies.experimental.orthogonal_gradients(t.optimizer),
               needs_classes=False, from_alarm=False),
    )
}  # fmt: skip

PILOTS = {
    "Autopilot": remedies.Policy(),
    "Autopilot (at imminent)": remedies.Policy(loss_at="imminent"),
    "Autopilot (at imminent, loss not routed)": remedies.Policy(loss_at="imminent"),
}
"""Live, under a monitor; the last has to project the gradient."""


def loss_in_float64(training: Training, batch: Any) -> Tensor:
    """The family's own objective, computed in float64, whatever was exchanged since."""
    inputs, target = batch
    logits = training.model(inputs).double()
    if logits.shape[-1] == 1:
        return losses.hinge(_Given(logits), (inputs, target), None)  # type: ignore[arg-type]
    return F.cross_entropy(logits, target.flatten())


class _Given:
    """Stands for a training whose model has answered already."""

    def __init__(self, logits: Tensor) -> None:
        self.model = lambda inputs: logits
        self.arm = lambda logits: logits
