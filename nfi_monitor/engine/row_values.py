"""Leave out what the head's rows do not show of the trained loss, because the loss adds to the logits."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from nfi_monitor.capture.head_probe import HeadProbe

OF_THE_LOSS = {
    "margin_min", "margin_median", "head_loss", "residual_mass", "max_probability", "logit_scale",
    "contradicted_fraction", "unsure_fraction",
}  # fmt: skip
"""Quantities of rows that hold only if the loss takes the logits that were read."""
SAME = 0.01
"""Largest relative difference of the reported loss from the cross-entropy of the rows, at which they hold."""


class RowValues:
    """Decide which quantities of rows are recorded.

    ``probe.added`` names an operation of the loss that adds to the head's logits.  It may change nothing, as
    the largest logit of each row does, subtracted as a constant.  Once the loss is another one than the
    cross-entropy of the head's logits, margins and loss at the head are left out, for the rest of the run.
    """

    def __init__(self, probe: HeadProbe, note: Callable[[str, str, int], None]) -> None:
        """``note(code, message, step)`` makes a note."""
        self._probe, self._note = probe, note
        self._left_out = False

    def known(self, step: int, values: Mapping[str, float]) -> Mapping[str, float]:
        """Return those of the values that the rows of the head show."""
        added, of_head, loss = self._probe.added, values.get("head_loss"), values.get("loss")
        if added is None:
            self._left_out = False  # another head
        elif of_head is not None and not self._left_out:
            if loss is not None and abs(of_head - loss) <= SAME * max(of_head, abs(loss)):
                return values
            self._left_out = True
            self._note("logits_added", _text(added, of_head, loss), step)
        if not self._left_out:
            return values
        return {name: value for name, value in values.items() if name not in OF_THE_LOSS}


def _text(added: str, of_head: float, loss: float | None) -> str:
    reported = "" if loss is None else f", the reported loss {loss:.3g}"
    return (
        f"The loss changes the logits before its softmax ({added}: a margin, a prior, a mask or a slice of "
        f"the classes). The cross-entropy of the head's own logits is {of_head:.3g}{reported}. Margins and "
        "loss at the head are left out. The zero-sum is still watched, and so is a reported loss. For "
        "margins, watch the changed logits: logits = monitor.tap(logits)."
    )
