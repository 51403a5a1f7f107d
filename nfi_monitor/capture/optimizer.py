"""Read the optimizer around its step: gradients before, moments and weights after.

Step hooks work for the default, foreach, fused and compiled steps and survive ``load_state_dict``.
Gradients are read before the step (clipped, as the optimizer sees them), because a fused step under a
gradient scaler unscales them in place.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from nfi_monitor import _moved
from nfi_monitor.capture import devices
from nfi_monitor.capture.head import Head
from nfi_monitor.capture.quantized import Quantized, quantized_moment
from nfi_monitor.capture.reading_plan import ReadingPlan
from nfi_monitor.capture.sampling import CoordinateSample, local

HEAD_ELEMENTS = 1 << 18
"""Head weights up to this many entries are compared whole; of larger ones, a stride of class rows."""

MEAN_ELEMENTS = 1 << 20
"""Head weights read for W_G and for the batch-level zero-sum per step; larger heads are read less often."""

SECOND_MOMENTS = ("max_exp_avg_sq", "exp_avg_sq", "state2")
"""Names of the second moment in an optimizer's state; with amsgrad the maximum is what divides; the last is
bitsandbytes'."""

ASSUMED_BETAS = (0.9, 0.99)
"""(β1, β2) of an optimizer that has no betas (SGD, RMSprop, Adafactor), for τ = 1/(1−β2) = 100 steps.

Such an optimizer has no second-moment memory of that form, yet patience and intervals are counted in τ.  100
steps is RMSprop's own default (alpha=.99).  With Adam's .999 it would be read a quarter as often at risk, and
a replay would wait ten times as long for a slingshot."""


@dataclass(frozen=True)
class Update:
    """One optimizer step as tensors: [C] over sampled coordinates, head tensors classes first."""

    sample: CoordinateSample
    params: tuple[nn.Parameter, ...]  # whose coordinates they are
    grad: Tensor  # [C]
    before: Tensor  # [C]
    after: Tensor  # [C]
    exp_avg_sq: Tensor | None  # [C]
    correction: Tensor | float  # 1 − β2^t, scalar or [C]
    eps: Tensor | float  # ε_A, scalar or [C]
    lr: Tensor | float  # of the head's group
    lrs: Tensor | None  # [C], where not all groups have the same
    found_inf: Tensor | None  # > 0: a fused step under a gradient scaler skipped itself
    head_position: int | None  # which of the sample's tensors the head's weight is
    head_weight_update: Tensor | None  # [k, d], a stride of class rows
    head_bias_update: Tensor | None  # [k], the same classes
    head_weight: Tensor | None  # [K, d] view; None at steps when a large head is not read
    head_weight_grad: Tensor | None  # [K, c] view, a block of feature columns
    head_bias_grad: Tensor | None  # [K]


@dataclass(frozen=True)
class _Before:
    sample: CoordinateSample
    params: tuple[nn.Parameter, ...]
    grad: Tensor | None  # None: to be read after the step
    before: Tensor
    found_inf: Tensor | None
    head_weight: Tensor | None
    head_bias: Tensor | None
    head_weight_grad: Tensor | None
    head_bias_grad: Tensor | None


def unwrap(optimizer: Any) -> Optimizer:
    """The torch optimizer inside wrappers such as accelerate's, whose own hooks never fire.

    Raises TypeError, saying what was given, if there is none.
    """
    seen = optimizer
    while not isinstance(seen, Optimizer):
        inner = getattr(seen, "optimizer", None)
        if inner is None or inner is seen:
            raise TypeError(
                f"Monitor needs a torch.optim.Optimizer, got {type(optimizer).__name__}. "
                "Pass the optimizer whose step() updates the model."
            )
        seen = inner
    # accelerate.AcceleratedOptimizer is an Optimizer subclass that delegates.
    inner = getattr(seen, "optimizer", None)
    return unwrap(inner) if isinstance(inner, Optimizer) else seen


def choose(optimizer: Any, head: Head | None) -> Optimizer:
    """The optimizer of a monitor: the one given, or of several the one that trains the head.

    Raises TypeError as :func:`unwrap`; the first of several is taken where none or no head is found.
    """
    if not isinstance(optimizer, (list, tuple)):
        return unwrap(optimizer)
    if not optimizer:
        raise TypeError("Monitor needs an optimizer, got an empty list. Pass the one that trains the head.")
    several = [unwrap(one) for one in optimizer]
    weight = head.weight if head is not None else None
    trains = [
        one
        for one in several
        if weight is not None and any(p is weight for group in one.param_groups for p in group["params"])
    ]
    return (trains or several)[0]


