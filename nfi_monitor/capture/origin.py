"""Ask the autograd graph of a model's output which weight made the logits, and from which features.

The graph is only read: no node is added, no tensor is computed.  A node that is not known ends the search on
its path, and then nothing is concluded.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn

_SAME_ROWS = {"View", "UnsafeView", "ReshapeAlias", "ToCopy", "Alias"}
"""Operations that change neither the numbers nor the order of the rows."""
OF_A_WEIGHT = _SAME_ROWS | {"T", "Transpose", "Permute", "Expand", "Unsqueeze", "Clone"}
"""Operations between a parameter and the product in which it is used."""
_POINTWISE = {"Add", "Sub", "Mul", "Div", "Tanh"}
_OF_LOGITS = (
    OF_A_WEIGHT
    | _POINTWISE
    | {
        "Slice", "Select", "Squeeze", "Index", "IndexSelect", "Gather", "NativeDropout", "MaskedFill",
        "Where", "Cat", "Split", "Stack", "Mean", "Sum", "Neg", "Exp", "Log", "Pow", "Clamp", "Diagonal",
        "UpsampleBilinear2D", "UpsampleNearest2D", "AdaptiveAvgPool2D", "AvgPool2D", "DDPSink",
        "Softmax", "LogSoftmax", "Logsumexp", "Sigmoid", "LogSigmoid", "Softplus",
        "Acos", "Cos", "Asin", "Sin", "Abs", "Reciprocal", "Rsqrt", "Sqrt", "ClampMin",
        "Hardtanh", "Maximum", "Minimum", "Rsub", "Scatter",
        "IndexPut", "CopySlices", "ConstantPadNd", "SplitWithSizes", "NanToNum",
        "NllLoss", "NllLoss2D", "NllLossNd", "CrossEntropyLoss", "BinaryCrossEntropyWithLogits", "KlDiv",
        "MseLoss", "L1Loss", "SmoothL1Loss",
    }
)  # fmt: skip
"""Operations between the product that makes logits and the output or the loss."""
PRODUCTS = {
    "Mm": ("self", "mat2"),
    "Bmm": ("self", "mat2"),
    "Addmm": ("", "mat1", "mat2"),
    "Baddbmm": ("", "batch1", "batch2"),
    "Linear": ("input", "weight", ""),
    "Convolution": ("input", "weight", ""),
    "MkldnnConvolution": ("input", "weight", ""),
}
"""Products, each with the names under which a node saves its inputs, in the order of ``next_functions``."""
_NORMALIZES = (
    OF_A_WEIGHT | _POINTWISE | {"LinalgVectorNorm", "Norm", "ClampMin", "Clamp", "Sum", "Mean", "Pow", "Sqrt",
                                "Rsqrt", "Reciprocal", "Exp", "WeightNormInterface"}
)  # fmt: skip
"""Operations with which a weight is computed from a matrix of the same size."""
FACTOR = 32
"""Maximum number of nodes between a product and the matrix from which its weight is computed."""
_DISTANCES = {"Cdist", "EuclideanDist", "CosineSimilarity"}
"""They compare features, as a product of two does."""
LIMIT = 400
"""Maximum number of nodes that are looked at."""


class Product(NamedTuple):
    """A product in the graph: its node, the parameter in it (None: two activations), and its place.

    ``changed``: the parameter from which one factor is computed, as a normalised weight, if none is in it.
    """

    node: Any
    weight: nn.Parameter | None
    place: int
    changed: nn.Parameter | None = None


class Origin(NamedTuple):
    """The products that an output comes from.

    ``complete``: the search met no unknown node.  ``reached``: it met one of the nodes that it looks for.
    ``start``: the node of the output.
    """

    products: tuple[Product, ...]
    complete: bool
    reached: bool = False
    start: Any = None


@dataclass(frozen=True)
class Logits:
    """Logits in the graph: their values, their features, and the node at which their gradient arrives."""

    values: Tensor
    features: Tensor | None
    node: Any
    axis: int = -1  # that of the classes
    normalized: bool = False  # log-probabilities: the logits minus a number for each row
    product: Any = None  # the node of the product that made them

    def hook(self, on_gradient: Callable[[Tensor | None], None]) -> None:
        """Call ``on_gradient`` with the gradient of the logits in the backward pass."""
        shape = self.values.shape

        def pass_on(gradients: tuple[Tensor | None, ...]) -> None:
            grad = gradients[0]
            on_gradient(None if grad is None else grad.reshape(shape))

        self.node.register_prehook(pass_on)


def operation(node: Any) -> str:
    """Return the operation of a node: "Mm" for ``MmBackward0``."""
    return re.sub(r"Backward\d*$", "", str(node.name()).rpartition("::")[2].removeprefix("_"))


def saved(node: Any, name: str) -> Tensor | None:
    """Return a tensor that a node keeps for its backward pass; None if it does not have it as it is."""
    try:
        raw = getattr(node, f"_raw_saved_{name}", None)
        # Unpacking a tensor that hooks have packed runs them: checkpointing would compute the model anew.
        if raw is None or getattr(raw, "unpack_hook", raw) is not None:
            return None
        tensor = getattr(node, f"_saved_{name}")
    except RuntimeError:  # freed by the backward pass
        return None
    return tensor if isinstance(tensor, Tensor) else None


def tensors_of(output: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors in a model's output that have a gradient, with their names (or "")."""
    for path, tensor in paths_of(output):
        yield next((key for key in path if isinstance(key, str)), ""), tensor


