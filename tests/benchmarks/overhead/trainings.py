"""Who watches: nobody, this monitor in its variants, and others, each in its documented minimal form."""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Callable
from functools import cache, partial
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from nfi_monitor import Monitor
from nfi_monitor.capture import sampling
from nfi_monitor.report.run_directory.writer import RunDirectory
from tests.benchmarks.overhead.cases import fused_loss, plain_loss

NULL = "bare, again"
SETTLED = 4_096
"""Optimizer step at which the interval between readings is decided on for the last time that matters: what is
timed is a run from there on, which nobody wants to wait for."""

Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]


class TimedTraining:
    """One copy of the model with its own AdamW. Subclasses watch it."""

    loss: Loss = staticmethod(plain_loss)

    def __init__(
        self,
        model: nn.Module,
        data: list[tuple[Tensor, Tensor]],
        directory: Path,
        *,
        autocast: bool = False,
    ) -> None:
        """``autocast``: forward and loss in bfloat16."""
        self.model, self.data = model, data
        device = next(model.parameters()).device.type
        self._precision = partial(torch.autocast, device, torch.bfloat16, enabled=autocast)
        # On an accelerator as language models are trained there.
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=device != "cpu" or None)
        self.step = 0
        self.attach(directory)

    def attach(self, directory: Path) -> None:
        """Before the first step."""

    def before_step(self, loss: Tensor) -> None:
        """Between backward and ``optimizer.step()``."""

    def close(self) -> None:
        """After the last step."""

    def settle(self) -> None:
        """After the warm-up: as it is from here on."""

    def own(self) -> tuple[float, int]:
        """Seconds that a monitor of ours has taken so far, and the steps that it has read."""
        return 0.0, 0

    def run(self, steps: int) -> None:
        for _ in range(steps):
            inputs, targets = self.data[self.step % len(self.data)]
            with self._precision():
                loss = self.loss(self.model, inputs, targets)
            self.optimizer.zero_grad()
            loss.backward()
            self.before_step(loss)
            self.optimizer.step()
            self.step += 1


class Watched(TimedTraining):
    """This monitor."""

    arguments: ClassVar[dict[str, Any]] = {}

    def attach(self, directory: Path) -> None:
        self.monitor = Monitor(self.model, self.optimizer, console=False, **self.given(directory))

    def given(self, directory: Path) -> dict[str, Any]:
        return self.arguments

    def before_step(self, loss: Tensor) -> None:
        self.monitor.observe_loss(loss)

    def close(self) -> None:
        self.monitor.close()

    def settle(self) -> None:
        self.monitor._loop.schedule.decide(SETTLED, self.monitor.tau)

    @property
    def interval(self) -> int:
        """Steps after which readings repeat themselves while nothing is going on."""
        return 2 * int(self.monitor._loop.info()["interval"])

    def own(self) -> tuple[float, int]:
        clock = self.monitor._loop.schedule  # summary() says the same, but costs more than what is timed
        return clock.own_seconds, clock.readings


class Default(Watched):
    name = "default"


class EveryStep(Watched):
    name = "every step"
    arguments: ClassVar[dict[str, Any]] = {"every": 1}


class AllRows(EveryStep):
    """Without the budget of rows."""

    name = "every step, all rows"

    def run(self, steps: int) -> None:
        budget, sampling.ROW_ELEMENTS = sampling.ROW_ELEMENTS, 1 << 62
        try:
            super().run(steps)
        finally:
            sampling.ROW_ELEMENTS = budget


