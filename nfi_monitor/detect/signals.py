"""Smooth the readings into the few signals that decide on the phase."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from nfi_monitor.detect.smoothing import (
    Ema,
    Growth,
    Hysteresis,
    Stateful,
    Times,
    fading_max,
    log_or_nan,
    of_its_kind,
    recent_lowest,
)
from nfi_monitor.types import Reading, Thresholds

NAN = math.nan
_PARTS = (Ema, Growth, Hysteresis)


class Signals(Stateful):
    """Update the signals at each reading. Every attribute without an underscore is a signal; NaN: unknown.

    violation: zero-sum violation that reaches the weights, smoothed; NaN before it is measured and while the
    loss breaks the zero-sum by design.
    growth: d ln‖μ_G‖ / d step, smoothed.
    classifier_growth: d ln‖W_G‖ / d step, smoothed.
    displacement: average of ln δ, as δ in nats; δ is of the probe's margins where there is a probe.
    displacement_per_rate: average of ln(δ over the learning rate), as a ratio.
    displacement_rise: ratio of ``displacement_per_rate`` to its own recent minimum.
    rate_rise: ratio of the learning rate to its own average over τ, at least 1.
    head_displacement: as ``displacement``, but always by the head alone, with or without a probe.
    displacement_rms: average of ln of the head's root mean square displacement, as nats.
    displacement_slope: d ln(root mean square displacement) / d step.
    other_rows: whether the last neighbouring steps had different rows, as minibatches have.
    same_rows: whether they had the same rows.  Both are False while no rows were seen in two steps.
    swing: nats that the layers below the head moved the mean row's logits; largest of the last few steps.
    Only steps with the same rows count.
    swell: ratio of ``swing`` to the recent minimum of its average.
    alignment: average cosine of successive gradients.
    turn: cosine of the last two gradients.
    gradient_growth: d ln‖gradient‖ / d step, over the last few steps.
    rms_t, rms_t_mean: RMS_t of the last reading, and its average.
    reduction, reduction_peak: predicted reduction over the loss, of the last reading, and the largest of the
    last few steps; NaN where the loss is not positive.
    reduction_before, reduction_usual: ``reduction_peak`` before the last reading, and the geometric mean of
    ``reduction`` over about 50 readings before it.
    rms_t_peak, curvature_peak: largest RMS_t and secant curvature of the last few steps.
    curvature, curvature_slope: secant curvature of the last reading, and its change since the step before.
    gone_at: last step at which ``rms_t_mean`` was at most GONE.
    decay: log10 of the head's sqrt(v̂) over its maximum since the last slingshot; that maximum fades slowly.
    decay_lowest: lowest ``decay`` of the last few steps, because a kick refills the second moment at once.
    shrinkage: d ln(weight norm) / d step; negative while weight decay alone moves the weights.
    learning_rate_jump: largest ratio of the learning rate to its own average in the last few steps.
    update_jump: ratio of the last update's RMS to its own average.
    loss_rise: nats of averaged log loss above its minimum of the last 3 τ.
    loss_recent: log loss, averaged over about 3 readings.
    clock: sqrt(v̂)/(sqrt(v̂) + ε_A) of the head, median; 1 where it is not known.
    root_max: that maximum of sqrt(v̂); 0 where none is known.
    soft_targets: whether more than half of the rows have soft targets.
    logits_scaled: whether most gradients contradict the logits, so that margins mean nothing.
    unseen: number of readings without rows.
    last_step: step of the last reading.
    broken_by_design: whether the loss breaks the zero-sum by design: rounding cannot explain the violation,
    so the violation is no absorption.
    """

    __slots__ = (
        "_alignment", "_classifier_growth", "_displacement", "_displacement_lowest", "_displacement_rms",
        "_gradient", "_growth", "_head_displacement", "_learning_rate", "_loss", "_loss_lowest",
        "_loss_recent", "_per_rate", "_rate", "_reduction", "_rms_t", "_row_match", "_shrinkage", "_slope",
        "_swing", "_swing_lowest", "_unexplained", "_unexplained_switch", "_update_rms", "_violation",
        "alignment", "classifier_growth", "clock", "curvature", "curvature_peak", "curvature_slope",
        "decay", "decay_lowest", "displacement", "displacement_per_rate", "displacement_rise",
        "displacement_rms", "displacement_slope", "gone_at", "gradient_growth", "growth",
        "head_displacement", "last_step", "learning_rate_jump", "logits_scaled", "loss_recent", "loss_rise",
        "other_rows", "rate_rise", "reduction", "reduction_before", "reduction_peak", "reduction_usual",
        "rms_t", "rms_t_mean", "rms_t_peak", "root_max", "same_rows", "shrinkage", "soft_targets", "swell",
        "swing", "turn", "unseen", "update_jump", "violation",
    )  # fmt: skip

    def __init__(self) -> None:
        self._violation, self._unexplained, self._displacement = Ema(), Ema(), Ema()
        self._displacement_rms, self._rms_t, self._alignment = Ema(), Ema(), Ema()
        self._head_displacement, self._rate, self._per_rate = Ema(), Ema(), Ema()
        self._loss_recent, self._row_match = Ema(), Ema()
        self._learning_rate, self._update_rms, self._loss = Ema(), Ema(), Ema()
        self._growth, self._classifier_growth, self._shrinkage = Growth(), Growth(), Growth()
        self._slope, self._gradient = Growth(), Growth()
        self.gradient_growth = NAN
        self._unexplained_switch = Hysteresis()
        self._swing, self._reduction = Ema(), Ema()
        self.reduction = self.reduction_peak = self.reduction_usual = self.reduction_before = NAN
        self._loss_lowest = self._swing_lowest = self._displacement_lowest = NAN
        self.violation = self.growth = self.classifier_growth = NAN
        self.displacement_rise = self.displacement_slope = self.displacement_per_rate = NAN
        self.displacement = self.head_displacement = self.displacement_rms = NAN
        self.swing = self.swell = self.alignment = NAN
        self.rms_t = self.rms_t_mean = self.rms_t_peak = self.curvature_peak = NAN
        self.curvature = self.curvature_slope = NAN
        self.decay = self.decay_lowest = self.shrinkage = NAN
        self.learning_rate_jump = self.update_jump = self.loss_rise = self.turn = self.loss_recent = NAN
        self.root_max = 0.0
        self.rate_rise = self.clock = 1.0
        self.gone_at = -math.inf
        self.soft_targets = self.other_rows = self.same_rows = self.logits_scaled = False
        self.unseen = 0
        self.last_step = 0

    @property
    def broken_by_design(self) -> bool:
        """Whether the loss breaks the zero-sum by design."""
        return bool(self._unexplained_switch.on)

    def update(self, reading: Reading, tau: float, limits: Thresholds) -> dict[str, float]:
        """Add a reading; return the quantities that are derived from it (growth rates, decay)."""
        times = Times.of(reading.step, self.last_step, tau, limits)
        found = _violation(reading)
        self._update_violation(reading, found, times, limits)
        if self.logits_scaled:
            reading = Reading(
                reading.step, {name: x for name, x in reading.values.items() if name not in IN_NATS}
            )
        derived = self._update_growth(reading, times)
        if not math.isnan(found) and not math.isnan(self.violation):
            derived["zero_sum_violation_smoothed"] = self.violation
        log_rate = log_or_nan(reading.values.get("learning_rate", NAN))
        self._update_displacement(reading, log_rate, times)
        self._update_swing(reading, times)
        self._update_optimizer(reading, log_rate, times)
        derived |= self._update_decay(reading, times) | self._update_reduction(reading, times)
        self.last_step = reading.step
        return derived

    def _update_violation(self, reading: Reading, found: float, times: Times, limits: Thresholds) -> None:
        step, get = reading.step, reading.values.get
        unsure = get("unsure_fraction", NAN)
        share = self._unexplained.update(step, get("unexplained_violation_fraction", NAN), times.window)
        # Only unsure rows can prove that the zero-sum holds. Of confident rows, any violation may be
        # rounding: a loss that breaks the zero-sum by design must not lapse there.
        cleared = share < limits.unexplained_exit and unsure >= CLEAR
        self._unexplained_switch.update(
            step, share >= limits.unexplained_enter or self._broken_from_the_start(reading), not cleared
        )
        if "logit_scale" in reading.values:  # what is in nats has been multiplied by it
            self.logits_scaled = False
        else:
            self._update_scaled(get("contradicted_fraction", NAN), unsure)
        soft = get("soft_target_fraction")
        if soft is not None:
            self.soft_targets = soft > 0.5
        smoothed = self._violation.update(step, found, times.window)
        self.violation = NAN if self.broken_by_design else smoothed

    def _update_scaled(self, contradicted: float, unsure: float) -> None:
        """Update ``logits_scaled``; forget displacements when it begins, because they are not in nats."""
        if math.isnan(contradicted):
            return
        was = self.logits_scaled
        agree = contradicted < 0.1 and unsure >= CLEAR  # a fitted row's gradient is small in any case
        self.logits_scaled = not self.broken_by_design and (contradicted >= 0.5 or (was and not agree))
        if self.logits_scaled and not was:
            self._displacement, self._head_displacement, self._displacement_rms = Ema(), Ema(), Ema()
            self._slope, self._swing, self._per_rate = Growth(), Ema(), Ema()
            self._displacement_lowest = self._swing_lowest = self.swing = self.swell = NAN

    def _broken_from_the_start(self, reading: Reading) -> bool:
        """Return whether the head's weight gradient, seen without rows, has a violation by design.

        Without rows, rounding is believed only in a run whose first readings had a zero-sum.  An absorbed row
        adds to the violation no more than its own loss, so a loss far above that excludes rounding.
        """
        weights = reading.get("zero_sum_violation_weight")
        if "zero_sum_violation" in reading.values or math.isnan(weights):
            return False
        self.unseen += 1
        first = self.unseen <= FIRST and weights >= NUMERIC_ABOVE
        return first or (weights > ROUNDED_HALF and weights * reading.get("loss") > ROUNDED)

    def _update_growth(self, reading: Reading, times: Times) -> dict[str, float]:
        step, get = reading.step, reading.values.get
        derived: dict[str, float] = {}
        features, classifier = get("feature_mean_norm"), get("classifier_mean_norm")
        if features is not None:
            self.growth = self._growth.update(step, log_or_nan(features), times.long)
            derived["feature_mean_growth"] = self.growth
        if classifier is not None:
            self.classifier_growth = self._classifier_growth.update(step, log_or_nan(classifier), times.long)
            derived["classifier_mean_growth"] = self.classifier_growth
        return derived

    def _update_displacement(self, reading: Reading, log_rate: float, times: Times) -> None:
        step, get = reading.step, reading.values.get
        log_by_head = log_or_nan(get("logit_displacement", NAN))
        by_probe = get("margin_displacement")
        log_delta = log_by_head if by_probe is None else log_or_nan(by_probe)
        average = self._displacement.update(step, log_delta, times.short, limit_gap=True)
        self.displacement = math.exp(average)
        # A schedule that raises the rate raises δ with it; that is no rise of the run's own.
        usual = self._rate.update(step, log_rate, times.tau, limit_gap=True)
        known = math.isfinite(log_rate)
        self.rate_rise = math.exp(max(log_rate - usual, 0.0)) if known else 1.0
        # Averaged after the division: the average of δ alone would lag behind a step of the rate.
        per_rate = self._per_rate.update(
            step, log_delta - (log_rate if known else 0.0), times.short, limit_gap=True
        )
        fade = times.gap / (10.0 * times.tau)
        self._displacement_lowest = recent_lowest(self._displacement_lowest, per_rate, fade)
        by_head = self._head_displacement.update(step, log_by_head, times.short)
        self.head_displacement = math.exp(by_head)
        self.displacement_rise = math.exp(per_rate - self._displacement_lowest)
        self.displacement_per_rate = math.exp(per_rate)
        log_rms = log_or_nan(get("logit_displacement_rms", NAN))
        self.displacement_rms = math.exp(self._displacement_rms.update(step, log_rms, times.short))
        self.displacement_slope = self._slope.update(step, log_rms, times.long)

    def _update_swing(self, reading: Reading, times: Times) -> None:
        step, get = reading.step, reading.values.get
        match = self._row_match.update(step, get("row_match", NAN), ROWS, limit_gap=True)
        self.other_rows = match < SAME_ROWS
        self.same_rows = match >= SAME_ROWS
        # Another minibatch has another mean row: only a movement of the same rows is one of the layers.
        moved = NAN if self.other_rows else felt_displacement(reading)
        self.swing = fading_max(self.swing, moved, math.exp(-times.gap / SWINGS))
        self._swing_lowest += times.gap / (10.0 * times.tau)  # also where this reading has no movement
        if moved > 0:
            average = self._swing.update(step, log_or_nan(moved), times.short)
            self._swing_lowest = recent_lowest(self._swing_lowest, average, 0.0)
            self.swell = self.swing / math.exp(self._swing_lowest)
        self.gradient_growth = self._gradient.update(step, log_or_nan(get("gradient_norm", NAN)), SWINGS)
        self.turn = get("gradient_alignment", NAN)
        self.alignment = self._alignment.update(step, self.turn, SWINGS)

    def _update_optimizer(self, reading: Reading, log_rate: float, times: Times) -> None:
        step, get = reading.step, reading.values.get
        rate = get("learning_rate", NAN)
        jump = rate / math.exp(self._learning_rate.value) if rate > 0 else NAN
        self.learning_rate_jump = fading_max(self.learning_rate_jump, jump, times.keep)
        self._learning_rate.update(step, log_rate, times.window)
        rms_t = get("rms_t_max")
        if rms_t is not None:
            self.rms_t = rms_t
            self.rms_t_mean = self._rms_t.update(step, rms_t, times.window)
            if self.rms_t_mean <= GONE:
                self.gone_at = step
            self.rms_t_peak = fading_max(self.rms_t_peak, rms_t, times.keep)
        curvature = get("secant_curvature", NAN)
        self.curvature_slope = curvature - self.curvature if times.gap == 1 else NAN
        self.curvature = curvature
        self.curvature_peak = fading_max(self.curvature_peak, curvature, times.keep)
        if "weight_norm" in reading.values:
            self.shrinkage = self._shrinkage.update(step, log_or_nan(get("weight_norm", NAN)), times.window)
        moved = get("update_rms", NAN)
        if moved > 0:
            self.update_jump = moved / math.exp(self._update_rms.value)
            self._update_rms.update(step, log_or_nan(moved), times.window)
        reported = get("loss", NAN)
        loss = reported if "loss" in reading.values else get("head_loss", NAN)
        if loss >= 0:
            floored = max(loss, LOWEST_LOSS)
            self.loss_recent = self._loss_recent.update(step, log_or_nan(floored), SWINGS, limit_gap=True)
        if reported > 0:
            average = self._loss.update(step, log_or_nan(reported), times.short)
            fade = times.gap / (3.0 * times.tau)
            self._loss_lowest = recent_lowest(self._loss_lowest, average, fade)
            self.loss_rise = average - self._loss_lowest

    def _update_decay(self, reading: Reading, times: Times) -> dict[str, float]:
        # The effective rate is lr / (median sqrt(v̂) + ε_A).
        get = reading.values.get
        median, rate = get("head_sqrt_exp_avg_sq_median", NAN), get("learning_rate", NAN)
        clock = median * get("effective_learning_rate", NAN) / rate if rate > 0 else NAN
        self.clock = min(clock, 1.0) if math.isfinite(clock) else 1.0
        root = get("head_sqrt_exp_avg_sq_mean", get("sqrt_exp_avg_sq_mean", NAN))
        if not (math.isfinite(root) and root > 0):
            return {}
        self.root_max = max(self.root_max * math.exp(-times.gap / (REMEMBERED * times.tau)), root)
        self.decay = math.log10(root / self.root_max)
        self.decay_lowest = -fading_max(-self.decay_lowest, -self.decay, times.keep)
        return {"second_moment_decay": self.decay}

    def _update_reduction(self, reading: Reading, times: Times) -> dict[str, float]:
        loss = reading.get("loss", reading.get("head_loss"))
        self.reduction = reading.get("predicted_reduction") / loss if loss > 0 else NAN
        self.reduction_before = self.reduction_peak * times.keep
        self.reduction_peak = fading_max(self.reduction_peak, self.reduction, times.keep)
        self.reduction_usual = math.exp(self._reduction.value)
        self._reduction.update(reading.step, log_or_nan(max(self.reduction, 1e-3)), 50.0 * times.gap)
        return {} if math.isnan(self.reduction) else {"reduction_ratio": self.reduction}

    def restart(self) -> None:
        """Reset decay and vanished gradient when a slingshot begins; its gradients make the new maximum."""
        self.root_max = 0.0
        self.decay = self.decay_lowest = NAN
        self.gone_at = -math.inf

    def calm(self) -> None:
        """Reset the peaks when a slingshot is over, because they say nothing about the next one."""
        self.rms_t_peak = self.curvature_peak = self.swing = self.alignment = self.reduction_peak = NAN
        self._swing_lowest = self._displacement_lowest = self.swell = NAN
        self.decay_lowest = self.decay

    def state_dict(self) -> dict[str, Any]:
        """Return the signals and the averages behind them in plain types."""
        return {
            name: value.state_dict() if isinstance(value := getattr(self, name), _PARTS) else value
            for name in self.__slots__
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned, also in an earlier version."""
        for name in self.__slots__:
            if name not in state:
                continue  # an earlier version had no such signal
            value = getattr(self, name)
            if isinstance(value, _PARTS):
                value.load_state_dict(state[name])
            else:
                setattr(self, name, of_its_kind(value, state[name], name))


