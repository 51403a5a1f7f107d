"""Find the optimizer to watch: inside a wrapper, and among several."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from inspect import isroutine
from typing import Any, cast

from torch import Tensor
from torch.optim import Optimizer

from nfi_monitor.capture.foreign_optimizer import ForeignOptimizer, adapt
from nfi_monitor.capture.head import Head

INNER = (
    "optimizer", "base_optimizer", "_optimizer", "_base_optimizer", "optim", "_optim", "opt", "base",
    "inner_optimizer", "wrapped_optimizer", "optimizers", "chained_optimizers",
)  # fmt: skip
"""Attributes under which wrappers keep the optimizer that they wrap, or several."""

_MOST = 64
"""Maximum number of objects that are looked into. Wrappers that make new ones must not hang the attach."""


def unwrap(optimizer: Any) -> Optimizer:
    """Return the torch optimizer inside wrappers such as accelerate's, whose own hooks never fire.

    Of a wrapper around several, returns the first.  Raises TypeError if there is none.
    """
    found = _search(optimizer, {})
    if not found:
        raise TypeError(
            f"A torch.optim.Optimizer is needed here, got {type(optimizer).__name__}, with none inside."
        )
    return found[0]


def choose(optimizer: Any, head: Head | None) -> Optimizer:
    """Return the optimizer to watch: the given one, or of several the one that trains the head.

    Without a head, or if none trains it, returns the first.  Raises TypeError as :func:`watchable`.
    """
    several = watchable(optimizer)
    weight = head.weight if head is not None else None
    trains = [one for one in several if weight is not None and id(weight) in trained(one)]
    return (trains or several)[0]


def watchable(optimizer: Any) -> list[Optimizer]:
    """Return the optimizers whose ``step()`` is called at last, of one object or of a list.

    Torch optimizers inside wrappers; where there are none, other objects that make steps, adapted
    (:class:`~nfi_monitor.capture.foreign_optimizer.ForeignOptimizer`).  Raises TypeError if there are none.
    """
    given = optimizer if isinstance(optimizer, (list, tuple)) else [optimizer]
    found = [inner for one in given for inner in (_search(one, {}) or _foreign(one, {}))]
    if not found:
        got = "an empty list" if optimizer == [] else type(optimizer).__name__
        if callable(getattr(optimizer, "step", None)) and not hasattr(optimizer, "__dict__"):
            raise TypeError(
                f"The steps of {got} cannot be watched: its class has __slots__, so the monitor cannot put "
                f"its hooks around step(). Add '__dict__' to __slots__, or pass an object of a derived "
                f"class: class Watched({got}): pass."
            )
        raise TypeError(
            f"Monitor needs a torch.optim.Optimizer, got {got}, with none inside; nor is it another object "
            "with parameters and a method step(). Pass the optimizer whose step() updates the model."
        )
    return found


def trained(optimizer: Optimizer) -> set[int]:
    """Return the ids of an optimizer's parameters; empty where it does not name them."""
    try:
        return {id(param) for group in optimizer.param_groups for param in group["params"]}
    except Exception:
        return set()


def _foreign(seen: Any, known: dict[int, Any]) -> list[Optimizer]:
    """Return the objects that make steps, though they are no torch optimizers: the innermost ones."""
    if id(seen) in known or len(known) >= _MOST:
        return []
    known[id(seen)] = seen
    own = seen if isinstance(seen, ForeignOptimizer) else adapt(seen)
    inner = [] if own is seen else [one for inside in _candidates(seen) for one in _foreign(inside, known)]
    return cast("list[Optimizer]", _outermost(own, inner))


def _search(seen: Any, known: dict[int, Any]) -> list[Optimizer]:
    if id(seen) in known or len(known) >= _MOST:
        return []
    known[id(seen)] = seen
    inner: list[Optimizer] = []
    for candidate in _candidates(seen):
        if isinstance(candidate, Optimizer) or not isinstance(seen, Optimizer):
            inner += [one for one in _search(candidate, known) if one not in inner]
    return _outermost(seen if isinstance(seen, Optimizer) else None, inner)


def _outermost(own: Any, inner: list[Any]) -> list[Any]:
    """Return the optimizers inside an optimizer ``own``, or itself if they do not train all that it trains.

    An optimizer may use another one for some of its parameters, and step the rest itself.
    """
    if own is None:
        return inner
    covered = set().union(*map(trained, inner)) if inner else set()
    return inner if inner and trained(own) <= covered else [own]


def _candidates(wrapper: Any) -> Iterator[Any]:
    """Return what a wrapper may wrap: optimizers among its attributes, and what the usual names hold."""
    try:
        attributes = vars(wrapper)
    except TypeError:
        attributes = {}
    for name in INNER:
        value = attributes.get(name)
        if value is None:
            try:
                value = getattr(wrapper, name, None)
            except Exception:  # a property may raise anything
                continue
        yield from _flat(value)
    for name, value in list(attributes.items()):
        if name not in INNER:
            yield from (one for one in _flat(value) if isinstance(one, Optimizer))


def _flat(value: Any) -> Iterable[Any]:
    if isinstance(value, Mapping):
        return [*value.values()]
    if isinstance(value, (list, tuple)):
        return value
    odd = value is None or isinstance(value, (str, int, float, Tensor, type)) or isroutine(value)
    return () if odd else (value,)
