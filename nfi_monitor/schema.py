"""Check records from files and checkpoints against declared types: dataclasses, typed dicts, enums.

A record comes from a disk that was full, from a newer version, or from somebody else.  So nothing in it is
taken for granted: :func:`parse` accepts strict JSON of bounded depth only, and :func:`decode` checks every
field.  Both raise :class:`DamagedRecordError` and no other error.  Standard library only: TensorBoard's tab
imports this module.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import types
import typing
from collections.abc import Callable, Mapping
from enum import Enum
from functools import cache
from typing import Annotated, Any, NamedTuple

DEPTH = 32
"""Deepest nesting of a record. The monitor writes at most 6."""
LARGEST_INT = 2**53
"""Largest integer that every reader of JSON keeps exactly, also as a float."""
_MAX = sys.float_info.max

Check = Callable[[Any], Any]


class DamagedRecordError(ValueError):
    """Raised for a record that cannot be used. The message names the field and what was found there.

    ``torn``: the text is no JSON, as a line whose writer was killed.
    """

    def __init__(self, reason: str, place: str = "", *, torn: bool = False) -> None:
        super().__init__(f"'{place}': {reason}" if place else reason)
        self.reason, self.place, self.torn = reason, place, torn

    def inside(self, name: object) -> DamagedRecordError:
        """Return the same error, of a field inside ``name``."""
        place = f"{_short(str(name))}.{self.place}" if self.place else _short(str(name))
        return DamagedRecordError(self.reason, place, torn=self.torn)


class Between(NamedTuple):
    """Smallest and largest value of a number: ``Annotated[float, Between(0, 1)]``."""

    low: float
    high: float


NULL_IS_NAN = "null is NaN"
Measured = Annotated[float, NULL_IS_NAN]
"""A measured number. JSON has no NaN and no Inf: the monitor writes null for them."""


# --- text → plain values ---------------------------------------------------------------------------


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


_JSON = json.JSONDecoder(parse_constant=_refuse)


def parse(text: bytes | str) -> dict[str, Any]:
    """Return the JSON object in ``text``.

    Raises DamagedRecordError for anything else: other JSON, a number that is not finite or an integer beyond
    ±2^53, nesting deeper than DEPTH.
    """
    try:
        value = _JSON.decode(text.decode("utf-8") if isinstance(text, bytes) else text)
    except RecursionError:
        raise DamagedRecordError("nested too deeply") from None
    except ValueError as error:  # also for invalid UTF-8: a torn line may end inside a character
        raise DamagedRecordError(_short(str(error)), torn=True) from None
    if not isinstance(value, dict):
        raise DamagedRecordError(f"expected an object, got {shown(value)}")
    _check_plain(value, DEPTH)
    return value


def _check_plain(value: Any, depth: int) -> None:
    """Raise DamagedRecordError for numbers that JSON cannot hold, and below ``depth`` levels."""
    kind = type(value)
    if kind is float:
        if not -_MAX <= value <= _MAX:
            raise DamagedRecordError("a number is too large")
    elif kind is int:
        if not -LARGEST_INT <= value <= LARGEST_INT:
            raise DamagedRecordError("a whole number is too large")
    elif kind is dict or kind is list:
        if not depth:
            raise DamagedRecordError("nested too deeply")
        for item in value.values() if kind is dict else value:
            _check_plain(item, depth - 1)


# --- plain values → declared types -------------------------------------------------------------------


def decode(declared: Any, value: Any) -> Any:
    """Return ``value`` (of JSON's types) as the ``declared`` type. Raises DamagedRecordError if it is none.

    Dataclasses are made from dicts: fields with a default may be missing, and unknown keys of a newer version
    are ignored.  Typed dicts stay dicts and keep unknown keys.  Enums are made from their values.  A number
    may be NaN or Inf here: files cannot hold them (:func:`parse`), checkpoints can.
    """
    return check_of(declared)(value)


@cache
def check_of(declared: Any) -> Check:
    """Return the function that does :func:`decode` for one type; it is made once for each type."""
    if declared in _SIMPLE:
        return _SIMPLE[declared]
    origin, arguments = typing.get_origin(declared), typing.get_args(declared)
    if origin is Annotated:
        return _annotated(check_of(arguments[0]), arguments[1:])
    if origin in (typing.Union, types.UnionType):
        return _union(declared, [check_of(argument) for argument in arguments])
    if origin in (list, tuple):
        return _sequence(origin, arguments)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return _mapping(check_of(arguments[1]))
    if isinstance(declared, type) and issubclass(declared, Enum):
        return _enum(declared)
    if dataclasses.is_dataclass(declared):
        return _dataclass(declared)
    if typing.is_typeddict(declared):
        return _typed_dict(declared)
    raise TypeError(f"{declared!r} cannot be checked.")


def _whole(value: Any) -> int:
    if type(value) is int and -LARGEST_INT <= value <= LARGEST_INT:
        return value
    raise DamagedRecordError(f"expected a whole number, got {shown(value)}")


def _number(value: Any) -> float:
    if type(value) is float:
        return value
    if isinstance(value, float):  # numpy's float64, from a state that never was text
        return float(value)
    if type(value) is int and -_MAX <= value <= _MAX:
        return float(value)
    raise DamagedRecordError(f"expected a number, got {shown(value)}")


def _exactly(kind: type, name: str) -> Check:
    def check(value: Any) -> Any:
        if type(value) is kind:
            return value
        raise DamagedRecordError(f"expected {name}, got {shown(value)}")

    return check


_SIMPLE: dict[Any, Check] = {
    Any: lambda value: value,
    int: _whole,
    float: _number,
    str: _exactly(str, "text"),
    bool: _exactly(bool, "true or false"),
    type(None): _exactly(type(None), "null"),
    None: _exactly(type(None), "null"),
}


def _annotated(check: Check, marks: tuple[Any, ...]) -> Check:
    limits = next((mark for mark in marks if isinstance(mark, Between)), None)
    null_is_nan = NULL_IS_NAN in marks

    def checked(value: Any) -> Any:
        if value is None and null_is_nan:
            return float("nan")
        found = check(value)
        if limits is not None and not limits.low <= found <= limits.high:
            raise DamagedRecordError(f"expected {limits.low:g} to {limits.high:g}, got {shown(found)}")
        return found

    return checked


def _union(declared: Any, checks: list[Check]) -> Check:
    def check(value: Any) -> Any:
        errors = []
        for one in checks:
            try:
                return one(value)
            except DamagedRecordError as error:
                errors.append(error)
        # The error of a nested field says more than that of a branch which does not fit at all.
        raise max(errors, key=lambda error: len(error.place))

    return check


def _sequence(kind: type, arguments: tuple[Any, ...]) -> Check:
    length = None if kind is list or arguments[-1] is Ellipsis else len(arguments)
    checks = [check_of(argument) for argument in arguments if argument is not Ellipsis]

    def check(value: Any) -> Any:
        if not isinstance(value, (list, tuple)) or length not in (None, len(value)):
            many = "a list" if length is None else f"a list of {length}"
            raise DamagedRecordError(f"expected {many}, got {shown(value)}")
        each = checks if length is not None else checks * len(value)
        return kind(
            [_at(index, one, item) for index, (one, item) in enumerate(zip(each, value, strict=True))]
        )

    return check


def _mapping(check_item: Check) -> Check:
    def check(value: Any) -> Any:
        return {name: _at(name, check_item, item) for name, item in _object(value).items()}

    return check


def _enum(declared: type[Enum]) -> Check:
    known = {member.value: member for member in declared}

    def check(value: Any) -> Any:
        if isinstance(value, str) and value in known:
            return known[value]
        raise DamagedRecordError(f"{shown(value)} is no {declared.__name__} that this version knows")

    return check


def _dataclass(declared: Any) -> Check:
    hints = typing.get_type_hints(declared, include_extras=True)
    fields = [
        (
            field.name,
            check_of(hints[field.name]),
            field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING,
        )
        for field in dataclasses.fields(declared)
    ]

    def check(value: Any) -> Any:
        if type(value) is declared:
            return value
        record, found = _object(value), {}
        for name, one, needed in fields:
            if name in record:
                found[name] = _at(name, one, record[name])
            elif needed:
                raise DamagedRecordError("missing", name)
        return declared(**found)

    return check


def _typed_dict(declared: Any) -> Check:
    hints = typing.get_type_hints(declared, include_extras=True)
    checks = {name: check_of(hint) for name, hint in hints.items()}
    needed = declared.__required_keys__

    def check(value: Any) -> Any:
        record = dict(_object(value))
        for name in needed - record.keys():
            raise DamagedRecordError("missing", name)
        for name in checks.keys() & record.keys():
            record[name] = _at(name, checks[name], record[name])
        return record

    return check


def _object(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping) or not all(type(name) is str for name in value):
        raise DamagedRecordError(f"expected an object, got {shown(value)}")
    return value


def _at(name: object, check: Check, value: Any) -> Any:
    try:
        return check(value)
    except DamagedRecordError as error:
        raise error.inside(name) from None


def shown(value: Any) -> str:
    """Show a wrong value; of a list, an object or anything else only its kind."""
    if isinstance(value, int) and not -LARGEST_INT <= value <= LARGEST_INT:
        return "a number that is too large"  # Python refuses to print one of thousands of digits
    if value is None or isinstance(value, (bool, int, float, str)):
        return _short(repr(value))
    if isinstance(value, (list, tuple)):
        return "a list"
    return "an object" if isinstance(value, dict) else type(value).__name__


def _short(text: str) -> str:
    return text if len(text) <= 60 else text[:59] + "…"
