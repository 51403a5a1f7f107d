"""Define a configuration of the zoo: one training, and what is true of it."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from tests.zoo.session import Session

STEPS = 8
"""Optimizer steps of a training, unless its configuration says another number."""


@dataclass(frozen=True)
class Configuration:
    """One training, with the facts that the monitor's findings are held against.

    ``train(session)`` trains and returns the model. It runs twice with the same seeds: without and with a
    monitor. It attaches the monitor through the session, as a user of the library would.
    """

    name: str
    train: Callable[[Session], nn.Module]
    head: str | tuple[str | None, ...] | None
    """Qualified name of the layer that makes the classifier's logits, or several that are right; None if to
    find no head is right, too."""
    classes: bool = True
    """Whether the loss is a loss over classes. Without classes there are no rows to read."""
    logits: bool = True
    """Whether the loss is computed from logits that exist. If not (fused and chunked losses), the rows can
    only be recomputed."""
    shift_invariant: bool = True
    """Whether adding a number to all logits of a row leaves the loss as it is (not so: BCE)."""
    soft: bool = False
    """Whether rows have several correct classes or changing signs (label smoothing, distillation, RL)."""
    scaled: bool = False
    """Whether the logits are scaled between head and loss."""
    changed: bool = False
    """Whether the logits are mixed with others, enlarged, pooled or capped between head and loss."""
    half: bool = False
    """Whether the loss is computed in half precision."""
    tau: float | None = None
    """1/(1 − β2) of the optimizer, where it is known."""
    loss: bool = True
    """Whether the library lets the monitor see the trained loss. If not, its absence must be noted."""
    either: bool = False
    """Whether a step has several losses of which each is right (SAM: at the point and beside it)."""
    true_notes: tuple[str, ...] = ()
    """Codes of further notes that are true of this training."""
    steps: int = STEPS

    @property
    def heads(self) -> tuple[str, ...]:
        """The names of right heads."""
        given = self.head if isinstance(self.head, tuple) else (self.head,)
        return tuple(name for name in given if name is not None)

    @property
    def headless(self) -> bool:
        """Whether finding no head is right."""
        return self.head is None or None in self.head


@dataclass(frozen=True)
class Table:
    """The configurations of one library."""

    library: str
    packages: tuple[str, ...]
    """Names of the distributions whose versions the page shows; the first must be installed."""
    make: Callable[[], list[Configuration]] = field(repr=False)
    """Returns the configurations. Imports the library only when called."""
    reason: str | None = None
    """Why the library cannot be installed here, where that is known."""

    def missing(self) -> str | None:
        """Return why the library cannot be used here; None if it can."""
        if self.reason is not None:
            return self.reason
        for package in self.packages:
            try:
                importlib.metadata.version(package)
            except importlib.metadata.PackageNotFoundError:
                return f"{package} is not installed"
        return None
