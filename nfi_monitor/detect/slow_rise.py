"""Find a rise of the loss that no few losses show: a slow one, one within the noise, and a collapse.

The running averages of ``loss_baseline.py`` follow a slow rise, and a noisy loss hides a rise of a few σ.  So
the means of log loss over blocks of ``LENGTH`` losses are compared with the lowest level of the last 400
losses.  A level is the mean of ``HELD`` blocks.

- A *climb* is as high as one of ``spike.py``.  The last two block means are that high.
- A *collapse* is lower, because a cross-entropy of few classes cannot climb by one nat.  The loss had fallen
  to ``LEARNED`` of the early level, at which the run began, and is back there for ``STAYS`` blocks.  So a
  harder part of the data, which is learned in its turn, is none.

Block means and levels usually lie above the lowest level, too.  A rise must be ``spike_sigmas`` times as far
as that: a GAN or a curriculum has wandered nearly as far before.
"""

from __future__ import annotations

import math
from typing import Any

from nfi_monitor.detect.loss_baseline import LossBaseline, highest_of_each, highest_usual
from nfi_monitor.detect.smoothing import Stateful
from nfi_monitor.types import Thresholds

LENGTH = 10  # losses in a block
HELD = 5  # blocks in a level
STAYS = 4 * HELD  # blocks that a collapse must last
KEPT = 40  # levels among which the lowest is looked for
FEWEST = 8  # fewest distances from which to tell what is usual
UNSURE = 20.0  # so many distances may be half as large as usual
MEMORY = 200  # distances in the usual distance
JUST = 15  # blocks before the rise, of which
LOWER = 0.9  # this share must be lower: else the loss has just come from there, as on the way down
LEAST = 0.02  # smallest usual distance of log loss from the lowest level
LEARNED = 0.75  # share of the early level to which a loss has fallen that can collapse


class SlowRise(Stateful):
    """Compare the means of blocks of losses; ``height`` is finite while they have risen."""

    __slots__ = (
        "count", "distances", "floor", "half_way", "height", "least", "levels", "lowest", "means",
        "recent", "since", "total", "usual", "usual_of_levels", "usual_of_means",
    )  # fmt: skip

    def __init__(self) -> None:
        self.usual_of_means = 0.0  # usual distance of block means from the lowest level
        self.usual_of_levels = 0.0  # the same of levels
        self.distances = 0  # number of distances in both
        self.recent: list[list[float]] = []  # last distances of both, which may belong to a rise
        self.restart()

    def restart(self) -> None:
        """Forget all losses, but not their distances: the next rise must be large beside this one, too."""
        self._keep_distances(0)
        self.means: list[float] = []  # mean log loss of the last blocks, oldest first
        self.levels: list[float] = []  # mean of every ``HELD`` of them in a row
        self.lowest = math.inf  # smallest of ``means``
        self.total, self.count = 0.0, 0  # of the present block
        self.least = math.inf  # smallest log loss of the present block
        self.usual = math.inf  # largest loss that is no rise from ``lowest``
        self.half_way = math.inf  # log loss half-way from ``lowest`` to that
        self.since = 0  # first step above ``half_way`` of the blocks that are above it; 0: none
        self.floor = math.nan  # log of the level from which the loss has risen
        self.height = math.inf  # the loss has risen above this; ∞: it has not risen

    def state_dict(self) -> dict[str, Any]:
        """Return name → value of each attribute. The lists are copies."""
        state = super().state_dict()
        return {name: list(value) if isinstance(value, list) else value for name, value in state.items()}

    def add(self, step: int, log_loss: float, baseline: LossBaseline, limits: Thresholds) -> None:
        """Add a log loss whose smallest differences are left out."""
        self.total += log_loss
        self.count += 1
        if log_loss < self.least:
            self.least = log_loss
        if log_loss > self.half_way and not self.since:
            self.since = step
        if self.count == LENGTH:
            self._end_block(baseline, limits)

    def usual_below(self, baseline: LossBaseline, limits: Thresholds) -> float:
        """Return the loss below which the next loss cannot end a rise.

        This also holds for 50 further losses, if none of them is lower than ``baseline``'s level.
        """
        if self.least >= self.lowest:
            return self.usual
        return self._usual_below(self.least, baseline, limits)

    def _usual_below(self, log_loss: float, baseline: LossBaseline, limits: Thresholds) -> float:
        """Return the largest loss that is no rise from ``log_loss``."""
        lowest, early = math.exp(log_loss), baseline.early
        climb = highest_usual(lowest, limits, baseline.unit)
        return min(climb, early) if lowest < LEARNED * early else climb

    def _end_block(self, baseline: LossBaseline, limits: Thresholds) -> None:
        """Add the mean of the block, and judge it."""
        means, levels, mean = self.means, self.levels, self.total / LENGTH
        means.append(mean)
        if len(means) >= HELD:
            levels.append(sum(means[-HELD:]) / HELD)
            self._add_distances(mean, levels)
        del means[: -KEPT - HELD + 1], levels[:-KEPT]
        self.lowest, self.least = min(means), math.inf
        self.total, self.count, self.height = 0.0, 0, math.inf
        self.usual = self._usual_below(self.lowest, baseline, limits)
        self.half_way = 0.5 * (self.lowest + math.log(self.usual))
        if mean <= self.half_way:
            self.since = 0
            return
        if len(levels) <= 2:
            return
        now, floor = min(means[-2:]), min(levels[:-2])
        height = _climb(floor, baseline, limits)
        lower = sum(before < now for before in means[-2 - JUST : -2]) >= LOWER * JUST
        if lower and now > height and now - floor > self._far(0, 2, limits):
            self.floor, self.height = floor, math.exp(height)
            return
        if len(levels) <= STAYS:
            return
        now, floor, early = min(levels[-1:-STAYS:-HELD]), min(levels[:-STAYS]), math.log(baseline.early)
        if early < now and floor < early + math.log(LEARNED) and now - floor > self._far(1, STAYS, limits):
            self.floor, self.height = floor, baseline.early

    def _add_distances(self, mean: float, levels: list[float]) -> None:
        """Note how far the last block and the last level are above the lowest level."""
        lowest = min(levels)
        self.recent.append([max(mean - lowest, 0.0), levels[-1] - lowest])
        self._keep_distances(STAYS)

    def _keep_distances(self, newest: int) -> None:
        """Add the distances except the ``newest`` to the usual ones."""
        while len(self.recent) > newest:
            of_mean, of_level = self.recent.pop(0)
            self.distances = min(self.distances + 1, MEMORY)
            self.usual_of_means += (of_mean - self.usual_of_means) / self.distances
            self.usual_of_levels += (of_level - self.usual_of_levels) / self.distances

    def _far(self, which: int, newest: int, limits: Thresholds) -> float:
        """Return a distance that is far outside those of means (0) or levels (1), without the ``newest``."""
        recent = [distances[which] for distances in self.recent[:-newest]]
        count = self.distances + len(recent)
        if count < FEWEST:
            return math.inf
        usual = (self.distances * (self.usual_of_means, self.usual_of_levels)[which] + sum(recent)) / count
        return limits.spike_sigmas * (1.0 + UNSURE / count) * max(usual, LEAST)


def _climb(level: float, baseline: LossBaseline, limits: Thresholds) -> float:
    """Return the log loss above which a loss has climbed, where the log loss was at ``level``."""
    return math.log(highest_of_each(math.exp(level), limits, baseline.unit)[0])
