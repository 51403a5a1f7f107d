"""Describe the classifier head: the layer, or the bare parameter, that makes the logits."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.parameter import is_lazy

from nfi_monitor.capture.sampling import local


class Place(NamedTuple):
    """Where rows are read if the logits are changed after the head.

    ``where``: "output", the tensor at the keys ``path`` of the model's output; "loss", the softmax of the
    loss that the model returns; "nowhere", if no tensor holds the changed logits.  ``axis``: of the classes.
    ``same_rows``: whether its rows are those of the head's output, with the head's features.
    """

    where: str
    path: tuple[Any, ...] = ()
    axis: int = -1
    same_rows: bool = False


@dataclass(frozen=True)
class Head:
    """The watched module, with its qualified name in the model and the layout of its weight.

    ``owner`` and ``parameter`` say where the weight is: by default it is ``module.weight``.  A head that is a
    bare parameter (``logits = h @ model.W_U``) belongs to the module that returns the logits.
    """

    name: str
    module: nn.Module
    class_axis: int  # axis of the weight: 0 for nn.Linear's [K, d], 1 for GPT-2-style Conv1D's [d, K]
    tied: bool  # an input embedding shares the weight, so its .grad has no zero-sum
    parameter: str = "weight"
    owner: nn.Module | None = None
    bare: bool = False  # a parameter that no standard layer uses: its features come from the autograd graph
    classes: int | None = None  # K, also if the module has no weight of its own; None: unknown
    spatial: int = 0  # axes of the output behind the class axis: 2 for a Conv2d
    others: tuple[str, ...] = field(default=(), compare=False)  # further heads that are not watched
    sure: bool = field(default=True, compare=False)  # False: check it against the first output
    place: Place | None = field(default=None, compare=False)  # None: at the head's own output
    changed: bool = field(default=False, compare=False)  # the product of a bare parameter, before the output

    @property
    def weight(self) -> nn.Parameter | None:
        weight = own_parameter(self.owner or self.module, self.parameter)
        if weight is None or is_lazy(weight) or weight.is_complex():
            return None
        return weight if weight.dim() in (2, 2 + self.spatial) else None

    @property
    def waits(self) -> bool:
        """Whether the head is a lazy layer, which makes its weight in its first forward pass."""
        weight = own_parameter(self.owner or self.module, self.parameter)
        return weight is not None and is_lazy(weight)

    @property
    def bias(self) -> nn.Parameter | None:
        owner = self.owner or self.module
        if not self.bare:
            bias = own_parameter(owner, "bias")
            return bias if bias is not None and not is_lazy(bias) and bias.dim() == 1 else None
        fit = [p for p in owner._parameters.values() if p is not None and tuple(p.shape) == (self.outputs,)]
        return fit[0] if len(fit) == 1 else None

    def classes_first(self, tensor: Tensor) -> Tensor:
        """Return the weight or its gradient as [K, d], a view if possible; [K, d·k·k] for a convolution."""
        tensor = local(tensor)
        if tensor.dim() == 2:
            return tensor if self.class_axis == 0 else tensor.T
        return tensor.movedim(self.class_axis, 0).flatten(1)

    @property
    def outputs(self) -> int | None:
        """K, or None for a head without a weight matrix."""
        return self.weight.shape[self.class_axis] if self.weight is not None else None

    @property
    def width(self) -> int | None:
        """Length of a row of the weight: d, or d·k·k of a convolution; None without a weight matrix."""
        return self.weight.numel() // max(self.outputs or 1, 1) if self.weight is not None else None

    def class_axis_of(self, output: Tensor) -> int | None:
        """Return the axis of the module's output that holds the classes, below zero; None if none fits.

        It is the last axis of a linear layer's output, and axis 1 of a convolution's [N, K, H, W].
        """
        axis = -1 - self.spatial
        whole = self.weight is not None and not self.bare
        if self.spatial and not whole and output.dim() == 2:
            axis = -1  # pooled
        if output.dim() < -axis:
            return None
        known = self.outputs if self.bare else self.classes
        fits = known is None or whole or output.shape[axis] == known
        return axis if fits else None

    @property
    def has_zero_sum(self) -> bool:
        """Whether a softmax's zero-sum reaches the gradient of the weight.

        Not so if an embedding shares the weight, or if the logits are changed after the head in a way that
        may depend on them, as the attention of a graph network.  Then the rows alone show it.
        """
        return not (self.tied or self.changed) and (self.place is None or self.place.where == "nowhere")

    def describe(self) -> str:
        name = f"layer {self.name}" if self.name.rpartition(".")[2].isdigit() else self.name
        kind = "parameter" if self.bare else type(self.owner or self.module).__name__
        if self.weight is None:
            return f"{name} ({kind})"
        return f"{name} ({kind} {self.width}→{self.outputs})"


def size_of(param: Tensor) -> int:
    """Return the number of elements; 0 for a parameter that its lazy layer has not made yet."""
    return 0 if is_lazy(param) else param.numel()


def own_parameter(module: nn.Module, name: str) -> nn.Parameter | None:
    """Return a registered parameter; None if there is none of this name. TorchScript's table has no ``get``.

    Rejected: reading the attribute.  For a parametrized module (spectral norm), that runs code of the model,
    which changes its buffers or draws random numbers.
    """
    return next((one for own, one in module._parameters.items() if own == name), None)


def is_linear(module: nn.Module) -> bool:
    """Return whether a module is a linear layer, or GPT-2's ``Conv1D``, which is one."""
    if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
        # MultiheadAttention's projection is never called as a module, so its hook would never run.
        return not isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)
    return False


