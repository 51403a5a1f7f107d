"""Declare the quantities of the global means, the optimizer's state and update, and the run."""

from __future__ import annotations

from math import inf

from nfi_monitor.quantities.declaration import (
    ADAM,
    COSINE,
    INPUT,
    LIU,
    MEAN_ROW,
    POSITIVE,
    SHARE,
    Merge,
    Quantity,
    Undefined,
)  # fmt: skip

_WORTSMAN = "Wortsman et al. 2023 (arXiv 2304.13013)"
_THILAK = "Thilak et al. (arXiv 2206.04817)"
_FORMULAS = "tests/measure/test_step.py::test_every_quantity_of_a_real_adamw_step_equals_its_formula"

MEANS = (
    Quantity(
        "classifier_mean_norm", "1", "‖W_G‖", "‖W_G‖, W_G the mean over classes of the head's rows",
        source=f"{LIU}, section 3", within=POSITIVE, nan=INPUT,
        reference=_FORMULAS,
        chart="global means", curve="‖W_G‖", extreme="max", place=90,
    ),
    Quantity(
        "feature_mean_norm", "1", "‖μ_G‖", "‖μ_G‖, μ_G the mean over rows of the features",
        source=f"{LIU}, section 3", within=POSITIVE, nan=MEAN_ROW, merge=Merge.MEAN_FEATURES,
        reference=_FORMULAS,
        chart="global means", curve="‖μ_G‖", extreme="max", live=True, tail=True, place=80,
    ),
    Quantity(
        "mean_alignment", "1", "cos(W_G, μ_G)", "cos(W_G, μ_G)",
        source=f"{LIU}, Theorem 3.7", within=COSINE, nan=(*MEAN_ROW, Undefined.NO_DIRECTION),
        merge=Merge.MEAN_FEATURES,
        reference=_FORMULAS,
        chart="alignment", curve="cos(W_G, μ_G)", extreme="min", place=100,
    ),
    Quantity(
        "classifier_mean_growth", "1/step", "growth of ‖W_G‖", "d ln‖W_G‖ / d step",
        source=f"{LIU}, Theorem 3.7", nan=(*INPUT, Undefined.NO_DIRECTION), merge=Merge.DERIVED,
        reference="tests/detect/test_signals.py::test_a_growth_rate_is_the_slope_of_the_logarithm_of_its_norm",
        chart="growth of the means", curve="‖W_G‖",
    ),
    Quantity(
        "feature_mean_growth", "1/step", "growth of ‖μ_G‖", "d ln‖μ_G‖ / d step",
        source=f"{LIU}, Theorem 3.7", nan=(*MEAN_ROW, Undefined.NO_DIRECTION), merge=Merge.DERIVED,
        reference="tests/detect/test_signals.py::test_a_growth_rate_is_the_slope_of_the_logarithm_of_its_norm",
        chart="growth of the means", curve="‖μ_G‖", place=110,
    ),
)  # fmt: skip

