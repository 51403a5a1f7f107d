"""Trainings with Lightning."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from tests.zoo.configuration import STEPS, Configuration, Table
from tests.zoo.kits import as_rows, labels, reals
from tests.zoo.session import Session
from tests.zoo.tables.causal_lm import GPT
from tests.zoo.tables.hub_models import language, make
from tests.zoo.tables.plain_loops import mlp


def _module(make_model: Any, loss: Any, manual: bool = False) -> Any:
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = make_model()
            self.automatic_optimization = not manual

        def training_step(self, batch: Any, index: int) -> Tensor | None:
            found: Tensor = loss(self.model, batch)
            if not manual:
                return found
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(found)
            optimizer.step()
            return None

        def validation_step(self, batch: Any, index: int) -> None:
            loss(self.model, batch)

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), 1e-3)

    return Module()


def _own(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch["x"]), batch["y"])


def _hub(model: nn.Module, batch: Any) -> Tensor:
    found: Tensor = model(**batch).loss
    return found


def _train(
    make_model: Any = mlp,
    loss: Any = _own,
    *,
    rows: Any = None,
    manual: bool = False,
    validate: bool = False,
    batch_size: int = 4,
    **options: Any,
) -> Any:
    def train(session: Session) -> nn.Module:
        import lightning

        module = _module(make_model, loss, manual)
        data: Any = as_rows(x=reals(12), y=labels(5)) if rows is None else rows(module.model)
        ran = lightning.Trainer(
            max_steps=STEPS,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=session.folder,
            callbacks=session.lightning_callbacks(),
            **options,
        )
        more = {"val_dataloaders": DataLoader(data, batch_size=4)} if validate else {}
        ran.fit(module, DataLoader(data, batch_size=batch_size), **more)
        session.optimizer = ran.optimizers[0] if ran.optimizers else None
        return module

    return train


def _make() -> list[Configuration]:
    return [
        Configuration("automatic optimization", _train(), "model.4"),
        Configuration("manual optimization", _train(manual=True), "model.4"),
        Configuration(
            "accumulation, clipping",
            _train(batch_size=2, accumulate_grad_batches=2, gradient_clip_val=1.0),
            "model.4",
        ),
        Configuration(
            "bf16-mixed", _train(precision="bf16-mixed"), "model.4", true_notes=("half_precision_loss",)
        ),
        Configuration("validation in between", _train(validate=True, val_check_interval=4), "model.4"),
        Configuration("GPT-2", _train(make("GPT2LMHeadModel", **GPT), _hub, rows=language), "model.lm_head"),
        Configuration(
            "ResNet (transformers)",
            _train(
                make(
                    "ResNetForImageClassification",
                    embedding_size=16,
                    hidden_sizes=[16, 32],
                    depths=[1, 1],
                    num_labels=5,
                ),
                _hub,
                rows=lambda model: as_rows(pixel_values=reals(3, 32, 32), labels=labels(5)),
            ),
            "model.classifier.1",
        ),
    ]


TABLE = Table("lightning", ("lightning",), _make)
