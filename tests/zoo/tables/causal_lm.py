"""Causal language models of transformers, trained by its Trainer."""

from __future__ import annotations

from typing import Any

from tests.zoo.configuration import Configuration, Table
from tests.zoo.tables.hub_models import PACKAGES, SMALL, VOCABULARY, case, language

GPT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 2,
    "eos_token_id": 3,
}
GROUPED = {**SMALL, "num_key_value_heads": 2, "head_dim": 8}
EXPERTS = {
    **GROUPED,
    "num_local_experts": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}
UNTIED = {"tie_word_embeddings": False}


def _make() -> list[Configuration]:
    def lm(
        model: str, config: dict[str, Any] | None = None, head: str = "lm_head", **facts: Any
    ) -> Configuration:
        return case(model, head, language, config, **facts)

    return [
        lm("GPT2LMHeadModel", GPT),
        lm(
            "GPTNeoForCausalLM",
            {
                "vocab_size": VOCABULARY,
                "hidden_size": 32,
                "num_layers": 2,
                "num_heads": 4,
                "attention_types": [[["global", "local"], 1]],
                "max_position_embeddings": 64,
                "bos_token_id": 2,
                "eos_token_id": 3,
            },
        ),
        lm("GPTNeoXForCausalLM", head=("embed_out", "lm_head")),
        lm("GPTJForCausalLM", {**GPT, "rotary_dim": 4}),
        lm("GPTBigCodeForCausalLM", GPT),
        lm("CodeGenForCausalLM", {**GPT, "rotary_dim": 4}),
        lm("OpenAIGPTLMHeadModel", GPT),
        lm("LlamaForCausalLM", GROUPED),
        lm("LlamaForCausalLM", {**GROUPED, "tie_word_embeddings": True}, label="tied"),
        lm("MistralForCausalLM", GROUPED),
        lm("MixtralForCausalLM", EXPERTS),
        lm("GemmaForCausalLM", GROUPED),
        lm("Gemma2ForCausalLM", GROUPED, changed=True),
        lm("Gemma3ForCausalLM", GROUPED),
        lm("Qwen2ForCausalLM", GROUPED),
        lm("Qwen3ForCausalLM", GROUPED),
        lm("Qwen2MoeForCausalLM", {**EXPERTS, "shared_expert_intermediate_size": 32}),
        lm("Qwen3MoeForCausalLM", EXPERTS),
        lm("PhiForCausalLM", GROUPED),
        lm("Phi3ForCausalLM", GROUPED),
        lm("OPTForCausalLM", {**SMALL, "ffn_dim": 64, "word_embed_proj_dim": 32}),
        lm("BloomForCausalLM", {**SMALL, "n_layer": 2, "n_head": 4}),
        lm("FalconForCausalLM", SMALL),
        lm(
            "MptForCausalLM",
            {"vocab_size": VOCABULARY, "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64},
        ),
        lm("MambaForCausalLM", {**SMALL, "state_size": 4}),
        lm(
            "Mamba2ForCausalLM",
            {**SMALL, "state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 8},
        ),
        lm("RwkvForCausalLM", {**SMALL, "attention_hidden_size": 32, "context_length": 64}, head="head"),
        lm("StableLmForCausalLM", GROUPED),
        lm("OlmoForCausalLM", GROUPED),
        lm("Olmo2ForCausalLM", GROUPED),
        lm("Starcoder2ForCausalLM", GROUPED),
        lm("SmolLM3ForCausalLM", GROUPED),
        lm("CohereForCausalLM", GROUPED, scaled=True),
        lm("GraniteForCausalLM", GROUPED),
        lm("GptOssForCausalLM", EXPERTS),
        lm("PersimmonForCausalLM", SMALL),
        lm(
            "XGLMForCausalLM",
            {"vocab_size": VOCABULARY, "d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 64},
        ),
        lm("BioGptForCausalLM", SMALL, head="output_projection"),
        lm("CTRLLMHeadModel", {**GPT, "dff": 64}),
        lm("BertLMHeadModel", {**SMALL, "is_decoder": True}, head="cls.predictions.decoder"),
        lm(
            "RecurrentGemmaForCausalLM",
            {**GROUPED, "lru_width": 32, "attention_window_size": 16, "num_hidden_layers": 3},
            changed=True,
        ),
    ]


TABLE = Table("transformers: causal LM", PACKAGES, _make)
