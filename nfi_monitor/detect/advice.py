"""Say what to do about an alert: one concrete next action first, then the alternatives.

Every remedy that is recommended here averts at least half of its mechanism's slingshots.  That holds if the
remedy is applied at the moment of the alert (measured: ``tests/benchmarks/remedies/RESULTS.md``).
``tests/remedies/test_advice.py`` compares the texts with that table.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from nfi_monitor.types import AlertKind, Mechanism, Severity

_LOSS = (
    "Replace the loss by nfi_monitor.remedies.zero_sum_cross_entropy(logits, target), or compute it in "
    "float64: criterion(logits.double(), target). The parameters keep their dtype."
)
_LOSS_AND_EPSILON = (
    "Replace the loss by nfi_monitor.remedies.zero_sum_cross_entropy(logits, target), and raise Adam's eps: "
    "nfi_monitor.remedies.raise_epsilon(optimizer, 1e-5). The new loss removes the cause. Its gradients come "
    "back on a second moment that has decayed: with the old eps, one slingshot in ten is only delayed."
)
_PROJECT = "If you cannot change the loss: nfi_monitor.remedies.project_zero_sum(head)."
_EPSILON = "Or raise Adam's eps: nfi_monitor.remedies.raise_epsilon(optimizer, 1e-5)."
_HALF = (
    "Compute the loss in float32 or float64, outside autocast: nfi_monitor.remedies.zero_sum_cross_entropy("
    "logits.float(), target), or criterion(logits.double(), target). In half precision, rounding silences "
    "rows already at margins of 2 to 6 nats, and a larger eps does not prevent that."
)
_IN_FLOAT64 = (
    "Replace the loss by nfi_monitor.remedies.zero_sum_cross_entropy(logits, target). It is computed in "
    "float64 already, so its logits or its gradient are rounded elsewhere."
)
_CLIP = "Clip the gradients before optimizer.step(): torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)."
_IN_DOUBLE = (
    "Or compute the loss in float64: criterion(logits.double(), target). The parameters keep their dtype."
)
_LAST_MOMENT = (
    "With less than 1.25 τ ({last_steps} steps) left, the new loss alone comes too late, but with the larger "
    "eps it does not. If you can do one thing only: nfi_monitor.remedies.raise_epsilon(optimizer, 1e-5). A "
    "smaller learning rate for a few τ only delays the slingshot."
)
_COOL = (
    "Multiply the learning rate by 0.1 for about {steps} steps now: "
    "nfi_monitor.remedies.cool_down(optimizer, 0.1, {steps in code})."
)
_STAY_COOL = (
    "Multiply the learning rate by 0.1 now and leave it there: "
    "nfi_monitor.remedies.cool_down(optimizer, 0.1, None). A smaller learning rate for a few τ "
    "(τ = {tau} steps) only delays the slingshot."
)
_NOT_THE_LOSS = "Float64 does not help here: rounding is not the cause. Neither does a larger eps."
_SAVE = "Save a checkpoint now: further training may not undo the damage of a slingshot."

NON_FINITE = (
    "Stop and go back to the last checkpoint: weights do not recover from a NaN or Inf.",
    "Check the batch of this step, the learning rate and, in float16, the loss scale.",
)
NON_FINITE_UPDATE = (
    "The update itself made the NaN or Inf: all gradients of this step were finite. In float16, Adam's "
    "default eps of 1e-8 is 0, and an update divides by it: set eps=1e-4, or keep float32 master weights.",
    "Go back to the last checkpoint: weights do not recover from a NaN or Inf.",
)
"""Advice where gradients were finite and weights are not."""
NON_FINITE_LOSS = (
    "Look at the batch of this step: if all targets are ignored, the loss is a mean over no rows. Such a "
    "loss is NaN, but it changes no weight.",
    "No NaN or Inf was seen in a gradient or a weight. If one appears there, this alert becomes critical.",
)
"""Advice where only the loss was NaN or Inf."""


_Table = dict[AlertKind, tuple[str, ...]]
_OVERSHOOT = ("Successive updates overshoot along the gradient. " + _STAY_COOL, _NOT_THE_LOSS)
_COASTING = (
    _STAY_COOL,
    _NOT_THE_LOSS + " Weight decay moves the weights to where the gradient comes back. By then the second "
    "moment has decayed, so the first updates are far too large. Do not reset the second moment: that brings "
    "the slingshot sooner.",
    _SAVE,
)
_NOT_ROUNDING = "Float64 does not help here: rounding is not the cause."
_OUTSIDE = (
    "Look at the batches and the learning-rate schedule of these steps. Skip unusual batches, or clip their "
    "gradients: torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).",
    _NOT_ROUNDING,
)
_BY_RATE = (
    "The learning rate jumped in the steps before. Set it back to its value before, or raise it over "
    "at least a few τ (τ = {tau} steps). After a resume, check that the scheduler was restored.",
    _NOT_ROUNDING,
)
_BY_GRADIENT = (
    _CLIP + " A gradient many times its usual size came at an ordinary loss.",
    "Look at the batch of that step, and in mixed precision at the loss scale.",
    _NOT_ROUNDING,
)
_BY_BATCH = (
    "Look at the data of this step: the update before was an ordinary one and cannot have raised the loss. "
    "Check labels and inputs, and skip such batches. If the loss stays high, the data or the targets are "
    "others now (a switched dataset, a new target network).",
    _CLIP + " This limits what a bad batch can do.",
    _NOT_ROUNDING,
)
_FOREWARNED = (AlertKind.AT_RISK, AlertKind.IMMINENT, AlertKind.SLINGSHOT)
_NO_SIGN = (
    "Look at the batch and the learning-rate schedule of this step: no sign of a mechanism that the monitor "
    "knows came before it."
)

ADVICE: dict[str, _Table] = {
    "numerical_feature_inflation": {
        AlertKind.AT_RISK: (_LOSS, _EPSILON),
        AlertKind.IMMINENT: (_LOSS_AND_EPSILON.replace("loss by", "loss now by"), _LAST_MOMENT, _SAVE),
        AlertKind.SLINGSHOT: (_LOSS + " This prevents the next slingshot.", _PROJECT, _EPSILON),
    },
    "second_moment": {
        AlertKind.AT_RISK: _COASTING,
        AlertKind.IMMINENT: _COASTING,
        AlertKind.SLINGSHOT: (
            _STAY_COOL,
            "A lower β2 (0.99) or less weight decay makes the next slingshot smaller.",
            _NOT_THE_LOSS,
        ),
    },
    "edge_of_stability": {
        AlertKind.AT_RISK: _OVERSHOOT,
        AlertKind.IMMINENT: (_STAY_COOL, _NOT_THE_LOSS, _SAVE),
        AlertKind.SLINGSHOT: _OVERSHOOT,
    },
    "external": dict.fromkeys(_FOREWARNED, _OUTSIDE),
    "unknown": {
        AlertKind.AT_RISK: (_COOL, _SAVE),
        AlertKind.IMMINENT: (_COOL, _SAVE),
        AlertKind.SLINGSHOT: (
            _NO_SIGN,
            _CLIP,
            "Pass every=1 to the monitor: then it reads every step before the next slingshot.",
        ),
    },
    "unknown, every step read": {AlertKind.SLINGSHOT: (_NO_SIGN, _CLIP)},
    "outside, rate": dict.fromkeys(_FOREWARNED, _BY_RATE),
    "outside, gradient": dict.fromkeys(_FOREWARNED, _BY_GRADIENT),
    "outside, batch": dict.fromkeys(_FOREWARNED, _BY_BATCH),
    "numeric, growing": {AlertKind.AT_RISK: (_LOSS_AND_EPSILON, _IN_DOUBLE, _PROJECT)},
    "numeric, half precision": {
        AlertKind.AT_RISK: (_HALF,),
        AlertKind.IMMINENT: (_HALF, _COOL, _SAVE),
        AlertKind.SLINGSHOT: (_HALF + " This prevents the next slingshot.", _PROJECT),
    },
    "numeric, float64": {
        AlertKind.AT_RISK: (_IN_FLOAT64, _EPSILON),
        AlertKind.IMMINENT: (_IN_FLOAT64, _LAST_MOMENT, _SAVE),
        AlertKind.SLINGSHOT: (_IN_FLOAT64, _PROJECT, _EPSILON),
    },
    "non_finite_update": {AlertKind.NON_FINITE: NON_FINITE_UPDATE},
    "non_finite": {AlertKind.NON_FINITE: NON_FINITE},
}  # fmt: skip
"""Advice key → kind of alert → lines of advice, in the order to try them.

