"""Find causes from outside of the training's own dynamics: a jump of the rate, bad data, a corrupt gradient.

Rounding, the second moment and the curvature all act through updates.  An update moves the logits by nats
that are measured.  So a loss that rises by far more, in one step, was not raised by an update: the batch did
it.  And a gradient that grows while the loss does not was not made by the loss.

The learning rate and the loss are known at every step, so a cause is found between two readings as well.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from nfi_monitor.detect.signals import felt_displacement
from nfi_monitor.detect.smoothing import Ema, Stateful, of_its_kind
from nfi_monitor.schema import decode
from nfi_monitor.types import Reading

NAN = math.nan
JUMP = 3.0
"""Ratio of the learning rate to its own recent value that counts as a jump.

A linear warm-up from 0 reaches 2.9 (its sixth step)."""
FOLLOWS = 1.2
"""Factor per step by which the value that the rate is compared with may rise."""
LASTS = (20.0, 60.0)
"""Steps in which a jump of the rate explains an event: τ, within these limits.

Measured: after rates × 5 to × 300 the loss followed within 1–40 steps, also at τ = 1,000."""
FLOOR = 1e-7
"""Losses below this count as equal: float32 rounds the loss of an absorbed row to 0."""
MEMORY = 16
"""Number of losses before the last one that show what an ordinary loss is."""
ROUNDED = 1e-6
"""Reported losses up to this may be off by rounding."""
ROUNDED_HALF = 2.0**-8
"""The same of a loss in half precision: a unit of bfloat16's last place beside 1."""
LEAP = 1.5
"""Smallest rise of log loss in one step, in nats, that is compared with what the update moved."""
AT_ONCE = 0.7
"""Share of the whole rise that one step must bring, to be a leap. Oscillations build up in 3–18 steps."""
REACH = 4.0
"""Rise of log loss, in nats, for which one nat of measured movement can account.

A margin moves by at most twice the displacement of a logit. Twice that, because the largest row may be
unsampled, and the movement of the features is known for the mean row only."""
AFTERWARDS = 12
"""Steps after a leap, or a corrupt gradient, in which its update may still raise the loss."""
OUTWEIGHS = 10.0
"""Ratio of two rises from which a leap is no result of one shortly before it: minibatches that fit differ by
factors, and a bad one may follow at once."""
UNREAD = 3
"""Largest number of updates, between the last reading and a leap, whose movements are added.

Many updates that move the logits one way raise the loss step by step, and so make no leap."""
BURST = 3.0
"""Ratio of the gradient norm to its own average, at an ordinary loss, that counts as a burst."""
CORRUPT = 2000.0
"""Ratio from which no data of the run made the gradient.

Rounding reaches 60, and 516 in half precision: when a first row is no longer absorbed, its gradient comes
back while the loss, made of absorbed rows, hardly moves.  An oscillation reaches 156 before the loss rises.
The smallest corrupt gradient that was read had 12,700."""
BUILDS_UP = 2
"""Steps between two bursts of a gradient that grows: an oscillation takes two."""
REMEMBERED = 5.5
"""Ratio from which the second moment keeps a gradient that no loss explains (see ``Outside.remembered``).

Measured at slingshots of the recorded runs: up to 4.8, and once 25 in a run that absorbs, where
the violation names the cause before this is asked."""
AVERAGED = 50.0
"""Time constant, in steps, of the averages of gradient norm and of gradient norm per loss."""


@dataclass(frozen=True)
class Outside:
    """What came from outside before an event. NaN: not seen."""

    rate_jump: float = NAN
    """Largest ratio of the learning rate to its value before, while that can explain the event."""
    leap: float = NAN
    """Rise of log loss in one step, in nats, if the rise came at once."""
    rise: float = NAN
    """The same rise of the loss itself."""
    moved: float = NAN
    """Nats by which the updates since the last reading before the leap can have moved the logits."""
    read_before: bool = False
    """Whether the step right before the leap was read."""
    per_nat: bool = False
    """Whether the loss rises by at most twice what a logit moves, as a cross-entropy does."""
    burst: float = NAN
    """Largest ratio of the gradient norm to its own average, at a loss that had not risen likewise."""
    remembered: float = NAN
    """Ratio of the gradient that the second moment has taken in since before the event to the event's own.

    By v ← β2·v + (1−β2)·g², one gradient G raises v by G²/τ, and RMS_t compares the event's gradient g with
    v.  So G/g = sqrt(τ·(1 − v before/v now))/RMS_t.  If n steps of the event had the gradient g, this is
    sqrt(n), so it is divided by that.  NaN if no step of the event was read.
    """

    @property
    def outgrown(self) -> bool:
        """Whether the second moment remembers a gradient far larger than those of the event."""
        return self.remembered >= REMEMBERED

    @property
    def unexplained_leap(self) -> bool:
        """Whether one step raised the loss by far more than its update can have done."""
        by_nats = self.per_nat and self.leap > LEAP and self.rise > REACH * self.moved
        return by_nats or self.leaps_beyond(1.0)

    def leaps_beyond(self, factor: float) -> bool:
        """Return whether the update cannot have raised the loss, even if it moved ``factor`` times as far."""
        moved = factor * self.moved
        # A cross-entropy or a hinge loss rises by at most twice what a logit moves.
        return self.leap > LEAP + REACH * moved and self.rise > moved

    @property
    def corrupt_gradient(self) -> bool:
        """Whether a gradient came that no data of the run makes."""
        return self.burst >= CORRUPT

    @property
    def gradient_grew(self) -> bool:
        """Whether the gradient had grown far before the loss rose, but as the run's data can make it."""
        return OUTWEIGHS <= self.burst < CORRUPT

    def state_dict(self) -> dict[str, Any]:
        """Return the fields as plain types."""
        return asdict(self)

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Outside:
        """Restore what :meth:`state_dict` returned. Raises ValueError for fields of other types."""
        found: Outside = decode(cls, state)
        return found


