"""Test modular division, where rounding causes slingshots (Liu, Cao, Li, Zhou 2026, arXiv 2605.06152).

An MLP and a transformer learn a/b mod p with Adam and without decay. Late in training the correct class's
gradient is rounded to zero, and the zero-sum over classes breaks. Then the classifier mean and the feature
mean amplify each other, and the loss jumps by orders of magnitude. Each arm removes one suspected cause or
adds one.

    python -m examples.reference.modular_division                        # p = 23, minutes
    python -m examples.reference.modular_division --preset paper --device cuda
    python -m examples.reference.modular_division --arm mlp-float32 --arm mlp-eps-1e-5 --seeds 7 8
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: import from the root of the checkout
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.reference import division_claims as claims
from examples.reference.division_model import MLP, Transformer, division, one_hot, tokens
from examples.reference.results import fingerprint
from examples.reference.study import Plan, Preset, Study, Variant, command
from examples.reference.training import Record, Training
from examples.reference.update_log import UpdateLog
from nfi_monitor import Monitor
from nfi_monitor.remedies import zero_sum_cross_entropy

WARM_UP = 10
ADAM_STEPS = 100_000
"""Maximum number of Adam steps before gradient descent begins."""


def build(config: Mapping[str, Any], seed: int, device: torch.device) -> Training:
    p = config["p"]
    (pairs, y), (test_pairs, test_y) = (tuple(t.to(device) for t in part) for part in division(p, seed))
    if config["model"] == "mlp":
        encode: Callable[[Tensor, int], Tensor] = one_hot
        model: nn.Module = MLP(
            p, config["width"], config["depth"], norm=config.get("head_norm", False),
            head_bias=config.get("head_bias", True),
        )  # fmt: skip
    else:
        encode = tokens
        model = Transformer(
            p, config["width"], config["depth"], config["heads"], norm=config.get("norm", False),
            head_norm=config.get("head_norm", False), head_bias=config.get("head_bias", True),
        )  # fmt: skip
    x, test_x = encode(pairs, p), encode(test_pairs, p)
    data = (x, y)
    model.to(device)
    if config.get("dtype") == "float64":
        model.double()
        x, test_x = (t.double() if t.is_floating_point() else t for t in (x, test_x))

    batch = config.get("batch")
    order = torch.Generator().manual_seed(seed)
    losses = Loss(config)

    def rows() -> Tensor | slice:
        if batch is None or batch >= len(y):
            return slice(None)
        return torch.randperm(len(y), generator=order)[:batch].to(device)

    start = None
    if config.get("gradient_descent"):
        start = fingerprint(model)
        _until_zero_loss(model, x, y, config)
        optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=config["descent_lr"])
        warm_up = None
    else:
        optimizer = _adam(model, config)
        warm_up = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / WARM_UP))
    log = UpdateLog(list(model.parameters())) if config.get("update_log") else None
    subtract = config.get("subtract_classifier_mean", False)

    def step(number: int, monitor: Monitor) -> Tensor:
        chosen = rows()
        loss = losses(model(x[chosen]), y[chosen])
        monitor.observe_loss(loss)
        loss.backward()
        if log is not None:
            log.begin()
        optimizer.step()
        if subtract:
            with torch.no_grad():
                model.head.weight -= model.head.weight.mean(0)  # type: ignore[operator, union-attr]
        if log is not None:
            log.end(number, float(loss.detach()))
        optimizer.zero_grad()
        if warm_up is not None:
            warm_up.step()
        return loss.detach()

    def measure(step: int) -> dict[str, float]:
        found = {"test_accuracy": float((model(test_x).argmax(1) == test_y).double().mean())}
        if isinstance(model, MLP):
            found["below_norm"] = float(model.below(x).mean(0).norm())
            found |= _effective_rates(optimizer, model)
        return found

    extras = [order, *(extra for extra in (log, warm_up) if extra is not None)]
    return Training(
        model, optimizer, step, data=data, extras=extras, start=start,
        watch={"head": "head", "every": config.get("every", "auto")},
        measure=measure, measure_every=config.get("measure_every", 20), finish=finish,
    )  # fmt: skip


class Loss:
    """Compute the cross-entropy, after the arm's change of the logits."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.dtype = getattr(torch, config.get("loss_dtype", "float32"))
        self.project = config.get("zero_sum", False)
        self.cross_entropy = zero_sum_cross_entropy if config.get("exact") else F.cross_entropy
        self.clamp = config.get("clamp")
        self.smoothing = config.get("label_smoothing", 0.0)
        self.z_loss = config.get("z_loss", 0.0)

    def __call__(self, logits: Tensor, target: Tensor) -> Tensor:
        if self.project:
            logits.register_hook(lambda grad: grad - grad.mean(-1, keepdim=True))
        if self.clamp is not None:  # no probability underflows to 0
            logits = torch.maximum(logits, logits.detach().amax(-1, keepdim=True) - self.clamp)
        if logits.dtype is not torch.float64:
            logits = logits.to(self.dtype)
        loss = self.cross_entropy(logits, target, label_smoothing=self.smoothing)
        if self.z_loss:
            loss = loss + self.z_loss * logits.logsumexp(-1).square().mean()
        return loss


