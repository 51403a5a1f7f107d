"""Damage records and states as disks, other programs and hostile people do."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st

RAW = "\ue000"
"""Begins a string that :func:`text_of` writes without quotes: text that ``json.dumps`` cannot make."""
_RAW = [
    "1e999", "-1e999", "NaN", "Infinity", "1" + "0" * 400, "-" + "9" * 5000, "9223372036854775808",
    "[" * 200 + "]" * 200, "[" * 100_000, '{"a":' * 60 + "1" + "}" * 60, '"\\ud800"', '"\\u0000\\u001b[2J"',
    "1" + "0" * 400 + ".5", "", "tru",
]  # fmt: skip
_PLAIN = [
    None, True, False, 0, -1, 1, 2, 10**6, 2**31, 2**53, 2**53 + 1, 2**63 - 1, -(2**63), 0.0, -0.0, 0.5, -0.5,
    1.5, 1e-320, 5e-324, 1e300, -1e300, 1.7e308, "", "x", "1", "healthy", "slingshot", "imminent",
    "resolved", "firing", "critical", "open", "passed", "kicking", "loss", "μ\u202e\x1b[31m", "[red]x[/red]",
    "$\\frac{$", "a" * 10_000, [], {}, [1], ["x"], [[1]], [None], {"a": 1}, {"loss": "x"}, {"value": None},
    [1, 2, 3], [3, 2, 1], [[]], {"": {}}, list(range(1000)),
]  # fmt: skip


def text_of(value: Any) -> str:
    """JSON text of a damaged value."""
    return json.dumps(value, ensure_ascii=False).replace(f'"{RAW}', "").replace(f'{RAW}"', "")


def junk(*, files: bool) -> st.SearchStrategy[Any]:
    """A value that may be wrong anywhere. ``files``: also text that is no JSON."""
    floats = st.floats(allow_nan=not files, allow_infinity=not files)
    plain = st.one_of(st.sampled_from(_PLAIN).map(copy.deepcopy), floats, st.integers(), st.text(max_size=20))
    if files:
        return st.one_of(plain, st.sampled_from([f"{RAW}{text}{RAW}" for text in _RAW]))
    odd = [math.nan, math.inf, -math.inf, 10**400, object(), b"x", {1: 2}, (1,), {1, 2}, complex(1, 2)]
    return st.one_of(plain, st.sampled_from(odd).map(copy.deepcopy))


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths to all values inside ``value``, and to itself."""
    yield path
    items: Any = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value[:4])  # the others are alike
    for name, inside in items:
        yield from places(inside, (*path, name))


@st.composite
def damaged(draw: st.DrawFn, value: Any, *, files: bool) -> Any:
    """A copy of ``value`` with one to three places replaced, removed, repeated, renamed or put elsewhere."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        among = list(places(value))
        *inside, last = draw(st.sampled_from(among[1:] or [(None,)]))
        holder = value
        for name in inside:
            holder = holder[name]
        if last is None or not isinstance(holder, (dict, list)):
            return draw(junk(files=files))
        how = draw(st.sampled_from(["replace", "replace", "remove", "repeat", "rename", "swap"]))
        if how == "remove":
            del holder[last]
        elif how == "repeat" and isinstance(holder, list):
            holder.append(copy.deepcopy(holder[last]))
        elif how == "rename" and isinstance(holder, dict):
            holder[draw(st.text(max_size=8))] = holder.pop(last)
        elif how == "swap":
            other = value
            for name in draw(st.sampled_from(list(places(value)))):
                other = other[name]
            holder[last] = copy.deepcopy(other)
        else:
            holder[last] = draw(junk(files=files))
    return value


@st.composite
def damaged_lines(draw: st.DrawFn, records: list[Any]) -> bytes:
    """A file of lines, of which some are damaged, cut, repeated, out of order or no text at all."""
    lines = [text_of(record).encode() for record in records]
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(lines) - 1))
        how = draw(st.sampled_from(["damage", "damage", "damage", "cut", "bytes", "move", "repeat", "glue"]))
        if how == "damage":
            text = text_of(draw(damaged(records[min(at, len(records) - 1)], files=True)))
            lines[at] = text.encode("utf-8", draw(st.sampled_from(["replace", "surrogatepass"])))
        elif how == "cut":
            lines[at] = lines[at][: draw(st.integers(0, len(lines[at])))]
        elif how == "bytes":
            lines.insert(at, draw(st.binary(max_size=60)))
        elif how == "move":
            lines.insert(draw(st.integers(0, len(lines) - 1)), lines.pop(at))
        elif how == "repeat":
            lines += lines[at:]
        else:
            lines[at] += lines[draw(st.integers(0, len(lines) - 1))]
    return b"\n".join(lines) + draw(st.sampled_from([b"", b"\n", b"\n\n", b"\x00"]))
