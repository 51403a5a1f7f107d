from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from nfi_monitor import Monitor
from nfi_monitor.capture.probe_batch import CommunicatesError, NoCollectives, ProbeBatch
from tests.runs import batch, mlp


class Noisy(nn.Module):
    """Dropout, running statistics, and a part that the user keeps in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.drop, self.head = nn.BatchNorm1d(12), nn.Dropout(0.5), nn.Linear(12, 7)
        self.frozen = nn.BatchNorm1d(12).eval()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.head(self.frozen(self.drop(self.norm(x))))
        return logits, x


def test_a_probe_leaves_modes_statistics_and_random_state_alone() -> None:
    model = Noisy()
    inputs, targets = batch()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    ProbeBatch(model, inputs, targets).displacement(1)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert [module.training for module in (model, model.norm, model.drop, model.frozen)] == [True] * 3 + [
        False
    ]


def test_the_displacement_is_the_largest_margin_change_per_step() -> None:
    model = nn.Sequential(nn.Linear(12, 7))
    inputs, targets = batch()
    probe = ProbeBatch(model, inputs, targets)
    assert probe.displacement(10) is None
    with torch.no_grad():
        model[0].bias[3] += 5.0  # rows of class 3 gain 5 nats, others lose at most that
    found = probe.displacement(14)
    assert found is not None and 0 < found.item() <= 5.0 / 4 + 1e-5
    assert (targets == 3).any() and found.item() == pytest.approx(5.0 / 4, rel=1e-3)


def test_a_model_with_one_output_has_no_margin_and_none_is_made_up() -> None:
    probe = ProbeBatch(nn.Linear(12, 1), batch()[0], torch.zeros(24, dtype=torch.int64))
    assert probe.displacement(1) is probe.displacement(2) is None


@pytest.mark.parametrize("padding", [-100, -1, 7, 255])
def test_padding_in_the_targets_is_left_out(padding: int) -> None:
    """Whatever is no class: as an index, one past the end kills a CUDA run."""
    model = mlp()
    inputs, targets = batch()
    targets[1:] = padding
    probe = ProbeBatch(model, inputs, targets)
    probe.displacement(1)
    with torch.no_grad():
        model[4].bias += torch.randn(7)
    one = ProbeBatch(mlp(), inputs[:1], targets[:1])
    one.displacement(1)
    with torch.no_grad():
        one._model[4].bias.copy_(model[4].bias)  # type: ignore[index]
    left, right = probe.displacement(2), one.displacement(2)
    assert left is not None and right is not None
    assert left.item() == pytest.approx(right.item(), rel=1e-5)


def test_inside_data_parallelism_the_wrapped_model_is_asked() -> None:
    """The wrapper broadcasts buffers: a rank that reads alone would wait for the others for ever."""
    model = Noisy()
    for wrapped in (nn.DataParallel(model), torch.compile(model), torch.compile(nn.DataParallel(model))):
        asked: list[nn.Module] = []
        handle = model.register_forward_hook(lambda module, *_, asked=asked: asked.append(module))
        others: list[nn.Module] = []
        wrapped.register_forward_hook(lambda module, *_, others=others: others.append(module))
        ProbeBatch(wrapped, *batch()).displacement(1)
        handle.remove()
        assert asked == [model] and not others


class DistributedDataParallel(nn.Module):
    """Stands for torch's, which needs a process group: it is known by its name."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        raise AssertionError("the other ranks would wait")


class FullyShardedDataParallel(DistributedDataParallel): ...


class Subclass(DistributedDataParallel): ...


@pytest.mark.parametrize("kind", [DistributedDataParallel, FullyShardedDataParallel, Subclass])
def test_a_model_that_holds_one_that_communicates_is_refused_and_the_run_says_so(kind: type) -> None:
    model = nn.ModuleDict({"net": kind(mlp())})
    model.forward = lambda x: model["net"].module(x)  # type: ignore[method-assign]
    inputs, targets = batch()
    probe = ProbeBatch(model, inputs, targets)
    assert probe.displacement(1) is probe.displacement(2) is None
    assert probe.refused is not None and "('net')" in probe.refused
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with Monitor(model, optimizer, console=False, every=1, probe=(inputs, targets)) as monitor:
        for _ in range(3):
            nn.functional.cross_entropy(model.forward(inputs), targets).backward()
            optimizer.step()
    (note,) = [note for note in monitor.notes if note.code == "no_probe"]
    assert "('net'), whose forward pass communicates" in note.message and note.step == 1
    assert "margin_displacement" not in monitor.history and len(monitor.history["loss"][0]) == 0


def test_a_wrapper_that_is_the_model_itself_is_looked_through() -> None:
    probe = ProbeBatch(DistributedDataParallel(mlp()), *batch())
    probe.displacement(1)
    assert probe.displacement(2) == 0 and probe.refused is None


def test_a_collective_of_the_models_own_is_not_begun(tmp_path: Path) -> None:
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1, timeout=timedelta(seconds=5))
    try:
        with pytest.raises(CommunicatesError, match=r"c10d\.allreduce"), NoCollectives():
            dist.all_reduce(torch.ones(2))
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("inputs", [lambda x: x, lambda x: (x,), lambda x: {"input": x}])
def test_inputs_may_be_a_tensor_arguments_or_keywords(inputs: object) -> None:
    x, targets = batch()
    probe = ProbeBatch(mlp(), inputs(x), targets)  # type: ignore[operator]
    probe.displacement(1)
    assert probe.displacement(2) == 0