The key is ``Rule.advice`` or the name of a mechanism. A rule may have a key of its own, for the kinds that it
holds.
"""


def advice_for(
    kind: AlertKind,
    mechanism: Mechanism,
    tau: float,
    severity: Severity = Severity.CRITICAL,
    keys: Iterable[str] = (),
) -> tuple[str, ...]:
    """Return the lines of advice in the order to try them; the first line is the action to take.

    ``tau``: τ in optimizer steps; it sets the number of steps that some lines name.  ``severity`` matters for
    a NaN or Inf only: below critical, it was in the loss alone.  ``keys``: advice keys of the rules that are
    on; the first that has advice for ``kind`` is used, or else the mechanism's own.
    """
    if kind is AlertKind.NON_FINITE:
        if "non_finite_update" in keys:
            return NON_FINITE_UPDATE
        return NON_FINITE if severity is Severity.CRITICAL else NON_FINITE_LOSS
    lines = next(ADVICE[key][kind] for key in (*keys, str(mechanism)) if kind in ADVICE.get(key, {}))
    steps = max(10, round(2 * tau))
    numbers = {
        "{steps}": f"{steps:,}",
        "{steps in code}": f"{steps}",
        "{last_steps}": f"{max(1, round(1.25 * tau)):,}",
        "{tau}": f"{max(1, round(tau)):,}",
    }
    return tuple(_filled(line, numbers) for line in lines)


def _filled(line: str, numbers: Mapping[str, str]) -> str:
    for place, number in numbers.items():
        line = line.replace(place, number)
    return line
