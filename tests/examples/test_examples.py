"""Each example, and the overhead command, run as a person runs them: from the command line, in short form."""

from __future__ import annotations

import importlib
import json
import os
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from nfi_monitor import Alert, AlertKind, Mechanism, Severity
from nfi_monitor.report.run_directory.reader import RunRecord, read_run
from tests.examples.started import PLAIN, ROOT, started

PNG = b"\x89PNG"


@dataclass(frozen=True)
class Demo:
    """What one start of the demo printed and wrote."""

    out: Path
    printed: str


def example(name: str, *arguments: str, cwd: Path) -> str:
    """What ``python examples/NAME.py ARGUMENTS`` prints."""
    return started(name, *arguments, cwd=cwd).printed()


def fresh(name: str, *arguments: str, cwd: Path) -> str:
    """The same in an interpreter of its own."""
    environment = {**os.environ, **PLAIN, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / f"{name}.py"), *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        encoding="utf-8",
        timeout=600,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("01_plain_loop", "--steps --run-dir --loss-dtype"),
        ("02_modular_division", "--p --width --depth --beta2 --seed --steps --slingshots --out --no-live"),
        ("03_sparse_parity", "--loss --loss-dtype --steps --seed --run-dir"),
        ("06_tensorboard", "--out --steps --seed --serve --port"),
    ],
)
def test_help_names_every_option(name: str, options: str, tmp_path: Path) -> None:
    printed = example(name, "--help", cwd=tmp_path)
    assert [option for option in options.split() if f"{option} " not in printed] == []
    assert list(tmp_path.iterdir()) == []


# --- 01: the plain loop -----------------------------------------------------------------------------


def test_the_plain_loop_learns_prints_its_summary_and_writes_its_run(tmp_path: Path) -> None:
    printed = fresh("01_plain_loop", "--steps", "200", "--run-dir", "run", cwd=tmp_path)
    assert float(printed.split("test accuracy ")[1].split("%")[0]) > 80
    assert "zero-sum violation" in printed
    assert (tmp_path / "run" / "run.json").is_file()
    assert lines(tmp_path / "run" / "readings.jsonl")
    assert read_run(tmp_path / "run").history["zero_sum_violation"][0][-1] <= 200


def test_the_plain_loop_taps_cast_logits_and_writes_nothing_unless_asked(tmp_path: Path) -> None:
    printed = example("01_plain_loop", "--steps", "60", "--loss-dtype", "bfloat16", cwd=tmp_path)
    assert "loss in bfloat16" in printed
    assert list(tmp_path.iterdir()) == []


# --- 02: the demo -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def short_demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    cwd = tmp_path_factory.mktemp("short-demo")
    printed = example("02_modular_division", "--steps", "120", "--out", "demo", "--no-live", cwd=cwd)
    return Demo(cwd / "demo", printed)


def test_a_short_demo_says_that_it_has_shown_nothing(short_demo: Demo) -> None:
    assert "No slingshot within 120 steps" in short_demo.printed
    assert "Rounding made them" not in short_demo.printed


def test_a_short_demo_writes_both_runs_and_the_figure(short_demo: Demo) -> None:
    for arm in ("float32", "float64"):
        assert (short_demo.out / arm / "run.json").is_file()
        assert lines(short_demo.out / arm / "readings.jsonl")
    figure = short_demo.out / "figure.png"
    assert figure.read_bytes().startswith(PNG)
    assert "figure.png" in short_demo.printed


