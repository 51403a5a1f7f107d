"""Run what would be a program of its own in a process forked from this one.

A fresh interpreter imports torch, and what else is wanted, for longer than most of these programs run.  A
forked one has directory, environment, output and exit code of its own all the same.
"""

from __future__ import annotations

import importlib
import io
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import rich

LIMIT = 900
"""Seconds; the kernel ends it then."""


class Forked:
    """``program()`` in ``cwd`` with ``environment`` beside ours; it ends as an interpreter would.

    ``warm`` are modules that it will import: imported here first, all that are forked have them.
    """

    def __init__(
        self,
        program: Callable[[], object],
        cwd: Path,
        environment: Mapping[str, str],
        warm: Iterable[str] = (),
    ) -> None:
        for module in warm:
            importlib.import_module(module)
        self._output = tempfile.TemporaryFile()  # noqa: SIM115 - closed by wait()
        self._pid = os.fork()
        if self._pid == 0:
            code = 1
            try:
                signal.alarm(LIMIT)
                os.chdir(cwd)
                os.environ |= environment
                for descriptor in (1, 2):
                    os.dup2(self._output.fileno(), descriptor)
                sys.stdout, sys.stderr = (
                    io.TextIOWrapper(io.FileIO(descriptor, "w"), encoding="utf-8", write_through=True)
                    for descriptor in (1, 2)
                )
                rich.reconfigure()  # its console has looked at the environment before
                code = _ended(program)
            finally:
                os._exit(code)  # no exit handler of the parent's, no test that goes on twice

    def wait(self) -> tuple[int, str]:
        """Its exit code, and what it printed on either stream."""
        _, status = os.waitpid(self._pid, 0)
        with self._output as output:
            output.seek(0)
            return os.waitstatus_to_exitcode(status), output.read().decode()

    def printed(self) -> str:
        """What one printed that has to succeed."""
        code, printed = self.wait()
        assert code == 0, printed
        return printed


def _ended(program: Callable[[], object]) -> int:
    try:
        program()
    except SystemExit as stopped:
        if stopped.code is None or isinstance(stopped.code, int):
            return stopped.code or 0
        print(stopped.code, file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0
