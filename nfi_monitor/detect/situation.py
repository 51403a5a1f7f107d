"""Define what a rule may read: the run's present signals, its context, and which rules are on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from nfi_monitor.detect.causes import FALLEN_FAR, FORGOTTEN, LEARNED, STAYS_GONE
from nfi_monitor.detect.loss_baseline import MEMORY
from nfi_monitor.detect.movement import Movement
from nfi_monitor.detect.outside import Outside
from nfi_monitor.detect.record import Record
from nfi_monitor.detect.signals import LOWEST_LOSS, Signals
from nfi_monitor.detect.smoothing import Hysteresis
from nfi_monitor.detect.spike import SpikeDetector
from nfi_monitor.types import Evidence, Reading, Thresholds

FEW = 0.41
"""Standard deviation of ``Signals.loss_recent`` over that of one loss: an average over about 3 readings."""
BATCH_SIGMAS = 6.0
"""Standard deviations by which ``Signals.loss_recent`` must be high where each step has other rows."""
ENDS = 0.5
"""Share of the least loss of a slingshot below which an oscillation is expected to end."""
FALLS = 0.4
"""Nats of log loss below the running average at which the loss falls: a third less than over 50 readings."""


@dataclass(frozen=True)
class RunContext:
    """What the detector knows about the run besides its readings.

    The defaults are torch's for Adam. The engine always gives the optimizer's own betas, or ASSUMED_BETAS.
    """

    beta1: float = 0.9
    beta2: float = 0.999
    decoupled_decay: bool = False  # AdamW-style weight decay is on
    coupled_decay: bool = False  # weight decay is added to the gradient (L2)
    loss_bits: int = 0  # bits of the precision in which the loss is computed; 0: unknown
    every_step: bool = False  # every step is read
    no_classes: bool = False  # the head has one output
    layer: str | None = None
    rank: int = 0
    momentum: float | None = None  # of a sum of gradients (SGD, RMSprop); None: Adam's average of them, by β1
    dampening: float = 0.0  # share of the gradient that such a sum leaves out
    nesterov: bool = False

    @property
    def tau(self) -> float:
        """τ = 1/(1−β2) in optimizer steps."""
        return 1.0 / max(1.0 - self.beta2, 1e-9)

    @property
    def stability_limit(self) -> float:
        """lr · curvature, in the metric in which the optimizer moves, above which it oscillates and diverges.

        On a quadratic of curvature h, a step is m ← μm + (1−d)g, w ← w − lr·m.  Its characteristic polynomial
        has the root −1 at lr·h = 2(1+μ)/(1−d): 2(1+μ) for heavy ball (Cohen et al. 2021, arXiv 2103.00065,
        appendix B), 2 without momentum, and 2(1+β1)/(1−β1) for Adam, where μ = d = β1 (Cohen et al. 2022,
        arXiv 2207.14484).  With Nesterov's step, w ← w − lr·((1−d)g + μm), it has that root at
        2(1+μ)/((1−d)(1+2μ)).
        """
        averaged = (self.beta1, self.beta1)
        momentum, left_out = averaged if self.momentum is None else (self.momentum, self.dampening)
        ahead = 1.0 + 2.0 * momentum if self.nesterov else 1.0
        return 2.0 * (1.0 + momentum) / (max(1.0 - left_out, 1e-9) * ahead)


_SUMMED = ("ASGD", "Adagrad", "Adadelta")
"""torch's optimizers without momentum: their groups have no such setting."""


