"""Read by what an optimizer divides its steps, P, where that is not sqrt(v̂) + ε_A.

A step of rate lr goes lr · P⁻¹ · gradient, or along an average of such gradients.  The curvature along the
step is measured in the metric P (:mod:`nfi_monitor.measure.curvature`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import ASGD, SGD, Adadelta, Adagrad, Adamax, Optimizer, RMSprop

from nfi_monitor.capture.sampling import CoordinateSample
from nfi_monitor.capture.step_constants import host, spread


def preconditioner(
    optimizer: Optimizer,
    params: Sequence[nn.Parameter],
    group_of: Callable[[nn.Parameter], Mapping[str, Any]],
    sample: CoordinateSample,
    like: Tensor,
) -> Tensor | None:
    """Return P at the sampled coordinates after a step of one of torch's own optimizers, [C].

    ``params``: those of the sample.  ``like`` [C]: of the dtype and on the device of the
    result.  None where P is sqrt(v̂) + ε_A, and where a step is no quotient of gradients (Rprop, LBFGS,
    Adafactor, Muon).
    """
    found = next((item for item in _KINDS if isinstance(optimizer, item[0])), None)
    if found is None:
        return None
    _, needed, of = found
    states = [optimizer.state.get(param, {}) for param in params]
    if not all(isinstance(state.get(name), Tensor) for state in states for name in needed):
        return None  # a step that was skipped makes no state
    return of(_Read(states, [*map(group_of, params)], sample, like))


class _Read:
    """The state at the sampled coordinates, and the settings of each of their tensors."""

    def __init__(
        self,
        states: Sequence[Mapping[str, Any]],
        groups: Sequence[Mapping[str, Any]],
        sample: CoordinateSample,
        like: Tensor,
    ) -> None:
        self.states, self.groups, self.sample, self.like = states, groups, sample, like

    def entry(self, name: str) -> Tensor:
        """Return an entry of the parameters' shapes, [C]."""
        return self.sample.gather([state[name] for state in self.states])

    def number(self, name: str, *, of_state: bool = False) -> Tensor | float:
        """Return a number of each group, or of each tensor's state: one if all agree, else [C]."""
        each = [host(place.get(name)) for place in (self.states if of_state else self.groups)]
        if isinstance(each[0], Tensor):  # on a device, where comparing them would wait for it
            return each[0].reshape(())
        return each[0] if all(x == each[0] for x in each) else spread(each, self.sample, self.like)


def _of_sgd(read: _Read) -> Tensor:
    return torch.ones_like(read.like)


def _of_asgd(read: _Read) -> Tensor:
    return torch.ones_like(read.like) * (read.number("lr") / read.number("eta", of_state=True))


def _of_centred_rmsprop(read: _Read) -> Tensor | None:
    if not all(group.get("centered") for group in read.groups):
        return None
    mean = read.entry("grad_avg")
    return read.entry("square_avg").addcmul_(mean, mean, value=-1).clamp_min_(0.0).sqrt_() + read.number(
        "eps"
    )


def _of_adagrad(read: _Read) -> Tensor:
    decayed = 1.0 + (read.number("step", of_state=True) - 1.0) * read.number("lr_decay")  # of the rate
    return (read.entry("sum").sqrt_() + read.number("eps")) * decayed


def _of_adadelta(read: _Read) -> Tensor:
    """Return P of the next step: this step has already added itself to ``acc_delta``."""
    eps = read.number("eps")
    return ((read.entry("square_avg") + eps) / (read.entry("acc_delta") + eps)).sqrt_()


def _of_adamax(read: _Read) -> Tensor:
    beta1 = float(read.groups[0]["betas"][0])
    decayed: Tensor = read.entry("exp_inf") * (
        1.0 - beta1 ** read.number("step", of_state=True)
    )  # the average is divided by it
    return decayed


_KINDS: tuple[tuple[type[Optimizer], tuple[str, ...], Callable[[_Read], Tensor | None]], ...] = (
    (SGD, (), _of_sgd),
    (ASGD, ("eta",), _of_asgd),
    (RMSprop, ("square_avg",), _of_centred_rmsprop),
    (Adagrad, ("sum",), _of_adagrad),
    (Adadelta, ("square_avg", "acc_delta"), _of_adadelta),
    (Adamax, ("exp_inf",), _of_adamax),
)
"""Optimizer, entries of its state that must be there, and what reads P."""
