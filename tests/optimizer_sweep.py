"""Attach to each optimizer class of the installed packages, and compare with the run without a monitor.

    python -m tests.optimizer_sweep                  # torch.optim, and the packages below, where installed
    python -m tests.optimizer_sweep Adam heavyball.  # those with one of these words in their name

Packages: pytorch_optimizer, schedulefree, heavyball, bitsandbytes, prodigyopt, galore-torch.  Each optimizer
trains a small network for 30 steps, every step read.  A run is wrong if something raised, a part of the
monitor is off, a bit differs, a step is missing, RMS_t is not finite, or an alert was raised.  ``rms`` is the
number of steps with RMS_t, and ``off`` its largest relative distance from own averages of the gradients.
Optimizers that this program does not know how to make or drive are listed as such.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import math
import random
import sys
import warnings
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nfi_monitor import Monitor
from tests.runs import batch, mlp

STEPS = 30
PACKAGES = (
    "torch.optim", "schedulefree", "heavyball", "bitsandbytes.optim", "prodigyopt", "galore_torch",
)  # fmt: skip
WRAPPERS = ("Lookahead", "OrthoGrad", "ScheduleFreeWrapper", "PCGrad")
SHARPNESS = ("SAM", "WSAM", "LookSAM", "FriendlySAM")
SECOND_ORDER = ("AdaHessian", "SophiaH")
MATRICES_ONLY = ("Muon", "SpectralSphere")
MUONS = ("Muon", "AdaMuon", "MuonClip", "NorMuon", "AdaGO")


def classes() -> dict[str, Any]:
    """Return package.name → class."""
    found: dict[str, Any] = {}
    for package in PACKAGES:
        with contextlib.suppress(ImportError):
            module = importlib.import_module(package)
            if package == "heavyball":
                module.utils.compile_mode = None
            for name, kind in vars(module).items():
                if inspect.isclass(kind) and issubclass(kind, torch.optim.Optimizer):
                    found[f"{package.split('.')[0]}.{name}"] = kind
    with contextlib.suppress(ImportError):
        package = importlib.import_module("pytorch_optimizer")
        known = {kind.__name__: kind for kind in package.optimizer.OPTIMIZERS.values()}
        known |= {name: getattr(package, name) for name in WRAPPERS + SHARPNESS}
        found |= {f"pytorch_optimizer.{name}": kind for name, kind in known.items()}
    found.pop("torch.Optimizer", None)
    return found


def make(name: str, kind: Any, model: nn.Module) -> Any:
    """Return an optimizer of this class for the model."""
    package, short = name.split(".")
    params = list(model.parameters())
    matrices, vectors = [p for p in params if p.ndim > 1], [p for p in params if p.ndim < 2]
    accepted = inspect.signature(kind).parameters
    options = {
        key: value
        for key, value in {"lr": 1e-3, "num_iterations": 100, "num_data": 100}.items()
        if key in accepted
    }
    if package == "bitsandbytes" and "momentum" in accepted:
        options["momentum"] = 0.9
    if package == "pytorch_optimizer" and short in SHARPNESS:
        first = (model, params) if short == "WSAM" else (params,)
        return kind(*first, torch.optim.AdamW, lr=1e-3)
    if package == "pytorch_optimizer" and short in WRAPPERS:
        return kind(torch.optim.AdamW(params, lr=1e-3))
    if package == "pytorch_optimizer" and short in MUONS:
        return kind(
            [{"params": matrices, "use_muon": True}, {"params": vectors, "use_muon": False}], **options
        )
    if short in MATRICES_ONLY and package in ("torch", "pytorch_optimizer"):
        return kind(matrices, **options)
    if package == "galore_torch":
        low = {"params": matrices, "rank": 4, "update_proj_gap": 10, "scale": 0.25, "proj_type": "std"}
        return kind([{"params": vectors}, low], lr=1e-3)
    return kind(model if short in ("AdamMini", "LOMO", "AdaLOMO") else params, **options)


def train(name: str, kind: Any, watched: bool) -> tuple[list[Tensor], Monitor | None, dict[int, float]]:
    """Return the trained weights, the monitor, and the largest RMS_t of each step by own averages."""
    random.seed(1)
    np.random.seed(1)  # some optimizers draw from it
    model = mlp()
    optimizer = make(name, kind, model)
    if callable(getattr(optimizer, "train", None)):
        optimizer.train()
    monitor = Monitor(model, optimizer, console=False, every=1) if watched else None
    short = name.split(".")[1]
    averages: dict[int, Tensor] = {}
    largest: dict[int, float] = {}
    for step in range(1, STEPS + 1):
        inputs, targets = batch(seed=step % 7)

        def loss_of(inputs: Tensor = inputs, targets: Tensor = targets, back: bool = True) -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(inputs), targets)
            if back:
                loss.backward(create_graph=short in SECOND_ORDER)
            return loss

        if "Closure" in short or short in (*SHARPNESS, "LBFGS"):
            optimizer.step(loss_of)
            continue
        inside = short in ("LOMO", "AdaLOMO")
        loss = loss_of(back=not inside)
        if monitor is not None:
            monitor.observe_loss(loss)
            largest[step] = _largest(monitor, model, averages, step)
        if inside:
            optimizer.fused_backward(loss, 1e-3)
        else:
            optimizer.step()
    return [param.detach().clone() for param in model.parameters()], monitor, largest


def _largest(monitor: Monitor, model: nn.Module, averages: dict[int, Tensor], step: int) -> float:
    largest = 0.0
    for group in monitor.optimizer.param_groups:
        for param in group["params"]:
            betas = group.get("betas")
            if param.grad is None or not betas or len(betas) < 2 or not 0 < float(betas[1]) < 1:
                continue
            beta2, eps = float(betas[1]), group.get("eps", 1e-8)
            average = averages.setdefault(id(param), torch.zeros_like(param, dtype=torch.float64))
            square = param.grad.detach().double().square()
            average.mul_(beta2).add_(square, alpha=1 - beta2)
            floor = eps**2 if isinstance(eps, float) else 1e-16
            ratio = square / (average / (1 - beta2**step)).clamp_min(floor)
            largest = max(largest, ratio.mean().sqrt().item())
    return largest


def compare(name: str, kind: Any) -> tuple[bool, str]:
    """Return whether a monitor is right beside this optimizer, and what was found."""
    try:
        alone = train(name, kind, watched=False)[0]
    except Exception as error:
        return True, f"does not run here: {type(error).__name__}: {str(error)[:80]}"
    try:
        weights, monitor, largest = train(name, kind, watched=True)
    except Exception as error:
        return False, f"RAISED {type(error).__name__}: {error}"
    assert monitor is not None
    # NaN equals NaN: an optimizer may diverge here.
    same = all(torch.equal(x.nan_to_num(), y.nan_to_num()) for x, y in zip(alone, weights, strict=True))
    diverged = any(not x.isfinite().all() for x in alone)
    codes = [note.code for note in monitor.notes]
    failed = any(code.startswith("failed") for code in codes)
    history = monitor.history
    found = dict(zip(*history["rms_t_max"], strict=True)) if "rms_t_max" in history else {}
    finite = diverged or all(math.isfinite(value) for value in found.values())
    off = max((abs(found[at] / largest[at] - 1) for at in found if largest.get(at)), default=math.nan)
    counted = monitor.step == STEPS or "no_steps" in codes
    right = same and not failed and finite and counted and (diverged or not monitor.alerts)
    result = (
        f"bits {'equal' if same else 'DIFFER'}  steps {monitor.step}  τ {monitor.tau:.0f}  rms {len(found)}  "
        f"off {off:.1g}  alerts {len(monitor.alerts)}  {' '.join(codes)}"
    )
    monitor.close()
    return right, result


def main(words: list[str]) -> int:
    """Print a line for each optimizer; return the number of wrong ones."""
    wrong = 0
    warnings.simplefilter("ignore")
    for name, kind in sorted(classes().items()):
        if words and not any(word in name for word in words):
            continue
        with contextlib.redirect_stdout(io.StringIO()):  # some optimizers print
            right, result = compare(name, kind)
        wrong += not right
        print(f"{'' if right else 'WRONG '}{name}: {result}", flush=True)
    print(f"{wrong} wrong")
    return wrong


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]) > 0)
