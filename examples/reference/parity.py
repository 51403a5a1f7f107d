"""Test k-sparse parity, where hinge loss and cross-entropy slingshot for different reasons (W. Wu 2024).

The input is 40 random bits; the label is the parity of 3 of them. The network has one hidden ReLU layer of
width 128, trained by AdamW at lr 1e-2 with torch's other defaults. Under hinge loss the gradient vanishes,
and the second moment decays towards zero. Weight decay then pulls the outputs back below the margin. The
gradient returns, and Adam divides it by the decayed second moment: the step is too large. Precision plays no
part. Under cross-entropy the cause is rounding.

    python -m examples.reference.parity
    python -m examples.reference.parity --preset paper --jobs 16       # 100 runs of each loss
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: import from the root of the checkout
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.reference import parity_claims as claims
from examples.reference.local_learning import Sampler, calibration
from examples.reference.parity_after import Task, after
from examples.reference.slingshot_log import SlingshotLog
from examples.reference.study import Plan, Preset, Study, Variant, command
from examples.reference.training import Training
from nfi_monitor import Monitor


def parity(rows: int, bits: int, relevant: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return ``(bits [rows, bits] as 0.0/1.0, XOR of the first ``relevant`` [rows])``.

    The choice of the relevant bits makes no difference.
    """
    values = torch.randint(0, 2, (rows, bits), generator=generator)
    return values.float(), values[:, :relevant].sum(1) % 2


def hinge(output: Tensor, label: Tensor) -> Tensor:
    """Return max(0, 1 − y·ŷ) with y = ±1; loss and gradient are exactly 0 past the margin."""
    return F.relu(1 - (2 * label - 1) * output.squeeze(-1)).mean()


class Net(nn.Sequential):
    """Map bits to ``width`` ReLU units, then to 1 or 2 columns."""

    def __init__(self, bits: int, width: int, columns: int) -> None:
        super().__init__()
        self.add_module("hidden", nn.Linear(bits, width))
        self.add_module("relu", nn.ReLU())
        self.add_module("head", nn.Linear(width, columns))


def loss_of(config: Mapping[str, Any], output: Tensor, label: Tensor) -> Tensor:
    if config.get("zero_sum"):
        output.register_hook(lambda grad: grad - grad.mean(-1, keepdim=True))
    if config.get("loss_dtype"):
        output = output.to(getattr(torch, config["loss_dtype"]))
    return hinge(output, label) if config["loss"] == "hinge" else F.cross_entropy(output, label)


def make_optimizer(config: Mapping[str, Any], model: nn.Module) -> torch.optim.Optimizer:
    """Make AdamW; ``weight_decay`` 0 is Adam, because AdamW without decay is the same algorithm."""
    # Fused: the launches of a dozen kernels dominate a step this small.
    return torch.optim.AdamW(
        model.parameters(), lr=config["lr"], betas=(0.9, config["beta2"]),
        weight_decay=config["weight_decay"], fused=True,
    )  # fmt: skip


