"""The server's side of the NFI tab, over real event files, through TensorBoard's own data provider."""

from __future__ import annotations

import hashlib
import json
import math
import random
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest

from nfi_monitor.report.summary import Summary
from nfi_monitor.report.tensorboard.sink import TensorBoardSink
from nfi_monitor.report.tensorboard.tab_data import CHARTS, CHUNKS_PER_WIDTH, ROWS
from nfi_monitor.types import AlertKind, Change, Note, Phase, Reading
from tests.report.builders import AT_RISK, INFO, SLINGSHOT, event, resolved
from tests.spiking import Recorded

pytest.importorskip("tensorboard")
plugin = pytest.importorskip(
    "nfi_monitor.integrations.tensorboard.plugin",
    reason="nfi-monitor is not installed; `make test` does that",
)

ROOT = Path(__file__).resolve().parents[2]
STATIC = ROOT / "integrations" / "tensorboard" / "static"
Ask = Callable[..., Any]


class Server:
    """The plugin's routes over a log directory, asked as a browser asks."""

    def __init__(self, logdir: Path) -> None:
        from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
        from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
        from tensorboard.plugins.base_plugin import TBContext

        self.logdir = logdir
        self.multiplexer = EventMultiplexer()
        provider = MultiplexerDataProvider(self.multiplexer, str(logdir))
        self.plugin = plugin.NFIPlugin(TBContext(data_provider=provider))
        self.plugin._runs._clock = self._tick
        self.now = 0.0
        self.status = ""
        self.headers: dict[str, str] = {}
        self.load()

    def _tick(self) -> float:
        self.now += 10.0  # every request may look anew
        return self.now

    def load(self) -> None:
        self.multiplexer.AddRunsFromDirectory(str(self.logdir))
        self.multiplexer.Reload()

    def bytes(self, route: str, **query: Any) -> bytes:
        def start_response(status: str, headers: list[tuple[str, str]]) -> None:
            self.status, self.headers = status, dict(headers)

        environ = {"QUERY_STRING": urlencode(query), "REQUEST_METHOD": "GET"}
        return b"".join(self.plugin.get_plugin_apps()[f"/{route}"](environ, start_response))

    def get(self, route: str, **query: Any) -> Any:
        return json.loads(self.bytes(route, **query))


def sink(directory: Path, info: dict[str, Any] | None = None) -> TensorBoardSink:
    """An open sink that leaves the stock curves thin: these tests read the tab's own records."""
    opened = TensorBoardSink(directory, min_seconds=1e9)
    opened.start(INFO if info is None else info)
    return opened


def write(directory: Path, readings: list[tuple[Reading, Phase]]) -> None:
    opened = sink(directory)
    for reading, phase in readings:
        opened.reading(reading, phase)
    opened.close(INFO, Summary())


def values_of(answer: Any, name: str) -> dict[int, Any]:
    pairs = zip(answer["steps"], answer["series"][name], strict=True)
    return {step: value for step, value in pairs if value is not None}


# --- a real run -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real(spiking_run: Recorded) -> Server:
    return Server(spiking_run.run_dir.parent)


def test_the_alerts_are_those_of_the_monitor(real: Server, spiking_run: Recorded) -> None:
    shown = real.get("run", run="run")["alerts"]
    told = spiking_run.monitor.alerts
    assert len(told) >= 3
    assert [(a["id"], a["first_step"], a["last_step"], a["severity"], a["state"]) for a in shown] == [
        (a.id, a.first_step, a.last_step, str(a.severity), str(a.state))
        for a in sorted(told, key=lambda a: (a.first_step, a.last_step))
    ]


def test_an_alert_opens_to_its_evidence_with_thresholds_and_its_advice(
    real: Server, spiking_run: Recorded
) -> None:
    alert = spiking_run.alert(AlertKind.IMMINENT)
    shown = real.get("alert", run="run", id=alert.id, first=alert.first_step)
    assert tuple(shown["advice"]) == alert.advice
    assert {row[0] for row in shown["evidence"]} >= {"smoothed zero-sum violation", "logit displacement δ"}
    by_label = {row[0]: row for row in shown["evidence"]}
    assert by_label["smoothed zero-sum violation"][2] == "0.1"
    assert shown["mechanism"] == "numerical feature inflation"


