"""Sparse parity: states around a slingshot, continuations and sampler, each against what is known."""

from __future__ import annotations

import io
import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from examples.reference import parity
from examples.reference.intervals import intervals
from examples.reference.local_learning import Sampler, reduced_rank, regular
from examples.reference.parity_after import HORIZON
from examples.reference.slingshot_log import EARLY, LOW, RING, Continuation, SlingshotLog, jump

CONFIG = {"loss": "hinge", "lr": 3e-2, "weight_decay": 0.01, "beta2": 0.999}
BLOW = 400
"""The step after which the weights of the recorded training are shrunk: its loss rises at once."""


def test_labels_are_the_parity_of_the_relevant_bits() -> None:
    bits, label = parity.parity(200, 12, 3, torch.Generator().manual_seed(0))
    expected = [int(row[0]) ^ int(row[1]) ^ int(row[2]) for row in bits.tolist()]
    assert label.tolist() == expected and set(bits.flatten().tolist()) == {0.0, 1.0}


def test_hinge_loss_and_gradient_are_exactly_zero_past_the_margin() -> None:
    output = torch.tensor([[1.5], [-1.0], [0.25], [-2.0]], requires_grad=True)
    label = torch.tensor([1, 0, 1, 1])
    loss = parity.hinge(output, label)
    loss.backward()
    assert float(loss.detach()) == (0 + 0 + 0.75 + 3.0) / 4
    assert output.grad is not None and output.grad.flatten().tolist() == [0, 0, -0.25, -0.25]


# --- the log, on a training whose loss spikes -------------------------------------------------------------


class Recorded:
    """A small training whose loss is made to spike; all losses and weights, beside what the log keeps."""

    def __init__(self, cut_at: int = 0) -> None:
        """``cut_at``: the step before which everything goes through a file."""
        torch.manual_seed(1)
        self.x, self.y = parity.parity(64, 12, 3, torch.Generator().manual_seed(1))
        self.model = parity.Net(12, 32, 1)
        self.optimizer = parity.make_optimizer(CONFIG, self.model)
        self.log = SlingshotLog(self.model, self.optimizer)
        self.losses: list[float] = []
        self.weights = [self.flat()]
        for number in range(1, BLOW + 200):
            if number == cut_at:
                self.resume()
            loss = self.loss(self.model)
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            if number == BLOW:
                with torch.no_grad():
                    for parameter in self.model.parameters():
                        parameter *= 0.3
            self.losses.append(float(loss.detach()))
            self.weights.append(self.flat())
            self.log.add(number, self.losses[-1])

    def resume(self) -> None:
        parts = (self.model, self.optimizer, self.log)
        file = io.BytesIO()
        torch.save([part.state_dict() for part in parts], file)
        file.seek(0)
        self.model = parity.Net(12, 32, 1)
        self.optimizer = parity.make_optimizer(CONFIG, self.model)
        self.log = SlingshotLog(self.model, self.optimizer)
        for part, state in zip((self.model, self.optimizer, self.log), torch.load(file), strict=True):
            part.load_state_dict(state)

    def loss(self, model: torch.nn.Module) -> torch.Tensor:
        return parity.loss_of(CONFIG, model(self.x), self.y)

    def flat(self) -> torch.Tensor:
        return flat(self.model)


def flat(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()]).clone()


@pytest.fixture(scope="module")
def recorded() -> Recorded:
    return Recorded()


def test_the_log_keeps_the_last_weights_below_the_level_and_the_first_back_below_it(
    recorded: Recorded,
) -> None:
    (item,) = recorded.log.kept
    losses = recorded.losses  # losses[i] is of weights[i]
    start = next(i for i, loss in enumerate(losses) if loss > 0.1 and min(losses[:i], default=1) < LOW)
    last = max(i for i in range(start) if losses[i] < LOW)
    back = next(i for i in range(start, len(losses)) if losses[i] < LOW)
    assert (item["start"], item["end"]) == (start + 1, back + 1)
    assert torch.equal(item["before"]["weights"], recorded.weights[last])
    assert torch.equal(item["after"]["weights"], recorded.weights[back])
    assert torch.equal(item["early"]["weights"], recorded.weights[last - EARLY])
    expected = torch.stack(recorded.weights[last - EARLY : start + 1]).diff(dim=0)
    assert torch.equal(item["updates"], expected[: len(item["updates"])]) and len(item["updates"]) > EARLY


def test_a_continuation_that_changes_nothing_repeats_the_run_bit_for_bit(recorded: Recorded) -> None:
    (item,) = recorded.log.kept
    on = Continuation(parity.Net(12, 32, 1), partial(parity.make_optimizer, CONFIG), recorded.loss)
    first = item["early"]["step"]
    again = on.train(on.begin(item["early"]), EARLY)
    assert again == recorded.losses[first : first + EARLY]
    assert torch.equal(flat(on.model), recorded.weights[first + EARLY])
    for reset in ("state", "count"):
        other = on.train(on.begin(item["early"], reset), EARLY)
        assert other[0] == again[0], "the reset acts at the first step, not before"
        # Not the losses: they may all be exactly 0, past the margin.
        assert not torch.equal(flat(on.model), recorded.weights[first + EARLY])


