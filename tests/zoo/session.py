"""Run one training of the zoo, with or without a monitor, and record what happened from outside."""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import random
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from nfi_monitor import Monitor
from tests.zoo.configuration import Configuration

OPTIONS: dict[str, Any] = {"console": False, "every": 1, "overhead_budget": None, "snapshots": False}
"""Every step is read, so that each can be judged."""


class Session:
    """What a training of the zoo attaches its monitor through. Without a monitor it does nothing."""

    def __init__(self, watching: bool) -> None:
        self.watching = watching
        self.backwards: dict[int, list[float]] = {}
        """Step → the values of the tensors on which backward was called for it."""
        self.cross_entropies: dict[int, list[float]] = {}
        """Step → mean cross-entropy of each call of F.cross_entropy with gradients."""
        self.averages: tuple[int, int] | None = None
        """How many tensors have a second moment that is an average of squared gradients, and of how many."""
        self.optimizer: Any = None
        self.folder = tempfile.mkdtemp(prefix="nfi-zoo-")
        self._monitor: Monitor | None = None
        self._callback: Any = None

    @property
    def losses(self) -> dict[int, float]:
        """Step → sum of the tensors on which backward was called for it."""
        return {step: sum(values) for step, values in self.backwards.items()}

    @property
    def in_adapter(self) -> bool:
        """Whether the monitor was attached by an adapter of ours."""
        return self._callback is not None

    @property
    def monitor(self) -> Monitor | None:
        """The monitor, once it is attached."""
        return self._monitor if self._callback is None else self._callback.monitor

    def attach(self, model: nn.Module, optimizer: Any, **options: Any) -> Monitor | None:
        """Attach in a loop of one's own."""
        self.optimizer = optimizer
        if self.watching:
            self._monitor = Monitor(model, optimizer, **{**OPTIONS, **options})
        return self._monitor

    def attach_accelerate(self, accelerator: Any, model: Any, optimizer: Any, **options: Any) -> None:
        """Attach in a loop of Accelerate."""
        self.optimizer = optimizer
        if self.watching:
            from nfi_monitor.integrations.accelerate import watch

            self._monitor = watch(accelerator, model, optimizer, **{**OPTIONS, **options})

    def trainer_callbacks(self, **options: Any) -> list[Any]:
        """Return the callbacks for a transformers Trainer."""
        if not self.watching:
            return []
        from nfi_monitor.integrations.transformers import NFICallback

        self._callback = NFICallback(**{**OPTIONS, "run_dir": None, **options})
        return [self._callback]

    def lightning_callbacks(self, **options: Any) -> list[Any]:
        """Return the callbacks for a Lightning Trainer."""
        if not self.watching:
            return []
        from nfi_monitor.integrations.lightning import NFICallback

        self._callback = NFICallback(**{**OPTIONS, "run_dir": None, **options})
        return [self._callback]

    def observe(self, loss: Tensor) -> None:
        """Report a loss, as a loop of one's own does."""
        if self._monitor is not None:
            self._monitor.observe_loss(loss)

    def tap(self, logits: Tensor) -> Tensor:
        """Pass logits through the monitor's tap."""
        return logits if self._monitor is None else self._monitor.tap(logits)

    def tap_features(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Pass the hidden states of a loss without logits through the monitor's tap."""
        return hidden if self._monitor is None else self._monitor.tap_features(hidden, targets)

    def trained(self, loss: Tensor) -> None:
        """Say the value of the loss whose multiple (a GradScaler's) was given to backward last."""
        step = 1 + (0 if self.monitor is None else self.monitor.step)
        self.backwards[step][-1] = float(loss.detach())

    def cross_entropy_called(self, logits: Any, target: Any, keywords: dict[str, Any]) -> None:
        """Record the plain mean over the rows, whatever the weights, of a call that may be trained on."""
        plain = isinstance(target, Tensor) and not target.is_floating_point()
        if self.monitor is None or not (plain and isinstance(logits, Tensor) and logits.requires_grad):
            return
        with torch.no_grad():
            value = torch.nn.functional.nll_loss(
                logits.float().log_softmax(1), target, ignore_index=keywords.get("ignore_index", -100)
            )
        self.cross_entropies.setdefault(1 + self.monitor.step, []).append(float(value))

    def backward_called(self, tensors: Any) -> None:
        """Record the value of a loss whose backward pass begins."""
        step = 1 + (0 if self.monitor is None else self.monitor.step)
        for tensor in (tensors,) if isinstance(tensors, Tensor) else tuple(tensors):
            if tensor.numel() == 1:
                self.backwards.setdefault(step, []).append(float(tensor.detach()))


@dataclass
class Record:
    """What one training left behind."""

    error: BaseException | None = None
    digest: str = ""
    session: Session = field(default_factory=lambda: Session(False))
    tied: bool = False
    trained: bool = True
    """Whether the right head's weight is among the optimizer's parameters."""
    second_moment: bool = True
    """Whether the state of the right head's weight has an exp_avg_sq of the weight's own shape."""
    partial: bool = False
    """Whether some trained parameters have no exp_avg_sq of their own shape."""
    parameter: bool = False
    """Whether the right head is a bare parameter."""
    spatial: bool = False
    """Whether a row of the right head is made from the features of several positions."""
    weighty: bool = True
    """Whether the right head has a weight matrix of its own."""


def run(configuration: Configuration, *, watching: bool) -> Record:
    """Train once; an error of the training is part of the record."""
    session = Session(watching)
    record = Record(session=session)
    _seed()
    with _recorded(session), _quiet():
        try:
            model = configuration.train(session)
            record.digest = _digest(model)
            _facts(record, configuration, model)
        except (KeyboardInterrupt, GeneratorExit):
            raise
        except BaseException as error:
            record.error = error
        finally:
            if session.monitor is not None:
                session.monitor.close()
    return record


def _seed() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float32)
    torch.set_grad_enabled(True)


