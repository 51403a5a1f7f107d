"""Write the output of a monitor, or of a detector that is fed recorded readings, into files without times."""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nfi_monitor import Monitor
from nfi_monitor.detect.detector import Detector
from nfi_monitor.history import History
from nfi_monitor.report.explain import explain, explain_run
from nfi_monitor.report.summary import summarize
from nfi_monitor.report.tensorboard import TensorBoardSink

_OF_THE_DAY = ("nfi_monitor", "torch", "overhead", "run_dir", "version")
"""Keys whose values depend on the day or the machine."""


def stop_the_clock() -> None:
    """Make output independent of the clock, also where an example creates the monitor.

    Then the steps to read depend on τ only, and each reading is written to TensorBoard.
    """
    TensorBoardSink.__init__.__defaults__ = (0.0, *(TensorBoardSink.__init__.__defaults__ or ())[1:])
    for module, name in (("nfi_monitor.engine.schedule", "Schedule"), ("nfi_monitor.cadence", "Clock")):
        try:
            schedule = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError):
            continue
        schedule.decide = lambda self, *args, **options: False
        return
    raise RuntimeError("The class that decides on the interval between readings has moved: name it here.")


def event_sink(out: Path, name: str = "events") -> TensorBoardSink:
    """Return a sink that writes every reading; by default the clock decides how many are written."""
    return TensorBoardSink(out / "events" / name, min_seconds=0)


def dump(monitor: Monitor, out: Path, *, console: Any = None, extra: Mapping[str, Any] | None = None) -> None:
    """Write all output of a closed monitor into ``out``; the monitor's run directory is ``out/run``."""
    out.mkdir(parents=True, exist_ok=True)
    _write(out / "alerts.json", [alert.to_json() for alert in monitor.alerts])
    _write(out / "phases.json", [[step, str(phase)] for step, phase in monitor.phases])
    _write(out / "notes.json", [asdict(note) for note in monitor.notes])
    _write(out / "history.json", _columns(monitor.history))
    _write(out / "explained.json", [_explanation(monitor.explain(alert)) for alert in monitor.alerts])
    _write(out / "summary.json", monitor.summary())
    _write(out / "replays.json", [verdict.to_json() for verdict in monitor.replays])
    if extra:
        _write(out / "extra.json", extra)
    if console is not None:
        (out / "console.txt").write_text(console.file.getvalue().replace(str(out), "OUT"), encoding="utf-8")


def finish(out: Path) -> None:
    """Replace binary event files by JSON, and remove files and keys that change from day to day."""
    for path in sorted(out.rglob("events.out.tfevents.*")):
        events = list(_events(path))
        # The tab's tags are written again every ten seconds, as they grow: keep the last record only.
        last = {event[1]: index for index, event in enumerate(events)}
        kept = [e for i, e in enumerate(events) if not e[1].startswith("nfi-tab/") or last[e[1]] == i]
        _write(path.parent / "events.json", sorted(kept, key=lambda e: e[1].startswith("nfi-tab/")))
    for path in [
        *out.rglob("events.out.tfevents.*"),
        *out.rglob("*.pt"),
        *out.rglob("*.png"),
        *out.rglob(".lock"),
    ]:
        path.unlink()
    for path in out.rglob("run.json"):
        _write(path, json.loads(path.read_text(encoding="utf-8")))


def recorded(path: Path, out: Path) -> None:
    """Feed a recorded run to the detector, and write its answer to each reading."""
    from tests.benchmarks.detection.generate import load
    from tests.benchmarks.detection.replay import readings

    run = load(path)
    detector, history, phases = Detector(), History(max_rows=1 << 20), [(0, Detector().phase)]
    contexts = {step: context for step, context in run.contexts}
    detector.context = run.contexts[0][1]
    answers: list[Any] = []
    for reading in readings(run):
        detector.context = contexts.get(reading.step, detector.context)
        answer = detector.update(reading)
        history.append(reading.step, {**reading.values, **answer.derived})
        if answer.phase is not phases[-1][1]:
            phases.append((reading.step, answer.phase))
        changes = [[str(change), alert.to_json()] for change, alert in answer.changes]
        answers.append([reading.step, str(answer.phase), detector.attention.value, answer.derived, changes])
    _write(out / "answers.json", answers)
    context, limits = detector.context, detector.limits
    _write(
        out / "explained.json",
        [_explanation(explain(alert, history, phases, limits, context)) for alert in detector.alerts],
    )
    info = {"tau": context.tau, "thresholds": limits.to_json()}
    _write(out / "report.json", [str(one) for one in explain_run(info, history, phases, detector.alerts, [])])
    _write(out / "summary.json", summarize(info, history, phases, detector.alerts, []))


def _explanation(explanation: Any) -> Any:
    return explanation.to_json()


def _columns(history: History) -> dict[str, Any]:
    return {name: [column.tolist() for column in history[name]] for name in history.names()}


def _events(path: Path) -> Iterable[Any]:
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
    from tensorboard.util import tensor_util

    sessions: dict[str, str] = {}

    def named(tag: str) -> str:
        parts = tag.split("/")
        if parts[0] == "nfi-tab":
            parts[2] = sessions.setdefault(parts[2], f"session-{len(sessions)}")
        return "/".join(parts)

    for event in EventFileLoader(str(path)).Load():
        for value in event.summary.value:
            content = tensor_util.make_ndarray(value.tensor) if value.HasField("tensor") else None
            items = None if content is None else [_decoded(item) for item in content.ravel().tolist()]
            yield [event.step, named(value.tag), value.metadata.plugin_data.content.decode("latin-1"), items]


def _decoded(item: Any) -> Any:
    """Return an event's bytes as JSON or lines of text, without the keys in ``_OF_THE_DAY``."""
    if not isinstance(item, bytes):
        return item
    text = item.decode("utf-8", "replace")
    try:
        return plain(json.loads(text))
    except ValueError:
        return [
            line
            for line in text.splitlines()
            if not any(f"| {key.replace('_', ' ')} |" in line for key in _OF_THE_DAY)
        ]


def plain(value: Any) -> Any:
    """Remove the keys in ``_OF_THE_DAY``; write NaN and Inf as text, so that the file stays JSON."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items() if key not in _OF_THE_DAY}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)
    return value


def _write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(plain(value), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
