"""The examples that need a training framework: started in short form and, slow, in full."""

from __future__ import annotations

import csv
import importlib
from contextlib import suppress
from pathlib import Path

import pytest

from nfi_monitor import AlertKind, Mechanism
from nfi_monitor.report.run_directory.reader import read_run

# Here, not in a test: lightning's log keeps the stderr that it finds when it is first imported.
for framework in ("transformers", "lightning.pytorch"):
    with suppress(ImportError):
        importlib.import_module(framework)


def run(name: str, package: str, *arguments: object) -> None:
    """In this process: a fresh one would import the frameworks again, which takes longer than the example."""
    pytest.importorskip(package, reason=f'pip install "nfi-monitor[{package}]"')
    assert importlib.import_module(f"examples.{name}").main([str(argument) for argument in arguments]) == 0


# --- 04: the HuggingFace Trainer --------------------------------------------------------------------


def test_the_hf_example_trains_prints_its_summary_and_writes_its_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("04_hf_trainer", "transformers", "--steps", 30, "--out", tmp_path / "out")
    printed = capsys.readouterr().out
    assert "lm_head (Linear 64→25)" in printed
    assert "0 alert messages" in printed
    record = read_run(tmp_path / "out" / "nfi")
    assert record.history["loss"][0][-1] == 30
    assert record.history["live_fraction"][1].max() == pytest.approx(1 / 5), "one token in five is an answer"


@pytest.mark.slow
def test_the_hf_example_slingshots_with_a_warning_in_float32_and_not_at_all_in_float64(
    tmp_path: Path,
) -> None:
    """Rounding makes the slingshot, so each processor has it at seeds of its own."""

    def trained(dtype: str, seed: int) -> Path:
        out = tmp_path / f"{dtype}-{seed}"
        options = ("--loss-dtype", dtype, "--seed", seed, "--out", out, "--save-on", "at_risk")
        run("04_hf_trainer", "transformers", *options)
        return out

    def warns_and_slings(seed: int) -> bool:
        kinds = [alert.kind for alert in read_run(trained("float32", seed) / "nfi").alerts]
        return AlertKind.AT_RISK in kinds and AlertKind.SLINGSHOT in kinds

    seed = next(filter(warns_and_slings, range(6)))
    alerts = read_run(tmp_path / f"float32-{seed}" / "nfi").alerts
    slingshot, *_ = (alert for alert in alerts if alert.kind is AlertKind.SLINGSHOT)
    assert slingshot.mechanism is Mechanism.NUMERICAL_FEATURE_INFLATION
    at_risk = [alert.first_step for alert in alerts if alert.kind is AlertKind.AT_RISK]
    # Between minibatches, the movement of the layers below the head is not known: *imminent* may not come.
    assert any(first < slingshot.first_step - 50 for first in at_risk)
    saved = {path.name for path in (tmp_path / f"float32-{seed}").glob("checkpoint-*")}
    assert saved == {f"checkpoint-{step}" for step in at_risk}
    in_float64 = read_run(trained("float64", seed) / "nfi").alerts
    assert [alert for alert in in_float64 if alert.first_step <= slingshot.last_step] == []


# --- 05: Lightning ----------------------------------------------------------------------------------


def test_the_lightning_example_trains_prints_its_summary_and_logs_to_the_trainers_logger(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("05_lightning", "lightning", "--steps", 60, "--out", tmp_path / "out")
    assert "60 steps, loss in float32" in capsys.readouterr().out
    assert read_run(tmp_path / "out" / "nfi").history["loss"][0][-1] == 60
    with open(tmp_path / "out" / "logs" / "version_0" / "metrics.csv", encoding="utf-8") as file:
        assert [row for row in csv.DictReader(file) if row["nfi/zero_sum_violation"]]


def test_the_lightning_example_in_bfloat16_stops_where_it_is_asked_to(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--loss-dtype", "bfloat16", "--stop-on", "at_risk", "--lr", 0.003, "--steps", 500)
    run("05_lightning", "lightning", *options, "--out", tmp_path / "out")
    [alert] = [
        alert for alert in read_run(tmp_path / "out" / "nfi").alerts if alert.kind is AlertKind.AT_RISK
    ]
    assert f"{alert.first_step} steps, loss in bfloat16" in capsys.readouterr().out
    assert alert.first_step < 500
