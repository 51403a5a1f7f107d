"""List the notes that a reading can be a reason for: :data:`REMARKS`, in the order in which they are checked.

:class:`~nfi_monitor.engine.notes.NoteTaker` checks them after each reading.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from nfi_monitor.capture.head_probe import HeadProbe
from nfi_monitor.capture.optimizer import OptimizerReader
from nfi_monitor.detect.signals import Signals
from nfi_monitor.engine.head_notes import no_features_text, no_rows_text
from nfi_monitor.measure.accumulator import RowAccumulator
from nfi_monitor.measure.rows import OTHER_LOSS
from nfi_monitor.native import library
from nfi_monitor.types import Reading

FLOAT32_MARGIN = 10.0
"""Nats. With float32 a row is absorbed from a margin of 16.6 on and rounds visibly from 13.2; with float16
from 7.6 and 4.2, with bfloat16 from 5.6 and 2.0, measured on F.cross_entropy's own backward."""
HALF = 1e-4
"""Machine epsilon between those of float32 (1.2e-7) and float16 (9.8e-4)."""
PATIENCE = 5
"""Readings without any rows, or any loss, before a note says so."""


class Seen(NamedTuple):
    """A reading, with the parts of the monitor that made it."""

    reading: Reading
    signals: Signals
    probe: HeadProbe
    rows: RowAccumulator
    loss_below_zero: bool
    measured: int
    """Number of readings before this one."""
    reader: OptimizerReader
    without_rows: int = 0
    """Number of readings in a row without rows, this one included."""
    without_loss: int = 0
    """Number of readings in a row without a loss, this one included."""
    loss_bits: int = 0
    """Bits of the dtype of the observed loss; 0: unknown."""
    without_report: int = 0
    """Number of readings so far if the user has never reported a loss, else 0."""
    step_before: int | None = None
    """Step of the reading before this one; None: this is the first."""
    needed_float32: bool = False
    """Whether a gradient at the head, in this reading or before it, fitted into no half precision."""
    other_loss: int = 0
    """Number of readings in a row whose rows are not a cross-entropy's, this one included."""
    untrained_loss: str = ""
    """The loss at which no gradient arrives: "reported" by the loop, "returned" by the model, or ""."""
    model: nn.Module | None = None


@dataclass(frozen=True)
class Remark:
    """A note with the condition under which it is made."""

    code: str
    applies: Callable[[Seen], bool]
    text: str | Callable[[Seen], str]


def _half_precision(seen: Seen) -> bool:
    values = seen.reading.values
    # A gradient that needs float32 was computed in it. Regression and one-vs-rest losses show nothing.
    if not values.get("loss_epsilon", 0.0) > HALF or seen.signals.broken_by_design:
        return False
    if 0 < seen.loss_bits <= 16:
        return True
    # The loss of a run is computed in one precision. Gradients of a run that explodes are 0 and ±1/N: they
    # fit into any precision and show nothing.
    if seen.needed_float32:
        return False
    # Under autocast the logits' gradient is in half precision, whatever the loss is computed in.
    rounded = seen.probe.dtype in (torch.float32, torch.float64) and seen.loss_bits == 0
    near = abs(values.get("margin_median", 0.0)) < FLOAT32_MARGIN
    if rounded and near and values.get("zero_sum_violation", 0.0) > HALF / 10:
        return True
    absorbed = values.get("absorbed_fraction", 0.0) * values.get("live_fraction", 0.0)
    return absorbed > 0.5 and values.get("margin_median", math.inf) < FLOAT32_MARGIN


def _loss_between_readings(seen: Seen) -> bool:
    """Return whether the head's loss is judged, and steps since the reading before were not read."""
    if seen.untrained_loss == "reported":
        return False  # "loss_not_trained" says so
    if seen.without_report < PATIENCE or "head_loss" not in seen.reading.values or seen.step_before is None:
        return False
    return not _other_loss(seen) and seen.reading.step - seen.step_before > 1


def _other_loss(seen: Seen) -> bool:
    """Return whether the loss is no cross-entropy at the head: the detector does not use the head's then."""
    signals, values = seen.signals, seen.reading.values
    return signals.broken_by_design or signals.logits_scaled or "mismatch_fraction" in values


