"""What JSON allows and a record does not is refused, before any declared type is asked."""

from __future__ import annotations

import pytest

from nfi_monitor.schema import DEPTH, DamagedRecordError, parse


@pytest.mark.parametrize(
    "value",
    [
        "1e999", "-1e999", "NaN", "Infinity", "1" + "0" * 400, "9007199254740994", "[[1e999]]",
        "[" * DEPTH + "]" * DEPTH, '{"a":' * DEPTH + "1" + "}" * DEPTH, "[" * 100_000, "tru", '"\udcff"',
    ],
    ids=lambda value: value[:12],
)  # fmt: skip
def test_a_value_that_no_record_may_hold_is_refused(value: str) -> None:
    with pytest.raises(DamagedRecordError):
        parse(f'{{"x": {value}}}'.encode("utf-8", "surrogatepass"))


def test_the_largest_and_deepest_values_are_accepted() -> None:
    levels = DEPTH - 1
    assert parse('{"x": [1.7e308, 9007199254740992]}') == {"x": [1.7e308, 2**53]}
    assert parse(f'{{"x": {"[" * levels}{"]" * levels}}}')
