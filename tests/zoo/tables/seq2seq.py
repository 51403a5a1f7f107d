"""Sequence-to-sequence models of transformers."""

from __future__ import annotations

from typing import Any

from tests.zoo.configuration import Configuration, Table
from tests.zoo.kits import as_rows, tokens
from tests.zoo.tables.hub_models import PACKAGES, VOCABULARY, case

T5: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 2,
    "num_heads": 4,
    "pad_token_id": 0,
    "eos_token_id": 3,
    "decoder_start_token_id": 0,
}
BART: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 64,
    "pad_token_id": 1,
    "bos_token_id": 2,
    "eos_token_id": 3,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": 3,
}


def _translation(model: Any) -> list[dict[str, Any]]:
    return as_rows(input_ids=tokens(VOCABULARY), labels=tokens(VOCABULARY))


def _make() -> list[Configuration]:
    def s2s(model: str, config: dict[str, Any], head: str = "lm_head", **facts: Any) -> Configuration:
        return case(model, head, _translation, config, **facts)

    return [
        s2s("T5ForConditionalGeneration", T5),
        s2s(
            "T5ForConditionalGeneration",
            {**T5, "tie_word_embeddings": False, "feed_forward_proj": "gated-gelu"},
            label="v1.1",
        ),
        s2s("MT5ForConditionalGeneration", T5),
        s2s("UMT5ForConditionalGeneration", T5),
        s2s("LongT5ForConditionalGeneration", T5),
        s2s("BartForConditionalGeneration", BART),
        s2s("MBartForConditionalGeneration", BART),
        s2s("PegasusForConditionalGeneration", BART),
        s2s("MarianMTModel", BART),
        s2s("BlenderbotForConditionalGeneration", BART),
        s2s("M2M100ForConditionalGeneration", BART),
        s2s(
            "LEDForConditionalGeneration",
            {
                **BART,
                "attention_window": 8,
                "max_encoder_position_embeddings": 64,
                "max_decoder_position_embeddings": 64,
            },
        ),
        s2s(
            "SwitchTransformersForConditionalGeneration",
            {
                **T5,
                "num_experts": 2,
                "expert_capacity": 64,
                "num_sparse_encoder_layers": 1,
                "num_sparse_decoder_layers": 1,
            },
        ),
        s2s("BartForCausalLM", BART),
    ]


TABLE = Table("transformers: sequence to sequence", PACKAGES, _make)
