"""Hold one optimizer step as tensors: values before it, and values after it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from nfi_monitor.capture.sampling import CoordinateSample


@dataclass(frozen=True)
class Update:
    """One optimizer step: tensors [C] over sampled coordinates, and the head's tensors, classes first."""

    sample: CoordinateSample
    params: tuple[nn.Parameter, ...]  # the sampled parameters
    grad: Tensor  # [C]
    before: Tensor  # [C]
    after: Tensor  # [C]
    exp_avg_sq: Tensor | None  # [C]
    correction: Tensor | float  # 1 − β2^t, scalar or [C]
    eps: Tensor | float  # ε_A, scalar or [C]
    lr: Tensor | float  # of the head's group
    lrs: Tensor | None  # [C]; None if all groups have the same rate
    found_inf: Tensor | None  # > 0 if a fused step under a gradient scaler was skipped
    head_position: int | None  # index of the head's weight among the sample's tensors
    head_weight_update: Tensor | None  # [k, d], a stride of class rows
    head_bias_update: Tensor | None  # [k], the same classes
    head_weight: Tensor | None  # [K, d] view; None at steps when a large head is not read
    head_weight_grad: Tensor | None  # [K, c] view, a block of feature columns
    head_bias_grad: Tensor | None  # [K]


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
