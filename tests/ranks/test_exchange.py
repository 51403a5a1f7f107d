"""One rank's side of an exchange; what several ranks read together: tests/distributed."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from nfi_monitor.ranks.exchange import Exchange
from nfi_monitor.ranks.shape import survey
from tests.runs import mlp


def test_what_is_done_to_a_loss_before_ranks_tell_each_other_is_not_taken_for_the_loss() -> None:
    model = mlp()
    shape, shares = survey(model, torch.optim.AdamW(model.parameters()), None, 1, slots=4)
    pool = Exchange(SimpleNamespace(world=1, index=0), shape, shares, {})  # type: ignore[arg-type]
    loss = torch.tensor(2.0)
    pool.keep_loss(1, loss)
    loss.mul_(8)
    assert pool.finish(pool.message(), 3).tensor.tolist() == [2.0]
