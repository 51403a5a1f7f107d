"""The head found by names, checked against the first output of the model."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nfi_monitor import Monitor
from nfi_monitor.errors import HeadNotFoundError


class Tied(nn.Module):
    """Logits by the embedding's weight, outside of any module; the last linear layer is an inner one."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.inner = nn.Embedding(11, 16), nn.Linear(16, 16)
        self.scale = nn.Parameter(torch.tensor(1.0))

    def features(self, tokens: Tensor) -> Tensor:
        e = self.embed(tokens)
        return e + self.inner(e).relu()

    def forward(self, tokens: Tensor) -> Any:
        return F.linear(self.features(tokens), self.embed.weight)


class ReturnsLoss(Tied):
    def forward(self, tokens: Tensor) -> Any:
        logits = super().forward(tokens)
        return {"loss": cross_entropy(logits, tokens), "logits": logits}


class OtherOrder(Tied):
    """The head is registered first."""

    def __init__(self) -> None:
        super().__init__()
        self._modules = {"out": nn.Linear(16, 11), **self._modules}

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(self.features(tokens))  # type: ignore[no-any-return]


class Contrastive(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = nn.Linear(8, 8), nn.Linear(8, 8)
        self.logit_scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: Tensor) -> Tensor:
        image, text = (F.normalize(part(x), dim=-1) for part in (self.image, self.text))
        return self.logit_scale.exp() * image @ text.T


class Hidden(Tied):
    """Returns features behind a norm: the output does not show what makes the logits."""

    def forward(self, tokens: Tensor) -> Tensor:
        return F.layer_norm(self.features(tokens), (16,))


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten())


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    output = model(tokens)
    if isinstance(output, dict):
        return output["loss"]  # type: ignore[no-any-return]
    if isinstance(model, Hidden):
        return cross_entropy(F.linear(output, model.embed.weight), tokens)
    return cross_entropy(output, tokens)


def train(model: nn.Module, *, steps: int = 6, watch: bool = True, **options: Any) -> Monitor | None:
    """Train on fixed data, watched or not."""
    random = torch.Generator().manual_seed(1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    monitor = Monitor(model, optimizer, console=False, every=1, **options) if watch else None
    for _ in range(steps):
        if isinstance(model, Contrastive):
            loss = cross_entropy(model(torch.randn(6, 8, generator=random)), torch.arange(6))
        else:
            loss = loss_of(model, torch.randint(0, 11, (4, 5), generator=random))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return monitor


@pytest.mark.parametrize(
    ("kind", "head"), [(Tied, "embed.weight"), (ReturnsLoss, "embed.weight"), (OtherOrder, "out")]
)
def test_the_layer_or_parameter_that_makes_the_logits_is_watched_instead(kind: Any, head: str) -> None:
    torch.manual_seed(0)
    monitor = train(kind())
    assert monitor is not None and monitor.head is not None and monitor.head.name == head
    codes = [note.code for note in monitor.notes]
    assert "head_by_output" in codes and "several_heads" not in codes
    monitor.observe_outputs()
    for name in ("zero_sum_violation", "feature_mean_norm", "logit_displacement"):
        assert len(monitor.history[name][1]) == 5, "all but the first step"
    assert monitor.history["unexplained_violation_fraction"][1].max() == 0
    monitor.close()
    assert "not_shift_invariant" not in [note.code for note in monitor.notes]


def test_a_product_of_two_features_has_no_head() -> None:
    monitor = train(Contrastive())
    assert monitor is not None and monitor.head is None
    (note,) = [note for note in monitor.notes if note.code == "no_head"]
    assert "product of two features" in note.message and "monitor.tap(logits)" in note.message
    assert len(monitor.history["zero_sum_violation"][1]) == 0 and len(monitor.history["rms_t_max"][1]) == 6
    monitor.close()


def test_an_output_that_shows_nothing_leaves_the_guess_and_says_that_it_is_one() -> None:
    monitor = train(Hidden())
    assert monitor is not None and monitor.head is not None and monitor.head.name == "inner"
    assert "head_guessed" in [note.code for note in monitor.notes]
    monitor.close()


def test_a_named_head_is_not_checked() -> None:
    monitor = train(Tied(), head="inner")
    assert monitor is not None and monitor.head is not None and monitor.head.name == "inner"
    monitor.close()


@pytest.mark.parametrize("kind", [Tied, ReturnsLoss, OtherOrder, Contrastive, Hidden])
def test_the_training_has_the_same_bits_and_no_hook_is_left(kind: Any) -> None:
    torch.manual_seed(0)
    watched = kind()
    alone = copy.deepcopy(watched)
    monitor = train(watched)
    train(alone, watch=False)
    assert monitor is not None
    monitor.close()
    for (name, one), other in zip(watched.named_parameters(), alone.parameters(), strict=True):
        assert torch.equal(one, other), name
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in watched.modules())
    assert monitor.head is None


