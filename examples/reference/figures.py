"""Draw figures in the papers' form: one column per group of arms, loss on top, explaining series below.

The figures use matplotlib's object interface on an Agg canvas: no display, no global
state. They read only stored series.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from examples.reference.results import NotTested, Result, Results

COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")  # Okabe & Ito
INK, GREY, GRID = "#1B2733", "#66727F", "#DDE2E7"
LABELS = {
    "loss": "loss",
    "zero_sum_violation": "zero-sum violation",
    "feature_mean_norm": "‖μ_G‖",
    "classifier_mean_norm": "‖W_G‖",
    "residual_mass": "ε",
    "mean_alignment": "cos(W_G, μ_G)",
    "test_accuracy": "test accuracy",
    "rms_t_max": "RMS_t",
}
LOGARITHMIC = {"loss", "feature_mean_norm", "classifier_mean_norm", "residual_mass", "rms_t_max", "test_loss"}


def sheet(rows: int, columns: int, title: str) -> tuple[Any, Any]:
    """Return (figure, axes [rows, columns]). Raises ImportError without matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(0.8 + 3.6 * columns, 0.7 + 2.0 * rows), dpi=100, facecolor="white")
    FigureCanvasAgg(figure)
    figure.set_layout_engine("constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        for spine in axis.spines.values():
            spine.set_color(GRID)
        axis.tick_params(labelsize=7.5, colors=GREY, labelcolor=INK)
        axis.grid(color=GRID, linewidth=0.5)
        axis.set_axisbelow(True)
    figure.suptitle(title, fontsize=11, fontweight="bold", color=INK, x=0.01, ha="left")
    return figure, axes


def save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, facecolor="white", metadata={"Software": None})


def first(results: Results, arm: str) -> Result:
    """Return the run with stored series. Raises NotTested without one."""
    for run in results[arm]:
        if run.series:
            return run
    raise NotTested(f"no series of arm {arm}")


def curve(axis: Any, run: Result, name: str, colour: str, label: str = "") -> bool:
    """Draw one series; on a logarithmic axis exact zeros lie at the bottom. False if it was not stored."""
    if name not in run.series:
        return False
    steps, values = run.series[name]
    values = np.where(np.isfinite(values), values, np.nan).astype(float)
    if name in LOGARITHMIC:
        positive = values[values > 0]
        values = np.where(values > 0, values, positive.min() if len(positive) else np.nan)
        axis.set_yscale("log")
        axis.yaxis.set_minor_formatter("")
    axis.plot(steps, values, color=colour, linewidth=0.9, label=label)
    return True


def loss_figure(
    results: Results,
    path: Path,
    title: str,
    rows: Sequence[tuple[str, Sequence[str]]],
    names: Sequence[str] = ("loss", "zero_sum_violation"),
) -> None:
    """Draw one column per group ``(title, arms)`` and one row per series name.

    Arms without results are left out. Raises NotTested if there is nothing to draw.
    """
    groups = []
    for heading, arms in rows:
        there = [arm for arm in arms if arm in results and any(run.series for run in results[arm])]
        if there:
            groups.append((heading, there))
    if not groups:
        raise NotTested("no series of the arms it shows")
    figure, axes = sheet(len(names), len(groups), title)
    for column, (heading, arms) in enumerate(groups):
        for row, name in enumerate(names):
            axis = axes[row][column]
            drawn = [
                curve(axis, first(results, arm), name, COLOURS[index % len(COLOURS)], arm)
                for index, arm in reversed(list(enumerate(arms)))  # draws the first arm on top
            ]
            if not any(drawn):
                axis.text(
                    0.5, 0.5, "not measured", transform=axis.transAxes, ha="center", color=GREY, fontsize=8
                )
            if column == 0:
                axis.set_ylabel(LABELS.get(name, name.replace("_", " ")), fontsize=8.5, color=INK)
            if row == 0:
                axis.set_title(heading, fontsize=9, color=INK, loc="left")
                axis.legend(fontsize=6.5, frameon=False, loc="best")
            if row == len(names) - 1:
                axis.set_xlabel("optimizer step", fontsize=8, color=INK)
    save(figure, path)
