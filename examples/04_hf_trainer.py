"""Watch a HuggingFace ``Trainer`` with one line: ``callbacks=[NFICallback()]``.

A small GPT-2 learns division modulo 23, written as a language: "a ÷ b =" and then the answer.  When it knows
the answers by heart, margins grow until rounding absorbs rows.  The monitor says *at risk* more than a
hundred steps before the loss leaves its floor.  With the loss in float64 there is no slingshot.  Rounding
differs between processors: if the slingshot does not come, try another seed.

    python examples/04_hf_trainer.py
    python examples/04_hf_trainer.py --loss-dtype float64    # the remedy that the alert advises
    python examples/04_hf_trainer.py --save-on at_risk       # a checkpoint at the step of the alert

Nothing is downloaded.  ``OUT/nfi`` is the run directory: ``nfi-monitor report OUT/nfi``, or ``tensorboard
--logdir OUT``.  After ``trainer.train(resume_from_checkpoint=True)`` the monitor goes on with its alerts.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import rich
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

try:
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

    from nfi_monitor.integrations.transformers import NFICallback
except ImportError as missing:
    raise SystemExit(f'This example needs pip install "nfi-monitor[transformers]": {missing}') from missing

P = 23
DIVIDED, EQUALS = P, P + 1  # tokens after the numbers'


class Division(Dataset[dict[str, Tensor]]):
    """One question per row: tokens ``a ÷ b = c`` with c·b ≡ a (mod 23). Only the answer is in the loss."""

    def __init__(self, pairs: Tensor) -> None:
        answers = pairs[:, 0] * torch.tensor([pow(int(b), P - 2, P) for b in pairs[:, 1]]) % P
        words = [torch.full_like(answers, word) for word in (DIVIDED, EQUALS)]
        self.tokens = torch.stack([pairs[:, 0], words[0], pairs[:, 1], words[1], answers], dim=1)
        self.labels = self.tokens.clone()
        self.labels[:, :-1] = -100

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        return {"input_ids": self.tokens[row], "labels": self.labels[row]}


def questions(seed: int) -> Division:
    """Return half of all questions."""
    pairs = torch.tensor([(a, b) for a in range(P) for b in range(1, P)])
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed))
    return Division(pairs[order[: len(pairs) // 2]])


def float64_loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """Return the cross-entropy in float64. The logits are cast; the parameters keep their dtype."""
    logits, targets = outputs.logits[:, :-1].double().flatten(0, 1), labels[:, 1:].flatten()
    count = num_items_in_batch if num_items_in_batch is not None else (targets != -100).sum()
    return F.cross_entropy(logits, targets, reduction="sum") / count


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a small GPT-2 on modular division under the monitor.")
    parser.add_argument("--steps", type=int, default=700, help="optimizer steps (default %(default)s)")
    parser.add_argument("--lr", type=float, default=3e-3, help="learning rate (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--loss-dtype", choices=("float32", "float64"), default="float32")
    parser.add_argument("--out", default="runs/hf_trainer", help="output_dir (default %(default)s)")
    parser.add_argument("--save-on", help="kind of alert that saves a checkpoint: at_risk, imminent …")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    torch.set_num_threads(1)  # at this size a second thread costs more time than it saves
    set_seed(args.seed)
    rows = questions(args.seed)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=P + 2, n_positions=5, n_embd=64, n_layer=1, n_head=4, bos_token_id=0, eos_token_id=0,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, tie_word_embeddings=False,
        )
    )  # fmt: skip
    callback = NFICallback(save_on=args.save_on)
    trainer = Trainer(
        model,
        TrainingArguments(
            args.out, max_steps=args.steps, learning_rate=args.lr, lr_scheduler_type="constant",
            adam_beta2=0.95, per_device_train_batch_size=len(rows), weight_decay=0.0, logging_steps=100,
            save_strategy="no", report_to="none", disable_tqdm=True, seed=args.seed,
        ),
        train_dataset=rows,
        compute_loss_func=float64_loss if args.loss_dtype == "float64" else None,
        callbacks=[callback],
    )  # fmt: skip
    trainer.train()

    assert callback.monitor is not None
    rich.print(callback.monitor.summary())
    logged = [entry for entry in trainer.state.log_history if "nfi_alert" in entry]
    rich.print(f"{len(logged)} alert messages in trainer.state.log_history, loss in {args.loss_dtype}")
    for checkpoint in sorted(Path(args.out).glob("checkpoint-*")):
        rich.print(f"saved at an alert: {checkpoint}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
