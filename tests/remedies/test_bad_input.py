"""Remedies where they do not fit: refused with the reason, or shown to work after all."""

from __future__ import annotations

import itertools
import math
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from nfi_monitor import Autopilot, Monitor, remedies
from nfi_monitor.errors import HeadNotFoundError
from nfi_monitor.remedies.steps import around_steps, hooks_on
from tests.forked import Forked
from tests.remedies import ranks
from tests.runs import batch, differences, mlp, snapshot, train

ROOT = Path(__file__).resolve().parents[2]
Apply = Callable[[nn.Sequential, Optimizer], remedies.Handle]
REVERSIBLE: dict[str, Apply] = {
    "project_zero_sum": lambda model, optimizer: remedies.project_zero_sum(model[-1]),
    "raise_epsilon": lambda model, optimizer: remedies.raise_epsilon(optimizer, 1e-2),
    "cool_down": lambda model, optimizer: remedies.cool_down(optimizer, 0.1, 100),
    "clip_update_rms": lambda model, optimizer: remedies.experimental.clip_update_rms(optimizer, 0.1),
    "orthogonal_gradients": lambda model, optimizer: remedies.experimental.orthogonal_gradients(optimizer),
    "reset_second_moment": lambda model, optimizer: remedies.experimental.reset_second_moment(optimizer),
}


def adamw(model: nn.Module, **options: Any) -> Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95), **options)


# --- heads --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("remedy", [remedies.project_zero_sum, remedies.experimental.center_features])
def test_a_convolution_has_its_classes_where_no_remedy_at_the_head_looks(remedy: Any) -> None:
    with pytest.raises(ValueError, match=r"last axis, got Conv2d\. Use zero_sum_cross_entropy, which takes"):
        remedy(nn.Conv2d(3, 4, 1))
    with pytest.raises(TypeError, match=r"needs the head, a torch\.nn\.Module, got Parameter"):
        remedy(nn.Linear(3, 4).weight)


def test_without_a_linear_head_centring_says_what_there_is() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten())
    with pytest.raises(HeadNotFoundError, match="found no linear layer"):
        remedies.experimental.center_classifier(model, adamw(model))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.lm_head = nn.Linear(4, 7, bias=False)
        self.lm_head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.lm_head(self.embed(tokens))


def test_tied_embeddings_keep_everything_but_the_centring_of_the_classifier() -> None:
    """A projected gradient sums to zero over the classes at the logits, whatever else the weight is."""
    model, tokens = Tied(), torch.arange(7)
    with torch.no_grad():
        model.embed.weight.copy_(30 * F.one_hot(torch.arange(7) % 4, 4))  # margins at which rows absorb
    seen: list[Tensor] = []

    def watch(module: nn.Module, args: Any, output: Tensor) -> None:
        output.register_hook(lambda grad: seen.append(grad.sum(-1).abs().max()))

    with remedies.project_zero_sum(model.lm_head), remedies.experimental.center_features(model.lm_head):
        model.lm_head.register_forward_hook(watch)
        F.cross_entropy(model(tokens), tokens).backward()
    assert seen and float(seen[0]) < 1e-7
    before = model.embed.weight.detach().clone()
    with pytest.raises(ValueError, match="Untie them, or use z_loss"):
        remedies.experimental.center_classifier(model, adamw(model))
    assert torch.equal(model.embed.weight, before), "refused before anything moved"


# --- optimizers ----------------------------------------------------------------------------------------


def test_an_optimizer_without_what_a_remedy_changes_is_refused_and_left_alone() -> None:
    model = mlp()
    for optimizer in (torch.optim.SGD(model.parameters(), 0.1), torch.optim.Rprop(model.parameters())):
        train(model, optimizer, 2)
        state = optimizer.state_dict()
        for refused, message in (
            (lambda optimizer: remedies.raise_epsilon(optimizer), "has no eps to raise"),
            (
                lambda optimizer: remedies.experimental.reset_second_moment(optimizer),
                "has no second moment to reset",
            ),
            (
                lambda optimizer: remedies.experimental.clip_update_rms(optimizer),
                "has no second moment to compare",
            ),
        ):
            with pytest.raises(ValueError, match=message):
                refused(optimizer)
        assert differences(state, optimizer.state_dict()) == [] and hooks_on(optimizer) == 0
    with pytest.raises(TypeError, match=r"got Linear"):
        remedies.cool_down(nn.Linear(2, 2))


def test_centring_needs_no_momentum() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    remedies.experimental.center_classifier(model, optimizer)
    train(model, optimizer, 4)
    assert float(model[-1].weight.detach().mean(0).abs().max()) < 1e-6


# --- twice, and undone in any order --------------------------------------------------------------------


@pytest.mark.parametrize("name", ["project_zero_sum", "raise_epsilon", "cool_down", "orthogonal_gradients"])
def test_applied_twice_is_applied_once(name: str) -> None:
    results = []
    for times in (1, 2):
        model = mlp()
        optimizer = adamw(model)
        for _ in range(times):
            REVERSIBLE[name](model, optimizer)
        train(model, optimizer, 5)
        results.append([parameter.detach() for parameter in model.parameters()])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


def test_what_would_act_twice_is_refused_until_it_is_undone() -> None:
    model = mlp()
    optimizer = adamw(model)
    handle = remedies.experimental.clip_update_rms(optimizer)
    with pytest.raises(ValueError, match="AdamW are clipped already: undo that first"):
        remedies.experimental.clip_update_rms(optimizer)
    handle.undo()
    remedies.experimental.clip_update_rms(optimizer).undo()


