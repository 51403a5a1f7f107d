"""Describe a run: the content of ``run.json``, and the optimizer's settings for the detector."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import asdict
from operator import itemgetter
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from nfi_monitor._version import __version__
from nfi_monitor.capture.head import Head
from nfi_monitor.capture.head_layer import size_of
from nfi_monitor.capture.head_probe import HeadProbe
from nfi_monitor.capture.optimizer import OptimizerReader
from nfi_monitor.capture.sampling import auto_interval
from nfi_monitor.capture.step_constants import host_rate
from nfi_monitor.detect.detector import Detector
from nfi_monitor.detect.situation import RunContext, momentum_of
from nfi_monitor.engine.notes import NoteTaker
from nfi_monitor.engine.schedule import Schedule
from nfi_monitor.engine.step_reader import StepReader
from nfi_monitor.types import Thresholds

_GROUP_KEYS = (
    "lr", "betas", "alpha", "eps", "weight_decay", "momentum", "dampening", "nesterov", "amsgrad",
    "decoupled_weight_decay", "foreach", "fused",
)  # fmt: skip


class Run(Protocol):
    """What ``run.json`` is made from: these parts of a :class:`~nfi_monitor.engine.loop.StepLoop`."""

    model: nn.Module
    head: Head | None
    reader: OptimizerReader
    probe: HeadProbe
    detector: Detector
    schedule: Schedule
    step_reader: StepReader
    notes: NoteTaker
    thresholds: Thresholds
    every: int | str
    step: int
    run_dir: str | os.PathLike[str] | None


def describe_run(model: nn.Module, head: Head | None, reader: OptimizerReader) -> dict[str, Any]:
    """Return versions, model, head and optimizer in plain types."""
    group = reader.group_of(head.weight if head is not None else None)
    parameters = list(model.parameters())
    return {
        "nfi_monitor": __version__,
        "torch": torch.__version__,
        "model": type(model).__name__,
        "parameters": sum(map(size_of, parameters)),
        "dtype": ", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in parameters})),
        "head": head.describe() if head is not None else "none: rows come from monitor.tap()",
        "classes": head.outputs if head is not None else None,
        "optimizer": {
            "name": type(reader.optimizer).__name__,
            **{key: _plain(group[key]) for key in _GROUP_KEYS if key in group},
        },
    }


def run_json(run: Run) -> dict[str, Any]:
    """Return the present content of ``run.json``."""
    schedule, tau = run.schedule, run.detector.context.tau
    auto = schedule.healthy_interval or auto_interval(tau)
    training = schedule.training
    described = describe_run(run.model, run.head, run.reader)
    if run.probe.level == "recomputed":
        described["head"] += ", rows recomputed"
    return {
        **described,
        "level": run.probe.level,
        "tau": round(tau, 6),
        "every": run.every,
        "interval": run.every if isinstance(run.every, int) else auto,
        "thresholds": run.thresholds.to_json(),
        "steps": run.step,
        "absorbing_classes": run.step_reader.absorbing_classes(),
        "notes": notes_json(run.notes),
        "overhead": {
            "seconds": schedule.own_seconds,
            "share": schedule.own_seconds / training if training > 0 else None,
            "measured_steps": schedule.readings,
        },
        "run_dir": None if run.run_dir is None else str(run.run_dir),
    }


def notes_json(notes: NoteTaker) -> list[dict[str, Any]]:
    """Return the notes so far in plain types, oldest first."""
    return [asdict(note) for note in notes.by_code.values()]


class ContextReader:
    """Read what the detector must know about the run; make it anew only where something has changed."""

    def __init__(self) -> None:
        self._key: tuple[Any, ...] | None = None
        self._context = RunContext()

    def read(self, head: Head | None, reader: OptimizerReader, **rest: Any) -> RunContext:
        """Return the settings of the optimizer for the head. ``rest``: other fields of the context."""
        key = _settings(head, reader, rest)
        if key is None or key != self._key:
            self._context, self._key = read_context(head, reader, **rest), key
        return self._context


_SETTINGS = itemgetter("betas", "weight_decay")


def _settings(head: Head | None, reader: OptimizerReader, rest: dict[str, Any]) -> tuple[Any, ...] | None:
    """Return all that the context of one of torch's optimizers with betas depends on; None for others."""
    group = reader.group_of(head.weight if head is not None else None)
    if not reader.check.trusted or "betas" not in group or "weight_decay" not in group:
        return None
    betas, decay = _SETTINGS(group)
    if type(betas) is not tuple or type(decay) not in (float, int) or {*map(type, betas)} != {float}:
        return None
    state = reader.optimizer.state
    decoupled = group.get("decoupled_weight_decay")
    return (betas, decay, decoupled, id(head), id(group), len(state), *rest.values())


def read_context(head: Head | None, reader: OptimizerReader, **rest: Any) -> RunContext:
    beta1, beta2 = reader.betas_or_assumed()
    group = reader.group_of(head.weight if head is not None else None)
    decoupled = group.get(
        "decoupled_weight_decay",
        group.get("weight_decouple", type(reader.optimizer).__name__.startswith("AdamW")),
    )
    decays = host_rate(group.get("weight_decay")) > 0
    return RunContext(
        beta1=beta1,
        beta2=beta2,
        decoupled_decay=bool(decoupled) and decays,
        coupled_decay=not decoupled and decays,
        layer=head.name if head is not None else None,
        **momentum_of(type(reader.optimizer).__name__, group),
        **rest,
    )


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        # Reading a learning rate on an accelerator would synchronise: leave it out.
        return value.tolist() if value.device.type == "cpu" else None
    if isinstance(value, Iterable) and not isinstance(value, str):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)