def paths_of(output: Any, depth: int = 2) -> Iterator[tuple[tuple[Any, ...], Tensor]]:
    """Yield the tensors in a model's output that have a gradient, each with its keys in the output."""
    if isinstance(output, Tensor):
        if output.grad_fn is not None:
            yield (), output
        return
    if depth == 0:
        return
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(output, Mapping):
        items = output.items()
    elif isinstance(output, (tuple, list)):
        items = enumerate(output)
    for key, value in items:
        yield from (((key, *path), tensor) for path, tensor in paths_of(value, depth - 1))


def at_path(output: Any, path: tuple[Any, ...]) -> Tensor | None:
    """Return the tensor at these keys of a model's output; None if none with a gradient is there."""
    return next((tensor for keys, tensor in paths_of(output) if keys == path), None)


def origin(start: Any, targets: Collection[Any] = ()) -> Origin:
    """Return the products that logits, or a loss, come from. The search ends at nodes of ``targets``.

    ``start``: the node that made them.
    """
    found: dict[Any, Product] = {}
    complete, reached, seen, ahead = True, False, set(), [start]
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        name = operation(node)
        if node in targets:
            reached = True
        elif name in _DISTANCES or (name == "Sum" and _is_dot_product(node)):
            found[node] = Product(node, None, -1)
        elif name in PRODUCTS:
            product = _product(node, PRODUCTS[name])
            complete &= product is not None
            if product is not None:
                found[node] = product
        elif name in _OF_LOGITS and len(seen) < LIMIT:
            ahead += [before for before, _ in node.next_functions]
        elif not name.endswith("AccumulateGrad"):
            complete = False
    return Origin(tuple(found.values()), complete, reached, start)


def of_last_axis(node: Any) -> bool:
    """Return whether the node of a sum or a mean is one over the last axis."""
    sizes, axes = getattr(node, "_saved_self_sym_sizes", None), getattr(node, "_saved_dim", None)
    if sizes is None or axes is None:
        return False
    return tuple(axes) in ((2**64 - 1,), (-1,), (len(sizes) - 1,))  # a negative one may be read as unsigned


def _is_dot_product(node: Any) -> bool:
    """Return whether a sum over the last axis adds up the product of two activations."""
    factors = node.next_functions[0][0]
    if not of_last_axis(node) or factors is None or operation(factors) != "Mul":
        return False
    activations = [before for before, _ in factors.next_functions if before is not None]
    return len(activations) == 2 and all(_of_a_product(before) for before in activations)


def _of_a_product(node: Any) -> bool:
    """Return whether a tensor is a trained layer's output, or a normalised one: a feature."""
    seen, ahead = {node}, [node]
    while ahead and len(seen) < FACTOR:
        one = ahead.pop()
        name = operation(one)
        if name in PRODUCTS or "Norm" in name:
            return True
        if name not in _NORMALIZES:
            return False
        following = [before for before, _ in one.next_functions if before is not None]
        ahead += [before for before in following if before not in seen]
        seen.update(following)
    return False


