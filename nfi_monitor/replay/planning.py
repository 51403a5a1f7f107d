"""Choose the snapshot and the number of steps for the replay of a watched run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from nfi_monitor.errors import MonitorError
from nfi_monitor.replay.recent_snapshots import RecentSnapshots
from nfi_monitor.replay.snapshots import Snapshot
from nfi_monitor.replay.verdict import margin
from nfi_monitor.types import Alert, AlertKind


class Plan(NamedTuple):
    """The snapshot of a replay, its number of steps (None: the default), and the slingshot to repeat."""

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
    """Return the plan for the replay of a run's last slingshot.

    It begins at the newest snapshot at least 2 τ before the slingshot, or else at the oldest snapshot.  It
    ends max(2 τ, 20) steps after the slingshot.  ``snapshot`` and ``steps`` replace these defaults.

    Raises MonitorError, with the reason, if there is no snapshot.
    """
    slingshot = next((a for a in reversed(alerts) if a.kind is AlertKind.SLINGSHOT), None)
    if snapshot is None:
        snapshot = _snapshot_before(slingshot, recent, tau)
    if slingshot is not None and slingshot.first_step <= snapshot.step:
        slingshot = None  # the given snapshot is of a later step, after that slingshot began
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
            f"the monitor's snapshots are of steps {kept[0].step:,}–{kept[-1].step:,}, after the slingshot "
            "began"
        )
    elif recent.refused:
        why = recent.refused
    elif not recent.limit:
        why = "the monitor takes no snapshots (snapshots=False or 0)"
    else:
        why = (
            "the monitor takes a snapshot when an at-risk alert begins; no such alert began, or the copy "
            "failed (see monitor.notes)"
        )
    raise MonitorError(
        f"No snapshot to replay from: {why}. Pass snapshots=<bytes> to Monitor (say snapshots=4 << 30), "
        "or take one yourself with Snapshot.take(step, model, optimizer, stateful) and pass snapshot=."
    )
