"""Each arm changes what it says and nothing else; an old name still works."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nfi_monitor import (
    Snapshot,
)  # fmt: skip
from nfi_monitor.replay.run import (
    FLOAT64_LOSS,
    SECOND_MOMENT_HELD,
    SECOND_MOMENT_RESET,
    SMALLER_LR,
    ZERO_SUM,
    ArmContext,
    combined,
    larger_eps,
    smaller_lr,
)
from tests.replay.scene import Run
from tests.runs import batch, mlp


def context_of(model: nn.Module, head: Any = None, **options: Any) -> ArmContext:
    from nfi_monitor.capture.head import find_head

    optimizer = torch.optim.Adam(model.parameters(), **options)
    taken = Snapshot.take(0, model, optimizer)
    return ArmContext(model, optimizer, None if head is False else find_head(model, head), taken, 10)


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cross_entropy": F.cross_entropy,
    "module": lambda z, y: nn.CrossEntropyLoss(weight=torch.rand(7), label_smoothing=0.1)(z, y),
    "huggingface": lambda z, y: F.cross_entropy(z.float().view(-1, 7), y),
    "to_dtype": lambda z, y: F.cross_entropy(z.to(torch.float32), y),
    "to_device_and_dtype": lambda z, y: F.cross_entropy(z.to("cpu", torch.float32, non_blocking=True), y),
    "to_other": lambda z, y: F.cross_entropy(z.to(torch.zeros(1)), y),
    "type": lambda z, y: F.cross_entropy(z.type(torch.float32), y),
    "log_softmax": lambda z, y: F.nll_loss(F.log_softmax(z, -1, dtype=torch.float32), y),
    "by_hand": lambda z, y: (torch.logsumexp(z.float(), -1) - z.float()[range(24), y]).mean(),
    "soft": lambda z, y: F.cross_entropy(z, torch.full((24, 7), 1 / 7)),
    "kl": lambda z, y: F.kl_div(z.float().log_softmax(-1), torch.full((24, 7), 1 / 7), reduction="batchmean"),
    "bce": lambda z, y: F.binary_cross_entropy_with_logits(z.float(), F.one_hot(y, 7).float()),
}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_the_float64_arm_reaches_the_loss_however_it_is_written(name: str, autocast: bool) -> None:
    model = mlp()
    inputs, targets = batch()
    context = context_of(model)
    with FLOAT64_LOSS.change(context):
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = LOSSES[name](model(inputs), targets)
            assert loss.dtype is torch.float64
            loss.backward()
    assert context.applied and all(
        p.grad is not None and p.grad.dtype is torch.float32 for p in model.parameters()
    )
    assert LOSSES[name](model(inputs), targets).dtype is torch.float32, "nothing of the arm is left"


def test_the_float64_arm_gives_the_gradient_of_a_float64_loss() -> None:
    model = mlp()
    inputs, targets = batch()
    F.cross_entropy(model(inputs).double(), targets).backward()
    expected = [p.grad.clone() for p in model.parameters()]
    for head in (None, False):
        model.zero_grad()
        with FLOAT64_LOSS.change(context_of(model, head)):
            F.cross_entropy(model(inputs), targets).backward()
        assert all(torch.equal(p.grad, e) for p, e in zip(model.parameters(), expected, strict=True))


def test_outside_the_loss_the_float64_arm_leaves_casts_alone() -> None:
    model = mlp()
    inputs, targets = batch()
    with FLOAT64_LOSS.change(context_of(model)):
        assert inputs.double().float().dtype is torch.float32  # before the head
        F.cross_entropy(model(inputs), targets).backward()
        assert inputs.double().float().dtype is torch.float32  # after the backward pass
        with torch.no_grad():
            model(inputs)  # an evaluation
        assert inputs.double().to(torch.float32).dtype is torch.float32


@pytest.mark.parametrize("head", [None, False])
def test_the_zero_sum_arm_makes_the_head_rows_sum_to_zero(head: Any) -> None:
    model = mlp()
    inputs, targets = batch()

    def column_sums() -> float:
        model.zero_grad()
        logits = model(inputs)
        (F.cross_entropy(logits, targets) + (logits.sum() if head is None else 0)).backward()
        return model[4].weight.grad.sum(0).abs().max().item()

    if head is None:  # a gradient that breaks the sum outright
        assert column_sums() > 1
    context = context_of(model, head)
    with ZERO_SUM.change(context):
        assert column_sums() < 1e-5
    assert context.applied


def test_the_second_moment_is_given_back_what_it_forgot_and_falls_in_no_coordinate() -> None:
    run = Run()
    run.go(10)
    taken = replace(run.take(), second_moment_decay=-0.5)
    context = ArmContext(run.model, run.optimizer, None, taken, 10)
    left = [state["exp_avg_sq"].clone() for state in run.optimizer.state.values()]
    with SECOND_MOMENT_HELD.change(context):
        floors = [state["exp_avg_sq"].clone() for state in run.optimizer.state.values()]
        for floor, had in zip(floors, left, strict=True):
            torch.testing.assert_close(floor, 10.0 * had)  # half a decade of its root
        assert "set to 10 times its value in the snapshot" in context.note
        for number in range(5):
            run.step(number)
            moments = [state["exp_avg_sq"].clone() for state in run.optimizer.state.values()]
            assert all((m >= f).all() for m, f in zip(moments, floors, strict=True))
            floors = moments
    for _ in range(30):
        run.step(0)
    moments = [state["exp_avg_sq"] for state in run.optimizer.state.values()]
    assert not all((m >= f).all() for m, f in zip(moments, floors, strict=True)), "without the arm it falls"


def test_what_is_held_early_in_a_run_is_the_moment_that_the_step_divides_by() -> None:
    """In the first steps v rises while v̂ = v/(1 − β2^t), by which Adam divides, falls."""
    run = Run(beta2=0.99)
    run.go(5)
    context = ArmContext(run.model, run.optimizer, None, run.take(), 10)

    def corrected() -> list[Tensor]:
        states = run.optimizer.state.values()
        return [state["exp_avg_sq"] / (1 - 0.99 ** float(state["step"])) for state in states]

    with SECOND_MOMENT_HELD.change(context):
        floors = corrected()
        for number in range(20):
            run.step(number)
            for moment, floor in zip(corrected(), floors, strict=True):
                assert (moment >= floor * (1 - 1e-5)).all()


def test_a_second_moment_forgotten_beyond_all_measure_gives_back_no_nan() -> None:
    run = Run()
    run.go(10)
    with torch.no_grad():
        for state in run.optimizer.state.values():
            state["exp_avg_sq"].flatten()[0] = 0.0
    taken = replace(run.take(), second_moment_decay=-40.0)
    with SECOND_MOMENT_HELD.change(ArmContext(run.model, run.optimizer, None, taken, 10)):
        moments = [state["exp_avg_sq"] for state in run.optimizer.state.values()]
        assert all(moment.isfinite().all() for moment in moments)


def test_a_smaller_rate_is_used_for_as_many_steps_as_asked_and_the_schedule_never_sees_it() -> None:
    run = Run()
    used: list[float] = []
    plain = Run()
    plain.go(6)
    context = ArmContext(run.model, run.optimizer, None, run.take(), 10)
    with smaller_lr(0.5, steps=2).change(context):
        run.optimizer.register_step_pre_hook(lambda opt, *_: used.append(opt.param_groups[0]["lr"]))
        before = []
        for step in range(1, 7):
            before.append(run.optimizer.param_groups[0]["lr"])
            run.step(step)
    assert used == [0.5 * before[0], 0.5 * before[1], *before[2:]]
    assert run.scheduler.get_last_lr() == plain.scheduler.get_last_lr()


def test_eps_and_a_fresh_optimizer_last_as_long_as_their_arms() -> None:
    run = Run()
    run.go(10)
    context = ArmContext(run.model, run.optimizer, None, run.take(), 10)
    group = run.optimizer.param_groups[0]
    before = {param: dict(state) for param, state in run.optimizer.state.items()}
    with larger_eps(1e-3).change(context):
        assert group["eps"] == 1e-3
    assert group["eps"] == 1e-8
    with SECOND_MOMENT_RESET.change(context):
        assert len(run.optimizer.state) == 0
        run.step(11)
        assert {float(state["step"]) for state in run.optimizer.state.values()} == {1.0}
    for param, state in run.optimizer.state.items():
        assert all(state[name] is before[param][name] for name in state)


def test_combined_arms_act_together_and_say_so() -> None:
    arm = combined(FLOAT64_LOSS, smaller_lr(0.5))
    assert (arm.name, arm.what) == (
        "float64_loss+smaller_lr", "the loss in float64, parameters as they are and learning rate × 0.5",
    )  # fmt: skip
    run = Run(spike_at=70)
    run.go(60)
    taken = run.take()
    run.go(75)
    verdict = run.replay(taken, [arm, SMALLER_LR])
    assert [o.applied for o in verdict.outcomes.values()] == [True, False, False], (
        "scripted losses never differ"
    )
    sgd = torch.optim.SGD(run.model.parameters(), lr=0.1)
    context = ArmContext(run.model, sgd, None, taken, 10)
    with combined(smaller_lr(), SECOND_MOMENT_HELD).change(context):
        pass
    assert not context.applied, "SGD has no second moment to hold"


@pytest.mark.filterwarnings("default::DeprecationWarning")
def test_the_old_name_of_an_arms_context_works_with_a_warning() -> None:
    import nfi_monitor.replay

    with pytest.warns(DeprecationWarning, match="ArmContext"):
        assert nfi_monitor.replay.Context is ArmContext