def test_every_reading_and_every_phase_of_the_run_is_there(real: Server, spiking_run: Recorded) -> None:
    answer = real.get("series", run="run", points=4000, names="loss,zero_sum_violation")
    assert answer["exact"]
    for name in ("loss", "zero_sum_violation"):
        steps, values = spiking_run.monitor.history[name]
        kept = values_of(answer, name)
        assert list(kept) == list(steps)
        assert list(kept.values()) == pytest.approx(list(values), rel=1e-5)
    phases = [[step, list(Phase).index(phase)] for step, phase in spiking_run.monitor.phases]
    phases[0][0] = answer["steps"][0]  # the monitor's first phase begins before its first reading
    assert real.get("run", run="run")["phases"] == phases


def test_the_classes_that_absorb_are_known_before_the_run_ends(tmp_path: Path) -> None:
    grown = {**INFO, "absorbing_classes": [[5.0, 40.0]]}
    opened = TensorBoardSink(tmp_path / "run", describe=lambda: grown)
    opened.start({**INFO, "absorbing_classes": []})
    opened.alert(AT_RISK, Change.BEGIN)
    record = Server(tmp_path).get("run", run="run")["record"]
    assert record["classes"] == [[5.0, 40.0]] and not record["closed"]
    opened.close(grown, Summary())


def test_charts_carry_the_thresholds_of_their_run(real: Server, spiking_run: Recorded) -> None:
    charts = {chart["title"]: chart for chart in real.get("run", run="run")["record"]["charts"]}
    thresholds = spiking_run.monitor._loop.thresholds
    band = charts["displacement by one update"]["band"]
    expected = (thresholds.imminent_exit, thresholds.imminent_displacement)
    assert (band["low"], band["high"]) == pytest.approx(expected)
    growth = charts["growth of the means"]["band"]["high"]
    assert growth == pytest.approx(thresholds.inflating_growth / 20)  # per τ there, per step here; τ = 20
    assert sum(chart["key"] for chart in charts.values()) < len(charts) == len(CHARTS)


# --- downsampling -----------------------------------------------------------------------------------


def spiky(steps: int, spikes: dict[int, float]) -> list[tuple[Reading, Phase]]:
    return [
        (Reading(s, {"loss": spikes.get(s, 1.0 + s / steps)}), Phase.HEALTHY) for s in range(1, steps + 1)
    ]


@pytest.mark.parametrize(("steps", "points"), [(5000, 50), (5000, 137), (5000, 600), (20_000, 50)])
def test_downsampling_keeps_every_extreme(tmp_path: Path, steps: int, points: int) -> None:
    """Buckets of less than a tensor, of one, and of several."""
    spikes = {1: -7.0, 1234: 90.0, 1235: -90.0, steps - 1: 50.0, steps: 60.0}
    write(tmp_path / "run", spiky(steps, spikes))
    answer = Server(tmp_path).get("series", run="run", points=points)
    assert not answer["exact"] and answer["rows"] == steps
    assert len(answer["steps"]) <= 2.2 * points
    assert answer["steps"] == sorted(answer["steps"])
    shown = answer["series"]["loss"]
    assert set(spikes.values()) - set(shown) <= {50.0}  # hidden behind its neighbour, 60
    for extreme, value in ((1234, 90.0), (1235, -90.0)):
        at = answer["steps"][shown.index(value)]
        assert abs(at - extreme) <= 2 * 2 * steps / points


def test_a_bucket_holds_the_smallest_and_largest_of_its_readings(tmp_path: Path) -> None:
    random.seed(3)
    noise = {s: random.gauss(0, 1) for s in range(1, 2001)}
    write(tmp_path / "run", spiky(2000, noise))
    answer = Server(tmp_path).get("series", run="run", points=50)
    steps, shown = answer["steps"], answer["series"]["loss"]
    for i in range(0, len(steps) - 1, 2):
        inside = [noise[s] for s in range(steps[i], steps[i + 1] + 1)]
        assert sorted(shown[i : i + 2]) == pytest.approx([min(inside), max(inside)], rel=1e-5)


