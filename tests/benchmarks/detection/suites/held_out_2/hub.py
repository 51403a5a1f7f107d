"""Ordinary trainings of tiny models of ``transformers`` of classes that no other half has."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.benchmarks.detection import data
from tests.benchmarks.detection.suites.checked import CheckedTraining, epochs
from tests.benchmarks.detection.suites.common import ENDS, USUAL, VOCABULARY, of_transformers, trained
from tests.benchmarks.detection.training import LogitChange

LENGTH = 16
_ONE_KEY = {**USUAL, "num_key_value_heads": 1, "head_dim": 12, **ENDS}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral": ("MistralForCausalLM", {**_ONE_KEY, "sliding_window": 8}),
    "gemma": ("Gemma2ForCausalLM", {**_ONE_KEY, "sliding_window": 8}),
    "neox": ("GPTNeoXForCausalLM", {**USUAL, **ENDS}),
    "bloom": ("BloomForCausalLM", {
        "vocab_size": VOCABULARY, "hidden_size": 24, "n_layer": 1, "n_head": 2, **ENDS}),
    "phi": ("PhiForSequenceClassification", {**USUAL, **ENDS, "num_labels": 4}),
    "swin": ("SwinForImageClassification", {
        "image_size": 8, "patch_size": 1, "num_channels": 1, "embed_dim": 12, "depths": [1, 1],
        "num_heads": [2, 2], "window_size": 4, "num_labels": 10}),
    "albert": ("AlbertForSequenceClassification", {
        **USUAL, "embedding_size": 16, "num_hidden_layers": 2, "num_labels": 4, **ENDS}),
    "bart": ("BartForConditionalGeneration", {
        "vocab_size": VOCABULARY, "d_model": 24, "encoder_layers": 1, "decoder_layers": 1,
        "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48, "max_position_embeddings": 32, "decoder_start_token_id": 2, **ENDS}),
    "resnet": ("ResNetForImageClassification", {
        "num_channels": 1, "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1],
        "layer_type": "basic", "num_labels": 10}),
    "funnel": ("FunnelForTokenClassification", {
        "vocab_size": VOCABULARY, "block_sizes": [1, 1], "d_model": 24, "n_head": 2, "d_head": 12,
        "d_inner": 48, "num_decoder_layers": 1, "num_labels": 3}),
}  # fmt: skip
"""Short name → class of ``transformers`` and its configuration."""


def columns_of(name: str, rows: int, seed: int) -> dict[str, Tensor]:
    """What a collator would hand to the model, all rows."""
    if name in ("swin", "resnet"):
        x, y = data.digits(rows, seed=seed)
        return {"pixel_values": x.reshape(-1, 1, 8, 8), "labels": y}
    tokens, _ = data.text_windows(rows, LENGTH, seed=seed)
    if name == "bart":  # words in lower case are to be put in upper case
        small = (tokens >= 97) & (tokens <= 122)
        return {"input_ids": tokens, "labels": torch.where(small, tokens - 32, tokens)}
    if name == "funnel":  # a letter, a space, the rest
        kinds = torch.where(tokens == 32, 1, ((tokens < 65) | (tokens > 122)).long() * 2)
        return {"input_ids": tokens, "labels": kinds}
    if name in ("albert", "phi"):  # how many words begin
        return {"input_ids": tokens, "labels": (tokens == 32).sum(1).clamp_max(4).sub(1).clamp_min(0)}
    return {"input_ids": tokens, "labels": tokens}


def hub(
    seed: int,
    arm: LogitChange,
    *,
    model: str,
    rows: int = 800,
    batch: int = 8,
    accumulate: int = 1,
    low: bool = False,
    **how: Any,
) -> CheckedTraining:
    """Train a model of :data:`CONFIGS` as Trainer does: gradients clipped at 1, rows padded to none.

    ``low``: under autocast in bfloat16.
    """
    torch.manual_seed(seed)
    network = of_transformers(*CONFIGS[model]).train()
    columns = columns_of(model, rows, seed)
    plain = epochs(*columns.values(), size=batch * accumulate, seed=seed)

    def draw(step: int) -> Any:
        parts = [column.split(batch) for column in plain(step)[0]]
        return [dict(zip(columns, chosen, strict=True)) for chosen in zip(*parts, strict=True)]

    def loss(training: Any, given: Any, monitor: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            return training.model(**given).loss  # type: ignore[no-any-return]

    part = {name: column[:64] for name, column in columns.items()}
    return trained(network, loss, draw, arm, part=part, check_every=20, clip=1.0, **how)
