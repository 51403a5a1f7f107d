from __future__ import annotations

import builtins
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from nfi_monitor.history import History
from nfi_monitor.report.figure import compare, draw
from nfi_monitor.report.pixels import thin
from nfi_monitor.types import AlertKind, Phase
from tests.report.builders import AT_RISK, IMMINENT, SLINGSHOT, event, readings, recorded, resolved

pytest.importorskip("matplotlib")
PNG = b"\x89PNG"


def texts(path: Path) -> str:
    """An SVG keeps its words when they are written as text."""
    return path.read_text(encoding="utf-8")


@pytest.fixture(autouse=True)
def words_in_svg() -> Any:
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none"}):
        yield


def test_a_run_becomes_a_picture(tmp_path: Path) -> None:
    history, phases = recorded(readings(1000))
    alerts = [resolved(AT_RISK, 895), resolved(IMMINENT, 895), SLINGSHOT]
    path = draw(history, phases, alerts, tmp_path / "report.png", title="a run")
    assert path.read_bytes().startswith(PNG) and path.stat().st_size > 20_000


def test_it_shows_phases_alert_ids_thresholds_and_what_was_exactly_zero(tmp_path: Path) -> None:
    history, phases = recorded(readings(1000))
    limits = {"absorbing_enter": 0.25}
    text = texts(draw(history, phases, [AT_RISK, IMMINENT], tmp_path / "r.svg", "a run", limits))
    for word in ("a run", "inflating", "recovering", "at_risk-1", "imminent-1", "enter 0.25", "exit 0.03"):
        assert word in text
    assert "exactly 0 in 99 of 1,000 readings, shown at the floor" in text


def nothing() -> History:
    return History()


def one_reading() -> History:
    history = History()
    history.append(7, {"loss": 0.5, "zero_sum_violation": 0.1})
    return history


def only_zeros() -> History:
    history = History()
    for step in range(5):
        history.append(step, {"loss": 0.0, "logit_displacement": 0.0})
    return history


def only_nan() -> History:
    history = History()
    for step in range(5):
        history.append(step, dict.fromkeys(("loss", "zero_sum_violation", "feature_mean_norm"), math.nan))
    return history


def negative() -> History:
    history = History()
    for step in range(5):
        history.append(step, {"loss": -1.0 - step, "zero_sum_violation": math.inf})
    return history


def near_overflow() -> History:
    history = History()
    for step, value in enumerate((1.7e308, 5e-324, 1.0, 0.0, 1e300)):
        history.append(step, dict.fromkeys(("loss", "rms_t_max", "feature_mean_norm", "row_match"), value))
    return history


@pytest.mark.parametrize("make", [nothing, one_reading, only_zeros, only_nan, negative, near_overflow])
def test_awkward_histories_are_drawn_without_a_warning(
    make: Any, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    draw(make(), [(0, Phase.ABSORBING)], [], tmp_path / "a.svg")
    record = SimpleNamespace(history=make(), alerts=[AT_RISK])
    compare({"a": record, "b": record}, tmp_path / "b.svg")
    assert [str(warning.message) for warning in recwarn] == []


def test_two_thousand_alerts_and_phases_are_drawn_without_their_ids(tmp_path: Path) -> None:
    kinds = (AlertKind.AT_RISK, AlertKind.SLINGSHOT)
    alerts = [event(kind, 10 * i, 10 * i + 5, i) for i in range(1000) for kind in kinds]
    phases = [(10 * i, list(Phase)[i % 6]) for i in range(2000)]
    text = texts(draw(one_reading(), phases, alerts, tmp_path / "many.svg"))
    assert "at_risk-500" not in text


def test_thinning_a_million_readings_keeps_the_spike_of_one_step() -> None:
    steps, values = np.arange(1_000_000), np.full(1_000_000, 1e-6)
    values[777_777], values[123_456], values[500_000:500_010] = 5.0, 1e-9, math.nan
    few_steps, few = thin(steps, values)
    assert len(few) <= 3_000 and np.all(np.diff(few_steps) > 0)
    assert few[few_steps == 777_777] == [5.0] and few[few_steps == 123_456] == [1e-9]


def test_thinning_keeps_a_gap_where_nothing_is_finite() -> None:
    values = np.ones(100_000)
    values[40_000:60_000] = np.nan
    steps, few = thin(np.arange(100_000), values)
    assert np.isnan(few[(steps > 40_000) & (steps < 60_000)]).all()
    assert np.isfinite(few[(steps < 39_000) | (steps > 61_000)]).all()
    assert len(thin(np.arange(10), values[:10])[0]) == 10


def test_arms_are_named_and_overlaid(tmp_path: Path) -> None:
    history, _ = recorded(readings(300))
    arms = {
        "float32": SimpleNamespace(history=history, alerts=[resolved(AT_RISK, 895), SLINGSHOT]),
        "float64": SimpleNamespace(history=one_reading(), alerts=[]),
    }
    text = texts(compare(arms, tmp_path / "arms.svg", title="two arms"))
    assert "two arms" in text and "float32" in text and "float64: not measured" in text


def test_no_global_state_of_matplotlib_is_touched(tmp_path: Path) -> None:
    import matplotlib

    before, loaded = dict(matplotlib.rcParams), "matplotlib.pyplot" in sys.modules
    draw(one_reading(), [], [], tmp_path / "a.png")
    assert dict(matplotlib.rcParams) == before and ("matplotlib.pyplot" in sys.modules) == loaded


def test_without_matplotlib_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    monkeypatch.setattr("nfi_monitor.extras._installed", lambda package: False)
    with pytest.raises(ImportError, match=r'pip install "nfi-monitor\[plots\]"'):
        draw(nothing(), [], [], tmp_path / "a.png")
