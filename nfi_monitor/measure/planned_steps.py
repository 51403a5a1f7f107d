"""Read steps by a plan while one holds, and make another plan where it does not."""

from __future__ import annotations

import torch
from torch import Tensor

from nfi_monitor.capture.optimizer import HEAD_ELEMENTS, OptimizerReader
from nfi_monitor.capture.stepped_gradient import is_changed
from nfi_monitor.capture.update import BeforeStep
from nfi_monitor.measure import declared, native_step
from nfi_monitor.measure.memory import Memory
from nfi_monitor.measure.planned_moments import moment_names
from nfi_monitor.measure.step_plan import StepPlan
from nfi_monitor.native import library

MOST_PLANS = 8
"""Plans that are made in vain, one after the other, before no more are made for PAUSE readings."""
PAUSE = 64


def plan_for(reader: OptimizerReader) -> StepPlan | None:
    """Return a plan for the present parameters with a gradient; None where there can be none.

    A plan needs one of torch's own optimizers with a second moment, one dtype on the host, and a head that
    is read whole.
    """
    head, loaded = reader.head, library.library()
    if loaded is None or not reader.check.trusted or declared.OF_STEP != native_step.OF_GRADIENT:
        return None
    scaled = (getattr(reader.optimizer, name, None) for name in ("grad_scale", "found_inf"))
    if any(value is not None for value in scaled):  # a gradient scaler's, for a fused step
        return None
    if any(is_changed(reader.check, group) for group in reader.optimizer.param_groups):
        return None  # the library has the gradients of .grad alone
    layout = reader.layout(needs_gradient=True)
    if layout is None or layout.understood < len(layout.params) or head is None:
        return None
    weight, dtype = head.weight, layout.params[0].dtype
    parts = [weight] if head.bias is None else [weight, head.bias]
    known = {id(param) for param in layout.params}
    if (
        weight is None
        or dtype not in (torch.float32, torch.float64)
        or head.class_axis != 0
        or weight.dim() != 2
        or weight.numel() > HEAD_ELEMENTS
        or not all(id(part) in known for part in parts)
        or not all(library.is_plain(param, dtype) for param in layout.params)
    ):
        return None
    states = [reader.optimizer.state.get(param, {}) for param in layout.params]
    moments = [state.get(name) for state, name in zip(states, moment_names(reader, layout), strict=True)]
    counts = [state.get("step") for state in states]
    if not all(library.is_plain(moment, dtype) for moment in moments) or not all(
        library.is_plain(count, torch.float32) and count.numel() == 1 for count in counts
    ):
        return None
    return StepPlan(reader, layout, head, weight)


class PlannedSteps:
    """Hold the plan for the steps of one optimizer.

    An error of the library costs nothing: torch reads the step.
    """

    def __init__(self) -> None:
        self._plan: StepPlan | None = None
        self._vain = 0  # plans, or attempts to make one, since the last that served
        self._wait = 0  # readings until another is made

    def before(self, reader: OptimizerReader) -> bool:
        """Read gradients and weights before a step. Returns False if torch must do it."""
        try:
            if self._plan is not None and self._plan.before():
                return True
            self._plan = None
            if self._wait:
                self._wait -= 1
                return False
            self._plan = plan_for(reader)
            served = self._plan is not None and self._plan.before()
        except Exception as error:
            library.failed(error)
            served = False
        if not served:
            self._plan = None
            self._vain += 1
            if self._vain >= MOST_PLANS:
                self._vain, self._wait = 0, PAUSE
        return served

    def after(
        self, features: Tensor | None, mean: Tensor | None, previous: Memory | None, step: int
    ) -> tuple[dict[str, float], Memory] | None:
        """Return the quantities of the step and its memory; None if torch must read it."""
        try:
            read = None if self._plan is None else self._plan.after(features, mean, previous, step)
        except Exception as error:
            library.failed(error)
            return None
        self._vain = 0 if read is not None else self._vain + 1
        return read

    def before_step(self) -> BeforeStep | None:
        """Return what was read before the step, for torch to read it; the plan is dropped."""
        plan, self._plan = self._plan, None
        return None if plan is None else plan.before_step()

    def release(self) -> None:
        """Drop the model, the optimizer and all memory."""
        self._plan = None
