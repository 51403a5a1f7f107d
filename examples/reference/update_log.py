"""Record the updates around a slingshot by coordinate: are they bimodal (Liu et al. 2026, figure 4)?

A slingshot is detected only after it begins. So a ring buffer holds the last updates of a fixed sample of
coordinates, and a slingshot's start copies it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nfi_monitor.types import Thresholds

BEFORE, AFTER = 40, 24
"""Updates kept before and after the first step of a slingshot."""


class UpdateLog:
    """Record updates; call :meth:`begin` before and :meth:`end` after each optimizer step.

    Change no parameter between an end and a begin. ``state_dict`` holds everything.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], sample: int = 4_096, slingshots: int = 2) -> None:
        self._parameters = [p for p in parameters if p.requires_grad]
        sizes = torch.tensor([p.numel() for p in self._parameters])
        wanted = (sizes.double() / sizes.sum() * sample).ceil().long().clamp(max=sizes)
        generator = torch.Generator().manual_seed(0)
        self._at = [
            torch.randperm(int(size), generator=generator)[: int(count)].to(parameter.device)
            for parameter, size, count in zip(self._parameters, sizes, wanted, strict=True)
        ]
        self._ring = torch.zeros(BEFORE + AFTER, int(wanted.sum()))
        self._before: Tensor | None = None
        self._limit = slingshots
        self._low, self._due, self._start = False, 0, 0
        self.kept: list[tuple[int, Tensor]] = []
        """(first step of the slingshot, updates of steps first − BEFORE … first + AFTER − 1)."""

    def _read(self) -> Tensor:
        with torch.no_grad():
            parts = [p.reshape(-1)[at] for p, at in zip(self._parameters, self._at, strict=True)]
            return torch.cat(parts).float()

    def begin(self) -> None:
        if self._before is None:  # otherwise the previous step has set it
            self._before = self._read()

    def end(self, step: int, loss: float) -> None:
        """Record the update of this step; its gradient is that of ``loss``."""
        assert self._before is not None
        before, self._before = self._before, self._read()
        self._ring[step % len(self._ring)] = (self._before - before).cpu()
        if self._due:
            if step == self._due:
                order = (torch.arange(len(self._ring)) + step + 1) % len(self._ring)
                self.kept.append((self._start, self._ring[order].clone()))
                self._due = 0
        elif loss < Thresholds.spike_low:
            self._low = True
        elif self._low and loss > Thresholds.spike_high and len(self.kept) < self._limit and step > BEFORE:
            self._low, self._start, self._due = False, step, step + AFTER - 1

    def state_dict(self) -> dict[str, Any]:
        return {
            "ring": self._ring,
            "at": [self._low, self._due, self._start],
            "kept": [[step, updates] for step, updates in self.kept],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._ring.copy_(state["ring"])
        self._low, self._due, self._start = state["at"]
        self._before = None
        self.kept = [(step, updates) for step, updates in state["kept"]]

    def histograms(self, bins: int = 41) -> list[dict[str, Any]]:
        """Return counts before, at and after each slingshot, their bimodality, and the relative size of *at*.

        *before* is the median-sized update of the 20 steps up to ten before the loss rose. *at* is the
        largest one from there on; *after* is the last one recorded. The bins of each cover ± its own largest
        absolute value.
        """
        found = []
        for start, updates in self.kept:
            size = updates.square().mean(1).sqrt()
            quiet = size[BEFORE - 30 : BEFORE - 10]
            before = BEFORE - 30 + int(quiet.argsort()[len(quiet) // 2])
            at = BEFORE - 10 + int(size[BEFORE - 10 :].argmax())
            moments = {"before": before, "at": at, "after": len(updates) - 1}
            found.append(
                {
                    "start": start,
                    "growth": float(size[at] / size[before]),
                    **{name: _histogram(updates[index], bins) for name, index in moments.items()},
                    "steps": {name: start - BEFORE + index for name, index in moments.items()},
                }
            )
        return found


def _histogram(update: Tensor, bins: int) -> dict[str, Any]:
    span = float(update.abs().max())
    moved = update[update != 0]  # leave out dead units: their updates are exactly 0
    counts = torch.histc(moved, bins, -span, span) if span > 0 else torch.zeros(bins)
    return {"span": span, "counts": counts.int().tolist(), "bimodality": bimodality(moved)}


def bimodality(sample: Tensor) -> float:
    """Return Sarle's coefficient (skewness² + 1) / kurtosis: 1 for two points, .56 uniform, .33 normal."""
    if len(sample) < 4:
        return float("nan")
    centred = sample.double() - sample.double().mean()
    variance = centred.square().mean()
    if variance == 0:
        return float("nan")
    skewness = centred.pow(3).mean() / variance**1.5
    return float((skewness**2 + 1) / (centred.pow(4).mean() / variance**2))
