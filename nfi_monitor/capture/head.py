"""Find the classifier head: the last layer before the softmax.

The rules only look at the modules and their names.  Where these leave a doubt, ``Head.sure`` is False, and
:mod:`nfi_monitor.capture.origin` asks the first output of the model which weight made it.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import nn

from nfi_monitor import _moved
from nfi_monitor.capture.head_layer import Head as Head
from nfi_monitor.capture.head_layer import (
    is_convolution,
    is_layer,
    is_linear,
    layout,
    looked_through,
    shares_weight,
    size_of,
)
from nfi_monitor.capture.head_layer import own_parameter as own_parameter
from nfi_monitor.capture.named_head import named_head
from nfi_monitor.capture.names import HeadLike, clean, no_head_text
from nfi_monitor.errors import HeadNotFoundError

HEAD_NAMES = {
    "lm_head": 1, "score": 1, "classifier": 1, "classification_head": 1, "unembed": 1,
    "output_projection": 1, "qa_outputs": 1, "head": 0, "fc": 0,
}  # fmt: skip
"""Attribute names that libraries use for the head, most specific first, each with a maximum depth.  ``fc`` of
the model is its head, but ``fc`` of a block may be any layer."""
_NO_CLASSES = re.compile(r"(^|_)(b?box(es)?|bboxes|coords?|points?|offsets?|regress\w*|reg|depth)(_|$)")
"""Name of a layer that predicts places, not classes."""
_CLASSES = re.compile(r"(^|_)(class\w*|cls|labels?|logits?|score)(_|$)")
_AUXILIARY = re.compile(r"(^|_)(aux\w*|dist\w*|teacher)(_|$)")
"""Name of a second head that helps to train the first."""
_POOLED = (nn.ReLU, nn.AdaptiveAvgPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool1d, nn.AvgPool1d, nn.Flatten)
TEACHER = 0.2
"""Smallest share of the model's parameters in a frozen part that is taken for a teacher's."""


def find_head(model: nn.Module, head: HeadLike | None = None, trained: Collection[int] | None = None) -> Head:
    """Return the last layer before the softmax.

    Order of preference: the given ``head``; ``model.get_output_embeddings()``; layers with one of the usual
    names; the last linear layer or convolution in registration order.  Of several heads, the one with most
    classes is taken; of equal ones the first that is not auxiliary.  Layers of a frozen teacher and layers
    that predict boxes come last.

    Args:
        head: a module, a parameter, the qualified name of one, or a list of them (the one with most classes).
        trained: ``id`` of each parameter of the optimizer. None: all. Those without a gradient are frozen.

    Raises:
        HeadNotFoundError: the model has no layer that makes logits, or not the one that is named.
    """
    modules = {clean(name, model): module for name, module in model.named_modules()}
    if head is not None:
        return named_head(model, modules, head)
    layers = _alive(model, modules, _layers(modules), trained)
    found = _models_own_answer(model, modules)
    if found is not None:
        return describe(model, *found)
    found_by_name = _by_usual_name(model, modules, layers)
    if found_by_name is not None:
        return found_by_name
    if not layers:
        bare = _bare_parameter(model, modules)
        if bare is None:
            raise HeadNotFoundError(no_head_text("found no linear layer", modules))
        return replace(named_head(model, modules, bare), sure=False)
    last = _last(model, modules, layers)
    return replace(last, sure=not last.others and last.classes not in _widths(model, last.module))


def describe(model: nn.Module, name: str, module: nn.Module) -> Head:
    """Return the head that ``module`` is, or the layer that it passes its input on to."""
    path, module = looked_through(module)
    name = f"{name}.{path}" if path else name
    weight = own_parameter(module, "weight")
    return Head(name, module, tied=shares_weight(model, weight), **layout(module))


def _layers(modules: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Return the layers that could make logits; layers inside an adapter (LoRA and similar) count as one.

    Of an adaptive softmax it is the first layer, which all rows go through.
    """
    single: list[str] = []
    rest = tuple(
        f"{name}.tail." for name, one in modules.items() if isinstance(one, nn.AdaptiveLogSoftmaxWithLoss)
    )
    copied: dict[str, str] = {}  # wrapper → the prefix of the layers in its active copy
    for name, module in modules.items():
        path, layer = looked_through(module)
        if "base_layer" in module._modules or (path and is_layer(layer)):
            single.append(name)
        elif path:
            copied[f"{name}."] = f"{name}.{path}."
    return {
        name: module
        for name, module in modules.items()
        if (name in single or is_layer(module))
        and not name.startswith(rest)
        and not any(name.startswith(f"{one}.") for one in single)
        and not any(name.startswith(outer) and not name.startswith(inner) for outer, inner in copied.items())
    }


def _alive(
    model: nn.Module,
    modules: dict[str, nn.Module],
    layers: dict[str, nn.Module],
    trained: Collection[int] | None,
) -> dict[str, nn.Module]:
    """Return the layers outside of a frozen part such as a distillation's teacher; all if none is outside.

    A frozen head on a trained body stays: its part of the model holds few parameters.
    """
    # Loops give frozen parameters to the optimizer too, which leaves them as they are.
    updated = {id(p) for p in model.parameters() if p.requires_grad and (trained is None or id(p) in trained)}
    if not updated:
        return layers
    total = sum(map(size_of, model.parameters()))
    frozen = []
    for name, part in modules.items():
        size = sum(map(size_of, part.parameters()))
        large = name and name not in layers and size >= TEACHER * total
        if large and not any(id(p) in updated for p in part.parameters()):
            frozen.append(f"{name}.")
    alive = {name: layer for name, layer in layers.items() if not name.startswith(tuple(frozen))}
    return alive or layers


