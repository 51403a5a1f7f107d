"""Compare a step of second moments with what it should be, under each assumption about how they are made."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nfi_monitor.capture import devices
from nfi_monitor.capture.betas import Slot, slots, value_at
from nfi_monitor.capture.sampling import CoordinateSample

_SURE = 8.0
"""A coordinate counts if it must move by this many times its rounding."""
_ROUNDINGS = 4.0
"""Roundings of v that a step of an optimizer may add up."""
_PLACES = 3
"""Maximum number of places that are tried for β2."""


class Kind(NamedTuple):
    """How a second moment is made: ``slot`` is the place of its β2; ``unbiased``: it needs no correction.

    ``coupled``: it is made of gradients with L2 decay.
    """

    slot: Slot
    unbiased: bool
    coupled: bool = False


class Trial(NamedTuple):
    """An assumption about each of T tensors: ``rates`` of 1 − β2 (NaN: none), L2 ``decays``, ``kinds``."""

    rates: list[float]
    decays: list[float]
    kinds: list[Kind | None]


def trials(groups: Sequence[Mapping[str, Any] | None], taken: Sequence[float | None]) -> list[Trial]:
    """Return what the second moments may be: by each β2 of a group, corrected or not, of gradients with L2.

    ``groups``: the parameter group of each tensor, None for tensors that are not checked.  ``taken``: how
    many gradients each moment has averaged after this step, None where that is unknown.
    """
    found = []
    for place in range(_PLACES):
        for unbiased in (False, True):
            for coupled in (False, True):
                each = [
                    _assume(group, place, steps if unbiased else math.inf, coupled=coupled)
                    for group, steps in zip(groups, taken, strict=True)
                ]
                if any(one is not None for one in each):
                    found.append(
                        Trial(
                            [math.nan if one is None else one[0] for one in each],
                            [0.0 if one is None else one[1] for one in each],
                            [None if one is None else Kind(one[2], unbiased, coupled) for one in each],
                        )
                    )
    return found


def _assume(
    group: Mapping[str, Any] | None, place: int, taken: float | None, *, coupled: bool
) -> tuple[float, float, Slot] | None:
    """Return 1 − β2 of one step, the L2 decay, and the place of β2; None if there is no such assumption."""
    if group is None or not taken:
        return None
    places = slots(group)
    decay = group.get("weight_decay") if coupled else 0.0
    if place >= len(places) or not isinstance(decay, (int, float)) or (coupled and not decay):
        return None
    beta2 = value_at(group, places[place])
    if beta2 is None:
        return None
    # A moment that is corrected as it is kept moves by (1 − β2) / (1 − β2^t).
    return (1.0 - beta2) / (1.0 - beta2**taken), float(decay), places[place]


def fit(
    sample: CoordinateSample,
    trial: Trial,
    grad: Tensor,
    weights: Tensor,
    before: Tensor,
    now: Tensor,
    rounding: float,
) -> Tensor:
    """Return, for each tensor, how many coordinates count, and how many agree with the trial, [2, T].

    ``grad``, ``weights``: before the step.  ``before``, ``now``: second moments before and after it; all [C].
    ``rounding``: the largest machine epsilon of their dtypes.
    """
    rates = devices.send(trial.rates, grad.device, grad.dtype)[sample.segments]
    if any(trial.decays):
        grad = grad + devices.send(trial.decays, grad.device, grad.dtype)[sample.segments] * weights
    square = grad * grad
    must = rates * (square - before)
    smallest = torch.finfo(torch.float32).smallest_normal
    noise = _ROUNDINGS * rounding * torch.maximum(before, now) + smallest
    counts = must.abs() > _SURE * noise
    allowed = noise + max(1e-3, _SURE * rounding) * rates * square
    agree = counts & ((now - before - must).abs() <= allowed)
    return torch.stack([sample.per_tensor(counts.to(grad.dtype)), sample.per_tensor(agree.to(grad.dtype))])
