"""Copy numbers of several tensors into one vector, in one call."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_int64, c_void_p

import torch
from torch import Tensor

from nfi_monitor.native import library


class Gather:
    """The strides at which tensors of given sizes are read, and how many numbers that makes of each."""

    def __init__(self, strides: Sequence[int], counts: Sequence[int]) -> None:
        self._tensors, self._total = len(counts), sum(counts)
        self._strides = (c_int64 * self._tensors)(*strides)
        self._counts = (c_int64 * self._tensors)(*counts)

    def copy(self, tensors: Sequence[Tensor]) -> Tensor | None:
        """Return the numbers [C], float64 if the tensors are, else float32; None where torch must copy.

        ``tensors``: plain, contiguous, of the sizes that the strides and counts are for.
        """
        loaded = library.library()
        first = tensors[0].dtype
        if loaded is None or first not in library.DTYPES:
            return None
        for tensor in tensors:
            if tensor.dtype is not first or not tensor.is_cpu or tensor.is_neg():
                return None
        addresses = [*map(Tensor.data_ptr, tensors)]
        if 0 in addresses:  # the storage was freed
            return None
        dtype = torch.float64 if first is torch.float64 else torch.float32
        numbers = torch.empty(self._total, dtype=dtype, device="cpu")  # whatever the default device is
        loaded.nfi_gather(
            (c_void_p * self._tensors)(*addresses),
            ctypes.addressof(self._strides),
            ctypes.addressof(self._counts),
            self._tensors,
            library.DTYPES[first],
            numbers.data_ptr(),
        )
        return numbers
