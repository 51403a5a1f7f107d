"""Logits that are changed after the head: rows are read where the loss takes them, or a note says why not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from nfi_monitor import Monitor

K, D = 5, 8
ELSEWHERE, CHANGED = "rows_after_head", "logits_changed"
OF_ROWS = ("head_loss", "absorbed_fraction", "margin_median", "zero_sum_violation")


class Net(nn.Module):
    """A trunk, a head, and ``write``, which makes the output of the features."""

    def __init__(self, write: Callable[[Any, Tensor], Any], *, conv: bool = False, **more: nn.Module) -> None:
        super().__init__()
        self.trunk = nn.Conv2d(3, D, 3, padding=1) if conv else nn.Linear(6, D)
        self.head: nn.Module = nn.Conv2d(D, K, 1) if conv else nn.Linear(D, K)
        for name, module in more.items():
            setattr(self, name, module)
        self.write = write

    def forward(self, x: Tensor, y: Tensor | None = None) -> Any:
        output = self.write(self, self.trunk(x).relu())
        return output if y is None else {"loss": F.cross_entropy(_enlarged(output), y), "logits": output}


def _enlarged(z: Tensor, size: int = 8) -> Tensor:
    return F.interpolate(z, size=size, mode="bilinear")


ADJACENCY = torch.rand(12, 12, generator=torch.Generator().manual_seed(3))
INDEX = torch.randint(0, 12, (12,), generator=torch.Generator().manual_seed(4))


def _plain(model: Any, h: Tensor) -> Tensor:
    return model.head(h)  # type: ignore[no-any-return]


def _train(
    model: nn.Module,
    loss: Callable[[nn.Module, Tensor, Tensor], tuple[Tensor, Tensor | None]],
    *,
    conv: bool = False,
    steps: int = 6,
    watch: bool = True,
    observe: bool = True,
    **options: Any,
) -> tuple[Monitor | None, list[float]]:
    """Train; return the closed monitor, and the cross-entropies of the loss's logits."""
    random = torch.Generator().manual_seed(1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    monitor = Monitor(model, optimizer, console=False, every=1, **options) if watch else None
    entropies = []
    for _ in range(steps):
        x = torch.randn(*((2, 3, 4, 4) if conv else (12, 6)), generator=random)
        y = torch.randint(0, K, (2, 8, 8) if conv else (12,), generator=random)
        found, logits = loss(model, x, y)
        if logits is not None:
            entropies.append(float(F.cross_entropy(logits.detach(), y)))
        found.backward()
        if monitor is not None and observe:
            monitor.observe_loss(found)
        optimizer.step()
        optimizer.zero_grad()
    if monitor is not None:
        monitor.close()
    return monitor, entropies


def _of_output(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    output = model(x)
    if isinstance(output, dict):
        output = output["out"]
    logits = output[0] if isinstance(output, tuple) else output
    return F.cross_entropy(logits, y), logits


def _codes(monitor: Monitor | None) -> set[str]:
    assert monitor is not None
    return {note.code for note in monitor.notes}


def _heads(*names: str) -> dict[str, nn.Module]:
    return {name: nn.Linear(D, K) for name in names}


READABLE: dict[str, tuple[Callable[[], Net], bool]] = {
    "enlarged": (lambda: Net(lambda m, h: _enlarged(m.head(h)), conv=True), True),
    "enlarged in a dict": (
        lambda: Net(lambda m, h: {"features": h, "out": _enlarged(m.head(h))}, conv=True), True,
    ),
    "enlarged, also as it was": (
        lambda: Net(lambda m, h: (_enlarged(m.head(h)), m.head(h)), conv=True), True,
    ),
    "two heads averaged": (lambda: Net(lambda m, h: (m.head(h) + m.other(h)) / 2, **_heads("other")), False),
    "a sum of a head and a skip": (lambda: Net(lambda m, h: m.head(h) + h[:, :K]), False),
    "a mean over dropouts": (
        lambda: Net(lambda m, h: torch.stack([m.head(F.dropout(h, 0.2)) for _ in range(3)]).mean(0)), False,
    ),
    "a mean over positions": (
        lambda: Net(lambda m, h: m.head(torch.stack([h, h.square()], 1)).mean(1)), False,
    ),
    "neighbours, dense": (lambda: Net(lambda m, h: ADJACENCY @ m.head(h)), False),
    "neighbours, sparse": (
        lambda: Net(lambda m, h: torch.sparse.mm(ADJACENCY.to_sparse(), m.head(h))), False,
    ),
    "neighbours, scattered": (
        lambda: Net(lambda m, h: torch.zeros(12, K).index_add(0, INDEX, m.head(h)[INDEX.flip(0)])), False,
    ),
    "a norm": (lambda: Net(lambda m, h: m.norm(m.head(h)), norm=nn.LayerNorm(K)), False),
    "a scale for each class": (
        lambda: Net(lambda m, h: m.head(h) * m.more.bias, more=nn.Linear(1, K)), False,
    ),
    "gated": (lambda: Net(lambda m, h: m.head(h) * m.gate(h).sigmoid(), **_heads("gate")), False),
}  # fmt: skip


@pytest.mark.parametrize("kind", READABLE)
def test_changed_logits_that_the_model_returns_are_read(kind: str) -> None:
    torch.manual_seed(0)
    make, conv = READABLE[kind]
    monitor, entropies = _train(make(), _of_output, conv=conv, head="head" if "gate" in kind else None)
    assert monitor is not None and ELSEWHERE in _codes(monitor) and CHANGED not in _codes(monitor)
    steps, values = monitor.history["head_loss"]
    assert len(steps) >= 5 and values == pytest.approx(entropies[-len(steps) :], rel=1e-5)
    assert monitor.history["soft_target_fraction"][1].max() == 0
    assert monitor.history["unexplained_violation_fraction"][1].max() == 0
    assert "no_features" not in _codes(monitor) and not monitor.alerts
    assert monitor.summary()["run"]["head"].startswith("head (")


@pytest.mark.parametrize("kind", READABLE)
def test_the_training_has_the_same_bits(kind: str) -> None:
    torch.manual_seed(0)
    make, conv = READABLE[kind]
    watched = make()
    alone = copy.deepcopy(watched)
    torch.manual_seed(5)
    _train(watched, _of_output, conv=conv)
    torch.manual_seed(5)
    _train(alone, _of_output, conv=conv, watch=False)
    for (name, one), other in zip(watched.named_parameters(), alone.parameters(), strict=True):
        assert torch.equal(one, other), name
    assert not any(module._forward_hooks for module in watched.modules())


@pytest.mark.parametrize("kind", ["enlarged", "two heads averaged", "neighbours, scattered"])
def test_a_loss_that_is_not_reported_is_not_needed(kind: str) -> None:
    make, conv = READABLE[kind]
    monitor, entropies = _train(make(), _of_output, conv=conv, observe=False)
    assert monitor is not None and ELSEWHERE in _codes(monitor)
    assert monitor.history["head_loss"][1] == pytest.approx(entropies, rel=1e-5)


def _enlarged_outside(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, None]:
    return F.cross_entropy(_enlarged(model(x)), y), None


def _averaged_outside(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, None]:
    one, other = model(x)
    return F.cross_entropy((one + other) / 2, y), None


def _mean_of_chances(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, None]:
    one, other = (z.softmax(-1) for z in model(x))
    return F.nll_loss(((one + other) / 2).log(), y), None


UNREADABLE: dict[str, tuple[Callable[[], Net], Any, bool]] = {
    "enlarged in the loop": (lambda: Net(_plain, conv=True), _enlarged_outside, True),
    "two heads averaged in the loop": (
        lambda: Net(lambda m, h: (m.head(h), m.other(h)), **_heads("other")), _averaged_outside, False,
    ),
    "neighbours in the loop": (
        lambda: Net(_plain), lambda m, x, y: (F.cross_entropy(ADJACENCY @ m(x), y), None), False,
    ),
    "a mean of probabilities": (
        lambda: Net(lambda m, h: (m.head(h), m.other(h)), **_heads("other")), _mean_of_chances, False,
    ),
    "probabilities as logits": (
        lambda: Net(_plain), lambda m, x, y: (F.cross_entropy(m(x).softmax(-1), y), None), False,
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", UNREADABLE)
def test_logits_changed_where_they_cannot_be_read_are_said_and_no_row_is_passed_off(kind: str) -> None:
    make, loss, conv = UNREADABLE[kind]
    monitor, _ = _train(make(), loss, conv=conv)
    assert monitor is not None
    (text,) = [note.message for note in monitor.notes if note.code == CHANGED]
    assert "monitor.tap(logits" in text and ("class_axis=1" in text) is conv
    assert not any(name in monitor.history for name in OF_ROWS)
    assert len(monitor.history["zero_sum_violation_weight"][1]) >= 5
    assert "head_never_fired" not in _codes(monitor) and not monitor.alerts


def test_tapped_logits_are_read_whatever_comes_before_them() -> None:
    model = Net(_plain, conv=True)
    optimizer = torch.optim.Adam(model.parameters())
    with Monitor(model, optimizer, console=False, every=1) as monitor:
        for _ in range(6):
            logits = monitor.tap(_enlarged(model(torch.randn(2, 3, 4, 4))), class_axis=1)
            found = F.cross_entropy(logits, torch.randint(0, K, (2, 8, 8)))
            found.backward()
            monitor.observe_loss(found)
            optimizer.step()
    assert not _codes(monitor) & {ELSEWHERE, CHANGED}
    assert monitor.history["head_loss"][1] == pytest.approx(monitor.history["loss"][1], rel=1e-5)


def test_logits_that_the_model_returns_may_be_tapped() -> None:
    model = Net(lambda m, h: _enlarged(m.head(h)), conv=True)
    optimizer = torch.optim.Adam(model.parameters())
    with Monitor(model, optimizer, console=False, every=1) as monitor:
        for _ in range(6):
            logits = monitor.tap(model(torch.randn(2, 3, 4, 4)), class_axis=1)
            found = F.cross_entropy(logits, torch.randint(0, K, (2, 8, 8)))
            found.backward()
            monitor.observe_loss(found)
            optimizer.step()
        assert monitor.head is not None and monitor.head.place is None
    assert not _codes(monitor) & {ELSEWHERE, CHANGED}
    assert monitor.history["head_loss"][1] == pytest.approx(monitor.history["loss"][1], rel=1e-5)


@pytest.mark.parametrize("every", [1, 3])
def test_a_resumed_run_reads_the_changed_logits_again(every: int) -> None:
    model = Net(lambda m, h: _enlarged(m.head(h)), conv=True)
    optimizer = torch.optim.Adam(model.parameters())
    saved: Any = None
    for _ in range(2):
        with Monitor(model, optimizer, console=False, every=every) as monitor:
            if saved is not None:
                monitor.load_state_dict(saved)
            for _ in range(7):
                found = F.cross_entropy(model(torch.randn(2, 3, 4, 4)), torch.randint(0, K, (2, 8, 8)))
                found.backward()
                monitor.observe_loss(found)
                optimizer.step()
            saved = monitor.state_dict()
    losses = dict(zip(*monitor.history["loss"], strict=True))
    steps, values = monitor.history["head_loss"]
    assert len(steps) >= 2 and values == pytest.approx([losses[step] for step in steps], rel=1e-5)
    assert [note.code for note in monitor.notes].count(ELSEWHERE) == 1


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=str)
def test_logits_changed_inside_of_the_models_loss_are_read_at_its_softmax(precision: torch.dtype) -> None:
    torch.manual_seed(0)
    entropies = []

    def loss(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, None]:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision is torch.bfloat16):
            output = model(x, y)
        entropies.append(float(output["loss"].detach()))
        return output["loss"], None

    monitor, _ = _train(Net(_plain, conv=True), loss, conv=True)
    assert monitor is not None
    (text,) = [note.message for note in monitor.notes if note.code == ELSEWHERE]
    assert "softmax of the model's loss" in text and "UpsampleBilinear2D" in text
    assert monitor.history["head_loss"][1] == pytest.approx(
        entropies, rel=1e-2 if precision.itemsize == 2 else 1e-5
    )
    assert "mean_logit" not in monitor.history
    assert monitor.history["zero_sum_violation_max"][1].max() < (1e-2 if precision.itemsize == 2 else 1e-5)


def test_a_loss_that_the_model_returns_and_nobody_trains_is_not_read() -> None:
    def loss(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, None]:
        return F.cross_entropy(_enlarged(model(x, y)["logits"]), y, label_smoothing=0.1), None

    monitor, _ = _train(Net(_plain, conv=True), loss, conv=True)
    assert _codes(monitor) & {ELSEWHERE, CHANGED, "head_never_fired"} == {CHANGED}
    assert monitor is not None and not any(name in monitor.history for name in OF_ROWS)


def test_micro_batches_and_evaluation_between_them_are_read_alike() -> None:
    model = Net(lambda m, h: _enlarged(m.head(h)), conv=True)
    optimizer = torch.optim.Adam(model.parameters())
    with Monitor(model, optimizer, console=False, every=1) as monitor:
        for _ in range(4):
            for _ in range(3):
                loss = F.cross_entropy(model(torch.randn(2, 3, 4, 4)), torch.randint(0, K, (2, 8, 8)))
                (loss / 3).backward()
                monitor.observe_loss(loss)
                model.eval()(torch.randn(2, 3, 4, 4))
                model.train()
            optimizer.step()
            optimizer.zero_grad()
    assert ELSEWHERE in _codes(monitor)
    assert monitor.history["head_loss"][1] == pytest.approx(monitor.history["loss"][1], rel=1e-5)


# --- no note where the loss takes the head's logits -----------------------------------------------------


def _by_hand(z: Tensor, y: Tensor) -> Tensor:
    return (z.logsumexp(-1) - z.gather(-1, y[:, None])[:, 0]).mean()


def _distilled(z: Tensor, y: Tensor) -> Tensor:
    soft = F.kl_div((z / 2).log_softmax(-1), torch.full_like(z, 1 / K), reduction="batchmean")
    return F.cross_entropy(z, y) + soft


def _focal(z: Tensor, y: Tensor) -> Tensor:
    each = F.cross_entropy(z, y, reduction="none")
    return ((1 - torch.exp(-each)) ** 2 * each).mean()


def _with_entropy(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z, y) + 0.1 * (z.softmax(-1) * z.log_softmax(-1)).sum(-1).mean()


def _consistent(z: Tensor, y: Tensor) -> Tensor:
    other = z.detach().flip(0).softmax(-1)
    return F.cross_entropy(z, y) + F.kl_div(z.log_softmax(-1), other, reduction="batchmean")


ORDINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "plain": F.cross_entropy,
    "by hand": _by_hand,
    "centred": lambda z, y: F.cross_entropy(z - z.mean(-1, keepdim=True), y),
    "less the largest": lambda z, y: F.cross_entropy(z - z.amax(-1, keepdim=True), y),
    "margins to the target": lambda z, y: (z - z.gather(-1, y[:, None])).logsumexp(-1).mean(),
    "log of a softmax": lambda z, y: F.nll_loss(z.softmax(-1).log(), y),
    "log of a chosen chance": lambda z, y: -(z.softmax(-1) * F.one_hot(y, K)).sum(-1).add(1e-9).log().mean(),
    "nll": lambda z, y: F.nll_loss(z.log_softmax(-1), y),
    "twice normalised": lambda z, y: F.cross_entropy(z.log_softmax(-1), y),
    "temperature": lambda z, y: F.cross_entropy(z / 2.0, y),
    "smoothed": lambda z, y: F.cross_entropy(z, y, label_smoothing=0.1),
    "two targets": lambda z, y: 0.6 * F.cross_entropy(z, y) + 0.4 * F.cross_entropy(z, y.flip(0)),
    "soft": lambda z, y: F.cross_entropy(z, torch.full_like(z, 1 / K)),
    "less the largest, detached": lambda z, y: F.cross_entropy(z - z.detach().amax(-1, keepdim=True), y),
    "other rows filled": lambda z, y: F.cross_entropy(z.masked_fill(torch.zeros(12, 1) > 0, 0.0), y),
    "some rows": lambda z, y: F.cross_entropy(z[::2], y[::2]),
    "distilled": _distilled,
    "focal": _focal,
    "with an entropy": _with_entropy,
    "with a penalty": lambda z, y: F.cross_entropy(z, y) + 1e-3 * z.square().mean(),
    "of double precision": lambda z, y: F.cross_entropy(z.double(), y),
    "consistent": _consistent,
}  # fmt: skip


@pytest.mark.parametrize("kind", ORDINARY)
def test_an_ordinary_loss_gets_no_note(kind: str) -> None:
    monitor, _ = _train(Net(_plain), lambda m, x, y: (ORDINARY[kind](m(x), y), None))
    assert monitor is not None
    assert not _codes(monitor) & {
        ELSEWHERE,
        CHANGED,
        "no_head",
        "head_by_output",
        "head_guessed",
        "failed_head_check",
    }
    assert len(monitor.history["head_loss"][1]) == 6 and len(monitor.history["feature_mean_norm"][1]) == 6


MODELS: dict[str, Callable[[], nn.Module]] = {
    "an auxiliary head": lambda: Net(lambda m, h: (m.head(h), m.aux(h)), **_heads("aux")),
    "weight norm": lambda: Net(_plain, head=parametrizations.weight_norm(nn.Linear(D, K))),
    "spectral norm": lambda: Net(_plain, head=parametrizations.spectral_norm(nn.Linear(D, K))),
    "a scale that is trained": lambda: Scaled(),
    "a bias of its own": lambda: Net(lambda m, h: m.head(h) + m.more.bias, more=nn.Linear(1, K)),
    "enlarged to its own size": lambda: Net(
        lambda m, h: F.interpolate(m.head(h)[..., None, None], size=1)[..., 0, 0]
    ),
    "log-probabilities": lambda: Net(lambda m, h: m.head(h).log_softmax(-1)),
    "probabilities": lambda: Net(lambda m, h: m.head(h).softmax(-1)),
    "called twice": lambda: Net(lambda m, h: torch.cat([m.head(h[:6]), m.head(h[6:])])),
    "a frozen head": lambda: _frozen(),
}  # fmt: skip


class Scaled(Net):
    def __init__(self) -> None:
        super().__init__(lambda m, h: m.head(F.normalize(h, dim=-1)) * m.scale.exp().clamp(max=100))
        self.scale = nn.Parameter(torch.tensor(1.0))


def _frozen() -> Net:
    model = Net(_plain)
    model.head.requires_grad_(False)
    return model


@pytest.mark.parametrize("kind", MODELS)
def test_a_model_that_returns_its_heads_logits_gets_no_note(kind: str) -> None:
    def loss(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, None]:
        output = model(x)
        if isinstance(output, tuple):
            return F.cross_entropy(output[0], y) + 0.4 * F.cross_entropy(output[1], y), None
        if kind == "probabilities":
            return F.nll_loss(output.log(), y), None
        return F.cross_entropy(output, y), None

    monitor, _ = _train(MODELS[kind](), loss)
    assert monitor is not None
    assert not _codes(monitor) & {ELSEWHERE, CHANGED, "no_head", "head_by_output", "failed_head_check"}
    assert len(monitor.history["head_loss"][1]) == 6
    assert monitor.summary()["run"]["head"].startswith("head")


# --- something is added to the logits, or classes are left out -------------------------------------------


PRIOR = torch.linspace(-4, 4, K)
ADDED: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "a prior": lambda m, h: m.head(h) + PRIOR,
    "a trained bias": lambda m, h: m.head(h) + m.more.bias,
    "a prior, features by keyword": lambda m, h: m.head(input=h) + PRIOR,
    "a mask": lambda m, h: m.head(h).masked_fill(torch.arange(7) >= K, -torch.inf),
    "a mask of zeros and infinities": lambda m, h: m.head(h) + torch.tensor([0.0] * K + [-torch.inf] * 2),
    "a slice": lambda m, h: m.head(h)[:, :K],
    "a slice up to the end": lambda m, h: m.head(h)[..., :-2],
}


