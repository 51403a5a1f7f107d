"""Make RESULTS.md from the stored result files: ``python -m examples.reference.verdicts``.

No number on that page is typed by hand: claims come from the studies, numbers from the files in ``results/``.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

if not __package__:  # run as a script: import from the root of the checkout
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from examples.reference.judge import Judgement, Verdict
from examples.reference.results import RESULTS, Results
from examples.reference.study import RUN_COLUMNS, Preset, Study, judged, load_study, run_rows

STUDIES = ("parity", "modular_division", "cifar", "gpt")
PAGE = Path(__file__).parent / "RESULTS.md"
COMMAND = "python -m examples.reference.verdicts"


def page(studies: Sequence[Study], directory: Path) -> str:
    """Return the whole page."""
    parts: list[str] = []
    total: Counter[Verdict] = Counter()
    for study in studies:
        for preset in study.presets:
            lines, found = _section(study, preset, directory)
            parts += lines
            total.update(found)
    counted = ", ".join(f"{total[verdict]} {verdict}" for verdict in Verdict)
    head = [
        "# The papers' experiments, each with its verdict",
        "",
        f"Made by `{COMMAND}` from the files in [results](results); do not edit.",
        "Intervals are 95%: Wilson's for shares, a bootstrap's for medians, or what stands there.",
        "A slingshot is counted by W. Wu's rule: the loss, having been below 1e-2, exceeds 1e-1.",
        "",
        f"{sum(total.values())} verdicts: {counted}.",
        "",
    ]
    return "\n".join(head + parts).rstrip() + "\n"


def _section(study: Study, preset: Preset, directory: Path) -> tuple[list[str], list[Verdict]]:
    title = f"## {study.title}, preset {preset.name}"
    where = directory / study.name / preset.name
    results = Results.load(where)
    problems = [f"Left out: {problem}." for problem in results.problems]
    how = f"`python -m examples.reference.{study.name} --preset {preset.name}`"
    if not len(results):
        return [title, "", *problems, f"Not run at this scale: {how}.", ""], []
    verdicts = judged(study, results)
    made = sorted({str(run.made.get("date")) for run in results})
    seconds = sum(float(run.made.get("seconds", 0)) for run in results)
    versions = {
        f"torch {run.made['versions']['torch']} on {run.made['device']}"
        for run in results
        if "versions" in run.made
    }
    lines = [title, "", f"{how}: {len(results)} runs, {seconds / 60:.0f} minutes of one core"]
    lines[-1] += f", made {made[0]}" + (f" to {made[-1]}" if len(made) > 1 else "")
    lines[-1] += f", {', '.join(sorted(versions))}."
    lines += ["", *problems]
    lines += _markdown(("claim", "source", "ours", "interval", "verdict"), _rows(verdicts))
    lines += ["", *_markdown(RUN_COLUMNS, run_rows(study, results)), ""]
    figure = where / "figure.png"
    if figure.exists():
        lines += [f"![{study.title}]({figure.relative_to(directory.parent).as_posix()})", ""]
    return lines, [found.verdict for _, found in verdicts]


def _rows(verdicts: Iterable[tuple[object, Judgement]]) -> list[tuple[str, ...]]:
    return [
        (claim.text, claim.source, found.ours, found.interval, f"**{found.verdict}**")  # type: ignore[attr-defined]
        for claim, found in verdicts
    ]


def _markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"

    return [line(header), "|" + "---|" * len(header), *(line(row) for row in rows)]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__)
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help="result files (default: beside the code)"
    )
    parser.add_argument(
        "--out", type=Path, default=PAGE, help="the page (default: RESULTS.md beside the code)"
    )
    args = parser.parse_args(argv)
    args.out.write_text(page([load_study(name) for name in STUDIES], args.results), encoding="utf-8")
    print(f"written: {args.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
