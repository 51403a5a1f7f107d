"""Keep the states around each slingshot, and continue training from them in other ways.

A slingshot is detected only after the loss has risen. So a ring buffer holds the most recent states, and a
slingshot's start copies them. After the run, short continuations start from these states. Each differs in one
thing: a reset of the optimizer's memory, or a random jump of the slingshot's size in its place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nfi_monitor.types import Thresholds

RING = 48
"""Number of recent states in the ring buffer, one per step."""
EARLY = 20
"""Steps before the loss first rose, at which the continuations with a reset begin."""
LOW, HIGH = Thresholds.spike_low, Thresholds.spike_high

MakeOptimizer = Callable[[nn.Module], torch.optim.Optimizer]
LossOf = Callable[[nn.Module], Tensor]


class SlingshotLog:
    """Record states; call :meth:`add` after each optimizer step. ``state_dict`` holds everything."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, limit: int = 6) -> None:
        self._model, self._optimizer, self._limit = model, optimizer, limit
        self._ring: list[dict[str, Any]] = []
        self._low = False
        self._open: dict[str, Any] | None = None
        self.kept: list[dict[str, Any]] = []
        """Per finished slingshot: start, end, the states *early*, *before*, *after*, the first *updates*."""

    def add(self, step: int, loss: float) -> None:
        """Record a step; ``loss`` belongs to the weights before the step, and to this step's gradient."""
        if not self._limit:
            return
        state = self._state(step, loss)
        if self._open is not None:
            if loss < LOW:
                self._open |= {"end": step, "after": self._ring[-1]}
                self.kept.append(self._open)
                self._open = None
        elif self._low and loss > HIGH and len(self.kept) < self._limit and len(self._ring) == RING:
            self._begin(step)
        self._low = loss < LOW or (self._low and self._open is None)
        self._ring.append(state)
        del self._ring[:-RING]

    def _begin(self, step: int) -> None:
        # Start from the last weights whose loss was below LOW: the state before the one that measured it. If
        # the loss rose for longer than the ring holds, take the oldest state with EARLY states before it.
        last = max((i for i, s in enumerate(self._ring) if s["loss"] < LOW), default=0)
        before = max(last - 1, EARLY)
        weights = torch.stack([s["weights"] for s in self._ring[before - EARLY :]])
        self._open = {
            "start": step,
            "before": self._ring[before],
            "early": self._ring[before - EARLY],
            "updates": weights.diff(dim=0),
            "first": self._ring[before - EARLY]["step"] + 1,
        }

    def _state(self, step: int, loss: float) -> dict[str, Any]:
        parameters = list(self._model.parameters())
        with torch.no_grad():
            memory = [self._optimizer.state.get(p, {}) for p in parameters]
            found = {"step": step, "loss": loss, "weights": _flat(parameters)}
            if all("exp_avg" in item for item in memory):
                found["exp_avg"] = _flat([item["exp_avg"] for item in memory])
                found["exp_avg_sq"] = _flat([item["exp_avg_sq"] for item in memory])
                found["count"] = float(memory[0]["step"])
        return found

    def state_dict(self) -> dict[str, Any]:
        return {"ring": self._ring, "low": self._low, "open": self._open, "kept": self.kept}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._ring, self.kept = list(state["ring"]), list(state["kept"])
        self._low, self._open = state["low"], state["open"]


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors]).clone()


def _put(flat: Tensor, tensors: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for part, tensor in zip(flat.split([t.numel() for t in tensors]), tensors, strict=True):
            tensor.copy_(part.reshape(tensor.shape))


@dataclass
class Continuation:
    """Train on from a recorded state. Uses the model as it is, and changes it."""

    model: nn.Module
    make_optimizer: MakeOptimizer
    loss: LossOf

    def begin(self, state: Mapping[str, Any], reset: str = "") -> torch.optim.Optimizer:
        """Return an optimizer at this state.

        ``reset``: "state" zeroes both moments, "count" the step count.
        """
        parameters = list(self.model.parameters())
        _put(state["weights"], parameters)
        optimizer = self.make_optimizer(self.model)
        if reset != "state" and "exp_avg" in state:
            sizes = [p.numel() for p in parameters]
            moments = [state[name].split(sizes) for name in ("exp_avg", "exp_avg_sq")]
            for p, first, second in zip(parameters, *moments, strict=True):
                optimizer.state[p] = {
                    "step": torch.tensor(0.0 if reset == "count" else state["count"]),
                    "exp_avg": first.reshape(p.shape).clone(),
                    "exp_avg_sq": second.reshape(p.shape).clone(),
                }
        return optimizer

    def train(
        self, optimizer: torch.optim.Optimizer, steps: int, until: Callable[[float], bool] | None = None
    ) -> list[float]:
        """Return the losses before each step; end early, before the step, once ``until(loss)`` is true."""
        losses: list[float] = []
        for _ in range(steps):
            optimizer.zero_grad()
            loss = self.loss(self.model)
            losses.append(float(loss.detach()))
            if until is not None and until(losses[-1]):
                break
            loss.backward()
            optimizer.step()
        return losses


def jump(weights: Tensor, size: Tensor, sizes: Sequence[int], layers: bool, seed: int) -> Tensor:
    """Return ``weights`` moved in a random direction by ‖``size``‖, or by each tensor's own norm."""
    generator = torch.Generator().manual_seed(seed)
    direction = torch.randn(len(weights), generator=generator, dtype=torch.float64).to(weights)
    if not layers:
        return weights + direction * (size.norm() / direction.norm())
    parts = [
        d * (s.norm() / d.norm())
        for d, s in zip(direction.split(list(sizes)), size.split(list(sizes)), strict=True)
    ]
    return weights + torch.cat(parts)
