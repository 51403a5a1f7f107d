"""Read the optimizer around its step: gradients before, moments and weights after.

Step hooks work for the default, foreach, fused and compiled steps, and stay after ``load_state_dict``.
Gradients are read before the step, clipped as the optimizer gets them.  After the step would be too late: a
fused step under a gradient scaler unscales them in place.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from nfi_monitor import _moved
from nfi_monitor.capture import devices
from nfi_monitor.capture.betas import ASSUMED_BETAS, betas_of
from nfi_monitor.capture.head import Head
from nfi_monitor.capture.head_layer import size_of
from nfi_monitor.capture.moment_check import Failed, MomentCheck, ignore
from nfi_monitor.capture.preconditioner import preconditioner
from nfi_monitor.capture.reading_plan import ReadingPlan
from nfi_monitor.capture.sampling import CoordinateSample, copies, differences, local
from nfi_monitor.capture.second_moment import entries, sample_moments, states
from nfi_monitor.capture.step_constants import constants, host, host_rate, rates
from nfi_monitor.capture.stepped_gradient import stepped_gradient
from nfi_monitor.capture.update import BeforeStep, Update

HEAD_ELEMENTS = 1 << 18
"""Head weights with at most this many entries are compared whole, larger ones at a stride of class rows."""

MEAN_ELEMENTS = 1 << 20
"""Maximum number of head weights read per step for W_G and the batch's zero-sum. Larger heads: less often."""


class Layout(NamedTuple):
    """The coordinates that are read, of these parameters.

    ``understood``: number of parameters, which come first, whose second moment is understood.  ``undecided``:
    positions of those whose second moment is still checked.  ``group_at``: id of a parameter → position
    of its group.
    """

    sample: CoordinateSample
    params: tuple[nn.Parameter, ...]
    understood: int
    undecided: tuple[int, ...]
    group_at: dict[int, int]


