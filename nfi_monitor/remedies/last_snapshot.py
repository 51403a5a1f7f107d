"""Take the snapshot with which the Autopilot ends a training."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from nfi_monitor.ranks import processes
from nfi_monitor.replay.snapshots import Snapshot
from nfi_monitor.types import Alert, AlertKind

if TYPE_CHECKING:
    from nfi_monitor.monitor import Monitor


class LastSnapshot(NamedTuple):
    """The last snapshot. ``finish()`` adds schedulers and scalers, writes it and returns it."""

    snapshot: Snapshot | None
    finish: Callable[[], Snapshot] | None
    in_words: str

    @classmethod
    def of(cls, alert: Alert, monitor: Monitor) -> LastSnapshot:
        """Take a snapshot now; after a slingshot or NaN, use the newest snapshot from before it."""
        spoilt = alert.kind in (AlertKind.SLINGSHOT, AlertKind.NON_FINITE)
        earlier = [kept for kept in monitor.snapshots if kept.step < alert.first_step]
        snapshot: Snapshot | None = None
        if spoilt:
            snapshot = earlier[-1] if earlier else None
        else:
            with monitor.port.guarded("autopilot_snapshot"):
                snapshot = monitor.take_snapshot()
        path = None
        finish = None
        if snapshot is not None:
            # For a sharded model each rank keeps its own part, in memory.
            sharded = monitor.head is not None and hasattr(monitor.head.weight, "to_local")
            if monitor.run_dir is not None and processes.rank() == 0 and not sharded:
                path = Path(monitor.run_dir) / f"autopilot-{snapshot.step}.pt"
            moves = None if spoilt else (monitor.optimizer, monitor.port.stateful)
            finish = partial(_finished, snapshot, moves, path, monitor)
        kept = "no snapshot" if snapshot is None else f"a snapshot of step {snapshot.step:,}"
        kept += "" if path is None else f" in {path.name}"
        return cls(snapshot, finish, kept)


def _finished(
    snapshot: Snapshot, moves: tuple[Any, tuple[Any, ...]] | None, path: Path | None, monitor: Monitor
) -> Snapshot:
    """Return the snapshot with the present state of ``moves`` (if given), and write it to ``path``."""
    with monitor.port.guarded("autopilot_snapshot"):
        if moves is not None:
            snapshot = snapshot.completed(*moves)
        if path is not None:
            snapshot.save(path)
    return snapshot
