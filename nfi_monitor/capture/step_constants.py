"""Read the constants of an optimizer step: bias correction, ε_A and learning rates, for each coordinate."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from nfi_monitor.capture import devices
from nfi_monitor.capture.betas import value_at
from nfi_monitor.capture.moment_check import MomentCheck
from nfi_monitor.capture.sampling import CoordinateSample


def constants(
    check: MomentCheck,
    params: Sequence[nn.Parameter],
    group_of: Callable[[nn.Parameter], Mapping[str, Any]],
    sample: CoordinateSample,
    like: Tensor,
    step: int,
) -> tuple[Tensor | float, Tensor | float]:
    """Return (1 − β2^t, ε_A) of these tensors: scalars if all agree, else one value per coordinate [C]."""
    pairs: list[tuple[float, float]] = []
    of_group: dict[tuple[int, int], tuple[float, float]] = {}  # β2 and ε_A
    for param in params:
        group, kind = group_of(param), check.kind(param)
        found = of_group.get((id(group), id(kind)))
        if found is None:
            # Without betas, torch's default for Adam. ASSUMED_BETAS would be wrong: it is a time scale, and
            # this undoes the bias correction of a second moment that the optimizer does keep.
            decay = value_at(group, kind.slot if kind is not None else ("betas", 1))
            given = group.get("eps", 1e-8)
            found = (
                0.999 if decay is None else decay,
                float(given) if isinstance(given, (int, float)) else 0.0,
            )
            of_group[id(group), id(kind)] = found
        beta2, eps = found
        unbiased = kind is not None and kind.unbiased
        taken = host(None if unbiased else check.steps_averaged(param, group, step))
        unknown = isinstance(taken, float) and math.isnan(taken)
        correction = 1.0 if unknown else 1.0 - beta2**taken
        pairs.append((correction, eps))
        if isinstance(correction, Tensor):
            # Capturable and fused optimizers count steps on the device.  Use one value for all tensors:
            # single values would cost kernels for each, and late in training the correction is 1.
            return pairs[0]
    first = pairs[0]
    if all(pair == first for pair in pairs):
        return max(first[0], 1e-12), first[1]
    corrections, epsilons = [max(pair[0], 1e-12) for pair in pairs], [pair[1] for pair in pairs]
    return spread(corrections, sample, like), spread(epsilons, sample, like)


def rates(
    groups: Sequence[Mapping[str, Any]],
    params: Sequence[nn.Parameter],
    sample: CoordinateSample,
    like: Tensor,
) -> Tensor | None:
    """Return the learning rate of each coordinate [C], or None if all groups have the same."""
    given = [host(group.get("lr")) for group in groups]
    first = given[0]
    # Rates on a device are not compared, because that would wait for the device.
    on_device = any(isinstance(rate, Tensor) for rate in given)
    if all(rate is first or (not on_device and rate == first) for rate in given):
        return None
    rate_of = {
        id(param): rate for group, rate in zip(groups, given, strict=True) for param in group["params"]
    }
    return spread([rate_of[id(param)] for param in params], sample, like)


def host_rate(rate: Any) -> float:
    """Return a learning rate as a number; NaN if reading it would wait for the device."""
    rate = host(rate)
    return math.nan if isinstance(rate, Tensor) else float(rate)


def host(value: Any) -> Any:
    """Return a float if that needs no synchronisation, else the tensor; NaN for what is no number."""
    if isinstance(value, Tensor) and not devices.on_host(value):
        return value
    with suppress(TypeError, ValueError, RuntimeError):
        return float(value)
    return math.nan


def spread(numbers: Sequence[Tensor | float], sample: CoordinateSample, like: Tensor) -> Tensor:
    """Return one number per coordinate [C], of ``like``'s dtype, from one number per tensor."""
    if any(isinstance(number, Tensor) for number in numbers):
        each = torch.stack(
            [
                number.reshape(()).to(like.dtype) if isinstance(number, Tensor) else like.new_full((), number)
                for number in numbers
            ]
        )
    else:
        each = devices.send(numbers, like.device, like.dtype)
    return each[sample.segments]
