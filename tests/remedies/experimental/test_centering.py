"""Means that are taken off: the differences stay, and undoing leaves evaluation as it is."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from nfi_monitor.remedies import experimental
from tests.remedies.training import adam
from tests.runs import batch, mlp, train


def test_a_centred_classifier_gives_the_same_differences_and_no_common_part() -> None:
    model = mlp()
    optimizer = adam(model)
    train(model, optimizer, 5)
    inputs, _ = batch()
    before = model(inputs).detach()
    handle = experimental.center_classifier(model, optimizer)
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
        experimental.center_classifier(tied, adam(tied))
    one = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
    with pytest.raises(ValueError, match="one output"):
        experimental.center_classifier(one, adam(one))
    normed = nn.Sequential(nn.Linear(3, 3), nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)))
    with pytest.raises(ValueError, match="no weight matrix of its own"):
        experimental.center_classifier(normed, adam(normed))


def test_centred_features_have_no_mean_in_training_and_the_running_one_is_taken_off_in_evaluation() -> None:
    model = nn.Sequential(nn.Linear(12, 5), nn.Linear(5, 7))
    seen: list[Tensor] = []
    inputs, _ = batch()
    handle = experimental.center_features(model[1], momentum=1.0)
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
    handle = experimental.center_features(head)
    with pytest.raises(ValueError, match="centred already"):
        experimental.center_features(head)
    handle.undo()
    experimental.center_features(head).undo()