class OptimizerReader:
    """Gathers an :class:`Update` for the steps that are measured."""

    def __init__(self, optimizer: Optimizer, head: Head | None) -> None:
        self.optimizer = optimizer
        self.head = head
        self.plan = ReadingPlan()
        self.unreadable: set[str] = set()  # state of a kind that cannot be sampled, for a note
        self._layouts: dict[tuple[int, ...], tuple[CoordinateSample, tuple[nn.Parameter, ...]]] = {}
        self._groups: dict[int, dict[str, Any]] = {}
        self._found: tuple[Tensor | None, dict[str, Any]] | None = None

    @property
    def can_reduce(self) -> bool:
        """Whether a reduced sample of this model would have fewer coordinates."""
        return any(sample.can_lower for sample, _ in self._layouts.values())

    def group_of(self, param: Tensor | None) -> dict[str, Any]:
        """The parameter group that holds ``param``; the first one if none does."""
        groups = self.optimizer.param_groups
        known = self._found
        # load_state_dict replaces the groups: one that is no longer in the list is stale.
        if known is not None and known[0] is param and any(group is known[1] for group in groups):
            return known[1]
        for group in groups:
            if any(candidate is param for candidate in group["params"]):
                self._found = (param, group)
                return group
        return groups[0]

    def holds(self, param: Tensor) -> bool:
        return any(
            candidate is param for group in self.optimizer.param_groups for candidate in group["params"]
        )

    def betas(self) -> tuple[float, float] | None:
        """(β1, β2) of the head's group; None for optimizers without a second moment of that form."""
        betas = self.group_of(self.head.weight if self.head else None).get("betas")
        if betas is None or len(betas) < 2:
            return None
        return float(betas[0]), float(betas[1])

    def betas_or_assumed(self) -> tuple[float, float]:
        """(β1, β2) of the head's group, or :data:`ASSUMED_BETAS`: the one place that decides on τ."""
        return self.betas() or ASSUMED_BETAS

    def has_second_moment(self) -> bool | None:
        """Whether the state keeps ``exp_avg_sq``; None before the first step, when nobody can know."""
        states = [state for state in self.optimizer.state.values() if state]
        return any(_second_moment(state) is not None for state in states) if states else None

    def before(self, step: int, *, closure: bool = False) -> _Before | None:
        """Call in the step's pre-hook. None when no parameter has a gradient.

        ``closure``: the step computes its gradients itself (LBFGS, SAM, Lightning): they are read after it.
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
        return _Before(
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

    def after(self, start: _Before, step: int) -> Update | None:
        """Call in the step's post-hook, with what :meth:`before` returned. None without gradients."""
        grad, weight_grad, bias_grad = start.grad, start.head_weight_grad, start.head_bias_grad
        if grad is None:
            gradients = [param.grad for param in start.params if param.grad is not None]
            if len(gradients) < len(start.params):
                self.unreadable.add("gradients that exist only inside optimizer.step(closure)")
                return None
            grad = start.sample.gather(gradients)
            weight_grad, bias_grad = self._head_gradients(step)
        states = [self.optimizer.state.get(param, {}) for param in start.params]
        moments = [_second_moment(state) for state in states]
        exp_avg_sq = None
        correction: Tensor | float = 1.0
        eps: Tensor | float = 0.0
        lrs = None
        if all(isinstance(moment, Tensor) for moment in moments):
            exp_avg_sq = start.sample.gather(moments)  # type: ignore[arg-type]
        elif all(moment is not None for moment in moments):
            exp_avg_sq = start.sample.pack(_in_bits(start.sample, moments))
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
            if len(self._layouts) >= 8:  # gradients that come and go (mixtures of experts)
                self._layouts.clear()
            self._groups = {
                id(param): group for group in self.optimizer.param_groups for param in group["params"]
            }
            place = {param: at for at, param in enumerate(self._groups)}
            found = self._layouts[key] = (
                CoordinateSample(usable, places=[place[id(param)] for param in usable], lowered=reduced),
                tuple(usable),
            )
        return found

    def _usable(self, params: list[nn.Parameter]) -> list[nn.Parameter]:
        """Dense real parameters on one device; of those, the ones with a second moment if any has one."""
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
            moment = _second_moment(self.optimizer.state.get(param, {}))
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
        self, start: _Before, states: list[Mapping[str, Any]]
    ) -> tuple[Tensor | float, Tensor | float]:
        """(1 − β2^t, ε_A): scalars when all tensors agree, else one value per coordinate."""
        pairs: list[tuple[float, float]] = []
        for param, state in zip(start.params, states, strict=True):
            group = self._groups.get(id(param)) or self.group_of(param)
            beta2 = float(group.get("betas", (0.0, 0.999))[1])
            # Some optimizers count in the group (fused ones of other libraries), some not at all.
            taken = state.get("step", group.get("step", group.get("k")))
            eps = group.get("eps", 1e-8)
            correction = 1.0 if taken is None else 1.0 - beta2 ** _host(taken)
            pairs.append((correction, float(eps) if isinstance(eps, (int, float)) else 0.0))
            if isinstance(correction, Tensor):
                # Capturable and fused steps count on the device.  One value for all: reading them apart
                # would cost kernels for each tensor, and late in training the correction is 1.
                return pairs[0]
        first = pairs[0]
        if all(pair == first for pair in pairs):
            return max(first[0], 1e-12), first[1]
        corrections, epsilons = [max(pair[0], 1e-12) for pair in pairs], [pair[1] for pair in pairs]
        return _spread(corrections, start), _spread(epsilons, start)

    def _rates(self, start: _Before) -> Tensor | None:
        """The learning rate of each coordinate, or None where all groups have one."""
        groups = self.optimizer.param_groups
        rates = [_host(group.get("lr")) for group in groups]
        first = rates[0]
        on_device = any(isinstance(rate, Tensor) for rate in rates)  # comparing those would wait for them
        if all(rate is first or (not on_device and rate == first) for rate in rates):
            return None
        rate_of = {
            id(param): rate for group, rate in zip(groups, rates, strict=True) for param in group["params"]
        }
        return _spread([rate_of[id(param)] for param in start.params], start)

    # --- the head --------------------------------------------------------------------------------

    def _readable_head(self) -> Head | None:
        """The head, unless its weight is sharded and nobody adds up the shards: a part of the classes alone
        means nothing."""
        if self.head is not None and not self.plan.head_pooled and hasattr(self.head.weight, "to_local"):
            self.unreadable.add("the head's weight, which is sharded over ranks")
            return None
        return self.head

    def _head_rows(self) -> tuple[Tensor | None, Tensor | None]:
        """Views of a stride of the head's class rows and of the bias entries of the same classes."""
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
        # The sum over classes has to be complete; the features may be sampled: neighbouring columns,
        # because they share cache lines.
        columns = gradient_columns(grad.shape[1], head.outputs or 1)
        first = (step * columns) % (grad.shape[1] - columns + 1)
        return grad[:, first : first + columns], bias_grad


