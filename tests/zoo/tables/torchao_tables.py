"""torchao: optimizers with quantized state, and training with quantized weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tests.zoo.configuration import Configuration, Table
from tests.zoo.kits import loop
from tests.zoo.tables.plain_loops import cross_entropy, mlp


def _with(name: str) -> Callable[[nn.Module], Any]:
    def made(model: nn.Module) -> Any:
        import torchao.optim

        return getattr(torchao.optim, name)(model.parameters(), lr=1e-3)

    return made


def _wide() -> nn.Module:
    """Quantized states begin at 4096 elements."""
    return mlp(width=128)


def _aware() -> nn.Module:
    from torchao.quantization import quantize_
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

    model = mlp(inputs=12, width=32)
    config = IntxFakeQuantizeConfig(torch.int8, "per_channel")
    quantize_(model, QATConfig(weight_config=config, step="prepare"))
    return model


def _make() -> list[Configuration]:
    def one(name: str) -> Configuration:
        return Configuration(
            name,
            loop(_wide, cross_entropy, _with(name)),
            "4",
        )

    return [
        one("Adam8bit"),
        one("AdamW8bit"),
        one("Adam4bit"),
        one("AdamW4bit"),
        one("AdamWFp8"),
        Configuration("quantization-aware training", loop(_aware, cross_entropy), "4"),
    ]


TABLE = Table("torchao", ("torchao",), _make)
