"""Test in a language model which tokens reach a loss of exactly 0, how the logits drift, and what stops it.

The model is a GPT as in Liu et al. 2026, table 4 (rotary positions, SwiGLU, QK-LayerNorm, untied, no bias).
It is trained in bfloat16 autocast by AdamW with β = (0.9, 0.95), no decay, clipping at 1, warm-up and cosine.
Unequal token frequencies alone make the mean of the classifier large. The paper finds that the logits then
drift upwards, and faster in float64.

The quick preset learns an excerpt of Python's own language reference nearly by heart, in 1,000 steps. The
paper sees every text once, and needs 100,000 steps. The paper preset streams FineWeb (--data-dir: local
files). One arm is a GPT2LMHeadModel in HuggingFace's Trainer, watched through the callback.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: import from the root of the checkout
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
import torch.nn.functional as F
from torch import Tensor

from examples.reference import gpt_claims
from examples.reference.figures import loss_figure
from examples.reference.gpt_model import GPT
from examples.reference.gpt_trainer import train_with_trainer
from examples.reference.results import Results, StudyError
from examples.reference.study import Plan, Preset, Study, Variant, command
from examples.reference.text_data import Excerpt, TokenStream, excerpt, fineweb
from examples.reference.tokens import Tally
from examples.reference.training import Record, Training
from nfi_monitor import Monitor
from nfi_monitor.remedies import zero_sum_cross_entropy

SOURCES = ("python", "fineweb")


def text(config: Mapping[str, Any], seed: int) -> tuple[Excerpt | TokenStream, Any]:
    """Return ``(windows, tokenizer)`` of the configuration's data."""
    rows, length = config["rows"], config["length"]
    if config["data"] == "python":
        stream, tokenizer = excerpt(config["tokens"] + 1, config["vocabulary"])
        return Excerpt(stream, rows=rows, length=length, seed=seed), tokenizer
    if config["data"] == "fineweb":
        documents = fineweb(rows=rows, length=length, data_dir=config.get("data_dir"))
        return documents, documents.tokenizer
    raise StudyError(f"no data called {config['data']!r}: use one of {', '.join(SOURCES)}")


def build(config: Mapping[str, Any], seed: int, device: torch.device) -> Training:
    """Build one training.

    Keys of ``config``: data, data_dir, tokens, vocabulary, length, rows, micro, width, layers, heads, lr,
    lr_end, warm_up, steps, autocast, loss_dtype, exact, centred, z_loss.
    """
    data, tokenizer = text(config, seed)
    fixed = data.fixed()
    model = GPT(config["vocabulary"], width=config["width"], layers=config["layers"], heads=config["heads"])
    model.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config["lr"], betas=(0.9, 0.95), weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: learning_rate(done, config))
    loss_dtype = getattr(torch, config.get("loss_dtype", "float32"))
    cross_entropy = zero_sum_cross_entropy if config.get("exact") else F.cross_entropy
    tally = Tally(config["vocabulary"], device)

    def logits_of(tokens: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=config["autocast"]):
            return model(tokens)

    def step(number: int, monitor: Monitor) -> Tensor:
        inputs, targets = (tensor.to(device) for tensor in data.batch(number))
        total = torch.zeros((), dtype=torch.float64, device=device)
        for part, target in zip(inputs.split(config["micro"]), targets.split(config["micro"]), strict=True):
            logits = logits_of(part).flatten(0, 1).to(loss_dtype)
            each = cross_entropy(logits, target.flatten(), reduction="none")
            tally.add(target, each)
            share = len(part) / len(inputs)
            loss = each.mean()
            total += each.detach().double().mean() * share
            if config.get("z_loss"):
                loss = loss + config["z_loss"] * logits.logsumexp(-1).square().mean()
            (loss * share).backward()
        monitor.observe_loss(total)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        if config.get("centred"):
            with torch.no_grad():
                model.head.weight -= model.head.weight.mean(0)
        return total

    def measure(done: int) -> dict[str, float]:
        """Measure on the fixed tokens.

        The head's module is not called, so that the monitor sees training alone.
        """
        weight = model.head.weight
        zero = torch.zeros((), dtype=torch.int64, device=device)
        sums = torch.zeros(2, dtype=torch.float64, device=device)  # of logits, of log Z
        mean = torch.zeros(config["width"], dtype=torch.float64, device=device)
        for part, target in zip(*(tensor.split(config["micro"]) for tensor in fixed), strict=True):
            with torch.autocast(device.type, torch.bfloat16, enabled=config["autocast"]):
                features = model.features(part.to(device)).flatten(0, 1)
                logits = F.linear(features, weight)
            each = cross_entropy(logits.to(loss_dtype), target.flatten().to(device), reduction="none")
            zero += (each == 0).sum()
            sums += torch.stack([logits.double().mean(-1).sum(), logits.double().logsumexp(-1).sum()])
            mean += features.double().sum(0)
        tokens = fixed[1].numel()
        centre = weight.double().mean(0)
        return {
            "zero_loss_tokens": float(zero),
            "mean_logit": float(sums[0]) / tokens,
            "log_partition": float(sums[1]) / tokens,
            "classifier_mean": float(centre.norm()),
            "alignment": float(F.cosine_similarity(centre, mean, dim=0)),
        }

    def finish(record: Record) -> dict[str, Any]:
        series = record.series
        return {
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "tokens_measured": fixed[1].numel(),
            **{name: [float(value) for value in values] for name, (_, values) in series.items()},
            "measured_at": series["alignment"][0].tolist(),
            "absorbed_fraction": gpt_claims.mean_of_last_tenth(record.history["absorbed_fraction"]),
            "zero_sum_violation": gpt_claims.mean_of_last_tenth(record.history["zero_sum_violation"]),
            **tally.summary(lambda token: tokenizer.decode([token], skip_special_tokens=False)),
        }

    extras = [scheduler, tally, *([data] if isinstance(data, TokenStream) else [])]
    return Training(
        model,
        optimizer,
        step,
        data=fixed,
        extras=extras,
        watch={"head": "head"},
        measure=measure,
        measure_every=config["measure_every"],
        finish=finish,
    )


