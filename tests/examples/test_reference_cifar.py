"""The CIFAR study: its networks against what they should be, its pairing, and its judgements."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from examples.reference import cifar, cifar_claims
from examples.reference.judge import NotTested, Verdict
from examples.reference.results import Result, Results
from examples.reference.training import run_one
from examples.reference.vision_models import MODELS
from nfi_monitor import Monitor
from nfi_monitor.history import History

SMALL = {"rows": 16, "test_rows": 20, "measure_every": 2}
QUICK = cifar.STUDY.preset("quick")


def short(arm: str, tmp_path: Path, steps: int = 4, **changes: Any) -> Result:
    """The arm of the quick preset on a few rows, for a few steps."""
    preset = QUICK.changed({name: SMALL | changes for name in QUICK.configs})
    return run_one(
        cifar.STUDY, preset, arm, 0, results=tmp_path / "results", runs=tmp_path / "runs", steps=steps
    )


# --- networks ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        # Counted by hand from the layers' shapes; a VGG11's convolutions have 9,220,480 weights and biases.
        ("mlp", 3072 * 512 + 512 + 4 * (512 * 512 + 512) + 512 * 10 + 10),
        ("vgg11", 9_220_480 + 512 * 10 + 10),
        ("vgg11-bn-inside", 9_220_480 + 2 * 2752 + 512 * 10 + 10),
        ("vgg11-bn-before-head", 9_220_480 + 2 * 512 + 512 * 10 + 10),
        ("resnet18", 11_173_962),  # what this network has in every implementation for CIFAR-10
        ("vit", 48 * 256 + 256 + 64 * 256 + 12 * (12 * 256 * 256 + 13 * 256) + 512 + 256 * 10 + 10),
    ],
)
def test_full_size_networks_have_the_published_number_of_parameters(name: str, parameters: int) -> None:
    with torch.device("meta"):
        model = MODELS[name](10, 1)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


@pytest.mark.parametrize("name", MODELS)
def test_every_network_ends_in_one_linear_head_and_divides(name: str) -> None:
    small = MODELS[name](10, 16 if name != "vit" else 5)
    assert small(torch.rand(3, 3, 32, 32)).shape == (3, 10)
    last = list(small.modules())[-1]
    assert isinstance(last, nn.Linear) and last.out_features == 10


def test_the_one_batchnorm_stands_right_before_the_head() -> None:
    kinds = [type(layer) for layer in MODELS["vgg11-bn-before-head"](10, 16)]
    assert kinds[-2:] == [nn.BatchNorm1d, nn.Linear]
    assert nn.BatchNorm2d not in kinds


def test_the_transformer_s_blocks_compute_what_torch_s_do() -> None:
    """Against nn.TransformerEncoderLayer with the same weights."""
    from examples.reference.vision_models import Block

    ours = Block(16, 4).eval()
    theirs = nn.TransformerEncoderLayer(16, 4, 64, 0.0, F.gelu, batch_first=True, norm_first=True).eval()
    norm, attention = ours.attention
    norm2, first, _, second = ours.feed
    theirs.load_state_dict(
        {
            "self_attn.in_proj_weight": attention.qkv.weight,
            "self_attn.in_proj_bias": attention.qkv.bias,
            "self_attn.out_proj.weight": attention.out.weight,
            "self_attn.out_proj.bias": attention.out.bias,
            "linear1.weight": first.weight,
            "linear1.bias": first.bias,
            "linear2.weight": second.weight,
            "linear2.bias": second.bias,
            "norm1.weight": norm.weight,
            "norm1.bias": norm.bias,
            "norm2.weight": norm2.weight,
            "norm2.bias": norm2.bias,
        }
    )
    x = torch.randn(2, 5, 16)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)


# --- pairing ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["mlp", "vit"])
def test_arms_begin_alike_and_their_first_losses_differ_by_the_arm_alone(model: str, tmp_path: Path) -> None:
    runs = {name: short(f"{model}-{name}", tmp_path) for name in ("float32", "float64-loss", "zero-sum")}
    base = runs["float32"]
    assert all(run.start == base.start and run.data == base.data for run in runs.values())
    losses = {name: run.series["loss"][1] for name, run in runs.items()}
    # The projection acts on the gradient: the first loss is the same to the last bit, later ones are not.
    assert losses["zero-sum"][0] == losses["float32"][0]
    # The same logits in float64: equal to float32's rounding, and not beyond.
    assert losses["float64-loss"][0] == pytest.approx(losses["float32"][0], rel=1e-6)
    assert not np.array_equal(losses["float64-loss"], losses["float32"])


def test_the_exact_loss_is_another_way_to_the_same_numbers(tmp_path: Path) -> None:
    base, exact = short("vgg11-float32", tmp_path), short("vgg11-exact", tmp_path)
    assert exact.start == base.start and exact.data == base.data
    losses, usual = exact.series["loss"][1], base.series["loss"][1]
    assert losses[0] == pytest.approx(usual[0], rel=1e-6)
    assert not np.array_equal(losses, usual)


@pytest.mark.parametrize(
    ("arm", "violation"), [("mlp-float32", 1.0), ("mlp-zero-sum", 0.0), ("mlp-float64-loss", 0.0)]
)
def test_on_absorbed_rows_each_remedy_restores_the_zero_sum_at_the_head(arm: str, violation: float) -> None:
    """Every row of class 3, with a margin of 20: float32 rounds the correct class's gradient to 0."""
    config = cifar.STUDY.config(QUICK.changed({"mlp": SMALL}), cifar.STUDY.arm(arm))
    training = cifar.build(config, 0, torch.device("cpu"))
    head = training.model[-1]
    training.data[1].fill_(3)
    with torch.no_grad():
        head.weight.zero_()
        head.bias.zero_()[3] = 20.0
    seen = []

    def look(*_: object) -> None:
        seen.append(head.bias.grad.double())

    training.optimizer.register_step_pre_hook(look)
    with Monitor(training.model, training.optimizer, console=False) as monitor:
        training.step(1, monitor)
    assert float(seen[0].sum().abs() / seen[0].abs().sum()) == pytest.approx(violation, abs=1e-6)


