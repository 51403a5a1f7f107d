"""What to do about an alert: one concrete next action first, then the alternatives.

Measured on modular division (β2 = .95): moving the loss to float64 averts the slingshot when done
1.25 τ ahead and not later; a tenfold smaller learning rate still does five steps ahead.
"""

from __future__ import annotations

from nfi_monitor.types import AlertKind, Mechanism

_FLOAT64 = "Compute the loss in float64: criterion(logits.double(), target). Parameters stay as they are."
_PROJECT = (
    "Or project the gradient: if logits.requires_grad: logits.register_hook(lambda g: g - g.mean(-1, "
    "keepdim=True))."
)
_EPSILON = "Or raise Adam's eps to 1e-6 or more: for group in optimizer.param_groups: group['eps'] = 1e-6."
_COOL = (
    "Multiply the learning rate by 0.1 for about {steps} steps now; it works up to a few steps before the "
    "spike."
)
_SAVE = "Save a checkpoint now: what follows may not be undone by training on."


def advice_for(kind: AlertKind, mechanism: Mechanism, tau: float) -> tuple[str, ...]:
    """Advice in the order to try it; the first is the action to take."""
    cool = _COOL.format(steps=max(10, round(2 * tau)))
    if kind is AlertKind.NON_FINITE:
        return (
            "Stop and go back to the last checkpoint: weights that took a NaN or Inf do not come back.",
            "Look at the batch of this step, at the learning rate, and (float16) at the loss scale.",
        )
    if mechanism is Mechanism.NUMERICAL_FEATURE_INFLATION:
        if kind is AlertKind.IMMINENT:
            return (
                cool + " And compute the loss in float64 from now on: criterion(logits.double(), target).",
                "Float64 alone averts it if 1.25 τ or more are left; the smaller rate alone only delays it.",
                _SAVE,
            )
        if kind is AlertKind.SLINGSHOT:
            return (_FLOAT64 + " It prevents the next one.", _PROJECT, _EPSILON)
        return (_FLOAT64, _PROJECT, _EPSILON)
    if mechanism is Mechanism.SECOND_MOMENT:
        if kind is AlertKind.SLINGSHOT:
            return (
                "Lower β2 (0.99) or weight decay, or the learning rate, to make the next one smaller.",
                "Float64 does not help here: rounding is not the cause.",
            )
        return (
            cool,
            "Float64 does not help here: rounding is not the cause. Weight decay pulls the weights back "
            "onto a second moment that has forgotten their gradient.",
            _SAVE,
        )
    if mechanism is Mechanism.EDGE_OF_STABILITY:
        if kind is AlertKind.IMMINENT:
            return (cool, "Float64 does not help here: rounding is not the cause.", _SAVE)
        return (
            "Lower the learning rate, or warm it up more slowly: the curvature along the update is above "
            "what Adam is stable at.",
            "Float64 does not help here: rounding is not the cause.",
        )
    if mechanism is Mechanism.EXTERNAL:
        return (
            "Look at the batches and the learning-rate schedule of these steps; skip or clip what stands "
            "out.",
            "Float64 does not help here: rounding is not the cause.",
        )
    if kind is AlertKind.SLINGSHOT:
        return (
            "No mechanism known to this monitor preceded it: look at the batch and at the learning-rate "
            "schedule of this step.",
            "Attach with every=1 to see the steps before the next one in full.",
        )
    return (cool, _SAVE)