def _product(node: Any, names: tuple[str, ...]) -> Product | None:
    """Return the product at a node; None if a factor needs no gradient: it may be a frozen weight."""
    factors = [(place, node.next_functions[place][0]) for place, name in enumerate(names) if name]
    weights = [(place, _parameter(factor)) for place, factor in factors]
    trained = [(place, weight) for place, weight in weights if weight is not None]
    if trained:
        return Product(node, trained[-1][1], trained[-1][0])
    if any(factor is None for _, factor in factors):
        return None
    changed = next((one for _, factor in factors if (one := _computed_from(factor)) is not None), None)
    return Product(node, None, -1, changed)


def _computed_from(node: Any) -> nn.Parameter | None:
    """Return the matrix from which a factor is computed, with no data in it; None for an activation."""
    seen, ahead, matrix = {node}, [node], None
    while ahead:
        one = ahead.pop()
        variable = getattr(one, "variable", None)
        if isinstance(variable, nn.Parameter):
            matrix = variable if variable.dim() >= 2 else matrix
        elif operation(one) not in _NORMALIZES or len(seen) > FACTOR:
            return None
        ahead += [before for before, _ in one.next_functions if before is not None and before not in seen]
        seen.update(before for before, _ in one.next_functions)
    return matrix


def _parameter(node: Any) -> nn.Parameter | None:
    """Return the parameter that a factor is a view or a converted copy of; None for an activation."""
    while node is not None and operation(node) in OF_A_WEIGHT:
        node = node.next_functions[0][0]
    variable = getattr(node, "variable", None)
    return variable if isinstance(variable, nn.Parameter) and variable.dim() >= 2 else None


def logits_of(output: Any, weight: Tensor) -> Logits | None:
    """Return the logits in an output that the matrix ``weight`` made; None if there are none."""
    for _, tensor in tensors_of(output):
        classes = tensor.shape[-1] if tensor.dim() > 1 else 0
        if classes not in weight.shape:
            continue
        for product in origin(tensor.grad_fn).products:
            if product.weight is weight:
                node: Any = tensor.grad_fn
                while operation(node) in _SAME_ROWS:
                    node = node.next_functions[0][0]
                width = weight.numel() // classes
                features = _features(product, width) if _in_order(tensor.grad_fn, product.node) else None
                return Logits(tensor, features, node, product=product.node)
    return None


def takes(output: Tensor, weight: Tensor | None, features: Tensor | None) -> bool:
    """Return whether one operation makes an output [..., K] of just this weight and these features.

    It may be one that this module does not know, as a function of the user's own.  Features without a
    gradient are in no graph: then False.
    """
    node: Any = output.grad_fn
    while node is not None and weight is not None and features is not None:
        factors = [before for before, _ in node.next_functions]
        if any(_parameter(factor) is weight for factor in factors):
            return any(_is_of(factor, features) for factor in factors)
        node = factors[0] if factors and operation(node) in _SAME_ROWS | _POINTWISE else None
    return False


def _is_of(node: Any, tensor: Tensor) -> bool:
    """Return whether the node, or one before it that only changes shape or type, made the tensor."""
    while node is not None and node is not tensor.grad_fn and operation(node) in _SAME_ROWS:
        node = node.next_functions[0][0]
    return node is not None and (node is tensor.grad_fn or getattr(node, "variable", None) is tensor)


def _in_order(node: Any, product: Any) -> bool:
    """Return whether the rows of a product are in the order of those of the tensor that ``node`` made."""
    while node is not None and node is not product:
        # torch.einsum makes one product of [1, N, d] and [1, d, K], and moves the axes back.
        einsum = operation(product) == "Bmm" and operation(node) == "Permute"
        if not (operation(node) in _SAME_ROWS | _POINTWISE or einsum):
            return False
        node = node.next_functions[0][0]
    return node is product


def _features(product: Product, width: int) -> Tensor | None:
    """Return the other factor of a product, [n, ``width``]; None if the graph does not keep it as it is."""
    names = PRODUCTS[operation(product.node)]
    other = next(name for place, name in enumerate(names) if name and place != product.place)
    kept = saved(product.node, other)
    if kept is None:
        return None
    kept = kept.detach()
    if kept.shape[-1] != width and kept.dim() > 1:
        kept = kept.mT
    return kept.reshape(-1, width) if kept.shape[-1] == width else None
