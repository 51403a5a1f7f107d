"""Ordinary trainings of tiny models of ``transformers`` that compute their own loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.benchmarks.detection import data
from tests.benchmarks.detection.suites.checked import CheckedTraining, epochs
from tests.benchmarks.detection.suites.common import ENDS, USUAL, VOCABULARY, of_transformers, trained
from tests.benchmarks.detection.suites.held_out.shared import code_windows, generator_of
from tests.benchmarks.detection.training import LogitChange

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "t5": ("T5ForConditionalGeneration", {
        "vocab_size": VOCABULARY, "d_model": 24, "d_kv": 12, "d_ff": 48, "num_layers": 1, "num_heads": 2,
        "decoder_start_token_id": 0, **ENDS}),
    "whisper": ("WhisperForConditionalGeneration", {
        "vocab_size": VOCABULARY, "num_mel_bins": 8, "d_model": 24, "encoder_layers": 1, "decoder_layers": 1,
        "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48, "max_source_positions": 16, "max_target_positions": 16,
        "decoder_start_token_id": 1, **ENDS}),
    "convnext": ("ConvNextForImageClassification", {
        "num_channels": 1, "patch_size": 2, "image_size": 8, "num_stages": 2, "hidden_sizes": [12, 24],
        "depths": [1, 1], "num_labels": 10, "drop_path_rate": 0.1}),
    "mamba": ("MambaForCausalLM", {
        "vocab_size": VOCABULARY, "hidden_size": 24, "state_size": 4, "num_hidden_layers": 1, "expand": 2,
        "conv_kernel": 3, **ENDS}),
    "wav2vec": ("Wav2Vec2ForCTC", {
        "vocab_size": 9, "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 48, "conv_dim": [16, 16], "conv_stride": [4, 2], "conv_kernel": [8, 4],
        "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2,
        "mask_time_prob": 0.0, "ctc_loss_reduction": "mean", "ctc_zero_infinity": True, "pad_token_id": 0}),
    "distilbert": ("DistilBertForSequenceClassification", {
        "vocab_size": VOCABULARY, "dim": 24, "n_layers": 1, "n_heads": 2, "hidden_dim": 48,
        "max_position_embeddings": 32, "num_labels": 3}),
    "opt": ("OPTForCausalLM", {
        "vocab_size": VOCABULARY, "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
        "ffn_dim": 48, "max_position_embeddings": 32, "word_embed_proj_dim": 24, **ENDS}),
    "mixtral": ("MixtralForCausalLM", {
        **USUAL, "num_key_value_heads": 1, "num_local_experts": 3, "num_experts_per_tok": 2,
        "output_router_logits": True, **ENDS}),
    "qwen": ("Qwen2ForCausalLM", {**USUAL, "num_key_value_heads": 1, "tie_word_embeddings": True, **ENDS}),
    "electra": ("ElectraForPreTraining", {**USUAL, "embedding_size": 16}),
    "roberta": ("RobertaForMultipleChoice", {**USUAL, "pad_token_id": 0}),
}  # fmt: skip
"""Short name → class of ``transformers`` and its configuration."""


# --- data ------------------------------------------------------------------------------------------------


def _sound(symbols: Tensor, frames: int, channels: int) -> Tensor:
    """Noisy sound of symbols [N, S] → [N, frames, channels]; each has a sound of its own."""
    sounds = torch.randn(16, channels, generator=generator_of(0, 0))
    heard = sounds[symbols].repeat_interleave(frames // symbols.shape[1], 1)
    return heard + 0.5 * torch.randn(heard.shape)


def columns_of(name: str, rows: int, seed: int) -> dict[str, Tensor]:
    """What a collator would hand to the model, all rows; random numbers are torch's own."""
    if name == "convnext":
        x, y = data.digits(rows, seed=seed)
        return {"pixel_values": x.reshape(-1, 1, 8, 8), "labels": y}
    if name == "whisper":
        symbols = torch.randint(3, 15, (rows, 8))
        return {"input_features": _sound(symbols - 3, 32, 8).transpose(1, 2), "labels": symbols}
    if name == "wav2vec":
        symbols = torch.randint(1, 9, (rows, 4))
        return {"input_values": _sound(symbols, 16, 8).flatten(1), "labels": symbols}
    tokens = code_windows(rows, 16, seed)
    if name == "t5":
        return {"input_ids": tokens, "labels": tokens[:, :8].flip(1)}
    if name == "distilbert":
        return {"input_ids": tokens, "labels": (tokens == 32).sum(1).clamp_max(4) // 2}
    if name == "electra":
        wrong = torch.rand(tokens.shape) < 0.2
        given = torch.where(wrong, torch.randint(32, 127, tokens.shape), tokens)
        return {"input_ids": given, "labels": (given != tokens).float()}
    if name == "roberta":
        return _choices(tokens)
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}


def _choices(tokens: Tensor) -> dict[str, Tensor]:
    """Three ends for each beginning; one of them is its own."""
    begin, end = tokens[:, None, :10].expand(-1, 3, -1), tokens[:, 10:]
    ends = torch.stack([end, end.roll(1, 0), end.roll(2, 0)], 1)
    right = torch.randint(0, 3, (len(tokens),))
    order = (torch.arange(3) - right[:, None]) % 3
    ends = ends.gather(1, order[..., None].expand(-1, -1, ends.shape[-1]))
    return {"input_ids": torch.cat([begin, ends], 2), "labels": right}


def own_loss(training: Any, batch: Any, monitor: Any) -> Tensor:
    return training.model(**batch).loss  # type: ignore[no-any-return]


def library(
    seed: int,
    arm: LogitChange,
    *,
    model: str,
    rows: int = 800,
    batch: int = 8,
    accumulate: int = 1,
    **how: Any,
) -> CheckedTraining:
    """Train a model of :data:`CONFIGS`, the gradients clipped at 1."""
    torch.manual_seed(seed)
    network = of_transformers(*CONFIGS[model]).train()
    columns = columns_of(model, rows, seed)
    plain = epochs(*columns.values(), size=batch * accumulate, seed=seed)

    def draw(step: int) -> Any:
        parts = [column.split(batch) for column in plain(step)[0]]
        return [dict(zip(columns, chosen, strict=True)) for chosen in zip(*parts, strict=True)]

    part = {name: column[:64] for name, column in columns.items()}
    return trained(network, own_loss, draw, arm, part=part, check_every=20, clip=1.0, **how)
