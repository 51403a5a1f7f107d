"""Judge the claims of W. Wu (2024) and Liu et al. (2026) about sparse parity."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np

from examples.reference.figures import loss_figure
from examples.reference.judge import (
    Claim,
    Estimate,
    Judgement,
    agrees_if,
    announced,
    compared,
    decided,
    grouped_median,
    number,
    quiet,
    share,
    spiking,
    stays,
    without,
)
from examples.reference.results import NotTested, Result, Results
from nfi_monitor.types import Thresholds

SERIES = ("loss", "test_loss", "weight_norm", "zero_sum_violation", "rms_t_max")
DRAWN = ("hinge-float32", "hinge-float64-model", "ce-float32", "ce-float64-loss")


def figure(results: Results, path: Path) -> None:
    rows = [
        ("hinge loss", ["hinge-float32", "hinge-float64-model"]),
        ("cross-entropy", ["ce-float32", "ce-float64-loss"]),
    ]
    loss_figure(results, path, "Sparse parity", rows, ("loss", "test_loss", "weight_norm", "rms_t_max"))


def smaller(results: Results) -> Judgement:
    """Compare the peaks of the loss with β2 .99 and with .999."""
    runs, base = results["hinge-beta2-.99"], results["hinge-float32"]
    typical = float(np.median([peak for run in base for *_, peak in run.episodes] or [math.nan]))
    if math.isnan(typical):
        raise NotTested("no slingshot to compare with")
    estimate = grouped_median([[peak / typical for *_, peak in run.episodes] for run in runs])
    return decided(estimate, "below", 1.0, "times the peak at β2 = .999")


def reset(what: str) -> Callable[[Results], Judgement]:
    """Divide the highest loss after a reset 20 steps before by the highest loss without a reset."""

    def judge(results: Results) -> Judgement:
        runs = results["hinge-float32"]
        peaks = [[item["peaks"] for item in run.values["kept"]] for run in runs]
        estimate = grouped_median([[p[what] / p["as_it_was"] for p in group] for group in peaks])
        left = sum(p[what] > Thresholds.spike_high for group in peaks for p in group)
        return decided(estimate, "below", 1.0, "times the peak", f"{left} still exceed 0.1")

    return judge


def falls(arm: str) -> Callable[[Results], Judgement]:
    """Compare log ratios of test loss across slingshots with those of quiet stretches.

    The estimate is the difference, nested by run, with the p-value of Mood's test.
    """

    def judge(results: Results) -> Judgement:
        runs = [run for run in results[arm] if run.values["intervals"]["slingshot"]]
        inside = [run.values["intervals"]["slingshot"] for run in runs]
        outside = [x for run in runs for x in run.values["intervals"]["quiet"]]
        if not inside or not outside:
            raise NotTested("no slingshot to compare")
        typical = float(np.median(outside))
        estimate = grouped_median([[x - typical for x in group] for group in inside])
        note = f"quiet stretches {number(typical)}; {_mood([x for group in inside for x in group], outside)}"
        return decided(estimate, "below", 0.0, "log ratio", note)

    return judge


def _mood(one: list[float], other: list[float]) -> str:
    try:
        from scipy.stats import median_test
    except ImportError as error:
        raise NotTested('Mood\'s median test needs scipy: pip install "nfi-monitor[examples]"') from error
    try:
        return f"Mood's median test p = {median_test(one, other).pvalue:.2g}"
    except ValueError:  # all values on one side of the grand median
        return "Mood's median test undefined"


def jumps(kind: str) -> Callable[[Results], Judgement]:
    """Compare log ratios of test loss: a slingshot's less the median of random jumps from its start.

    The jumps have the slingshot's size.
    """

    def judge(results: Results) -> Judgement:
        groups, lost = [], 0
        for run in results["hinge-float32"]:
            kept = [item for item in run.values["kept"] if item[f"jump_{kind}"]]
            lost += sum(item[f"jump_{kind}_lost"] for item in run.values["kept"])
            groups.append([_ratio(item) - float(np.median(item[f"jump_{kind}"])) for item in kept])
        note = f"{lost} jumps never came back below 1e-2" if lost else ""
        return decided(grouped_median(groups), "below", 0.0, "log ratio against jumps", note)

    return judge


def _ratio(item: dict[str, float]) -> float:
    tiny = 1e-300
    return math.log(max(item["test_after"], tiny) / max(item["test_before"], tiny))


def outward(results: Results) -> Judgement:
    items = _kept(results, "hinge-float32")
    grown = sum(item["norm_ratio"] > 1 for item in items)
    typical = float(np.median([item["norm_ratio"] for item in items]))
    estimate = share(grown, len(items))
    return agrees_if(estimate.low > 0.5, estimate, "slingshots end farther out", f"norm × {number(typical)}")


def simpler(results: Results) -> Judgement:
    """Judge the log ratio of λ̂, after over before, by each sampler with possible estimates.

    No coefficient exceeds half of the number of weights (Watanabe 2009). A sampler with an estimate
    outside (0, that limit) has left the neighbourhood and does not count. The claim is
    decided only if all the others agree.
    """
    runs = [run for run in results["ce-float32"] if run.values["kept"]]
    if not runs:
        raise NotTested("no finished slingshot")
    limit = _weights(runs[0]) / 2
    found: dict[str, Estimate] = {}
    for name in runs[0].values["kept"][0]["coefficients"]:
        groups = [[item["coefficients"][name] for item in run.values["kept"]] for run in runs]
        if all(0 < value < limit for group in groups for pair in group for value in pair):
            found[name] = grouped_median([[math.log(b / a) for a, b in group] for group in groups])
    if not found:
        raise NotTested(f"every sampler leaves the neighbourhood: λ̂ not in (0, {limit:,.0f})")
    low, high = min(e.low for e in found.values()), max(e.high for e in found.values())
    each = "; ".join(f"{number(estimate.value)} with {name}" for name, estimate in found.items())
    n = min(estimate.n for estimate in found.values())
    interval = f"{number(low)} to {number(high)} over {len(found)} samplers"
    return decided(Estimate(0, low, high, n, f"log ratio of λ̂ {each}", interval), "below", 0.0)


def _weights(run: Result) -> int:
    """Return the number of weights of the network: both layers with their biases."""
    config = run.config
    columns = 1 if config["loss"] == "hinge" else 2
    return int(config["width"] * (config["bits"] + 1) + columns * (config["width"] + 1))


def _kept(results: Results, arm: str) -> list[dict[str, float]]:
    items = [item for run in results[arm] for item in run.values["kept"]]
    if not items:
        raise NotTested(f"no finished slingshot of {arm}")
    return items


def calibrated(results: Results) -> Judgement:
    """Return the worst relative error of the first sampler; the interval is that of all samplers."""
    runs = results["calibration"]
    errors = {
        name: max(abs(item["estimate"] / item["known"] - 1) for run in runs for item in run.values[name])
        for name in runs[0].values
    }
    name, worst = next(iter(errors.items()))
    models = len(runs[0].values[name])
    low, high = min(errors.values()), max(errors.values())
    interval = f"{low:.0%} to {high:.0%} over {len(errors)} samplers"
    estimate = Estimate(worst, low, high, models, f"{worst:.0%}", interval)
    return agrees_if(worst < 0.2, estimate, f"off at worst, {models} models", name)


def first_kick(results: Results) -> Judgement:
    kicks = results["kick"][0].values["kicks"]
    off = max(abs(kicks[b][0] / (0.1 / math.sqrt(1 - float(b))) - 1) for b in kicks)
    ours = " and ".join(f"{number(sizes[0])} lr at β2 = {b}" for b, sizes in kicks.items())
    return agrees_if(
        off < 1e-2, Estimate(kicks["0.999"][0], 0, 0, 1, ours, f"within {off:.0e} of the formula")
    )


def aligned(results: Results) -> Judgement:
    """Fit the exponent of the kick's size over the aligned steps; local slopes give the interval."""
    sizes = np.array(results["kick"][0].values["kicks"]["0.999"][:10])
    steps = np.arange(1, len(sizes) + 1)
    local = np.diff(np.log(sizes)) / np.diff(np.log(steps))
    slope = float(np.polyfit(np.log(steps), np.log(sizes), 1)[0])
    interval = f"local {number(local.min())} to {number(local.max())}"
    ours = f"n^{number(slope)} over {len(sizes)} steps, × {number(sizes[-1] / sizes[0])}"
    estimate = Estimate(slope, local.min(), local.max(), len(sizes), ours, interval)
    return agrees_if(local.min() <= 0.5 <= local.max(), estimate, note="the first moment saturates as well")