class OptimizerReader:
    """Read an :class:`~nfi_monitor.capture.update.Update` at each measured step."""

    def __init__(self, optimizer: Optimizer, head: Head | None, failed: Failed = ignore) -> None:
        """``failed(part, error)`` is called if the second moments cannot be checked."""
        self.optimizer = optimizer
        self.head = head
        self.plan = ReadingPlan()
        self.unreadable: set[str] = set()  # descriptions of what cannot be read, for a note
        self.check = MomentCheck(optimizer, failed)
        self._layouts: dict[tuple[int, ...], Layout] = {}
        self._group_at: dict[int, int] = {}  # id of a parameter → position of its group
        self._found: tuple[Any, int, int] | None = None  # parameter, positions of its group and in it
        self._found_moments: tuple[Any, tuple[bool | None, list[str]]] | None = None

    @property
    def can_reduce(self) -> bool:
        """Whether a reduced sample of this model has fewer coordinates."""
        return any(layout.sample.can_reduce for layout in self._layouts.values())

    def group_of(self, param: Tensor | None) -> dict[str, Any]:
        """Return the parameter group that holds ``param``, or the first group if none does."""
        groups = self.optimizer.param_groups
        if param is not None and self._found is not None and self._found[0] is param:
            _, at, place = self._found
            held = groups[at]["params"] if at < len(groups) else ()
            if place < len(held) and held[place] is param:  # it may have moved to another group
                return groups[at]
        for at, group in enumerate(groups):
            for place, candidate in enumerate(group["params"]):
                if candidate is param:
                    self._found = (candidate, at, place)
                    return group
        return groups[0] if groups else {}

    def rates(self) -> list[float]:
        """Return the learning rate of each group; NaN where the host does not know it."""
        given = [group.get("lr") for group in self.optimizer.param_groups]
        return [rate if type(rate) is float else host_rate(rate) for rate in given]

    def holds(self, param: Tensor) -> bool:
        return any(
            candidate is param for group in self.optimizer.param_groups for candidate in group["params"]
        )

    def betas(self) -> tuple[float, float] | None:
        """Return (β1, β2) of the head's group; None for optimizers without such a pair."""
        param = self.head.weight if self.head is not None else None
        group = self.group_of(param)
        if param is None or not any(param is candidate for candidate in group.get("params", ())):
            param = next(iter(group.get("params", ())), None)
        state = {} if param is None else entries(self.optimizer.state.get(param, {}))
        kind = self.check.kind(param)
        return betas_of(self.optimizer, group, state, None if kind is None else kind.slot)

    def betas_or_assumed(self) -> tuple[float, float]:
        """Return (β1, β2) of the head's group, or :data:`ASSUMED_BETAS`. This decides τ everywhere."""
        return self.betas() or ASSUMED_BETAS

    def has_second_moment(self) -> bool | None:
        """Return whether the state has a second moment of the gradient; None while that is checked."""
        return self._findings()[0]

    def moments_left_out(self) -> list[str]:
        """Return which second moments are not read and why, in words; empty while that is checked."""
        return self._findings()[1]

    def _findings(self) -> tuple[bool | None, list[str]]:
        key = (self.check.version, len(self.optimizer.state))
        if self._found_moments is None or self._found_moments[0] != key:
            params: list[Any] = [param for param, _ in states(self.optimizer) if not param.is_complex()]
            has: bool | None = any(map(self.check.understood, params))
            if not has and self.check.pending(params):
                has = None
            self._found_moments = (key, (has, self.check.left_out(params)))
        return self._found_moments[1]

    def before(self, step: int, *, closure: bool = False) -> BeforeStep | None:
        """Read gradients and weights before the step; None if no parameter has a gradient.

        Call it in the pre-hook.  ``closure``: the step computes its gradients itself (LBFGS, SAM, Lightning),
        so :meth:`after` reads them.
        """
        self.check.receive()
        layout = self.layout(needs_gradient=not closure)
        if layout is None:
            return None
        sample, params = layout.sample, layout.params
        grad = None
        if closure:
            before = sample.gather(params)
        else:
            gradients = [param.grad for param in params if param.grad is not None]
            grad, before = sample.gather_both(gradients, params)
            grad_scale = getattr(self.optimizer, "grad_scale", None)
            if isinstance(grad_scale, Tensor):
                grad = grad / devices.send(grad_scale, grad.device, grad.dtype)
        found_inf = getattr(self.optimizer, "found_inf", None)
        weight, bias = self._head_rows()
        weight_grad, bias_grad = (None, None) if closure else self._head_gradients(step)
        # Copies: some optimizers make their update in the gradient's memory.
        weight, bias, weight_grad, bias_grad = copies(weight, bias, weight_grad, bias_grad)
        return BeforeStep(
            sample=sample,
            params=params,
            grad=grad,
            before=before,
            found_inf=found_inf if isinstance(found_inf, Tensor) else None,
            head_weight=weight,
            head_bias=bias,
            head_weight_grad=weight_grad,
            head_bias_grad=bias_grad,
            moments=layout.understood,
            earlier=self.check.before(sample, params, layout.undecided, closure=closure),
        )

    def after(self, start: BeforeStep, step: int) -> Update | None:
        """Read moments and weights after the step, in the post-hook. ``start``: from :meth:`before`."""
        grad, weight_grad, bias_grad = start.grad, start.head_weight_grad, start.head_bias_grad
        if grad is None:
            gradients = [param.grad for param in start.params if param.grad is not None]
            if len(gradients) < len(start.params):
                self.unreadable.add("gradients that exist only inside optimizer.step(closure)")
                return None
            grad = start.sample.gather(gradients)
        if start.earlier is not None:
            groups = [self._group(param) for param in start.params]
            self.check.after(start.earlier, start.sample, start.params, groups, grad, start.before, step)
        left = start.grad is not None or self._leaves_gradients(start)
        if start.grad is None and left:
            weight_grad, bias_grad = self._head_gradients(step)
        after, count, exp_avg_sq = self._read_after(start, left=left)
        correction: Tensor | float = 1.0
        eps: Tensor | float = 0.0
        lrs = None
        if exp_avg_sq is not None:
            sample = start.sample.leading(count)
            leading = start.params[:count]
            correction, eps = constants(self.check, leading, self._group, sample, start.before, step)
        divided_by = self._preconditioner(start, count) if left else None
        if exp_avg_sq is not None or divided_by is not None:
            lrs = rates(self.optimizer.param_groups, start.params, start.sample, start.before)
        moved, bias_moved = differences(self._head_rows(), (start.head_weight, start.head_bias))
        full = self.head.weight if self.head is not None else None
        position = next((i for i, param in enumerate(start.params) if param is full), None)
        return Update(
            sample=start.sample,
            params=start.params,
            grad=grad,
            before=start.before,
            after=after,
            exp_avg_sq=exp_avg_sq,
            correction=correction,
            eps=eps,
            lr=host(self.group_of(full).get("lr")),
            lrs=lrs,
            found_inf=start.found_inf,
            head_position=position,
            head_weight_update=moved,
            head_bias_update=bias_moved,
            head_weight=self._whole_head(step),
            head_weight_grad=weight_grad,
            head_bias_grad=bias_grad,
            moments=count,
            preconditioner=divided_by,
            stepped_by=stepped_gradient(
                self.check, start.params, self._group, start.sample, grad, start.before
            ),
            gradients_left=left,
        )

    def _preconditioner(self, start: BeforeStep, moments: int) -> Tensor | None:
        """Return P where it is not sqrt(v̂) + ε_A. ``moments``: number of tensors with a second moment."""
        if not self.check.trusted or 0 < moments < len(start.params):
            return None
        return preconditioner(self.optimizer, start.params, self._group, start.sample, start.before)

    def _read_after(self, start: BeforeStep, *, left: bool) -> tuple[Tensor, int, Tensor | None]:
        """Return weights [C], the number of parameters, the first ones, with a second moment, and it, [M].

        ``left``: whether the gradients are what the step got.
        """
        count = start.moments
        if not count and all(map(self.check.understood, start.params)):  # this step has made the state
            count = len(start.params)
        moments = [self.check.readable(param) for param in start.params[:count]]
        read = [moment for moment in moments if moment is not None]
        if not read or len(read) < count or not left:
            return start.sample.gather(start.params), 0, None
        tensors = [moment for moment in read if isinstance(moment, Tensor)]
        if len(tensors) == len(start.params):
            after, exp_avg_sq = start.sample.gather_both(start.params, tensors)
            return after, count, exp_avg_sq
        exp_avg_sq = sample_moments(start.sample.leading(count), read)
        return start.sample.gather(start.params), count, exp_avg_sq

    def _leaves_gradients(self, start: BeforeStep) -> bool:
        """Return whether the gradients that ``step(closure)`` has made are still in ``.grad`` after it.

        Some optimizers make their update there.  Of torch's own it is known that the zero-sum of a gradient
        stays; of others it is known while their second moments agree with the gradients."""
        known = [param for param in start.params if self.check.understood(param)]
        if self.check.trusted or (known and not any(map(self.check.in_doubt, known))):
            return True
        if not self.check.pending(start.params):
            self.unreadable.add(
                "the head's gradient, which exists only inside optimizer.step(closure), where "
                f"{type(self.optimizer).__name__} may overwrite it (norms of gradients are of what it leaves)"
            )
        return False

    # --- coordinates ---------------------------------------------------------------------------

    def layout(self, *, needs_gradient: bool) -> Layout | None:
        params: list[nn.Parameter] = []
        ends: list[int] = []  # of each group among the parameters
        for group in self.optimizer.param_groups:
            params += [
                param
                for param in group["params"]
                if (param.grad is not None if needs_gradient else param.requires_grad)
            ]
            ends.append(len(params))
        reduced = self.plan.reduced_sample
        sizes = [*map(size_of, params)]  # pruning changes them in place
        sparse = [id(param) for param in params if not _is_dense(param)]
        state = len(self.optimizer.state)
        key = (reduced, self.check.version, state, *ends, *map(id, params), *sizes, *sparse)
        found = self._layouts.get(key)
        if found is None:
            usable = self._usable(params)
            if not usable:
                return None
            groups = self.optimizer.param_groups
            group_at = {id(param): at for at, group in enumerate(groups) for param in group["params"]}
            self._forget_layouts(group_at)
            place = {param: at for at, param in enumerate(group_at)}
            known = [param for param in usable if self.check.understood(param)]
            first = {id(param) for param in known}
            ordered = (*known, *(param for param in usable if id(param) not in first))
            sample = CoordinateSample(
                ordered, places=[place[id(param)] for param in ordered], reduced=reduced
            )
            undecided = tuple(at for at, param in enumerate(ordered) if self.check.undecided(param))
            found = self._layouts[key] = Layout(sample, ordered, len(known), undecided, group_at)
        self._group_at = found.group_at
        return found

    def _forget_layouts(self, group_at: Mapping[int, int]) -> None:
        """Forget layouts with parameters that the optimizer has no more: they would stay in memory."""
        gone = [
            key
            for key, layout in self._layouts.items()
            if any(id(param) not in group_at for param in layout.params)
        ]
        for key in gone:
            del self._layouts[key]
        if len(self._layouts) >= 8:  # parameters change from step to step (mixtures of experts)
            self._layouts.clear()

    def _usable(self, params: list[nn.Parameter]) -> list[nn.Parameter]:
        """Return the parameters to read: dense, real, on one device."""
        anchor = self.head.weight if self.head is not None and self.head.weight is not None else None
        dense = []
        for param in params:
            if local(param).numel() == 0:
                continue
            if not _is_dense(param) or param.is_complex():
                self.unreadable.add(
                    "complex parameters" if param.is_complex() else "parameters with sparse gradients"
                )
                continue
            dense.append(param)
        if dense:
            device = anchor.device if anchor is not None else dense[0].device
            elsewhere = [param for param in dense if param.device != device]
            if elsewhere and len(elsewhere) < len(dense):
                self.unreadable.add(f"parameters on other devices than {device}")
                dense = [param for param in dense if param.device == device]
        return dense

    def _group(self, param: nn.Parameter) -> dict[str, Any]:
        at, groups = self._group_at.get(id(param)), self.optimizer.param_groups
        return groups[at] if at is not None and at < len(groups) else self.group_of(param)

    # --- the head --------------------------------------------------------------------------------

    def _readable_head(self) -> Head | None:
        """Return the head; None if its weight is sharded and the ranks do not add up the shards.

        Numbers of some of the classes alone have no meaning."""
        if self.head is not None and not self.plan.head_summed and hasattr(self.head.weight, "to_local"):
            self.unreadable.add("the head's weight, which is sharded over ranks")
            return None
        return self.head

    def _head_rows(self) -> tuple[Tensor | None, Tensor | None]:
        """Return views of a stride of the head's class rows, and of the bias entries of the same classes."""
        head = self._readable_head()
        if head is None or head.weight is None or not self.holds(head.weight):
            return None, None
        weight = head.classes_first(head.weight.detach())
        stride = -(-weight.numel() // HEAD_ELEMENTS)
        bias = None if head.bias is None else local(head.bias.detach())
        if stride > 1:
            weight, bias = weight[::stride], None if bias is None else bias[::stride]
        return weight, bias

    def _whole_head(self, step: int) -> Tensor | None:
        head = self._readable_head()
        if head is None or head.weight is None:
            return None
        every = -(-head.weight.numel() // MEAN_ELEMENTS)
        return head.classes_first(head.weight.detach()) if step % every == 0 else None

    def _head_gradients(self, step: int) -> tuple[Tensor | None, Tensor | None]:
        head = self._readable_head()
        if head is None or head.weight is None or not head.has_zero_sum or head.outputs == 1:
            return None, None
        grad, bias_grad = head.weight.grad, None
        if head.bias is not None and head.bias.grad is not None and _is_dense(head.bias):
            bias_grad = local(head.bias.grad.detach())
        if grad is None or not _is_dense(head.weight) or grad.shape != head.weight.shape:
            return None, bias_grad
        grad = head.classes_first(grad.detach())
        # Read all classes, because their sum is needed, and a sample of the feature columns.  Neighbouring
        # columns share cache lines.
        columns = gradient_columns(grad.shape[1], head.outputs or 1)
        first = (step * columns) % (grad.shape[1] - columns + 1)
        return grad[:, first : first + columns], bias_grad


def _is_dense(param: Tensor) -> bool:
    """Return whether a parameter has no sparse gradient."""
    grad = param.grad
    return grad is None or grad.layout is torch.strided


def gradient_columns(features: int, outputs: int) -> int:
    """Return how many columns of the head's gradient [K, d] are read per step."""
    return max(1, min(features, MEAN_ELEMENTS // 4 // outputs))


if not TYPE_CHECKING:  # for a type checker, any name would exist

    def __getattr__(name: str) -> Any:
        return _moved.left(__name__, name)
