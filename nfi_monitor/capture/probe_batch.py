"""Compare the margins of a fixed batch between readings.

The head's own update does not show the movement by the layers below the head; behind a LayerNorm it shows
nothing.  A forward pass of a fixed batch shows the whole displacement, and costs that pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nfi_monitor.capture.tensor_text import from_text, to_text
from nfi_monitor.measure.displacement import margin_displacement, probe_margins
from nfi_monitor.schema import decode


class ProbeBatch:
    """Measure margins of a fixed batch. Rows whose target is no class of the model are left out.

    Raises ValueError for targets that are not integer labels, and for a model that is sharded over ranks.
    """

    def __init__(self, model: nn.Module, inputs: Any, targets: Tensor) -> None:
        if not isinstance(targets, Tensor) or targets.is_floating_point():
            raise ValueError("probe=(inputs, targets): targets must be a tensor of integer labels.")
        if any(hasattr(parameter, "to_local") for parameter in model.parameters()):
            raise ValueError(
                "probe= cannot be used on a model that is sharded over ranks: its forward communicates, and "
                "each rank decides on its readings alone. Leave it out."
            )
        # Use the module inside DDP: the wrapper's forward pass broadcasts buffers, which only all ranks
        # together may do.
        wrapped = type(model).__name__ in ("DistributedDataParallel", "DataParallel")
        self._model: nn.Module = model.module if wrapped else model  # type: ignore[assignment]
        self._inputs = inputs
        self._targets = targets
        self._margins: Tensor | None = None
        self._step = 0

    def displacement(self, step: int) -> Tensor | None:
        """Return the largest margin change per optimizer step since the last call, in nats.

        Returns None at the first call, and for a model with one output, which has no margin.
        """
        margins = self._measure()
        if margins is None:
            return None
        before, last = self._margins, self._step
        self._margins, self._step = margins, step
        return None if before is None else margin_displacement(before, margins, step - last)

    def state_dict(self) -> dict[str, Any]:
        """Return the margins for the next comparison, in plain types."""
        return {"step": self._step, "margins": None if self._margins is None else to_text(self._margins)}

    def read_state(self, state: Mapping[str, Any]) -> tuple[int, Tensor | None]:
        """Return step and margins of a saved state, for :meth:`apply_state`; no margins of another batch.

        Raises an error for a wrong state.
        """
        step, text = decode(int, state["step"]), decode(str | None, state["margins"])
        margins = None if text is None else from_text(text, self._targets.device)
        return step, margins if margins is not None and len(margins) == self._targets.numel() else None

    def apply_state(self, step: int, margins: Tensor | None) -> None:
        """Continue from a state that :meth:`read_state` returned."""
        self._step, self._margins = step, margins

    def _measure(self) -> Tensor | None:
        """Return the margins from a forward pass in eval mode.

        It has no dropout, and changes neither running statistics nor the random state.
        """
        model = self._model
        modes = [(module, module.training) for module in model.modules()]
        devices = [self._targets.device] if self._targets.device.type == "cuda" else []
        with torch.no_grad(), torch.random.fork_rng(devices=devices):
            try:
                for module, _ in modes:
                    module.training = False
                output = self._forward()
            finally:
                for module, mode in modes:
                    module.training = mode
        if isinstance(output, (tuple, list)) and output and isinstance(output[0], Tensor):
            output = output[0]
        logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
        if logits is None and isinstance(output, Mapping):
            logits = output.get("logits")
        if not isinstance(logits, Tensor):
            raise TypeError(
                f"the model returned {type(output).__name__} on the probe batch, with no logits in it"
            )
        if logits.shape[-1] == 1:
            return None
        logits = logits.reshape(-1, logits.shape[-1])
        targets = self._targets.reshape(-1)
        # −100, or 255, marks padding. As an index such a label would kill the training on an accelerator.
        labels = targets.clamp(0, logits.shape[-1] - 1)
        return torch.where(
            labels == targets,
            probe_margins(logits.float(), labels),
            torch.zeros_like(logits[:, 0].float()),
        )

    def _forward(self) -> Any:
        if isinstance(self._inputs, Mapping):
            return self._model(**self._inputs)
        if isinstance(self._inputs, (tuple, list)):
            return self._model(*self._inputs)
        return self._model(self._inputs)
