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
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nfi_monitor.capture import devices
from nfi_monitor.capture.after_head import AfterHead
from nfi_monitor.capture.backward_pass import Pass, nearest_parameter, pass_of
from nfi_monitor.capture.head import Head
from nfi_monitor.capture.head_probe import HeadProbe, Rows, rows_of
from nfi_monitor.capture.sampling import REDUCTION, offset

ROWS = 64
"""Maximum number of rows that are recomputed in one backward pass."""
ELEMENTS = 1 << 22
"""Maximum number of logits that are recomputed in one backward pass (16 MiB in float32)."""
CLASSES = 1 << 14
"""Number of classes of which logits are computed at once: a copy of the whole weight may be large."""
NEAR_POWER = 0.02
"""Where a row's gradient times the number of rows is this near to a power of two, in log2, it is that power:
the loss is a mean over rows, times a scaler's factor."""
SAME_WEIGHT = 0.005
"""Share of the squared gradient that one factor for all rows may leave unexplained."""
EXPLAINED = 0.02
"""Share of the squared gradient that recomputed rows may leave unexplained. Beyond it they are refused."""
ROUNDINGS = 4.0
"""Roundings of the correct class's gradient that are allowed besides: in rows near absorption it is no more
than that, and each fused loss rounds it in its own way."""


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

    @property
    def wants(self) -> bool:
        """Whether this step's hidden states are of use."""
        return self._wanted() is not None

    @property
    def head_calls(self) -> int:
        """Number of forward passes of the head that the probe watches: these rows need not be recomputed."""
        return self._probe.fired

    def tap(self, hidden: Tensor, targets: Tensor, autocast: Autocast | None = None) -> None:
        """Watch hidden states [..., d] and the targets [...] of their rows; a negative one does not count.

        ``autocast``: of :func:`autocast_of`, where the loss is computed; default: as it is now.
        """
        step, head = self._wanted(), self.head
        if step is None or head is None or not devices.is_readable(hidden):
            return
        if not (torch.is_grad_enabled() and hidden.requires_grad and _readable(head, hidden, targets)):
            return
        started = time.perf_counter()
        try:
            self._watch(hidden, targets, step, head, autocast or autocast_of(hidden.device.type))
        finally:
            self._spent(time.perf_counter() - started)

    def _watch(self, hidden: Tensor, targets: Tensor, step: int, head: Head, autocast: Autocast) -> None:
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
        labels = targets.detach().to(hidden.device, non_blocking=True)
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
        )
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


@dataclass
class Known:
    """What earlier readings have shown of the loss."""

    factor: Tensor | None = None  # the gradient of a row, times the number of rows
    dtype: torch.dtype | None = None  # of the loss


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
            dtype = _precision(logits, known.dtype)
            pulls = [self._pull(gradient, logits, weight, dtype, output.dtype) for gradient in GRADIENTS]
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
            rounding=own.sqrt() * torch.finfo(dtype).eps * logits.amax(-1).to(own.dtype).abs().clamp(min=1),
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
            unit = gradient(logits, self.targets, ones, dtype).to(_accumulator(logits))
            unit = self.after_head.chain(unit, logits)
            largest = unit.abs().amax(-1, keepdim=True)
            # Each row is scaled to 1, because float16 would round a small gradient to zero.
            unit = (unit / largest.clamp(min=torch.finfo(unit.dtype).tiny)).to(output)
            pull = torch.zeros(len(unit), weight.shape[1], dtype=largest.dtype, device=unit.device)
            for at in range(0, len(weight), CLASSES):
                pull += unit[:, at : at + CLASSES] @ weight[at : at + CLASSES].to(unit.dtype)
            return pull * largest


