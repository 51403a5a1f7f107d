"""Read the tab's runs through TensorBoard's data provider, and keep them between polls.

``nfi_monitor/report/tensorboard/tab_data.py`` writes these records.  This module imports only the standard
library and :mod:`.records`: the data provider returns numpy arrays, and their own methods are enough.

A poll lists the tags and reads only those that changed.  A record that cannot be read becomes a sentence in
:attr:`Run.problems`; the rest of the run is shown.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from .records import AlertRecord, NewerFormatError, RunRecord, check_readings, content_of, json_of

PLUGIN = "nfi"
PREFIX = "nfi-tab/"
PROBLEMS = 20
_RECORDS = 1000  # records requested of each tag: the last one is always among them, and only it is used

Read = Callable[[str, list[str]], Mapping[str, Any]]
"""``(run, tags) → {tag: its data}``"""


class Chunk:
    """Up to 128 readings: ``array`` [rows, 2 + columns] of step, index of the phase, one column a quantity.

    NaN means *not measured*; ±Inf means *measured and not finite*.
    """

    def __init__(self, columns: Collection[str], array: Any) -> None:
        self.columns = list(columns)
        self.array = array
        self._blocks: dict[int, list[list[list[float]]]] = {}
        self._latest: dict[str, float] | None = None
        self._edges: list[list[int]] | None = None

    @property
    def first(self) -> float:
        return float(self.array[0, 0])

    @property
    def last(self) -> float:
        return float(self.array[-1, 0])

    @property
    def edges(self) -> list[list[int]]:
        """Return ``[step, index of the phase]`` of the first reading and of each change of phase."""
        if self._edges is None:
            phases = self.array[:, 1]
            changed = [0, *((phases[1:] != phases[:-1]).nonzero()[0] + 1).tolist()]
            self._edges = [[int(step), int(phase)] for step, phase in self.array[changed, :2].tolist()]
        return self._edges

    def before(self, step: float) -> Chunk | None:
        """Return the readings before ``step``; None if there are none."""
        kept = self.array[self.array[:, 0] < step]
        return Chunk(self.columns, kept) if len(kept) else None

    def within(self, low: float, high: float) -> list[list[float]]:
        """Return the rows with a step in [low, high]."""
        rows: list[list[float]] = self._between(low, high).tolist()
        return rows

    def latest(self, low: float, high: float) -> dict[str, float]:
        """Return the last value in [low, high] of each quantity that was measured there."""
        if not (low <= self.first and self.last <= high):
            return _latest(self.columns, self._between(low, high))
        if self._latest is None:
            self._latest = _latest(self.columns, self.array)
        return self._latest

    def _between(self, low: float, high: float) -> Any:
        steps = self.array[:, 0]
        return self.array[(steps >= low) & (steps <= high)]

    def blocks(self, width: int) -> list[list[list[float]]]:
        """Return every ``width`` rows as two rows with each column's extremes; a single row stays one."""
        if width not in self._blocks:
            starts = range(0, len(self.array), width)
            self._blocks[width] = [_extremes(self.array[i : i + width]) for i in starts]
        return self._blocks[width]


def _latest(columns: list[str], rows: Any) -> dict[str, float]:
    if not len(rows):
        return {}
    backwards = rows[::-1, 2:]
    # 0 also if no row was measured: the value is NaN then.
    newest = (backwards == backwards).argmax(axis=0).tolist()
    values = (float(backwards[row, i]) for i, row in enumerate(newest))
    return {name: value for name, value in zip(columns, values, strict=True) if value == value}


def _extremes(rows: Any) -> list[list[float]]:
    if len(rows) == 1:
        return [rows[0].tolist()]
    absent = rows != rows
    low, high = rows.copy(), rows.copy()
    low[absent], high[absent] = float("inf"), float("-inf")
    low, high = low.min(axis=0), high.max(axis=0)
    none = absent.all(axis=0)
    low[none] = high[none] = float("nan")
    return _in_order(rows[0].tolist(), rows[-1].tolist(), low.tolist(), high.tolist())


