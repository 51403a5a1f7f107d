"""Models of pictures and text of transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tests.zoo.configuration import Configuration, Table
from tests.zoo.kits import ROWS, as_rows, labels, reals, tokens, trainer
from tests.zoo.tables.causal_lm import GPT, GROUPED
from tests.zoo.tables.hub_models import PACKAGES, SMALL, VOCABULARY, case
from tests.zoo.tables.vision import PATCHES

EYES = {key: value for key, value in PATCHES.items() if key != "num_labels"}
CLIP: dict[str, Any] = {"text_config": SMALL, "vision_config": EYES, "projection_dim": 16}
IMAGE = 7
"""The token in whose places the picture's features are put."""


def _pairs(model: Any) -> list[dict[str, Any]]:
    found = tokens(VOCABULARY)
    return [
        {**row, "return_loss": True}
        for row in as_rows(
            input_ids=found, attention_mask=torch.ones_like(found), pixel_values=reals(3, 32, 32)
        )
    ]


def _pairs_collated(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0] if key != "return_loss"} | {
        "return_loss": True
    }


def _described(model: Any) -> list[dict[str, Any]]:
    return as_rows(pixel_values=reals(3, 32, 32), labels=tokens(VOCABULARY))


def _seen_text(model: Any) -> list[dict[str, Any]]:
    found = tokens(VOCABULARY, 24, 8)
    found[:, :16] = IMAGE
    return as_rows(
        input_ids=found,
        attention_mask=torch.ones_like(found),
        pixel_values=reals(3, 32, 32),
        labels=found.clone(),
    )


def _captioner() -> nn.Module:
    from transformers import GPT2Config, VisionEncoderDecoderConfig, VisionEncoderDecoderModel, ViTConfig

    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(ViTConfig(**EYES), GPT2Config(**GPT))
    config.decoder_start_token_id, config.pad_token_id = 2, 1
    return VisionEncoderDecoderModel(config=config)


def _berts() -> nn.Module:
    from transformers import BertConfig, EncoderDecoderConfig, EncoderDecoderModel

    config = EncoderDecoderConfig.from_encoder_decoder_configs(BertConfig(**SMALL), BertConfig(**SMALL))
    config.decoder_start_token_id, config.pad_token_id = 2, 1
    return EncoderDecoderModel(config=config)


def _make() -> list[Configuration]:
    pairs = {"arguments": {"keywords": lambda model: {"data_collator": _pairs_collated}}}
    none: dict[str, Any] = {"classes": False, "soft": True, "scaled": True}
    return [
        case("CLIPModel", None, _pairs, CLIP, **none, **pairs),
        case("SiglipModel", None, _pairs, {"text_config": SMALL, "vision_config": EYES}, **none, **pairs),
        case(
            "CLIPForImageClassification",
            "classifier",
            lambda model: as_rows(pixel_values=reals(3, 32, 32), labels=labels(5)),
            {**CLIP, "num_labels": 5},
        ),
        case(
            "BlipForConditionalGeneration",
            "text_decoder.cls.predictions.decoder",
            lambda model: as_rows(
                pixel_values=reals(3, 32, 32), input_ids=tokens(VOCABULARY), labels=tokens(VOCABULARY)
            ),
            {"text_config": {**SMALL, "encoder_hidden_size": 32, "is_decoder": True}, "vision_config": EYES},
            soft=True,
        ),
        case(
            "GitForCausalLM",
            "output",
            lambda model: as_rows(
                pixel_values=reals(3, 32, 32), input_ids=tokens(VOCABULARY), labels=tokens(VOCABULARY)
            ),
            {**SMALL, "vision_config": EYES},
        ),
        Configuration(
            "VisionEncoderDecoderModel (ViT, GPT-2)", trainer(_captioner, _described), "decoder.lm_head"
        ),
        Configuration(
            "EncoderDecoderModel (BERT, BERT)",
            trainer(_berts, lambda model: as_rows(input_ids=tokens(VOCABULARY), labels=tokens(VOCABULARY))),
            "decoder.cls.predictions.decoder",
        ),
        case(
            "LlavaForConditionalGeneration",
            "lm_head",
            _seen_text,
            {
                "text_config": {**GROUPED, "model_type": "llama"},
                "vision_config": {**EYES, "model_type": "clip_vision_model"},
                "image_token_index": IMAGE,
                "image_seq_length": 16,
                "vision_feature_layer": -1,
            },
        ),
        case(
            "ViltForQuestionAnswering",
            "classifier.3",
            lambda model: as_rows(
                input_ids=tokens(VOCABULARY),
                attention_mask=torch.ones(ROWS, 12, dtype=torch.long),
                pixel_values=reals(3, 32, 32),
                pixel_mask=torch.ones(ROWS, 32, 32, dtype=torch.long),
                labels=labels(2, 5).float(),
            ),
            {**SMALL, **EYES, "num_labels": 5},
            shift_invariant=False,
            soft=True,
        ),
    ]


TABLE = Table("transformers: pictures and text", PACKAGES, _make)
