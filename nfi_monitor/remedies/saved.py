"""Read an Autopilot's saved state as a whole, before anything changes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, TypedDict

from nfi_monitor.remedies.action import Action
from nfi_monitor.remedies.policy import Rung
from nfi_monitor.remedies.rate_hold import RateHold
from nfi_monitor.schema import DamagedRecordError, decode
from nfi_monitor.types import Alert


class _Saved(TypedDict):
    exchanged: str
    stopped: bool
    firing: list[Any]
    taken: dict[str, dict[str, int]]
    actions: list[Action]
    held_since: int | None
    held_for: int
    calm_since: int
    released: int | None
    repeated: int


class SavedAutopilot(NamedTuple):
    """The parts of a saved state."""

    exchanged: str
    stopped: bool
    firing: list[Alert]
    taken: dict[str, dict[Rung, int]]
    hold: RateHold
    actions: list[Action]


def read_state(state: Mapping[str, Any]) -> SavedAutopilot:
    """Return the parts of ``autopilot.state_dict()``. Raises ValueError for another state."""
    try:
        saved = decode(_Saved, dict(state))
        if saved["exchanged"] not in ("", "loss", "projection"):
            raise DamagedRecordError("expected loss, projection or nothing", "exchanged")
        hold = RateHold()
        hold.load_state_dict(saved)
        return SavedAutopilot(
            exchanged=saved["exchanged"],
            stopped=saved["stopped"],
            firing=[Alert.from_json(alert) for alert in saved["firing"]],
            taken={
                alert: {Rung[rung.upper()]: step for rung, step in rungs.items()}
                for alert, rungs in saved["taken"].items()
            },
            hold=hold,
            actions=saved["actions"],
        )
    except Exception as error:
        found = sorted(map(str, state))[:8] if isinstance(state, Mapping) else type(state).__name__
        raise ValueError(
            f"Not an autopilot's state: expected keys 'taken' and 'exchanged', found {found} "
            f"({type(error).__name__}: {error}). Pass what autopilot.state_dict() returned."
        ) from error
