"""Many processes: real DDP, FSDP2, HSDP and tensor parallel trainings over gloo, and what goes wrong in them.

All cases of a speed are run by one launch (:mod:`tests.distributed.launch`); tests look at what they left.
"""

from __future__ import annotations

import math
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nfi_monitor.native import library
from nfi_monitor.ranks.exchange import LAG
from tests.compatibility import Recorder
from tests.runs import differences
from tests.safety.faults import judged

ROOT = Path(__file__).resolve().parents[2]
RESUMED = 480  # of tests.distributed.cases, which only its own processes import
FAST = {
    "accumulated": 1, "ddp_slingshot": 2, "ddp": 2, "fsdp": 2, "fsdp1": 2, "tensor_parallel": 2,
    "vocabulary_parallel": 2, "vocabulary_parallel_4": 4, "vocabulary_local": 2, "vocabulary_accumulated": 2,
    "one_head": 1, "vocabulary_slingshot": 2, "closed_and_opened": 2, "rank_0_only": 2, "disagreed": 2,
    "closed_on_rank_1": 2, "exception_on_rank_1": 2, "broken_on_rank_1": 2, "dies": 2, "dies_in_step": 2,
    "skips_a_step": 2, "uneven": 2, "joined": 2, "several": 2, "sweep": 2, "given_group": 2, "late": 2,
    "faults.some": 2, "ended": 2, "wrapped_later": 2, "head_by_output": 2,
}  # fmt: skip
SLOW = {
    "hsdp": 4, "accumulated_whole": 1, "ddp_slingshot_whole": 2, "ddp_slingshot_4": 4, "fsdp_slingshot": 2,
    "fsdp_vocabulary_parallel": 4, "one_head": 1,
    "vocabulary_slingshot_whole": 2,
}  # fmt: skip

Outcome = list[Any]
"""What a case returned, by rank; None for a rank that was killed."""


def launched(
    folder: Path, cases: dict[str, int], timeout: float = 900.0, *, native: bool = True
) -> Callable[[str], Outcome]:
    """``native``: the C library may measure. It sums in another order than several ranks together."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment |= {} if native else {library.SWITCH: "0"}
    wanted = [f"{name}:{world}" for name, world in cases.items()]
    done = subprocess.run(
        [sys.executable, "-m", "tests.distributed.launch", str(folder), *wanted],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        encoding="utf-8",
        timeout=timeout,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"

    def outcome(case: str) -> Outcome:
        results = []
        for rank in range(cases[case]):
            file = folder / f"{case}.{rank}"
            result = pickle.loads(file.read_bytes()) if file.exists() else None
            assert not isinstance(result, BaseException), f"{case}, rank {rank}: {result!r}\n{done.stderr}"
            results.append(result)
        return results

    return outcome


@pytest.fixture(scope="module")
def fast(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Outcome]:
    return launched(tmp_path_factory.mktemp("fast"), FAST, native=False)


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Outcome]:
    return launched(tmp_path_factory.mktemp("slow"), SLOW, native=False)


def column(outcome: dict[str, Any], name: str) -> dict[int, float]:
    """Step → value of one quantity that a rank's monitor recorded."""
    return dict(zip(*outcome["seen"]["history"].get(name, [[], []]), strict=True))


# --- the numbers --------------------------------------------------------------------------------------


def test_two_processes_say_what_one_says_of_the_same_data_to_the_last_bit(
    fast: Callable[[str], Outcome],
) -> None:
    """One process that makes two micro-batches of the two ranks' rows trains the same run, bit for bit."""
    (one,), (two, _) = fast("accumulated"), fast("ddp_slingshot")
    assert differences(one["state"], two["state"]) == [], "not the same run: nothing to compare"
    kinds = {alert["kind"] for alert in one["seen"]["alerts"]}
    assert {"at_risk", "imminent", "slingshot"} <= kinds, "the run has to have something to say"
    assert two["seen"]["alerts"] == one["seen"]["alerts"]
    assert two["seen"]["phases"] == one["seen"]["phases"]
    assert two["seen"]["history"].keys() == one["seen"]["history"].keys()
    for name in two["seen"]["history"]:
        got = column(two, name)
        expected = {step: value for step, value in column(one, name).items() if step > RESUMED}
        assert got == {step: expected[step] for step in got}, name
        assert len(expected) - len(got) <= 1, f"{name}: the first compares with a step before"