def kick_in_training(results: Results) -> Judgement:
    groups = [[item["kick"] for item in run.values["kept"]] for run in results["hinge-float32"]]
    quiet_size = float(np.median([item["kick_quiet"] for item in _kept(results, "hinge-float32")]))
    estimate = grouped_median(groups, " lr")
    return decided(estimate, "above", 1.0, "a coordinate (99% quantile)", f"{number(quiet_size)} lr before")


def named(arm: str, mechanism: str) -> Callable[[Results], Judgement]:
    """Return the share of slingshots for which the monitor names this mechanism."""

    def judge(results: Results) -> Judgement:
        every = [s for run in results[arm] for s in run.slingshots]
        hit = sum(s["mechanism"] == mechanism for s in every)
        estimate = share(hit, len(every))
        return agrees_if(hit == len(every), estimate, f"named {mechanism.replace('_', ' ')}")

    return judge


_WU, _LIU, _OURS = "Wu 2024", "Liu et al. 2026", "nfi-monitor"
CLAIMS = (
    Claim("Hinge loss slingshots with AdamW", f"{_WU}, 2.1", spiking("hinge-float32")),
    Claim("Cross-entropy slingshots with AdamW", f"{_WU}, 2.2", spiking("ce-float32")),
    Claim("Hinge loss does not slingshot with Adam without decay", f"{_WU}, 2.1", quiet("hinge-adam")),
    Claim("Cross-entropy does not slingshot with Adam without decay", f"{_WU}, 2.1", quiet("ce-adam")),
    Claim("β = (.9, .99): slingshots are more frequent", f"{_WU}, note 3",
          compared("hinge-beta2-.99", "hinge-float32", more=True)),
    Claim("β = (.9, .99): slingshots are smaller", f"{_WU}, note 3", smaller),
    Claim("Hinge slingshots need no rounding: they are there in float64", f"{_WU}, 2.1",
          stays("hinge-float64-model", "hinge-float32")),
    Claim("… and with the loss alone in float64", f"{_WU}, 2.1",
          stays("hinge-float64-loss", "hinge-float32")),
    Claim("A float64 model removes the slingshots of cross-entropy", f"{_LIU}, abstract",
          without("ce-float64-model", "ce-float32")),
    Claim("Float64 from the logits to the loss removes them", f"{_LIU}, abstract",
          without("ce-float64-loss", "ce-float32")),
    Claim("Projecting the logit gradient to zero sum removes them", f"{_LIU}, section 3",
          without("ce-zero-sum", "ce-float32")),
    Claim("Resetting AdamW's state 20 steps before lowers a hinge slingshot", f"{_WU}, 2.3", reset("state")),
    Claim("Resetting its step count alone does", f"{_WU}, 2.3", reset("count")),
    Claim("Forgetting its state every 500 steps makes them rarer", f"{_WU}, 2.3",
          compared("hinge-reset-state", "hinge-float32", more=False)),
    Claim("Setting its step count to 0 every 500 steps makes them rarer", f"{_WU}, 2.3",
          compared("hinge-reset-count", "hinge-float32", more=False)),
    Claim("Hinge: test loss falls across slingshots, more than in stretches without", f"{_WU}, 3.1",
          falls("hinge-float32")),
    Claim("Cross-entropy: the same", f"{_WU}, 3.1", falls("ce-float32")),
    Claim("Test loss falls more than after random jumps of the same size", f"{_WU}, 3.2", jumps("global")),
    Claim("… and of the same size in each tensor", f"{_WU}, 3.2", jumps("layers")),
    Claim("A slingshot leads outward: the weight norm grows", f"{_WU}, 2.1", outward),
    Claim("The sampler finds local learning coefficients that are known", "Aoyagi and Watanabe 2005",
          calibrated),
    Claim("Cross-entropy: the local learning coefficient falls across a slingshot", f"{_WU}, 3.3", simpler),
    Claim("After a silence the first kick is (1−β1)/√(1−β2) times lr", f"{_WU}, 2.1", first_kick),
    Claim("With aligned gradients it grows as the square root of the steps", f"{_WU}, 2.1", aligned),
    Claim("In training, kicks on the way out exceed lr", f"{_WU}, 2.1", kick_in_training),
    Claim("Each hinge slingshot is announced before it starts", _OURS, announced("hinge-float32")),
    Claim("Each cross-entropy slingshot is announced before it starts", _OURS, announced("ce-float32")),
    Claim("Hinge slingshots are named second moment", _OURS, named("hinge-float32", "second_moment")),
    Claim("Cross-entropy slingshots are named numerical feature inflation", _OURS,
          named("ce-float32", "numerical_feature_inflation")),
)  # fmt: skip