@dataclass
class RecomputedRows(Rows):
    """Rows whose gradient at the logits is computed from that at the hidden states, [n, d] in ``grad``.

    ``targets`` [n], negative where a row does not count; ``counted``: number of rows of the batch that count,
    0-d.  ``pulls``, [n, d] each: gradient at the hidden states if each row had weight 1, by each of
    :data:`GRADIENTS`.  ``rounding`` [n]: size of one rounding of it.
    """

    targets: Tensor = None  # type: ignore[assignment]
    counted: Tensor = None  # type: ignore[assignment]
    pulls: list[Tensor] = field(default_factory=list)
    rounding: Tensor = None  # type: ignore[assignment]
    known: Known = field(default_factory=lambda: Known())

    def _sum_up(self, grad: Tensor) -> None:
        self.grad.add_(grad)  # [n, d]: of the hidden states

    def finished(self, loss_dtype: torch.dtype | None = None) -> Rows:
        """Return the rows with the gradient at the logits, in the precision of the loss."""
        with torch.no_grad(), torch.autocast(self.grad.device.type, enabled=False):
            fits = [self._fit(pull) for pull in self.pulls]
            first, second = fits
            # PyTorch's arithmetic, unless the other one leaves far less unexplained.
            other = (second.left < first.left / 2) & (first.left > 1e-4 * first.square)
            self.known.factor, self.known.dtype = torch.where(other, second.factor, first.factor), loss_dtype
            explained = torch.where(other, second.explained, first.explained)
            dtype = _precision(self.logits, loss_dtype)
            grad, otherwise = (
                gradient(self.logits, self.targets, fit.weights, dtype)
                for gradient, fit in zip(GRADIENTS, fits, strict=True)
            )
            grad = torch.where(other, otherwise, grad)
            nothing = torch.zeros((), dtype=self.logits.dtype, device=grad.device)
            return Rows(
                torch.where(explained, grad.to(self.logits.dtype), nothing),
                torch.where(explained, self.logits, nothing),
                self.features,
                self.total,
                graph=self.graph,
                recomputed=explained,
            )

    def _fit(self, pull: Tensor) -> _Fit:
        """Find the weights with which ``pull`` gives the gradient that arrived."""
        # Squares of small gradients underflow in float32, and Apple's devices have nothing wider.
        wide = torch.float32 if pull.device.type == "mps" else torch.float64
        pull, counted, arrived = pull.to(wide), self.counted.clamp(min=1), self.grad.to(wide)
        present = (arrived != 0).any(-1)
        size, common = pull.square().sum(-1), (arrived * pull).sum(-1)
        factor = common.sum() / torch.where(present, size, torch.zeros_like(size)).sum() * counted
        before = torch.ones_like(factor) if self.known.factor is None else self.known.factor.to(factor.dtype)
        # Of rows that all underflowed, or do not count, there is no factor.
        factor = torch.where(torch.isfinite(factor) & (factor != 0), factor, before)
        exponent = factor.abs().log2()
        whole = (exponent - exponent.round()).abs() < NEAR_POWER
        factor = torch.where(whole & (factor > 0), exponent.round().exp2(), factor)
        weight = (factor / counted).expand(len(size))
        # A row without any gradient, where underflow is no reason for it, is not a part of the loss.
        tiny = torch.finfo(self.grad.dtype).tiny
        left_out = ~present & ((weight[:, None] * pull).abs().amax(-1) > 100 * tiny)
        weight = torch.where(left_out, torch.zeros_like(weight), weight)
        own = torch.where(size > 0, common / size, torch.zeros_like(size))
        square = arrived.square().sum()
        left, left_by_own = ((arrived - w[:, None] * pull).square().sum() for w in (weight, own))
        noise = (ROUNDINGS * weight * self.rounding).square().sum()
        same = left <= SAME_WEIGHT * square + noise
        explained = same | (left_by_own <= EXPLAINED * square + noise) | ~torch.isfinite(square)
        weights = torch.where(same, weight, own)
        return _Fit(weights, factor, explained, torch.where(same, left, left_by_own), square)


class _Fit(NamedTuple):
    """Weights [n] of the rows, their common factor times the number of rows, and how well they fit."""

    weights: Tensor
    factor: Tensor
    explained: Tensor
    left: Tensor
    square: Tensor


def cross_entropy_gradient(logits: Tensor, targets: Tensor, weights: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the gradient of Σ_i w_i·CE_i at the logits, [n, K] in ``dtype``, as PyTorch's loss computes it.

    ``logits`` [n, K]; ``targets`` [n], negative where a row does not count; ``weights`` [n].
    """
    logs = torch.log_softmax(logits, -1, dtype=dtype)
    of_log = _at_targets(targets, -weights.to(dtype), logs)
    return torch.ops.aten._log_softmax_backward_data(of_log, logs, -1, dtype)  # type: ignore[no-any-return]


def normalized_gradient(logits: Tensor, targets: Tensor, weights: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the gradient as losses compute it that store log Σ_k e^{z_k}. As :func:`cross_entropy_gradient`.

    The log is rounded beside a large logit, so such losses absorb rows at a smaller margin.
    """
    wide = logits.to(dtype)
    chances = torch.exp(wide - torch.logsumexp(wide, -1, keepdim=True))
    weights = torch.where(targets >= 0, weights.to(dtype), torch.zeros_like(weights, dtype=dtype))
    return weights[:, None] * (chances - _at_targets(targets, torch.ones_like(weights), chances))


Gradient = Callable[[Tensor, Tensor, Tensor, torch.dtype], Tensor]
GRADIENTS: tuple[Gradient, Gradient] = (cross_entropy_gradient, normalized_gradient)
"""The ways in which losses compute their gradient, which differ where rows are absorbed."""


def _at_targets(targets: Tensor, values: Tensor, like: Tensor) -> Tensor:
    """Return zeros [n, K], with ``values`` [n] at the targets of rows that count."""
    values = torch.where(targets >= 0, values, torch.zeros_like(values))
    return torch.zeros_like(like).scatter_(-1, targets.clamp(min=0)[:, None], values[:, None])


def _precision(logits: Tensor, loss_dtype: torch.dtype | None) -> torch.dtype:
    """Return the precision of the loss: that of the logits, where the loss itself has no wider one."""
    return logits.dtype if loss_dtype is logits.dtype else _accumulator(logits)


def _accumulator(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype is torch.float64 else torch.float32


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
