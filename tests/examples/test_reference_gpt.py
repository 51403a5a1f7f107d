"""The GPT study: text and its order, the model against independent computations, pairing, judgements."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from examples.reference import gpt, gpt_claims
from examples.reference.gpt_model import GPT, SwiGLU, rotate
from examples.reference.judge import NotTested, Verdict
from examples.reference.results import Result, Results, StudyError
from examples.reference.text_data import (
    END,
    Excerpt,
    TokenStream,
    byte_pair_encoding,
    excerpt,
    fineweb,
    python_reference,
)
from examples.reference.tokens import Tally
from examples.reference.training import run_one

pytest.importorskip("tokenizers")

SMALL = {
    "tokens": 128,
    "vocabulary": 300,
    "length": 16,
    "rows": 4,
    "micro": 4,
    "width": 16,
    "layers": 1,
    "heads": 2,
}
QUICK = gpt.STUDY.preset("quick")


def short(arm: str, tmp_path: Path, steps: int = 4, **changes: Any) -> Result:
    preset = QUICK.changed(
        {"gpt": SMALL | {"measure_every": 2} | changes, "trainer": SMALL | {"steps": steps} | changes}
    )
    return run_one(
        gpt.STUDY, preset, arm, 0, results=tmp_path / "results", runs=tmp_path / "runs", steps=steps
    )


# --- text -------------------------------------------------------------------------------------------------


def test_the_encoding_has_the_size_asked_for_decodes_to_the_text_and_repeats_itself() -> None:
    text = python_reference()[:20_000]
    one, two = byte_pair_encoding(text, 400), byte_pair_encoding(text, 400)
    assert one.get_vocab_size() == 400
    assert one.decode(one.encode(text).ids) == text
    assert one.get_vocab() == two.get_vocab()


def test_a_text_too_short_for_the_vocabulary_or_the_excerpt_is_refused() -> None:
    with pytest.raises(StudyError, match="a vocabulary of 400 was asked for, this text gives 257"):
        byte_pair_encoding("a", 400)
    with pytest.raises(StudyError, match=r"10,000,000 tokens were asked for, Python's reference has"):
        excerpt(10_000_000, 300)
    with pytest.raises(StudyError, match="8 windows of 4 tokens need a longer text than 32 tokens"):
        Excerpt(torch.arange(32), rows=8, length=4, seed=0)


def test_an_epoch_reads_every_window_once_and_targets_are_the_next_tokens() -> None:
    data = Excerpt(torch.arange(33), rows=2, length=4, seed=0)
    batches = [data.batch(step) for step in range(1, 5)]
    assert all(torch.equal(y, x + 1) for x, y in batches)
    assert sorted(int(x[row, 0]) for x, _ in batches for row in range(2)) == list(range(0, 32, 4))
    next_epoch = [data.batch(step)[0] for step in range(5, 9)]
    assert not all(torch.equal(x, later) for (x, _), later in zip(batches, next_epoch, strict=True))
    assert torch.equal(data.batch(3)[0], batches[2][0])
    assert torch.equal(data.fixed()[0].flatten(), torch.arange(32))


class Documents:
    """What TokenStream needs of ``datasets.IterableDataset``: resumable iteration over rows with a text."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.texts, self.place = texts, 0

    def __iter__(self) -> Any:
        while self.place < len(self.texts):
            self.place += 1
            yield {"text": self.texts[self.place - 1]}

    def state_dict(self) -> dict[str, int]:
        return {"place": self.place}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.place = state["place"]


@pytest.fixture(scope="module")
def encoding() -> Any:
    return byte_pair_encoding(python_reference()[:20_000], 300)


def documents() -> list[str]:
    return [f"document {number} " * (1 + number % 3) for number in range(12)]


def test_a_stream_is_the_documents_one_after_the_other_with_an_end_between(encoding: Any) -> None:
    expected = [
        token for text in documents() for token in [*encoding.encode(text).ids, encoding.token_to_id(END)]
    ]
    stream = TokenStream(Documents(documents()), encoding, rows=2, length=5)
    inputs, targets = zip(*(stream.batch(step) for step in range(4)), strict=True)
    assert torch.cat([x.flatten() for x in inputs]).tolist() == expected[:40]
    assert torch.cat([y.flatten() for y in targets]).tolist() == expected[1:41]


