"""The ordinary families of the fourth held-out half: tasks, networks and losses that no other half has.

While they were written, truth.py looked at losses of trainings without a monitor and with other seeds, and
families with a slingshot were changed.  No detector saw any of them.
"""

from __future__ import annotations

from functools import partial

from tests.benchmarks.detection.families import HELD_OUT_4, Family
from tests.benchmarks.detection.suites.held_out_4 import classifiers, made, pretrained, quantities
from tests.benchmarks.detection.suites.registry import family_of


def ordinary() -> list[Family]:
    """Return the families; AdamW as PyTorch makes it, unless something else is said."""
    return [*_all_rows(), *_classes(), *_made(), *_quantities(), *_pretrained()]


def _all_rows() -> list[Family]:
    """Full batches at the edge of stability."""
    family = partial(family_of, HELD_OUT_4)
    rows = classifiers.all_rows
    return [
        family("i-descent", rows, 2400, nats=False, net="deep", squares=True, kind="sgd", lr=0.2),
        family("i-descent-pictures", rows, 2000, net="convolved", kind="sgd", lr=0.1),
        family("i-descent-momentum", rows, 2000, nats=False, net="pieces", squares=True, kind="momentum",
               lr=0.17),
        family("i-nesterov", rows, 2000, nats=False, net="deep", squares=True, kind="nesterov", lr=0.1),
        family("i-root-mean-square", rows, 2000, nats=False, net="deep", squares=True, kind="rmsprop",
               lr=3e-4),
        family("i-adam", rows, 2000, nats=False, net="convolved", squares=True, kind="adam", lr=3e-3),
        family("i-adam-text", rows, 2000, nats=False, net="read", squares=True, kind="adam", lr=3e-3),
    ]  # fmt: skip


def _classes() -> list[Family]:
    family, classes = partial(family_of, HELD_OUT_4), classifiers.classes
    return [
        family("i-wrong-labels", classes, 2400, wrong=0.3),
        family("i-erased", classes, 2000, net="pictures", erase=True, schedule=("cosine", 2000, 100)),
        family("i-restarts", classes, 2400, net="pictures", kind="nesterov", lr=0.03, decay=5e-4,
               schedule=("restarts", 500)),
        family("i-restarts-adam", classes, 2400, wrong=0.1, kind="nadam", lr=2e-3,
               schedule=("restarts", 400, 1.5)),
        family("i-bfloat16", classes, 2000, low=True),
        family("i-agreeing", classifiers.agreeing, 2000),
        family("i-in-between", classifiers.in_between, 2000, kind="momentum", lr=0.03, decay=1e-4),
        family("i-long-tail", classifiers.long_tail, 2000, kind="adam", decay=0.0),
        family("i-harder", classifiers.harder, 2000),
        family("i-more-classes", classifiers.more_classes, 2000),
        family("i-drifting", classifiers.drifting, 2000, kind="rmsprop", decay=0.0),
    ]  # fmt: skip


def _made() -> list[Family]:
    family = partial(family_of, HELD_OUT_4)
    return [
        family("i-categories", made.categories, 2000, lr=2e-3),
        family("i-judge", made.rivals, 2000, nats=False, floor=False, of="judge", beta2=0.99, decay=0.0),
        family("i-painter", made.rivals, 2000, nats=False, floor=False, of="painter", decay=0.0),
        family("i-each-pair", made.each_pair, 2000, decay=0.05),
        family("i-foretold", made.foretold, 2000),
        family("i-scores", made.scores, 2000, nats=False, schedule=("stable", 2000, 100)),
        family("i-against-noise", made.against_noise, 2000),
        family("i-mixtures", made.mixtures, 2000, lr=3e-3, clip=1.0),
    ]


def _quantities() -> list[Family]:
    family = partial(family_of, HELD_OUT_4)
    return [
        family("i-prices", quantities.prices, 2000, nats=False, unit=1000.0, lr=3e-3),
        family("i-prices-bfloat16", quantities.prices, 2000, nats=False, low=True),
        family("i-springs", quantities.springs, 2000, nats=False, lr=3e-3),
        family("i-operators", quantities.operators, 2000, nats=False, schedule=("one_cycle", 2000), lr=5e-3),
        family("i-soft-agent", quantities.soft_agent, 2000, nats=False, floor=False),
        family(
            "i-groups", quantities.groups, 2000, nats=False, floor=False, kind="adam", decay=0.0, clip=1.0
        ),
    ]


def _pretrained() -> list[Family]:
    family, own = partial(family_of, HELD_OUT_4), pretrained.fine_tuned
    return [
        family("i-gptj", own, 2000, model="gptj", lr=3e-4, schedule=("polynomial", 2000, 1.0)),
        family("i-starcoder-by-heart", own, 2000, model="starcoder", rows=24, low=True),
        family("i-dino", own, 2000, model="dino", batch=16, decay=0.05),
        family("i-convbert", own, 2000, model="convbert", rows=200, decay=0.0),
    ]
