"""Register forward hooks that copies, pickles and TorchScript do not see.

A forward hook is a part of its module: ``deepcopy(model)`` and ``torch.save(model)`` copy it, and
``torch.jit.script(model)`` compiles it.  A :class:`ModelHook` is left out by all of them.  So a saved model
is byte for byte the one that is saved without a monitor.

Both work by functions that torch and pickle look up when they run.  They are exchanged while a hook is
registered, and put back with the last one.
"""

from __future__ import annotations

import copyreg
import weakref
from collections import OrderedDict
from collections.abc import Callable
from contextlib import nullcontext, suppress
from typing import Any

import torch
import torch.jit._recursive as scripting
from torch import nn

INERT: tuple[Callable[..., Any], tuple[Any, ...]] = (getattr, (nullcontext(), "__exit__"))
"""A hook that does nothing, as (function, arguments).  It returns None for any arguments.  It is from the
standard library, so a pickle of it can be loaded without this package."""

_TABLES = ("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called")
"""Attributes of a module that hold entries of a forward hook, the hooks themselves first."""
_SCRIPTING = ("infer_concrete_type_builder", "get_hook_stubs")
"""Functions of torch that compile the hooks of a module, for ``torch.jit.script`` and ``torch.jit.trace``."""


def is_torchscript(module: nn.Module) -> bool:
    """Return whether ``torch.jit`` has compiled or traced the module: such a one calls no hook of a layer."""
    return isinstance(module, torch.jit.ScriptModule)


class ModelHook:
    """Base class of the monitor's hooks on modules of the model.

    A copy of such a hook, by whichever way, does nothing.
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        return INERT[0](*INERT[1])  # type: ignore[no-any-return]

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return INERT


class ForwardHook:
    """Keep ``hook`` on ``module`` between :meth:`register` and :meth:`remove`.

    It is called as ``hook(module, args, kwargs, output)``.  Copies leave out any such hook.  If the class of
    the module has its own ``__deepcopy__``, they leave out a :class:`ModelHook` only.  ``remove`` needs no
    handle of torch: it also works if Ctrl-C has interrupted ``register``.
    """

    def __init__(self, module: nn.Module, hook: Any) -> None:
        self._module, self.hook = module, hook

    @property
    def kind(self) -> type[nn.Module]:
        """The class of the module."""
        return type(self._module)

    def is_on(self, module: nn.Module) -> bool:
        """Return whether the hook is among the forward hooks of ``module``."""
        hooks = getattr(module, "_forward_hooks", None) or {}
        return any(hook is self.hook for hook in hooks.values())

    def register(self) -> None:
        """Register the hook. TorchScript takes none, or never calls it: do nothing then."""
        if is_torchscript(self._module):
            return
        _REGISTERED.add(self)
        _hide()
        self._module.register_forward_hook(self.hook, with_kwargs=True)

    def remove(self) -> None:
        tables = [getattr(self._module, name, {}) for name in _TABLES]
        for key in [key for key, hook in tables[0].items() if hook is self.hook]:
            for table in tables:
                table.pop(key, None)
        _REGISTERED.discard(self)
        _hide()


_REGISTERED: weakref.WeakSet[ForwardHook] = weakref.WeakSet()
_REDUCERS: dict[type[nn.Module], tuple[Callable[[Any], Any], Any]] = {}
"""Class of a hooked module → (our reducer, the reducer that was registered before or None)."""
_REPLACED: dict[str, tuple[Any, Any]] = {}
"""Name of a function of torch → (our function, torch's own)."""


def _hide() -> None:
    """Make pickle, copy and TorchScript leave out the hooks that are registered now, or undo that."""
    kinds = {registered.kind for registered in list(_REGISTERED)}
    for kind in kinds - _REDUCERS.keys():
        before = copyreg.dispatch_table.get(kind)
        _REDUCERS[kind] = (_reducer(before), before)
        copyreg.dispatch_table[kind] = _REDUCERS[kind][0]
    for kind in _REDUCERS.keys() - kinds:
        ours, before = _REDUCERS[kind]
        if copyreg.dispatch_table.get(kind) is ours:
            if before is None:
                del copyreg.dispatch_table[kind]
            else:
                copyreg.dispatch_table[kind] = before
        del _REDUCERS[kind]
    for name in _SCRIPTING:
        if kinds and name not in _REPLACED and hasattr(scripting, name):
            own = getattr(scripting, name)
            _REPLACED[name] = (_without_hooks(own), own)
            setattr(scripting, name, _REPLACED[name][0])
        elif not kinds and name in _REPLACED:
            ours, own = _REPLACED[name]
            if getattr(scripting, name) is ours:
                setattr(scripting, name, own)
            del _REPLACED[name]


def _reducer(before: Callable[[Any], Any] | None) -> Callable[[Any], Any]:
    def reduce(module: Any) -> Any:
        reduced = module.__reduce_ex__(2) if before is None else before(module)
        with suppress(Exception):  # an error here must not end the user's torch.save
            if isinstance(reduced, tuple) and len(reduced) > 2 and isinstance(reduced[2], dict):
                return (*reduced[:2], _without_entries(reduced[2]), *reduced[3:])
        return reduced

    return reduce


def _without_hooks(own: Callable[..., Any]) -> Callable[..., Any]:
    def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with suppress(Exception):
            shown = _without_entries(vars(module))
            if shown is not vars(module):
                other = object.__new__(type(module))
                vars(other).update(shown)
                module = other
        return own(module, *args, **kwargs)

    return call


def _without_entries(state: dict[str, Any]) -> dict[str, Any]:
    """Return a module's attributes without the monitor's hooks; ``state`` itself if it has none."""
    registered = [one.hook for one in list(_REGISTERED)]
    ours = [
        key
        for key, hook in state.get(_TABLES[0], {}).items()
        if isinstance(hook, ModelHook) or any(hook is one for one in registered)
    ]
    if not ours:
        return state
    state = dict(state)
    for name in _TABLES:
        if name in state:
            state[name] = OrderedDict((key, value) for key, value in state[name].items() if key not in ours)
    return state
