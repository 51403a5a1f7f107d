"""Judge the claims of Liu et al. 2026 about image classifiers by the runs of the CIFAR study."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from examples.reference.judge import (
    Claim,
    Judgement,
    NotTested,
    agrees_if,
    announced,
    quantiles,
    share,
    spiking,
    without,
)
from examples.reference.results import Result, Results
from nfi_monitor.history import History

LIU = "Liu et al. 2026 (arXiv 2605.06152)"
WINDOW = 100
"""Steps from the start of absorption to the comparison of ε and ‖μ_G‖, before the first slingshot."""
NUMERIC = "numerical_feature_inflation"
SPIKING = ("mlp", "vgg11", "vit")


# --- values stored of a run -----------------------------------------------------------------------------


def inflation(history: History) -> dict[str, Any]:
    """Return measures of the feedback loop from the monitor's readings; None if a level was never reached.

    ``absorbed_from``: first step at which half of the live rows are absorbed. ``residual_mass_fall``: decades
    that ε has fallen ``WINDOW`` steps later. ``feature_mean_rise``: nats that ln‖μ_G‖ has risen by then.
    ``absorbed_median``: median share of absorbed rows over the second half of the run. ``alignment_lowest``:
    lowest cosine; ``norm_ratio``: ‖W_G‖·√K / ‖μ_G‖ at that step (Theorem 3.7 says 1).
    """
    steps, absorbed = history["absorbed_fraction"]
    found: dict[str, Any] = {
        "absorbed_from": None,
        "absorbed_median": None,
        "absorbed_final": None,
        "residual_mass_fall": None,
        "feature_mean_rise": None,
        "feature_mean_final": _last(history, "feature_mean_norm"),
        "mean_logit_final": _last(history, "mean_logit"),
        "alignment_lowest": None,
        "norm_ratio": None,
    }
    if len(steps):
        found["absorbed_median"] = float(np.median(absorbed[steps > steps[-1] / 2]))
        found["absorbed_final"] = float(absorbed[-1])
        if (absorbed >= 0.5).any():
            begin = int(steps[np.argmax(absorbed >= 0.5)])
            found["absorbed_from"] = begin
            mass, mean = _ratio(history, "residual_mass", begin), _ratio(history, "feature_mean_norm", begin)
            found["residual_mass_fall"] = None if mass is None else -float(np.log10(mass))
            found["feature_mean_rise"] = None if mean is None else float(np.log(mean))
    steps, alignment = history["mean_alignment"]
    if len(steps):
        at = int(np.argmin(alignment))
        found["alignment_lowest"] = float(alignment[at])
        found["norm_ratio"] = _norm_ratio(history, int(steps[at]))
    return found


CLASSES = 10


def _norm_ratio(history: History, step: int) -> float | None:
    values = []
    for name in ("classifier_mean_norm", "feature_mean_norm"):
        steps, norm = history[name]
        at = np.searchsorted(steps, step)
        if at == len(steps) or steps[at] != step:
            return None
        values.append(float(norm[at]))
    return values[0] * CLASSES**0.5 / values[1] if values[1] > 0 else None


def _ratio(history: History, name: str, begin: int) -> float | None:
    """Divide the value ``WINDOW`` steps after ``begin`` by that at ``begin``; None if one is 0 or missing."""
    steps, values = history[name]
    first, last = np.searchsorted(steps, begin), np.searchsorted(steps, begin + WINDOW)
    if last >= len(steps) or not (values[first] > 0 and values[last] > 0):
        return None
    return float(values[last] / values[first])


def _last(history: History, name: str) -> float | None:
    values = history[name][1]
    return float(values[-1]) if len(values) else None


# --- judgements -----------------------------------------------------------------------------------------


def calm(arm: str) -> Callable[[Results], Judgement]:
    """Judge whether no run slingshots although rows absorb.

    A run without absorption is no evidence, because it never became confident.
    """

    def judge(results: Results) -> Judgement:
        runs = results[arm]
        tested = [run for run in runs if (run.values["absorbed_final"] or 0) > 0]
        if not tested:
            raise NotTested("no row was absorbed, so nothing was to be seen")
        clean = sum(not run.episodes for run in tested)
        absorbed = np.median([run.values["absorbed_final"] for run in tested])
        note = f"{absorbed:.0%} of the rows absorbed after {tested[0].steps:,} steps"
        return agrees_if(clean == len(tested), share(clean, len(tested)), "runs without a slingshot", note)

    return judge


def numeric_gone(*arms: str) -> Callable[[Results], Judgement]:
    """Judge whether the control has no more slingshots than its float32 pair has of another mechanism.

    The monitor's verdict counts for the float32 run only. In the control every slingshot counts.
    """

    def judge(results: Results) -> Judgement:
        pairs = [pair for arm in arms for pair in results.pairs(arm, f"{arm.split('-')[0]}-float32")]
        pairs = [(run, base) for run, base in pairs if _numeric(base)]
        if not pairs:
            raise NotTested("no numeric slingshot in float32")
        clean = sum(len(run.slingshots) <= len(base.slingshots) - len(_numeric(base)) for run, base in pairs)
        numeric = sum(len(_numeric(base)) for _, base in pairs)
        others = sum(len(base.slingshots) for _, base in pairs) - numeric
        left = sum(len(run.slingshots) for run, _ in pairs)
        note = f"float32 {numeric} numeric and {others} other slingshots, here {left} in all"
        return agrees_if(clean == len(pairs), share(clean, len(pairs)), "runs without a numeric one", note)

    return judge


def first_survives(results: Results) -> Judgement:
    """Judge whether float64 removes the transformer's first slingshot, if absorption is not its cause."""
    pairs = [(run, base) for run, base in results.pairs("vit-float64-loss", "vit-float32") if base.slingshots]
    early = [(run, base) for run, base in pairs if base.slingshots[0]["mechanism"] != NUMERIC]
    if not early:
        raise NotTested("its first slingshot is numeric in every run")
    same = [bool(run.slingshots) for run, _ in early]
    at = ", ".join(
        f"step {base.slingshots[0]['start']:,} and {run.slingshots[0]['start']:,}" if kept else "gone"
        for (run, base), kept in zip(early, same, strict=True)
    )
    named = ", ".join(dict.fromkeys(base.slingshots[0]["mechanism"].replace("_", " ") for _, base in early))
    return agrees_if(
        not any(same), share(sum(same), len(same)), "first slingshots survive float64", f"{named}; {at}"
    )


