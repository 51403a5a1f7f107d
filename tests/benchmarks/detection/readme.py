"""The README's figures about the warnings, made from the pages of the proving ground.

``python -m tests.benchmarks.detection.readme`` puts them there, between comments such as
``<!-- figures: first -->`` and ``<!-- end of figures -->``; a test holds the README to the pages.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.benchmarks.detection.families import NEWEST_FIRST

HERE = Path(__file__).parent
README = HERE.parents[2] / "README.md"
ORDINARY = HERE / "ordinary" / "ORDINARY.md"
FROZEN, QUICK = HERE / "FROZEN.md", HERE / "QUICK.md"
PROOFS = HERE / "proofs" / "PROOFS.md"
PAGES = (ORDINARY, FROZEN, QUICK, PROOFS)

NUMERIC, OTHERS = "Slingshots, numeric", "Slingshots, second moment, edge of stability"
PEERS = {
    "gradient norm, z > 3": "gradient norm, z > 3",
    "log loss, CUSUM": "log loss, CUSUM",
    "trainscope, change point": "trainscope 1.8.1, change point",
    "trainpulse, any alert": "trainpulse 0.4.0, any alert",
    "arc-training, drift": "arc-training 5.2.0, drift",
    "kill switch, window of 20": "kill switch, window of 20",
    "loss > 5 × rolling mean": "loss > 5 × rolling mean",
    "RMS_t > 2.3, any tensor": "RMS_t > 2.3",
}
"""Rule → its name in the README."""


class Page:
    """A page that a command wrote.

    Raises KeyError for a table or a row that the page does not have.
    """

    def __init__(self, path: Path) -> None:
        first, *halves = re.split(r"\n(?=# )", path.read_text(encoding="utf-8"))
        self.text = "\n".join([first, *halves[:1]])  # the newest half comes first

    def found(self, pattern: str) -> tuple[str, ...]:
        match = re.search(pattern, self.text)
        if match is None:
            raise KeyError(pattern)
        return match.groups()

    def rows(self, title: str) -> dict[str, list[str]]:
        """Return first cell → the other cells, of the table under a title."""
        parts = self.text.split(f"\n## {title}\n")
        if len(parts) != 2:
            raise KeyError(title)
        lines = parts[1].split("\n## ")[0].splitlines()
        cells = [re.split(r"(?<!\\) *\| *", line)[1:-1] for line in lines if line.startswith("|")]
        return {first: rest for first, *rest in cells[2:]}


# --- cells ---------------------------------------------------------------------------------------------


def _count(cell: str) -> str:
    """ "51/51 [0.93, 1.00]" → "51 of 51"."""
    match = re.match(r"(?:[\d.]+: )?(\d+)/(\d+)", cell)
    return f"{match[1]} of {match[2]}" if match else "–"


def _rate(cell: str) -> str:
    return cell.split(" ")[0]


def _lead(cell: str) -> str:
    """ "128 (68) steps, 6.4 (3.4) τ" → "6.4 τ"; leads below one τ in steps."""
    match = re.match(r"(\d+) \(\d+\) steps, ([\d.]+) \(", cell)
    if match is None:
        return "–"
    one = match[1] == "1"
    return f"{match[2]} τ" if float(match[2]) >= 1 else f"{match[1]} step{'' if one else 's'}"


def _percent(cell: str) -> str:
    value = float(cell.rstrip("%"))
    return f"{value:.0f}%" if value >= 10 else f"{value:.1f}%"


def _markdown(*rows: list[str]) -> str:
    header, *rest = rows
    lines = [header, ["---"] * len(header), *rest]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines).replace("| --- ", "|---") + "\n"


# --- blocks ----------------------------------------------------------------------------------------------


def _first() -> Iterator[str]:
    ordinary, frozen = Page(ORDINARY), Page(FROZEN)
    families, _, _ = ordinary.found(r"(\d+) families, (\d+) runs, ([\d,]+) optimizer steps")
    together = ordinary.rows("Together")
    rows = []
    halves = [f"{half} half" for half in NEWEST_FIRST]
    unseen = next((half for half in halves if half in together), halves[-1])
    for half, name in (("all", ""), (unseen, ", families on which no constant was chosen")):
        if half in together:
            size, _, _, imminent, imminent_auto, false, false_auto, under, under_auto, read = together[half]
            steps_of = re.sub(r".*, (?=[\d,]+ steps)| steps", "", size)
            rows.append([f"every step read{name}", steps_of, imminent, false, under, "100%"])
            rows.append([f"with the defaults{name}", steps_of, imminent_auto, false_auto, under_auto, read])
    yield _markdown(
        [f"{families} kinds of ordinary training", "steps", "false *imminent*",
         "false *slingshot*", "steps under a warning", "steps read"],
        *rows,
    )  # fmt: skip
    rows = []
    for title, name in (
        (NUMERIC, "rounding in the loss (numerical feature inflation)"),
        (OTHERS, "the optimizer (second moment, edge of stability)"),
    ):
        found = frozen.rows(title)
        cells = [
            cell
            for rule in ("at risk, warning", "imminent")
            for cell in (
                _count(found[rule][0]),
                "–" if found[rule][0].startswith("0/") else _lead(found[rule][3]),
                _percent(found[rule][4]),
            )
        ]
        rows.append([name, *cells])
    families, _, steps = frozen.found(r"(\d+) families, (\d+) runs, ([\d,]+) optimizer steps")
    yield _markdown(
        [f"{families} families with slingshots, on which no constant was chosen, {steps} steps",
         "*at risk* as a warning: warned", "median lead", "steps under it", "*imminent*: warned",
         "median lead", "steps under it"],
        *rows,
    )  # fmt: skip


def _compared() -> Iterator[str]:
    ordinary, frozen = Page(ORDINARY), Page(FROZEN)
    everyday, numeric, others = (
        ordinary.rows("The monitor and its peers"), frozen.rows(NUMERIC), frozen.rows(OTHERS)
    )  # fmt: skip
    names = {
        "imminent": ("nfi-monitor, imminent or slingshot, every step", "**nfi-monitor**, every step"),
        "imminent, auto": ("nfi-monitor, imminent or slingshot, auto", "**nfi-monitor**, defaults"),
    } | {rule: (rule, name) for rule, name in PEERS.items()}
    rows = []
    for rule, (everyday_name, name) in names.items():
        if rule not in numeric:
            continue
        warned, _, in_time, lead, under, false = numeric[rule][:6]
        quiet = everyday.get(everyday_name)
        rows.append([name, _rate(quiet[1]) if quiet else "–", _count(warned), _count(in_time).split(" ")[0],
                     _lead(lead), _percent(under), _rate(false), _count(others[rule][0])])  # fmt: skip
    yield _markdown(
        ["rule", "false alarms in 10,000 ordinary steps", "numeric slingshots warned of",
         "of them ≥ 1.25 τ ahead", "median lead", "steps under this alarm",
         "false alarms in 10,000 steps of these runs", "other slingshots warned of"],
        *rows,
    )  # fmt: skip


def _measured() -> Iterator[str]:
    frozen, quick = Page(FROZEN), Page(QUICK)
    goals = frozen.rows("Targets")
    measured = {name: cells[1] for name, cells in goals.items()}
    reached = sum(cells[2] == "yes" for cells in goals.values())
    missed = [name.replace("\\|", "|") for name, cells in goals.items() if cells[2] == "**no**"]
    other = frozen.rows(OTHERS)["imminent"]
    false = re.search(
        r"(\d+) in ([\d,]+) steps", _of(measured, "second moment, edge of stability, imminent: false")
    )
    assert false is not None
    yield (
        f"- **Other mechanisms.** *Imminent* comes before {_count(other[0])} slingshots of the second moment "
        f"and of the edge of stability; the median lead is {_lead(other[3])}. False alarms in the same runs: "
        f"{false.group(1)} in the {false.group(2)} steps that are farther than 10 τ from a slingshot."
    )
    imminent = _count(_of(measured, "P(slingshot within 10 τ"))
    warnings = _count(_of(measured, "P(slingshot within 40 τ"))
    yield (
        f"- **What follows an alarm.** Within 10 τ after *imminent*, a slingshot comes in {imminent} cases; "
        f"within 40 τ after *at risk* became a warning, in {warnings}. The other runs absorb without a "
        "slingshot, or have it later."
    )
    none = measured["slingshots called that are none"]
    yield (
        f"- **Slingshots named.** {_count(measured['slingshots called, of those in the truth'])} slingshots "
        f"have an alert *slingshot*. Slingshots named that are none: {none}."
    )
    _, true, called, *_ = Page(ORDINARY).rows("Together")["all"]
    yield (
        f"- **In the ordinary trainings** {true} slingshots happened, too; {called} of them have an alert "
        "*slingshot*."
    )
    lost, found = re.match(  # type: ignore[union-attr]
        r"([-\d.]+) points: .*; ([\d.]+%) of the steps read", _of(measured, "`every")
    ).groups()
    yield (
        f'- **Sparse reading.** With `every="auto"` the monitor reads {_percent(found)} of the steps of '
        f"these runs, and the recall of *imminent* {'rises' if float(lost) < 0 else 'falls'} "
        f"by {abs(float(lost)):.1f} points."
    )
    yield from _proofs()
    yield (
        f"- **Targets.** {reached} of the {len(goals)} targets of FROZEN.md are reached. Missed: "
        + ("; ".join(missed) or "none")
        + "."
    )
    yield from _quick(quick)


def _of(measured: dict[str, str], start: str) -> str:
    return next(cell for name, cell in measured.items() if name.startswith(start))


def _proofs() -> Iterator[str]:
    """What was measured by training again; a row without a number is left out."""
    rows = {name: cells[1] for name, cells in Page(PROOFS).rows("Targets").items()}

    def told(*names: tuple[str, str]) -> str:
        counts = ((_count(rows.get(row, "–")), name) for row, name in names)
        return ", ".join(f"{count} {name}" for count, name in counts if count != "–")

    link = "([PROOFS.md](tests/benchmarks/detection/proofs/PROOFS.md))"
    if named := told(
        ("mechanism, numerical feature inflation", "numeric"),
        ("mechanism, second moment, edge of stability", "of the second moment or the edge of stability"),
        ("mechanism, external", "external"),
    ):
        yield f"- **Mechanism.** The alert names what a replay finds, by the defaults: {named} {link}."
    if averted := told(
        ("averted from the first alarm on, numeric", "numeric slingshots from the first alarm on"),
        ("averted from imminent on, numeric", "from *imminent* on"),
        ("averted from the first alarm on, second moment, edge of stability",
         "others from the first alarm on"),
        ("averted from imminent on, second moment, edge of stability", "others from *imminent* on"),
    ):  # fmt: skip
        yield f"- **Averted by the first advice of the alert.** {averted}."
    if confirmed := told(("at risk confirmed by the float64 twin", "warnings")):
        yield f"- **Float64 twin.** It confirms {confirmed}: without rounding the run grows less."
    if (read := rows.get("share of steps read, runs that absorb", "–")) != "–":
        yield f"- **Runs that absorb for good** are read at these shares of their steps: {read}."


def _quick(quick: Page) -> Iterator[str]:
    families, _, steps = quick.found(r"(\d+) families, (\d+) runs, ([\d,]+) optimizer steps")
    numeric, others = quick.rows(NUMERIC), quick.rows(OTHERS)
    calm = sum(int(cells[4].split(" ")[0]) for cells in quick.rows("Quiet families").values())
    (quiet,) = quick.found(r"\(([\d,]+) of them in quiet families\)")
    soon, other = numeric["imminent"], others["imminent"]
    yield (
        f"- **The quick suite** ([QUICK.md](tests/benchmarks/detection/QUICK.md), {families} families, "
        f"{steps} steps), on which constants were chosen: *imminent* before {_count(soon[0])} numeric "
        f"slingshots ({_lead(soon[3])} ahead, {_percent(soon[4])} of the steps under the alarm) and "
        f"{_count(other[0])} others; {calm} false *imminent* in {quiet} quiet steps."
    )


BLOCKS: dict[str, Callable[[], Iterator[str]]] = {
    "first": _first,
    "compared": _compared,
    "measured": _measured,
}


def filled(text: str) -> str:
    """Return the README with its blocks made anew. Raises ValueError for a block that it does not have."""
    for name, make in BLOCKS.items():
        begin, end = f"<!-- figures: {name} -->\n", "<!-- end of figures -->"
        if text.count(begin) != 1:
            raise ValueError(f"README has no block {begin!r}, or several.")
        before, rest = text.split(begin)
        separator = "\n" if name != "measured" else ""
        body = separator.join(part if part.endswith("\n") else _wrapped(part) for part in make())
        text = f"{before}{begin}\n{body}\n{end}{rest.split(end, 1)[1]}"
    return text


def _wrapped(item: str, width: int = 119) -> str:
    """Return a list item, broken into lines."""
    lines, line = [], ""
    for word in item.split(" "):
        if line and len(line) + 1 + len(word) > width:
            lines.append(line)
            line = " "
        line = f"{line} {word}" if line else word
    return "\n".join([*lines, line]) + "\n"


def main() -> None:
    README.write_text(filled(README.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
