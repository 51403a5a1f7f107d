"""A head that is a parameter of the module that holds the body, too: what its features are."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nfi_monitor import Monitor

X = torch.randn(48, 16, generator=torch.Generator().manual_seed(1))
Y = torch.arange(48) % 20


class OwnWeight(nn.Module):
    """Body and head in one module."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(20, width) / 8)
        self.body = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, width))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.body(x), self.weight)


class Normalised(OwnWeight):
    def forward(self, x: Tensor) -> Tensor:
        return 15 * F.linear(F.normalize(self.body(x)), F.normalize(self.weight))


class Product(torch.autograd.Function):
    """A product that the monitor does not know, as of a library's own kernel."""

    @staticmethod
    def forward(ctx, h: Tensor, weight: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(h, weight)
        return h @ weight.T

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def]
        h, weight = ctx.saved_tensors
        return grad @ weight, grad.T @ h


class Kernel(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Linear(width, 20, bias=False).weight

    def forward(self, h: Tensor) -> Tensor:
        return Product.apply(h, self.weight)  # type: ignore[no-any-return]


class NormalisedInside(Kernel):
    def forward(self, h: Tensor) -> Tensor:
        return Product.apply(F.normalize(h), self.weight)  # type: ignore[no-any-return]


def train(model: nn.Module, head: str | None = None, *, steps: int = 7, packed: bool = False) -> Monitor:
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    with Monitor(model, optimizer, head=head, console=False, every=1) as monitor:
        for _ in range(steps):
            optimizer.zero_grad()
            hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t)
            with hooks if packed else nullcontext():
                loss = F.cross_entropy(model(X), Y)
            loss.backward()
            monitor.observe_loss(loss)
            optimizer.step()
    return monitor


FEATURES = ("feature_mean_norm", "logit_displacement", "feature_displacement")
CODES = {"failed_optimizer", "state_unreadable"}


@pytest.mark.parametrize("width", [32, 16], ids=["another width", "the input's width"])
@pytest.mark.parametrize("head", [None, "weight"], ids=["found", "named"])
def test_features_come_from_the_product_and_not_from_the_modules_input(width: int, head: str | None) -> None:
    torch.manual_seed(0)
    own = OwnWeight(width)
    layer = nn.Sequential(copy.deepcopy(own.body), nn.Linear(width, 20, bias=False))
    layer[1].weight.data.copy_(own.weight.data)
    expected, monitor = train(layer), train(own, head)
    notes = {note.code: note.message for note in monitor.notes}
    assert not CODES & set(notes) and f"weight (parameter {width}→20)" in notes["head_parameter"]
    assert head or "made by weight (parameter" in notes["head_by_output"]
    for name in (*FEATURES, "rms_t_head"):
        right, read = expected.history[name][1], monitor.history[name][1]
        assert len(read) > 3 and read == pytest.approx(right[-len(read) :], rel=1e-5), name


@pytest.mark.parametrize("width", [32, 16])
def test_a_normalised_matrix_has_no_features_and_the_optimizer_is_read(width: int) -> None:
    torch.manual_seed(0)
    monitor = train(Normalised(width), "weight")
    notes = {note.code: note.message for note in monitor.notes}
    assert not CODES & set(notes) and "normalised" in notes["no_features"]
    assert all(len(monitor.history[name][1]) == 0 for name in FEATURES)
    assert len(monitor.history["rms_t_head"][1]) == 7


@pytest.mark.parametrize("packed", [False, True], ids=["kept", "packed"])
def test_the_input_is_the_features_where_one_unknown_operation_takes_it_and_the_matrix(packed: bool) -> None:
    torch.manual_seed(0)
    body = nn.Linear(16, 24)
    monitor = train(nn.Sequential(body, Kernel(24)), "1.weight", packed=packed)
    assert len(monitor.history["feature_mean_norm"][1]) == 7
    monitor = train(nn.Sequential(nn.Linear(16, 24), NormalisedInside(24)), "1.weight", packed=packed)
    assert len(monitor.history["feature_mean_norm"][1]) == 0
    assert "no_features" in {note.code for note in monitor.notes}


def test_packed_features_behind_a_body_in_the_same_module_are_left_out() -> None:
    monitor = train(OwnWeight(16), "weight", packed=True)
    assert len(monitor.history["feature_mean_norm"][1]) == 0
    assert not CODES & {note.code for note in monitor.notes}


@pytest.mark.parametrize("width", [32, 16])
def test_the_input_of_a_named_module_with_a_body_is_not_taken_for_features(width: int) -> None:
    model = nn.ModuleDict({"inner": OwnWeight(width)})
    model.forward = lambda x: model["inner"](x)
    monitor = train(model, "inner")
    notes = {note.code for note in monitor.notes}
    assert not CODES & notes and "no_features" in notes
    assert len(monitor.history["feature_mean_norm"][1]) == 0 and len(monitor.history["rms_t_max"][1]) == 7


@pytest.mark.parametrize("kind", [OwnWeight, Normalised])
def test_the_training_has_the_same_bits(kind: type[OwnWeight]) -> None:
    torch.manual_seed(0)
    watched = kind(16)
    alone = copy.deepcopy(watched)
    train(watched, "weight")
    optimizer = torch.optim.Adam(alone.parameters(), lr=1e-2)
    for _ in range(7):
        optimizer.zero_grad()
        F.cross_entropy(alone(X), Y).backward()
        optimizer.step()
    for mine, its in zip(alone.parameters(), watched.parameters(), strict=True):
        assert torch.equal(mine, its)
