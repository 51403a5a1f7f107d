"""Find what changes the logits between the head's output and the softmax of the loss, in the autograd graph.

A segmentation model enlarges the logits to the size of the picture, a graph network adds up those of the
neighbours, two heads are averaged.  The gradient at the head's output is then not that of a softmax of this
output: loss, margin and absorption of its rows would be wrong.  The graph is only read.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any, NamedTuple

from torch import Tensor

from nfi_monitor.capture import devices
from nfi_monitor.capture.origin import OF_A_WEIGHT, PRODUCTS, Logits, of_last_axis, operation, saved

_SOFTMAX = {"LogSoftmax", "Softmax", "Logsumexp"}
_PROBABILITIES = {"Softmax", "Sigmoid", "LogSigmoid", "Exp"}
"""If a model returns the result of these, its output is no logits."""
_MIXES = {"Add", "Mul", "Mean", "Sum"}
_SAME_ROWS = OF_A_WEIGHT | {
    "Slice", "Select", "Squeeze", "Index", "IndexSelect", "Gather", "MaskedFill", "Where", "Cat", "Split",
    "SplitWithSizes", "Stack", "DDPSink", "LogSoftmax", "Narrow", "ConstantPadNd", "Unbind", "CopySlices",
    "NanToNum",
}  # fmt: skip
"""Operations that keep, choose or reorder rows, if :func:`_resized` and :func:`_overwrites` do not object."""
CHOOSE = {"Slice", "Index", "IndexSelect", "Gather", "Narrow", "Split", "SplitWithSizes"}
"""Operations that may leave out classes."""
_OF_TWO = {"Add", "Sub", "Mul", "Div"}
"""They keep the rows if the other factor or summand is a constant or a parameter."""
_CHANGES = {
    "Mean", "Sum", "Cumsum", "Max", "Amax", "Exp", "Log", "Pow", "Sqrt", "Neg", "Relu", "LeakyRelu", "Gelu",
    "Silu", "Elu", "Sigmoid", "LogSigmoid", "Softplus", "Softmax", "NativeDropout", "Prelu", "Tanh", "Abs",
    "Hardtanh", "Clamp", "ClampMin", "ClampMax", "Acos", "Cos", "Asin", "Sin", "Rsqrt", "Reciprocal",
    "Maximum", "Minimum", "Rsub",
    "UpsampleBilinear2D", "UpsampleBicubic2D", "UpsampleNearest2D", "UpsampleTrilinear3D", "UpsampleLinear1D",
    "UpsampleNearest1D", "UpsampleNearest3D", "UpsampleBilinear2DAa", "UpsampleBicubic2DAa",
    "UpsampleNearestExact1D", "UpsampleNearestExact2D", "UpsampleNearestExact3D", "GridSampler2D",
    "AvgPool2D", "AvgPool3D", "AdaptiveAvgPool2D", "AdaptiveAvgPool3D", "MaxPool2DWithIndices",
    "AdaptiveMaxPool2D", "ScatterAdd", "ScatterReduce", "Scatter", "IndexAdd", "IndexPut", "IndexReduce",
    "SegmentReduce", "SparseAddmm", "SparseMm", "NativeLayerNorm", "NativeBatchNorm", "CudnnBatchNorm",
    "MiopenBatchNorm", "NativeGroupNorm", "LinalgVectorNorm", "Norm",
}  # fmt: skip
"""Operations that mix rows or change the differences between the logits of a row."""
OF_EACH = {
    "Tanh", "Hardtanh", "Clamp", "ClampMin", "ClampMax", "Exp", "Log", "Pow", "Sqrt", "Neg", "Relu",
    "LeakyRelu", "Gelu", "Silu", "Elu", "Sigmoid", "LogSigmoid", "Softplus", "Abs", "Acos", "Cos", "Asin",
    "Sin",
}  # fmt: skip
"""Operations of these that change each logit by itself: the rows keep their features."""
_OF_PARAMETERS = OF_A_WEIGHT | {
    "Add", "Sub", "Mul", "Div", "Exp", "Log", "Clamp", "ClampMin", "ClampMax", "Sigmoid", "Softplus", "Neg",
    "Reciprocal", "Pow", "Sqrt", "Tanh",
}  # fmt: skip
"""Operations with which a factor or a summand is computed from parameters."""
LIMIT = 600
"""Maximum number of steps of a search."""
DEEP = 20_000
"""Maximum number of nodes that are searched for the head's output behind other layers."""
FAR = 30.0
"""Nats. A clamp at this magnitude or beyond changes no softmax: what it cuts off is below rounding."""
SMALL = 16
"""Maximum number of nodes between a factor and the parameters that it is computed from."""


