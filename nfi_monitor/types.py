"""Define what all stages share: readings, alerts, phases, thresholds. No torch, no numpy.

Data flows from capture to measure to detect to report; each stage imports only earlier stages and this file.
Everything here is a frozen dataclass, or an enum whose value is the word written to disk.  Alerts and phases
are defined in :mod:`nfi_monitor.alert`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields

from nfi_monitor.alert import (
    Alert,
    AlertKind,
    AlertState,
    Change,
    Evidence,
    Mechanism,
    Outcome,
    Phase,
    Severity,
    finite_or_none,
)

__all__ = [
    "Alert", "AlertKind", "AlertState", "Change", "Evidence", "Mechanism", "Note", "Outcome", "Phase",
    "Reading", "Severity", "Thresholds", "finite_or_none",
]  # fmt: skip


@dataclass(frozen=True)
class Note:
    """A message that is given once, for example about numbers that the monitor cannot read."""

    code: str  # stable, for programs: "head_never_fired"
    message: str  # for people: what happened, and what to do
    step: int


@dataclass(frozen=True)
class Reading:
    """The numbers of one measured optimizer step.

    ``values`` maps a name of :data:`nfi_monitor.quantities.QUANTITIES` to a float.  A quantity that could
    not be measured at this step is absent, never 0.  NaN and Inf are measured values.
    """

    step: int
    values: Mapping[str, float]

    def get(self, name: str, default: float = math.nan) -> float:
        return self.values.get(name, default)


@dataclass(frozen=True)
class Thresholds:
    """Every threshold of the detector, with its unit, meaning, source and the effect of another value.

    Times are in τ = 1/(1−β2) optimizer steps, displacements in nats, violations relative to the sum of
    absolute gradients.  "Measured" refers to the project's own runs: ``tests/benchmarks/detection`` scores
    every change of a level in minutes (FROZEN.md), and ``tests/benchmarks/LOG.md`` lists rejected changes.
    Constants of the mechanism, the forecast and the averages are in ``nfi_monitor/detect/``: ``causes.py``,
    ``forecast.py``, ``signals.py``, ``spike.py``, ``slow_rise.py`` and ``loss_watch.py``.
    """

    # --- absorbing: rounding breaks the zero-sum (Liu et al. 2026, section 3) -------------------
    absorbing_enter: float = 0.10
    """Zero-sum violation (smoothed, in [0, 1]) at which *absorbing* begins. Measured: .11–.99 before numeric
    slingshots, 1e-8–1e-3 before others. Lower: *at risk* comes earlier, and a few confident rows cause it.
    Higher: it comes later in narrow networks."""
    absorbing_exit: float = 0.03
    """Violation below which *absorbing* ends; the gap is the hysteresis. Higher: one state may become several
    alerts."""
    absorbing_smoothing: float = 0.5
    """Time constant in τ of the averages over violation and RMS_t, at most ``smoothing_cap``. Measured,
    lower: false alarms on minibatches. Higher: less lead."""
    smoothing_cap: float = 50.0
    """Longest smoothing in steps: at β2 = .999 half a τ would hide the whole start of a spike."""

    # --- inflating: the feature mean grows (Theorem 3.7) ----------------------------------------
    inflating_growth: float = 0.05
    """Growth of ln‖μ_G‖ per τ at which an absorbing run is *inflating*. Measured: .01–.6 per τ before numeric
    slingshots. With .01, none is warned of that is not with .05, and runs that merely drift are warned too: a
    minibatch run at β2 = .999 grows by .02 to .04."""

    # --- imminent: updates are nearly large enough to raise the loss -----------------------------
    imminent_growth: float = 0.02
    """Growth or shrinkage of ln‖μ_G‖ per τ that *imminent* requires, unless δ has risen by
    ``imminent_rise``. Higher: slingshots before which δ hardly rises are missed."""
    imminent_displacement: float = 0.6
    """Logit (or probe margin) displacement in nats of one update (log-averaged) at which *imminent* begins.
    Lower: alarms more than 10 τ ahead (.3: every seventh); many of them end without a slingshot."""
    imminent_product: float = 8.0
    """Product of δ, in nats over a twentieth of τ, and the square of its rise, at which *imminent* begins
    after a rise of ``imminent_rise``. Measured: before a run's first slingshot δ is large for 10 τ and rises
    slowly, before later ones it is small and rises fast. Lower: more lead, and more alarms that come more
    than 10 τ ahead."""
    imminent_lowest: float = 0.1
    """Smallest displacement in nats over a twentieth of τ at which *imminent* begins after any rise."""
    imminent_exit: float = 0.05
    """Displacement in nats over the same time below which *imminent* ends without a slingshot."""
    imminent_rise: float = 3.0
    """Ratio of δ to its lowest value of the last 10 τ, both over the learning rate, from which on δ counts as
    risen. Then its sum over a twentieth of τ counts (β2 above .95), and a lower displacement is enough.
    Lower: a run that goes on learning from minibatches at β2 = .999 is called imminent."""
    imminent_swell: float = 25.0
    """Ratio of the displacement by the layers below the head to its lowest value of the last 10 τ at which a
    run is *imminent*. It matters if a LayerNorm before the head hides that displacement from the head.
    Measured: up to 20 in runs that absorb behind a LayerNorm forever; 29–85 in vision transformers 1.25 τ
    before a slingshot."""
    displacement_smoothing: float = 0.25
    """Time constant in τ of the average over ln δ, at most ``displacement_cap``. Longer: less lead."""
    displacement_cap: float = 12.0
    """Longest time constant in steps of the average over ln δ, and of the fading peaks that keep an alarm
    on."""

    # --- second-moment slingshots (W. Wu 2024; Wortsman et al. 2023) ----------------------------
    second_moment_settles: float = 0.25
    """Steps, in τ, before the detector uses the second moment. Earlier, bias correction makes it an average
    over all gradients so far, and the fast first learning looks like a decay."""
    coasting_enter: float = 0.5
    """RMS_t = sqrt(mean(g²/max(v, ε_A²))), largest tensor, averaged like violations, below which the gradient
    is far smaller than the second moment expects (1: as expected). The run is then *at risk* if weight decay
    moves the weights. Higher: the alert comes earlier, and also in runs with noisy gradients."""
    coasting_exit: float = 0.8
    """RMS_t, averaged, above which the gradient is back and *coasting* ends."""
    rms_t_imminent: float = 2.3
    """RMS_t of a kick under decoupled weight decay, after the second moment has decayed. A spike follows 1–8
    steps later (Wortsman et al. 2023, arXiv 2304.13013). Lower: one or two steps more lead, but false
    alarms."""
    rms_t_minibatch: float = 6.0
    """RMS_t of a kick if the rows differ from step to step. The gradients of minibatches differ by
    themselves: RMS_t reaches 2.4 to 3 in runs in which nothing follows, and 12 before a slingshot."""
    rms_t_exit: float = 1.1
    """RMS_t, largest of the last few steps, below which the alarm of a kick ends."""
    rms_t_steep: float = 1.3
    """RMS_t of a kick if the curvature is above ``kick_curvature`` and the rows are the same at each step.
    Higher: one step less lead; every tenth hinge-loss slingshot is named too late."""
    kick_curvature: float = 0.25
    """Secant curvature as a share of the stability limit: 2(1+β1)/(1−β1) for Adam (Cohen et al. 2022,
    arXiv 2207.14484), 2 for SGD without momentum. Higher: hinge-loss slingshots are named one step later."""
    kick_displacement: float = 0.05
    """Smallest movement of the mean row's logits by the layers below the head, in nats, for a kick. It
    excludes a single noisy tensor. Higher than .1: slingshots under hinge loss are missed."""
    kick_turn: float = 0.5
    """Minus the cosine of the last two gradients at which a kick needs no decayed second moment. Under strong
    weight decay the gradient comes back before the second moment has decayed, and then turns around."""

    kick_loss: float = 0.01
    """Share of the least loss of a slingshot that the loss must have reached in a kick. Lower: alarms before
    bursts of a hinge loss that nobody would see. Measured: .012 and more before slingshots that no other rule
    saw coming."""
    kick_agreement: float = 0.2
    """Cosine of successive gradients, averaged over 3 steps, at which a kick counts where each step has other
    rows. Measured: up to .1 where single minibatches are hard, .2 and more before slingshots."""

    # --- edge of stability (Cohen et al. 2022; Bai et al. 2025, arXiv 2506.04805) ---------------
    swing_alignment: float = 0.4
    """Minus the cosine of successive gradients, averaged over 3 steps, at which the optimizer overshoots.
    Gradients of minibatches do not oppose each other. Higher: less lead (.6: one step)."""
    overshoot_displacement: float = 0.1
    """Movement of the mean row's logits by the layers below the head, in nats, at which gradients that oppose
    each other mean *at risk*. Lower: more lead, and alerts of oscillations that die down."""
    overshoot_swell: float = 10.0
    """Ratio of that movement to its own recent minimum that *at risk* requires as well. Lower: runs that live
    at the edge of stability are called at risk (under label smoothing .1 nat alone: four times as often)."""
    overshoot_turn: float = 0.7
    """Minus the cosine of the last two gradients at which twice ``overshoot_displacement`` means *at risk*
    before the average of the cosine shows it. Lower: minibatch runs are called at risk a few times."""
    swing_curvature: float = 0.25
    """Smallest secant curvature of an oscillation, as a share of the stability limit. Lower: under label
    smoothing, four times as many oscillations that die down are called imminent."""
    swing_displacement: float = 0.3
    """Movement of the mean row's logits by the layers below the head, in nats, at which an oscillation is
    *imminent*. Lower: more lead (.2: one step), and three times the false alarms under label smoothing."""
    swing_exit: float = 0.1
    """Movement in nats below which that ends. It ends, too, when the alignment has fallen to half."""
    diverging_alignment: float = 0.9
    """Minus the averaged cosine of successive gradients at which an oscillation counts as diverging: the
    update has one direction left. Lower: oscillations of many directions, which die down."""
    diverging_curvature: float = 1.03
    """Secant curvature of a diverging oscillation, as a share of the stability limit. Above 1 every step is
    larger than the one before; the estimate is a little low. Lower: twice the alarms that lead to nothing."""
    diverging_rise: float = 0.7
    """Rise of the loss above its running average, in nats of log loss, that it requires: a doubling. Lower:
    regressions that live at the edge of stability are called imminent."""
    diverging_steps: float = 16.0
    """Most steps until the loss of a slingshot, if the gradient goes on growing as it does. Higher: more
    lead, and alarms of oscillations that stop growing."""
    surging_rise: float = 1.5
    """Rise of the loss above its running average, in nats of log loss, in a surge. Lower: alarms of
    oscillations that die down."""
    surging_steps: float = 1.0
    """Most steps until the loss of a slingshot in a surge. Higher: more alarms before mere bursts."""
    overreach_ratio: float = 4.0
    """Predicted reduction of the loss over the loss, above which an update raises a quadratic loss of its own
    rows (``rules/overreach.py``). This follows from the formula and is no fitted level. Higher: less lead."""
    overreach_rms_t: float = 1.5
    """RMS_t of an update that overreaches. Lower: alarms in runs whose usual updates are long for a minibatch
    that is nearly fitted. Higher: fewer steps of lead."""
    overreach_steps: float = 8.0
    """Most steps until the loss of a slingshot, if each raises the loss as if it were quadratic. Higher:
    alarms of full-batch runs that live at the edge of stability."""
    overreach_rise: float = 1.5
    """Rise of the loss above its running average, in nats of log loss, in an overreach. Lower: alarms of
    oscillations that die down."""
    swing_settles: float = 3.0
    """Steps, in τ, before an oscillation counts while the loss is above ``spike_high``. By then 95% of the
    second moment are of real gradients. Lower: networks that oscillate while the loss first falls are called
    imminent."""

    # --- oscillations and kicks ------------------------------------------------------------------
    loss_stands_out: float = 0.15
    """Rise of the loss above its running average, in nats of log loss, that the alarm of a kick or an
    oscillation requires: a run that lives at the edge of stability oscillates for good. Higher: less lead."""

    # --- what a slingshot is ---------------------------------------------------------------------
    # Losses are in U: 1 for a loss in nats, else the loss at which the run began (``loss_baseline.py``).
    spike_floor: float = 1e-7
    """Losses below this, in U, count as this. Lower: a leap between losses that do not matter counts."""
    spike_leap: float = 3.0
    """Smallest rise above the running average, in decades, of a leap. Measured: 6 or more before most
    slingshots of full batches; in runs that fit minibatches, ordinary losses rise by up to 4. Lower: those
    become slingshots."""
    spike_leap_loss: float = 1e-3
    """Loss in U that a leap of a cross-entropy must exceed; another loss must exceed ``spike_low``. Lower:
    small bursts count as slingshots."""
    spike_low: float = 1e-2
    """Loss in U below which a slingshot ends that was above ``spike_high`` (W. Wu 2024), if the average was
    below this before. Lower: slingshots last longer."""
    spike_high: float = 1e-1
    """Loss in U that a climb must exceed: W. Wu's upper level. Lower: small spikes count, too."""
    spike_rise: float = 2.303
    """Smallest rise of log loss above its running average in a climb, in nats: a decade. So W. Wu's levels
    (from below 1e-2 to above 1e-1) are the case of a low loss. Lower: a harder data set is a slingshot."""
    spike_nats: float = 1.0
    """Rise above the running average, in U, that is enough for a climb of a high loss: of a language model,
    one nat (perplexity × 2.7). Lower: a change of the data is a slingshot."""
    spike_sigmas: float = 6.0
    """Smallest mean rise of log loss above its running average in a spike, in standard deviations; each loss
    must rise by half of it. A slow rise must be so many times the usual distance from the lowest level.
    Lower: bad minibatches become slingshots."""
    spike_burst: float = 1.5
    """Smallest rise in decades of a burst: a rise that is no slingshot, but ends an *imminent* alert as one
    that was right. Lower: noise counts as a burst."""
    recovered: float = 2.0
    """Time in τ (10 to 200 steps) that the loss must stay low before a new slingshot may begin. Lower: one
    slingshot with aftershocks becomes several alerts."""

    # --- what is not absorption ------------------------------------------------------------------
    unexplained_enter: float = 0.2
    """Share of live rows whose violation rounding cannot explain, at which the loss counts as breaking the
    zero-sum by design (z-loss, logit penalties, soft-capping, regression). Higher: such losses cause
    alerts."""
    unexplained_exit: float = 0.02
    """Share of such rows below which the loss no longer counts as breaking the zero-sum by design."""

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if not (isinstance(value, (int, float)) and math.isfinite(value) and value > 0):
                raise ValueError(f"Thresholds.{item.name} must be a positive finite number, got {value!r}.")
        for low, high in (
            ("absorbing_exit", "absorbing_enter"),
            ("imminent_exit", "imminent_lowest"),
            ("imminent_lowest", "imminent_displacement"),
            ("coasting_enter", "coasting_exit"),
            ("rms_t_exit", "rms_t_imminent"),
            ("rms_t_exit", "rms_t_steep"),
            ("rms_t_imminent", "rms_t_minibatch"),
            ("swing_exit", "swing_displacement"),
            ("spike_floor", "spike_leap_loss"),
            ("spike_leap_loss", "spike_high"),
            ("spike_low", "spike_high"),
            ("spike_burst", "spike_leap"),
            ("unexplained_exit", "unexplained_enter"),
        ):
            if getattr(self, low) >= getattr(self, high):
                raise ValueError(
                    f"Thresholds.{low} ({getattr(self, low)}) must be below Thresholds.{high} "
                    f"({getattr(self, high)}): without this hysteresis, one event becomes several alerts."
                )

    def to_json(self) -> dict[str, float]:
        return asdict(self)
