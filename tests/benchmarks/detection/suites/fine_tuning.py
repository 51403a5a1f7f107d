"""Ordinary trainings of tiny models of ``transformers``, fed as its Trainer feeds them; LoRA by hand.

As in Trainer: batches are dictionaries, the model computes its own loss, AdamW with a linear decay, gradients
clipped at 1.  The configurations are tiny, and the weights random or trained a little before.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.benchmarks.detection import data
from tests.benchmarks.detection.suites.checked import CheckedTraining, clipped, epochs, scheduled
from tests.benchmarks.detection.training import LogitChange

VOCABULARY, LENGTH = 128, 16
_TINY = {
    "vocab_size": VOCABULARY, "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
    "intermediate_size": 48, "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip


def own_loss(training: Any, batch: Any, monitor: Any) -> Tensor:
    return training.model(**batch).loss  # type: ignore[no-any-return]


def make(name: str, **more: Any) -> nn.Module:
    """A model of ``transformers`` by its class's name."""
    import transformers

    transformers.logging.set_verbosity_error()
    if name.startswith("ViT"):
        config: Any = transformers.ViTConfig(
            hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48, image_size=8,
            patch_size=4, num_channels=1, **more,
        )  # fmt: skip
    elif name.startswith("GPT2"):
        config = transformers.GPT2Config(
            vocab_size=VOCABULARY, n_positions=32, n_embd=24, n_layer=1, n_head=2, bos_token_id=1,
            eos_token_id=2, pad_token_id=0, **more,
        )  # fmt: skip
    elif name.startswith("Llama"):
        config = transformers.LlamaConfig(**_TINY, num_key_value_heads=1, **more)
    elif name.startswith("DistilBert"):
        config = transformers.DistilBertConfig(
            vocab_size=VOCABULARY, dim=24, n_layers=1, n_heads=2, hidden_dim=48, max_position_embeddings=32,
            **more,
        )  # fmt: skip
    else:
        config = transformers.BertConfig(**_TINY, **more)
    return getattr(transformers, name)(config)  # type: ignore[no-any-return]


# --- data ------------------------------------------------------------------------------------------


def rows_of(task: str, count: int, seed: int) -> dict[str, Tensor]:
    """The columns of a data set: what a collator would hand to the model, all rows."""
    if task.startswith("image"):
        x, y = data.digits(count, seed=seed)
        labels = y / 9.0 if task == "image-regression" else y
        return {"pixel_values": x.reshape(-1, 1, 8, 8), "labels": labels}
    stream = data.text()
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, len(stream) - LENGTH - 1, (count,), generator=generator)
    tokens = stream[starts[:, None] + torch.arange(LENGTH)]
    columns = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    if task == "causal":
        return columns | {"labels": tokens}
    if task == "masked":
        hidden = torch.rand(tokens.shape, generator=generator) < 0.15
        hidden[:, 0] = True
        columns["input_ids"] = tokens.masked_fill(hidden, 3)
        return columns | {"labels": tokens.masked_fill(~hidden, -100)}
    if task == "topics":
        return columns | {"labels": starts * 4 // len(stream)}
    if task == "regression":
        return columns | {"labels": torch.randint(0, 4, (count,), generator=generator).float()}
    if task == "many":
        return columns | {"labels": torch.stack([(tokens == ord(c)).any(1) for c in "aeiost"], 1).float()}
    if task == "tags":
        return columns | {"labels": (tokens > 64).long() + (tokens > 96).long()}
    if task == "answers":
        first = (tokens == 32).float().argmax(1)
        return columns | {"start_positions": first, "end_positions": (first + 2).clamp_max(LENGTH - 1)}
    raise ValueError(f"task {task!r}")


def batches(columns: dict[str, Tensor], size: int, seed: int) -> Any:
    names, tensors = list(columns), list(columns.values())
    draw = epochs(*tensors, size=size, seed=seed)
    return lambda step: [dict(zip(names, chosen, strict=True)) for chosen in draw(step)]


# --- trainings ---------------------------------------------------------------------------------------


def fine_tuned(
    seed: int,
    arm: LogitChange,
    *,
    model: str,
    task: str,
    rows: int = 1000,
    batch: int = 8,
    lr: float = 1e-3,
    decay: float = 0.0,
    total: int = 0,
    before: int = 0,
    lora: int = 0,
    **more: Any,
) -> CheckedTraining:
    """Train a model of ``transformers`` on a task.

    ``total``: the rate falls in a line to 0 over so many steps; 0: constant. ``before``: steps of training
    on other rows before the monitor comes. ``lora``: rank of the adapters; the rest but the head is frozen.
    """
    torch.manual_seed(seed)
    network = make(model, **more)
    if before:
        _train(network, batches(rows_of(task, rows, seed + 100), batch, seed), before, lr)
    if lora:
        adapt(network, lora)
    columns = rows_of(task, rows, seed)
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    step = torch.optim.AdamW(trained, lr=lr, weight_decay=decay)
    falling = (lambda number: max(0.0, 1.0 - number / total)) if total else None
    network.train()
    return CheckedTraining(
        network,
        step,
        own_loss,
        batches(columns, batch, seed),
        scheduled(step, falling),
        arm,
        part={name: column[:64] for name, column in columns.items()},
        check_every=20,
        before_update=clipped(1.0),
    )


def _train(network: nn.Module, draw: Any, steps: int, lr: float) -> None:
    optimizer = torch.optim.AdamW(network.parameters(), lr=lr)
    network.train()
    for number in range(1, steps + 1):
        network(**draw(number)[0]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


class LowRank(nn.Module):
    """A frozen linear layer and a trained product of two thin matrices beside it (Hu et al. 2021)."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 2.0 * self.up(self.down(x))  # type: ignore[no-any-return]


_ADAPTED = ("q_proj", "v_proj", "query", "value")
_HEADS = ("score", "classifier", "qa_outputs", "lm_head")


def adapt(network: nn.Module, rank: int) -> None:
    """Freeze everything but the head; queries and values get adapters."""
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(any(part in _HEADS for part in name.split(".")))
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            if name in _ADAPTED and isinstance(child, nn.Linear):
                setattr(module, name, LowRank(child, rank))
