"""The first line of an alert's advice as actions on a training.

The line is read, not guessed: the functions of ``nfi_monitor.remedies`` or ``torch.nn.utils`` that it names,
with the numbers that stand in their brackets.  What one line names is done together.
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass, replace
from typing import Any

import torch

from nfi_monitor import remedies
from nfi_monitor.capture.head import find_head
from tests.benchmarks.detection.training import Training
from tests.benchmarks.remedies.matrix import exchange_loss

_CALL = re.compile(
    r"\b(?:nfi_monitor\.remedies|torch\.nn\.utils)\.(?:experimental\.)?(\w+)\(([^()]*(?:\(\))?[^()]*)\)"
)
_FLOAT64 = re.compile(r"\.double\(\)")
FLOAT32 = "logits.float()"
LOSSES = ("zero_sum_cross_entropy", "float64_cross_entropy")


@dataclass(frozen=True)
class Action:
    """A remedy's name and the arguments that are plain values."""

    name: str
    arguments: tuple[Any, ...] = ()

    def __str__(self) -> str:
        return f"{self.name}({', '.join(map(repr, self.arguments))})"

    def apply(self, training: Training) -> None:
        """Switch it on, from the next optimizer step on. Raises KeyError if it is not known here."""
        if self.name in LOSSES:
            if FLOAT32 in self.arguments:  # computed in float32 again
                training.arm = replace(training.arm, loss_dtype=None)
            exchange_loss(training, getattr(remedies, self.name))
        elif self.name in ("cool_down", "raise_epsilon"):
            getattr(remedies, self.name)(training.optimizer, *self.arguments)
        elif self.name == "project_zero_sum":
            remedies.project_zero_sum(find_head(training.model, training.watch.get("head")).module)
        elif self.name == "clip_grad_norm_":
            _clip(training, *self.arguments)
        else:
            raise KeyError(self.name)

    @property
    def known(self) -> bool:
        return self.name in (*LOSSES, "cool_down", "raise_epsilon", "project_zero_sum", "clip_grad_norm_")


def first_actions(advice: tuple[str, ...]) -> tuple[Action, ...]:
    """What the first line says to do; empty where it names no function that is known here."""
    if not advice:
        return ()
    named = (Action(found[1], _plain(found[2])) for found in _CALL.finditer(advice[0]))
    known = tuple(action for action in named if action.known)
    if known or not _FLOAT64.search(advice[0]):
        return known
    return (Action("float64_cross_entropy"),)


def in_words(actions: tuple[Action, ...]) -> str:
    return " + ".join(map(str, actions))


def _plain(arguments: str) -> tuple[Any, ...]:
    """The arguments that are literals: ``optimizer, 0.1, None`` → (0.1, None); and FLOAT32."""
    values: list[Any] = [FLOAT32] if FLOAT32 in arguments else []
    for text in arguments.split(","):
        try:
            values.append(ast.literal_eval(text.rpartition("=")[2].strip()))
        except (ValueError, SyntaxError):
            continue
    return tuple(values)


def _clip(training: Training, most: float = 1.0, *_: Any) -> None:
    def clip(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        torch.nn.utils.clip_grad_norm_(parameters, most)

    training.optimizer.register_step_pre_hook(clip)
