"""Judge the claims of Liu et al. (2026) about modular division; define the values stored of a run for it."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from examples.reference.figures import COLOURS, GREY, INK, LABELS, curve, first, save, sheet
from examples.reference.intervals import intervals
from examples.reference.judge import (
    Claim,
    Judgement,
    agrees_if,
    announced,
    compared,
    decided,
    grouped_median,
    median,
    number,
    quantiles,
    quiet,
    share,
    spiking,
    stays,
    without,
)
from examples.reference.results import NotTested, Result, Results, episodes
from nfi_monitor.types import AlertKind

if TYPE_CHECKING:
    from examples.reference.training import Record
    from examples.reference.update_log import UpdateLog

SERIES = ("loss", "zero_sum_violation", "residual_mass", "feature_mean_norm")
DRAWN = (
    "mlp-float32",
    "mlp-float64-loss",
    "mlp-layernorm",
    "mlp-label-smoothing",
    "transformer-float32",
    "transformer-float64-loss",
)
BIMODAL = 5 / 9
"""Sarle's coefficient of a uniform distribution: above it a distribution is called bimodal."""


# --- values stored of a run ----------------------------------------------------------------------------


def remembered(record: Record, log: UpdateLog | None) -> dict[str, Any]:
    steps, accuracy = record.series["test_accuracy"]
    grid = int(steps[1] - steps[0]) if len(steps) > 1 else 1
    closed = [(start, end) for start, end, _ in episodes(record.loss) if end is not None]
    accuracy_steps = intervals(
        record.loss, closed, grid, lambda a, b: float(accuracy[b] - accuracy[a]), record.seed
    )
    return {
        "final_test_accuracy": float(accuracy[-1]),
        "accuracy_steps": accuracy_steps,
        "approach": approach(record),
        "updates": [] if log is None else log.histograms(),
    }


def approach(record: Record) -> dict[str, Any]:
    """Measure the steps from the first *at risk* alert to just before the first slingshot, or to the end.

    ``growth``: growth of ‖μ_G‖ per step, on the grid of the study's measurements. It is given as measured, by
    the plain theory ln(1 + lr·ε/√K), and with Adam's effective rates and the features' own norm.
    ``alignment``: last cos(W_G, μ_G). ``epsilon`` and ``feature_mean``: first and last value.
    """
    at_risk = [a.first_step for a in record.monitor.alerts if a.kind is AlertKind.AT_RISK]  # type: ignore[union-attr]
    spikes = [start for start, _, _ in episodes(record.loss)]
    end = (spikes[0] if spikes else record.steps + 1) - 5  # the last 5 steps already belong to the slingshot
    found: dict[str, Any] = {"growth": {"measured": [], "plain": [], "corrected": []}}
    if not at_risk or at_risk[0] >= end:
        return found
    begin = at_risk[0]
    found |= {"from": begin, "to": end}
    for key, name in (("epsilon", "residual_mass"), ("feature_mean", "feature_mean_norm")):
        steps, values = record.history[name]
        inside = values[(steps >= begin) & (steps <= end)]
        if len(inside):
            found[key] = [float(inside[0]), float(inside[-1])]
    steps, values = record.history["mean_alignment"]
    if len(inside := values[(steps >= begin) & (steps <= end)]):
        found["alignment"] = float(inside[-1])
    if "below_norm" in record.measured:
        found["growth"] = _growth(record, begin, end)
    return found


def _growth(record: Record, begin: int, end: int) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {"measured": [], "plain": [], "corrected": []}
    classes = record.training.model.head.out_features  # type: ignore[union-attr]
    rates = {name: dict(zip(*map(np.ndarray.tolist, record.column(name)), strict=True))
             for name in ("below_norm", "head_rate", "hidden_rate") if name in record.measured}  # fmt: skip
    mu, epsilon, lr = (_by_step(record, n) for n in ("feature_mean_norm", "residual_mass", "learning_rate"))
    every = record.training.measure_every
    for step in sorted(rates.get("hidden_rate", {})):
        if not (begin <= step and step + every <= end):
            continue
        if not all(
            at in known for known, at in ((mu, step), (mu, step + every), (epsilon, step), (lr, step))
        ):
            continue
        a, b = rates["head_rate"][step], rates["hidden_rate"][step]
        plain = lr[step] * epsilon[step] / math.sqrt(classes)
        corrected = math.sqrt(a * b) * epsilon[step] * rates["below_norm"][step] / math.sqrt(classes)
        found["measured"].append(math.log(mu[step + every] / mu[step]) / every)
        found["plain"].append(math.log1p(plain))
        found["corrected"].append(math.log1p(corrected))
    return found


