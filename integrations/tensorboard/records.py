"""Check the tab's records: those of ``nfi_monitor/report/tensorboard/tab_data.py``, or of anybody.

Everything that passes can be sent to the browser as strict JSON.  Only the standard library is imported.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Annotated, Any, TypedDict

from nfi_monitor.schema import Between, DamagedRecordError, decode, parse

FORMAT = 1
STEP = Annotated[int, Between(0, 2**53)]
_LARGEST = sys.float_info.max
_FINITE = Annotated[float, Between(-_LARGEST, _LARGEST)]


class NewerFormatError(ValueError):
    """Raised for a record of a newer version."""


class _Band(TypedDict):
    low: _FINITE
    high: _FINITE
    means: str


class _Curve(TypedDict):
    name: str
    label: str
    meaning: str


class _Chart(TypedDict):
    title: str
    unit: str
    log: bool
    key: bool
    band: _Band | None
    series: list[_Curve]


class _Note(TypedDict, total=False):
    code: str
    message: str
    step: STEP


class RunRecord(TypedDict, total=False):
    """The run's description."""

    closed: bool
    step: STEP
    tau: _FINITE | None
    facts: list[tuple[str, str]]
    phases: list[str]
    classes: list[tuple[_FINITE | str, _FINITE]]
    notes: list[_Note]
    replays: list[str]
    charts: list[_Chart]


class _Steps(TypedDict):
    first_step: STEP
    last_step: STEP


class AlertRecord(_Steps, total=False):
    """An alert in its latest state, with the texts that the tab shows."""

    id: str
    what: str
    kind: str
    severity: str
    state: str
    phase: str
    mechanism: str
    mechanism_in_words: str
    confidence: _FINITE
    headline: str
    forecast: str
    then: str
    evidence: list[list[str]]
    advice: list[str]
    layer: str | None


@dataclass(frozen=True)
class Content:
    """The description of a record. ``first`` and ``columns``: of readings only."""

    first: STEP = 0
    columns: tuple[str, ...] = ()


def content_of(text: bytes) -> Content:
    """Return the description. Raises NewerFormatError, and DamagedRecordError if it is damaged."""
    described = parse(text)
    if decode(int, described.get("format", FORMAT)) > FORMAT:
        raise NewerFormatError
    content: Content = decode(Content, described)
    return content


def json_of(text: Any, declared: Any) -> dict[str, Any]:
    """Return a record of the ``declared`` kind. Raises DamagedRecordError."""
    if not isinstance(text, (str, bytes)):
        raise DamagedRecordError("no text")
    record: dict[str, Any] = decode(declared, parse(text))
    return record


def check_readings(array: Any, content: Content) -> Any:
    """Return the readings as float64 [rows, 2 + columns], the first column the optimizer steps.

    Raises DamagedRecordError if the array does not fit its description, or has a wrong step or phase.
    """
    if getattr(array, "ndim", 0) != 2 or array.shape[1] != 2 + len(content.columns) or not len(array):
        shape = getattr(array, "shape", None)
        raise DamagedRecordError(f"an array of shape {shape} for {len(content.columns)} columns")
    if array.dtype.kind not in "fiu":
        raise DamagedRecordError(f"an array of {array.dtype}")
    rows = array.astype("float64")
    rows[:, 0] += float(content.first)
    steps, phases = rows[:, 0], rows[:, 1]
    if not ((steps >= 0) & (steps <= 2**53)).all():
        raise DamagedRecordError("a step that is no step")
    if not ((phases >= 0) & (phases < 1000) & (phases == phases.round())).all():
        raise DamagedRecordError("a phase that is no phase")
    if (steps[1:] < steps[:-1]).any():
        rows = rows[steps.argsort(kind="stable")]
    return rows
