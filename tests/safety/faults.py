"""Make any function of the package raise, wherever it is referred to: its code is exchanged, not its name."""

from __future__ import annotations

import gc
import inspect
import os
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import nfi_monitor
from nfi_monitor import integrations
from tests.safety.outside import SILENT

ROOTS = tuple(str(Path(str(package.__file__)).parent) + os.sep for package in (integrations, nfi_monitor))
"""The adapters first: in an installed package they are a folder of the other."""


Result = TypeVar("Result")
Given = TypeVar("Given")


class InjectedFault(Exception):
    """What the broken function raises."""


@contextmanager
def traced() -> Iterator[dict[str, types.CodeType]]:
    """``module:qualified name`` → code of every function of the package that runs meanwhile, on this thread.

    Comprehensions, lambdas and class bodies belong to the functions they stand in.
    """
    found: set[types.CodeType] = set()
    names: dict[str, types.CodeType] = {}

    def called(frame: types.FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        # Bodies of classes and modules run when something is imported late; they are no functions.
        function = code.co_flags & inspect.CO_OPTIMIZED
        if code in found or not function or not code.co_filename.startswith(ROOTS):
            return
        name = code.co_qualname if sys.version_info >= (3, 11) else code.co_name
        if not name.rpartition(".")[2].startswith("<"):
            found.add(code)
            names[f"{_module(code.co_filename)}:{name}"] = code

    # Not setprofile, which is told of every C function, too: that is most of a training.
    sys.settrace(called)
    try:
        yield names
    finally:
        sys.settrace(None)


def _module(file: str) -> str:
    root = next(root for root in ROOTS if file.startswith(root))
    inside = "integrations/" if root == ROOTS[0] else ""
    return inside + Path(file).relative_to(root).with_suffix("").as_posix()


def during(
    train: Callable[[Callable[[], None]], Result], context: AbstractContextManager[Given]
) -> tuple[Result, Given]:
    """``train(begin)``, with the context entered where it calls ``begin()`` and left when it returns."""
    with ExitStack() as stack:
        given: list[Given] = []
        result = train(lambda: given.append(stack.enter_context(context)))
    return result, given[0]


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


def judged(*reports: dict[str, dict[str, Any]]) -> int:
    """How many faults of :mod:`tests.distributed.faults` raised. Fails unless no rank was harmed or kept
    waiting, and each that noticed says so once."""
    assert len({tuple(report) for report in reports}) == 1, [list(report)[-1] for report in reports]
    wrong, count = [], 0
    for name in reports[0]:
        ranks = [report[name] for report in reports]
        wrong += [f"{name}: harmed {rank['harmed']}" for rank in ranks if rank["harmed"]]
        if any(rank["raised"] for rank in ranks):
            count += 1
            said = [rank["notes"] for rank in ranks]
            # What another rank's monitor says of its own, this one passes on: not all ranks report.
            own = [[code for code in codes if code != "failed_rank"] for codes in said]
            silent = name in SILENT or name.split()[1] in SILENT
            if max(map(len, own)) > 1 or not (silent or any(said)):
                wrong.append(f"{name}: said {said}")
        wrong += [f"{name}: took {rank['seconds']:.0f} s" for rank in ranks if rank["hung"]]
    assert not wrong, "\n".join(wrong)
    return count