def test_a_window_is_exact(tmp_path: Path) -> None:
    write(tmp_path / "run", spiky(5000, {2501: 9.0}))
    answer = Server(tmp_path).get("series", run="run", points=600, **{"from": 2490, "to": 2510})
    assert answer["steps"] == list(range(2490, 2511)) and answer["series"]["loss"][11] == 9.0


def test_not_measured_is_null_and_not_finite_is_said(tmp_path: Path) -> None:
    rows = [{"loss": 1.0}, {"loss": math.nan, "rms_t_max": 2.0}, {"rms_t_max": math.inf}, {"loss": 3.0}]
    write(tmp_path / "run", [(Reading(i, row), Phase.HEALTHY) for i, row in enumerate(rows)])
    series = Server(tmp_path).get("series", run="run", points=600)["series"]
    assert series == {"loss": [1.0, "NaN", None, 3.0], "rms_t_max": [None, 2.0, "NaN", None]}


@pytest.mark.parametrize("points", [50, 600, 4000])
def test_the_latest_value_is_the_one_that_was_measured_last_however_few_points_are_asked_for(
    tmp_path: Path, points: int
) -> None:
    rows = spiky(5000, {4995: 90.0, 4998: math.inf})
    rows[699] = (Reading(700, {"loss": 1.5, "rms_t_max": 2.5}), Phase.HEALTHY)
    write(tmp_path / "run", rows)
    server = Server(tmp_path)
    whole = server.get("series", run="run", points=points)
    assert whole["latest"] == {"loss": 2.0, "rms_t_max": 2.5}
    window = server.get("series", run="run", points=50, **{"from": 10, "to": 4998})
    assert window["latest"] == {"loss": "NaN", "rms_t_max": 2.5}
    early = server.get("series", run="run", points=50, **{"from": 10, "to": 600})
    assert early["latest"] == {"loss": 1.12}


def test_steps_beyond_what_float32_holds_stay_exact(tmp_path: Path) -> None:
    start = 2**40 + 1
    write(tmp_path / "run", [(Reading(start + i, {"loss": 1.0}), Phase.HEALTHY) for i in range(300)])
    assert Server(tmp_path).get("series", run="run")["steps"] == list(range(start, start + 300))


def test_a_very_long_run_grows_slower_and_loses_no_extreme(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nfi_monitor.report.tensorboard.tab_data.CHUNKS_PER_WIDTH", 2)
    steps = 40 * ROWS
    write(tmp_path / "run", spiky(steps, {steps - 333: 77.0, steps - 222: -77.0}))
    server = Server(tmp_path)
    answer = server.get("series", run="run", points=4000)
    assert {77.0, -77.0} <= set(answer["series"]["loss"])
    assert answer["steps"][-1] == steps
    # 2 tensors at one reading a row, 2 at 4 in two rows, 2 at 16, ...
    assert server.get("run", run="run")["readings"] < 8 * ROWS < steps
    assert CHUNKS_PER_WIDTH * ROWS > 100_000  # and a run of ordinary length is kept whole


# --- alerts, resumes, polling -----------------------------------------------------------------------


def test_no_alert_is_lost_and_each_is_as_it_was_last(tmp_path: Path) -> None:
    """Hundreds, where TensorBoard keeps ten records of a tag; the browser's test has two thousand."""
    opened = sink(tmp_path / "run")
    writer = opened._open()
    writer.flush = writer.add_text = lambda *_: None  # the stock texts have their own test
    for number in range(1, 301):
        opened.alert(event(AlertKind.AT_RISK, 10 * number, None, number), Change.UPDATE)
    for last in range(20):  # more records of one tag than TensorBoard keeps
        opened.alert(resolved(event(AlertKind.AT_RISK, 70, None, 7), 70 + last), Change.UPDATE)
    opened.close(INFO, Summary())
    alerts = Server(tmp_path).get("run", run="run")["alerts"]
    assert [alert["id"] for alert in alerts] == [f"at_risk-{number}" for number in range(1, 301)]
    assert (alerts[6]["last_step"], alerts[6]["state"]) == (89, "resolved")


def test_a_resumed_run_is_one_run_and_what_was_measured_again_replaces_the_first_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(10**9, 10**10, 10**9))
    monkeypatch.setattr("nfi_monitor.report.tensorboard.tab_data.time.time_ns", lambda: next(clock))
    first, second = sink(tmp_path / "run"), sink(tmp_path / "run")
    for step in range(1, 301):
        first.reading(Reading(step, {"loss": 1.0}), Phase.HEALTHY)
    early, late = replace(AT_RISK, first_step=50), replace(SLINGSHOT, first_step=250, last_step=260)
    for alert in (early, late):
        first.alert(alert, Change.BEGIN)
    first.close(INFO, Summary())
    for step in range(201, 401):
        second.reading(Reading(step, {"loss": 2.0, "rms_t_max": 1.0}), Phase.HEALTHY)
    second.alert(resolved(early, 210), Change.END)
    second.close(INFO, Summary())

    server = Server(tmp_path)
    answer = server.get("series", run="run", points=4000)
    assert answer["steps"] == list(range(1, 401))
    assert answer["series"]["loss"] == [1.0] * 200 + [2.0] * 200
    assert answer["series"]["rms_t_max"] == [None] * 200 + [1.0] * 200
    alerts = server.get("run", run="run")["alerts"]
    assert [(alert["id"], alert["last_step"]) for alert in alerts] == [("at_risk-1", 210)]


