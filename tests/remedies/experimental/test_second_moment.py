"""A reset optimizer is a new one, until its memory is brought back."""

from __future__ import annotations

import copy

import pytest
import torch

from nfi_monitor.remedies import experimental
from tests.remedies.training import adam
from tests.runs import differences, mlp, snapshot, train


def test_a_reset_optimizer_takes_the_steps_of_a_new_one_and_undo_brings_its_memory_back() -> None:
    model = mlp()
    optimizer = adam(model)
    train(model, optimizer, 5)
    remembered = copy.deepcopy(optimizer.state_dict())
    fresh = copy.deepcopy(model)
    handle = experimental.reset_second_moment(optimizer)
    handle.undo()
    assert differences(remembered, optimizer.state_dict()) == []
    experimental.reset_second_moment(optimizer)
    train(model, optimizer, 1)
    new = adam(fresh)
    train(fresh, new, 1)
    assert differences(snapshot(fresh, new)["model"], snapshot(model, optimizer)["model"]) == []


def test_only_the_parameters_asked_for_are_reset() -> None:
    model = mlp()
    optimizer = adam(model)
    train(model, optimizer, 3)
    experimental.reset_second_moment(optimizer, model[-1].parameters())
    assert float(optimizer.state[model[-1].weight]["exp_avg_sq"].abs().max()) == 0
    assert float(optimizer.state[model[0].weight]["exp_avg_sq"].abs().max()) > 0


def test_there_is_nothing_to_reset_before_the_first_step_or_in_sgd() -> None:
    model = mlp()
    for optimizer in (adam(model), torch.optim.SGD(model.parameters(), lr=0.1)):
        with pytest.raises(ValueError, match="no second moment to reset"):
            experimental.reset_second_moment(optimizer)
