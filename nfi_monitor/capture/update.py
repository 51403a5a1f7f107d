"""Hold one optimizer step as tensors: values before it, and values after it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor, nn

from nfi_monitor.capture.moment_check import Earlier
from nfi_monitor.capture.sampling import CoordinateSample


@dataclass(frozen=True)
class Update:
    """One optimizer step: tensors [C] over sampled coordinates, and the head's tensors, classes first.

    Tensors with a second moment come first in ``sample``; theirs are the first M of the C coordinates."""

    sample: CoordinateSample
    params: tuple[nn.Parameter, ...]  # the sampled parameters
    grad: Tensor  # [C]
    before: Tensor  # [C]
    after: Tensor  # [C]
    exp_avg_sq: Tensor | None  # [M]
    correction: Tensor | float  # 1 − β2^t, scalar or [M]
    eps: Tensor | float  # ε_A, scalar or [M]
    lr: Tensor | float  # of the head's group
    lrs: Tensor | None  # [C]; None if all groups have the same rate
    found_inf: Tensor | None  # > 0 if a fused step under a gradient scaler was skipped
    head_position: int | None  # index of the head's weight among the sample's tensors
    head_weight_update: Tensor | None  # [k, d], a stride of class rows
    head_bias_update: Tensor | None  # [k], the same classes
    head_weight: Tensor | None  # [K, d] view; None at steps when a large head is not read
    head_weight_grad: Tensor | None  # [K, c] view, a block of feature columns
    head_bias_grad: Tensor | None  # [K]
    moments: int | None = None  # number of tensors with a second moment; None: all
    preconditioner: Tensor | None = (
        None  # P where it is not sqrt(v̂) + ε_A, [M], or [C] without a second moment
    )
    stepped_by: Tensor | None = None  # [C] the gradient with L2 decay, or negated; None: it is ``grad``
    gradients_left: bool = True  # False: the step may have overwritten the gradients that were read after it

    def with_moments(self) -> Update:
        """Return the update of the tensors that have a second moment, with the gradient that they step by.

        C is M.  Itself if all tensors have one, and step by ``grad``.
        """
        count, grad = self.moments, self.grad if self.stepped_by is None else self.stepped_by
        if self.exp_avg_sq is None or count is None or count == len(self.params):
            return self if self.stepped_by is None else replace(self, grad=grad, stepped_by=None)
        end = len(self.exp_avg_sq)
        position = self.head_position
        return replace(
            self,
            sample=self.sample.leading(count),
            params=self.params[:count],
            grad=grad[:end],
            stepped_by=None,
            before=self.before[:end],
            after=self.after[:end],
            lrs=None if self.lrs is None else self.lrs[:end],
            head_position=position if position is not None and position < count else None,
        )


@dataclass(frozen=True)
class BeforeStep:
    """The tensors read before a step. ``OptimizerReader.after`` completes them to an :class:`Update`."""

    sample: CoordinateSample
    params: tuple[nn.Parameter, ...]
    grad: Tensor | None  # None: read it after the step
    before: Tensor
    found_inf: Tensor | None
    head_weight: Tensor | None
    head_bias: Tensor | None
    head_weight_grad: Tensor | None
    head_bias_grad: Tensor | None
    moments: int  # number of tensors, the first of the sample, with a second moment
    earlier: Earlier | None  # set if this step shows which tensors have one