def _models_own_answer(model: nn.Module, modules: dict[str, nn.Module]) -> tuple[str, nn.Module] | None:
    """Return the module that ``get_output_embeddings()`` names, if it is one of the model's layers."""
    output_embeddings = getattr(model, "get_output_embeddings", None)
    if not callable(output_embeddings):
        return None
    try:
        found = output_embeddings()
    except Exception:  # code of the model: whatever it raises, it names no head
        return None
    if not isinstance(found, nn.Module) or isinstance(found, nn.Embedding):
        return None
    return next(((name, module) for name, module in modules.items() if module is found), None)


def _by_usual_name(
    model: nn.Module, modules: dict[str, nn.Module], layers: dict[str, nn.Module]
) -> Head | None:
    for usual, trusted in HEAD_NAMES.items():
        matches = [name for name in layers if usual in name.split(".")]
        if not matches:
            continue
        depth = min(name.split(".").index(usual) for name in matches)
        matches = [name for name in matches if name.split(".").index(usual) == depth]
        owners: dict[tuple[str, ...], str] = {}
        for name in matches:
            owners[tuple(name.split(".")[: depth + 1])] = name  # the last layer of each
        if depth <= trusted:
            head = _of_several(model, modules, layers, list(owners.values()))
            # Two parts of one name may be two classifiers, or a part of the body that is called alike.
            return replace(head, sure=len(owners) == 1)
    return None


def _last(model: nn.Module, modules: dict[str, nn.Module], layers: dict[str, nn.Module]) -> Head:
    """Return the last layer in registration order, or the best of the heads beside it."""
    names = list(layers)
    if _places(names[-1]):
        # A detector: its boxes are registered after its classes. Prefer a layer whose name says "class".
        classes = [name for name in names if not _places(name) and _CLASSES.search(_path(name))]
        names = classes or names
    last = names[-1]
    rivals = [name for name in names if name != last and _same_input(layers, name, last)]
    return _of_several(model, modules, layers, [*rivals, last])


def _of_several(
    model: nn.Module, modules: dict[str, nn.Module], layers: dict[str, nn.Module], names: Sequence[str]
) -> Head:
    """Return the head with most classes; of equal ones the first that is not auxiliary."""
    heads = [describe(model, *_with_pooling(modules, name, layers[name])) for name in names]
    return most_classes(heads)


def most_classes(heads: Sequence[Head]) -> Head:
    """Return the head with most classes and the names of the others; of equal ones the first.

    Layers that predict boxes, and heads that only help to train, come after all others.
    """
    ranked = sorted(
        heads,
        key=lambda head: (
            _places(head.name),
            bool(_AUXILIARY.search(_path(head.name))),
            -(head.classes or 0),
        ),
    )
    best, others = ranked[0], tuple(head.describe() for head in heads if head is not ranked[0])
    return replace(best, others=others)


def _path(name: str) -> str:
    return name.lower().replace(".", "_")


def _widths(model: nn.Module, head: nn.Module) -> set[int]:
    """Return the numbers of features that parts of the model take: K of a head is none of these."""
    found: set[int] = set()
    for module in model.modules():
        if isinstance(module, nn.Linear):
            found.add(module.in_features)
        elif is_convolution(module):
            found.add(int(module.in_channels))  # type: ignore[arg-type]
        elif module is not head:
            found.update(size for one in module._parameters.values() if one is not None for size in one.shape)
    return found


def _places(name: str) -> bool:
    """Return whether the name says that a layer predicts boxes or coordinates, not classes."""
    return bool(_NO_CLASSES.search(_path(name)))


def _with_pooling(modules: dict[str, nn.Module], name: str, layer: nn.Module) -> tuple[str, nn.Module]:
    """Return the sequence that holds a convolution and pools its output, as in SqueezeNet; else the layer."""
    owner, _, place = name.rpartition(".")
    parent = modules.get(owner)
    if owner and is_convolution(layer) and type(parent) is nn.Sequential and place in parent._modules:
        after = list(parent._modules.values())[list(parent._modules).index(place) + 1 :]
        if any(isinstance(one, _POOLED) for one in after):
            return owner, parent
    return name, layer


def _bare_parameter(model: nn.Module, modules: dict[str, nn.Module]) -> str | None:
    """Return the name of the last matrix that no layer of torch holds, as ``unembed.W_U``."""
    found = None
    for name, module in modules.items():
        if type(module).__module__.startswith("torch.nn."):
            continue
        for own, parameter in module._parameters.items():
            if parameter is not None and parameter.dim() == 2 and min(parameter.shape) > 1:
                found = f"{name}.{own}" if name else own
    return found


def _same_input(layers: dict[str, nn.Module], name: str, last: str) -> bool:
    """Return whether two siblings have equal input widths and neither can feed the other: two heads."""
    if name.rpartition(".")[0] != last.rpartition(".")[0] or name.rpartition(".")[2].isdigit():
        return False
    one, other = layers[name], layers[last]
    if is_convolution(one) and is_convolution(other):
        pointwise = set(one.kernel_size) == set(other.kernel_size) == {1}  # type: ignore[arg-type]
        return pointwise and one.in_channels == other.in_channels != one.out_channels
    if not (is_linear(one) and isinstance(one, nn.Linear) and isinstance(other, nn.Linear)):
        return False
    return one.in_features == other.in_features and one.out_features != other.in_features


if not TYPE_CHECKING:  # for a type checker, any name would exist

    def __getattr__(name: str) -> Any:
        return _moved.left(__name__, name)
