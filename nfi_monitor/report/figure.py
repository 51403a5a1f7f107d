"""Draw the after-run figure: loss, zero-sum violation, ‖μ_G‖ and δ over the optimizer steps, with the phases.

It uses matplotlib's object interface on an Agg canvas and no pyplot.  So it changes no global state of the
user's session, and needs no display.
"""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from nfi_monitor.atomic_write import replacing
from nfi_monitor.detect.situation import RunContext
from nfi_monitor.extras import raise_missing
from nfi_monitor.history import History
from nfi_monitor.report import levels
from nfi_monitor.report.pixels import apart, joined, thin
from nfi_monitor.report.terminal import escape_controls
from nfi_monitor.types import Alert, AlertKind, AlertState, Phase

# Colours that keep their order in greyscale and under common colour blindness; healthy has no colour.
PHASE_COLOURS = {
    Phase.ABSORBING: "#FFF1B8",
    Phase.INFLATING: "#FFCE7A",
    Phase.IMMINENT: "#F2916B",
    Phase.SLINGSHOT: "#A0338A",
    Phase.RECOVERING: "#CFE3F5",
}
_ALERT_COLOURS = {
    AlertKind.AT_RISK: "#E0A100",
    AlertKind.IMMINENT: "#D55E00",
    AlertKind.SLINGSHOT: "#A0338A",
    AlertKind.NON_FINITE: "#000000",
}
_ALERT_ROWS = {
    AlertKind.AT_RISK: "at risk",
    AlertKind.IMMINENT: "imminent",
    AlertKind.SLINGSHOT: "slingshot",
    AlertKind.NON_FINITE: "not finite",
}
_ARMS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")  # Okabe & Ito
_INK, _GREY, _GRID = "#1B2733", "#66727F", "#DDE2E7"
_DRAWN = 1e100  # the largest size that is drawn: axes and their ticks overflow long before the numbers
_LABELLED = 24  # alerts that get their id as a label; more labels would overlap

Array = np.ndarray[Any, Any]


class Drawable(Protocol):
    """The attributes of a run that :func:`compare` reads; a ``RunRecord`` has them."""

    @property
    def history(self) -> History: ...
    @property
    def alerts(self) -> list[Alert]: ...


class _Panel(NamedTuple):
    names: tuple[str, ...]  # the first one that was recorded is drawn
    title: str
    log: bool


_PANELS = (
    _Panel(("loss", "head_loss"), "loss", True),
    # The smoothed violation is the one that the detector tests; records of version 0.2 do not have it.
    _Panel(
        ("zero_sum_violation_smoothed", "zero_sum_violation", "zero_sum_violation_weight"),
        "zero-sum\nviolation",
        False,
    ),
    _Panel(("feature_mean_norm",), "feature mean\n" + r"$\|\mu_G\|$", True),
    _Panel(("logit_displacement", "margin_displacement"), "displacement\n" + r"$\delta$ (nat)", True),
)


def draw(
    history: History,
    phases: Sequence[tuple[int, Phase]],
    alerts: Sequence[Alert],
    path: str | os.PathLike[str],
    title: str = "",
    thresholds: Mapping[str, float] | None = None,
) -> Path:
    """Draw one run into ``path`` (its suffix decides the format), and return the path.

    Phases are coloured bands; alerts are bars above the panels.  An exact 0 on a logarithmic axis is drawn at
    the panel's floor, with a note; NaN and Inf are gaps.  ``thresholds`` is ``Thresholds.to_json()`` of the
    run (default: the defaults).  Raises ImportError, with what to install, without matplotlib.
    """
    kinds = [kind for kind in AlertKind if kind is not AlertKind.NON_FINITE or _of_kind(alerts, kind)]
    figure, strip, axes = _figure(title, len(kinds))
    first, last = _extent([history], phases, alerts)
    for axis in axes:
        _shade(axis, phases, last)
    for row, kind in enumerate(kinds):
        _alert_bars(strip, _of_kind(alerts, kind), len(kinds) - 1 - row, last, label=len(alerts) <= _LABELLED)
    strip.set_yticks(range(len(kinds)), [_ALERT_ROWS[kind] for kind in reversed(kinds)])
    for axis, panel in zip(axes, _PANELS, strict=True):
        _finish(axis, panel, [_curve(axis, panel, history, _INK, "")])
    bands = levels.bands(levels.thresholds_of({"thresholds": thresholds}), RunContext())
    _threshold(axes[1], bands["zero_sum_violation_smoothed"].enter, "enter", shift=4)
    _threshold(axes[1], bands["zero_sum_violation_smoothed"].leave, "exit", shift=-3)
    _threshold(axes[3], bands["logit_displacement"].enter, "imminent")
    for axis in (strip, *axes):
        axis.set_xlim(*_limits(first, last))
    _phase_legend(figure, phases)
    return _save(figure, path)