class OutsideWatch(Stateful):
    """Watch the learning rates and losses of every step, and the gradient norms of the readings."""

    __slots__ = (
        "_norm", "_per_loss", "burst", "burst_at", "jump", "jump_at", "jump_until", "leap", "leap_at",
        "losses", "moved", "moved_at", "per_nat", "quiet", "quiet_at", "rates", "references", "rise",
        "second_moments", "step",
    )  # fmt: skip

    def __init__(self) -> None:
        self.rates: list[float] = []  # learning rate of each parameter group
        self.references: list[float] = []  # what each is compared with
        self.jump = NAN  # largest ratio of the last jump
        self.jump_at = self.jump_until = -math.inf  # first and last step at which the rate stood above
        self.step = 0  # step of the last loss
        self.losses: list[float] = []  # the last MEMORY + 1 log losses
        self.leap, self.rise = NAN, NAN  # rise of log loss and of the loss in one step
        self.leap_at = 0  # that step
        self.moved, self.moved_at = NAN, 0  # nats that the last reading's update moved, and its step
        self.quiet, self.quiet_at = NAN, 0  # the same of the last reading before the leap
        self.burst, self.burst_at = NAN, 0  # ratio and step of the last burst of the gradient
        self.per_nat = False  # whether the last reading's loss is a cross-entropy
        self.second_moments: list[float] = []  # step, RMS_t and mean sqrt(v̂) of each of the last readings
        self._norm, self._per_loss = Ema(), Ema()

    def update_rates(self, step: int, rates: Sequence[float]) -> None:
        """Add the learning rates of step ``step``, one for each parameter group."""
        rates = list(rates)
        if rates == self.rates and rates == self.references:
            return
        if len(rates) != len(self.references):  # another optimizer's state, or a new group
            self.references = rates
        ratios = [
            rate / low for rate, low in zip(rates, self.references, strict=True) if rate > 0 and low > 0
        ]
        self.references = [
            min(rate, FOLLOWS * before) if before > 0 else rate
            for rate, before in zip(rates, self.references, strict=True)
        ]
        self.rates = rates
        jump = max(ratios, default=1.0)
        if jump >= JUMP:
            if step - self.jump_until > LASTS[1]:
                self.jump, self.jump_at = jump, step
            self.jump, self.jump_until = max(jump, self.jump), step

    def update_loss(self, step: int, loss: float) -> None:
        """Add the loss of a step, before the reading of this step. A step that was added is skipped."""
        if step <= self.step and step > self.step - 2 * MEMORY:
            return
        follows = step == self.step + 1
        self.step = step
        if not math.isfinite(loss):
            return
        log_loss = math.log(max(loss, FLOOR))
        leap = log_loss - self.losses[-1] if follows and len(self.losses) > MEMORY // 2 else 0.0
        rise = loss - math.exp(self.losses[-1]) if leap >= LEAP else NAN
        new = leap >= LEAP and (step - self.leap_at > AFTERWARDS or rise > OUTWEIGHS * self.rise)
        if new and leap >= AT_ONCE * (log_loss - _median(self.losses)):
            self.leap, self.leap_at, self.rise = leap, step, rise
            self.quiet, self.quiet_at = self.moved, self.moved_at
        self.losses = [*self.losses[-MEMORY:], log_loss]

    def update(self, reading: Reading, moved: float, *, per_loss: bool, loss_bits: int = 0) -> None:
        """Add a full reading. ``moved``: nats by which its update moved the logits.

        ``per_loss``: the gradient vanishes with the loss, as under cross-entropy.  ``loss_bits``: size of the
        loss's dtype, as in ``RunContext``.  A loss within rounding says nothing about its gradient.
        """
        if math.isfinite(moved):
            self.moved, self.moved_at = moved, reading.step
        self.per_nat = per_loss
        norm, by_head = reading.get("gradient_norm"), reading.get("head_loss")
        loss = reading.get("loss", by_head)
        if per_loss and 0 < loss_bits <= 16 and loss <= ROUNDED_HALF:
            loss = NAN
        elif per_loss and loss <= ROUNDED:  # the loss at the head is not rounded, but may be another one
            loss = by_head if by_head <= 10.0 * ROUNDED else NAN
        if not (math.isfinite(norm) and norm > 0 and math.isfinite(loss) and loss > 0):
            return
        log_norm, log_ratio = math.log(norm), math.log(norm) - math.log(loss)
        risen = log_norm - self._norm.value
        if per_loss:
            risen = min(risen, log_ratio - self._per_loss.value)
        elif len(self.losses) > MEMORY // 2:  # the loss itself must be an ordinary one
            risen -= max(math.log(max(loss, FLOOR)) - _median(self.losses), 0.0)
        burst = math.exp(min(risen, 50.0)) if math.isfinite(risen) else NAN
        if reading.step - self.burst_at <= BUILDS_UP and OUTWEIGHS <= self.burst < CORRUPT <= burst:
            burst = math.nextafter(CORRUPT, 0.0)  # it has grown to this, and a corrupt one comes at once
        if burst >= BURST and (reading.step - self.burst_at > AFTERWARDS or not self.burst > burst):
            self.burst, self.burst_at = burst, reading.step
        cap = math.log(BURST)
        self._norm.update(reading.step, min(log_norm, _above(self._norm.value, cap)), AVERAGED)
        self._per_loss.update(reading.step, min(log_ratio, _above(self._per_loss.value, cap)), AVERAGED)

    def remember(self, reading: Reading) -> None:
        """Keep RMS_t and the second moment of a full reading, also in an event."""
        # Of the head: below it, coordinates without a gradient (dead units) have a small second moment.
        values = reading.get("rms_t_head"), reading.get("head_sqrt_exp_avg_sq_mean")
        if 0.0 < values[0] < math.inf and 0.0 < values[1] < math.inf:
            known = self.second_moments
            kept = len(known)
            while kept and known[kept - 3] >= reading.step:  # the step counter was set back
                kept -= 3
            first = max(kept - 3 * (MEMORY - 1), 0)
            self.second_moments = [*known[first:kept], float(reading.step), *values]

    def _second_moments(self) -> list[tuple[float, ...]]:
        """Return (step, RMS_t, mean sqrt(v̂)) of each of the last MEMORY readings."""
        flat = self.second_moments
        return list(zip(flat[::3], flat[1::3], flat[2::3], strict=True))

    def before(self, start: int, tau: float, *, leap: bool = True) -> Outside:
        """Return what came before an event that starts at step ``start``. ``tau``: in optimizer steps.

        ``leap``: False leaves ``Outside.leap`` NaN: a leap of the loss is an event itself.
        """
        lasts = min(max(tau, LASTS[0]), LASTS[1])
        jumped = self.jump >= JUMP and self.jump_at < start <= self.jump_until + lasts
        leapt = self.leap >= LEAP and 0 <= start - self.leap_at <= AFTERWARDS
        gap = max(self.leap_at - self.quiet_at, 1)
        burst = self.burst >= BURST and 0 < start - self.burst_at <= lasts
        return Outside(
            rate_jump=self.jump if jumped else NAN,
            leap=self.leap if leap and leapt else NAN,
            rise=self.rise if leapt else NAN,
            moved=self.quiet * min(gap, UNREAD) if leapt else NAN,
            read_before=leapt and gap == 1,
            per_nat=self.per_nat,
            burst=self.burst if burst else NAN,
            remembered=self._remembered(start, tau),
        )

    def raised(self, step: int, tau: float) -> bool:
        """Return whether the batch, not an update, has raised the loss in the last steps before ``step``."""
        recent = 0 <= step - self.leap_at <= AFTERWARDS
        return recent and self.before(step, tau).unexplained_leap

    def _remembered(self, start: int, tau: float) -> float:
        """Return ``Outside.remembered`` of an event that starts at step ``start``."""
        known = self._second_moments()
        before = [item for item in known if item[0] < start]
        if not before or len(before) == len(known):
            return NAN
        # The gradient may have come some steps before the loss rose.
        early = [item for item in before if item[0] <= start - AFTERWARDS]
        _, _, root_before = early[-1] if early else before[0]
        step, rms_t, root = known[-1]
        taken_in = max(1.0 - (root_before / root) ** 2, 0.0)
        return math.sqrt(tau * taken_in / (step - start + 2.0)) / rms_t

    def state_dict(self) -> dict[str, Any]:
        """Return the state in plain types."""
        values = {name: getattr(self, name) for name in self.__slots__}
        return {k: v.state_dict() if isinstance(v, Ema) else v for k, v in values.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        for name in self.__slots__:
            if name in state:
                value = getattr(self, name)
                if isinstance(value, Ema):
                    value.load_state_dict(state[name])
                else:
                    setattr(self, name, of_its_kind(value, state[name], name))


def _median(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]


def _above(average: float, cap: float) -> float:
    """Return the largest value that an average may take in: an outlier must not become the usual."""
    return average + cap if math.isfinite(average) else math.inf


def moved_by(reading: Reading) -> float:
    """Return the nats by which an update moved the logits, as far as they were measured."""
    by_head = max(reading.get("logit_displacement", 0.0), reading.get("margin_displacement", 0.0))
    below = felt_displacement(reading)
    if by_head == 0.0 and not math.isfinite(below):
        return math.nan
    return by_head + (below if math.isfinite(below) else 0.0)