def test_a_second_demo_leaves_the_first_alone(short_demo: Demo) -> None:
    before = {path: path.read_bytes() for path in short_demo.out.rglob("*") if path.is_file()}
    printed = example(
        "02_modular_division", "--steps", "20", "--out", "demo", "--no-live", cwd=short_demo.out.parent
    )
    assert (short_demo.out.parent / "demo-2" / "figure.png").is_file()
    assert "demo-2" in printed
    assert {path: path.read_bytes() for path in short_demo.out.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--p", "21"], "21 is not an odd prime"),
        (["--steps", "0"], "--steps must be at least 1"),
        (["--slingshots", "-1"], "--slingshots must be at least 1"),
    ],
)
def test_the_demo_refuses_what_cannot_work_and_says_why(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module("examples.02_modular_division").main(arguments)
    assert stopped.value.code == 2
    assert complaint in capsys.readouterr().err


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    cwd = tmp_path_factory.mktemp("demo")
    options = ("--out", "demo", "--slingshots", "1")
    return Demo(cwd / "demo", example("02_modular_division", *options, cwd=cwd))


def assert_announced_in_time(run_: RunRecord, slingshots_at_least: int) -> None:
    """*At risk* 100 steps before each slingshot, *imminent* 10 before each, and 25 before half of them.

    A later slingshot builds up faster, so that a seed's third may have been imminent for some 20 steps only.
    """
    slingshots = [alert for alert in run_.alerts if alert.kind is AlertKind.SLINGSHOT]
    assert len(slingshots) >= slingshots_at_least
    previous, leads = 0, []
    for slingshot in slingshots:
        start = slingshot.first_step
        # Announced since the last slingshot began: a warning that was about that one is not counted.
        for kind, lead in ((AlertKind.AT_RISK, 100), (AlertKind.IMMINENT, 10)):
            found = [
                start - alert.first_step
                for alert in run_.alerts
                if alert.kind is kind and previous <= alert.first_step <= start - lead <= alert.last_step
            ]
            assert found, f"no {kind} alert {lead} steps before {start}"
        leads.append(max(found))
        assert slingshot.mechanism is Mechanism.NUMERICAL_FEATURE_INFLATION
        previous = start
    assert statistics.median(leads) >= 25, leads


def test_the_demo_slingshots_and_that_was_announced_in_time(demo: Demo) -> None:
    assert_announced_in_time(read_run(demo.out / "float32"), 1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", ["0", "1", "2", "3", "4"])
def test_three_slingshots_are_each_announced_in_time_at_any_seed_and_the_controls_stay_quiet(
    seed: str, tmp_path: Path
) -> None:
    example("02_modular_division", "--out", "demo", "--seed", seed, "--slingshots", "3", cwd=tmp_path)
    assert_announced_in_time(read_run(tmp_path / "demo" / "float32"), 3)
    control = read_run(tmp_path / "demo" / "float64").alerts
    assert [alert for alert in control if alert.severity.rank >= Severity.WARNING.rank] == []


def test_the_demo_s_control_stays_quiet(demo: Demo) -> None:
    alerts = read_run(demo.out / "float64").alerts
    assert [alert for alert in alerts if alert.severity.rank >= Severity.WARNING.rank] == []
    assert "no slingshot. Rounding made them" in demo.printed


def test_the_demo_ends_with_its_table_and_its_paths(demo: Demo) -> None:
    for words in (
        "loss in float32",
        "loss in float64",
        "first warning",
        "lead in steps, at risk",
        "lead in steps, imminent",
        "mechanism named",
        "numerical feature inflation",
        "final test accuracy",
        str(Path("demo") / "figure.png"),
        str(Path("demo") / "float32"),
        str(Path("demo") / "float64"),
    ):
        assert words in demo.printed
    assert (demo.out / "figure.png").read_bytes().startswith(PNG)


# --- 03: sparse parity ------------------------------------------------------------------------------


@pytest.mark.parametrize(("loss", "dtype"), [("hinge", "float64"), ("cross_entropy", "float32")])
def test_sparse_parity_runs_under_each_loss_and_in_each_precision(
    loss: str, dtype: str, tmp_path: Path
) -> None:
    arguments = ["--loss", loss, "--loss-dtype", dtype, "--steps", "200", "--run-dir", "run"]
    printed = example("03_sparse_parity", *arguments, cwd=tmp_path)
    assert "slingshots in 200 steps" in printed
    assert "test accuracy" in printed
    assert (tmp_path / "run" / "run.json").is_file()


def test_hinge_slingshots_are_not_called_numerical(tmp_path: Path) -> None:
    """The first comes between steps 100 and 1,400, or later: which seed's does, rounding and so the processor
    decides. A one-column head has no zero-sum to break.

    Within 2 τ a second moment has had no time to forget: what comes by then is named edge of stability.
    """
    slingshots: list[Alert] = []
    for seed in range(6):
        run = f"run{seed}"
        example("03_sparse_parity", "--steps", "1400", "--seed", str(seed), "--run-dir", run, cwd=tmp_path)
        alerts = read_run(tmp_path / run).alerts
        slingshots = [alert for alert in alerts if alert.kind is AlertKind.SLINGSHOT]
        if slingshots:
            break
    assert slingshots
    for slingshot in slingshots:
        young = slingshot.first_step < 2 * 1000
        assert slingshot.mechanism is (Mechanism.EDGE_OF_STABILITY if young else Mechanism.SECOND_MOMENT)


@pytest.mark.slow
def test_cross_entropy_parity_is_armed_a_thousand_steps_before_its_slingshot(tmp_path: Path) -> None:
    """W. Wu's setting, float32: one slingshot, onset after some 15,500 to 18,700 steps."""
    example("03_sparse_parity", "--loss", "cross_entropy", "--run-dir", "run", cwd=tmp_path)
    alerts = read_run(tmp_path / "run").alerts
    slingshot = next(alert for alert in alerts if alert.kind is AlertKind.SLINGSHOT)
    armed = [alert for alert in alerts if alert.kind is AlertKind.AT_RISK and alert.severity.rank >= 1]
    assert any(a.first_step <= slingshot.first_step - 1000 <= a.last_step for a in armed)
    assert slingshot.mechanism is Mechanism.NUMERICAL_FEATURE_INFLATION


@pytest.mark.slow
@pytest.mark.parametrize("seed", ["0", "1"])
def test_no_hinge_parity_slingshot_is_named_numerical_and_each_was_at_risk(seed: str, tmp_path: Path) -> None:
    example("03_sparse_parity", "--loss", "hinge", "--seed", seed, "--run-dir", "run", cwd=tmp_path)
    alerts = read_run(tmp_path / "run").alerts
    assert not any(alert.mechanism is Mechanism.NUMERICAL_FEATURE_INFLATION for alert in alerts)
    # A spike in the first steps of training has no forgotten second moment behind it.
    slingshots = [a for a in alerts if a.kind is AlertKind.SLINGSHOT and a.first_step > 250]
    assert len(slingshots) >= 3
    # Where gradients oppose each other on the way, it is an oscillation on a second moment that has let go.
    mechanisms = {alert.mechanism for alert in slingshots}
    assert Mechanism.SECOND_MOMENT in mechanisms
    assert mechanisms <= {Mechanism.SECOND_MOMENT, Mechanism.EDGE_OF_STABILITY}
    at_risk = [alert for alert in alerts if alert.kind is AlertKind.AT_RISK]
    for slingshot in slingshots:
        assert any(a.first_step < slingshot.first_step <= a.last_step for a in at_risk), slingshot.first_step
