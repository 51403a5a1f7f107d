"""Segmentation and depth models of transformers: their heads are convolutions."""

from __future__ import annotations

from typing import Any

from tests.zoo.configuration import Configuration, Table
from tests.zoo.kits import labels
from tests.zoo.tables.hub_models import PACKAGES, case, images
from tests.zoo.tables.vision import MIT, PATCHES

PIXELS = images(labels=labels(5, 32, 32))


def _make() -> list[Configuration]:
    from transformers import ConvNextConfig

    convnext = ConvNextConfig(
        num_stages=4,
        hidden_sizes=[8, 16, 24, 32],
        depths=[1] * 4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    upernet: dict[str, Any] = {
        "backbone_config": convnext,
        "hidden_size": 16,
        "pool_scales": [1, 2],
        "auxiliary_in_channels": 24,
        "auxiliary_channels": 16,
        "num_labels": 5,
        "use_auxiliary_head": True,
    }
    beit = {
        **PATCHES,
        "num_hidden_layers": 4,
        "out_indices": [1, 2, 3, 4],
        "use_auxiliary_head": False,
        "pool_scales": [1, 2],
    }
    dpt: dict[str, Any] = {
        **PATCHES,
        "num_hidden_layers": 4,
        "backbone_out_indices": [0, 1, 2, 3],
        "is_hybrid": False,
        "neck_hidden_sizes": [8, 16, 16, 16],
        "fusion_hidden_size": 16,
        "use_auxiliary_head": True,
        "backbone_config": None,
    }
    mobile: dict[str, Any] = {
        "hidden_sizes": [16, 16, 16],
        "neck_hidden_sizes": [8, 8, 16, 16, 16, 16, 16],
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 2,
        "num_labels": 5,
        "aspp_out_channels": 16,
        "atrous_rates": [1, 2, 3],
    }
    return [
        case("SegformerForSemanticSegmentation", "decode_head.classifier", PIXELS, MIT, **RESIZED),
        case(
            "UperNetForSemanticSegmentation",
            "decode_head.classifier",
            PIXELS,
            upernet,
            true_notes=("several_heads",),
            **RESIZED,
        ),
        case(
            "UperNetForSemanticSegmentation",
            "decode_head.classifier",
            PIXELS,
            {**upernet, "use_auxiliary_head": False},
            label="no auxiliary head",
            **RESIZED,
        ),
        case(
            "UperNetForSemanticSegmentation",
            "decode_head.classifier",
            PIXELS,
            upernet,
            label="head named",
            arguments={"options": {"head": "decode_head.classifier"}},
            **RESIZED,
        ),
        case("BeitForSemanticSegmentation", "decode_head.classifier", PIXELS, beit, **RESIZED),
        case("DPTForSemanticSegmentation", "head.head.4", PIXELS, dpt, **RESIZED),
        case(
            "MobileViTForSemanticSegmentation",
            "segmentation_head.classifier.convolution",
            PIXELS,
            mobile,
            **RESIZED,
        ),
        case(
            "MobileNetV2ForSemanticSegmentation",
            "segmentation_head.classifier.convolution",
            PIXELS,
            {"depth_multiplier": 0.35, "num_labels": 5},
            **RESIZED,
        ),
    ]


RESIZED: dict[str, Any] = {"changed": True}
"""The logits are enlarged to the picture's size after the head."""

TABLE = Table("transformers: segmentation", PACKAGES, _make)
