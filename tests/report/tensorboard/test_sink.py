from __future__ import annotations

import builtins
import itertools
import re
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nfi_monitor.quantities import QUANTITIES
from nfi_monitor.report.summary import Summary
from nfi_monitor.report.tensorboard import sink as tensorboard
from nfi_monitor.report.tensorboard.sink import TensorBoardSink
from nfi_monitor.types import Change, Note, Phase, Reading
from tests.report.builders import AT_RISK, INFO, event, readings, resolved

pytest.importorskip("tensorboard")
pytest.importorskip("torch")


def read(path: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(path), size_guidance={"tensors": 10, "scalars": 0})
    accumulator.Reload()
    return accumulator


def text(accumulator: Any, tag: str) -> list[str]:
    return [item.tensor_proto.string_val[0].decode() for item in accumulator.Tensors(f"{tag}/text_summary")]


def test_scalars_thresholds_and_texts_come_back(tmp_path: Path) -> None:
    sink = TensorBoardSink(tmp_path, min_seconds=0)
    sink.start(INFO)
    run = readings(50)
    for reading, phase in run:
        sink.reading(reading, phase)
    sink.alert(AT_RISK, Change.BEGIN)
    sink.note(Note("tied_head", "The head is tied.", 7))
    sink.close(INFO, Summary())

    back = read(tmp_path)
    loss = back.Scalars("nfi/loss")
    assert [item.step for item in loss] == [reading.step for reading, _ in run]
    assert loss[0].value == pytest.approx(run[0][0].values["loss"])
    assert [item.value for item in back.Scalars("nfi/phase")][-1] == list(Phase).index(run[-1][1])
    markdown = text(back, "nfi/alerts/at_risk-1")[0]
    assert (
        "| smoothed zero-sum violation | 0.134 | 0.1 | 0.03 |" in markdown
        and "1. Compute the loss" in markdown
    )
    assert "The head is tied." in text(back, "nfi/notes/tied_head")[0]
    assert "Linear 128→23" in text(back, "nfi/run")[0]


def test_a_band_has_the_steps_of_its_value(tmp_path: Path) -> None:
    sink = TensorBoardSink(tmp_path, min_seconds=0)
    sink.start(INFO)
    for step in range(1, 21):  # the violation is not measured at every step
        sink.reading(
            Reading(step, {"zero_sum_violation_smoothed": 0.5} if step % 3 else {"loss": 1.0}), Phase.HEALTHY
        )
    sink.close(INFO, Summary())
    back = read(tmp_path)
    steps = [item.step for item in back.Scalars("nfi/zero_sum_violation_smoothed")]
    for edge, value in (("enter", 0.1), ("exit", 0.03)):
        band = back.Scalars(f"nfi/threshold/zero_sum_violation_smoothed/{edge}")
        assert [item.step for item in band] == steps and band[0].value == pytest.approx(value)


def test_no_alert_is_lost_to_sampling(tmp_path: Path) -> None:
    sink = TensorBoardSink(tmp_path)
    sink.start(INFO)
    sink._open().flush = lambda: None  # type: ignore[method-assign]  # 500 flushes are not the point
    from nfi_monitor.types import AlertKind

    for number in range(1, 501):
        sink.alert(event(AlertKind.AT_RISK, number, None, number), Change.UPDATE)
    sink.alert(resolved(AT_RISK, 900), Change.END)
    sink.close(INFO, Summary())
    tags = read(tmp_path).Tags()["tensors"]
    assert sum(tag.startswith("nfi/alerts/at_risk-") for tag in tags) == 500
    overview = text(read(tmp_path), "nfi/alerts")[-1]
    assert "at_risk-1 |" in overview and "earlier" in overview and len(overview.splitlines()) < 30


def test_quick_runs_are_thinned_but_not_at_phase_changes_or_slingshots(tmp_path: Path) -> None:
    sink = TensorBoardSink(tmp_path, min_seconds=1000.0)
    sink.start(INFO)
    run = readings(500)
    started = time.perf_counter()
    for reading, phase in run:
        sink.reading(reading, phase)
    assert (time.perf_counter() - started) / len(run) < 1e-3
    sink.close(INFO, Summary())
    steps = {item.step for item in read(tmp_path).Scalars("nfi/loss")}
    changes = {b.step for (_, p), (b, q) in itertools.pairwise(run) if p is not q}
    slingshot = {reading.step for reading, phase in run if phase is Phase.SLINGSHOT}
    assert steps == {1, 500} | changes | slingshot


def test_the_layout_shows_five_panels_of_known_quantities() -> None:
    layout = tensorboard.layout({"zero_sum_violation_smoothed": (0.03, 0.1)})
    assert list(layout) == ["zero-sum", "means", "displacement", "second moment", "norms"]
    charts = [chart for charts in layout.values() for chart in charts.values()]
    assert [chart for chart in charts if chart[0] == "Margin"] == [
        ["Margin", ["nfi/zero_sum_violation_smoothed", "nfi/threshold/zero_sum_violation_smoothed/exit",
                    "nfi/threshold/zero_sum_violation_smoothed/enter"]]
    ]  # fmt: skip
    known = {f"nfi/{name}" for name in [*QUANTITIES, "phase"]}
    for kind, tags in charts:
        if kind == "Multiline":  # regular expressions, matched at the start: each must fit one tag only
            assert all(len([name for name in known if re.match(tag, name)]) == 1 for tag in tags)


