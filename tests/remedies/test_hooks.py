"""Remedies that are switched on and taken back: what each changes, and that undoing leaves nothing."""

from __future__ import annotations

import copy
import inspect
import io
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nfi_monitor import remedies
from nfi_monitor.remedies.steps import hooks_on
from tests.remedies import ranks
from tests.remedies.training import adam
from tests.runs import differences, mlp, snapshot, train

APPLY = {
    "project_zero_sum": lambda model, optimizer: remedies.project_zero_sum(model[-1]),
    "raise_epsilon": lambda model, optimizer: remedies.raise_epsilon(optimizer, 1e-2),
    "cool_down": lambda model, optimizer: remedies.cool_down(optimizer, 0.1, 1000),
    "center_classifier": lambda model, optimizer: remedies.experimental.center_classifier(model, optimizer),
    "center_features": lambda model, optimizer: remedies.experimental.center_features(model[-1]),
    "clip_update_rms": lambda model, optimizer: remedies.experimental.clip_update_rms(optimizer, 0.1),
    "orthogonal_gradients": lambda model, optimizer: remedies.experimental.orthogonal_gradients(optimizer),
}
AT_ONCE = {"reset_second_moment"}  # changes the state once, and hooks nothing
OWN_ROWS = {"center_features"}  # centres the rows of its own rank: no process alone computes the same


def test_every_remedy_that_gives_a_handle_is_applied_here_and_on_several_ranks() -> None:
    public = {*remedies.__all__, *remedies.experimental.__all__}
    handles = {name for name in public if _gives_a_handle(name)}
    assert handles - AT_ONCE == set(APPLY), (
        "add it to APPLY (and, if it can be undone in any order, to REVERSIBLE)"
    )
    assert handles - OWN_ROWS <= set(ranks.REMEDIES), (
        "add it to REMEDIES in tests/remedies/ranks.py: there it meets DDP and FSDP2"
    )


def _gives_a_handle(name: str) -> bool:
    remedy = getattr(remedies, name) if name in remedies.__all__ else getattr(remedies.experimental, name)
    returned = getattr(remedy, "__annotations__", {}).get("return", "")
    return inspect.isfunction(remedy) and returned in ("Handle", "CoolDown")


ONE_TIME = {"center_classifier"}  # it centres at once, too


@pytest.mark.parametrize("name", APPLY)
def test_what_is_undone_at_once_has_changed_nothing(name: str) -> None:
    results = []
    for remedied in (False, True):
        model = mlp()
        optimizer = adam(model)
        train(model, optimizer, 5)
        if remedied and name not in ONE_TIME:
            handle = APPLY[name](model, optimizer)
            assert handle.active
            handle.undo()
            handle.undo()
            assert not handle.active and "undone" in repr(handle)
        train(model, optimizer, 5)
        results.append(snapshot(model, optimizer))
    assert differences(*results) == []


@pytest.mark.parametrize("name", APPLY)
def test_a_handle_answers_to_torchs_word_remove(name: str) -> None:
    model = mlp()
    handle = APPLY[name](model, adam(model))
    assert handle.active
    handle.remove()
    handle.remove()
    assert not handle.active


@pytest.mark.parametrize("name", APPLY)
def test_each_changes_the_training_while_it_is_on_and_ends_with_its_block(name: str) -> None:
    model, other = mlp(), mlp()
    optimizer, plain = adam(model), adam(other)
    with APPLY[name](model, optimizer) as handle:
        train(model, optimizer, 8)
    train(other, plain, 8)
    assert not handle.active
    rounding = name == "project_zero_sum"  # a healthy gradient sums to zero already
    changed = differences(snapshot(other, plain)["model"], snapshot(model, optimizer)["model"])
    assert changed or rounding


@pytest.mark.parametrize("name", APPLY)
def test_a_remedied_model_can_be_copied_and_saved(name: str) -> None:
    model = mlp()
    optimizer = adam(model)
    train(model, optimizer, 2)
    with APPLY[name](model, optimizer):
        train(model, optimizer, 2)
        copy.deepcopy(model)
        torch.save(model, io.BytesIO())
        copy.deepcopy(optimizer.state_dict())


