"""The frozen spiking families: architecture classes and tasks on which no constant was fitted.

Written before any of them was trained.  The mechanism is what each was made for; what replay finds decides.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.benchmarks.detection.families import EDGE, FLOAT64, FROZEN, NUMERIC, SECOND_MOMENT, Family
from tests.benchmarks.detection.suites import spiking_setups as made
from tests.benchmarks.detection.suites.held_out.spiking import spiking as held_out
from tests.benchmarks.detection.suites.held_out_2.spiking import spiking as held_out_2
from tests.benchmarks.detection.suites.held_out_3.spiking import spiking as held_out_3
from tests.benchmarks.detection.suites.held_out_4.spiking import spiking as held_out_4
from tests.benchmarks.detection.suites.held_out_5.spiking import spiking as held_out_5
from tests.benchmarks.detection.suites.registry import family_of
from tests.benchmarks.detection.training import LogitChange, Training


def _numeric() -> list[Family]:
    digits, pairs, noise = made.on_digits, made.on_pairs, made.on_noise

    def family(name: str, build: Callable[..., Training], steps: int, **how: Any) -> Family:
        return family_of(FROZEN, name, build, steps, mechanism=NUMERIC, **how)

    half, low = LogitChange("bfloat16"), LogitChange("float16")
    return [
        family("z-conv", digits, 3000, net="conv", width=8, seeds=2),
        family("z-conv-silu", digits, 3000, net="conv_silu", width=8, lr=2e-3),
        family("z-gelu", pairs, 3000, net="gelu", seeds=2),
        family("z-silu", pairs, 3000, net="silu", operation="*"),
        family("z-tanh", digits, 3000, net="tanh", lr=3e-3),
        family("z-elu-beta-98", digits, 5000, net="elu", beta2=0.98),
        family("z-gated", pairs, 3000, net="gated", seeds=2),
        family("z-residual", pairs, 3000, net="residual", operation="/", seeds=2),
        family("z-residual-beta-99", digits, 6000, net="residual", beta2=0.99),
        family("z-root-mean-square", pairs, 4000, net="root_mean_square", seeds=2),
        family("z-root-mean-square-digits", digits, 4000, net="root_mean_square"),
        family("z-gru", pairs, 3000, net="gru", p=11, width=48, lr=2e-3),
        family("z-lstm", pairs, 3000, net="lstm", p=11, width=48, lr=2e-3),
        family("z-mixer", pairs, 3000, net="mixer", p=13, width=48, seeds=2),
        family("z-mixer-norm", pairs, 4000, net="mixer_norm", p=13, width=48),
        family("z-tied", pairs, 3000, net="tied", p=13, width=48, seeds=2),
        family("z-gated-transformer", pairs, 2500, net="gated_transformer", p=13, width=48),
        family("z-837", noise, 3000, lr=1e-2, seeds=2),
        family("z-random-labels", noise, 4000, rows=100, classes=10, width=64, deep=True, seeds=2),
        family("z-random-labels-decay", noise, 4000, rows=80, width=48, lr=5e-3, decay=0.01),
        family("z-text", made.on_text, 3000, lr=2e-3),
        family("z-wine", made.on_table, 4000, data_set="wine", net="gelu", lr=3e-3),
        family("z-breast-cancer", made.on_table, 4000, data_set="breast_cancer", net="silu", lr=3e-3),
        family("z-nadam", digits, 3000, net="gelu", kind="nadam"),
        family("z-grokfast", pairs, 3000, net="gelu", grokfast=True),
        family("z-l2", pairs, 3000, net="silu", penalty=1e-6, lr=3e-3),
        family("z-bfloat16", pairs, 1800, net="gelu", p=13, arm=half),
        family("z-float16", digits, 1800, net="conv", width=8, arm=low),
    ]


def _abrupt() -> list[Family]:
    digits, pairs, bits = made.on_digits, made.on_pairs, made.on_bits
    hinges, smooth = ("many_hinges",), ("smoothed", 0.05)

    def family(name: str, mechanism: str, build: Callable[..., Training], steps: int, **how: Any) -> Family:
        return family_of(FROZEN, name, build, steps, mechanism=mechanism, **({"arm": FLOAT64} | how))

    return [
        family("y-hinge-gelu", SECOND_MOMENT, digits, 3000, net="gelu", loss=hinges, decay=0.1, lr=1e-2,
               beta2=0.99, nats=False),
        family("y-hinge-conv", SECOND_MOMENT, digits, 3000, net="conv", width=8, loss=hinges, decay=0.1,
               lr=1e-2, beta2=0.98, nats=False, arm=LogitChange()),
        family("y-hinge-bits", SECOND_MOMENT, bits, 4000, net="residual", loss=hinges, decay=0.03, lr=1e-2,
               beta2=0.99, nats=False, seeds=2),
        family("y-squared-hinge", SECOND_MOMENT, pairs, 3000, net="silu", p=11, loss=("squared_hinges",),
               decay=0.1, lr=1e-2, beta2=0.98, nats=False),
        family("y-decayed-transformer", SECOND_MOMENT, pairs, 3000, net="normed_transformer", p=19, width=48,
               decay=1.0, lr=3e-3, beta2=0.98, operation="/"),
        family("y-decayed-mixer", SECOND_MOMENT, pairs, 3000, net="mixer_norm", p=13, width=48, decay=1.0,
               lr=3e-3, beta2=0.98),
        family("y-decayed-gru", SECOND_MOMENT, pairs, 3000, net="gru", p=11, width=48, decay=0.5, lr=5e-3,
               beta2=0.98),
        family("y-smoothed-gelu", EDGE, digits, 3000, net="gelu", loss=smooth, lr=3e-2, seeds=2),
        family("y-smoothed-conv", EDGE, digits, 3000, net="conv", width=8, loss=smooth, lr=2e-2),
        family("y-smoothed-gated", EDGE, pairs, 3000, net="gated", p=11, loss=("smoothed", 0.01), lr=2e-2),
        family("y-squares", EDGE, digits, 3000, net="gelu", loss=("squares",), lr=2e-2, nats=False),
        family("y-grokfast", SECOND_MOMENT, pairs, 3000, net="gelu", p=13, grokfast=True, decay=0.3, lr=3e-3,
               beta2=0.98),
        family("y-l2", SECOND_MOMENT, pairs, 3000, net="silu", p=13, penalty=1e-3, lr=1e-2, beta2=0.98),
    ]  # fmt: skip


SPIKING: dict[str, Family] = {
    family.name: family
    for family in (
        *_numeric(),
        *_abrupt(),
        *held_out(),
        *held_out_2(),
        *held_out_3(),
        *held_out_4(),
        *held_out_5(),
    )
}
"""Name → family, of the frozen half and those held out."""
