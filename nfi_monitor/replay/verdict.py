"""From what the arms of a replay did to the mechanism: which change makes the slingshot not happen.

A signal can only accompany a cause; taking the cause away and seeing nothing happen is as close to a proof
as one run allows.  The order of the questions matters: a smaller learning rate averts nearly everything, so
it names a mechanism only when nothing more specific averted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from nfi_monitor.detect.causes import JUMP
from nfi_monitor.types import Mechanism, finite_or_none

BASELINE = "as_it_was"
FLOAT64_NEEDS = 1.25
"""τ between the change and the slingshot below which moving the loss to float64 comes too late (measured)."""


@dataclass(frozen=True)
class Outcome:
    """What one arm did. ``losses`` are those of the ``steps`` optimizer steps after the snapshot."""

    arm: str
    spiked_at: int | None
    """First step of the slingshot (or of a loss that is not finite); None: none within ``steps``."""
    peak: float
    """Largest finite loss."""
    losses: tuple[float, ...]
    steps: int
    applied: bool = True
    """False: the arm found nothing to change (no head, no second moment), so its outcome says nothing."""
    rate_jump: float = 1.0
    """Largest factor between the learning rates of neighbouring optimizer steps."""
    note: str = ""
    """What else the arm did, in words, that its outcome has to be read with."""

    def to_json(self) -> dict[str, Any]:
        record = asdict(self)
        record["peak"] = finite_or_none(self.peak)
        record["losses"] = [finite_or_none(loss) for loss in self.losses]
        return record

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Outcome:
        return cls(
            arm=str(record["arm"]),
            spiked_at=record["spiked_at"],
            peak=_number(record["peak"]),
            losses=tuple(_number(loss) for loss in record["losses"]),
            steps=int(record["steps"]),
            applied=bool(record.get("applied", True)),
            rate_jump=float(record.get("rate_jump", 1.0)),
            note=str(record.get("note", "")),
        )


@dataclass(frozen=True)
class ReplayVerdict:
    """The causal verdict of a replay, with what it rests on."""

    snapshot_step: int
    outcomes: dict[str, Outcome]
    """Arm → what it did, in the order they were run."""
    mechanism: Mechanism
    reasons: tuple[str, ...]
    """The verdict in words, what it rests on first."""
    reproduced: bool | None
    """Whether the arm without a change gave the recorded losses to the last bit; None: nothing to compare."""
    slingshot: str | None = None
    """Id of the alert that was replayed; None: none was known."""

    @property
    def spiked_at(self) -> int | None:
        """Step at which the slingshot happened again; None: it did not."""
        baseline = self.outcomes.get(BASELINE)
        return None if baseline is None else baseline.spiked_at

    def to_json(self) -> dict[str, Any]:
        """A dict of plain types; what is not finite is None."""
        return {
            "slingshot": self.slingshot,
            "snapshot_step": self.snapshot_step,
            "outcomes": [outcome.to_json() for outcome in self.outcomes.values()],
            "mechanism": str(self.mechanism),
            "reasons": list(self.reasons),
            "reproduced": self.reproduced,
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> ReplayVerdict:
        """The inverse of :meth:`to_json`. Raises KeyError and ValueError like :meth:`Alert.from_json`."""
        outcomes = [Outcome.from_json(item) for item in record["outcomes"]]
        return cls(
            snapshot_step=int(record["snapshot_step"]),
            outcomes={outcome.arm: outcome for outcome in outcomes},
            mechanism=Mechanism(record["mechanism"]),
            reasons=tuple(record["reasons"]),
            reproduced=record["reproduced"],
            slingshot=record.get("slingshot"),
        )


def margin(tau: float) -> int:
    """Steps after the slingshot of the run as it was for which an arm must stay quiet to have averted it.

    A run on the edge is chaotic: any change moves its slingshot by some steps, and that averts nothing.
    """
    return max(round(2 * tau), 20)


def judge(outcomes: Mapping[str, Outcome], snapshot_step: int, tau: float) -> tuple[Mechanism, list[str]]:
    """(mechanism, reasons). The arms not run are questions not asked.

    An arm proves something only if the slingshot withstands a change that means nothing (``nudged``).
    """
    baseline = outcomes[BASELINE]
    if baseline.spiked_at is None:
        return Mechanism.UNKNOWN, [
            f"it did not happen again: as it was, no slingshot in the {baseline.steps:,} steps after step "
            f"{snapshot_step:,}"
        ]
    reasons = [f"as it was, the slingshot comes at step {baseline.spiked_at:,}"]

    def asked(*arms: str) -> list[str]:
        return [arm for arm in arms if arm in outcomes and outcomes[arm].applied]

    def averted(*arms: str) -> list[str]:
        return [arm for arm in asked(*arms) if outcomes[arm].spiked_at is None]

    if averted("nudged"):
        # The control: where anything averts it, the silence of an arm is chance.
        return Mechanism.UNKNOWN, [
            *reasons,
            "weights moved by a part in a million avert it as well: which arm is silent is chance. Replay "
            "from an earlier snapshot, or look at several slingshots",
        ]
    for arms, mechanism, why in _RULES:
        silent, failed = averted(*arms), [arm for arm in asked(*arms) if arm not in averted(*arms)]
        if silent == ["lr_held"] and baseline.rate_jump < JUMP:
            # In a warm-up the rate of the snapshot is a smaller one, which averts nearly everything.
            reasons.append("lr held averts it, but the rate only climbed: as a smaller rate would")
            continue
        if silent:
            notes = [outcomes[arm].note for arm in silent if outcomes[arm].note]
            found = f"{_listed(silent)} {_averts(silent)} it: {why}"
            return mechanism, [*reasons, found, *notes, *_other(failed)]
        reasons += _other(failed)
    lead = (baseline.spiked_at - snapshot_step) / tau
    if asked("float64_loss") and lead < FLOAT64_NEEDS:
        reasons.append(
            f"the snapshot is {lead:.2g} τ before it: float64 may have come too late; replay an earlier one"
        )
    return Mechanism.UNKNOWN, [*reasons, "no arm that names a mechanism averts it"]


_RULES: tuple[tuple[tuple[str, ...], Mechanism, str], ...] = (
    (
        ("float64_loss", "zero_sum"),
        Mechanism.NUMERICAL_FEATURE_INFLATION,
        "rounding in the loss is the cause",
    ),
    (("lr_held",), Mechanism.EXTERNAL, "the learning-rate schedule is the cause"),
    (("other_data",), Mechanism.EXTERNAL, "these steps' batches are the cause"),
    (
        ("second_moment_held",),
        Mechanism.SECOND_MOMENT,
        "a second moment that has let go of the gradient is the cause",
    ),
    (
        ("smaller_lr",),
        Mechanism.EDGE_OF_STABILITY,
        "the learning rate is above what the curvature bears",
    ),
)


def arm_in_words(arm: str) -> str:
    return arm.replace("_", " ").replace("+", " and ")


def _listed(arms: Sequence[str]) -> str:
    return " and ".join(arm_in_words(arm) for arm in arms)


def _averts(arms: Sequence[str]) -> str:
    return "averts" if len(arms) == 1 else "avert"


def _other(arms: Sequence[str]) -> list[str]:
    return [f"{_listed(arms)} {'does' if len(arms) == 1 else 'do'} not avert it"] if arms else []


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)
