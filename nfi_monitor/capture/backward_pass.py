"""Tell a backward pass that trains from one that only computes a derivative; add up several passes.

``loss.backward()`` accumulates gradients in the parameters.  ``torch.autograd.grad(logits, inputs)``, as in a
gradient penalty or a saliency map, runs the same hooks, but trains nothing.  ``torch.autograd.grad(loss,
parameters)`` may train, if the loop assigns the result, or may be a part of something else: an inner step
(MAML), a product with the Hessian (AdaHessian, SophiaH, power iteration), a penalty on the gradient.
"""

from __future__ import annotations

from collections import deque
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

SMALL_PENALTY = 0.1
"""A penalty on the logits with a backward pass of its own is left out if its gradient is smaller than this
share of the cross-entropy's.  In rows that the loss has absorbed, even a tiny penalty is the larger part of
the gradient, and would hide them."""
NODES = 1000
"""Maximum number of graph nodes that are searched for a parameter."""


def nearest_parameter(tensor: Tensor) -> Any:
    """Return the graph node of the parameter nearest to ``tensor``; None if there is none."""
    if tensor.grad_fn is None:
        return None
    for following, _ in tensor.grad_fn.next_functions:  # of a layer: its bias
        if isinstance(getattr(following, "variable", None), nn.Parameter):
            return following
    queue: deque[Any] = deque([tensor.grad_fn])
    seen = {tensor.grad_fn}
    while queue:
        node = queue.popleft()
        if isinstance(getattr(node, "variable", None), nn.Parameter):
            return node
        for following, _ in node.next_functions:
            if following is not None and following not in seen and len(seen) < NODES:
                seen.add(following)
                queue.append(following)
    return None


def is_freed(node: Any) -> bool | None:
    """Return whether a backward pass has freed the tensors that a graph node kept; None if it kept none."""
    kept = None
    for name in dir(node):
        if not name.startswith("_raw_saved_"):
            continue
        try:
            # Unpacking a tensor that hooks have packed would run them.
            if getattr(getattr(node, name), "unpack_hook", None) is None:
                getattr(node, name.removeprefix("_raw"))
                kept = False
        except RuntimeError as error:
            if "freed" in str(error):
                return True
        except AttributeError:  # a function of the user's own, not yet freed
            kept = False
    return kept


class Pass(Enum):
    """The kind of a backward pass through the logits."""

    TRAINS = "accumulates gradients in parameters"
    ASKED = "computes gradients of parameters for the caller"
    DIFFERENTIABLE = "computes them with create_graph: they are a part of something else, or are assigned"
    OTHER = "computes no gradient of a parameter"


def pass_of(parameter: Any) -> Pass:
    """Return the kind of the running backward pass. Call it in a tensor hook.

    ``parameter``: of :func:`nearest_parameter`.  A pass that cannot be examined (None) trains.
    """
    examine = getattr(torch._C, "_will_engine_execute_node", None)
    if parameter is None or examine is None:
        return Pass.TRAINS
    try:
        return Pass.TRAINS if examine(parameter) else Pass.OTHER
    except RuntimeError:
        # Raised if the gradient of the parameter itself was asked for, and outside of the usual engine.
        return Pass.DIFFERENTIABLE if torch.is_grad_enabled() else Pass.ASKED


class Change(Enum):
    """What a further backward pass does to the gradient so far."""

    ADD, REPLACE, NOTHING = "add", "replace", "nothing"


def change(before: Pass, now: Pass) -> Change:
    """Return what a backward pass does to the gradient of earlier ones through the same logits.

    Where some passes train, no others count.  What is asked for of a differentiable gradient is a derivative
    of the gradient, such as a product with the Hessian.
    """
    if now is before and now is not Pass.DIFFERENTIABLE:
        return Change.ADD
    return Change.REPLACE if now is Pass.TRAINS else Change.NOTHING


class SeveralPasses:
    """Add up the gradients of several backward passes through the same logits, ``logits`` [n, K].

    Passes that look like a cross-entropy's are added apart from the rest (penalties), on their device.
    """

    def __init__(self, grad: Tensor, logits: Tensor) -> None:
        """``grad`` [n, K]: the gradient of the first pass."""
        self._logits = logits
        self._losses, self._rest = torch.zeros_like(grad), torch.zeros_like(grad)
        self.add(grad)

    def add(self, grad: Tensor) -> None:
        """Add the gradient [n, K] of one pass."""
        with torch.no_grad():
            is_loss, zero = looks_like_cross_entropy(grad, self._logits), torch.zeros_like(grad)
            self._losses += torch.where(is_loss, grad, zero)
            self._rest += torch.where(is_loss, zero, grad)

    def sum(self) -> Tensor:
        """Return the sum [n, K] of all passes, without penalties below :data:`SMALL_PENALTY`."""
        with torch.no_grad():
            losses, rest = (_absolute_sum(part) for part in (self._losses, self._rest))
            small = rest < SMALL_PENALTY * losses
            return torch.where(small, self._losses, self._losses + self._rest)


def looks_like_cross_entropy(grad: Tensor, logits: Tensor) -> Tensor:
    """Return whether most rows of a gradient [n, K] can be a cross-entropy's with one target, bool, 0-d.

    Such a row has one negative entry, which the others balance, or, once absorbed, none and a zero at the
    largest logit.  ``logits`` [n, K].
    """
    dtype = torch.float64 if grad.dtype is torch.float64 else torch.float32
    negative = (grad < 0).sum(-1)
    absolute = grad.abs().sum(-1, dtype=dtype)
    # An own entry that is not absorbed is rounded by at most a half: the violation is at most 1/3.
    balanced = grad.sum(-1, dtype=dtype).abs() <= 0.35 * absolute
    at_winner = grad.gather(-1, logits.argmax(-1, keepdim=True)).squeeze(-1)
    fits = ((negative == 1) & balanced) | ((negative == 0) & (at_winner == 0))
    live = absolute > 0
    return 2 * (fits & live).sum() >= live.sum()


def _absolute_sum(tensor: Tensor) -> Tensor:
    return tensor.abs().sum(dtype=torch.float64 if tensor.dtype is torch.float64 else torch.float32)
