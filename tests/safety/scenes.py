"""Trainings into which faults are injected, each of which runs code of the package that the others do not.

A scene is called as ``train(folder, begin)`` and says what became of its training.  It calls ``begin()`` once
the monitor is attached: what is traced or broken is so from there to the end of ``close()``.  (A fault while
attaching is an error of the user's call, before the first step.)  Without ``begin`` there is no monitor.
"""

from __future__ import annotations

import copy
import importlib.util
import io
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

from nfi_monitor import Monitor, Thresholds
from nfi_monitor.capture import devices
from nfi_monitor.history import History
from nfi_monitor.remedies import Autopilot, Policy
from nfi_monitor.report.loggers import AlertLog, notifiers
from nfi_monitor.report.run_directory.writer import RunDirectory
from tests.capture.test_quantized import TABLE, quantize
from tests.runs import batch, mlp, snapshot

Begin = Callable[[], None]
SOON = Thresholds(absorbing_enter=1e-9, absorbing_exit=1e-10)
"""Any rounding at all counts as absorption: *at risk* fires within the first steps of any training."""
AT_ONCE = Thresholds(
    absorbing_enter=1e-9, absorbing_exit=1e-10, inflating_growth=1e-12, imminent_growth=1e-12,
    imminent_displacement=1e-9, imminent_lowest=5e-10, imminent_exit=1e-10,
)  # fmt: skip
"""*Imminent* from the first steps on, and for ever."""
STEPS, SPIKE = 70, (60, 61, 62)


class Outcome(NamedTuple):
    result: Any
    """All that a training leaves: weights, optimizer, random state."""
    monitor: Monitor | None


class Scene(NamedTuple):
    train: Callable[[Path, Begin | None], Outcome]
    kind: str
    """What it is counted as."""
    needs: tuple[str, ...] = ()
    exact: bool = True
    """Whether its result has to be that of the training without a monitor, to the last bit."""

    @property
    def missing(self) -> list[str]:
        return [name for name in self.needs if importlib.util.find_spec(name) is None]


def steep() -> tuple[nn.Sequential, torch.optim.AdamW, Tensor, Tensor]:
    """A training that absorbs at once, is at risk and imminent."""
    model = mlp()
    with torch.no_grad():
        model[-1].weight.mul_(40)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95))
    return model, optimizer, *batch()


def plain(folder: Path, begin: Begin | None) -> Outcome:
    """It spikes, too: every part of a monitor that only watches has work."""
    model, optimizer, inputs, targets = steep()
    monitor = None
    if begin is not None:
        monitor = Monitor(
            model,
            optimizer,
            run_dir=folder,
            console=Console(file=io.StringIO()),
            on_alert=lambda alert: None,
            probe=(inputs[:4], targets[:4]),
            every=1,
        )
        begin()
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(inputs), targets if step not in SPIKE else (targets + 1) % 7)
        if monitor is not None:
            monitor.observe_loss(loss)
        loss.backward()
        optimizer.step()
    return closed(model, optimizer, monitor)


def closed(model: nn.Module, optimizer: torch.optim.Optimizer, monitor: Monitor | None) -> Outcome:
    if monitor is not None:
        monitor.close()
    return Outcome(snapshot(model, optimizer), monitor)


@contextmanager
def service(name: str) -> Iterator[None]:
    """A package that notifies people; here it tells nobody. (mock.patch.dict would forget late imports.)"""
    before = sys.modules.get(name)
    sys.modules[name] = SimpleNamespace(alert=lambda **_: None, AlertLevel=str)  # type: ignore[assignment]
    try:
        yield
    finally:
        if before is None:
            del sys.modules[name]
        else:
            sys.modules[name] = before