def _by_step(record: Record, name: str) -> dict[int, float]:
    steps, values = record.history[name]
    return dict(zip(steps.tolist(), values.tolist(), strict=True))


# --- verdicts ------------------------------------------------------------------------------------------


def later(arm: str, than: str) -> Callable[[Results], Judgement]:
    """Judge whether the first slingshot comes later in one arm than in another, seed by seed."""

    def judge(results: Results) -> Judgement:
        pairs = results.pairs(arm, than)
        both = [(r.episodes[0][0], b.episodes[0][0]) for r, b in pairs if r.episodes and b.episodes]
        if not both:
            raise NotTested(f"{arm} and {than} do not both slingshot on any seed")
        after = sum(one > other for one, other in both)
        times = float(np.median([one / other for one, other in both]))
        note = f"at × {number(times)} of the steps"
        return agrees_if(2 * after > len(both), share(after, len(both)), "runs later", note)

    return judge


def absorbs_sooner(arm: str, than: str) -> Callable[[Results], Judgement]:
    """Judge whether the first *at risk* alert comes sooner in one arm than in another, seed by seed."""

    def judge(results: Results) -> Judgement:
        both = [(_at_risk(r), _at_risk(b)) for r, b in results.pairs(arm, than)]
        both = [(one, other) for one, other in both if one is not None and other is not None]
        if not both:
            raise NotTested("no alert to compare")
        earlier = sum(one < other for one, other in both)
        times = float(np.median([one / other for one, other in both]))
        note = f"at × {number(times)} of the steps; {_slingshots(results, arm)}"
        return agrees_if(2 * earlier > len(both), share(earlier, len(both)), "runs at risk sooner", note)

    return judge


def _at_risk(run: Result) -> Any:
    return min((a.first_step for a in run.alerts if a.kind is AlertKind.AT_RISK), default=None)


def _slingshots(results: Results, arm: str) -> str:
    runs = results[arm]
    return f"{sum(len(run.episodes) for run in runs)} slingshots in {len(runs)} runs"


def no_feature_inflation(arm: str) -> Callable[[Results], Judgement]:
    """Judge whether no run of the arm gets an *at risk* alert for rounding."""

    def judge(results: Results) -> Judgement:
        runs = results[arm]
        clean = [
            not any(
                a.kind is AlertKind.AT_RISK and str(a.mechanism).startswith("numerical") for a in run.alerts
            )
            for run in runs
        ]
        note = _slingshots(results, arm)
        return agrees_if(all(clean), share(sum(clean), len(clean)), "runs never at risk", note)

    return judge


def bimodal(when: str) -> Callable[[Results], Judgement]:
    """Judge whether updates are bimodal at a slingshot, or not bimodal before or after it, as ``when`` says.

    The measure is Sarle's coefficient of the update's coordinates.
    """

    def judge(results: Results) -> Judgement:
        groups = [
            [item[when]["bimodality"] for item in run.values["updates"]] for run in results["mlp-float32"]
        ]
        expected = "above" if when == "at" else "below"
        return decided(grouped_median(groups), expected, BIMODAL, "", "5/9 is uniform, 1 two points")

    return judge


def larger_update(results: Results) -> Judgement:
    groups = [[item["growth"] for item in run.values["updates"]] for run in results["mlp-float32"]]
    return decided(grouped_median(groups), "above", 20.0, "times the update of the 20 steps before")


def growth(which: str) -> Callable[[Results], Judgement]:
    """Divide measured growth of ‖μ_G‖ by theory's, for each reading before the first slingshot."""

    def judge(results: Results) -> Judgement:
        groups = []
        for run in results["mlp-float32"]:
            rates = run.values["approach"]["growth"]
            groups.append(
                [m / t for m, t in zip(rates["measured"], rates[which], strict=True) if t and t > 0]
            )
        estimate = grouped_median(groups)
        return agrees_if(0.5 <= estimate.value <= 2, estimate, "times what theory says")

    return judge


