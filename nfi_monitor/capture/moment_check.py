"""Find out whether a tensor in the optimizer's state is a second moment of the gradient.

The name does not tell.  Prodigy keeps an average of d²·g² under ``exp_avg_sq``, SOAP and GaLore an average in
another basis, NovoGrad one number a tensor.  What tells is how the tensor moves: v_t = β v_{t−1} + (1−β) g²
holds at every coordinate of a second moment (Kingma & Ba 2015), and at hardly any of another tensor.

The first readings are checked at the sampled coordinates.  torch's own optimizers need no check.  The host
does not wait: the result is copied like a reading, and counts when it has arrived.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer, RMSprop

from nfi_monitor.capture import devices
from nfi_monitor.capture.betas import slots
from nfi_monitor.capture.host_transfer import HostTransfer
from nfi_monitor.capture.moment_trials import Kind, fit, trials
from nfi_monitor.capture.quantized import Quantized
from nfi_monitor.capture.sampling import CoordinateSample, local
from nfi_monitor.capture.second_moment import entries, is_freed, second_moment

CHECKS = 8
"""Maximum number of readings in which a tensor is checked, until it is known to be a second moment."""
CONFIRMED = 3
"""Number of readings in which it is checked then.  Later, readings 16, 32, 64, … check it again: some
optimizers begin with a warm-up that has other rules."""
FAILURES = 3
"""A tensor that moved otherwise in this many readings since it last moved like a second moment is none."""

_AGREE, _DISAGREE = 0.9, 0.75
"""Shares of the coordinates. From the first on, a tensor is a second moment; below the second, it is none."""


_OTHERS = frozenset(("max_exp_avg_sq", "exp_avg_diff", "state2"))
"""Entries of a state beside which ``exp_avg_sq`` is not what divides the step, or is not alone."""

Failed = Callable[[str, BaseException], None]


def ignore(part: str, error: BaseException) -> None:
    """Do nothing with an error."""


class Earlier(NamedTuple):
    """Second moments before a step, of the parameters at ``positions`` in a sample."""

    positions: tuple[int, ...]
    moments: Tensor | None  # [C], 0 where there is none; None: there is none at all
    fresh: frozenset[int]  # positions without a second moment


def _plain_moment(state: Any, param: Tensor) -> Tensor | None:
    """Return the second moment of the usual kind: torch's names, a plain tensor of the parameter's shape.

    Each reading asks for each parameter; this spares it the search for other kinds.
    """
    if type(state) is not dict or not _OTHERS.isdisjoint(state):
        return None
    moment = state.get("exp_avg_sq")
    if type(moment) is not Tensor or not moment.is_floating_point() or is_freed(moment):
        return None
    return moment if moment.shape == param.shape and moment.device == param.device else None


class MomentCheck:
    """Know which parameters' second moments are understood.

    Attributes:
        trusted: whether the step is one of torch's own, whose state needs no check.
        version: changes when the answer for a parameter may have changed.
    """

    def __init__(self, optimizer: Optimizer, failed: Failed = ignore) -> None:
        self.optimizer = optimizer
        self._failed = failed
        step = inspect.unwrap(type(optimizer).step)
        self.trusted = str(getattr(step, "__module__", "")).startswith("torch.optim.")
        self.version = 0
        self._odd: dict[int, str] = {}  # parameter → what is odd about its state
        self._kinds: dict[int, Kind] = {}
        # RMSprop divides by the average as it is. Adam's needs no kind: its settings are the default.
        self._own = Kind(("alpha", None), True) if self.trusted and isinstance(optimizer, RMSprop) else None
        self._failures: dict[int, int] = {}
        self._checks: dict[int, int] = {}
        self._born: dict[int, int] = {}  # parameter → the step that made its state
        self._error = ""  # of a check; no more are made after it
        self._readings = 0
        self._inside = False  # whether the gradients exist only inside the step
        self._transfer = HostTransfer()

    def readable(self, param: nn.Parameter) -> Tensor | Quantized | None:
        """Return what is named like the second moment of a parameter, if it has the parameter's shape."""
        plain = _plain_moment(self.optimizer.state.get(param), param)
        if plain is not None:
            return plain
        moment = self._named(param)
        if moment is None:
            return None
        name = type(self.optimizer).__name__
        if isinstance(moment, Quantized):
            if moment.codes.numel() == local(param).numel():
                return moment
            self._odd[id(param)] = "is kept in 8 bits and in another shape than its parameter's"
        elif "exp_avg_diff" in entries(self.optimizer.state[param]):  # Adan
            self._odd[id(param)] = f"{name} makes of differences between gradients"
        elif moment.shape != param.shape:
            self._odd[id(param)] = f"{name} keeps in another shape than their parameters'"
        elif moment.device != param.device:
            self._odd[id(param)] = f"{name} keeps on {moment.device}, with the tensors on {param.device}"
        elif type(moment) is Tensor and is_freed(moment):
            if id(param) not in self._odd:
                self.version += 1  # it may have been read before
            self._odd[id(param)] = "have no memory after optimizer.step(): a hook has freed it"
        elif moment.is_floating_point() and type(moment) in (Tensor, type(param), type(param.data)):
            return moment
        else:
            self._odd[id(param)] = f"{name} keeps as {type(moment).__name__}"
        return None

    def understood(self, param: nn.Parameter) -> bool:
        """Return whether the state of this parameter has a second moment of its gradient."""
        moment = self.readable(param)
        if moment is None:
            return False
        # 8-bit moments of known formats are those of Adam.
        return self.trusted or isinstance(moment, Quantized) or id(param) in self._kinds

    def _named(self, param: nn.Parameter) -> Tensor | Quantized | None:
        state = self.optimizer.state.get(param, {})
        if "max_exp_avg_sq" in entries(state) and not self._takes_maximum(param):
            state = {name: value for name, value in entries(state).items() if name != "max_exp_avg_sq"}
        return second_moment(state)

    def _takes_maximum(self, param: nn.Parameter) -> bool:
        """Return whether the step divides by the maximum, which stays in the state without amsgrad, too."""
        flags = [bool(group.get("amsgrad", True)) for group in self.optimizer.param_groups]
        if all(flags) or not any(flags):
            return all(flags)
        groups = zip(flags, self.optimizer.param_groups, strict=True)
        return any(flag and any(param is held for held in group["params"]) for flag, group in groups)

    def undecided(self, param: nn.Parameter) -> bool:
        """Return whether the next reading should check this parameter's state."""
        failures, known = self._failures.get(id(param), 0), id(param) in self._kinds
        if self.trusted or self._error or failures >= FAILURES:
            return False
        if self._checks.get(id(param), 0) >= (CONFIRMED if known else CHECKS) and not (known and failures):
            return False
        moment = self._named(param)
        return moment is None or isinstance(self.readable(param), Tensor)

    def in_doubt(self, param: nn.Parameter) -> bool:
        """Return whether the last check of this parameter's second moment failed."""
        return self._failures.get(id(param), 0) > 0

    def kind(self, param: Tensor | None) -> Kind | None:
        """Return how the second moment of this parameter is made; None if no check has shown it."""
        return self._kinds.get(id(param), self._own)

    def pending(self, params: Sequence[nn.Parameter]) -> bool:
        """Return whether one of these parameters has a state whose meaning is still checked."""
        state = self.optimizer.state
        return any(
            second_moment(state.get(param, {})) is not None and self.undecided(param) for param in params
        )

    def left_out(self, params: Sequence[nn.Parameter]) -> list[str]:
        """Return what is not read of these parameters' states and why, in words; empty while checks go on."""
        if self.pending(params):
            return []
        named = {id(param): self._named(param) is not None for param in params}
        counts: dict[str, int] = {}
        some = any(map(self.understood, params))
        for param in params:
            if not self.understood(param) and (some or named[id(param)]):
                why = self._why(param) if named[id(param)] else "have none, while others do"
                counts[why] = counts.get(why, 0) + 1
        total = len(params)
        return [
            f"the second moment of {count} of {total} tensors, which {why}" for why, count in counts.items()
        ]

    def _why(self, param: nn.Parameter) -> str:
        name = type(self.optimizer).__name__
        if id(param) in self._odd:
            return self._odd[id(param)]
        if self._error:
            return self._error
        if self._failures.get(id(param), 0) >= FAILURES:
            if self._inside:
                return (
                    "does not agree with the gradients that are left after optimizer.step(closure), where "
                    f"{name} may overwrite them"
                )
            dtype = getattr(self._named(param), "dtype", torch.float32)
            rounded = f", or rounded to {dtype}" if dtype.itemsize < 4 else ""
            how = f"(it is scaled or rotated{rounded})"
            return f"does not move in {name} as an average of squared gradients does {how}"
        return "moves by less than its rounding, so that its meaning cannot be checked"

    def steps_averaged(self, param: nn.Parameter, group: Mapping[str, Any], step: int) -> Any:
        """Return how many gradients the second moment has averaged, a number or a tensor; None if unknown."""
        state = entries(self.optimizer.state.get(param, {}))
        for place in (state, group):
            if place.get("step") is not None:
                return place["step"]
        born = self._born.get(id(param))
        return group.get("k") if born is None else step - born + 1

    # --- check -----------------------------------------------------------------------------------

    def before(
        self,
        sample: CoordinateSample,
        params: Sequence[nn.Parameter],
        undecided: Sequence[int],
        *,
        closure: bool,
    ) -> Earlier | None:
        """Read the second moments before a step; None if nothing is to be checked.

        ``closure``: the step computes the gradients, which are read after it, and may overwrite them: check.
        """
        if self.trusted or self._error:
            return None
        try:
            return self._before(sample, params, undecided, closure=closure)
        except Exception as error:
            self._give_up(error)
            return None

    def _before(
        self,
        sample: CoordinateSample,
        params: Sequence[nn.Parameter],
        undecided: Sequence[int],
        *,
        closure: bool,
    ) -> Earlier | None:
        self._readings += 1
        self._inside = closure
        again = self._readings >= 16 and not self._readings & (self._readings - 1)
        if closure or again:
            known = [at for at, param in enumerate(params) if id(param) in self._kinds]
            undecided = sorted({*undecided, *known})
        if not undecided:
            return None
        fresh = frozenset(at for at in undecided if self._named(params[at]) is None)
        return Earlier(tuple(undecided), self._gather(sample, params, undecided), fresh)

    def after(
        self,
        earlier: Earlier,
        sample: CoordinateSample,
        params: Sequence[nn.Parameter],
        groups: Sequence[Mapping[str, Any]],
        grad: Tensor,
        weights: Tensor,
        step: int,
    ) -> None:
        """Compare the second moments after a step with what they should be. ``grad``, ``weights``: [C]."""
        try:
            self._after(earlier, sample, params, groups, grad, weights, step)
        except Exception as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        """Read no second moment that was not understood yet: an odd state must cost nothing else."""
        self._error = f"cannot be checked ({type(error).__name__}: {error})"
        self.version += 1
        self._failed("moment_check", error)

    def _after(
        self,
        earlier: Earlier,
        sample: CoordinateSample,
        params: Sequence[nn.Parameter],
        groups: Sequence[Mapping[str, Any]],
        grad: Tensor,
        weights: Tensor,
        step: int,
    ) -> None:
        positions = self._with_moment(earlier, params, step)
        now = self._gather(sample, params, positions)
        if now is None:
            return
        before = torch.zeros_like(now) if earlier.moments is None else earlier.moments
        of: list[Mapping[str, Any] | None] = [None] * len(params)
        taken: list[float | None] = [None] * len(params)
        for at in positions:
            of[at] = groups[at]
            taken[at] = 1 if at in earlier.fresh else self._host_count(params[at], groups[at], step)
        assumed = trials(of, taken)
        rounding = torch.finfo(grad.dtype).eps
        for at in positions:
            for tensor in (self._named(params[at]), params[at].grad):
                if isinstance(tensor, Tensor) and tensor.is_floating_point():
                    rounding = max(rounding, torch.finfo(tensor.dtype).eps)
        fits = [fit(sample, trial, grad, weights, before, now, rounding) for trial in assumed]
        self._reject([params[at] for at in positions if not slots(groups[at])])
        if fits:
            label = ([(at, params[at]) for at in positions], assumed, len(params))
            self._transfer.put(label, torch.stack(fits).flatten().double())
        self.receive()

    def _with_moment(self, earlier: Earlier, params: Sequence[nn.Parameter], step: int) -> list[int]:
        """Return the positions whose second moment can be read after a step. Others are no longer checked
        if they have one that cannot be read, or have none after some steps.
        """
        positions = []
        for at in earlier.positions:
            param = params[at]
            if isinstance(self.readable(param), Tensor):
                positions.append(at)
                if at in earlier.fresh:
                    self._born[id(param)] = step
                continue
            self._checks[id(param)] = self._checks.get(id(param), 0) + 1
            if self._named(param) is not None or self._checks[id(param)] >= CHECKS:
                self.version += 1
        return positions

    def receive(self) -> None:
        """Take in the checks that have arrived on the host."""
        if not self._transfer.waiting:
            return
        for (checked, assumed, tensors), vector in self._transfer.take():
            numbers = vector.tolist()
            for at, param in checked:
                places = range(0, len(numbers), 2 * tensors)
                counts = [(numbers[place + at], numbers[place + tensors + at]) for place in places]
                self._judge(id(param), [trial.kinds[at] for trial in assumed], counts)
            self.version += 1

    def _reject(self, params: Sequence[nn.Parameter]) -> None:
        """Reject what is named like a second moment, but has no constant β2 (Adafactor)."""
        for param in params:
            if self.readable(param) is not None:
                self._odd[id(param)] = f"{type(self.optimizer).__name__} averages without a constant β2"
                self._failures[id(param)] = FAILURES
                self.version += 1

    def _judge(self, key: int, kinds: Sequence[Kind | None], counts: Sequence[tuple[float, float]]) -> None:
        """Decide about one parameter. ``counts``: for each kind, coordinates that count, and that agree."""
        self._checks[key] = self._checks.get(key, 0) + 1
        known = self._kinds.get(key)
        for kind, (counted, agree) in zip(kinds, counts, strict=True):
            if kind is not None and counted and agree >= _AGREE * counted:
                unbiased = kind.unbiased if known is None else known.unbiased
                self._kinds[key] = Kind(kind.slot, unbiased, kind.coupled)
                self._failures[key] = 0
                return
        if any(counted for counted, _ in counts) and all(
            agree < _DISAGREE * counted for counted, agree in counts if counted
        ):
            self._failures[key] = self._failures.get(key, 0) + 1
            if self._failures[key] >= FAILURES:
                self._kinds.pop(key, None)
        elif self._checks[key] == CHECKS and known is None and self._kinds:
            # It hardly moves. The optimizer's other tensors are second moments: take it for one, too.
            self._kinds[key] = next(iter(self._kinds.values()))

    def _gather(
        self, sample: CoordinateSample, params: Sequence[nn.Parameter], positions: Sequence[int]
    ) -> Tensor | None:
        """Return the second moments at the sampled coordinates [C], 0 at others than ``positions``."""
        found = {at: moment for at in positions if isinstance(moment := self.readable(params[at]), Tensor)}
        if not found:
            return None
        views = []
        for at, (start, end) in enumerate(sample.spans):
            moment = found.get(at)
            if moment is None:
                views.append(torch.zeros(end - start, device=local(params[at]).device))
            else:
                raw = _unmaximised(self.optimizer.state.get(params[at], {}), moment)
                part = local(raw).detach().reshape(-1)[:: sample.strides[at]]
                views.append(part if part.dtype is torch.float64 else part.float())
        return torch.cat(views)

    def _host_count(self, param: nn.Parameter, group: Mapping[str, Any], step: int) -> float | None:
        taken = self.steps_averaged(param, group, step)
        if isinstance(taken, Tensor):
            return float(taken) if devices.on_host(taken) and taken.numel() == 1 else None
        return float(taken) if isinstance(taken, (int, float)) else None


def _unmaximised(state: Any, moment: Tensor) -> Tensor:
    """Return the average itself, where an optimizer divides by the maximum of it (amsgrad)."""
    average = entries(state).get("exp_avg_sq")
    return average if isinstance(average, Tensor) and average.shape == moment.shape else moment