def build(config: Mapping[str, Any], seed: int, device: torch.device) -> Training:
    generator = torch.Generator().manual_seed(seed)
    sizes = (config["bits"], config["relevant"])
    x, y = (t.to(device) for t in parity(config["rows"], *sizes, generator))
    test_x, test_y = (t.to(device) for t in parity(config["test_rows"], *sizes, generator))
    data = (x, y, test_x)
    model = Net(config["bits"], config["width"], 1 if config["loss"] == "hinge" else 2).to(device)
    if config.get("dtype") == "float64":
        model.double()
        x, test_x = x.double(), test_x.double()
    optimizer = make_optimizer(config, model)
    log = SlingshotLog(model, optimizer, limit=config["kept"])
    every, reset = config.get("reset_every", 0), config.get("reset", "")

    def step(number: int, monitor: Monitor) -> Tensor:
        if every and number % every == 0:
            forget(optimizer, reset)
        loss = loss_of(config, model(x), y)
        monitor.observe_loss(loss)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        log.add(number, float(loss.detach()))
        return loss.detach()

    def test_loss(network: nn.Module) -> Tensor:
        # Float64 from the logits on: near 0 a float32 cross-entropy is as coarse as the values of interest.
        return loss_of({"loss": config["loss"]}, network(test_x).double(), test_y)

    def measure(step: int) -> dict[str, float]:
        return {"test_loss": float(test_loss(model))}

    task = Task(
        loss=lambda network: loss_of(config, network(x), y),
        test_loss=test_loss,
        make_optimizer=partial(make_optimizer, config),
        log=log,
        rows=(x, y),
        lr=config["lr"],
        decay=config["weight_decay"],
        samplers=samplers(config) if "samplers" in config else {},
        jumps=config["jumps"],
    )
    return Training(
        model, optimizer, step, data=data, extras=[log], watch={"head": "head", "every": config["every"]},
        measure=measure, measure_every=10, finish=partial(after, task),
    )  # fmt: skip


def forget(optimizer: torch.optim.Optimizer, what: str) -> None:
    """Reset AdamW: "state" zeroes both moments, "count" only the step count of the bias correction."""
    if what == "state":
        optimizer.state.clear()
        return
    for state in optimizer.state.values():
        state["step"].zero_()


# --- computations without training --------------------------------------------------------------------


def samplers(config: Mapping[str, Any]) -> dict[str, Sampler]:
    """Return the samplers by step and pull, which affect their estimates; the first one is the reference."""
    return {
        f"step {step:g}, pull {pull:g}": Sampler(step=step, pull=pull, **config["chains"])
        for step, pull in config["samplers"]
    }


def calibrate(config: Mapping[str, Any], seed: int, device: torch.device, run_dir: Path) -> dict[str, Any]:
    """Run each sampler on models whose coefficient is known."""
    return {name: calibration(sampler, config["rows"], seed) for name, sampler in samplers(config).items()}


def kick(config: Mapping[str, Any], seed: int, device: torch.device, run_dir: Path) -> dict[str, Any]:
    """Measure torch's AdamW on one weight: a constant gradient after ``silence`` steps without any."""
    found = {}
    for beta2 in (0.999, 0.99):
        weight = nn.Parameter(torch.zeros(1, dtype=torch.float64))
        optimizer = torch.optim.AdamW([weight], lr=1.0, betas=(0.9, beta2), eps=1e-30, weight_decay=0.0)
        weight.grad = torch.zeros_like(weight)
        optimizer.step()
        # Steps with a gradient of 0 leave both moments at 0, so it is enough to set their count.
        optimizer.state[weight]["step"].fill_(config["silence"])
        sizes = []
        for _ in range(config["aligned"]):
            weight.grad = torch.ones_like(weight)
            before = weight.detach().clone()
            optimizer.step()
            sizes.append(float((before - weight.detach()).abs()))
        found[f"{beta2:g}"] = sizes
    return {"kicks": found}


# --- the arms ------------------------------------------------------------------------------------------

HINGE, CE = {"loss": "hinge"}, {"loss": "cross_entropy"}
ARMS = (
    # Keeping states around slingshots does not change the training, so "kept" does not make another arm.
    Variant("hinge-float32", "hinge loss, AdamW, float32", "hinge", {"kept": 4}),
    Variant("hinge-float64-model", "parameters and loss in float64", "hinge", {"dtype": "float64"}),
    Variant("hinge-float64-loss", "float64 from the output to the loss", "hinge", {"loss_dtype": "float64"}),
    Variant("hinge-adam", "Adam without decay", "hinge", {"weight_decay": 0.0}),
    Variant("hinge-beta2-.99", "β = (.9, .99)", "hinge", {"beta2": 0.99}),
    Variant("hinge-reset-state", "AdamW's state forgotten every 500 steps", "hinge",
        {"reset_every": 500, "reset": "state"}),
    Variant("hinge-reset-count", "AdamW's step count set to 0 every 500 steps", "hinge",
        {"reset_every": 500, "reset": "count"}),
    Variant("ce-float32", "cross-entropy, AdamW, float32", "ce", {"kept": 1}),
    Variant("ce-float64-model", "parameters and loss in float64", "ce", {"dtype": "float64"}),
    Variant("ce-float64-loss", "float64 from the logits to the loss", "ce", {"loss_dtype": "float64"}),
    Variant("ce-zero-sum", "logit gradient minus its mean over classes", "ce", {"zero_sum": True}),
    Variant("ce-adam", "Adam without decay", "ce", {"weight_decay": 0.0}),
    Variant("calibration", "local learning coefficients known in closed form", compute=calibrate),
    Variant("kick", "AdamW on one weight after a long silence", compute=kick),
)  # fmt: skip