def compare(records: Mapping[str, Drawable], path: str | os.PathLike[str], title: str = "") -> Path:
    """Draw several runs (label → run) over each other, one colour each; return the path.

    The panels are those of :func:`draw`.  Above them, one row for each run shows its alerts: *at risk*
    (light), *imminent* (dark) and slingshots (stars).  Raises ImportError, with what to install, without
    matplotlib.
    """
    figure, strip, axes = _figure(title, max(len(records), 1))
    arms = [(name, record, _ARMS[index % len(_ARMS)]) for index, (name, record) in enumerate(records.items())]
    everything = [alert for _, record, _ in arms for alert in record.alerts]
    first, last = _extent([record.history for _, record, _ in arms], [], everything)
    for row, (_, record, colour) in enumerate(reversed(arms)):
        strip.axhline(row, color=_GRID, linewidth=0.8, zorder=0)
        for kind, height, alpha in ((AlertKind.AT_RISK, 0.34, 0.35), (AlertKind.IMMINENT, 0.34, 0.9)):
            _bars(strip, _of_kind(record.alerts, kind), row, height, last, colour, alpha)
        starts = [alert.first_step for alert in _of_kind(record.alerts, AlertKind.SLINGSHOT)]
        _stars(strip, starts, row, colour)
    strip.set_yticks(range(len(arms)), [name for name, _, _ in reversed(arms)])
    for tick, (_, _, colour) in zip(strip.get_yticklabels(), reversed(arms), strict=True):
        tick.set_color(colour)
        tick.set_fontweight("bold")
    for axis, panel in zip(axes, _PANELS, strict=True):
        notes = []
        for order, (name, record, colour) in enumerate(arms):
            # The first run is the one of interest: draw it on top.
            notes.append(_curve(axis, panel, record.history, colour, name, zorder=3 + len(arms) - order))
        _finish(axis, panel, notes)
    # Runs of one experiment share their thresholds.
    info = getattr(arms[0][1], "info", {}) if arms else {}
    bands = levels.bands(levels.thresholds_of(info), RunContext())
    _threshold(axes[1], bands["zero_sum_violation_smoothed"].enter, "enter")
    _threshold(axes[3], bands["logit_displacement"].enter, "imminent")
    for axis in (strip, *axes):
        axis.set_xlim(*_limits(first, last))
    _arm_legend(figure)
    return _save(figure, path)


# --- the parts --------------------------------------------------------------------------------------


