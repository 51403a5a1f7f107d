"""Judge the claims of Liu et al. 2026 and others about language models by the runs of the GPT study."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from examples.reference.judge import (
    Claim,
    Estimate,
    Judgement,
    NotTested,
    Verdict,
    agrees_if,
    number,
    quantiles,
    share,
)
from examples.reference.results import Result, Results
from nfi_monitor.types import AlertKind, Mechanism

LIU = "Liu et al. 2026 (arXiv 2605.06152)"
HALVES = 2


def mean_of_last_tenth(series: tuple[Any, Any]) -> float | None:
    """Return the mean of the values in the last tenth of the steps; None without values."""
    steps, values = series
    return float(np.mean(values[steps > 0.9 * steps[-1]])) if len(steps) else None


# --- estimates ------------------------------------------------------------------------------------------


def zeros(runs: Sequence[Result]) -> Estimate:
    """Estimate the share of the fixed tokens with a loss of exactly 0 at the end of training."""
    return share(
        sum(int(run.values["zero_loss_tokens"][-1]) for run in runs),
        sum(int(run.values["tokens_measured"]) for run in runs),
    )


def late(runs: Sequence[Result], name: str) -> Estimate:
    """Return median and range of a measured series over the second half of training."""
    return quantiles([value for run in runs for value in run.values[name][len(run.values[name]) // HALVES :]])


def drift(run: Result) -> Estimate:
    """Estimate the drift of the mean logit in nats per 1,000 steps over the second half of training.

    It is the slope of a least-squares fit, with the fit's interval. Raises NotTested for fewer than four
    measurements.
    """
    at = np.asarray(run.values["measured_at"], float)
    half = len(at) // HALVES
    if len(at) - half < 4:
        raise NotTested("too few measurements for a slope")
    logits = np.asarray(run.values["mean_logit"], float)[half:]
    (slope, _), covariance = np.polyfit(at[half:] / 1_000, logits, 1, cov=True)
    wide = 1.96 * float(covariance[0, 0]) ** 0.5
    low, high = float(slope) - wide, float(slope) + wide
    ours, interval = number(float(slope)), f"{number(low)} to {number(high)}"
    return Estimate(float(slope), low, high, len(logits), ours, interval)


def slowest(runs: Sequence[Result]) -> Estimate:
    """Return the smallest drift of the runs."""
    return min((drift(run) for run in runs), key=lambda found: found.value)


def some_at_zero(results: Results) -> Judgement:
    runs = results["float32-loss"]
    found = zeros(runs)
    share_seen = np.median([run.values["zero_loss_seen"] / run.values["tokens_seen"] for run in runs])
    return agrees_if(
        found.value > 0, found, "tokens at exactly 0 at the end", f"{share_seen:.2%} of all in training"
    )


def none_at_zero(arm: str) -> Callable[[Results], Judgement]:
    def judge(results: Results) -> Judgement:
        found, base = zeros(results[arm]), zeros(results["float32-loss"])
        if not base.value:
            raise NotTested("no token at exactly 0 in float32 either")
        return agrees_if(found.value == 0, found, "tokens at exactly 0 at the end", f"float32: {base.ours}")

    return judge


def more_in_bfloat16(results: Results) -> Judgement:
    found, base = zeros(results["bfloat16-loss"]), zeros(results["float32-loss"])
    return agrees_if(found.low > base.high, found, "tokens at exactly 0 at the end", f"float32: {base.ours}")


def frequent_first(results: Results) -> Judgement:
    """Correlate by rank how often a token occurs and how often its loss is exactly 0.

    The note names the ten tokens with most zeros.
    """
    runs = [run for run in results["float32-loss"] if (run.values["kinds_at_zero"] or 0) > 3]
    if not runs:
        raise NotTested("fewer than four kinds of token reached exactly 0")
    least = min(runs, key=lambda run: run.values["rank_correlation"])
    rho, kinds = least.values["rank_correlation"], least.values["kinds_at_zero"]
    # Fisher's transformation, with the standard error of Spearman's coefficient (Fieller et al. 1957).
    wide = 1.96 * 1.03 / (kinds - 3) ** 0.5
    low, high = (float(np.tanh(np.arctanh(min(rho, 1 - 1e-9)) + side * wide)) for side in (-1, 1))
    found = Estimate(rho, low, high, kinds, number(rho), f"{number(low)} to {number(high)}")
    unit = f"= Spearman's ρ over {kinds} kinds of token"
    return agrees_if(found.low > 0, found, unit, f"most in total: {_named(runs, 'most_in_total')}")


def not_the_same_per_occurrence(results: Results) -> Judgement:
    """Count how many of the ten tokens that absorb most per occurrence are among the ten most frequent."""
    runs = [run for run in results["float32-loss"] if run.values["most_per_occurrence"]]
    if not runs:
        raise NotTested("no token that came often enough reached exactly 0")
    frequent = {token for run in runs for token, _, _ in run.values["most_frequent"]}
    tokens = [token for run in runs for token, _, _ in run.values["most_per_occurrence"]]
    common = sum(token in frequent for token in tokens)
    note = f"most per occurrence: {_named(runs, 'most_per_occurrence')}"
    return agrees_if(
        2 * common < len(tokens), share(common, len(tokens)), "are among the ten most frequent", note
    )


def _named(runs: Sequence[Result], name: str) -> str:
    return ", ".join(repr(token) for token, _, _ in runs[0].values[name])


def aligned_with(results: Results) -> Judgement:
    found = late(results["float32-loss"], "alignment")
    return agrees_if(found.value > 0, found, "= cos(W_G, μ_G) in the second half")


def logits_rise(results: Results) -> Judgement:
    runs = results["float32-loss"]
    end = np.median([run.values["mean_logit"][-1] for run in runs])
    found = slowest(runs)
    return agrees_if(found.low > 0, found, "nats per 1,000 steps", f"{end:.3g} at the end")


def float64_worse(results: Results) -> Judgement:
    pairs = results.pairs("float64-loss", "float32-loss")
    found, base = slowest([run for run, _ in pairs]), slowest([base for _, base in pairs])
    worse = found.low > max(0.0, base.high)
    return agrees_if(worse, found, "nats per 1,000 steps", f"float32: {base.ours}")


def absorption_pulls_down(results: Results) -> Judgement:
    """Compare the mean logit where most tokens absorb with that of the same training without absorption."""
    pairs = results.pairs("bfloat16-loss", "float64-loss")
    found = max((drift(run) for run, _ in pairs), key=lambda drift: drift.value)
    base = slowest([base for _, base in pairs])
    return agrees_if(found.high < min(0.0, base.low), found, "nats per 1,000 steps", f"float64: {base.ours}")


def not_from_rounding(results: Results) -> Judgement:
    """Judge whether, with no token absorbed, the mean logit moves at least half as far as in float32."""
    pairs = results.pairs("exact-loss", "float32-loss")
    found, base = (_sizes(runs, "mean_logit") for runs in zip(*pairs, strict=True))
    slope, usual = (drift(runs[0]).ours for runs in zip(*pairs, strict=True))
    note = f"float32: {number(base.value)}; drift {slope} nats per 1,000 steps, float32: {usual}"
    return agrees_if(found.value > 0.5 * base.value, found, "= |mean logit| in the second half", note)


def held_by(arm: str, name: str, what: str, factor: float) -> Callable[[Results], Judgement]:
    """Judge whether the second half's median |``name``| is below ``factor`` × the smallest of float32."""

    def judge(results: Results) -> Judgement:
        pairs = results.pairs(arm, "float32-loss")
        found, base = (_sizes(runs, name) for runs in zip(*pairs, strict=True))
        return agrees_if(found.value < factor * base.low, found, what, f"float32: {number(base.value)}")

    return judge


