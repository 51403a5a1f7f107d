"""Make torchvision importable where its compiled part cannot be loaded (a CUDA build beside a CPU torch).

Its Python part registers a fake kernel for ``torchvision::nms`` and fails if that operator does not exist. No
training of the zoo calls the operator.
"""

from __future__ import annotations

import contextlib

import torch


def declare() -> None:
    """Declare the operator; if the compiled part is there, it is declared already."""
    with contextlib.suppress(ImportError, RuntimeError):
        import torchvision  # noqa: F401

        return
    import sys

    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    for name in ("nms", "qnms"):
        torch.library.define(
            f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        )
