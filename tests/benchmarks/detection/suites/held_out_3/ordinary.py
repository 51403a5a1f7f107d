"""The ordinary families of the third held-out half: tasks, networks and losses that no other half has.

While they were written, truth.py looked at losses of trainings without a monitor and with other seeds, and
families with a slingshot were changed.  No detector saw any of them.
"""

from __future__ import annotations

from functools import partial

from tests.benchmarks.detection.families import HELD_OUT_3, Family
from tests.benchmarks.detection.suites.held_out_3 import (
    adapting,
    figures,
    networks_of_digits,
    rows,
    without_labels,
    writing,
)
from tests.benchmarks.detection.suites.registry import family_of


def ordinary() -> list[Family]:
    """Return the families; AdamW as PyTorch makes it, unless something else is said."""
    return [*_figures(), *_writing(), *_rows(), *_digits(), *_without_labels(), *_adapting()]


def _figures() -> list[Family]:
    family = partial(family_of, HELD_OUT_3)
    return [
        family("k-citations", figures.citations, 4000, kind="adam", lr=5e-3, decay=5e-4),
        family("k-molecules", figures.molecules, 4000),
        family("k-energies", figures.energies, 3000, nats=False, schedule=("cosine", 3000)),
        family("k-outlines", figures.outlines, 4000, kind="nadam", lr=2e-3, decay=0.0),
        family("k-clouds-again", figures.clouds_again, 4000, nats=False),
    ]


def _writing() -> list[Family]:
    family, spelling = partial(family_of, HELD_OUT_3), writing.spelling
    return [
        family("k-spelling", spelling, 4000, names="entities", mix="faded", tied=True, beta2=0.95, decay=0.1,
               clip=1.0, schedule=("cosine", 4000, 200)),
        family("k-by-heart", spelling, 3000, names="zones", mix="faded", rows=24, batch=8),
        family("k-switched", spelling, 3000, names="entities", mix="windowed", feed="switched"),
        family("k-windowed", spelling, 3000, names="zones", mix="windowed", norm=False, lr=5e-4, clip=1.0),
        family("k-bfloat16-weights", spelling, 3000, names="entities", mix="windowed", low="weights"),
        family("k-autocast", spelling, 3000, names="zones", mix="faded", low="autocast", kind="radam",
               lr=2e-3, decay=0.0),
        family("k-two-ahead", writing.two_ahead, 3000, lr=2e-3, clip=1.0),
        family("k-continents", writing.continents, 4000),
        family("k-pointing", writing.pointing, 4000, schedule=("stable", 4000, 100)),
        family("k-carrying", writing.carrying, 4000, beta2=0.98, schedule=("cosine", 4000, 200)),
    ]  # fmt: skip


def _rows() -> list[Family]:
    family, table = partial(family_of, HELD_OUT_3), rows.table
    return [
        family("k-clicks", rows.clicks, 5000),
        family("k-drifting", rows.clicks, 5000, drift=0.3, kind="amsgrad"),
        family("k-grades", table, 5000, nats=False, task="grades", loss="earth_movers"),
        family("k-doubting", table, 5000, nats=False, task="noisy", loss="doubting", kind="adamax", lr=2e-3),
        family("k-bounded", table, 5000, nats=False, task="noisy", loss="bounded"),
        family("k-many-labels", table, 5000, task="labels", loss="lopsided_labels", lr=2e-3,
               schedule=("one_cycle", 5000)),
        family("k-amounts", table, 5000, nats=False, task="amounts", loss="squares", lr=4e-3),
        family("k-worst-group", rows.worst_group, 5000, kind="momentum", lr=1e-2, decay=1e-3),
        family("k-exercises", rows.exercises, 5000, nats=False, lr=3e-3),
    ]  # fmt: skip


def _digits() -> list[Family]:
    family, drawn, net = partial(family_of, HELD_OUT_3), rows.drawn, networks_of_digits
    return [
        family("k-half-sorted", drawn, 5000, order=("half_sorted", {"size": 32, "share": 0.5})),
        family("k-class-by-class", drawn, 5000, loss="smoothed",
               order=("class_by_class", {"size": 32, "every": 1000})),
        family("k-larger-batches", drawn, 4000, net="gated",
               order=("larger_batches", {"size": 8, "every": 800})),
        family("k-private", drawn, 5000, noise=0.02, kind="momentum", lr=0.02, decay=0.0),
        family("k-triangles", drawn, 5000, net="gated", kind="momentum", lr=0.05, decay=5e-4,
               schedule=("triangles", 500)),
        family("k-muon", drawn, 4000, net="no_bias", kind="muon", lr=2e-3, decay=0.1),
        family("k-averaged", drawn, 4000, net="gated", kind="asgd", lr=0.1, decay=1e-4),
        family("k-centred", drawn, 4000, net="gated", kind="centred", lr=1e-4, decay=0.0,
               schedule=("milestones", 2500, 3500)),
        family("k-full-batch", rows.at_the_edge, 4000, nats=False, kind="momentum", lr=0.1, decay=0.0),
        family("k-full-batch-adam", rows.at_the_edge, 4000, nats=False, lr=3e-3),
        family("k-high-rate", rows.at_the_edge, 4000, nats=False, batch=32, lr=5e-3),
        family("k-spiking", net.recognised, 3000, net="spiking", lr=2e-3),
        family("k-settled", net.recognised, 3000, net="settled"),
        family("k-capsules", net.recognised, 2500, nats=False, net="capsules"),
        family("k-attacked", net.attacked, 4000),
        family("k-hinted", net.hinted, 4000, nats=False),
        family("k-domains", net.domains, 4000, lr=5e-4),
    ]  # fmt: skip


def _without_labels() -> list[Family]:
    family, own = partial(family_of, HELD_OUT_3), without_labels
    return [
        family("k-bandit", own.bandit, 5000, nats=False, floor=False, kind="adam", lr=3e-4, decay=0.0),
        family("k-expectiles", own.expectiles, 5000, nats=False),
        family("k-energy", own.energy, 2500, nats=False, floor=False, kind="adam", decay=0.0, clip=1.0),
        family("k-choices", own.choices, 4000),
        family("k-enlarging", own.enlarging, 3000, nats=False),
        family("k-cleaning", own.cleaning, 3000, nats=False, floor=False, clip=5.0),
        family("k-beside", own.beside, 5000, nats=False, lr=5e-3, decay=0.0),
    ]


def _adapting() -> list[Family]:
    family, adapted = partial(family_of, HELD_OUT_3), adapting.adapted
    return [
        family("k-directions", adapted, 3000, by="directions", lr=2e-3),
        family("k-bottlenecks", adapted, 3000, by="bottlenecks"),
        family("k-prompt", adapted, 3000, by="prompt", kind="adafactor", lr=0.03, decay=0.0),
        family("k-biases", adapted, 3000, by="biases", lr=5e-3, rows=200),
        family("k-easy-first", adapting.easy_first, 3000),
        family("k-half", adapting.half, 3000),
        family("k-olmo", adapting.from_library, 2000, model="olmo", decay=0.1, beta2=0.95),
        family("k-olmo-bfloat16", adapting.from_library, 2000, model="olmo", rows=40, low=True),
        family("k-deberta", adapting.from_library, 1500, model="deberta"),
        family("k-neo", adapting.from_library, 2000, model="neo", schedule=("polynomial", 2000, 1.0)),
    ]
