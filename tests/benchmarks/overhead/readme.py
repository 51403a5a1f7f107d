"""The README's six lines about what the monitor costs, made from OVERHEAD.md.

``python -m tests.benchmarks.overhead.readme`` puts them there, between ``<!-- figures: overhead -->`` and
``<!-- end of figures -->``; a test holds one to the other.
"""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

from tests.benchmarks.overhead.__main__ import PAGE

README = Path(__file__).resolve().parents[3] / "README.md"
BEGIN, END = "<!-- figures: overhead -->\n", "<!-- end of figures -->"
MODELS = {
    "mlp-26k": "MLP, 26,000 parameters",
    "transformer-422k": "transformer, 422,000",
    "mlp-2.6M": "MLP, 2.6 million",
    "gpt-10M": "GPT, 10 million, 8,192 classes",
    "head-heavy": "50,257 classes, 1,024 rows a step",
    "parameters-50M": "MLP, 48 million",
}
HEADER = ["your model", "its step takes", "a healthy run takes", "a run at risk takes (each step is read)"]


def block(page: str) -> str:
    """Return table and sentence, from the page's rows of one thread."""
    lines = ["| " + " | ".join(HEADER) + " |", "|" + "---|" * len(HEADER)]
    lines += ["| " + " | ".join(_cells_of(page, case, model)) + " |" for case, model in MODELS.items()]
    return "\n".join(lines) + f"\n\n{_sentence(page)}\n"


def _cells_of(page: str, case: str, model: str) -> list[str]:
    section = page.split(f"\n## {case}, 1 thread\n")[1].split("\n## ")[0]
    bare = re.search(r"a bare step takes (\S+) ms", section)
    assert bare is not None
    arms = {cells[0]: cells[1:] for cells in map(_cells, section.splitlines()) if len(cells) == 5}
    noise = max(_spread(arms["bare, again"][0])[2], 1.0)
    return [
        model,
        _duration(float(bare[1])),
        *(_longer(arms[arm], noise) for arm in ("default", "every step")),
    ]


def _longer(cells: list[str], noise: float) -> str:
    """Return the ratio of wall times where it exceeds a bare copy's ``noise``, else the own clock's share."""
    median, low, _ = _spread(cells[0])
    if low <= noise:
        return f"≈ {_two_digits(float(cells[3].rstrip('%')))}% longer"
    return f"{_two_digits(100 * (median - 1))}% longer" if median < 2 else f"{median:.1f} times as long"


def _sentence(page: str) -> str:
    times = [float(x) for x in re.findall(r"\| ([\d.]+) ms \| [\d.]+ ms \| \d+ \|", page)]
    targets = page.split("\n## Targets\n")[1].split("\n## ")[0]
    verdicts = [cells[-1] for cells in map(_cells, targets.splitlines()) if len(cells) == 5][1:]
    verdicts = [verdict for verdict in verdicts if not verdict.startswith("---")]
    missed = sum(verdict == "missed" for verdict in verdicts)
    date = re.search(r"^date ([\d-]+)", page, re.MULTILINE)
    assert date is not None and times and verdicts
    load = re.search(r", load ([\d.–]+)", page)
    where = f"Measured on {date[1]}, on one CPU thread" + (f", at a load of {load[1]}" if load else "")
    said = (
        f"{where}. ≈: less than two equal copies of that training differ by; then the monitor's own clock "
        f"counted it. A reading takes {_two_digits(min(times))} to {_two_digits(max(times))} ms. {missed} of "
        f"{len(verdicts)} targets are missed; the page lists them."
    )
    return textwrap.fill(said, 119)


def filled(text: str, page: str) -> str:
    """Return the README with the block made anew. Raises ValueError if it has none, or several."""
    if text.count(BEGIN) != 1:
        raise ValueError(f"README has no block {BEGIN!r}, or several.")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{block(page)}\n{END}{rest.split(END, 1)[1]}"


def _spread(cell: str) -> tuple[float, float, float]:
    """Return median and quartiles of a cell such as "1.174 (1.057–1.372)"."""
    median, low, high = re.findall(r"\d+\.\d+", cell)
    return float(median), float(low), float(high)


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("| ") else []


def _duration(milliseconds: float) -> str:
    return f"{_two_digits(milliseconds)} ms" if milliseconds < 100 else f"{milliseconds / 1e3:.2g} s"


def _two_digits(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}"


def main() -> None:
    page, text = PAGE.read_text(encoding="utf-8"), README.read_text(encoding="utf-8")
    README.write_text(filled(text, page), encoding="utf-8")


if __name__ == "__main__":
    main()