class Arrival(NamedTuple):
    """A path from a softmax to a watched tensor.

    ``change``: the first operation on the way that changes the logits, or None.  ``mixed``: whether one of
    these does more than change each logit by itself.  ``softmax``: its node; None if the search began at
    logits.  ``added``: the first operation that adds a constant or a parameter, fills
    entries, or leaves out classes.  It keeps the rows and their gradient, but not margins and loss.
    ``scaled``: whether the logits are multiplied besides.  ``turned``: whether axes change places.
    """

    change: str | None = None
    mixed: bool = False
    softmax: Any = None
    added: str | None = None
    scaled: bool = False
    turned: bool = False

    def after(self, node: Any, name: str, classes: int) -> Arrival | None:
        """Return the path with one more operation on logits of K classes; None if that is not known."""
        known, changed = _effect(node, name, classes)
        if not known:
            return None
        return self._replace(
            change=self.change or changed,
            mixed=self.mixed or (changed is not None and changed not in OF_EACH),
            added=self.added or (name if _adds(node, name, classes) else None),
            scaled=self.scaled or (name in ("Mul", "Div") and not _is_one(_constant(node))),
            turned=self.turned or name in ("Transpose", "Permute", "T"),
        )


def arrivals(start: Any, targets: Collection[Any], *, at_logits: bool, axis: int = -1) -> list[Arrival]:
    """Return the paths from the node ``start`` to nodes of ``targets``, from logits on.

    ``at_logits``: whether ``start`` made logits; if not, it made a loss, and logits begin at a softmax.  A
    path ends at a product with a weight, and from logits on at an operation that is not known.  ``axis``: of
    the classes in what the targets made.
    """
    classes = next((_shape(target)[axis] for target in targets if len(_shape(target)) >= -axis), 0)
    found: list[Arrival] = []
    seen: set[tuple[Any, ...]] = set()
    ahead: list[tuple[Any, Arrival, bool]] = [(start, Arrival(), False)]
    while ahead and len(seen) < LIMIT:
        place = ahead.pop()
        node, path, in_log = place
        if node is None or place in seen:
            continue
        seen.add(place)
        logits = at_logits or path.softmax is not None
        if node in targets:
            if logits:
                found.append(path)
            continue
        name = operation(node)
        if logits:
            longer = None if at_logits and name in _PROBABILITIES else path.after(node, name, classes)
            if longer is None:
                continue
            path = longer
        elif name in PRODUCTS:
            continue
        elif name in _SOFTMAX:
            path = path._replace(softmax=node)
        elif in_log and name in _MIXES:  # the loss is the log of a mean of probabilities
            changed = None if of_last_axis(node) else _effect(node, name, classes)[1]
            path = path._replace(change=path.change or changed, mixed=path.mixed or changed is not None)
        in_log = not logits and (in_log or name == "Log")
        ahead += [(before, path, in_log) for before, _ in node.next_functions]
    return found


def has_softmax(loss: Any) -> bool:
    """Return whether the node of a loss depends on a softmax, with no product in between."""
    seen, ahead = {loss}, [loss]
    while ahead and len(seen) < LIMIT:
        node = ahead.pop()
        name = operation(node)
        if name in _SOFTMAX:
            return True
        if name not in PRODUCTS:
            following = [before for before, _ in node.next_functions if before is not None]
            ahead += [before for before in following if before not in seen]
            seen.update(following)
    return False


def _effect(node: Any, name: str, classes: int) -> tuple[bool, str | None]:
    """Return whether an operation on logits is known, and its name if it changes them."""
    if name in PRODUCTS:
        return _mixes_rows(node, name), name
    if name in _OF_TWO:
        return True, None if _keeps_rows(node, name) else name
    if name in _CHANGES:
        return True, None if _does_nothing(node, name) else name
    if (name in ("Cat", "ConstantPadNd") and _adds_classes(node, name, classes)) or (
        name == "CopySlices" and _overwrites(node)
    ):
        return True, name
    return name in _SAME_ROWS, None


