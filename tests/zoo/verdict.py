"""Judge a training of the zoo: right, degraded with a true note, or wrong."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from nfi_monitor import Monitor
from nfi_monitor.errors import HeadNotFoundError
from tests.zoo.configuration import Configuration
from tests.zoo.session import Record

RIGHT, DEGRADED, WRONG = "right", "degraded", "wrong"
BROKEN = "broken"
"""The training fails without a monitor, too: the zoo itself must be mended."""
TOLERANCE = 2e-3
"""Relative difference of two losses that counts as rounding: a loss may be recomputed in bfloat16."""


@dataclass
class Verdict:
    """What one configuration showed; a row of results.json."""

    library: str
    name: str
    verdict: str = RIGHT
    causes: list[str] = field(default_factory=list)
    head: str | None = None
    rows: str = "none"
    """"logits", "recomputed", "none" or "no classes"."""
    why: str = ""
    """Why no rows are seen: the code of the note that says so."""
    notes: dict[str, str] = field(default_factory=dict)

    def wrong(self, cause: str) -> None:
        self.verdict = WRONG
        self.causes.append(cause)

    def degraded(self, cause: str) -> None:
        if self.verdict != WRONG:
            self.verdict = DEGRADED
        self.causes.append(cause)

    def to_json(self) -> dict[str, Any]:
        kept = asdict(self)
        kept["notes"] = sorted(self.notes)
        return kept


def judge(library: str, configuration: Configuration, alone: Record, watched: Record) -> Verdict:
    """Hold what the monitor found against what is true of the configuration."""
    verdict = Verdict(library, configuration.name)
    monitor = watched.session.monitor
    watched.session.averages = alone.session.averages
    if watched.error is not None:
        _raised(verdict, configuration, watched.error, watched.session.in_adapter)
        return verdict
    if monitor is None:
        verdict.wrong("not attached: no monitor was made")
        return verdict
    verdict.notes = {note.code: note.message for note in monitor.notes}
    _bits(verdict, alone, watched)
    _steps(verdict, configuration, monitor)
    _head(verdict, configuration, monitor)
    _rows(verdict, configuration, monitor, watched)
    _loss(verdict, configuration, monitor, watched)
    _optimizer(verdict, configuration, monitor)
    _alarms(verdict, monitor)
    _notes(verdict, configuration, watched)
    return verdict


def _raised(verdict: Verdict, configuration: Configuration, error: BaseException, in_adapter: bool) -> None:
    """An adapter never ends a training; a loop of one's own may be refused before step 1."""
    text = str(error)
    helpful = [*configuration.heads] if isinstance(error, HeadNotFoundError) else ["OptimWrapper"]
    if not in_adapter and "no module named" not in text and any(name in text for name in helpful):
        verdict.degraded("refused before step 1, with a message that says what to pass")
    else:
        last = text.strip().splitlines()[0] if text.strip() else ""
        verdict.wrong(f"the training ended: {type(error).__name__}: {last[:200]}")


def _bits(verdict: Verdict, alone: Record, watched: Record) -> None:
    if alone.digest != watched.digest:
        verdict.wrong("other bits: weights, buffers or random state differ from the run without a monitor")


def _steps(verdict: Verdict, configuration: Configuration, monitor: Monitor) -> None:
    if monitor.step != configuration.steps:
        _unless_noted(
            verdict,
            ("no_steps",),
            f"{monitor.step} of {configuration.steps} optimizer steps were seen",
        )


def _head(verdict: Verdict, configuration: Configuration, monitor: Monitor) -> None:
    # A monitor closes with the training; summary() keeps the head's name as "name (Linear 8→5)".
    described = monitor.summary()["run"].get("head") or ""
    described = "" if described.startswith("none") else described
    verdict.head = described.split(" (")[0].removeprefix("layer ") or None
    if verdict.head in configuration.heads or (verdict.head is None and configuration.headless):
        return
    if verdict.head is None:
        _unless_noted(verdict, _NO_HEAD, "the head was not found")
    else:
        verdict.wrong(f"wrong head: {described}, right is {' or '.join(configuration.heads) or 'none'}")


def _column(monitor: Monitor, name: str) -> tuple[Any, Any]:
    """Return steps and values of a quantity; empty if it was never measured."""
    history = monitor.history
    return history[name] if name in history else ((), ())  # noqa: SIM401 (not a dict)


