"""The spiking families of the third held-out half.

While they were written, truth.py looked at losses of trainings without a monitor and with other seeds, to see
which of them have slingshots at all, and found none in the float64 twins of the numeric families.  No
detector saw any of them before the commit that report.py names.  The mechanism is what each was made for;
what replay finds decides.
"""

from __future__ import annotations

from functools import partial

from tests.benchmarks.detection.families import EDGE, FLOAT64, HELD_OUT_3, NUMERIC, SECOND_MOMENT, Family
from tests.benchmarks.detection.suites.held_out_3.unstable import on_numbers, on_tokens
from tests.benchmarks.detection.suites.registry import family_of
from tests.benchmarks.detection.training import LogitChange


def spiking() -> list[Family]:
    return [
        *_numeric_numbers(), *_numeric_tokens(), *_in_batches(), *_in_half(), *_hinges(), *_decayed(),
        *_regressions(),
    ]  # fmt: skip


def _numeric_numbers() -> list[Family]:
    """Cross-entropy in float32, all rows at each step, long past the fit.

    Three families absorb and do not spike, here and among the tokens: their features hardly grow.
    """
    family = partial(family_of, HELD_OUT_3, mechanism=NUMERIC, lr=5e-3, beta2=0.95)
    return [
        family("s-snake", on_numbers, 2500, net="snake", task="gates"),
        family("s-logarithm", on_numbers, 2500, net="logarithm", task="gates"),
        family("s-rational", on_numbers, 2500, net="rational", task="highest"),
        family("s-chebyshev", on_numbers, 2500, net="chebyshev", task="terraces"),
        family("s-excited", on_numbers, 2500, net="excited", task="tones"),
        family("s-squashed", on_numbers, 2500, net="squashed", task="clouds"),
        family("s-one-length", on_numbers, 2500, net="one_length", task="gates"),
        family("s-one-length-last", on_numbers, 2500, net="one_length_last", task="highest", lr=1e-2),
        family("s-mixed", on_numbers, 2500, net="mixed", task="terraces", lr=3e-3),
        family("s-butterfly", on_numbers, 2500, net="butterfly", task="terraces"),
        family("s-crossed", on_numbers, 2500, net="crossed", task="terraces"),
        family("s-points", on_numbers, 2500, net="points", task="clouds"),
        family("s-sound", on_numbers, 2500, net="sound", task="tones"),
        family("s-three-lines", on_numbers, 2500, net="three_lines", task="highest"),
        family("s-nadam", on_numbers, 2500, net="mixed", task="gates", kind="nadam"),
        family("s-radam", on_numbers, 2500, net="points", task="clouds", kind="radam", beta2=0.98),
        family("s-default-decay", on_numbers, 3000, net="excited", task="gates", decay=0.01, beta2=0.98),
    ]  # fmt: skip


def _numeric_tokens() -> list[Family]:
    family = partial(family_of, HELD_OUT_3, mechanism=NUMERIC, lr=3e-3, beta2=0.95)
    return [
        family("s-retained", on_tokens, 2500, net="retained", task="below"),
        family("s-slopes", on_tokens, 2500, net="slopes", task="dihedral"),
        family("s-near", on_tokens, 2000, net="near", task="three_in_a_row"),
        family("s-difference", on_tokens, 2500, net="difference", task="two_squares"),
        family("s-related", on_tokens, 2500, net="related", task="hands", lr=5e-3),
        family("s-remembered", on_tokens, 2500, net="remembered", task="affine", lr=5e-3),
        family("s-two-ways", on_tokens, 2000, net="two_ways", task="hands", lr=5e-3),
        family("s-adapted", on_tokens, 3000, net="adapted", task="dihedral", lr=5e-3),
        family("s-outer", on_tokens, 2500, net="outer", task="two_squares", width=12, lr=5e-3),
        family("s-embedded", on_tokens, 2500, net="butterfly", task="knights", lr=5e-3, beta2=0.97),
    ]


def _in_batches() -> list[Family]:
    """The same by minibatches; the truth is found in the loss of all rows."""
    family = partial(family_of, HELD_OUT_3, mechanism=NUMERIC, lr=5e-3, beta2=0.95, batch=60)
    return [
        family("s-batches-gates", on_numbers, 2500, net="mixed", task="gates"),
        family("s-batches-knights", on_tokens, 2500, net="remembered", task="knights"),
        family("s-batches-points", on_numbers, 2500, net="points", task="clouds", beta2=0.98),
    ]


def _in_half() -> list[Family]:
    """Logits in bfloat16 or float16 before the loss, by a cast or by autocast."""
    family = partial(family_of, HELD_OUT_3, mechanism=NUMERIC, lr=3e-3)
    half, low = LogitChange("bfloat16"), LogitChange("float16")
    return [
        family("s-bfloat16-points", on_numbers, 1500, arm=half, net="points", task="clouds", beta2=0.98),
        family("s-bfloat16-retained", on_tokens, 1500, arm=half, net="retained", task="below", beta2=0.95),
        family("s-float16-sound", on_numbers, 1500, arm=low, net="sound", task="tones", beta2=0.95),
        family("s-autocast", on_numbers, 1500, low=True, net="chebyshev", task="gates", beta2=0.95),
    ]