def _not_cross_entropy(seen: Seen) -> bool:
    if seen.without_report < PATIENCE or seen.other_loss < PATIENCE:
        return False
    if "mismatch_fraction" not in seen.reading.values:
        return False
    return not (seen.signals.broken_by_design or seen.signals.logits_scaled)


def _no_absorption(seen: Seen) -> bool:
    """Return whether most rows are those of another loss than a cross-entropy, and no other note says so."""
    signals = seen.signals
    said = signals.broken_by_design or signals.logits_scaled or signals.soft_targets
    said |= seen.probe.added is not None  # "logits_added" says so
    reported = seen.without_report == 0 and seen.measured >= PATIENCE and seen.other_loss >= PATIENCE
    return reported and not said and seen.reading.values.get("mismatch_fraction", 0.0) > OTHER_LOSS


def _no_absorption_text(seen: Seen) -> str:
    share = seen.reading.values["mismatch_fraction"]
    return (
        f"The trained loss is no plain cross-entropy at the head: {share:.0%} of the rows that tell have "
        "another gradient. Possible reasons: preferences, a policy gradient, a focal loss, weights of single "
        "rows, logits changed after the head. Absorption is not defined there and is left out. Margins and "
        "the loss at the head are those of the head's own logits. The reported loss is judged. If the logits "
        "are changed after the head, watch the changed ones: logits = monitor.tap(logits)."
    )


def _not_cross_entropy_text(seen: Seen) -> str:
    share = seen.reading.values["mismatch_fraction"]
    unreported = "The trained loss is not reported" if seen.untrained_loss else "No loss is reported"
    return (
        f"{unreported}, and the trained loss is no plain cross-entropy at the head: {share:.0%} of the rows "
        "that tell have another gradient. Possible reasons: a policy gradient or preferences, soft "
        "targets, a focal loss, weights of single rows, logits changed after the head. The loss at the head "
        "is recorded, but not judged: a slingshot itself cannot be seen. Call monitor.observe_loss(loss) "
        "before optimizer.step()."
    )


def _loss_between_readings_text(seen: Seen) -> str:
    return (
        "No loss is reported. The monitor computes it from the logits (the plain mean over rows, without "
        "weights, penalties and other losses), but only in the steps that it reads: "
        f"after step {seen.step_before:,} it read step {seen.reading.step:,}. A slingshot between two "
        "readings is seen late or not at all. To show the monitor the loss of every step, call "
        "monitor.observe_loss(loss) before optimizer.step()."
    )


def _loss_not_trained_text(seen: Seen) -> str:
    cure = "Report the loss that trains: monitor.observe_loss(loss) before optimizer.step()."
    if seen.untrained_loss == "returned":
        return (
            "The model returns a loss, but no gradient arrives at it: another loss trains. The returned loss "
            f"is not watched. {cure}"
        )
    if "loss" in seen.reading.values:
        instead = "The loss whose backward pass was seen is judged instead."
    elif "head_loss" in seen.reading.values and not _other_loss(seen):
        instead = "The loss at the head is judged instead, in the steps that are read."
    else:
        instead = "No loss is judged: a slingshot itself cannot be seen, its causes are watched."
    return (
        "The loss that monitor.observe_loss gets is not trained: no gradient arrives at it, another loss "
        f"trains. It is left out. {instead} {cure}"
    )


def _no_features(seen: Seen) -> bool:
    probe = seen.probe
    place = None if probe.head is None else probe.head.place
    if place is not None and not place.same_rows:
        return False  # the note about the place says so
    return seen.measured == PATIENCE and probe.delivered > 0 and probe.without_features >= probe.fired


def _no_rows_text(seen: Seen) -> str:
    if seen.probe.recomputed:
        return _not_recomputed_text(seen)
    weight_read = "zero_sum_violation_weight" in seen.reading.values
    return no_rows_text(seen.probe, seen.model, weight_read=weight_read)