def _merged(blocks: list[list[list[float]]]) -> list[list[float]]:
    """Merge several blocks into one, by the rule of :func:`_extremes`."""
    rows = [row for block in blocks for row in block]
    if len(rows) == 1:
        return rows
    low, high = [], []
    for column in zip(*rows, strict=True):
        present = [x for x in column if x == x] or [float("nan")]
        low.append(min(present))
        high.append(max(present))
    return _in_order(rows[0], rows[-1], low, high)


def _in_order(
    first: list[float], last: list[float], low: list[float], high: list[float]
) -> list[list[float]]:
    """Return two rows, at the first and the last step. A column that falls has its largest value first."""
    early, late = [first[0], first[1]], [last[0], last[1]]
    for i in range(2, len(first)):
        falls = first[i] > last[i]
        early.append(high[i] if falls else low[i])
        late.append(low[i] if falls else high[i])
    return [early, late]


class Session:
    """The records of one start of the monitor: a resumed run has several sessions."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.record: dict[str, Any] = {}
        self.chunks: dict[str, Chunk] = {}
        self.alerts: dict[str, dict[str, Any]] = {}

    @property
    def first(self) -> float:
        return min((chunk.first for chunk in self.chunks.values()), default=float("inf"))


class Run:
    """One run with its sessions joined: a later session replaces the earlier readings of the same steps.

    TensorBoard answers requests in threads.  Hold ``lock`` while reading, as :meth:`update` does while it
    changes the run.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.lock = threading.RLock()
        self.version = ""
        self.wall_time = 0.0
        self._seen: dict[str, tuple[float, int]] = {}
        self._sessions: dict[str, Session] = {}
        self._problems: dict[str, str] = {}
        self._chunks: list[Chunk] | None = None
        self._alerts: list[dict[str, Any]] | None = None
        self._phases: list[list[int]] | None = None

    def update(self, listed: Mapping[str, Any], read: Read) -> None:
        """Read the tags of ``listed`` ({tag: TensorTimeSeries}) that are new or have changed."""
        with self.lock:
            self._update(listed, read)

    def _update(self, listed: Mapping[str, Any], read: Read) -> None:
        now = {tag: (series.max_wall_time, series.max_step) for tag, series in listed.items()}
        changed = [tag for tag, mark in now.items() if self._seen.get(tag) != mark]
        if not changed and len(now) == len(self._seen):
            return
        if self._seen.keys() - now.keys():  # the run was deleted, and another one began under its name
            self._sessions, self._problems = {}, {}
            changed = list(now)
        data = read(self.name, changed)
        for tag in changed:
            if data.get(tag):
                latest = max(data[tag], key=lambda datum: datum.wall_time)
                self._take(tag, listed[tag].plugin_content, latest.numpy)
        self._seen = now
        self._chunks = self._alerts = self._phases = None
        self.wall_time = max((mark[0] for mark in now.values() if math.isfinite(mark[0])), default=0.0)
        self.version = f"{len(now)}-{self.wall_time!r}"

    def _take(self, tag: str, content: bytes, array: Any) -> None:
        self._problems.pop(tag, None)
        try:
            kind, session_name, *rest = tag.removeprefix(PREFIX).split("/", 2)
            described = content_of(content)
            session = self._sessions.setdefault(session_name, Session(session_name))
            if kind == "readings":
                session.chunks[rest[0]] = Chunk(described.columns, check_readings(array, described))
            elif kind == "run":
                session.record = json_of(array.item(), RunRecord)
            elif kind == "alerts":
                session.alerts[rest[0]] = json_of(array.item(), AlertRecord)
            else:
                raise ValueError(f"{kind[:40]!r} is no kind of record")
        except NewerFormatError:
            self._problems[tag] = (
                "Written by a newer nfi-monitor than this tab: upgrade it where TensorBoard runs "
                "(pip install -U nfi-monitor)."
            )
        except Exception as error:
            # Any exception: a damaged record must not hide the others.
            name = tag.removeprefix(PREFIX)[:80]
            self._problems[tag] = f"{name} could not be read ({error}); the rest is shown."

    def _in_order(self) -> list[tuple[Session, float]]:
        """Return the sessions, oldest first, each with the first step of the later sessions."""
        sessions = [self._sessions[name] for name in sorted(self._sessions)]
        cut = float("inf")
        pairs = []
        for session in reversed(sessions):
            pairs.append((session, cut))
            cut = min(cut, session.first)
        return pairs[::-1]

    @property
    def record(self) -> dict[str, Any]:
        """Return the run's description, from its latest session."""
        records = [self._sessions[name].record for name in sorted(self._sessions)]
        return next((record for record in reversed(records) if record), {})

    def key_quantities(self) -> list[str] | None:
        """Return the quantities that the run's charts show at first; None if the run has no charts."""
        charts = self.record.get("charts")
        if charts is None:
            return None
        return [curve["name"] for chart in charts if chart["key"] for curve in chart["series"]]

    @property
    def problems(self) -> list[str]:
        """Return up to PROBLEMS sentences about records that could not be read."""
        said = sorted(set(self._problems.values()))
        more = len(said) - PROBLEMS
        return said if more <= 0 else [*said[:PROBLEMS], f"{more:,} more records could not be read."]

    @property
    def chunks(self) -> list[Chunk]:
        if self._chunks is None:
            found = []
            for session, cut in self._in_order():
                for _, chunk in sorted(session.chunks.items()):
                    kept = chunk if chunk.last < cut else chunk.before(cut)
                    if kept is not None:
                        found.append(kept)
            self._chunks = found
        return self._chunks

    @property
    def alerts(self) -> list[dict[str, Any]]:
        """Return the last state of each alert, oldest first."""
        if self._alerts is None:
            # The id alone is no key: a run resumed without the monitor's state numbers alerts from 1 again.
            kept: dict[tuple[str, int], dict[str, Any]] = {}
            for session, cut in self._in_order():
                for alert in session.alerts.values():
                    if alert["first_step"] < cut:
                        kept[str(alert.get("id")), alert["first_step"]] = alert
            self._alerts = sorted(kept.values(), key=lambda alert: (alert["first_step"], alert["last_step"]))
        return self._alerts

    def phases(self) -> list[list[int]]:
        """Return ``[step, index of the new phase]`` for each change; the first is the first reading."""
        if self._phases is None:
            edges: list[list[int]] = []
            for chunk in self.chunks:
                for step, phase in chunk.edges:
                    if not edges or edges[-1][1] != phase:
                        edges.append([step, phase])
            self._phases = edges
        return self._phases

    def series(
        self, low: float, high: float, points: int, wanted: Collection[str] | None = None
    ) -> dict[str, Any]:
        """Return the readings of [low, high] in about ``2 · points`` rows at most, with every extreme.

        If there are more readings, each bucket becomes two rows with each quantity's smallest and largest
        value: a spike of one step keeps its height.

        Keys: ``steps``; ``series`` {name: values} of the ``wanted`` quantities (None: all), with null where a
        quantity was not measured and ``"NaN"`` where it was not finite; ``latest`` {name: last measured
        value} (of a run that was thinned while it was written, one of the last few values); ``measured``, the
        names of all quantities; ``rows``, the number of readings; ``exact``, True if nothing was merged.
        """
        chunks = [chunk for chunk in self.chunks if chunk.last >= low and chunk.first <= high]
        total = sum(len(chunk.array) for chunk in chunks)
        exact = total <= 2 * points
        names: dict[str, None] = {}
        for chunk in chunks:
            names.update(dict.fromkeys(chunk.columns))
        steps: list[int] = []
        columns: dict[str, list[Any]] = {name: [] for name in names if wanted is None or name in wanted}
        for chunk, rows in _buckets(chunks, low, high, points, exact):
            steps += [int(row[0]) for row in rows]
            for name in columns:
                if name in chunk.columns:
                    index = 2 + chunk.columns.index(name)
                    columns[name] += [_plain(row[index]) for row in rows]
                else:
                    columns[name] += [None] * len(rows)
        return {
            "steps": steps,
            "series": columns,
            "latest": {name: _plain(value) for name, value in _newest(chunks, low, high, columns).items()},
            "measured": list(names),
            "rows": total,
            "exact": exact,
        }


