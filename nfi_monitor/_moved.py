"""Modules that moved, and classes that were renamed with them: the old import works, with a DeprecationWarning.

One finder at the end of ``sys.meta_path``, asked only for what no other finder knows.  (A file of its own for
each old name would keep the package as crowded as it was.)
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import sys
import warnings
from collections.abc import Mapping, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_ARMS = tuple(f"nfi_monitor.replay.{name}" for name in ("arm", "arms", "loss_arms", "optimizer_arms"))
_EXCHANGE = tuple(f"nfi_monitor.ranks.{name}" for name in ("exchange", "layout", "reduced", "shape"))
_RANKS = ("nfi_monitor.ranks.processes", "nfi_monitor.ranks.team", "nfi_monitor.capture.sharding")

MOVED: dict[str, tuple[str, ...]] = {
    "nfi_monitor.arms": _ARMS,
    "nfi_monitor.attach": ("nfi_monitor.integrations.attach",),
    "nfi_monitor.cadence": ("nfi_monitor.engine.schedule",),
    "nfi_monitor.capture.outbox": ("nfi_monitor.capture.host_transfer",),
    "nfi_monitor.capture.placement": ("nfi_monitor.capture.devices",),
    "nfi_monitor.capture.ring": ("nfi_monitor.replay.recent_snapshots",),
    "nfi_monitor.capture.snapshots": ("nfi_monitor.replay.snapshots",),
    "nfi_monitor.capture.texts": ("nfi_monitor.capture.tensor_text",),
    "nfi_monitor.detect.causal": ("nfi_monitor.replay.verdict",),
    "nfi_monitor.detect.unrest": ("nfi_monitor.detect.loss_watch",),
    "nfi_monitor.distributed": _RANKS,
    "nfi_monitor.leaver": ("nfi_monitor.ranks.departure",),
    "nfi_monitor.losses": ("nfi_monitor.engine.loss_queue",),
    "nfi_monitor.measure.class_shards": ("nfi_monitor.measure.sharded.rows",),
    "nfi_monitor.measure.shards": ("nfi_monitor.measure.sharded.step",),
    "nfi_monitor.meter": ("nfi_monitor.engine.step_reader",),
    "nfi_monitor.notes": ("nfi_monitor.engine.notes",),
    "nfi_monitor.pool": _EXCHANGE,
    "nfi_monitor.remedies.centering": ("nfi_monitor.remedies.experimental.centering",),
    "nfi_monitor.remedies.penalties": ("nfi_monitor.remedies.experimental.penalties",),
    "nfi_monitor.remedies.prieto": ("nfi_monitor.remedies.experimental.stablemax",),
    "nfi_monitor.remedies.second_moment": ("nfi_monitor.remedies.experimental.second_moment",),
    "nfi_monitor.remedies.update_clip": ("nfi_monitor.remedies.experimental.update_clip",),
    "nfi_monitor.replacing": ("nfi_monitor.atomic_write",),
    "nfi_monitor.report.explanation": ("nfi_monitor.report.explain.explanation",),
    "nfi_monitor.report.fanout": ("nfi_monitor.report.sinks",),
    "nfi_monitor.report.findings": ("nfi_monitor.report.explain.crossings",),
    "nfi_monitor.report.hindsight": ("nfi_monitor.report.explain.signal_history",),
    "nfi_monitor.report.jsonl": ("nfi_monitor.report.run_directory",),
    "nfi_monitor.report.lock": ("nfi_monitor.report.run_directory.lock",),
    "nfi_monitor.report.plain": ("nfi_monitor.report.plain",),
    "nfi_monitor.report.tensorboard_tab": ("nfi_monitor.report.tensorboard.tab_data",),
    "nfi_monitor.report.thinning": ("nfi_monitor.report.run_directory.thinning",),
    "nfi_monitor.report.words": ("nfi_monitor.report.wording",),
    "nfi_monitor.run_info": ("nfi_monitor.engine.run_info",),
}
"""Old module → where its names are now, in the order they are looked up."""

RENAMED: dict[str, str] = {
    "Clock": "Schedule",
    "Context": "ArmContext",
    "Fanout": "Sinks",
    "Hindsight": "SignalHistory",
    "Leaver": "Departure",
    "Losses": "LossQueue",
    "Meter": "StepReader",
    "Outbox": "HostTransfer",
    "Pool": "Exchange",
    "Ranks": "Membership",
    "SnapshotRing": "RecentSnapshots",
    "Unrest": "LossWatch",
}
"""Old name of a class → its name now."""


def moved_name(module: str, name: str, homes: Mapping[str, str]) -> Any:
    """Return what ``homes`` (name → the module where it is now) says of ``name``, with a warning.

    For a module's ``__getattr__`` where some of its names have moved and others have not.  Raises
    AttributeError for a name that is not in ``homes``.
    """
    if name not in homes:
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    home = homes[name]
    warnings.warn(f"{module}.{name} has moved: from {home} import {name}.", DeprecationWarning, stacklevel=3)
    return getattr(importlib.import_module(home), name)


class _Moved(ModuleType):
    """Stands where the old module stood; its attributes are those of the new ones, as they are now."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        for home in MOVED[self.__name__]:
            module = importlib.import_module(home)
            for known in (name, RENAMED.get(name, name)):
                if hasattr(module, known):
                    return getattr(module, known)
        raise AttributeError(f"module {self.__name__!r} (moved) has no attribute {name!r}")


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return importlib.util.spec_from_loader(fullname, self) if fullname in MOVED else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Moved(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        homes = " and ".join(MOVED[module.__name__])
        # The frames of the import system between here and who imports are passed over by warnings itself.
        warnings.warn(f"{module.__name__} has moved: import from {homes}.", DeprecationWarning, stacklevel=2)


def install() -> None:
    """Make the old imports work. Calling it again does nothing."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
