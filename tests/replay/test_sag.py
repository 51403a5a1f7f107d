"""A slow rise of the loss that an arm makes itself is no slingshot; one that jumps is."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from nfi_monitor.replay.run import SECOND_MOMENT_HELD, SMALLER_LR, Arm
from nfi_monitor.replay.sag import jumps
from tests.replay.scene import Run

Script = Callable[[int], float]
LOW, BEGINS = 1e-3, 66
RISE = 1.3
"""Factor per step of the sag: 0.1 after 18 steps."""


def jump(step: int) -> float:
    return LOW if step < 70 else 5.0


def sag(step: int) -> float:
    return min(LOW * RISE ** max(step - BEGINS, 0), 0.2)


def sag_then_jump(step: int) -> float:
    return sag(step) if step < 100 else 3.0


class Scripted(Run):
    """A run whose reported losses follow ``script``."""

    script: Script = staticmethod(jump)

    def step(self, step: int) -> Tensor:
        super().step(step)
        return torch.tensor(self.script(step))


def arm(run: Scripted, script: Script, **options: Any) -> Arm:
    @contextmanager
    def change(_: Any) -> Iterator[None]:
        was, run.script = run.script, script
        try:
            yield
        finally:
            run.script = was

    return Arm("tried", "another loss", change, **options)


def spiked(script: Script, unchanged: Script = jump, **options: Any) -> int | None:
    """Return where an arm with these losses has its slingshot."""
    run = Scripted(beta2=0.95)
    run.script = unchanged
    run.go(60)
    taken = run.take()
    run.go(75)
    verdict = run.replay(taken, [arm(run, script, **options)])
    assert verdict.spiked_at is not None
    found: int | None = verdict.outcomes["tried"].spiked_at
    return found


def test_a_slow_rise_counts_unless_the_arm_may_sag() -> None:
    assert spiked(sag) is not None
    assert spiked(sag, may_sag=True) is None


def test_a_jump_counts_also_where_the_loss_has_sagged_before() -> None:
    assert spiked(jump, may_sag=True) == 70
    assert spiked(sag_then_jump, may_sag=True) == 100


def test_a_slow_rise_counts_where_the_unchanged_run_rises_as_slowly() -> None:
    assert spiked(sag, unchanged=sag, may_sag=True) == spiked(sag, unchanged=sag)


def test_only_the_held_second_moment_may_sag() -> None:
    assert SECOND_MOMENT_HELD.may_sag and not SMALLER_LR.may_sag


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ([0.005, 0.009, 0.016, 0.027], False),
        ([0.005, 0.009, 0.03], True),
        ([0.0, 1e-8, 0.0], False),
        ([0.0, 1e-5], True),
        ([1.0, math.nan], True),
        ([1.0], False),
        ([], False),
    ],
)
def test_a_jump_is_a_nat_in_one_step(losses: list[float], expected: bool) -> None:
    assert jumps(losses) is expected