def momentum_of(optimizer: str, group: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of :class:`RunContext` that say how an optimizer adds up gradients.

    ``optimizer``: name of its class.  ``group``: a parameter group, or its settings in ``run.json``.
    """
    ahead = bool(group.get("nesterov")) or optimizer.lower().startswith("nadam")
    if "betas" in group or not ("momentum" in group or optimizer in _SUMMED):
        return {"nesterov": ahead}
    momentum, left_out = (
        float(x) if isinstance(x, (int, float)) else 0.0
        for x in (group.get("momentum"), group.get("dampening"))
    )
    return {"momentum": momentum, "dampening": left_out if momentum else 0.0, "nesterov": ahead}


@dataclass
class Situation:
    """The detector's parts that rules read. ``reading`` is the reading that is judged now."""

    limits: Thresholds
    context: RunContext
    signals: Signals
    spike: SpikeDetector
    switches: Mapping[str, Hysteresis]
    """Name of a rule → its switch."""
    record: Record = field(default_factory=Record)
    """What the alarms of each rule led to so far."""
    movement: Movement = field(default_factory=Movement)
    """What has moved while the run is *at risk*."""
    reading: Reading = field(default_factory=lambda: Reading(0, {}))
    outside: Outside = field(default_factory=Outside)
    """What came from outside in the last steps."""
    raised_from_outside: bool = False
    """Whether the batch, not an update, has raised the loss in the last steps: no sign of what updates do."""

    @property
    def step(self) -> int:
        """Optimizer step of the reading that is judged."""
        return self.reading.step

    def on(self, name: str) -> bool:
        """Return whether the rule called ``name`` is on."""
        return self.switches[name].on

    @property
    def forgotten(self) -> bool:
        """Whether the second moment has decayed: sqrt(v̂) fell to half of its recent maximum or less."""
        return self.signals.decay_lowest <= FORGOTTEN

    @property
    def gradient_vanished(self) -> bool:
        """Whether the gradient had nearly vanished not long ago, after the second moment had learned it.

        If sqrt(v̂) has fallen very far, it had, even if it came back too slowly for RMS_t to show that.
        """
        signals, tau = self.signals, self.context.tau
        recently = signals.last_step - signals.gone_at <= STAYS_GONE * tau
        return signals.last_step >= LEARNED * tau and (recently or signals.decay_lowest <= FALLEN_FAR)

    @property
    def displacement_steps(self) -> float:
        """Steps in a twentieth of τ, at least 1: the steps over which δ is added up.

        With a long τ, small updates add up before the second moment corrects them.
        """
        return max(self.context.tau / 20.0, 1.0)

    @property
    def curvature_is_high(self) -> bool:
        """Whether the curvature along the update exceeds ``kick_curvature`` of the stability limit."""
        return bool(self.signals.curvature_peak >= self.limits.kick_curvature * self.context.stability_limit)

    @property
    def loss_stands_out(self) -> bool:
        """Whether the loss of this reading is above its own recent range; True where no loss is known.

        A loss that the batch has raised does not count.
        With the same rows at each step, any clear rise counts.  Minibatches differ, so there a few losses in
        a row must be far above the noise of the loss; the same holds where the rows are not seen.
        """
        return not self.raised_from_outside and all(item.crossed for item in self.loss_evidence.values())

    @property
    def loss_evidence(self) -> dict[str, Evidence]:
        """The loss that must stand out, with the level that it must exceed; empty where no loss is known."""
        spike, signals = self.spike, self.signals
        if math.isnan(spike.baseline.average) or math.isnan(signals.loss_recent):
            return {}
        rise = self.limits.loss_stands_out
        if not signals.same_rows:
            recent = signals.loss_recent
            # From the mean absolute difference of two losses to σ of one, and of the average of a few.
            rise = max(rise, BATCH_SIGMAS * FEW * spike.baseline.noise / 1.128)
        else:
            loss = self.loss
            if not loss >= 0:
                return {}
            recent = math.log(max(loss, LOWEST_LOSS))
        crossed = recent - spike.baseline.average >= rise
        floor, level = math.exp(spike.baseline.average), math.exp(spike.baseline.average + rise)
        return {"loss": Evidence(math.exp(recent), level, floor, crossed=crossed)}

    @property
    def loss(self) -> float:
        """The loss of the reading that is judged, or else the cross-entropy of the head; NaN if unknown."""
        return self.reading.get("loss", self.reading.get("head_loss"))

    @property
    def rows_repeat(self) -> bool:
        """Whether each step has the same rows.

        Rows that are not seen count as the same if the gradient turns around at high curvature.  Gradients of
        other rows have little in common.
        """
        signals = self.signals
        unseen = not (signals.same_rows or signals.other_rows)
        turns = self.curvature_is_high and signals.turn <= -self.limits.kick_turn
        return signals.same_rows or (unseen and turns)

    @property
    def loss_share(self) -> float:
        """The loss of this reading over the least loss of a slingshot; ∞ where no loss is known."""
        loss = self.loss
        if not loss >= 0:
            return math.inf
        return loss / min(self.spike.least_of_each(self.limits))

    @property
    def loss_above_average(self) -> float:
        """Rise of this reading's loss above the running average, in nats of log loss; NaN if unknown."""
        loss = self.loss
        return math.log(max(loss, LOWEST_LOSS)) - self.spike.baseline.average if loss >= 0 else math.nan

    @property
    def loss_falls(self) -> bool:
        """Whether the last few losses are far below the running average, as while a run first learns.

        Its updates move the logits because there is still something to learn.  In half precision, rounding
        absorbs the confident rows even then.
        """
        return self.signals.loss_recent - self.spike.baseline.average < -FALLS

    @property
    def steps_to_slingshot(self) -> float:
        """Steps until the loss is that of a slingshot, if the gradient goes on growing as in the last steps.

        ∞ where it does not grow, NaN where no finite loss is known.  Near a minimum, the loss grows as the
        square of the gradient.
        """
        loss = self.loss
        rate = self.signals.gradient_growth
        if not 0 < loss < math.inf or math.isnan(rate):
            return math.nan
        least = min(self.spike.least_of_each(self.limits))
        return max(math.log(least / loss), 0.0) / (2.0 * rate) if rate > 0 else math.inf

    @property
    def ends_by_itself(self) -> bool:
        """Whether the oscillation will end far below the loss of a slingshot; False where that is not known.

        Beside the stability limit an oscillation moves the weights to where the curvature is lower, and ends
        there (Damian et al. 2023, arXiv 2209.15594).  Let x be its size, e the curvature over the limit − 1,
        and r its growth d ln x / d step.  r is proportional to e, and e falls in proportion to x².  So
        x² (1 + r e / (−d e / d step)) stays what it is, and x² grows up to it.  The loss above its average
        grows as x².
        """
        signals, average = self.signals, math.exp(self.spike.baseline.average)
        beyond = signals.curvature / self.context.stability_limit - 1.0
        falls = -signals.curvature_slope / self.context.stability_limit
        if not (falls > 0 and self.loss >= average):
            return False
        left = max(signals.gradient_growth, 0.0) * max(beyond, 0.0) / falls
        highest = average + (self.loss - average) * (1.0 + left)
        return highest < ENDS * min(self.spike.least_of_each(self.limits))

    @property
    def still(self) -> bool:
        """Whether the run has been *at risk* for long and nothing moves."""
        return self.movement.is_still(self.signals.last_step, self.context.tau)

    def level_of(self, rule: str) -> float:
        """Return the factor by which the levels of a rule are higher because its alarms led to nothing."""
        return self.record.factor(rule, self.signals.last_step, self.context.tau)

    def outgrows(self, rule: str) -> bool:
        """Return whether the loss is above that of the rule's alarms that no slingshot followed.

        A run that lives at the edge of stability oscillates again and again, by about the same amount.
        """
        return not self.loss <= self.record.passed(rule, self.step, self.context.tau)

    def weight_decay_pulls(self, step: int, *, coupled: bool = False) -> bool:
        """Return whether weight decay moves the weights and the second moment has had time to settle.

        ``coupled``: count decay that is a part of the gradient (L2), too.  It keeps the second moment up, so
        a small gradient alone does not show that the moment decays.  In the first steps a bias-corrected
        second moment is an average over a moving target, not a memory.
        """
        context = self.context
        decay = context.decoupled_decay or (coupled and context.coupled_decay)
        return decay and step >= self.limits.second_moment_settles * context.tau

    @property
    def loss_has_settled(self) -> bool:
        """Whether a slingshot can start from this loss: enough steps have passed; fewer if the loss is low.

        Earlier, while the loss falls from its first values, it oscillates too, and goes on falling.
        """
        low = self.spike.baseline.average <= math.log(self.limits.spike_high * self.spike.baseline.unit)
        settles = (self.limits.second_moment_settles if low else self.limits.swing_settles) * self.context.tau
        return self.spike.baseline.readings >= MEMORY and self.step >= settles
