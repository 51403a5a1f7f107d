"""StableAdamW's rule: no tensor's update may be larger than its second moment expects."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from nfi_monitor.capture.optimizer import SECOND_MOMENTS, unwrap
from nfi_monitor.remedies.handle import Handle


def clip_update_rms(optimizer: Any, limit: float = 1.0) -> Handle:
    """For kicks on a second moment that has let go: each tensor's step is divided by max(1, RMS_t / limit).

    RMS_t = sqrt(mean(g² / max(v̂, ε_A²))) is 1 where the second moment describes the gradient and many times
    more when a gradient comes back (Wortsman et al. 2023, arXiv 2304.13013, algorithm 2, where the tensor's
    learning rate is divided; its weight decay shrinks with it, here too).  It needs no warning, and costs a
    copy of the parameters and three passes over the gradient a step.  When not to use it: for numeric
    slingshots, whose updates are as large as their second moment says.

    Raises ValueError for a limit that is not positive, or an optimizer without a second moment.
    """
    optimizer = unwrap(optimizer)
    if not limit > 0:
        raise ValueError(f"limit must be positive, got {limit!r}.")
    if not any("betas" in group for group in optimizer.param_groups):
        raise ValueError(f"{type(optimizer).__name__} has no second moment to hold updates against.")
    before: dict[
        Tensor, tuple[Tensor, Tensor]
    ] = {}  # parameter → (its values before the step, its gradient²)

    def pre(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        scale = getattr(optimizer, "grad_scale", None)
        for group in optimizer.param_groups:
            for param in group["params"]:
                if param.grad is not None and param.grad.layout is torch.strided:
                    grad = param.grad if scale is None else param.grad / scale
                    before[param] = param.detach().clone(), grad.detach().square()

    def post(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        with torch.no_grad():
            for group in optimizer.param_groups:
                beta2, eps = group["betas"][1], float(group.get("eps", 0.0))
                for param in group["params"]:
                    state = optimizer.state.get(param, {})
                    moment = next((state[name] for name in SECOND_MOMENTS if name in state), None)
                    if param not in before or moment is None:
                        continue
                    values, square = before[param]
                    unbiased = moment / (1.0 - beta2 ** state["step"])
                    rms = (
                        (square / unbiased.clamp_min(eps * eps or torch.finfo(moment.dtype).tiny))
                        .mean()
                        .sqrt()
                    )
                    # Interpolated from what it was: the optimizer knows one rate a group, not one a tensor.
                    param.copy_(torch.lerp(values, param, (limit / rms).clamp_max(1.0).to(param.dtype)))
        before.clear()

    hooks = [optimizer.register_step_pre_hook(pre), optimizer.register_step_post_hook(post)]

    def undo() -> None:
        for hook in hooks:
            hook.remove()

    return Handle(f"updates clipped at RMS_t {limit:g}", undo)
