"""Declare the quantities of the rows: of the gradient and the logits at the head's output."""

from __future__ import annotations

from nfi_monitor.quantities.declaration import INPUT, LIU, POSITIVE, SHARE, Merge, PerRow, Quantity

_PRIETO = "Prieto et al. 2025"
_LABELLED = "tests/measure/test_rows.py::test_every_row_quantity_equals_the_labelled_reference"
_FORMULAS = "tests/measure/test_step.py::test_every_quantity_of_a_real_adamw_step_equals_its_formula"

ROWS = (
    Quantity(
        "zero_sum_violation", "1", "zero-sum violation", "mean over live rows of |Σ_k g_k| / Σ_k |g_k|",
        source=f"{LIU}, section 3", within=SHARE, merge=Merge.ROW_SUMS,
        reference=_LABELLED,
        chart="zero-sum violation", curve="rows", extreme="max", live=True, short="zero-sum viol.",
        tail=True, place=30,
    ),
    Quantity(
        "zero_sum_violation_smoothed", "1", "smoothed zero-sum violation",
        "zero-sum violation, at most ten times that of the head's weight gradient, averaged over τ/2 or 50 "
        "steps; the detector compares this number with its levels",
        within=SHARE, merge=Merge.DERIVED,
        reference="tests/detect/test_signals.py::"
        "test_the_smoothed_violation_is_the_average_of_the_limited_violation",
        chart="zero-sum violation", curve="smoothed", extreme="max", place=35,
    ),
    Quantity(
        "zero_sum_violation_max", "1", "largest zero-sum violation",
        "largest |Σ_k g_k| / Σ_k |g_k| of the live rows",
        source=f"{LIU}, section 3", within=SHARE, merge=Merge.ROW_EXTREME,
        reference=_LABELLED,
    ),
    Quantity(
        "zero_sum_violation_share", "fraction", "rows with a zero-sum violation",
        "share of live rows whose violation is above the rounding floor of the dtype",
        source=f"{LIU}, section 3", within=SHARE, merge=Merge.ROW_SUMS,
        reference="tests/measure/test_rows.py::test_rows_above_the_rounding_floor_are_those_of_the_reference",
    ),
    Quantity(
        "zero_sum_violation_batch", "1", "zero-sum violation of the batch",
        "|Σ_ik g_ik| / Σ_ik |g_ik| over the batch",
        source=f"{LIU}, section 3", within=SHARE, nan=INPUT, merge=Merge.ROW_SUMS,
        reference=_LABELLED,
    ),
    Quantity(
        "zero_sum_violation_weight", "1", "zero-sum violation of the head's weight gradient",
        "|Σ_k ∂L/∂W_k|₁ / Σ_k |∂L/∂W_k|₁ of the head",
        source=f"{LIU}, Theorem 3.4", within=SHARE, nan=INPUT,
        per_step="nfi_monitor.measure.zero_sum:violation_of_head_weight",
        reference=_FORMULAS,
        chart="zero-sum violation", curve="weight gradient", extreme="max", place=40,
    ),
    Quantity(
        "zero_sum_violation_bias", "1", "zero-sum violation of the head's bias gradient",
        "|Σ_k ∂L/∂b_k| / Σ_k |∂L/∂b_k| of the head",
        source=f"{LIU}, Theorem 3.4", within=SHARE, nan=INPUT,
        per_step="nfi_monitor.measure.zero_sum:violation_of_head_bias",
        reference=_FORMULAS,
    ),
    Quantity(
        "absorbed_fraction", "fraction", "absorbed rows",
        "share of live rows whose correct-class gradient is exactly 0",
        source=f"{LIU}, section 3; Prieto et al. 2025", within=SHARE, merge=Merge.ROW_SUMS,
        reference=_LABELLED,
        chart="rows that rounding silences", curve="absorbed", extreme="max", live=True, short="absorbed",
        tail=True, place=50,
    ),
    Quantity(
        "partially_absorbed_fraction", "fraction", "partially absorbed rows",
        "share of live rows that are not absorbed and whose violation is above the rounding floor",
        source=f"{LIU}, section 3", within=SHARE, merge=Merge.ROW_SUMS,
        reference="tests/measure/test_rows.py::test_rows_above_the_rounding_floor_are_those_of_the_reference",
        chart="rows that rounding silences", curve="partially", extreme="max", place=60,
    ),
    Quantity(
        "underflowed_fraction", "fraction", "underflowed rows",
        "share of the rows that count whose whole gradient underflowed to 0",
        within=SHARE, merge=Merge.ROW_SUMS,
        reference=_LABELLED,
        chart="rows that rounding silences", curve="underflowed",
    ),
    Quantity(
        "ignored_fraction", "fraction", "ignored rows",
        "share of rows without a gradient because they do not count (padding, −100)",
        within=SHARE, merge=Merge.ROW_SUMS,
        reference=_LABELLED,
    ),
    Quantity(
        "live_fraction", "fraction", "live rows", "share of rows whose gradient is not all zero",
        within=SHARE, merge=Merge.ROW_SUMS,
        reference=_LABELLED,
    ),
    Quantity(
        "recomputed_fraction", "fraction", "recomputed rows",
        "share of the rows read whose logits and gradient are recomputed, because the loss makes no logits; "
        "absent where none is",
        within=SHARE, merge=Merge.ROW_SUMS,
        reference="tests/capture/test_recomputed.py::"
        "test_recomputed_rows_are_those_of_the_same_run_with_logits",
    ),
    Quantity(
        "unexplained_violation_fraction", "fraction", "rows whose violation rounding cannot explain",
        "share of live rows whose violation rounding cannot explain",
        within=SHARE, merge=Merge.ROW_SUMS,
        no_reference="a judgement with a safety factor: tried on losses of both kinds in "
        "tests/measure/test_shift_invariance.py",
    ),
    Quantity(
        "unsure_fraction", "fraction", "unsure rows",
        "share of live rows with a residual mass above 0.1, by their logits and by their gradient",
        within=SHARE, merge=Merge.ROW_SUMS,
        reference="tests/measure/test_rows.py::test_unsure_rows_are_those_of_which_logits_and_gradient_say_so",
    ),
    Quantity(
        "contradicted_fraction", "fraction", "rows whose gradient contradicts their logits",
        "share of live rows whose gradient shows 100 times the residual mass of their logits",
        within=SHARE, merge=Merge.ROW_SUMS,
        no_reference="a judgement with a safety factor: tried on scaled logits in "
        "tests/measure/test_shift_invariance.py",
    ),
    Quantity(
        "logit_scale", "1", "factor after the head",
        "factor between the head's logits and those of the loss, where it is not 1; margins, the loss at the "
        "head and displacements are of the multiplied logits",
        within=POSITIVE, merge=Merge.ROW_EXTREME,
        reference="tests/measure/test_logit_scale.py::test_the_factor_after_the_head_is_recovered",
    ),
    Quantity(
        "mismatch_fraction", "fraction", "rows whose gradient is none of a cross-entropy",
        "share of unsure rows whose gradient is not that of a cross-entropy of these logits with one weight "
        "for each class; absent up to 0.1",
        within=SHARE, merge=Merge.ROW_EXTREME,
        reference="tests/measure/test_cross_entropy_fit.py::test_the_share_is_that_of_the_reference",
    ),
    Quantity(
        "uneven_fraction", "fraction", "rows with a smaller weight",
        "share of unsure rows whose gradient is that of a cross-entropy with less than 0.9 of the largest "
        "weight of the batch; absent up to 0.1",
        within=SHARE, merge=Merge.ROW_EXTREME,
        reference="tests/measure/test_cross_entropy_fit.py::test_the_share_is_that_of_the_reference",
    ),
    Quantity(
        "loss_epsilon", "1", "precision of the gradient at the head",
        "machine epsilon of the narrowest precision that holds all gradients at the head's output",
        within=POSITIVE, merge=Merge.ROW_EXTREME,
        reference="tests/measure/test_rows.py::test_the_epsilon_is_that_of_the_narrowest_precision_that_fits",
    ),
    Quantity(
        "soft_target_fraction", "fraction", "rows with soft targets",
        "share of live rows with more than one negative gradient, which soft targets cause",
        within=SHARE, merge=Merge.ROW_SUMS,
        reference="tests/measure/test_rows.py::test_soft_targets_are_the_rows_with_several_negative_gradients",
    ),
    Quantity(
        "non_finite_rows", "rows", "rows that are not finite",
        "number of rows with NaN or Inf in logits or gradient",
        within=POSITIVE, merge=Merge.ROW_SUMS,
        reference="tests/measure/test_rows.py::test_rows_that_are_not_finite_are_counted_as_in_the_reference",
    ),
    Quantity(
        "residual_mass", "1", "residual mass ε", "mean over live rows of ε = Σ_{k≠r} p_k",
        source=f"{LIU}, Theorem 3.4", within=SHARE, merge=Merge.ROW_SUMS,
        per_row=PerRow("nfi_monitor.measure.margins:residual_mass_of_rows", over="live", from_shards=True),
        reference=_LABELLED,
    ),
    Quantity(
        "margin_min", "nat", "smallest margin", "smallest z_r − max_{k≠r} z_k over rows that count",
        source=_PRIETO, merge=Merge.ROW_EXTREME,
        reference=_LABELLED,
        chart="margins", curve="smallest",
    ),
    Quantity(
        "margin_median", "nat", "median margin", "median of z_r − max_{k≠r} z_k over rows that count",
        source=_PRIETO, nan=INPUT, merge=Merge.ROW_SUMS,
        reference=_LABELLED,
        chart="margins", curve="median", extreme="max", place=70,
    ),
    Quantity(
        "max_probability", "1", "mean largest probability", "mean over rows that count of max_k p_k",
        within=SHARE, merge=Merge.ROW_SUMS,
        per_row=PerRow(
            "nfi_monitor.measure.margins:max_probability_of_rows", over="counted", from_shards=True
        ),
        reference=_LABELLED,
    ),
    Quantity(
        "mean_logit", "nat", "mean logit", "mean of the logits over classes and rows that count",
        source=f"{LIU}, section 3", nan=INPUT, merge=Merge.ROW_SUMS,
        reference=_LABELLED,
        extreme="min", place=120,
    ),
    Quantity(
        "head_loss", "nat", "loss at the head",
        "cross-entropy of the rows that count, computed from logits and the signs of the gradient",
        within=POSITIVE, merge=Merge.ROW_SUMS,
        per_row=PerRow("nfi_monitor.measure.margins:loss_of_rows", over="counted", from_shards=True),
        reference=_LABELLED,
        chart="loss", curve="at the head", extreme="max", short="loss", tail=True, place=20,
    ),
)  # fmt: skip
