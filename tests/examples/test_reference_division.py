"""Modular division: its rows, what each arm does to the loss, and the updates around a slingshot."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from examples.reference.division_model import MLP, Transformer, division, one_hot, tokens
from examples.reference.modular_division import Loss
from examples.reference.update_log import AFTER, BEFORE, UpdateLog, bimodality


def test_rows_are_all_quotients_once_half_to_train_on() -> None:
    (train, y), (test, test_y) = division(7, seed=0)
    pairs, result = torch.cat([train, test]), torch.cat([y, test_y])
    assert sorted(map(tuple, pairs.tolist())) == [(a, b) for a in range(7) for b in range(1, 7)]
    assert torch.equal(pairs[:, 1] * result % 7, pairs[:, 0]), "quotient times divisor"
    assert len(train) == len(test) == 21
    assert not torch.equal(train, division(7, seed=1)[0][0])


def test_encodings() -> None:
    pairs = torch.tensor([[2, 1], [0, 4]])
    assert one_hot(pairs, 5).tolist() == [[0, 0, 1, 0, 0, 0, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0, 0, 0, 1]]
    assert tokens(pairs, 5).tolist() == [[2, 5, 1, 6], [0, 5, 4, 6]]


@pytest.mark.parametrize("kind", ["mlp", "transformer"])
def test_a_layernorm_before_the_head_leaves_all_other_weights_as_they_were(kind: str) -> None:
    def made(norm: bool, bias: bool) -> nn.Module:
        torch.manual_seed(0)
        if kind == "mlp":
            return MLP(5, 8, 2, norm=norm, head_bias=bias)
        return Transformer(5, 8, 1, 2, norm=False, head_norm=norm, head_bias=bias)

    plain = made(False, True).state_dict()
    for other in (made(True, True), made(False, False)):
        shared = plain.keys() & other.state_dict().keys()
        assert "head.weight" in shared
        assert all(torch.equal(plain[name], other.state_dict()[name]) for name in shared)


# --- the loss -------------------------------------------------------------------------------------------


def gradient(config: dict[str, Any], logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    logits = logits.clone().requires_grad_(True)
    Loss(config)(logits * 1.0, target).backward()
    assert logits.grad is not None
    return logits.grad


@pytest.fixture
def confident() -> tuple[torch.Tensor, torch.Tensor]:
    """Logits whose correct class is 18 nats ahead: its float32 gradient is exactly 0."""
    target = torch.tensor([0, 3, 2])
    return 18.0 * F.one_hot(target, 5).float(), target


def test_float32_rounds_the_correct_class_away_and_the_arms_do_not(confident: Any) -> None:
    plain = gradient({}, *confident)
    rows = torch.arange(3)
    assert (plain[rows, confident[1]] == 0).all() and (plain.sum(1) > 0).all()
    wide = gradient({"loss_dtype": "float64"}, *confident)
    assert (wide[rows, confident[1]] < 0).all()
    assert wide.sum(1).abs().max() < 1e-3 * wide.abs().sum(1).min()
    projected = gradient({"zero_sum": True}, *confident)
    assert torch.equal(projected, plain - plain.mean(-1, keepdim=True))


def test_the_clamp_lifts_what_would_underflow_and_nothing_else() -> None:
    logits = torch.tensor([[0.0, -50.0, -300.0]])
    target = torch.tensor([1])
    assert gradient({}, logits, target)[0, 2] == 0
    free, clamped = gradient({}, logits, target), gradient({"clamp": 100.0}, logits, target)
    assert torch.allclose(free[0, :2], clamped[0, :2])
    lifted = Loss({"clamp": 100.0})(logits.clone().requires_grad_(), target)
    assert float(lifted.detach()) == pytest.approx(50.0)


def test_z_loss_and_label_smoothing_are_torchs() -> None:
    logits, target = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 5])
    plain = F.cross_entropy(logits, target)
    with_z = Loss({"z_loss": 0.5})(logits.clone().requires_grad_(), target)
    assert float(with_z.detach()) == pytest.approx(float(plain + 0.5 * logits.logsumexp(-1).square().mean()))
    smooth = Loss({"label_smoothing": 0.1})(logits.clone().requires_grad_(), target)
    log_p = logits.log_softmax(-1)
    expected = -(0.9 * log_p[range(4), target] + 0.1 * log_p.mean(-1)).mean()
    assert float(smooth.detach()) == pytest.approx(float(expected))


# --- updates --------------------------------------------------------------------------------------------


def test_bimodality_tells_two_points_from_one_hump() -> None:
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (4_000,), generator=generator) * 2.0 - 1.0
    normal = torch.randn(4_000, generator=generator)
    assert bimodality(signs) == pytest.approx(1.0, abs=1e-3)
    assert bimodality(signs + 0.1 * normal) > 0.9
    assert bimodality(torch.rand(4_000, generator=generator)) == pytest.approx(5 / 9, abs=0.02)
    assert bimodality(normal) == pytest.approx(1 / 3, abs=0.03)


def logged(resume_at: int | None = None) -> tuple[UpdateLog, dict[int, float]]:
    """100 quiet steps of 1e-3, then one of ±1 at step 101, whose loss is the first above 1e-1."""
    parameter = nn.Parameter(torch.zeros(500))
    log = UpdateLog([parameter], sample=200)
    generator = torch.Generator().manual_seed(0)
    sizes = {}
    for step in range(1, 101 + AFTER):
        if step == resume_at:
            state = log.state_dict()
            log = UpdateLog([parameter], sample=200)
            log.load_state_dict(state)
        scale = 1.0 if step == 101 else 1e-3
        log.begin()
        with torch.no_grad():
            parameter += scale * (torch.randint(0, 2, (500,), generator=generator) * 2.0 - 1.0)
        sizes[step] = scale
        log.end(step, 0.5 if step == 101 else 1e-3)
    return log, sizes


def test_the_log_keeps_the_updates_around_the_first_step_of_a_slingshot() -> None:
    log, sizes = logged()
    ((start, updates),) = log.kept
    assert start == 101 and len(updates) == BEFORE + AFTER
    rms = updates.square().mean(1).sqrt().tolist()
    assert rms == pytest.approx([sizes[step] for step in range(101 - BEFORE, 101 + AFTER)], rel=1e-2)
    (found,) = log.histograms()
    assert found["steps"]["at"] == 101 and found["growth"] == pytest.approx(1e3, rel=0.02)
    assert sum(found["at"]["counts"]) == updates.shape[1] and found["at"]["bimodality"] > 0.95


def test_the_log_is_the_same_after_a_resume() -> None:
    whole, _ = logged()
    resumed, _ = logged(resume_at=105)
    assert torch.equal(whole.kept[0][1], resumed.kept[0][1])
