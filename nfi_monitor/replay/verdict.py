"""Conclude the mechanism of a slingshot from the arms that averted it in a replay.

A signal may only accompany the cause.  If the slingshot does not come after one cause was removed, this is
the best proof that one run allows.  The order of the rules matters: a smaller learning rate averts nearly
every slingshot, so it names a mechanism only if no more specific arm averts it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from nfi_monitor.detect.causes import JUMP
from nfi_monitor.schema import Measured, decode
from nfi_monitor.types import Mechanism, finite_or_none

BASELINE = "as_it_was"
FLOAT64_NEEDS = 1.25
"""Time in τ before the slingshot: after it, a change of the loss to float64 comes too late (measured)."""


@dataclass(frozen=True)
class Outcome:
    """The result of one arm. ``losses``: one for each of the ``steps`` optimizer steps after the snapshot."""

    arm: str
    spiked_at: int | None
    """First step of the slingshot (or of NaN or Inf); None if there was none within ``steps``."""
    peak: Measured
    """Largest finite loss."""
    losses: tuple[Measured, ...]
    steps: int
    applied: bool = True
    """False if the arm found nothing to change (no head, no second moment). Then ignore its outcome."""
    rate_jump: float = 1.0
    """Largest factor between the learning rates of neighbouring optimizer steps."""
    note: str = ""
    """A remark on the outcome for people; may be empty."""

    def to_json(self) -> dict[str, Any]:
        record = asdict(self)
        record["peak"] = finite_or_none(self.peak)
        record["losses"] = [finite_or_none(loss) for loss in self.losses]
        return record

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Outcome:
        """Make an outcome from the result of :meth:`to_json`. Raises ValueError otherwise."""
        found: Outcome = decode(cls, record)
        return found


@dataclass(frozen=True)
class ReplayVerdict:
    """The mechanism that a replay found, with the outcomes of its arms."""

    snapshot_step: int
    outcomes: dict[str, Outcome]
    """Arm → its outcome, in the order of the replay."""
    mechanism: Mechanism
    reasons: tuple[str, ...]
    """Sentences that explain the verdict, the decisive one first."""
    reproduced: bool | None
    """Whether the unchanged arm gave the recorded losses to the last bit; None: nothing to compare."""
    slingshot: str | None = None
    """Id of the alert that was replayed; None if there was none."""

    @property
    def spiked_at(self) -> int | None:
        """First step of the slingshot in the unchanged arm; None if it did not happen again."""
        baseline = self.outcomes.get(BASELINE)
        return None if baseline is None else baseline.spiked_at

    def to_json(self) -> dict[str, Any]:
        """Return a dict of plain types; NaN and Inf become None."""
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
        """Make a verdict from the result of :meth:`to_json`. Raises ValueError otherwise."""
        if isinstance(record, Mapping) and "outcomes" in record:
            outcomes: list[Outcome] = decode(list[Outcome], record["outcomes"])
            record = {**record, "outcomes": {outcome.arm: outcome for outcome in outcomes}}
        found: ReplayVerdict = decode(cls, record)
        return found


def margin(tau: float) -> int:
    """Return for how many steps after the unchanged run's slingshot an arm must not spike to avert it.

    Such a run is chaotic: any change moves its slingshot by some steps, which does not avert it.
    """
    return max(round(2 * tau), 20)


def judge(outcomes: Mapping[str, Outcome], snapshot_step: int, tau: float) -> tuple[Mechanism, list[str]]:
    """Return (mechanism, reasons). A rule whose arms were not run is skipped.

    An arm proves something only if the arm ``nudged``, a change without meaning, still has the slingshot.
    """
    baseline = outcomes[BASELINE]
    if baseline.spiked_at is None:
        return Mechanism.UNKNOWN, [
            f"the slingshot did not happen again: the unchanged run has none in the {baseline.steps:,} steps "
            f"after step {snapshot_step:,}"
        ]
    reasons = [f"unchanged, the run has the slingshot at step {baseline.spiked_at:,}"]

    def asked(*arms: str) -> list[str]:
        return [arm for arm in arms if arm in outcomes and outcomes[arm].applied]

    def averted(*arms: str) -> list[str]:
        return [arm for arm in asked(*arms) if outcomes[arm].spiked_at is None]

    if averted("nudged"):
        # The control: if any change averts the slingshot, an arm without one is chance.
        return Mechanism.UNKNOWN, [
            *reasons,
            "moving the weights by a part in a million averts it as well, so the other arms prove nothing. "
            "Replay from an earlier snapshot, or compare several slingshots",
        ]
    for arms, mechanism, why in _RULES:
        silent, failed = averted(*arms), [arm for arm in asked(*arms) if arm not in averted(*arms)]
        if silent == ["lr_held"] and baseline.rate_jump < JUMP:
            # In a warm-up the snapshot's rate is smaller than later ones: that averts nearly everything.
            reasons.append("lr held averts it, but the rate only rose: a smaller rate would avert it, too")
            continue
        if silent:
            notes = [outcomes[arm].note for arm in silent if outcomes[arm].note]
            found = f"{_listed(silent)} {_averts(silent)} it: {why}"
            return mechanism, [*reasons, found, *notes, *_other(failed)]
        reasons += _other(failed)
    lead = (baseline.spiked_at - snapshot_step) / tau
    if asked("float64_loss") and lead < FLOAT64_NEEDS:
        reasons.append(
            f"the snapshot is {lead:.2g} τ before the slingshot, so float64 may have come too late: replay "
            "from an earlier one"
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
        "a second moment that has decayed is the cause",
    ),
    (
        ("smaller_lr",),
        Mechanism.EDGE_OF_STABILITY,
        "the learning rate is too large for the curvature",
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