def test_a_run_that_goes_back_replaces_what_it_had_told_of_the_same_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(10**9, 10**10, 10**9))
    monkeypatch.setattr("nfi_monitor.report.tensorboard.tab_data.time.time_ns", lambda: next(clock))
    opened = sink(tmp_path / "run")
    for step in range(1, 31):
        opened.reading(Reading(step, {"loss": 1.0}), Phase.HEALTHY)
    opened.alert(replace(SLINGSHOT, first_step=25, last_step=26), Change.BEGIN)
    opened.went_back()
    for step in range(21, 41):
        opened.reading(Reading(step, {"loss": 2.0}), Phase.HEALTHY)
    opened.close(INFO, Summary())
    server = Server(tmp_path)
    answer = server.get("series", run="run", points=4000)
    assert answer["series"]["loss"] == [1.0] * 20 + [2.0] * 20
    assert server.get("run", run="run")["alerts"] == []


def test_a_poll_reads_only_what_is_new(tmp_path: Path) -> None:
    opened = sink(tmp_path / "run")
    for step in range(1, 1001):
        opened.reading(Reading(step, {"loss": 1.0}), Phase.HEALTHY)
    opened._open().flush()
    server = Server(tmp_path)
    version = server.get("run", run="run")["version"]
    answer = server.get("run", run="run", version=version)
    assert answer["unchanged"] and "alerts" not in answer

    provider, asked = server.plugin._runs._provider, []
    read = provider.read_tensors
    provider.read_tensors = lambda *a, **k: asked.append(set(k["run_tag_filter"].tags)) or read(*a, **k)
    opened.alert(AT_RISK, Change.BEGIN)
    server.load()
    answer = server.get("run", run="run", version=version)
    assert [alert["id"] for alert in answer["alerts"]] == ["at_risk-1"]
    assert [{tag.split("/")[1] for tag in tags} for tags in asked] == [{"alerts"}]
    opened.close(INFO, Summary())


def test_a_run_that_is_watched_moves_before_its_tensor_is_full(tmp_path: Path) -> None:
    opened = sink(tmp_path / "run")
    opened._opened_tab()._seconds = 0.0
    opened.reading(Reading(1, {"loss": 1.0}), Phase.HEALTHY)
    server = Server(tmp_path)
    assert server.get("series", run="run")["steps"] == [1]
    opened.reading(Reading(2, {"loss": 1.0}), Phase.ABSORBING)
    server.load()
    assert server.get("series", run="run")["steps"] == [1, 2]
    assert server.get("run", run="run")["phases"] == [[1, 0], [2, 1]]
    opened.close(INFO, Summary())


# --- what goes wrong --------------------------------------------------------------------------------


