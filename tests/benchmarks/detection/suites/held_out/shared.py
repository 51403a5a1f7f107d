"""What the set-ups of the first held-out half share besides: losses of the output, rows."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.benchmarks.detection.suites.common import each_place, generators, of_output

cross_entropy = of_output(F.cross_entropy)
everywhere = of_output(each_place)
squares = of_output(F.mse_loss)
"""Mean squared error."""


def pinball(*quantiles: float) -> Callable[[Tensor, Tensor], Tensor]:
    """Quantile loss (Koenker and Bassett 1978); the last dimension of the output is the quantiles."""
    levels = torch.tensor(quantiles)

    def function(z: Tensor, y: Tensor) -> Tensor:
        missing = y[..., None] - z
        return torch.maximum(levels * missing, (levels - 1) * missing).mean()

    return function


# --- rows ---------------------------------------------------------------------------------------


generator_of = generators(7_919)


@cache
def code() -> Tensor:
    """Source text of some modules of the standard library, as bytes below 128."""
    import argparse
    import statistics
    import textwrap

    texts = "\n".join(inspect.getsource(module) for module in (argparse, statistics, textwrap))
    return torch.tensor([byte for byte in texts.encode("ascii", "ignore")])


def code_windows(rows: int, length: int, seed: int) -> Tensor:
    starts = torch.randint(0, len(code()) - length, (rows,), generator=generator_of(seed, 0))
    return code()[starts[:, None] + torch.arange(length)]


# --- averages ---------------------------------------------------------------------------------------


def moving_average(model: nn.Module, share: float = 0.999) -> Callable[[Any, int], None]:
    """Return what keeps an exponential moving average of the weights after every step."""
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(share)
    )
    return lambda training, number: average.update_parameters(training.model)
