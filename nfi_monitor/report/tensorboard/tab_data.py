"""Write the records of TensorBoard's NFI tab: every reading's key quantities, every alert, and the run.

Why the records have their form:

- TensorBoard keeps 1,000 random points of a scalar and 10 random records of any other tag.  A spike of three
  steps can be missing from its own curves.  But it always keeps the last record of a tag.  So everything that
  must not be lost has a tag of its own: 128 readings are one tensor, an alert is one.  It is written again
  while it grows.
- Titles, labels, bands and advice are written with the numbers, and the tab shows them as they are.  So runs
  of older and newer versions can be shown together, and the words are in one place, this package.
- The files of a long run must not grow without bound: after every 1,024 tensors, each row covers four times
  as many readings, by the smallest and the largest value of each bucket.
- A resumed run writes under the tags of a new *session*.  The tab drops the earlier readings of the same
  steps.
"""

from __future__ import annotations

import json
import math
import time
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from nfi_monitor.quantities import QUANTITIES, READING_ORDER
from nfi_monitor.replay.verdict import ReplayVerdict
from nfi_monitor.report import wording
from nfi_monitor.report.json_values import as_json
from nfi_monitor.report.levels import bands_of
from nfi_monitor.types import Alert, Note, Phase, Reading

PLUGIN = "nfi"
FORMAT = 1
"""Version of the format. Raise it if older tabs cannot read new records: they then say so."""
ROWS = 128
CHUNKS_PER_WIDTH = 1024
UPDATES = 360
"""The readings are flushed after every 1/360 of the run's time, but at least ten seconds apart."""
_PHASES = {phase: float(index) for index, phase in enumerate(Phase)}


@dataclass(frozen=True)
class Chart:
    """Quantities that share an axis. Their declarations name the chart by its title."""

    title: str
    log: bool = True
    key: bool = True  # shown at first; the others on request

    @property
    def curves(self) -> dict[str, str]:
        """The chart's quantities by name, each with the short name of its curve."""
        return {quantity.name: quantity.curve for quantity in READING_ORDER if quantity.chart == self.title}


CHARTS = (
    Chart("loss"),
    Chart("zero-sum violation"),
    Chart("rows that rounding silences", log=False),
    Chart("global means"),
    Chart("displacement by one update"),
    Chart("RMS_t"),
    Chart("margins", log=False),
    Chart("second moment, median sqrt(v̂)"),
    Chart("growth of the means", log=False, key=False),
    Chart("alignment", log=False, key=False),
    Chart("learning rate", key=False),
    Chart("second-moment decay", log=False, key=False),
    Chart("curvature along the update", log=False, key=False),
    Chart("predicted reduction over loss", log=False, key=False),
    Chart("gradient norm", key=False),
    Chart("update RMS", key=False),
    Chart("weight norms", key=False),
)
_SHOWN = frozenset(quantity.name for quantity in READING_ORDER if quantity.chart)


