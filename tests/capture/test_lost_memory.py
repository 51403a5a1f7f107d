"""What a training frees, overwrites or makes sparse before the step costs that alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nfi_monitor import Monitor
from nfi_monitor.capture.sampling import ROW_ELEMENTS
from tests.runs import differences, snapshot

pytestmark = pytest.mark.usefixtures("both_ways")
SMALL, LARGE = 32, ROW_ELEMENTS // 16 + 1  # rows of 16 features, copied or not


def freed(features: Tensor) -> None:
    features.untyped_storage().resize_(0)


def cut(features: Tensor) -> None:
    features.untyped_storage().resize_(64)


def refilled(features: Tensor) -> None:
    features.fill_(7.0)


def trained(rows: int, lose: Any, *, watch: bool = True) -> tuple[Any, Any, list[float]]:
    """Train three steps; ``lose`` gets the head's features after each backward pass. Returns true ‖μ_G‖."""
    torch.manual_seed(0)
    body, head = nn.Linear(8, 16), nn.Linear(16, 2)
    model = nn.Sequential(body, nn.ReLU(), head)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    monitor = Monitor(model, optimizer, console=False, every=1) if watch else None
    expected = []
    for _ in range(3):
        x, y = torch.randn(rows, 8), torch.randint(2, (rows,))
        optimizer.zero_grad()
        features = model[1](model[0](x))
        F.cross_entropy(model[2](features), y).backward()
        expected.append(float(features.detach().double().mean(0).norm()))
        with torch.no_grad():
            lose(features)
        optimizer.step()
    return monitor, snapshot(model, optimizer), expected


@pytest.mark.parametrize("lose", [freed, cut, refilled])
@pytest.mark.parametrize("rows", [SMALL, LARGE])
def test_features_are_those_of_the_forward_pass_or_are_left_out(rows: int, lose: Any) -> None:
    monitor, state, expected = trained(rows, lose)
    _, found = monitor.history["feature_mean_norm"]
    notes = [note.message for note in monitor.notes]
    if rows == SMALL:
        assert found == pytest.approx(expected, rel=1e-5) and notes == []
    else:
        assert len(found) == 0
        assert len(notes) == 1 and "features that are freed or written to" in notes[0]
    for name in ("gradient_norm", "rms_t_max", "head_loss", "zero_sum_violation"):
        assert len(monitor.history[name][0]) == 3, name
    assert differences(state, trained(rows, lose, watch=False)[1]) == []
    monitor.close()


def test_large_features_that_stay_are_read() -> None:
    monitor, _, expected = trained(LARGE, lambda features: None)
    assert monitor.history["feature_mean_norm"][1] == pytest.approx(expected, rel=1e-4)
    assert monitor.notes == []
    monitor.close()


def test_a_buffer_that_is_filled_for_each_micro_batch_is_read_each_time() -> None:
    """A linear probe: its features are the input, which no layer makes anew."""
    torch.manual_seed(0)
    model, buffer = nn.Linear(8, 5), torch.empty(32, 8)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    with Monitor(model, optimizer, console=False, every=1) as monitor:
        for _ in range(3):
            optimizer.zero_grad()
            true = torch.zeros(8)
            for shift in (10.0, 0.0):
                buffer.copy_(torch.randn(32, 8) + shift)
                true += buffer.mean(0) / 2
                (F.cross_entropy(model(buffer), torch.randint(5, (32,))) / 2).backward()
            buffer.zero_()
            optimizer.step()
            assert monitor.history["feature_mean_norm"][1][-1] == pytest.approx(float(true.norm()), rel=1e-5)


def small_run(optimizer_of: Any, steps: int, between: Any = lambda model, step: None) -> tuple[Any, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 5))
    optimizer = optimizer_of(model)
    monitor = Monitor(model, optimizer, console=False, every=1)
    for step in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(torch.randn(32, 8)), torch.randint(5, (32,))).backward()
        between(model, step)
        optimizer.step()
    return monitor, model


def offloading(model: nn.Module, until: int) -> torch.optim.Optimizer:
    """Free the moments after each of the first steps, and fill them again before the next."""
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    kept: dict[Tensor, Tensor] = {}
    taken = [0]

    def fill(*given: Any) -> None:
        for param, values in kept.items():
            moment = optimizer.state[param]["exp_avg_sq"]
            moment.untyped_storage().resize_(values.numel() * 4)
            moment.copy_(values)
        kept.clear()

    def free(*given: Any) -> None:
        taken[0] += 1
        for param, state in optimizer.state.items():
            if taken[0] <= until:
                kept[param] = state["exp_avg_sq"].clone()
                state["exp_avg_sq"].untyped_storage().resize_(0)

    optimizer.register_step_pre_hook(fill)
    optimizer.register_step_post_hook(free)
    return optimizer


def test_moments_that_are_freed_after_each_step_cost_nothing_else() -> None:
    monitor, _ = small_run(lambda model: offloading(model, until=99), 12)
    for name in ("gradient_norm", "weight_norm", "update_rms", "gradient_alignment", "head_loss"):
        assert len(monitor.history[name][0]) >= 11, name
    assert "rms_t_max" not in monitor.history
    assert [note.code for note in monitor.notes] == ["no_second_moment"]
    assert "a hook has freed it" in monitor.notes[0].message
    monitor.close()


def test_moments_that_are_freed_for_some_steps_are_read_afterwards() -> None:
    monitor, _ = small_run(lambda model: offloading(model, until=3), 12)
    assert monitor.history["rms_t_max"][0].tolist() == [*range(4, 13)]
    assert len(monitor.history["gradient_norm"][0]) == 12
    assert not [note for note in monitor.notes if note.code.startswith("failed")]
    monitor.close()


@pytest.mark.parametrize("first", [0, 5])
@pytest.mark.parametrize("names", [("weight",), ("weight", "bias"), ("bias",)])
def test_a_sparse_gradient_at_the_head_leaves_the_rest_measured(first: int, names: tuple[str, ...]) -> None:
    def between(model: Any, step: int) -> None:
        for name in names if step >= first else ():
            param = getattr(model[2], name)
            param.grad = param.grad.to_sparse()

    monitor, model = small_run(lambda model: torch.optim.SGD(model.parameters(), 1e-2), 10, between)
    dense = [param for param in model.parameters() if param.grad.layout is torch.strided]
    for name in ("gradient_norm", "weight_norm", "update_rms", "head_loss"):
        assert len(monitor.history[name][0]) == 10, name
    norm = float(torch.cat([param.grad.flatten() for param in dense]).norm())
    assert monitor.history["gradient_norm"][1][-1] == pytest.approx(norm, rel=1e-5)
    assert {note.code for note in monitor.notes} == {"no_second_moment", "state_unreadable"}
    monitor.close()


def test_an_input_buffer_may_be_filled_with_the_next_micro_batch() -> None:
    torch.manual_seed(0)
    head, buffer, norms = nn.Linear(16, 5), torch.empty(32, 16), []
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3)
    with Monitor(head, optimizer, head=head, console=False, every=1) as monitor:
        for _ in range(6):
            optimizer.zero_grad()
            means = []
            for scale in (1.0, 30.0):
                buffer.copy_(scale * torch.randn(32, 16))
                means.append(buffer.mean(0))
                F.cross_entropy(head(buffer), torch.randint(5, (32,))).backward()
            norms.append(float(torch.stack(means).mean(0).norm()))
            optimizer.step()
    assert monitor.history["feature_mean_norm"][1].tolist() == pytest.approx(norms, rel=1e-5)
    assert not monitor.notes