AGREEING = (
    "ddp_slingshot", "ddp", "fsdp", "tensor_parallel", "vocabulary_parallel", "vocabulary_parallel_4",
    "vocabulary_accumulated", "vocabulary_slingshot",
)  # fmt: skip


@pytest.mark.parametrize("case", AGREEING)
def test_all_ranks_agree_bit_for_bit(case: str, fast: Callable[[str], Outcome]) -> None:
    first, *others = fast(case)
    assert len(first["seen"]["history"]) > 10
    for other in others:
        for what in ("alerts", "phases", "history", "step"):
            assert other["seen"][what] == first["seen"][what], what


MODES = {
    "ddp": "DistributedDataParallel, 2 processes",
    "fsdp": "FSDP2 (fully_shard), 2 processes",
    "fsdp1": "FSDP (FullyShardedDataParallel), 2 processes",
    "tensor_parallel": "tensor parallel, logits gathered, 2 processes",
    "vocabulary_parallel": "tensor parallel, logits cut along the classes, 2 processes",
    "vocabulary_parallel_4": "tensor parallel, logits cut along the classes, 4 processes",
}


@pytest.mark.parametrize("case", MODES)
def test_training_is_bitwise_equal_with_and_without_the_monitor_on_every_rank(
    case: str, fast: Callable[[str], Outcome], compatibility: Recorder
) -> None:
    for rank in fast(case):
        assert rank["differences"] == []
        assert [code for code in rank["seen"]["notes"] if code.startswith(("failed", "ranks_apart"))] == []
    history = dict(fast(case)[0]["seen"]["history"])
    history.pop("loss")  # these loops call observe_loss themselves
    compatibility("PyTorch", MODES[case], history)


EXACT = (
    "gradient_norm", "update_rms", "weight_norm", "relative_update", "predicted_reduction", "rms_t_max",
    "rms_t_head",
    "sqrt_exp_avg_sq_mean", "head_sqrt_exp_avg_sq_mean", "head_weight_norm", "classifier_mean_norm",
    "feature_mean_norm", "mean_alignment", "loss", "head_loss", "residual_mass", "live_fraction",
    "gradient_alignment", "secant_curvature", "learning_rate", "margin_min",
)  # fmt: skip
"""What shards give exactly; medians and the displacements are near what one process measures."""


def assert_measured_alike(sharded: dict[str, Any], ddp: dict[str, Any], names: tuple[str, ...]) -> None:
    for name in names:
        expected, got = column(ddp, name), column(sharded, name)
        assert got.keys() == expected.keys() and expected, name
        for step in expected:
            assert math.isclose(got[step], expected[step], rel_tol=5e-4, abs_tol=1e-5), (name, step)
        if name != "secant_curvature":  # before the two trainings' own rounding parts them
            for step in range(1, 4):
                assert math.isclose(
                    got.get(step, 0.0), expected.get(step, 0.0), rel_tol=5e-6, abs_tol=1e-7
                ), (name, step)


@pytest.mark.parametrize("case", ["fsdp", "tensor_parallel", "vocabulary_parallel"])
def test_shards_add_up_to_what_whole_tensors_show(case: str, fast: Callable[[str], Outcome]) -> None:
    sharded, ddp = fast(case)[0], fast("ddp")[0]
    assert_measured_alike(sharded, ddp, EXACT)
    for name, factor in (("logit_displacement", 1.5), ("sqrt_exp_avg_sq_median", 1.3)):
        expected, got = column(ddp, name), column(sharded, name)
        late = [step for step in got if step > 10]
        assert len(late) == 10, name
        assert all(expected[step] / factor < got[step] < expected[step] * factor for step in late), name


