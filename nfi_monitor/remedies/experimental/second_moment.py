"""Reset the optimizer's moments."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from nfi_monitor.capture.second_moment import SECOND_MOMENTS, states
from nfi_monitor.capture.unwrap import unwrap
from nfi_monitor.remedies.handle import Handle


def reset_second_moment(optimizer: Any, params: Iterable[Tensor] | None = None) -> Handle:
    """Set ``exp_avg``, ``exp_avg_sq`` and ``step`` of ``params`` (None: of all parameters) to 0.

    All three are reset: with a step count of thousands, a second moment of 0 is not corrected for its bias,
    and the next updates would be 1/√(1−β2) times too large.

    W. Wu (2024) found that this suppresses second-moment slingshots.  In our runs most slingshots of every
    mechanism came sooner (``tests/benchmarks/remedies/RESULTS.md``).  ``undo()`` restores the moments; a
    copy of them is kept until then.

    Raises ValueError if there is no second moment to reset.
    """
    optimizer = unwrap(optimizer)
    wanted = None if params is None else {id(param) for param in params}
    saved: list[tuple[Tensor, Tensor]] = []
    counts: list[tuple[Any, Any]] = []
    for param, state in states(optimizer):
        if wanted is not None and id(param) not in wanted:
            continue
        if not any(isinstance(state.get(name), Tensor) for name in SECOND_MOMENTS):
            continue
        tensors = [state.get(name) for name in ("exp_avg", *SECOND_MOMENTS)]
        saved += [(tensor, tensor.clone()) for tensor in tensors if isinstance(tensor, Tensor)]
        taken = state.get("step")
        if isinstance(taken, Tensor):
            saved.append((taken, taken.clone()))
        elif taken is not None:
            counts.append((state, taken))
    if not saved:
        raise ValueError(
            f"{type(optimizer).__name__} has no second moment to reset: either it keeps none, or no step has "
            "been taken yet."
        )
    with torch.no_grad():
        for tensor, _ in saved:
            tensor.zero_()
    for state, _ in counts:
        state["step"] = 0

    def undo() -> None:
        with torch.no_grad():
            for tensor, before in saved:
                tensor.copy_(before)
        for state, taken in counts:
            state["step"] = taken

    return Handle("reset second moment", undo)