def test_without_tensorboard_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = ("tensorboard.compat.proto", "torch.utils.tensorboard")
    for name in [name for name in sys.modules if name.startswith(parts)]:
        monkeypatch.delitem(sys.modules, name)
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("tensorboard"):
            raise ModuleNotFoundError("No module named 'tensorboard'", name="tensorboard")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    monkeypatch.setattr("nfi_monitor.extras._installed", lambda package: False)
    with pytest.raises(ImportError, match=re.escape('pip install "nfi-monitor[tensorboard]"')):
        TensorBoardSink(tmp_path).start(INFO)


def test_use_before_start_says_so(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="start"):
        TensorBoardSink(tmp_path).reading(Reading(1, {}), Phase.HEALTHY)


def test_closing_without_start_is_harmless(tmp_path: Path) -> None:
    TensorBoardSink(tmp_path).close(INFO, Summary())
    assert not list(tmp_path.iterdir())


def test_of_a_long_run_fewer_and_fewer_readings_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files can only grow; a slingshot's beginning and every change of phase are written all the same."""
    monkeypatch.setattr(tensorboard, "EVENTS", 16)
    monkeypatch.setattr(tensorboard, "SLINGSHOT_EVENTS", 5)
    sink = TensorBoardSink(tmp_path, min_seconds=0)
    sink.start(INFO)
    for step in range(1, 201):
        sink.reading(Reading(step, {"loss": 1.0}), Phase.SLINGSHOT if step > 150 else Phase.HEALTHY)
    sink.close(INFO, Summary())
    steps = [item.step for item in read(tmp_path).Scalars("nfi/loss")]
    assert steps[:16] == list(range(1, 17)) and steps[16:32] == list(range(18, 50, 2))
    assert steps[32:48] == list(range(52, 116, 4)) and set(range(151, 156)) <= set(steps)
    assert len(steps) < 70 and steps[-1] == 200


# --- a run that goes back ------------------------------------------------------------------------------


def curve(directory: Path, tag: str = "nfi/loss") -> dict[int, float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(directory), size_guidance={"scalars": 0})
    accumulator.Reload()
    events = accumulator.Scalars(tag)
    assert [event.step for event in events] == sorted({event.step for event in events}), "the curve goes back"
    return {event.step: event.value for event in events}


@pytest.fixture(autouse=True)
def writers_with_numbers_of_equal_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are read in the order of their names: second, process, number of the writer in the process.

    Sessions of one process in one second are those of a test alone, and there 10 comes before 9.
    """
    from tensorboard.summary.writer import event_file_writer

    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(1_000))


def session(directory: Path, steps: range, loss: float) -> TensorBoardSink:
    sink = TensorBoardSink(directory, min_seconds=0)
    sink.start(INFO)
    for step in steps:
        sink.reading(Reading(step, {"loss": loss}), Phase.HEALTHY)
    return sink


def test_a_resumed_run_has_one_curve(tmp_path: Path) -> None:
    session(tmp_path, range(1, 31), 1.0).close(INFO, Summary())
    session(tmp_path, range(21, 26), 2.0).close(INFO, Summary())
    session(tmp_path, range(11, 14), 3.0).close(INFO, Summary())
    assert curve(tmp_path) == {**dict.fromkeys(range(1, 11), 1.0), **dict.fromkeys(range(11, 14), 3.0)}


def test_a_run_that_goes_back_within_its_process_has_one_curve(tmp_path: Path) -> None:
    sink = session(tmp_path, range(1, 31), 1.0)
    sink.went_back()
    for step in range(21, 25):
        sink.reading(Reading(step, {"loss": 2.0}), Phase.HEALTHY)
    sink.close(INFO, Summary())
    assert curve(tmp_path) == {**dict.fromkeys(range(1, 21), 1.0), **dict.fromkeys(range(21, 25), 2.0)}


def test_of_losses_that_come_together_the_curve_has_the_last_one(tmp_path: Path) -> None:
    sink = session(tmp_path, range(1, 11), 1.0)
    sink.losses([(step, 2.0) for step in range(11, 21)], Phase.HEALTHY)
    sink.close(INFO, Summary())
    resumed = TensorBoardSink(tmp_path, min_seconds=0)
    resumed.start(INFO)
    resumed.losses([(step, 3.0) for step in range(6, 9)], Phase.HEALTHY)
    resumed.close(INFO, Summary())
    assert curve(tmp_path) == {**dict.fromkeys(range(1, 6), 1.0), 8: 3.0}


def test_the_curves_of_another_writer_in_the_directory_are_left_alone(tmp_path: Path) -> None:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path)) as writer:
        for tokens in range(0, 10_000, 1000):
            writer.add_scalar("theirs", tokens, tokens)
    session(tmp_path, range(1, 11), 1.0).close(INFO, Summary())
    session(tmp_path, range(11, 21), 1.0).close(INFO, Summary())
    assert len(curve(tmp_path, "theirs")) == 10 and len(curve(tmp_path)) == 20


def test_the_tab_keeps_what_was_written_before_the_run_went_back(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    first = session(tmp_path, range(1, 31), 1.0)  # one tensor: its last step is 30
    first.alert(replace(AT_RISK, first_step=5, last_step=28), Change.BEGIN)
    first.close(INFO, Summary())
    session(tmp_path, range(21, 25), 2.0).close(INFO, Summary())
    accumulator = EventAccumulator(str(tmp_path), size_guidance={"tensors": 0})
    accumulator.Reload()
    kept = [tag for tag in accumulator.Tags()["tensors"] if tag.startswith("nfi-tab/")]
    kinds = [tag.split("/")[1] for tag in kept if accumulator.Tensors(tag)]
    assert sorted(kinds) == ["alerts", "readings", "readings", "run", "run"]
