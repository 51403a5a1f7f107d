"""Remedies that are switched on and taken back: what each changes, and that undoing leaves nothing."""

from __future__ import annotations

import copy
import io
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nfi_monitor import remedies
from nfi_monitor.remedies.steps import hooks_on
from tests.runs import batch, differences, mlp, snapshot, train


def adam(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), **{"lr": 1e-2, "betas": (0.9, 0.95), **options})


APPLY = {
    "project_zero_sum": lambda model, optimizer: remedies.project_zero_sum(model[-1]),
    "raise_epsilon": lambda model, optimizer: remedies.raise_epsilon(optimizer, 1e-2),
    "cool_down": lambda model, optimizer: remedies.cool_down(optimizer, 0.1, 1000),
    "center_classifier": lambda model, optimizer: remedies.experimental.center_classifier(model, optimizer),
    "center_features": lambda model, optimizer: remedies.experimental.center_features(model[-1]),
    "clip_update_rms": lambda model, optimizer: remedies.experimental.clip_update_rms(optimizer, 0.1),
    "orthogonal_gradients": lambda model, optimizer: remedies.experimental.orthogonal_gradients(optimizer),
}
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


# --- centring -----------------------------------------------------------------------------------------


def test_a_centred_classifier_gives_the_same_differences_and_no_common_part() -> None:
    model = mlp()
    optimizer = adam(model)
    train(model, optimizer, 5)
    inputs, _ = batch()
    before = model(inputs).detach()
    handle = remedies.experimental.center_classifier(model, optimizer)
    after = model(inputs).detach()
    torch.testing.assert_close(after, before - before.mean(-1, keepdim=True), rtol=1e-4, atol=1e-5)
    train(model, optimizer, 5)
    head = model[-1]
    for tensor in (head.weight, head.bias, optimizer.state[head.weight]["exp_avg"]):
        assert float(tensor.detach().mean(0).abs().max()) < 1e-6 * float(tensor.detach().abs().max())
    handle.undo()
    train(model, optimizer, 5)
    assert float(head.weight.detach().mean(0).abs().max()) > 0


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.lm_head = nn.Linear(4, 7, bias=False)
        self.lm_head.weight = self.embed.weight


def test_centring_says_why_it_refuses() -> None:
    tied = Tied()
    with pytest.raises(ValueError, match="shares its weight with an input embedding"):
        remedies.experimental.center_classifier(tied, adam(tied))
    one = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
    with pytest.raises(ValueError, match="one output"):
        remedies.experimental.center_classifier(one, adam(one))
    normed = nn.Sequential(nn.Linear(3, 3), nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)))
    with pytest.raises(ValueError, match="no weight matrix of its own"):
        remedies.experimental.center_classifier(normed, adam(normed))


def test_centred_features_have_no_mean_in_training_and_the_running_one_is_taken_off_in_evaluation() -> None:
    model = nn.Sequential(nn.Linear(12, 5), nn.Linear(5, 7))
    seen: list[Tensor] = []
    inputs, _ = batch()
    handle = remedies.experimental.center_features(model[1], momentum=1.0)
    model[1].register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    features = model[0](inputs).detach()
    model(inputs)
    torch.testing.assert_close(seen[-1].mean(0), torch.zeros(5), atol=1e-6, rtol=0)
    model.eval()
    model(inputs[:1])
    torch.testing.assert_close(seen[-1], features[:1] - features.mean(0))
    assert any("_nfi_centered_features" in name for name in model.state_dict())
    expected = model(inputs).detach()
    handle.undo()
    torch.testing.assert_close(model(inputs), expected, rtol=1e-4, atol=1e-5)
    assert not any("_nfi" in name for name in model.state_dict())


def test_features_are_centred_once() -> None:
    head = nn.Linear(3, 4)
    handle = remedies.experimental.center_features(head)
    with pytest.raises(ValueError, match="centred already"):
        remedies.experimental.center_features(head)
    handle.undo()
    remedies.experimental.center_features(head).undo()


# --- the second moment ------------------------------------------------------------------------------------


def test_a_reset_optimizer_takes_the_steps_of_a_new_one_and_undo_brings_its_memory_back() -> None:
    model = mlp()
    optimizer = adam(model)
    train(model, optimizer, 5)
    remembered = copy.deepcopy(optimizer.state_dict())
    fresh = copy.deepcopy(model)
    handle = remedies.experimental.reset_second_moment(optimizer)
    handle.undo()
    assert differences(remembered, optimizer.state_dict()) == []
    remedies.experimental.reset_second_moment(optimizer)
    train(model, optimizer, 1)
    new = adam(fresh)
    train(fresh, new, 1)
    assert differences(snapshot(fresh, new)["model"], snapshot(model, optimizer)["model"]) == []


