"""Declare the saved state of a step reader."""

from __future__ import annotations

from typing import Annotated, Any, NamedTuple, TypedDict

from torch import Tensor

from nfi_monitor.measure.accumulator import Facts
from nfi_monitor.measure.memory import Memory
from nfi_monitor.measure.rows import LossKind
from nfi_monitor.schema import Between


class _Needed(TypedDict):
    absorbing_classes: list[tuple[Annotated[float, Between(0, 2**53)], float]]
    loss_kind: tuple[float, float, float, float] | None


class SavedReader(_Needed, total=False):
    """Declaration of a saved state."""

    loss_kind_dtypes: list[str]
    logit_scale: float
    mismatch: float
    uneven: float
    loss_facts: tuple[float, float, int] | None
    look_again: bool
    single_output: bool | None
    last_step: dict[str, Any] | None
    probe: dict[str, Any] | None


class ReaderState(NamedTuple):
    """A saved state that was read as a whole."""

    classes: dict[int, float]
    loss_kind: LossKind | None
    facts: Facts | None
    look_again: bool
    single_output: bool | None
    memory: Memory | None
    probe: tuple[int, Tensor | None] | None