def every_size(results: Results) -> Judgement:
    """Judge whether the MLP slingshots with every number of rows in the results."""
    sizes: dict[int, list[Result]] = {}
    for arm in results.arms():
        if arm == "mlp-float32" or arm.startswith("mlp-rows-"):
            for run in results[arm]:
                sizes.setdefault(int(run.config["rows"]), []).append(run)
    if len(sizes) < 2:
        raise NotTested("one number of rows alone")
    hit = [rows for rows, runs in sorted(sizes.items()) if any(run.episodes for run in runs)]
    ran, spiked = (", ".join(f"{rows:,}" for rows in found) for found in (sorted(sizes), hit))
    note = f"with {spiked or 'no'} rows, of {ran}"
    return agrees_if(len(hit) == len(sizes), share(len(hit), len(sizes)), "sizes slingshot", note)


def minibatch_absorbs(results: Results) -> Judgement:
    absorbed = quantiles(_values(results, minibatch(results), "absorbed_median"))
    return agrees_if(0.25 <= absorbed.value <= 0.75, absorbed, "of the rows absorbed in the second half")


def minibatch_grows(results: Results) -> Judgement:
    """Compare ‖μ_G‖ at the end with the same training in float64, seed by seed."""
    ratios = [
        run.values["feature_mean_final"] / base.values["feature_mean_final"]
        for arm in minibatch(results)
        for run, base in results.pairs(arm, arm.replace("float32", "float64-loss"))
    ]
    grown = quantiles(ratios)
    return agrees_if(grown.low > 1.0, grown, "times the ‖μ_G‖ of the loss in float64 at the end")


def minibatch_calm(results: Results) -> Judgement:
    """Judge whether minibatch runs have no slingshot; the control shows those that rounding causes."""
    runs = [run for arm in minibatch(results) for run in results[arm]]
    clean = sum(not run.slingshots for run in runs)
    controls = [
        base
        for arm in minibatch(results)
        for _, base in results.pairs(arm, arm.replace("float32", "float64-loss"))
    ]
    many, left = (sum(len(run.slingshots) for run in group) for group in (runs, controls))
    note = f"{many} slingshots, with the loss in float64 {left}"
    return agrees_if(clean == len(runs), share(clean, len(runs)), "runs without a slingshot", note)


def minibatch(results: Results) -> list[str]:
    """Return the minibatch arms with float32 results. Raises NotTested without one."""
    arms = [arm for arm in results.arms() if arm.endswith("-minibatch-float32")]
    if not arms:
        raise NotTested("no result of a minibatch arm")
    return arms


def aligned(results: Results) -> Judgement:
    """Judge whether cos(W_G, μ_G) → −1 where the loop runs; the note shows the control."""
    lowest = _values(results, [f"{model}-float32" for model in ("mlp", "vgg11")], "alignment_lowest")
    control = _values(results, [f"{model}-float64-loss" for model in ("mlp", "vgg11")], "alignment_lowest")
    found = quantiles(lowest)
    note = f"float64 loss: {np.median(control):.2f}" if control else ""
    return agrees_if(found.value <= -0.9, found, "lowest cosine", note)


def proportional(results: Results) -> Judgement:
    """Judge whether W_G ≈ −μ_G/√K, that is ‖W_G‖·√K/‖μ_G‖ = 1."""
    found = quantiles(_values(results, [f"{model}-float32" for model in ("mlp", "vgg11")], "norm_ratio"))
    return agrees_if(0.5 <= found.value <= 2.0, found, "= ‖W_G‖·√K/‖μ_G‖ where the cosine is lowest")


