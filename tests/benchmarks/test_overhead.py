"""The overhead benchmark times what it says, and calls a target reached only where it is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from nfi_monitor.capture.sampling import COORDINATES
from tests.benchmarks.overhead import __main__ as command
from tests.benchmarks.overhead import costs, readme, report, timing
from tests.benchmarks.overhead.__main__ import main
from tests.benchmarks.overhead.cases import CASES, Case, Classifier, Transformer, rows, tokens
from tests.benchmarks.overhead.timing import Result, Spread, measure
from tests.benchmarks.overhead.trainings import NULL, OURS, Default, EveryStep, TimedTraining, WeightGradient

TINY = Case("tiny", lambda: Classifier(4, 4, 3), lambda: rows(8, 4, 3), 0.05, 0.25)


def result(arm: str, ratio: float, *, case: str = "mlp-2.6M", own: float | None = None, width: float = 0.0):
    spread = Spread(ratio, ratio - width, ratio + width)
    return Result(case, 1, arm, 10, 1.0, spread, spread, 32, 9, 0.06, own)


def verdict_of(*results: Result) -> str:
    record = report.Record()
    for found in results:
        record.add(found, "cpu")
    rows = [row for row in report._targets(record).rows if "default" in row[0]]
    assert len(rows) == 1
    return rows[0][-1]


def test_a_target_is_reached_by_the_ratio() -> None:
    assert verdict_of(result(NULL, 1.0), result("default", 1.009, own=0.009)) == "reached"


def test_a_target_is_missed_where_the_monitors_own_clock_says_so() -> None:
    assert verdict_of(result(NULL, 1.0, width=0.1), result("default", 1.02, own=0.015)) == "missed"
    assert verdict_of(result(NULL, 1.0, width=0.1), result("default", 1.001, own=0.015)) == "missed"


def test_a_target_is_missed_where_the_ratio_stands_out_of_the_noise() -> None:
    assert verdict_of(result(NULL, 1.0, width=0.01), result("default", 1.05, own=0.001)) == "missed"


def test_a_run_directory_is_held_against_the_default_beside_it() -> None:
    record = report.Record()
    for arm, own in (("default", 0.05), ("default, run directory", 0.065)):
        record.add(replace(result(arm, 1.0, case="mlp-26k", own=own), load=1.25), "cpu")
    (line,) = report._run_directory(record)
    assert line[-2:] == ["1.50%", "reached"]
    assert ", load 1.2–1.2\n" in report.page(record)


def test_within_the_noise_of_a_bare_copy_the_own_clock_decides() -> None:
    told = verdict_of(result(NULL, 1.0, width=0.05), result("default", 1.02, own=0.005))
    assert told.startswith("reached by its own clock")


@pytest.mark.parametrize("kind", OURS)
def test_each_arm_trains_the_same_weights_as_nobody_watching(kind, tmp_path: Path) -> None:
    from tests.benchmarks.overhead.trainings import FusedBare

    torch.manual_seed(0)
    data = [TINY.batch() for _ in range(4)]
    weights = []
    for made in (FusedBare if kind is WeightGradient else TimedTraining, kind):
        torch.manual_seed(1)
        arm = made(TINY.build(), data, tmp_path)
        arm.run(12)
        arm.close()
        weights.append(torch.cat([p.detach().flatten() for p in arm.model.parameters()]))
    assert torch.equal(*weights)


def test_a_measurement_has_a_bare_copy_and_counts_what_was_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "WARM_UP_STEPS", 20)
    null, default, every = measure("tiny", TINY, [Default, EveryStep], rounds=2, console=Console(quiet=True))
    assert (null.arm, default.arm, every.arm) == (NULL, "default", "every step")
    assert null.read is None and every.read == 1.0 and 0.0 <= default.read < 0.2
    assert every.own > max(default.own, 0.1)  # idle, a reading takes longer than a step of 35 weights


def test_the_command_prints_the_table_and_keeps_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(timing, "WARM_UP_STEPS", 10)
    monkeypatch.setattr(timing, "BLOCK_STEPS", 3)
    page = tmp_path / "OVERHEAD.md"
    monkeypatch.setattr(command, "PAGE", page)
    asked = ["--cases", "mlp-26k", "--arms", "default", "every step", "--rounds", "2", "--only", "times"]
    asked += ["--threads", "1"]
    assert main([*asked, "--cache", str(tmp_path / "record.json")]) == 0
    assert "26,122 parameters" in capsys.readouterr().out
    record = report.load(tmp_path / "record.json")
    assert [found.arm for _, found in record.results] == [NULL, "default", "every step"]
    assert all(found.wall.median > 0 and found.cpu.median > 0 for _, found in record.results)
    assert "| mlp-26k, default, 1 thread | ≤ 1.050 |" in page.read_text(encoding="utf-8")
    # What is on record is not timed again.
    monkeypatch.setattr(timing, "_paired", None)
    assert main([*asked, "--cache", str(tmp_path / "record.json")]) == 0


def test_the_record_survives_its_file(tmp_path: Path) -> None:
    record = report.Record()
    record.add(result("default", 1.1), "cpu")
    record.add(result("default", 1.2), "cpu")
    report.save(record, tmp_path / "record.json")
    again = report.load(tmp_path / "record.json")
    assert again == record
    assert [item.wall.median for _, item in again.results] == [1.2]
    assert "1.200 (1.200–1.200)" in report.page(again)


def test_the_least_that_a_reading_has_to_read_is_counted_from_its_budgets() -> None:
    assert costs.bytes_read(TINY) == 4 * (8 * (2 * 3 + 4) + 4 * 35)
    big = replace(TINY, build=lambda: Classifier(256, 512, 10), batch=lambda: rows(8, 256, 10))
    assert costs.bytes_read(big) == 4 * (8 * (2 * 10 + 512) + 4 * COORDINATES)


def test_peak_memory_counts_what_a_step_allocates(tmp_path: Path) -> None:
    found = costs.peak("tiny", TINY, tmp_path)
    assert 0 < found.bare < found.watched < 1.0  # MiB


def test_a_case_in_bfloat16_computes_in_bfloat16_and_trains_the_same_weights(tmp_path: Path) -> None:
    seen = set()

    class Noted(TimedTraining):
        def before_step(self, loss: torch.Tensor) -> None:
            seen.add(self.logits)

    small = replace(
        CASES["gpt2-124M"],
        build=lambda: Transformer(50, 8, 16, 1, 2, tied=True),
        batch=lambda: tokens(2, 8, 50),
    )
    torch.manual_seed(0)
    data = [small.batch() for _ in range(2)]
    weights = []
    for made in (Noted, EveryStep):
        torch.manual_seed(1)
        arm = made(small.build(), data, tmp_path, autocast=small.autocast)
        arm.model.head.register_forward_hook(lambda *seen, to=arm: setattr(to, "logits", seen[-1].dtype))
        arm.run(4)
        arm.close()
        weights.append(torch.cat([p.detach().flatten() for p in arm.model.parameters()]))
    assert seen == {torch.bfloat16}
    assert torch.equal(*weights)


def test_gpt2s_sizes_are_gpt2s() -> None:
    with torch.device("meta"):
        model = CASES["gpt2-124M"].build()
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(124.4e6, rel=0.005)
    assert model.head.weight is model.tokens.weight


def test_what_only_an_accelerator_runs_is_refused_elsewhere(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--cases", "gpt2-124M"])
    assert "for an accelerator (--device cuda)" in capsys.readouterr().err


def test_the_tests_that_hold_a_target_exist() -> None:
    root = Path(report.__file__).parents[3]
    files = [line[2].split("`")[1] for line in report.HELD]
    assert files and all((root / file).is_file() for file in files)


def test_an_unknown_case_lists_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--cases", "nothing"])
    said = capsys.readouterr().err
    assert all(name in said for name in CASES)


def test_the_six_lines_in_the_readme_are_those_of_the_page() -> None:
    page, told = command.PAGE.read_text(encoding="utf-8"), readme.README.read_text(encoding="utf-8")
    assert readme.filled(told, page) == told, "python -m tests.benchmarks.overhead.readme"
    with pytest.raises(ValueError, match="no block"):
        readme.filled("", page)


def test_a_ratio_within_the_noise_of_a_bare_copy_gives_way_to_the_own_clock() -> None:
    def cell(ratio: str) -> str:
        return readme._longer([ratio, "", "1.0%", "0.67%"], noise=1.05)

    assert cell("1.174 (1.057–1.372)") == "17% longer"
    assert cell("3.880 (3.662–4.289)") == "3.9 times as long"
    assert cell("1.060 (1.050–1.070)") == cell("0.990 (0.950–1.200)") == "≈ 0.67% longer"
