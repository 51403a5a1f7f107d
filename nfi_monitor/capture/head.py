"""Find the classifier head and watch the gradient at its output.

The head module is hooked, not the model: under mixed precision the outer output is often a converted
copy whose hook never fires.  A tensor hook on the head's output sees the true ∂L/∂z of the run, in the
run's own precision, without labels and without a second backward.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nfi_monitor.capture.sampling import local, offset, row_stride
from nfi_monitor.distributed import ClassShard, class_shard
from nfi_monitor.errors import HeadNotFoundError

HEAD_NAMES = {
    "lm_head": 1, "score": 1, "classifier": 1, "classification_head": 1, "unembed": 1,
    "output_projection": 1, "qa_outputs": 1, "head": 0, "fc": 0,
}  # fmt: skip
"""Attribute names under which libraries keep the head, most specific first, with the depth down to
which the name is trusted: ``fc`` of the model is its head, ``fc`` of a block is any layer."""


@dataclass(frozen=True)
class Head:
    """The watched module, its qualified name in the model, and how its weight lies."""

    name: str
    module: nn.Module
    class_axis: int  # 0 for nn.Linear's [K, d], 1 for GPT-2-style Conv1D's [d, K]
    tied: bool  # the weight is an input embedding's too: its .grad is no batch-level zero-sum

    @property
    def weight(self) -> nn.Parameter | None:
        weight = _own_parameter(self.module, "weight")
        return weight if weight is not None and weight.dim() == 2 else None

    @property
    def bias(self) -> nn.Parameter | None:
        bias = _own_parameter(self.module, "bias")
        return bias if bias is not None and bias.dim() == 1 else None

    def classes_first(self, tensor: Tensor) -> Tensor:
        """A [K, d] view of the weight or of its gradient."""
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
    """The last linear layer before the softmax.

    Order: what the caller names; ``model.get_output_embeddings()``; a unique linear layer under one of
    the usual names; the last linear layer in registration order, unless a sibling reads the same
    features (two heads).

    Raises:
        HeadNotFoundError: nothing or more than one module fits; the message lists the candidates.
    """
    modules = {_clean(name, model): module for name, module in model.named_modules()}
    adapted = [name for name, module in modules.items() if "base_layer" in module._modules]  # LoRA and kin
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
            _advice(f"{last!r} and {rivals[-1]!r} read the same features: which is the head?", linears)
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
    weight = _own_parameter(module, "weight")
    conv1d = type(module).__name__ == "Conv1D"
    tied = weight is not None and any(
        isinstance(other, nn.Embedding) and _own_parameter(other, "weight") is weight
        for other in model.modules()
    )
    return Head(name, module, 1 if conv1d else 0, tied)


def _own_parameter(module: nn.Module, name: str) -> nn.Parameter | None:
    """A registered parameter, never the attribute: reading a parametrized one (spectral norm) runs code of
    the model's, which moves its buffers or draws random numbers."""
    return module._parameters.get(name)


def _is_linear(module: nn.Module) -> bool:
    if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
        # MultiheadAttention's projection is never called as a module, so it could never fire.
        return not isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)
    return False


def _same_input(linears: dict[str, nn.Module], name: str, last: str) -> bool:
    """Siblings with equal input widths of which neither can feed the other: two heads."""
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
        f"Name it: Monitor(model, optimizer, head={example!r}), or pass the module itself. If the logits "
        "are not a module's output, use head=False and logits = monitor.tap(logits)."
    )


def _clean(name: str, model: nn.Module) -> str:
    """Names without the wrappers of torch.compile, data parallelism and activation checkpointing."""
    parts = [part for part in name.split(".") if part not in ("_orig_mod", "_checkpoint_wrapped_module")]
    if type(model).__name__ in ("DistributedDataParallel", "DataParallel") and parts[0] == "module":
        parts = parts[1:]
    return ".".join(parts)


@dataclass(frozen=True)
class Rows:
    """What one backward pass shows: detached, sampled by the same stride. [n, K], [n, K], [n, d] or None."""

    grad: Tensor
    logits: Tensor
    features: Tensor | None
    total: int  # rows of the whole batch
    shard: ClassShard | None = None  # the K are some of the classes, other ranks hold the rest


