"""Damaged and hostile records cost themselves: report, tail, figure and tab show the rest, and say so."""

from __future__ import annotations

import contextlib
import io
import json
import math
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlencode

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nfi_monitor import cli
from nfi_monitor.replay.verdict import Outcome, ReplayVerdict
from nfi_monitor.report.run_directory.reader import read_run
from nfi_monitor.report.run_directory.writer import RunDirectory
from nfi_monitor.report.summary import Summary
from nfi_monitor.report.tensorboard.sink import TensorBoardSink
from nfi_monitor.types import Change, Mechanism, Note, Phase, Reading
from tests.report.builders import AT_RISK, IMMINENT, INFO, SLINGSHOT, resolved
from tests.safety.damage import damaged, damaged_lines, text_of
from tests.safety.table import Shown

plugin = pytest.importorskip("nfi_monitor.integrations.tensorboard.plugin")
EXAMPLES = {"fast": 60, "slow": 1000}
QUIET = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]
FILES = ("run.json", "readings.jsonl", "alerts.jsonl", "replays.jsonl")
VERDICT = ReplayVerdict(
    100, {"as_it_was": Outcome("as_it_was", 105, 2.0, (0.1, math.nan, 2.0), 3)}, Mechanism.EXTERNAL,
    ("the loss rose",), True, "slingshot-1",
)  # fmt: skip
VALUES = {
    "loss": 0.5, "head_loss": 0.5, "zero_sum_violation": 0.3, "feature_mean_norm": 2.0, "learning_rate": 1e-3,
    "logit_displacement": 0.4, "feature_displacement": 0.2, "rms_t_max": 1.2, "update_rms": 1e-3,
    "gradient_alignment": -0.5, "secant_curvature": 0.4, "sqrt_exp_avg_sq_mean": 1e-3, "row_match": 1.0,
    "second_moment_decay": -1.0, "gradient_norm": 1.0, "weight_norm": 3.0, "non_finite_rows": 0.0,
}  # fmt: skip
PHASES = (Phase.HEALTHY, Phase.ABSORBING, Phase.IMMINENT, Phase.SLINGSHOT, Phase.RECOVERING, Phase.HEALTHY)


def whole_run(directory: Path) -> dict[str, list[Any]]:
    """A run with every kind of record, resumed once; the records of each of its files."""
    for first in (1, 20):
        sink = RunDirectory(directory)
        sink.start(INFO)
        for step in range(first, first + 24):
            sink.reading(Reading(step, {**VALUES, "loss": 1.0 / step}), PHASES[step // 8 % 6])
        sink.note(Note("tied_head", "The head is tied.", first))
        for alert in (AT_RISK, IMMINENT, SLINGSHOT):
            alert = replace(alert, first_step=first + 5, last_step=first + 6, tau=20.0)
            sink.alert(alert, Change.BEGIN)
            sink.alert(resolved(alert, first + 9), Change.END)
        sink.replay(VERDICT)
        sink.close(INFO, Summary())
    found: dict[str, list[Any]] = {"run.json": [json.loads((directory / "run.json").read_text())]}
    for name in FILES[1:]:
        found[name] = [json.loads(line) for line in (directory / name).read_text().splitlines()]
    return found


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[Any]]]:
    directory = tmp_path_factory.mktemp("whole") / "run"
    return directory, whole_run(directory)


def strict(text: str) -> Any:
    def refuse(word: str) -> None:
        raise AssertionError(f"not strict JSON: {word}")

    return json.loads(text, parse_constant=refuse)


def command(*arguments: str) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
        assert cli.main([*arguments]) == 0
    return out.getvalue()


def look_at(directory: Path, *, figure: bool) -> None:
    """Everything that a shell can ask of a run."""
    shown = command("report", str(directory), *([] if figure else ["--no-figure"]))
    assert "after-run report" in shown and "no figure" not in shown
    assert "could not be explained" not in shown, shown
    strict(command("report", str(directory), "--json"))
    for alert in read_run(directory).alerts[:3]:
        if alert.id and not alert.id.startswith("-"):
            strict(command("report", str(directory), "--json", f"--explain={alert.id}"))
    command("tail", str(directory))
    for line in command("tail", str(directory), "--json").splitlines():
        strict(line)


