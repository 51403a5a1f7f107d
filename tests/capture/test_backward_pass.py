"""Several backward passes through the same logits, and passes that train nothing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nfi_monitor import Monitor
from nfi_monitor.capture.backward_pass import Change, Pass, SeveralPasses, change, looks_like_cross_entropy
from tests.runs import batch, differences, mlp, snapshot

Passes = Callable[[Tensor, Tensor, Tensor], None]
"""Runs the backward passes of one step: (logits, targets, inputs)."""


def run(passes: Passes, *, steps: int = 3, watched: bool = True) -> tuple[Monitor | None, dict[str, object]]:
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    monitor = Monitor(model, optimizer, console=False, every=1) if watched else None
    inputs, targets = batch()
    for _ in range(steps):
        x = inputs.clone().requires_grad_()
        passes(model(x), targets, x)
        optimizer.step()
        optimizer.zero_grad()
    if monitor is not None:
        monitor.close()
    return monitor, snapshot(model, optimizer)


def whole(logits: Tensor, targets: Tensor, inputs: Tensor) -> None:
    F.cross_entropy(logits, targets).backward()


def halves(logits: Tensor, targets: Tensor, inputs: Tensor) -> None:
    """The rows of one half of the batch, then those of the other."""
    half = len(targets) // 2
    (F.cross_entropy(logits[:half], targets[:half]) / 2).backward(retain_graph=True)
    (F.cross_entropy(logits[half:], targets[half:]) / 2).backward()


def quarters(logits: Tensor, targets: Tensor, inputs: Tensor) -> None:
    for left in (True, True, True, False):
        (F.cross_entropy(logits, targets) / 4).backward(retain_graph=left)


def penalty_first(logits: Tensor, targets: Tensor, inputs: Tensor) -> None:
    (1e-9 * logits.square().mean()).backward(retain_graph=True)
    F.cross_entropy(logits, targets).backward()


def penalty_last(logits: Tensor, targets: Tensor, inputs: Tensor) -> None:
    F.cross_entropy(logits, targets).backward(retain_graph=True)
    (1e-9 * logits.square().mean()).backward()


def saliency_first(logits: Tensor, targets: Tensor, inputs: Tensor) -> None:
    torch.autograd.grad(logits.square().sum(), inputs, retain_graph=True)
    F.cross_entropy(logits, targets).backward()


def penalty_of_the_gradient(logits: Tensor, targets: Tensor, inputs: Tensor) -> None:
    (slope,) = torch.autograd.grad(logits.sum(), inputs, create_graph=True)
    (F.cross_entropy(logits, targets) + 1e-6 * slope.square().sum()).backward()


def parameters_of(logits: Tensor) -> list[Tensor]:
    """The parameters behind the logits."""
    found, ahead, seen = [], [logits.grad_fn], set()
    while ahead:
        node = ahead.pop()
        if node is not None and node not in seen:
            seen.add(node)
            if isinstance(getattr(node, "variable", None), nn.Parameter):
                found.append(node.variable)
            ahead += [following for following, _ in node.next_functions]
    return found


def curvature(
    gradients: list[Tensor] | tuple[Tensor, ...], params: list[Tensor], *, more: bool = False
) -> None:
    """A product of the Hessian with a vector, as AdaHessian, SophiaH and power iterations ask for it."""
    torch.autograd.grad(gradients, params, [torch.ones_like(one) for one in params], retain_graph=more)


def product_with_the_hessian(logits: Tensor, targets: Tensor, inputs: Tensor) -> None:
    params = parameters_of(logits)
    F.cross_entropy(logits, targets).backward(create_graph=True)
    gradients = [param.grad for param in params if param.grad is not None]
    for more in (True, False):
        curvature(gradients, params, more=more)
    for param, gradient in zip(params, gradients, strict=True):
        param.grad = gradient.detach()


def products_first(logits: Tensor, targets: Tensor, inputs: Tensor) -> None:
    params = parameters_of(logits)
    gradients = torch.autograd.grad(F.cross_entropy(logits, targets), params, create_graph=True)
    curvature(gradients, params, more=True)
    curvature(gradients, params, more=True)
    F.cross_entropy(logits, targets).backward()


def assigned_after_a_product(logits: Tensor, targets: Tensor, inputs: Tensor) -> None:
    params = parameters_of(logits)
    gradients = torch.autograd.grad(F.cross_entropy(logits, targets), params, create_graph=True)
    curvature(gradients, params)
    for param, gradient in zip(params, gradients, strict=True):
        param.grad = gradient.detach()


def assigned_in_parts(logits: Tensor, targets: Tensor, inputs: Tensor) -> None:
    """The gradient of each task is asked for, as gradient surgery does."""
    params, half = parameters_of(logits), len(targets) // 2
    first = torch.autograd.grad(F.cross_entropy(logits[:half], targets[:half]) / 2, params, retain_graph=True)
    second = torch.autograd.grad(F.cross_entropy(logits[half:], targets[half:]) / 2, params)
    for param, one, other in zip(params, first, second, strict=True):
        param.grad = one + other


def norm_of_the_gradient_first(logits: Tensor, targets: Tensor, inputs: Tensor) -> None:
    loss = F.cross_entropy(logits, targets)
    torch.autograd.grad(loss, parameters_of(logits), retain_graph=True)
    loss.backward()


def penalty_of_the_parameters_gradient(logits: Tensor, targets: Tensor, inputs: Tensor) -> None:
    loss = F.cross_entropy(logits, targets)
    gradients = torch.autograd.grad(loss, parameters_of(logits), create_graph=True)
    (loss + 1e-9 * torch.stack([gradient.square().sum() for gradient in gradients]).sum()).backward()


@pytest.mark.filterwarnings("ignore:Using backward")
@pytest.mark.parametrize(
    "passes",
    [
        halves,
        quarters,
        penalty_first,
        penalty_last,
        saliency_first,
        penalty_of_the_gradient,
        product_with_the_hessian,
        products_first,
        assigned_after_a_product,
        assigned_in_parts,
        norm_of_the_gradient_first,
        penalty_of_the_parameters_gradient,
    ],
    ids=lambda passes: passes.__name__,
)
def test_what_arrives_in_several_backward_passes_is_read_as_one(passes: Passes) -> None:
    """Only the loss's passes count, and their sum is the gradient of a single pass."""
    expected, _ = run(whole)
    monitor, trained = run(passes)
    assert monitor is not None and expected is not None
    for name in ("zero_sum_violation", "absorbed_fraction", "soft_target_fraction", "head_loss"):
        steps, values = monitor.history[name]
        assert steps.tolist() == [1, 2, 3], name
        assert values == pytest.approx(expected.history[name][1], rel=1e-3, abs=1e-6), name
    assert [note.code for note in monitor.notes] == [note.code for note in expected.notes]
    assert not differences(run(passes, watched=False)[1], trained)


