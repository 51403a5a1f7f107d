"""What a rule may look at: the run's signals as they are now, its context, and which rules are on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from nfi_monitor.detect.causes import FORGOTTEN, LEARNED
from nfi_monitor.detect.signals import Signals
from nfi_monitor.detect.smoothing import Hysteresis
from nfi_monitor.detect.spike import MEMORY, SpikeDetector
from nfi_monitor.types import Reading, Thresholds


@dataclass(frozen=True)
class RunContext:
    """What the detector knows of the run besides its readings."""

    beta1: float = 0.9
    beta2: float = 0.999
    decoupled_decay: bool = False  # AdamW-style weight decay is on
    no_classes: bool = False  # the head has one output
    layer: str | None = None
    rank: int = 0

    @property
    def tau(self) -> float:
        """τ = 1/(1−β2) in optimizer steps."""
        return 1.0 / max(1.0 - self.beta2, 1e-9)

    @property
    def stability_limit(self) -> float:
        """Curvature above which Adam oscillates: 2(1+β1)/(1−β1) (Cohen et al. 2022, arXiv 2207.14484)."""
        return 2.0 * (1.0 + self.beta1) / (1.0 - self.beta1)


@dataclass
class Situation:
    """The detector's own, shown to the rules; ``reading`` is the one that is judged."""

    limits: Thresholds
    context: RunContext
    signals: Signals
    spike: SpikeDetector
    switches: Mapping[str, Hysteresis]
    """Rule's name → its switch."""
    reading: Reading = field(default_factory=lambda: Reading(0, {}))

    @property
    def step(self) -> int:
        """The optimizer step of the reading that is judged."""
        return self.reading.step

    def on(self, name: str) -> bool:
        """Whether a rule is on."""
        return self.switches[name].on

    @property
    def forgotten(self) -> bool:
        """Whether the second moment has let go of the gradient."""
        return self.signals.decay_lowest <= FORGOTTEN

    @property
    def gone(self) -> bool:
        """Whether within the last τ there was next to no gradient, on a second moment that had learned
        one.
        """
        step, tau = self.signals.last_step, self.context.tau
        return step >= LEARNED * tau and step - self.signals.gone_at <= tau

    @property
    def stretch(self) -> float:
        """Steps in a twentieth of τ: with a long memory small updates add up before it corrects them."""
        return max(self.context.tau / 20.0, 1.0)

    @property
    def steep(self) -> bool:
        """Whether the curvature along the update is a good part of the stability limit."""
        return bool(self.signals.curvature_peak >= self.limits.kick_curvature * self.context.stability_limit)

    def pulled(self, step: int) -> bool:
        """Whether decoupled decay moves the weights on a second moment that has had the time to learn a
        gradient.

        In its first steps a bias-corrected second moment is an average over a moving target, no memory.
        """
        return self.context.decoupled_decay and step >= self.limits.second_moment_settles * self.context.tau

    @property
    def has_floor(self) -> bool:
        """Whether the loss has come to where a slingshot would start: it is low, or training is under way.

        On its way down from where it began it oscillates, too, and goes on falling.
        """
        low = self.spike.average <= math.log(self.limits.spike_high)
        settles = (self.limits.second_moment_settles if low else self.limits.swing_settles) * self.context.tau
        return self.spike.readings >= MEMORY and self.step >= settles
