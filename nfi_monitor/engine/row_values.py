"""Leave out what the head's rows do not show of the trained loss, because the loss adds to the logits."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping

from nfi_monitor.capture.head_probe import HeadProbe
from nfi_monitor.engine.loss_queue import LossQueue
from nfi_monitor.measure.logit_scale import IN_NATS

OF_THE_LOSS = {
    "margin_min", "margin_median", "head_loss", "residual_mass", "max_probability", "logit_scale",
    "contradicted_fraction", "unsure_fraction",
}  # fmt: skip
"""Quantities of rows that hold only if the loss takes the logits that were read."""
SAME = 0.01
"""Largest relative difference of the reported loss from the cross-entropy of the rows, at which they hold."""
ROUNDED = 0.002
"""Largest relative difference from a whole number, at which a loss is taken to be divided by it."""
OTHER, READINGS = 0.1, 5
"""Relative difference of the two losses in each of so many first readings, from which on a note says so."""


class RowValues:
    """Decide which quantities of rows are recorded.

    ``probe.added`` names an operation of the loss that adds to the head's logits.  It may change nothing, as
    the largest logit of each row does, subtracted as a constant.  Once the loss is another one than the
    cross-entropy of the head's logits, margins and loss at the head are left out, for the rest of the run.
    ``probe.scaled``: the loss multiplies the logits; the gradients may not show by what, as with two classes
    or a factor near 1.  Then it is the same, until they do.
    ``probe.multiplied``: displacements, which the head's update gives, are not those of the logits.
    """

    def __init__(
        self,
        probe: HeadProbe,
        note: Callable[[str, str, int], None],
        said: Collection[str],
        losses: LossQueue,
    ) -> None:
        """``note(code, message, step)`` makes a note; ``said``: the codes of the notes so far."""
        self._probe, self._note, self._said, self._losses = probe, note, said, losses
        self._left_out = False
        self._readings = self._apart = self._divided = 0

    def known(self, step: int, values: Mapping[str, float]) -> Mapping[str, float]:
        """Return those of the values that the rows of the head show."""
        no_row_counts = math.isnan(values.get("feature_mean_norm", 0.0))  # all were refused, or are ignored
        if (self._probe.multiplied or no_row_counts) and not values.keys().isdisjoint(IN_NATS):
            values = {name: value for name, value in values.items() if name not in IN_NATS}
            if self._probe.multiplied:
                self._note("displacement_left_out", _MULTIPLIED, step)
        added, of_head, loss = self._probe.added, values.get("head_loss"), values.get("loss")
        by_unknown = self._probe.scaled and loss is not None and "logit_scale" not in values
        if added is None and not by_unknown:
            self._left_out = False  # another head
        elif of_head is not None and not self._left_out:
            if loss is not None and abs(of_head - loss) <= SAME * max(of_head, abs(loss)):
                return values
            self._left_out = True
            code = "logits_scaled" if added is None else "logits_added"
            self._note(code, _text(added, of_head, loss), step)
        if not self._left_out:
            if of_head is not None and loss is not None and self._readings < READINGS:
                self._readings += 1
                self._look_for_divisor(step, of_head, loss)
                if "recomputed_fraction" not in values:  # the gradient shows that the loss takes their logits
                    self._compare(step, of_head, loss)
            return values
        unknown = OF_THE_LOSS if added is not None else OF_THE_LOSS.union(IN_NATS)
        return {name: value for name, value in values.items() if name not in unknown}

    def _look_for_divisor(self, step: int, of_head: float, loss: float) -> None:
        """Note that the losses of the micro-batches are divided by their number, by the first readings."""
        number = self._losses.averaged
        divided = number > 1 and abs(of_head - number * loss) <= ROUNDED * of_head
        self._divided = self._divided + 1 if divided else 0
        if self._divided == READINGS:
            self._note("loss_divided", _text_divided(number, of_head, loss), step)

    def _compare(self, step: int, of_head: float, loss: float) -> None:
        """Note that the reported loss is another one than the loss at the head, by the first readings.

        Only if no graph has shown that the loss takes the head's logits: else it has other parts or weights.
        Later the loss is small, and a few rows make it: a sample of the rows may then have another mean.
        """
        if self._probe.shown:
            return
        self._apart += abs(of_head - loss) > OTHER * max(of_head, abs(loss))
        if self._apart == READINGS and _SAID.isdisjoint(self._said):
            self._note("loss_not_at_head", _text_apart(of_head, loss), step)


_SAID = {
    "absorption_left_out", "adaptive_softmax", "logits_changed", "logits_scaled", "loss_below_zero",
    "loss_divided", "loss_not_trained", "not_shift_invariant", "several_heads", "single_output",
    "soft_targets",
}  # fmt: skip
"""Notes that say what the trained loss has beside the cross-entropy at the head."""
_MULTIPLIED = (
    "The logits that are read are multiplied or capped after the head. The logit displacement is computed "
    "from the update of the head's weight, so it would not be theirs, and is left out: *imminent* cannot be "
    "reached by rounding without probe=. Rows and feature mean are measured as usual. Nothing has to be done."
)


def _text_divided(number: int, of_head: float, loss: float) -> str:
    return (
        f"{number} losses are reported in each step, and their mean ({loss:.3g}) is 1/{number} of the "
        f"cross-entropy at the head ({of_head:.3g}): each seems to be divided by their number before it is "
        "reported. The reported loss is judged, and shown too low by this factor. Report each loss before it "
        f"is divided: monitor.observe_loss(loss * {number})."
    )


def _text_apart(of_head: float, loss: float) -> str:
    return (
        f"The reported loss ({loss:.3g}) is not the mean cross-entropy at the head ({of_head:.3g}), and no "
        "autograd graph shows how it takes the logits. It may have other parts or weights, or change the "
        "logits (a margin, a scale). Margins and the loss at the head are those of the head's own logits. "
        "The reported loss is judged. If the loss changes the logits, watch the changed ones: "
        "logits = monitor.tap(logits)."
    )


def _text(added: str | None, of_head: float, loss: float | None) -> str:
    reported = "" if loss is None else f", the reported loss {loss:.3g}"
    if added is None:
        return (
            "The loss multiplies the head's logits, and the gradients do not show by how much (few classes, "
            f"or a factor near 1). The cross-entropy of the head's own logits is {of_head:.3g}{reported}. "
            "Margins, loss at the head and displacements are left out. The zero-sum is still watched, and so "
            "is the reported loss. For margins, watch the multiplied logits: logits = monitor.tap(logits)."
        )
    return (
        f"The loss changes the logits before its softmax ({added}: a margin, a prior, a mask or a slice of "
        f"the classes). The cross-entropy of the head's own logits is {of_head:.3g}{reported}. Margins and "
        "loss at the head are left out. The zero-sum is still watched, and so is a reported loss. For "
        "margins, watch the changed logits: logits = monitor.tap(logits)."
    )