def test_gradients_that_the_loop_asks_for_itself_and_assigns_are_read() -> None:
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    inputs, targets = batch()
    with Monitor(model, optimizer, console=False, every=1) as monitor:
        for _ in range(3):
            gradients = torch.autograd.grad(F.cross_entropy(model(inputs), targets), [*model.parameters()])
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                parameter.grad = gradient
            optimizer.step()
    assert len(monitor.history["zero_sum_violation"][0]) == 3


Inner = Callable[[nn.Module, Tensor, Tensor], object]
"""What a training step does with other rows before its own backward pass."""


def first_order_step(model: nn.Module, inputs: Tensor, targets: Tensor) -> object:
    """The inner step of first-order MAML, at which the outer loss is not computed here."""
    return torch.autograd.grad(F.cross_entropy(model(inputs), targets), [*model.parameters()])


def largest_eigenvalue(model: nn.Module, inputs: Tensor, targets: Tensor) -> object:
    """Some power iterations on a batch of their own."""
    params: list[Tensor] = [*model.parameters()]
    gradients = torch.autograd.grad(F.cross_entropy(model(inputs), targets), params, create_graph=True)
    for _ in range(3):
        curvature(gradients, params, more=True)
    return None


def attack(model: nn.Module, inputs: Tensor, targets: Tensor) -> object:
    """One step of an adversarial attack."""
    x = inputs.clone().requires_grad_()
    return torch.autograd.grad(F.cross_entropy(model(x), targets), x)


@pytest.mark.parametrize("inner", [first_order_step, largest_eigenvalue, attack], ids=lambda f: f.__name__)
def test_rows_whose_gradient_is_only_asked_for_do_not_count_beside_rows_that_train(inner: Inner) -> None:
    def trained(inner: Inner | None) -> Monitor:
        model = mlp()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        inputs, targets = batch()
        others, labels = batch(rows=10, seed=7)
        with Monitor(model, optimizer, console=False, every=1) as monitor:
            for _ in range(3):
                if inner is not None:
                    inner(model, others, labels)
                F.cross_entropy(model(inputs), targets).backward()
                optimizer.step()
                optimizer.zero_grad()
        return monitor

    expected, monitor = trained(None), trained(inner)
    for name in ("head_loss", "margin_median", "zero_sum_violation", "mean_logit"):
        assert monitor.history[name][1].tolist() == expected.history[name][1].tolist(), name