class TabWriter:
    """Write the tab's records through ``file_writer``, the ``FileWriter`` inside torch's SummaryWriter.

    At most every ``seconds``, the tensor that is not full yet is written and flushed, so that an open tab
    shows new readings.  Raises ImportError if tensorboard is missing.
    """

    def __init__(self, file_writer: Any, info: Mapping[str, Any], seconds: float = 10.0) -> None:
        from tensorboard.compat.proto import summary_pb2, tensor_pb2, tensor_shape_pb2, types_pb2

        self._protos: Any = (summary_pb2, tensor_pb2, tensor_shape_pb2, types_pb2)
        self._writer = file_writer
        self._seconds = seconds
        self._session = f"{time.time_ns() // 1_000_000:014d}"
        self._info = info
        self._notes: list[dict[str, Any]] = []
        self._replays: list[str] = []
        self._columns: dict[str, None] = {}  # an ordered set
        self._rows: list[Sequence[float]] = []
        self._bucket: list[Sequence[float]] = []
        self._width = 1
        self._chunk = 0
        self._unwritten = False
        self._started = time.monotonic()
        self._written = -math.inf
        self._step = 0
        self._write_run(closed=False)

    def reading(self, reading: Reading, phase: Phase) -> None:
        values = reading.values
        if new := [name for name in values if name in _SHOWN and name not in self._columns]:
            self._end_bucket()
            self._end_chunk()  # all records of a tag have the same columns
            self._columns.update(dict.fromkeys(new))
        self._step = reading.step
        index = _PHASES[phase]
        if self._bucket and (len(self._bucket) == self._width or self._bucket[0][1] != index):
            self._end_bucket()
        # Most readings are a loss alone: call nothing for what is absent.
        found = [values.get(name) for name in self._columns]
        cells = [math.nan if value is None else _cell(value) for value in found]
        self._bucket.append((reading.step, index, *cells))
        if self._width == 1:
            self._end_bucket()
        now = time.monotonic()
        # The last tag is written again while it grows, and files only grow: write less often in longer runs.
        if now - self._written >= max(self._seconds, (now - self._started) / UPDATES):
            self._written = now
            self._write_chunk()
            self._writer.flush()

    def alert(self, alert: Alert) -> None:
        evidence = [
            [
                wording.label(name),
                *wording.evidence_cells(name, item, alert.tau),
                QUANTITIES[name].meaning if name in QUANTITIES else "",
            ]
            for name, item in wording.ordered_evidence(alert).items()
        ]
        record = {
            **alert.to_json(),
            "what": wording.kind_in_words(alert.kind),
            "headline": wording.headline(alert),
            "mechanism": wording.mechanism_name(alert.mechanism),
            "mechanism_in_words": wording.mechanism_in_words(alert),
            "forecast": wording.forecast_in_words(alert),
            "then": wording.ending_in_words(alert),
            "evidence": evidence,
        }
        self._write_json(f"alerts/{self._session}/{alert.id}", record)

    def note(self, note: Note) -> None:
        self._notes.append(asdict(note))
        self._write_run(closed=False)

    def replay(self, verdict: ReplayVerdict) -> None:
        replayed = verdict.slingshot or f"step {verdict.snapshot_step:,}"
        self._replays.append(f"replay of {replayed}: {wording.replay_in_words(verdict)}")
        self._write_run(closed=False)

    def describe(self, info: Mapping[str, Any]) -> None:
        """Write the run's record again with a new ``info``: above all, more classes may absorb."""
        self._info = info
        self._write_run(closed=False)

    def close(self, info: Mapping[str, Any]) -> None:
        self._end_bucket()
        self._write_chunk()
        self._info = info
        self._write_run(closed=True)

    def _end_bucket(self) -> None:
        rows, self._bucket = self._bucket, []
        if len(rows) > 2:
            rows = _extremes(rows)
        for row in rows:
            self._rows.append(row)
            self._unwritten = True
            if len(self._rows) == ROWS:
                self._end_chunk()

    def _end_chunk(self) -> None:
        if self._rows:
            self._write_chunk()
            self._rows = []
            self._chunk += 1
            if self._chunk % CHUNKS_PER_WIDTH == 0:
                self._width *= 4

    def _write_chunk(self) -> None:
        if not self._unwritten:
            return
        self._unwritten = False
        _, tensor_pb2, tensor_shape_pb2, types_pb2 = self._protos
        first = int(self._rows[0][0])
        # float32 is not exact for steps beyond 2^24: store the distance to the first step.
        numbers = array("f", (x for row in self._rows for x in (row[0] - first, *row[1:])))
        shape = tensor_shape_pb2.TensorShapeProto(
            dim=[tensor_shape_pb2.TensorShapeProto.Dim(size=n) for n in (len(self._rows), len(self._rows[0]))]
        )
        tensor = tensor_pb2.TensorProto(
            dtype=types_pb2.DT_FLOAT, tensor_shape=shape, tensor_content=numbers.tobytes()
        )
        content = {"format": FORMAT, "first": first, "columns": list(self._columns)}
        self._write(f"readings/{self._session}/{self._chunk:06d}", tensor, content)

    def _write_run(self, *, closed: bool) -> None:
        info = as_json(self._info)
        notes = {note.get("code"): note for note in [*(info.get("notes") or []), *self._notes]}
        record = {
            "format": FORMAT,
            "closed": closed,
            "step": self._step,
            "tau": info.get("tau"),
            "facts": facts(info),
            "phases": [str(phase) for phase in Phase],
            "classes": info.get("absorbing_classes") or [],
            "notes": list(notes.values()),
            "replays": self._replays,
            "charts": [chart_json(chart, info) for chart in CHARTS],
        }
        self._write_json(f"run/{self._session}", record)

    def _write_json(self, tag: str, record: Mapping[str, Any]) -> None:
        _, tensor_pb2, tensor_shape_pb2, types_pb2 = self._protos
        text = json.dumps(record, ensure_ascii=False, allow_nan=False).encode("utf-8", "backslashreplace")
        tensor = tensor_pb2.TensorProto(
            dtype=types_pb2.DT_STRING, tensor_shape=tensor_shape_pb2.TensorShapeProto(), string_val=[text]
        )
        self._write(tag, tensor, {"format": FORMAT})

    def _write(self, tag: str, tensor: Any, content: Mapping[str, Any]) -> None:
        summary_pb2 = self._protos[0]
        plugin_data = summary_pb2.SummaryMetadata.PluginData(
            plugin_name=PLUGIN, content=json.dumps(content).encode()
        )
        metadata = summary_pb2.SummaryMetadata(
            plugin_data=plugin_data, data_class=summary_pb2.DATA_CLASS_TENSOR
        )
        value = summary_pb2.Summary.Value(tag=f"nfi-tab/{tag}", metadata=metadata, tensor=tensor)
        # At step 0: where a run goes back, TensorBoard drops all records from that step on, and a chunk or an
        # alert may have begun before.
        self._writer.add_summary(summary_pb2.Summary(value=[value]), 0)


