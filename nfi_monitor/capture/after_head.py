"""Scale and cap logits as some models do between their head and their loss."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class AfterHead(NamedTuple):
    """What happens between head and loss to z: ``cap``·tanh(``scale``·z/``cap``); no cap: ``scale``·z."""

    scale: float = 1.0
    cap: float | None = None

    def divided(self, temperature: float) -> AfterHead:
        """Return the same, with the result divided by ``temperature``."""
        cap = None if self.cap is None else self.cap / temperature
        return AfterHead(self.scale / temperature, cap)

    def logits(self, output: Tensor) -> Tensor:
        """Return the logits of the loss, of the head's output [n, K]."""
        if self == AfterHead():
            return output
        scaled = output.to(torch.float64 if output.dtype is torch.float64 else torch.float32) * self.scale
        return scaled if self.cap is None else self.cap * torch.tanh(scaled / self.cap)

    def chain(self, grad: Tensor, logits: Tensor) -> Tensor:
        """Return the gradient at the head's output, of the gradient at the logits, [n, K] each."""
        if self.cap is not None:
            grad = grad * (1 - (logits / self.cap).square())
        return grad if self.scale == 1.0 else grad * self.scale


def of_config(config: Any) -> AfterHead:
    """Return what the model does to the head's output, by the names that HuggingFace's configurations use."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    scale = 1.0
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        found = getattr(text, name, None)
        if isinstance(found, float):
            scale = found
    divisor = getattr(text, "logits_scaling", None)
    if isinstance(divisor, (int, float)) and divisor:
        multiplied = getattr(text, "model_type", "") == "hyperclovax"
        scale = float(divisor) if multiplied else 1 / divisor
    return AfterHead(scale, getattr(text, "final_logit_softcapping", None))
