"""Foreign packages in the table: through their own classes where installed, said to be missing where not."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tests.benchmarks.detection import peers_installed, report

SPIKE = (np.arange(1, 401), np.concatenate([np.linspace(1.1, 1.0, 390), np.full(10, 40.0)]))
NORMS = (np.arange(1, 401), np.concatenate([np.full(395, 1.0), np.full(5, 500.0)]))
SERIES = {"loss": SPIKE, "gradient_norm": NORMS}


def needs(name: str) -> None:
    if name not in peers_installed.installed():
        pytest.skip(f"{name} {peers_installed.PINNED[name]}: {peers_installed.missing()[name]}")


def test_trainscope_sounds_through_its_own_detectors() -> None:
    needs("trainscope")
    found = peers_installed.trainscope(SERIES.__getitem__)
    assert {391} <= set(found["trainscope, change point up"].tolist())
    assert set(found["trainscope, change point up"]) < set(found["trainscope, change point"])
    assert 391 in found["trainscope, z score up"]
    # Its own class, asked step by step, is the reference.
    from trainscope.core.detectors import ChangePointDetector

    detector = ChangePointDetector()
    expected = [step for step, loss in zip(*SPIKE, strict=True) if detector.update(float(loss)) is not None]
    assert found["trainscope, change point"].tolist() == expected


def test_trainpulse_sounds_through_its_own_monitor() -> None:
    needs("trainpulse")
    found = peers_installed.trainpulse(SERIES.__getitem__)
    assert found["trainpulse, loss spike"].tolist()[0] == 391
    assert set(found["trainpulse, loss spike"]) < set(found["trainpulse, any alert"])
    assert {396, 400} <= set(found["trainpulse, any alert"].tolist())  # the gradient norm above 100


def test_arc_training_sounds_through_its_own_detector() -> None:
    needs("arc-training")
    found = peers_installed.arc_training(SERIES.__getitem__)
    assert 391 <= found["arc-training, drift"].tolist()[0] <= 396
    assert set(found["arc-training, critical drift"]) <= set(found["arc-training, drift"])


def test_a_package_that_is_not_there_is_said_to_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers_installed, "PINNED", {"no-such-package-of-ours": "1.0"})
    peers_installed._found.cache_clear()
    peers_installed.installed.cache_clear()
    try:
        assert peers_installed.installed() == {} and peers_installed.sounded(SERIES.__getitem__) == {}
        assert peers_installed.missing() == {"no-such-package-of-ours": "not installed"}
        assert report._packages() == ["no-such-package-of-ours: not installed"]
    finally:
        peers_installed._found.cache_clear()
        peers_installed.installed.cache_clear()


def test_a_foreign_score_that_is_not_finite_is_a_spike_and_nan_losses_are_not_shown_to_it() -> None:
    class Foreign:
        def update(self, loss: float) -> float | None:
            assert math.isfinite(loss)
            return {1.0: math.inf, 2.0: -math.inf}.get(loss)

    found = peers_installed._scores(Foreign(), [1.0, math.nan, 2.0, 3.0])
    assert np.isfinite(found).tolist() == [True, False, True, False] and found[0] > 0 > found[2]
