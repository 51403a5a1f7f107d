"""Compare the margins of a fixed batch between readings.

The head's own update does not show the movement by the layers below the head; behind a LayerNorm it shows
nothing.  A forward pass of a fixed batch shows the whole displacement, and costs that pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from nfi_monitor.capture.head_layer import child
from nfi_monitor.capture.tensor_text import from_text, to_text
from nfi_monitor.measure.displacement import margin_displacement, probe_margins
from nfi_monitor.schema import decode

_COMMUNICATE = ("DistributedDataParallel", "FullyShardedDataParallel", "DeepSpeedEngine")
"""Classes of modules whose forward pass waits for the other ranks."""


class CommunicatesError(RuntimeError):
    """The model's forward pass would wait for other ranks, or make them wait."""


class ProbeBatch:
    """Measure margins of a fixed batch. Rows whose target is no class of the model are left out.

    A rank decides on its readings alone, so this forward pass must not wait for other ranks.  Of a model
    inside ``DistributedDataParallel`` or ``torch.compile``, the inner module is used.  ``refused`` says why
    a model cannot be probed; None: it can, so far.

    Raises ValueError for targets that are not integer labels.
    """

    def __init__(self, model: nn.Module, inputs: Any, targets: Tensor) -> None:
        if not isinstance(targets, Tensor) or targets.is_floating_point():
            raise ValueError("probe=(inputs, targets): targets must be a tensor of integer labels.")
        self._model = model
        self._inputs = inputs
        self._targets = targets
        self._margins: Tensor | None = None
        self._step = 0
        self.refused: str | None = None

    def displacement(self, step: int) -> Tensor | None:
        """Return the largest margin change per optimizer step since the last call, in nats.

        Returns None at the first call, for a model with one output, which has no margin, and for a model that
        is refused.
        """
        model = _inside(self._model)
        self.refused = self.refused or _refusal(model)
        if self.refused:
            return None
        try:
            margins = self._measure(model)
        except CommunicatesError as error:
            self.refused = str(error)
            return None
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

    def _measure(self, model: nn.Module) -> Tensor | None:
        """Return the margins from a forward pass in eval mode.

        It has no dropout, and changes neither running statistics nor the random state.
        """
        devices = [self._targets.device] if self._targets.device.type == "cuda" else []
        together = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        guard = NoCollectives() if together else nullcontext()
        with torch.no_grad(), torch.random.fork_rng(devices=devices), _in_eval_mode(model), guard:
            output = self._forward(model)
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

    def _forward(self, model: nn.Module) -> Any:
        # model.compile() compiles the call: it would be compiled once more, for this batch and eval mode.
        compiled = getattr(model, "_compiled_call_impl", None) is not None
        call: Callable[..., Any] = model._call_impl if compiled else model
        if isinstance(self._inputs, Mapping):
            return call(**self._inputs)
        if isinstance(self._inputs, (tuple, list)):
            return call(*self._inputs)
        return call(self._inputs)


class NoCollectives(TorchDispatchMode):
    """Raise CommunicatesError where a collective would begin, also one that no class name tells of."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func.namespace in ("c10d", "_c10d_functional", "_c10d_functional_autograd"):
            raise CommunicatesError(f"its forward pass communicates with other ranks ({func})")
        return func(*args, **(kwargs or {}))


@contextmanager
def _in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Set every module to eval mode for a block, and back to its own mode."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        try:
            for module, _ in modes:
                module.training = False
            yield
        finally:
            _set_modes(modes)
    finally:
        _set_modes(modes)  # once more: Ctrl-C may have ended the first


def _set_modes(modes: Sequence[tuple[nn.Module, bool]]) -> None:
    for module, mode in modes:
        module.training = mode


def _inside(model: nn.Module) -> nn.Module:
    """Return the module inside data parallelism and ``torch.compile``, whose own forward pass differs.

    DDP's broadcasts buffers, which only all ranks together may do.  A compiled one would be compiled again.
    """
    while True:
        parallel = type(model).__name__ in ("DistributedDataParallel", "DataParallel")
        inner = child(model, "module" if parallel else "_orig_mod")
        if inner is None:
            return model
        model = inner


def _refusal(model: nn.Module) -> str | None:
    """Return why a forward pass of the model communicates, as far as its modules tell; else None."""
    for name, module in model.named_modules():
        kind = next((kind.__name__ for kind in type(module).__mro__ if kind.__name__ in _COMMUNICATE), None)
        if kind is not None:
            where = f" ({name!r})" if name else ""
            return f"the model holds a {kind}{where}, whose forward pass communicates with other ranks"
    if any(hasattr(parameter, "to_local") for parameter in model.parameters()):
        return "the model is sharded over ranks, and its forward pass communicates"
    return None