def test_a_stream_goes_on_where_it_was_and_says_when_it_is_used_up(encoding: Any) -> None:
    whole = TokenStream(Documents(documents()), encoding, rows=2, length=5)
    before = [whole.batch(step) for step in range(3)]
    state = whole.state_dict()
    after = whole.batch(3)
    resumed = TokenStream(Documents(documents()), encoding, rows=2, length=5)
    assert torch.equal(resumed.fixed()[0], before[0][0])  # what build draws before the state is loaded
    resumed.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(resumed.batch(3), after, strict=True))
    with pytest.raises(StudyError, match="the text is used up at step"):
        for step in range(4, 1000):
            resumed.batch(step)


@pytest.fixture
def local_fineweb(tmp_path: Path, encoding: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "fineweb"
    folder.mkdir()
    rows = {"text": documents(), "id": list(range(len(documents())))}
    datasets.Dataset.from_dict(rows).to_parquet(folder / "000.parquet")
    encoding.save(str(folder / "tokenizer.json"))
    return folder


def test_local_parquet_files_are_streamed_and_resumed_in_the_middle(
    local_fineweb: Path, encoding: Any
) -> None:
    stream = fineweb(rows=2, length=5, data_dir=str(local_fineweb))
    expected = [
        token for text in documents() for token in [*encoding.encode(text).ids, encoding.token_to_id(END)]
    ]
    assert stream.fixed()[0].flatten().tolist() == expected[:10]
    stream.batch(1)
    state = stream.state_dict()
    after = stream.batch(2)
    resumed = fineweb(rows=2, length=5, data_dir=str(local_fineweb))
    resumed.fixed()
    resumed.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(resumed.batch(2), after, strict=True))


def test_a_resumed_run_on_a_stream_ends_in_the_same_bits(local_fineweb: Path, tmp_path: Path) -> None:
    changes = {"data": "fineweb", "data_dir": str(local_fineweb), "rows": 2, "length": 2, "micro": 1}
    preset = QUICK.changed({"gpt": SMALL | {"measure_every": 5} | changes}, checkpoint_every=5)

    class Stop(Exception):
        pass

    losses, results = [], []
    for name, stop_at in (("whole", 0), ("broken", 8)):
        where = {"results": tmp_path / name, "runs": tmp_path / name / "runs"}
        if stop_at:
            build = gpt.build

            def interrupted(*args: Any, build: Any = build, stop_at: int = stop_at) -> Any:
                training = build(*args)
                step = training.step

                def stopping(number: int, monitor: Any) -> Any:
                    if number == stop_at:
                        raise Stop
                    return step(number, monitor)

                training.step = stopping
                return training

            with pytest.raises(Stop):
                run_one(replace(gpt.STUDY, build=interrupted), preset, "float32-loss", 0, steps=12, **where)
        results.append(run_one(gpt.STUDY, preset, "float32-loss", 0, steps=12, **where))
        losses.append(results[-1].series["loss"][1])
    assert np.array_equal(*losses)
    assert results[0].values == results[1].values


def test_fineweb_without_files_or_network_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    import huggingface_hub.constants

    with pytest.raises(StudyError, match=r"expected parquet files and a tokenizer.json in"):
        fineweb(rows=1, length=4, data_dir=str(tmp_path))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(StudyError) as stopped:
        fineweb(rows=1, length=4)
    assert "no FineWeb without a network" in str(stopped.value) and "--data python" in str(stopped.value)
    assert "\n" not in str(stopped.value)


# --- model ------------------------------------------------------------------------------------------------


def test_rotation_is_multiplication_by_a_complex_number_of_the_position() -> None:
    x = torch.randn(2, 3, 7, 8, dtype=torch.float64)
    pairs = torch.complex(*x.chunk(2, dim=-1))
    angle = torch.arange(7)[:, None] * 10_000.0 ** (-torch.arange(0, 8, 2) / 8)
    turned = pairs * torch.polar(torch.ones_like(angle), angle).to(pairs.dtype)
    expected = torch.cat([turned.real, turned.imag], dim=-1)
    torch.testing.assert_close(rotate(x), expected, rtol=1e-5, atol=1e-5)


