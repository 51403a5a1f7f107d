"""The arms of a replay: each takes one possible cause of a slingshot away and leaves the rest as it is.

Those that change the loss work from outside, at the head's output and at torch's own loss functions, because
the loss is computed in code that is not ours.  Those that change the optimizer do so inside its step, between
a pre-hook and a post-hook, so that schedulers find the hyperparameters they left.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from nfi_monitor.capture.head import Head
from nfi_monitor.capture.sampling import local
from nfi_monitor.capture.second_moment import SECOND_MOMENTS
from nfi_monitor.replay.snapshots import Snapshot
from nfi_monitor.replay.verdict import BASELINE


@dataclass
class Context:
    """What an arm may change. The snapshot has been restored when :attr:`Arm.change` is entered."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    head: Head | None
    snapshot: Snapshot
    steps: int  # how many are replayed at most
    data_step: Callable[[int], int] = field(default=lambda step: step)
    """Optimizer step → the step whose data ``step_fn`` is asked for."""
    applied: bool = True
    """An arm sets it to False while it has found nothing to change."""
    note: str = ""
    """What an arm has to say of what it did."""


@dataclass(frozen=True)
class Arm:
    """One variant: ``change(context)`` is a context manager that is open while the arm's steps are done."""

    name: str
    what: str
    """One line for people."""
    change: Callable[[Context], AbstractContextManager[Any]]


# --- the loss ---------------------------------------------------------------------------------

_CASTS = {"float": torch.float32, "half": torch.float16, "bfloat16": torch.bfloat16}
_SOFTMAX = {F.log_softmax, torch.log_softmax, Tensor.log_softmax, torch.logsumexp, Tensor.logsumexp}
_NAMED_LOSSES = ("cross_entropy", "nll_loss", "binary_cross_entropy", "with_logits", "kl_div")
_NAMES = [name for name in dir(F) if name.endswith(("_loss", *_NAMED_LOSSES))]
_LOSSES = {getattr(F, name) for name in _NAMES if callable(getattr(F, name))}


class _AtTheLoss(TorchFunctionMode):
    """Keeps what comes after the head in float64 until the backward pass begins.

    Between head and backward, casts of a float64 tensor to a lower precision are left out: losses of
    HuggingFace models begin with ``logits.float()``.  That holds for any float64 tensor in this stretch, not
    for the logits alone: nothing but the loss is computed there.  Losses and log-softmaxes are computed in
    float64 wherever they stand, which is all that can be done without a head.
    """

    def __init__(self, always: bool) -> None:
        super().__init__()
        self.always = always  # no head whose output would tell where the loss begins
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
    """Class weights and soft targets, too: a loss wants one dtype."""

    def wide(value: Any) -> Any:
        return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

    return tuple(map(wide, args)), {name: wide(value) for name, value in kwargs.items()}


def _without_lower_dtype(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in kwargs.items() if not (name == "dtype" and _lower(value))}