def test_many_micro_batches_whose_gradient_is_asked_for_are_all_read() -> None:
    model = mlp()
    params: list[Tensor] = [*model.parameters()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    inputs, targets = batch()
    with Monitor(model, optimizer, console=False, every=1) as monitor:
        losses = []
        for _ in range(2):
            for param in params:
                param.grad = torch.zeros_like(param)
            losses.append(F.cross_entropy(model(inputs), targets).item())
            for row, target in zip(inputs.split(1), targets.split(1), strict=True):
                gradients = torch.autograd.grad(F.cross_entropy(model(row), target) / len(inputs), params)
                for param, gradient in zip(params, gradients, strict=True):
                    assert param.grad is not None
                    param.grad += gradient
            optimizer.step()
    assert monitor.history["head_loss"][1] == pytest.approx(losses, rel=1e-5)


def test_what_a_further_pass_does() -> None:
    trains, asked, differentiable = Pass.TRAINS, Pass.ASKED, Pass.DIFFERENTIABLE
    adds = {(trains, trains), (asked, asked)}
    replaces = {(asked, trains), (differentiable, trains)}
    for before in (trains, asked, differentiable):
        for now in (trains, asked, differentiable):
            pair = (before, now)
            expected = Change.ADD if pair in adds else Change.REPLACE if pair in replaces else Change.NOTHING
            assert change(before, now) is expected, pair


def test_a_penalty_hides_no_absorbed_rows_and_counts_where_it_is_large() -> None:
    logits = torch.tensor([[40.0, 1.0, -3.0], [2.0, 1.0, -1.0]], requires_grad=True)
    targets = torch.tensor([0, 1])
    (own,) = torch.autograd.grad(F.cross_entropy(logits, targets), logits)
    for scale, expected in ((1e-9, own), (1.0, own + 2 * logits.detach())):
        passes = SeveralPasses(scale * 2 * logits.detach(), logits.detach())
        passes.add(own)
        assert torch.equal(passes.sum(), expected)


@pytest.mark.parametrize("apart", [False, True])
def test_a_tiny_penalty_on_absorbed_rows_changes_neither_margins_nor_losses(
    apart: bool,
) -> None:
    def trained(penalty: float) -> Monitor:
        model = mlp()
        with torch.no_grad():
            model[4].weight.mul_(300)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        inputs = batch()[0]
        targets = model(inputs).argmax(-1)
        with Monitor(model, optimizer, console=False, every=1) as monitor:
            for _ in range(6):
                logits = model(inputs)
                loss, rest = F.cross_entropy(logits, targets), penalty * logits.square().mean()
                optimizer.zero_grad()
                if apart:
                    rest.backward(retain_graph=True)
                    loss.backward()
                else:
                    (loss + rest).backward()
                optimizer.step()
        return monitor

    alone, both = trained(0.0), trained(1e-9)
    assert alone.history["absorbed_fraction"][1].min() > 0.5
    for name in ("margin_median", "margin_min", "head_loss"):  # the penalty does train
        assert both.history[name][1] == pytest.approx(alone.history[name][1], rel=2e-2), name
    assert [note.code for note in both.notes] == [note.code for note in alone.notes]
    if apart:  # else only the sum arrives, and the penalty pushes the correct class itself
        for name in ("absorbed_fraction", "zero_sum_violation"):
            assert both.history[name][1] == pytest.approx(alone.history[name][1], abs=1e-3), name


@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0, 100.0])
def test_a_cross_entropy_is_told_from_penalties_on_its_logits(scale: float) -> None:
    torch.manual_seed(0)
    logits = (scale * torch.randn(64, 9)).requires_grad_()

    def gradient(loss: Tensor) -> Tensor:
        return torch.autograd.grad(loss, logits)[0]

    for targets in (torch.randint(9, (64,)), logits.argmax(-1)):
        assert looks_like_cross_entropy(gradient(F.cross_entropy(logits, targets)), logits)
    assert not looks_like_cross_entropy(gradient(logits.square().mean()), logits)
    assert not looks_like_cross_entropy(gradient(logits.logsumexp(-1).square().mean()), logits)


def test_rows_of_many_micro_batches_do_not_wait_for_the_step() -> None:
    """Only those whose graph may still get a gradient are held."""
    model = nn.Linear(8, 5)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with Monitor(model, optimizer, console=False, every=1) as monitor:
        for _ in range(20):
            F.cross_entropy(model(torch.randn(4, 8)), torch.randint(5, (4,))).backward()
            assert len(monitor._loop.step_reader._arrived) <= 1
        optimizer.step()
        assert monitor.history["live_fraction"][1].tolist() == [1.0]
