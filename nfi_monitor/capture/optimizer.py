"""Read the optimizer around its step: gradients before, moments and weights after.

Step hooks work for the default, foreach, fused and compiled steps, and stay after ``load_state_dict``.
Gradients are read before the step, clipped as the optimizer gets them.  After the step would be too late: a
fused step under a gradient scaler unscales them in place.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from nfi_monitor import _moved
from nfi_monitor.capture import devices
from nfi_monitor.capture.head import Head
from nfi_monitor.capture.quantized import Quantized
from nfi_monitor.capture.reading_plan import ReadingPlan
from nfi_monitor.capture.sampling import CoordinateSample, local
from nfi_monitor.capture.second_moment import sample_moments, second_moment
from nfi_monitor.capture.update import BeforeStep, Update

HEAD_ELEMENTS = 1 << 18
"""Head weights with at most this many entries are compared whole, larger ones at a stride of class rows."""

MEAN_ELEMENTS = 1 << 20
"""Maximum number of head weights read per step for W_G and the batch's zero-sum. Larger heads: less often."""

ASSUMED_BETAS = (0.9, 0.99)
"""(β1, β2) of an optimizer that has no betas (SGD, RMSprop, Adafactor), for τ = 1/(1−β2) = 100 steps.

Such an optimizer has no second moment of that form, but waiting times and intervals are counted in τ.  100
steps is RMSprop's own default (alpha=.99).  Rejected: Adam's .999, because a run at risk would be read a
quarter as often, and a replay would wait ten times as long for a slingshot."""


