"""Smooth the readings into the few signals that phases are decided on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from nfi_monitor.detect.smoothing import Ema, Growth, Hysteresis, Stateful
from nfi_monitor.types import Reading, Thresholds

NAN = math.nan
_PARTS = (Ema, Growth, Hysteresis)


class _Times(NamedTuple):
    """Time constants of one reading, in steps."""

    tau: float
    gap: int  # since the last reading
    window: float  # of violation and RMS_t
    long: float  # of growth, a small difference of noisy numbers: the whole window, also at β2 = .999
    short: float  # of displacements
    keep: float
    """What is left of a peak. Peaks fade within a few steps: they hold an alarm through the gaps of a
    chattering gradient, and must not hold it through a calm one.
    """

    @classmethod
    def of(cls, step: int, last_step: int, tau: float, limits: Thresholds) -> _Times:
        gap = max(step - last_step, 1)
        short = min(limits.displacement_smoothing * tau, limits.displacement_cap)
        return cls(
            tau=tau,
            gap=gap,
            window=min(limits.absorbing_smoothing * tau, limits.smoothing_cap),
            long=max(limits.absorbing_smoothing * tau, 10.0),
            short=short,
            keep=math.exp(-gap / max(short, 1.0)),
        )


class Signals(Stateful):
    """Updated once a reading; every attribute without an underscore is a signal.

    violation: zero-sum violation that reaches the weights, smoothed; NaN while unseen or while the loss
    breaks it by design.
    growth: d ln‖μ_G‖ / d step, smoothed.  classifier_growth: the same of ‖W_G‖.
    displacement: ln-average of δ in nats (the probe's margins where there is a probe); displacement_rise:
    that against its own lowest of late; head_displacement: δ by the head alone, with or without a probe;
    displacement_rms: ln-average of the head's root mean square; displacement_slope: d ln of that / d step.
    swing: how far the layers below the head moved the mean row's logits, nats, largest of the last few
    steps; swell: that against its own lowest average of late; alignment: average cosine of successive
    gradients, turn: that of the last two.
    rms_t: RMS_t of the last reading; rms_t_peak and curvature_peak: largest of the last few steps;
    rms_t_mean: average; gone_at: the last step at which that was below GONE.
    decay: decades sqrt(v̂) of the head lies below its maximum since the last slingshot, which fades;
    decay_lowest: the lowest of the last few steps, because a kick refills the second moment at once.
    shrinkage: d ln(weight norm) / d step; negative while weight decay alone moves the weights.
    learning_rate_jump: largest ratio of the learning rate to its own average in the last few steps.
    update_jump: the last update's RMS against its own average.
    loss_rise: nats that log loss, averaged, stands above its lowest of the last 3 τ.
    broken_by_design: rounding cannot explain the violation; it is not absorption.
    """

    __slots__ = (
        "_alignment", "_classifier_growth", "_displacement", "_displacement_lowest",
        "_displacement_rms", "_growth", "_head_displacement", "_learning_rate", "_loss", "_loss_lowest",
        "_rms_t", "_shrinkage", "_slope", "_swing", "_swing_lowest", "_unexplained", "_unexplained_switch",
        "_update_rms",
        "_violation", "alignment", "classifier_growth", "curvature_peak", "decay", "decay_lowest",
        "displacement", "displacement_rise", "displacement_rms", "displacement_slope", "gone_at", "growth",
        "head_displacement", "last_step", "learning_rate_jump", "loss_rise", "rms_t", "rms_t_mean",
        "rms_t_peak", "root_max", "shrinkage", "soft_targets", "swell", "swing", "turn",
        "update_jump", "violation",
    )  # fmt: skip

    def __init__(self) -> None:
        self._violation, self._unexplained, self._displacement = Ema(), Ema(), Ema()
        self._displacement_rms, self._rms_t, self._alignment = Ema(), Ema(), Ema()
        self._head_displacement = Ema()
        self._learning_rate, self._update_rms, self._loss = Ema(), Ema(), Ema()
        self._growth, self._classifier_growth, self._shrinkage = Growth(), Growth(), Growth()
        self._slope = Growth()
        self._unexplained_switch = Hysteresis()
        self._swing = Ema()
        self._loss_lowest = self._swing_lowest = self._displacement_lowest = NAN
        self.violation = self.growth = self.classifier_growth = NAN
        self.displacement_rise = self.displacement_slope = NAN
        self.displacement = self.head_displacement = self.displacement_rms = NAN
        self.swing = self.swell = self.alignment = NAN
        self.rms_t = self.rms_t_mean = self.rms_t_peak = self.curvature_peak = NAN
        self.decay = self.decay_lowest = self.shrinkage = NAN
        self.learning_rate_jump = self.update_jump = self.loss_rise = self.turn = NAN
        self.root_max = 0.0
        self.gone_at = -math.inf
        self.soft_targets = False
        self.last_step = 0

    @property
    def broken_by_design(self) -> bool:
        return bool(self._unexplained_switch.on)

    def update(self, reading: Reading, tau: float, limits: Thresholds) -> dict[str, float]:
        """Take a reading in; return the quantities derived from it (growth rates, decay)."""
        times = _Times.of(reading.step, self.last_step, tau, limits)
        self._take_rows(reading, times, limits)
        derived = self._take_growth(reading, times)
        self._take_displacement(reading, times)
        self._take_swing(reading, times)
        self._take_optimizer(reading, times)
        derived |= self._take_decay(reading, times)
        self.last_step = reading.step
        return derived

    def _take_rows(self, reading: Reading, times: _Times, limits: Thresholds) -> None:
        step, get = reading.step, reading.get
        share = self._unexplained.update(step, get("unexplained_violation_fraction"), times.window)
        self._unexplained_switch.update(
            step, share >= limits.unexplained_enter, not share < limits.unexplained_exit
        )
        if "soft_target_fraction" in reading.values:
            self.soft_targets = get("soft_target_fraction") > 0.5
        smoothed = self._violation.update(step, _violation(reading), times.window)
        self.violation = NAN if self.broken_by_design else smoothed

    def _take_growth(self, reading: Reading, times: _Times) -> dict[str, float]:
        step, get = reading.step, reading.get
        derived: dict[str, float] = {}
        if "feature_mean_norm" in reading.values:
            self.growth = self._growth.update(step, _log(get("feature_mean_norm")), times.long)
            derived["feature_mean_growth"] = self.growth
        if "classifier_mean_norm" in reading.values:
            self.classifier_growth = self._classifier_growth.update(
                step, _log(get("classifier_mean_norm")), times.long
            )
            derived["classifier_mean_growth"] = self.classifier_growth
        return derived

    def _take_displacement(self, reading: Reading, times: _Times) -> None:
        step, get = reading.step, reading.get
        delta = get("margin_displacement", get("logit_displacement"))
        level = self._displacement.update(step, _log(delta), times.short, wary=True)
        self._displacement_lowest = _lowest(self._displacement_lowest, level, times.gap / (10.0 * times.tau))
        self.displacement = math.exp(level)
        by_head = self._head_displacement.update(step, _log(get("logit_displacement")), times.short)
        self.head_displacement = math.exp(by_head)
        self.displacement_rise = math.exp(level - self._displacement_lowest)
        root_mean_square = _log(get("logit_displacement_rms"))
        self.displacement_rms = math.exp(self._displacement_rms.update(step, root_mean_square, times.short))
        self.displacement_slope = self._slope.update(step, root_mean_square, times.long)

    def _take_swing(self, reading: Reading, times: _Times) -> None:
        step, get = reading.step, reading.get
        moved = felt_displacement(reading)
        self.swing = _fading_max(self.swing, moved, math.exp(-times.gap / SWINGS))
        if moved > 0:
            level = self._swing.update(step, _log(moved), times.short)
            self._swing_lowest = _lowest(self._swing_lowest, level, times.gap / (10.0 * times.tau))
            self.swell = self.swing / math.exp(self._swing_lowest)
        self.turn = get("gradient_alignment")
        self.alignment = self._alignment.update(step, get("gradient_alignment"), SWINGS)

    def _take_optimizer(self, reading: Reading, times: _Times) -> None:
        step, get = reading.step, reading.get
        rate = get("learning_rate")
        jump = rate / math.exp(self._learning_rate.value) if rate > 0 else NAN
        self.learning_rate_jump = _fading_max(self.learning_rate_jump, jump, times.keep)
        self._learning_rate.update(step, _log(rate), times.window)
        if "rms_t_max" in reading.values:
            self.rms_t = get("rms_t_max")
            self.rms_t_mean = self._rms_t.update(step, self.rms_t, times.window)
            if self.rms_t_mean <= GONE:
                self.gone_at = step
            self.rms_t_peak = _fading_max(self.rms_t_peak, self.rms_t, times.keep)
            self.curvature_peak = _fading_max(self.curvature_peak, get("secant_curvature"), times.keep)
            self.shrinkage = self._shrinkage.update(step, _log(get("weight_norm")), times.window)
        if get("update_rms") > 0:
            self.update_jump = get("update_rms") / math.exp(self._update_rms.value)
            self._update_rms.update(step, _log(get("update_rms")), times.window)
        if get("loss") > 0:
            level = self._loss.update(step, _log(get("loss")), times.short)
            self._loss_lowest = _lowest(self._loss_lowest, level, times.gap / (3.0 * times.tau))
            self.loss_rise = level - self._loss_lowest

    def _take_decay(self, reading: Reading, times: _Times) -> dict[str, float]:
        root = reading.get("head_sqrt_exp_avg_sq_mean", reading.get("sqrt_exp_avg_sq_mean"))
        if not (math.isfinite(root) and root > 0):
            return {}
        self.root_max = max(self.root_max * math.exp(-times.gap / (REMEMBERED * times.tau)), root)
        self.decay = math.log10(root / self.root_max)
        self.decay_lowest = -_fading_max(-self.decay_lowest, -self.decay, times.keep)
        return {"second_moment_decay": self.decay}

    def restart(self) -> None:
        """A slingshot begins: what the second moment has forgotten is counted from the gradients in it."""
        self.root_max = 0.0
        self.decay = self.decay_lowest = NAN

    def calm(self) -> None:
        """A slingshot is over: its peaks say nothing about the next one."""
        self.rms_t_peak = self.curvature_peak = self.swing = self.alignment = NAN
        self._swing_lowest = self._displacement_lowest = self.swell = NAN
        self.decay_lowest = self.decay

    def state_dict(self) -> dict[str, Any]:
        return {
            name: value.state_dict() if isinstance(value := getattr(self, name), _PARTS) else value
            for name in self.__slots__
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name in self.__slots__:
            if name not in state:
                continue  # of an earlier version
            value = getattr(self, name)
            if isinstance(value, _PARTS):
                value.load_state_dict(state[name])
            else:
                setattr(self, name, state[name])


SWINGS = 3.0
"""Steps that a swing of the features and the gradients' alignment are remembered: an oscillation from wall to
wall takes two."""
GONE = 0.3
"""RMS_t, averaged, from which down the gradient counts as gone: the second moment decays about as fast as it
can. Where a gradient shrinks by a factor exp(−r) a step, RMS_t settles at sqrt(1 − 2rτ). Measured, lowest of
the last τ: up to .15 before slingshots that a second moment given back averts, .48 and more before others."""
REMEMBERED = 100.0
"""τ in which the maximum that sqrt(v̂) is held against fades by a factor e: fifty times as slowly as v̂ lets go
of a gradient that is gone. A maximum that stood for ever made a long run count as having forgotten its first
gradients to its end (measured: a notice every 25 τ in a million quiet steps)."""
REACH = 10.0
"""How many times larger than the weights' own violation that of the rows may count."""


def _violation(reading: Reading) -> float:
    """The rows' zero-sum violation, as far as it reaches the weights.

    A mean over rows counts a row whose gradient is next to nothing like any other: in ordinary minibatch
    training half of the rows may be absorbed while the few that carry the gradient are not, and a gradient
    projected after the monitor's hook breaks no zero-sum where it matters.  So the rows' violation counts up
    to ten times that of the head's weight gradient (of the batch, where the weight cannot be read).
    """
    rows = reading.get("zero_sum_violation")
    weights = reading.get("zero_sum_violation_weight", reading.get("zero_sum_violation_batch"))
    if math.isnan(rows) or math.isnan(weights):
        return weights if math.isnan(rows) else rows
    return min(rows, REACH * weights)


LAYERS = 20.0
"""A step that moves no layer by more than a share x of its size moves the logits by no more than about x a
layer, of their size; networks have tens of layers."""


def felt_displacement(reading: Reading) -> float:
    """The features' displacement, as far as the update can have caused it.

    Between minibatches the mean row is another one, and moves by nats while the weights hardly do.
    """
    moved, update = reading.get("feature_displacement"), reading.get("relative_update")
    margin = reading.get("margin_median")  # the logits' size, as far as the loss feels it
    if math.isnan(update) or math.isnan(margin):
        return moved
    return min(moved, LAYERS * update * max(abs(margin), 1.0))


def _log(x: float) -> float:
    return math.log(x) if math.isfinite(x) and x > 0 else NAN


def _lowest(held: float, x: float, rise: float) -> float:
    """The lowest of late: what was lowest before forgets itself upwards by ``rise``."""
    return x if math.isnan(held) else min(x, held + rise)


def _fading_max(held: float, x: float, keep: float) -> float:
    if not math.isfinite(x):
        return held
    return x if math.isnan(held) else max(x, held * keep)
