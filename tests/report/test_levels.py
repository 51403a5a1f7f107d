"""Pictures draw the levels that the rules apply, of the run's own thresholds."""

from __future__ import annotations

import pytest

from nfi_monitor.detect.rules import LEVELS
from nfi_monitor.detect.situation import RunContext
from nfi_monitor.quantities import QUANTITIES
from nfi_monitor.report.levels import bands, bands_of
from nfi_monitor.report.tensorboard.tab_data import CHARTS, chart_json
from nfi_monitor.types import Thresholds
from tests.report.builders import INFO

CHANGED = Thresholds(absorbing_enter=0.2, absorbing_exit=0.1, inflating_growth=0.05, rms_t_imminent=3.0)


def test_each_band_is_drawn_beside_a_quantity_and_for_one_level() -> None:
    drawn = [name for level in LEVELS for name in level.bands]
    assert drawn and set(drawn) <= QUANTITIES.keys() and len(set(drawn)) == len(drawn)


def test_a_band_goes_from_the_level_that_ends_a_sign_to_the_level_that_begins_it() -> None:
    found = bands(CHANGED, RunContext(beta1=0.8, beta2=0.95))
    assert found["zero_sum_violation_smoothed"] == (0.1, 0.2, "at risk")
    assert found["rms_t_max"] == (CHANGED.rms_t_exit, 3.0, "imminent")
    assert found["feature_mean_growth"][:2] == pytest.approx((0.025 / 20, 0.05 / 20))
    assert found["secant_curvature"].enter == pytest.approx(2 * 1.8 / 0.2)


def test_the_tab_draws_the_band_of_the_runs_own_thresholds() -> None:
    info = {**INFO, "thresholds": CHANGED.to_json()}
    charts = {chart.title: chart_json(chart, info)["band"] for chart in CHARTS}
    assert charts["zero-sum violation"] == {"low": 0.1, "high": 0.2, "means": "at risk"}
    assert charts["RMS_t"]["high"] == 3.0 and charts["margins"] is None
    assert charts["growth of the means"]["high"] == pytest.approx(0.05 / 20)


def test_the_limit_of_the_curvature_is_that_of_the_runs_optimizer() -> None:
    sgd = {"name": "SGD", "momentum": 0.9, "dampening": 0.0, "nesterov": False}
    optimizers = [sgd, {**sgd, "nesterov": True}, {"name": "Adagrad"}, {"name": "Adam", "betas": [0.8, 0.99]}]
    found = [bands_of({**INFO, "optimizer": optimizer})["secant_curvature"].enter for optimizer in optimizers]
    assert found == pytest.approx([3.8, 3.8 / 2.8, 2.0, 18.0])


@pytest.mark.parametrize("unknown", [{}, {"thresholds": None}, {"thresholds": {}, "tau": None}])
def test_without_thresholds_nothing_is_drawn(unknown: dict[str, object]) -> None:
    assert bands_of(unknown) == {}