class OptimizerReader:
    """Read an :class:`~nfi_monitor.capture.update.Update` at each measured step."""

    def __init__(self, optimizer: Optimizer, head: Head | None) -> None:
        self.optimizer = optimizer
        self.head = head
        self.plan = ReadingPlan()
        self.unreadable: set[str] = set()  # descriptions of state that cannot be read, for a note
        self._layouts: dict[tuple[int, ...], tuple[CoordinateSample, tuple[nn.Parameter, ...]]] = {}
        self._groups: dict[int, dict[str, Any]] = {}
        self._found: tuple[Tensor | None, dict[str, Any]] | None = None

    @property
    def can_reduce(self) -> bool:
        """Whether a reduced sample of this model has fewer coordinates."""
        return any(sample.can_reduce for sample, _ in self._layouts.values())

    def group_of(self, param: Tensor | None) -> dict[str, Any]:
        """Return the parameter group that holds ``param``, or the first group if none does."""
        groups = self.optimizer.param_groups
        known = self._found
        # load_state_dict replaces the groups: a group that is no longer in the list is stale.
        if known is not None and known[0] is param and any(group is known[1] for group in groups):
            return known[1]
        for group in groups:
            if any(candidate is param for candidate in group["params"]):
                self._found = (param, group)
                return group
        return groups[0]

    def rates(self) -> list[float]:
        """Return the learning rate of each group; NaN where the host does not know it."""
        rates = [group.get("lr") for group in self.optimizer.param_groups]
        return [rate if type(rate) is float else _host_rate(rate) for rate in rates]

    def holds(self, param: Tensor) -> bool:
        return any(
            candidate is param for group in self.optimizer.param_groups for candidate in group["params"]
        )

    def betas(self) -> tuple[float, float] | None:
        """Return (β1, β2) of the head's group; None for optimizers without such a pair."""
        betas = self.group_of(self.head.weight if self.head else None).get("betas")
        if betas is None or len(betas) < 2:
            return None
        return float(betas[0]), float(betas[1])

    def betas_or_assumed(self) -> tuple[float, float]:
        """Return (β1, β2) of the head's group, or :data:`ASSUMED_BETAS`. This decides τ everywhere."""
        return self.betas() or ASSUMED_BETAS

    def has_second_moment(self) -> bool | None:
        """Return whether the state has a second moment; None before the first step."""
        states = [state for state in self.optimizer.state.values() if state]
        return any(second_moment(state) is not None for state in states) if states else None

    def before(self, step: int, *, closure: bool = False) -> BeforeStep | None:
        """Read gradients and weights before the step; None if no parameter has a gradient.

        Call it in the pre-hook.  ``closure``: the step computes its gradients itself (LBFGS, SAM, Lightning),
        so :meth:`after` reads them.
        """
        layout = self._layout(needs_gradient=not closure)
        if layout is None:
            return None
        sample, params = layout
        grad = None
        if not closure:
            grad = sample.gather([param.grad for param in params if param.grad is not None])
            grad_scale = getattr(self.optimizer, "grad_scale", None)
            if isinstance(grad_scale, Tensor):
                grad = grad / devices.send(grad_scale, grad.device, grad.dtype)
        found_inf = getattr(self.optimizer, "found_inf", None)
        weight, bias = self._head_rows()
        weight_grad, bias_grad = (None, None) if closure else self._head_gradients(step)
        return BeforeStep(
            sample=sample,
            params=params,
            grad=grad,
            before=sample.gather(params),
            found_inf=found_inf if isinstance(found_inf, Tensor) else None,
            head_weight=None if weight is None else weight.clone(),
            head_bias=None if bias is None else bias.clone(),
            head_weight_grad=weight_grad,
            head_bias_grad=bias_grad,
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
            weight_grad, bias_grad = self._head_gradients(step)
        states = [self.optimizer.state.get(param, {}) for param in start.params]
        moments = [second_moment(state) for state in states]
        exp_avg_sq = None
        correction: Tensor | float = 1.0
        eps: Tensor | float = 0.0
        lrs = None
        if all(isinstance(moment, Tensor) for moment in moments):
            exp_avg_sq = start.sample.gather(moments)  # type: ignore[arg-type]
        elif all(moment is not None for moment in moments):
            exp_avg_sq = start.sample.pack(sample_moments(start.sample, moments))
        if exp_avg_sq is not None:
            correction, eps = self._constants(start, states)
            lrs = self._rates(start)
        weight, bias = self._head_rows()
        full = self.head.weight if self.head is not None else None
        position = next((i for i, param in enumerate(start.params) if param is full), None)
        return Update(
            sample=start.sample,
            params=start.params,
            grad=grad,
            before=start.before,
            after=start.sample.gather(start.params),
            exp_avg_sq=exp_avg_sq,
            correction=correction,
            eps=eps,
            lr=_host(self.group_of(full).get("lr")),
            lrs=lrs,
            found_inf=start.found_inf,
            head_position=position,
            head_weight_update=_difference(weight, start.head_weight),
            head_bias_update=_difference(bias, start.head_bias),
            head_weight=self._whole_head(step),
            head_weight_grad=weight_grad,
            head_bias_grad=bias_grad,
        )

    # --- coordinates ---------------------------------------------------------------------------

    def _layout(self, *, needs_gradient: bool) -> tuple[CoordinateSample, tuple[nn.Parameter, ...]] | None:
        params = [
            param
            for group in self.optimizer.param_groups
            for param in group["params"]
            if (param.grad is not None if needs_gradient else param.requires_grad)
        ]
        reduced = self.plan.reduced_sample
        key = (reduced, len(self.optimizer.state), *map(id, params))
        found = self._layouts.get(key)
        if found is None:
            usable = self._usable(params)
            if not usable:
                return None
            if len(self._layouts) >= 8:  # parameters change from step to step (mixtures of experts)
                self._layouts.clear()
            self._groups = {
                id(param): group for group in self.optimizer.param_groups for param in group["params"]
            }
            place = {param: at for at, param in enumerate(self._groups)}
            found = self._layouts[key] = (
                CoordinateSample(usable, places=[place[id(param)] for param in usable], reduced=reduced),
                tuple(usable),
            )
        return found

    def _usable(self, params: list[nn.Parameter]) -> list[nn.Parameter]:
        """Return the parameters to read: dense, real, on one device, with a second moment if any has one."""
        anchor = self.head.weight if self.head is not None and self.head.weight is not None else None
        dense = []
        for param in params:
            if local(param).numel() == 0:
                continue
            dense_gradient = param.grad is None or param.grad.layout is torch.strided
            if not dense_gradient or param.is_complex():
                self.unreadable.add("sparse or complex parameters")
                continue
            dense.append(param)
        if dense:
            device = anchor.device if anchor is not None else dense[0].device
            elsewhere = [param for param in dense if param.device != device]
            if elsewhere and len(elsewhere) < len(dense):
                self.unreadable.add(f"parameters on other devices than {device}")
                dense = [param for param in dense if param.device == device]
        with_moment = []
        for param in dense:
            moment = second_moment(self.optimizer.state.get(param, {}))
            if moment is None:
                continue
            if isinstance(moment, Quantized):
                if moment.codes.numel() == local(param).numel():
                    with_moment.append(param)
                else:
                    self.unreadable.add("8-bit optimizer state of another shape than its parameter")
            elif (
                moment.is_floating_point()
                and moment.shape == param.shape
                and type(moment)
                in (
                    Tensor,
                    type(param),
                    type(param.data),
                )
            ):
                with_moment.append(param)
            else:
                self.unreadable.add(f"{type(moment).__name__} optimizer state")
        if with_moment and len(with_moment) < len(dense):
            self.unreadable.add(
                f"{len(dense) - len(with_moment)} of {len(dense)} parameters, which have no exp_avg_sq while "
                "others do (norms and update RMS leave them out, too)"
            )
        return with_moment or dense

    def _constants(
        self, start: BeforeStep, states: list[Mapping[str, Any]]
    ) -> tuple[Tensor | float, Tensor | float]:
        """Return (1 − β2^t, ε_A): scalars if all tensors agree, else one value per coordinate."""
        pairs: list[tuple[float, float]] = []
        for param, state in zip(start.params, states, strict=True):
            group = self._groups.get(id(param)) or self.group_of(param)
            # Without betas, torch's default for Adam. ASSUMED_BETAS would be wrong: it is a time scale, and
            # this undoes the bias correction of a second moment that the optimizer does keep.
            beta2 = float(group.get("betas", (0.0, 0.999))[1])
            # Some optimizers count steps in the group (fused ones of other libraries), some do not count.
            taken = state.get("step", group.get("step", group.get("k")))
            eps = group.get("eps", 1e-8)
            correction = 1.0 if taken is None else 1.0 - beta2 ** _host(taken)
            pairs.append((correction, float(eps) if isinstance(eps, (int, float)) else 0.0))
            if isinstance(correction, Tensor):
                # Capturable and fused optimizers count steps on the device.  Use one value for all tensors:
                # single values would cost kernels for each, and late in training the correction is 1.
                return pairs[0]
        first = pairs[0]
        if all(pair == first for pair in pairs):
            return max(first[0], 1e-12), first[1]
        corrections, epsilons = [max(pair[0], 1e-12) for pair in pairs], [pair[1] for pair in pairs]
        return _spread(corrections, start), _spread(epsilons, start)

    def _rates(self, start: BeforeStep) -> Tensor | None:
        """Return the learning rate of each coordinate, or None if all groups have the same."""
        groups = self.optimizer.param_groups
        rates = [_host(group.get("lr")) for group in groups]
        first = rates[0]
        # Rates on a device are not compared, because that would wait for the device.
        on_device = any(isinstance(rate, Tensor) for rate in rates)
        if all(rate is first or (not on_device and rate == first) for rate in rates):
            return None
        rate_of = {
            id(param): rate for group, rate in zip(groups, rates, strict=True) for param in group["params"]
        }
        return _spread([rate_of[id(param)] for param in start.params], start)

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
        bias = None if head.bias is None else local(head.bias.detach())[::stride]
        return weight[::stride], bias

    def _whole_head(self, step: int) -> Tensor | None:
        head = self._readable_head()
        if head is None or head.weight is None:
            return None
        every = -(-head.weight.numel() // MEAN_ELEMENTS)
        return head.classes_first(head.weight.detach()) if step % every == 0 else None

    def _head_gradients(self, step: int) -> tuple[Tensor | None, Tensor | None]:
        head = self._readable_head()
        if head is None or head.weight is None or head.tied or head.outputs == 1:
            return None, None
        grad, bias_grad = head.weight.grad, None
        if head.bias is not None and head.bias.grad is not None:
            bias_grad = local(head.bias.grad.detach())
        if grad is None:
            return None, bias_grad
        grad = head.classes_first(grad.detach())
        # Read all classes, because their sum is needed, and a sample of the feature columns.  Neighbouring
        # columns share cache lines.
        columns = gradient_columns(grad.shape[1], head.outputs or 1)
        first = (step * columns) % (grad.shape[1] - columns + 1)
        return grad[:, first : first + columns], bias_grad


def gradient_columns(features: int, outputs: int) -> int:
    """Return how many columns of the head's gradient [K, d] are read per step."""
    return max(1, min(features, MEAN_ELEMENTS // 4 // outputs))


def _spread(numbers: Sequence[Tensor | float], start: BeforeStep) -> Tensor:
    """Return one number per coordinate [C], from one number per tensor."""
    like = start.before
    if any(isinstance(number, Tensor) for number in numbers):
        each = torch.stack(
            [
                number.reshape(()).to(like.dtype) if isinstance(number, Tensor) else like.new_full((), number)
                for number in numbers
            ]
        )
    else:
        each = devices.send(numbers, like.device, like.dtype)
    return each[start.sample.segments]


def _difference(after: Tensor | None, before: Tensor | None) -> Tensor | None:
    return None if after is None or before is None else after - before


def _host_rate(rate: Any) -> float:
    """Return a learning rate as a number; NaN if reading it would wait for the device."""
    rate = _host(rate)
    return math.nan if isinstance(rate, Tensor) else float(rate)


def _host(value: Any) -> Any:
    """Return a float if that needs no synchronisation, else the tensor; NaN for None."""
    if isinstance(value, Tensor) and not devices.on_host(value):
        return value
    return math.nan if value is None else float(value)


if not TYPE_CHECKING:  # for a type checker, any name would exist

    def __getattr__(name: str) -> Any:
        return _moved.left(__name__, name)
