"""Compute the mean cross-entropy of a few rows on a CPU in one call of the C library.

For a few rows, a call of torch costs more than its arithmetic.  The library computes in float64, so that loss
and gradient are exact to half an ulp of the logits' dtype, on any processor.  (Rejected: NumPy, whose float32
exponential is off by more than the bound of ``zero_sum_cross_entropy`` where it uses AVX-512.)  The tests
compare the result with :mod:`nfi_monitor.remedies.row_losses`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nfi_monitor.native import library
from nfi_monitor.remedies.row_losses import saved_gradient

SMALL = 1 << 14
"""Maximum number of logits for which this is faster."""


def mean_of_few_rows(logits: Tensor, target: Tensor) -> Tensor | None:
    """Return the mean loss, or None if torch must compute it (other inputs, ignored rows, no library)."""
    if not (
        not torch.compiler.is_compiling()  # first, so that torch.compile does not guard the sizes
        and type(logits) is Tensor  # the memory of a subclass may not hold its values
        and logits.is_cpu
        and target.is_cpu
        and 0 < logits.numel() <= SMALL
        and (logits.dtype is torch.float32 or logits.dtype is torch.float64)
        and target.dtype is torch.int64
        and logits.dim() == 2
        and not torch._C._len_torch_dispatch_stack()  # make_fx would record constants
        and not torch._C._is_tracing()  # likewise
    ):
        return None
    loaded = library.library()
    try:
        # Both have no NumPy view where they have no memory of their own: inside vmap, sparse.
        shape, places = logits.detach().numpy().shape, target.numpy().shape
        contiguous = logits.is_contiguous() and target.is_contiguous()
    except (RuntimeError, TypeError):
        return None
    if loaded is None or not contiguous or places != shape[:1]:
        return None
    gradient = torch.empty_like(logits) if logits.requires_grad and torch.is_grad_enabled() else None
    loss = torch.empty((), dtype=logits.dtype, device="cpu")
    if loaded.nfi_cross_entropy(
        logits.data_ptr(),
        target.data_ptr(),
        *shape,
        logits.dtype is torch.float64,
        loss.data_ptr(),
        None if gradient is None else gradient.data_ptr(),
    ):
        return None
    result: Tensor = _attach(logits, loss, gradient)
    return result


class _Known(torch.autograd.Function):
    """Return a loss [] whose gradient [N, K] is known already."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, loss: Tensor, gradient: Tensor | None) -> Tensor:
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        found = saved_gradient(ctx)
        return found if grad.item() == 1.0 else found * grad, None, None


# Not Function.apply, which first looks for functorch's wrappers.  They have no NumPy view and never get here.
# The search takes 5% of the time of F.cross_entropy for 128 rows of ten classes.
_attach = super(torch.autograd.Function, _Known).apply
