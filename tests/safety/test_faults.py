"""Fault injection by name: every function that runs inside a training is made to raise, one at a time.

Training's result must be that of the run without a monitor, and the fault is said once.  What is left out is
what nothing can stand in front of: the functions that torch, a framework or the user calls directly.
"""

from __future__ import annotations

import types
import warnings
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from nfi_monitor import Monitor
from nfi_monitor.native import library
from tests.distributed.test_ranks import launched
from tests.runs import differences
from tests.safety.faults import broken, during, judged, traced
from tests.safety.outside import OUTSIDE, SILENT
from tests.safety.scenes import ALONE, STEPS
from tests.safety.table import Shown

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
Codes = dict[str, types.CodeType]
SAID_OTHERWISE = ("ranks_apart", "library_failed")
"""Notes that say a fault, of another name than failed_*."""


class Theatre:
    """Each scene's functions and the result of its training without a monitor, found out once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._played = 0
        self._functions: dict[str, Codes] = {}
        self._bare: dict[str, Any] = {}

    def folder(self) -> Path:
        self._played += 1
        return self._folder / str(self._played)

    def functions(self, name: str) -> Codes:
        if name not in self._functions:
            _, found = during(partial(ALONE[name].train, self.folder()), traced())
            self._functions[name] = dict(sorted(found.items()))
        return self._functions[name]

    def new_functions(self, name: str, earlier: Iterable[str]) -> Codes:
        """Those that run in no earlier scene."""
        known = {function for scene in earlier for function in self.functions(scene)}
        return {function: code for function, code in self.functions(name).items() if function not in known}

    def bare(self, name: str) -> Any:
        if name not in self._bare:
            self._bare[name] = ALONE[name].train(self.folder(), None).result
        return self._bare[name]

    def check(self, name: str, functions: Codes) -> int:
        """Break one after the other; returns how many were broken and raised."""
        scene, harmed, unsaid, count = ALONE[name], [], [], 0
        for function, code in functions.items():
            if function in OUTSIDE:
                continue
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    outcome, raised = during(partial(scene.train, self.folder()), broken(code))
                except Exception as error:
                    harmed.append(f"{function}: {error!r}")
                    continue
            if not raised:
                continue
            count += 1
            if scene.exact:
                different = differences(self.bare(name), outcome.result)
                harmed += [f"{function}: {path}" for path in different[:1]]
            assert outcome.monitor is not None
            # What fails while the other ranks are looked for is said as that: this one goes on alone.
            codes = [note.code for note in outcome.monitor.notes]
            failures = [code for code in codes if code.startswith("failed_") or code in SAID_OTHERWISE]
            library._state.fault, library._state.failures = (
                "",
                0,
            )  # the library is switched off for the process, not for one monitor
            # Code of the detector runs when a state is loaded, too, and some code serves the library and the
            # torch operations that stand in for it: both parts are said, each once.
            others = [code for code in failures if code not in ("failed_load_state", "library_failed")]
            if len(others) > 1 or len(failures) > 2 or (not failures and function not in SILENT):
                unsaid.append(f"{function}: {failures}")
        assert not harmed and not unsaid, f"{name}: harmed {harmed}, not said once {unsaid}"
        return count


@pytest.fixture(scope="module")
def theatre(tmp_path_factory: pytest.TempPathFactory) -> Theatre:
    return Theatre(tmp_path_factory.mktemp("theatre"))


def test_the_first_scene_gives_all_that_watches_something_to_do(theatre: Theatre) -> None:
    monitor = ALONE["plain"].train(theatre.folder(), lambda: None).monitor
    assert monitor is not None
    assert {str(alert.kind) for alert in monitor.alerts} >= {"at_risk", "slingshot"}
    assert monitor.snapshots


def test_a_fault_in_one_function_of_twenty_changes_no_training_and_is_said(theatre: Theatre) -> None:
    functions = theatre.functions("plain")
    assert theatre.check("plain", dict(list(functions.items())[::20])) >= 12


@pytest.mark.parametrize("name", ["tapped", "lone_output", "dry_pilot", "accelerate"])
def test_a_fault_in_one_of_the_functions_of_other_trainings_changes_nothing_and_is_said(
    name: str, theatre: Theatre
) -> None:
    missing(name)
    functions = {
        function: code
        for function, code in theatre.new_functions(name, ["plain"]).items()
        if function not in OUTSIDE
    }
    assert theatre.check(name, dict(list(functions.items())[::20])) >= 1


def missing(name: str) -> None:
    if ALONE[name].missing:
        pytest.skip(f"not installed: {', '.join(ALONE[name].missing)}")


@pytest.mark.parametrize("function", ["capture/devices:is_traced"])
def test_a_fault_in_what_the_hooks_ask_first_changes_no_training_and_is_said(
    function: str, theatre: Theatre
) -> None:
    assert theatre.check("plain", {function: theatre.functions("plain")[function]}) == 1


@pytest.mark.parametrize(
    ("broken_one", "quantity"),
    [
        ("measure/native_rows:row_statistics", "weight_norm"),  # what the optimizer did is still read
        ("measure/native_step:step_statistics", "zero_sum_violation"),  # the rows are
        ("report/run_directory/writer:RunDirectory.reading", "zero_sum_violation"),
        ("detect/detector:Detector.update", "zero_sum_violation"),
    ],
)
def test_what_does_not_need_the_broken_part_goes_on(theatre: Theatre, broken_one: str, quantity: str) -> None:
    monitor = under_a_fault(theatre, "plain", broken_one)
    steps = monitor.history[quantity][0]
    assert len(steps) >= 10 and steps[-1] > STEPS - 10
    assert len(monitor.history["loss"][0]) == STEPS


@pytest.mark.parametrize(
    ("broken_one", "lost"),
    [
        ("detect/advice:advice_for", {"advice": ()}),
        ("detect/alert_writer:AlertWriter.evidence", {"evidence": {}}),
        ("detect/alert_writer:AlertWriter.forecast", {"steps_to_spike": None}),
    ],
)
def test_an_alert_is_raised_without_what_could_not_be_said_with_it(
    theatre: Theatre, broken_one: str, lost: dict[str, Any]
) -> None:
    whole = ALONE["plain"].train(theatre.folder(), lambda: None).monitor
    assert whole is not None and len(whole.alerts) >= 2
    monitor = under_a_fault(theatre, "plain", broken_one)
    # How high the loss rose comes from another function, when an alert ends.
    left = {name for alert in monitor.alerts for name in alert.evidence} if "evidence" in lost else set()
    assert left <= {"loss", "spike_loss", "loss_afterwards"}
    assert [replace(alert, **lost) for alert in monitor.alerts] == [
        replace(alert, **lost) for alert in whole.alerts
    ]
    assert left or [getattr(alert, name) for alert in monitor.alerts for name in lost] == [
        *lost.values()
    ] * len(monitor.alerts)
    assert [note.code for note in monitor.notes] == [f"failed_{PARTS[next(iter(lost))]}"]


PARTS = {"advice": "advice", "evidence": "evidence", "steps_to_spike": "forecast"}


def under_a_fault(theatre: Theatre, name: str, function: str) -> Monitor:
    code = theatre.functions(name)[function]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        outcome, raised = during(partial(ALONE[name].train, theatre.folder()), broken(code))
    assert raised and outcome.monitor is not None
    return outcome.monitor


@pytest.mark.slow
@pytest.mark.parametrize("kind", dict.fromkeys(scene.kind for scene in ALONE.values()))
def test_a_fault_in_any_function_changes_no_training_and_is_said(
    kind: str, theatre: Theatre, shown: Shown
) -> None:
    names = list(ALONE)
    count = 0
    for name in names:
        if ALONE[name].kind == kind:
            missing(name)
            count += theatre.check(name, theatre.new_functions(name, names[: names.index(name)]))
    assert count >= LEAST[kind]
    shown("faults", count, kind)


LEAST = {
    "functions made to raise": 300,
    "in other kinds of training of one process": 28,
    "under the Autopilot": 45,
    "under a framework": 28,
}
"""Scenes that run less than they did show less: these are a little below what they do."""


@pytest.mark.slow
def test_a_fault_in_any_function_on_all_ranks_or_one_harms_none_and_none_waits(
    tmp_path: Path, shown: Shown
) -> None:
    one, two = launched(tmp_path, {"faults.everything": 2}, timeout=1900.0)("faults.everything")
    count = judged(one, two)
    assert count >= 500
    shown("faults", count, "on one or all of two ranks")
