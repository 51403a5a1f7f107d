from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from nfi_monitor import Monitor
from nfi_monitor.capture.head import find_head
from nfi_monitor.capture.host_transfer import HostTransfer
from nfi_monitor.capture.optimizer import OptimizerReader
from tests.runs import batch, mlp


@pytest.mark.parametrize(
    "options", [{}, {"foreach": True}, {"fused": True}, {"amsgrad": True}, {"capturable": False}]
)
def test_the_update_holds_what_the_step_really_did(options: dict[str, Any]) -> None:
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-7, **options)
    reader = OptimizerReader(optimizer, find_head(model))
    inputs, targets = batch()
    for step in range(1, 4):
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), targets).backward()
        weights = torch.cat([p.detach().reshape(-1).clone() for p in model.parameters()])
        start = reader.before(step)
        assert start is not None
        optimizer.step()
        update = reader.after(start, step)
        now = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
        states = [optimizer.state[p] for p in model.parameters()]
        assert torch.equal(update.before, weights) and torch.equal(update.after, now)
        assert torch.equal(update.grad, torch.cat([p.grad.reshape(-1) for p in model.parameters()]))
        divides = "max_exp_avg_sq" if options.get("amsgrad") else "exp_avg_sq"
        assert torch.equal(update.exp_avg_sq, torch.cat([s[divides].reshape(-1) for s in states]))
        assert update.correction == pytest.approx(1 - 0.999**step) and update.eps == 1e-7
        assert update.lr == 1e-2
        assert update.head_position == 4
        assert torch.equal(
            update.head_weight_update, update.after[-231:-7].reshape(7, 32) - weights[-231:-7].reshape(7, 32)
        )


def test_groups_with_their_own_constants_are_read_per_coordinate() -> None:
    model = mlp()
    optimizer = torch.optim.AdamW(
        [
            {"params": model[0].parameters(), "betas": (0.9, 0.9)},
            {"params": model[4].parameters(), "eps": 1e-3},
        ]
    )
    reader = OptimizerReader(optimizer, find_head(model))
    inputs, targets = batch()
    F.cross_entropy(model(inputs), targets).backward()
    optimizer.step()
    start = reader.before(2)
    assert start is not None
    optimizer.step()
    update = reader.after(start, 2)
    first = sum(p.numel() for p in model[0].parameters())
    assert isinstance(update.correction, torch.Tensor) and isinstance(update.eps, torch.Tensor)
    assert update.correction[0].item() == pytest.approx(1 - 0.9**2)
    assert update.correction[-1].item() == pytest.approx(1 - 0.999**2)
    assert update.eps[first - 1].item() == pytest.approx(1e-8) and update.eps[first].item() == pytest.approx(
        1e-3
    )
    assert reader.betas() == (0.9, 0.999)


def test_parameters_without_gradient_or_moment_are_left_out_and_odd_state_is_noted() -> None:
    model = mlp()
    embedding = nn.Embedding(4, 2, sparse=True)
    optimizer = torch.optim.SGD([*model.parameters(), *embedding.parameters()], 0.1)
    reader = OptimizerReader(optimizer, find_head(model))
    embedding(torch.tensor([1])).sum().backward()
    model[4].weight.grad = torch.ones_like(model[4].weight)
    start = reader.before(1)
    assert start is not None and len(start.params) == 1
    assert reader.unreadable == {"parameters with sparse gradients"}
    optimizer.step()
    assert reader.after(start, 1).exp_avg_sq is None


def test_parameter_groups_added_later_are_read() -> None:
    model = mlp()
    optimizer = torch.optim.AdamW(model[:4].parameters())
    reader = OptimizerReader(optimizer, find_head(model))
    inputs, targets = batch()
    sizes = []
    for step in range(1, 4):
        if step == 2:
            optimizer.add_param_group({"params": model[4].parameters()})
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), targets).backward()
        start = reader.before(step)
        optimizer.step()
        assert start is not None
        sizes.append(len(reader.after(start, step).grad))
    body, head = (sum(p.numel() for p in part.parameters()) for part in (model[:4], model[4]))
    assert sizes[0] == body and sizes[2] == body + head