def damage_files(data: st.DataObject, run: tuple[Path, dict[str, list[Any]]]) -> Iterator[Path]:
    whole, records = run
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "run"
        shutil.copytree(whole, directory)
        name = data.draw(st.sampled_from(FILES))
        if name == "run.json":
            text = text_of(data.draw(damaged(records[name][0], files=True))).encode("utf-8", "surrogatepass")
        else:
            text = data.draw(damaged_lines(records[name]))
        (directory / name).write_bytes(text)
        yield directory


@settings(max_examples=EXAMPLES["fast"], deadline=None, suppress_health_check=QUIET, database=None)
@given(data=st.data())
def test_a_damaged_record_ends_no_report_and_no_tail(
    run: tuple[Path, dict[str, list[Any]]], data: st.DataObject
) -> None:
    for directory in damage_files(data, run):
        look_at(directory, figure=False)


@pytest.mark.slow
def test_no_damaged_record_ends_a_report_or_a_tail(
    run: tuple[Path, dict[str, list[Any]]], shown: Shown
) -> None:
    pytest.importorskip("matplotlib")
    tried = 0

    @settings(max_examples=EXAMPLES["slow"], deadline=None, suppress_health_check=QUIET, database=None)
    @given(data=st.data())
    def each(data: st.DataObject) -> None:
        nonlocal tried
        tried += 1
        for directory in damage_files(data, run):
            look_at(directory, figure=tried % 10 == 0)

    each()
    assert tried >= EXAMPLES["slow"]  # the rest were drawn twice, or were not damaged
    shown("records", EXAMPLES["slow"], "run directories with damaged records")


# --- the tab ---------------------------------------------------------------------------------------


class Provider:
    """A data provider of one run, with the records that it is given: {tag: (content, array)}."""

    def __init__(self, records: dict[str, tuple[bytes, Any]], wall_time: float) -> None:
        self.records, self.wall_time = records, wall_time

    def list_tensors(self, *_: Any, **__: Any) -> Any:
        return {
            "r": {
                tag: SimpleNamespace(max_wall_time=self.wall_time, max_step=0, plugin_content=content)
                for tag, (content, _) in self.records.items()
            }
        }

    def read_tensors(self, *_: Any, run_tag_filter: Any, **__: Any) -> Any:
        found = {
            tag: [SimpleNamespace(wall_time=self.wall_time, numpy=self.records[tag][1])]
            for tag in run_tag_filter.tags
        }
        return {"r": found}