_NO_HEAD = ("no_head", "several_heads", "no_steps")
"""Notes that say why no head, or no single one, is watched; without a step nothing is."""


def _rows(verdict: Verdict, configuration: Configuration, monitor: Monitor, watched: Record) -> None:
    steps, _ = _column(monitor, "live_fraction")
    _, recomputed = _column(monitor, "recomputed_fraction")
    if len(steps):
        verdict.rows = "recomputed" if any(value > 0 for value in recomputed) else "logits"
    elif not configuration.classes:
        verdict.rows = "no classes"
    if not configuration.classes:
        return
    if not len(steps):
        verdict.why = next((code for code in _NO_ROWS if code in verdict.notes), "")
        _unless_noted(verdict, _NO_ROWS, "no rows are seen")
    elif len(steps) < configuration.steps - 1:
        _unless_noted(verdict, _NO_ROWS, f"rows are seen in {len(steps)} of {configuration.steps} steps")
    if verdict.rows == "logits" and not configuration.logits:
        verdict.wrong("rows are said to be from logits, which this loss does not have")
    if not configuration.soft:  # else the loss is no plain cross-entropy of these rows
        _values_of_rows(verdict, monitor, watched)


def _values_of_rows(verdict: Verdict, monitor: Monitor, watched: Record) -> None:
    """Compare the loss at the head with F.cross_entropy's result, where that was called once a step."""
    if verdict.rows != "logits":  # recomputed rows are a sample
        return
    for step, value in zip(*_column(monitor, "head_loss"), strict=True):
        calls = watched.session.cross_entropies.get(step, [])
        if len(calls) == 1 and not math.isclose(value, calls[0], rel_tol=TOLERANCE, abs_tol=TOLERANCE):
            _unless_noted(
                verdict,
                ("logits_scaled", "logits_changed", "not_shift_invariant", "several_heads"),
                f"the rows are not those of the loss: at step {step} cross_entropy of them is {value:.5g}, "
                f"of the loss's {calls[0]:.5g}",
            )
            return


_NO_ROWS = ("head_never_fired", "rows_elsewhere", "logits_changed", *_NO_HEAD)


def _loss(verdict: Verdict, configuration: Configuration, monitor: Monitor, watched: Record) -> None:
    name = "loss" if len(_column(monitor, "loss")[0]) else "head_loss"
    steps, values = _column(monitor, name)
    if not len(steps):
        _unless_noted(verdict, ("no_loss", *_NO_HEAD), "the loss is not seen", allowed=not configuration.loss)
        return
    trained = watched.session.losses
    compared = [
        (step, value, trained[step]) for step, value in zip(steps, values, strict=True) if step in trained
    ]
    if not compared:
        verdict.wrong("no step's loss can be compared with a loss that was trained")
        return
    for step, value, true in compared:
        right = [true, *(watched.session.backwards[step] if configuration.either else ())]
        if not any(math.isclose(value, one, rel_tol=TOLERANCE, abs_tol=TOLERANCE) for one in right):
            text = f"step {step}: trained {true:.5g}, {name} {value:.5g}"
            if name == "loss":
                _unless_noted(verdict, ("loss_divided",), f"the loss is shown too low ({text})")
            else:
                _unless_noted(
                    verdict, ("no_loss", "loss_not_trained", "loss_between_readings", "logits_scaled",
                              "not_shift_invariant", "not_cross_entropy", "rows_weighted", "several_heads"),
                    f"the trained loss is not seen ({text})", allowed=not configuration.loss,
                )  # fmt: skip
            return
    if len(compared) < configuration.steps - 1:
        verdict.degraded(f"the loss of {len(compared)} of {configuration.steps} steps is seen")


IMPLAUSIBLE = 100.0
"""RMS_t from which on it cannot be of a second moment: these trainings are stationary."""


def _optimizer(verdict: Verdict, configuration: Configuration, monitor: Monitor) -> None:
    if configuration.tau is not None and not math.isclose(monitor.tau, configuration.tau, rel_tol=1e-3):
        verdict.wrong(f"wrong τ: {monitor.tau:g}, right is {configuration.tau:g}")
    if "rms_t_max" in monitor.history:
        largest = max((float(value) for value in monitor.history["rms_t_max"][1]), default=0.0)
        if not largest < IMPLAUSIBLE:
            verdict.wrong(f"implausible second moment: RMS_t of {largest:g}")