class HeadProbe:
    """Forward hook of the head. Copies and pickles of the model get an inert one.

    A bound method as hook would make ``deepcopy(model)`` and ``torch.save(model)`` drag the monitor
    along, and an EMA copy would report its rows as the run's.
    """

    def __init__(
        self,
        wanted: Callable[[], int | None],
        deliver: Callable[[Rows], None],
        failed: Callable[[str, BaseException], None],
        spent: Callable[[float], None] = lambda seconds: None,
    ) -> None:
        """``spent`` is told the seconds that each hook took in a step that is read."""
        self._wanted = wanted
        self._deliver = deliver
        self._failed = failed
        self._spent = spent
        self.fired = 0
        self.delivered = 0
        self.fired_without_gradient = 0
        self.traced = 0
        self.tapped = False
        self.lowered = False  # fewer rows than the budget has
        self.can_lower = False  # whether that would be fewer than there are
        self.without_features = 0
        self.outputs: int | None = None  # K, where the head's own weight holds a part of the classes
        self.sharded = 0  # logits of which each rank holds some classes only, and nobody puts them together
        self.row_slots = 0  # rows of such logits that the ranks put together
        self._features: Tensor | None = None
        self.__name__ = type(self).__name__  # torch.jit asks every hook for its name

    @property
    def level(self) -> str:
        """Where violations are read: "rows", "tap" or, while no row was seen, "weight_gradient"."""
        if self.tapped:
            return "tap"
        return "rows" if self.delivered else "weight_gradient"

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if torch.compiler.is_compiling():
            # Inside a compiled graph a Python hook would be a graph break; the head's weight gradient
            # is read instead.  (The count is a constant to the tracer: set, not added to.)
            self.traced = 1
            return
        try:
            step = self._wanted()
            if step is None or not isinstance(output, Tensor) or _inside_functorch(output):
                return
            started = time.perf_counter()
            try:
                self._look(module, args, kwargs, output, step)
            finally:
                self._spent(time.perf_counter() - started)
        except Exception as error:
            self._failed("rows", error)

    def _look(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor, step: int
    ) -> None:
        if not (module.training and torch.is_grad_enabled() and output.requires_grad):
            self.fired_without_gradient += 1
            return
        inputs = (value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        features = next(inputs, None)
        if self.tapped:
            # The tapped tensor comes later; these may be its features.
            self._features = None if features is None else features.detach()
        else:
            weight = _own_parameter(module, "weight")
            self._watch(output, features, step, tapped=False, weight=weight)

    def tap(self, logits: Tensor) -> None:
        """Watch exactly this tensor from now on, instead of the head's output."""
        self.tapped = True
        features, self._features = self._features, None
        step = self._wanted()
        if step is None or _inside_functorch(logits):
            return
        if torch.is_grad_enabled() and logits.requires_grad:
            started = time.perf_counter()
            try:
                self._watch(logits, features, step, tapped=True)
            finally:
                self._spent(time.perf_counter() - started)

    def _watch(
        self,
        logits: Tensor,
        features: Tensor | None,
        step: int,
        *,
        tapped: bool,
        weight: Tensor | None = None,
    ) -> None:
        """Register the gradient hook on ``logits`` [..., K]; ``features`` [..., d] feed them."""
        self.fired += 1
        shard, shown = None, whole_rows(logits)
        if shown is None or (not tapped and self.outputs is not None and shown.shape[-1:] != (self.outputs,)):
            shard = class_shard(logits if shown is None else weight, -1 if shown is None else 0)
            shown = local(logits.detach())
            if shard is None or not self.row_slots or shown.shape[-1] != shard.classes:
                self.sharded += 1
                return
        features = None if features is None else whole_rows(features)
        classes = shown.shape[-1] if shown.dim() else 0
        total = shown.numel() // classes if classes else 0
        if total == 0:
            return  # an empty batch shows nothing
        wide = shard.outputs if shard else classes
        stride = row_stride(total, wide, lowered=self.lowered)
        self.can_lower = row_stride(total, wide, lowered=True) > row_stride(total, wide)
        if shard is not None:
            stride = max(stride, -(-total // self.row_slots))
        first = offset(step, stride)

        def sample(tensor: Tensor) -> Tensor:
            return rows_of(tensor.detach(), first, stride)

        # Copies: some losses write their gradient over the logits, and a strided view would keep the whole
        # [N, K] and [N, d] storages alive.  All rows of the features are autograd's own and are shared.
        kept = [sample(shown).clone()]
        same_rows = features is not None and features.shape[:-1] == shown.shape[:-1]
        if features is not None and same_rows and features.device == shown.device:
            kept.append(sample(features).clone() if stride > 1 else sample(features))
        else:
            self.without_features += 1

        def on_gradient(grad: Tensor | None) -> None:
            # None: some compiled outer graphs call tensor hooks so.  Tapped after this forward: the
            # tapped tensor reports the rows.
            if grad is None or self.tapped is not tapped:
                return
            started = time.perf_counter()
            try:
                try:
                    deliver(whole_rows(grad) if shard is None else classes_of(grad, shard))
                finally:
                    self._spent(time.perf_counter() - started)
            except Exception as error:
                self._failed("rows", error)

        def deliver(grad: Tensor | None) -> None:
            if grad is None:
                self.sharded += 1
                return
            self.delivered += 1
            if kept:  # a second backward through the same graph shows the same rows again
                features = kept[1] if len(kept) > 1 else None
                self._deliver(Rows(sample(grad), kept[0], features, total, shard))
                kept.clear()  # the graph may outlive its backward

        logits.register_hook(on_gradient)

    def forget(self) -> None:
        """Let go of features whose logits were never tapped."""
        self._features = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        return INERT[0](*INERT[1])  # type: ignore[no-any-return]

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return INERT


INERT: tuple[Callable[..., Any], tuple[Any, ...]] = (getattr, (nullcontext(), "__exit__"))
"""What a copied or unpickled model carries in the place of a probe, as (function, arguments): a hook that
returns None whatever it is given. Of the standard library: a saved model opens where this package is not."""


def rows_of(tensor: Tensor, first: int, stride: int) -> Tensor:
    """Rows ``first``, ``first + stride``, … of [..., K], in the order of their indices → [n, K].

    Never a copy of the whole: a gradient may be laid out with the classes before the positions, as that of
    ``cross_entropy(logits.transpose(1, 2), target)`` is, and no view of it has rows.
    """
    classes = tensor.shape[-1]
    try:
        return tensor.view(-1, classes)[first::stride]
    except RuntimeError:
        # torch.unravel_index would make the device wait for the shape.
        at = torch.arange(first, tensor.numel() // classes, stride, device=tensor.device)
        places: list[Tensor] = []
        for size in reversed(tensor.shape[:-1]):
            places.insert(0, at % size)
            at = at // size
        return tensor[tuple(places)]


def whole_rows(tensor: Any) -> Tensor | None:
    """This rank's rows of a DTensor, detached, where they hold all classes (or features); None where they do
    not. Any other tensor itself."""
    if not hasattr(tensor, "to_local"):
        return tensor  # type: ignore[no-any-return]
    cut = {getattr(placement, "dim", None) for placement in tensor.placements}
    partial = any(placement.is_partial() for placement in tensor.placements)
    if partial or not cut.isdisjoint({-1, tensor.dim() - 1}):
        return None
    return local(tensor.detach())


def classes_of(tensor: Any, shard: ClassShard) -> Tensor | None:
    """This rank's classes of a gradient at logits that are cut like ``shard``; None where it has others."""
    whole = whole_rows(tensor)
    if whole is None:
        return local(tensor.detach()) if class_shard(tensor, -1) == shard else None
    if whole.shape[-1] == shard.outputs:
        return whole.narrow(-1, shard.first, shard.classes)
    return whole if whole.shape[-1] == shard.classes else None


def _inside_functorch(tensor: Tensor) -> bool:
    """Under vmap and torch.func.grad tensors are wrapped: there are no rows to read."""
    wrapped = getattr(torch._C._functorch, "is_functorch_wrapped_tensor", None)
    return bool(wrapped is not None and wrapped(tensor))
