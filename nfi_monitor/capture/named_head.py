"""Find the head that the user names: a module, a parameter, the qualified name of one, or a list of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from nfi_monitor.caller import call_with
from nfi_monitor.capture.head_layer import (
    Head,
    is_layer,
    layout,
    looked_through,
    own_parameter,
    shares_weight,
)
from nfi_monitor.capture.names import clean, no_head_text
from nfi_monitor.errors import HeadNotFoundError

_TUPLES = (nn.RNNBase, nn.MultiheadAttention)
_PROBABILITIES = (nn.Softmax, nn.LogSoftmax, nn.Softmax2d, nn.Sigmoid, nn.LogSigmoid)
_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)


def named_head(model: nn.Module, modules: Mapping[str, nn.Module], head: Any) -> Head:
    """Return the head that the user names.

    Raises HeadNotFoundError if the model lacks it, or if it cannot be a head; the message says what can.
    """
    if isinstance(head, (list, tuple)) and not head:
        raise HeadNotFoundError(no_head_text("is given an empty list as head=", modules))
    if isinstance(head, (list, tuple)):
        found = [named_head(model, modules, one) for one in head]
        best = max(found, key=lambda one: one.classes or one.outputs or 0)  # the first of equal ones
        return replace(best, others=tuple(one.describe() for one in found if one is not best))
    if isinstance(head, nn.Parameter):
        name = next((name for name, one in _named_parameters(model) if one is head), None)
        if name is None:
            raise HeadNotFoundError(no_head_text("does not contain the Parameter given as head=", modules))
        return _of_parameter(model, modules, name)
    if isinstance(head, str) and head and head in modules:
        return _of_module(model, modules, head, modules[head])
    if isinstance(head, str):
        if head in dict(_named_parameters(model)):
            return _of_parameter(model, modules, head)
        raise HeadNotFoundError(no_head_text(f"has no module named {head!r}", modules))
    for name, module in modules.items():
        if module is head:
            return _of_module(model, modules, name, module)
    raise HeadNotFoundError(
        no_head_text(f"does not contain the {type(head).__name__} given as head=", modules)
    )


def _named_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(clean(name, model), one) for name, one in model.named_parameters(remove_duplicate=False)]


def _of_module(model: nn.Module, modules: Mapping[str, nn.Module], name: str, module: nn.Module) -> Head:
    """Return the head that a named module is, or that it ends in."""
    path, inner = looked_through(module)
    name = f"{name}.{path}" if path else name
    while type(inner) is nn.Sequential and len(inner) and not is_layer(inner):
        last, child = list(inner.named_children())[-1]
        if not (is_layer(child) or type(child) is nn.Sequential):
            break
        name, inner = f"{name}.{last}", child
    _refuse(name, inner, modules)
    if isinstance(inner, nn.Embedding):
        return _of_parameter(model, modules, f"{name}.weight")
    own = [key for key, one in inner._parameters.items() if one is not None and one.dim() == 2]
    if not is_layer(inner) and len(own) == 1 and not any(is_layer(one) for one in inner.modules()):
        return _of_parameter(model, modules, f"{name}.{own[0]}" if name else own[0])
    tied = shares_weight(model, own_parameter(inner, "weight"))
    return Head(name or type(model).__name__, inner, tied=tied, **layout(inner))


def _refuse(name: str, module: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Raise HeadNotFoundError for a module whose output cannot be logits [..., K] or [N, K, ...]."""
    kind = type(module).__name__
    why = ""
    if isinstance(module, _TUPLES):
        why = "returns a tuple, not logits"
    elif isinstance(module, (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)):
        why = "is a list of modules, which is never called itself"
    elif isinstance(module, _PROBABILITIES):
        why = "returns probabilities, not logits: name the layer before it"
    elif isinstance(module, _NORMS):
        why = "normalises features and makes no logits: name the layer after it"
    if why:
        raise HeadNotFoundError(no_head_text(f"has {name!r}, but this {kind} {why}", modules))


def _of_parameter(model: nn.Module, modules: Mapping[str, nn.Module], name: str) -> Head:
    """Return the head that the parameter ``name`` is, with the module that returns the logits."""
    path, _, own = name.rpartition(".")
    owner = modules[path]
    parameter = own_parameter(owner, own)
    if parameter is None or parameter.dim() != 2:
        shape = None if parameter is None else tuple(parameter.shape)
        raise HeadNotFoundError(
            f"No classifier head: the parameter {name!r} has shape {shape}. A head is a matrix [features, "
            f"classes] or [classes, features]; {call_with('head=...')} also takes a module. Of logits that "
            "another shape makes, as an ensemble's, tap rows: head=False and logits = monitor.tap(logits)."
        )
    if own == "weight" and is_layer(owner):
        return _of_module(model, modules, path, owner)
    axis = 0 if isinstance(owner, nn.Embedding) else _class_axis(model, owner, parameter)
    # In TorchScript, the class itself has no forward.
    called = getattr(type(owner), "forward", None) is not nn.Module.forward
    called = called and not isinstance(owner, (nn.Embedding, nn.ParameterList, nn.ParameterDict))
    return Head(
        name,
        owner if called else model,
        class_axis=axis,
        tied=shares_weight(model, parameter),
        parameter=own,
        owner=owner,
        bare=True,
        classes=parameter.shape[axis],
        sure=False,
    )


def _class_axis(model: nn.Module, owner: nn.Module, parameter: nn.Parameter) -> int:
    """Guess the axis of the classes; the first output shows whether it is right.

    A bias of K entries tells.  Else d is the size that more of the model's other matrices have.  Else the
    matrix is [d, K], as in ``h @ W_U``.
    """
    sizes = {tuple(one.shape) for one in owner._parameters.values() if one is not None and one.dim() == 1}
    fits = [axis for axis in (0, 1) if (parameter.shape[axis],) in sizes]
    if len(fits) == 1 and owner is not model:
        return fits[0]
    matrices = (one for one in model.parameters() if one is not parameter and one.dim() > 1)
    others = [size for one in matrices for size in one.shape]
    rows, columns = (others.count(size) for size in parameter.shape)
    return 0 if columns > rows else 1