def _cell(value: float) -> float:
    """Encode one value that was measured: NaN as Inf, because NaN stands for what was not measured."""
    return math.inf if value != value else value


def _extremes(rows: Sequence[Sequence[float]]) -> list[Sequence[float]]:
    """Replace rows by two with each column's extremes; the largest comes first if the column falls."""
    first, last = rows[0], rows[-1]
    low: list[float] = [first[0], first[1]]
    high: list[float] = [last[0], last[1]]
    for column in zip(*(row[2:] for row in rows), strict=True):
        present = [x for x in column if x == x] or [math.nan]
        pair = (min(present), max(present))
        falls = present[0] > present[-1]
        low.append(pair[falls])
        high.append(pair[not falls])
    return [low, high]


def facts(info: Mapping[str, Any]) -> list[list[str]]:
    """Return ``[label, text]`` of the run's model, head, optimizer, dtype, τ and level."""
    optimizer = info.get("optimizer")
    optimizer = optimizer if isinstance(optimizer, Mapping) else {}
    settings = [
        f"{name} {value}"
        for key, name in (("lr", "lr"), ("betas", "β"), ("eps", "ε"), ("weight_decay", "decay"))
        if (value := _short(optimizer.get(key)))
    ]
    parameters = info.get("parameters")
    model = [info.get("model"), f"{parameters:,} parameters" if isinstance(parameters, int) else None]
    found = {
        "model": _joined(model),
        "head": _joined([info.get("head")]),
        "optimizer": _joined([optimizer.get("name"), *settings]),
        "dtype": _joined([info.get("dtype")]),
        "τ": _short(info.get("tau")) + " steps" if info.get("tau") else "",
        "sees": _joined([info.get("level")]),
    }
    return [[label, text] for label, text in found.items() if text]


def _joined(parts: Iterable[Any]) -> str:
    return " · ".join(str(part) for part in parts if part)


def _short(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return "/".join(_short(item) for item in value)
    return f"{value:g}" if isinstance(value, (int, float)) and value else ""


def chart_json(chart: Chart, info: Mapping[str, Any]) -> dict[str, Any]:
    """Return a chart as the tab draws it, with the thresholds of this run; no band if they are unknown."""
    drawn = bands_of(info)
    found = next((drawn[name] for name in chart.curves if name in drawn), None)
    band = None if found is None else {"low": found.leave, "high": found.enter, "means": found.means}
    units = {QUANTITIES[name].unit for name in chart.curves}
    unit = units.pop() if len(units) == 1 else ""
    return {
        "title": chart.title,
        "unit": "" if unit == "1" else unit,
        "log": chart.log,
        "key": chart.key,
        "band": band,
        "series": [
            {"name": name, "label": label, "meaning": f"{wording.label(name)}: {QUANTITIES[name].meaning}"}
            for name, label in chart.curves.items()
        ],
    }
