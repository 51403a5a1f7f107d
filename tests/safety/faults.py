"""Make any function of the package raise, wherever it is referred to: its code is exchanged, not its name."""

from __future__ import annotations

import gc
import inspect
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nfi_monitor

PACKAGE = str(Path(nfi_monitor.__file__).parent)


class InjectedFault(Exception):
    """What the broken function raises."""


def called_in(work: Callable[[], Any]) -> dict[str, types.CodeType]:
    """``module:qualified name`` → code of every function of the package that runs during ``work()``.

    Comprehensions, lambdas and class bodies belong to the functions they stand in.
    """
    found: dict[str, types.CodeType] = {}

    def profile(frame: types.FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        # Bodies of classes and modules run when something is imported late; they are no functions.
        function = code.co_flags & inspect.CO_OPTIMIZED
        if event == "call" and function and code.co_filename.startswith(PACKAGE):
            name = code.co_qualname if sys.version_info >= (3, 11) else code.co_name
            if not name.rpartition(".")[2].startswith("<"):
                where = Path(code.co_filename).relative_to(PACKAGE).with_suffix("").as_posix()
                found[f"{where}:{name}"] = code

    sys.setprofile(profile)
    try:
        work()
    finally:
        sys.setprofile(None)
    return dict(sorted(found.items()))


@contextmanager
def broken(code: types.CodeType) -> Iterator[list[int]]:
    """Every function with this code raises :class:`InjectedFault`; the list grows by one a raise."""
    raised: list[int] = []
    exchanged = _raising(code, raised)
    gc.unfreeze()  # what somebody froze is not listed
    changed: list[tuple[types.FunctionType, types.CodeType]] = []
    # type(), not isinstance(): that asks the object itself, and a dead weak proxy raises.
    for function in [item for item in gc.get_objects() if type(item) is types.FunctionType]:
        new = _exchange(function.__code__, code, exchanged)
        if new is not function.__code__:
            changed.append((function, function.__code__))
            function.__code__ = new
    assert changed, f"{code.co_name}: no function has this code"
    try:
        yield raised
    finally:
        for function, old in changed:
            function.__code__ = old


def _exchange(code: types.CodeType, old: types.CodeType, new: types.CodeType) -> types.CodeType:
    """``code`` with ``old`` replaced by ``new``, also among the functions that it makes."""
    if code is old:
        return new
    if code.co_filename != old.co_filename:
        return code
    constants = tuple(
        _exchange(item, old, new) if isinstance(item, types.CodeType) else item for item in code.co_consts
    )
    if all(a is b for a, b in zip(constants, code.co_consts, strict=True)):
        return code
    return code.replace(co_consts=constants)


def _raising(code: types.CodeType, raised: list[int]) -> types.CodeType:
    """Code that fits in the place of ``code``: the same free variables, any arguments."""
    free = ", ".join(code.co_freevars)
    keep = f"({free},)" if free else "None"
    source = (
        f"def make({free}):\n"
        "    def fault(*args, **kwargs):\n"
        f"        {keep}\n"
        "        from tests.safety import faults\n"
        "        faults.RAISED.append(1)\n"
        f"        raise faults.InjectedFault({code.co_name!r})\n"
        "    return fault\n"
    )
    global RAISED
    RAISED = raised
    scope: dict[str, Any] = {}
    exec(compile(source, code.co_filename, "exec"), scope)
    made: types.FunctionType = scope["make"](*[None] * len(code.co_freevars))
    return made.__code__.replace(co_name=code.co_name, co_firstlineno=code.co_firstlineno)


RAISED: list[int] = []
