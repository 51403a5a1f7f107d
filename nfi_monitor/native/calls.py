"""Declare the arguments of the library's functions that read an optimizer step, as nfi.h does."""

from __future__ import annotations

from ctypes import Structure, c_double, c_int32, c_int64, c_void_p

STEP_NAMES = (
    "gradient_norm", "update_rms", "weight_norm", "relative_update", "rms_t_max", "rms_t_head",
    "sqrt_exp_avg_sq_median", "sqrt_exp_avg_sq_mean", "head_sqrt_exp_avg_sq_median",
    "head_sqrt_exp_avg_sq_mean", "effective_learning_rate", "secant_curvature", "gradient_alignment",
)  # fmt: skip
HEAD_NAMES = (
    "logit_displacement", "logit_displacement_rms", "head_weight_norm", "classifier_mean_norm",
    "mean_alignment", "feature_displacement", "feature_mean_norm", "zero_sum_violation_weight",
    "zero_sum_violation_bias", "row_match",
)  # fmt: skip
"""The results of ``nfi_step_call`` and ``nfi_head_call``, in their order."""


class StepCall(Structure):
    """``nfi_step_call`` of nfi.h."""

    _fields_ = (
        *((name, c_void_p) for name in ("grad", "before", "after", "exp_avg_sq")),
        *((name, c_void_p) for name in ("old_grad", "old_before", "old_preconditioner", "preconditioner")),
        *((name, c_void_p) for name in ("ends", "rates", "corrections", "epsilons", "lrs", "matrices")),
        *((name, c_int64) for name in ("tensors", "moment_tensors", "moments", "head")),
        *((name, c_double) for name in ("total", "moment_total", "correction", "eps", "lr", "mean_eps")),
        ("wide", c_int32),
        ("after_of", c_void_p),
        ("moment_of", c_void_p),
        ("out", c_double * 16),
    )


class HeadCall(Structure):
    """``nfi_head_call`` of nfi.h."""

    _fields_ = (
        *((name, c_void_p) for name in ("weight", "grad", "bias_grad", "update", "bias_update", "features")),
        *((name, c_void_p) for name in ("mean", "old_mean", "sketch", "old_sketch")),
        *((f"{name}_stride", c_int64) for name in ("weight", "grad", "update", "feature")),
        *((name, c_int64) for name in ("classes", "width", "columns", "kept", "rows", "sketched")),
        ("wide", c_int32),
        ("out", c_double * 16),
    )


class PlanCall(Structure):
    """``nfi_plan`` of nfi.h."""

    _fields_ = (
        ("step", StepCall),
        ("head", HeadCall),
        *((name, c_void_p) for name in ("params", "grads", "moments", "taken", "strides", "counts")),
        *((name, c_void_p) for name in ("betas", "corrections", "after_of", "moment_of")),
        *((name, c_void_p) for name in ("old_weight", "old_bias", "bias", "features", "directions")),
        *((name, c_int64) for name in ("weight_at", "bias_at")),
        ("copy_head", c_int32),
    )
