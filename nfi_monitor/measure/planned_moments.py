"""Name the entry of each parameter's state that a plan reads as its second moment."""

from __future__ import annotations

from nfi_monitor.capture.optimizer import Layout, OptimizerReader

MOMENTS = ("max_exp_avg_sq", "exp_avg_sq")
"""Names of torch's own optimizers that correct a moment by the number of steps."""


def moment_names(reader: OptimizerReader, layout: Layout) -> list[str | None]:
    """Return the name of the moment that divides the step of each parameter; None where it is no such one."""
    found = []
    for param in layout.params:
        state, moment = reader.optimizer.state.get(param, {}), reader.check.readable(param)
        names = (name for name in MOMENTS if moment is not None and state.get(name) is moment)
        found.append(next(names, None))
    return found