def gradient_descent(results: Results) -> Judgement:
    groups = []
    for run in results["mlp-gradient-descent"]:
        rates = run.values["approach"]["growth"]
        pairs = zip(rates["measured"], rates["corrected"], strict=True)
        ratios = [m / t for m, t in pairs if t and t > 0]
        groups.append(ratios[len(ratios) // 2 :])  # theory holds once both means are aligned
    estimate = grouped_median(groups)
    return agrees_if(0.5 <= estimate.value <= 2, estimate, "times what theory says")


def opposed(results: Results) -> Judgement:
    values = [run.values["approach"].get("alignment") for run in results["mlp-float32"]]
    estimate = median([value for value in values if value is not None])
    return agrees_if(estimate.high < -0.9, estimate)


def inflated(arm: str) -> Callable[[Results], Judgement]:
    """Divide ‖μ_G‖ just before the first slingshot by its value at the first *at risk* alert."""

    def judge(results: Results) -> Judgement:
        pairs = [run.values["approach"].get("feature_mean") for run in results[arm] if run.episodes]
        estimate = quantiles([last / first for first, last in filter(None, pairs)], "×")
        return agrees_if(estimate.low > 1.5, estimate)

    return judge


def steady(results: Results) -> Judgement:
    """Compare |Δ ln ε| with Δ ln‖μ_G‖ between the first *at risk* alert and the slingshot."""
    ratios = []
    for run in results["mlp-float32"]:
        found = run.values["approach"]
        if "epsilon" in found and "feature_mean" in found and min(found["epsilon"]) > 0:
            moved = math.log(found["feature_mean"][1] / found["feature_mean"][0])
            ratios.append(abs(math.log(found["epsilon"][1] / found["epsilon"][0])) / abs(moved))
    return decided(median(ratios), "below", 1.0, "|Δ ln ε| / |Δ ln‖μ_G‖|")


def accuracy(arm: str) -> Callable[[Results], Judgement]:
    def judge(results: Results) -> Judgement:
        runs = [run for run in results[arm] if run.values["accuracy_steps"]["slingshot"]]
        outside = [x for run in runs for x in run.values["accuracy_steps"]["quiet"]]
        if not outside:
            raise NotTested("no slingshot to compare")
        typical = float(np.median(outside))
        estimate = grouped_median(
            [[x - typical for x in run.values["accuracy_steps"]["slingshot"]] for run in runs]
        )
        last = float(np.median([run.values["final_test_accuracy"] for run in runs]))
        chance = 1 / runs[0].config["p"]
        if last < 2 * chance:
            raise NotTested(f"it does not generalise here: accuracy {last:.1%}, chance {chance:.1%}")
        return decided(estimate, "above", 0.0, "accuracy", f"quiet {number(typical)}, last {last:.1%}")

    return judge


_LIU, _THILAK, _OURS = "Liu et al. 2026", "Thilak et al. 2022", "nfi-monitor"
_BASE, _T, _T2 = "mlp-float32", "transformer-float32", "transformer2-float32"
CLAIMS = (
    Claim("The MLP slingshots in float32", f"{_LIU}, table 1", spiking(_BASE)),
    Claim("The transformer slingshots in float32", f"{_LIU}, table 1", spiking(_T)),
    Claim("MLP: a float64 model removes all slingshots", f"{_LIU}, abstract",
          without("mlp-float64-model", _BASE)),
    Claim("MLP: float64 from the logits to the loss removes all", f"{_LIU}, abstract",
          without("mlp-float64-loss", _BASE)),
    Claim("MLP: projecting the logit gradient to zero sum removes all", f"{_LIU}, section 3",
          without("mlp-zero-sum", _BASE)),
    Claim("Transformer: float64 from the logits to the loss removes all", f"{_LIU}, abstract",
          without("transformer-float64-loss", _T)),
    Claim("Transformer: projecting the logit gradient removes all", f"{_LIU}, section 3",
          without("transformer-zero-sum", _T)),
    Claim("Transformer: ‖μ_G‖ has grown by half before the first slingshot", f"{_LIU}, Theorem 3.7",
          inflated(_T)),
    Claim("Two layers: float64 from the logits to the loss removes all", f"{_LIU}, abstract",
          without("transformer2-float64-loss", _T2)),
    Claim("Two layers: projecting the logit gradient removes all", f"{_LIU}, section 3",
          without("transformer2-zero-sum", _T2)),
    Claim("Two layers: the exact zero-sum loss, in float32, removes all", "this project",
          without("transformer2-exact", _T2)),
    Claim("Two layers: ‖μ_G‖ has grown by half before the first slingshot", f"{_LIU}, Theorem 3.7",
          inflated(_T2)),
    Claim("Subtracting W_G from the head removes all", f"{_LIU}, section 3",
          without("mlp-mean-subtracted", _BASE)),
    Claim("Adam's eps 1e-6 makes them rarer", _LIU, compared("mlp-eps-1e-6", _BASE, more=False)),
    Claim("Adam's eps 1e-5 removes all", _LIU, without("mlp-eps-1e-5", _BASE)),
    Claim("LayerNorm before the head: rows absorb sooner", _LIU, absorbs_sooner("mlp-layernorm", _BASE)),
    Claim("Label smoothing removes numerical feature inflation", _LIU,
          no_feature_inflation("mlp-label-smoothing")),
    Claim("Weight decay removes all slingshots", _LIU, without("mlp-weight-decay", _BASE)),
    Claim("A z-loss removes all slingshots", _LIU, without("mlp-z-loss", _BASE)),
    Claim("Without a bias in the head they come later", _LIU, later("mlp-no-head-bias", _BASE)),
    Claim("A smaller learning rate makes them more frequent", _LIU,
          compared("mlp-lr-3e-4", _BASE, more=True)),
    Claim("A learning rate of 1e-2 makes them rarer", _LIU, compared("mlp-lr-1e-2", _BASE, more=False)),
    Claim("Without underflow (z ≥ z_max − 100) they stay", _LIU, stays("mlp-clamp", _BASE)),
    Claim("The update at a slingshot is bimodal", f"{_LIU}, section 3", bimodal("at")),
    Claim("The update before it is not", f"{_LIU}, section 3", bimodal("before")),
    Claim("It is tens of times the update before it", f"{_LIU}, section 3", larger_update),
    Claim("‖μ_G‖ grows by ln(1 + lr·ε/√K) a step", f"{_LIU}, Theorem 3.7", growth("plain")),
    Claim("… with Adam's effective rates and the features' norm in place of lr", f"after {_LIU}, Theorem 3.7",
          growth("corrected")),
    Claim("Gradient descent from zero loss on inflates ‖μ_G‖ as theory says", _LIU, gradient_descent),
    Claim("W_G and μ_G turn against each other: cos → −1", f"{_LIU}, Theorem 3.7", opposed),
    Claim("ε changes less than the means grow", f"{_LIU}, Theorem 3.7", steady),
    Claim("Test accuracy steps up at slingshots", _THILAK, accuracy(_BASE)),
    Claim("Each slingshot of the MLP is announced before it starts", _OURS, announced(_BASE)),
    Claim("Each slingshot of the transformer is announced before it starts", _OURS, announced(_T)),
    Claim("The float64 loss leaves nothing to announce: no run slingshots", _OURS, quiet("mlp-float64-loss")),
)  # fmt: skip


# --- the figure -------------------------------------------------------------------------------------------


def figure(results: Results, path: Path) -> None:
    """Draw loss, ε and ‖μ_G‖ of the pairs (Liu et al., figures 1 to 3), and updates around a slingshot."""
    columns = [
        ("MLP", ["mlp-float32", "mlp-float64-loss"]),
        ("transformer", ["transformer-float32", "transformer-float64-loss"]),
        ("MLP, two remedies", ["mlp-layernorm", "mlp-label-smoothing"]),
    ]
    there = [(title, [arm for arm in arms if arm in results]) for title, arms in columns]
    there = [(title, arms) for title, arms in there if arms]
    if not there:
        raise NotTested("no series of the arms it shows")
    figure, axes = sheet(len(SERIES) + 1, max(len(there), 3), "Modular division a/b mod p")
    for column, (title, arms) in enumerate(there):
        for row, name in enumerate(SERIES):
            axis = axes[row][column]
            for index, arm in reversed(list(enumerate(arms))):
                curve(axis, first(results, arm), name, COLOURS[index], arm)
            if row == 0:
                axis.set_title(title, fontsize=9, color=INK, loc="left")
                axis.legend(fontsize=6.5, frameon=False)
            if column == 0:
                axis.set_ylabel(LABELS.get(name, name), fontsize=8.5, color=INK)
            axis.set_xlabel("optimizer step" if row == len(SERIES) - 1 else "", fontsize=8, color=INK)
    for axis in axes[:-1, len(there) :].flat:
        axis.set_visible(False)
    _updates(axes[-1], results)
    save(figure, path)


def _updates(axes: Any, results: Results) -> None:
    runs = [run for run in results if run.arm == "mlp-float32"]
    found = [item for run in runs for item in run.values["updates"]]
    for axis, when in zip(axes, ("before", "at", "after"), strict=False):
        if not found:
            axis.set_visible(False)
            continue
        item = found[0][when]
        counts = np.array(item["counts"])
        edges = np.linspace(-item["span"], item["span"], len(counts) + 1)
        axis.stairs(counts, edges, fill=True, color=COLOURS[0] if when == "at" else GREY)
        step = found[0]["steps"][when]
        axis.set_title(
            f"update of step {step:,}, {when} the slingshot; bimodality {item['bimodality']:.2f}",
            fontsize=7.5, color=INK, loc="left",
        )  # fmt: skip
        axis.set_xlabel("change of a coordinate", fontsize=8, color=INK)
        axis.locator_params(axis="x", nbins=5)
    axes[0].set_ylabel("coordinates", fontsize=8.5, color=INK)
