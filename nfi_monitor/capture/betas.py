"""Read what an optimizer's ``betas`` mean: which of them averages the squared gradient."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

Slot = tuple[str, int | None]
"""Where a parameter group keeps a decay rate: ``group[name]`` or ``group[name][index]``."""

ASSUMED_BETAS = (0.9, 0.99)
"""(β1, β2) of an optimizer that has no betas (SGD, RMSprop, Adafactor), for τ = 1/(1−β2) = 100 steps.

Such an optimizer has no second moment of that form, but waiting times and intervals are counted in τ.  100
steps is RMSprop's own default (alpha=.99).  Rejected: Adam's .999, because a run at risk would be read a
quarter as often, and a replay would wait ten times as long for a slingshot."""

_SECOND_AVERAGES_NOTHING = ("lion", "aggmo")
"""Parts of names of optimizers whose betas all belong to momenta. (PNM's second beta is 1.)"""

_FIRST_MOMENT = re.compile(r"exp_avg|m|mu|state1|qmap1|absmax1|step|.*moment(um)?(_buffer)?")
"""Names of entries that are no second moment. A state with no other entries has no second moment."""

_SINGLE = ("beta2", "alpha", "rho", "beta", "sqr_mom")
"""Names under which a group may keep the decay of its second moment alone."""


def slots(group: Mapping[str, Any]) -> list[Slot]:
    """Return where a group may keep the decay rate of its second moment, the likeliest place first."""
    betas = _numbers(group.get("betas"))
    places: list[Slot] = [("betas", index) for index in range(1, len(betas))]
    places += [(name, None) for name in _SINGLE]
    return [place for place in places if value_at(group, place) is not None]


def value_at(group: Mapping[str, Any], slot: Slot) -> float | None:
    """Return the decay rate at a place, 0 ≤ β < 1; None if there is none."""
    name, index = slot
    values = _numbers(group.get(name)) if index is not None else _numbers([group.get(name)])
    at = index or 0
    if at >= len(values):
        return None
    return values[at] if 0.0 <= values[at] < 1.0 else None


def betas_of(
    optimizer: object, group: Mapping[str, Any], state: Mapping[str, Any], slot: Slot | None
) -> tuple[float, float] | None:
    """Return (β1, β2) of a group; None for optimizers without a decay of the squared gradient.

    ``state``: that of one parameter, empty before its first step.  ``slot``: where β2 is, if that is known
    from how the second moment moves.
    """
    betas = _numbers(group.get("betas"))
    first = betas[0] if betas and 0.0 <= betas[0] < 1.0 else ASSUMED_BETAS[0]
    if slot is not None:
        beta2 = value_at(group, slot)
        return None if beta2 is None else (first, beta2)
    kind = type(optimizer).__name__.lower()
    if any(name in kind for name in _SECOND_AVERAGES_NOTHING):
        return None
    if state and all(_FIRST_MOMENT.fullmatch(str(name)) for name in state):
        return None
    if kind.endswith("adafactor"):  # its decay grows with the step: 1 − t^decay_rate
        return None
    # Adan's second averages differences of gradients, and its third the squares.
    adan = len(betas) > 2 and ("adan" in kind or "exp_avg_diff" in state)
    beta2 = value_at(group, ("betas", 2 if adan else 1))
    return (first, beta2) if beta2 else None  # 0 averages nothing: bitsandbytes gives it to SGD and LARS


def _numbers(values: Any) -> list[float]:
    """Return a sequence of numbers as floats, up to the first entry that is no number."""
    found: list[float] = []
    with suppress(TypeError, ValueError, RuntimeError):
        for value in () if values is None or isinstance(values, str) else values:
            found.append(float(value))
    return found
