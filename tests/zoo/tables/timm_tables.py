"""timm's models, losses and optimizers in a plain loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from tests.zoo.configuration import Configuration, Table
from tests.zoo.kits import loop
from tests.zoo.tables.plain_loops import batch

SIZE = 32


def _model(name: str, **config: Any) -> Callable[[], nn.Module]:
    def made() -> nn.Module:
        import timm

        model: nn.Module = timm.create_model(name, pretrained=False, num_classes=5, **config)
        return model

    return made


def _loss(
    make: Callable[[], Any] = nn.CrossEntropyLoss, size: int = SIZE
) -> Callable[[nn.Module, int], Tensor]:
    def loss(model: nn.Module, step: int) -> Tensor:
        x, y = batch(step, 3, size, size)
        found: Tensor = make()(model(x), y)
        return found

    return loss


def _mixed(model: nn.Module, step: int) -> Tensor:
    from timm.loss import SoftTargetCrossEntropy

    x, y = batch(step, 3, SIZE, SIZE)
    soft = 0.7 * F.one_hot(y, 5).float() + 0.3 * F.one_hot(y.flip(0), 5).float()
    found: Tensor = SoftTargetCrossEntropy()(model(0.7 * x + 0.3 * x.flip(0)), soft)
    return found


def _bce(model: nn.Module, step: int) -> Tensor:
    from timm.loss import BinaryCrossEntropy

    x, y = batch(step, 3, SIZE, SIZE)
    found: Tensor = BinaryCrossEntropy(smoothing=0.1)(model(x), y)
    return found


def _two_classifiers(model: nn.Module, step: int) -> Tensor:
    x, y = batch(step, 3, SIZE, SIZE)
    out = model(x)
    if isinstance(out, tuple):
        out = (out[0] + out[1]) / 2
    return F.cross_entropy(out, y)


def _optimizer(name: str) -> Callable[[nn.Module], Any]:
    def made(model: nn.Module) -> Any:
        from timm.optim import create_optimizer_v2

        return create_optimizer_v2(model, opt=name, lr=1e-3)

    return made


VIT: dict[str, Any] = {"img_size": SIZE, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4}


def _make() -> list[Configuration]:
    from timm.loss import LabelSmoothingCrossEntropy

    plain = _loss()

    def net(
        name: str,
        head: Any,
        *,
        size: int = SIZE,
        label: str = "",
        loss: Any = None,
        facts: dict[str, Any] | None = None,
        **config: Any,
    ) -> Configuration:
        chosen = loss or (plain if size == SIZE else _loss(size=size))
        return Configuration(
            f"{name} ({label})" if label else name,
            loop(_model(name, **config), chosen),
            head,
            **(facts or {}),
        )

    smoothed = _loss(lambda: LabelSmoothingCrossEntropy(0.1))
    return [
        net("vit_tiny_patch16_224", "head", **VIT),
        net("deit_tiny_patch16_224", "head", **VIT),
        net(
            "deit_tiny_distilled_patch16_224",
            ("head", "head, head_dist"),
            label="two classifiers, averaged",
            loss=_two_classifiers,
            facts={"changed": True, "true_notes": ("several_heads",)},
            **VIT,
        ),
        net("beit_base_patch16_224", "head", **VIT),
        net("cait_xxs24_224", "head", img_size=SIZE, patch_size=8, embed_dim=32, depth=2, num_heads=4),
        net("mixer_s16_224", "head", img_size=SIZE),
        net(
            "swin_tiny_patch4_window7_224",
            "head.fc",
            img_size=SIZE,
            patch_size=4,
            window_size=4,
            embed_dim=16,
            depths=(1, 1),
            num_heads=(2, 4),
        ),
        net("resnet10t", "fc"),
        net("resnext50_32x4d", "fc", layers=[1, 1, 1, 1]),
        net("convnext_atto", "head.fc", depths=(1, 1, 1, 1), dims=(8, 16, 16, 32)),
        net("efficientnet_lite0", "classifier"),
        net("mobilenetv3_small_050", "classifier"),
        net("densenet121", "classifier", growth_rate=8, block_config=(1, 1, 1, 1)),
        net("regnetx_002", "head.fc"),
        net("ghostnet_050", "classifier"),
        net("dla34", "fc", size=32),
        net("repvgg_a0", "head.fc", size=32),
        net("poolformer_s12", "head.fc"),
        net("resmlp_12_224", "head", img_size=SIZE),
        net("mobilevit_xxs", "head.fc", size=64),
        net(
            "vit_tiny_patch16_224",
            "head",
            label="label smoothing",
            loss=smoothed,
            facts={"soft": True},
            **VIT,
        ),
        net(
            "vit_tiny_patch16_224",
            "head",
            label="mixup, soft targets",
            loss=_mixed,
            facts={"soft": True},
            **VIT,
        ),
        net(
            "resnet10t",
            "fc",
            label="binary cross-entropy",
            loss=_bce,
            facts={"soft": True, "shift_invariant": False},
        ),
        *(
            Configuration(
                f"optimizer {name}",
                loop(_model("vit_tiny_patch16_224", **VIT), plain, _optimizer(name)),
                "head",
            )
            for name in ("adamw", "lamb", "nadamw", "adopt", "lion", "muon", "mars")
        ),
    ]


TABLE = Table("timm", ("timm", "torchvision"), _make)