def multiplies(paths: Iterable[Arrival]) -> bool:
    """Return whether logits are moved by other amounts than the head's output that they are made of."""
    return any(path.scaled or path.change is not None for path in paths)


def first_changed(paths: Iterable[Arrival]) -> Arrival | None:
    """Return the first path if all change the logits, one with a readable softmax if possible; else None."""
    paths = list(paths)
    if not paths or any(path.change is None for path in paths):
        return None
    readable = [path for path in paths if softmax_logits(path.softmax) is not None]
    return (readable or paths)[0]


def first_added(paths: Iterable[Arrival]) -> Arrival | None:
    """Return the first path if something is added on all of them, and nothing else changes the logits."""
    paths = list(paths)
    if not paths or any(path.change is not None or path.added is None for path in paths):
        return None
    return paths[0]


def softmax_logits(softmax: Any) -> Logits | None:
    """Return the log-probabilities that a node of ``log_softmax`` keeps; None for another node.

    They are the logits minus a number for each row.  Their hook gets the gradient of the logits.
    """
    if softmax is None or operation(softmax) != "LogSoftmax":
        return None
    before, output = softmax.next_functions[0]
    values = saved(softmax, "result")
    if before is None or output != 0 or values is None:
        return None
    axis = softmax._saved_dim
    axis = axis if axis < values.dim() else axis - 2**64  # a negative one, read as unsigned
    return Logits(values, None, before, axis if axis < 0 else axis - values.dim(), normalized=True)


def reached(start: Any, targets: Collection[Any]) -> set[Any]:
    """Return those nodes of ``targets`` on which the node ``start`` depends, as far as the search goes."""
    seen, ahead, found = {start}, [start], set()
    while ahead and len(seen) < DEEP:
        for before, _ in ahead.pop().next_functions:
            if before is not None and before not in seen:
                seen.add(before)
                ahead.append(before)
                if before in targets:
                    found.add(before)
    return found


def _mixes_rows(node: Any, name: str) -> bool:
    """Return whether a product multiplies by a constant matrix from the left: an adjacency matrix."""
    factors = [place for place, saved in enumerate(PRODUCTS[name]) if saved]
    left, right = (node.next_functions[place][0] for place in factors)
    return name in ("Mm", "Bmm") and left is None and right is not None


def _keeps_rows(node: Any, name: str) -> bool:
    """Return whether the other input is one number, a scale, a bias, or a summand for each row."""
    others = [before for before, _ in node.next_functions if before is not None]
    sizes = [_of_parameters(before) for before in others]
    known = [size for size in sizes if size is not None]
    if len(others) < 2:
        constant = _constant(node)
        return name in ("Add", "Sub") or constant is None or constant.numel() == 1
    if known:  # a bias of its own leaves the gradient as it is
        return name in ("Add", "Sub") or max(known) == 1
    return name in ("Add", "Sub") and any(_of_each_row(before) for before in others)


def _constant(node: Any) -> Tensor | None:
    """Return what a product or quotient multiplies logits by, or divides them by; None if it is not kept."""
    first = node.next_functions[0][0] is not None
    return saved(node, "other" if first else "self")


def _is_one(constant: Tensor | None) -> bool:
    """Return whether the host knows that a factor is 1."""
    return (
        constant is not None and constant.numel() == 1 and devices.on_host(constant) and bool(constant == 1)
    )


def _adds(node: Any, name: str, classes: int) -> bool:
    """Return whether an operation adds a constant or a bias, fills entries of rows, or leaves out classes."""
    inputs = [before for before, _ in node.next_functions if before is not None]
    if name in ("Add", "Sub"):
        sizes = [size for before in inputs if (size := _of_parameters(before)) is not None]
        return len(inputs) < 2 or max(sizes, default=1) > 1
    if name in ("MaskedFill", "Where"):
        mask, axis = (
            saved(node, "mask" if name == "MaskedFill" else "condition"),
            _axis_of(_shape(node), classes),
        )
        return mask is None or (mask.dim() >= -axis and mask.shape[axis] > 1)  # else it fills whole rows
    return name in CHOOSE and _resized(node, classes) < 0


