from __future__ import annotations

import math
import sys
from typing import Any

import numpy as np
import pytest

from nfi_monitor import history as history_module
from nfi_monitor.history import History


def test_steps_at_which_a_quantity_was_absent_are_left_out_and_nan_that_was_measured_stays() -> None:
    history = History()
    history.append(1, {"loss": 1.0})
    history.append(2, {"rms_t_max": 2.0})
    history.append(4, {"loss": math.nan, "rms_t_max": 3.0})
    steps, values = history["loss"]
    assert steps.tolist() == [1, 4] and values[0] == 1.0 and math.isnan(values[1])
    assert history["rms_t_max"][0].tolist() == [2, 4]
    assert steps.dtype == np.int64 and values.dtype == np.float64


def test_memory_is_bounded_and_the_recent_past_keeps_its_resolution() -> None:
    history = History(max_rows=1000)
    for step in range(1, 100_001):
        history.append(step, {"loss": float(step)})
    steps, values = history["loss"]
    assert len(steps) <= 1000 and len(history) == 100_000
    assert steps.tolist()[-400:] == list(range(99_601, 100_001))
    assert steps[0] == 1, "the beginning of the run is kept"
    assert (np.diff(steps) > 0).all() and (values == steps).all()


@pytest.mark.parametrize("stride", [1, 16])
def test_the_distant_past_keeps_one_resolution_from_its_beginning_on(stride: int) -> None:
    history = History(max_rows=1000)
    for step in range(1, 100_000 * stride, stride):
        history.append(step, {"loss": float(step)})
    steps, _ = history["loss"]
    first_half = steps[steps < 50_000 * stride]
    assert len(first_half) > 80  # halving the oldest again and again left 1
    gaps = np.diff(first_half)
    assert gaps.max() <= 2 * gaps.min(), gaps


def test_a_counter_that_stands_still_or_goes_back_is_kept_within_the_limit() -> None:
    history = History(max_rows=8)
    for step in [1] * 50 + [40, 30, 20, 10] * 50:
        history.append(step, {"loss": 0.5})
    assert 0 < len(history["loss"][0]) <= 8


def test_an_unknown_name_lists_the_known_ones() -> None:
    history = History()
    history.append(1, {"loss": 1.0})
    with pytest.raises(KeyError, match=r"'los' is not a measured quantity. Known: loss"):
        history["los"]
    with pytest.raises(KeyError, match="not a measured quantity"):
        history.append(2, {"accuracy": 1.0})


def test_what_was_measured_after_a_step_can_be_forgotten() -> None:
    history = History()
    for step in range(1, 6):
        history.append(step, {"loss": float(step)} | ({"weight_norm": 1.0} if step > 3 else {}))
    history.cut(3)
    assert history["loss"][0].tolist() == [1, 2, 3] and history["loss"][1].tolist() == [1.0, 2.0, 3.0]
    assert history.names() == ["loss"]
    history.append(4, {"loss": 9.0})
    assert history["loss"][1].tolist() == [1.0, 2.0, 3.0, 9.0]


def test_a_known_quantity_that_was_never_measured_is_empty() -> None:
    steps, values = History()["loss"]
    assert len(steps) == len(values) == 0 and "loss" not in History()


def test_an_interrupt_at_any_line_loses_no_reading_and_adds_none_twice() -> None:
    def filled(interrupted_at: int) -> tuple[History, bool]:
        history, lines = History(), 0
        for step in (1, 2, 3):
            history.append(step, {"loss": float(step), "gradient_norm": 2.0 * step})

        def look(frame: Any, event: str, argument: object) -> Any:
            nonlocal lines
            if frame.f_code.co_filename != history_module.__file__:
                return None
            lines += event == "line"
            if lines == interrupted_at:
                raise KeyboardInterrupt
            return look

        before = sys.gettrace()
        sys.settrace(look)
        try:
            history.last("loss")
        except KeyboardInterrupt:
            return history, True
        finally:
            sys.settrace(before)
        return history, False

    number, interrupted = 1, True
    while interrupted:
        history, interrupted = filled(number)
        assert history["loss"][0].tolist() == [1, 2, 3], number
        assert history["gradient_norm"][1].tolist() == [2.0, 4.0, 6.0], number
        number += 1
    assert number > 20