def _logits_scaled_text(seen: Seen) -> str:
    scale = seen.reading.values.get("logit_scale")
    if scale is not None:
        return (
            f"The loss multiplies the head's logits by {scale:.3g} (a temperature, muP, a cosine head): the "
            "gradients show it. Margins, the loss at the head and displacements are those of the multiplied "
            "logits. Nothing has to be done."
        )
    return (
        "The logits are scaled after the head, or a margin or a bias is added: most gradients are far larger "
        "than these logits can cause. Margins, the loss at the head and displacements are not those of the "
        "loss, and raise no alert alone. Watch the changed logits: logits = monitor.tap(logits)."
    )


def _not_recomputed_text(seen: Seen) -> str:
    return (
        f"The loss makes no logits. In the last {PATIENCE} readings, rows recomputed from hidden states and "
        "labels do not give the gradient that arrives at the hidden states, so they are left out, with their "
        "displacement. Possible reasons: logits that are scaled or capped, smoothed labels, a penalty "
        "besides the cross-entropy, other labels. The rest is watched. For rows, use a loss of logits and "
        "monitor.tap(logits)."
    )


def _rows_elsewhere_text(seen: Seen) -> str:
    first, *others = map(str, seen.rows.devices)
    return (
        f"Rows on {', '.join(others)} are not read, only those on {first}: the share of each batch that one "
        "of nn.DataParallel's replicas gets. Everything else is watched as usual. With "
        "DistributedDataParallel all rows are read: attach the monitor on every rank."
    )


def _no_second_moment(seen: Seen) -> bool:
    return seen.measured >= PATIENCE and seen.reader.has_second_moment() is False


def _no_second_moment_text(seen: Seen) -> str:
    why = seen.reader.moments_left_out()
    keeps = f"keeps no second moment that can be read: {'; '.join(why)}" if why else "keeps no exp_avg_sq"
    return (
        f"{type(seen.reader.optimizer).__name__} {keeps}. Effective learning rate, RMS_t and second-moment "
        "decay are not measured. Rows, means, margins and norms are."
    )


def _second_moment_in_part(seen: Seen) -> bool:
    reader = seen.reader
    return bool(reader.has_second_moment()) and bool(reader.moments_left_out())


def _second_moment_in_part_text(seen: Seen) -> str:
    return (
        f"Not read: {'; '.join(seen.reader.moments_left_out())}. RMS_t, effective learning rate, "
        "second-moment decay and curvature are those of the other tensors. Rows and norms are read as usual."
    )


def _half_precision_loss_text(seen: Seen) -> str:
    epsilon = seen.reading.values["loss_epsilon"]
    name = "bfloat16" if epsilon > 4e-3 else "float16"
    onset = 2 if epsilon > 4e-3 else 4
    return (
        f"The loss is computed in half precision ({name}): its gradients resolve margins up to {onset} nats, "
        "those of float32 up to 13. Its rounding does not go away: expect *at risk* for the rest of the "
        "run. Compute the loss in float32 or float64, outside autocast: criterion(logits.float(), target)."
    )


def _state_unreadable_text(seen: Seen) -> str:
    return f"Not read: {', '.join(sorted(seen.reader.unreadable))}. The rest of the model is watched."


