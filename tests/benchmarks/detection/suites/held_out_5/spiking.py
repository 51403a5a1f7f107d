"""The spiking families of the fifth held-out half.

While they were written, truth.py looked at losses of trainings without a monitor and with other seeds, to
see which of them have slingshots at all.  No detector saw any of them before the commit that report.py names.
The mechanism is what each was made for; what replay finds decides.
"""

from __future__ import annotations

from functools import partial

from tests.benchmarks.detection.families import EDGE, FLOAT64, HELD_OUT_5, NUMERIC, SECOND_MOMENT, Family
from tests.benchmarks.detection.suites.held_out_5.unstable import on_numbers, on_tokens
from tests.benchmarks.detection.suites.registry import family_of
from tests.benchmarks.detection.training import LogitChange


def spiking() -> list[Family]:
    return [*_numeric(), *_hinges(), *_decayed(), *_regressions()]


def _numeric() -> list[Family]:
    """Cross-entropy in float32, long past the fit: all rows at each step, or some."""
    family = partial(family_of, HELD_OUT_5, mechanism=NUMERIC, lr=5e-3, beta2=0.95)
    return [
        family("a-joined", on_numbers, 2000, net="joined", task="chance"),
        family("a-reflections", on_numbers, 2000, net="reflections", task="checkers"),
        family("a-ternary", on_numbers, 2000, net="ternary", task="signs", width=80, lr=2e-2),
        family("a-many", on_numbers, 2000, net="many", task="wine_of_two"),
        family("a-recalled", on_numbers, 2000, net="recalled", task="upper_half", beta2=0.98),
        family("a-instance", on_numbers, 2000, net="instance", task="chance", kind="nadam"),
        family("a-shrunk", on_numbers, 2000, net="shifted", task="signs"),
        family("a-fourier", on_tokens, 2000, net="fourier", task="divisor"),
        family("a-sloped", on_tokens, 2000, net="sloped", task="three_summands", beta2=0.98),
        family("a-found", on_tokens, 2000, net="found", task="codes"),
        family("a-batches-joined", on_numbers, 2000, net="joined", task="signs", batch=40),
        family("a-batches-tokens", on_tokens, 2000, net="joined", task="divisor", batch=40),
        family("a-batches-many", on_numbers, 2000, net="many", task="chance", batch=60, beta2=0.98),
        family("a-bfloat16-joined", on_numbers, 1500, arm=LogitChange("bfloat16"), net="joined",
               task="wine_of_two", beta2=0.98, lr=3e-3),
        family("a-autocast-many", on_numbers, 1500, low=True, net="many", task="checkers", lr=3e-3),
    ]  # fmt: skip


def _hinges() -> list[Family]:
    """Losses that are exactly 0 once a row is right enough, under decay."""
    family = partial(
        family_of,
        HELD_OUT_5,
        mechanism=SECOND_MOMENT,
        arm=FLOAT64,
        nats=False,
        lr=2e-2,
        decay=0.2,
        beta2=0.98,
    )
    batches = partial(family, batch=40)
    return [
        family("b-behind", on_numbers, 1600, net="joined", task="signs", loss="behind_squared"),
        family("b-far-behind", on_tokens, 1600, net="sloped", task="divisor", loss="far_behind", lr=1e-2),
        batches("b-behind-batches", on_numbers, 1600, net="joined", task="wine_of_two",
                loss="behind_squared"),
        batches("b-far-behind-batches", on_numbers, 1600, net="recalled", task="wine_of_two",
                loss="far_behind"),
        batches("b-corners-batches", on_numbers, 1600, net="competing", task="upper_half", loss="to_corners"),
        batches("b-corners-tokens", on_tokens, 1600, net="joined", task="mirrors", loss="to_corners",
                decay=0.1),
        batches("b-behind-tokens", on_tokens, 1600, net="fourier", task="codes", loss="behind_squared"),
    ]  # fmt: skip


def _decayed() -> list[Family]:
    """Cross-entropy in float64 under a strong decay."""
    family = partial(
        family_of, HELD_OUT_5, mechanism=SECOND_MOMENT, arm=FLOAT64, lr=2e-2, decay=0.3, beta2=0.98
    )
    batches = partial(family, batch=40)
    return [
        family("b-decayed-reflections", on_numbers, 1600, net="reflections", task="wine_of_two"),
        family("b-decayed-sloped", on_tokens, 1600, net="sloped", task="mirrors"),
        batches("b-decayed-joined", on_numbers, 1600, net="joined", task="checkers", decay=0.1),
        batches("b-decayed-many", on_numbers, 1600, net="many", task="upper_half", decay=0.1),
        batches("b-decayed-recalled", on_numbers, 1600, net="recalled", task="signs", decay=0.1),
        batches("b-decayed-instance", on_numbers, 1600, net="instance", task="wine_of_two"),
        batches("b-decayed-waist", on_numbers, 1600, net="narrow_waist", task="chance", decay=0.1),
        batches("b-decayed-fourier", on_tokens, 1600, net="fourier", task="codes"),
        batches("b-decayed-found", on_tokens, 1600, net="found", task="mirrors", decay=0.1),
        batches("b-decayed-tokens", on_tokens, 1600, net="shifted", task="three_summands", kind="nadam",
                options={"decoupled_weight_decay": True}),
        batches("b-decayed-given", on_numbers, 1600, net="given", task="checkers"),
        batches("b-focal", on_numbers, 1600, net="shifted", task="signs", loss="focal", nats=False),
    ]  # fmt: skip


def _regressions() -> list[Family]:
    """Squared errors and their like, a rate at which the steps are too long, or one that grows so far."""
    family = partial(family_of, HELD_OUT_5, mechanism=EDGE, arm=FLOAT64, nats=False, lr=5e-2, beta2=0.98)
    batches = partial(family, batch=40)
    return [
        family("b-pendulum", on_numbers, 2000, net="reflections", task="pendulum", loss="squares", lr=1e-1),
        family("b-growing-adam", on_numbers, 2000, net="many", task="ellipses", loss="squares", lr=2e-3,
               schedule=("growing", 150, 1.4), beta2=0.99),
        family("b-growing-momentum", on_numbers, 2000, net="shifted", task="chirps", loss="squares",
               kind="momentum", lr=5e-3, schedule=("growing", 120, 1.25)),
        batches("b-pendulum-batches", on_numbers, 2000, net="joined", task="pendulum", loss="squares"),
        batches("b-cubes-batches", on_numbers, 2000, net="narrow_waist", task="ellipses", loss="cubes",
                lr=1e-1),
        batches("b-angles-batches", on_numbers, 2000, net="joined", task="pendulum", loss="of_sines"),
        batches("b-growing-batches", on_numbers, 2000, net="reflections", task="friedman", loss="squares",
                lr=2e-3, schedule=("growing", 150, 1.4), beta2=0.99),
        batches("b-growing-whitened", on_numbers, 2000, net="given", task="sugar", loss="whitened",
                lr=2e-3, schedule=("growing", 150, 1.4), beta2=0.99),
        batches("b-growing-sgd", on_numbers, 2000, net="joined", task="chirps", loss="squares", kind="sgd",
                lr=2e-2, schedule=("growing", 120, 1.4)),
        batches("b-root-mean-square", on_numbers, 2000, net="many", task="chirps", loss="squares",
                kind="rmsprop", lr=5e-2, options={"alpha": 0.98}),
    ]  # fmt: skip
