"""Restore the zero-sum: subtract the mean over classes from the gradient at the logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from nfi_monitor.remedies.handle import Handle
from nfi_monitor.remedies.steps import step_now
from nfi_monitor.replay.replayed_step import REPLAY, acts


def project_zero_sum(head: nn.Module, *, failed: Callable[[Exception], None] | None = None) -> Handle:
    """Subtract from each row's gradient at the logits its mean over the classes: g ← g − mean_k g.

    It is for numerical feature inflation if the loss cannot be replaced.  The loss and the absorbed rows stay
    the same, but these rows no longer push the means (Liu et al. 2026, section 5).  It costs one [N, K]
    tensor per backward pass.  To apply it twice has the same effect as once.  A monitor on the same head
    shows the projected gradient, also if this is applied after the monitor.

    Args:
        head: the module whose output are the logits [..., K], K ≥ 2, uncompiled (a hook that is registered
            after the first compiled call never runs).
        failed: called with an error of the projection; the gradient then stays as it is. By default
            ``backward()`` raises the error.

    Raises TypeError unless ``head`` is a module, ValueError for a convolution.  When not to use it: for
    losses whose gradient has no zero-sum (z-loss, one-vs-rest, regression): it would remove a part of it.
    In deep networks and transformers it averted fewer slingshots than a replaced loss
    (``tests/benchmarks/remedies/RESULTS.md``).
    """
    if not isinstance(head, nn.Module):
        raise TypeError(f"project_zero_sum needs the head, a torch.nn.Module, got {type(head).__name__}.")
    classes_last("project_zero_sum", head)
    # Make it the first of the head's hooks: then a monitor reads the gradient that the weights get, and its
    # alert ends.
    hook = head.register_forward_hook(_Project(failed, step_now(None, head)), prepend=True)
    return Handle("zero-sum projection", hook.remove)


def classes_last(remedy: str, head: nn.Module) -> None:
    """Raise ValueError for a head whose output or input has its channels in the middle."""
    if isinstance(head, nn.modules.conv._ConvNd):
        raise ValueError(
            f"{remedy} needs a head with classes and features in the last axis, got {type(head).__name__}. "
            "Use zero_sum_cross_entropy, which takes [N, K, d1, ...]."
        )


class _Project:
    """Hook the head. A class, because a model with a closure as hook cannot be saved or copied."""

    def __init__(self, failed: Callable[[Exception], None] | None = None, since: int | None = None) -> None:
        self.__name__ = type(self).__name__  # torch.jit asks every hook for its name
        self._failed, self._since = failed, since

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        logits = isinstance(output, Tensor) and output.requires_grad and output.dim() and output.shape[-1] > 1
        if logits and (REPLAY.step is None or acts(self._since)):
            output.register_hook(self._project)

    def _project(self, grad: Tensor) -> Tensor:
        try:
            return zero_sum(grad)
        except Exception as error:
            if self._failed is None:
                raise
            self._failed(error)
            return grad

    def __getstate__(self) -> dict[str, Any]:
        """Drop the callback: a copied or saved model has no Autopilot to report to."""
        return {**self.__dict__, "_failed": None}


def zero_sum(grad: Tensor) -> Tensor:
    """Return ``grad`` [..., K] minus its mean over the classes; half precisions are summed in float32."""
    wide = grad.dtype if grad.dtype in (torch.float32, torch.float64) else torch.float32
    return (grad - grad.mean(-1, keepdim=True, dtype=wide)).to(grad.dtype)
