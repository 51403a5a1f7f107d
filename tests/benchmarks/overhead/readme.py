"""The README's table of what the monitor costs, made from OVERHEAD.md.

``python -m tests.benchmarks.overhead.readme`` puts it there; a test holds one to the other.
"""

from __future__ import annotations

import re
from pathlib import Path

from tests.benchmarks.overhead.__main__ import PAGE

README = Path(__file__).resolve().parents[3] / "README.md"
MODELS = {
    "mlp-26k": "MLP, 26k parameters",
    "transformer-422k": "transformer, 422k",
    "mlp-2.6M": "MLP, 2.6M",
    "gpt-10M": "GPT, 10M, 8,192 classes",
    "head-heavy": "50,257 classes × 1,024 rows",
    "parameters-50M": "MLP, 48M",
}
HEADER = (
    "| model | a bare step | default, own clock | default, ratio | every step, own clock "
    "| trainscope 1.8.1, ratio | trainpulse 0.4.0, loss, ratio |"
)


def table(page: str) -> str:
    """The rows of one thread."""
    lines = [HEADER, "|" + "---|" * 7]
    for case, model in MODELS.items():
        section = page.split(f"\n## {case}, 1 thread\n")[1].split("\n## ")[0]
        bare = re.search(r"a bare step takes (\S+) ms", section)
        assert bare is not None
        arms = {cells[0]: cells[1:] for cells in map(_cells, section.splitlines()) if len(cells) == 5}
        default, each = arms["default"], arms["every step"]
        peers = [arms[name][0].split()[0] if name in arms else "–" for name in PEERS]
        cells = [model, _duration(float(bare[1])), default[3], default[0], each[3], *peers]
        lines.append("| " + " | ".join(_shorter(cell) for cell in cells) + " |")
    return "\n".join(lines) + "\n"


PEERS = ("trainscope", "trainpulse, loss")


def noise(page: str) -> tuple[str, str]:
    """The lowest and the highest ratio of an identical bare copy on one thread."""
    found = [
        re.search(r"\| bare, again \| (\S+)", page.split(f"\n## {case}, 1 thread\n")[1]) for case in MODELS
    ]
    ratios = [float(match[1]) for match in found if match is not None]
    return f"{min(ratios):.2f}", f"{max(ratios):.2f}"


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("| ") else []


def _duration(milliseconds: float) -> str:
    return f"{_two_digits(milliseconds)} ms" if milliseconds < 100 else f"{milliseconds / 1e3:.2g} s"


def _shorter(cell: str) -> str:
    """Ratios to two decimals, shares to two digits."""
    cell = re.sub(r"\d+\.\d{3}", lambda number: f"{float(number[0]):.2f}", cell)
    return re.sub(r"(\d+\.?\d*)%", lambda share: f"{_two_digits(float(share[1]))}%", cell)


def _two_digits(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}"


def main() -> None:
    page, text = PAGE.read_text(encoding="utf-8"), README.read_text(encoding="utf-8")
    old = re.search(re.escape(HEADER) + r"\n(\|.*\n)*", text)
    assert old is not None, f"{README} has no such table"
    README.write_text(text.replace(old[0], table(page)), encoding="utf-8")


if __name__ == "__main__":
    main()