def test_a_run_repeats_itself_bit_for_bit(tmp_path: Path) -> None:
    one, two = (short("mlp-float32", tmp_path / name, steps=6) for name in ("one", "two"))
    assert np.array_equal(one.series["loss"][1], two.series["loss"][1])
    assert one.values == two.values and one.start == two.start


def test_full_batches_accumulate_to_the_gradient_of_one(tmp_path: Path) -> None:
    whole = short("mlp-float32", tmp_path / "whole", steps=5, micro=500)
    parts = short("mlp-float32", tmp_path / "parts", steps=5, micro=5)  # 5 + 5 + 5 + 1 rows
    np.testing.assert_allclose(parts.series["loss"][1], whole.series["loss"][1], rtol=1e-4)


def test_a_minibatch_run_that_was_interrupted_resumes_to_the_same_bits(tmp_path: Path) -> None:
    """With BatchNorm, whose averages belong to the state, and batches that depend on the step."""

    class Stop(Exception):
        pass

    def interrupt(done: int) -> None:
        raise Stop

    changes = {"model": "vgg11-bn-before-head", "divide": 16, "rows": 32, "batch": 8}
    preset = QUICK.changed({"mlp-minibatch": SMALL | changes}, checkpoint_every=20)
    results = []
    for name, told in (("whole", None), ("broken", interrupt)):
        where = {"results": tmp_path / name / "results", "runs": tmp_path / name / "runs", "steps": 55}
        if told is not None:
            with pytest.raises(Stop):
                run_one(cifar.STUDY, preset, "mlp-minibatch-float32", 0, told=told, **where)
        results.append(run_one(cifar.STUDY, preset, "mlp-minibatch-float32", 0, **where))
    whole, resumed = results
    assert (resumed.loss_final, resumed.values) == (whole.loss_final, whole.values)
    assert resumed.alerts == whole.alerts


# --- judgements ---------------------------------------------------------------------------------------------


def result(arm: str, *, slingshots: tuple[tuple[int, str], ...] = (), seed: int = 0, **values: Any) -> Result:
    """As a run would have left it."""
    return Result(
        study="cifar",
        preset="quick",
        arm=arm,
        seed=seed,
        pair=arm.split("-")[0],
        config={"rows": 64},
        steps=900,
        slingshots=[
            {"start": at, "mechanism": name, "at_risk_lead": 100, "imminent_lead": None}
            for at, name in slingshots
        ],
        episodes=[(at, at + 5, 1.0) for at, _ in slingshots],
        alerts=[],
        loss_final=1e-8,
        values={"absorbed_median": 0.5, "absorbed_final": 0.5, **values},
    )


NUMERIC, EDGE = (700, "numerical_feature_inflation"), (180, "edge_of_stability")


@pytest.mark.parametrize(
    ("left", "verdict"),
    [((EDGE,), Verdict.AGREES), ((), Verdict.AGREES), ((EDGE, (800, "unknown")), Verdict.DISAGREES)],
)
def test_a_control_may_keep_the_slingshots_that_were_not_numeric_and_no_more(
    left: Any, verdict: Verdict
) -> None:
    results = Results(
        [result("vit-float32", slingshots=(EDGE, NUMERIC)), result("vit-zero-sum", slingshots=left)]
    )
    assert cifar_claims.numeric_gone("vit-zero-sum")(results).verdict is verdict