def learning_rate(done: int, config: Mapping[str, Any]) -> float:
    """Return the factor on lr after ``done`` steps: linear warm-up, then half a cosine to ``lr_end`` / lr."""
    rise = min(1.0, (done + 1) / config["warm_up"])
    lowest = config["lr_end"] / config["lr"]
    way = min(1.0, max(0.0, (done - config["warm_up"]) / max(1, config["steps"] - config["warm_up"])))
    return rise * (lowest + (1 - lowest) * 0.5 * (1 + math.cos(math.pi * way)))


# --- plans and presets ------------------------------------------------------------------------------------

ARMS = (
    Variant("float32-loss", "bfloat16 autocast, loss in float32", pair="gpt"),
    Variant("float64-loss", "the same, loss in float64", pair="gpt", options={"loss_dtype": "float64"}),
    Variant("bfloat16-loss", "the same, loss in bfloat16", pair="gpt", options={"loss_dtype": "bfloat16"}),
    Variant("exact-loss", "exact zero-sum cross-entropy in float32", pair="gpt", options={"exact": True}),
    Variant(
        "centred-head", "W_G subtracted from the head after every step", pair="gpt", options={"centred": True}
    ),
    Variant("z-loss", "1e-4 · mean (log Z)² added to the loss", pair="gpt", options={"z_loss": 1e-4}),
    Variant(
        "trainer", "GPT2LMHeadModel in HuggingFace's Trainer with NFICallback", compute=train_with_trainer
    ),
)
_QUICK = {
    "data": "python", "tokens": 1_024, "vocabulary": 512, "length": 32, "rows": 8, "micro": 8,
    "width": 64, "layers": 2, "heads": 4, "autocast": True,
    "lr": 3e-3, "lr_end": 3e-4, "warm_up": 50, "steps": 1_000, "measure_every": 50,
}  # fmt: skip
# Table 4 does not give these: they are from Stollenwerk's 109M (arXiv 2601.02031), with as many tokens a
# step.
_PAPER = {
    "data": "fineweb", "vocabulary": 50_304, "length": 2_048, "rows": 64, "micro": 8,
    "width": 640, "layers": 15, "heads": 4, "autocast": True,
    "lr": 1e-3, "lr_end": 1e-5, "warm_up": 5_000, "steps": 100_000, "measure_every": 1_000,
}  # fmt: skip
_TRAINER = {
    "tokens": 1_024,
    "vocabulary": 512,
    "length": 32,
    "rows": 8,
    "width": 64,
    "layers": 2,
    "heads": 4,
    "lr": 3e-3,
}
_ALL = tuple(arm.name for arm in ARMS if arm.pair)

PRESETS = (
    Preset(
        "quick",
        {"gpt": _QUICK, "trainer": {**_TRAINER, "steps": 150}},
        {**{name: Plan(1_000) for name in _ALL}, "trainer": Plan(150)},
    ),
    Preset(
        "paper",
        {"gpt": _PAPER, "trainer": {**_TRAINER, "steps": 2_000}},
        {**{name: Plan(100_000) for name in _ALL}, "trainer": Plan(2_000)},
        checkpoint_every=2_000,
    ),
)


def figure(results: Results, path: Path) -> None:
    """Draw loss, tokens with a loss of exactly 0, mean logit, ‖W_G‖ and cosine of all arms."""
    names = ("loss", "zero_loss_tokens", "mean_logit", "classifier_mean", "alignment")
    groups = [
        ("precision of the loss", ["float32-loss", "float64-loss", "bfloat16-loss"]),
        ("what holds the logits", ["float32-loss", "exact-loss", "centred-head", "z-loss"]),
    ]
    loss_figure(results, path, "A small GPT", groups, names)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", help=f"{' or '.join(SOURCES)} (default: the preset's)")
    parser.add_argument("--data-dir", help="parquet files with a column text, and GPT-2's tokenizer.json")


STUDY = Study(
    "gpt",
    "GPT",
    build,
    ARMS,
    PRESETS,
    gpt_claims.CLAIMS,
    figure=figure,
    series=("loss", "zero_loss_tokens", "mean_logit", "classifier_mean", "alignment"),
    drawn=_ALL,
    options=add_options,
)

if __name__ == "__main__":
    raise SystemExit(command("gpt"))