def _added(kind: str) -> Net:
    model = Net(ADDED[kind], more=nn.Linear(1, K))
    with torch.no_grad():
        model.more.bias.copy_(PRIOR)  # type: ignore[union-attr,operator]
    if "mask" in kind or "slice" in kind:
        model.head = nn.Linear(D, K + 2)
    return model


def _of_sum(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    logits = model(x)
    return F.cross_entropy(logits, y), logits


@pytest.mark.parametrize("observe", [True, False])
@pytest.mark.parametrize("kind", ADDED)
def test_logits_to_which_something_is_added_are_read_with_their_features(kind: str, observe: bool) -> None:
    torch.manual_seed(2)
    monitor, entropies = _train(_added(kind), _of_sum, observe=observe)
    assert monitor is not None
    assert monitor.history["head_loss"][1] == pytest.approx(entropies, rel=1e-4)
    assert len(monitor.history["feature_mean_norm"][1]) == 6
    assert not _codes(monitor) - {"loss_between_readings"}


def test_a_slice_whose_axes_are_changed_is_not_read_along_another_axis() -> None:
    def loss(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, None]:
        return F.cross_entropy(model(x), (y % 3).reshape(4, 3)), None

    torch.manual_seed(2)
    write: Callable[[Any, Tensor], Tensor] = lambda m, h: m.head(h).reshape(4, 3, K).transpose(1, 2)[:, :4]  # noqa: E731
    monitor, _ = _train(Net(write), loss)
    assert monitor is not None and _codes(monitor) == {"logits_added"}
    assert not {"head_loss", "margin_median"} & set(monitor.history)
    assert monitor.history["zero_sum_violation"][1].max() < 1e-5


def test_a_sum_that_is_multiplied_is_read_without_displacement() -> None:
    """Features and the update of the head's weight give the displacement before the multiplication."""
    torch.manual_seed(2)
    monitor, entropies = _train(Net(lambda m, h: 30 * (m.head(F.normalize(h, dim=-1)) - PRIOR / 30)), _of_sum)
    assert monitor is not None
    assert monitor.history["head_loss"][1] == pytest.approx(entropies, rel=1e-4)
    assert "logit_displacement" not in monitor.history and "displacement_left_out" in _codes(monitor)
    assert len(monitor.history["feature_mean_norm"][1]) == 6


@pytest.mark.parametrize(("classes", "factor"), [(2, 10.0), (2, 1 / 16), (3, 3.0), (K, 1.15), (K, 0.9)])
def test_margins_of_a_factor_that_no_gradient_shows_are_left_out(classes: int, factor: float) -> None:
    def loss(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, None]:
        return F.cross_entropy(model(x) * factor, y % classes), None

    torch.manual_seed(2)
    model = Net(_plain)
    model.head = nn.Linear(D, classes)
    with torch.no_grad():
        model.head.weight.mul_(4)
    monitor, _ = _train(model, loss, steps=12)
    assert monitor is not None and "logits_scaled" in _codes(monitor)
    assert len(monitor.history["zero_sum_violation"][1]) == 12
    for name in ("head_loss", "margin_median", "logit_displacement"):
        assert name not in monitor.history or len(monitor.history[name][1]) < 3


def test_a_factor_of_one_is_no_factor() -> None:
    torch.manual_seed(2)
    monitor, entropies = _train(Net(lambda m, h: m.head(h) / 1.0), _of_sum)
    assert monitor is not None and not _codes(monitor)
    assert monitor.history["head_loss"][1] == pytest.approx(entropies, rel=1e-5)
    assert len(monitor.history["logit_displacement"][1]) == 6


CHANGED_IN_THE_LOSS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "a constant scale for each class": lambda z, y: z * torch.linspace(0.2, 3, K),
    "a temperature for each row": lambda z, y: z / torch.linspace(0.2, 3, 12)[:, None],
    "capped": lambda z, y: 5 * torch.tanh(z / 5),
    "an angular margin": lambda z, y: 9 * torch.cos(
        torch.acos((z / 9).clamp(-0.99, 0.99)) + 0.3 * F.one_hot(y, K)
    ),
    "a class besides": lambda z, y: F.pad(z, (0, 1)),
    "the target first": lambda z, y: torch.cat([z.gather(1, y[:, None]), z], 1),
}  # fmt: skip


