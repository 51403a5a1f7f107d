"""Apply what the alerts advise, watch whether it helps, take it back, and say so.

The monitor never changes a run. This does, because it is asked to: it is the part of the package that acts.

    autopilot = Autopilot()
    with Monitor(model, optimizer, on_alert=autopilot):
        for x, y in loader:
            loss = autopilot.loss(model(x), y)      # F.cross_entropy to the last bit, until it has to be more
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if autopilot.should_stop:
                break

The rungs are those of :class:`nfi_monitor.remedies.policy.Rung`: exchange the loss, lower the learning rate
for a while, take a snapshot and ask for an end.  An alert gets what its mechanism needs at once, each rung
once, and the next rung only if it outlasts the policy's patience.  The learning rate comes back once the
alarm has been over for a while.  The loss stays exchanged: margins at which ``F.cross_entropy`` rounds do not
go away, and the other loss is the same function.

All ranks of a training act at the same step: while they are read together they agree on every alert.  Where
they are not, or no longer (also after ``monitor.close()``), none acts, and what is on stays on, even a rate
that is held down: taken back on one rank alone it would let the replicas drift apart.  A new monitor with the
Autopilot, on every rank, begins anew.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor
from torch.optim import Optimizer

from nfi_monitor.alert_handler import AlertHandler
from nfi_monitor.errors import MonitorError
from nfi_monitor.ranks import processes
from nfi_monitor.remedies.cooling import CoolDown, cool_down
from nfi_monitor.remedies.cross_entropy import zero_sum_cross_entropy
from nfi_monitor.remedies.handle import Handle
from nfi_monitor.remedies.policy import Policy, Rung
from nfi_monitor.remedies.projection import project_zero_sum
from nfi_monitor.remedies.steps import around_steps
from nfi_monitor.replay.replayed_step import REPLAY, acts
from nfi_monitor.replay.snapshots import Snapshot
from nfi_monitor.types import Alert, AlertKind, AlertState

if TYPE_CHECKING:
    from nfi_monitor.monitor import Monitor

RELAPSE = 10.0
"""τ after a cool-down within which another one counts as its repetition and is held longer."""


class AutopilotStop(RuntimeError):
    """Raised from ``optimizer.step()`` where ``Policy(stop="raise")`` asks for it."""


@dataclass(frozen=True)
class Action:
    """Something that was done, or in a dry run would have been, after optimizer step ``step``."""

    step: int
    what: str  # "loss", "projection", "cool", "release", "stop", or "nothing" where a rung is out of reach
    alert: str  # id of the alert that it answers
    message: str


class Autopilot(AlertHandler):
    """Give it to the monitor: ``Monitor(model, optimizer, on_alert=Autopilot())``.

    Args:
        policy: what it may do, and when.
        dry_run: only say what would be done at each alert; training stays the same to the last bit.

    What it does appears among the monitor's notes (console, run directory, TensorBoard, summary) and in
    ``actions``.  With losses that are not computed through :meth:`loss` the gradient at the head is projected
    instead, which is less (``tests/benchmarks/remedies/RESULTS.md``).  An error of its own is reported once;
    what is switched on stays, but for what the error was in: a rate or a gradient goes back to its own.

    For numeric slingshots first of all; the others are only met by a smaller learning rate, often too late to
    avert them.  When not to use it: where a run has to be repeated from its seed alone.
    """

    def __init__(self, policy: Policy | None = None, *, dry_run: bool = False) -> None:
        if policy is not None and not isinstance(policy, Policy):
            raise TypeError(f"policy must be a Policy(...), got {type(policy).__name__}.")
        self.policy = policy or Policy()
        self.dry_run = dry_run
        self.actions: list[Action] = []
        """Everything that was done, oldest first."""
        self.snapshot: Snapshot | None = None
        """The state that was saved before an end was asked for; also written to the run directory."""
        self._monitor: Monitor | None = None
        self._take_off: Any = None
        self._pending: Any = None  # completes the snapshot, once what moves after the step has moved
        self._projection: Handle | None = None
        self._cooling: CoolDown | None = None
        self._routed = False  # a loss has come through loss()
        self._loaded = False
        self._start_anew()

    def _start_anew(self) -> None:
        self._exchanged = ""  # "loss" or "projection", also where a dry run only says so
        self._stopped = False
        self._raised = False
        self._firing: dict[str, Alert] = {}
        self._taken: dict[str, dict[Rung, int]] = {}  # alert → what it was answered with, and when
        self._held_since: int | None = None
        self._held_for = 0  # the alert's step until which the rate stays low at least
        self._calm_since = 0  # when the last alert that asked for a smaller rate ended
        self._released: int | None = None
        self._repeated = 0

    # --- the user's side -----------------------------------------------------------------------------

    def loss(
        self,
        input: Tensor,
        target: Tensor,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
    ) -> Tensor:
        """``F.cross_entropy``, to the last bit; :func:`zero_sum_cross_entropy` once it has been exchanged.

        Arguments, shapes, units and errors as for these two.
        """
        self._routed = True
        options: dict[str, Any] = {
            "weight": weight,
            "ignore_index": ignore_index,
            "reduction": reduction,
            "label_smoothing": label_smoothing,
        }
        if self._exchanged:
            with self._guarded():
                exchanged_at = next((action.step for action in self.actions if action.what == "loss"), None)
                if self.swapped and acts(exchanged_at):
                    return zero_sum_cross_entropy(input, target, **options)
        return F.cross_entropy(input, target, **options)

    @property
    def should_stop(self) -> bool:
        """Whether nothing is left to be done: ask after each step, and leave the loop."""
        with self._guarded():
            self._complete()
        return self._stopped

    @property
    def swapped(self) -> bool:
        """Whether :meth:`loss` is the repaired one by now."""
        return self._exchanged == "loss" and not self.dry_run

    @property
    def cooling(self) -> bool:
        """Whether the learning rate is being held down."""
        return self._held_since is not None

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, in plain types; beside ``monitor.state_dict()``."""
        return {
            "exchanged": self._exchanged,
            "stopped": self._stopped,
            "firing": [alert.to_json() for alert in self._firing.values()],
            "taken": {
                alert: {str(rung): step for rung, step in rungs.items()}
                for alert, rungs in self._taken.items()
            },
            "held_since": self._held_since,
            "held_for": self._held_for,
            "calm_since": self._calm_since,
            "released": self._released,
            "repeated": self._repeated,
            "actions": [asdict(action) for action in self.actions],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where :meth:`state_dict` left off, before or after the monitor is made.

        Raises ValueError for a state of another kind.
        """
        if "taken" not in state or "exchanged" not in state:
            raise ValueError(
                "Not an autopilot's state: expected keys 'taken' and 'exchanged', found "
                f"{sorted(map(str, state))[:8]}. Pass what autopilot.state_dict() returned."
            )
        self._let_go()
        self._start_anew()
        self._exchanged, self._stopped = str(state["exchanged"]), bool(state["stopped"])
        self._firing = {alert.id: alert for alert in map(Alert.from_json, state["firing"])}
        self._taken = {
            alert: {Rung[rung.upper()]: int(step) for rung, step in rungs.items()}
            for alert, rungs in state["taken"].items()
        }
        for name in ("held_since", "held_for", "calm_since", "released", "repeated"):
            setattr(self, f"_{name}", state[name])
        self.actions = [Action(**action) for action in state["actions"]]
        self._loaded = True
        if self._monitor is not None:
            self._take_up()

    # --- the monitor's side --------------------------------------------------------------------------

    def attach_monitor(self, monitor: Monitor) -> None:
        """Old name of :meth:`attach`."""
        warnings.warn("autopilot.attach_monitor is now autopilot.attach.", DeprecationWarning, stacklevel=2)
        self.attach(monitor)

    def attach(self, monitor: Monitor) -> None:
        """Called by the monitor whose ``on_alert`` this is. A new monitor is a new run, unless a state has
        been loaded. Raises ValueError while another one is open."""
        if self._monitor is not None and not self._monitor.closed:
            raise ValueError("This Autopilot serves an open monitor already: make one for each.")
        if not self._loaded:
            self._let_go()
            self._start_anew()
            self.actions, self.snapshot = [], None
        self._monitor = monitor
        if self._take_off is not None:
            self._take_off()
        # Here and not at the first alert: that comes from inside a step.
        self._take_off = around_steps(monitor.optimizer, self._before_step, self._after_step)
        self._loaded = False
        self._take_up()

    def __call__(self, alert: Alert) -> None:
        """Called by the monitor when an alert begins, changes or ends."""
        monitor = self._monitor
        if monitor is None:
            raise MonitorError(
                "This Autopilot has no monitor. Give it to one itself, not a function that calls it: "
                "Monitor(model, optimizer, on_alert=autopilot)."
            )
        if monitor.closed or not monitor.port.may_act():  # what is told while it closes comes too late
            return
        if alert.state is AlertState.RESOLVED:
            self._firing.pop(alert.id, None)
            if Rung.COOL in self._taken.get(alert.id, ()):
                self._calm_since = monitor.step
            return
        self._firing[alert.id] = alert
        for rung in self.policy.advised(alert):
            self._answer(alert, rung, monitor)

    def _guarded(self) -> AbstractContextManager[None]:
        """An error in here is reported once, and training goes on; without a monitor nobody can report it."""
        return nullcontext() if self._monitor is None else self._monitor.port.guarded("autopilot")

    @property
    def _told(self) -> Callable[[Exception], None]:
        """For what stays switched on: it hears of errors, and keeps neither pilot nor monitor alive."""
        pilot = weakref.ref(self)

        def told(error: Exception) -> None:
            if (alive := pilot()) is not None:
                with alive._guarded():
                    raise error

        return told

    def _before_step(self, optimizer: Optimizer) -> None:
        if self._pending is not None:
            with self._guarded():
                self._complete()

    def _after_step(self, optimizer: Optimizer) -> None:
        monitor = self._monitor
        if monitor is None or (not self._firing and self._held_since is None and not self._stopped):
            return
        if REPLAY.step is not None:
            return
        with monitor.port.guarded("autopilot"):
            if monitor.closed:
                self._retire(monitor)
            elif monitor.port.may_act():
                self._watch(monitor)
        if self._stopped and self.policy.stop == "raise" and not self._raised:
            self._raised = True
            with monitor.port.guarded("autopilot"):
                self._complete()
            raise AutopilotStop(f"{self.actions[-1].message} Catch AutopilotStop around the training loop.")

    def _watch(self, monitor: Monitor) -> None:
        """Once a step: what goes on in spite of a remedy, and what may be taken back."""
        step, tau = monitor.step, monitor.tau
        if not self.dry_run:  # nothing was done, so that nothing has failed
            patience = self.policy.patience_in_steps(tau)
            for alert in list(self._firing.values()):
                taken = self._taken.get(alert.id, {})
                last = max(taken, default=None)
                since = alert.first_step if last is None else taken[last]
                if alert.kind is AlertKind.SLINGSHOT:  # after a loss that was back for a while, anew
                    since = max(since, monitor.phases[-1][0])
                if step - since >= patience:
                    rung = self.policy.next_rung(alert, last, monitor.phase)
                    if rung is not None:
                        self._answer(alert, rung, monitor, escalated=True)
        if self._held_since is not None and self._may_release(monitor):
            self._held_since, self._released = None, step
            if self._cooling is not None:
                self._cooling.release()
                self._cooling = None
            self._act(monitor, "release", self.actions[-1].alert, "the learning rate comes back")

    def _may_release(self, monitor: Monitor) -> bool:
        asking = any(
            Rung.COOL in self._taken.get(alert.id, ()) and self.policy.asks_to_cool(alert, monitor.phase)
            for alert in self._firing.values()
        )
        calm = round(self.policy.calm * monitor.tau)
        over = not asking and monitor.step - self._calm_since >= calm
        return over and monitor.step >= self._held_for

    # --- the rungs -----------------------------------------------------------------------------------

    def _answer(self, alert: Alert, rung: Rung, monitor: Monitor, *, escalated: bool = False) -> None:
        """One rung for one alert, once."""
        taken = self._taken.setdefault(alert.id, {})
        if rung in taken:
            return
        taken[rung] = monitor.step
        do = {Rung.LOSS: self._exchange, Rung.COOL: self._cool, Rung.STOP: self._stop}[rung]
        do(alert, monitor, "still firing: " if escalated else "")

    def _exchange(self, alert: Alert, monitor: Monitor, why: str) -> None:
        if self._exchanged:
            return
        if self._routed:
            self._exchanged = "loss"
            self._act(monitor, "loss", alert.id, f"{why}the loss is zero_sum_cross_entropy from now on")
            return
        head = monitor.head
        if head is None or not monitor.port.sees_rows:
            lacking = (
                "no head is known whose gradient could be projected"
                if head is None
                else f"no gradient that could be projected comes to the output of {head.name}"
            )
            what = (
                f"the loss cannot be exchanged, and {lacking}: compute it as autopilot.loss(logits, target)"
            )
            self._act(monitor, "nothing", alert.id, why + what)
            return
        self._exchanged = "projection"
        if not self.dry_run:
            self._projection = project_zero_sum(head.module, failed=self._told)
        what = f"the gradient at the output of {head.name} is projected to zero sum from now on"
        self._act(monitor, "projection", alert.id, why + what)

    def _cool(self, alert: Alert, monitor: Monitor, why: str) -> None:
        step, tau, policy = monitor.step, monitor.tau, self.policy
        if self._held_since is None:
            soon = self._released is not None and step - self._released <= RELAPSE * tau
            self._repeated = self._repeated + 1 if soon else 0
        hold = policy.hold_in_steps(tau, self._repeated)
        self._held_for = max(self._held_for, step + hold)
        if self._held_since is not None:
            return
        what = f"{why}learning rate × {policy.factor:g} for {hold:,} steps or more"
        if not self.dry_run:
            self._held_since = step
            self._cool_now(monitor)
        self._act(monitor, "cool", alert.id, what)

    def _cool_now(self, monitor: Monitor) -> None:
        ramp = max(round(monitor.tau), 1)
        factor = self.policy.factor
        self._cooling = cool_down(monitor.optimizer, factor, steps=None, ramp=ramp, failed=self._told)

    def _stop(self, alert: Alert, monitor: Monitor, why: str) -> None:
        if self.dry_run:
            self._act(monitor, "stop", alert.id, "training ends with a snapshot")
            return
        if self._stopped:
            return
        self._stopped = True
        spoilt = alert.kind in (AlertKind.SLINGSHOT, AlertKind.NON_FINITE)
        earlier = [kept for kept in monitor.snapshots if kept.step < alert.first_step]
        if spoilt:
            self.snapshot = earlier[-1] if earlier else None
        else:
            with monitor.port.guarded("autopilot_snapshot"):
                self.snapshot = monitor.take_snapshot()
        path = None
        if self.snapshot is not None:
            # Of a sharded model each rank keeps its own part, in memory.
            sharded = monitor.head is not None and hasattr(monitor.head.weight, "to_local")
            if monitor.run_dir is not None and processes.rank() == 0 and not sharded:
                path = Path(monitor.run_dir) / f"autopilot-{self.snapshot.step}.pt"
            moves = None if spoilt else (monitor.optimizer, monitor.port.stateful)
            self._pending = partial(_finished, self.snapshot, moves, path, monitor)
        kept = "no snapshot" if self.snapshot is None else f"a snapshot of step {self.snapshot.step:,}"
        kept += "" if path is None else f" in {path.name}"
        self._act(monitor, "stop", alert.id, f"{why}training should end; {kept}")

    def _complete(self) -> None:
        """Schedulers and scalers move after the optimizer's step; their state belongs to the snapshot."""
        if REPLAY.step is not None:
            return
        pending, self._pending = self._pending, None
        if pending is not None:
            self.snapshot = pending()

    def _act(self, monitor: Monitor, what: str, alert: str, message: str) -> None:
        mode = "autopilot (dry run, nothing is changed)" if self.dry_run else "autopilot"
        text = f"{mode}, {alert}: {message}."
        self.actions.append(Action(monitor.step, what, alert, text))
        monitor.note(f"autopilot-{alert}-{what}-{monitor.step}", text)

    # --- coming and going ----------------------------------------------------------------------------

    def _take_up(self) -> None:
        """Switch on again what a loaded state says is on."""
        monitor = self._monitor
        if monitor is None or self.dry_run:
            return
        if self._exchanged == "projection" and monitor.head is not None:
            self._projection = project_zero_sum(monitor.head.module, failed=self._told)
        if self._held_since is not None:
            self._cool_now(monitor)

    def _let_go(self) -> None:
        for handle in (self._projection, self._cooling):
            if handle is not None:
                handle.undo()
        self._projection, self._cooling = None, None

    def _retire(self, monitor: Monitor) -> None:
        """The monitor was closed and training goes on: nobody watches, so the rate comes back, unless that
        could be on this rank alone."""
        if self._cooling is None or monitor.port.may_act():
            if self._cooling is not None:
                self._cooling.release()
            self._cooling, self._held_since = None, None
        self._firing.clear()
        if self._take_off is not None:
            self._take_off()


def _finished(
    snapshot: Snapshot, moves: tuple[Any, tuple[Any, ...]] | None, path: Path | None, monitor: Monitor
) -> Snapshot:
    """The snapshot with what has moved since the step (None: it has that already), written to ``path``."""
    with monitor.port.guarded("autopilot_snapshot"):
        if moves is not None:
            snapshot = snapshot.completed(*moves)
        if path is not None:
            snapshot.save(path)
    return snapshot