SECOND_MOMENT = (
    Quantity(
        "sqrt_exp_avg_sq_median", "gradient", "median root second moment",
        "median of sqrt(v̂) over coordinates of all tensors",
        source=ADAM, within=POSITIVE, nan=INPUT,
        reference=_FORMULAS,
        chart="second moment, median sqrt(v̂)", curve="all tensors",
    ),
    Quantity(
        "sqrt_exp_avg_sq_mean", "gradient", "mean root second moment",
        "mean of sqrt(v̂) over coordinates of all tensors",
        source=ADAM, within=POSITIVE, nan=INPUT,
        reference=_FORMULAS,
    ),
    Quantity(
        "head_sqrt_exp_avg_sq_median", "gradient", "median root second moment of the head",
        "median of sqrt(v̂) of the head's weight",
        source=ADAM, within=POSITIVE, nan=INPUT,
        reference=_FORMULAS,
        chart="second moment, median sqrt(v̂)", curve="head",
    ),
    Quantity(
        "head_sqrt_exp_avg_sq_mean", "gradient", "mean root second moment of the head",
        "mean of sqrt(v̂) of the head's weight",
        source=ADAM, within=POSITIVE, nan=INPUT,
        reference=_FORMULAS,
    ),
    Quantity(
        "effective_learning_rate", "1/gradient", "effective learning rate",
        "lr / (median sqrt(v̂) + ε_A), head",
        source=ADAM, within=POSITIVE, nan=(*INPUT, Undefined.STILL),
        reference=_FORMULAS,
        chart="learning rate", curve="effective", extreme="max", place=170,
    ),
    Quantity(
        "second_moment_decay", "decade", "second-moment decay",
        "log10 of the head's mean sqrt(v̂) over its maximum since the last slingshot; "
        "the maximum fades over 100 τ",
        source="W. Wu 2024, section 2.1", within=(-inf, 0.0), merge=Merge.DERIVED,
        reference="tests/detect/test_signals.py::test_the_decay_is_in_decades_below_the_fading_maximum",
        chart="second-moment decay", curve="head", extreme="min", place=180,
    ),
    Quantity(
        "rms_t_max", "1", "RMS_t", "largest over tensors of sqrt(mean(g²/max(v, ε_A²)))",
        source=_WORTSMAN, within=POSITIVE, nan=INPUT,
        reference=_FORMULAS,
        chart="RMS_t", curve="worst tensor", extreme="max", live=True, place=160,
    ),
    Quantity(
        "rms_t_head", "1", "RMS_t of the head", "sqrt(mean(g²/max(v, ε_A²))) of the head's weight",
        source=_WORTSMAN, within=POSITIVE, nan=INPUT,
        reference=_FORMULAS,
        chart="RMS_t", curve="head",
    ),
)  # fmt: skip