def _newest(chunks: list[Chunk], low: float, high: float, wanted: Iterable[str]) -> dict[str, float]:
    found: dict[str, float] = {}
    missing = set(wanted)
    for chunk in reversed(chunks):
        if not missing:
            break
        latest = chunk.latest(low, high)
        for name in missing & latest.keys():
            found[name] = latest[name]
        missing -= found.keys()
    return found


def _buckets(
    chunks: list[Chunk], low: float, high: float, points: int, exact: bool
) -> Iterable[tuple[Chunk, list[list[float]]]]:
    if exact:
        for chunk in chunks:
            yield chunk, chunk.within(low, high)
        return
    total = sum(len(chunk.array) for chunk in chunks)
    width = 1
    while width * points < total:
        width *= 2
    longest = max(len(chunk.array) for chunk in chunks)
    group: list[Chunk] = []
    for chunk in chunks:
        if width < longest:
            yield chunk, [row for block in chunk.blocks(width) for row in block if low <= row[0] <= high]
            continue
        # A bucket is several whole chunks with the same columns.
        if group and (chunk.columns != group[0].columns or sum(len(other.array) for other in group) >= width):
            yield group[0], _merged([other.blocks(longest)[0] for other in group])
            group = []
        group.append(chunk)
    if group:
        yield group[0], _merged([other.blocks(longest)[0] for other in group])


