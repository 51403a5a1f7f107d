"""Language models, and models of pictures and text, of 2025 and 2026."""

from __future__ import annotations

from typing import Any

from tests.zoo.configuration import Configuration, Table
from tests.zoo.tables.causal_lm import EXPERTS, GROUPED
from tests.zoo.tables.hub_models import PACKAGES, case, classes, images, language, masked, text_with
from tests.zoo.tables.vision import PATCHES

LATENT: dict[str, Any] = {
    **EXPERTS,
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
LINEAR: dict[str, Any] = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 4,
    "layer_types": ["linear_attention", "full_attention"],
}


def _make() -> list[Configuration]:
    def lm(model: str, config: dict[str, Any] | None = None, **facts: Any) -> Configuration:
        return case(model, "lm_head", language, GROUPED if config is None else config, **facts)

    return [
        lm("DeepseekV3ForCausalLM", LATENT),
        lm("Qwen3NextForCausalLM", {**EXPERTS, **LINEAR, "shared_expert_intermediate_size": 32}),
        lm("Qwen3_5ForCausalLM", {**GROUPED, **LINEAR}),
        lm("Glm4ForCausalLM"),
        lm("Glm4MoeForCausalLM", {**EXPERTS, "n_routed_experts": 4, "n_group": 1, "topk_group": 1}),
        lm("Olmo3ForCausalLM"),
        lm("Lfm2ForCausalLM", {**GROUPED, "layer_types": ["conv", "full_attention"]}),
        lm("NanoChatForCausalLM", changed=True),
        lm("Ministral3ForCausalLM"),
        lm("Ernie4_5ForCausalLM"),
        lm("Exaone4ForCausalLM"),
        lm("ApertusForCausalLM"),
        lm("Cohere2ForCausalLM", scaled=True),
        lm("MiniMaxM2ForCausalLM", EXPERTS),
        lm("HunYuanDenseV1ForCausalLM"),
        lm("NemotronForCausalLM"),
        lm("BitNetForCausalLM"),
        lm(
            "FalconH1ForCausalLM",
            {
                **GROUPED,
                "mamba_d_ssm": 32,
                "mamba_n_heads": 4,
                "mamba_d_head": 8,
                "mamba_d_state": 8,
                "mamba_chunk_size": 8,
            },
        ),
        lm(
            "GraniteMoeHybridForCausalLM",
            {
                **EXPERTS,
                "mamba_n_heads": 8,
                "mamba_d_head": 8,
                "mamba_d_state": 8,
                "layer_types": ["mamba", "attention"],
                "shared_intermediate_size": 32,
            },
        ),
        lm("xLSTMForCausalLM", {**GROUPED, "num_heads": 4, "chunk_size": 4, "mode": "train"}, changed=True),
        lm(
            "Gemma3nForCausalLM",
            {
                **GROUPED,
                "vocab_size_per_layer_input": 96,
                "hidden_size_per_layer_input": 8,
                "laurel_rank": 4,
                "num_kv_shared_layers": 0,
                "activation_sparsity_pattern": [0.0, 0.0],
                "layer_types": ["sliding_attention", "full_attention"],
            },
            changed=True,
        ),
        case("ModernBertDecoderForCausalLM", "decoder", language, GROUPED),
        case("EuroBertForMaskedLM", "lm_head", masked, GROUPED),
        case("Qwen3ForSequenceClassification", "score", text_with(**classes()), {**GROUPED, "num_labels": 5}),
        case(
            "Gemma3TextForSequenceClassification",
            "score",
            text_with(**classes()),
            {**GROUPED, "num_labels": 5},
        ),
        case("Dinov2WithRegistersForImageClassification", "classifier", images(**classes()), PATCHES),
        case("IJepaForImageClassification", "classifier", images(**classes()), PATCHES),
        case(
            "SiglipForImageClassification",
            "classifier",
            images(**classes()),
            {"vision_config": PATCHES, "num_labels": 5},
        ),
    ]


TABLE = Table("transformers: models of 2025 and 2026", PACKAGES, _make)
