"""Which runs are tried: short ones, several seeds of each."""

from __future__ import annotations

from collections.abc import Callable, Iterable
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
from tests.benchmarks.detection.training import LogitChange, Training

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
    """Losses in float64, but for hinge's: whatever they come from, it is not rounding."""
    parity, digits, division = setups.sparse_parity, setups.digits_mlp, setups.modular_mlp
    transformer = partial(setups.modular_transformer, p=13, layers=1, norm=True, weight_decay=1.0)
    hinge: dict[str, Any] = {"hinge": True, "rows": 500, "width": 64}
    decayed: dict[str, Any] = {"width": 64, "weight_decay": 1.0}

    def family(name: str, build: Callable[..., Training], steps: int, **options: Any) -> Family:
        arm = LogitChange() if name.startswith("parity") else FLOAT64
        return Family(name, partial(build, **options), steps, (0,), SECOND_MOMENT, arm=arm)

    return [
        replace(FAMILIES["parity-hinge-95"], steps=1000),  # a slingshot every hundred steps
        replace(FAMILIES["parity-hinge-99"], steps=2000),
        family("parity-hinge-99-decay-.1", parity, 2000, beta2=0.99, weight_decay=0.1, **hinge),
        FAMILIES["survives-float64-quick"],
        family("transformer-decay", transformer, 500, width=48, lr=5e-3, beta2=0.98),
        family("transformer-decay-narrow", transformer, 400, width=32, lr=1e-2, beta2=0.95),
        family("digits-decay", digits, 800, lr=3e-2, beta2=0.95, depth=3, **decayed),
        family("division-decay-norm", division, 1500, p=17, lr=1e-2, beta2=0.99, norm=True, **decayed),
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
