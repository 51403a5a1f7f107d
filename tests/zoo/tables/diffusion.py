"""The training loss of diffusers: a regression of noise, without classes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.zoo.configuration import Configuration, Table
from tests.zoo.kits import loop
from tests.zoo.tables.plain_loops import batch


def _noise_loss(
    call: Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor], channels: int = 3, flow: bool = False
) -> Any:
    def loss(model: nn.Module, step: int) -> Tensor:
        from diffusers import DDPMScheduler

        clean, kinds = batch(step, channels, 16, 16)
        generator = torch.Generator().manual_seed(step)
        noise = torch.randn(clean.shape, generator=generator)
        if flow:
            at = torch.rand(4, generator=generator)
            mixed = torch.lerp(clean, noise, at[:, None, None, None])
            return F.mse_loss(call(model, mixed, at * 1000, kinds), noise - clean)
        times = torch.randint(0, 1000, (4,), generator=generator)
        return F.mse_loss(call(model, DDPMScheduler().add_noise(clean, noise, times), times, kinds), noise)

    return loss


def _unet() -> nn.Module:
    from diffusers import UNet2DModel

    return UNet2DModel(
        sample_size=16,
        in_channels=3,
        out_channels=3,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )


def _conditioned() -> nn.Module:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=16,
        attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )


def _dit() -> nn.Module:
    from diffusers import DiTTransformer2DModel

    return DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=3,
        out_channels=3,
        num_layers=2,
        sample_size=16,
        patch_size=4,
        norm_num_groups=1,
    )


def _vae() -> nn.Module:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(16,),
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        norm_num_groups=8,
        sample_size=16,
    )


def _controlled() -> nn.Module:
    from diffusers import UNet2DConditionModel
    from peft import LoraConfig

    model = _conditioned()
    assert isinstance(model, UNet2DConditionModel)
    model.requires_grad_(False)
    model.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_v"]))
    return model


def _reconstruction(model: nn.Module, step: int) -> Tensor:
    x, _ = batch(step, 3, 16, 16)
    latent = model.encode(x).latent_dist
    return (
        F.mse_loss(model.decode(latent.sample(torch.Generator().manual_seed(step))).sample, x)
        + 1e-6 * latent.kl().mean()
    )


def _of_trainable(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3)


def _make() -> list[Configuration]:
    words = torch.randn(4, 5, 16, generator=torch.Generator().manual_seed(9))
    plain = _noise_loss(lambda model, x, t, y: model(x, t).sample)
    conditioned = _noise_loss(lambda model, x, t, y: model(x, t, encoder_hidden_states=words).sample, 4)
    dit = _noise_loss(lambda model, x, t, y: model(x, timestep=t.long(), class_labels=y).sample)
    flow = _noise_loss(lambda model, x, t, y: model(x, t).sample, flow=True)
    none: dict[str, Any] = {"classes": False}
    return [
        Configuration("UNet2D, noise", loop(_unet, plain), ("conv_out", None), **none),
        Configuration("UNet2D, flow matching", loop(_unet, flow), ("conv_out", None), **none),
        Configuration("UNet2D, head=False", loop(_unet, plain, head=False), None, **none),
        Configuration("UNet2DCondition, noise", loop(_conditioned, conditioned), ("conv_out", None), **none),
        Configuration(
            "UNet2DCondition, LoRA", loop(_controlled, conditioned, _of_trainable), ("conv_out", None), **none
        ),
        Configuration("DiT, noise", loop(_dit, dit), ("proj_out_2", None), **none),
        Configuration("AutoencoderKL", loop(_vae, _reconstruction), ("decoder.conv_out", None), **none),
    ]


TABLE = Table("diffusers", ("diffusers", "peft"), _make)