# --- projection --------------------------------------------------------------------------------------------


def test_the_projected_gradient_sums_to_zero_where_rows_absorb() -> None:
    head, features = nn.Linear(3, 3), torch.eye(3)
    with torch.no_grad():
        head.weight.copy_(25 * features)  # margins of 25 nats

    def violation() -> float:
        head.zero_grad()
        logits = head(features)
        F.cross_entropy(logits, torch.arange(3)).backward()
        assert head.bias.grad is not None
        return float(head.bias.grad.sum().abs() / head.bias.grad.abs().sum())

    assert violation() > 0.5
    with remedies.project_zero_sum(head), remedies.project_zero_sum(head):
        assert violation() < 1e-6


def test_projection_wants_a_module() -> None:
    with pytest.raises(TypeError, match="needs the head"):
        remedies.project_zero_sum(torch.zeros(3))  # type: ignore[arg-type]


# --- epsilon ------------------------------------------------------------------------------------------------


def test_epsilons_are_undone_in_any_order_and_never_lowered() -> None:
    optimizer = adam(mlp(), eps=1e-7)
    low, high = remedies.raise_epsilon(optimizer, 1e-9), remedies.raise_epsilon(optimizer, 1e-5)
    middle = remedies.raise_epsilon(optimizer, 1e-6)
    assert optimizer.param_groups[0]["eps"] == 1e-5
    high.undo()
    assert optimizer.param_groups[0]["eps"] == 1e-6
    low.undo()
    middle.undo()
    assert optimizer.param_groups[0]["eps"] == 1e-7


def test_an_epsilon_that_somebody_sets_meanwhile_is_theirs() -> None:
    optimizer = adam(mlp())
    handle = remedies.raise_epsilon(optimizer, 1e-5)
    optimizer.param_groups[0]["eps"] = 1e-3
    handle.undo()
    assert optimizer.param_groups[0]["eps"] == 1e-3


def test_epsilon_refuses_what_has_none() -> None:
    with pytest.raises(ValueError, match="SGD has no eps"):
        remedies.raise_epsilon(torch.optim.SGD(mlp().parameters(), lr=0.1))
    with pytest.raises(ValueError, match="positive, got 0"):
        remedies.raise_epsilon(adam(mlp()), 0)


# --- cooling ------------------------------------------------------------------------------------------


def rates(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, steps: int) -> list[float]:
    """What plain SGD under a gradient of 1 moves by."""
    moved = []
    for _ in range(steps):
        parameter.grad = torch.ones_like(parameter)
        before = parameter.item()
        optimizer.step()
        moved.append(before - parameter.item())
    return moved


def sgd() -> tuple[torch.optim.Optimizer, nn.Parameter]:
    parameter = nn.Parameter(torch.zeros((), dtype=torch.float64))
    return torch.optim.SGD([parameter], lr=1.0), parameter


def test_the_rate_is_smaller_for_the_steps_and_comes_back_by_equal_factors() -> None:
    optimizer, parameter = sgd()
    remedies.cool_down(optimizer, 0.1, steps=3, ramp=3)
    moved = rates(optimizer, parameter, 8)
    expected = [0.1, 0.1, 0.1, 0.1**0.75, 0.1**0.5, 0.1**0.25, 1.0, 1.0]
    assert moved == pytest.approx(expected) and optimizer.param_groups[0]["lr"] == 1.0
    assert hooks_on(optimizer) == 0, "it has taken itself off"


def test_a_scheduler_does_not_notice() -> None:
    optimizer, parameter = sgd()
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    handle = remedies.cool_down(optimizer, 0.1, steps=100)
    seen = []
    for _ in range(3):
        rates(optimizer, parameter, 1)
        scheduler.step()
        seen.append(optimizer.param_groups[0]["lr"])
    handle.undo()
    assert seen == [0.5, 0.25, 0.125] and rates(optimizer, parameter, 1) == pytest.approx([0.125])


