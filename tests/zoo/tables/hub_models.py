"""Make tiny models of the transformers library from their configurations, and data for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tests.zoo.configuration import Configuration
from tests.zoo.kits import ROWS, WORDS, as_rows, labels, reals, tokens, trainer

PACKAGES = ("transformers", "accelerate")
VOCABULARY = 96
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "pad_token_id": 1,
    "bos_token_id": 2,
    "eos_token_id": 3,
}
"""Most configurations know these names, those of other names map them."""

Rows = Callable[[nn.Module], Sequence[dict[str, Any]]]


def make(name: str, **config: Any) -> Callable[[], nn.Module]:
    """Return a function that makes the model of this class from its own configuration class."""

    def made() -> nn.Module:
        import transformers

        cls = getattr(transformers, name)
        model: nn.Module = cls(cls.config_class(**config))
        return model.float()

    return made


def case(
    model: str, head: Any, rows: Rows, config: dict[str, Any] | None = None, *, label: str = "", **facts: Any
) -> Configuration:
    """Return the configuration that trains ``model`` with the Trainer on ``rows``."""
    arguments = facts.pop("arguments", {})
    name = f"{model} ({label})" if label else model
    return Configuration(
        name, trainer(make(model, **(SMALL if config is None else config)), rows, **arguments), head, **facts
    )


def language(model: nn.Module) -> Sequence[dict[str, Any]]:
    """Rows for a causal language model."""
    found = tokens(VOCABULARY)
    return as_rows(input_ids=found, attention_mask=torch.ones_like(found), labels=found.clone())


def masked(model: nn.Module) -> Sequence[dict[str, Any]]:
    """Rows for a masked language model: a third of the positions have a label."""
    found = tokens(VOCABULARY)
    wanted = torch.where(torch.arange(WORDS) % 3 == 0, found, torch.full_like(found, -100))
    return as_rows(input_ids=found, attention_mask=torch.ones_like(found), labels=wanted)


def text_with(**columns: Tensor) -> Rows:
    """Rows of text with further columns."""
    return lambda model: as_rows(
        input_ids=tokens(VOCABULARY), attention_mask=torch.ones(ROWS, WORDS, dtype=torch.long), **columns
    )


def images(size: int = 32, channels: int = 3, **columns: Tensor) -> Rows:
    """Rows of images [channels, size, size] with further columns."""
    return lambda model: as_rows(pixel_values=reals(channels, size, size), **columns)


def classes(count: int = 5, *shape: int) -> dict[str, Tensor]:
    """A column of class numbers."""
    return {"labels": labels(count, *shape)}