def test_a_training_that_is_cut_in_a_slingshot_gives_the_same_log(recorded: Recorded) -> None:
    (whole,) = recorded.log.kept
    (found,) = Recorded(cut_at=(whole["start"] + whole["end"]) // 2).log.kept
    assert whole["end"] - whole["start"] > 2
    assert (found["start"], found["end"]) == (whole["start"], whole["end"])
    for name in ("early", "before", "after"):
        for key, value in whole[name].items():
            assert torch.equal(torch.as_tensor(found[name][key]), torch.as_tensor(value)), (name, key)


@pytest.mark.parametrize("layers", [False, True])
def test_a_jump_is_as_long_as_the_slingshot(layers: bool) -> None:
    sizes, generator = [30, 5, 12], torch.Generator().manual_seed(0)
    start, size = torch.randn(47, generator=generator), torch.randn(47, generator=generator)
    moved = jump(start, size, sizes, layers, seed=1) - start
    assert float(moved.norm()) == pytest.approx(float(size.norm()), rel=1e-5)
    each = [float(part.norm()) for part in moved.split(sizes)]
    expected = [float(part.norm()) for part in size.split(sizes)]
    assert (each == pytest.approx(expected, rel=1e-5)) is layers
    assert not torch.equal(moved, jump(start, size, sizes, layers, seed=2) - start)


def test_horizon_outlasts_the_states_it_begins_with() -> None:
    assert HORIZON > RING > EARLY


# --- intervals ------------------------------------------------------------------------------------------


def test_intervals_compare_points_around_each_slingshot_with_stretches_that_touch_none() -> None:
    loss = np.full(400, 1e-3)
    loss[:50] = 1.0
    loss[200:212] = 0.5  # steps 201 to 212
    seen: list[tuple[int, int]] = []

    def change(a: int, b: int) -> float:
        seen.append((a, b))
        return float(b - a)

    found = intervals(loss, [(201, 213)], 10, change, seed=0)
    assert seen[0] == (20, 22), "the last point before step 201, the first from step 213 on"
    assert found["slingshot"] == [2.0] and found["quiet"] == [2.0] * 4
    for a, b in seen[1:]:
        assert b - a == 2 and a >= 6 and b <= 40 and (b < 20 or a > 22)


def test_a_slingshot_that_outlasts_the_run_is_left_out() -> None:
    found = intervals(np.full(100, 1e-3), [(95, 120)], 10, lambda a, b: 1.0, seed=0)
    assert found == {"slingshot": [], "quiet": []}


# --- the sampler ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "known"),
    [
        (regular(8, 500, 1), 4.0),
        (reduced_rank(4, 2, 0, 500, 1), 3.5),  # singular: half of its 16 weights would be 8
        (reduced_rank(4, 2, 2, 500, 1), 6.0),
    ],
)
def test_the_sampler_finds_coefficients_known_in_closed_form(model: Any, known: float) -> None:
    loss, best, closed = model
    assert closed == known
    found = Sampler(step=0.03, pull=1.0, draws=600, burn_in=300, chains=4).estimate(loss, best, 500, seed=2)
    assert found == pytest.approx(known, rel=0.25)


def test_a_strong_pull_hides_what_is_flat() -> None:
    loss, best, known = reduced_rank(4, 2, 0, 500, 1)
    found = Sampler(step=0.03, pull=300.0, draws=300, burn_in=100).estimate(loss, best, 500)
    assert found < 0.5 * known


def test_the_coefficient_outside_its_case_is_refused() -> None:
    with pytest.raises(ValueError, match="'case 1' only"):
        reduced_rank(2, 4, 1, 100, 0)


# --- the kick ----------------------------------------------------------------------------------------------


def test_torchs_kicks_after_a_silence_follow_the_formula(tmp_path: Path) -> None:
    kicks = parity.kick({"silence": 100_000, "aligned": 12}, 0, torch.device("cpu"), tmp_path)["kicks"]
    for beta2, sizes in kicks.items():
        b = float(beta2)
        expected = [(1 - 0.9**n) / math.sqrt(1 - b**n) for n in range(1, 13)]
        assert sizes == pytest.approx(expected, rel=1e-3)
    assert kicks["0.999"][0] == pytest.approx(math.sqrt(10), rel=1e-3)


def test_forgetting_the_count_keeps_the_moments() -> None:
    model = parity.Net(4, 3, 1)
    optimizer = parity.make_optimizer(CONFIG, model)
    F.mse_loss(model(torch.ones(2, 4)), torch.ones(2, 1)).backward()
    optimizer.step()
    moments = [state["exp_avg_sq"].clone() for state in optimizer.state.values()]
    parity.forget(optimizer, "count")
    assert [float(state["step"]) for state in optimizer.state.values()] == [0.0] * 4
    assert all(
        torch.equal(a, s["exp_avg_sq"]) for a, s in zip(moments, optimizer.state.values(), strict=True)
    )
    parity.forget(optimizer, "state")
    assert not optimizer.state
