"""The catalogue of measured quantities: name, unit, meaning, source, range.

One place for units, meanings and ranges: of ``run.json``, of the charts and of the tests.
A name absent here cannot be recorded.
"""

from __future__ import annotations

from enum import Enum
from math import inf
from typing import NamedTuple


class Undefined(Enum):
    """Why a reading may be NaN."""

    INPUT = "a number that it is read from is NaN, Inf, or too large for its square"
    NO_ROWS = "no row of the step counts"
    NO_DIRECTION = "a vector whose direction or growth is asked for is zero, or too small for its square"
    STILL = "no parameter moved, or by too little for its square"


class Quantity(NamedTuple):
    unit: str
    meaning: str
    source: str = ""
    within: tuple[float, float] = (-inf, inf)
    """Smallest and largest value that a reading can have."""
    nan: tuple[Undefined, ...] = ()
    """When it may be NaN instead; empty: never, for rows that are not finite are counted and left out."""


_LIU = "Liu et al. 2026 (arXiv 2605.06152)"
_ADAM = "Kingma & Ba 2015"
_SHARE = (0.0, 1.0)
_COSINE = (-1.0, 1.0)
_POSITIVE = (0.0, inf)
_INPUT = (Undefined.INPUT,)
_MEAN_ROW = (Undefined.INPUT, Undefined.NO_ROWS)

