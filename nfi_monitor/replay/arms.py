"""List the arms of a replay: each removes one possible cause of a slingshot and changes nothing else."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from nfi_monitor.capture.sampling import local
from nfi_monitor.replay.arm import Arm, ArmContext
from nfi_monitor.replay.loss_arms import float64_loss, zero_sum
from nfi_monitor.replay.optimizer_arms import (
    larger_eps,
    lr_held,
    second_moment_held,
    second_moment_reset,
    smaller_lr,
)
from nfi_monitor.replay.verdict import BASELINE


@contextmanager
def _other_data(context: ArmContext) -> Iterator[None]:
    start, back = context.snapshot.step, context.steps

    def earlier(step: int) -> int:
        return (step - back - 1) % max(start, 1) + 1  # early in a run: the data of its first steps

    context.data_step = earlier
    # step_fn may draw its batches from the random state, so change that, too. The replay restores it.
    torch.manual_seed(0x5EED + start)
    random.seed(0x5EED + start)
    np.random.seed((0x5EED + start) % (1 << 32))
    yield


NUDGE = 2.0**-20
"""Relative change of the weights: a few ulp of float32, far less than any optimizer step."""


@contextmanager
def _nudged(context: ArmContext) -> Iterator[None]:
    with torch.no_grad():
        for param in context.model.parameters():
            if param.is_floating_point():
                values = local(param)
                # Alternate up and down, so that the mean of the weights stays and no random number is needed.
                signs = torch.arange(values.numel(), device=values.device).remainder_(2).mul_(2).sub_(1)
                values.add_(values * (NUDGE * signs.reshape(values.shape).to(values.dtype)))
    yield


AS_IT_WAS = Arm(BASELINE, "nothing changed", lambda context: contextlib.nullcontext())
NUDGED = Arm("nudged", "the weights moved by a part in a million: the control for the other arms", _nudged)
FLOAT64_LOSS = Arm("float64_loss", "the loss in float64, parameters as they are", float64_loss)
ZERO_SUM = Arm("zero_sum", "the logits' gradient projected to sum to zero over the classes", zero_sum)
LARGER_EPS = larger_eps()
SECOND_MOMENT_RESET = Arm(
    "second_moment_reset", "the optimizer's state as at a fresh start", second_moment_reset
)
SECOND_MOMENT_HELD = Arm(
    "second_moment_held",
    "exp_avg_sq set to its value before it decayed, and kept from decaying",
    second_moment_held,
    may_sag=True,
)
SMALLER_LR = smaller_lr()
LR_HELD = Arm("lr_held", "the learning rate held at that of the snapshot", lr_held)
OTHER_DATA = Arm("other_data", "the batches of earlier steps, other random numbers", _other_data)

ARMS = (
    AS_IT_WAS, NUDGED, FLOAT64_LOSS, ZERO_SUM, LR_HELD, OTHER_DATA, SECOND_MOMENT_HELD, SMALLER_LR,
    LARGER_EPS, SECOND_MOMENT_RESET,
)  # fmt: skip
"""The default arms. The last two are only reported: they never decide the verdict."""
