"""Define the methods of a monitor for adapters of training frameworks and for remedies."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn

from nfi_monitor.capture.backward_pass import nearest_parameter
from nfi_monitor.capture.body import BodyWatch
from nfi_monitor.engine.loop import StepLoop

MOVED_TO_PORT = {
    "at_close": "at_close",
    "begin_step": "begin_step",
    "end_micro_batch": "end_micro_batch",
    "extras": "stateful",
    "guarded": "guarded",
    "may_act": "may_act",
    "sees_rows": "sees_rows",
}
"""Old attribute of a monitor → its name on ``monitor.port``."""


class AdapterPort:
    """Serve code that attaches a monitor to a framework, or acts on its alerts, as ``monitor.port``.

    Your own training loop does not need it.  A new adapter calls:

    - :meth:`at_close` after the monitor is made, with functions that undo the adapter's own registrations;
    - :meth:`begin_step` before each optimizer step, if the framework has an event for it;
    - :meth:`wrapped_by` before the first step, if the framework wraps the model after the monitor attaches;
    - :meth:`end_micro_batch` after each backward pass, if losses are read from the model's output
      (``monitor.observe_outputs()``) and the framework has an event for it;
    - :meth:`backward_of` around each backward pass, if the framework lets the adapter see it, and
      :meth:`trained_by` if it may train several models; :meth:`micro_batch` around a training step that may
      run its backward pass unseen;
    - :meth:`recompute_rows` if its models get labels and may compute a loss without logits;
    - :meth:`guarded` around all its code in the framework's events: an error must not stop the training;
    - :meth:`explain_note` for what the user can do in this framework;
    - :meth:`may_act` before it changes the training because of an alert.
    """

    def __init__(self, loop: StepLoop) -> None:
        self._loop = loop

    def begin_step(self) -> None:
        """Drop the losses that were observed since the last optimizer step.

        If a gradient scaler skipped a step, its loss is still there and does not belong to the next step.
        """
        self._loop.losses.forget()

    def wrapped_by(self, model: nn.Module) -> None:
        """Look for the ranks around ``model``, the watched model with its wrappers, before the first step."""
        loop = self._loop
        if loop.step == 0 and not loop.closed:
            loop.rank_search.again(model)

    def end_micro_batch(self) -> None:
        """Collect the loss of the micro-batch after its backward pass.

        Needed only for gradient accumulation with a compiled model and ``monitor.observe_outputs()``:
        without it, only the last micro-batch's loss is seen.
        """
        self._loop.loss_sources.end_micro_batch()

    def backward_of(self, loss: Any, *, shares: bool = False) -> AbstractContextManager[None]:
        """Take ``loss`` for the run's, in a block that runs its backward pass.

        ``shares``: the losses of a step's micro-batches are added; else their mean is taken.  The loss in the
        model's output no longer counts then.  A loss that the user reports goes first.
        """
        return self._loop.loss_sources.backward(loss, shares=shares)

    def micro_batch(self, *, shares: bool = False) -> AbstractContextManager[list[Any]]:
        """Take the loss that a training step returns, which the block adds to the yielded list.

        For a step whose backward pass :meth:`backward_of` cannot see.  Where it was seen, that loss counts.
        """
        return self._loop.loss_sources.micro_batch(shares=shares)

    def at_close(self, *callbacks: Callable[[], object]) -> None:
        """Register functions to call, in this order, when the monitor closes. Their errors are reported."""
        self._loop.close_callbacks += callbacks

    def guarded(self, part: str) -> AbstractContextManager[None]:
        """Run a block that must not stop the training: report an exception once, as an error of ``part``."""
        return self._loop.faults.guarded(part)

    def recompute_rows(self, *, temperature: float = 1.0) -> None:
        """Recompute rows where the loss does not call the head. The model gets ``labels`` as a keyword.

        For models of HuggingFace's kind; ``temperature`` divides their logits in the loss.  Elsewhere, the
        training loop calls ``monitor.tap_features``.
        """
        loop = self._loop
        if loop.head is not None and loop.head.weight is not None and not loop.closed:
            failed = loop.faults.failed
            watch = BodyWatch(loop.model, loop.head, loop.recomputer, failed, temperature=temperature)
            loop.hooks.keep(watch)

    def trained_by(self, loss: Tensor) -> bool:
        """Return whether the watched optimizer trains the parameters nearest to ``loss``."""
        loop, ours = self._loop, False
        with self.guarded("loss"):
            node = nearest_parameter(loss)
            groups = [] if loop.closed else loop.optimizer.param_groups
            ours = node is None or any(
                node.variable is parameter for group in groups for parameter in group["params"]
            )
        return ours

    def explain_note(self, code: str, text: str) -> None:
        """Use ``text`` for the note ``code`` of this run: what the user can do inside the framework."""
        self._loop.notes.texts[code] = text

    def may_act(self) -> bool:
        """Return whether an alert may change the training.

        False if several processes run that are not read together: each has its own alerts, and would act at
        another step. A note then says so once. ``on_alert`` is still called.
        """
        return self._loop.membership.may_act(self._loop.step)

    @property
    def sees_rows(self) -> bool:
        """Return whether gradients of rows arrive; False only after the note that none do."""
        loop = self._loop
        seen = loop.probe.delivered + loop.probe.recomputed
        return seen > 0 or not loop.notes.by_code.keys() & {"head_never_fired", "logits_changed"}

    @property
    def stateful(self) -> tuple[Any, ...]:
        """The objects given as ``stateful``; empty once closed."""
        return () if self._loop.closed else self._loop.stateful