def test_other_hooks_of_the_model_still_get_their_arguments_while_the_head_changes() -> None:
    """The loss is read by a hook on the same module, which was registered after the check."""
    model = ReturnsLoss()
    optimizer = torch.optim.Adam(model.parameters())
    with Monitor(model, optimizer, console=False, every=1) as monitor:
        monitor.observe_outputs()
        for _ in range(3):
            model(torch.randint(0, 11, (4, 5)))["loss"].backward()
            optimizer.step()
    assert len(monitor.history["loss"][1]) == 3


class Ensemble(nn.Module):
    """Four heads in one parameter [4, 16, 11]."""

    def __init__(self, write: str) -> None:
        super().__init__()
        self.embed, self.inner = nn.Embedding(11, 16), nn.Linear(16, 16)
        self.heads, self.write = nn.Parameter(torch.randn(4, 16, 11) / 4), write

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.inner(self.embed(tokens.flatten())).tanh()
        if self.write == "einsum":
            return torch.einsum("nd,edk->enk", h, self.heads)
        return h.expand(4, *h.shape) @ self.heads


@pytest.mark.parametrize("write", ["einsum", "matmul"])
@pytest.mark.parametrize("tapped", [False, True], ids=["plain", "tapped"])
def test_logits_of_a_parameter_with_three_axes_have_no_head_and_can_be_tapped(
    write: str, tapped: bool
) -> None:
    torch.manual_seed(0)
    watched = Ensemble(write)
    alone, tokens = copy.deepcopy(watched), torch.randint(0, 11, (4, 5))
    notes: dict[str, str] = {}
    for model in (watched, alone):
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        monitor = Monitor(model, optimizer, console=False, every=1) if model is watched else None
        for _ in range(8):
            optimizer.zero_grad()
            logits = model(tokens)
            logits = monitor.tap(logits) if monitor is not None and tapped else logits
            loss = cross_entropy(logits, tokens.flatten().repeat(4))
            loss.backward()
            if monitor is not None:
                monitor.observe_loss(loss)
            optimizer.step()
        if monitor is not None:
            monitor.close()
            notes = {note.code: note.message for note in monitor.notes}
            assert len(monitor.history["rms_t_max"][1]) == 8
            if tapped:
                assert monitor.history["head_loss"][1] == pytest.approx(monitor.history["loss"][1], rel=1e-5)
    assert not {"failed_head_check", "not_shift_invariant"} & set(notes)
    assert "[4, 16, 11]" in notes["no_head"] and "monitor.tap(logits)" in notes["no_head"]
    for one, other in zip(watched.parameters(), alone.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_named_parameter_with_three_axes_is_refused_with_the_way_to_rows() -> None:
    model = Ensemble("einsum")
    with pytest.raises(HeadNotFoundError, match=r"shape \(4, 16, 11\).*monitor\.tap\(logits\)"):
        Monitor(model, torch.optim.Adam(model.parameters()), head="heads", console=False)
