"""Find the classifier head: the last linear layer before the softmax."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from nfi_monitor import _moved
from nfi_monitor.capture.sampling import local
from nfi_monitor.errors import HeadNotFoundError

HEAD_NAMES = {
    "lm_head": 1, "score": 1, "classifier": 1, "classification_head": 1, "unembed": 1,
    "output_projection": 1, "qa_outputs": 1, "head": 0, "fc": 0,
}  # fmt: skip
"""Attribute names that libraries use for the head, most specific first, each with a maximum depth.  ``fc`` of
the model is its head, but ``fc`` of a block may be any layer."""


@dataclass(frozen=True)
class Head:
    """The watched module, with its qualified name in the model and the layout of its weight."""

    name: str
    module: nn.Module
    class_axis: int  # 0 for nn.Linear's [K, d], 1 for GPT-2-style Conv1D's [d, K]
    tied: bool  # an input embedding shares the weight, so its .grad has no zero-sum

    @property
    def weight(self) -> nn.Parameter | None:
        weight = own_parameter(self.module, "weight")
        return weight if weight is not None and weight.dim() == 2 else None

    @property
    def bias(self) -> nn.Parameter | None:
        bias = own_parameter(self.module, "bias")
        return bias if bias is not None and bias.dim() == 1 else None

    def classes_first(self, tensor: Tensor) -> Tensor:
        """Return a [K, d] view of the weight or of its gradient."""
        return local(tensor) if self.class_axis == 0 else local(tensor).T

    @property
    def outputs(self) -> int | None:
        """K, or None for a head without a weight matrix."""
        return self.weight.shape[self.class_axis] if self.weight is not None else None

    def describe(self) -> str:
        name = f"layer {self.name}" if self.name.rpartition(".")[2].isdigit() else self.name
        if self.weight is None:
            return f"{name} ({type(self.module).__name__})"
        features = self.weight.shape[1 - self.class_axis]
        return f"{name} ({type(self.module).__name__} {features}→{self.outputs})"


def find_head(model: nn.Module, head: nn.Module | str | None = None) -> Head:
    """Return the last linear layer before the softmax.

    Order of preference: the given ``head``; ``model.get_output_embeddings()``; a unique linear layer with one
    of the usual names; the last linear layer in registration order, unless a sibling reads the same features
    (two heads).

    Raises:
        HeadNotFoundError: no module fits, or more than one; the message lists the candidates.
    """
    modules = {_clean(name, model): module for name, module in model.named_modules()}
    adapted = [
        name for name, module in modules.items() if "base_layer" in module._modules
    ]  # LoRA and similar
    linears = {
        name: module
        for name, module in modules.items()
        if name in adapted
        or (_is_linear(module) and not any(name.startswith(owner + ".") for owner in adapted))
    }
    if head is not None:
        return _named(model, modules, linears, head)

    output_embeddings = getattr(model, "get_output_embeddings", None)
    if callable(output_embeddings):
        try:
            found = output_embeddings()
        except (NotImplementedError, AttributeError):
            found = None
        for name, module in modules.items():
            if found is not None and module is found:
                return _describe(model, name, module)

    for usual, trusted in HEAD_NAMES.items():
        matches = [name for name in linears if usual in name.split(".")]
        if not matches:
            continue
        depth = min(name.split(".").index(usual) for name in matches)
        matches = [name for name in matches if name.split(".").index(usual) == depth]
        owners = {tuple(name.split(".")[: depth + 1]) for name in matches}
        if len(owners) == 1 and depth <= trusted:
            return _describe(model, matches[-1], linears[matches[-1]])

    if not linears:
        raise HeadNotFoundError(_advice("found no linear layer", linears))
    last = list(linears)[-1]
    rivals = [name for name in linears if name != last and _same_input(linears, name, last)]
    if rivals:
        raise HeadNotFoundError(
            _advice(f"has two layers that read the same features, {last!r} and {rivals[-1]!r}", linears)
        )
    after = list(modules)[list(modules).index(last) + 1 :]
    convolutions = [name for name in after if isinstance(modules[name], nn.modules.conv._ConvNd)]
    if convolutions:
        raise HeadNotFoundError(
            _advice(f"ends in a convolution ({convolutions[-1]!r}), not in a linear layer", linears)
        )
    return _describe(model, last, linears[last])


def _named(
    model: nn.Module,
    modules: dict[str, nn.Module],
    linears: dict[str, nn.Module],
    head: nn.Module | str,
) -> Head:
    if isinstance(head, str):
        if head not in modules or head == "":
            raise HeadNotFoundError(_advice(f"has no module named {head!r}", linears))
        return _describe(model, head, modules[head])
    for name, module in modules.items():
        if module is head:
            return _describe(model, name or type(model).__name__, module)
    raise HeadNotFoundError(_advice(f"does not contain the {type(head).__name__} given as head=", linears))


def _describe(model: nn.Module, name: str, module: nn.Module) -> Head:
    weight = own_parameter(module, "weight")
    conv1d = type(module).__name__ == "Conv1D"
    tied = weight is not None and any(
        isinstance(other, nn.Embedding) and own_parameter(other, "weight") is weight
        for other in model.modules()
    )
    return Head(name, module, 1 if conv1d else 0, tied)


def own_parameter(module: nn.Module, name: str) -> nn.Parameter | None:
    """Return a registered parameter; None if there is none of this name.

    Rejected: reading the attribute.  For a parametrized module (spectral norm), that runs code of the model,
    which changes its buffers or draws random numbers.
    """
    return module._parameters.get(name)


def _is_linear(module: nn.Module) -> bool:
    if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
        # MultiheadAttention's projection is never called as a module, so its hook would never run.
        return not isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)
    return False


def _same_input(linears: dict[str, nn.Module], name: str, last: str) -> bool:
    """Return whether two siblings have equal input widths and neither can feed the other: two heads."""
    if name.rpartition(".")[0] != last.rpartition(".")[0] or name.rpartition(".")[2].isdigit():
        return False
    one, other = linears[name], linears[last]
    if not (isinstance(one, nn.Linear) and isinstance(other, nn.Linear)):
        return False
    return one.in_features == other.in_features and one.out_features != other.in_features


def _advice(problem: str, linears: dict[str, nn.Module]) -> str:
    shown = [f"  {name}  {module.extra_repr()}" for name, module in list(linears.items())[-8:]]
    listing = "\n".join(shown) if shown else "  (none)"
    example = list(linears)[-1] if linears else "classifier"
    return (
        f"No classifier head: the model {problem}.\nLinear layers (last 8):\n{listing}\n"
        f"Name the head: Monitor(model, optimizer, head={example!r}), or pass the module itself. If no "
        "module returns the logits, use head=False and logits = monitor.tap(logits)."
    )


def _clean(name: str, model: nn.Module) -> str:
    """Return a name without the wrappers of torch.compile, data parallelism and activation checkpointing."""
    parts = [part for part in name.split(".") if part not in ("_orig_mod", "_checkpoint_wrapped_module")]
    if type(model).__name__ in ("DistributedDataParallel", "DataParallel") and parts[0] == "module":
        parts = parts[1:]
    return ".".join(parts)


if not TYPE_CHECKING:  # for a type checker, any name would exist

    def __getattr__(name: str) -> Any:
        return _moved.left(__name__, name)