def _adam(model: nn.Module, config: Mapping[str, Any]) -> torch.optim.Optimizer:
    decay = config.get("weight_decay", 0.0)
    kind = torch.optim.AdamW if decay else torch.optim.Adam
    return kind(
        model.parameters(), lr=config["lr"], betas=(0.9, config["beta2"]), eps=config.get("eps", 1e-8),
        weight_decay=decay, fused=True,  # kernel launches dominate a step this small
    )  # fmt: skip


def _until_zero_loss(model: nn.Module, x: Tensor, y: Tensor, config: Mapping[str, Any]) -> None:
    """Train with Adam until a share of the rows has a loss of exactly 0.

    Raises RuntimeError if that never happens.
    """
    optimizer = _adam(model, config)
    for step in range(ADAM_STEPS):
        optimizer.param_groups[0]["lr"] = config["lr"] * min(1.0, (step + 1) / WARM_UP)
        each = F.cross_entropy(model(x), y, reduction="none")
        if float((each == 0).double().mean()) >= config["zero_share"]:
            optimizer.zero_grad()
            return
        each.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    raise RuntimeError(
        f"no share of {config['zero_share']:.0%} of zero losses in {ADAM_STEPS:,} steps of Adam"
    )


def _effective_rates(optimizer: torch.optim.Optimizer, model: MLP) -> dict[str, float]:
    """Return lr / (median sqrt(v̂) + ε_A) of the weights of the head and of the last hidden layer."""
    group = optimizer.param_groups[0]
    found = {}
    for name, weight in (("head_rate", model.head.weight), ("hidden_rate", model.last[0].weight)):
        state = optimizer.state.get(weight, {})
        if "exp_avg_sq" in state:
            corrected = state["exp_avg_sq"].double() / (1 - group["betas"][1] ** float(state["step"]))
            found[name] = group["lr"] / (float(corrected.sqrt().median()) + group["eps"])
        elif isinstance(optimizer, torch.optim.SGD):
            found[name] = group["lr"]
    return found


def finish(record: Record) -> dict[str, Any]:
    logs = [extra for extra in record.training.extras if isinstance(extra, UpdateLog)]
    return claims.remembered(record, logs[0] if logs else None)


# --- the arms ------------------------------------------------------------------------------------------

ARMS = (
    # The update log does not change the training, so "update_log" does not make another arm.
    Variant("mlp-float32", "MLP, everything in float32", "mlp", {"update_log": True}),
    Variant("mlp-float64-model", "parameters and loss in float64", "mlp", {"dtype": "float64"}),
    Variant("mlp-float64-loss", "float64 from the logits to the loss", "mlp", {"loss_dtype": "float64"}),
    Variant("mlp-zero-sum", "logit gradient minus its mean over classes", "mlp", {"zero_sum": True}),
    Variant("mlp-mean-subtracted", "W_G subtracted from the head after each step", "mlp",
        {"subtract_classifier_mean": True}),
    Variant("mlp-eps-1e-6", "Adam's eps 1e-6", "mlp", {"eps": 1e-6}),
    Variant("mlp-eps-1e-5", "Adam's eps 1e-5", "mlp", {"eps": 1e-5}),
    Variant("mlp-layernorm", "LayerNorm before the head", "mlp", {"head_norm": True}),
    Variant("mlp-label-smoothing", "label smoothing 0.1", "mlp", {"label_smoothing": 0.1}),
    Variant("mlp-weight-decay", "AdamW, decay 0.1", "mlp", {"weight_decay": 0.1}),
    Variant("mlp-z-loss", "z-loss 1e-4", "mlp", {"z_loss": 1e-4}),
    Variant("mlp-no-head-bias", "head without bias", "mlp", {"head_bias": False}),
    Variant("mlp-clamp", "logits at least z_max − 100: no underflow", "mlp", {"clamp": 100.0}),
    Variant("mlp-lr-1e-2", "lr 1e-2", "mlp", {"lr": 1e-2}),
    Variant("mlp-lr-3e-4", "lr 3e-4", "mlp", {"lr": 3e-4}),
    Variant("mlp-lr-1e-4", "lr 1e-4", "mlp", {"lr": 1e-4}),
    Variant("mlp-lr-1e-5", "lr 1e-5", "mlp", {"lr": 1e-5}),
    Variant("mlp-gradient-descent", "gradient descent in place of Adam once most rows have a loss of 0",
        "mlp", {"gradient_descent": True}),
    Variant("transformer-float32", "transformer without LayerNorm, everything in float32", "transformer"),
    Variant("transformer-float64-loss", "float64 from the logits to the loss", "transformer",
        {"loss_dtype": "float64"}),
    Variant("transformer-zero-sum", "logit gradient minus its mean over classes", "transformer",
        {"zero_sum": True}),
    Variant("transformer-layernorm", "LayerNorm in the blocks and before the head", "transformer",
        {"norm": True, "head_norm": True}),
    Variant("transformer2-float32", "two layers instead of one, everything in float32", "transformer2"),
    Variant("transformer2-float64-loss", "float64 from the logits to the loss", "transformer2",
        {"loss_dtype": "float64"}),
    Variant("transformer2-zero-sum", "logit gradient minus its mean over classes", "transformer2",
        {"zero_sum": True}),
    Variant("transformer2-exact", "exact zero-sum cross-entropy, in float32", "transformer2",
        {"exact": True}),
)  # fmt: skip