_WU = {"bits": 40, "relevant": 3, "rows": 1_000, "test_rows": 2_000, "width": 128, "lr": 1e-2, "beta2": 0.999,
       "weight_decay": 1e-2, "kept": 0, "jumps": 4, "every": "auto"}  # fmt: skip
# The steps are the longest stable ones. The pulls go from almost no confinement to one that hides flat
# directions.
_SAMPLERS = {"samplers": [[0.03, 1.0], [0.003, 1.0], [0.03, 100.0], [0.01, 1_000.0]]}
_SHORT = {**_SAMPLERS, "chains": {"draws": 120, "burn_in": 60, "chains": 2}}
_CHAINS = {**_SAMPLERS, "chains": {"draws": 600, "burn_in": 300, "chains": 4}}
_LONG_CHAINS = {**_SAMPLERS, "chains": {"draws": 2_000, "burn_in": 1_000, "chains": 4}}
_SEEDS = tuple(range(100))
_QUICK, _REST, _LONG = 3_600, 3_000, 17_600
PRESETS = (
    Preset(
        "quick",
        {
            "hinge": {**_WU, **HINGE},
            "ce": {**_WU, **CE, "every": 10, **_SHORT},
            "calibration": {**_CHAINS, "rows": 1_000},
            "kick": {"silence": 1_000_000, "aligned": 30},
        },
        {
            "hinge-float32": Plan(_QUICK, (0, 1, 2)),
            "hinge-float64-model": Plan(_REST, (0,)),
            "hinge-float64-loss": Plan(_REST, (0,)),
            "hinge-adam": Plan(_REST, (0,)),
            "hinge-beta2-.99": Plan(_REST, (0,)),
            "hinge-reset-state": Plan(_REST, (0,)),
            "hinge-reset-count": Plan(_REST, (0,)),
            "ce-float32": Plan(_LONG, (0,)),
            "ce-float64-loss": Plan(_LONG, (0,)),
            "ce-zero-sum": Plan(_LONG, (0,)),
            "calibration": Plan(0, (0,)),
            "kick": Plan(0, (0,)),
        },
    ),
    Preset(
        "paper",
        {
            "hinge": {**_WU, **HINGE, "test_rows": 10_000},
            "ce": {**_WU, **CE, "every": 10, "test_rows": 10_000, **_LONG_CHAINS},
            "calibration": {**_LONG_CHAINS, "rows": 1_000},
            "kick": {"silence": 1_000_000, "aligned": 30},
        },
        {
            **{arm.name: Plan(25_000, _SEEDS[:20]) for arm in ARMS if arm.compute is None},
            "hinge-float32": Plan(25_000, _SEEDS),
            "ce-float32": Plan(25_000, _SEEDS),
            "calibration": Plan(0, _SEEDS[:10]),
            "kick": Plan(0, (0,)),
        },
    ),
)  # fmt: skip

STUDY = Study(
    "parity", "Sparse parity", build, ARMS, PRESETS, claims.CLAIMS, claims.figure, claims.SERIES, claims.DRAWN
)

if __name__ == "__main__":
    raise SystemExit(command("parity"))
