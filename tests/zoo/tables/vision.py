"""Image classification, detection and pre-training of transformers."""

from __future__ import annotations

from typing import Any

import torch

from tests.zoo.configuration import Configuration, Table
from tests.zoo.kits import ROWS, as_rows, labels, reals
from tests.zoo.tables.hub_models import PACKAGES, case, classes, images

PATCHES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
    "num_labels": 5,
}
SWIN: dict[str, Any] = {
    "embed_dim": 16,
    "depths": [1, 1],
    "num_heads": [2, 4],
    "window_size": 4,
    "image_size": 32,
    "patch_size": 4,
    "num_labels": 5,
}
RESNET: dict[str, Any] = {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1], "num_labels": 5}
CONVNEXT: dict[str, Any] = {
    "hidden_sizes": [16, 32],
    "depths": [1, 1],
    "num_labels": 5,
    "num_stages": 2,
    "patch_size": 4,
}
MIT: dict[str, Any] = {
    "num_encoder_blocks": 2,
    "depths": [1, 1],
    "sr_ratios": [2, 1],
    "hidden_sizes": [16, 32],
    "patch_sizes": [7, 3],
    "strides": [4, 2],
    "num_attention_heads": [1, 2],
    "mlp_ratios": [2, 2],
    "decoder_hidden_size": 32,
    "num_labels": 5,
}
PICTURES = images(**classes())


def _detection(model: Any) -> list[dict[str, Any]]:
    boxes = torch.rand(ROWS, 2, 4, generator=torch.Generator().manual_seed(4)) * 0.4 + 0.2
    kinds = labels(3, 2)
    return [
        {"pixel_values": picture, "labels": {"class_labels": kinds[i], "boxes": boxes[i]}}
        for i, picture in enumerate(reals(3, 64, 64))
    ]


def _collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "pixel_values": torch.stack([row["pixel_values"] for row in rows]),
        "labels": [row["labels"] for row in rows],
    }


DETECTION: dict[str, Any] = {"arguments": {"keywords": lambda model: {"data_collator": _collate}}}


def _masks(model: Any) -> list[dict[str, Any]]:
    patches = torch.rand(ROWS, 16, generator=torch.Generator().manual_seed(5)) > 0.5
    return as_rows(pixel_values=reals(3, 32, 32), bool_masked_pos=patches)


def _make() -> list[Configuration]:
    from transformers import ResNetConfig

    backbone = ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], out_features=["stage2"])
    detr: dict[str, Any] = {
        "backbone_config": backbone,
        "use_timm_backbone": False,
        "use_pretrained_backbone": False,
        "d_model": 32,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 64,
        "decoder_ffn_dim": 64,
        "num_queries": 6,
        "num_labels": 3,
    }
    boxes: dict[str, Any] = {"true_notes": ("several_heads",), **DETECTION}
    return [
        case("ViTForImageClassification", "classifier", PICTURES, PATCHES),
        case("DeiTForImageClassification", "classifier", PICTURES, PATCHES),
        case("BeitForImageClassification", "classifier", PICTURES, PATCHES),
        case("Dinov2ForImageClassification", "classifier", PICTURES, PATCHES),
        case("ViTMSNForImageClassification", "classifier", PICTURES, PATCHES),
        case("SwinForImageClassification", "classifier", PICTURES, SWIN),
        case("Swinv2ForImageClassification", "classifier", PICTURES, SWIN),
        case("ConvNextForImageClassification", "classifier", PICTURES, CONVNEXT),
        case("ConvNextV2ForImageClassification", "classifier", PICTURES, CONVNEXT),
        case("ResNetForImageClassification", "classifier.1", PICTURES, RESNET),
        case("RegNetForImageClassification", "classifier.1", PICTURES, {**RESNET, "groups_width": 16}),
        case("BitForImageClassification", "classifier.1", PICTURES, {**RESNET, "num_groups": 4}),
        case(
            "PoolFormerForImageClassification",
            "classifier",
            PICTURES,
            {
                "hidden_sizes": [16, 32],
                "depths": [1, 1],
                "num_encoder_blocks": 2,
                "num_labels": 5,
                "patch_sizes": [7, 3],
                "strides": [4, 2],
                "padding": [2, 1],
            },
        ),
        case(
            "FocalNetForImageClassification",
            "classifier",
            PICTURES,
            {
                "image_size": 32,
                "patch_size": 4,
                "embed_dim": 16,
                "hidden_sizes": [16, 32],
                "depths": [1, 1],
                "focal_levels": [1, 1],
                "focal_windows": [3, 3],
                "num_labels": 5,
            },
        ),
        case(
            "MobileNetV2ForImageClassification",
            "classifier",
            PICTURES,
            {"depth_multiplier": 0.35, "num_labels": 5},
        ),
        case("SegformerForImageClassification", "classifier", PICTURES, MIT),
        case(
            "PvtV2ForImageClassification",
            "classifier",
            PICTURES,
            {
                "num_encoder_blocks": 2,
                "depths": [1, 1],
                "sr_ratios": [2, 1],
                "hidden_sizes": [16, 32],
                "patch_sizes": [7, 3],
                "strides": [4, 2],
                "num_attention_heads": [1, 2],
                "mlp_ratios": [2, 2],
                "image_size": 32,
                "num_labels": 5,
            },
        ),
        case(
            "ViTForMaskedImageModeling",
            ("decoder.0", None),
            _masks,
            {**PATCHES, "encoder_stride": 8},
            classes=False,
        ),
        case(
            "ViTMAEForPreTraining",
            ("decoder.decoder_pred", None),
            images(),
            {
                **PATCHES,
                "decoder_hidden_size": 32,
                "decoder_num_hidden_layers": 1,
                "decoder_num_attention_heads": 4,
                "decoder_intermediate_size": 64,
            },
            classes=False,
        ),
        case(
            "YolosForObjectDetection",
            "class_labels_classifier.layers.2",
            _detection,
            {**PATCHES, "image_size": [64, 64], "patch_size": 16, "num_detection_tokens": 6, "num_labels": 3},
            **boxes,
        ),
        case("DetrForObjectDetection", "class_labels_classifier", _detection, detr, **boxes),
        case(
            "ConditionalDetrForObjectDetection",
            "class_labels_classifier",
            _detection,
            detr,
            shift_invariant=False,
            soft=True,
            **boxes,
        ),
        case("TableTransformerForObjectDetection", "class_labels_classifier", _detection, detr, **boxes),
    ]


TABLE = Table("transformers: vision", PACKAGES, _make)