REMARKS: tuple[Remark, ...] = (
    Remark(
        "head_never_fired",
        lambda seen: seen.without_rows == PATIENCE and (seen.probe.head is not None or seen.probe.tapped),
        _no_rows_text,
    ),
    Remark(
        "loss_not_trained",
        lambda seen: bool(seen.untrained_loss),
        _loss_not_trained_text,
    ),
    Remark(
        "no_loss",
        lambda seen: seen.without_loss == PATIENCE and not seen.untrained_loss,
        (
            "No loss is observed. Causes are watched, but a slingshot itself cannot be seen. Call "
            "monitor.observe_loss(loss) before optimizer.step()."
        ),
    ),
    Remark(
        "not_cross_entropy",
        _not_cross_entropy,
        _not_cross_entropy_text,
    ),
    Remark("absorption_left_out", _no_absorption, _no_absorption_text),
    Remark(
        "rows_weighted",
        lambda seen: (
            seen.without_report >= PATIENCE
            and "uneven_fraction" in seen.reading.values
            and not _other_loss(seen)
        ),
        (
            "The trained loss is not reported, and weighs rows differently (class weights, a focal loss). "
            "The loss at the head is their plain mean; it is judged in place of the trained one. To "
            "show the trained loss, call monitor.observe_loss(loss) before optimizer.step()."
        ),
    ),
    Remark("loss_between_readings", _loss_between_readings, _loss_between_readings_text),
    Remark(
        "loss_below_zero",
        lambda seen: seen.loss_below_zero,
        (
            "The loss is below zero. A slingshot is seen where a loss rises from its floor, and this loss "
            "has none; causes are watched as usual. If a part of the loss cannot be negative, pass that part "
            "alone, from the first step on: monitor.observe_loss(part)."
        ),
    ),
    Remark(
        "single_output",
        lambda seen: bool(seen.rows.single_output),
        (
            "The head has one output. Without classes there is no zero-sum and no absorption to measure. "
            "Watched instead: RMS_t, second moment, curvature, weight norm and the observed loss."
        ),
    ),
    Remark(
        "rows_recomputed",
        lambda seen: "recomputed_fraction" in seen.reading.values,
        (
            "The loss makes no logits (it is fused or chunked), so rows are recomputed: in each reading the "
            "logits of up to 64 rows, from their hidden states and labels, and the gradient there as the "
            "loss computes it. Rows that do not give the gradient that arrives at the hidden states are left "
            "out."
        ),
    ),
    Remark(
        "library_failed",
        lambda seen: bool(library.fault()),
        lambda seen: (
            f"The C library failed ({library.fault()}). Torch operations computed this reading: they take "
            f"longer and say the same. After {library.MOST_FAILURES} failures they compute all. To try "
            f"without the library from the start: {library.SWITCH}=0."
        ),
    ),
    Remark("rows_elsewhere", lambda seen: len(seen.rows.devices) > 1, _rows_elsewhere_text),
    Remark(
        "no_second_moment",
        _no_second_moment,
        _no_second_moment_text,
    ),
    Remark("second_moment_in_part", _second_moment_in_part, _second_moment_in_part_text),
    Remark(
        "not_shift_invariant",
        lambda seen: seen.signals.broken_by_design,
        (
            "The loss violates the zero-sum by design, not by rounding: even rows far from absorption "
            "violate it. Possible reasons: z-loss, a penalty on logits, regression, one-vs-rest BCE, a "
            "softmax over another axis (start and end of an answer), or logits changed after the head "
            "(soft-capping). Violations are recorded, but raise no alert. If "
            "the logits are changed after the head, watch the changed ones: logits = monitor.tap(logits). If "
            "the watched layer does not make the logits, name the one that does: head=..."
        ),
    ),
    Remark(
        "logits_scaled",
        lambda seen: seen.signals.logits_scaled or "logit_scale" in seen.reading.values,
        _logits_scaled_text,
    ),
    Remark(
        "soft_targets",
        # A regression has rows with several negative gradients, too.
        lambda seen: seen.signals.soft_targets and not seen.signals.broken_by_design,
        (
            "Most rows have more than one negative gradient: targets are soft (label smoothing, "
            "distillation, mixup), rows are pushed away (preferences, rewards), the logits are mixed after "
            "the head (tap them: logits = monitor.tap(logits)), the gradient is projected, or the loss is "
            "that of an inner step (MAML). Absorption is defined only for rows with a single correct class. "
            "The zero-sum violation is defined for all rows and still watched."
        ),
    ),
    Remark("half_precision_loss", _half_precision, _half_precision_loss_text),
    Remark(
        "all_rows_ignored",
        lambda seen: seen.reading.values.get("ignored_fraction") == 1.0,
        (
            "In one step the gradient of every row was zero (all targets ignored, or a loss of exactly "
            "zero). Nothing is concluded from such steps."
        ),
    ),
    Remark(
        "no_features",
        _no_features,
        lambda seen: no_features_text(seen.probe.head),
    ),
    Remark("state_unreadable", lambda seen: bool(seen.reader.unreadable), _state_unreadable_text),
)
