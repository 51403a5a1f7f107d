"""Pack what the device has made for the host, and take it apart there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
Failed = Callable[[str, BaseException], None]
"""Reports an error in a part of the monitor."""


class Late(Generic[T]):
    """Tensors on the device, by name, and the function that makes a result of them on the host.

    ``part``: the part of the monitor in which an error of that function is reported.
    """

    def __init__(
        self, part: str, parts: Mapping[str, Tensor], finish: Callable[[Mapping[str, Tensor]], T]
    ) -> None:
        self.part, self.parts, self.finish = part, parts, finish

    @property
    def flat(self) -> list[Tensor]:
        """The tensors as vectors, in order."""
        return [part.reshape(-1) for part in self.parts.values()]

    def outline(self) -> Outline[T]:
        """Return what :class:`Outline` needs, without the tensors."""
        shapes = {name: (part.shape, part.dtype) for name, part in self.parts.items()}
        return Outline(self.part, shapes, self.finish)


class Outline(NamedTuple, Generic[T]):
    """Shapes and dtypes of the tensors of a :class:`Late`, and the function that makes a result of them."""

    part: str
    shapes: dict[str, tuple[torch.Size, torch.dtype]]
    finish: Callable[[Mapping[str, Tensor]], T]

    def read(self, numbers: Tensor, failed: Failed) -> tuple[T | None, Tensor]:
        """Return the result, None after an error, and the numbers that are left.

        ``numbers``: on the host, the tensors first.  ``failed`` gets the error.
        """
        parts = {}
        for name, (shape, dtype) in self.shapes.items():
            size = shape.numel()
            parts[name], numbers = numbers[:size].view(shape).to(dtype), numbers[size:]
        try:
            return self.finish(parts), numbers
        except Exception as error:
            failed(self.part, error)
            return None, numbers
