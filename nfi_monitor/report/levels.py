"""Read the levels of a run's rules from ``run.json``, for explanations and for the bands of pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, NamedTuple

from nfi_monitor.detect.rules import RULES
from nfi_monitor.detect.situation import RunContext, momentum_of
from nfi_monitor.report import wording
from nfi_monitor.types import AlertKind, Thresholds


class Band(NamedTuple):
    """The levels at which a sign begins and ends, in the unit of the quantity that is drawn."""

    leave: float
    enter: float
    means: str
    """The alert that the sign is for, in words: "at risk" or "imminent"."""


def bands(thresholds: Thresholds, context: RunContext) -> dict[str, Band]:
    """Return quantity → the band that a picture draws beside it, from the levels of the rules."""
    found: dict[str, Band] = {}
    for rule in RULES:
        kind = AlertKind.IMMINENT if AlertKind.IMMINENT in rule.holds else AlertKind.AT_RISK
        for level in rule.levels:
            for name in level.bands:
                leave, enter = level.band(thresholds, context)
                found.setdefault(name, Band(leave, enter, wording.kind_in_words(kind)))
    return found


def bands_of(info: Mapping[str, Any]) -> dict[str, Band]:
    """Return the bands of a run from its ``run.json``; none if its thresholds or its τ are unknown."""
    if not isinstance(info.get("thresholds"), Mapping) or not info.get("tau"):
        return {}
    return bands(thresholds_of(info), context_of(info))


def thresholds_of(info: Mapping[str, Any]) -> Thresholds:
    """Return the thresholds of ``run.json``; the defaults for those that are missing or invalid."""
    found = info.get("thresholds")
    known = {item.name for item in fields(Thresholds)}
    try:
        return Thresholds(**{name: x for name, x in dict(found or {}).items() if name in known})
    except (TypeError, ValueError):
        return Thresholds()


def context_of(info: Mapping[str, Any]) -> RunContext:
    """Return the optimizer's settings from ``run.json``, in the form that the detector used."""
    optimizer = info.get("optimizer")
    group: Mapping[str, Any] = optimizer if isinstance(optimizer, Mapping) else {}
    betas = group.get("betas")
    tau = info.get("tau")
    default = RunContext()
    pair = isinstance(betas, Sequence) and len(betas) >= 2 and all(isinstance(b, (int, float)) for b in betas)
    beta1 = float(betas[0]) if pair and betas is not None else default.beta1
    if isinstance(tau, (int, float)) and tau > 0:
        beta2 = 1.0 - 1.0 / tau
    else:
        beta2 = float(betas[1]) if pair and betas is not None else default.beta2
    decoupled = group.get("decoupled_weight_decay", str(group.get("name", "")).startswith("AdamW"))
    added_up = momentum_of(str(group.get("name", "")), group)
    return RunContext(beta1, beta2, bool(decoupled) and bool(group.get("weight_decay")), **added_up)
