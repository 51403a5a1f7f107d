"""Recompute rows where the loss makes no logits: fused and chunked linear cross-entropies.

Such a loss takes hidden states, targets and the head's weight, and never holds the logits of all rows.  From
the hidden states of at most :data:`ROWS` rows, their logits and the gradient there are computed once more, in
the run's precision.  The gradient that arrives at the hidden states shows the factor of the loss (its mean
over rows, a gradient scaler), or the weight of each row, and whether these are the run's rows at all.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nfi_monitor.capture import devices
from nfi_monitor.capture.after_head import AfterHead
from nfi_monitor.capture.backward_pass import Pass, nearest_parameter, pass_of
from nfi_monitor.capture.head import Head
from nfi_monitor.capture.head_probe import HeadProbe, Rows, rows_of
from nfi_monitor.capture.recomputed_rows import (
    GRADIENTS,
    Gradient,
    Known,
    RecomputedRows,
    accumulator,
    precision,
    scale_gradient,
)
from nfi_monitor.capture.sampling import REDUCTION, offset

ROWS = 64
"""Maximum number of rows that are recomputed in one backward pass."""
ELEMENTS = 1 << 22
"""Maximum number of logits that are recomputed in one backward pass (16 MiB in float32)."""
CLASSES = 1 << 14
"""Number of classes of which logits are computed at once: a copy of the whole weight may be large."""
Autocast = Callable[[], AbstractContextManager[Any]]
"""Returns a context with the state of autocast that it was made from."""


class RowRecomputer:
    """Deliver recomputed rows of hidden states that reach a loss without logits.

    Args:
        head: the head, whose weight the loss reads.
        probe: the head's probe: where the head is called, rows need not be recomputed.
        wanted, deliver, failed, spent: as for :class:`~nfi_monitor.capture.head_probe.HeadProbe`.
    """

    def __init__(
        self,
        head: Head | None,
        probe: HeadProbe,
        wanted: Callable[[], int | None],
        deliver: Callable[[Rows], None],
        failed: Callable[[str, BaseException], None],
        spent: Callable[[float], None],
    ) -> None:
        self.head, self._probe = head, probe
        self._wanted, self._deliver, self._failed, self._spent = wanted, deliver, failed, spent
        self._known = Known()
        self.after_head = AfterHead()
        self.cancels = False  # as for tap()
        self._last: tuple[weakref.ref[Tensor], weakref.ref[_Pending]] | None = None

    @property
    def wants(self) -> bool:
        """Whether this step's hidden states are of use."""
        return self._wanted() is not None

    @property
    def head_calls(self) -> int:
        """Number of forward passes of the head that the probe watches: these rows need not be recomputed."""
        return self._probe.fired

    def tap(
        self, hidden: Tensor, targets: Tensor, autocast: Autocast | None = None, *, cancels: bool = False
    ) -> None:
        """Watch hidden states [..., d] and the targets [...] of their rows; a negative one does not count.

        ``autocast``: of :func:`autocast_of`, where the loss is computed; default: as it is now.  ``cancels``:
        the loss multiplies 1 and p of the correct class by the weight, and subtracts then: the gradient of a
        row near absorption is rounded to zero at the hidden states, though not at the weight.
        """
        step, head = self._wanted(), self.head
        if step is None or head is None or not devices.is_readable(hidden):
            return
        if not (torch.is_grad_enabled() and hidden.requires_grad and _readable(head, hidden, targets)):
            return
        if self._last is not None and self._last[0]() is hidden:  # tapped by the user, and by a hook
            pending = self._last[1]()
            if pending is not None:
                pending.cancels |= cancels
            return
        started = time.perf_counter()
        try:
            autocast = autocast or autocast_of(hidden.device.type)
            self._watch(hidden, targets, step, head, autocast, cancels or self.cancels)
        finally:
            self._spent(time.perf_counter() - started)

    def _watch(
        self, hidden: Tensor, targets: Tensor, step: int, head: Head, autocast: Autocast, cancels: bool
    ) -> None:
        total, classes = targets.numel(), head.outputs or 1
        if total == 0:
            return
        budget = max(min(ROWS, ELEMENTS // classes), 1)
        if self._probe.plan.reduced_sample:
            budget = -(-budget // REDUCTION)
        stride = -(-total // budget)
        if stride > 1:
            self._probe.can_reduce = not self._probe.plan.reduced_sample
        first = offset(step, stride)
        labels = targets.detach().to(hidden.device, torch.int64, non_blocking=True)
        # On an accelerator, an index beyond the end kills the training; no try block can stop that.
        labels = torch.where((labels >= 0) & (labels < classes), labels, -1)
        pending = _Pending(
            head,
            features=rows_of(hidden.detach(), first, stride).clone(),
            targets=labels.reshape(-1)[first::stride].clone(),
            counted=(labels >= 0).sum(),
            total=total,
            after_head=self.after_head,
            autocast=autocast,
            bias_apart=hidden.dim() > 2 and not hidden.is_contiguous(),
            cancels=cancels,
        )
        self._last = weakref.ref(hidden), weakref.ref(pending)
        fired, parameter = self._probe.fired, nearest_parameter(hidden)
        given = _Given()

        def on_gradient(grad: Tensor | None) -> None:
            kind = Pass.OTHER if grad is None or self._probe.fired != fired else pass_of(parameter)
            if grad is None or kind is Pass.OTHER:
                return
            started = time.perf_counter()
            try:
                try:
                    arrive(rows_of(grad.detach(), first, stride), kind)
                finally:
                    self._spent(time.perf_counter() - started)
            except Exception as error:
                self._failed("rows", error)

        def arrive(grad: Tensor, kind: Pass) -> None:
            if given:
                rows = given[0]()
                if rows is not None:
                    rows.add(grad, kind)
                return
            if hasattr(head.weight, "to_local"):  # sharded again since the forward pass
                return
            rows = pending.rows(grad.clone(), weakref.ref(given), self._known)
            rows.kind = kind
            given.append(weakref.ref(rows))
            self._probe.recomputed += 1
            self._deliver(rows)

        hidden.register_hook(on_gradient)


class _Given(list["weakref.ref[RecomputedRows]"]):
    """The rows given away by one hook. Unlike a list, it can be referenced weakly."""


@dataclass
class _Pending:
    """What is kept of a forward pass until its gradient arrives."""

    head: Head
    features: Tensor
    targets: Tensor
    counted: Tensor
    total: int
    after_head: AfterHead
    autocast: Autocast
    bias_apart: bool
    """Whether a linear layer rounds once more before it adds its bias, as PyTorch's does for such inputs."""
    cancels: bool

    def rows(self, grad: Tensor, graph: Callable[[], object], known: Known) -> RecomputedRows:
        """Compute the logits as the loss does. ``grad`` [n, d]: what arrived at the hidden states."""
        head = self.head
        assert head.weight is not None
        weight = head.classes_first(head.weight.detach())
        bias = None if head.bias is None else head.bias.detach()
        with torch.no_grad(), self.autocast():
            parts = [
                self._linear(weight[at : at + CLASSES], None if bias is None else bias[at : at + CLASSES])
                for at in range(0, len(weight), CLASSES)
            ]
            output = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
            logits = self.after_head.logits(output)
            dtype = precision(logits, known.dtype)
            pulls, by_scale = [
                [self._pull(gradient, logits, weight, dtype, output.dtype) for gradient in gradients]
                for gradients in (GRADIENTS, (scale_gradient,))
            ]
            own = weight[self.targets.clamp(min=0)].to(pulls[0].dtype).square().sum(-1)
        return RecomputedRows(
            grad=grad,
            logits=logits,
            features=self.features * self.after_head.scale if self.after_head.scale != 1 else self.features,
            total=self.total,
            graph=graph,
            targets=self.targets,
            counted=self.counted,
            pulls=pulls,
            by_scale=by_scale[0],
            eps=torch.finfo(output.dtype).eps,
            rounding=own.sqrt() * torch.finfo(dtype).eps * logits.amax(-1).to(own.dtype).abs().clamp(min=1),
            cancels=self.cancels,
            known=known,
        )

    def _linear(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.bias_apart and bias is not None:
            product = F.linear(self.features, weight)
            return product + bias.to(product.dtype)
        return F.linear(self.features, weight, bias)

    def _pull(
        self, gradient: Gradient, logits: Tensor, weight: Tensor, dtype: torch.dtype, output: torch.dtype
    ) -> Tensor:
        """Return the gradient at the hidden states if each row had weight 1, [n, d].

        ``dtype``: of the loss; ``output``: of the head's output.
        """
        with torch.autocast(logits.device.type, enabled=False):
            ones = torch.ones(len(logits), device=logits.device)
            unit = gradient(logits, self.targets, ones, dtype).to(accumulator(logits))
            unit = self.after_head.chain(unit, logits)
            largest = unit.abs().amax(-1, keepdim=True)
            # Each row is scaled to 1, because float16 would round a small gradient to zero.
            unit = (unit / largest.clamp(min=torch.finfo(unit.dtype).tiny)).to(output)
            pull = torch.zeros(len(unit), weight.shape[1], dtype=largest.dtype, device=unit.device)
            for at in range(0, len(weight), CLASSES):
                pull += unit[:, at : at + CLASSES] @ weight[at : at + CLASSES].to(unit.dtype)
            return pull * largest


def _readable(head: Head, hidden: Tensor, targets: Tensor) -> bool:
    """Return whether the head's weight can be read here, and fits the hidden states and targets."""
    weight = head.weight
    if weight is None or hasattr(weight, "to_local") or not weight.is_floating_point():
        return False
    features, classes = weight.shape[1 - head.class_axis], weight.shape[head.class_axis]
    return (
        weight.device == hidden.device
        and not hasattr(hidden, "to_local")
        and hidden.shape[-1] == features
        and hidden.shape[:-1] == targets.shape
        and classes > 1
        and not targets.is_floating_point()
    )


def unusable(hidden: object, targets: object) -> str | None:
    """Return why no rows can come from what a user taps; None if they can."""
    if not (isinstance(hidden, Tensor) and isinstance(targets, Tensor)):
        return f"it takes two tensors, and got {type(hidden).__name__} and {type(targets).__name__}"
    if targets.is_floating_point() or targets.is_complex():
        return f"targets must be the numbers of classes (int64), and are {targets.dtype}"
    if hidden.shape[:-1] != targets.shape:
        needed = f"hidden states {list(hidden.shape)} need targets {list(hidden.shape[:-1])}"
        return f"{needed}, and got {list(targets.shape)}"
    return None


def autocast_of(device: str) -> Autocast:
    """Return a function that restores the present state of autocast."""
    enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    return lambda: torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=False)
