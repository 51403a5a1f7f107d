"""The held-out ordinary families: tasks, networks and losses that no family of the other halves has."""

from __future__ import annotations

from functools import partial

from tests.benchmarks.detection.families import HELD_OUT, Family
from tests.benchmarks.detection.suites.held_out import (
    agents,
    library,
    metrics,
    pictures,
    sequences,
    structures,
    tables,
)
from tests.benchmarks.detection.suites.registry import family_of


def ordinary() -> list[Family]:
    """Return the families; AdamW as PyTorch makes it, unless something else is said."""
    return [*_tables(), *_pictures(), *_sequences(), *_others(), *_library()]


def _tables() -> list[Family]:
    family, table = partial(family_of, HELD_OUT), tables.table
    return [
        family("h-rare-columns", table, 5000, task="rare", net="columns", batch=64),
        family("h-rare-weighted", table, 8000, task="rare_weighted", net="scaled_units", batch=64),
        family("h-rare-trees", table, 8000, task="rare", net="trees", kind="adamax", lr=2e-3),
        family("h-wine-splines", table, 8000, task="wine", net="splines", batch=16),
        family("h-iris-linear", table, 8000, task="iris", net="linear", batch=16, lr=1e-2),
        family("h-breast-cancer-gated", table, 8000, task="breast_cancer", net="gated", averaged=True,
               schedule=("cosine", 8000)),
        family("h-diabetes-quantiles", table, 8000, nats=False, task="quantiles", net="gated", decay=0.5),
        family("h-counts", table, 8000, task="counts", net="gated", batch=64),
        family("h-survival", table, 8000, task="survival", net="scaled_units", batch=64, lr=5e-4),
        family("h-density", table, 8000, task="density", net="trees", clip=1.0),
        family("h-ranking", tables.ranking, 8000, kind="adagrad", lr=1e-2, decay=0.0),
    ]  # fmt: skip


def _pictures() -> list[Family]:
    family, classified = partial(family_of, HELD_OUT), pictures.classified
    return [
        family("h-lion", classified, 5000, net="separable", kind="lion", lr=2e-4, decay=0.3, smoothing=0.1,
               schedule=("cosine", 5000, 100)),
        family("h-accumulation", classified, 4000, net="grouped", batch=8, accumulate=4),
        family("h-pure-bfloat16", classified, 6000, net="residuals", low=True),
        family("h-large-decay", classified, 6000, net="residuals", decay=2.0, batch=64,
               schedule=("stable", 6000, 200)),
        family("h-nesterov", classified, 5000, net="grouped", kind="nesterov", lr=0.02, decay=5e-4,
               schedule=("one_cycle", 5000)),
        family("h-sharpness-aware", pictures.sharpness_aware, 4000),
        family("h-early-stopping", pictures.plateau, 10_000),
        family("h-born-again", pictures.born_again, 4000),
        family("h-three-tasks", pictures.three_tasks, 8000),
        family("h-segmentation", pictures.pixels, 4000, task="segment", schedule=("polynomial", 4000)),
        family("h-cleaning", pictures.pixels, 4000, nats=False, task="clean"),
        family("h-picture-by-heart", pictures.picture_by_heart, 8000, nats=False, kind="adam", decay=0.0),
        family("h-quantised", pictures.quantised, 6000, nats=False),
        family("h-masked-patches", pictures.masked_patches, 6000, nats=False, decay=0.05, beta2=0.95,
               schedule=("cosine", 6000, 300)),
        family("h-siamese", metrics.siamese, 8000, nats=False),
        family("h-prototypes", metrics.prototypes, 6000),
        family("h-angles", metrics.angles, 8000, decay=5e-4),
        family("h-own-target", metrics.own_target, 8000, nats=False),
        family("h-decorrelated", metrics.decorrelated, 8000, nats=False),
    ]  # fmt: skip


def _sequences() -> list[Family]:
    family, forecast = partial(family_of, HELD_OUT), sequences.forecast
    return [
        family("h-forecast-quantiles", forecast, 6000, nats=False, net="causal", loss="quantiles"),
        family("h-forecast-patches", forecast, 5000, nats=False, net="patches", loss="squares",
               schedule=("stable", 5000, 100)),
        family("h-forecast-linear", forecast, 8000, nats=False, net="linear", loss="absolute"),
        family("h-forecast-gaussian", forecast, 6000, net="causal", loss="gaussian", batch=64, lr=2e-3),
        family("h-code", sequences.code_reader, 5000, beta2=0.95, decay=0.1, clip=1.0,
               schedule=("stable", 5000, 200)),
        family("h-code-by-heart", sequences.code_reader, 5000, rows=40),
        family("h-preferences", sequences.preferences, 4000, lr=1e-4),
        family("h-transcription", sequences.transcription, 4000, lr=2e-3),
        family("h-tagging", sequences.tagging, 3000),
        family("h-translation", sequences.translation, 4000, beta2=0.98, lr=2e-3,
               schedule=("inverse_root", 400)),
        family("h-longer-and-longer", sequences.longer_and_longer, 4000, clip=1.0),
        family("h-pixel-by-pixel", sequences.pixel_by_pixel, 4000, lr=3e-3),
    ]  # fmt: skip


def _others() -> list[Family]:
    family = partial(family_of, HELD_OUT)
    return [
        family("h-clouds", structures.clouds, 5000),
        family("h-triangles", structures.triangles, 5000, nats=False),
        family("h-links", structures.links, 6000, lr=5e-3),
        family("h-spirals", structures.spirals, 5000, kind="radam", decay=0.0),
        family("h-heat", structures.heat, 4000, nats=False),
        family("h-double-q", agents.double_q, 5000, nats=False, floor=False, clip=10.0),
        family("h-twin-critics", agents.twin_critics, 5000, nats=False, floor=False),
        family("h-actor-critic", agents.actor_critic, 4000, floor=False, kind="rmsprop", decay=0.0,
               clip=0.5),
        family("h-judge", agents.judge, 8000),
    ]  # fmt: skip


def _library() -> list[Family]:
    family, own = partial(family_of, HELD_OUT), library.library
    return [
        family("h-t5", own, 2500, model="t5", kind="adafactor", lr=1e-2, decay=0.0),
        family("h-whisper", own, 2500, model="whisper", schedule=("polynomial", 2500, 1.0)),
        family("h-convnext", own, 3000, model="convnext", batch=16, decay=0.05),
        family("h-mamba", own, 2000, model="mamba", decay=0.1),
        family("h-wav2vec", own, 2500, model="wav2vec"),
        family("h-distilbert", own, 3000, model="distilbert", rows=300),
        family("h-opt-by-heart", own, 3000, model="opt", rows=40),
        family("h-mixtral", own, 2500, model="mixtral", beta2=0.95, decay=0.1),
        family("h-qwen", own, 2000, model="qwen", batch=4, accumulate=4, schedule=("cosine", 2000, 100)),
        family("h-electra", own, 3000, model="electra"),
        family("h-roberta", own, 3000, model="roberta", batch=4),
    ]