def _without_casts(
    args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """``.to(float32)``, ``.to(other)`` and ``.type(...)`` without the dtype; a move to a device stays."""
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
        kept = kept[:1]  # non_blocking and copy alone ask for nothing
    if rest.keys() <= {"non_blocking", "copy", "memory_format"} and len(kept) == 1:
        rest = {}
    return tuple(kept), rest


@contextmanager
def _float64_loss(context: Context) -> Iterator[None]:
    mode = _AtTheLoss(always=context.head is None)

    def widen(module: nn.Module, args: Any, output: Any) -> Any:
        if not isinstance(output, Tensor) or not output.is_floating_point() or not torch.is_grad_enabled():
            return None
        mode.after_head = mode.reached = True
        return output.double()

    hook = None if context.head is None else context.head.module.register_forward_hook(widen)
    try:
        with mode:
            yield
    finally:
        context.applied = context.applied and mode.reached
        if hook is not None:
            hook.remove()


class _LogitsOfTheLoss(TorchFunctionMode):
    """Shows the logits that a cross-entropy is given, where no module makes them."""

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
def _zero_sum(context: Context) -> Iterator[None]:
    reached = False

    def project(logits: Any) -> None:
        nonlocal reached
        if isinstance(logits, Tensor) and logits.requires_grad and logits.shape[-1] > 1:
            logits.register_hook(lambda grad: grad - grad.mean(-1, keepdim=True))
            reached = True

    with ExitStack() as stack:
        if context.head is None:
            stack.enter_context(_LogitsOfTheLoss(project))
        else:
            hook = context.head.module.register_forward_hook(lambda module, args, output: project(output))
            stack.callback(hook.remove)
        try:
            yield
        finally:
            context.applied = context.applied and reached


# --- the optimizer ----------------------------------------------------------------------------


def _second_moments(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [
        state[name]
        for state in optimizer.state.values()
        for name in SECOND_MOMENTS
        if isinstance(state.get(name), Tensor) and state[name].is_floating_point()
    ]


@contextmanager
def _second_moment_reset(context: Context) -> Iterator[None]:
    optimizer = context.optimizer
    context.applied = bool(_second_moments(optimizer))
    kept = dict(optimizer.state)  # the tensors themselves: views and compiled steps hold on to them
    optimizer.state.clear()
    try:
        yield
    finally:
        optimizer.state.clear()
        optimizer.state.update(kept)


MOST_GIVEN_BACK = 10.0
"""Decades of sqrt(v̂): more is no other outcome, and 0 · ∞ would be NaN."""


@contextmanager
def _second_moment_held(context: Context) -> Iterator[None]:
    # A snapshot is taken when something is at risk: by then much is forgotten. Held at what was left, a
    # second moment averted half of the slingshots that it averts when given back what it had.
    given_back = 10.0 ** (-2.0 * max(context.snapshot.second_moment_decay, -MOST_GIVEN_BACK))
    if given_back >= 4.0:
        context.note = (
            f"the second moment was given back {given_back:.3g} times what was left of it, which shortens "
            f"the next steps as a learning rate {given_back**0.5:.3g} times smaller would"
        )
    with torch.no_grad():
        floors = [(moment, moment * given_back) for moment in _second_moments(context.optimizer)]
    context.applied = bool(floors)

    def hold(*_: Any) -> None:
        with torch.no_grad():
            for moment, floor in floors:
                torch.maximum(moment, floor, out=floor)
                moment.copy_(floor)

    hold()
    # After each step, and so before the next: what divides is at least β2 times the floor.
    hook = context.optimizer.register_step_post_hook(hold)
    try:
        yield
    finally:
        hook.remove()


def larger_eps(eps: float = 1e-6) -> Arm:
    """Adam's ε_A raised to ``eps`` (where it is smaller)."""

    @contextmanager
    def change(context: Context) -> Iterator[None]:
        groups = [group for group in context.optimizer.param_groups if "eps" in group]
        context.applied = any(group["eps"] < eps for group in groups)
        before = [group["eps"] for group in groups]
        for group in groups:
            group["eps"] = max(group["eps"], eps)
        try:
            yield
        finally:
            for group, value in zip(groups, before, strict=True):
                group["eps"] = value

    return Arm("larger_eps", f"Adam's eps {eps:g}", change)


@contextmanager
def _lr(context: Context, lr_of: Callable[[int, Any], Any]) -> Iterator[None]:
    """``lr_of(index of the group, its lr)`` is used inside each optimizer step and nowhere else.

    Schedulers read and write ``group["lr"]`` between steps: they must not see it.
    """
    groups = context.optimizer.param_groups
    before: list[Any] = []

    def pre(*_: Any) -> None:
        before[:] = [group["lr"] for group in groups]
        for index, group in enumerate(groups):
            group["lr"] = lr_of(index, group["lr"])

    def post(*_: Any) -> None:
        for group, lr in zip(groups, before, strict=False):
            group["lr"] = lr
        before.clear()

    hooks = (context.optimizer.register_step_pre_hook(pre), context.optimizer.register_step_post_hook(post))
    try:
        yield
    finally:
        post()
        for hook in hooks:
            hook.remove()


def smaller_lr(factor: float = 0.1, steps: int | None = None) -> Arm:
    """The learning rate times ``factor``, in the first ``steps`` optimizer steps (None: in all)."""

    @contextmanager
    def change(context: Context) -> Iterator[None]:
        done = 0

        def lr_of(index: int, lr: Any) -> Any:
            return lr * factor if steps is None or done < steps else lr

        def count(*_: Any) -> None:
            nonlocal done
            done += 1

        with _lr(context, lr_of):
            hook = context.optimizer.register_step_post_hook(count)
            try:
                yield
            finally:
                hook.remove()

    for_steps = "" if steps is None else f" for {steps:,} steps"
    return Arm("smaller_lr", f"learning rate × {factor:g}{for_steps}", change)


@contextmanager
def _lr_held(context: Context) -> Iterator[None]:
    held = context.snapshot.lrs
    with _lr(context, lambda index, lr: held[index].to(lr) if isinstance(lr, Tensor) else held[index]):
        yield


@contextmanager
def _other_data(context: Context) -> Iterator[None]:
    start, back = context.snapshot.step, context.steps

    def earlier(step: int) -> int:
        return (step - back - 1) % max(start, 1) + 1  # of a young run, its steps once more

    context.data_step = earlier
    # Batches may be drawn from the random state instead; what is put back afterwards includes it.
    torch.manual_seed(0x5EED + start)
    random.seed(0x5EED + start)
    np.random.seed((0x5EED + start) % (1 << 32))
    yield


NUDGE = 2.0**-20
"""A part in a million: far below anything an optimizer step does, a few ulp of float32."""


@contextmanager
def _nudged(context: Context) -> Iterator[None]:
    with torch.no_grad():
        for param in context.model.parameters():
            if param.is_floating_point():
                values = local(param)
                # Up and down in turn, so that the weights' mean stays; no random number is drawn.
                signs = torch.arange(values.numel(), device=values.device).remainder_(2).mul_(2).sub_(1)
                values.add_(values * (NUDGE * signs.reshape(values.shape).to(values.dtype)))
    yield


def combined(*arms: Arm) -> Arm:
    """Several changes at once; applied if each of them is."""

    @contextmanager
    def change(context: Context) -> Iterator[None]:
        applied: list[bool] = []
        with ExitStack() as stack:
            for arm in arms:
                stack.enter_context(_noting(arm, context, applied))
            yield
        context.applied = all(applied)

    return Arm("+".join(arm.name for arm in arms), " and ".join(arm.what for arm in arms), change)


@contextmanager
def _noting(arm: Arm, context: Context, applied: list[bool]) -> Iterator[None]:
    context.applied = True
    inner = arm.change(context)
    inner.__enter__()
    entered = context.applied
    try:
        yield
    finally:
        context.applied = entered
        inner.__exit__(None, None, None)
        applied.append(context.applied)


AS_IT_WAS = Arm(BASELINE, "nothing changed", lambda context: contextlib.nullcontext())
NUDGED = Arm("nudged", "the weights moved by a part in a million: the control of the others", _nudged)
FLOAT64_LOSS = Arm("float64_loss", "the loss in float64, parameters as they are", _float64_loss)
ZERO_SUM = Arm("zero_sum", "the logits' gradient projected to sum to zero over the classes", _zero_sum)
LARGER_EPS = larger_eps()
SECOND_MOMENT_RESET = Arm(
    "second_moment_reset", "the optimizer's state as at a fresh start", _second_moment_reset
)
SECOND_MOMENT_HELD = Arm(
    "second_moment_held",
    "exp_avg_sq given back what it had forgotten when the snapshot was taken, and falling no more",
    _second_moment_held,
)
SMALLER_LR = smaller_lr()
LR_HELD = Arm("lr_held", "the learning rate of the snapshot, whatever the schedule does", _lr_held)
OTHER_DATA = Arm("other_data", "the batches of earlier steps, other random numbers", _other_data)

ARMS = (
    AS_IT_WAS, NUDGED, FLOAT64_LOSS, ZERO_SUM, LR_HELD, OTHER_DATA, SECOND_MOMENT_HELD, SMALLER_LR,
    LARGER_EPS, SECOND_MOMENT_RESET,
)  # fmt: skip
"""What is tried unless told otherwise; the last two are reported and decide nothing."""
