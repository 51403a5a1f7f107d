"""Watch a Lightning ``Trainer`` with one line: ``callbacks=[NFICallback()]``.

scikit-learn's digits (1,797 handwritten 8×8 images) and a small MLP.  Readings go to the trainer's loggers,
here a CSV file; checkpoints hold the monitor's state.

    python examples/05_lightning.py
    python examples/05_lightning.py --loss-dtype bfloat16     # coarser rounding: rows absorb from 5.5 nats on
    python examples/05_lightning.py --loss-dtype bfloat16 --stop-on at_risk  # end at the step of the alert

Nothing is downloaded.  ``OUT/nfi`` is the run directory: ``nfi-monitor report OUT/nfi``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import rich
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

try:
    from lightning.pytorch import LightningModule, Trainer, seed_everything
    from lightning.pytorch.loggers import CSVLogger
    from sklearn.datasets import load_digits

    from nfi_monitor.integrations.lightning import NFICallback
except ImportError as missing:
    raise SystemExit(
        f'This example needs pip install "nfi-monitor[lightning]" scikit-learn: {missing}'
    ) from missing


class Classifier(LightningModule):
    """An MLP on images [N, 64] with ten classes; an everyday LightningModule."""

    def __init__(self, lr: float, loss_dtype: torch.dtype) -> None:
        super().__init__()
        self.lr, self.loss_dtype = lr, loss_dtype
        self.body = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU())
        self.head = nn.Linear(128, 10)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        images, labels = batch
        loss = F.cross_entropy(self.head(self.body(images)).to(self.loss_dtype), labels)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a small MLP on digits with Lightning, monitored.")
    parser.add_argument("--steps", type=int, default=1500, help="optimizer steps (default %(default)s)")
    parser.add_argument("--lr", type=float, default=1e-3, help="learning rate (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--loss-dtype", choices=("float32", "float64", "bfloat16"), default="float32")
    parser.add_argument("--out", type=Path, default=Path("runs/lightning"), help="(default %(default)s)")
    parser.add_argument("--stop-on", help="kind of alert that ends the training: at_risk, imminent …")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    torch.set_num_threads(1)  # at this size a second thread costs more time than it saves
    seed_everything(args.seed, verbose=False)
    digits = load_digits()
    images = torch.tensor(digits.data, dtype=torch.float32) / 16
    data = TensorDataset(images, torch.tensor(digits.target))

    callback = NFICallback(run_dir=args.out / "nfi", stop_on=args.stop_on)
    trainer = Trainer(
        max_steps=args.steps, accelerator="cpu", callbacks=[callback],
        logger=CSVLogger(args.out, name="logs"), default_root_dir=args.out, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=20,
    )  # fmt: skip
    model = Classifier(args.lr, getattr(torch, args.loss_dtype))
    trainer.fit(model, DataLoader(data, batch_size=64, shuffle=True))

    assert callback.monitor is not None
    rich.print(callback.monitor.summary())
    where = Path(trainer.log_dir or args.out) / "metrics.csv"
    rich.print(f"{trainer.global_step} steps, loss in {args.loss_dtype}; scalars in {where}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
