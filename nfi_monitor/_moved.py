"""Keep old imports working, with a DeprecationWarning that names the new place.

:data:`MOVED` lists modules that no longer exist.  :data:`RENAMED` lists classes, functions and constants with
a new name.  :data:`LEFT` lists names that moved out of a module that still exists.  One finder at the end of
``sys.meta_path`` makes the old modules: Python calls it only for modules that no other finder knows.
(Rejected: one file for each old module, because these would crowd the package.)
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import sys
import warnings
from collections.abc import Sequence
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
    "nfi_monitor.notes": ("nfi_monitor.engine.notes", "nfi_monitor.engine.remarks"),
    "nfi_monitor.open_monitors": ("nfi_monitor.registry",),
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
    "nfi_monitor.report.jsonl": (
        "nfi_monitor.report.run_directory", "nfi_monitor.report.run_directory.writer",
    ),
    "nfi_monitor.report.lock": ("nfi_monitor.report.run_directory.lock",),
    "nfi_monitor.report.plain": ("nfi_monitor.report.json_values", "nfi_monitor.report.terminal"),
    "nfi_monitor.report.tensorboard_tab": ("nfi_monitor.report.tensorboard.tab_data",),
    "nfi_monitor.report.thinning": ("nfi_monitor.report.run_directory.thinning",),
    "nfi_monitor.report.words": ("nfi_monitor.report.wording", "nfi_monitor.report.terminal"),
    "nfi_monitor.run_info": ("nfi_monitor.engine.run_info",),
}  # fmt: skip
"""Old module → the modules that have its names now, in the order they are searched."""

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
    "Sent": "PackedRows",
    "Together": "JoinedRows",
    "Unrest": "LossWatch",
    "LOOK_SECONDS": "CHECK_SECONDS",
    "LOWERED": "REDUCTION",
    "check_extra": "check_stateful",
    "is_watched": "watcher",
    "lingers": "warning_gap",
    "merged": "pack_shards",
    "plain": "as_json",
    "rows_alike": "same_rows_everywhere",
    "shown": "cleaner",
    "together": "join_shards",
    "visible": "escape_controls",
    "watching": "start_line",
}
"""Old name of a class, function or constant → its name now."""

_HEAD_PROBE = "nfi_monitor.capture.head_probe"
_RUN, _RANK = "nfi_monitor.replay.run", "nfi_monitor.ranks.membership"
_TENSORBOARD = "nfi_monitor.report.tensorboard"

LEFT: dict[str, dict[str, str]] = {
    "nfi_monitor.capture.head": dict.fromkeys(
        ("HeadProbe", "Rows", "classes_of", "rows_of", "whole_rows"), _HEAD_PROBE
    )
    | {"INERT": "nfi_monitor.capture.model_hooks"},
    "nfi_monitor.capture.optimizer": {
        **dict.fromkeys(("StepHooks", "has_closure"), "nfi_monitor.capture.step_hooks"),
        **dict.fromkeys(("choose", "unwrap"), "nfi_monitor.capture.unwrap"),
        "SECOND_MOMENTS": "nfi_monitor.capture.second_moment",
    },
    "nfi_monitor.capture.sampling": {"LOWERED": "nfi_monitor.capture.sampling"},
    "nfi_monitor.detect.mechanism": dict.fromkeys(("FORGOTTEN", "LEARNED"), "nfi_monitor.detect.causes"),
    "nfi_monitor.ranks": dict.fromkeys(("RECENT", "Ranks"), _RANK),
    "nfi_monitor.remedies.steps": {"replaying": "nfi_monitor.replay.replayed_step"},
    "nfi_monitor.replay": {
        **dict.fromkeys(("RECIPE", "STEP_FN", "StepFunction"), _RUN),
        **dict.fromkeys(("Plan", "plan"), "nfi_monitor.replay.planning"),
        "Context": "nfi_monitor.replay.arm",
    },
    "nfi_monitor.report.console": {"watching": "nfi_monitor.report.console"},
    "nfi_monitor.report.summary": {
        "PHASE_STYLES": "nfi_monitor.report.styles",
        "lingers": "nfi_monitor.report.summary",
    },
    "nfi_monitor.report.tensorboard": {
        **dict.fromkeys(("EVENTS", "SLINGSHOT_EVENTS"), f"{_TENSORBOARD}.sink"),
        **dict.fromkeys(("info_markdown", "overview_markdown"), f"{_TENSORBOARD}.texts"),
    },
}
"""Existing module → names that it had once, each with the module that has it now."""


def left(module: str, name: str) -> Any:
    """Return a name that ``module`` had once, with a DeprecationWarning that points at the importing file.

    For the ``__getattr__`` of a module in :data:`LEFT`. Raises AttributeError for any other name.
    """
    home = LEFT[module].get(name)
    if home is None:
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    now = RENAMED.get(name, name)
    message = f"{module}.{name} has moved: import {now} from {home}."
    warnings.warn(message, DeprecationWarning, stacklevel=3)
    return getattr(importlib.import_module(home), now)


class _Moved(ModuleType):
    """A module under an old name. Its attributes are read from, and written to, the new modules."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        found = _home_of(self.__name__, name)
        if found is None:
            raise AttributeError(f"module {self.__name__!r} (moved) has no attribute {name!r}")
        return getattr(*found)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function of the same name: importing ``nfi_monitor.open_monitors`` hides the function."""
        return getattr(self, self.__name__.rpartition(".")[2])(*args, **kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        found = None if name.startswith("__") else _home_of(self.__name__, name)
        if found is None:
            super().__setattr__(name, value)
        else:
            setattr(*found, value)


def _home_of(moved: str, name: str) -> tuple[ModuleType, str] | None:
    """Return the module that has ``name`` of the module ``moved`` today, and the name there."""
    for home in MOVED[moved]:
        module = importlib.import_module(home)
        for known in (name, RENAMED.get(name, name)):
            if hasattr(module, known):
                return module, known
    return None


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return importlib.util.spec_from_loader(fullname, self) if fullname in MOVED else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Moved(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        homes = " and ".join(MOVED[module.__name__])
        # The importing file is at level 2: warnings skips the frames of the import system.
        warnings.warn(f"{module.__name__} has moved: import from {homes}.", DeprecationWarning, stacklevel=2)


def install() -> None:
    """Add the finder of old modules to ``sys.meta_path``. A second call does nothing."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