def _hinges() -> list[Family]:
    """Losses that are exactly 0 once a row is right enough, under decay, from the start or late."""
    family = partial(
        family_of, HELD_OUT_3, mechanism=SECOND_MOMENT, arm=FLOAT64, nats=False, lr=2e-2, decay=0.1
    )
    return [
        family("r-second-best", on_numbers, 2000, net="snake", task="highest", loss="second_best",
               beta2=0.99),
        family("r-second-best-points", on_numbers, 2000, net="points", task="clouds", loss="second_best",
               beta2=0.98),
        family("r-exponential", on_numbers, 2000, net="butterfly", task="tones", loss="exponential",
               beta2=0.98, lr=4e-2, decay=0.2),
        family("r-exponential-rows", on_tokens, 2000, net="winners", task="three_in_a_row",
               loss="exponential", beta2=0.99, lr=2e-2),
        family("r-three-apart", on_numbers, 1500, net="excited", task="clouds", rows=48, loss="three_apart",
               beta2=0.98),
        family("r-inside", on_numbers, 2000, net="squashed", task="surfaces", loss="inside", beta2=0.98),
        family("r-pairs-squared", on_numbers, 2000, net="mixed", task="surface", loss="pairs_squared",
               beta2=0.99),
        family("r-binary", on_numbers, 2000, net="power", task="two_of_sixteen", loss="binary_hinges",
               beta2=0.99),
        family("r-sure-enough", on_numbers, 2000, net="snake", task="gates", loss="sure_enough", beta2=0.98,
               nats=True, lr=5e-2, decay=0.3),
        family("r-late", on_numbers, 2500, net="graph", task="graphs", loss="second_best", beta2=0.98,
               decay=0.0, late=(800, 0.3)),
        family("r-late-binary", on_numbers, 2500, net="snake", task="two_of_sixteen", loss="binary_hinges",
               beta2=0.99, decay=0.0, late=(600, 0.2)),
    ]  # fmt: skip


def _decayed() -> list[Family]:
    """Cross-entropy in float64 under a strong decay."""
    family = partial(
        family_of, HELD_OUT_3, mechanism=SECOND_MOMENT, arm=FLOAT64, lr=1e-2, decay=0.3, beta2=0.98
    )
    return [
        family("r-decayed-squashed", on_numbers, 2000, net="squashed", task="clouds", lr=3e-2, decay=0.5),
        family("r-decayed-one-length", on_numbers, 2000, net="one_length_last", task="gates", decay=0.5,
               lr=3e-2),
        family("r-decayed-centred", on_numbers, 2000, net="centred", task="gates", lr=3e-2, decay=0.3),
        family("r-decayed-graph", on_numbers, 2000, net="graph", task="graphs", rows=50, lr=2e-2, decay=0.05),
        family("r-decayed-sound", on_numbers, 2000, net="sound", task="tones", lr=5e-2, decay=0.5),
        family("r-decayed-slopes", on_tokens, 2000, net="slopes", task="dihedral", lr=2e-2),
        family("r-decayed-two-ways", on_tokens, 1500, net="two_ways", task="three_in_a_row", lr=2e-2),
        family("r-decayed-points", on_numbers, 2000, net="points", task="clouds", lr=3e-2, decay=0.5),
        family("r-decayed-batches", on_numbers, 2000, net="squashed", task="clouds", batch=40, lr=3e-2,
               decay=0.5),
        family("r-decayed-late", on_tokens, 2500, net="remembered", task="affine", decay=0.0, late=(700, 1.0),
               lr=2e-2),
    ]  # fmt: skip


def _regressions() -> list[Family]:
    """Squared errors and their like, a rate at which the steps are too long, or one that grows so far."""
    family = partial(family_of, HELD_OUT_3, mechanism=EDGE, arm=FLOAT64, nats=False, lr=5e-2)
    return [
        family("r-squares-snake", on_numbers, 2000, net="snake", task="surfaces", loss="squares", beta2=0.99,
               lr=1e-1),
        family("r-squares-crossed", on_numbers, 2000, net="crossed", task="surface", loss="squares",
               beta2=0.98, lr=1e-1),
        family("r-lopsided", on_numbers, 2000, net="logarithm", task="surface", loss="lopsided", beta2=0.98,
               lr=5e-2),
        family("r-log-cosh", on_numbers, 2000, net="squashed", task="surfaces", loss="log_cosh", beta2=0.98),
        family("r-brier", on_numbers, 2000, net="snake", task="gates", loss="of_one_hot", beta2=0.98,
               lr=3e-2),
        family("r-momentum", on_numbers, 2000, net="arctangent", task="surface", loss="squares",
               kind="momentum", lr=1e-2, schedule=("growing", 150, 1.25)),
        family("r-growing-rate", on_numbers, 1500, net="chebyshev", task="surfaces", loss="squares",
               beta2=0.98, lr=1e-3, schedule=("growing", 100, 1.4)),
        family("r-smoothed", on_tokens, 1500, net="related", task="hands", loss="smoothed", beta2=0.98,
               lr=5e-2, nats=True, decay=0.1),
        family("r-graph", on_numbers, 2000, net="graph", task="graphs", rows=50, beta2=0.95, lr=5e-3,
               nats=True),
        family("r-momentless", on_numbers, 2000, net="snake", task="terraces", kind="rmsprop",
               options={"alpha": 0.95}, lr=5e-3, nats=True),
    ]  # fmt: skip
