"""The held-out spiking families.

While they were written, truth.py looked at losses of trainings without a monitor, to see which of them have
slingshots at all.  No detector saw any of them before the commit that fixed its rules and constants.  The
mechanism is what each was made for; what replay finds decides.
"""

from __future__ import annotations

from functools import partial

from tests.benchmarks.detection.families import EDGE, FLOAT64, HELD_OUT, NUMERIC, SECOND_MOMENT, Family
from tests.benchmarks.detection.suites.held_out.unstable import on_numbers, on_tokens
from tests.benchmarks.detection.suites.registry import family_of
from tests.benchmarks.detection.training import LogitChange


def spiking() -> list[Family]:
    return [*_numeric(), *_hinges(), *_decayed(), *_regressions()]


def _numeric() -> list[Family]:
    """Cross-entropy that rows are absorbed by: float32, and a few nats earlier float16 and bfloat16."""
    family = partial(family_of, HELD_OUT, mechanism=NUMERIC)
    half, low = LogitChange("bfloat16"), LogitChange("float16")
    return [
        family("x-bilinear", on_tokens, 3000, net="bilinear", task="permutations", beta2=0.95, lr=3e-3),
        family("x-convolved", on_tokens, 2500, net="convolved", task="brackets", width=10, beta2=0.95,
               lr=4e-3),
        family("x-summed", on_tokens, 3000, net="summed", task="three_terms", beta2=0.95, lr=3e-3, seeds=2),
        family("x-attention", on_tokens, 3000, net="gathered", task="polynomial", beta2=0.95, lr=3e-3),
        family("x-highway", on_tokens, 3000, net="highway", task="polynomial", beta2=0.95, lr=2e-3, seeds=2),
        family("x-maxout", on_tokens, 3000, net="maxout", task="noise", beta2=0.95, lr=2e-3, seeds=2),
        family("x-bumps", on_numbers, 3000, net="bumps", task="digits", beta2=0.95, lr=2e-3),
        family("x-leaky", on_numbers, 3000, net="leaky", task="digits", beta2=0.98, lr=2e-3, seeds=2),
        family("x-squared", on_numbers, 3000, net="squared", task="majority", beta2=0.95, lr=2e-3),
        family("x-mish", on_numbers, 3000, net="mish", task="spirals", beta2=0.95, lr=3e-3),
        family("x-bfloat16", on_numbers, 1500, arm=half, net="softplus", task="majority", beta2=0.98,
               lr=2e-3),
        family("x-float16", on_numbers, 1500, arm=low, net="mish", task="digits", beta2=0.95),
    ]  # fmt: skip


def _hinges() -> list[Family]:
    """The gradient vanishes past the margin, the second moment forgets, the decay pulls rows back."""
    family = partial(
        family_of, HELD_OUT, mechanism=SECOND_MOMENT, arm=FLOAT64, nats=False, lr=1e-2, decay=0.1
    )
    return [
        family("w-hinge-convolved", on_tokens, 2000, net="convolved", task="brackets", loss="hinges",
               beta2=0.99),
        family("w-hinge-squared", on_numbers, 3000, net="squared", task="majority", loss="hinges",
               beta2=0.99, seeds=2),
        family("w-cubed-hinges-summed", on_tokens, 3000, net="summed", task="three_terms",
               loss="cubed_hinges", beta2=0.98),
        family("w-cubed-hinges-highway", on_numbers, 2500, net="highway", task="digits",
               loss="cubed_hinges", beta2=0.98),
        family("w-hinge-attention", on_tokens, 2500, net="gathered", task="three_terms", loss="hinges",
               beta2=0.99),
    ]  # fmt: skip


def _decayed() -> list[Family]:
    """Cross-entropy in float64 under a strong decay."""
    family = partial(family_of, HELD_OUT, mechanism=SECOND_MOMENT, arm=FLOAT64, nats=False)
    return [
        family("w-decayed-attention", on_tokens, 3000, net="gathered_norm", task="polynomial", beta2=0.98,
               lr=5e-3, decay=1.0),
        family("w-decayed-permutations", on_tokens, 2500, net="gathered_norm", task="permutations",
               width=24, beta2=0.98, lr=3e-3, decay=1.0),
        family("w-decayed-mish", on_numbers, 3000, net="mish", task="spirals", beta2=0.98, lr=1e-2,
               decay=0.3, seeds=2),
        family("w-decayed-squared", on_numbers, 2500, net="squared", task="spirals", beta2=0.99, lr=1e-2,
               decay=0.3),
        family("w-decayed-smoothed", on_numbers, 2000, net="mish", task="digits", beta2=0.98, lr=3e-2,
               decay=0.3, loss="smoothed", smoothing=0.05),
    ]  # fmt: skip


def _regressions() -> list[Family]:
    """Squared error, a rate at which the steps are too long."""
    family = partial(family_of, HELD_OUT, mechanism=EDGE, arm=FLOAT64, nats=False, task="teacher")
    return [
        family("w-teacher-squared", on_numbers, 2500, net="squared", beta2=0.99, lr=3e-2),
        family("w-teacher-mish", on_numbers, 2500, net="mish", beta2=0.999, lr=3e-2, seeds=2),
        family("w-teacher-leaky", on_numbers, 2500, net="leaky", beta2=0.95, lr=5e-2, decay=0.1, seeds=2),
        family("w-squares", on_numbers, 2000, net="squared", task="digits", loss="squares", beta2=0.98,
               lr=3e-2, decay=0.1),
    ]  # fmt: skip
