"""Which runs are tried: short ones, several seeds of each."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from tests.benchmarks.detection import setups
from tests.benchmarks.detection.families import EXTERNAL, FAMILIES, FLOAT64, NUMERIC, SECOND_MOMENT, Family
from tests.benchmarks.detection.proofs.kicks import (
    BOTH,
    FLIPPED,
    GARBAGE,
    INPUTS,
    LABELS,
    RATE,
    SCALED,
    Kick,
    kicked,
)
from tests.benchmarks.detection.training import LogitChange

CURVATURE, ABSORBS, EVERY_STEP = "curvature", "absorbs", "every step"
KINDS = (NUMERIC, CURVATURE, EXTERNAL, ABSORBS, EVERY_STEP)
"""numeric, curvature: runs that slingshot by themselves.  external: kicked runs.  absorbs: runs that absorb
for good, or in which a warning may last.  every step: runs of the first two kinds under ``every=1``."""
SEEDS = range(5)
COMPARED = range(2)
"""Seeds that are also read at every step."""


@dataclass(frozen=True)
class Subject:
    """One run, and what it is tried for."""

    kind: str
    family: Family
    seed: int
    kick: Kick | None = None

    @property
    def name(self) -> str:
        return f"{self.kind.replace(' ', '-')}-{self.family.name}-{self.seed}"


def subjects() -> list[Subject]:
    """All, the first seed of every family first: what is interrupted has something of everything."""
    found = [
        *(Subject(NUMERIC, family, seed) for family in _numeric() for seed in SEEDS),
        *(Subject(CURVATURE, family, seed) for family in _curvature() for seed in SEEDS),
        *_external(),
        *(Subject(ABSORBS, family, seed) for family in _absorbs() for seed in family.seeds),
    ]
    found += [
        replace(subject, kind=EVERY_STEP)
        for subject in found
        if subject.kind in (NUMERIC, CURVATURE) and subject.seed in COMPARED
    ]
    return sorted(found, key=lambda subject: subject.seed)


def _numeric() -> list[Family]:
    names = (
        "division-17", "addition-17", "multiplication-17", "division-23", "narrow-high-lr", "decay", "digits",
        "transformer-13", "bfloat16-loss", "float16-loss", "minibatch-half", "parity-ce-95",
    )  # fmt: skip
    return [FAMILIES[name] for name in names]


def _curvature() -> list[Family]:
    hinge = FAMILIES["parity-hinge-95"]
    return [
        replace(hinge, steps=1500),  # a slingshot every hundred steps
        replace(hinge, name="parity-hinge-95-float64", steps=1500, arm=FLOAT64),
        FAMILIES["parity-hinge-99"],
        Family(
            "parity-hinge-99-decay",
            partial(setups.sparse_parity, hinge=True, beta2=0.99, weight_decay=0.1, rows=500, width=64),
            2500,
            (0,),
            SECOND_MOMENT,
        ),
        FAMILIES["survives-float64-quick"],
        FAMILIES["high-lr-early"],
        replace(FAMILIES["smoothing-high-lr"], steps=1500),
    ]


# --- from outside ---------------------------------------------------------------------------------------

_ONCE = (LABELS, 1, 1.0)
"""One bad batch, and nothing after it: where the weights do not move much, this is no slingshot."""
_SPOILT = (LABELS, 3, 1.0)

_NETS: dict[str, tuple[str, dict[str, Any], int, list[tuple[str, int, float]]]] = {
    # name → builder, its options, the first kicked step, (kick, steps, amount)
    "digits-full-batch": (
        "digits_mlp", {"width": 64, "depth": 3, "lr": 1e-2, "beta2": 0.99}, 70,
        [_ONCE, _SPOILT, (BOTH, 1, 30.0), (BOTH, 3, 30.0), (SCALED, 1, 1e5), (FLIPPED, 1, 1e5),
         (FLIPPED, 3, 1e4), (GARBAGE, 1, 1e3), (RATE, 1, 300.0), (RATE, 5, 30.0), (RATE, 20, 30.0)],
    ),
    "digits-default": (  # Adam's own β2
        "digits_mlp", {"rows": None, "batch": 64, "width": 64, "depth": 2, "beta2": 0.999}, 500,
        [_SPOILT, (INPUTS, 1, 100.0), (SCALED, 1, 1e3), (SCALED, 1, 1e5), (FLIPPED, 1, 1e3), (RATE, 1, 100.0),
         (RATE, 1, 300.0), (RATE, 5, 30.0), (RATE, 100, 30.0)],
    ),
    "division-float32": (  # absorbs when the kick comes
        "modular_mlp", {"p": 17, "width": 64}, 700,
        [_ONCE, _SPOILT, (BOTH, 3, 30.0), (RATE, 1, 300.0), (RATE, 5, 30.0), (RATE, 20, 30.0)],
    ),
    "division-float32-fast": (
        "modular_mlp", {"p": 17, "width": 64, "lr": 1e-2}, 300,
        [_SPOILT, (SCALED, 3, 1e4), (FLIPPED, 3, 1e4), (FLIPPED, 5, 1e5)],
    ),
    "division-float64-fast": (  # the same, which does not absorb
        "modular_mlp", {"p": 17, "width": 64, "lr": 1e-2}, 300,
        [_SPOILT, (SCALED, 3, 1e4), (FLIPPED, 3, 1e4), (FLIPPED, 5, 1e5)],
    ),
    "division-float64": (
        "modular_mlp", {"p": 17, "width": 64, "lr": 3e-3}, 100,
        [_SPOILT, (FLIPPED, 3, 1e4), (RATE, 1, 300.0), (RATE, 5, 30.0), (RATE, 20, 30.0)],
    ),
    "digits-absorbing": (  # two thirds of its rows have a violation, and the rate's jump needs no rounding
        "digits_mlp", {"rows": 300, "width": 64, "batch": 64, "lr": 3e-3}, 600,
        [_SPOILT, (FLIPPED, 1, 1e5), (FLIPPED, 3, 1e4), (RATE, 1, 100.0), (RATE, 1, 300.0), (RATE, 5, 30.0),
         (RATE, 5, 100.0)],
    ),
    "division-minibatch": (
        "modular_mlp", {"p": 17, "width": 64, "batch": 64, "lr": 3e-3, "beta2": 0.99}, 400,
        [_SPOILT, (BOTH, 1, 30.0), (SCALED, 1, 1e3), (SCALED, 1, 1e5), (FLIPPED, 1, 1e3), (FLIPPED, 1, 1e5),
         (RATE, 1, 300.0)],
    ),
    "transformer": (
        "modular_transformer", {"p": 13, "width": 48, "layers": 1, "beta2": 0.99, "lr": 3e-3}, 120,
        [_ONCE, _SPOILT, (SCALED, 1, 1e5), (SCALED, 3, 1e4), (FLIPPED, 1, 1e5), (RATE, 1, 100.0),
         (RATE, 1, 300.0)],
    ),
    "resnet": (
        "digit_resnet", {"batch": 32}, 250,
        [_SPOILT, (SCALED, 1, 1e5), (FLIPPED, 1, 1e3), (RATE, 1, 30.0), (RATE, 1, 100.0), (RATE, 5, 30.0),
         (RATE, 20, 10.0)],
    ),
    "vgg": (
        "digit_vgg", {"rows": 64, "divide": 16}, 250,
        [_ONCE, (SCALED, 1, 1e3), (FLIPPED, 1, 1e3), (RATE, 1, 100.0), (RATE, 20, 10.0)],
    ),
}  # fmt: skip
AFTER = 60
"""Steps for which a kicked run goes on after its last kicked step."""


def _external() -> Iterable[Subject]:
    for net, (of, options, first, kicks) in _NETS.items():
        arm = FLOAT64 if "float64" in net else LogitChange()
        for what, steps, amount in kicks:
            kick = Kick(what, first, steps, amount)
            name = f"{net}-{what.replace(' ', '-')}-{amount:g}x{steps}"
            build = partial(kicked, of=of, kick=kick, **options)
            family = Family(name, build, kick.last + AFTER, (0, 1), EXTERNAL, arm=arm)
            seeds = (0,) if net == "vgg" else (0, 1)
            yield from (Subject(EXTERNAL, family, seed, kick) for seed in seeds)


def unkicked(subject: Subject) -> Family:
    """The same training without its kick."""
    build: Any = subject.family.build
    options = {name: value for name, value in build.keywords.items() if name not in ("of", "kick")}
    return replace(subject.family, build=partial(getattr(setups, build.keywords["of"]), **options))


def net_of(subject: Subject) -> str:
    return next(net for net in sorted(_NETS, key=len, reverse=True) if subject.family.name.startswith(net))


# --- runs that absorb for good ----------------------------------------------------------------------------


def _absorbs() -> list[Family]:
    small: dict[str, Any] = {"rows": 300, "bits": 20, "width": 64, "hinge": False}
    return [
        replace(FAMILIES["absorbed-layer-norm"], steps=4000, seeds=(0, 1)),
        replace(FAMILIES["absorbed-layer-norm-long"], seeds=(0,)),
        Family(
            "digits-minibatch-long",
            partial(setups.digits_mlp, rows=None, batch=64, width=64, depth=2),
            10_000,
            (0, 1),
            None,
        ),
        Family(
            "parity-ce-95-float64", partial(setups.sparse_parity, beta2=0.95, **small), 6000, (0,), None,
            arm=FLOAT64,
        ),
        replace(FAMILIES["parity-ce-float64"], seeds=(0,)),
    ]  # fmt: skip
