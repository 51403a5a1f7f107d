"""Compute the mean cross-entropy of a few rows on a CPU, in one call of the C library or in NumPy.

For a few rows, a call of torch costs more than its arithmetic.  NumPy serves where there is no library.  Both
compute in float64, so that loss and gradient are exact to an ulp of the logits' dtype on any processor.
(Rejected: NumPy in float32, whose exponential breaks the bound of ``zero_sum_cross_entropy`` where it uses
AVX-512.)  The tests compare the results with :mod:`nfi_monitor.remedies.row_losses`.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nfi_monitor.native import library
from nfi_monitor.remedies.row_losses import saved_gradient

SMALL = 1 << 14
"""Maximum number of logits for which this is faster."""

_Array = np.ndarray[Any, Any]
_Result = tuple[Tensor, Tensor | None]  # the loss [], its gradient [N, K] if one is wanted
_UNSIGNED = np.dtype(np.uint64)


def mean_of_few_rows(logits: Tensor, target: Tensor) -> Tensor | None:
    """Return the mean loss, or None if torch must compute it (other inputs, ignored rows, an overflow)."""
    if not (
        not torch.compiler.is_compiling()  # first, so that torch.compile does not guard the sizes
        and type(logits) is Tensor is type(target)  # the memory of a subclass may not hold its values
        and logits.is_cpu
        and target.is_cpu
        and 0 < logits.numel() <= SMALL
        and (logits.dtype is torch.float32 or logits.dtype is torch.float64)
        and target.dtype is torch.int64
        and not torch._C._len_torch_dispatch_stack()  # make_fx would record constants
        and not torch._C._is_tracing()  # likewise
    ):
        return None
    loaded = library.library()
    wanted = logits.requires_grad and torch.is_grad_enabled()
    known = _in_numpy(logits, target, wanted) if loaded is None else _in_c(loaded, logits, target, wanted)
    if known is None:
        return None
    result: Tensor = _attach(logits, known)
    return result


def _in_c(loaded: Any, logits: Tensor, target: Tensor, wanted: bool) -> _Result | None:
    shape = logits.shape
    try:
        if not (logits.is_contiguous() and target.is_contiguous()) or logits.is_neg() or target.is_neg():
            return None
        values, classes = logits.data_ptr(), target.data_ptr()
    except RuntimeError:  # tensors without own memory: inside vmap, sparse
        return None
    if len(shape) != 2 or target.shape != shape[:1]:
        return None
    wide = logits.dtype is torch.float64
    loss = torch.from_numpy(np.empty((), np.float64 if wide else np.float32))  # takes half of torch.empty
    gradient = torch.empty_like(logits) if wanted else None
    place = None if gradient is None else gradient.data_ptr()
    if loaded.nfi_cross_entropy(values, classes, *shape, wide, loss.data_ptr(), place):
        return None
    return loss, gradient


@np.errstate(all="ignore")
def _in_numpy(logits: Tensor, target: Tensor, wanted: bool) -> _Result | None:
    """Compute with all logits relative to the target's: loss = ln(1 + Σ_{k≠r} e_k), e_k = e^(z_k − z_r).

    No maximum is computed, so a margin below about −700 overflows.  Then the result is None.
    """
    try:
        z, index = logits.detach().numpy(), target.numpy()
    except (RuntimeError, TypeError):  # tensors without own memory: inside vmap, sparse
        return None
    if z.ndim != 2 or index.shape != z.shape[:1] or not z.flags.c_contiguous:
        return None
    rows, classes = z.shape
    starts, ones, counts, shares = _constants(rows, classes)
    unsigned = index.view(_UNSIGNED)  # negative indices become large
    if unsigned.item(unsigned.argmax()) >= classes:
        return None
    own = starts + index
    flat = z.ravel().astype(np.float64)
    # Repeat and flatten, because a broadcast operation starts a loop for each row.
    flat -= flat.take(own).repeat(classes)
    e = np.exp(flat, out=flat).reshape(rows, classes)
    total = e.dot(counts)  # N (1 + Σ_{k≠r} e_k)
    if not total.dot(shares) < math.inf:
        return None
    flat[own] = 0.0
    mass = e.dot(ones)
    loss = torch.from_numpy(np.asarray(np.log1p(mass).dot(shares), z.dtype))
    if not wanted:
        return loss, None
    flat[own] = -mass
    flat /= total.repeat(classes)
    return loss, torch.from_numpy(e.astype(z.dtype, copy=False))


@lru_cache(maxsize=8)
def _constants(rows: int, classes: int) -> tuple[_Array, _Array, _Array, _Array]:
    """Return (first index of each row, ones [K], N [K], 1/N [N])."""
    return (
        np.arange(0, rows * classes, classes),
        np.ones(classes),
        np.full(classes, float(rows)),
        np.full(rows, 1.0 / rows),
    )


class _Known(torch.autograd.Function):
    """Return a loss [] whose gradient [N, K] is known already."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, known: _Result) -> Tensor:
        # As a tuple: torch would return a view of a loss that is an argument.
        loss, gradient = known
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        found = saved_gradient(ctx)
        return found if grad.item() == 1.0 else found * grad, None


# Not Function.apply, which first looks for functorch's wrappers.  They have no memory and never get here.
# The search takes 5% of the time of F.cross_entropy for 128 rows of ten classes.
_attach = super(torch.autograd.Function, _Known).apply
