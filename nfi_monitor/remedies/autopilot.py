"""Apply the remedies that alerts advise, watch whether they help, undo them, and report each action.

The monitor never changes a run.  The Autopilot does: it is the only part of the package that acts on its own.

    autopilot = Autopilot()
    with Monitor(model, optimizer, on_alert=autopilot):
        for x, y in loader:
            loss = autopilot.loss(model(x), y)      # F.cross_entropy to the last bit, until it is replaced
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if autopilot.should_stop:
                break

The rungs (:class:`nfi_monitor.remedies.policy.Rung`) are: replace the loss, lower the learning rate for a
while, take a snapshot and ask for an end of the training.  For a new alert, the Autopilot takes the rungs
that its mechanism needs, each once.  It takes the next rung only if the alert lasts longer than the policy's
patience. The learning rate comes back when the alarm has been over for a while.  The loss stays replaced: it
is the same function, and the margins stay so large that ``F.cross_entropy`` rounds.

All ranks of a training act at the same step, because ranks that are read together agree on every alert. Ranks
that are not, or no longer, read together never act (also after ``monitor.close()``).  Remedies that are
active then stay active, even a low learning rate: if one rank alone undid it, the replicas would drift apart.
If every rank makes a new monitor with the Autopilot, the Autopilot starts anew.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor
from torch.optim import Optimizer

from nfi_monitor.alert_handler import AlertHandler
from nfi_monitor.capture.unwrap import unwrap
from nfi_monitor.errors import MonitorError
from nfi_monitor.remedies.action import Action, AutopilotStop
from nfi_monitor.remedies.cooling import CoolDown, cool_down
from nfi_monitor.remedies.cross_entropy import zero_sum_cross_entropy
from nfi_monitor.remedies.handle import Handle
from nfi_monitor.remedies.last_snapshot import LastSnapshot
from nfi_monitor.remedies.policy import Policy, Rung
from nfi_monitor.remedies.projection import project_zero_sum
from nfi_monitor.remedies.rate_hold import RateHold
from nfi_monitor.remedies.saved import read_state
from nfi_monitor.remedies.steps import around_steps
from nfi_monitor.replay.replayed_step import REPLAY, acts
from nfi_monitor.replay.snapshots import Snapshot
from nfi_monitor.types import Alert, AlertKind, AlertState

if TYPE_CHECKING:
    from nfi_monitor.monitor import Monitor


class Autopilot(AlertHandler):
    """Act on alerts. Pass it to the monitor: ``Monitor(model, optimizer, on_alert=Autopilot())``.

    Args:
        policy: what the Autopilot may do, and when.
        dry_run: only report what would be done at each alert; the training stays the same to the last bit.

    Actions are in ``actions`` and among the monitor's notes (console, run directory, TensorBoard, summary).
    If the loss is not computed by :meth:`loss`, the gradient at the head is projected instead, which averts
    fewer slingshots (``tests/benchmarks/remedies/RESULTS.md``).  An error inside the Autopilot is reported
    once.  Then only the remedy that failed is undone.

    The Autopilot is made for numeric slingshots.  Against others it only lowers the learning rate, often too
    late.  When not to use it: if a run must be repeatable from its seed alone.
    """

    def __init__(self, policy: Policy | None = None, *, dry_run: bool = False) -> None:
        if policy is not None and not isinstance(policy, Policy):
            raise TypeError(f"policy must be a Policy(...), got {type(policy).__name__}.")
        self.policy = policy or Policy()
        self.dry_run = dry_run
        self.actions: list[Action] = []
        """All actions so far, oldest first."""
        self.snapshot: Snapshot | None = None
        """The state that was saved when training should end; also written to the run directory."""
        self._monitor: Monitor | None = None
        self._take_off: Any = None
        self._pending: Any = None  # completes the snapshot after schedulers and scalers have stepped
        self._projection: Handle | None = None
        self._cooling: CoolDown | None = None
        self._routed = False  # loss() has been called
        self._loaded = False
        self._start_anew()

    def _start_anew(self) -> None:
        self._exchanged = ""  # "loss" or "projection", also in a dry run
        self._stopped = False
        self._raised = False
        self._firing: dict[str, Alert] = {}
        self._taken: dict[str, dict[Rung, int]] = {}  # alert → rungs, each with its step
        self._hold = RateHold()

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
        """Return ``F.cross_entropy``, or :func:`zero_sum_cross_entropy` after the loss was replaced.

        Before, the result is that of ``F.cross_entropy`` to the last bit.  Arguments, shapes, units and
        errors are those of these two functions.
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
        """Whether the training should end. Check it after each step, and leave the loop if it is True."""
        with self._guarded():
            self._complete()
        return self._stopped

    @property
    def swapped(self) -> bool:
        """Whether :meth:`loss` returns ``zero_sum_cross_entropy`` now."""
        return self._exchanged == "loss" and not self.dry_run

    @property
    def cooling(self) -> bool:
        """Whether the learning rate is held low now."""
        return self._hold.held_since is not None

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs besides ``monitor.state_dict()``, in plain types."""
        return {
            "exchanged": self._exchanged,
            "stopped": self._stopped,
            "firing": [alert.to_json() for alert in self._firing.values()],
            "taken": {
                alert: {str(rung): step for rung, step in rungs.items()}
                for alert, rungs in self._taken.items()
            },
            **self._hold.state_dict(),
            "actions": [asdict(action) for action in self.actions],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned, before or after the monitor is made.

        Raises ValueError for another state, and then changes nothing.
        """
        saved = read_state(state)
        self._undo_remedies()
        self._start_anew()
        self._exchanged, self._stopped = saved.exchanged, saved.stopped
        self._firing = {alert.id: alert for alert in saved.firing}
        self._taken, self._hold, self.actions = saved.taken, saved.hold, list(saved.actions)
        self._loaded = True
        if self._monitor is not None:
            self._reapply()

    # --- the monitor's side --------------------------------------------------------------------------

    def attach_monitor(self, monitor: Monitor) -> None:
        """Call :meth:`attach`, whose old name this is."""
        warnings.warn("autopilot.attach_monitor is now autopilot.attach.", DeprecationWarning, stacklevel=2)
        self.attach(monitor)

    def attach(self, monitor: Monitor) -> None:
        """Serve ``monitor``, which calls this when it is made. Forget earlier runs unless a state was loaded.

        Raises ValueError while another monitor is open, TypeError if the optimizer is none of torch's."""
        if self._monitor is not None and not self._monitor.closed:
            raise ValueError("This Autopilot serves an open monitor already: make one for each.")
        if not self._loaded:
            self._undo_remedies()
            self._start_anew()
            self.actions, self.snapshot = [], None
        self._monitor = monitor
        if self._take_off is not None:
            self._take_off()
        # Add the hooks now, not at the first alert, because alerts come from inside a step.
        self._take_off = around_steps(unwrap(monitor.optimizer), self._before_step, self._after_step)
        self._loaded = False
        self._reapply()

    def __call__(self, alert: Alert) -> None:
        """Act on an alert. The monitor calls this when an alert begins, changes or ends."""
        monitor = self._monitor
        if monitor is None:
            raise MonitorError(
                "This Autopilot has no monitor. Pass the Autopilot itself, not a function that calls it: "
                "Monitor(model, optimizer, on_alert=autopilot)."
            )
        if monitor.closed or not monitor.port.may_act():  # an alert during close() comes too late
            return
        if alert.state is AlertState.RESOLVED:
            self._firing.pop(alert.id, None)
            if Rung.COOL in self._taken.get(alert.id, ()):
                self._hold.calm_since = monitor.step
            return
        self._firing[alert.id] = alert
        for rung in self.policy.advised(alert):
            self._answer(alert, rung, monitor)

    def _guarded(self) -> AbstractContextManager[None]:
        """Report an error inside the block once; without a monitor, raise it."""
        return nullcontext() if self._monitor is None else self._monitor.port.guarded("autopilot")

    @property
    def _on_error(self) -> Callable[[Exception], None]:
        """A function that reports an error of a remedy. It keeps neither Autopilot nor monitor alive."""
        pilot = weakref.ref(self)

        def report(error: Exception) -> None:
            if (alive := pilot()) is not None:
                with alive._guarded():
                    raise error

        return report

    def _before_step(self, optimizer: Optimizer) -> None:
        if self._pending is not None:
            with self._guarded():
                self._complete()

    def _after_step(self, optimizer: Optimizer) -> None:
        monitor = self._monitor
        if monitor is None or (not self._firing and self._hold.held_since is None and not self._stopped):
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
        """Take the next rung if an alert goes on in spite of a remedy; end the cool-down if it may end."""
        step, tau = monitor.step, monitor.tau
        if not self.dry_run:  # a dry run applies no remedy, so none can have failed
            patience = self.policy.patience_in_steps(tau)
            for alert in list(self._firing.values()):
                taken = self._taken.get(alert.id, {})
                last = max(taken, default=None)
                since = alert.first_step if last is None else taken[last]
                if alert.kind is AlertKind.SLINGSHOT:  # count again after each recovery of the loss
                    since = max(since, monitor.phases[-1][0])
                if step - since >= patience:
                    rung = self.policy.next_rung(alert, last, monitor.phase)
                    if rung is not None:
                        self._answer(alert, rung, monitor, escalated=True)
        if self._hold.held_since is not None and self._may_release(monitor):
            self._hold.held_since, self._hold.released = None, step
            if self._cooling is not None:
                self._cooling.release()
                self._cooling = None
            self._act(monitor, "release", self.actions[-1].alert, "the learning rate comes back")

    def _may_release(self, monitor: Monitor) -> bool:
        asking = any(
            Rung.COOL in self._taken.get(alert.id, ()) and self.policy.asks_to_cool(alert, monitor.phase)
            for alert in self._firing.values()
        )
        return not asking and self._hold.may_end(monitor.step, monitor.tau, self.policy)

    # --- the rungs -----------------------------------------------------------------------------------

    def _answer(self, alert: Alert, rung: Rung, monitor: Monitor, *, escalated: bool = False) -> None:
        """Apply ``rung`` for ``alert``, unless it has been applied."""
        taken = self._taken.setdefault(alert.id, {})
        if rung in taken:
            return
        taken[rung] = monitor.step
        do = {Rung.LOSS: self._replace_loss, Rung.COOL: self._cool, Rung.STOP: self._stop}[rung]
        do(alert, monitor, "the alert goes on; " if escalated else "")

    def _replace_loss(self, alert: Alert, monitor: Monitor, why: str) -> None:
        if self._exchanged:
            return
        if self._routed:
            self._exchanged = "loss"
            self._act(monitor, "loss", alert.id, f"{why}the loss is zero_sum_cross_entropy from now on")
            return
        head = monitor.head
        if head is None or head.bare or head.spatial or not monitor.port.sees_rows:
            if head is None:
                lacking = "no head is known at which the gradient could be projected"
            elif head.bare or head.spatial:
                lacking = f"{head.name} is no linear layer, at whose output the gradient could be projected"
            else:
                lacking = f"no gradient reaches the output of {head.name}, where it could be projected"
            what = f"the loss cannot be replaced, and {lacking}: compute it as autopilot.loss(logits, target)"
            self._act(monitor, "nothing", alert.id, why + what)
            return
        self._exchanged = "projection"
        if not self.dry_run:
            self._projection = project_zero_sum(head.module, failed=self._on_error)
        what = f"the gradient at the output of {head.name} is projected to zero sum from now on"
        self._act(monitor, "projection", alert.id, why + what)

    def _cool(self, alert: Alert, monitor: Monitor, why: str) -> None:
        hold = self._hold.ask(monitor.step, monitor.tau, self.policy)
        if hold is None:
            return
        what = f"{why}learning rate × {self.policy.factor:g} for at least {hold:,} steps"
        if not self.dry_run:
            self._hold.held_since = monitor.step
            self._cool_now(monitor)
        self._act(monitor, "cool", alert.id, what)

    def _cool_now(self, monitor: Monitor) -> None:
        ramp = max(round(monitor.tau), 1)
        factor = self.policy.factor
        self._cooling = cool_down(monitor.optimizer, factor, steps=None, ramp=ramp, failed=self._on_error)

    def _stop(self, alert: Alert, monitor: Monitor, why: str) -> None:
        if self.dry_run:
            self._act(monitor, "stop", alert.id, "training ends with a snapshot")
            return
        if self._stopped:
            return
        self._stopped = True
        last = LastSnapshot.of(alert, monitor)
        self.snapshot, self._pending = last.snapshot, last.finish
        self._act(monitor, "stop", alert.id, f"{why}training should end; {last.in_words}")

    def _complete(self) -> None:
        """Complete the snapshot: schedulers and scalers move after the optimizer's step."""
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

    # --- attach and close -----------------------------------------------------------------------------

    def _reapply(self) -> None:
        """Apply the remedies again that were active in a loaded state."""
        monitor = self._monitor
        if monitor is None or self.dry_run:
            return
        if self._exchanged == "projection" and monitor.head is not None:
            self._projection = project_zero_sum(monitor.head.module, failed=self._on_error)
        if self._hold.held_since is not None:
            self._cool_now(monitor)

    def _undo_remedies(self) -> None:
        for handle in (self._projection, self._cooling):
            if handle is not None:
                handle.undo()
        self._projection, self._cooling = None, None

    def _retire(self, monitor: Monitor) -> None:
        """End the cool-down after the monitor was closed, unless it would end on this rank alone."""
        if self._cooling is None or monitor.port.may_act():
            if self._cooling is not None:
                self._cooling.release()
            self._cooling, self._hold.held_since = None, None
        self._firing.clear()
        if self._take_off is not None:
            self._take_off()