def gradient_columns(features: int, outputs: int) -> int:
    """How many columns of the head's gradient [K, d] are read per step."""
    return max(1, min(features, MEAN_ELEMENTS // 4 // outputs))


def _second_moment(state: Mapping[str, Any]) -> Tensor | Quantized | None:
    in_bits = quantized_moment(state)
    if in_bits is not None:
        return in_bits
    for name in SECOND_MOMENTS:
        if isinstance(state.get(name), Tensor):
            return state[name]  # type: ignore[no-any-return]
    return None


def _in_bits(sample: CoordinateSample, moments: Sequence[Tensor | Quantized | None]) -> list[Tensor]:
    """The sampled coordinates of moments of which some are kept in 8 bits; small tensors are not."""
    values = []
    for moment, stride in zip(moments, sample.strides, strict=True):
        if isinstance(moment, Quantized):
            values.append(moment.sample(stride))
        elif moment is not None:
            values.append(local(moment).detach().reshape(-1)[::stride].float())
    return values


def _spread(numbers: Sequence[Tensor | float], start: _Before) -> Tensor:
    """One number for each tensor → one for each coordinate [C]."""
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


def _host(value: Any) -> Any:
    """A float where that costs no synchronisation, else the tensor; NaN for None (self-scheduled rates)."""
    if isinstance(value, Tensor) and not devices.on_host(value):
        return value
    return math.nan if value is None else float(value)


if not TYPE_CHECKING:  # for a type checker, any name would exist

    def __getattr__(name: str) -> Any:
        return _moved.left(__name__, name)