def _alarms(verdict: Verdict, monitor: Monitor) -> None:
    for alert in monitor.alerts:
        verdict.wrong(f"false alarm: {alert.kind.value} at step {alert.first_step}")


def _unless_noted(verdict: Verdict, codes: tuple[str, ...], cause: str, *, allowed: bool = False) -> None:
    """Degraded where a note with one of these codes says so, else wrong."""
    said = next((code for code in codes if code in verdict.notes), None)
    if said is not None:
        if not allowed:
            verdict.degraded(f"{cause} (note {said})")
    else:
        verdict.wrong(f"{cause}, and no note says so")


def _averages(record: Record, most: int | None = None) -> bool:
    """Return whether at most so many (None: not all) second moments are averages of squared gradients."""
    if record.session.averages is None:
        return False
    follow, tensors = record.session.averages
    return follow <= (tensors - 1 if most is None else most)


def _at_head(record: Record) -> bool:
    """Return whether the trained losses are plain results of F.cross_entropy."""
    session = record.session
    return all(session.cross_entropies.get(step) == [loss] for step, loss in session.losses.items())


_TRUE: dict[str, Callable[[Configuration, Record, Verdict], bool]] = {
    "tied_head": lambda c, r, v: r.tied,
    "head_without_weight": lambda c, r, v: not r.weighty,
    "optimizer_without_head": lambda c, r, v: not r.trained,
    "optimizer_not_torch": lambda c, r, v: not isinstance(r.session.optimizer, torch.optim.Optimizer),
    "no_second_moment": lambda c, r, v: not r.second_moment or _averages(r, 0),
    "state_unreadable": lambda c, r, v: r.partial,
    "second_moment_in_part": lambda c, r, v: r.partial or _averages(r),
    "single_output": lambda c, r, v: not c.classes,
    "not_shift_invariant": lambda c, r, v: not c.shift_invariant or not c.classes,
    "soft_targets": lambda c, r, v: c.soft or not c.classes,
    "not_cross_entropy": lambda c, r, v: c.soft or c.scaled or not c.shift_invariant,
    "rows_weighted": lambda c, r, v: c.soft,
    "logits_scaled": lambda c, r, v: c.scaled,
    "half_precision_loss": lambda c, r, v: c.half,
    "head_never_fired": lambda c, r, v: (
        v.rows in ("none", "no classes") and (c.logits or "model.train()" not in v.notes["head_never_fired"])
    ),
    "no_loss": lambda c, r, v: True,  # judged with the loss
    "no_head": lambda c, r, v: v.head is None,
    "no_steps": lambda c, r, v: any("optimizer steps were seen" in cause for cause in v.causes),
    "head_by_output": lambda c, r, v: v.head in c.heads,
    "head_guessed": lambda c, r, v: v.head in c.heads,
    "head_parameter": lambda c, r, v: r.parameter,
    "several_heads": lambda c, r, v: len(c.heads) > 1,
    "no_features": lambda c, r, v: r.spatial or not r.weighty,
    "rows_after_head": lambda c, r, v: c.changed and v.rows == "logits",
    "logits_changed": lambda c, r, v: c.changed and v.rows == "none",
    "rows_recomputed": lambda c, r, v: v.rows == "recomputed",
    "absorption_left_out": lambda c, r, v: c.soft or not c.shift_invariant,
    "displacement_left_out": lambda c, r, v: c.changed or c.scaled or "tapped" in c.name,
    "logits_added": lambda c, r, v: c.changed,
    "loss_divided": lambda c, r, v: c.name.endswith("reported divided"),
    "loss_not_at_head": lambda c, r, v: not _at_head(r),
    "adaptive_softmax": lambda c, r, v: "adaptive" in c.name,
    "loss_below_zero": lambda c, r, v: min(r.session.losses.values(), default=0.0) < 0,
}
"""Code of a note → whether it is true of a training."""
_NEVER = "failed_"


def _notes(verdict: Verdict, configuration: Configuration, watched: Record) -> None:
    for code, message in verdict.notes.items():
        if code in configuration.true_notes:
            continue
        if code.startswith(_NEVER):
            verdict.wrong(f"a part failed: {code}: {message[-200:]}")
        elif code not in _TRUE:
            verdict.wrong(f"a note that the zoo cannot judge: {code}: {message[:160]}")
        elif not _TRUE[code](configuration, watched, verdict):
            verdict.wrong(f"untrue note: {code}: {message[:160]}")