def _sizes(runs: Sequence[Result], name: str) -> Estimate:
    return quantiles(
        [abs(value) for run in runs for value in run.values[name][len(run.values[name]) // HALVES :]]
    )


def no_slingshot(results: Results) -> Judgement:
    runs = [run for run in results if run.pair == "gpt" and "float32" in run.arm]
    if not runs or not any(run.values["zero_loss_seen"] for run in runs):
        raise NotTested("no token was absorbed")
    floor = np.median([run.loss_final for run in runs if run.loss_final is not None])
    clean = sum(not run.slingshots for run in runs)
    # Wu's rule reads single losses. The losses of minibatches cross its two thresholds by chance.
    crossed = sum(len(run.episodes) for run in runs)
    note = f"loss at the end {floor:.2g}; by Wu's rule on minibatch losses {crossed}"
    return agrees_if(clean == len(runs), share(clean, len(runs)), "runs without a slingshot", note)


def monitor_tells_them_apart(results: Results) -> Judgement:
    """Judge whether the monitor is *at risk* by absorption in every bfloat16 run and in no float64 run."""
    loud, quiet = results["bfloat16-loss"], results["float64-loss"]
    correct = sum(any(_numeric(run)) for run in loud) + sum(not any(_numeric(run)) for run in quiet)
    first = [step for run in loud for step in _numeric(run)[:1]]
    note = f"bfloat16: at risk from step {first[0]:,}" if first else "bfloat16: no alert"
    return agrees_if(
        correct == len(loud) + len(quiet), share(correct, len(loud) + len(quiet)), "runs called rightly", note
    )


def nothing_imminent(results: Results) -> Judgement:
    """Judge whether runs without a slingshot have no *imminent* alert."""
    runs = [run for run in results if run.pair == "gpt" and not run.slingshots]
    alarms = {run.arm: [a for a in run.alerts if a.kind is AlertKind.IMMINENT] for run in runs}
    quiet = sum(not found for found in alarms.values())
    named = dict.fromkeys(f"{a.mechanism}".replace("_", " ") for found in alarms.values() for a in found)
    note = f"{sum(map(len, alarms.values()))} alarms" + (f": {', '.join(named)}" if named else "")
    return agrees_if(quiet == len(runs), share(quiet, len(runs)), "runs without a false alarm", note)


def _numeric(run: Result) -> list[int]:
    """Return the first steps of the run's *at risk* alerts that name absorption."""
    return [
        alert.first_step
        for alert in run.alerts
        if alert.kind is AlertKind.AT_RISK and alert.mechanism is Mechanism.NUMERICAL_FEATURE_INFLATION
    ]


def trainer_unchanged(results: Results) -> Judgement:
    runs = results["trainer"]
    equal, all_ = (sum(run.values[name] for run in runs) for name in ("tensors_equal", "tensors"))
    return agrees_if(
        equal == all_, share(equal, all_), "tensors equal to the last bit", f"{runs[0].steps} steps"
    )


def trainer_seen(results: Results) -> Judgement:
    runs = results["trainer"]
    rows = [run.values["zero_sum_violation"] for run in runs]
    if any(value is None for value in rows):
        return Judgement(Verdict.DISAGREES, "no rows were seen")
    found = quantiles(rows)
    note = f"head {runs[0].values['head']}, {runs[0].values['readings']} readings"
    return agrees_if(found.high < 0.1, found, "= zero-sum violation at the end", note)


CLAIMS = (
    Claim("Some tokens reach a loss of exactly 0 in float32", f"{LIU}, section 6", some_at_zero),
    Claim("None does in float64", f"{LIU}, section 3", none_at_zero("float64-loss")),
    Claim("None does with the exact zero-sum loss in float32", "this project", none_at_zero("exact-loss")),
    Claim("Many more do where the loss is bfloat16", f"{LIU}, section 3", more_in_bfloat16),
    Claim("The tokens that absorb most in total are the frequent ones", f"{LIU}, section 6", frequent_first),
    Claim(
        "Per occurrence, other tokens absorb most: those of templates",
        "this project",
        not_the_same_per_occurrence,
    ),
    Claim("A language model's features align with W_G", f"{LIU}, section 6", aligned_with),
    Claim("Its mean logit drifts upwards", f"{LIU}, section 6", logits_rise),
    Claim("It drifts upwards faster with the loss in float64", f"{LIU}, section 6", float64_worse),
    Claim(
        "Where tokens absorb, W_G and μ_G inflate each other and the mean logit falls",
        f"{LIU}, Theorem 3.7",
        absorption_pulls_down,
    ),
    Claim(
        "The exact zero-sum loss does not stop the drift: it is not made by rounding",
        "this project",
        not_from_rounding,
    ),
    Claim(
        "Subtracting W_G in training stops the drift of the mean logit",
        f"{LIU}, section 6; Stollenwerk (arXiv 2601.02031)",
        held_by("centred-head", "mean_logit", "= |mean logit| in the second half", 0.1),
    ),
    Claim(
        "z-loss keeps log Z small",
        "Wortsman et al. 2024 (arXiv 2309.14322)",
        held_by("z-loss", "log_partition", "= |mean log Z| in the second half", 0.5),
    ),
    Claim("Partial absorption makes no slingshot in a language model", f"{LIU}, section 6", no_slingshot),
    Claim(
        "The monitor tells a loss in bfloat16 from one in float64", "this project", monitor_tells_them_apart
    ),
    Claim("The monitor calls nothing imminent where nothing comes", "this project", nothing_imminent),
    Claim("HuggingFace's Trainer ends in the same bits with the callback", "this project", trainer_unchanged),
    Claim("The callback finds the Trainer's head and its rows", "this project", trainer_seen),
)
