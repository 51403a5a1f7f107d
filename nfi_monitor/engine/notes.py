"""Make notes: each says once what the monitor cannot see, what it still can, and what to do."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from nfi_monitor.caller import by_callback, for_callback
from nfi_monitor.capture.foreign_optimizer import ForeignOptimizer
from nfi_monitor.capture.sampling import COORDINATES, FEWEST_ROWS, REDUCTION, ROW_ELEMENTS, auto_interval
from nfi_monitor.engine.faults import SWITCHED, TRIES
from nfi_monitor.engine.head_notes import at_attach
from nfi_monitor.engine.remarks import HALF, REMARKS, Seen
from nfi_monitor.native import library
from nfi_monitor.types import Note

if TYPE_CHECKING:
    from torch import nn

    from nfi_monitor.capture.head import Head
    from nfi_monitor.capture.head_probe import HeadProbe
    from nfi_monitor.capture.optimizer import OptimizerReader
    from nfi_monitor.detect.detector import Detector
    from nfi_monitor.engine.schedule import Schedule
    from nfi_monitor.engine.step_reader import StepReader
    from nfi_monitor.types import Reading


_WHY_NO_ROWS = {"head_replaced", "logits_changed", "features_unusable", "tap_unusable"}
"""Notes that say why no rows come from the head."""


class NoteTaker:
    """Make each note once, also across a resume. ``by_code`` holds the notes by their code."""

    def __init__(self, say: Callable[[Note], None]) -> None:
        self._say = say
        self._by_callback = by_callback()
        self.by_code: dict[str, Note] = {}
        self.texts: dict[str, str] = {}
        """Texts of notes for the framework that trains, by their code."""
        self._without_rows = 0
        self._without_loss = 0
        self._without_report = 0
        self._other_loss = 0
        self._reported = False
        self._step_before: int | None = None
        self._needed_float32 = False
        self._model: weakref.ref[nn.Module] | None = None
        # (type, text, place) of an error → the parts that it was raised in; and those lists by part
        self._stopped: dict[Any, list[str]] = {}
        self._off: set[str] = set()  # parts that are switched off
        self._failures: dict[str, list[str]] = {}

    def note(self, code: str, message: str, step: int) -> None:
        """Make a note, unless there is one with this code."""
        if code not in self.by_code:
            message = for_callback(message) if self._by_callback else message
            self.by_code[code] = Note(code, message, step)
            self._say(self.by_code[code])

    def attached(self, model: nn.Module, head: Head | None, reader: OptimizerReader) -> None:
        """Make the notes about the head, before the first step, or when the head is known."""
        self._model = weakref.ref(model)
        for code, message in at_attach(model, head, reader):
            self.note(code, message, 0)

    def optimizer(self, optimizer: object) -> None:
        """Note at attach if the optimizer is no torch optimizer."""
        if not isinstance(optimizer, ForeignOptimizer):
            return
        kind = type(optimizer.original)
        name = f"{kind.__module__}.{kind.__qualname__}"
        if not callable(getattr(optimizer.original, "step", None)):
            self.note(
                "no_optimizer",
                f"{name} is no optimizer: it has no parameters and no method step(). Without steps nothing "
                "is measured. Let the monitor attach to the optimizer whose step() updates the model.",
                0,
            )
            return
        self.note(
            "optimizer_not_torch",
            f"{name} is no torch.optim.Optimizer. Its steps are watched through its attribute step, until "
            "the monitor closes. Rows, norms, gradients and updates are measured; the second moment only if "
            "the state holds an average of squared gradients by parameter. Snapshots, replays, remedies and "
            "the Autopilot need a torch optimizer; in fastai: Learner(..., opt_func=partial(OptimWrapper, "
            "opt=torch.optim.AdamW)).",
            0,
        )

    def read(
        self,
        reading: Reading,
        detector: Detector,
        steps: StepReader,
        probe: HeadProbe,
        measured: int,
        *,
        untrained: str = "",
    ) -> None:
        """Make the notes that a reading is a reason for (:data:`~nfi_monitor.engine.remarks.REMARKS`).

        ``measured``: number of readings before this one.  ``untrained``: the loss at which no gradient
        arrives, as ``LossSources.untrained``.
        """
        values = reading.values
        known = "live_fraction" in values or "rows" in self._failures  # a failure has a note of its own
        self._without_rows = 0 if known else self._without_rows + 1
        self._without_loss = 0 if "loss" in values or "head_loss" in values else self._without_loss + 1
        if "loss_epsilon" in values:  # else no row tells
            self._other_loss = self._other_loss + 1 if "mismatch_fraction" in values else 0
        self._reported = "loss" in values or (self._reported and untrained != "reported")
        self._without_report = 0 if self._reported else self._without_report + 1
        if values.get("live_fraction", 0.0) > 0:  # a gradient of zeros shows no precision
            self._needed_float32 |= values.get("loss_epsilon", math.inf) <= HALF
        seen = Seen(
            reading,
            detector.signals,
            probe,
            steps.rows,
            detector.spike.negative,
            measured,
            steps.reader,
            self._without_rows,
            self._without_loss,
            steps.loss_bits,
            self._without_report,
            self._step_before,
            self._needed_float32,
            self._other_loss,
            "" if untrained == "returned" and self._reported else untrained,
            None if self._model is None else self._model(),
        )
        self._step_before = reading.step
        for remark in REMARKS:
            if remark.code == "head_never_fired" and self.by_code.keys() & _WHY_NO_ROWS:
                continue
            if remark.code not in self.by_code and remark.applies(seen):
                text = remark.text if isinstance(remark.text, str) else remark.text(seen)
                self.note(remark.code, self.texts.get(remark.code, text), seen.reading.step)

    def skipped_step(self, step: int) -> None:
        """Note that a gradient scaler skipped a step."""
        self._step_before = step  # it was read, too
        self.note(
            "skipped_step",
            "The gradient scaler skipped an optimizer step (Inf in scaled gradients). Skipped steps are not "
            "judged. A few at the start are normal.",
            step,
        )

    def probe_refused(self, why: str | None, step: int) -> None:
        """Note that the probe batch is not used; ``why`` is None if it is."""
        if why is not None:
            self.note(
                "no_probe",
                f"The batch of probe= is not used: {why}. A rank would wait there for ranks that do not read "
                "this step. The displacement of margins is not measured; everything else is. Leave probe= "
                "out, or pass the module inside as the model.",
                step,
            )

    def cuda_graph(self, step: int) -> None:
        """Note that a CUDA graph is being captured."""
        self.note(
            "cuda_graph",
            "A CUDA graph is being captured. The steps in it are neither watched nor counted: no hook "
            "runs when the graph is replayed. Steps outside of the graph are watched. To watch the whole "
            "training, leave the head and optimizer.step() out of the graph.",
            step,
        )

    def slowed(self, schedule: Schedule, tau: float, step: int) -> None:
        """Note that the budget made readings rarer or smaller."""
        share = schedule.expected(tau)
        still = f"; a healthy step still costs {share:.1%}" if share > (schedule.budget or math.inf) else ""
        because = (
            f"Monitoring costs more than the {100 * (schedule.budget or 0):g}% that was asked for: a reading "
            f"takes {1e3 * schedule.reading_seconds():.1f} ms, "
            f"a step {1e3 * schedule.step_seconds():.1f} ms. "
        )
        otherwise = "overhead_budget=None or every=... changes this."
        if library.missing():
            otherwise += f" Readings also take longer than with the C library: {library.missing()}."
        if schedule.healthy_interval is not None:
            self.note(
                "overhead_budget",
                f"{because}From now on one step in {schedule.healthy_interval} is read instead of one in "
                f"{auto_interval(tau)}, and never fewer than one in {round(tau / 10)}{still}. At any sign of "
                f"a slingshot as many steps are read as before. {otherwise}",
                step,
            )
        if schedule.reduced_sample:
            self.note(
                "overhead_samples",
                f"{because}From now on a reading holds one in {REDUCTION} of its rows and coordinates: "
                f"{COORDINATES // REDUCTION:,} coordinates, {ROW_ELEMENTS // REDUCTION:,} logits or "
                f"{FEWEST_ROWS} rows (smaller models are read whole). {otherwise}",
                step,
            )

    def failed(self, part: str, error: BaseException, step: int, *, off: bool) -> None:
        """Note that a part of the monitor failed; one note names all parts in which an error was raised.

        ``off``: the part is switched off for the rest of the run. Of a part that has a note, only the text
        is changed.
        """
        if part not in self._failures:
            cause = (type(error), str(error), _place(error))
            self._failures[part] = self._stopped.setdefault(cause, [])
            self._failures[part].append(part)
        parts = self._failures[part]
        code, are = f"failed_{parts[0]}", "are" if len(parts) > 1 else "is"
        if off:
            self._off.add(part)
        if self._off.issuperset(parts):
            rest = f"failed and {are} off from now on; training is not affected. "
        elif off:
            rest = f"failed; training is not affected. Off from now on: {part}. "
        elif part not in SWITCHED:
            rest = f"failed after step {step}; training is not affected. "
        else:
            rest = (
                f"failed after step {step} and {are} left out of this reading; training is not affected. "
                f"Later readings try again. Only {TRIES} failures in a row switch a part off. "
            )
        message = f"The monitor's {', '.join(parts)} {rest}{type(error).__name__}: {error}"
        if code in self.by_code:
            self.by_code[code] = replace(self.by_code[code], message=message)
        else:
            self.note(code, message, step)


def _place(error: BaseException) -> tuple[str, int] | None:
    """Return where an error was raised: file and line."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return None if trace is None else (trace.tb_frame.f_code.co_filename, trace.tb_lineno)