def epsilon_falls(results: Results) -> Judgement:
    """Judge whether ResNet18's ε falls faster than that of a network with slingshots."""
    escaping = quantiles(_values(results, ["resnet18-float32"], "residual_mass_fall"))
    caught = _values(results, ["mlp-float32", "vgg11-float32"], "residual_mass_fall")
    if not caught:
        raise NotTested("nothing to compare with")
    note = f"MLP and VGG11: {np.median(caught):.2f}"
    unit = f"decades in the {WINDOW} steps after half of the rows are absorbed"
    return agrees_if(escaping.value > max(caught), escaping, unit, note)


def mean_logit_falls(results: Results) -> Judgement:
    pairs = [
        (run.values["mean_logit_final"], base.values["mean_logit_final"])
        for model in ("mlp", "vgg11")
        for run, base in results.pairs(f"{model}-float64-loss", f"{model}-float32")
    ]
    found = quantiles([base for _, base in pairs])
    note = f"float64 loss: {np.median([run for run, _ in pairs]):.1f}"
    return agrees_if(
        found.high < 0 and all(base < run for run, base in pairs), found, "mean logit at the end", note
    )


def numeric_announced(results: Results) -> Judgement:
    """Judge whether an alert came before every slingshot that the monitor calls numeric."""
    runs = [run for model in SPIKING for run in results[f"{model}-float32"]]
    every = [item for run in runs for item in _numeric(run)]
    warned = [item for run in runs for item in run.announced if item["mechanism"] == NUMERIC]
    if not every:
        raise NotTested("no numeric slingshot")
    leads = [max(item["at_risk_lead"] or 0, item["imminent_lead"] or 0) for item in warned]
    note = f"lead {min(leads):,}–{max(leads):,} steps" if leads else ""
    return agrees_if(
        len(warned) == len(every), share(len(warned), len(every)), "numeric slingshots announced", note
    )


def _numeric(run: Result) -> list[dict[str, Any]]:
    return [item for item in run.slingshots if item["mechanism"] == NUMERIC]


def _values(results: Results, arms: Sequence[str], name: str) -> list[float]:
    return [run.values[name] for arm in arms for run in results[arm] if run.values[name] is not None]


CLAIMS = (
    Claim("The MLP slingshots under full-batch Adam", f"{LIU}, table 1", spiking("mlp-float32")),
    Claim("VGG11 with a single linear head slingshots", f"{LIU}, table 1", spiking("vgg11-float32")),
    Claim("The vision transformer slingshots", f"{LIU}, table 1", spiking("vit-float32")),
    Claim(
        "VGG11 with BatchNorm inside slingshots all the same",
        f"{LIU}, table 1",
        spiking("vgg11-bn-inside-float32"),
    ),
    Claim("ResNet18 does not slingshot", f"{LIU}, table 1", calm("resnet18-float32")),
    Claim(
        "VGG11 with a BatchNorm right before the head does not slingshot",
        f"{LIU}, section 4",
        calm("vgg11-bn-before-head-float32"),
    ),
    Claim("It slingshots whatever the number of rows", f"{LIU}, section 4", every_size),
    Claim(
        "The loss in float64 removes the MLP's slingshots",
        f"{LIU}, figure 1",
        without("mlp-float64-loss", "mlp-float32"),
    ),
    Claim(
        "Projecting the gradient to zero sum removes the MLP's slingshots",
        f"{LIU}, section 4",
        without("mlp-zero-sum", "mlp-float32"),
    ),
    Claim(
        "The loss in float64 removes every numeric slingshot",
        f"{LIU}, section 4",
        numeric_gone("mlp-float64-loss", "vgg11-float64-loss", "vit-float64-loss"),
    ),
    Claim(
        "Projecting the gradient to zero sum removes every numeric slingshot",
        f"{LIU}, section 4",
        numeric_gone("mlp-zero-sum", "vgg11-zero-sum", "vit-zero-sum"),
    ),
    Claim(
        "VGG11: the exact zero-sum loss, in float32, removes what the projection leaves",
        "this project",
        numeric_gone("vgg11-exact"),
    ),
    Claim(
        "All of the vision transformer's slingshots are made by rounding", f"{LIU}, table 1", first_survives
    ),
    Claim("Minibatches absorb about half of the rows", f"{LIU}, section 5", minibatch_absorbs),
    Claim("Minibatches do not slingshot", f"{LIU}, section 5", minibatch_calm),
    Claim("Absorption makes ‖μ_G‖ grow under minibatches all the same", f"{LIU}, section 5", minibatch_grows),
    Claim("cos(W_G, μ_G) goes to −1", f"{LIU}, Theorem 3.7", aligned),
    Claim("W_G approaches −μ_G/√K", f"{LIU}, Theorem 3.7", proportional),
    Claim("The mean logit falls, and less in float64", f"{LIU}, section 3", mean_logit_falls),
    Claim("ResNet18 escapes because its ε falls fast", f"{LIU}, section 4", epsilon_falls),
    Claim("The monitor announces every numeric slingshot", "this project", numeric_announced),
    Claim(
        "The monitor announces the others as well",
        "this project",
        announced("vit-float32"),
    ),
)
