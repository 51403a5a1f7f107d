"""Measure a head that each rank has whole, where the ranks know μ_G late: what it adds to their sums."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from nfi_monitor.capture import devices
from nfi_monitor.measure.late.packing import Late
from nfi_monitor.measure.sharded.step import HEAD_SUMS, HeadParts
from nfi_monitor.measure.zero_sum import accumulation_dtype


def late_head(
    weight: Tensor | None, share: float, widths: tuple[int, int, int], moved_mean: Tensor | None
) -> Late[HeadParts]:
    """Reduce the head's ``weight`` [K, d], as :func:`nfi_monitor.measure.sharded.step.head_parts` does.

    ``share``, ``widths`` and ``moved_mean`` are those of that function.
    """
    parts: dict[str, Tensor] = {}
    if weight is not None:
        dtype = accumulation_dtype(weight.dtype)
        parts = {
            "norm": torch.linalg.vector_norm(weight, dtype=dtype),
            "classifier": weight.sum(0, dtype=dtype),
        }
        if moved_mean is not None:
            logits = (weight @ devices.send(moved_mean, weight.device, weight.dtype)).to(dtype)
            lowest, highest = logits.aminmax()
            parts |= {"moved": logits.sum(), "lowest": lowest, "highest": highest}
    width, columns, rows = widths

    def finish(on: Mapping[str, Tensor]) -> HeadParts:
        sums = dict.fromkeys(HEAD_SUMS, 0.0)
        extremes = torch.full((2, rows + 1), -torch.inf, dtype=torch.float64, device="cpu")
        classifier = torch.zeros(width, dtype=torch.float64, device="cpu")
        if "norm" in on:
            sums |= {"weight_ranks": 1.0, "squares": float(on["norm"].double().square()) * share}
            classifier = on["classifier"].double() * share
        if "moved" in on:
            sums |= {"moved_ranks": 1.0, "moved": float(on["moved"]) * share}
            extremes[:, rows] = torch.stack([on["highest"], -on["lowest"]])
        packed = torch.tensor([sums[name] for name in HEAD_SUMS], dtype=torch.float64, device="cpu")
        nothing = torch.zeros(columns, dtype=torch.float64, device="cpu")
        return HeadParts(packed, classifier, nothing, nothing.new_zeros(2, rows), extremes)

    return Late("optimizer", parts, finish)
