"""Name modules and parameters as the user knows them, and word what to do if no head is found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

from torch import nn

from nfi_monitor.caller import call_with
from nfi_monitor.capture.head_layer import is_layer

HeadLike: TypeAlias = "nn.Module | nn.Parameter | str | Sequence[nn.Module | nn.Parameter | str]"
"""What names a head: a module, a parameter, the qualified name of one, or a list of these."""


def clean(name: str, model: nn.Module) -> str:
    """Return a name without the wrappers of torch.compile, data parallelism and activation checkpointing."""
    inner = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
    parts = [part for part in name.split(".") if part not in inner]
    if type(model).__name__ in ("DistributedDataParallel", "DataParallel") and parts[0] == "module":
        parts = parts[1:]
    return ".".join(parts)


def inner_names(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules of a model by their cleaned names."""
    return {clean(name, model): module for name, module in model.named_modules()}


def layer_names(modules: Mapping[str, nn.Module]) -> list[str]:
    """Return the names of the linear layers and convolutions of a model."""
    return [name for name, module in modules.items() if is_layer(module)]


def no_head_text(problem: str, modules: Mapping[str, nn.Module]) -> str:
    """Return a message that lists the layers that the model has, and says how to name one of them."""
    names = layer_names(modules)
    shown = [f"  {name}  {modules[name].extra_repr()}" for name in names[-8:]]
    listing = "\n".join(shown) if shown else "  (none)"
    usual = [name for name in names if "head" in name or "classif" in name]
    example = f"head={(usual or names)[-1]!r}" if names else None
    how = (
        f"Name the head: {call_with(example)}, or pass the module or parameter itself. If no module returns"
        if example
        else f"Pass the module or parameter that makes the logits: {call_with('head=...')}. If none returns"
    )
    return (
        f"No classifier head: the model {problem}.\nLayers (last 8):\n{listing}\n"
        f"{how} the logits, use head=False and logits = monitor.tap(logits)."
    )
