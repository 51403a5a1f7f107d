"""Keep the facts about the loss that the rows show, and find the precision in which it is computed."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from nfi_monitor.measure import absorption, zero_sum

_NARROWER = {
    torch.float64: (torch.float32, torch.float16, torch.bfloat16),
    torch.float32: (torch.float16, torch.bfloat16),
}


class LossKind(NamedTuple):
    """The facts about the loss that the rows have shown so far, scalar tensors.

    ``eps``: machine epsilon of the precision in which the loss is computed.  ``floor``: the violation that
    rounding may cause in this precision.  ``level``: ln of the size below which its gradients underflow.
    ``scale``: the largest s in g = s·(p − y) so far, 0 while no unsure row has shown it.  ``slope``: the
    factor between the head's logits and those of the loss (:mod:`nfi_monitor.measure.logit_scale`).
    ``mismatch``: the share of rows whose gradient is none of a cross-entropy; ``uneven``: of those with a
    smaller weight (:mod:`nfi_monitor.measure.cross_entropy_fit`).
    """

    eps: Tensor
    floor: Tensor
    level: Tensor
    scale: Tensor
    slope: Tensor = torch.ones((), device="cpu")
    mismatch: Tensor = torch.zeros((), device="cpu")
    uneven: Tensor = torch.zeros((), device="cpu")


def shown_precision(grad: Tensor, known: LossKind | None = None) -> LossKind:
    """Find the precision in which the gradient was computed, which may be below its dtype's. ``grad`` [N, K].

    If all entries of a float32 gradient are bfloat16 (float16) numbers, the loss was computed in that
    precision. A gradient of zeros shows nothing; then ``known`` is kept.
    """
    dtype = zero_sum.accumulation_dtype(grad.dtype)
    finite = absorption.finite_entries(grad)
    nonzero = finite.abs().amax() > 0
    eps = torch.full((), torch.finfo(grad.dtype).eps, device=grad.device)
    for narrow in _NARROWER.get(grad.dtype, ()):
        fits = nonzero & ~absorption.wider(finite, narrow)
        eps = torch.where(fits, torch.finfo(narrow).eps, eps)
    if known is not None:
        eps = torch.where(nonzero, eps, known.eps)
    half = torch.finfo(torch.float16).eps
    level = torch.where(
        eps == half, absorption.underflow_level(torch.float16), absorption.underflow_level(grad.dtype)
    )
    scale = torch.zeros((), dtype=dtype, device=grad.device) if known is None else known.scale
    slope = torch.ones((), dtype=dtype, device=grad.device) if known is None else known.slope
    nothing = torch.zeros((), dtype=dtype, device=grad.device)
    mismatch, uneven = (nothing, nothing) if known is None else (known.mismatch, known.uneven)
    floor = zero_sum.floor_of(eps, dtype, grad.shape[-1])
    return LossKind(eps, floor, level, scale, slope, mismatch, uneven)
