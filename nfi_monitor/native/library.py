"""Load the C library, and describe tensors to it.

The library is optional.  Without it, or where :func:`readable` refuses a tensor, torch operations compute
the same numbers (:mod:`nfi_monitor.measure.rows`, :mod:`nfi_monitor.measure.step`).  The library knows
neither torch nor Python: it gets addresses, sizes and strides, so that one build serves all their versions.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

SWITCH = "NFI_MONITOR_NATIVE"
"""Environment variable: with the value 0 the library is not loaded."""
VERSION = 6
"""Version of the functions' arguments (``NFI_VERSION`` in nfi.h)."""
DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
"""Numbers of the dtypes in nfi.h."""

MOST_FAILURES = 3
"""Errors in this process after which the library is no longer used. One odd event costs one reading."""

_PLAIN = frozenset((Tensor, nn.Parameter))
_FILE = Path(__file__).with_name("_nfi.dll" if os.name == "nt" else "_nfi.so")


class _State:
    """The library that is loaded, and why there is none."""

    def __init__(self) -> None:
        self.library: Any = None
        self.missing = ""
        self.fault = ""
        self.failures = 0
        self.off = 0
        self.level = -1


_state = _State()


def _load() -> None:
    if os.environ.get(SWITCH, "1") == "0":
        _state.missing = f"{SWITCH}=0"
        return
    if not _FILE.is_file():
        _state.missing = "the package was installed without a C compiler"
        return
    try:
        library = ctypes.CDLL(str(_FILE))
        if library.nfi_version() != VERSION:
            raise OSError("it is of another version of nfi_monitor; install the package again")
    except (OSError, AttributeError) as error:
        _state.missing = f"{_FILE.name} cannot be loaded: {error}"
        return
    for name in (
        "nfi_rows",
        "nfi_row_totals",
        "nfi_shown",
        "nfi_logit_scale",
        "nfi_step",
        "nfi_head",
        "nfi_before",
        "nfi_after",
    ):
        getattr(library, name).argtypes = (ctypes.c_void_p,)
    library.nfi_logit_scale.restype = ctypes.c_double
    library.nfi_gather.argtypes = (*(ctypes.c_void_p,) * 3, ctypes.c_int64, ctypes.c_int, ctypes.c_void_p)
    library.nfi_gather.restype = None
    library.nfi_cross_entropy.argtypes = (
        *(ctypes.c_void_p,) * 2,
        *(ctypes.c_int64,) * 2,
        ctypes.c_int,
        *(ctypes.c_void_p,) * 2,
    )
    _state.level = library.nfi_select(-1)
    _state.library = library


_load()


def library() -> Any:
    """Return the loaded library, or None where torch operations must serve."""
    return None if _state.off or _state.failures >= MOST_FAILURES else _state.library


def missing() -> str:
    """Return why there is no library, in words; empty if it is loaded."""
    return _state.missing


def fault() -> str:
    """Return the last error of the library, in words; empty if there was none."""
    return _state.fault


def failed(error: Exception) -> None:
    """Note an error, after which torch measures this reading. After MOST_FAILURES it measures all."""
    _state.failures += 1
    _state.fault = f"{type(error).__name__}: {error}"


@contextmanager
def disabled() -> Iterator[None]:
    """Use torch operations inside this block; for tests."""
    _state.off += 1
    try:
        yield
    finally:
        _state.off -= 1


@contextmanager
def at_level(level: int) -> Iterator[bool]:
    """Use the loops of an instruction set (0 any, 1 AVX2, 2 AVX-512) inside this block; for tests.

    Gives False where this processor or this build does not have it."""
    found = _state.library is not None and _state.library.nfi_select(level) == level
    try:
        yield found
    finally:
        if found:
            _state.library.nfi_select(_state.level)


def readable(tensor: Tensor) -> bool:
    """Return whether the library may read the memory of this tensor: plain, strided, on the host, all there.

    A tensor whose storage was freed or made smaller meanwhile is refused.
    """
    if (
        type(tensor) not in _PLAIN
        or not tensor.is_cpu
        or tensor.layout is not torch.strided
        or tensor.dtype not in DTYPES
        or tensor.is_neg()
    ):
        return False
    size, last = tensor.element_size(), tensor.storage_offset()
    if tensor.is_contiguous():
        count = tensor.numel()
        return count > 0 and tensor.untyped_storage().nbytes() >= (last + count) * size
    for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
        if length == 0:
            return False
        last += (length - 1) * stride
    return tensor.untyped_storage().nbytes() >= (last + 1) * size


def is_plain(tensor: Any, dtype: torch.dtype) -> bool:
    """Return whether this is a contiguous tensor of this dtype, and :func:`readable`."""
    plain = type(tensor) in _PLAIN and tensor.dtype is dtype and tensor.is_contiguous()
    return plain and readable(tensor)