def test_the_flat_pieces_of_the_older_fsdp_add_up_too(fast: Callable[[str], Outcome]) -> None:
    names = ("gradient_norm", "update_rms", "weight_norm", "rms_t_max", "sqrt_exp_avg_sq_mean", "head_loss")
    assert_measured_alike(fast("fsdp1")[0], fast("ddp")[0], names)
    assert fast("fsdp1")[0]["seen"]["notes"].keys() == {"head_without_weight"}


ROWS = (
    "live_fraction", "ignored_fraction", "non_finite_rows", "absorbed_fraction", "underflowed_fraction",
    "head_loss", "residual_mass", "max_probability", "mean_logit", "margin_min", "soft_target_fraction",
    "unexplained_violation_fraction", "partially_absorbed_fraction",
)  # fmt: skip


@pytest.mark.parametrize("case", ["vocabulary_parallel", "vocabulary_parallel_4", "vocabulary_local"])
def test_rows_cut_along_the_classes_are_put_together(case: str, fast: Callable[[str], Outcome]) -> None:
    """Against data parallel ranks with the same rows and whole logits; their products round differently."""
    cut, ddp = fast(case)[0], fast("ddp")[0]
    assert cut["seen"]["notes"] == {}
    for name in (*ROWS, "feature_mean_norm", "mean_alignment", "classifier_mean_norm", "gradient_norm"):
        expected, got = column(ddp, name), column(cut, name)
        assert set(got) >= {1, 2, 3, 4}, name
        for step in range(1, 5):
            assert math.isclose(got[step], expected[step], rel_tol=5e-6, abs_tol=1e-6), (name, step)
    for name in ("zero_sum_violation", "zero_sum_violation_max"):
        # One shard's would be near 1.
        assert len(column(cut, name)) >= 4 and max(column(cut, name).values()) < 1e-5, name


TOLD = ("id", "kind", "severity", "state", "phase", "first_step", "last_step", "mechanism", "advice")


def tolerance_of(name: str) -> float:
    """W·Δμ_G is taken in the weight's own float32, whose rounding differs where the head is cut."""
    return 1e-5 if name == "feature_displacement" else 1e-6


def assert_told_alike(cut: dict[str, Any], one: dict[str, Any]) -> None:
    """What the ranks that share a head said, and what one process said of the same steps."""
    assert differences(one["state"], cut["state"]) == [], "not the same run: nothing to compare"
    assert {"at_risk", "imminent", "slingshot"} <= {alert["kind"] for alert in one["seen"]["alerts"]}
    assert len(cut["seen"]["alerts"]) == len(one["seen"]["alerts"])
    for got, expected in zip(cut["seen"]["alerts"], one["seen"]["alerts"], strict=True):
        for key in (
            "id",
            "kind",
            "severity",
            "state",
            "phase",
            "first_step",
            "last_step",
            "mechanism",
            "advice",
        ):
            assert got[key] == expected[key], (expected["id"], key)
        for name, item in expected["evidence"].items():
            value, tolerance = got["evidence"][name]["value"], tolerance_of(name)
            # A cosine of gradients is a sum of float32 products that cancel, in another order on each rank.
            least = 1e-4 if "alignment" in name else 1e-9
            close = math.isclose(value, item["value"], rel_tol=tolerance, abs_tol=least)
            assert close or name in MEDIANS, (expected["id"], name, value, item["value"])
    assert cut["seen"]["phases"] == one["seen"]["phases"]
    assert cut["absorbing"] == one["absorbing"]
    for name in one["seen"]["history"]:
        expected, got = column(one, name), column(cut, name)
        first = min(got)
        assert got.keys() == {step for step in expected if step >= first}, name
        for step, value in got.items():
            if name not in (*MEDIANS, *AT_FLOOR):
                tolerance = tolerance_of(name)
                assert math.isclose(value, expected[step], rel_tol=tolerance, abs_tol=1e-6), (name, step)


