"""The second held-out ordinary families: tasks, networks and losses that no other half has."""

from __future__ import annotations

from functools import partial

from tests.benchmarks.detection.families import HELD_OUT_2, Family
from tests.benchmarks.detection.suites.held_out_2 import hub, streams, vectors, views, worlds
from tests.benchmarks.detection.suites.registry import family_of


def ordinary() -> list[Family]:
    """Return the families; AdamW as PyTorch makes it, unless something else is said."""
    return [*_vectors(), *_streams(), *_views(), *_worlds(), *_hub()]


def _vectors() -> list[Family]:
    family = partial(family_of, HELD_OUT_2)
    return [
        family("n-categories", vectors.shops, 5000, task="sold", kind="radam"),
        family("n-amounts", vectors.shops, 5000, nats=False, task="amount", kind="amsgrad", lr=3e-3),
        family("n-ranks", vectors.shops, 4000, task="ranks", schedule=("one_cycle", 4000), lr=3e-3),
        family("n-by-hand", vectors.by_hand, 6000),
        family("n-autocast", vectors.by_hand, 5000, low=True, kind="adam", decay=0.0),
        family("n-pasted", vectors.pasted, 3000, kind="momentum", lr=0.05, decay=5e-4,
               schedule=("cosine", 3000)),
        family("n-few-labels", vectors.few_labels, 5000),
        family("n-pruned", vectors.pruned, 5000),
        family("n-thawed", vectors.thawed, 5000),
        family("n-averaged", vectors.averaged, 4000, kind="nadam", lr=2e-3, decay=0.0,
               schedule=("restarts", 800)),
        family("n-doubtful", vectors.doubtful, 5000, lr=2e-3),
        family("n-waves", vectors.waves, 5000, nats=False, kind="adamax", lr=1e-2),
    ]  # fmt: skip


def _streams() -> list[Family]:
    family = partial(family_of, HELD_OUT_2)
    return [
        family("n-naming", streams.naming, 2500, clip=1.0),
        family("n-words", streams.words, 5000, kind="adadelta", lr=1.0, decay=0.0),
        family("n-numerals", streams.numerals, 2500, lr=2e-3, clip=1.0),
        family("n-adding", streams.adding, 4000, nats=False),
        family("n-listening", streams.listening, 5000),
        family("n-recall", streams.recall, 5000, lr=2e-3, beta2=0.98, schedule=("cosine", 5000, 300)),
        family("n-taking", streams.taking, 5000, decay=0.1, lr=3e-3),
    ]


def _views() -> list[Family]:
    family = partial(family_of, HELD_OUT_2)
    return [
        family("n-judge", views.judged_points, 4000, nats=False, floor=False, beta2=0.9, lr=1e-3, decay=0.0),
        family("n-warming", views.warming, 5000),
        family("n-one-by-one", views.one_by_one, 5000, schedule=("cosine", 5000, 200)),
        family("n-straight", views.straight, 5000, nats=False),
        family("n-cross-correlated", views.cross_correlated, 4000, nats=False),
        family("n-in-classes", views.in_classes, 4000),
        family("n-queue", views.queued, 4000, floor=False, decay=1e-3),
    ]


def _worlds() -> list[Family]:
    family = partial(family_of, HELD_OUT_2)
    return [
        family("n-shares", worlds.shares, 4000, floor=False, clip=10.0),
        family("n-balancing", worlds.balancing, 4000, nats=False, floor=False, kind="adam", lr=3e-4,
               decay=0.0, clip=0.5),
        family("n-imitating", worlds.imitating, 6000),
        family("n-dreaming", worlds.dreaming, 4000, nats=False),
    ]  # fmt: skip


def _hub() -> list[Family]:
    family, own = partial(family_of, HELD_OUT_2), hub.hub
    return [
        family(
            "n-mistral", own, 2000, model="mistral", decay=0.1, beta2=0.95, schedule=("cosine", 2000, 100)
        ),
        family("n-mistral-by-heart", own, 2000, model="mistral", rows=32),
        family("n-gemma", own, 1500, model="gemma", lr=5e-4),
        family("n-neox-autocast", own, 2000, model="neox", low=True),
        family("n-bloom", own, 2000, model="bloom", batch=4, accumulate=2),
        family("n-phi", own, 2500, model="phi", rows=300),
        family("n-swin", own, 2000, model="swin", batch=16, decay=0.05),
        family("n-albert", own, 2500, model="albert", kind="adafactor", lr=5e-3, decay=0.0),
        family("n-bart", own, 2000, model="bart"),
        family("n-resnet", own, 2500, model="resnet", batch=16),
        family("n-funnel", own, 1500, model="funnel"),
    ]
