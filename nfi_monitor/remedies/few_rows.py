"""Compute the mean cross-entropy of a few rows on a CPU with NumPy, in the same memory.

For a few rows, a call of torch costs more than its arithmetic, and several times as much as a call of NumPy.
The tests compare the result with :mod:`nfi_monitor.remedies.row_losses`.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nfi_monitor.remedies.row_losses import saved_gradient

SMALL = 1 << 14
"""Maximum number of logits for which NumPy is faster."""

_Array = np.ndarray[Any, Any]
_UNSIGNED = np.dtype(np.uint64)


def mean_of_few_rows(logits: Tensor, target: Tensor) -> Tensor | None:
    """Return the mean loss, or None if torch must compute it (other inputs, ignored rows, an overflow)."""
    if not (
        not torch.compiler.is_compiling()  # first, so that torch.compile does not guard the sizes
        and type(logits) is Tensor  # the memory of a subclass may not hold its values
        and logits.is_cpu
        and target.is_cpu
        and 0 < logits.numel() <= SMALL
        and (logits.dtype is torch.float32 or logits.dtype is torch.float64)
        and target.dtype is torch.int64
        and not torch._C._len_torch_dispatch_stack()  # make_fx would record constants
        and not torch._C._is_tracing()  # likewise
    ):
        return None
    try:
        z, index = logits.detach().numpy(), target.numpy()
    except (RuntimeError, TypeError):  # tensors without own memory: inside vmap, sparse
        return None
    if z.ndim != 2 or index.shape != z.shape[:1] or not z.flags.c_contiguous:
        return None
    known = _mean_and_gradient(z, index, logits.requires_grad and torch.is_grad_enabled())
    if known is None:
        return None
    result: Tensor = _attach(logits, *known)
    return result


@np.errstate(all="ignore")
def _mean_and_gradient(z: _Array, index: _Array, wanted: bool) -> tuple[_Array, _Array | None] | None:
    """Return (mean loss [], its gradient [N, K] if ``wanted``), with all logits relative to the target's.

    loss = ln(1 + Σ_{k≠r} e_k), e_k = e^(z_k − z_r).  No maximum is computed, so a margin below about −80
    (float32) overflows.  Then the result is None.
    """
    rows, classes = z.shape
    starts, ones, counts, shares = _constants(rows, classes, z.dtype)
    unsigned = index.view(_UNSIGNED)  # negative indices become large
    if unsigned.item(unsigned.argmax()) >= classes:
        return None
    own = starts + index
    # Repeat and flatten, because a broadcast operation starts a loop for each row.
    flat = z.ravel() - z.take(own).repeat(classes)
    e = np.exp(flat, out=flat).reshape(rows, classes)
    total = e.dot(counts)  # N (1 + Σ_{k≠r} e_k)
    if not total.dot(shares) < math.inf:
        return None
    flat[own] = 0.0
    mass = e.dot(ones)
    loss = np.asarray(np.log1p(mass).dot(shares))
    if not wanted:
        return loss, None
    flat[own] = -mass
    flat /= total.repeat(classes)
    return loss, e


@lru_cache(maxsize=8)
def _constants(rows: int, classes: int, dtype: np.dtype[Any]) -> tuple[_Array, _Array, _Array, _Array]:
    """Return (first index of each row, ones [K], N [K], 1/N [N])."""
    return (
        np.arange(0, rows * classes, classes),
        np.ones(classes, dtype),
        np.full(classes, rows, dtype),
        np.full(rows, 1.0 / rows, dtype),
    )


class _Known(torch.autograd.Function):
    """Return a loss [] whose gradient [N, K] is known already."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, loss: _Array, gradient: _Array | None) -> Tensor:
        if gradient is not None:
            ctx.save_for_backward(torch.from_numpy(gradient))
        return torch.from_numpy(loss)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        found = saved_gradient(ctx)
        return found if grad.item() == 1.0 else found * grad, None, None


# Not Function.apply, which first looks for functorch's wrappers.  They have no NumPy view and never get here.
# The search takes 5% of the time of F.cross_entropy for 128 rows of ten classes.
_attach = super(torch.autograd.Function, _Known).apply
