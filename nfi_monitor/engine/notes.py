"""What is said once: what the monitor found that limits what it can see, and what it can still see."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from nfi_monitor.capture.sampling import (
    COORDINATES,
    FEWEST_ROWS,
    LOWERED,
    ROW_ELEMENTS,
    auto_interval,
)
from nfi_monitor.types import Note, Reading

if TYPE_CHECKING:
    from nfi_monitor.capture.head import Head
    from nfi_monitor.capture.head_probe import HeadProbe
    from nfi_monitor.capture.optimizer import OptimizerReader
    from nfi_monitor.detect.signals import Signals
    from nfi_monitor.engine.schedule import Schedule
    from nfi_monitor.measure.accumulator import RowAccumulator

FLOAT32_MARGIN = 10.0
"""Nats. With float32 a row is absorbed from a margin of 16.6 on and rounds visibly from 13.2; with float16
from 7.6 and 4.2, with bfloat16 from 5.6 and 2.0, measured on F.cross_entropy's own backward."""
PATIENCE = 5
"""Measured steps without a sign of life before something is said to be missing."""


class NoteTaker:
    """Keeps ``said`` (code → note) so that nothing is said twice, also after a resume."""

    def __init__(self, say: Callable[[Note], None]) -> None:
        self._say = say
        self.said: dict[str, Note] = {}
        self._without_rows = 0
        self._without_loss = 0
        self._stopped: dict[Any, list[str]] = {}  # by an error's type, text and place: the parts it stopped

    def note(self, code: str, message: str, step: int) -> None:
        if code not in self.said:
            self.said[code] = Note(code, message, step)
            self._say(self.said[code])

    def attached(self, head: Head | None, reader: OptimizerReader) -> None:
        """What can be known before the first step."""
        if head is None:
            return
        if head.weight is None:
            self.note(
                "head_without_weight",
                f"The head {head.name!r} keeps no weight matrix of its own (parametrized, adapted, or not "
                "linear): classifier mean, logit displacement and the zero-sum of the weight gradient are "
                "not available. Rows are watched as usual.",
                0,
            )
            return
        if not reader.holds(head.weight):
            why = "is frozen" if not head.weight.requires_grad else "is not among the optimizer's parameters"
            self.note(
                "optimizer_without_head",
                f"The head {head.name!r} {why}: its second moment and displacement cannot be read. "
                "Rows are still watched. If another optimizer trains it, pass that one to Monitor; one that "
                "trains flat copies of the parameters (DeepSpeed ZeRO, master weights) cannot be read so.",
                0,
            )
        if head.tied:
            self.note(
                "tied_head",
                f"The head {head.name!r} shares its weight with an input embedding: the zero-sum of its "
                "weight gradient means nothing here and is not read. Rows are watched as usual.",
                0,
            )

    def read(
        self,
        reading: Reading,
        signals: Signals,
        probe: HeadProbe,
        rows: RowAccumulator,
        loss_below_zero: bool,
        measured: int,
        reader: OptimizerReader,
    ) -> None:
        """What a reading shows, or does not show."""
        step, values = reading.step, reading.values
        self._without_rows = 0 if "live_fraction" in values else self._without_rows + 1
        if self._without_rows == PATIENCE:
            self._no_rows(step, probe, "zero_sum_violation_weight" in values)
        self._without_loss = 0 if "loss" in values or "head_loss" in values else self._without_loss + 1
        if self._without_loss == PATIENCE:
            self.note(
                "no_loss",
                "No loss to look at: causes are watched, but a slingshot itself cannot be seen. Call "
                "monitor.observe_loss(loss) before optimizer.step().",
                step,
            )
        if loss_below_zero:
            self.note(
                "loss_below_zero",
                "The loss falls below zero: it has no floor to leave, and a slingshot itself cannot be seen. "
                "Causes are watched as usual. If a part of the loss cannot be negative, tell that part "
                "alone, from the first step on: monitor.observe_loss(part).",
                step,
            )
        if rows.single_output:
            self.note(
                "single_output",
                "The head has one output: there are no classes, so no zero-sum and no absorption to read. "
                "Watched instead: RMS_t, second moment, curvature, weight norm and the observed loss.",
                step,
            )
        if len(rows.devices) > 1:
            first, *others = map(str, rows.devices)
            self.note(
                "rows_elsewhere",
                f"Rows on {', '.join(others)} are not read, only those on {first}: of nn.DataParallel's "
                "replicas, one's share of each batch. All else is watched as usual. "
                "DistributedDataParallel is read whole: attach the monitor on every rank.",
                step,
            )
        if measured >= PATIENCE and not reader.has_second_moment():
            self.note(
                "no_second_moment",
                f"{type(reader.optimizer).__name__} keeps no exp_avg_sq: effective learning rate, RMS_t and "
                "second-moment decay are not available. Rows, means, margins and norms are.",
                step,
            )
        if signals.broken_by_design:
            self.note(
                "not_shift_invariant",
                "The loss breaks the zero-sum by design, not by rounding: rows violate it whose residual "
                "mass is far too large for absorption (z-loss, a penalty on logits, regression, one-vs-rest "
                "BCE, or logits changed after the head, as by soft-capping). Violations are recorded and "
                "not alarmed on. If the logits are changed after the head, watch the changed ones: "
                "logits = monitor.tap(logits).",
                step,
            )
        if signals.soft_targets:
            self.note(
                "soft_targets",
                "Most rows have more than one negative gradient: targets are soft (label smoothing, "
                "distillation, mixup), or the gradient is projected. Absorption in the sense of a single "
                "correct class is not defined; the zero-sum violation is.",
                step,
            )
        absorbed = values.get("absorbed_fraction", 0.0) * values.get("live_fraction", 0.0)
        margin = values.get("margin_median", math.inf)
        if absorbed > 0.5 and margin < FLOAT32_MARGIN:
            self.note(
                "half_precision_loss",
                f"Most rows are absorbed at a median margin of {margin:.1f} nats, which float32 would still "
                "resolve (it does up to 13, bfloat16 up to 2, float16 up to 4): the loss is computed in half "
                "precision. That corruption is chronic: expect *at risk* for the rest of the run. Compute "
                "the loss in float32 or float64, outside autocast: criterion(logits.float(), target).",
                step,
            )
        if values.get("ignored_fraction") == 1.0:
            self.note(
                "all_rows_ignored",
                "A step without a single row that counts: every row's gradient was zero (all targets "
                "ignored, or a loss that is exactly zero). Nothing is concluded from such steps.",
                step,
            )
        if measured == PATIENCE and probe.delivered and probe.without_features >= probe.fired:
            self.note(
                "no_features",
                "The watched logits come with no features of the same rows (another layer feeds them, or "
                "features and logits lie on two devices): the feature mean, its growth and the logit "
                "displacement are not available, so that *inflating* and *imminent* cannot be reached by "
                "rounding. Name the linear layer that makes the logits with head=....",
                step,
            )
        if reader.unreadable:
            self.note(
                "state_unreadable",
                f"Not read: {', '.join(sorted(reader.unreadable))}. The rest of the model is watched.",
                step,
            )

    def _no_rows(self, step: int, probe: HeadProbe, weight_seen: bool) -> None:
        if probe.sharded:
            cause = "each rank holds the logits of some classes only (a vocabulary-parallel head)"
            cure = "For rows, let the head gather its logits: ColwiseParallel(output_layouts=Replicate())."
        elif probe.traced:
            cause = "the head runs inside torch.compile, where a hook would break the graph"
            cure = "For rows, tap the compiled model's output: logits = monitor.tap(model(x))."
        elif probe.fired:
            cause = "the head fired, but no gradient came back to its output"
            cure = "If the loss is computed from other logits, pass those through monitor.tap(logits)."
        elif probe.fired_without_gradient:
            cause = "the head fired only in eval mode or without gradients"
            cure = "Call model.train() for training steps; gradients must be enabled at the head."
        else:
            cause = (
                "the head never fired (a fused loss that reads its weight, another module that computes the "
                "logits, or a model compiled before the monitor was attached)"
            )
            cure = "Name the right head with head=..., use monitor.tap(logits), or attach before compiling."
        seen = (
            "Its weight gradient is read instead, for the zero-sum violation of the whole batch; the feature "
            "mean is not, so that by rounding *at risk* stays at *info* and *imminent* cannot be reached."
            if weight_seen
            else "Only the optimizer, the norms and the observed loss are watched."
        )
        self.note("head_never_fired", f"No rows seen: {cause}. {seen} {cure}", step)

    def skipped_step(self, step: int) -> None:
        self.note(
            "skipped_step",
            "The gradient scaler skipped an optimizer step (Inf in scaled gradients): such steps are not "
            "judged. A few at the start are normal.",
            step,
        )

    def cuda_graph(self, step: int) -> None:
        self.note(
            "cuda_graph",
            "A CUDA graph is being captured: what goes into it is not watched, nor are its replays, in which "
            "no hook is called; they are not counted as steps either. What runs eagerly is watched. To watch "
            "all of the training, leave the head and optimizer.step() out of the graph.",
            step,
        )

    def slowed(self, clock: Schedule, tau: float, step: int) -> None:
        """The interval between readings was made longer, or what they hold smaller, for the budget."""
        share = clock.expected(tau)
        still = f"; a healthy step still costs {share:.1%}" if share > (clock.budget or math.inf) else ""
        beside = (
            f"A reading takes {1e3 * clock.reading_seconds():.1f} ms, much beside a step of "
            f"{1e3 * clock.step_seconds():.1f} ms: for overhead_budget={clock.budget:g}, "
        )
        otherwise = (
            "Any sign of a slingshot is read as often as ever. overhead_budget=None or every=... decide "
            "otherwise."
        )
        if clock.healthy is not None:
            self.note(
                "overhead_budget",
                f"{beside}while nothing is going on, fewer steps are read from now on: one in "
                f"{clock.healthy} instead of one in {auto_interval(tau)}, later one in {round(tau / 10)} at "
                f"most{still}. {otherwise}",
                step,
            )
        if clock.reduced_sample:
            self.note(
                "overhead_samples",
                f"{beside}readings hold one in {LOWERED} of the rows and coordinates that they may from now "
                f"on ({COORDINATES // LOWERED:,} coordinates, {ROW_ELEMENTS // LOWERED:,} logits or "
                f"{FEWEST_ROWS} rows; less than that is read whole). {otherwise}",
                step,
            )

    def failed(self, part: str, error: BaseException, step: int) -> None:
        """A part of the monitor stopped. What one fault stops after the first part is added to that note."""
        cause = (type(error), str(error), _place(error))
        parts = self._stopped.setdefault(cause, [])
        parts.append(part)
        are = "are" if len(parts) > 1 else "is"
        code = f"failed_{parts[0]}"
        message = (
            f"The monitor's {', '.join(parts)} failed and {are} off from now on; training is not affected. "
            f"{type(error).__name__}: {error}"
        )
        if len(parts) > 1 and code in self.said:
            self.said[code] = replace(self.said[code], message=message)
        else:
            self.note(code, message, step)


def _place(error: BaseException) -> tuple[str, int] | None:
    """Where an error was raised: file and line."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return None if trace is None else (trace.tb_frame.f_code.co_filename, trace.tb_lineno)