def _move(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Move the last layer to the second group; the order of the parameters stays."""
    first, second = optimizer.param_groups
    moved, first["params"][:] = first["params"][4:], first["params"][:4]
    second["params"][:0] = moved


def _exchange(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    optimizer.param_groups[:] = [dict(group) for group in optimizer.param_groups]
    optimizer.param_groups[0] |= {"lr": 1e-4, "betas": (0.5, 0.8), "eps": 1e-4}


@pytest.mark.parametrize("change", [_move, _exchange])
@pytest.mark.parametrize("library", ["1", "0"])
def test_the_settings_are_those_of_the_group_that_holds_a_parameter_now(
    change: Any, library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NFI_MONITOR_NATIVE", library)
    values = []
    for attach_at in (1, 4):  # the second monitor never saw the groups as they were
        model = mlp()
        head = model[4]
        optimizer = torch.optim.Adam(
            [
                {"params": list(model.parameters()), "lr": 1e-2},
                {"params": [nn.Parameter(torch.zeros(1))], "lr": 1e-4, "betas": (0.5, 0.8), "eps": 1e-4},
            ]
        )
        inputs, targets = batch()
        for step in range(1, 7):
            if step == 4:
                change(optimizer, model)
            if step == attach_at:
                monitor = Monitor(model, optimizer, console=False, every=1)
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
        last = {name: monitor.history[name][1][-1] for name in monitor.history}
        assert last["learning_rate"] == 1e-4 and monitor.tau == pytest.approx(5)
        assert monitor._loop.reader.group_of(head.weight)["lr"] == 1e-4
        values.append([last["effective_learning_rate"], last["rms_t_max"], last["update_rms"]])
        monitor.close()
    assert values[0] == values[1]


def test_loading_an_optimizer_state_does_not_leave_the_old_moments_behind() -> None:
    """load_state_dict replaces the state tensors: cached views must not outlive them."""
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters())
    reader = OptimizerReader(optimizer, find_head(model))
    inputs, targets = batch()
    for step in range(1, 5):
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), targets).backward()
        start = reader.before(step)
        optimizer.step()
        if step == 3:
            optimizer.load_state_dict(optimizer.state_dict())
        assert start is not None
        update = reader.after(start, step)
        expected = torch.cat([optimizer.state[p]["exp_avg_sq"].reshape(-1) for p in model.parameters()])
        assert torch.equal(update.exp_avg_sq, expected), step


def test_the_outbox_keeps_the_order_of_what_was_put() -> None:
    outbox = HostTransfer()
    for label in range(3):
        outbox.put(label, torch.full((2,), float(label)))
    taken = [(label, numbers.tolist()) for label, numbers in outbox.take()]
    assert taken == [(0, [0.0, 0.0]), (1, [1.0, 1.0]), (2, [2.0, 2.0])]
    assert outbox.take(everything=True) == []


def test_gradients_made_inside_the_step_are_read_after_it() -> None:
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters())
    reader = OptimizerReader(optimizer, find_head(model))
    inputs, targets = batch()

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(inputs), targets)
        loss.backward()
        return loss

    for step in range(1, 3):
        start = reader.before(step, closure=True)
        assert start is not None
        optimizer.step(closure)
        update = reader.after(start, step)
        assert update is not None
        assert torch.equal(update.grad, torch.cat([p.grad.reshape(-1) for p in model.parameters()]))


def test_a_step_count_kept_in_the_group_corrects_the_bias() -> None:
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters())
    reader = OptimizerReader(optimizer, find_head(model))
    inputs, targets = batch()
    F.cross_entropy(model(inputs), targets).backward()
    optimizer.step()
    for state in optimizer.state.values():
        del state["step"]
    optimizer.param_groups[0]["step"] = 5
    start = reader.before(2)
    assert start is not None
    update = reader.after(start, 2)
    assert update is not None and update.correction == pytest.approx(1 - 0.999**5)


def test_parameters_without_a_second_moment_beside_others_with_one_are_said() -> None:
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters())
    reader = OptimizerReader(optimizer, find_head(model))
    inputs, targets = batch()
    F.cross_entropy(model(inputs), targets).backward()
    optimizer.step()
    del optimizer.state[model[0].weight]["exp_avg_sq"]
    start = reader.before(2)
    assert start is not None and len(start.params) == 6 and start.moments == 5
    update = reader.after(start, 2)
    assert update is not None and len(update.grad) == sum(p.numel() for p in model.parameters())
    others = [p for p in model.parameters() if p is not model[0].weight]
    expected = torch.cat([optimizer.state[p]["exp_avg_sq"].reshape(-1) for p in others])
    assert torch.equal(update.exp_avg_sq, expected)
    moved = update.with_moments()
    assert torch.equal(moved.grad, torch.cat([p.grad.reshape(-1) for p in others]))
    assert moved.head_position == 3 and moved.params == tuple(others)
    assert reader.moments_left_out() == [
        "the second moment of 1 of 6 tensors, which have none, while others do"
    ]


@pytest.mark.parametrize("kind", ["parameter", "moment"])
def test_what_is_moved_elsewhere_between_two_steps_frees_its_memory(kind: str) -> None:
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters())
    inputs, targets = batch()
    with Monitor(model, optimizer, console=False, every=1) as monitor:
        for _ in range(3):
            F.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
        moved = [p if kind == "parameter" else optimizer.state[p]["exp_avg_sq"] for p in model.parameters()]
        old = [StorageWeakRef(tensor.untyped_storage()) for tensor in moved]
        for tensor in moved:
            tensor.data = tensor.data.clone()
        assert all(storage.expired() for storage in old)
        F.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
        assert monitor.history["weight_norm"][0].tolist() == [1, 2, 3, 4]


def test_a_parameter_that_was_replaced_is_not_kept_in_memory() -> None:
    """Progressive growing and Gaussian splatting replace parameters again and again."""
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 5))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    replaced = []
    with Monitor(model, optimizer, console=False, every=1) as monitor:
        for step in range(20):
            if step % 3 == 2:
                old = model[0].weight
                new = nn.Parameter(old.detach().clone())
                optimizer.state[new] = optimizer.state.pop(old)
                optimizer.param_groups[0]["params"][0] = model[0].weight = new
                replaced.append(weakref.ref(old))
                del old, new
            optimizer.zero_grad()
            loss = F.cross_entropy(model(torch.randn(32, 8)), torch.randint(5, (32,)))
            loss.backward()
            optimizer.step()
            del loss
    assert [param() for param in replaced] == [None] * 6
    assert monitor.history["gradient_norm"][0].tolist() == [*range(1, 21)]
