"""Test on CIFAR-10 which image classifiers slingshot under full-batch Adam, and which remedies stop it.

Six networks (Liu et al. 2026, table 1) are trained the same way: Adam, lr 1e-3, β = (0.9, 0.95), no decay, no
augmentation, every row in every step. Three of them have two more arms: the loss in float64, and the gradient
of the logits projected to zero sum. Both arms leave the network and its parameters alone. VGG11, where the
projection is not enough, is also trained with this project's exact loss. VGG11 with BatchNorm right before
the head, and ResNet18, should not slingshot at all.

The quick preset divides widths and learns the digits of scikit-learn. The paper preset has full size and
needs CIFAR-10, from the hub or from --data-dir (vision_data.py lists the formats).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: import from the root of the checkout
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
import torch.nn.functional as F
from torch import Tensor

from examples.reference import cifar_claims, vision_data
from examples.reference.figures import loss_figure
from examples.reference.results import Results
from examples.reference.study import Plan, Preset, Study, Variant, command
from examples.reference.training import Record, Training
from examples.reference.vision_models import MODELS
from nfi_monitor import Monitor
from nfi_monitor.remedies import zero_sum_cross_entropy

WARM_UP = 10
CONVOLUTIONAL = ("vgg11", "resnet18")


def build(config: Mapping[str, Any], seed: int, device: torch.device) -> Training:
    """Build one training.

    Keys of ``config``: data, data_dir, model, divide, rows, test_rows, batch, micro, lr, beta2,
    measure_every, loss_dtype, project, exact.
    """
    train, test = vision_data.load(config["data"], config.get("data_dir"))
    x, y = vision_data.subset(train, config["rows"], seed)
    tested = vision_data.subset(test, config["test_rows"], seed)
    model = MODELS[config["model"]](vision_data.CLASSES, config["divide"]).to(device)
    if config["model"].startswith(CONVOLUTIONAL):
        # This changes the memory layout only: convolutions are a third faster with channels last.
        model.to(memory_format=torch.channels_last)
    x, y, x_test, y_test = (tensor.to(device) for tensor in (x, y, *tested))
    optimizer = torch.optim.Adam(model.parameters(), lr=config["lr"], betas=(0.9, config["beta2"]), eps=1e-8)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: min(1.0, (done + 1) / WARM_UP))
    loss_dtype = getattr(torch, config.get("loss_dtype", "float32"))
    cross_entropy = zero_sum_cross_entropy if config.get("exact") else F.cross_entropy

    def batch(number: int) -> tuple[Tensor, Tensor]:
        if config["batch"] is None:
            return x, y
        # Seed and step alone choose the rows: a resume needs no state, and every arm gets the same rows.
        generator = torch.Generator().manual_seed(1_000_003 * (seed + 1) + number)
        rows = torch.randperm(len(y), generator=generator)[: config["batch"]].to(device)
        return x[rows], y[rows]

    def step(number: int, monitor: Monitor) -> Tensor:
        inputs, targets = batch(number)
        total = torch.zeros((), dtype=torch.float64, device=device)
        for part, target in zip(inputs.split(config["micro"]), targets.split(config["micro"]), strict=True):
            logits = model(part)
            if config.get("project"):
                logits.register_hook(lambda grad: grad - grad.mean(-1, keepdim=True))
            share = len(target) / len(targets)
            loss = cross_entropy(logits.to(loss_dtype), target)
            (loss if share == 1 else loss * share).backward()
            total += loss.detach().double() * share
        monitor.observe_loss(total)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        return total

    def measure(done: int) -> dict[str, float]:
        model.eval()  # BatchNorm uses its running averages and does not change them
        logits = torch.cat([model(part) for part in x_test.split(config["micro"])])
        model.train()
        return {"test_accuracy": (logits.argmax(1) == y_test).double().mean().item()}

    # After the last LayerNorm the head alone does not show the effect of an update; a probe batch does.
    watch = {"probe": (x[:32], y[:32])} if config["model"] == "vit" else {}
    return Training(
        model,
        optimizer,
        step,
        data=(x, y),
        extras=(scheduler,),
        watch=watch,
        measure=measure,
        measure_every=config["measure_every"],
        finish=finish,
    )


def finish(record: Record) -> dict[str, Any]:
    history, accuracy = record.history, record.series["test_accuracy"][1]
    return {
        "parameters": sum(parameter.numel() for parameter in record.training.model.parameters()),
        "test_accuracy_final": float(accuracy[-1]),
        **cifar_claims.inflation(history),
    }


# --- plans and presets ------------------------------------------------------------------------------------

WHAT = {
    "mlp": "MLP of five hidden layers",
    "vgg11": "VGG11, one linear head",
    "vit": "vision transformer",
    "vgg11-bn-inside": "VGG11 with BatchNorm after each convolution",
    "vgg11-bn-before-head": "VGG11 with one BatchNorm, before the head",
    "resnet18": "ResNet18, 3×3 stem, no max-pool",
}
TREATMENTS: dict[str, tuple[str, dict[str, Any]]] = {
    "float64-loss": ("loss in float64", {"loss_dtype": "float64"}),
    "zero-sum": ("gradient of the logits projected to zero sum", {"project": True}),
}
ROWS = (50, 200, 2_000, 20_000)

ARMS = (
    *(Variant(f"{model}-float32", f"{what}, loss in float32", pair=model) for model, what in WHAT.items()),
    *(
        Variant(f"{model}-{name}", f"{WHAT[model]}, {what}", pair=model, options=options)
        for model in ("mlp", "vgg11", "vit")
        for name, (what, options) in TREATMENTS.items()
    ),
    Variant("vgg11-exact", f"{WHAT['vgg11']}, exact zero-sum cross-entropy", "vgg11", {"exact": True}),
    *(Variant(f"mlp-rows-{rows}", f"{WHAT['mlp']}, {rows:,} rows", options={"rows": rows}) for rows in ROWS),
    *(
        Variant(
            f"{model}-minibatch-{name}", f"{WHAT[model]}, minibatches, {what}", f"{model}-minibatch", options
        )
        for model in ("mlp", "vgg11")
        for name, (what, options) in {"float32": ("loss in float32", {}), **TREATMENTS}.items()
        if name != "zero-sum"
    ),
)

_COMMON = {"lr": 1e-3, "beta2": 0.95, "batch": None}
_QUICK = {**_COMMON, "data": "digits", "rows": 64, "test_rows": 200, "micro": 500, "measure_every": 300}
# Full batches of 50,000 rows are accumulated, so BatchNorm inside the network sees only a micro-batch.
_PAPER = {
    **_COMMON,
    "data": "cifar10",
    "rows": 50_000,
    "test_rows": 10_000,
    "micro": 2_000,
    "measure_every": 500,
}


def _preset(
    name: str,
    common: Mapping[str, Any],
    divide: Mapping[str, int],
    minibatch: Mapping[str, Any],
    plans: Mapping[str, Plan],
    own: Mapping[str, Mapping[str, Any]],
) -> Preset:
    """Return the preset with the configuration of every pair or arm; ``own``: extra settings by model."""
    configs = {
        model: {**common, "model": model, "divide": divide[model], **own.get(model, {})} for model in WHAT
    }
    configs |= {f"mlp-rows-{rows}": configs["mlp"] for rows in ROWS}
    configs |= {f"{model}-minibatch": {**configs[model], **minibatch} for model in ("mlp", "vgg11")}
    return Preset(name, configs, plans)


_BOTH = ("float32", "float64-loss")
_THREE = (*_BOTH, "zero-sum")
_EPOCHS = 10_000

PRESETS = (
    _preset(
        "quick",
        _QUICK,
        {**dict.fromkeys(WHAT, 16), "mlp": 4, "vit": 5},
        {"rows": 1_437, "batch": 256},
        {
            **{f"mlp-{arm}": Plan(600, (0, 1)) for arm in _THREE},
            **{f"vgg11-{arm}": Plan(745, weight=2.0) for arm in (*_THREE, "exact")},
            **{f"vit-{arm}": Plan(850, weight=2.0) for arm in _THREE},
            "vgg11-bn-inside-float32": Plan(700, weight=2.0),
            "vgg11-bn-before-head-float32": Plan(700, weight=2.0),
            "resnet18-float32": Plan(600, weight=10.0),
            **{f"mlp-rows-{rows}": Plan(620) for rows in (50, 200)},
            **{f"mlp-minibatch-{arm}": Plan(600) for arm in _BOTH},
        },
        {"resnet18": {"rows": 32}},  # a step on 64 rows takes as long as three of VGG11's
    ),
    _preset(
        "paper",
        _PAPER,
        dict.fromkeys(WHAT, 1),
        {"batch": 256},
        {
            **{f"{model}-float32": Plan(_EPOCHS, (42,)) for model in WHAT},
            **{f"{model}-{arm}": Plan(_EPOCHS, (42,)) for model in ("mlp", "vgg11") for arm in TREATMENTS},
            "vgg11-exact": Plan(_EPOCHS, (42,)),
            **{f"vit-{arm}": Plan(_EPOCHS * 25, (42,)) for arm in _THREE},  # 25 batches of 2,048 an epoch
            **{f"mlp-rows-{rows}": Plan(_EPOCHS, (42,)) for rows in (200, 2_000, 20_000)},
            **{f"vgg11-minibatch-{arm}": Plan(1_000_000, (42,)) for arm in _BOTH},
        },
        {"vit": {"batch": 2_048}},
    ),
)


def figure(results: Results, path: Path) -> None:
    """Draw loss, zero-sum violation and ‖μ_G‖ of spiking arms, their remedies and the arms without spikes."""
    groups = [
        (WHAT[model], [f"{model}-{arm}" for arm in ("float32", *TREATMENTS)])
        for model in ("mlp", "vgg11", "vit")
    ]
    calm = [f"{model}-float32" for model in ("vgg11-bn-before-head", "resnet18", "vgg11-bn-inside")]
    names = ("loss", "zero_sum_violation", "feature_mean_norm")
    loss_figure(results, path, "CIFAR-10 networks under full-batch Adam", [*groups, ("others", calm)], names)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", help=f"{', '.join(vision_data.TRAIN_ROWS)} (default: the preset's)")
    parser.add_argument("--data-dir", help="local files of --data instead of the hub")


STUDY = Study(
    "cifar",
    "CIFAR-10",
    build,
    ARMS,
    PRESETS,
    cifar_claims.CLAIMS,
    figure=figure,
    series=("loss", "zero_sum_violation", "feature_mean_norm"),
    drawn=tuple(arm.name for arm in ARMS if arm.pair in WHAT),
    options=add_options,
)

if __name__ == "__main__":
    raise SystemExit(command("cifar"))