def test_undone_in_any_order_they_leave_the_training_as_it_was_to_the_last_bit() -> None:
    orders = list(itertools.permutations(REVERSIBLE))[:: math.factorial(len(REVERSIBLE)) // 12]
    expected = None
    for order in (None, *orders):
        model = mlp()
        optimizer = adamw(model)
        train(model, optimizer, 3)
        if order is not None:
            handles = {name: apply(model, optimizer) for name, apply in REVERSIBLE.items()}
            for name in order:
                handles[name].undo()
            assert hooks_on(optimizer) == 0
        train(model, optimizer, 3)
        expected = expected or snapshot(model, optimizer)
        assert differences(snapshot(model, optimizer), expected) == [], order


# --- inside a step ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_remedy_may_end_or_begin_inside_a_step_whatever_hooks_there_are(when: str) -> None:
    """torch raises "OrderedDict mutated during iteration" where a hook removes itself before another one."""
    model = mlp()
    optimizer = adamw(model)
    called: list[str] = []
    remedies.cool_down(optimizer, 0.5, steps=2, ramp=0)  # takes itself off inside the second step
    optimizer.register_step_post_hook(lambda optimizer, args, kwargs: called.append("another's"))
    begun: list[remedies.Handle] = []

    def begin(optimizer: Optimizer) -> None:
        if not begun:
            begun.append(remedies.experimental.clip_update_rms(optimizer))

    take_off = around_steps(optimizer, **{when: begin})
    train(model, optimizer, 4)
    assert called == ["another's"] * 4 and begun
    take_off()
    begun[0].undo()
    assert hooks_on(optimizer) == 0


def test_what_was_changed_last_is_put_back_first() -> None:
    optimizer, order = adamw(mlp()), []
    for name in "ab":
        around_steps(
            optimizer,
            lambda optimizer, name=name: order.append(f"{name} before"),  # type: ignore[misc]
            lambda optimizer, name=name: order.append(f"{name} after"),  # type: ignore[misc]
        )
    optimizer.step()
    assert order == ["a before", "b before", "b after", "a after"]


# --- under a gradient scaler -----------------------------------------------------------------------------


def scaled(apply: Apply | None, scale: float, fused: bool, bad: int | None = None) -> list[Tensor]:
    """Eight steps under a gradient scaler of a power of two; step ``bad`` overflows and is skipped."""
    torch.manual_seed(0)
    model = mlp()
    optimizer = adamw(model, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=10_000)
    inputs, targets = batch()
    for step in range(8):
        if step == 3 and apply is not None:
            apply(model, optimizer)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(inputs), targets)
        scaler.scale(loss * (float("inf") if step == bad else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
    return [parameter.detach() for parameter in model.parameters()]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", REVERSIBLE)
def test_under_a_gradient_scaler_a_remedy_is_what_it_is_without(name: str, fused: bool) -> None:
    if name == "orthogonal_gradients" and fused:
        with pytest.raises(RuntimeError, match=r"needs scaler\.unscale_\(optimizer\) before step"):
            scaled(REVERSIBLE[name], 1024.0, fused)
        return
    one, thousand = (scaled(REVERSIBLE[name], scale, fused) for scale in (1.0, 1024.0))
    torch.testing.assert_close(one, thousand, rtol=1e-5, atol=1e-7)
    nothing = scaled(None, 1024.0, fused)
    changed = any(not torch.equal(a, b) for a, b in zip(nothing, thousand, strict=True))
    assert changed or name == "project_zero_sum", "a healthy gradient sums to zero already"


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", ["cool_down", "clip_update_rms"])
def test_a_step_that_the_scaler_skips_moves_no_weight(name: str, fused: bool) -> None:
    for parameter in scaled(REVERSIBLE[name], 1024.0, fused, bad=5):
        assert torch.isfinite(parameter).all()


# --- in two processes --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[tuple[str, str], Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    Forked(lambda: sys.exit(ranks.main(folder)), ROOT, {}).printed()
    return [pickle.loads((folder / str(rank)).read_bytes()) for rank in range(ranks.WORLD)]


@pytest.mark.parametrize("wrapper", ["DDP", "FSDP2"])
@pytest.mark.parametrize("remedy", ranks.REMEDIES)
def test_two_processes_under_a_remedy_are_one_process_under_it(
    results: list[dict[tuple[str, str], Any]], wrapper: str, remedy: str
) -> None:
    first, second = (result[wrapper, remedy] for result in results)
    if (wrapper, remedy) == ("FSDP2", "center_classifier"):
        for refused in (first, second):
            assert refused == "The head '2' is sharded over ranks: no rank knows the mean of its classes."
        return
    assert isinstance(first, list), first
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    alone = ranks.train("one process", remedy, slice(None))
    torch.testing.assert_close(first, alone, rtol=1e-4, atol=1e-6)
    if remedy not in ("nothing", "project_zero_sum"):
        plain = results[0][wrapper, "nothing"]
        assert any(not torch.allclose(a, b, rtol=1e-4) for a, b in zip(first, plain, strict=True))


# --- the Autopilot on what is not meant for it -------------------------------------------------------------


def test_an_autopilot_on_a_one_column_head_and_plain_sgd_watches_and_does_nothing() -> None:
    model, pilot = mlp(classes=1), Autopilot()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    inputs, targets = batch()
    with Monitor(model, optimizer, console=False, on_alert=pilot) as monitor:
        for _ in range(30):
            optimizer.zero_grad()
            F.relu(1 - (2.0 * (targets % 2) - 1) * model(inputs).squeeze(1)).mean().backward()
            optimizer.step()
    assert pilot.actions == []
    assert [note for note in monitor.notes if note.code.startswith("failed")] == []
