"""Judged runs → tables for the terminal and for ORDINARY.md; no number typed by hand."""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Sequence

from nfi_monitor.types import Alert
from tests.benchmarks.detection.generate import detector_key, versions
from tests.benchmarks.detection.ordinary.judged import Judged, Said
from tests.benchmarks.detection.report import AFTER, CHANGED_SINCE, held_out
from tests.benchmarks.detection.sheet import NOTHING, Sheet

SHOWN = 6
"""Alerts of a run that are listed one by one."""
_HEADER = ["", "runs × steps", "true slingshots", "called", "false imminent", "auto", "false slingshot",
           "auto", "under warning", "auto", "read, auto", "notes"]  # fmt: skip


def sheets(judged: Sequence[Judged]) -> list[Sheet]:
    return [_totals(judged), _families(judged), *_peers(judged), _details(judged)]


def _totals(judged: Sequence[Judged]) -> Sheet:
    halves = list(dict.fromkeys(item.half for item in judged))
    rows = [_row(f"{half} half", [item for item in judged if item.half == half]) for half in halves]
    if len(halves) > 1:
        rows.append(_row("all", judged))
    return Sheet(
        "Together",
        "At every step, and as `every=\"auto\"` reads. Target: 0 false imminent, 0 false slingshot, at most "
        "3% of the steps under a warning. Near: those of them at a rise of the loss that is "
        "too small for a slingshot.",
        _HEADER[:-1],
        [row[:-1] for row in rows],
    )  # fmt: skip


def _families(judged: Sequence[Judged]) -> Sheet:
    names = dict.fromkeys(item.family for item in judged)
    rows = [_row(name, [item for item in judged if item.family == name]) for name in names]
    return Sheet("By family", "", _HEADER, rows)


def _row(name: str, items: Sequence[Judged]) -> list[str]:
    steps = sum(item.steps for item in items)
    lengths = sorted({item.steps for item in items})
    size = f"{len(items)} × {lengths[0]:,}" if len(lengths) == 1 else f"{len(items)} runs, {steps:,} steps"
    true = sum(len(item.truth.slingshots) for item in items)
    every, auto = [item.every for item in items], [item.auto for item in items]
    return [
        name,
        size,
        str(true),
        f"{sum(said.called for said in every)}" if true else NOTHING,
        *(
            _counted(sum(len(said.false_imminent) for said in one), sum(said.near_imminent for said in one))
            for one in (every, auto)
        ),
        *(
            _counted(
                sum(len(said.false_slingshots) for said in one), sum(said.near_slingshots for said in one)
            )
            for one in (every, auto)
        ),
        *(f"{sum(said.warned for said in one) / steps:.1%}" for one in (every, auto)),
        f"{sum(said.read for said in auto) / steps:.0%}",
        ", ".join(dict.fromkeys(note for item in items for note in item.notes)) or NOTHING,
    ]


def _counted(false: int, near: int) -> str:
    return f"{false} ({near} near)" if near else str(false)


def _peers(judged: Sequence[Judged]) -> Iterable[Sheet]:
    names = list(dict.fromkeys(name for item in judged for name in item.peers))
    if not names:
        return
    steps = sum(item.steps for item in judged)
    rows = [
        _monitor_row(
            "nfi-monitor, imminent or slingshot, every step", [item.every for item in judged], steps
        ),
        _monitor_row("nfi-monitor, imminent or slingshot, auto", [item.auto for item in judged], steps),
    ]
    for name in names:
        found = [item.peers[name] for item in judged if name in item.peers]
        false = sum(peer.false for peer in found)
        sounding = sum(peer.sounding for peer in found)
        touched = sum(peer.false > 0 for peer in found)
        rows.append(
            [
                name,
                str(false),
                f"{1e4 * false / steps:.2f}",
                f"{touched} of {len(found)}",
                f"{sounding / steps:.1%}",
            ]
        )
    yield Sheet(
        "The monitor and its peers",
        "False alarms: no slingshot comes within 10 τ (500 steps at most). Of the peers, alarms with pauses "
        "below 50 steps are one; of the monitor, every alert counts.",
        ["", "false alarms", "per 10,000 steps", "runs with one", "steps under alarm"],
        rows,
    )


def _monitor_row(name: str, said: Sequence[Said], steps: int) -> list[str]:
    false = sum(len(item.false_imminent) + len(item.false_slingshots) for item in said)
    touched = sum(bool(item.false_imminent or item.false_slingshots) for item in said)
    alarmed = sum(item.alarmed for item in said)
    return [
        name,
        str(false),
        f"{1e4 * false / steps:.2f}",
        f"{touched} of {len(said)}",
        f"{alarmed / steps:.1%}",
    ]


def _details(judged: Sequence[Judged]) -> Sheet:
    rows = []
    for item in judged:
        told = [
            _listed(item.every.false_imminent),
            _listed(item.every.false_slingshots),
            _listed(item.every.others),
        ]
        true = ", ".join(f"{event.start:,}–{event.end:,}" for event in item.truth.slingshots[:SHOWN])
        near = ", ".join(f"{event.start:,}" for event in item.truth.near_misses[:SHOWN])
        if true or near or any(told):
            rows.append(
                [
                    f"{item.family} {item.seed}",
                    true or NOTHING,
                    near or NOTHING,
                    *(cell or NOTHING for cell in told),
                ]
            )
    header = ["run", "true slingshots", "near misses", "false imminent", "false slingshots", "other alerts"]
    return Sheet("Runs in which something was said or happened", "At every step.", header, rows)


def _listed(alerts: Sequence[Alert]) -> str:
    shown = [
        f"{alert.first_step:,}–{alert.last_step:,} {alert.mechanism} {alert.confidence:.0%} {alert.severity}"
        for alert in alerts[:SHOWN]
    ]
    if len(alerts) > SHOWN:
        shown.append(f"{len(alerts) - SHOWN} more")
    return "; ".join(shown)


def text(made: Sequence[Sheet], judged: Sequence[Judged], options: str) -> str:
    steps = sum(item.steps for item in judged)
    said = ", ".join(f"{name} {value}" for name, value in versions().items())
    families = len({item.family for item in judged})
    head = [
        "# Where people train",
        "",
        f"Written by `python -m tests.benchmarks.detection.ordinary {options}` on "
        f"{datetime.date.today().isoformat()}; do not edit. {said}; detector code {detector_key()}.",
        "",
        f"{families} families, {len(judged)} runs, {steps:,} optimizer steps. Nothing should happen in them; "
        "what did is found in the recorded loss by truth.py, without the monitor's own detector.",
        "",
        f"The constants were fitted on the tuning half and fixed in commit 8df60af. {CHANGED_SINCE}",
        "",
        " ".join(held_out(half) for half in AFTER),
        "",
    ]
    return "\n".join(head) + "\n" + "\n".join(sheet.markdown() for sheet in made)