@service("trackio")
def tapped(folder: Path, begin: Begin | None) -> Outcome:
    """No module is the head, two micro-batches a step, one without a row that counts, a scheduler, snapshots,
    sinks of the user's and of a service."""
    model, _, inputs, targets = steep()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, betas=(0.9, 0.95), amsgrad=True)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.999)
    generator = torch.Generator().manual_seed(3)
    monitor = None
    if begin is not None:
        monitor = Monitor(
            model,
            optimizer,
            head=False,
            console=Console(file=io.StringIO()),
            thresholds=SOON,
            snapshots=1 << 22,
            stateful=[scheduler, generator],
            sinks=[AlertLog(lambda alert, change: None), *notifiers(["trackio"])],
        )
        begin()
    for step in range(25):
        for part in range(2):
            rows = torch.randperm(24, generator=generator)[part::2]
            logits = model(inputs[rows])
            if monitor is not None:
                logits = monitor.tap(logits)
            wanted = targets[rows] if step != 3 else torch.full((12,), -100)
            loss = F.cross_entropy(logits, wanted, reduction="sum") / 12
            if monitor is not None:
                monitor.observe_loss(loss)
            (loss / 2).backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    outcome = closed(model, optimizer, monitor)
    return Outcome((outcome.result, scheduler.state_dict(), generator.get_state()), monitor)


def spiking(folder: Path, begin: Begin | None) -> Outcome:
    """A slingshot that begins and ends, in losses that are told; the training itself has none. Records are so
    short that they are thinned."""
    model, optimizer, inputs, targets = steep()
    optimizer.param_groups[0]["betas"] = (0.9, 0.9)  # a short memory: it ends soon
    monitor = None
    if begin is not None:
        sinks = [RunDirectory(folder, readings_bytes=30_000)]
        monitor = Monitor(model, optimizer, console=False, sinks=sinks, every=1)
        monitor.history = History(max_rows=32)
        begin()
    for step in range(120):
        loss = F.cross_entropy(model(inputs), targets)
        if monitor is not None:
            monitor.observe_loss(5.0 if 50 <= step < 56 else 1e-6)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return closed(model, optimizer, monitor)


def scaled(folder: Path, begin: Begin | None) -> Outcome:
    """Steps that a gradient scaler has a fused optimizer skip."""
    model, _, inputs, targets = steep()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    monitor = None
    if begin is not None:
        monitor = Monitor(model, optimizer, console=False, every=1, stateful=[scaler])
        begin()
    for _ in range(8):
        loss = F.cross_entropy(model(inputs), targets)
        if monitor is not None:
            monitor.observe_loss(loss)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    outcome = closed(model, optimizer, monitor)
    return Outcome((outcome.result, scaler.state_dict()), monitor)


def calm(folder: Path, begin: Begin | None) -> Outcome:
    """A run with nothing to report: losses wait to be judged, the cadence is fitted to the budget."""
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-5)
    inputs, targets = batch()
    monitor = None
    if begin is not None:
        monitor = Monitor(model, optimizer, console=False, overhead_budget=1e-6)
        begin()
    for step in range(1030):
        loss = F.cross_entropy(model(inputs), targets)
        if monitor is not None:
            monitor.observe_loss(loss)
            if step == 1000:
                _ = monitor.history  # judges what waits
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return closed(model, optimizer, monitor)


