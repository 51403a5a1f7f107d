"""Masked language models of transformers."""

from __future__ import annotations

from typing import Any

import torch

from tests.zoo.configuration import Configuration, Table
from tests.zoo.tables.hub_models import (
    PACKAGES,
    SMALL,
    VOCABULARY,
    case,
    labels,
    masked,
    text_with,
)

DISTIL = {
    "vocab_size": VOCABULARY,
    "dim": 32,
    "n_layers": 2,
    "n_heads": 4,
    "hidden_dim": 64,
    "max_position_embeddings": 64,
    "pad_token_id": 1,
}
DEBERTA = {
    **SMALL,
    "relative_attention": True,
    "pos_att_type": ["c2p", "p2c"],
    "position_buckets": 8,
    "type_vocab_size": 0,
}


def _make() -> list[Configuration]:
    def mlm(model: str, head: str, config: dict[str, Any] | None = None, **facts: Any) -> Configuration:
        return case(model, head, masked, config, **facts)

    return [
        mlm("BertForMaskedLM", "cls.predictions.decoder"),
        mlm("RobertaForMaskedLM", "lm_head.decoder"),
        mlm("XLMRobertaForMaskedLM", "lm_head.decoder"),
        mlm("CamembertForMaskedLM", "lm_head.decoder"),
        mlm("DistilBertForMaskedLM", "vocab_projector", DISTIL),
        mlm("AlbertForMaskedLM", "predictions.decoder", {**SMALL, "embedding_size": 16}),
        mlm("ElectraForMaskedLM", "generator_lm_head", {**SMALL, "embedding_size": 32}),
        mlm("DebertaForMaskedLM", "cls.predictions.decoder", DEBERTA),
        mlm("DebertaV2ForMaskedLM", "cls.predictions.decoder", DEBERTA),
        mlm("MPNetForMaskedLM", "lm_head.decoder"),
        mlm(
            "ModernBertForMaskedLM",
            "decoder",
            {**SMALL, "cls_token_id": 2, "sep_token_id": 3, "reference_compile": False},
        ),
        mlm(
            "MobileBertForMaskedLM",
            ("cls.predictions.decoder", "cls.predictions.dense"),
            {**SMALL, "embedding_size": 32, "intra_bottleneck_size": 32, "true_hidden_size": 32},
        ),
        mlm("ConvBertForMaskedLM", "generator_lm_head", {**SMALL, "embedding_size": 32}),
        mlm("FNetForMaskedLM", "cls.predictions.decoder"),
        mlm("EsmForMaskedLM", "lm_head.decoder", {**SMALL, "mask_token_id": 4}),
        mlm("SqueezeBertForMaskedLM", "cls.predictions.decoder", {**SMALL, "embedding_size": 32}),
        mlm(
            "XLMWithLMHeadModel",
            "pred_layer.proj",
            {
                "vocab_size": VOCABULARY,
                "emb_dim": 32,
                "n_layers": 2,
                "n_heads": 4,
                "pad_index": 1,
                "n_langs": 1,
            },
        ),
        case(
            "BertForPreTraining",
            "cls.predictions.decoder",
            lambda model: [
                {**row, "next_sentence_label": torch.tensor(i % 2)} for i, row in enumerate(masked(model))
            ],
            true_notes=("several_heads",),
        ),
        case("BertForNextSentencePrediction", "cls.seq_relationship", text_with(labels=labels(2))),
        case(
            "ElectraForPreTraining",
            "discriminator_predictions.dense_prediction",
            text_with(labels=labels(2, 12)),
            {**SMALL, "embedding_size": 32},
            classes=False,
        ),
    ]


TABLE = Table("transformers: masked LM", PACKAGES, _make)