LOWEST_LOSS = 1e-7
"""Losses below this count as equal."""
IN_NATS = {"logit_displacement", "logit_displacement_rms", "feature_displacement", "margin_median"}
"""Quantities that mean nothing where the logits are scaled after the head."""
CLEAR = 0.05
"""Share of unsure rows that shows whether the loss has a zero-sum."""
FIRST = 8
"""Number of readings without rows in which the head's weight gradient must have a zero-sum."""
ROUNDED, ROUNDED_HALF = 1e-3, 2.0**-8
"""Share of the violation times loss, in nats, that rounding can reach: it silences rows of tiny loss only;
violation that rounding to half precision can cause at any loss."""
NUMERIC_ABOVE = 0.05
"""Zero-sum violation at and above which rounding is the cause."""
SWINGS = 3.0
"""Time constant in steps of ``swing``, ``alignment`` and ``loss_recent``. One oscillation takes two steps."""
SAME_ROWS = 0.7
"""Average match of the rows at and above which neighbouring steps have the same rows.

Measured in full batches: .97 and more, .7 and more while an oscillation builds up.  In minibatches: at most
.6 in one step."""
ROWS = 10.0
"""Time constant in steps of the average match: one odd step does not change what the run's steps are."""
GONE = 0.3
"""Averaged RMS_t at or below which the gradient counts as vanished.

There the second moment decays about as fast as it can.  Where a gradient shrinks by a factor exp(−r) a step,
RMS_t settles at sqrt(1 − 2rτ).  Measured, lowest of the last τ: up to .15 before slingshots that restoring
the second moment averts, .48 and more before others."""
REMEMBERED = 100.0
"""Time in τ in which the maximum of sqrt(v̂) fades by a factor e.

That is fifty times as slow as the decay of v̂ without a gradient.  Rejected: a maximum that never fades,
because in a long run the first gradients then count as forgotten to the end of the run.  Measured: a notice
every 25 τ in a million quiet steps."""
REACH = 10.0
"""Largest counted ratio of the rows' violation to the violation of the head's weight gradient."""