AT_FLOOR = ("zero_sum_violation_share", "partially_absorbed_fraction")
"""Count rows above the rounding floor: for those at the floor, the order of a sum decides."""
MEDIANS = (
    "sqrt_exp_avg_sq_median", "head_sqrt_exp_avg_sq_median", "effective_learning_rate", "second_moment_decay",
)  # fmt: skip
"""Averages of the ranks' medians, and what is made of them."""


def test_ranks_that_share_a_head_say_what_one_process_says_up_to_a_slingshot(
    fast: Callable[[str], Outcome],
) -> None:
    assert_told_alike(fast("vocabulary_slingshot")[0], fast("one_head")[0])


def test_plain_logits_of_some_classes_are_no_rows_of_their_own(fast: Callable[[str], Outcome]) -> None:
    """A monitor that is told to watch this process alone sees half of each row: none."""
    alone = fast("vocabulary_local")[0]["alone"]
    assert alone["differences"] == fast("vocabulary_local")[0]["differences"] == []
    assert "vocabulary-parallel head" in alone["seen"]["notes"]["head_never_fired"]
    assert not column(alone, "zero_sum_violation") and not column(alone, "live_fraction")


def test_micro_batches_ignored_rows_and_a_resume_under_a_shared_head(fast: Callable[[str], Outcome]) -> None:
    for rank in fast("vocabulary_accumulated"):
        assert rank["seen"]["notes"] == {}
        assert column(rank, "ignored_fraction") == dict.fromkeys((4, 5, 6), 4 / 78)
        assert max(column(rank, "zero_sum_violation").values()) < 0.01
        (eps, _, _, scale), (eps_later, _, _, scale_later) = rank["kinds"]
        assert eps == eps_later == 2.0**-7, "logits are bfloat16"
        assert scale_later >= scale > 0, "what was learned of the loss goes on"


def test_a_monitor_closed_and_another_opened_at_the_same_step_do_not_meet(
    fast: Callable[[str], Outcome],
) -> None:
    """What the first still owes the others is sent from hooks beside the second's."""
    for rank in fast("closed_and_opened"):
        assert "ranks_apart" not in rank["second"]["notes"]
        assert list(column({"seen": rank["second"]}, "live_fraction")) == list(range(1, 7))
        assert rank["hooks"] == [0, 0]


def test_a_short_batch_and_one_without_rows_that_count_are_added_as_they_are(
    fast: Callable[[str], Outcome],
) -> None:
    for rank in fast("uneven"):
        assert rank["seen"]["notes"] == {}
        assert column(rank, "live_fraction") == {1: 1.0, 2: 1.0, 3: 1.0, 4: 1.0, 5: 0.5}
        assert column(rank, "ignored_fraction")[5] == 0.5
        assert column(rank, "weight_norm").keys() == {1, 2, 3, 4, 5}
    assert [rank["rows"] for rank in fast("uneven")] == [38, 5]


def test_a_hand_made_data_parallel_run_and_a_bare_model_inside_ddp_are_read_together(
    fast: Callable[[str], Outcome],
) -> None:
    for rank in fast("given_group"):
        for seen in (rank["seen"], rank["other"]):
            assert "ranks_apart" not in seen["notes"]
            assert seen["history"]["live_fraction"][0] == [1, 2, 3]
    one, two = fast("given_group")
    assert one["seen"]["history"] == two["seen"]["history"]
    assert one["other"]["history"] == two["other"]["history"]


def test_monitors_attached_in_another_order_find_their_own(fast: Callable[[str], Outcome]) -> None:
    one, two = fast("several")
    assert one["seen"]["history"] == two["seen"]["history"]
    assert one["other"]["history"] == two["other"]["history"]
    assert one["seen"]["history"]["weight_norm"] != one["other"]["history"]["weight_norm"]
    assert one["seen"]["notes"] == one["other"]["notes"] == {}


def test_runs_that_were_only_started_together_stay_apart(fast: Callable[[str], Outcome]) -> None:
    for index, rank in enumerate(fast("sweep")):
        for mode in ("found", "false", "itself"):
            assert [*rank[mode]["seen"]["notes"]] == ["ranks_apart"] * (mode == "found")
            assert rank[mode]["seen"]["step"] == 3 + index
            assert rank[mode]["acts"] == (mode == "itself"), "what else trains with it nobody knows"
        for mode in ("false", "itself"):
            assert "watching" in rank[mode]["said"], "a run of its own reports itself"
    assert "watching" in fast("sweep")[0]["found"]["said"]
    assert fast("sweep")[1]["found"]["said"] == "", "nothing is known of it: rank 0 alone speaks"


