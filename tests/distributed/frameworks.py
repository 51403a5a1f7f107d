"""What runs on every rank of a framework's own data parallel training.

The second rank alone has something to warn of: from step :data:`TURN` on its rows are absorbed, and the first
one's are ignored.  A rank that decided from its own rows would go on while the other one saves, or stops and
waits for ever.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch import Trainer as LightningTrainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import Trainer, TrainingArguments

from nfi_monitor.integrations.lightning import NFICallback as LightningCallback
from nfi_monitor.integrations.transformers import NFICallback
from tests.runs import differences, snapshot

CLASSES, WIDTH, STEPS, TURN = 5, 8, 30, 6
ADAM = {"lr": 1e-3, "betas": (0.9, 0.95)}


class Net(nn.Module):
    """A head that also reads, once told to, which class is the right one: margins of 40 nats."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Dropout(0.1))
        self.head = nn.Linear(WIDTH + CLASSES, CLASSES)
        with torch.no_grad():
            self.head.weight[:, WIDTH:] = torch.eye(CLASSES)
        self.passes = 0

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        self.passes += 1
        second, turned = int(os.environ["RANK"]) == 1, self.passes >= TURN
        shown = 40.0 * F.one_hot(labels, CLASSES) * float(second and turned)
        logits = self.head(torch.cat([self.body(x), shown], -1))
        wanted = labels if second or not turned else torch.full_like(labels, -100)
        return {"loss": F.cross_entropy(logits, wanted, reduction="sum") / len(labels), "logits": logits}


def rows(world: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    count = 4 * STEPS * world
    x = torch.randn(count, WIDTH, generator=generator)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    return [{"x": one, "labels": label} for one, label in zip(x, labels, strict=True)]


def folder() -> Path:
    return Path(os.environ["CASE_FOLDER"])


def told(callback: Any, step: int, state: Any, files: list[str]) -> dict[str, Any]:
    monitor = callback.monitor
    return {
        "alerts": [alert.to_json() for alert in monitor.alerts],
        "notes": {note.code: note.message for note in monitor.notes},
        "watched": monitor.step,
        "history": {name: [column.tolist() for column in monitor.history[name]] for name in monitor.history},
        "step": step,
        "state": state,
        "files": files,
    }


def trained(where: str, world: int, callback: NFICallback | None) -> Trainer:
    arguments = TrainingArguments(
        str(folder() / where), use_cpu=True, ddp_backend="gloo", max_steps=STEPS, save_strategy="no",
        per_device_train_batch_size=4, disable_tqdm=True, report_to="none", adam_beta2=0.95, logging_steps=5,
    )  # fmt: skip
    trainer = Trainer(Net(), arguments, train_dataset=rows(world), callbacks=[callback] if callback else [])
    trainer.train()
    return trainer


def hf_actions(rank: int, world: int) -> dict[str, Any]:
    callback = NFICallback(console=False, every=1, save_on="at_risk", stop_on="at_risk")
    trainer = trained("acting", world, callback)
    torch.distributed.barrier()
    files = sorted(path.name for path in (folder() / "acting").glob("checkpoint-*"))
    return told(callback, trainer.state.global_step, None, files)


def hf_bitwise(rank: int, world: int) -> dict[str, Any]:
    callback = NFICallback(console=False, every=1)
    bare, watched = trained("bare", world, None), trained("watched", world, callback)
    found = differences(*(snapshot(done.model, done.optimizer) for done in (bare, watched)))
    return told(callback, watched.state.global_step, found, [])


class Module(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = Net()

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        return self.net(*batch)["loss"]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), **ADAM)


def fitted(where: str, rank: int, world: int, callback: LightningCallback | None) -> LightningTrainer:
    mine = rows(world)[rank::world]
    data = TensorDataset(*(torch.stack([row[name] for row in mine]) for name in ("x", "labels")))
    trainer = LightningTrainer(
        accelerator="cpu", devices=world, strategy="ddp", max_steps=STEPS, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        use_distributed_sampler=False, default_root_dir=folder() / where,
        callbacks=[callback] if callback else [],
    )  # fmt: skip
    torch.manual_seed(1)
    trainer.fit(Module(), DataLoader(data, batch_size=4))
    return trainer


def lightning_actions(rank: int, world: int) -> dict[str, Any]:
    callback = LightningCallback(console=False, every=1, save_on="at_risk", stop_on="at_risk")
    trainer = fitted("acting", rank, world, callback)
    torch.distributed.barrier()
    files = sorted(path.name for path in (folder() / "acting").rglob("*.ckpt"))
    return told(callback, trainer.global_step, None, files)


def lightning_bitwise(rank: int, world: int) -> dict[str, Any]:
    callback = LightningCallback(console=False, every=1)
    bare, watched = (fitted(name, rank, world, one) for name, one in (("bare", None), ("watched", callback)))
    found = differences(*(snapshot(done.lightning_module, done.optimizers[0]) for done in (bare, watched)))
    return told(callback, watched.global_step, found, [])