def _violation(reading: Reading) -> float:
    """Return the rows' zero-sum violation, limited to ten times that of the head's weight gradient.

    Where the weight's gradient cannot be read, the violation of the batch is the limit.

    A mean over rows gives a row with almost no gradient the same weight as any other row.  In ordinary
    minibatch training half of the rows may be absorbed, while the few rows that carry the gradient are not.
    Also, a gradient that is projected after the monitor's hook has no violation where it reaches the weights.
    The limit covers both cases.
    """
    get = reading.values.get
    rows = get("zero_sum_violation", NAN)
    weights = get("zero_sum_violation_weight", get("zero_sum_violation_batch", NAN))
    if math.isnan(rows) or math.isnan(weights):
        return weights if math.isnan(rows) else rows
    return min(rows, REACH * weights)


LAYERS = 20.0
"""Number of layers that :func:`felt_displacement` assumes; networks have tens of layers.

An update that moves each layer by at most a share x of its size moves the logits by about x of their size for
each layer."""


def felt_displacement(reading: Reading) -> float:
    """Return the features' displacement in nats, limited to what the update can have caused.

    Each minibatch has another mean row.  That row differs by nats, while the weights hardly move.
    """
    get = reading.values.get
    moved, update = get("feature_displacement", NAN), get("relative_update", NAN)
    margin = get("margin_median", NAN)  # size of the logits, as it matters for the loss
    if math.isnan(update) or math.isnan(margin):
        return moved
    return min(moved, LAYERS * update * max(abs(margin), 1.0))