@pytest.mark.parametrize("mode", ["now", "late"])
def test_the_last_losses_of_a_run_are_judged_when_all_ranks_close(
    mode: str, fast: Callable[[str], Outcome]
) -> None:
    one, two = (rank[mode] for rank in fast("ended"))
    assert one["history"]["loss"] == two["history"]["loss"]
    assert one["history"]["loss"][0] == list(range(1, 41))
    assert one["history"]["live_fraction"][0] == [1, 16, 32]
    assert one["notes"] == two["notes"] == {} and one["alerts"] == two["alerts"]
    assert max(one["seconds"], two["seconds"]) < 5 and one["hooks"] == two["hooks"] == 0


def test_ranks_are_found_where_ddp_wraps_later_and_the_head_is_never_called(
    fast: Callable[[str], Outcome],
) -> None:
    one, two = fast("wrapped_later")
    assert one["seen"]["history"]["loss"] == two["seen"]["history"]["loss"]
    assert "ranks_apart" not in one["seen"]["notes"] and one["acts"] and two["acts"]
    assert one["hooks"] == 0, "the search is over after the first step"


def test_a_head_that_the_first_output_shows_is_watched_on_all_ranks_together(
    fast: Callable[[str], Outcome],
) -> None:
    one, two = fast("head_by_output")
    for name in ("named", "found", "found, wrapped later"):
        for rank in (one, two):
            assert rank[name]["head"] == "logits"
            assert not {"wrong_head", "ranks_apart"} & rank[name]["seen"]["notes"].keys()
        for quantity in ("head_loss", "zero_sum_violation", "feature_mean_norm", "rms_t_head"):
            first = column(one[name], quantity)
            assert first == column(two[name], quantity), (name, quantity)
            expected = column(one["named"], quantity)
            assert {2, 3, 4, 5, 6} <= first.keys()  # the head ran before the first output showed it
            assert all(first[step] == expected[step] for step in range(2, 7)), (name, quantity)
    assert "head_by_output" in one["found"]["seen"]["notes"]


# --- what may go wrong ----------------------------------------------------------------------------------


def test_a_monitor_on_rank_0_alone_waits_once_and_reads_its_own_rows(fast: Callable[[str], Outcome]) -> None:
    one, two = fast("rank_0_only")
    assert "only 1 of 2 had attached a monitor" in one["seen"]["notes"]["ranks_apart"]
    assert "pass group=False, and no rank waits" in one["seen"]["notes"]["ranks_apart"]
    assert list(column(one, "live_fraction")) == list(range(1, 21))
    assert max(one["seconds"], two["seconds"]) < 20


def test_monitors_after_ranks_have_disagreed_are_read_together_at_once(
    fast: Callable[[str], Outcome],
) -> None:
    one, two = fast("disagreed")
    for rank in (one, two):
        for name in rank:
            seconds, codes = rank[name]
            apart = name in ("alone", "late", "other settings")
            assert ("ranks_apart" in codes) is apart, name
            assert seconds < (6 if name == "alone" else 2.8), name
    assert one["alone"][0] >= 3, "nobody says that no monitor is on rank 1"
    assert two["late"][0] < 1


def test_a_rank_that_is_read_alone_acts_on_no_alert_of_its_own(fast: Callable[[str], Outcome]) -> None:
    one, two = fast("rank_0_only")
    assert (one["due"].save, one["due"].stop, one["actions"]) == (False, False, [])
    assert "several processes run that are not read together" in one["seen"]["notes"]["no_action"]
    assert differences(one["state"], two["state"]) == []


