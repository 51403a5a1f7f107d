"""Where the replay of a watched run begins, and for how long it goes on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from nfi_monitor.errors import MonitorError
from nfi_monitor.replay.recent_snapshots import RecentSnapshots
from nfi_monitor.replay.snapshots import Snapshot
from nfi_monitor.replay.verdict import margin
from nfi_monitor.types import Alert, AlertKind


class Plan(NamedTuple):
    """From which snapshot a replay starts, for how many steps (None: the default), and the alert it
    repeats."""

    snapshot: Snapshot
    steps: int | None
    slingshot: Alert | None


def plan(
    alerts: Sequence[Alert],
    recent: RecentSnapshots,
    tau: float,
    snapshot: Snapshot | None = None,
    steps: int | None = None,
) -> Plan:
    """Return how to replay the last slingshot of a run.

    From the newest snapshot at least 2 τ before the slingshot, or else the oldest, until max(2 τ, 20) steps
    after it.  ``snapshot`` and ``steps`` are kept where they are given.

    Raises MonitorError, with the reason, if there is no snapshot.
    """
    slingshot = next((a for a in reversed(alerts) if a.kind is AlertKind.SLINGSHOT), None)
    if snapshot is None:
        snapshot = _snapshot_before(slingshot, recent, tau)
    if slingshot is not None and slingshot.first_step <= snapshot.step:
        slingshot = None  # the given snapshot is of a later step: the next slingshot is another one
    if steps is None and slingshot is not None:
        steps = slingshot.first_step - snapshot.step + margin(tau)
    return Plan(snapshot, steps, slingshot)


def _snapshot_before(slingshot: Alert | None, recent: RecentSnapshots, tau: float) -> Snapshot:
    kept = recent.snapshots
    before = [s for s in kept if slingshot is None or s.step < slingshot.first_step]
    if before:
        early = [s for s in before if slingshot is None or s.step <= slingshot.first_step - round(2 * tau)]
        return early[-1] if early else before[0]
    if kept and slingshot is not None:
        why = (
            f"those that the monitor kept are of steps {kept[0].step:,}–{kept[-1].step:,}, after the "
            "slingshot began"
        )
    elif recent.refused:
        why = recent.refused
    elif not recent.limit:
        why = "the monitor keeps none (snapshots=False or 0)"
    else:
        why = (
            "the monitor takes one when an at-risk alert begins; none began, or the copy failed (see "
            "monitor.notes)"
        )
    raise MonitorError(
        f"No snapshot to replay from: {why}. Pass snapshots=<bytes> to Monitor (say snapshots=4 << 30), "
        "or take one yourself with Snapshot.take(step, model, optimizer, stateful) and pass snapshot=."
    )
