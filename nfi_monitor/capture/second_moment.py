"""Find the second moment in an optimizer's state, and read it at sampled coordinates."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from nfi_monitor.capture.quantized import Quantized, quantized_moment
from nfi_monitor.capture.sampling import CoordinateSample, local

SECOND_MOMENTS = ("max_exp_avg_sq", "exp_avg_sq", "state2", "sqr_avg", "square_avg")
"""Names of the second moment in an optimizer's state. With amsgrad the step divides by the maximum. The last
three names are those of bitsandbytes, of fastai, and of RMSprop."""

OTHER_STEPS = ("acc_delta",)
"""Names of entries beside a ``square_avg`` that more than its root divides the step by (Adadelta)."""

OTHER_NAMES = "exp_avg_sq"
"""Part of the name under which other optimizers keep it (heavyball: ``update_by_adam_exp_avg_sq_0``)."""

_FACTORS = ("row", "col")
"""Parts of names of factored second moments, which have one number for each row or column."""


def entries(state: Any) -> Mapping[str, Any]:
    """Return the named entries of one parameter's state; empty if it has none.

    Some optimizers nest them in one more mapping: ``{0: {"exp_avg": ...}}`` (heavyball).
    """
    if not isinstance(state, Mapping):
        return {}
    inner = [value for value in state.values() if isinstance(value, Mapping)]
    return inner[0] if len(state) == len(inner) == 1 else state


def states(optimizer: Optimizer) -> Iterator[tuple[Tensor, Mapping[str, Any]]]:
    """Return (parameter, entries) of each parameter that has a state.

    ``optimizer.state`` may hold more than that: a step count for all parameters, for example.
    """
    for key, state in list(optimizer.state.items()):
        if isinstance(key, Tensor):
            found = entries(state)
            if found:
                yield key, found


def second_moment(state: Mapping[str, Any]) -> Tensor | Quantized | None:
    """Return the tensor that is named like the second moment of one parameter; None if there is none.

    The name alone does not tell what the tensor means: see :mod:`nfi_monitor.capture.moment_check`.
    """
    state = entries(state)
    in_bits = quantized_moment(state)
    if in_bits is not None:
        return in_bits
    if any(name in state for name in OTHER_STEPS):
        return None
    for name in SECOND_MOMENTS:
        if isinstance(state.get(name), Tensor):
            return state[name]  # type: ignore[no-any-return]
    others = [
        value
        for name, value in state.items()
        if isinstance(value, Tensor) and isinstance(name, str) and OTHER_NAMES in name
        if not any(factor in name for factor in _FACTORS)
    ]
    return others[0] if len(others) == 1 else None


def sample_moments(sample: CoordinateSample, moments: Sequence[Tensor | Quantized]) -> Tensor:
    """Return the sampled coordinates of each moment, float32 or float64 [C]; some may be kept in 8 bits."""
    if any(isinstance(moment, Quantized) for moment in moments):
        return sample.pack(
            [
                moment.sample(stride)
                if isinstance(moment, Quantized)
                else local(moment).detach().reshape(-1)[::stride].float()
                for moment, stride in zip(moments, sample.strides, strict=True)
            ]
        )
    return sample.gather(moments)  # type: ignore[arg-type]


def is_freed(tensor: Tensor) -> bool:
    """Return whether the memory of a tensor was given back, although the tensor is still there."""
    return tensor.numel() > 0 and not tensor.untyped_storage().nbytes()
