"""A part that fails rests, first for one reading, then for longer; only what fails again and again is off."""

from __future__ import annotations

from nfi_monitor.engine.faults import RECOVERED, TRIES, Faults
from nfi_monitor.engine.notes import NoteTaker

Told = list[tuple[str, str, bool]]


def faults() -> tuple[Faults, Told]:
    told: Told = []
    return Faults(lambda part, error, off: told.append((part, str(error), off)), lambda part: None), told


def tried(found: Faults, readings: int, fails: set[int] | None = None) -> list[int]:
    """Readings at which the part "rows" was tried. It fails at all of them, or at those in ``fails``."""
    at = []
    for reading in range(readings):
        if not found.is_off("rows"):
            at.append(reading)
            if fails is None or reading in fails:
                found.failed("rows", ValueError(str(reading)))
                assert found.is_off("rows"), "the rest of this reading goes on without it"
        found.next_reading()
    return at


def test_one_failure_costs_one_reading() -> None:
    found, told = faults()
    assert tried(found, 10, {4}) == list(range(10))
    assert told == [("rows", "4", False)]


def test_a_part_that_always_fails_is_tried_less_and_less_often_and_then_off() -> None:
    found, told = faults()
    assert tried(found, 1000) == [0, 1, 3, 7, 15, 31]
    assert told == [("rows", "0", False), ("rows", "31", True)]
    assert len([0, 1, 3, 7, 15, 31]) == TRIES


def test_a_part_that_has_recovered_begins_anew() -> None:
    found, told = faults()
    fails = set(range(0, 1000, RECOVERED + 2))
    assert tried(found, 1000, fails) == list(range(1000))
    assert len(told) == 1


def test_failures_in_one_reading_count_once_and_parts_are_apart() -> None:
    found, told = faults()
    for _ in range(20):
        found.failed("rows", ValueError("each micro-batch"))
    found.failed("probe", ValueError("another"))
    assert [part for part, _, _ in told] == ["rows", "probe"] and not any(off for *_, off in told)
    assert not found.is_off("optimizer") and found.failed_parts == {"rows", "probe"}
    found.next_reading()
    assert not found.is_off("rows")


def test_a_part_that_is_never_switched_off_is_not_said_to_be() -> None:
    found, told = faults()
    for _ in range(1000):
        found.failed("observe_loss", ValueError("no loss"))
        found.next_reading()
    assert told == [("observe_loss", "no loss", False)]
    assert "try again" not in said_of("observe_loss") and "off" not in said_of("observe_loss")


def test_of_two_parts_with_one_cause_only_the_one_that_is_off_is_said_to_be() -> None:
    error = ValueError("one cause")
    notes = NoteTaker(lambda note: None)
    notes.failed("rows", error, 1, off=False)
    notes.failed("step", error, 1, off=False)
    notes.failed("rows", error, 9, off=True)
    assert (
        "rows, step failed; training is not affected. Off from now on: rows."
        in notes.by_code["failed_rows"].message
    )


def said_of(part: str) -> str:
    notes = NoteTaker(lambda note: None)
    notes.failed(part, ValueError("odd"), 3, off=False)
    return notes.by_code[f"failed_{part}"].message


def test_what_is_dropped_is_said_once_as_off() -> None:
    found, told = faults()
    for _ in range(3):
        found.dropped("RunDirectory", OSError("disk full"))
    assert told == [("RunDirectory", "disk full", True)]