def damage(directory: Path, tag: str, text: bytes, content: bytes = b"{}") -> None:
    """One more record under the tab's name, as a broken or a newer writer would leave it."""
    from tensorboard.compat.proto import summary_pb2, tensor_pb2, types_pb2
    from torch.utils.tensorboard import SummaryWriter

    data = summary_pb2.SummaryMetadata.PluginData(plugin_name="nfi", content=content)
    metadata = summary_pb2.SummaryMetadata(plugin_data=data, data_class=summary_pb2.DATA_CLASS_TENSOR)
    tensor = tensor_pb2.TensorProto(dtype=types_pb2.DT_STRING, string_val=[text])
    value = summary_pb2.Summary.Value(tag=tag, metadata=metadata, tensor=tensor)
    with SummaryWriter(str(directory)) as writer:
        writer.file_writer.add_summary(summary_pb2.Summary(value=[value]), 1)


def test_a_damaged_record_costs_itself_and_is_said(tmp_path: Path) -> None:
    write(tmp_path / "run", spiky(10, {}))
    damage(tmp_path / "run", "nfi-tab/alerts/00000000000001/at_risk-1", b'{"id": "at_ri')
    damage(tmp_path / "run", "nfi-tab/readings/00000000000001/000000", b"", b'{"first": 1, "columns": []}')
    damage(tmp_path / "run", "nfi-tab/what", b"{}")
    # Python reads NaN where JSON has none; a browser would not read an answer with it at all.
    damage(
        tmp_path / "run", "nfi-tab/alerts/00000000000001/a", b'{"first_step": 1, "last_step": 2, "what": NaN}'
    )
    server = Server(tmp_path)
    assert b"NaN," not in server.bytes("run", run="run")
    answer = server.get("run", run="run")
    assert len(answer["problems"]) == 4 and answer["readings"] == 10
    assert any("NaN is not JSON" in said for said in answer["problems"])
    assert any("alerts/00000000000001/at_risk-1 could not be read" in said for said in answer["problems"])


def test_a_run_does_not_change_while_a_request_reads_it(tmp_path: Path) -> None:
    """TensorBoard answers each request in a thread of its own."""
    write(tmp_path / "run", spiky(10, {}))
    server = Server(tmp_path)
    before = server.get("run", run="run")
    (run,) = server.plugin._runs._runs[""].values()
    damage(tmp_path / "run", "nfi-tab/alerts/00000000000001/a", b'{"first_step": 0, "last_step": 2}')
    server.load()
    with run.lock:
        asked = threading.Thread(target=server.get, args=("runs",))
        asked.start()
        asked.join(timeout=0.3)
        assert asked.is_alive() and run.version == before["version"] and run.alerts == []
    asked.join(timeout=20)
    assert run.version != before["version"] and len(run.alerts) == 1


def test_a_newer_writer_is_told_from_damage(tmp_path: Path) -> None:
    damage(tmp_path / "run", "nfi-tab/run/00000000000001", b"{}", b'{"format": 2}')
    answer = Server(tmp_path).get("run", run="run")
    assert len(answer["problems"]) == 1 and "pip install -U nfi-monitor" in answer["problems"][0]


def test_no_runs_no_data_provider_and_an_unknown_run_are_answers(tmp_path: Path) -> None:
    from tensorboard.plugins.base_plugin import TBContext

    server = Server(tmp_path)
    assert server.get("runs") == {"runs": []}
    assert "no run 'gone'" in server.get("run", run="gone")["error"] and server.status.startswith("404")
    server.plugin = plugin.NFIPlugin(TBContext())
    assert server.get("runs") == {"runs": []}


def test_a_question_that_makes_no_sense_is_refused_with_its_reason(real: Server) -> None:
    assert real.get("series", run="run", points="many") == {"error": "points='many' is no number."}
    assert real.status.startswith("400")
    assert real.get("series", run="run", points=10**9)["steps"] and real.status.startswith("200")


def test_what_fails_inside_is_answered_and_not_raised(
    real: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise RuntimeError("disk on fire")

    provider = real.plugin._runs._provider
    kept, provider.list_tensors = provider.list_tensors, fails
    try:
        answer = real.get("runs")
    finally:
        provider.list_tensors = kept
    assert "RuntimeError: disk on fire" in answer["error"] and real.status.startswith("500")
    assert "Traceback" in capsys.readouterr().err


# --- what TensorBoard and the browser are given ------------------------------------------------------


def test_importing_the_plugin_imports_tensorboard_and_the_standard_library_alone() -> None:
    code = (
        "import sys, tensorboard.plugin_util, tensorboard.plugins.base_plugin;"
        "before = set(sys.modules);"
        "import nfi_monitor.integrations.tensorboard.plugin;"
        "new = {name.split('.')[0] for name in set(sys.modules) - before};"
        "print(sorted(new - set(sys.stdlib_module_names)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    # An editable installation brings its finder along; an installed copy does not.
    assert [name for name in eval(done.stdout) if not name.startswith("__editable__")] == ["nfi_monitor"]


def test_the_import_is_quick() -> None:
    code = (
        "import time, tensorboard.plugin_util, tensorboard.plugins.base_plugin;"
        "start = time.process_time();"
        "import nfi_monitor.integrations.tensorboard.plugin;"
        "print(time.process_time() - start)"
    )
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True) for _ in range(2)]
    assert min(float(done.stdout) for done in runs) < 0.1


