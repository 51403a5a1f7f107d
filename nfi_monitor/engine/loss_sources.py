"""Collect the losses of a step: reported by the loop, in the model's outputs, or given to a backward pass.

A loss that the loop reports is taken as it is.  Else the loss is taken that a framework's adapter sees on its
way into the backward pass.  Else, if the monitor was asked to read the model's outputs, the loss in them,
provided that a gradient arrives at it: a model returns a loss also where another loss trains.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from nfi_monitor.capture import devices
from nfi_monitor.capture.loss import LossProbe
from nfi_monitor.capture.sampling import local
from nfi_monitor.engine.loss_queue import LossQueue
from nfi_monitor.engine.reported_loss import ReportedLoss

UNTRAINED = 3
"""Optimizer steps without a gradient at the model's loss, before a note says that another loss trains."""


class LossSources:
    """Add the losses of this step to the queue of losses.

    Args:
        losses: the queue.
        failed: ``failed(part, error)`` reports an error.
        taken: called for each loss that was added.
        ignored: returns whether losses are ignored now (closed, paused, a CUDA graph is being captured).
    """

    def __init__(
        self,
        losses: LossQueue,
        failed: Callable[[str, BaseException], None],
        ignored: Callable[[], bool],
        taken: Callable[[], None],
    ) -> None:
        self.look: Callable[[Tensor], object] | None = None
        """Called with each loss that is trained, with its graph."""
        self._taken = taken
        self._losses, self._failed, self._ignored = losses, failed, ignored
        self._reported = False  # whether the loop reports losses: then no other source counts
        self._probe: LossProbe | None = None
        self._steps_untrained = self._passes = 0
        self._check = ReportedLoss()

    @property
    def untrained(self) -> str:
        """The loss at which no gradient arrives: "reported" by the loop, "returned" by the model, or ""."""
        if self._reported:
            return "reported" if self._check.untrained else ""
        return "returned" if self._steps_untrained >= UNTRAINED else ""

    def report(self, loss: Tensor | float) -> None:
        """Take a loss that the training loop reports."""
        if self._ignored():
            return
        if isinstance(loss, Tensor):
            if not devices.has_numbers(loss, meta=True):
                return
            if self.look is not None:
                self.look(loss)
            self._check.watch(loss)
        if not self._reported:
            self._reported = True
            self._losses.forget()  # losses of this step from other sources
        self._add(loss)

    def watch_outputs(
        self, model: nn.Module, scale: float, register: Callable[[nn.Module, LossProbe], None]
    ) -> None:
        """Read the loss in the model's outputs. ``register(module, hook)`` registers a forward hook.

        ``scale`` as for :meth:`nfi_monitor.Monitor.observe_outputs`.
        """
        if self._probe is not None:
            return

        def deliver(loss: Tensor, share: bool) -> None:
            if not self._reported:
                self._take(loss, scale if share else None)

        self._probe = LossProbe(deliver, self._failed)
        self._probe.on_meta = any(parameter.is_meta for parameter in model.parameters())
        register(model, self._probe)

    @contextmanager
    def backward(self, loss: Any, *, shares: bool) -> Iterator[None]:
        """Take ``loss`` if the block, its backward pass, raises no error.

        ``shares``: the losses of a step's micro-batches are added; else their mean is taken.
        """
        before = len(self._losses.observed)
        self._passes += 1
        yield
        try:
            if self.look is not None and isinstance(loss, Tensor) and not self._ignored():
                self.look(loss)
            self._take_instead(before, loss, shares=shares)
        except Exception as error:
            self._failed("loss", error)

    @contextmanager
    def micro_batch(self, *, shares: bool) -> Iterator[list[Any]]:
        """Take the loss that is added to the yielded list, unless :meth:`backward` ran inside the block."""
        before, passes, returned = len(self._losses.observed), self._passes, list[Any]()
        yield returned
        try:
            if returned and self._passes == passes:
                self._take_instead(before, returned[0], shares=shares)
        except Exception as error:
            self._failed("loss", error)

    def _take_instead(self, before: int, loss: Any, *, shares: bool) -> None:
        """Take ``loss`` in place of all but the first ``before`` losses of this step."""
        losses = self._losses
        if isinstance(loss, Tensor) and not self._reported:
            self.end_micro_batch()  # a compiled model stores its loss
            del losses.observed[before:]  # the loss in the model's output is a part of this one
            losses.share = None
            self._take(loss.detach().mean(), 1.0 if shares and before else None)

    def end_micro_batch(self) -> None:
        """Collect the loss that a compiled forward pass has stored."""
        if self._probe is not None:
            try:
                if not self._ignored():
                    self._probe.collect()
            except Exception as error:
                self._failed("loss", error)

    def end_step(self) -> None:
        """Collect the last micro-batch's loss, before the optimizer step."""
        self._check.end_step()
        if self._probe is None:
            return
        self.end_micro_batch()
        returned, trained = self._probe.take_counts()
        if trained:
            self._steps_untrained = 0
        elif returned:
            self._steps_untrained += 1

    def _take(self, loss: Tensor | float, share: float | None = None) -> None:
        if self._ignored():
            return
        if share is not None:
            self._losses.share = share
        self._add(loss)

    def _add(self, loss: Tensor | float) -> None:
        self._losses.observe(local(loss.detach()) if isinstance(loss, Tensor) else float(loss))
        self._taken()