UPDATES = (
    Quantity(
        "learning_rate", "1", "learning rate", "learning rate of the parameter group that holds the head",
        within=POSITIVE, nan=INPUT,
        no_reference="read from the optimizer, not computed",
        chart="learning rate", curve="as set",
    ),
    Quantity(
        "gradient_norm", "gradient", "gradient norm",
        "Euclidean norm of all gradients (estimated from the coordinate sample)",
        within=POSITIVE, nan=INPUT,
        reference=_FORMULAS,
        chart="gradient norm", curve="all tensors",
    ),
    Quantity(
        "update_rms", "weight", "update RMS", "root mean square of one update over all coordinates",
        within=POSITIVE, nan=INPUT,
        reference=_FORMULAS,
        chart="update RMS", curve="all tensors",
    ),
    Quantity(
        "predicted_reduction", "loss", "predicted reduction of the loss",
        "−gᵀs of the gradient g and the update s: to first order, by how much the update lowers the loss of "
        "the rows that made the gradient",
        source="Nocedal and Wright 2006, section 4.1", nan=INPUT,
        reference=_FORMULAS,
    ),
    Quantity(
        "reduction_ratio", "1", "predicted reduction over loss",
        "predicted reduction of the loss over the loss itself; above 4, the update cannot lower a loss that "
        "is quadratic along it and never negative",
        source="Nocedal and Wright 2006, section 4.1; Loizou et al. (arXiv 2002.10542)",
        nan=INPUT, merge=Merge.DERIVED,
        reference="tests/detect/test_signals.py::test_the_reduction_ratio_is_the_predicted_reduction_over_the_loss",
        chart="predicted reduction over loss", curve="all tensors",
    ),
    Quantity(
        "logit_displacement", "nat", "logit displacement δ",
        "δ = max over rows and classes of |(ΔW − mean_k ΔW)·h|",
        source=f"{LIU}, section 3", within=POSITIVE, nan=INPUT, merge=Merge.FIRST_RANK,
        reference=_FORMULAS,
        chart="displacement by one update", curve="logits δ", extreme="max", live=True, short="δ",
        tail=True, place=130,
    ),
    Quantity(
        "logit_displacement_rms", "nat", "logit displacement δ (RMS)",
        "root mean square over rows and classes of (ΔW − mean_k ΔW)·h",
        within=POSITIVE, nan=INPUT, merge=Merge.FIRST_RANK,
        reference=_FORMULAS,
    ),
    Quantity(
        "margin_displacement", "nat", "margin displacement",
        "largest change of a probe row's margin, per optimizer step",
        within=POSITIVE, nan=INPUT, merge=Merge.LARGEST_RANK,
        reference="tests/measure/test_displacement.py::test_margin_displacement_is_the_largest_change_per_step",
        chart="displacement by one update", curve="probe margins", extreme="max", place=150,
    ),
    Quantity(
        "feature_displacement", "nat", "feature displacement",
        "max_k |(W_k − W_G)·Δμ_G|: how far the layers below the head moved the mean row's logits",
        within=POSITIVE, nan=MEAN_ROW, merge=Merge.MEAN_FEATURES,
        reference=_FORMULAS,
        chart="displacement by one update", curve="by the features", place=140,
    ),
    Quantity(
        "row_match", "1", "match of the rows",
        "correlation of some rows' features with those at the same places in the step before; near 1 for the "
        "same rows, near 0 for another minibatch",
        within=COSINE, nan=(*INPUT, Undefined.NO_DIRECTION), merge=Merge.FIRST_RANK,
        reference="tests/measure/test_row_match.py::test_the_match_is_the_correlation_of_the_sketches",
    ),
    Quantity(
        "relative_update", "1", "relative update",
        "largest ‖ΔW‖ / ‖W‖ of one update over the weight matrices",
        within=POSITIVE, nan=INPUT,
        reference=_FORMULAS,
    ),
    Quantity(
        "weight_norm", "weight", "weight norm",
        "Euclidean norm of all parameters (estimated from the coordinate sample)",
        source=_THILAK, within=POSITIVE, nan=INPUT,
        reference=_FORMULAS,
        chart="weight norms", curve="all tensors", extreme="max", place=190,
    ),
    Quantity(
        "head_weight_norm", "weight", "weight norm of the head", "Frobenius norm of the head's weight",
        source=_THILAK, within=POSITIVE, nan=INPUT,
        reference=_FORMULAS,
        chart="weight norms", curve="head",
    ),
    Quantity(
        "secant_curvature", "1", "secant curvature",
        "lr · sᵀy / sᵀPs of the update s and the change y of the gradient, P = sqrt(v̂)+ε_A, or what else the "
        "optimizer divides by (SGD: 1); sᵀy / sᵀ(P/lr)s if groups have their own lr; unstable above "
        "2(1+β1)/(1−β1), or 2(1+μ) with momentum μ",
        source="Bai et al. (arXiv 2506.04805); Cohen et al. (arXiv 2103.00065)",
        nan=(*INPUT, Undefined.STILL),
        reference=_FORMULAS,
        chart="curvature along the update", curve="secant",
    ),
    Quantity(
        "gradient_alignment", "1", "gradient alignment",
        "cos of the gradients of this step and of the step before; near −1 the optimizer overshoots",
        within=COSINE, nan=INPUT,
        reference=_FORMULAS,
        chart="alignment", curve="successive gradients",
    ),
)  # fmt: skip

RUN = (
    Quantity(
        "loss", "loss", "loss", "loss given to observe_loss, mean over the micro-batches of the step",
        nan=INPUT, merge=Merge.LOSS,
        reference="tests/engine/test_loss_of_a_step.py::test_the_loss_of_a_step_is_the_mean_of_its_micro_batches",
        chart="loss", curve="observed", extreme="max", live=True, tail=True, place=10,
    ),
    Quantity(
        "non_finite_gradients", "0 or 1", "gradients that are not finite",
        "1 if a sampled gradient is NaN, Inf or too large to square, else 0",
        within=SHARE, merge=Merge.DERIVED,
        reference="tests/measure/test_step.py::test_non_finite_gradients_are_those_whose_norm_is_not_finite",
    ),
)  # fmt: skip