def test_scores_of_rotated_queries_and_keys_depend_on_their_distance_alone() -> None:
    q, k = torch.randn(8), torch.randn(8)
    scores = rotate(q.expand(1, 1, 9, 8))[0, 0] @ rotate(k.expand(1, 1, 9, 8))[0, 0].T
    for distance in range(-8, 9):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-4, atol=1e-5)


def test_the_model_is_causal_has_no_bias_and_an_untied_head() -> None:
    model = GPT(50, width=16, layers=2, heads=2)
    tokens = torch.randint(0, 50, (2, 9))
    changed = tokens.clone()
    changed[:, 6] = (tokens[:, 6] + 1) % 50
    before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :6], after[:, :6]) and not torch.equal(before[:, 6:], after[:, 6:])
    assert not any(name.endswith("bias") for name, _ in model.named_parameters())
    assert model.head.weight is not model.tokens.weight
    torch.testing.assert_close(model(tokens), F.linear(model.features(tokens), model.head.weight))


def test_the_feed_forward_is_as_large_as_four_times_the_width_without_a_gate() -> None:
    count = sum(parameter.numel() for parameter in SwiGLU(640).parameters())
    assert count == pytest.approx(8 * 640**2, rel=1e-3)


def test_the_paper_s_model_has_the_size_it_is_said_to_have() -> None:
    config = gpt.STUDY.preset("paper").configs["gpt"]
    with torch.device("meta"):
        model = GPT(
            config["vocabulary"], width=config["width"], layers=config["layers"], heads=config["heads"]
        )
    without_embedding = sum(p.numel() for p in model.parameters()) - model.tokens.weight.numel()
    assert without_embedding == pytest.approx(109e6, rel=0.03)
    assert config["rows"] * config["length"] == 131_072


def test_the_learning_rate_warms_up_and_falls_along_half_a_cosine() -> None:
    config = {"lr": 2.0, "lr_end": 0.2, "warm_up": 10, "steps": 110}
    factor = [gpt.learning_rate(done, config) for done in range(120)]
    assert factor[0] == pytest.approx(0.1) and factor[9] == 1.0 and factor[10] == 1.0
    assert factor[60] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 2)))
    assert factor[110] == pytest.approx(0.1) and factor[119] == pytest.approx(0.1)


# --- counting ---------------------------------------------------------------------------------------------


def test_a_tally_counts_zeros_by_target_and_ranks_them() -> None:
    tally = Tally(4, torch.device("cpu"))
    tally.add(torch.tensor([[0, 1], [1, 2]]), torch.tensor([0.0, 0.0, 0.5, 1e-45]))
    tally.add(torch.tensor([1] * 40), torch.zeros(40))
    tally.add(torch.tensor([0] * 19), torch.zeros(19))
    found = tally.summary(lambda token: "abcd"[token])
    assert (found["tokens_seen"], found["zero_loss_seen"]) == (63, 61)
    assert (found["kinds_seen"], found["kinds_at_zero"]) == (3, 2)
    assert found["most_in_total"] == [["b", 41, 42], ["a", 20, 20]]
    assert found["most_per_occurrence"] == [["a", 20, 20], ["b", 41, 42]]
    assert found["rank_correlation"] is None  # of two tokens there is none
    copy = Tally(4, torch.device("cpu"))
    copy.load_state_dict(tally.state_dict())
    assert copy.summary(str) == tally.summary(str)
    tally.add(torch.tensor([3, 3, 3]), torch.tensor([0.0, 1.0, 1.0]))
    # Zeros 20, 41, 1 of 20, 42, 3: the same order.
    assert tally.summary(str)["rank_correlation"] == pytest.approx(1.0)


# --- pairing ------------------------------------------------------------------------------------------------


