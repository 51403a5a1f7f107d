"""Speech models and time series of transformers."""

from __future__ import annotations

from typing import Any

import torch

from tests.zoo.configuration import Configuration, Table
from tests.zoo.kits import ROWS, as_rows, labels, reals, tokens
from tests.zoo.tables.hub_models import PACKAGES, VOCABULARY, case
from tests.zoo.tables.seq2seq import BART

WAVE: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "conv_dim": [16, 16],
    "conv_stride": [5, 4],
    "conv_kernel": [10, 4],
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 4,
    "feat_extract_norm": "group",
    "num_feat_extract_layers": 2,
    "mask_time_prob": 0.0,
    "ctc_loss_reduction": "mean",
    "pad_token_id": 0,
    "classifier_proj_size": 16,
    "num_labels": 5,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CTC: dict[str, Any] = {"soft": True, "true_notes": ("no_loss_at_head",)}
SERIES: dict[str, Any] = {
    "context_length": 16,
    "prediction_length": 4,
    "num_input_channels": 2,
    "d_model": 16,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "ffn_dim": 32,
    "patch_length": 4,
    "patch_stride": 4,
}


def _written(model: Any) -> list[dict[str, Any]]:
    return as_rows(input_values=reals(800), labels=tokens(32, 5))


def _named(model: Any) -> list[dict[str, Any]]:
    return as_rows(input_values=reals(800), labels=labels(5))


def _whisper(model: Any) -> list[dict[str, Any]]:
    return as_rows(input_features=reals(8, 40), labels=tokens(VOCABULARY, 8))


def _speech2text(model: Any) -> list[dict[str, Any]]:
    return as_rows(
        input_features=reals(40, 8),
        attention_mask=torch.ones(ROWS, 40, dtype=torch.long),
        labels=tokens(VOCABULARY, 8),
    )


def _make() -> list[Configuration]:
    return [
        case("Wav2Vec2ForCTC", "lm_head", _written, WAVE, **CTC),
        case("HubertForCTC", "lm_head", _written, WAVE, **CTC),
        case("WavLMForCTC", "lm_head", _written, WAVE, **CTC),
        case("SEWForCTC", "lm_head", _written, {**WAVE, "squeeze_factor": 2}, **CTC),
        case("UniSpeechForCTC", "lm_head", _written, WAVE, **CTC),
        case("Wav2Vec2ForSequenceClassification", "classifier", _named, WAVE),
        case("HubertForSequenceClassification", "classifier", _named, WAVE),
        case(
            "WhisperForConditionalGeneration",
            "proj_out",
            _whisper,
            {
                **BART,
                "num_mel_bins": 8,
                "max_source_positions": 20,
                "max_target_positions": 32,
                "suppress_tokens": None,
                "begin_suppress_tokens": None,
            },
        ),
        case(
            "WhisperForAudioClassification",
            "classifier",
            lambda model: as_rows(input_features=reals(8, 40), labels=labels(5)),
            {
                **BART,
                "num_mel_bins": 8,
                "max_source_positions": 20,
                "max_target_positions": 32,
                "num_labels": 5,
                "classifier_proj_size": 16,
            },
        ),
        case(
            "Speech2TextForConditionalGeneration",
            "lm_head",
            _speech2text,
            {
                **BART,
                "input_feat_per_channel": 8,
                "conv_channels": 16,
                "max_source_positions": 64,
                "max_target_positions": 32,
            },
        ),
        case(
            "ASTForAudioClassification",
            "classifier.dense",
            lambda model: as_rows(input_values=reals(32, 16), labels=labels(5)),
            {
                "hidden_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "intermediate_size": 64,
                "patch_size": 8,
                "max_length": 32,
                "num_mel_bins": 16,
                "time_stride": 8,
                "frequency_stride": 8,
                "num_labels": 5,
            },
        ),
        case(
            "PatchTSTForPrediction",
            ("head.projection", None),
            lambda model: as_rows(past_values=reals(16, 2), future_values=reals(4, 2)),
            {**SERIES, "loss": "mse"},
            classes=False,
        ),
        case(
            "PatchTSTForClassification",
            "head.linear",
            lambda model: as_rows(past_values=reals(16, 2), target_values=labels(5)),
            {**SERIES, "num_targets": 5},
        ),
    ]


TABLE = Table("transformers: speech, time series", PACKAGES, _make)