def test_construction_and_metadata_touch_nothing() -> None:
    from tensorboard.plugins.base_plugin import TBContext

    made = plugin.NFIPlugin(TBContext(data_provider=object()))  # any use of it would raise
    assert made.frontend_metadata().es_module_path in made.get_plugin_apps()
    assert made.frontend_metadata().tab_name == "NFI" and made.is_active() is False


def test_tensorboard_finds_the_plugin_by_its_entry_point() -> None:
    from importlib.metadata import entry_points

    found = {point.name: point for point in entry_points(group="tensorboard_plugins")}
    assert found["nfi"].load() is plugin.NFIPlugin


@pytest.mark.parametrize(
    "name", sorted(path.name for path in STATIC.iterdir() if path.suffix in (".js", ".css"))
)
def test_a_file_of_the_tab_is_served_as_what_it_is(real: Server, name: str) -> None:
    assert real.bytes(name) == (STATIC / name).read_bytes()
    kind = "text/javascript" if name.endswith(".js") else "text/css"
    assert real.headers["Content-Type"].startswith(kind)
    assert real.headers["X-Content-Type-Options"] == "nosniff"


def test_no_other_file_is_served(real: Server) -> None:
    routes = set(real.plugin.get_plugin_apps())
    assert routes == {f"/{name}" for name in ("runs", "run", "alert", "series")} | {
        f"/{path.name}" for path in STATIC.iterdir() if path.suffix in (".js", ".css")
    }


def test_the_chart_library_is_the_one_that_is_recorded_and_small() -> None:
    listed = (ROOT / "integrations" / "tensorboard" / "THIRD_PARTY.md").read_text(encoding="utf-8")
    sums = dict(re.findall(r"\| `(\S+)` \|.*`([0-9a-f]{64})` \|", listed))
    assert set(sums) == {path.name for path in STATIC.iterdir() if path.name.startswith("uPlot")}
    for name, digest in sums.items():
        assert hashlib.sha256((STATIC / name).read_bytes()).hexdigest() == digest, name
    assert sum((STATIC / name).stat().st_size for name in sums) < 100_000


def test_our_scripts_use_no_markup_no_inline_code_and_no_other_host() -> None:
    for path in STATIC.iterdir():
        if path.name.startswith("uPlot"):
            continue
        text = path.read_text(encoding="utf-8")
        text = text.replace("http://www.w3.org/2000/svg", "")  # a name, not an address
        for forbidden in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "://"):
            assert forbidden not in text, f"{path.name}: {forbidden}"


def test_notes_and_replays_reach_the_tab(tmp_path: Path, spiking_run: Recorded) -> None:
    from nfi_monitor.replay.verdict import ReplayVerdict
    from nfi_monitor.types import Mechanism

    opened = sink(tmp_path / "run")
    opened.note(Note("tied_head", "The head is tied.", 7))
    reasons = ("float64 loss averts it",)
    opened.replay(ReplayVerdict(855, {}, Mechanism.NUMERICAL_FEATURE_INFLATION, reasons, True, "slingshot-1"))
    opened.close(
        {**INFO, "notes": [{"code": "tied_head", "message": "The head is tied.", "step": 7}]}, Summary()
    )
    record = Server(tmp_path).get("run", run="run")["record"]
    assert [note["message"] for note in record["notes"]] == ["The head is tied."]
    said = "numerical feature inflation: float64 loss averts it; reproduced to the last bit"
    assert record["replays"] == [f"replay of slingshot-1: {said}"]
