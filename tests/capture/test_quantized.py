"""8-bit optimizer state, by fakes of the two layouts that libraries document."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nfi_monitor import Monitor
from nfi_monitor.capture.quantized import Quantized, block_size, quantized_moment
from tests.runs import batch, mlp

BLOCK = 256
TABLE = torch.linspace(0.0, 1.0, 256)


def quantize(values: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and block-wise scales, as block-wise 8-bit optimizers make them."""
    flat = values.reshape(-1)
    padded = F.pad(flat, (0, -len(flat) % BLOCK)).reshape(-1, BLOCK)
    scales = padded.abs().amax(1).clamp_min(1e-30)
    codes = (padded / scales[:, None] * 255).round().to(torch.uint8).reshape(-1)[: len(flat)]
    return codes.reshape(values.shape), scales


class OptimState8bit(Tensor):
    """torchao's: a tensor subclass with ``codes``, ``scale``, ``qmap``."""

    codes: Tensor
    scale: Tensor
    qmap: Tensor

    @staticmethod
    def of(values: Tensor) -> OptimState8bit:
        made = torch.Tensor._make_subclass(OptimState8bit, torch.zeros_like(values))
        made.codes, made.scale = quantize(values)
        made.qmap = TABLE
        return made


class Eight(torch.optim.Adam):
    """Adam that puts its second moment away in 8 bits after each step, and takes it out again."""

    layout = "torchao"

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for state in self.state.values():
            if "kept" in state:
                state["exp_avg_sq"] = state.pop("kept")
                for name in ("state2", "qmap2", "absmax2"):
                    state.pop(name, None)
        super().step(closure)
        for param, state in self.state.items():
            moment = state["kept"] = state.pop("exp_avg_sq")
            if self.layout == "torchao":
                state["exp_avg_sq"] = OptimState8bit.of(moment)
            elif param.numel() < 64:  # bitsandbytes leaves small tensors as they are
                state["state2"] = moment
            else:
                codes, scales = quantize(moment)
                state |= {"state2": codes, "qmap2": TABLE, "absmax2": scales}
        return None


@pytest.mark.parametrize("layout", ["torchao", "bitsandbytes"])
def test_the_second_moment_is_read_from_8_bits(layout: str) -> None:
    read = {}
    for kind in (torch.optim.Adam, Eight):
        model = mlp()
        optimizer = kind(model.parameters(), lr=1e-2)
        if isinstance(optimizer, Eight):
            optimizer.layout = layout
        with Monitor(model, optimizer, console=False, every=1) as monitor:
            for step in range(12):
                inputs, targets = batch(seed=step)
                F.cross_entropy(model(inputs), targets).backward()
                optimizer.step()
                optimizer.zero_grad()
        assert [note for note in monitor.notes if note.code != "no_loss"] == []
        read[kind] = monitor.history
    for name in ("sqrt_exp_avg_sq_mean", "head_sqrt_exp_avg_sq_mean", "effective_learning_rate"):
        exact, eight = read[torch.optim.Adam][name][1], read[Eight][name][1]
        assert len(eight) == 12
        # A code is 1/255 of its block's largest: the small ones, which sqrt(v̂) has many of, are coarse.
        assert all(math.isclose(a, b, rel_tol=0.1) for a, b in zip(exact, eight, strict=True)), name


@pytest.mark.parametrize("stride", [1, 3, 7])
def test_sampled_coordinates_are_those_of_the_whole(stride: int) -> None:
    values = torch.rand(5, 141, generator=torch.Generator().manual_seed(0))
    codes, scales = quantize(values)
    state = {"state2": codes, "qmap2": TABLE, "absmax2": scales}
    moment = quantized_moment(state)
    assert isinstance(moment, Quantized)
    torch.testing.assert_close(moment.sample(stride), values.reshape(-1)[::stride], atol=1 / 255, rtol=0)
    assert torch.equal(moment.sample(stride), moment.sample(1)[::stride])


@pytest.mark.parametrize(
    ("n", "blocks", "size"), [(300, 2, 256), (5000, 3, 2048), (256, 1, 256), (705, 3, 256)]
)
def test_the_block_size_follows_from_the_number_of_scales(n: int, blocks: int, size: int) -> None:
    assert block_size(n, blocks) == size


def test_blocks_of_no_known_size_are_refused() -> None:
    with pytest.raises(ValueError, match="300 coordinates in 4 blocks: of what size"):
        block_size(300, 4)


def test_an_ordinary_state_is_not_taken_for_8_bits() -> None:
    assert quantized_moment({"exp_avg_sq": torch.zeros(3)}) is None
    assert quantized_moment({"state2": torch.zeros(3)}) is None
    assert quantized_moment({}) is None


def test_flat_partitions_of_zero_are_watched_by_their_rows_and_that_is_said_once() -> None:
    """DeepSpeed ZeRO: a wrapper with ``optimizer``, which trains flat float32 copies of the parameters."""

    class ZeRO:
        def __init__(self, model: torch.nn.Module) -> None:
            self.model = list(model.parameters())
            self.flat = torch.nn.Parameter(torch.cat([p.detach().reshape(-1) for p in self.model]))
            self.optimizer = torch.optim.Adam([self.flat], lr=1e-2)

        def step(self) -> None:
            self.flat.grad = torch.cat([p.grad.reshape(-1) for p in self.model if p.grad is not None])
            self.optimizer.step()
            torch.nn.utils.vector_to_parameters(self.flat.detach(), self.model)

    model = mlp()
    zero = ZeRO(model)
    with Monitor(model, zero, console=False, every=1) as monitor:
        for step in range(8):
            model.zero_grad()
            inputs, targets = batch(seed=step)
            loss = F.cross_entropy(model(inputs), targets)
            monitor.observe_loss(loss)
            loss.backward()
            zero.step()
    assert [note.code for note in monitor.notes] == ["optimizer_without_head"]
    assert "DeepSpeed ZeRO" in monitor.notes[0].message
    assert len(monitor.history["zero_sum_violation"][0]) == len(monitor.history["rms_t_max"][0]) == 8