@pytest.mark.parametrize("kind", CHANGED_IN_THE_LOSS)
def test_rows_of_logits_that_the_loss_multiplies_are_not_read(kind: str) -> None:
    def loss(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, None]:
        return F.cross_entropy(CHANGED_IN_THE_LOSS[kind](model(x), y), y), None

    torch.manual_seed(2)
    states = []
    for watch in (False, True):
        torch.manual_seed(2)
        model = Net(_plain)
        monitor, _ = _train_observed_first(model, loss, watch=watch)
        states.append(model.state_dict())
    assert monitor is not None and CHANGED in _codes(monitor)
    assert not set(OF_ROWS) & set(monitor.history) - {"zero_sum_violation"}
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def _train_observed_first(
    model: nn.Module, loss: Callable[[nn.Module, Tensor, Tensor], tuple[Tensor, None]], *, watch: bool
) -> tuple[Monitor | None, None]:
    """Train with a loss that is reported before its backward pass, which frees the graph's constants."""
    random = torch.Generator().manual_seed(1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    monitor = Monitor(model, optimizer, console=False, every=1) if watch else None
    for _ in range(6):
        x, y = torch.randn(12, 6, generator=random), torch.randint(0, K, (12,), generator=random)
        found, _ = loss(model, x, y)
        if monitor is not None:
            monitor.observe_loss(found)
        found.backward()
        optimizer.step()
        optimizer.zero_grad()
    if monitor is not None:
        monitor.close()
    return monitor, None


@pytest.mark.parametrize("kind", ADDED)
def test_a_training_whose_sums_are_read_has_the_same_bits(kind: str) -> None:
    states = []
    for watch in (False, True):
        torch.manual_seed(2)
        model = _added(kind)
        _train(model, _of_sum, watch=watch)
        states.append(model.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


IN_THE_LOSS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "a margin": lambda z, y: z - 8 * F.one_hot(y, K),
    "a help": lambda z, y: z + 8 * F.one_hot(y, K),
    "a large prior": lambda z, y: z + 20 * PRIOR,
    "a small prior": lambda z, y: z + torch.arange(K) / K,
    "a scaled margin": lambda z, y: 30 * (z - 0.35 * F.one_hot(y, K)),
    "a margin by where": lambda z, y: torch.where(F.one_hot(y, K) > 0, z - 4, z),
    "a mask of targets": lambda z, y: z.masked_fill(F.one_hot(y, K) > 0, -9.0),
    "some classes": lambda z, y: z[:, :3].index_select(1, torch.tensor([2, 1, 0])),
}


@pytest.mark.parametrize("kind", IN_THE_LOSS)
def test_logits_changed_in_the_loss_are_said_and_the_heads_margins_are_left_out(kind: str) -> None:
    def loss(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, None]:
        logits = IN_THE_LOSS[kind](model(x), y)
        return F.cross_entropy(logits, y % logits.shape[-1]), None

    torch.manual_seed(2)
    monitor, _ = _train(Net(_plain), loss, steps=12)
    assert monitor is not None
    assert not {"head_loss", "margin_median", "margin_min"} & set(monitor.history)
    assert "logits_added" in _codes(monitor) and "logits_scaled" not in _codes(monitor)
    assert len(monitor.history["zero_sum_violation"][1]) == 12


class Bare(nn.Module):
    """Logits are the product with a bare matrix, changed by ``write``."""

    def __init__(self, write: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.trunk, self.unembed, self.write = nn.Linear(6, D), nn.Parameter(torch.randn(K, D)), write

    def forward(self, x: Tensor) -> Tensor:
        return self.write(self.trunk(x).relu() @ self.unembed.T)


@pytest.mark.parametrize(
    "write",
    [lambda z: 4 * z, lambda z: 2 * torch.tanh(z / 2), lambda z: z * torch.linspace(0.2, 3, K)],
    ids=["multiplied", "capped", "a scale for each class"],
)
def test_a_changed_product_with_a_bare_matrix_has_rows_and_no_displacement(write: Any) -> None:
    torch.manual_seed(0)
    monitor, entropies = _train(Bare(write), _of_sum, head="unembed")
    assert monitor is not None
    assert monitor.history["head_loss"][1] == pytest.approx(entropies, rel=1e-4)
    assert monitor.history["zero_sum_violation"][1].max() < 1e-5
    assert "logit_displacement" not in monitor.history and "displacement_left_out" in _codes(monitor)
    assert "not_shift_invariant" not in _codes(monitor) and not monitor.alerts


@pytest.mark.parametrize("scale", [1, 30])
def test_no_displacement_comes_with_tapped_logits_that_are_multiplied_after_the_head(scale: float) -> None:
    torch.manual_seed(0)
    model = Net(_plain)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    with Monitor(model, optimizer, console=False, every=1) as monitor:
        for _ in range(6):
            logits = model(torch.randn(12, 6))
            logits = monitor.tap(scale * logits + PRIOR if scale > 1 else logits + PRIOR)
            F.cross_entropy(logits, torch.randint(0, K, (12,))).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert ("logit_displacement" in monitor.history) is (scale == 1)
    assert len(monitor.history["margin_median"][1]) >= 5


def test_an_added_parameter_that_is_zero_needs_no_note() -> None:
    def loss(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, None]:
        return model(x, y)["loss"], None

    class Returns(Net):
        def forward(self, x: Tensor, y: Tensor | None = None) -> Any:
            z = self.head(self.trunk(x).relu()) + self.own
            return {"loss": F.cross_entropy(z, y), "logits": z}  # type: ignore[arg-type]

    model = Returns(_plain)
    model.own = nn.Parameter(torch.zeros(K))
    monitor, _ = _train(model, loss)
    assert monitor is not None and not _codes(monitor)
    assert monitor.history["head_loss"][1] == pytest.approx(monitor.history["loss"][1], rel=1e-5)
