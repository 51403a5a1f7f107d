"""torchvision, segmentation_models_pytorch, OpenCLIP, vit-pytorch and x-transformers in plain loops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.zoo.configuration import STEPS, Configuration, Table
from tests.zoo.kits import loop
from tests.zoo.session import Session
from tests.zoo.tables.plain_loops import batch


def _loss(size: int = 32) -> Callable[[nn.Module, int], Tensor]:
    def loss(model: nn.Module, step: int) -> Tensor:
        x, y = batch(step, 3, size, size)
        out = model(x)
        return F.cross_entropy(out.logits if hasattr(out, "logits") else out, y)

    return loss


def _pixels(step: int, size: int = 32) -> tuple[Tensor, Tensor]:
    x, _ = batch(step, 3, size, size)
    return x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long()


def _dense(model: nn.Module, step: int) -> Tensor:
    x, y = _pixels(step)
    out = model(x)
    return F.cross_entropy(out["out"] if isinstance(out, dict) else out, y)


def _dense_auxiliary(model: nn.Module, step: int) -> Tensor:
    x, y = _pixels(step)
    out = model(x)
    return F.cross_entropy(out["out"], y) + 0.4 * F.cross_entropy(out["aux"], y)


def _dice(model: nn.Module, step: int) -> Tensor:
    from segmentation_models_pytorch.losses import DiceLoss

    x, y = _pixels(step)
    found: Tensor = DiceLoss("multiclass")(model(x), y)
    return found


def _clip(model: nn.Module, step: int) -> Tensor:
    from open_clip import ClipLoss

    x, _ = batch(step, 3, 32, 32)
    text = torch.randint(1, 60, (4, 12), generator=torch.Generator().manual_seed(step))
    found: Tensor = ClipLoss()(*model(x, text)[:3])
    return found


def _open_clip() -> nn.Module:
    from open_clip.model import CLIP

    return CLIP(
        embed_dim=16,
        vision_cfg={"image_size": 32, "layers": 2, "width": 64, "patch_size": 8},
        text_cfg={"context_length": 12, "vocab_size": 64, "width": 64, "heads": 2, "layers": 2},
    )


def _autoregressive(session: Session) -> nn.Module:
    """x-transformers' wrapper computes the loss inside."""
    from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper

    model = AutoregressiveWrapper(
        TransformerWrapper(num_tokens=64, max_seq_len=32, attn_layers=Decoder(dim=32, depth=2, heads=4))
    )
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    session.attach(model, optimizer)
    for step in range(STEPS):
        loss = model(torch.randint(0, 64, (4, 16), generator=torch.Generator().manual_seed(step)))
        loss.backward()
        session.observe(loss)
        optimizer.step()
        optimizer.zero_grad()
    return model


def _others() -> list[Configuration]:
    import segmentation_models_pytorch as smp
    import vit_pytorch

    def unet() -> nn.Module:
        return smp.Unet("resnet18", encoder_weights=None, classes=3)

    return [
        Configuration("smp: U-Net", loop(unet, _dense), "segmentation_head.0"),
        Configuration("smp: U-Net, Dice loss", loop(unet, _dice), "segmentation_head.0", soft=True),
        Configuration(
            "smp: U-Net, head named", loop(unet, _dense, head="segmentation_head.0"), "segmentation_head.0"
        ),
        Configuration(
            "smp: DeepLabV3+",
            loop(lambda: smp.DeepLabV3Plus("resnet18", encoder_weights=None, classes=3), _dense),
            "segmentation_head.0",
            **RESIZED,
        ),
        Configuration("OpenCLIP", loop(_open_clip, _clip), None, classes=False, soft=True, scaled=True),
        Configuration(
            "vit-pytorch: ViT",
            loop(
                lambda: vit_pytorch.ViT(
                    image_size=32, patch_size=8, num_classes=5, dim=32, depth=2, heads=4, mlp_dim=64
                ),
                _loss(),
            ),
            ("mlp_head", "linear_head"),
        ),
        Configuration(
            "vit-pytorch: SimpleViT",
            loop(
                lambda: vit_pytorch.SimpleViT(
                    image_size=32, patch_size=8, num_classes=5, dim=32, depth=2, heads=4, mlp_dim=64
                ),
                _loss(),
            ),
            "linear_head",
        ),
        Configuration("x-transformers: AutoregressiveWrapper", _autoregressive, "net.to_logits"),
    ]


RESIZED: dict[str, Any] = {"changed": True}


def _make() -> list[Configuration]:
    from torchvision import models
    from torchvision.models import segmentation

    def tv(name: str, head: str | tuple[str, ...], size: int = 32, **config: Any) -> Configuration:
        return Configuration(
            f"torchvision: {name}",
            loop(lambda: getattr(models, name)(weights=None, num_classes=5, **config), _loss(size)),
            head,
        )

    dense = {"weights": None, "weights_backbone": None, "num_classes": 3}
    return [
        tv("resnet18", "fc"),
        tv("mobilenet_v3_small", "classifier.3"),
        tv("efficientnet_b0", "classifier.1"),
        tv("squeezenet1_1", ("classifier", "classifier.1"), 64),
        tv("shufflenet_v2_x0_5", "fc"),
        tv("mnasnet0_5", "classifier.1"),
        tv("googlenet", "fc", 64, aux_logits=False, init_weights=False),
        Configuration(
            "torchvision: LRASPP",
            loop(lambda: segmentation.lraspp_mobilenet_v3_large(**dense), _dense),
            ("classifier.low_classifier", "classifier.high_classifier"),
            true_notes=("several_heads",),
            **RESIZED,
        ),
        Configuration(
            "torchvision: DeepLabV3",
            loop(lambda: segmentation.deeplabv3_mobilenet_v3_large(**dense), _dense),
            "classifier.4",
            **RESIZED,
        ),
        Configuration(
            "torchvision: DeepLabV3, auxiliary loss",
            loop(lambda: segmentation.deeplabv3_mobilenet_v3_large(**dense, aux_loss=True), _dense_auxiliary),
            "classifier.4",
            true_notes=("several_heads",),
            **RESIZED,
        ),
        *_others(),
    ]


TABLE = Table(
    "other vision and language models",
    ("torchvision", "segmentation-models-pytorch", "open-clip-torch", "vit-pytorch", "x-transformers"),
    _make,
)
