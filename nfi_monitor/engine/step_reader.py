"""Measure an optimizer step in one process: its rows, the step itself, the probe batch.

A process that trains alone packs all numbers into one vector (:meth:`StepReader.read`).  With several ranks,
each adds its numbers to a message to the others (:meth:`StepReader.fill`).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from nfi_monitor.capture import devices
from nfi_monitor.capture.backward_pass import Pass
from nfi_monitor.capture.devices import full_precision
from nfi_monitor.capture.head_probe import Rows
from nfi_monitor.capture.optimizer import OptimizerReader
from nfi_monitor.capture.probe_batch import ProbeBatch
from nfi_monitor.capture.step_hooks import has_closure
from nfi_monitor.capture.update import Update
from nfi_monitor.engine.contents import Contents
from nfi_monitor.engine.loss_queue import LossQueue
from nfi_monitor.engine.reader_state import ReaderState, SavedReader
from nfi_monitor.measure.accumulator import Facts, RowAccumulator
from nfi_monitor.measure.late.packing import Late
from nfi_monitor.measure.late.step import late_step
from nfi_monitor.measure.memory import Memory
from nfi_monitor.measure.native_step import step_statistics
from nfi_monitor.measure.planned_steps import PlannedSteps
from nfi_monitor.measure.row_match import row_match, row_sketch
from nfi_monitor.measure.rows import LossKind, finish
from nfi_monitor.measure.step import SKIPPED
from nfi_monitor.ranks.exchange import Exchange
from nfi_monitor.ranks.layout import Message
from nfi_monitor.schema import decode

MOST_ASKED = 8
"""Maximum number of forward passes whose rows wait for the step, because their gradient was asked for."""


class StepReader:
    """Read one optimizer step between :meth:`begin` and :meth:`forget`.

    ``is_off(part)``: whether a part rests after an error.  ``failed(part, error)``: reports an error.
    ``memory``: the last measured step, with which the next step is compared.
    """

    def __init__(
        self,
        reader: OptimizerReader,
        rows: RowAccumulator,
        probe_batch: ProbeBatch | None,
        is_off: Callable[[str], bool],
        failed: Callable[[str, BaseException], None],
    ) -> None:
        self.reader, self.rows = reader, rows
        self.is_off, self.failed = is_off, failed
        self.memory: Memory | None = None
        self._probe_batch = probe_batch
        self._planned = PlannedSteps()
        self._before: Any = None
        self._arrived: deque[Rows] = deque()  # their gradients may still grow
        self._asked: deque[Rows] = deque()  # of autograd.grad
        self._rows_train = False  # whether a gradient of this step's rows was accumulated in parameters
        self._sketch: tuple[int, Tensor] | None = None  # step and rows of the last one with a sharded head
        self.probe_refused: str | None = None  # why the probe batch cannot be used
        self._loss_dtype: torch.dtype | None = None  # of the last observed loss
        self.loss_bits = 0  # bits of the dtype of the last observed loss; 0: unknown

    def add(self, rows: Rows) -> None:
        """Add the rows of a micro-batch, as its backward pass delivers them.

        They are measured when no further backward pass can add to their gradient: when the graph is freed,
        or at the optimizer step.
        """
        self._arrived.append(rows)
        while self._arrived and self._arrived[0].graph() is None:
            self._settle_rows(self._arrived.popleft())

    def finish_rows(self) -> None:
        """Measure all rows that have arrived: the optimizer step is done."""
        try:
            if self.rows.loss_kind is None and len(self._arrived) > 1:
                with torch.no_grad():
                    self.rows.look_ahead([rows for rows in self._arrived if type(rows) is Rows])
            while self._arrived:
                self._settle_rows(self._arrived.popleft())
            while self._asked:
                self._measure_rows(self._asked.popleft())
        except Exception as error:
            self.failed("rows", error)

    def _settle_rows(self, rows: Rows) -> None:
        """Measure rows to which no gradient is added any more; keep those of ``autograd.grad`` apart.

        A loop may assign what it has asked for.  If other rows of the step train, it has not: it was an inner
        step, or a penalty.
        """
        if rows.kind is Pass.TRAINS:
            self._rows_train = True
            self._asked.clear()
            self._measure_rows(rows)
        elif not self._rows_train:
            self._asked.append(rows)
            if len(self._asked) > MOST_ASKED:
                self._measure_rows(self._asked.popleft())

    def _measure_rows(self, rows: Rows) -> None:
        finished = rows.finished(self._loss_dtype)
        if finished.features is None and rows.features is not None:
            self.reader.unreadable.add("features that are freed or written to before optimizer.step()")
        self.rows.add(finished)

    def begin(self, step: int, given: Sequence[Any], *, alone: bool = False) -> None:
        """Read gradients and weights before the step.

        ``given``: the arguments of ``optimizer.step()``.  ``alone``: this process is read alone.
        """
        closure = has_closure(given)
        if alone and not closure and self._planned.before(self.reader):
            self._before = self._planned
            return
        with torch.no_grad():
            self._before = self.reader.before(step, closure=closure)

    def forget(self) -> None:
        """Drop the tensors read before the step."""
        self._before = None
        self.forget_rows()

    def forget_rows(self) -> None:
        """Drop the rows that are not measured yet."""
        self._arrived.clear()
        self._asked.clear()
        self._rows_train = False

    def discard_rows(self) -> None:
        """Drop all rows of this step so far: their gradients are gone before the step."""
        self.forget_rows()
        self.rows.discard()

    def read(self, step: int, losses: LossQueue) -> tuple[Contents, Tensor | None]:
        """Return one packed vector for this step: row sums, row maxima, step quantities, loss.

        None in place of the vector if the host knows all."""
        self._look_at(losses)
        self.finish_rows()
        rows = self.rows
        packed: list[Tensor] = []
        if rows.sums is not None and rows.maxima is not None:
            packed += [rows.sums, rows.maxima]
        has_rows = bool(packed)
        packed += [part for block in rows.late for part in block.flat]
        values: dict[str, Tensor] = {}
        known: dict[str, float] = {}
        late = None
        if self._before is not None and not self.is_off("optimizer"):
            try:
                values, known, late = self._step_quantities(step)
            except Exception as error:
                self.memory = None  # the next step must not be compared with what may be the cause
                self.failed("optimizer", error)
        if rows.numbers is not None:
            known |= finish(rows.numbers.sums, rows.numbers.maxima, single_output=False)
        packed += [] if late is None else late.flat
        self.add_probe(values, step)
        loss = losses.mean()
        if isinstance(loss, Tensor) and devices.on_host(loss):
            loss = loss.item()  # the host knows it: do not send it to the device and back
        if isinstance(loss, Tensor):
            values["loss"] = loss
        elif loss is not None:
            known["loss"] = loss
        if not packed and not values:
            return Contents(step, False, (), known, False), None
        with torch.no_grad():
            parts = devices.together([*packed, *(value.reshape(1) for value in values.values())])
            vector = torch.cat(parts)
        contents = Contents(
            step,
            has_rows,
            tuple(values),
            known,
            bool(rows.single_output),
            [block.outline() for block in rows.late],
            None if late is None else late.outline(),
            rows.count_absorbed,
        )
        return contents, vector

    def _step_quantities(
        self, step: int
    ) -> tuple[dict[str, Tensor], dict[str, float], Late[dict[str, float]] | None]:
        """Return the quantities of the optimizer step: those on the device, those known on the host, and
        those that the host will know.
        """
        if self._before is self._planned:
            read = self._planned.after(self.rows.features, self.rows.feature_mean, self.memory, step)
            if read is not None:
                known, self.memory = read
                return {}, known, None
            self._before = self._planned.before_step()
        with torch.no_grad():
            return self._by_tensors(step)

    def _by_tensors(
        self, step: int
    ) -> tuple[dict[str, Tensor], dict[str, float], Late[dict[str, float]] | None]:
        update = self.update(step)
        if update is None:
            self.memory = None
            return {}, {}, None
        values: dict[str, Tensor] = {}
        known: dict[str, float] = {}
        measured, late = self.statistics(update, self.rows.feature_mean, step)
        for name, value in measured.items():
            if isinstance(value, Tensor):
                values[name] = value
            else:
                known[name] = value
        if isinstance(update.lr, Tensor):
            values["learning_rate"] = update.lr
        elif math.isfinite(update.lr):
            known["learning_rate"] = update.lr
        return values, known, late

    def _look_at(self, losses: LossQueue) -> None:
        dtypes = {
            loss.dtype for loss in losses.observed if isinstance(loss, Tensor) and loss.is_floating_point()
        }
        if dtypes and dtypes != {self._loss_dtype}:
            self._loss_dtype = min(dtypes, key=lambda dtype: torch.finfo(dtype).bits)
            self.loss_bits = torch.finfo(self._loss_dtype).bits

    def update(self, step: int) -> Update | None:
        """Return the tensors around the optimizer step; None if none were read."""
        return None if self._before is None else self.reader.after(self._before, step)

    def statistics(
        self, update: Update, feature_mean: Tensor | None, step: int
    ) -> tuple[dict[str, Tensor | float], Late[dict[str, float]] | None]:
        """Return the step's quantities, 0-d or numbers, or on an accelerator what the host makes them of.

        Keeps the step for the comparison with the next.
        """
        features, device = self.rows.features, update.grad.device
        moved = update.head_weight_update
        if features is not None and moved is not None and features.shape[-1] != moved.shape[-1]:
            wide = f"features of width {features.shape[-1]}, with a head of width {moved.shape[-1]}"
            self.reader.unreadable.add(wide)
            features = feature_mean = None
        if features is not None and features.device != device:
            if devices.on_host(update.grad):  # copying the features to the host would wait for the device
                self.reader.unreadable.add(f"features on {features.device}, with the head on {device}")
                features = feature_mean = None
            else:
                features = devices.send(features, device)
                feature_mean = None if feature_mean is None else devices.send(feature_mean, device)
        with full_precision(update.grad):
            if devices.on_host(update.grad):
                values, self.memory = step_statistics(update, features, feature_mean, self.memory, step)
                return values, None
            late, self.memory = late_step(update, features, feature_mean, self.memory, step)
            return {}, late

    def add_probe(self, values: dict[str, Tensor], step: int) -> None:
        """Add the displacement of the probe batch's margins to ``values``, if there is a probe batch."""
        if self._probe_batch is not None and not self.is_off("probe"):
            try:
                displacement = self._probe_batch.displacement(step)
                self.probe_refused = self._probe_batch.refused
                if displacement is not None:
                    values["margin_displacement"] = displacement
            except Exception as error:
                self.failed("probe", error)

    def absorbing_classes(self, limit: int | None = 10) -> list[list[float]]:
        """Return [class, absorbed rows seen], the most absorbed class first."""
        return [[float(k), count] for k, count in self.rows.most_absorbed(limit)]

    def state_dict(self, step: int) -> dict[str, Any]:
        """Return the state that readings after ``step`` need, in plain types."""
        kind, memory = self.rows.loss_kind, self.memory
        return {
            "absorbing_classes": self.absorbing_classes(limit=None),
            "loss_kind": None if kind is None else [float(x) for x in kind[:4]],
            "loss_kind_dtypes": [str(x.dtype).removeprefix("torch.") for x in (kind or ())[:4]],
            "logit_scale": 1.0 if kind is None else float(kind.slope),
            "mismatch": 0.0 if kind is None else float(kind.mismatch),
            "uneven": 0.0 if kind is None else float(kind.uneven),
            "loss_facts": None if self.rows.facts is None else list(self.rows.facts),
            "look_again": self.rows.look_again,
            "single_output": self.rows.single_output,
            # Only the next step is compared with the memory.
            "last_step": None if memory is None or memory.step != step else memory.state_dict(),
            "probe": None if self._probe_batch is None else self._probe_batch.state_dict(),
        }

    def read_state(self, state: Mapping[str, Any], device: torch.device) -> ReaderState:
        """Return what :meth:`state_dict` returned, for :meth:`apply_state`; change nothing.

        ``device``: where the sampled coordinates are.  Raises ValueError, and others, for a wrong state.
        """
        saved = decode(SavedReader, dict(state))
        kind = None
        if saved["loss_kind"] is not None:
            dtypes = [getattr(torch, name) for name in saved.get("loss_kind_dtypes") or ["float32"] * 4]
            numbers = zip(saved["loss_kind"], dtypes, strict=True)
            known = [torch.tensor(x, dtype=dtype, device="cpu") for x, dtype in numbers]
            slope = torch.full_like(known[-1], saved.get("logit_scale", 1.0))
            mismatch = torch.full_like(known[-1], saved.get("mismatch", 0.0))
            uneven = torch.full_like(known[-1], saved.get("uneven", 0.0))
            kind = LossKind(*known)._replace(slope=slope, mismatch=mismatch, uneven=uneven)
        last, probe, facts = saved.get("last_step"), saved.get("probe"), saved.get("loss_facts")
        return ReaderState(
            classes={int(k): count for k, count in saved["absorbing_classes"]},
            loss_kind=kind,
            facts=None if facts is None else Facts(*facts),
            look_again=saved.get("look_again", False),
            single_output=saved.get("single_output"),
            memory=None if last is None else Memory.from_state(last, device),
            probe=None if self._probe_batch is None or probe is None else self._probe_batch.read_state(probe),
        )

    def apply_state(self, state: ReaderState) -> None:
        """Continue from a state that :meth:`read_state` returned."""
        rows = self.rows
        rows.absorbed = dict(state.classes)
        rows.loss_kind, rows.single_output, self.memory = state.loss_kind, state.single_output, state.memory
        rows.facts, rows.look_again = state.facts, state.look_again
        if self._probe_batch is not None and state.probe is not None:
            self._probe_batch.apply_state(*state.probe)

    def fill(self, losses: LossQueue, exchange: Exchange, message: Message, step: int) -> Tensor | None:
        """Add this process's numbers of the step to the message to the other ranks.

        Returns the head's weight if this process holds all of it, else None."""
        self._look_at(losses)
        self.finish_rows()
        message.failed = self.failed
        exchange.add_rows(message, self.rows)
        values: dict[str, Tensor] = {}
        weight = None
        if not self.is_off("optimizer"):
            try:
                weight = self._fill_step(exchange, message, step)
            except Exception as error:
                self.memory = None  # the next step must not be compared with what may be the cause
                self.failed("optimizer", error)
        self.add_probe(values, step)
        exchange.add_values(message, values)
        loss = losses.mean()
        if loss is not None:
            exchange.keep_loss(step, loss)
        return weight

    def _fill_step(self, exchange: Exchange, message: Message, step: int) -> Tensor | None:
        update = self.update(step)
        values: dict[str, Tensor | float] = {}
        if update is not None:
            values["learning_rate"] = update.lr
            if update.found_inf is not None:
                values[SKIPPED] = update.found_inf
            if exchange.shape.head_sharded:
                with full_precision(update.grad):
                    values |= self._row_match(step)
            else:
                measured, late = self.statistics(update, None, step)
                values |= exchange.whole(measured)
                if late is not None:
                    exchange.add_late_step(message, late)
        exchange.add_values(message, values)
        with full_precision(None if update is None else update.grad):
            exchange.add_step(message, update, step)
            exchange.add_head(message, update, step)
        return None if update is None or exchange.shape.head_sharded else update.head_weight

    def _row_match(self, step: int) -> dict[str, Tensor]:
        """Return the match of this step's rows with those of the step before, where the head is sharded."""
        features, before = self.rows.features, self._sketch
        if features is None or len(features) < 2:
            self._sketch = None
            return {}
        self._sketch = (step, row_sketch(features))
        if before is None or before[0] != step - 1:
            return {}
        return {"row_match": row_match(self._sketch[1], before[1])}

    def release(self) -> None:
        """Drop the model, the optimizer and their tensors. The row counts stay."""
        self._before = self.memory = self._probe_batch = self._sketch = None
        self._planned.release()
        self._arrived.clear()
        self._asked.clear()
        del self.reader