QUANTITIES: dict[str, Quantity] = {
    # --- rows: the gradient at the head's output -------------------------------------------------
    "zero_sum_violation": Quantity("1", "mean over live rows of |Σ_k g_k| / Σ_k |g_k|", f"{_LIU}, section 3", within=_SHARE),
    "zero_sum_violation_max": Quantity("1", "largest of the rows", f"{_LIU}, section 3", within=_SHARE),
    "zero_sum_violation_share": Quantity("fraction", "live rows above the dtype's rounding floor", f"{_LIU}, section 3", within=_SHARE),
    "zero_sum_violation_batch": Quantity("1", "|Σ_ik g_ik| / Σ_ik |g_ik| over the batch", f"{_LIU}, section 3", within=_SHARE, nan=_INPUT),
    "zero_sum_violation_weight": Quantity("1", "|Σ_k ∂L/∂W_k|₁ / Σ_k |∂L/∂W_k|₁ of the head", f"{_LIU}, Theorem 3.4", within=_SHARE, nan=_INPUT),
    "zero_sum_violation_bias": Quantity("1", "|Σ_k ∂L/∂b_k| / Σ_k |∂L/∂b_k| of the head", f"{_LIU}, Theorem 3.4", within=_SHARE, nan=_INPUT),
    "absorbed_fraction": Quantity("fraction", "live rows whose correct-class gradient is exactly 0", f"{_LIU}, section 3; Prieto et al. 2025", within=_SHARE),
    "partially_absorbed_fraction": Quantity("fraction", "live rows above the rounding floor, not absorbed", f"{_LIU}, section 3", within=_SHARE),
    "underflowed_fraction": Quantity("fraction", "rows that count whose whole gradient underflowed to 0", within=_SHARE),
    "ignored_fraction": Quantity("fraction", "rows with no gradient because they do not count (padding, −100)", within=_SHARE),
    "live_fraction": Quantity("fraction", "rows with a gradient that is not all zero", within=_SHARE),
    "unexplained_violation_fraction": Quantity("fraction", "live rows whose violation rounding cannot explain", within=_SHARE),
    "soft_target_fraction": Quantity("fraction", "live rows with more than one negative gradient: soft targets", within=_SHARE),
    "non_finite_rows": Quantity("rows", "rows with NaN or Inf in logits or gradient", within=_POSITIVE),
    "residual_mass": Quantity("1", "mean over live rows of ε = Σ_{k≠r} p_k", f"{_LIU}, Theorem 3.4", within=_SHARE),
    "margin_min": Quantity("nat", "smallest z_r − max_{k≠r} z_k over rows that count", "Prieto et al. 2025"),
    "margin_median": Quantity("nat", "median of the margins", "Prieto et al. 2025", nan=_INPUT),
    "max_probability": Quantity("1", "mean over rows of max_k p_k", within=_SHARE),
    "mean_logit": Quantity("nat", "mean of the logits over rows that count and classes", f"{_LIU}, section 3", nan=_INPUT),
    "head_loss": Quantity("nat", "cross-entropy of live rows, recovered from logits and gradient signs", within=_POSITIVE),
    # --- global means ----------------------------------------------------------------------------
    "classifier_mean_norm": Quantity("1", "‖W_G‖, W_G the mean over classes of the head's rows", f"{_LIU}, section 3", within=_POSITIVE, nan=_INPUT),
    "feature_mean_norm": Quantity("1", "‖μ_G‖, μ_G the mean over rows of the features", f"{_LIU}, section 3", within=_POSITIVE, nan=_MEAN_ROW),
    "mean_alignment": Quantity("1", "cos(W_G, μ_G)", f"{_LIU}, Theorem 3.7", within=_COSINE, nan=(*_MEAN_ROW, Undefined.NO_DIRECTION)),
    "classifier_mean_growth": Quantity("1/step", "d ln‖W_G‖ / d step", f"{_LIU}, Theorem 3.7", nan=(*_INPUT, Undefined.NO_DIRECTION)),
    "feature_mean_growth": Quantity("1/step", "d ln‖μ_G‖ / d step", f"{_LIU}, Theorem 3.7", nan=(*_MEAN_ROW, Undefined.NO_DIRECTION)),
    # --- second moment ---------------------------------------------------------------------------
    "sqrt_exp_avg_sq_median": Quantity("gradient", "median of sqrt(v̂) over coordinates of all tensors", _ADAM, within=_POSITIVE, nan=_INPUT),
    "sqrt_exp_avg_sq_mean": Quantity("gradient", "mean of sqrt(v̂) over coordinates of all tensors", _ADAM, within=_POSITIVE, nan=_INPUT),
    "head_sqrt_exp_avg_sq_median": Quantity("gradient", "median of sqrt(v̂) of the head's weight", _ADAM, within=_POSITIVE, nan=_INPUT),
    "head_sqrt_exp_avg_sq_mean": Quantity("gradient", "mean of sqrt(v̂) of the head's weight", _ADAM, within=_POSITIVE, nan=_INPUT),
    "effective_learning_rate": Quantity("1/gradient", "lr / (median sqrt(v̂) + ε_A), head", _ADAM, within=_POSITIVE, nan=(*_INPUT, Undefined.STILL)),
    "second_moment_decay": Quantity("decade", "log10 of head mean sqrt(v̂) over its maximum since the last slingshot (which fades over 100 τ)", "W. Wu 2024, section 2.1", within=(-inf, 0.0)),
    "rms_t_max": Quantity("1", "largest over tensors of sqrt(mean(g²/max(v, ε_A²)))", "Wortsman et al. 2023 (arXiv 2304.13013)", within=_POSITIVE, nan=_INPUT),
    "rms_t_head": Quantity("1", "the same for the head's weight", "Wortsman et al. 2023 (arXiv 2304.13013)", within=_POSITIVE, nan=_INPUT),
    # --- updates and weights ---------------------------------------------------------------------
    "learning_rate": Quantity("1", "lr of the parameter group that holds the head", within=_POSITIVE, nan=_INPUT),
    "gradient_norm": Quantity("gradient", "Euclidean norm of all gradients (estimated from the coordinate sample)", within=_POSITIVE, nan=_INPUT),
    "update_rms": Quantity("weight", "root mean square of one update over all coordinates", within=_POSITIVE, nan=_INPUT),
    "logit_displacement": Quantity("nat", "δ = max over rows and classes of |(ΔW − mean_k ΔW)·h|", f"{_LIU}, section 3", within=_POSITIVE, nan=_INPUT),
    "logit_displacement_rms": Quantity("nat", "root mean square of the same", within=_POSITIVE, nan=_INPUT),
    "margin_displacement": Quantity("nat", "largest change of a probe row's margin, per optimizer step", within=_POSITIVE, nan=_INPUT),
    "feature_displacement": Quantity("nat", "max_k |(W_k − W_G)·Δμ_G|: the mean row's logits moved by the layers below the head", within=_POSITIVE, nan=_MEAN_ROW),
    "relative_update": Quantity("1", "largest ‖ΔW‖ / ‖W‖ of one update over the weight matrices", within=_POSITIVE, nan=_INPUT),
    "weight_norm": Quantity("weight", "Euclidean norm of all parameters (estimated from the coordinate sample)", "Thilak et al. (arXiv 2206.04817)", within=_POSITIVE, nan=_INPUT),
    "head_weight_norm": Quantity("weight", "Frobenius norm of the head's weight", "Thilak et al. (arXiv 2206.04817)", within=_POSITIVE, nan=_INPUT),
    "secant_curvature": Quantity("1", "lr · sᵀy / sᵀPs along the update s, P = sqrt(v̂)+ε_A; sᵀy / sᵀ(P/lr)s where groups have their own lr; unstable above 2(1+β1)/(1−β1)", "Bai et al. (arXiv 2506.04805)", nan=(*_INPUT, Undefined.STILL)),
    "gradient_alignment": Quantity("1", "cos of this step's gradient and the last one's; towards −1 the optimizer overshoots", within=_COSINE, nan=_INPUT),
    # --- the run ---------------------------------------------------------------------------------
    "loss": Quantity("loss", "what observe_loss was given, mean over the micro-batches of the step", nan=_INPUT),
    "non_finite_gradients": Quantity("0 or 1", "1 where a sampled gradient is NaN or Inf (or too large to square)", within=_SHARE),
}  # fmt: skip
