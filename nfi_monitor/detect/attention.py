"""Decide how many of the next steps to read, from the state of the detector."""

from __future__ import annotations

from enum import Enum

from nfi_monitor.detect.alert_book import AlertBook
from nfi_monitor.detect.approach import growth_to_imminent, hidden_growth
from nfi_monitor.detect.rules import NEARING_RULES
from nfi_monitor.detect.rules.numeric import Absorbing
from nfi_monitor.detect.rules.second_moment import Coasting
from nfi_monitor.detect.situation import Situation
from nfi_monitor.types import AlertKind, Phase

NATS = 0.4
"""Growth of δ, in nats, for which one unit of pause is left before *imminent*.

At β2 = .95 a unit is .4 τ, and at larger β2 less.  Measured in 14 recorded runs: with .4 and .8, each of the
49 numeric slingshots that are warned of at every step is warned of, .35 τ later or as early (medians).  A
state that does not grow is read as rarely as one far below the levels."""


class Attention(Enum):
    """How many of the next steps the detector wants to read."""

    SELDOM = "seldom"
    RARELY = "rarely"
    SOMETIMES = "sometimes"
    SOON = "soon"
    OFTEN = "often"
    ALWAYS = "always"

    @property
    def units(self) -> int:
        """Length of the pause after a pair of readings, in intervals of the schedule; 0: no pairs."""
        return _UNITS.get(self, 0)

    @property
    def is_calm(self) -> bool:
        """Whether only the loss can be a reason to read one of the next few steps."""
        return self.units >= 2


_UNITS = {Attention.SELDOM: 4, Attention.RARELY: 2, Attention.SOMETIMES: 2, Attention.SOON: 1}
_ABSORBING = (Attention.SELDOM, Attention.SOMETIMES, Attention.SOON)
"""Pauses of a run that absorbs, the longest first."""


def attention_of(phase: Phase, book: AlertBook, now: Situation) -> Attention:
    """Return how many of the next steps to read, for other reasons than an unusual loss."""
    if any([rule.nears(now) for rule in NEARING_RULES]) or book.firing(AlertKind.IMMINENT) is not None:
        return Attention.ALWAYS
    # After a loss that is NaN or Inf, the next reading shows whether the weights are finite.
    if book.firing(AlertKind.NON_FINITE) is not None:
        return Attention.ALWAYS
    if phase is Phase.HEALTHY and not book:
        return Attention.RARELY
    if now.on(Absorbing.name):
        # Rows may absorb for good.  Nothing but growth of the updates leads to a slingshot then.
        left = growth_to_imminent(now) / NATS
        if hidden_growth(now):
            left = min(left, 1.0)
        return next((item for item in _ABSORBING if item.units <= left), Attention.ALWAYS)
    if now.still:  # a kick after a vanished gradient builds up in a few steps
        return Attention.OFTEN if now.on(Coasting.name) else Attention.SELDOM
    return Attention.ALWAYS