def test_a_control_of_a_run_without_numeric_slingshots_proves_nothing() -> None:
    results = Results([result("vit-float32", slingshots=(EDGE,)), result("vit-zero-sum")])
    with pytest.raises(NotTested):
        cifar_claims.numeric_gone("vit-zero-sum")(results)


def test_calm_needs_absorbed_rows() -> None:
    never = Results([result("resnet18-float32", absorbed_final=0.0)])
    with pytest.raises(NotTested, match="no row was absorbed"):
        cifar_claims.calm("resnet18-float32")(never)
    assert (
        cifar_claims.calm("resnet18-float32")(Results([result("resnet18-float32")])).verdict is Verdict.AGREES
    )
    spiked = Results([result("resnet18-float32", slingshots=(NUMERIC,))])
    assert cifar_claims.calm("resnet18-float32")(spiked).verdict is Verdict.DISAGREES


def test_a_first_slingshot_that_survives_float64_was_not_rounding_s() -> None:
    base = result("vit-float32", slingshots=(EDGE, NUMERIC))
    kept = Results([base, result("vit-float64-loss", slingshots=(EDGE,))])
    assert cifar_claims.first_survives(kept).verdict is Verdict.DISAGREES
    gone = Results([base, result("vit-float64-loss")])
    assert cifar_claims.first_survives(gone).verdict is Verdict.AGREES


def test_numeric_slingshots_without_an_alert_before_them_count_against_the_monitor() -> None:
    runs = [result(f"{model}-float32", slingshots=(NUMERIC,)) for model in cifar_claims.SPIKING]
    assert cifar_claims.numeric_announced(Results(runs)).verdict is Verdict.AGREES
    silent = replace(runs[0], slingshots=[{**runs[0].slingshots[0], "at_risk_lead": None}])
    found = cifar_claims.numeric_announced(Results([silent, *runs[1:]]))
    assert found.verdict is Verdict.DISAGREES and found.ours.startswith("2 of 3")


def test_minibatches_are_held_against_their_float64_control() -> None:
    def run(arm: str, mean: float, slingshots: Any = ()) -> Result:
        return replace(result(arm, slingshots=slingshots, feature_mean_final=mean), pair="mlp-minibatch")

    base, grown = run("mlp-minibatch-float64-loss", 10.0), run("mlp-minibatch-float32", 15.0)
    assert cifar_claims.minibatch_grows(Results([base, grown])).verdict is Verdict.AGREES
    smaller = run("mlp-minibatch-float32", 9.0, (NUMERIC,))
    assert cifar_claims.minibatch_grows(Results([base, smaller])).verdict is Verdict.DISAGREES
    found = cifar_claims.minibatch_calm(Results([base, smaller]))
    assert found.verdict is Verdict.DISAGREES and "1 slingshots, with the loss in float64 0" in found.ours
    with pytest.raises(NotTested, match="no result of a minibatch arm"):
        cifar_claims.minibatch_absorbs(Results([result("mlp-float32")]))


def test_inflation_reads_fall_and_rise_from_where_half_of_the_rows_are_absorbed() -> None:
    history = History()
    for step in range(1, 301):
        after = max(0, step - 100)
        history.append(
            step,
            {
                "absorbed_fraction": 0.6 if step >= 100 else 0.1,
                "residual_mass": 1e-6 * 10 ** (-after / 50),  # two decades in 100 steps
                "feature_mean_norm": 3.0 * np.exp(0.01 * after),  # one nat in 100 steps
                "classifier_mean_norm": 3.0 * np.exp(0.01 * after) / 10**0.5,
                "mean_alignment": -step / 300,
                "mean_logit": -1.0 * step,
            },
        )
    found = cifar_claims.inflation(history)
    assert found["absorbed_from"] == 100
    assert found["residual_mass_fall"] == pytest.approx(2.0)
    assert found["feature_mean_rise"] == pytest.approx(1.0)
    assert found["feature_mean_final"] == pytest.approx(3.0 * np.exp(2.0))
    assert found["alignment_lowest"] == -1.0 and found["norm_ratio"] == pytest.approx(1.0)
    assert found["absorbed_median"] == pytest.approx(0.6) and found["mean_logit_final"] == -300.0


def test_inflation_of_a_run_that_never_absorbed_is_none_not_zero() -> None:
    history = History()
    history.append(1, {"absorbed_fraction": 0.0, "residual_mass": 0.1})
    found = cifar_claims.inflation(history)
    assert found["absorbed_from"] is None and found["residual_mass_fall"] is None
    assert cifar_claims.inflation(History())["absorbed_median"] is None


def test_every_arm_of_a_preset_has_a_configuration_and_can_be_built() -> None:
    for preset in cifar.STUDY.presets:
        for name in preset.plans:
            config = cifar.STUDY.config(preset, cifar.STUDY.arm(name))
            assert config["model"] in MODELS, name
            assert config["rows"] > 0 and (config["batch"] is None or config["batch"] <= config["rows"])
