"""The spiking families of the fourth held-out half.

While they were written, truth.py looked at losses of trainings without a monitor and with other seeds, to
see which of them have slingshots at all.  No detector saw any of them before the commit that report.py names.
The mechanism is what each was made for; what replay finds decides.
"""

from __future__ import annotations

from functools import partial

from tests.benchmarks.detection.families import EDGE, FLOAT64, HELD_OUT_4, NUMERIC, SECOND_MOMENT, Family
from tests.benchmarks.detection.suites.held_out_4.unstable import on_numbers, on_tokens
from tests.benchmarks.detection.suites.registry import family_of
from tests.benchmarks.detection.training import LogitChange


def spiking() -> list[Family]:
    return [*_numeric(), *_hinges(), *_decayed(), *_regressions()]


def _numeric() -> list[Family]:
    """Cross-entropy in float32, long past the fit: all rows at each step, or some."""
    family = partial(family_of, HELD_OUT_4, mechanism=NUMERIC, lr=5e-3, beta2=0.95)
    return [
        family("l-polynomial", on_numbers, 2000, net="polynomial", task="labels_of_chance"),
        family("l-kronecker", on_numbers, 2000, net="kronecker", task="shells"),
        family("l-tropical", on_numbers, 2000, net="tropical", task="monks"),
        family("l-reversible", on_numbers, 2000, net="reversible", task="labels_of_chance"),
        family("l-from-zero", on_numbers, 2000, net="from_zero", task="labels_of_chance", beta2=0.97),
        family("l-boosted", on_numbers, 2000, net="boosted", task="vowels"),
        family("l-written", on_numbers, 2000, net="written", task="labels_of_chance", kind="nadam"),
        family("l-matrix-products", on_tokens, 2000, net="matrix_products", task="edits", width=16),
        family("l-folded", on_tokens, 2000, net="folded", task="edits", beta2=0.98),
        family("l-turning", on_tokens, 2000, net="turning", task="square_of_chance"),
        family("l-batches-diagonal", on_tokens, 2000, net="diagonal", task="runs", batch=50),
        family("l-bfloat16-pieces", on_numbers, 1500, arm=LogitChange("bfloat16"), net="pieces",
               task="shells", beta2=0.98, lr=3e-3),
        family("l-autocast-complex", on_numbers, 1500, low=True, net="complex", task="vowels", lr=3e-3),
    ]  # fmt: skip


def _hinges() -> list[Family]:
    """Losses that are exactly 0 once a row is right enough, under decay."""
    family = partial(
        family_of, HELD_OUT_4, mechanism=SECOND_MOMENT, arm=FLOAT64, nats=False, lr=2e-2, decay=0.1
    )
    return [
        family("e-hinges", on_numbers, 1600, net="sorted", task="circuits", loss="hinges", beta2=0.99),
        family("e-hinges-boosted", on_numbers, 1600, net="boosted", task="vowels", loss="hinges",
               beta2=0.98, batch=50, lr=4e-2),
        family("e-squared-hinges", on_numbers, 1600, net="flowing", task="shells", loss="squared_hinges",
               beta2=0.99),
        family("e-squared-hinges-tokens", on_tokens, 1600, net="dilated", task="games",
               loss="squared_hinges", beta2=0.98, batch=50),
        family("e-against-mean", on_numbers, 1600, net="kronecker", task="turned", loss="against_mean",
               beta2=0.98, lr=4e-2, decay=0.5),
        family("e-modified-huber", on_numbers, 1600, net="quadratic", task="monks", loss="modified_huber",
               beta2=0.98, batch=50),
        family("e-each-squared", on_tokens, 1600, net="neighbours", task="middles", loss="each_squared",
               beta2=0.99),
        family("e-angles", on_numbers, 1500, net="absolute", task="moons", loss="apart_by_angle", rows=60,
               beta2=0.98),
        family("e-hinges-batches", on_numbers, 1600, net="rules", task="circuits", loss="squared_hinges",
               beta2=0.98, batch=50),
        family("e-hinges-late", on_numbers, 1600, net="reversible", task="vowels", loss="each_squared",
               beta2=0.98, decay=0.0, late=(500, 0.2)),
    ]  # fmt: skip