def test_of_several_the_smallest_factor_counts_and_they_end_in_any_order() -> None:
    optimizer, parameter = sgd()
    first, second = remedies.cool_down(optimizer, 0.5, 9), remedies.cool_down(optimizer, 0.1, 9)
    assert rates(optimizer, parameter, 1) == pytest.approx([0.1])
    second.undo()
    assert rates(optimizer, parameter, 1) == pytest.approx([0.5])
    first.undo()
    assert rates(optimizer, parameter, 1) == [1.0]


def test_a_step_that_raised_leaves_no_smaller_rate_behind() -> None:
    optimizer, parameter = sgd()
    handle = remedies.cool_down(optimizer, 0.1, steps=100)

    def broken() -> float:
        raise RuntimeError("in the closure")

    with pytest.raises(RuntimeError, match="in the closure"):
        optimizer.step(broken)
    assert rates(optimizer, parameter, 1) == pytest.approx([0.1])
    with pytest.raises(RuntimeError):
        optimizer.step(broken)
    handle.undo()
    assert optimizer.param_groups[0]["lr"] == 1.0


@pytest.mark.parametrize(("options", "message"), [
    ({"factor": 0.0}, "factor"), ({"factor": 2.0}, "factor"), ({"steps": 0}, "steps"), ({"ramp": -1}, "ramp"),
])  # fmt: skip
def test_cooling_refuses_what_is_no_cooling(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        remedies.cool_down(sgd()[0], **options)


# --- the head and its loss in one ---------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 4, None])
def test_blocks_of_rows_add_up_to_the_whole(reduction: str, bias: bool, rows: int | None) -> None:
    torch.manual_seed(0)
    shapes = [(3, 3, 5), (7, 5)] + ([(7,)] if bias else [])
    leaves = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    hidden, weight, shift = (*leaves, None)[:3]
    target = torch.tensor([[0, 1, -100], [2, 3, 4], [5, 6, 0]])
    class_weight = torch.rand(7, dtype=torch.float64) + 0.5
    whole = F.cross_entropy(
        F.linear(hidden, weight, shift).flatten(0, -2), target.flatten(), class_weight, reduction=reduction
    )
    blocks = remedies.linear_zero_sum_cross_entropy(
        hidden, weight, target, shift, class_weight, reduction=reduction, rows_at_a_time=rows
    )
    torch.testing.assert_close(blocks, whole)
    torch.testing.assert_close(
        torch.autograd.grad(2 * blocks, leaves), torch.autograd.grad(2 * whole, leaves)
    )


def test_no_tensor_of_the_logits_size_is_held() -> None:
    hidden, weight = torch.randn(512, 8, requires_grad=True), torch.randn(4096, 8, requires_grad=True)
    with torch.profiler.profile(profile_memory=True) as profile:
        remedies.linear_zero_sum_cross_entropy(
            hidden, weight, torch.zeros(512).long(), rows_at_a_time=16
        ).backward()
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert largest <= 2 * 16 * 4096 * 4 < 512 * 4096 * 4 / 4


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"hidden \(3, 5\), head_weight \(7, 4\)"):
        remedies.linear_zero_sum_cross_entropy(torch.zeros(3, 5), torch.zeros(7, 4), torch.zeros(3).long())
    with pytest.raises(ValueError, match="mean, sum, got 'none'"):
        remedies.linear_zero_sum_cross_entropy(
            torch.zeros(3, 5), torch.zeros(7, 5), torch.zeros(3).long(), reduction="none"
        )


# --- HuggingFace's form -------------------------------------------------------------------------------


class Outputs(dict[str, Tensor]):
    @property
    def logits(self) -> Tensor:
        return self["logits"]


