"""Build the optional C library of nfi_monitor/native. Everything else is in pyproject.toml.

The library is loaded by ctypes. It includes no header of Python: one wheel serves all Pythons of a platform.
Where it cannot be compiled, the installation goes on, and torch operations do its work.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # setuptools before 70.1
    from wheel.bdist_wheel import bdist_wheel

NATIVE = "nfi_monitor/native"
FILE = "_nfi.dll" if os.name == "nt" else "_nfi.so"
SOURCES = [
    f"{NATIVE}/{name}"
    for name in (
        "kernels.c",
        "rows.c",
        "row_totals.c",
        "loss_kind.c",
        "step.c",
        "plan.c",
        "cross_entropy.c",
    )
]
OPTIONS = [
    "-std=c11",
    "-O3",
    "-fopenmp-simd",  # the loops' marks alone: no OpenMP library, no threads
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=off",
    "-fvisibility=hidden",
    "-g0",
]


class BuildLibrary(build_ext):
    """Compile a plain shared library, or say in one line that there is none."""

    def get_ext_filename(self, ext_name: str) -> str:
        return str(Path(*ext_name.split(".")).with_name(FILE))

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return list(ext.export_symbols or [])

    def get_libraries(self, ext: Extension) -> list[str]:
        return list(ext.libraries or [])

    def build_extension(self, ext: Extension) -> None:
        if self.compiler.compiler_type == "msvc":
            ext.extra_compile_args, ext.libraries = ["/O2", "/std:c11", "/fp:precise"], []
        try:
            super().build_extension(ext)
        except Exception as error:
            self._absent(error)

    def _absent(self, error: Exception) -> None:
        print(
            f"nfi-monitor: no C compiler that works ({type(error).__name__}): the monitor measures with "
            "torch operations, which take longer. To change that, install a C compiler, and install again.",
            file=sys.stderr,
        )


class OneWheelAPlatform(bdist_wheel):
    """Name the wheel py3-none-PLATFORM."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[
        Extension(
            "nfi_monitor.native._nfi",
            SOURCES,
            depends=[f"{NATIVE}/{name}" for name in ("nfi.h", "kernels.h", "rows.h")],
            extra_compile_args=OPTIONS,
            libraries=["m"],
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": OneWheelAPlatform},
)