def test_only_the_parameters_asked_for_are_reset() -> None:
    model = mlp()
    optimizer = adam(model)
    train(model, optimizer, 3)
    remedies.experimental.reset_second_moment(optimizer, model[-1].parameters())
    assert float(optimizer.state[model[-1].weight]["exp_avg_sq"].abs().max()) == 0
    assert float(optimizer.state[model[0].weight]["exp_avg_sq"].abs().max()) > 0


def test_there_is_nothing_to_reset_before_the_first_step_or_in_sgd() -> None:
    model = mlp()
    for optimizer in (adam(model), torch.optim.SGD(model.parameters(), lr=0.1)):
        with pytest.raises(ValueError, match="no second moment to reset"):
            remedies.experimental.reset_second_moment(optimizer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_update_is_clipped_by_its_own_rms(dtype: torch.dtype) -> None:
    """Against StableAdamW written out: the tensor's learning rate over max(1, RMS_t)."""
    torch.manual_seed(0)
    parameter = nn.Parameter(torch.randn(5, dtype=dtype))
    reference = parameter.detach().clone()
    optimizer = torch.optim.AdamW([parameter], lr=0.1, betas=(0.9, 0.95), weight_decay=0.3)
    remedies.experimental.clip_update_rms(optimizer)
    first, second = torch.zeros_like(reference), torch.zeros_like(reference)
    clipped = 0
    for step in range(1, 9):
        grad = torch.randn(5, dtype=dtype) * (100.0 if step == 6 else 1.0)
        first, second = 0.9 * first + 0.1 * grad, 0.95 * second + 0.05 * grad**2
        root = (second / (1 - 0.95**step)).sqrt()
        rms = float((grad**2 / root**2).mean().sqrt())
        rate = 0.1 / max(1.0, rms)
        clipped += rms > 1
        reference = reference * (1 - rate * 0.3) - rate * (first / (1 - 0.9**step)) / (root + 1e-8)
        parameter.grad = grad
        optimizer.step()
        torch.testing.assert_close(parameter.detach(), reference, rtol=1e-4, atol=1e-6)
    assert clipped >= 1


def test_clipping_refuses_what_it_cannot_hold_against_anything() -> None:
    with pytest.raises(ValueError, match="SGD has no second moment"):
        remedies.experimental.clip_update_rms(torch.optim.SGD(mlp().parameters(), lr=0.1))
    with pytest.raises(ValueError, match="positive"):
        remedies.experimental.clip_update_rms(adam(mlp()), -1)


# --- Prieto et al., z-loss ----------------------------------------------------------------------------------


def test_orthogonal_gradients_are_orthogonal_and_as_long() -> None:
    parameter = nn.Parameter(torch.tensor([1.0, 2.0, 2.0]))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    remedies.experimental.orthogonal_gradients(optimizer)
    before, grad = parameter.detach().clone(), torch.tensor([3.0, 0.0, 4.0])
    parameter.grad = grad.clone()
    optimizer.step()
    moved = before - parameter.detach()
    assert abs(float(moved @ before)) < 1e-5
    assert float(moved.norm()) == pytest.approx(5.0)


def test_stablemax_is_its_definition_and_a_probability() -> None:
    logits = torch.tensor([[2.0, -3.0, 0.0], [100.0, 0.0, 0.0]], dtype=torch.float64)
    s = torch.where(logits >= 0, logits + 1, 1 / (1 - logits))
    expected = -(s[:, 0] / s.sum(-1)).log()
    found = remedies.experimental.stablemax_cross_entropy(logits, torch.tensor([0, 0]), reduction="none")
    torch.testing.assert_close(found, expected)
    ignored = remedies.experimental.stablemax_cross_entropy(logits, torch.tensor([0, -100]))
    torch.testing.assert_close(ignored, expected[0])
    with pytest.raises(ValueError, match="got 'avg'"):
        remedies.experimental.stablemax_cross_entropy(logits, torch.tensor([0, 0]), reduction="avg")


def test_the_gradient_of_a_z_loss_sums_to_twice_the_penalty_over_z() -> None:
    logits = torch.randn(1, 5, dtype=torch.float64, requires_grad=True)
    remedies.experimental.z_loss(logits, 0.1).backward()
    assert logits.grad is not None
    assert float(logits.grad.sum()) == pytest.approx(2 * 0.1 * float(logits.detach().logsumexp(-1)))


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
    assert float(remedies.float64_cross_entropy(logits, torch.tensor([0]))) == pytest.approx(math.exp(-30))
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