@contextlib.contextmanager
def _recorded(session: Session) -> Iterator[None]:
    original = torch.autograd.backward

    def backward(tensors: Any, *args: Any, **kwargs: Any) -> Any:
        session.backward_called(tensors)
        return original(tensors, *args, **kwargs)

    cross_entropy = functional.cross_entropy

    def recorded_cross_entropy(input: Any, target: Any, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():
            session.cross_entropy_called(input, target, kwargs)
        return cross_entropy(input, target, *args, **kwargs)

    with (
        mock.patch.object(torch.autograd, "backward", backward),
        mock.patch.object(functional, "cross_entropy", recorded_cross_entropy),
    ):
        yield


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Libraries print banners and progress bars; verdicts must stay readable."""
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            with contextlib.redirect_stderr(io.StringIO()):
                yield
    finally:
        logging.disable(logging.NOTSET)


def _digest(model: nn.Module) -> str:
    """Return a hash of all parameters, all buffers and the state of the random generators."""
    digest = hashlib.sha256()
    for name, tensor in sorted([*model.named_parameters(), *model.named_buffers()], key=lambda pair: pair[0]):
        digest.update(name.encode())
        plain = tensor.detach()
        plain = (
            plain.dequantize()
            if hasattr(plain, "dequantize")
            and type(plain) is not Tensor
            and (type(plain) is not nn.Parameter)
            else plain
        )
        digest.update(plain.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    digest.update(torch.get_rng_state().numpy().tobytes())
    digest.update(repr(random.getstate()).encode())
    digest.update(np.random.get_state()[1].tobytes())  # type: ignore[index]
    return digest.hexdigest()


def _facts(record: Record, configuration: Configuration, model: nn.Module) -> None:
    """Find out about the right head what notes may claim of it."""
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    head = next((modules[name] for name in configuration.heads if name in modules), None)
    weight = next((parameters[name] for name in configuration.heads if name in parameters), None)
    record.parameter = weight is not None
    if head is not None:
        copies = getattr(head, "modules_to_save", None)  # peft keeps the trained copy of a whole module there
        head = copies["default"] if isinstance(copies, nn.ModuleDict) and "default" in copies else head
        weight = head._parameters.get("weight")
        record.weighty = weight is not None and weight.squeeze().dim() == 2
        record.spatial = max(getattr(head, "kernel_size", (1,))) > 1
    if weight is None:
        return
    record.tied = any(
        isinstance(other, nn.Embedding) and other._parameters.get("weight") is weight
        for other in modules.values()
    )
    optimizer = getattr(record.session.optimizer, "optimizer", record.session.optimizer)
    if optimizer is not None and isinstance(getattr(optimizer, "param_groups", None), list):
        record.trained = any(
            weight is parameter for group in optimizer.param_groups for parameter in group["params"]
        )
        state = getattr(optimizer, "state", {})
        record.second_moment = _second_moment(state, weight)
        record.partial = not all(
            _second_moment(state, parameter)
            for group in optimizer.param_groups
            for parameter in group["params"]
            if parameter.requires_grad
        )


def _second_moment(state: Any, parameter: Tensor) -> bool:
    own = state.get(parameter)  # a defaultdict: [] would make an entry
    kept = own.get("exp_avg_sq") if isinstance(own, dict) else None
    return isinstance(kept, Tensor) and kept.shape == parameter.shape
