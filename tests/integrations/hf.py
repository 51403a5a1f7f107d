"""Tiny, randomly initialised HuggingFace models with data made on the spot: nothing is downloaded."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from tests.runs import snapshot

# Every training begins with a garbage collection, which walks through all that was imported: .4 s of 1 s.
gc.freeze()

VOCABULARY, LENGTH, WIDTH = 50, 12, 16
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


@dataclass(frozen=True)
class Batches(Dataset[dict[str, Tensor]]):
    """Rows drawn from their own number, so that two trainings see the same."""

    row: Callable[[torch.Generator], dict[str, Tensor]]
    rows: int = 32

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.row(torch.Generator().manual_seed(index))


def _tokens(generator: torch.Generator, length: int = LENGTH) -> Tensor:
    return torch.randint(3, VOCABULARY, (length,), generator=generator)


def _language(generator: torch.Generator) -> dict[str, Tensor]:
    tokens = _tokens(generator)
    labels = tokens.clone()
    labels[:2] = -100  # a prompt: rows that do not count
    return {"input_ids": tokens, "labels": labels}


def _masked(generator: torch.Generator) -> dict[str, Tensor]:
    tokens = _tokens(generator)
    hidden = torch.rand(LENGTH, generator=generator) < 0.3
    return {"input_ids": tokens.where(~hidden, 3), "labels": tokens.where(hidden, -100)}


def _sentences(generator: torch.Generator) -> dict[str, Tensor]:
    return {"input_ids": _tokens(generator), "labels": torch.randint(0, 4, (), generator=generator)}


def _pairs(generator: torch.Generator) -> dict[str, Tensor]:
    return {"input_ids": _tokens(generator), "labels": _tokens(generator, 6)}


def _images(generator: torch.Generator) -> dict[str, Tensor]:
    label = torch.randint(0, 4, (), generator=generator)
    return {"pixel_values": torch.randn(3, 8, 8, generator=generator), "labels": label}


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_positions=LENGTH, n_embd=WIDTH, n_layer=2, n_head=2, **TOKENS
    )
    return transformers.GPT2LMHeadModel(config)


def llama_config(**options: Any) -> Any:
    return transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=LENGTH,
        tie_word_embeddings=False, attention_dropout=0.1, **TOKENS, **options,
    )  # fmt: skip


def llama() -> nn.Module:
    return transformers.LlamaForCausalLM(llama_config())


def classifier() -> nn.Module:
    return transformers.LlamaForSequenceClassification(llama_config(num_labels=4))


def vit() -> nn.Module:
    config = transformers.ViTConfig(
        hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=8,
        patch_size=4, num_labels=4, hidden_dropout_prob=0.1,
    )  # fmt: skip
    return transformers.ViTForImageClassification(config)


def t5() -> nn.Module:
    config = transformers.T5Config(
        vocab_size=VOCABULARY, d_model=WIDTH, d_kv=8, d_ff=32, num_layers=1, num_heads=2,
        decoder_start_token_id=0, **TOKENS,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config)


def bert() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=LENGTH, **TOKENS,
    )  # fmt: skip
    return transformers.BertForMaskedLM(config)


class FusedLoss(nn.Module):
    """A fused linear cross-entropy: its logits never leave the loss, and ``lm_head`` is never called.

    As the kernels of that kind do, it goes through the rows in chunks and takes the head's weight itself.
    """

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.body = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Dropout(0.1))
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        features = self.body(self.embed(input_ids))[:, :-1].reshape(-1, WIDTH)
        targets = labels[:, 1:].reshape(-1)
        loss = sum(
            F.cross_entropy(F.linear(part, self.lm_head.weight), target, reduction="sum")
            for part, target in zip(features.split(16), targets.split(16), strict=True)
        )
        return {"loss": loss / (targets != -100).sum()}


MODELS: dict[str, tuple[Callable[[], nn.Module], Batches]] = {
    "causal LM, tied head (GPT-2)": (gpt2, Batches(_language)),
    "causal LM (Llama)": (llama, Batches(_language)),
    "sequence classification (Llama)": (classifier, Batches(_sentences)),
    "image classification (ViT)": (vit, Batches(_images)),
    "sequence to sequence, tied head (T5)": (t5, Batches(_pairs)),
    "masked LM, tied head (BERT)": (bert, Batches(_masked)),
    "fused linear cross-entropy": (FusedLoss, Batches(_language)),
}
LLAMA = "causal LM (Llama)"


def trainer(
    folder: Path,
    name: str = LLAMA,
    *,
    callbacks: list[TrainerCallback] | None = None,
    steps: int = 10,
    model: nn.Module | None = None,
    options: dict[str, Any] | None = None,
    change: Callable[[Trainer], None] | None = None,
    kind: type[Trainer] = Trainer,
    **arguments: Any,
) -> Trainer:
    """A trainer of one of :data:`MODELS`; ``options`` are the Trainer's own, the rest TrainingArguments'.

    ``change`` is applied to it in the end.
    """
    build, data = MODELS[name]
    transformers.set_seed(0)
    defaults: dict[str, Any] = {
        "use_cpu": True, "max_steps": steps, "per_device_train_batch_size": 8, "learning_rate": 1e-2,
        "save_strategy": "no", "disable_tqdm": True, "report_to": "none", "logging_steps": 1,
    }  # fmt: skip
    trainer = kind(
        model if model is not None else build(),
        TrainingArguments(str(folder), **(defaults | arguments)),
        train_dataset=data,
        eval_dataset=Batches(data.row, rows=8),
        callbacks=callbacks,
        **(options or {}),
    )
    if change is not None:
        change(trainer)
    return trainer


def half(trainer: Trainer) -> None:
    """What ``fp16=True`` does on an accelerator (on a CPU the Trainer leaves all of it out).

    The scale is so large that the first steps overflow and are skipped.
    """
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**26)
    trainer.compute_loss_context_manager = lambda: torch.autocast("cpu", torch.float16)


def state(done: Trainer) -> dict[str, Any]:
    """Everything a monitor must leave alone: weights, optimizer, schedule, random states, what was logged."""
    logged = [entry for entry in done.state.log_history if "loss" in entry or "eval_loss" in entry]
    timeless = [
        {k: v for k, v in entry.items() if "_second" not in k and "runtime" not in k} for entry in logged
    ]
    return {
        **snapshot(done.model, done.optimizer),
        "scheduler": done.lr_scheduler.state_dict(),
        "python": random.getstate(),
        "numpy": str(np.random.get_state()),
        "logged": timeless,
    }  # fmt: skip
