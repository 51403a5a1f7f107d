"""Notice that nothing arrives: backward passes or losses without an optimizer step, steps without the head.

All notes but these are made by readings.  Without optimizer steps there are no readings: the optimizer was
made anew after the monitor was attached, its update is not in ``step()``, or the hooks were removed.

Everything here is known to the host: counts, version counters, and whether a gradient is there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from nfi_monitor.capture import devices
from nfi_monitor.capture.head import Head
from nfi_monitor.capture.model_hooks import is_torchscript

CHANGED = 8
"""Passes before which the weights have changed without an optimizer step, until a note says so."""
DROPPED = 16
"""Gradients that are gone before the next pass, without a step. A gradient scaler skips some ten at first."""
LOOKS = 3
"""The weights are looked at from this pass or loss without a step on. An ordinary step has one of each."""
PASSES = 256
"""Losses, or backward passes, without any step. Few runs accumulate over that many micro-batches."""


class Silence:
    """Count what arrives without an optimizer step, and steps that arrive without the head.

    ``note(code, message, step)`` makes a note once.  ``failed(part, error)`` reports an error: only this part
    ends with it.  ``inside_step``: whether an optimizer step is running; it may need many passes (LBFGS).
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        head: Head | None,
        note: Callable[[str, str, int], None],
        failed: Callable[[str, BaseException], None],
    ) -> None:
        self._model, self._optimizer, self._head, self._note = model, optimizer, head, note
        self._failed, self._off = failed, False
        self._weight = _reference(optimizer, head)
        self._step = self._steps = self._headless = self._unfinished = 0
        self._arrived = self.inside_step = False
        self._forget()

    def watch(self, head: Head | None) -> None:
        """Another head is watched from now on."""
        self._head, self._weight = head, _reference(self._optimizer, head)

    def release(self) -> None:
        """Make the note if there was never a step, and drop the model and the optimizer."""
        if not self._steps and self._passes + self._losses >= CHANGED:
            self._say()
        del self._model, self._optimizer, self._head, self._weight
        self._note = lambda code, message, step: None

    def passed(self) -> None:
        """Count a forward pass of the head, if gradients are enabled in it."""
        if self.inside_step or not torch.is_grad_enabled():
            return
        self._headless = 0
        self._forward = True
        self._looks += 1
        if self._looks >= LOOKS:  # in most trainings a step comes before
            self._guarded(self._look)
        if self._arrived:  # since the pass before: a head may run many times in one pass of its model
            self._guarded(self._count_pass)

    def has_passed(self) -> bool:
        """Return whether the head was called, with gradients enabled, since the last optimizer step."""
        return self._forward

    def arrived(self) -> None:
        """Count a gradient at the head."""
        self._arrived = True

    def reported(self) -> None:
        """Count a loss that was reported."""
        if self.inside_step:
            return
        self._losses += 1
        self._looks += 1
        if self._looks >= LOOKS:
            self._guarded(self._look)
        if self._losses == PASSES:
            self._guarded(self._say)

    def begin_step(self) -> None:
        """Count the begin of an optimizer step."""
        if self.inside_step:  # the one before has not ended; of a nested step, the outer one will
            self._unfinished += 1
            if self._unfinished == CHANGED:
                self._note(
                    "no_steps",
                    f"The last {CHANGED} calls of {type(self._optimizer).__name__}.step() have begun and not "
                    "ended: each has raised an error, or something has removed the hook that the monitor has "
                    "after the step. Without it nothing is measured. Close this monitor, and attach a new "
                    "one to the optimizer.",
                    self._step,
                )
        self.inside_step = True

    def stepped(self, step: int, hooked: Callable[[nn.Module], bool]) -> None:
        """Count an optimizer step. ``hooked`` tells whether a module has a hook of the monitor."""
        self._step = step
        self._steps += 1
        self._headless += 1
        self._forget()
        few = self._headless
        if few >= 4 and not few & (few - 1) and self._head is not None:  # rarely: this walks over the model
            self._guarded(self._look_for_head, self._head, hooked)

    def _guarded(self, count: Callable[..., None], *given: Any) -> None:
        if not self._off:
            try:
                count(*given)
            except Exception as error:
                self._off = True
                self._failed("silence", error)

    def _count_pass(self) -> None:
        self._arrived = False
        self._passes += 1
        dropped = self._weight is not None and self._weight.grad is None
        self._dropped += dropped
        if self._passes == PASSES or (dropped and self._dropped == DROPPED):
            self._say()

    def _forget(self) -> None:
        self._passes = self._losses = self._dropped = self._changed = self._unfinished = 0
        self._arrived = self.inside_step = False
        self._looks = 0
        self._forward = False
        self._seen: tuple[int, float] | None = None

    def _look(self) -> None:
        """Look whether the weights have changed since the last pass or loss."""
        if self._weight is None:
            return
        weight = self._weight.detach()
        seen = (weight._version, _sample(weight))
        if self._seen is not None and seen != self._seen:
            self._changed += 1
            if self._changed == CHANGED:
                self._say()
        self._seen = seen

    def _say(self) -> None:
        name = type(self._optimizer).__name__
        counts = [f"{self._passes} backward passes"] if self._passes else []
        counts += [f"{self._losses} losses"] if self._losses else []
        seen = f"{self._steps:,} were seen before" if self._steps else "none was seen before"
        if self._changed:
            why = (
                "The weights change all the same: another optimizer updates them (one made after the monitor "
                f"was attached?), {name} updates them elsewhere than in step() (LOMO inside the backward "
                "pass), or hooks were removed."
            )
        elif self._dropped:
            why = (
                "Gradients come, and are gone before the next pass: they are used up inside the backward "
                "pass (as LOMO does), another optimizer uses them, or a gradient scaler skips every step."
            )
        else:
            why = "Gradients are accumulated for longer than that, or another optimizer trains the model."
        self._note(
            "no_steps",
            f"No optimizer step came with {' and '.join(counts)} ({seen}): {name}.step(), which the monitor "
            f"watches, is not called. {why} Without steps nothing is measured. Attach a monitor to the "
            "optimizer whose step() updates the model, after it is made.",
            self._step,
        )

    def _look_for_head(self, head: Head, hooked: Callable[[nn.Module], bool]) -> None:
        if is_torchscript(head.module):  # another note says that its rows are not seen
            return
        if all(module is not head.module for module in self._model.modules()):
            what = "is no longer a part of the model: it was replaced after the monitor was attached"
        elif not hooked(head.module):
            what = "has lost the monitor's hook: something has cleared its forward hooks"
        else:
            return
        self._note(
            "head_replaced",
            f"The watched head {head.name!r} {what}. Its rows are not seen any more; optimizer, norms and "
            "loss are. Close this monitor, and attach a new one to the model as it is now.",
            self._step,
        )


def _sample(weight: Tensor) -> float:
    """Return a number that an update of ``weight.data`` changes: such an update leaves the version.

    0 where the host does not know the weight.  Squares: the sum of a head's gradient over classes is 0."""
    if not devices.on_host(weight):
        return 0.0
    flat = weight.reshape(-1)
    return float(flat[:: len(flat) // 64 + 1].abs().square().sum().nan_to_num())


def _reference(optimizer: Optimizer, head: Head | None) -> Tensor | None:
    """Return a tensor that each optimizer step changes: the head's weight, or the first parameter.

    None in a group of processes: sharded training replaces and changes parameters between steps.
    """
    if dist.is_available() and dist.is_initialized():
        return None
    params = [param for group in optimizer.param_groups for param in group["params"] if param.requires_grad]
    weight = None if head is None else head.weight
    if weight is not None and any(param is weight for param in params):
        return weight
    return params[0] if params else None
