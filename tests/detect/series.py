"""Generate artificial series of readings with realistic shapes, to test the detector without training."""

from __future__ import annotations

import math
from collections.abc import Iterator

from nfi_monitor.types import Reading


def numeric_slingshot(start: int, spike: int, *, every: int = 1, first: int = 1) -> Iterator[Reading]:
    """Yield a healthy run until ``start``; then rows absorb, ‖μ_G‖ and δ grow; the loss jumps at ``spike``.

    The rates are those of modular division at β2 = .95 (τ = 20).
    """
    for step in range(first, spike + 200, every):
        t = step - start
        after = step - spike
        absorbed = 0.0 if t < 0 else min(0.7, 0.004 * t)
        growing = max(0, t - 60)
        delta = 0.02 * math.exp(0.0256 * min(growing, spike - start - 60))
        loss = 1e-7
        if 0 <= after < 12:
            loss = 0.5
        elif after >= 12:
            loss = 1e-5
        if after > 0:
            absorbed, delta = 0.005, 0.02
        yield Reading(
            step,
            {
                "zero_sum_violation": absorbed,
                "absorbed_fraction": absorbed,
                "unexplained_violation_fraction": 0.0,
                "feature_mean_norm": 40.0 * math.exp(0.006 * min(growing, spike - start)),
                "logit_displacement": delta,
                "logit_displacement_rms": delta / 3,
                "rms_t_max": 1.0,
                "head_sqrt_exp_avg_sq_mean": 1e-6,
                "weight_norm": 30.0,
                "gradient_norm": 1e-6,
                "non_finite_gradients": 0.0,
                "loss": loss,
            },
        )


def second_moment_slingshot(silent_from: int, kick: int) -> Iterator[Reading]:
    """Yield a hinge loss under weight decay (τ = 1000).

    From ``silent_from`` on the gradient is zero and the weights shrink.  At ``kick`` the gradient comes back.
    """
    root = 1.0
    for step in range(1, kick + 120):
        silent = silent_from <= step < kick
        after = step - kick
        kicked = {0: 1.2, 1: 2.6, 2: 6.0}.get(after, 1.0)
        if silent:
            root *= 0.999**0.5
        yield Reading(
            step,
            {
                "row_match": 1.0,
                "rms_t_max": 0.0 if silent else kicked,
                "head_sqrt_exp_avg_sq_mean": root,
                "weight_norm": 20.0 * math.exp(-1e-4 * (step - silent_from)) if silent else 20.0,
                "secant_curvature": 60.0 if 0 <= after < 3 else 1.0,
                "gradient_norm": 0.0 if silent else 1.0,
                "non_finite_gradients": 0.0,
                # The loss rises a little before it jumps.
                "loss": 2e-4 if 0 <= after < 3 else 0.5 if 3 <= after < 20 else 0.3 * (step <= silent_from),
            },
        )


def oscillation() -> Iterator[Reading]:
    """Yield an oscillation at the edge of stability that grows from step 389 on (τ = 20)."""
    for step in range(1, 401):
        growth = 1.6 ** max(step - 388, 0)
        values = {
            "zero_sum_violation": 1e-8, "rms_t_max": 0.4, "loss": 1e-3 * growth**0.25,
            "feature_displacement": 0.01 * growth, "relative_update": 2e-3, "margin_median": 12.0,
            "gradient_alignment": -0.9 if step > 388 else 0.7, "secant_curvature": 0.3 * growth,
        }  # fmt: skip
        yield Reading(step, values)