def test_what_all_ranks_have_done_together_none_takes_back_or_adds_to_alone(
    fast: Callable[[str], Outcome],
) -> None:
    stayed, left = fast("closed_on_rank_1")
    assert stayed["actions"] == left["actions"] == ["cool"], "neither a release nor a stop"
    assert not stayed["stops"] and "no_action" in stayed["seen"]["notes"]
    assert differences(stayed["state"], left["state"]) == []


def test_a_rank_that_closes_its_monitor_tells_the_others_and_trains_on(
    fast: Callable[[str], Outcome],
) -> None:
    stayed, left = fast("closed_on_rank_1")
    assert "the monitor of rank 1 was closed" in stayed["seen"]["notes"]["ranks_apart"]
    assert list(column(stayed, "loss")) == list(range(1, 31))
    assert list(column(left, "loss")) == list(range(1, 11)), "a closed monitor stays as it was"
    assert left["hooks"] == 1 and left["seconds"] < 20, "the Autopilot's stays, empty"
    assert differences(stayed["state"]["model"], left["state"]["model"]) == []


def test_an_exception_that_leaves_the_with_block_on_one_rank_holds_nobody(
    fast: Callable[[str], Outcome],
) -> None:
    stayed, left = fast("exception_on_rank_1")
    assert "the monitor of rank 1 was closed" in stayed["seen"]["notes"]["ranks_apart"]
    assert stayed["seen"]["step"] == 20 and left["seen"]["step"] == 10
    assert differences(stayed["state"]["model"], left["state"]["model"]) == []


def test_a_fault_in_one_function_of_fifty_on_one_rank_or_all_harms_none(
    fast: Callable[[str], Outcome],
) -> None:
    """All functions, in all modes: ``tests/safety/test_faults.py``."""
    assert judged(*fast("faults.some")) >= 4


def test_a_monitor_that_breaks_on_one_rank_still_takes_part_and_rank_0_says_so(
    fast: Callable[[str], Outcome],
) -> None:
    one, two = fast("broken_on_rank_1")
    assert one["seen"]["history"] == two["seen"]["history"]
    assert list(column(one, "live_fraction")) == list(column(one, "weight_norm")) == list(range(1, 16))
    assert one["seen"]["notes"].keys() == {"failed_rank"}
    assert "failed on rank 1" in one["seen"]["notes"]["failed_rank"]
    assert "broken on purpose" in two["seen"]["notes"]["failed_rows"]
    assert differences(one["state"], two["state"]) == []


def test_when_a_rank_dies_the_others_hear_torchs_own_error(fast: Callable[[str], Outcome]) -> None:
    survivor, dead = fast("dies")
    assert dead is None
    assert survivor["error"] and survivor["seconds"] < 20
    assert list(column(survivor, "loss"))[:10] == list(range(1, 11))


def test_a_rank_that_dies_inside_the_optimizer_step_stops_only_the_reading(
    fast: Callable[[str], Outcome],
) -> None:
    survivor, dead = fast("dies_in_step")
    assert dead is None
    assert "one of the other ranks is gone or late" in survivor["seen"]["notes"]["ranks_apart"]
    assert survivor["seen"]["step"] == 11 and survivor["seconds"] < 20


def test_a_step_that_one_rank_leaves_out_costs_a_bounded_wait(fast: Callable[[str], Outcome]) -> None:
    one, two = fast("skips_a_step")
    assert "ranks_apart" in one["seen"]["notes"] and "ranks_apart" in two["seen"]["notes"]
    assert (one["seen"]["step"], two["seen"]["step"]) == (11, 10), "both trained to the end"


def test_under_ddps_join_each_rank_is_read_alone_and_training_is_the_same(
    fast: Callable[[str], Outcome],
) -> None:
    for rank in fast("joined"):
        assert rank["differences"] == []
        assert "DDP's join()" in rank["seen"]["notes"]["ranks_apart"]
    assert [rank["seen"]["step"] for rank in fast("joined")] == [16, 14]


