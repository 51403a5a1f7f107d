"""What changes logits between the head and the softmax of the loss, in the autograd graph."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nfi_monitor.capture.logit_changes import (
    arrivals,
    class_axis,
    first_changed,
    has_softmax,
    reached,
    softmax_logits,
)


def _logits() -> Tensor:
    return nn.Linear(4, 5)(torch.randn(6, 4))


Y = torch.tensor([0, 1, 2, 3, 4, 0])
LOSSES: dict[str, tuple[Callable[[Tensor], Tensor], set[str | None]]] = {
    "none": (lambda z: F.cross_entropy(z, Y), {None}),
    "a sum with another": (lambda z: F.cross_entropy(z + _logits(), Y), {"Add"}),
    "one of two losses": (lambda z: F.cross_entropy(z, Y) + F.cross_entropy(z + _logits(), Y), {None, "Add"}),
    "the first change counts": (lambda z: F.cross_entropy((z * _logits()).exp(), Y), {"Exp"}),
    "a mean of chances": (
        lambda z: F.nll_loss((z.softmax(-1) + _logits().softmax(-1)).log(), Y),
        {"Add"},
    ),
    "another layer": (lambda z: F.cross_entropy(nn.Linear(5, 5)(z), Y), set()),
    "an unknown operation": (lambda z: F.cross_entropy(torch.erf(z), Y), set()),
    "no softmax": (lambda z: z.square().mean(), set()),
}


@pytest.mark.parametrize("kind", LOSSES)
def test_the_paths_from_a_softmax_to_the_heads_output(kind: str) -> None:
    logits = _logits()
    loss, expected = LOSSES[kind]
    node = loss(logits).grad_fn
    paths = arrivals(node, [logits.grad_fn], at_logits=False)
    assert {path.change for path in paths} == expected
    assert (first_changed(paths) is not None) == (bool(expected) and None not in expected)
    assert has_softmax(node) is (kind != "no softmax")
    assert reached(node, {logits.grad_fn}) == {logits.grad_fn}


def test_the_softmax_keeps_log_probabilities_until_the_backward_pass() -> None:
    logits = torch.randn(2, 5, 3, 4, requires_grad=True)
    wide = F.interpolate(logits, size=(6, 8), mode="bilinear")
    loss = F.cross_entropy(wide, torch.zeros(2, 6, 8, dtype=torch.long))
    (path,) = arrivals(loss.grad_fn, [wide.grad_fn], at_logits=False)
    found = softmax_logits(path.softmax)
    assert found is not None and found.normalized and found.features is None and found.axis == -3
    assert torch.equal(found.values, wide.log_softmax(1))
    arrived: list[Tensor | None] = []
    found.hook(arrived.append)
    wide.retain_grad()
    loss.backward()
    assert arrived[0] is not None and torch.equal(arrived[0], wide.grad)
    assert softmax_logits(path.softmax) is None


def test_a_packed_softmax_is_not_unpacked() -> None:
    """Unpacking would run the hooks: checkpointing would compute the model once more."""
    logits, unpacked = _logits(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: unpacked.append(t) or t):
        loss = F.cross_entropy(logits, Y)
    (path,) = arrivals(loss.grad_fn, [logits.grad_fn], at_logits=False)
    assert softmax_logits(path.softmax) is None and unpacked == []


@pytest.mark.parametrize(
    ("shape", "spatial", "axis"),
    [((6, 5), 0, -1), ((6, 7, 5), 0, -1), ((6, 5, 7), 0, -2), ((2, 5, 5, 5), 2, -3), ((2, 5), 2, -1),
     ((2, 4, 4, 5), 2, -1), ((6, 4), 0, None), ((5,), 0, None)],
)  # fmt: skip
def test_the_axis_of_the_classes(shape: tuple[int, ...], spatial: int, axis: int | None) -> None:
    assert class_axis(torch.empty(shape), 5, spatial=spatial) == axis