def _figure(title: str, rows: int) -> tuple[Any, Any, list[Any]]:
    """Make a figure with a strip of ``rows`` rows for alerts above the four panels."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise_missing(error, ("matplotlib",), 'Figures need matplotlib: pip install "nfi-monitor[plots]"')
    figure = Figure(figsize=(9, 7.4), dpi=160, facecolor="white")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(
        5, 1, height_ratios=[0.2 * rows + 0.06, 1, 1, 1, 1],
        left=0.105, right=0.9, top=0.935, bottom=0.112, hspace=0.13,
    )  # fmt: skip
    strip = figure.add_subplot(grid[0])
    axes = [figure.add_subplot(grid[index], sharex=strip) for index in range(1, 5)]
    for axis in (strip, *axes):
        for side in ("top", "right", "left", "bottom"):
            axis.spines[side].set_color(_GRID)
            axis.spines[side].set_linewidth(0.8)
        axis.tick_params(labelsize=8.5, colors=_GREY, labelcolor=_INK, length=3, width=0.8)
        if axis is not axes[-1]:
            axis.tick_params(axis="x", bottom=False, labelbottom=False)
    for side in ("top", "right", "left", "bottom"):
        strip.spines[side].set_visible(False)
    strip.tick_params(axis="y", length=0)
    strip.set_ylim(-0.6, rows - 0.4)
    axes[-1].set_xlabel("optimizer step", fontsize=9.5, color=_INK)
    axes[-1].xaxis.set_major_locator(MaxNLocator(nbins=9, steps=[1, 2, 2.5, 5, 10], integer=True))
    axes[-1].xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    if title:
        # A model's name may have dollar signs: it is no formula.
        figure.text(0.105, 0.968, title, fontsize=12.5, fontweight="bold", color=_INK, ha="left",
                    va="center", parse_math=False)  # fmt: skip
    return figure, strip, axes


def _save(figure: Any, path: str | os.PathLike[str]) -> Path:
    """Write the figure at once: a link in a run directory is replaced, and not followed."""
    path = Path(path) if Path(path).suffix else Path(path).with_suffix(".png")
    drawn = io.BytesIO()
    figure.savefig(drawn, facecolor="white", format=path.suffix[1:])
    with replacing(path) as file:
        file.write(drawn.getvalue())
    return path


def _of_kind(alerts: Sequence[Alert], kind: AlertKind) -> list[Alert]:
    return [alert for alert in alerts if alert.kind is kind]


def _extent(
    histories: Sequence[History], phases: Sequence[tuple[int, Phase]], alerts: Sequence[Alert]
) -> tuple[int, int]:
    """Return the first and the last step of everything that is drawn; (0, 1) if there is nothing."""
    steps = [step for step, _ in phases] + [alert.last_step for alert in alerts]
    steps += [alert.first_step for alert in alerts]
    for history in histories:
        for panel in _PANELS:
            for name in panel.names:
                found, _ = history[name]
                steps += [int(found[0]), int(found[-1])] if len(found) else []
    return (min(steps), max(steps)) if steps else (0, 1)


def _limits(first: int, last: int) -> tuple[float, float]:
    return (first, last + (last - first) * 0.005) if last > first else (first - 1, last + 1)


def _shade(axis: Any, phases: Sequence[tuple[int, Phase]], last: int) -> None:
    """Draw phases as bands over the whole height, one matplotlib collection for each phase."""
    for phase, colour in PHASE_COLOURS.items():
        spans = [
            (start, max(end - start, 1))
            for (start, current), (end, _) in pairwise([*phases, (last, Phase.HEALTHY)])
            if current is phase
        ]
        spans = joined(spans)
        # A slingshot can be one step in a hundred thousand: an outline keeps it visible.
        width = 1.2 if phase is Phase.SLINGSHOT and len(spans) < 100 else 0
        axis.broken_barh(
            spans, (0, 1), transform=axis.get_xaxis_transform(), facecolor=colour, zorder=0,
            alpha=0.55 if phase is Phase.SLINGSHOT else 0.75, edgecolor=colour, linewidth=width,
        )  # fmt: skip


def _bars(
    axis: Any, alerts: list[Alert], row: int, height: float, last: int, colour: str, alpha: float
) -> None:
    ends = [alert.last_step if alert.state is AlertState.RESOLVED else last for alert in alerts]
    spans = [
        (alert.first_step, max(end - alert.first_step, 1)) for alert, end in zip(alerts, ends, strict=True)
    ]
    axis.broken_barh(
        joined(spans),
        (row - height / 2, height),
        facecolor=colour,
        alpha=alpha,
        linewidth=0.6,
        edgecolor=colour,
    )


def _stars(axis: Any, steps: list[int], row: int, colour: str) -> None:
    steps = apart(steps)
    axis.plot(steps, [row] * len(steps), "*", color=colour, markersize=11, markeredgecolor="white",
              markeredgewidth=0.6, clip_on=False, zorder=5)  # fmt: skip


def _alert_bars(axis: Any, alerts: list[Alert], row: int, last: int, label: bool) -> None:
    """Draw one row of the strip: a bar from each alert's first to its last step, with its id."""
    axis.axhline(row, color=_GRID, linewidth=0.8, zorder=0)
    if not alerts:
        return
    kind = alerts[0].kind
    colour = _ALERT_COLOURS[kind]
    if kind is AlertKind.SLINGSHOT:
        _stars(axis, [alert.first_step for alert in alerts], row, colour)
    else:
        _bars(axis, alerts, row, 0.2, last, colour, 0.95)
        starts = apart(alert.first_step for alert in alerts)
        axis.plot(starts, [row] * len(starts), "o", color=colour, markersize=4.5,
                  markeredgecolor="white", markeredgewidth=0.6, clip_on=False, zorder=4)  # fmt: skip
    for alert in alerts if label else ():
        axis.annotate(
            escape_controls(alert.id), (alert.first_step, row), xytext=(0, 3.5), textcoords="offset points",
            fontsize=6.5, ha="left", va="bottom", color=_GREY, annotation_clip=False, zorder=6,
            parse_math=False,
        )  # fmt: skip