class Everything(Watched):
    """Every step, with the probe batch's margins."""

    name = "every step, all quantities"

    def given(self, directory: Path) -> dict[str, Any]:
        inputs, targets = self.data[0]
        # Rows of a language model are tokens: one text, or 32 rows.
        texts = len(inputs) != len(targets)
        few = 1 if texts else min(32, len(inputs))
        asked = targets[: len(targets) // len(inputs)] if texts else targets[:few]
        return {"every": 1, "probe": (inputs[:few], asked)}


class WeightGradient(Watched):
    """The head is never called: violations are read from its weight's gradient."""

    name = "weight-gradient level"
    loss = staticmethod(fused_loss)


class Jsonl(Watched):
    name = "default, run directory"

    def given(self, directory: Path) -> dict[str, Any]:
        return {"sinks": [RunDirectory(directory / "jsonl")]}


class WithTensorBoard(Watched):
    name = "default, run directory and TensorBoard"

    def given(self, directory: Path) -> dict[str, Any]:
        return {"run_dir": directory / "tensorboard"}


class TrainScope(TimedTraining):
    name = "trainscope"
    package = "trainscope"
    settings: ClassVar[dict[str, Any]] = {}

    def attach(self, directory: Path) -> None:
        config = importlib.import_module("trainscope.core.config").TrainScopeConfig
        logging.getLogger("trainscope").setLevel(logging.CRITICAL)
        given = config(run_dir=str(directory / type(self).__name__), **self.settings)
        self.scope = importlib.import_module("trainscope").TrainScope(
            self.model, self.optimizer, config=given
        )
        self.scope.attach()

    def before_step(self, loss: Tensor) -> None:
        self.scope.step(loss.item(), batch_index=self.step)

    def close(self) -> None:
        self.scope.detach()


class SparseTrainScope(TrainScope):
    name = "trainscope, every 10 steps"
    settings: ClassVar[dict[str, Any]] = {"trace_every_n_steps": 10}


class TrainPulse(TimedTraining):
    name = "trainpulse, loss"
    package = "trainpulse"

    def attach(self, directory: Path) -> None:
        self.pulse = importlib.import_module("trainpulse").Monitor()

    def before_step(self, loss: Tensor) -> None:
        self.pulse.log("loss", self.step, loss.item())


class TrainPulseWithNorm(TrainPulse):
    name = "trainpulse, loss and gradient norm"

    def before_step(self, loss: Tensor) -> None:
        super().before_step(loss)
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        self.pulse.log("grad_norm", self.step, norm.item())


class ZClip(TimedTraining):
    name = "zclip"
    package = "zclip"

    def attach(self, directory: Path) -> None:
        self.clip = importlib.import_module("zclip").ZClip()

    def before_step(self, loss: Tensor) -> None:
        self.clip.step(self.model)


class WandB(TimedTraining):
    name = "wandb, offline, watch"
    package = "wandb"

    def attach(self, directory: Path) -> None:
        os.environ.setdefault("WANDB_SILENT", "true")
        wandb = importlib.import_module("wandb")
        # The global run: what wandb.watch logs goes to that one.
        self.run_ = wandb.init(mode="offline", dir=str(directory), project="overhead")
        self.run_.watch(self.model)

    def before_step(self, loss: Tensor) -> None:
        self.run_.log({"loss": loss.item()})

    def close(self) -> None:
        self.run_.finish()


class TwoScalars(TimedTraining):
    name = "TensorBoard, two scalars"
    package = "tensorboard"

    def attach(self, directory: Path) -> None:
        writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter
        self.writer = writer(directory / "two-scalars")

    def before_step(self, loss: Tensor) -> None:
        self.writer.add_scalar("loss", loss.item(), self.step)
        self.writer.add_scalar("lr", self.optimizer.param_groups[0]["lr"], self.step)

    def close(self) -> None:
        self.writer.close()


OURS: tuple[type[Watched], ...] = (
    Default, EveryStep, AllRows, Everything, WeightGradient, Jsonl, WithTensorBoard,
)  # fmt: skip
OTHERS: tuple[type[TimedTraining], ...] = (
    TrainScope,
    SparseTrainScope,
    TrainPulse,
    TrainPulseWithNorm,
    ZClip,
    WandB,
    TwoScalars,
)


class FusedBare(TimedTraining):
    """What the weight-gradient level is held against."""

    loss = staticmethod(fused_loss)


@cache
def version(package: str) -> str | None:
    """The package's version, if it can be imported."""
    try:
        importlib.import_module(package)
        return metadata.version(package)
    except Exception:  # whatever a foreign package raises: the table goes on without it
        return None


def others() -> list[type[TimedTraining]]:
    """Those whose package is installed."""
    return [arm for arm in OTHERS if version(arm.package) is not None]


def absent() -> list[str]:
    """Packages that are not in the table."""
    return sorted({arm.package for arm in OTHERS if version(arm.package) is None})