def _resized(node: Any, classes: int) -> int:
    """Return −1 (1) if an operation leaves out (adds) classes, else 0."""
    before, output = node.next_functions[0]
    old, new = _shape(before, output), _shape(node)
    axis = _axis_of(old, classes)
    if not axis or len(old) != len(new) or new[axis] < 2:
        return 0
    return int(new[axis] > old[axis]) - int(new[axis] < old[axis])


def _adds_classes(node: Any, name: str, classes: int) -> bool:
    """Return whether an operation joins classes, or pads them."""
    last = name == "Cat" and node._saved_dim in (len(_shape(node)) - 1, 2**64 - 1)
    return last or _resized(node, classes) > 0


def _shape(node: Any, output: int = 0) -> tuple[int, ...]:
    """Return the shape of what a node made; () if that is not known."""
    try:
        return tuple(node._input_metadata[output].shape)
    except (AttributeError, IndexError):  # an older torch, or no gradient goes there
        return ()


def _axis_of(shape: tuple[int, ...], classes: int) -> int:
    """Return the axis of K classes, below zero, the last one if several fit; 0 if none does."""
    return next((axis - len(shape) for axis in reversed(range(len(shape))) if shape[axis] == classes), 0)


def _overwrites(node: Any) -> bool:
    """Return whether a part of other logits is written over, and not only a buffer filled part by part."""
    base = node.next_functions[0][0]
    return base is not None and operation(base) != "CopySlices"


def _of_each_row(node: Any) -> bool:
    """Return whether a tensor is one number for each row of logits: no softmax sees it added to the row."""
    while node is not None and operation(node) in OF_A_WEIGHT:
        node = node.next_functions[0][0]
    name = "" if node is None else operation(node)
    if name in ("Mean", "Sum"):
        return bool(getattr(node, "_saved_keepdim", False)) and of_last_axis(node)
    return name in ("Gather", "Max", "Amax", "Logsumexp")


def _of_parameters(node: Any) -> int | None:
    """Return the size of the largest parameter of a tensor that is computed from parameters alone.

    ``scale.exp()`` is one of size 1.  None: it depends on the data.
    """
    seen, ahead, size = {node}, [node], 0
    while ahead:
        one = ahead.pop()
        if hasattr(one, "variable"):
            size = max(size, one.variable.numel())
            continue
        if operation(one) not in _OF_PARAMETERS or len(seen) > SMALL:
            return None
        inputs = [before for before, _ in one.next_functions if before is not None and before not in seen]
        ahead += inputs
        seen.update(inputs)
    return size


def _clamps_far(node: Any) -> bool:
    """Return whether a clamp by numbers cuts off only what is far from all usual logits."""
    try:
        least, most = getattr(node, "_saved_min", None), getattr(node, "_saved_max", None)
    except RuntimeError:  # tensors, freed by the backward pass
        return False
    known = [x for x in (least, most) if x is not None]
    numbers = all(isinstance(x, (int, float)) for x in known)
    return numbers and (least is None or least <= -FAR) and (most is None or most >= FAR)


def _does_nothing(node: Any, name: str) -> bool:
    """Return whether an operation returns its input: it enlarges to the same size, or adds up one entry.

    A clamp far from all usual logits counts as one, too.
    """
    if name.startswith("Clamp"):
        return _clamps_far(node)
    sizes = getattr(node, "_saved_self_sym_sizes", None)
    if name.startswith("Upsample"):
        wanted = getattr(node, "_saved_output_size", None)
        return sizes is not None and wanted is not None and tuple(sizes[-len(wanted) :]) == tuple(wanted)
    if name in ("Mean", "Sum") and sizes is not None:
        axes = getattr(node, "_saved_dim", None)
        axes = range(len(sizes)) if not axes else [axis % 2**64 for axis in axes]
        return all(sizes[axis if axis < len(sizes) else axis - 2**64] == 1 for axis in axes)
    return False


def class_axis(tensor: Tensor, classes: int, *, spatial: int) -> int | None:
    """Return the axis of ``classes`` logits, below zero: axis 1 of pictures, else the last; None: neither."""
    axes = (1 - tensor.dim(), -1) if spatial and tensor.dim() > 2 else (-1, 1 - tensor.dim())
    fits = [axis for axis in axes if tensor.dim() > 1 and tensor.shape[axis] == classes]
    return fits[0] if fits else None