def test_the_losses_for_huggingface_shift_and_divide_as_its_own() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 4, 6, dtype=torch.float64)
    labels = torch.tensor([[0, 1, 2, -100], [3, -100, 4, 5]])
    outputs = Outputs(logits=logits)
    flat = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    torch.testing.assert_close(remedies.causal_lm_loss(outputs, labels), flat / 4)
    torch.testing.assert_close(remedies.causal_lm_loss(outputs, labels, 10), flat / 10)
    torch.testing.assert_close(remedies.causal_lm_loss(outputs, labels, torch.tensor(10)), flat / 10)
    whole = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(remedies.classification_loss(outputs, labels), whole)


def test_the_float64_reference_absorbs_later_than_float32() -> None:
    logits = torch.tensor([[30.0, 0.0]], requires_grad=True)
    loss = remedies.float64_cross_entropy(logits, torch.tensor([0]))
    assert loss.item() == pytest.approx(math.exp(-30))
    assert float(F.cross_entropy(logits, torch.tensor([0]))) == 0.0


# --- errors of their own ------------------------------------------------------------------------------


def broken(*args: Any, **kwargs: Any) -> Any:
    raise ArithmeticError("broken on purpose")


def test_a_cool_down_that_fails_gives_the_rate_back_and_raises_or_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for told in (None, []):
        model = mlp()
        optimizer = adam(model)
        remedies.cool_down(optimizer, 0.1, 100, failed=None if told is None else told.append)
        train(model, optimizer, 2)
        with monkeypatch.context() as patch:
            patch.setattr("nfi_monitor.remedies.cooling._Cooling.now", broken)
            if told is None:
                with pytest.raises(ArithmeticError, match="on purpose"):
                    train(model, optimizer, 1)
            else:
                train(model, optimizer, 1)
                assert [str(error) for error in told] == ["broken on purpose"]
        rates: list[float] = []
        optimizer.register_step_pre_hook(
            lambda *_, rates=rates, of=optimizer: rates.append(of.param_groups[0]["lr"])
        )
        train(model, optimizer, 2)
        assert rates == [1e-2] * 2 and hooks_on(optimizer) == 0


def test_a_cool_down_that_fails_at_its_end_gives_the_rate_back_and_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = mlp()
    optimizer = adam(model)
    told: list[Exception] = []
    remedies.cool_down(optimizer, 0.1, 2, 0, failed=told.append)
    with monkeypatch.context() as patch:
        patch.setattr("nfi_monitor.remedies.cooling._Scaled._end", broken)
        train(model, optimizer, 2)
    assert [str(error) for error in told] == ["broken on purpose"]
    rates: list[float] = []
    optimizer.register_step_pre_hook(lambda *_: rates.append(optimizer.param_groups[0]["lr"]))
    train(model, optimizer, 2)
    assert rates == [1e-2] * 2


def test_of_several_cool_downs_that_fail_each_is_told_and_one_without_raises(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = mlp()
    optimizer = adam(model)
    told: list[Exception] = []
    remedies.cool_down(optimizer, 0.1, 9)
    remedies.cool_down(optimizer, 0.5, 9, failed=told.append)
    monkeypatch.setattr("nfi_monitor.remedies.cooling._Cooling.now", broken)
    with pytest.raises(ArithmeticError, match="on purpose"):
        train(model, optimizer, 1)
    assert len(told) == 1 and optimizer.param_groups[0]["lr"] == 1e-2


def test_a_projection_that_fails_leaves_the_gradient_and_raises_or_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: list[Exception] = []
    plain, loud, quiet = mlp(), mlp(), mlp()
    remedies.project_zero_sum(loud[-1])
    remedies.project_zero_sum(quiet[-1], failed=told.append)
    monkeypatch.setattr("nfi_monitor.remedies.projection.zero_sum", broken)
    with pytest.raises(ArithmeticError, match="on purpose"):
        train(loud, adam(loud), 1)
    for model in (plain, quiet):
        train(model, adam(model), 2)
    assert differences(plain.state_dict(), quiet.state_dict()) == []
    assert [str(error) for error in told] == ["broken on purpose"] * 2
    torch.save(copy.deepcopy(quiet), io.BytesIO())  # whoever is told stays behind