class Eight(torch.optim.Optimizer):
    """Keeps its second moment in 8 bits."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for param in self.param_groups[0]["params"]:
            state, square = self.state[param], param.grad**2
            if "moment" in state:
                square = 0.1 * square + 0.9 * state["moment"]
            codes, scales = quantize(square)
            state |= {"state2": codes, "qmap2": TABLE, "absmax2": scales, "moment": square}
            param -= 1e-2 * param.grad / (square.sqrt() + 1e-8)


def unseen(folder: Path, begin: Begin | None) -> Outcome:
    """The head never fires, and the moments are in 8 bits: what there is, is in the optimizer."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"body": nn.Linear(12, 32), "head": nn.Linear(32, 7)})
    optimizer = Eight(model.parameters(), {"lr": 1e-2, "betas": (0.9, 0.9), "eps": 1e-8})
    inputs, targets = batch()
    monitor = None
    if begin is not None:
        monitor = Monitor(model, optimizer, console=False, every=1)
        begin()
    for step in range(24):
        logits = F.linear(model["body"](inputs).relu(), model["head"].weight, model["head"].bias)
        loss = F.cross_entropy(logits, targets)
        if monitor is not None:
            # A number, not a tensor, and one that is none: what the loop tells need not be what it trains on.
            monitor.observe_loss(math.nan if step == 12 else loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return closed(model, optimizer, monitor)


def lone_output(folder: Path, begin: Begin | None) -> Outcome:
    """One output and no classes, gradients that exist only in a closure, no second moment."""
    model = mlp(classes=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
    inputs, targets = batch(classes=2)
    monitor = None
    if begin is not None:
        monitor = Monitor(model, optimizer, console=False, every=1)
        begin()

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.binary_cross_entropy_with_logits(model(inputs).squeeze(-1), targets.float())
        if monitor is not None:
            monitor.observe_loss(loss)
        loss.backward()
        return loss

    for step in range(24):
        if step % 2:
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()
    return closed(model, optimizer, monitor)


def late(folder: Path, begin: Begin | None) -> Outcome:
    """All numbers are taken for an accelerator's, which are not waited for; the logits are bfloat16."""
    with mock.patch.object(devices, "on_host", lambda tensor: False):
        model, optimizer, inputs, targets = steep()
        monitor = None
        if begin is not None:
            monitor = Monitor(model, optimizer, console=False, every=5)
            begin()
        for _ in range(24):
            with torch.autocast("cpu", torch.bfloat16):
                loss = F.cross_entropy(model(inputs), targets)
            if monitor is not None:
                monitor.observe_loss(loss)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return closed(model, optimizer, monitor)


def copied(folder: Path, begin: Begin | None) -> Outcome:
    """An average of the weights is kept, and the model saved, while it trains."""
    model, optimizer, inputs, targets = steep()
    monitor = None
    if begin is not None:
        monitor = Monitor(model, optimizer, console=False)
        monitor.observe_outputs()
        begin()
    average = None
    for _ in range(4):
        if monitor is not None:
            monitor.port.begin_step()
        loss = F.cross_entropy(model(inputs), targets)
        loss.backward()
        if monitor is not None:
            monitor.port.end_micro_batch()
        optimizer.step()
        optimizer.zero_grad()
        average = copy.deepcopy(model)
        torch.save(model, io.BytesIO())
    outcome = closed(model, optimizer, monitor)
    return Outcome((outcome.result, average.state_dict() if average is not None else None), monitor)


def dry_pilot(folder: Path, begin: Begin | None) -> Outcome:
    return piloted(folder, begin, 40, Policy(), dry_run=True, thresholds=AT_ONCE)


def acting_pilot(folder: Path, begin: Begin | None) -> Outcome:
    """It exchanges the loss, cools, and in the end asks for an end."""
    return piloted(folder, begin, 130, Policy(), thresholds=AT_ONCE)


def releasing_pilot(folder: Path, begin: Begin | None) -> Outcome:
    """It has no say in the loss: the gradient is projected instead."""
    policy = Policy(hold=0.1, calm=0.1, loss_at="at_risk", patience=0.1)
    return piloted(folder, begin, 125, policy, thresholds=SOON, routed=False)


def piloted(
    folder: Path,
    begin: Begin | None,
    steps: int,
    policy: Policy,
    *,
    dry_run: bool = False,
    thresholds: Thresholds | None = None,
    routed: bool = True,
) -> Outcome:
    """Some steps are taken after the monitor was closed, and a NaN is told last."""
    model, optimizer, inputs, targets = steep()
    pilot = Autopilot(policy, dry_run=dry_run)
    loss_of = pilot.loss if routed and begin is not None else F.cross_entropy
    monitor = None
    if begin is not None:
        monitor = Monitor(
            model, optimizer, console=False, run_dir=folder, on_alert=pilot, thresholds=thresholds
        )
        begin()
    for step in range(steps):
        loss = loss_of(model(inputs), targets)
        if monitor is not None:
            monitor.observe_loss(loss)
            if step == steps - 5:
                monitor.close()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        _ = pilot.should_stop
    return Outcome(snapshot(model, optimizer), monitor)


def huggingface(folder: Path, begin: Begin | None) -> Outcome:
    """Accumulation, checkpoints, an Autopilot's dry run, a remedy that does nothing."""
    import transformers

    from nfi_monitor.integrations.transformers import NFICallback
    from tests.integrations import hf

    callbacks: list[Any] = []
    if begin is not None:
        own = NFICallback(
            console=False,
            every=1,
            thresholds=SOON,
            on_alert=Autopilot(dry_run=True),
            remedy=lambda alert, context: None,
            save_on="at_risk",
            stop_on="slingshot",
        )

        class Begins(transformers.TrainerCallback):
            def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                begin()

        callbacks = [own, Begins()]
    trainer = hf.trainer(folder, callbacks=callbacks, steps=5, gradient_accumulation_steps=2)
    trainer.train()
    return Outcome(hf.state(trainer), own._attachment.monitor if callbacks else None)


def lightning(folder: Path, begin: Begin | None) -> Outcome:
    from lightning.pytorch.callbacks import Callback
    from lightning.pytorch.loggers import TensorBoardLogger

    from nfi_monitor.integrations.lightning import NFICallback
    from tests.integrations import test_lightning as lit

    callbacks: list[Any] = []
    if begin is not None:
        own = NFICallback(console=False, every=1, thresholds=SOON, save_on="at_risk", run_dir=None)

        class Begins(Callback):
            def on_train_start(self, trainer: Any, pl_module: Any) -> None:
                begin()

        callbacks = [own, Begins()]
    logger = TensorBoardLogger(folder)
    trainer = lit.fit(folder, callbacks, max_steps=5, logger=logger, accumulate_grad_batches=2)
    return Outcome(lit.state(trainer), own._attachment.monitor if callbacks else None)


def accelerate(folder: Path, begin: Begin | None) -> Outcome:
    """Saved and loaded in the middle, and trackers of its own."""
    from nfi_monitor.integrations.accelerate import watch
    from tests.integrations import test_accelerate as acc

    accelerator, model, optimizer, data = acc.prepared(folder, gradient_accumulation_steps=2)
    monitor = None
    if begin is not None:
        monitor = watch(accelerator, model, optimizer, console=False, every=1, thresholds=SOON)
        begin()
    acc.train(accelerator, model, optimizer, data, steps=4)
    accelerator.save_state(str(folder / "saved"))
    acc.train(accelerator, model, optimizer, data, steps=2)
    accelerator.load_state(str(folder / "saved"))
    acc.train(accelerator, model, optimizer, data, steps=4)
    return closed(accelerator.unwrap_model(model), optimizer.optimizer, monitor)


FIRST = Scene(plain, "functions made to raise")
ALONE: dict[str, Scene] = {
    "plain": FIRST,
    **{
        each.__name__: Scene(each, "in other kinds of training of one process")
        for each in (tapped, spiking, scaled, calm, unseen, lone_output, late, copied)
    },
    "dry_pilot": Scene(dry_pilot, "under the Autopilot"),
    "acting_pilot": Scene(acting_pilot, "under the Autopilot", exact=False),
    "releasing_pilot": Scene(releasing_pilot, "under the Autopilot", exact=False),
    "huggingface": Scene(huggingface, "under a framework", ("transformers", "accelerate")),
    "lightning": Scene(lightning, "under a framework", ("lightning",)),
    "accelerate": Scene(accelerate, "under a framework", ("accelerate",)),
}