def _decayed() -> list[Family]:
    """Cross-entropy in float64 under a strong decay."""
    family = partial(
        family_of, HELD_OUT_4, mechanism=SECOND_MOMENT, arm=FLOAT64, lr=2e-2, decay=0.3, beta2=0.98
    )
    return [
        family("e-decayed-spread", on_numbers, 1600, net="spread", task="vowels", batch=50),
        family("e-decayed-from-zero", on_numbers, 1600, net="from_zero", task="shells"),
        family("e-decayed-circulant", on_numbers, 1600, net="circulant", task="turned", batch=50),
        family("e-decayed-turning", on_tokens, 1600, net="turning", task="powers"),
        family("e-decayed-kernelised", on_tokens, 1600, net="kernelised", task="queens", batch=50),
        family("e-decayed-folded", on_tokens, 1500, net="folded", task="games", kind="nadam",
               options={"decoupled_weight_decay": True}),
        family("e-decayed-flowing", on_numbers, 1600, net="flowing", task="vowels"),
        family("e-decayed-batches", on_numbers, 1600, net="complex", task="labels_of_chance", batch=50),
        family("e-truncated", on_numbers, 1600, net="shrunk", task="monks", loss="truncated", nats=False),
        family("e-adamax-hinges", on_numbers, 1600, net="wavelets", task="circuits", kind="adamax", lr=5e-2,
               loss="squared_hinges", decay=2e-3, nats=False),
    ]  # fmt: skip


def _regressions() -> list[Family]:
    """Squared errors and their like, a rate at which the steps are too long, or one that grows so far."""
    family = partial(family_of, HELD_OUT_4, mechanism=EDGE, arm=FLOAT64, nats=False, lr=5e-2)
    return [
        family("e-arm", on_numbers, 2000, net="flowing", task="arm", loss="squares", beta2=0.99, lr=1e-1),
        family("e-weather", on_numbers, 2000, net="smooth_celu", task="weather", loss="squares", beta2=0.98,
               lr=1e-1, batch=50),
        family("e-impedance", on_numbers, 2000, net="wavelets", task="impedance", loss="relative",
               beta2=0.999, lr=3e-2),
        family("e-ripples", on_numbers, 2000, net="reversible", task="ripples", loss="squares", beta2=0.98,
               lr=5e-2),
        family("e-explained", on_numbers, 2000, net="sorted", task="ripples", loss="explained", beta2=0.99,
               lr=1e-1),
        family("e-one-hot", on_numbers, 2000, net="boosted", task="circuits", loss="one_hot_squares",
               beta2=0.98),
        family("e-growing-sgd", on_numbers, 2000, net="smooth_celu", task="arm", loss="squares", kind="sgd",
               lr=2e-2, schedule=("growing", 100, 1.2)),
        family("e-growing-nesterov", on_numbers, 2000, net="flowing", task="weather", loss="squares",
               kind="nesterov", lr=5e-3, schedule=("growing", 100, 1.25)),
        family("e-growing-momentum", on_numbers, 2000, net="absolute", task="impedance", loss="rooted",
               kind="momentum", lr=1e-2, schedule=("growing", 120, 1.25)),
        family("e-quartic", on_numbers, 2000, net="pieces", task="weather", loss="quartic", kind="nadam",
               beta2=0.98, lr=2e-2),
        family("e-root-mean-square", on_numbers, 2000, net="quadratic", task="arm", loss="squares",
               kind="rmsprop", lr=5e-3, options={"alpha": 0.98}, batch=50),
        family("e-with-squares", on_numbers, 2000, net="tropical", task="moons", loss="with_squares",
               beta2=0.98),
        family("e-growing-batches", on_numbers, 2000, net="kronecker", task="arm", loss="squares", batch=50,
               beta2=0.99, lr=2e-3, schedule=("growing", 150, 1.4)),
    ]  # fmt: skip