def test_numbers_that_arrive_late_are_taken_up_at_the_same_step_everywhere(
    fast: Callable[[str], Outcome],
) -> None:
    one, two = fast("late")
    assert one["before"]["history"] == two["before"]["history"]
    assert one["before"]["history"]["live_fraction"][0][-1] <= 30 - LAG - 1
    for name in ("feature_mean_norm", "mean_alignment", "logit_displacement", "rms_t_max", "loss"):
        assert len(one["before"]["history"][name][0]) > 8, name
    # Known Δμ_G comes with the exchange before: the displacement by it is of some steps ago.
    expected, got = column(fast("ddp")[0], "feature_displacement"), column(one, "feature_displacement")
    assert math.isclose(got[8], expected[8 - LAG - 2], rel_tol=0.1)
    assert "the monitor of rank 1 was closed" in one["seen"]["notes"]["ranks_apart"]
    assert two["hooks"] == 0 and two["seconds"] < 20
    assert one["seen"]["step"] == 50 and max(column(one, "live_fraction")) > 45


# --- slower --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_hsdp_on_four_ranks_measures_and_trains_alike(
    slow: Callable[[str], Outcome], fast: Callable[[str], Outcome], compatibility: Recorder
) -> None:
    ranks = slow("hsdp")
    assert all(rank["differences"] == [] for rank in ranks)
    assert all(rank["seen"]["history"] == ranks[0]["seen"]["history"] for rank in ranks)
    assert_measured_alike(ranks[0], fast("ddp")[0], EXACT)
    history = dict(ranks[0]["seen"]["history"])
    history.pop("loss")
    compatibility("PyTorch", "HSDP (fully_shard on a 2-D mesh), 4 processes", history)


@pytest.mark.slow
def test_replicas_of_ranks_that_share_a_head_measure_alike(
    slow: Callable[[str], Outcome], fast: Callable[[str], Outcome], compatibility: Recorder
) -> None:
    ranks, ddp = slow("fsdp_vocabulary_parallel"), fast("ddp")[0]
    assert all(rank["differences"] == [] and rank["seen"]["notes"] == {} for rank in ranks)
    assert all(rank["seen"]["history"] == ranks[0]["seen"]["history"] for rank in ranks)
    for name in ROWS:
        expected, got = column(ddp, name), column(ranks[0], name)
        assert all(math.isclose(got[s], expected[s], rel_tol=5e-6, abs_tol=1e-6) for s in range(1, 5)), name
    # As many medians over as many rows as data parallel ranks take.
    assert math.isclose(column(ranks[0], "margin_median")[1], column(ddp, "margin_median")[1], rel_tol=1e-5)
    history = dict(ranks[0]["seen"]["history"])
    history.pop("loss")
    compatibility("PyTorch", "FSDP2 with tensor parallel, logits cut along the classes, 4 processes", history)


@pytest.mark.slow
def test_a_whole_run_of_two_processes_is_that_of_one_to_the_last_bit(slow: Callable[[str], Outcome]) -> None:
    (one,), ranks = slow("accumulated_whole"), slow("ddp_slingshot_whole")
    assert differences(one["state"], ranks[0]["state"]) == [], "not the same run: nothing to compare"
    assert all(rank["seen"] == one["seen"] for rank in ranks)


@pytest.mark.slow
def test_a_whole_run_under_a_shared_head_is_told_as_one_process_tells_it(
    slow: Callable[[str], Outcome],
) -> None:
    assert_told_alike(slow("vocabulary_slingshot_whole")[0], slow("one_head")[0])


@pytest.mark.slow
@pytest.mark.parametrize("case", ["ddp_slingshot_4", "fsdp_slingshot"])
def test_a_slingshot_is_warned_of_on_four_ranks_and_on_shards(
    case: str, slow: Callable[[str], Outcome]
) -> None:
    ranks = slow(case)
    assert all(rank["seen"]["alerts"] == ranks[0]["seen"]["alerts"] for rank in ranks)
    first = {alert["kind"]: alert for alert in reversed(ranks[0]["seen"]["alerts"])}
    assert first["at_risk"]["first_step"] < first["imminent"]["first_step"] < first["slingshot"]["first_step"]
    assert first["slingshot"]["mechanism"] == "numerical_feature_inflation"
