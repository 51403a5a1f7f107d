"""Word why the monitor cannot use what a training loop passes to it."""

from __future__ import annotations

from numbers import Real
from typing import Any

from torch import Tensor

from nfi_monitor.capture.recomputed import unusable


def loss_text(loss: Any) -> str | None:
    """Return the note about an object that is no loss; None if it is a loss."""
    if isinstance(loss, Tensor):
        if not loss.is_complex() and loss.numel():
            return None
        got = f"a complex tensor ({loss.dtype})" if loss.is_complex() else "an empty tensor"
    elif isinstance(loss, str | bytes):
        got = f"a {type(loss).__name__}"
    else:
        try:
            float(loss)
            return None
        except Exception as error:  # __float__ of a foreign class may raise anything
            got = type(loss).__name__ + (f" ({error})" if isinstance(loss, Real) else "")
    return (
        f"monitor.observe_loss(loss) takes a tensor or a number, and got {got}. This call is ignored, and so "
        "is each later one of that kind; other losses are taken. Pass the loss that trains: "
        "monitor.observe_loss(loss) before optimizer.step()."
    )


def logits_text(logits: Any, class_axis: Any) -> str | None:
    """Return the note about arguments of ``monitor.tap`` that bring no rows; None if they can."""
    if not isinstance(logits, Tensor):
        why = f"it takes a tensor [..., K], and got {type(logits).__name__}"
    elif logits.dim() == 0 or not logits.is_floating_point():
        why = f"it takes floating-point logits [..., K], and got {logits.dtype} of shape {list(logits.shape)}"
    elif not isinstance(class_axis, int) or not -logits.dim() <= class_axis < logits.dim():
        why = f"class_axis={class_axis!r} is no axis of logits of shape {list(logits.shape)}"
    else:
        return None
    return (
        f"No rows come from this call of monitor.tap(logits): {why}. The training gets its argument "
        "unchanged. Pass the logits that the loss takes; class_axis names the axis of their classes."
    )


def features_text(hidden: Any, targets: Any) -> str | None:
    """Return the note about arguments of ``monitor.tap_features`` that bring no rows; None if they can."""
    why = unusable(hidden, targets)
    if why is None:
        return None
    return (
        f"No rows come from this call of monitor.tap_features(hidden, targets): {why}. The training gets "
        "the hidden states unchanged. Pass those of the loss, [..., d], with the class of each row."
    )