_SEEDS = (0, 1, 2)
_MAIN, _REST, _ONE = Plan(1_500, _SEEDS), Plan(1_500, _SEEDS[:2]), Plan(1_500, _SEEDS[:1])
_TRANSFORMER, _TWO_LAYERS = Plan(1_200, _SEEDS[:2]), Plan(600, _SEEDS[:1])
# One layer inflates its features; two without LayerNorm slingshot at the same precision before that.
_TINY = {"model": "transformer", "p": 17, "width": 64, "heads": 4, "lr": 1e-3, "beta2": 0.95, "every": 4}
# Liu et al. train on seed 42; two more seeds show the variation.
_LONG = Plan(100_000, (42, 43, 44))
_ADAM = {"lr": 1e-3, "beta2": 0.999, "batch": 512, "descent_lr": 1e5, "zero_share": 0.9, "measure_every": 100}
PRESETS = (
    Preset(
        "quick",
        {
            "mlp": {"model": "mlp", "p": 23, "width": 128, "depth": 3, "lr": 1e-3, "beta2": 0.95,
                    "descent_lr": 1e4, "zero_share": 0.5, "every": 4},
            "transformer": {**_TINY, "depth": 1},
            "transformer2": {**_TINY, "depth": 2},
        },
        {
            "mlp-float32": _MAIN,
            "mlp-float64-loss": _MAIN,
            "mlp-zero-sum": _MAIN,
            "mlp-float64-model": _ONE,
            "mlp-mean-subtracted": _ONE,
            "mlp-eps-1e-6": _REST,
            "mlp-eps-1e-5": _REST,
            "mlp-layernorm": _REST,
            "mlp-label-smoothing": _ONE,
            "mlp-weight-decay": _REST,
            "mlp-z-loss": _ONE,
            "mlp-no-head-bias": _ONE,
            "mlp-clamp": _REST,
            "mlp-lr-1e-2": _ONE,
            "mlp-gradient-descent": Plan(400, _SEEDS[:2]),
            "transformer-float32": _TRANSFORMER,
            "transformer-float64-loss": _TRANSFORMER,
            "transformer-zero-sum": _TRANSFORMER,
            "transformer2-float32": _TWO_LAYERS,
            "transformer2-float64-loss": _TWO_LAYERS,
            "transformer2-zero-sum": _TWO_LAYERS,
            "transformer2-exact": _TWO_LAYERS,
        },
    ),
    Preset(
        "paper",
        {
            "mlp": {"model": "mlp", "p": 97, "width": 512, "depth": 5, **_ADAM},
            "transformer": {"model": "transformer", "p": 97, "width": 128, "depth": 2, "heads": 4, **_ADAM},
        },
        {arm.name: _LONG for arm in ARMS if arm.pair != "transformer2"},
    ),
)  # fmt: skip

STUDY = Study(
    "modular_division", "Modular division", build, ARMS, PRESETS, claims.CLAIMS, claims.figure, claims.SERIES,
    claims.DRAWN,
)  # fmt: skip

if __name__ == "__main__":
    raise SystemExit(command("modular_division"))
