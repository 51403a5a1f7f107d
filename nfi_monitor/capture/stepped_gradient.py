"""Know the gradient that an optimizer steps by, where it is not that of ``.grad``.

L2 decay that is coupled adds weight_decay · w to the gradient before the moments are made, and ``maximize``
turns its sign (:class:`torch.optim.Adam`).  RMS_t and the curvature compare that gradient with the moments.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import ASGD, SGD, Adadelta, Adagrad, Adam, Adamax, NAdam, RAdam, RMSprop

from nfi_monitor.capture.moment_check import MomentCheck
from nfi_monitor.capture.sampling import CoordinateSample
from nfi_monitor.capture.step_constants import host, spread

_COUPLED = (SGD, ASGD, RMSprop, Adagrad, Adadelta, Adam, Adamax, NAdam, RAdam)
"""Optimizers whose decay is coupled unless their group says ``decoupled_weight_decay`` (AdamW is an Adam)."""


def is_changed(check: MomentCheck, group: Mapping[str, Any], param: nn.Parameter | None = None) -> bool:
    """Return whether a step of this group goes by another gradient than ``.grad``.

    ``param``: one of the group, for optimizers that are not torch's own.
    """
    return bool(group.get("maximize")) or _decay(check, group, param) is not None


def _decay(check: MomentCheck, group: Mapping[str, Any], param: nn.Parameter | None) -> Any:
    """Return the coupled decay of a group, None if there is none."""
    if check.trusted:
        coupled = isinstance(check.optimizer, _COUPLED) and not group.get("decoupled_weight_decay")
    else:  # the check of its second moment has shown what that is made of
        kind = check.kind(param)
        coupled = kind is not None and kind.coupled
    decay = group.get("weight_decay") if coupled else None
    return decay if isinstance(decay, Tensor) or decay else None


def stepped_gradient(
    check: MomentCheck,
    params: Sequence[nn.Parameter],
    group_of: Callable[[nn.Parameter], Mapping[str, Any]],
    sample: CoordinateSample,
    grad: Tensor,
    before: Tensor,
) -> Tensor | None:
    """Return ±g + weight_decay · w at the sampled coordinates [C]; None where that is g.

    ``params``: those of the sample.  ``grad`` g and ``before`` w [C]: as they are before the step.
    """
    groups = [*map(group_of, params)]
    if not any(is_changed(check, group, param) for group, param in zip(groups, params, strict=True)):
        return None
    signs = [-1.0 if group.get("maximize") else 1.0 for group in groups]
    decays = [
        0.0 if decay is None else host(decay)
        for decay in (_decay(check, group, param) for group, param in zip(groups, params, strict=True))
    ]
    weights = before.to(grad.dtype)
    first = decays[0]
    if isinstance(first, float) and all(decay == first for decay in decays) and len({*signs}) == 1:
        return (grad * signs[0]).add_(weights, alpha=first)
    return (grad * spread(signs, sample, grad)).addcmul_(weights, spread(decays, sample, grad))