def _plain(value: float) -> Any:
    if value != value:
        return None
    return "NaN" if value in (float("inf"), float("-inf")) else float(f"{value:.6g}")


class Runs:
    """All runs of a TensorBoard. If ``data_provider`` is None, there are no runs."""

    def __init__(self, data_provider: Any, clock: Callable[[], float] = time.monotonic) -> None:
        self._provider = data_provider
        self._clock = clock
        self._lock = threading.Lock()
        self._runs: dict[str, dict[str, Run]] = {}
        self._refreshed: dict[str, float] = {}

    def refresh(self, context: Any, experiment: str) -> dict[str, Run]:
        """Read new records, at most once a second for all open tabs, and return the runs by name."""
        with self._lock:
            runs = self._runs.setdefault(experiment, {})
            now = self._clock()
            if self._provider is None or now - self._refreshed.get(experiment, -1e9) < 1.0:
                return dict(runs)
            listed = self._provider.list_tensors(context, experiment_id=experiment, plugin_name=PLUGIN)
            for name in runs.keys() - listed.keys():
                del runs[name]

            def read(run: str, tags: list[str]) -> Mapping[str, Any]:
                from tensorboard.data.provider import RunTagFilter

                found = self._provider.read_tensors(
                    context,
                    experiment_id=experiment,
                    plugin_name=PLUGIN,
                    downsample=_RECORDS,
                    run_tag_filter=RunTagFilter(runs=[run], tags=tags),
                )
                series: Mapping[str, Any] = found.get(run, {})
                return series

            for name, tags in listed.items():
                mine = {tag: series for tag, series in tags.items() if tag.startswith(PREFIX)}
                if mine:
                    runs.setdefault(name, Run(name)).update(mine, read)
            self._refreshed[experiment] = self._clock()
            return dict(runs)
