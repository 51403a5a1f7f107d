"""Write scalars, panels with threshold bands, and alerts as text for a stock TensorBoard.

The same sink writes the records of the NFI tab (:mod:`nfi_monitor.report.tensorboard.tab_data`).  Why the
stock part has its form:

- All scalars of a reading are one event, and a run with fast steps writes only some readings.  TensorBoard's
  writer computes checksums in Python (0.7 ms for forty scalars), and a curve shows 1,000 points at most.
- TensorBoard keeps a sample of the text records of a tag, but always the last one.  So each alert has a tag
  of its own, and the overview ``nfi/alerts`` is always written as a whole.
- Files can only grow: the longer a run is, the fewer readings are written.
- Where a run goes back, a session mark lets TensorBoard drop what was written of the same steps: else its
  curves would go back, too.
- A margin chart draws a band only where the value, the lower and the upper edge have the same steps.  So the
  thresholds are written beside every value, not once.
"""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from nfi_monitor.extras import raise_missing
from nfi_monitor.replay.verdict import ReplayVerdict
from nfi_monitor.report.levels import bands_of
from nfi_monitor.report.run_directory.lock import DirectoryInUseError, DirectoryLock
from nfi_monitor.report.sink import SinkBase, passing
from nfi_monitor.report.tensorboard.tab_data import TabWriter
from nfi_monitor.report.tensorboard.texts import alert_markdown, info_markdown, overview_markdown
from nfi_monitor.safe_open import absolute, identity
from nfi_monitor.types import Alert, Change, Note, Phase, Reading

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from nfi_monitor.report.summary import Summary

EVENTS = 2048
"""Readings written before the stride doubles: then every second one is written, later every fourth ..."""
SLINGSHOT_EVENTS = 256
"""Readings from the first one of a slingshot that are all written."""

SUFFIX = ".nfi"
"""End of the names of our event files."""

_OVERVIEW = 20  # alerts in the overview text; it is written with each alert, so it must not grow
_PHASES = {phase: index for index, phase in enumerate(Phase)}


def available() -> bool:
    """Return whether torch and tensorboard are installed, without importing them."""
    try:
        return all(importlib.util.find_spec(name) is not None for name in ("torch", "tensorboard"))
    except ValueError:  # somebody has put another object, or None, in the place of the module
        return False