def is_convolution(module: nn.Module) -> bool:
    """Return whether a module is a convolution, transposed or not."""
    return isinstance(module, _ConvNd)


def is_layer(module: nn.Module) -> bool:
    """Return whether a module could make logits: a linear layer or a convolution."""
    return is_linear(module) or is_convolution(module)


def child(module: nn.Module, name: str) -> nn.Module | None:
    """Return the module's own submodule of this name, or None. TorchScript's table has no ``get``."""
    return next((one for own, one in module._modules.items() if own == name), None)


def looked_through(module: nn.Module) -> tuple[str, nn.Module]:
    """Return the layer that a wrapper calls, with its path in the wrapper ("" if it is no wrapper).

    peft's ``ModulesToSaveWrapper`` trains a copy of the layer for each adapter, and calls the active one.
    """
    saved = child(module, "modules_to_save")
    if isinstance(saved, nn.ModuleDict) and len(saved):
        active = getattr(module, "active_adapters", None) or getattr(module, "active_adapter", None)
        active = [active] if isinstance(active, str) else list(active or ())
        name = next((one for one in active if one in saved), next(iter(saved)))
        path, layer = looked_through(saved[name])
        return ".".join(part for part in ("modules_to_save", name, path) if part), layer
    return "", module


def layout(module: nn.Module) -> dict[str, Any]:
    """Return ``class_axis``, ``classes`` and ``spatial`` of the layer that makes a module's output.

    Of a container it is the last layer with a weight.
    """
    base = child(module, "base_layer")  # LoRA and similar
    layer = base if base is not None else module
    if not is_layer(layer):
        inner = [one for one in layer.modules() if is_layer(one)]
        if not inner:
            return {"class_axis": 0}
        layer = inner[-1]
    if is_convolution(layer):
        transposed = isinstance(layer, _ConvTransposeNd) and layer.groups == 1
        weight = own_parameter(layer, "weight")
        return {
            "class_axis": 1 if transposed else 0,
            "classes": int(layer.out_channels),  # type: ignore[arg-type]
            "spatial": 0 if weight is None else weight.dim() - 2,
        }
    weight, axis = own_parameter(layer, "weight"), 1 if type(layer).__name__ == "Conv1D" else 0
    classes = getattr(layer, "out_features", None)
    if classes is None and weight is not None and weight.dim() == 2:
        classes = weight.shape[axis]
    return {"class_axis": axis, "classes": classes}


def shares_weight(model: nn.Module, weight: Tensor | None) -> bool:
    """Return whether an input embedding of the model has this very weight."""
    return weight is not None and any(
        isinstance(other, nn.Embedding) and own_parameter(other, "weight") is weight
        for other in model.modules()
    )
