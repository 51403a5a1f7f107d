"""Run one arm under the monitor: its loop, its checkpoints, and its result.

A run consists of segments. After each segment the whole state goes through a checkpoint and a new monitor is
attached, *even if the run was not interrupted*. The reason: a new monitor has no previous step to compare
with, so its alerts could differ after an interruption. With segments, a resumed run equals an uninterrupted
one bit for bit.
"""

from __future__ import annotations

import platform
import random
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

import nfi_monitor
from examples.reference.results import (
    RESULTS,
    RUNS,
    Result,
    atomically,
    digest,
    episodes,
    fingerprint,
    write,
)
from nfi_monitor import Alert, Monitor
from nfi_monitor.history import History
from nfi_monitor.quantities import QUANTITIES
from nfi_monitor.report.json_values import as_json

if TYPE_CHECKING:
    from examples.reference.study import Preset, Study, Variant

CHECKPOINT = "checkpoint.pt"
_FLUSH = 256
"""Losses that stay on the device before one copy transfers them."""

Array = np.ndarray[Any, Any]


@dataclass
class Training:
    """Hold everything that one run needs; a study's ``build`` returns it."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    step: Callable[[int, Monitor], Tensor | float]
    """Run the training loop's body for optimizer step ``number`` ≥ 1; return the loss.

    It also calls ``monitor.observe_loss``.
    """
    data: Sequence[Tensor] = ()
    """Tensors that the arms of a pair must share besides the initial weights."""
    extras: Sequence[Any] = ()
    """Further objects with state: ``torch.Generator``, scheduler, scaler, variables of closures.

    Except for generators they have ``load_state_dict``, and a ``state_dict`` of plain types and tensors.
    """
    watch: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of Monitor besides the model and the optimizer."""
    measure: Callable[[int], Mapping[str, float]] | None = None
    """Further series at steps completed; must draw no random number."""
    measure_every: int = 100
    finish: Callable[[Record], Mapping[str, Any]] | None = None
    """Values to store in the result, as plain types."""
    start: Mapping[str, str] | None = None
    """Fingerprint of the model before any training, if ``build`` trains it."""


