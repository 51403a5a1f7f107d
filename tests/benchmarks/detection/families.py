"""The registry: which trainings the proving ground consists of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from tests.benchmarks.detection import setups
from tests.benchmarks.detection.training import LogitChange, Training

NUMERIC, SECOND_MOMENT, EDGE = "numerical_feature_inflation", "second_moment", "edge_of_stability"
EXTERNAL = "external"
"""A kick from outside."""
TUNING, FROZEN, HELD_OUT, HELD_OUT_2, HELD_OUT_3, HELD_OUT_4, HELD_OUT_5 = (
    "tuning", "frozen", "held-out", "held-out 2", "held-out 3", "held-out 4", "held-out 5",
)  # fmt: skip
"""Constants are fitted on the first half of a suite; the second was trained after they were fixed.  Each time
rules had changed after a look at the newest half, another one was trained: the third to the seventh."""
NEWEST_FIRST = HELD_OUT_5, HELD_OUT_4, HELD_OUT_3, HELD_OUT_2, HELD_OUT, FROZEN
"""Halves that no constant was fitted on. The pages show them in this order, each with tables of its own."""


@dataclass(frozen=True)
class Family:
    """Runs that differ in nothing but their seed."""

    name: str
    build: Callable[[int, LogitChange], Training]
    steps: int
    seeds: tuple[int, ...]
    mechanism: str | None  # what its slingshots come from; None: there should be none
    quick: bool = False
    arm: LogitChange = field(default_factory=LogitChange)
    half: str | None = None
    """TUNING, one of NEWEST_FIRST, or None for the families of the quick and the full suite."""
    nats: bool = True
    """Whether the loss is a cross-entropy; of any other loss the unit says nothing (truth.py)."""
    floor: bool = True
    """Whether the loss has a lowest value that the run descends to; that of one of two players has none."""

    @property
    def quiet(self) -> bool:
        return self.mechanism is None

    @property
    def abrupt(self) -> bool:
        """Whether what it should warn of builds up within a few steps, whatever τ."""
        return self.mechanism not in (None, NUMERIC)

    @property
    def module(self) -> str:
        """Name of the module that builds its runs."""
        return str(self._function().__module__)

    def _function(self) -> Any:
        build: Any = self.build
        return build.func if isinstance(build, partial) else build

    def config(self) -> str:
        """All that a run of it depends on, besides the code of the set-ups and the seed."""
        build: Any = self.build
        function = self._function()
        keywords = build.keywords if isinstance(build, partial) else {}
        return repr((function.__qualname__, sorted(keywords.items()), self.steps, self.arm))


def _family(
    name: str,
    build: Callable[..., Training],
    steps: int,
    seeds: int,
    mechanism: str | None,
    *,
    quick: bool = False,
    arm: LogitChange | None = None,
    **variation: Any,
) -> Family:
    """``seeds`` is how many, from 0; the variation goes to the builder."""
    bound = partial(build, **variation)
    return Family(name, bound, steps, tuple(range(seeds)), mechanism, quick, arm or LogitChange())


FLOAT64, PROJECTED = LogitChange("float64"), LogitChange(project=True)
_CAPPED, _Z, _L2 = ("soft_capped", 15.0), ("z_loss", 1e-3), ("logit_l2", 1e-3)
_SMALL: dict[str, Any] = {"rows": 300, "bits": 20, "width": 64}
_DECAYED: dict[str, Any] = {
    "p": 23,
    "layers": 1,
    "norm": True,
    "weight_decay": 1.0,
    "lr": 3e-3,
    "beta2": 0.98,
}


def _spiking() -> list[Family]:
    mlp, transformer, parity = setups.modular_mlp, setups.modular_transformer, setups.sparse_parity
    digits = setups.digits_mlp
    return [
        # Modular arithmetic, full batch: the known cycle.
        _family("division-23", mlp, 1600, 2, NUMERIC, quick=True, p=23),
        _family("division-17", mlp, 1800, 2, NUMERIC, quick=True, p=17, width=64),
        _family("addition-17", mlp, 1800, 1, NUMERIC, quick=True, p=17, width=64, operation="+"),
        _family("multiplication-17", mlp, 1800, 1, NUMERIC, quick=True, p=17, width=64, operation="*"),
        _family("division-23-long", mlp, 6000, 3, NUMERIC, p=23),
        _family("division-23-wide", mlp, 4000, 2, NUMERIC, p=23, width=512),
        _family("division-23-deep", mlp, 4000, 2, NUMERIC, p=23, depth=5),
        _family("division-23-shallow", mlp, 6000, 2, NUMERIC, p=23, depth=1),
        _family("division-23-beta-99", mlp, 10_000, 2, NUMERIC, p=23, beta2=0.99),
        _family("division-23-beta-999", mlp, 36_000, 2, NUMERIC, p=23, beta2=0.999),
        _family("addition-23", mlp, 5000, 2, NUMERIC, p=23, operation="+"),
        _family("multiplication-23", mlp, 5000, 2, NUMERIC, p=23, operation="*"),
        _family("narrow-high-lr", mlp, 2000, 2, NUMERIC, quick=True, p=17, width=20, lr=1e-2),
        _family("narrow-high-lr-long", mlp, 6000, 4, NUMERIC, p=17, width=20, lr=1e-2),
        _family("decay", mlp, 2000, 1, NUMERIC, quick=True, p=17, width=64, weight_decay=0.1),
        _family("decay-long", mlp, 6000, 2, NUMERIC, p=23, weight_decay=0.1),
        _family("decay-strong", mlp, 6000, 2, NUMERIC, p=23, weight_decay=1.0),
        _family("minibatch", mlp, 6000, 2, NUMERIC, p=37, depth=4, batch=256),
        _family("minibatch-half", mlp, 3000, 1, NUMERIC, quick=True, p=13, width=64, batch=64),
        # Transformers on the same task.
        _family("transformer-13", transformer, 1300, 1, NUMERIC, quick=True, p=13, width=48, layers=1),
        _family("transformer-17", transformer, 2500, 3, NUMERIC, p=17),
        _family("transformer-17-beta-99", transformer, 8000, 1, NUMERIC, p=17, beta2=0.99),
        _family("transformer-norm", transformer, 5000, 2, NUMERIC, p=17, norm=True),
        _family("transformer-norm-probe", transformer, 5000, 1, NUMERIC, p=17, norm=True, probe=True),
        # Half-precision losses: rounding at margins of a few nats.
        _family("bfloat16-loss", mlp, 1200, 1, NUMERIC, quick=True, arm=LogitChange("bfloat16"), p=17,
                width=64),
        _family("float16-loss", mlp, 1200, 1, NUMERIC, quick=True, arm=LogitChange("float16"), p=17,
                width=64),
        _family("bfloat16-loss-long", mlp, 5000, 2, NUMERIC, arm=LogitChange("bfloat16"), p=23),
        _family("float16-loss-long", mlp, 5000, 2, NUMERIC, arm=LogitChange("float16"), p=23),
        # Digits.
        _family("digits", digits, 1900, 1, NUMERIC, quick=True),
        _family("digits-long", digits, 5000, 3, NUMERIC),
        _family("vgg11", setups.digit_vgg, 1600, 2, NUMERIC),
        _family("vgg11-norm-inside", setups.digit_vgg, 1500, 1, NUMERIC, norm=True),
        _family("vit", setups.digit_vit, 2500, 2, NUMERIC),
        _family("vit-probe", setups.digit_vit, 2500, 1, NUMERIC, probe=True),
        # k-sparse parity: cross-entropy is numeric, hinge is not.
        _family("parity-ce-95", parity, 3000, 1, NUMERIC, quick=True, hinge=False, beta2=0.95, **_SMALL),
        _family("parity-ce-99", parity, 12_000, 2, NUMERIC, hinge=False, beta2=0.99, **_SMALL),
        _family("parity-ce", parity, 22_000, 3, NUMERIC, hinge=False),
        _family("parity-hinge-95", parity, 2500, 1, SECOND_MOMENT, quick=True, hinge=True, beta2=0.95,
                weight_decay=0.1, rows=500, width=64),
        _family("parity-hinge-99", parity, 2500, 1, SECOND_MOMENT, quick=True, hinge=True, beta2=0.99,
                weight_decay=0.03, rows=500, width=64),
        _family("parity-hinge", parity, 20_000, 3, SECOND_MOMENT, hinge=True),
        _family("parity-hinge-float64", parity, 20_000, 2, SECOND_MOMENT, arm=FLOAT64, hinge=True),
        _family("parity-hinge-decay", parity, 20_000, 2, SECOND_MOMENT, hinge=True, weight_decay=0.1),
        # Cross-entropy spikes that survive float64.
        _family("survives-float64-quick", transformer, 700, 1, SECOND_MOMENT, quick=True, arm=FLOAT64,
                **_DECAYED),
        _family("survives-float64", transformer, 4000, 3, SECOND_MOMENT, arm=FLOAT64, **_DECAYED),
        # Edge of stability: curvature that does not vanish, or a learning rate too high at the start.
        _family("high-lr-early", digits, 500, 3, EDGE, quick=True, arm=FLOAT64, lr=2e-2, depth=5, width=64),
        _family("smoothing-high-lr", setups.smoothed_digits, 3000, 2, EDGE, lr=3e-2, smoothing=0.01),
        # From outside.
        _family("lr-kick", mlp, 700, 1, EXTERNAL, quick=True, arm=FLOAT64, p=17, width=64,
                kick=(300, 3, 1e3)),
        _family("bad-batch", digits, 700, 1, EXTERNAL, quick=True, arm=FLOAT64, width=64, depth=2,
                bad_batches=(400, 401, 402, 403)),
    ]  # fmt: skip


def _quiet() -> list[Family]:
    mlp, digits = setups.modular_mlp, setups.digits_mlp
    transformer, parity = setups.modular_transformer, setups.sparse_parity
    all_rows: dict[str, Any] = {"rows": None, "width": 64, "depth": 2, "batch": 64}
    return [
        # Twins: the same seeds, one thing different.
        _family("division-23-float64", mlp, 1600, 2, None, quick=True, arm=FLOAT64, p=23),
        _family("division-17-float64", mlp, 1800, 2, None, quick=True, arm=FLOAT64, p=17, width=64),
        _family("division-17-projected", mlp, 1800, 1, None, quick=True, arm=PROJECTED, p=17, width=64),
        _family("division-17-eps", mlp, 1800, 1, None, quick=True, p=17, width=64, eps=1e-5),
        _family("narrow-high-lr-float64", mlp, 2000, 2, None, quick=True, arm=FLOAT64, p=17, width=20,
                lr=1e-2),
        _family("digits-float64", digits, 1900, 1, None, quick=True, arm=FLOAT64),
        _family("division-23-long-float64", mlp, 6000, 3, None, arm=FLOAT64, p=23),
        _family("division-23-long-projected", mlp, 6000, 2, None, arm=PROJECTED, p=23),
        _family("division-23-beta-99-float64", mlp, 10_000, 1, None, arm=FLOAT64, p=23, beta2=0.99),
        _family("minibatch-float64", mlp, 6000, 2, None, arm=FLOAT64, p=37, depth=4, batch=256),
        _family("transformer-17-float64", transformer, 3000, 1, None, arm=FLOAT64, p=17),
        _family("parity-ce-float64", parity, 22_000, 2, None, arm=FLOAT64, hinge=False),
        _family("vgg11-float64", setups.digit_vgg, 1200, 1, None, arm=FLOAT64),
        # Ordinary training.
        _family("digits-minibatch", digits, 2500, 2, None, quick=True, rows=None, batch=64),
        _family("digits-minibatch-999", digits, 15_000, 1, None, rows=None, batch=64, beta2=0.999),
        _family("gpt", setups.tiny_gpt, 900, 1, None, quick=True),
        _family("gpt-long", setups.tiny_gpt, 3000, 1, None, windows=20_000, layers=4, width=128),
        _family("gpt-memorising", setups.tiny_gpt, 6000, 1, None, windows=64, weight_decay=0.0),
        _family("resnet", setups.digit_resnet, 700, 1, None, quick=True),
        _family("resnet-long", setups.digit_resnet, 5000, 1, None, width=16),
        _family("fine-tuning", setups.digits_fine_tuned, 1500, 1, None, quick=True),
        _family("fine-tuning-long", setups.digits_fine_tuned, 8000, 1, None),
        _family("warm-restarts", digits, 1500, 1, None, quick=True, restart=300, **all_rows),
        _family("warm-restarts-long", digits, 8000, 1, None, restart=1000, **all_rows),
        _family("accumulation", digits, 900, 1, None, quick=True, accumulate=4, **(all_rows | {"batch": 32})),
        _family("absorbed-layer-norm", mlp, 2000, 1, None, quick=True, p=17, width=64, norm=True),
        _family("absorbed-layer-norm-long", mlp, 4000, 2, None, p=23, norm=True),
        # Losses that break the zero-sum by design, or bend it.
        _family("z-loss", digits, 1200, 1, None, quick=True, loss=_Z, **all_rows),
        _family("logit-l2", digits, 1200, 1, None, quick=True, loss=_L2, **all_rows),
        _family("soft-capped", digits, 1200, 1, None, quick=True, loss=_CAPPED, **all_rows),
        _family("label-smoothing", mlp, 1800, 1, None, quick=True, loss=("smoothed", 1e-3), p=17, width=64),
        _family("focal", digits, 1200, 1, None, quick=True, loss=("focal", 2.0), **all_rows),
        _family("class-weights", digits, 1200, 1, None, quick=True, loss=("class_weighted", 0.2, 3.0),
                **all_rows),
        _family("distillation", setups.digits_distilled, 1200, 1, None, quick=True),
        _family("two-heads", setups.digits_two_heads, 1200, 1, None, quick=True),
        _family("contrastive", setups.digits_contrastive, 1200, 1, None, quick=True),
        *(
            _family(f"{name}-long", digits, 5000, 1, None, loss=loss, **all_rows)
            for name, loss in (
                ("z-loss", _Z), ("logit-l2", _L2), ("soft-capped", _CAPPED), ("focal", ("focal", 2.0)),
                ("class-weights", ("class_weighted", 0.2, 3.0)),
            )
        ),
        _family("label-smoothing-long", mlp, 6000, 1, None, loss=("smoothed", 1e-3), p=23),
        _family("accumulation-long", digits, 4000, 1, None, accumulate=4, **(all_rows | {"batch": 32})),
        _family("two-heads-long", setups.digits_two_heads, 5000, 1, None),
        _family("vit-float64", setups.digit_vit, 2000, 1, None, arm=FLOAT64),
        _family("distillation-long", setups.digits_distilled, 5000, 1, None),
        _family("contrastive-long", setups.digits_contrastive, 5000, 1, None),
    ]  # fmt: skip


FAMILIES: dict[str, Family] = {family.name: family for family in (*_spiking(), *_quiet())}


def suite(name: str, only: list[str] | None = None) -> list[Family]:
    """The families of "quick", "full", "edges", "frozen" (all halves nothing was tuned on) or one later half.

    ``only`` names some families instead.

    Raises ValueError for unknown names.
    """
    # Those suites are built of this module's parts.
    from tests.benchmarks.detection.suites.edges import EDGES
    from tests.benchmarks.detection.suites.spiking import SPIKING

    known = FAMILIES | SPIKING | EDGES
    if only:
        unknown = [item for item in only if item not in known]
        if unknown:
            raise ValueError(f"No family {', '.join(unknown)}. Known: {', '.join(known)}.")
        return [known[item] for item in only]
    if name == "edges":
        return list(EDGES.values())
    if name in NEWEST_FIRST:
        return [family for family in SPIKING.values() if name in (FROZEN, family.half)]
    # What runs in the quick suite is part of the full one.
    return [family for family in FAMILIES.values() if family.quick or name == "full"]
