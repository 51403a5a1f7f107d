"""Clip each tensor's update by its RMS, as StableAdamW does."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from nfi_monitor.capture.second_moment import SECOND_MOMENTS, entries
from nfi_monitor.capture.unwrap import unwrap
from nfi_monitor.remedies.handle import Handle
from nfi_monitor.remedies.steps import around_steps

_CLIPPED: weakref.WeakSet[Optimizer] = weakref.WeakSet()


def clip_update_rms(optimizer: Any, limit: float = 1.0) -> Handle:
    """Divide each tensor's step by max(1, RMS_t / limit).

    RMS_t = sqrt(mean(g² / max(v̂, ε_A²))) is 1 if the second moment describes the gradient.  It is many times
    larger when a gradient comes back after v̂ has decayed (Wortsman et al. 2023, arXiv 2304.13013, algorithm
    2). Weight decay shrinks with the step, as there.  It can be used without a warning.  A step costs a copy
    of the parameters and three passes over the gradient.  When not to use it: against numeric slingshots,
    whose updates are as large as the second moment expects.

    Raises ValueError for a limit that is not positive, and for an optimizer without a second moment.  It also
    raises ValueError if the optimizer's updates are clipped already: the step would be divided twice.
    """
    optimizer = unwrap(optimizer)
    if not limit > 0:
        raise ValueError(f"limit must be positive, got {limit!r}.")
    if not any("betas" in group for group in optimizer.param_groups):
        raise ValueError(f"{type(optimizer).__name__} has no second moment to compare updates with.")
    if optimizer in _CLIPPED:
        raise ValueError(
            f"The updates of this {type(optimizer).__name__} are clipped already: undo that first."
        )
    # Parameter → (its values before the step, its gradient²).
    before: dict[Tensor, tuple[Tensor, Tensor]] = {}

    def pre(optimizer: Optimizer) -> None:
        scale = getattr(optimizer, "grad_scale", None)
        for group in optimizer.param_groups:
            for param in group["params"]:
                if param.grad is not None and param.grad.layout is torch.strided:
                    grad = param.grad if scale is None else param.grad / scale
                    before[param] = param.detach().clone(), grad.detach().square()

    def post(optimizer: Optimizer) -> None:
        skipped = getattr(optimizer, "found_inf", None)
        with torch.no_grad():
            for group in optimizer.param_groups:
                beta2, eps = group["betas"][1], float(group.get("eps", 0.0))
                for param in group["params"]:
                    state = entries(optimizer.state.get(param, {}))
                    moment = next((state[name] for name in SECOND_MOMENTS if name in state), None)
                    if param not in before or moment is None:
                        continue
                    values, square = before[param]
                    unbiased = moment / (1.0 - beta2 ** state["step"])
                    share = (limit / _rms(square, unbiased, eps)).clamp_max(1.0)
                    if skipped is not None:  # a fused step whose gradients overflowed has changed nothing
                        share = torch.where(skipped > 0, 1.0, share)
                    # Interpolate towards the old values: an optimizer has one rate a group, not one a tensor.
                    param.copy_(torch.lerp(values, param, share.to(param.dtype)))
        before.clear()

    _CLIPPED.add(optimizer)
    take_off = around_steps(optimizer, pre, post)

    def undo() -> None:
        take_off()
        _CLIPPED.discard(optimizer)

    return Handle(f"updates clipped at RMS_t {limit:g}", undo)


def _rms(square: Tensor, moment: Tensor, eps: float) -> Tensor:
    """Return RMS_t [] of a gradient² and an unbiased second moment of the same shape."""
    floor = eps * eps or torch.finfo(moment.dtype).tiny
    return (square / moment.clamp_min(floor)).mean().sqrt()