class TensorBoardSink(SinkBase):
    """Write TensorBoard event files into ``log_dir``. A sink; it makes the directory if it is missing.

    Readings that follow the last written one by less than ``min_seconds`` are left out (0: none), except
    where the phase changes, at the beginning of a slingshot, and at the end.  ``readings.jsonl`` and the tab
    have them.  ``describe`` returns the run's description; it is called when an alert begins or ends, for the
    classes that absorb.  ``lock`` is held while files are open.  :meth:`start` raises ImportError, with what
    to install, if tensorboard is missing, and DirectoryInUseError if another process writes into the
    directory.
    """

    reopens = True  # TensorBoard's writer does not survive an error

    def __init__(
        self,
        log_dir: str | os.PathLike[str],
        min_seconds: float = 0.03,
        describe: Callable[[], Mapping[str, Any]] | None = None,
        lock: DirectoryLock | None = None,
    ) -> None:
        self.log_dir = os.fspath(absolute(log_dir))
        self._lock = lock
        self._min_seconds = min_seconds
        self._describe = describe
        self._tab: TabWriter | None = None
        self._writer: SummaryWriter | None = None
        self._proto: Any = None
        self._phase: Phase | None = None
        self._written = 0.0
        self._events = 0
        self._stride = self._skipped = 1
        self._in_phase = 0  # readings since it changed
        self._pending: tuple[Reading, Phase] | None = None
        self._edges: dict[str, tuple[float, float]] = {}
        self._alerts: dict[str, Alert] = {}
        self._earlier = 0
        self._step = 0
        self._goes_back = False  # whether the next reading may be of a step that was written before
        self._info: Mapping[str, Any] = {}
        self._files: dict[str, tuple[int, ...] | None] = {}  # path of the open event file → its identity

    def start(self, info: Mapping[str, Any]) -> None:
        try:
            from tensorboard.compat.proto.summary_pb2 import Summary as SummaryProto
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise_missing(
                error,
                ("tensorboard",),
                'TensorBoard files need the tensorboard package: pip install "nfi-monitor[tensorboard]"',
            )
        self._proto, self._info = SummaryProto, info
        self._edges = {name: (band.leave, band.enter) for name, band in bands_of(info).items()}
        broken, self._writer = self._writer, None
        if broken is not None:
            with contextlib.suppress(OSError):
                broken.close()
        self._files.clear()
        try:
            if self._lock is not None:
                os.makedirs(self.log_dir, exist_ok=True)
                self._lock.acquire()
            self._goes_back = self._may_go_back()
            before = set(_names_in(self.log_dir))
            self._writer = SummaryWriter(self.log_dir, filename_suffix=SUFFIX)
            for name in set(_names_in(self.log_dir)) - before:
                path = os.path.join(self.log_dir, name)
                self._files[path] = identity(path)
        except DirectoryInUseError:
            raise
        except OSError as error:
            reason = f"cannot write {error.filename or self.log_dir}: {error.strerror or error}."
            advice = "files are written; the training goes on. Pass another directory as run_dir=."
            if passing(error):
                advice = "file is open yet; later records are tried, and the training goes on."
            raise OSError(error.errno, f"{reason} No TensorBoard {advice}") from error
        self._writer.add_custom_scalars(layout(self._edges))
        self._writer.add_text("nfi/run", info_markdown(info), 0)
        self._tab = TabWriter(self._writer.file_writer, info)

    def losses(self, losses: Sequence[tuple[int, float]], phase: Phase) -> None:
        """Take losses that come together: the tab gets all, the curves of the stock panels the last one."""
        tab = self._opened_tab()
        *others, last = (Reading(step, {"loss": loss}) for step, loss in losses)
        for reading in others:
            self._mark_session(reading.step)
            tab.reading(reading, phase)
        self.reading(last, phase)

    def _mark_session(self, step: int) -> None:
        if self._goes_back:
            self._goes_back = False
            self._begin_session(step)

    def reading(self, reading: Reading, phase: Phase) -> None:
        self._step = reading.step
        self._opened_tab().reading(reading, phase)
        self._mark_session(reading.step)
        now = time.monotonic()
        self._in_phase = self._in_phase + 1 if phase is self._phase else 0
        self._phase = phase
        self._skipped += 1
        due = now - self._written >= self._min_seconds and self._skipped >= self._stride
        # Only the first SLINGSHOT_EVENTS of a slingshot: if the loss never recovers, it never ends.
        if due or self._in_phase == 0 or (phase is Phase.SLINGSHOT and self._in_phase < SLINGSHOT_EVENTS):
            self._written, self._skipped = now, 0
            self._write(reading, phase)
        else:
            self._pending = (reading, phase)

    def _write(self, reading: Reading, phase: Phase) -> None:
        self._pending = None
        self._events += 1
        if self._events % EVENTS == 0:
            self._stride *= 2
        scalars = {f"nfi/{name}": value for name, value in reading.values.items()}
        for name, (low, high) in self._edges.items():
            if name in reading.values:
                scalars[_threshold_tag(name, "exit")] = low
                scalars[_threshold_tag(name, "enter")] = high
        scalars["nfi/phase"] = _PHASES[phase]
        value = self._proto.Value
        proto = self._proto(value=[value(tag=tag, simple_value=number) for tag, number in scalars.items()])
        file_writer: Any = self._open().file_writer  # not None between the constructor and close()
        file_writer.add_summary(proto, reading.step)

    def alert(self, alert: Alert, change: Change) -> None:
        writer, tab = self._open(), self._opened_tab()
        writer.add_text(f"nfi/alerts/{alert.id}", alert_markdown(alert), alert.last_step)
        tab.alert(alert)
        self._alerts.pop(alert.id, None)  # move it to the end: the overview lists the latest changes
        self._alerts[alert.id] = alert
        if len(self._alerts) > _OVERVIEW:
            del self._alerts[next(iter(self._alerts))]
            self._earlier += 1
        if change is not Change.UPDATE:
            text = overview_markdown(list(self._alerts.values()), self._earlier)
            writer.add_text("nfi/alerts", text, alert.last_step)
            if self._describe is not None:
                tab.describe(self._describe())
            writer.flush()  # show it at once in a TensorBoard that is open

    def note(self, note: Note) -> None:
        self._open().add_text(f"nfi/notes/{note.code}", note.message, note.step)
        self._opened_tab().note(note)

    def replay(self, verdict: ReplayVerdict) -> None:
        """Write the result for the tab only: the stock panels have no place for it."""
        self._opened_tab().replay(verdict)

    def went_back(self) -> None:
        """Begin a new session, as a resumed run does."""
        tab = self._opened_tab()
        info = self._info if self._describe is None else self._describe()
        tab.close(info)
        self._tab = TabWriter(self._open().file_writer, info)
        self._alerts, self._earlier, self._pending = {}, 0, None
        self._goes_back = self._may_go_back()

    def _may_go_back(self) -> bool:
        """Return whether the directory has event files of an earlier session, and none of anybody else.

        TensorBoard cannot drop the records of one writer alone, and others may count other steps.
        """
        files = [name for name in _names_in(self.log_dir) if name.startswith("events.out.tfevents.")]
        return bool(files) and all(name.endswith(SUFFIX) for name in files)

    def _begin_session(self, step: int) -> None:
        """Let TensorBoard drop what an earlier session wrote of ``step`` and later ones."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        file_writer: Any = self._open().file_writer
        for _ in range(2):  # TensorBoard takes the first mark in a directory for the beginning of the run
            file_writer.add_event(Event(session_log=SessionLog(status=SessionLog.START)), step)

    def close(self, info: Mapping[str, Any], summary: Summary) -> None:
        if self._writer is not None:
            try:
                if self._tab is not None:  # else start() was interrupted
                    if self._pending is not None:
                        self._write(*self._pending)
                    self._writer.add_text("nfi/run", info_markdown(info), self._step)
                    self._opened_tab().close(info)
                self._open().close()
            finally:
                if self._lock is not None:
                    self._lock.release()
            self._writer = None
        elif self._lock is not None:  # start() was interrupted
            self._lock.release()

    def _open(self) -> SummaryWriter:
        if self._writer is None:
            raise RuntimeError("TensorBoardSink is not open: call start() before, and nothing after close().")
        # TensorBoard opens the file by its name at each write: by now a link could lead out of the directory.
        for path, opened in self._files.items():
            if identity(path) != opened:
                raise OSError(
                    errno.ENOENT,
                    f"cannot write {path}: it was deleted or replaced during the run. No TensorBoard files "
                    "are written from here on; the training goes on.",
                )
        return self._writer

    def _opened_tab(self) -> TabWriter:
        self._open()
        assert self._tab is not None  # start() makes both
        return self._tab


def _names_in(directory: str) -> list[str]:
    try:
        return os.listdir(directory)
    except OSError:
        return []


def _threshold_tag(quantity: str, edge: str) -> str:
    return f"nfi/threshold/{quantity}/{edge}"


def layout(bands: Mapping[str, Any]) -> dict[str, dict[str, list[Any]]]:
    """Return the custom-scalars layout: panels zero-sum, means, displacement, second moment, norms.

    A quantity in ``bands`` gets a margin chart.  Without thresholds, a margin chart shows an error.
    """

    def lines(*names: str) -> list[Any]:
        # TensorBoard reads these tags as regular expressions that match at the start.
        return ["Multiline", [f"nfi/{name}$" for name in names]]

    def band(title: str, quantity: str) -> dict[str, list[Any]]:
        if quantity not in bands:
            return {title: lines(quantity)}
        edges = [_threshold_tag(quantity, "exit"), _threshold_tag(quantity, "enter")]
        return {f"{title} (band: thresholds)": ["Margin", [f"nfi/{quantity}", *edges]]}

    return {
        "zero-sum": {
            **band("smoothed zero-sum violation", "zero_sum_violation_smoothed"),
            "of the rows": lines("zero_sum_violation"),
            "of the head's gradients": lines("zero_sum_violation_weight", "zero_sum_violation_bias"),
            "rows": lines("absorbed_fraction", "partially_absorbed_fraction", "underflowed_fraction"),
            "margins": lines("margin_min", "margin_median"),
            "phase (0 healthy … 4 slingshot, 5 recovering)": lines("phase"),
        },
        "means": {
            "norms of the global means": lines("feature_mean_norm", "classifier_mean_norm"),
            "alignment cos(W_G, μ_G)": lines("mean_alignment"),
            **band("growth of ‖μ_G‖ per step", "feature_mean_growth"),
            "growth of ‖W_G‖ per step": lines("classifier_mean_growth"),
            "mean logit": lines("mean_logit"),
        },
        "displacement": {
            **band("logit displacement δ", "logit_displacement"),
            **band("margin displacement", "margin_displacement"),
            "loss": lines("loss", "head_loss"),
        },
        "second moment": {
            **band("RMS_t", "rms_t_max"),
            "effective learning rate": lines("effective_learning_rate"),
            "sqrt(v̂), median": lines("sqrt_exp_avg_sq_median", "head_sqrt_exp_avg_sq_median"),
            "decay, decades": lines("second_moment_decay"),
            **band("curvature along the update", "secant_curvature"),
        },
        "norms": {
            "weight norms": lines("weight_norm", "head_weight_norm"),
            "gradient norm": lines("gradient_norm"),
            "update RMS": lines("update_rms"),
        },
    }
