"""Decide how many of the next steps to read, from the state of the detector."""

from __future__ import annotations

from enum import Enum

from nfi_monitor.detect.alert_book import AlertBook
from nfi_monitor.detect.rules import RULES
from nfi_monitor.detect.rules.numeric import displacing
from nfi_monitor.detect.rules.second_moment import Coasting
from nfi_monitor.detect.situation import Situation
from nfi_monitor.types import AlertKind, Phase


class Attention(Enum):
    """How many of the next steps the detector wants to read."""

    SELDOM = "seldom"
    RARELY = "rarely"
    OFTEN = "often"
    ALWAYS = "always"

    @property
    def is_calm(self) -> bool:
        """Whether only the loss can be a reason to read one of the next few steps."""
        return self in (Attention.SELDOM, Attention.RARELY)


def attention_of(phase: Phase, book: AlertBook, now: Situation) -> Attention:
    """Return how many of the next steps to read, for other reasons than an unusual loss."""
    moves = displacing(now)
    healthy = phase is Phase.HEALTHY and not book
    # A state in which nothing moves may last for the rest of a run.  A slingshot builds up over some 20 τ, so
    # half of the readings of a healthy run show in time that something moves again.
    finite = book.firing(AlertKind.NON_FINITE) is None
    unmoved = now.still and not moves and finite and book.firing(AlertKind.IMMINENT) is None
    if (healthy or unmoved) and not any(rule.nears(now) for rule in RULES):
        if unmoved and now.on(Coasting.name):  # a kick after a vanished gradient builds up in a few steps
            return Attention.OFTEN
        return Attention.SELDOM if unmoved else Attention.RARELY
    # The phase *absorbing* alone may last for the rest of a run. No slingshot follows within τ.
    # After a loss that is NaN or Inf, the next reading shows whether the weights are finite.
    calm = phase is Phase.ABSORBING and not moves and finite
    return Attention.OFTEN if calm else Attention.ALWAYS
