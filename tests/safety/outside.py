"""The functions that faults are not injected into, because nothing can stand in front of them, and why."""

from __future__ import annotations

CALLED_FROM_OUTSIDE = {
    "torch calls it, and what it does is in its own try block": (
        "capture/head_probe:HeadProbe.__call__",
        "capture/head_probe:HeadProbe._deliver_at_backward.<locals>.on_gradient",
        "capture/inert_hook:InertInCopies.__call__",
        "capture/loss:LossProbe._watch.<locals>.on_gradient",
        "capture/loss:LossProbe.__call__",
        "engine/head_check:HeadCheck.__call__",
        "capture/step_hooks:StepHooks.install.<locals>.around.<locals>.hook",
        "remedies/projection:_Project._project",
    ),
    "the user calls it, and what it does is in its own try block": (
        "monitor:Monitor.observe_loss",
        "monitor:Monitor.tap",
        "monitor:Monitor.close",
        "monitor:Monitor.history",
        "engine/detach:close",
        "engine/detach:_run_endings",
        "engine/port:AdapterPort.end_micro_batch",
        "engine/loss_sources:LossSources.end_micro_batch",
        "remedies/autopilot:Autopilot.loss",
        "remedies/autopilot:Autopilot.should_stop",
    ),
    "a framework calls it, and what it does is in its own try block": (
        *(
            f"integrations/transformers:NFICallback.{name}"
            for name in ("on_step_begin", "on_substep_end", "on_step_end", "on_train_end", "state")
        ),
        *(
            f"integrations/lightning:NFICallback.{name}"
            for name in ("on_before_backward", "on_train_batch_end", "on_train_end", "state_dict")
        ),
        "integrations/attach:watch_backward.<locals>.backward",
        "integrations/accelerate:watch.<locals>.save",
        "integrations/accelerate:watch.<locals>.load",
    ),
    "it is the try block, or opens it": (
        "engine/port:AdapterPort.guarded",
        "engine/faults:Faults.guarded",
        "integrations/attach:Attachment.guarded",
        "remedies/autopilot:Autopilot._guarded",
    ),
    "called from outside, and a line or two of torch's or Python's own": (
        "_beside:_Finder.find_spec",
        "_moved:_Finder.find_spec",
        "capture/untraced:untraced.<locals>.call",
        "engine/port:AdapterPort.begin_step",
        "remedies/projection:_Project.__call__",
        "capture/model_hooks:ModelHook.__deepcopy__",
        "capture/model_hooks:ModelHook.__reduce__",
        "capture/model_hooks:_reducer.<locals>.reduce",
    ),
    "torch calls it around a step, and it lets pass what a remedy raises on purpose (AutopilotStop); what an "
    "Autopilot switches on has a try block of its own": (
        "remedies/steps:_Steps._before",
        "remedies/steps:_Steps._after",
        "remedies/autopilot:Autopilot._before_step",
        "remedies/autopilot:Autopilot._after_step",
        "remedies/cooling:_Scaled._before",
        "remedies/cooling:_Scaled._after",
    ),
    "backward of the loss that the training was given: without it there is no gradient": (
        "remedies/few_rows:_Known.backward",
        "remedies/row_losses:saved_gradient",
    ),
}
OUTSIDE = {function for functions in CALLED_FROM_OUTSIDE.values() for function in functions}
SILENT = {
    "capture/model_hooks:_without_entries",
    "engine/faults:Faults.failed",
    "engine/faults:Faults._tell",
    "engine/loop:StepLoop._own_fault",
    "engine/loop:StepLoop._report_fault",
    "engine/notes:NoteTaker.failed",
    "engine/notes:NoteTaker.note",
    "monitor:Monitor.notes",
    "leaving capture/step_hooks:StepHooks.remove last",
}
"""What says so is itself broken: nothing is said.  In the first, a copy keeps hooks that do nothing.  In the
last, what a closed monitor has left behind for the other ranks cannot take itself off: its hooks stay and do
nothing."""
