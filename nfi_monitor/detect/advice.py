"""What to do about an alert: one concrete next action first, then the alternatives.

Whatever is named here stands in ``tests/benchmarks/remedies/RESULTS.md`` as averting at least half of the
slingshots of that mechanism from that moment on; ``tests/remedies/test_advice.py`` holds the two together.
"""

from __future__ import annotations

from nfi_monitor.detect.rules import RULES
from nfi_monitor.types import AlertKind, Mechanism, Severity

_LOSS = (
    "Exchange the loss: nfi_monitor.remedies.zero_sum_cross_entropy(logits, target), or compute it in "
    "float64: criterion(logits.double(), target). Parameters stay as they are."
)
_PROJECT = "Where the loss is out of reach: nfi_monitor.remedies.project_zero_sum(head)."
_EPSILON = "Or raise Adam's eps: nfi_monitor.remedies.raise_epsilon(optimizer, 1e-5)."
_LAST_MOMENT = (
    "With less than 1.25 τ left that comes too late: nfi_monitor.remedies.raise_epsilon(optimizer, 1e-5), "
    "and the loss besides. A smaller learning rate for a few τ only delays the slingshot."
)
_COOL = (
    "Multiply the learning rate by 0.1 for about {steps} steps now: "
    "nfi_monitor.remedies.cool_down(optimizer, 0.1, {steps})."
)
_STAY_COOL = (
    "Multiply the learning rate by 0.1 now and leave it there: "
    "nfi_monitor.remedies.cool_down(optimizer, 0.1, None). A few τ of it only delay the slingshot."
)
_NOT_THE_LOSS = "Float64 does not help here: rounding is not the cause. Neither does a larger eps."
_SAVE = "Save a checkpoint now: what follows may not be undone by training on."

NON_FINITE = (
    "Stop and go back to the last checkpoint: weights that took a NaN or Inf do not come back.",
    "Look at the batch of this step, at the learning rate, and (float16) at the loss scale.",
)
NON_FINITE_LOSS = (
    "Look at the batch of this step: where every target is ignored, the mean over no rows is NaN and moves "
    "nothing.",
    "No gradient or weight was seen to be NaN or Inf. Should one be, this alert becomes critical.",
)
"""Where it was seen in the loss alone."""


_Table = dict[AlertKind, tuple[str, ...]]
_OVERSHOOT = ("Successive updates overshoot along the gradient. " + _STAY_COOL, _NOT_THE_LOSS)
_COASTING = (
    _STAY_COOL,
    _NOT_THE_LOSS + " Weight decay pulls the weights back onto a second moment that has forgotten "
    "their gradient; resetting it brings the slingshot sooner.",
    _SAVE,
)
_OUTSIDE = (
    "Look at the batches and the learning-rate schedule of these steps; skip or clip what stands out.",
    "Float64 does not help here: rounding is not the cause.",
)

ADVICE: dict[str, _Table] = {
    "numeric": {
        AlertKind.AT_RISK: (_LOSS, _EPSILON),
        AlertKind.IMMINENT: (
            _LOSS.replace("Exchange the loss", "Exchange the loss now"), _LAST_MOMENT, _SAVE,
        ),
        AlertKind.SLINGSHOT: (_LOSS + " It prevents the next one.", _PROJECT, _EPSILON),
    },
    "second_moment": {
        AlertKind.AT_RISK: _COASTING,
        AlertKind.IMMINENT: _COASTING,
        AlertKind.SLINGSHOT: (
            _STAY_COOL,
            "A lower β2 (0.99) or less weight decay make the next one smaller.",
            _NOT_THE_LOSS,
        ),
    },
    "edge_of_stability": {
        AlertKind.AT_RISK: _OVERSHOOT,
        AlertKind.IMMINENT: (_STAY_COOL, _NOT_THE_LOSS, _SAVE),
        AlertKind.SLINGSHOT: _OVERSHOOT,
    },
    "external": dict.fromkeys((AlertKind.AT_RISK, AlertKind.IMMINENT, AlertKind.SLINGSHOT), _OUTSIDE),
    "unknown": {
        AlertKind.AT_RISK: (_COOL, _SAVE),
        AlertKind.IMMINENT: (_COOL, _SAVE),
        AlertKind.SLINGSHOT: (
            "No mechanism known to this monitor preceded it: look at the batch and at the learning-rate "
            "schedule of this step.",
            "Attach with every=1 to see the steps before the next one in full.",
        ),
    },
    "non_finite": {AlertKind.NON_FINITE: NON_FINITE},
}  # fmt: skip
"""Key of a rule, or of a mechanism that no rule speaks for → kind of alert → what to do, in this order."""


def advice_for(
    kind: AlertKind, mechanism: Mechanism, tau: float, severity: Severity = Severity.CRITICAL
) -> tuple[str, ...]:
    """Return advice in the order to try it; the first is the action to take."""
    if kind is AlertKind.NON_FINITE:
        return NON_FINITE if severity is Severity.CRITICAL else NON_FINITE_LOSS
    key = next(
        (rule.advice for rule in RULES if rule.mechanism is mechanism and not rule.anytime), str(mechanism)
    )
    steps = max(10, round(2 * tau))
    return tuple(line.replace("{steps}", str(steps)) for line in ADVICE[key][kind])
