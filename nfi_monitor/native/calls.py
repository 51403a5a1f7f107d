"""Declare the arguments of the library's functions, as nfi.h does."""

from __future__ import annotations

from ctypes import Structure, c_double, c_int32, c_int64, c_void_p

STEP_NAMES = (
    "gradient_norm", "update_rms", "weight_norm", "relative_update", "predicted_reduction", "rms_t_max",
    "rms_t_head", "sqrt_exp_avg_sq_median", "sqrt_exp_avg_sq_mean", "head_sqrt_exp_avg_sq_median",
    "head_sqrt_exp_avg_sq_mean", "effective_learning_rate", "secant_curvature", "gradient_alignment",
)  # fmt: skip
HEAD_NAMES = (
    "logit_displacement", "logit_displacement_rms", "head_weight_norm", "classifier_mean_norm",
    "mean_alignment", "feature_displacement", "feature_mean_norm", "zero_sum_violation_weight",
    "zero_sum_violation_bias", "row_match",
)  # fmt: skip
"""The results of ``nfi_step_call`` and ``nfi_head_call``, in their order."""

ROW_SUMS, ROW_MAXIMA, FACTS, THRESHOLDS = 22, 6, 7, 18
"""Numbers of results, of facts about the loss and of thresholds in ``nfi_rows_call``."""


class RowsCall(Structure):
    """``nfi_rows_call`` of nfi.h."""

    _fields_ = (
        ("grad", c_void_p),
        ("logits", c_void_p),
        ("grad_strides", c_int64 * 2),
        ("logit_strides", c_int64 * 2),
        ("rows", c_int64),
        ("classes", c_int64),
        ("total", c_int64),
        ("grad_dtype", c_int32),
        ("logit_dtype", c_int32),
        ("wide", c_int32),
        ("look", c_int32),
        ("summation_error", c_double),
        ("facts", c_double * FACTS),
        ("thresholds", c_double * THRESHOLDS),
        ("sums", c_void_p),
        ("maxima", c_void_p),
        ("counts", c_void_p),
        ("absorbed", c_void_p),
        ("winner", c_void_p),
    )


class RowTotalsCall(Structure):
    """``nfi_row_totals_call`` of nfi.h."""

    _fields_ = (
        ("rows", RowsCall),
        ("features", c_void_p),
        *((name, c_int64) for name in ("width", "feature_stride", "keep")),
        ("feature_wide", c_int32),
        ("feature_sum", c_void_p),
        ("kept", c_void_p),
        ("totals", c_double * (ROW_SUMS + ROW_MAXIMA)),
    )


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
