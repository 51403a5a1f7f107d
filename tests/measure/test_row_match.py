"""Two steps have the same rows, or they do not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from nfi_monitor import Monitor
from nfi_monitor.measure.row_match import WIDTH, row_match, row_sketch


def test_the_match_is_the_correlation_of_the_sketches():
    generator = torch.Generator().manual_seed(0)
    one = torch.randn(20, 7, generator=generator, dtype=torch.float64)
    two = one + torch.randn(20, 7, generator=generator, dtype=torch.float64)
    a, b = (row_sketch(x).reshape(20, WIDTH).numpy() for x in (one, two))
    a, b = (x - x.mean(0) for x in (a, b))
    expected = (a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum())
    assert float(row_match(row_sketch(two), row_sketch(one))) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("features", [8, 64, 1000])
@pytest.mark.parametrize("rows", [4, 16, 64])
def test_the_same_rows_match_after_an_update_and_other_rows_do_not(rows, features):
    generator = torch.Generator().manual_seed(1)
    others = []
    for _ in range(20):
        one = torch.randn(rows, features, generator=generator).relu()
        moved = 3.0 * one + 0.05 * torch.randn(rows, features, generator=generator) + 1.0
        assert float(row_match(row_sketch(moved), row_sketch(one))) > 0.95
        other = torch.randn(rows, features, generator=generator).relu()
        others.append(abs(float(row_match(row_sketch(other), row_sketch(one)))))
    assert max(others) < 0.9


def test_another_number_of_rows_is_no_match():
    assert float(row_match(torch.ones(3 * WIDTH), torch.ones(4 * WIDTH))) == 0.0


def test_rows_that_are_all_alike_have_no_match():
    assert torch.isnan(row_match(torch.ones(3 * WIDTH), torch.ones(3 * WIDTH)))


def _matches(batches, dropout=0.0):
    torch.manual_seed(0)
    x, y = torch.randn(256, 20), torch.randint(0, 5, (256,))
    model = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Dropout(dropout), nn.Linear(32, 5))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    with Monitor(model, optimizer, console=False, every=1) as monitor:
        for step in range(30):
            rows = batches(step)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
    return monitor.history["row_match"][1]


def test_a_full_batch_matches_and_minibatches_do_not():
    assert min(_matches(lambda step: slice(None))) > 0.95
    assert max(_matches(lambda step: slice(32 * (step % 8), 32 * (step % 8) + 32))) < 0.6


def test_another_dropout_mask_is_no_match():
    assert max(_matches(lambda step: slice(None), dropout=0.5)) < 0.8
