from __future__ import annotations

import io
import time
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from nfi_monitor.report.console import ConsoleSink
from nfi_monitor.report.live import LivePanel
from nfi_monitor.types import Change, Phase
from tests.report.builders import AT_RISK, SLINGSHOT, readings, recorded, resolved

ALERTS = (resolved(SLINGSHOT, 905), AT_RISK)


def watched(phase: Phase = Phase.IMMINENT, alerts: Any = ALERTS) -> Any:
    history, _ = recorded(readings(100))
    return SimpleNamespace(history=history, phase=phase, alerts=list(alerts))


def terminal(encoding: str = "utf-8") -> tuple[Console, io.BytesIO]:
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding=encoding, errors="strict", write_through=True)
    return Console(file=file, force_terminal=True, width=100, color_system=None), raw


def test_a_terminal_sees_progress_phase_numbers_and_the_last_alert() -> None:
    console, raw = terminal()
    with LivePanel(watched(), 200, console, title="float32") as panel:
        panel.advance(120)
    text = raw.getvalue().decode()
    for word in ("float32", "120/200", "phase imminent", "zero-sum viol. 0.7", "‖μ_G‖ 54.6", "slingshots 1",
                 "δ 1.1 nat", "last alert ≈ 360 steps left", "at risk: rounding"):  # fmt: skip
        assert word in text


def test_a_pipe_sees_nothing_and_everything_else_works() -> None:
    file = io.StringIO()
    with LivePanel(watched(), 200, Console(file=file)) as panel:
        panel.advance(3)
        ConsoleSink(panel.console).alert(AT_RISK, Change.BEGIN)
    assert panel.done == 3
    assert file.getvalue().startswith("nfi  step 535") and "╭" not in file.getvalue()


def test_an_alert_appears_above_the_panel() -> None:
    console, raw = terminal()
    with LivePanel(watched(alerts=()), 200, console) as panel:
        ConsoleSink(panel.console).alert(AT_RISK, Change.BEGIN)
    text = raw.getvalue().decode()
    assert text.index("nfi  step 535") < text.rindex("phase imminent")


def test_ten_thousand_calls_redraw_at_most_eight_times_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    console, _ = terminal()
    with LivePanel(watched(), 10_000, console) as panel:
        draws = 0
        real = panel._refresh

        def count() -> None:
            nonlocal draws
            draws += 1
            real()

        monkeypatch.setattr(panel, "_refresh", count)
        started = time.monotonic()
        for _ in range(10_000):
            panel.advance()
        seconds = time.monotonic() - started
        assert draws <= 8 * seconds + 1


def test_it_works_before_a_monitor_is_attached_and_on_a_run_without_readings() -> None:
    console, raw = terminal()
    with LivePanel(None, 10, console) as panel:
        panel.advance()
        panel.monitor = SimpleNamespace(history=recorded([])[0], phase=Phase.HEALTHY, alerts=[])
        panel.advance(9)
    assert "no monitor is attached yet" in raw.getvalue().decode() and "10/10" in raw.getvalue().decode()


def test_an_ascii_terminal_is_no_error() -> None:
    console, raw = terminal("ascii")
    with LivePanel(watched(), 200, console, title="τ run") as panel:
        panel.advance(1)
    assert b"tau run" in raw.getvalue() and b"|mu_G|" in raw.getvalue()


def test_a_terminal_that_goes_away_turns_the_panel_off_and_not_the_training() -> None:
    console, _ = terminal()
    with LivePanel(watched(), 200, console) as panel:
        console.file.close()
        panel._next = 0.0
        panel.advance()
        panel.advance()
    assert panel.done == 2 and panel._live is None


def test_an_exception_leaves_the_terminal_usable() -> None:
    console, raw = terminal()
    with pytest.raises(ZeroDivisionError), LivePanel(watched(), 10, console):
        raise ZeroDivisionError
    assert raw.getvalue().decode().rstrip().endswith("\x1b[?25h")  # the cursor is back