def _curve(axis: Any, panel: _Panel, history: History, colour: str, name: str, zorder: int = 3) -> str:
    """Draw a panel's quantity. Return a note for the reader, or an empty string."""
    steps, values = np.empty(0, np.int64), np.empty(0)
    for quantity in panel.names:
        if len(history[quantity][0]):
            steps, values = history[quantity]
            break
    if not len(steps):
        return f"{name}: not measured" if name else "not measured"
    said = []
    bad = int(np.count_nonzero(~np.isfinite(values)))
    values = np.where(np.isfinite(values), np.clip(values, -_DRAWN, _DRAWN), values)
    if bad:
        said.append(f"{bad:,} not finite (gaps)")
    zeros = 0
    if panel.log:
        positive = values[np.isfinite(values) & (values > 0)]
        zeros = int(np.count_nonzero(values == 0))
        floor = max(float(positive.min()) / 3, 1 / _DRAWN) if len(positive) else 1e-12
        values = np.where(np.isfinite(values) & (values <= 0), np.nan if not zeros else floor, values)
        if zeros:
            said.append(f"exactly 0 in {zeros:,} of {len(values):,} readings, shown at the floor")
        values = np.where((values > 0) & (values < floor), floor, values)
    steps, values = thin(steps, values)
    marker = "o" if len(steps) < 3 else None
    axis.plot(
        steps, np.where(np.isfinite(values), values, np.nan), color=colour, linewidth=1.15, marker=marker,
        markersize=3.5, solid_joinstyle="round", zorder=zorder,
    )  # fmt: skip
    text = "; ".join(said)
    return f"{name}: {text}" if name and text else text


def _finish(axis: Any, panel: _Panel, notes: Sequence[str]) -> None:
    axis.set_ylabel(panel.title, fontsize=9, color=_INK)
    axis.yaxis.set_label_coords(-0.075, 0.5)
    drawn = [line.get_ydata() for line in axis.get_lines()]
    if panel.log and any(np.isfinite(np.asarray(y, float)).any() for y in drawn):
        from matplotlib.ticker import LogLocator, NullLocator

        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(numticks=5))
        axis.yaxis.set_minor_locator(NullLocator())
        axis.margins(y=0.12)
    elif not panel.log and drawn:
        top = max((float(np.nanmax(y)) for y in drawn if np.isfinite(y).any()), default=1.0)
        axis.set_ylim(0, max(1.02, top * 1.05))
    else:
        axis.set_yticks([])
    axis.grid(axis="y", color=_GRID, linewidth=0.6, zorder=1)
    axis.set_axisbelow(False)
    said = " · ".join(note for note in notes if note)
    if said:  # above the panel: inside, it could lie on a curve
        axis.text(
            1, 1.015, said, transform=axis.transAxes, fontsize=6.5, color=_GREY, ha="right", va="bottom"
        )


def _threshold(axis: Any, value: float, name: str, shift: float = 0) -> None:
    """Draw a dashed line, with its name in the right margin, where there is no curve."""
    low, high = axis.get_ylim()
    if not axis.get_lines() or not low <= value:
        return
    if value > high:
        axis.set_ylim(low, value * 2 if axis.get_yscale() == "log" else value * 1.1)
    axis.axhline(value, color=_INK, linewidth=0.8, linestyle=(0, (4, 3)), zorder=2)
    axis.annotate(
        f"{name} {value:g}", (1, value), xycoords=("axes fraction", "data"), xytext=(4, shift),
        textcoords="offset points", fontsize=7, color=_INK, va="center", annotation_clip=False,
    )  # fmt: skip


def _phase_legend(figure: Any, phases: Sequence[tuple[int, Phase]]) -> None:
    from matplotlib.patches import Patch

    seen = {phase for _, phase in phases}
    patches = [
        Patch(facecolor=colour, alpha=0.75, label=str(phase))
        for phase, colour in PHASE_COLOURS.items()
        if phase in seen
    ]
    if patches:
        _legend(figure, patches)


def _arm_legend(figure: Any) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    _legend(
        figure,
        [
            Patch(facecolor=_GREY, alpha=0.35, label="at risk"),
            Patch(facecolor=_GREY, alpha=0.9, label="imminent"),
            Line2D([], [], marker="*", linestyle="none", color=_GREY, markersize=9, label="slingshot"),
        ],
    )


def _legend(figure: Any, handles: list[Any]) -> None:
    figure.legend(
        handles=handles, loc="lower left", bbox_to_anchor=(0.098, 0.012), ncols=len(handles), frameon=False,
        fontsize=8.5, labelcolor=_INK, handlelength=1.6, handleheight=1.0, columnspacing=1.6,
        handletextpad=0.6,
    )  # fmt: skip