def tab_records(directory: Path) -> dict[str, tuple[bytes, Any]]:
    """The tab's records of a run with readings and alerts, as a data provider gives them."""
    from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
    from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
    from tensorboard.context import RequestContext

    whole_run(directory)
    opened = TensorBoardSink(directory)
    opened.start(INFO)
    for step in range(1, 200):
        opened.reading(Reading(step, VALUES), PHASES[step // 40])
    for alert in (AT_RISK, resolved(SLINGSHOT, 900)):
        opened.alert(alert, Change.BEGIN)
    opened.note(Note("tied_head", "The head is tied.", 3))
    opened.replay(VERDICT)
    opened.close(INFO, Summary())
    multiplexer = EventMultiplexer().AddRunsFromDirectory(str(directory))
    multiplexer.Reload()
    provider = MultiplexerDataProvider(multiplexer, str(directory))
    about = {"ctx": RequestContext(), "experiment_id": "", "plugin_name": "nfi"}
    (listed,) = provider.list_tensors(**about).values()
    (data,) = provider.read_tensors(**about, downsample=1000).values()
    return {tag: (listed[tag].plugin_content, data[tag][-1].numpy) for tag in listed}


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[bytes, Any]]:
    pytest.importorskip("tensorboard")
    return tab_records(tmp_path_factory.mktemp("tab"))


NUMBERS = [math.nan, math.inf, -math.inf, -1.0, 0.5, 1e30, 3e38, 2.0**60, 7.0, 1e6]


@st.composite
def damaged_array(draw: st.DrawFn, array: Any) -> Any:
    """An array of readings with a wrong number, shape or type."""
    if array.ndim != 2 or array.dtype.kind != "f" or not array.size:
        return array
    array = array.copy()
    row, column = draw(st.integers(0, len(array) - 1)), draw(st.integers(0, array.shape[1] - 1))
    array[row, column] = draw(st.sampled_from(NUMBERS))
    how = draw(st.sampled_from(["", "", "", "cut", "flat", "int", "text", "none"]))
    if how == "int":
        return np.nan_to_num(array, posinf=0, neginf=0).clip(-1e9, 1e9).astype("int64")
    changed = {"cut": array[:, :-1], "flat": array.ravel(), "text": array.astype(str), "none": array[:0]}
    return changed.get(how, array)


@st.composite
def damaged_tab(draw: st.DrawFn, tab: dict[str, tuple[bytes, Any]]) -> dict[str, tuple[bytes, Any]]:
    """The records, one to three of them damaged: their text, their description, their array or their tag."""
    records = dict(tab)
    for _ in range(draw(st.integers(1, 3))):
        tag = draw(st.sampled_from(sorted(records)))
        content, array = records[tag]
        how = draw(st.sampled_from(["text", "text", "array", "content", "tag", "kind"]))
        if how == "content":
            content = text_of(draw(damaged(json.loads(tab.get(tag, (b"{}",))[0]), files=True))).encode()
        elif how == "tag":
            del records[tag]
            tag = draw(st.sampled_from([f"{tag}/x", tag[:-3], "nfi-tab/", "nfi-tab/run", "nfi-tab/alerts/s"]))
        elif how == "kind":
            array = draw(st.sampled_from([array for _, array in tab.values()]))
        elif array.dtype == object:
            texts = [json.loads(one.item()) for _, one in tab.values() if one.dtype == object]
            text = text_of(draw(damaged(draw(st.sampled_from(texts)), files=True)))
            array = np.array(
                draw(st.sampled_from([text, text.encode("utf-8", "replace"), text[:50]])), object
            )
        else:
            array = draw(damaged_array(array))
        records[tag] = (content, array)
    return records


QUERIES = st.dictionaries(
    st.sampled_from(["from", "to", "points", "names", "id", "first", "version"]),
    st.one_of(
        st.sampled_from(
            ["1e999", "nan", "-inf", "", "1", "loss", "at_risk-1", "535", "1e18", "-5", "x" * 999]
        ),
        st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
    ),
    max_size=3,
)


def ask(app: Any, query: dict[str, str]) -> tuple[int, Any]:
    status: list[str] = []
    with contextlib.redirect_stderr(io.StringIO()):
        body = b"".join(app({"QUERY_STRING": urlencode(query)}, lambda code, _: status.append(code)))
    return int(status[0][:3]), strict(body.decode())


def look_at_tab(records: dict[str, tuple[bytes, Any]], query: dict[str, str], wall_time: float) -> None:
    context = SimpleNamespace(data_provider=Provider(records, wall_time))
    apps = plugin.NFIPlugin(context).get_plugin_apps()
    assert ask(apps["/runs"], {})[0] == 200
    known = any(tag.startswith("nfi-tab/") for tag in records)
    status, run = ask(apps["/run"], {"run": "r"})
    assert status == (200 if known else 404), run
    for alert in run.get("alerts", []):
        about = {"run": "r", "id": alert["id"] or "", "first": alert["first_step"]}
        assert ask(apps["/alert"], about)[0] in (200, 404)
    assert ask(apps["/series"], {"run": "r"})[0] == status or not known
    for route in ("/run", "/series", "/alert"):
        status, answer = ask(apps[route], {"run": "r", **query})
        assert status in (200, 400, 404) and (status == 200) == ("error" not in answer)


@settings(max_examples=EXAMPLES["fast"], deadline=None, suppress_health_check=QUIET, database=None)
@given(data=st.data())
def test_a_damaged_record_costs_the_tab_that_record(
    tab: dict[str, tuple[bytes, Any]], data: st.DataObject
) -> None:
    look_at_tab(data.draw(damaged_tab(tab)), data.draw(QUERIES), data.draw(st.sampled_from([1.0, *NUMBERS])))


@pytest.mark.slow
def test_no_damaged_record_ends_an_answer_of_the_tab(tab: dict[str, tuple[bytes, Any]], shown: Shown) -> None:
    tried = 0

    @settings(max_examples=EXAMPLES["slow"], deadline=None, suppress_health_check=QUIET, database=None)
    @given(data=st.data())
    def each(data: st.DataObject) -> None:
        nonlocal tried
        tried += 1
        wall_time = data.draw(st.sampled_from([1.0, *NUMBERS]))
        look_at_tab(data.draw(damaged_tab(tab)), data.draw(QUERIES), wall_time)

    each()
    assert tried >= EXAMPLES["slow"]  # the rest were drawn twice, or were not damaged
    shown("records", EXAMPLES["slow"], "runs of the tab with damaged records")


def test_what_is_skipped_is_counted_and_the_rest_is_shown(tmp_path: Path) -> None:
    whole_run(tmp_path)
    with open(tmp_path / "readings.jsonl", "a") as file:
        file.write('{"step": 44, "phase": "healthy", "values": {"loss": 1e999}, "session": 2}\n')
        file.write('{"step": 45, "phase": ["x"], "values": {}, "session": 2}\n')
        file.write('{"step": 0, "phase": "healthy", "values": {"loss": "x"}, "session": 9}\n')
        file.write('{"step": 46, "phase": "healthy", "values": {"absorbed_fraction": 7}, "session": 2}\n')
    (tmp_path / "run.json").write_text(
        '{"model": "M", "tau": -1, "steps": 5, '
        '"notes": [{"step": "x"}, {"code": "c", "message": "m", "step": 1}]}'
    )
    record = read_run(tmp_path)
    assert record.history["loss"][0].tolist() == list(range(1, 44)), "the damaged line hides no good one"
    assert record.info["model"] == "M" and "tau" not in record.info
    assert [note.code for note in record.notes] == ["c"]
    assert record.problems[0].startswith(
        "run.json: skipped 2 damaged values: 'notes.0.code': missing; 'tau': "
    )
    assert "readings.jsonl: skipped 4 damaged lines" in record.problems[1]
    assert "'values.absorbed_fraction': expected a number from 0 to 1, got 7" in record.problems[1]


def test_a_deeply_nested_run_json_does_not_stop_the_writer(tmp_path: Path) -> None:
    whole_run(tmp_path)
    (tmp_path / "run.json").write_text('{"notes": ' + "[" * 5000 + "]" * 5000 + "}")
    sink = RunDirectory(tmp_path)
    sink.start(INFO)
    sink.reading(Reading(30, {"loss": 0.25}), Phase.HEALTHY)
    sink.close(INFO, Summary())
    record = read_run(tmp_path)
    assert record.info["session"] == 3, "the readings say how many sessions there were"
    assert record.history["loss"][0].tolist() == list(range(1, 31))


# --- many ------------------------------------------------------------------------------------------


def many_slingshots(directory: Path, count: int) -> None:
    sink = RunDirectory(directory)
    sink.start(INFO)
    for number in range(1, count + 1):
        at = 100 * number
        warned = replace(IMMINENT, id=f"imminent-{number}", first_step=at - 10, last_step=at)
        began = replace(SLINGSHOT, id=f"slingshot-{number}", first_step=at, last_step=at)
        sink.alert(resolved(warned, at), Change.END)
        sink.alert(resolved(began, at + 10), Change.END)
        for step, phase in ((at, Phase.SLINGSHOT), (at + 10, Phase.RECOVERING), (at + 20, Phase.HEALTHY)):
            sink.reading(Reading(step, {"loss": 1.0, "zero_sum_violation": 0.5}), phase)
    sink.close(INFO, Summary())


@pytest.mark.parametrize("count", [2_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_a_report_of_many_slingshots_ends(tmp_path: Path, count: int) -> None:
    pytest.importorskip("matplotlib")
    many_slingshots(tmp_path, count)
    started = time.process_time()
    shown = command("report", str(tmp_path))
    assert f"{count - 20:,} earlier slingshots" in shown and "report.png" in shown
    assert f"earlier ones: {count - 40:,} more and slingshot-{count - 39}, " in shown
    assert len(shown) < 50_000
    command("tail", str(tmp_path))
    assert time.process_time() - started < 30 + count / 500  # measured: 5 s, and 30 s


def test_the_tab_lists_the_last_of_many_alerts(tab: dict[str, tuple[bytes, Any]]) -> None:
    (one,) = (json.loads(array.item()) for tag, (_, array) in tab.items() if tag.endswith("/slingshot-1"))
    many = dict(tab)
    for number in range(20_000):
        text = json.dumps({**one, "id": f"slingshot-{number}", "first_step": number, "last_step": number + 1})
        many[f"nfi-tab/alerts/s/slingshot-{number}"] = (b"{}", np.array(text, dtype=object))
    started = time.process_time()
    apps = plugin.NFIPlugin(SimpleNamespace(data_provider=Provider(many, 1.0))).get_plugin_apps()
    status, run = ask(apps["/run"], {"run": "r"})
    assert status == 200 and len(run["alerts"]) == 5_000 and "15,002 earlier alerts" in run["problems"][0]
    assert time.process_time() - started < 30  # measured: 2 s
