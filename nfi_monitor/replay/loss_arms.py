"""Change the loss in a replay: at the head's output and in torch's own loss functions.

The user's code computes the loss, so it cannot be changed elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from nfi_monitor.capture.head import Head
from nfi_monitor.replay.arm import ArmContext

_SOFTMAX = {F.log_softmax, torch.log_softmax, Tensor.log_softmax, torch.logsumexp, Tensor.logsumexp}
_NAMED_LOSSES = ("cross_entropy", "nll_loss", "binary_cross_entropy", "with_logits", "kl_div")
_NAMES = [name for name in dir(F) if name.endswith(("_loss", *_NAMED_LOSSES))]
_LOSSES = {getattr(F, name) for name in _NAMES if callable(getattr(F, name))}


class _AtTheLoss(TorchFunctionMode):
    """Keep everything after the head in float64 until the backward pass begins.

    Between head and backward pass, it skips casts of float64 tensors to a lower precision, because losses of
    HuggingFace models begin with ``logits.float()``.  It skips them for any float64 tensor, because only the
    loss is computed there.  Losses and log-softmaxes are computed in float64 everywhere.  Without a head,
    only these are changed.
    """

    def __init__(self, always: bool) -> None:
        super().__init__()
        self.always = always  # True without a head: then nothing shows where the loss begins
        self.after_head = False
        self.reached = False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.backward or func is torch.autograd.backward or func is torch.autograd.grad:
            self.after_head = False
        elif func in _LOSSES:
            logits = args[0] if args else kwargs.get("input")
            if func in (F.cross_entropy, F.nll_loss) or _is_float64(logits):
                args, kwargs = _in_float64(args, kwargs)
                self.reached = True
        elif func in _SOFTMAX and (self.after_head or self.always):
            args, kwargs = _in_float64(args, _without_lower_dtype(kwargs))
            self.reached = True
        elif self.after_head and args and _is_float64(args[0]):
            if func in (Tensor.float, Tensor.half, Tensor.bfloat16):
                return args[0]
            if func in (Tensor.to, Tensor.type):
                args, kwargs = _without_casts(args, kwargs)
                if len(args) == 1 and not kwargs:
                    return args[0]
            elif func in (F.softmax, torch.softmax, Tensor.softmax):
                kwargs = _without_lower_dtype(kwargs)
        return func(*args, **kwargs)


def _is_float64(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype is torch.float64


def _lower(value: Any) -> bool:
    return isinstance(value, torch.dtype) and value.is_floating_point and value is not torch.float64


def _in_float64(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Convert class weights and soft targets, too: a loss needs one dtype."""

    def wide(value: Any) -> Any:
        return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

    return tuple(map(wide, args)), {name: wide(value) for name, value in kwargs.items()}


def _without_lower_dtype(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in kwargs.items() if not (name == "dtype" and _lower(value))}


def _without_casts(
    args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Remove the dtype from ``.to(float32)``, ``.to(other)`` and ``.type(...)``; keep a move to a device."""
    kept: list[Any] = [args[0]]
    for value in args[1:]:
        if isinstance(value, Tensor):
            kept.append(value.device)
        elif not _lower(value) and not (isinstance(value, str) and value.startswith("torch.")):
            kept.append(value)
    rest = _without_lower_dtype(kwargs)
    other = rest.pop("other", None)
    if isinstance(other, Tensor):
        rest["device"] = other.device
    if len(kept) > 1 and all(isinstance(value, bool) for value in kept[1:]):
        kept = kept[:1]  # non_blocking and copy alone change nothing
    if rest.keys() <= {"non_blocking", "copy", "memory_format"} and len(kept) == 1:
        rest = {}
    return tuple(kept), rest


@contextmanager
def float64_loss(context: ArmContext) -> Iterator[None]:
    head = _returns_logits(context)
    mode = _AtTheLoss(always=head is None)

    def widen(module: nn.Module, args: Any, output: Any) -> Any:
        if not isinstance(output, Tensor) or not output.is_floating_point() or not torch.is_grad_enabled():
            return None
        mode.after_head = mode.reached = True
        return output.double()

    hook = None if head is None else head.module.register_forward_hook(widen)
    try:
        with mode:
            yield
    finally:
        context.applied = context.applied and mode.reached
        if hook is not None:
            hook.remove()


def _returns_logits(context: ArmContext) -> Head | None:
    """Return the head if its module returns the logits; a bare parameter's logits are found at the loss."""
    return None if context.head is None or context.head.bare else context.head


class _LogitsOfTheLoss(TorchFunctionMode):
    """Pass the logits of each cross-entropy to ``seen``, for models without a head module."""

    def __init__(self, seen: Callable[[Tensor], None]) -> None:
        super().__init__()
        self._seen = seen

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.cross_entropy:
            self._seen(args[0] if args else kwargs["input"])
        return func(*args, **kwargs)


@contextmanager
def zero_sum(context: ArmContext) -> Iterator[None]:
    reached = False
    head = _returns_logits(context)

    def project(logits: Any) -> None:
        nonlocal reached
        if not (isinstance(logits, Tensor) and logits.requires_grad):
            return
        # F.cross_entropy takes [N, K, d1, ...], with the classes along axis 1.
        axis = 1 - logits.dim() if head is None and logits.dim() > 2 else -1
        axis = axis if head is None else head.class_axis_of(logits) or -1
        if logits.shape[axis] > 1:
            logits.register_hook(lambda grad: grad - grad.mean(axis, keepdim=True))
            reached = True

    with ExitStack() as stack:
        if head is None:
            stack.enter_context(_LogitsOfTheLoss(project))
        else:
            hook = head.module.register_forward_hook(lambda module, args, output: project(output))
            stack.callback(hook.remove)
        try:
            yield
        finally:
            context.applied = context.applied and reached