def test_arms_begin_alike_and_their_first_losses_differ_by_the_arm_alone(tmp_path: Path) -> None:
    names = [arm.name for arm in gpt.ARMS if arm.pair]
    runs = {name: short(name, tmp_path) for name in names}
    base = runs["float32-loss"]
    assert all(run.start == base.start and run.data == base.data for run in runs.values())
    losses = {name: run.series["loss"][1] for name, run in runs.items()}
    first = losses["float32-loss"][0]
    # What acts on the gradient or after the step leaves the first loss alone, to the last bit.
    assert losses["centred-head"][0] == first and losses["z-loss"][0] == first
    assert losses["float64-loss"][0] == pytest.approx(first, rel=1e-6)
    assert losses["exact-loss"][0] == pytest.approx(first, rel=1e-6)
    assert losses["bfloat16-loss"][0] == pytest.approx(first, rel=2**-8)
    for name in names[1:]:
        assert not np.array_equal(losses[name], losses["float32-loss"]), name
    # Subtracting the mean after the step is what the arm does, and all that it does.
    assert runs["centred-head"].values["classifier_mean"][-1] < 1e-8 < base.values["classifier_mean"][-1]


def test_a_run_repeats_itself_bit_for_bit_and_accumulates_to_the_same_gradient(tmp_path: Path) -> None:
    one, two = (short("float32-loss", tmp_path / name, autocast=False) for name in ("one", "two"))
    assert np.array_equal(one.series["loss"][1], two.series["loss"][1]) and one.values == two.values
    parts = short("float32-loss", tmp_path / "parts", autocast=False, micro=1)
    np.testing.assert_allclose(parts.series["loss"][1], one.series["loss"][1], rtol=1e-5)


def test_what_is_measured_is_what_an_independent_computation_in_float64_says(tmp_path: Path) -> None:
    """At step 0, from the model as ``build`` makes it."""
    config = {**QUICK.configs["gpt"], **SMALL, "autocast": False}
    torch.manual_seed(0)
    training = gpt.build(config, 0, torch.device("cpu"))
    with torch.no_grad():
        found = training.measure(0)
        model = training.model.double()
        inputs, _ = training.data
        features = model.features(inputs).flatten(0, 1)
        logits = features @ model.head.weight.T
        centre = model.head.weight.mean(0)
    assert found["mean_logit"] == pytest.approx(logits.mean().item(), abs=1e-6)
    assert found["log_partition"] == pytest.approx(logits.logsumexp(-1).mean().item(), rel=1e-6)
    assert found["classifier_mean"] == pytest.approx(centre.norm().item(), rel=1e-6)
    mean = features.mean(0)
    assert found["alignment"] == pytest.approx((centre @ mean / centre.norm() / mean.norm()).item(), rel=1e-4)
    assert found["zero_loss_tokens"] == 0.0


def test_the_trainer_s_arm_sees_the_head_and_changes_no_bit(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    run = short("trainer", tmp_path, steps=4)
    assert run.values["tensors"] > 20 and run.values["tensors_equal"] == run.values["tensors"]
    assert run.values["head"].startswith("lm_head")
    assert run.values["zero_sum_violation"] < 1e-5
    assert json.dumps(run.to_json())


# --- judgements ---------------------------------------------------------------------------------------------


def result(arm: str, *, zero: int = 0, **values: Any) -> Result:
    at = list(range(0, 1100, 100))
    measured = {
        "zero_loss_tokens": [0.0, float(zero)],
        "tokens_measured": 1000,
        "tokens_seen": 10_000,
        "zero_loss_seen": zero,
        "measured_at": at,
        "mean_logit": [0.001 * step for step in at],
        "log_partition": [20.0],
        "alignment": [0.5] * len(at),
        **values,
    }
    return Result(
        study="gpt", preset="quick", arm=arm, seed=0, pair="gpt", config={}, steps=1000, slingshots=[],
        episodes=[], alerts=[], loss_final=0.1, values=measured,
    )  # fmt: skip


def test_the_drift_is_the_slope_of_the_second_half_per_thousand_steps() -> None:
    straight = gpt_claims.drift(result("float32-loss"))
    assert (straight.value, straight.low, straight.high) == pytest.approx((1.0, 1.0, 1.0), abs=1e-6)
    early = [100.0] * 5 + [0.0] * 6
    assert gpt_claims.drift(result("float32-loss", mean_logit=early)).value == pytest.approx(0.0, abs=1e-9)
    with pytest.raises(NotTested):
        gpt_claims.drift(result("float32-loss", measured_at=[0, 1], mean_logit=[0.0, 1.0]))


def test_a_drift_s_interval_is_that_of_the_regression() -> None:
    from scipy.stats import linregress

    random = np.random.default_rng(0)
    at = np.arange(0, 1100, 100)
    noisy = (0.002 * at + random.normal(0, 0.1, len(at))).tolist()
    found = gpt_claims.drift(result("float32-loss", mean_logit=noisy))
    expected = linregress(at[5:] / 1000, noisy[5:])
    assert found.value == pytest.approx(expected.slope)
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * expected.stderr)
    assert gpt_claims.logits_rise(Results([result("float32-loss", mean_logit=noisy)])).verdict is (
        Verdict.AGREES if expected.slope > 1.96 * expected.stderr else Verdict.DISAGREES
    )


