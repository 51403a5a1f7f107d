"""Find the second moment in an optimizer's state, and read it at sampled coordinates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from nfi_monitor.capture.quantized import Quantized, quantized_moment
from nfi_monitor.capture.sampling import CoordinateSample, local

SECOND_MOMENTS = ("max_exp_avg_sq", "exp_avg_sq", "state2")
"""Names of the second moment in an optimizer's state. With amsgrad the step divides by the maximum. The last
name is that of bitsandbytes."""


def second_moment(state: Mapping[str, Any]) -> Tensor | Quantized | None:
    """Return the second moment of one parameter's optimizer state; None if it has none."""
    in_bits = quantized_moment(state)
    if in_bits is not None:
        return in_bits
    for name in SECOND_MOMENTS:
        if isinstance(state.get(name), Tensor):
            return state[name]  # type: ignore[no-any-return]
    return None


def sample_moments(sample: CoordinateSample, moments: Sequence[Tensor | Quantized | None]) -> list[Tensor]:
    """Return the sampled coordinates of each moment, float32 [n]; some moments may be kept in 8 bits."""
    values = []
    for moment, stride in zip(moments, sample.strides, strict=True):
        if isinstance(moment, Quantized):
            values.append(moment.sample(stride))
        elif moment is not None:
            values.append(local(moment).detach().reshape(-1)[::stride].float())
    return values
