"""Make docs/compatibility.md from the zoo's results and the rows of the tests.

``python -m tests.zoo.page`` writes it.
``results.json`` is written by ``make test-zoo``, ``modes.json`` by ``python -m tests.compatibility``.
"""

from __future__ import annotations

import collections
import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).with_name("results.json")
MODES = Path(__file__).with_name("modes.json")
PAGE = Path(__file__).resolve().parents[2] / "docs" / "compatibility.md"

VERDICTS = ("right", "degraded", "wrong", "broken")
_WHY = {
    "head_never_fired": "the logits are not made by a call of the head that can be hooked",
    "no_head": "no head was found",
    "several_heads": "several heads",
    "logits_changed": "the loop changes the logits after the model",
    "no_steps": "no step of the optimizer is called",
    "refused": "refused before step 1 until head= is named",
    "": "not said",
}
"""Code of a note → why no rows are seen."""

_HEAD = """\
# What is seen where

This page is made by `python -m tests.zoo.page` from two records: the zoo (`make test-zoo`, {versions}), and
the tests that passed (`python -m tests.compatibility`, {mode_versions}).

## Libraries

Each configuration of the zoo (`tests/zoo/tables/`) is a small training of a library. It runs twice with the
same seeds, without and with the monitor.

- *Right*: the monitor attaches and names the right head. It reads the loss that is trained (compared with the
  tensor on which `backward` is called) and the rows of that loss (compared with `F.cross_entropy`). Every
  note is true, and there is no alarm. Weights, buffers and random state are bit for bit those without the
  monitor.
- *Degraded*: something that could be seen is not seen, and a true note says so.
- *Wrong*: anything else.

*Rows*: zero-sum, absorption and margins of single rows. They come from the logits of the loss, or are
*recomputed* from the features where the loss makes no logits (fused and chunked losses), or there are none. A
loss without classes (regression, contrastive losses, one output) has no such rows.

"""
_COLUMNS = (
    "library", "configurations", "right", "degraded", "wrong", "rows: from the loss's logits", "recomputed",
    "none (why)", "loss without classes",
)  # fmt: skip

_MODES = """
## Modes, also of several processes

*rows*: as above. *head's gradient*: the zero-sum of the head's weight gradient, at batch level; it means
nothing for a tied head. *second moment*: sqrt(v̂), RMS_t and what follows from them. *loss*: of every step,
without a call of yours. *bitwise*: weights, optimizer and random state are those of the training without the
monitor.

| framework | mode | rows | head's gradient | second moment | loss | bitwise |
|---|---|---|---|---|---|---|
"""


def render(results: dict[str, Any], modes: dict[str, Any]) -> str:
    """Return the page. ``results``: of the zoo; ``modes``: {"versions": …, "rows": lines of the table}."""
    found = results["configurations"]
    libraries = list(dict.fromkeys(row["library"] for row in found))
    lines = [_library(name, [row for row in found if row["library"] == name]) for name in libraries]
    lines.append(_library("**all**", found))
    page = _HEAD.format(versions=_versions(results["versions"]), mode_versions=_versions(modes["versions"]))
    page += "| " + " | ".join(_COLUMNS) + " |\n" + "|---" * len(_COLUMNS) + "|\n"
    page += "\n".join(lines) + "\n"
    page += _listed("Degraded", [row for row in found if row["verdict"] == "degraded"])
    page += _listed("Wrong", [row for row in found if row["verdict"] in ("wrong", "broken")])
    if results["not_installable"]:
        page += "\n### Not installable here\n\nThese were not tried:\n\n"
        page += "".join(f"- {name}: {reason}\n" for name, reason in results["not_installable"].items())
    return page + _MODES + "\n".join(modes["rows"]) + "\n"


def _library(name: str, rows: list[dict[str, Any]]) -> str:
    """One line of the table of libraries."""
    verdicts = collections.Counter(row["verdict"] for row in rows)
    kinds = collections.Counter(row["rows"] for row in rows)
    why = collections.Counter(_WHY.get(row["why"], row["why"]) for row in rows if row["rows"] == "none")
    reasons = "; ".join(f"{count}: {reason}" for reason, count in why.most_common())
    cells = [
        name, len(rows), verdicts["right"], verdicts["degraded"], verdicts["wrong"] + verdicts["broken"],
        kinds["logits"], kinds["recomputed"], reasons or 0, kinds["no classes"],
    ]  # fmt: skip
    return "| " + " | ".join(map(str, cells)) + " |"


def _listed(title: str, rows: list[dict[str, Any]]) -> str:
    if not rows:
        return ""
    lines = [f"- {row['library']}, {row['name']}: {'; '.join(row['causes'])}\n" for row in rows]
    return f"\n### {title}\n\n" + "".join(lines)


def _versions(versions: dict[str, str]) -> str:
    return "with " + ", ".join(f"{name} {version}" for name, version in versions.items())


def current() -> str:
    """Return the page as the two records make it."""
    return render(
        json.loads(RESULTS.read_text(encoding="utf-8")), json.loads(MODES.read_text(encoding="utf-8"))
    )


def write() -> None:
    """Write the page."""
    PAGE.write_text(current(), encoding="utf-8")


if __name__ == "__main__":
    write()