@dataclass
class Record:
    """Hold a run in progress; ``finish`` receives it at the end."""

    training: Training
    config: Mapping[str, Any]
    seed: int
    device: torch.device
    run_dir: Path
    history: History
    """The monitor's readings of all segments."""
    monitor: Monitor | None = None
    steps: int = 0
    measured: dict[str, tuple[list[int], list[float]]] = field(default_factory=dict)
    _losses: list[Tensor] = field(default_factory=list)
    _pending: list[Tensor] = field(default_factory=list)

    @property
    def loss(self) -> Array:
        """Return the losses of steps 1, 2, …, float64 [steps]."""
        self._flush()
        return torch.cat(self._losses).numpy() if self._losses else np.empty(0)

    @property
    def series(self) -> dict[str, tuple[Array, Array]]:
        """Return the values of ``measure``: name → (steps, values)."""
        return {name: (np.array(s), np.array(v)) for name, (s, v) in self.measured.items()}

    def column(self, name: str) -> tuple[Array, Array]:
        """Return (steps, values) of a measured series, of the loss, or of one of the monitor's quantities."""
        if name in self.measured:
            return self.series[name]
        if name == "loss":
            return np.arange(1, self.steps + 1), self.loss
        return self.history[name]

    def took(self, loss: Tensor | float) -> None:
        self.steps += 1
        self._pending.append(torch.as_tensor(loss, dtype=torch.float64).detach().reshape(()))
        if len(self._pending) >= _FLUSH:
            self._flush()

    def measure(self) -> None:
        if self.training.measure is None:
            return
        with torch.no_grad():
            found = self.training.measure(self.steps)
        for name, value in found.items():
            steps, values = self.measured.setdefault(name, ([], []))
            steps.append(self.steps)
            values.append(float(value))

    def _flush(self) -> None:
        if self._pending:
            self._losses.append(torch.stack(self._pending).cpu())
            self._pending.clear()

    def state_dict(self) -> dict[str, Any]:
        """Return a state that ``torch.load(weights_only=True)`` can read."""
        names = self.history.names()
        return {
            "steps": self.steps,
            "loss": torch.from_numpy(self.loss),
            "measured": {name: (list(s), list(v)) for name, (s, v) in self.measured.items()},
            "history": {name: tuple(map(torch.from_numpy, self.history[name])) for name in names},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.steps = state["steps"]
        self._losses, self._pending = [state["loss"]], []
        self.measured = {name: (list(s), list(v)) for name, (s, v) in state["measured"].items()}
        for name, (steps, values) in state["history"].items():
            for step, value in zip(steps.tolist(), values.tolist(), strict=True):
                self.history.append(step, {name: value})


# --- one run --------------------------------------------------------------------------------------------


def run_one(
    study: Study,
    preset: Preset,
    arm: str,
    seed: int,
    *,
    results: Path = RESULTS,
    runs: Path = RUNS,
    device: str = "cpu",
    steps: int | None = None,
    refresh: bool = False,
    options: Mapping[str, Any] | None = None,
    told: Callable[[int], None] | None = None,
) -> Result:
    """Return the result of one arm and seed, from its file if the same run is stored, else by running it.

    ``steps`` defaults to the preset's. ``options`` override the arm's configuration. ``told`` is called with
    the number of steps completed, every 50 steps. An interrupted run continues from its checkpoint.
    """
    chosen = study.arm(arm)
    config = study.config(preset, chosen, options)
    total = preset.plans[arm].steps if steps is None else steps
    directory = results / study.name / preset.name
    path = directory / f"{arm}-{seed}.json"
    if not refresh and (found := finished(path, config, total)) is not None:
        return found
    run_dir = runs / study.name / preset.name / f"{arm}-{seed}"
    with _one_thread():
        _seed(seed)
        if chosen.compute is not None:
            result, series = _computed(study, preset, chosen, seed, config, torch.device(device), run_dir)
        else:
            job = _Job(study, preset, chosen, seed, config, total, torch.device(device), run_dir, told)
            result, series = job.run()
    drawn = arm in study.drawn and seed == preset.plans[arm].seeds[0]
    write(result, directory, series if drawn else None)
    (run_dir / CHECKPOINT).unlink(missing_ok=True)
    return Result.read(path)


def finished(path: Path, config: Mapping[str, Any], steps: int) -> Result | None:
    """Return the result in this file if it is complete and has this configuration and length."""
    try:
        result = Result.read(path)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    same = result.config == as_json(config) and result.steps == steps
    return result if same else None


@contextmanager
def _one_thread() -> Iterator[None]:
    """Use one thread: at these sizes several parallel runs are faster than several threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _seed(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % (1 << 32))


class _Job:
    """Hold a run in progress."""

    def __init__(
        self,
        study: Study,
        preset: Preset,
        arm: Variant,
        seed: int,
        config: dict[str, Any],
        total: int,
        device: torch.device,
        run_dir: Path,
        told: Callable[[int], None] | None,
    ) -> None:
        self.study, self.preset, self.arm, self.seed = study, preset, arm, seed
        self.config, self.total, self.device, self.run_dir = config, total, device, run_dir
        self.told = told
        self.seconds = 0.0

    def run(self) -> tuple[Result, dict[str, tuple[Array, Array]]]:
        started = time.perf_counter()
        training = self.study.build(self.config, self.seed, self.device)
        begun = dict(training.start or fingerprint(training.model))
        data = digest(*training.data) if training.data else ""
        history = History(max_rows=1 << 18)
        record = Record(training, self.config, self.seed, self.device, self.run_dir, history)
        state = self._checkpoint()
        if state is None:
            shutil.rmtree(self.run_dir, ignore_errors=True)
            record.measure()
            self._open(record, None)
        else:
            self._restore(record, state)
        while record.steps < self.total:
            self._step(record)
            if record.steps % self.preset.checkpoint_every == 0 and record.steps < self.total:
                self.seconds += time.perf_counter() - started
                started = time.perf_counter()
                self._save(record)
        assert record.monitor is not None
        record.monitor.close()
        values = {} if training.finish is None else dict(training.finish(record))
        alerts = record.monitor.alerts
        loss = record.loss
        self.seconds += time.perf_counter() - started
        result = Result(
            study=self.study.name,
            preset=self.preset.name,
            arm=self.arm.name,
            seed=self.seed,
            pair=self.arm.pair,
            config=self.config,
            steps=record.steps,
            slingshots=record.monitor.summary()["slingshots"],
            episodes=episodes(loss),
            alerts=alerts,
            loss_final=float(loss[-1]) if len(loss) else None,
            values=values,
            start=begun,
            data=data,
            made=made(self.device, self.seconds),
        )
        series = {name: record.column(name) for name in self.study.series if name in _known(record)}
        return result, {name: column for name, column in series.items() if len(column[0])}

    def _step(self, record: Record) -> None:
        assert record.monitor is not None
        record.took(record.training.step(record.steps + 1, record.monitor))
        done = record.steps
        if done % record.training.measure_every == 0 or done == self.total:
            record.measure()
        if self.told is not None and done % 50 == 0:
            self.told(done)

    def _open(self, record: Record, state: Mapping[str, Any] | None) -> None:
        """Attach a monitor for the next segment."""
        training = record.training
        watch: dict[str, Any] = {"console": False, "snapshots": False, "run_dir": self.run_dir}
        record.monitor = Monitor(training.model, training.optimizer, **(watch | dict(training.watch)))
        record.monitor.history = record.history
        if state is not None:
            record.monitor.load_state_dict(state)

    def _save(self, record: Record) -> None:
        assert record.monitor is not None
        monitor = record.monitor.state_dict()
        record.monitor.close()
        training = record.training
        state = {
            "config": as_json(self.config),
            "seconds": self.seconds,
            "record": record.state_dict(),
            "model": training.model.state_dict(),
            "optimizer": training.optimizer.state_dict(),
            "extras": [_state_of(extra) for extra in training.extras],
            "monitor": monitor,
            "random": _random_state(),
        }
        atomically(self.run_dir / CHECKPOINT, lambda file: torch.save(state, file))
        self._open(record, monitor)

    def _checkpoint(self) -> dict[str, Any] | None:
        """Return the checkpoint of an interrupted run of the same configuration."""
        path = self.run_dir / CHECKPOINT
        if not path.exists():
            return None
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception:  # another torch wrote it, or it is damaged: start the run anew
            return None
        same = state["config"] == as_json(self.config) and state["record"]["steps"] < self.total
        return state if same else None

    def _restore(self, record: Record, state: Mapping[str, Any]) -> None:
        training = record.training
        training.model.load_state_dict(state["model"])
        training.optimizer.load_state_dict(state["optimizer"])
        for extra, saved in zip(training.extras, state["extras"], strict=True):
            if isinstance(extra, torch.Generator):
                extra.set_state(saved)
            else:
                extra.load_state_dict(saved)
        record.load_state_dict(state["record"])
        self.seconds = state["seconds"]
        self._open(record, state["monitor"])
        _set_random_state(state["random"])


def _known(record: Record) -> set[str]:
    return {"loss", *record.measured, *QUANTITIES}


def _state_of(extra: Any) -> Any:
    return extra.get_state() if isinstance(extra, torch.Generator) else extra.state_dict()


def _random_state() -> dict[str, Any]:
    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    version, words, spare = random.getstate()
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, gauss],
        "python": [version, list(words), spare],
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def _set_random_state(state: Mapping[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    kind, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    version, words, spare = state["python"]
    random.setstate((version, tuple(words), spare))
    if "cuda" in state:
        torch.cuda.set_rng_state_all(state["cuda"])


# --- computations without a training loop -------------------------------------------------------------


def _computed(
    study: Study,
    preset: Preset,
    arm: Variant,
    seed: int,
    config: dict[str, Any],
    device: torch.device,
    run_dir: Path,
) -> tuple[Result, dict[str, tuple[Array, Array]]]:
    assert arm.compute is not None
    started = time.perf_counter()
    shutil.rmtree(run_dir, ignore_errors=True)
    values = dict(arm.compute(config, seed, device, run_dir))
    alerts: list[Alert] = list(values.pop("alerts", []))
    loss = np.asarray(values.pop("loss", []), float)
    series = {name: (np.asarray(s), np.asarray(v)) for name, (s, v) in values.pop("series", {}).items()}
    result = Result(
        study=study.name,
        preset=preset.name,
        arm=arm.name,
        seed=seed,
        pair=arm.pair,
        config=config,
        steps=preset.plans[arm.name].steps,
        slingshots=list(values.pop("slingshots", [])),
        episodes=episodes(loss),
        alerts=alerts,
        loss_final=float(loss[-1]) if len(loss) else None,
        values=values,
        made=made(device, time.perf_counter() - started),
    )
    if len(loss) and "loss" in study.series:
        series.setdefault("loss", (np.arange(1, len(loss) + 1), loss))
    return result, series


def made(device: torch.device, seconds: float) -> dict[str, Any]:
    """Return date, duration, device kind and versions, so that a number can be traced."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "seconds": round(seconds, 1),
        "device": f"{device.type} ({name})",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
            "nfi_monitor": nfi_monitor.__version__,
        },
    }
