"""Ordinary trainings of tiny models of ``transformers`` of classes that no other half has, trained before."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.benchmarks.detection import data
from tests.benchmarks.detection.suites.checked import CheckedTraining, epochs
from tests.benchmarks.detection.suites.common import ENDS, USUAL, VOCABULARY, Draw, of_transformers, trained
from tests.benchmarks.detection.training import LogitChange

LENGTH = 12
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "gptj": ("GPTJForCausalLM", {
        "vocab_size": VOCABULARY, "n_embd": 24, "n_layer": 1, "n_head": 2, "n_positions": 32,
        "rotary_dim": 8, **ENDS}),
    "starcoder": ("Starcoder2ForCausalLM", {**USUAL, "num_key_value_heads": 1, **ENDS}),
    "dino": ("Dinov2ForImageClassification", {
        "image_size": 8, "patch_size": 2, "num_channels": 1, "hidden_size": 24, "num_hidden_layers": 1,
        "num_attention_heads": 2, "mlp_ratio": 2, "num_labels": 10}),
    "convbert": ("ConvBertForSequenceClassification", {
        **USUAL, "embedding_size": 24, "num_attention_heads": 4, "conv_kernel_size": 3, "num_labels": 3,
        **ENDS}),
    "mpnet": ("MPNetForTokenClassification", {**USUAL, "num_labels": 3, **ENDS}),
}  # fmt: skip
"""Short name → class of ``transformers`` and its configuration."""


def columns_of(name: str, rows: int, seed: int) -> dict[str, Tensor]:
    """What a collator would hand to the model, all rows."""
    if name == "dino":
        x, y = data.digits(rows, seed=seed)
        return {"pixel_values": x.reshape(-1, 1, 8, 8), "labels": y}
    tokens, _ = data.text_windows(rows, LENGTH, seed=seed)
    kinds = torch.where(tokens == 32, 1, ((tokens < 65) | (tokens > 122)).long() * 2)
    if name == "mpnet":
        return {"input_ids": tokens, "labels": kinds}
    if name == "convbert":  # whether there are more spaces, signs or neither
        return {"input_ids": tokens, "labels": ((kinds == 2).sum(1) > (kinds == 1).sum(1)).long()}
    return {"input_ids": tokens, "labels": tokens}


def fine_tuned(
    seed: int,
    arm: LogitChange,
    *,
    model: str,
    rows: int = 600,
    batch: int = 8,
    before: int = 150,
    low: bool = False,
    **how: Any,
) -> CheckedTraining:
    """Train on other rows ``before``, then on these as Trainer does. ``low``: autocast in bfloat16."""
    torch.manual_seed(seed)
    network = of_transformers(*CONFIGS[model]).train()

    def named(columns: dict[str, Tensor], seed: int) -> Draw:
        plain = epochs(*columns.values(), size=batch, seed=seed)
        return lambda step: [dict(zip(columns, plain(step)[0], strict=True))]

    step, draw = torch.optim.AdamW(network.parameters(), 2e-3), named(columns_of(model, 400, seed + 1), seed)
    for number in range(1, before + 1):
        network(**draw(number)[0]).loss.backward()
        step.step()
        step.zero_grad()
    torch.manual_seed(seed + 1)
    columns = columns_of(model, rows, seed)

    def loss(training: Any, given: Any, monitor: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            return training.model(**given).loss  # type: ignore[no-any-return]

    part = {name: column[:64] for name, column in columns.items()}
    how = {"clip": 1.0, "check_every": 20} | how
    return trained(network, loss, named(columns, seed), arm, part=part, **how)