def test_a_mean_logit_that_sinks_without_absorption_too_is_no_proof() -> None:
    def sinking(arm: str, rate: float) -> Result:
        return result(arm, mean_logit=[-rate * step for step in range(0, 1100, 100)])

    fast = Results([sinking("bfloat16-loss", 0.02), sinking("float64-loss", 0.001)])
    assert gpt_claims.absorption_pulls_down(fast).verdict is Verdict.AGREES
    alike = Results([sinking("bfloat16-loss", 0.02), sinking("float64-loss", 0.02)])
    assert gpt_claims.absorption_pulls_down(alike).verdict is Verdict.DISAGREES


def test_float64_is_worse_only_if_it_drifts_up_and_faster() -> None:
    base = result("float32-loss")
    faster = result("float64-loss", mean_logit=[0.002 * step for step in range(0, 1100, 100)])
    assert gpt_claims.float64_worse(Results([base, faster])).verdict is Verdict.AGREES
    down = result("float64-loss", mean_logit=[-0.002 * step for step in range(0, 1100, 100)])
    assert gpt_claims.float64_worse(Results([base, down])).verdict is Verdict.DISAGREES


@pytest.mark.parametrize(("rate", "verdict"), [(0.0019, Verdict.AGREES), (0.0002, Verdict.DISAGREES)])
def test_a_drift_that_the_exact_loss_keeps_is_not_made_by_rounding(rate: float, verdict: Verdict) -> None:
    def rising(arm: str, rate: float) -> Result:
        return result(arm, mean_logit=[rate * step for step in range(0, 1100, 100)])

    both = Results([rising("float32-loss", 0.002), rising("exact-loss", rate)])
    assert gpt_claims.not_from_rounding(both).verdict is verdict


def test_zeros_are_compared_between_precisions_and_not_without_any() -> None:
    some, none = result("float32-loss", zero=20), result("float64-loss")
    assert gpt_claims.some_at_zero(Results([some])).verdict is Verdict.AGREES
    assert gpt_claims.none_at_zero("float64-loss")(Results([some, none])).verdict is Verdict.AGREES
    assert (
        gpt_claims.none_at_zero("float64-loss")(Results([some, result("float64-loss", zero=1)])).verdict
        is Verdict.DISAGREES
    )
    with pytest.raises(NotTested):
        gpt_claims.none_at_zero("float64-loss")(Results([result("float32-loss"), none]))
    many, few = result("bfloat16-loss", zero=300), result("bfloat16-loss", zero=25)
    assert gpt_claims.more_in_bfloat16(Results([some, many])).verdict is Verdict.AGREES
    assert gpt_claims.more_in_bfloat16(Results([some, few])).verdict is Verdict.DISAGREES


def test_an_arm_holds_a_quantity_by_its_size_not_its_sign() -> None:
    judge = gpt_claims.held_by("z-loss", "log_partition", "x", 0.5)
    base = result("float32-loss")
    assert judge(Results([base, result("z-loss", log_partition=[1.0])])).verdict is Verdict.AGREES
    assert judge(Results([base, result("z-loss", log_partition=[-19.0])])).verdict is Verdict.DISAGREES


def test_a_bit_that_differs_under_the_callback_is_a_disagreement() -> None:
    run = result("trainer", tensors=100, tensors_equal=99)
    found = gpt_claims.trainer_unchanged(Results([run]))
    assert found.verdict is Verdict.DISAGREES and found.ours.startswith("99 of 100")


def test_data_that_is_not_there_lists_what_is() -> None:
    config = {**QUICK.configs["gpt"], "data": "wikipedia"}
    with pytest.raises(StudyError, match="no data called 'wikipedia': use one of python, fineweb"):
        gpt.build(config, 0, torch.device("cpu"))
