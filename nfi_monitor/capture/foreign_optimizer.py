"""Watch an optimizer that is no ``torch.optim.Optimizer``: fastai's own classes, a class of the user's.

Such an object has no hooks around its step.  While the monitor is attached, the object's attribute ``step``
calls them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import update_wrapper
from operator import itemgetter
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

_SETTINGS = ("lr", "betas", "eps", "momentum", "weight_decay")
"""Attributes that are read as settings of an optimizer without parameter groups."""
_MOST = 100_000
"""Maximum number of objects that are looked through for parameters."""

Hook = Callable[[Any, tuple[Any, ...], dict[str, Any]], object]


class ForeignOptimizer:
    """Show another library's optimizer as a ``torch.optim.Optimizer``: groups, state, hooks around its step.

    Use :func:`adapt`.  ``original`` is the object itself.  It is as it was before once all hooks are removed.
    """

    def __init__(self, original: Any) -> None:
        self.original = original
        self._params: list[Tensor] | None = None
        self._before: OrderedDict[int, Hook] = OrderedDict()
        self._after: OrderedDict[int, Hook] = OrderedDict()
        self._wrapped: _Step | None = None

    @property
    def param_groups(self) -> Sequence[Mapping[str, Any]]:
        """The parameter groups as they are now; if there are none, one of all parameters that it holds."""
        groups = _groups(self.original)
        if groups is not None:
            return groups
        held = _attributes(self.original)
        if self._params is None:
            self._params = list(_trained_in([*held.values()]))
        return [{**{name: held[name] for name in _SETTINGS if name in held}, "params": self._params}]

    @property
    def state(self) -> Mapping[Any, Any]:
        """The state by parameter; empty where the object keeps it in another form."""
        state = getattr(self.original, "state", None)
        return state if isinstance(state, Mapping) else {}

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """Do what ``step`` of the object does."""
        return self.original.step(*args, **kwargs)

    def register_step_pre_hook(self, hook: Hook) -> RemovableHandle:
        """Call ``hook(self, args, kwargs)`` before each step."""
        return self._register(self._before, hook)

    def register_step_post_hook(self, hook: Hook) -> RemovableHandle:
        """Call ``hook(self, args, kwargs)`` after each step."""
        return self._register(self._after, hook)

    def _register(self, hooks: OrderedDict[int, Hook], hook: Hook) -> RemovableHandle:
        handle = _Handle(hooks, self._unwrap_if_idle)
        hooks[handle.id] = hook
        own = getattr(self.original, "step", None)
        if self._wrapped is None and callable(own):
            # Not setattr: a wrapper may pass attributes on to what it wraps.
            attributes = vars(self.original)
            self._wrapped = _Step(self, own, attributes.get("step"))
            attributes["step"] = self._wrapped
        return handle

    def _unwrap_if_idle(self) -> None:
        ours = self._wrapped
        if ours is None or self._before or self._after:
            return
        attributes = vars(self.original)
        if attributes.get("step") is ours:  # else somebody has wrapped it again: ours stays, and does nothing
            if ours.replaced is None:
                del attributes["step"]
            else:
                attributes["step"] = ours.replaced
        self._wrapped = None

    def run(self, step: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call ``step`` between the hooks."""
        for hook in list(self._before.values()):
            hook(self, args, kwargs)
        result = step(*args, **kwargs)
        for hook in list(self._after.values()):
            hook(self, args, kwargs)
        return result


class _Step:
    """The attribute ``step`` of a watched optimizer. Copies and pickles hold the optimizer's own step."""

    def __init__(self, watched: ForeignOptimizer, own: Callable[..., Any], replaced: Any) -> None:
        """``replaced``: the attribute of the object itself, None where its class has the method."""
        update_wrapper(self, own)
        self._watched, self._own, self.replaced = watched, own, replaced

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._watched.run(self._own, args, kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return itemgetter(0), ((self._own,),)


class _Handle(RemovableHandle):
    """A handle that calls ``removed`` once it has removed its hook."""

    def __init__(self, hooks: OrderedDict[int, Hook], removed: Callable[[], None]) -> None:
        super().__init__(hooks)
        self._removed = removed

    def remove(self) -> None:
        super().remove()
        self._removed()


def adapt(original: Any) -> ForeignOptimizer | None:
    """Return an optimizer that is no torch optimizer, so that its steps can be watched; None if it is none.

    It is one if it has a method ``step`` and holds parameters.
    """
    if isinstance(original, (type, nn.Module)) or not callable(getattr(original, "step", None)):
        return None
    if not hasattr(original, "__dict__"):
        return None
    # Messages and run.json name the class of the optimizer.
    kind = type(type(original).__name__, (ForeignOptimizer,), {})
    adapted: ForeignOptimizer = kind(original)
    return adapted if any(group["params"] for group in adapted.param_groups) else None


def _attributes(held: Any) -> dict[str, Any]:
    """Return an object's attributes, those in slots included."""
    slots: list[str] = []
    for kind in type(held).__mro__:
        own = vars(kind).get("__slots__", ())
        slots += [own] if isinstance(own, str) else own
    in_slots = {name: getattr(held, name) for name in slots if name != "__dict__" and hasattr(held, name)}
    return {**in_slots, **getattr(held, "__dict__", {})}


def _groups(optimizer: Any) -> Sequence[Mapping[str, Any]] | None:
    """Return an object's own parameter groups, each with a list of parameters; None if it has none."""
    try:
        groups = optimizer.param_groups
    except Exception:  # a property may raise anything
        return None
    if not isinstance(groups, Sequence) or not len(groups):
        return None
    if all(isinstance(group, Mapping) and isinstance(group.get("params"), list) for group in groups):
        return groups
    return [_group(group) for group in groups]


def _group(group: Any) -> Mapping[str, Any]:
    """Return a group with its parameters in a list. Some libraries give nothing but the parameters."""
    params = group.get("params") if isinstance(group, Mapping) else group
    rest = group if isinstance(group, Mapping) else {}
    return {**rest, "params": list(_trained_in([params]))}


def _trained_in(ahead: list[Any]) -> Iterator[Tensor]:
    """Yield the trained tensors among some objects: in containers and modules, each once."""
    seen: set[int] = set()
    while ahead and len(seen) < _MOST:
        held = ahead.pop(0)
        if id(held) in seen:
            continue
        seen.add(id(held))
        if isinstance(held, Tensor):
            if held.requires_grad and held.is_leaf:
                yield held
        elif isinstance(held, nn.Module):
            ahead += held.parameters()
        elif isinstance(held, Mapping):
            ahead += held.values()
        elif isinstance(held, (Sequence, set)) and not isinstance(held, (str, bytes)):
            ahead += held


def original_of(optimizer: Any) -> Any:
    """Return the optimizer that the user has made."""
    return optimizer.original if isinstance(optimizer, ForeignOptimizer) else optimizer
