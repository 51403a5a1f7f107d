"""What the first losses and gradients show of a head that was found by its name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nfi_monitor import Monitor

K, D = 5, 8


class Body(nn.Module):
    """Modules by their names, and what ``write(model, x)`` makes of them."""

    def __init__(self, write: Callable[[Any, Tensor], Any], **parts: Any) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.write = write

    def forward(self, x: Tensor) -> Any:
        return self.write(self, x)


Loss = Callable[[Any, Tensor, Tensor], Tensor]


def _train(
    model: nn.Module,
    loss: Loss,
    *more: nn.Module,
    steps: int = 6,
    observe: bool = True,
    before: bool = False,
    **options: Any,
) -> Monitor:
    """Train; return the closed monitor. ``before``: report the loss before its backward pass."""
    torch.manual_seed(0)
    optimizer = torch.optim.Adam([p for part in (model, *more) for p in part.parameters()], lr=1e-2)
    monitor = Monitor(model, optimizer, console=False, every=1, **options)
    for _ in range(steps):
        found = loss(model, torch.randn(12, 6), torch.randint(0, K, (12,)))
        if observe and before:
            monitor.observe_loss(found)
        found.backward()
        if observe and not before:
            monitor.observe_loss(found)
        optimizer.step()
        optimizer.zero_grad()
    monitor.close()
    return monitor


def _head(monitor: Monitor) -> str | None:
    found = monitor.summary()["run"]["head"]
    return None if found.startswith("none") else found.split(" (")[0].removeprefix("layer ")


def _texts(monitor: Monitor) -> dict[str, str]:
    return {note.code: note.message for note in monitor.notes}


def _embeddings(model: Any, x: Tensor) -> dict[str, Tensor]:
    h = F.layer_norm(model.trunk(x), (D,))
    return {"embedding": h, "pooled": model.pooler(h).tanh()}


def _without_pooled(model: Any, x: Tensor) -> dict[str, Tensor]:
    return {"embedding": _embeddings(model, x)["embedding"]}


def _encoder() -> Body:
    """As a sentence encoder: the pooling layer is called, and no loss uses it."""
    return Body(_without_pooled, trunk=nn.Linear(6, D), pooler=nn.Linear(D, D))


def _cosine(model: Any, x: Tensor, y: Tensor) -> Tensor:
    one, other = model(x)["embedding"], model(x.flip(0))["embedding"]
    return F.mse_loss(F.cosine_similarity(one, other), y / K)


def _triplet(model: Any, x: Tensor, y: Tensor) -> Tensor:
    h = model(x)["embedding"]
    return F.triplet_margin_loss(h, h.roll(1, 0), h.roll(2, 0))


def _ranking(model: Any, x: Tensor, y: Tensor) -> Tensor:
    one, other = (F.normalize(model(v)["embedding"], dim=-1) for v in (x, x + 0.1))
    return F.cross_entropy(20 * one @ other.T, torch.arange(len(x)))


@pytest.mark.parametrize("loss", [_cosine, _triplet])
@pytest.mark.parametrize("observe", [True, False])
def test_a_layer_at_which_no_gradient_arrives_is_no_head(loss: Loss, observe: bool) -> None:
    monitor = _train(_encoder(), loss, observe=observe)
    assert _head(monitor) is None
    texts = _texts(monitor)
    seen = observe and loss is _cosine
    why = "product of two features" if seen else "No gradient has arrived at pooler (Linear 8→8)"
    assert why in texts["no_head"]
    assert not texts.keys() & {"head_guessed", "head_never_fired", "failed_head_check"}
    assert len(monitor.history["rms_t_max"][1]) >= 5


@pytest.mark.parametrize("before", [True, False])
def test_logits_of_two_embeddings_have_no_head(before: bool) -> None:
    monitor = _train(_encoder(), _ranking, before=before)
    assert _head(monitor) is None and "product of two features" in _texts(monitor)["no_head"]
    assert not _texts(monitor).keys() & {"head_guessed", "head_never_fired"}


def test_a_layer_that_makes_an_output_which_no_loss_takes_is_no_head() -> None:
    model = Body(_embeddings, trunk=nn.Linear(6, D), pooler=nn.Linear(D, D))
    monitor = _train(model, _ranking)
    assert _head(monitor) is None and "No gradient has arrived at pooler" in _texts(monitor)["no_head"]
    assert not _texts(monitor).keys() & {"head_guessed", "head_never_fired"}


def _two_heads(model: Any, x: Tensor) -> dict[str, Tensor]:
    h = F.relu(model.trunk(x))
    return {"few": model.few(h), "many": model.many(h)}


@pytest.mark.parametrize("observe", [True, False])
def test_the_output_that_the_loss_takes_has_the_head(observe: bool) -> None:
    """The last layer by its name has more classes, and is called at each step."""
    model = Body(_two_heads, trunk=nn.Linear(6, D), few=nn.Linear(D, K), many=nn.Linear(D, 30))
    monitor = _train(model, lambda net, x, y: F.cross_entropy(net(x)["few"], y), observe=observe, steps=12)
    assert _head(monitor) == "few"
    assert "many (Linear 8→30), is not in the loss" in _texts(monitor)["head_by_output"]
    assert len(monitor.history["margin_median"][1]) >= 8 and "no_head" not in _texts(monitor)


def test_an_embedding_beside_a_layer_that_no_loss_takes_is_no_head() -> None:
    model = Body(_two_heads, trunk=nn.Linear(6, D), few=nn.Linear(D, K), many=nn.Linear(D, 30))
    monitor = _train(model, lambda net, x, y: net(x)["few"].square().mean(), observe=False)
    assert _head(monitor) is None and "No gradient has arrived at many" in _texts(monitor)["no_head"]


def test_embeddings_that_a_trained_projection_makes_have_no_head() -> None:
    """As CLIP: the inner layer that is taken by its place gets a gradient, too."""

    def write(model: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        image, text = model.trunk(x), model.inner(model.trunk(x).relu())
        return F.normalize(image @ model.p, dim=-1), F.normalize(text @ model.q, dim=-1), model.scale.exp()

    def loss(model: Any, x: Tensor, y: Tensor) -> Tensor:
        image, text, scale = model(x)
        z = scale * image @ text.T
        return (F.cross_entropy(z, torch.arange(12)) + F.cross_entropy(z.T, torch.arange(12))) / 2

    matrix = nn.Parameter(torch.randn(D, D)), nn.Parameter(torch.randn(D, D))
    scale = nn.Parameter(torch.tensor(1.0))
    model = Body(write, trunk=nn.Linear(6, D), inner=nn.Linear(D, D), p=matrix[0], q=matrix[1], scale=scale)
    monitor = _train(model, loss)
    assert _head(monitor) is None and "product of two features" in _texts(monitor)["no_head"]
    assert "head_guessed" not in _texts(monitor)


def test_a_classifier_outside_of_the_model_is_said() -> None:
    classifier = nn.Linear(2 * D, 3)

    def loss(model: Any, x: Tensor, y: Tensor) -> Tensor:
        h = torch.cat([model(x)["embedding"], model(x.flip(0))["embedding"]], -1)
        return F.cross_entropy(classifier(h), y % 3)

    monitor = _train(_encoder(), loss, classifier)
    assert _head(monitor) is None
    assert "a weight [3, 16] that is not in the watched model" in _texts(monitor)["no_head"]


def test_a_classifier_in_a_list_with_the_model_is_the_head() -> None:
    both = nn.ModuleList([_encoder(), nn.Linear(D, 3)])

    def loss(model: Any, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(model[1](model[0](x)["embedding"]), y % 3)

    monitor = _train(both, loss)
    assert _head(monitor) == "1" and not _texts(monitor).keys() & {"head_guessed", "no_head"}
    assert monitor.history["head_loss"][1] == pytest.approx(monitor.history["loss"][1], rel=1e-5)


class Autoencoder(nn.Module):
    """Its parts are called one by one; the layer that is registered last is an inner one."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(6, 2 * 4), nn.Sequential(nn.Linear(4, D), nn.ReLU())
        self.out, self.inner = nn.Linear(D, 6), nn.Linear(4, 4)


def test_the_last_layer_of_an_autoencoder_is_found_by_its_loss() -> None:
    def loss(model: Any, x: Tensor, y: Tensor) -> Tensor:
        mean, log = model.encoder(x).chunk(2, -1)
        latent = model.inner(mean + torch.randn_like(mean) * (log / 2).exp())
        kl = 0.5 * (mean.square() + log.exp() - 1 - log).mean()
        return F.mse_loss(model.out(model.decoder(latent)), x) + 1e-3 * kl

    monitor = _train(Autoencoder(), loss)
    assert _head(monitor) == "out"
    assert "as the graph of the loss shows" in _texts(monitor)["head_by_output"]


def test_a_usual_head_before_another_trained_layer_is_an_inner_one() -> None:
    model = Body(
        lambda m, x: m.calibration(m.head(m.trunk(x).relu())),
        trunk=nn.Linear(6, D), calibration=nn.Linear(K, K), head=nn.Linear(D, K),
    )  # fmt: skip
    monitor = _train(model, lambda m, x, y: F.cross_entropy(m(x), y))
    assert _head(monitor) == "calibration"
    assert monitor.history["head_loss"][1] == pytest.approx(monitor.history["loss"][1][-5:], rel=1e-5)


def test_a_usual_head_stays_if_the_reported_loss_is_another_part() -> None:
    """The loop trains two losses, and reports that of the other head."""
    model = Body(
        lambda m, x: (m.classifier(m.trunk(x)), m.other(m.trunk(x))),
        trunk=nn.Linear(6, D), other=nn.Linear(D, 3), classifier=nn.Linear(D, K),
    )  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters())
    with Monitor(model, optimizer, console=False, every=1) as monitor:
        for _ in range(6):
            first, second = model(torch.randn(12, 6))
            y = torch.randint(0, 3, (12,))
            part = F.cross_entropy(second, y)
            (part + F.cross_entropy(first, y)).backward()
            monitor.observe_loss(part)
            optimizer.step()
    assert _head(monitor) == "classifier" and "head_by_output" not in _texts(monitor)


def _projection(width: int) -> Body:
    return Body(lambda m, x: m.last(m.trunk(x).relu()), trunk=nn.Linear(6, D), last=nn.Linear(D, width))


def _distances(model: Any, x: Tensor, y: Tensor) -> Tensor:
    """Prototypes: the logits are distances of embeddings."""
    h = model(x)
    return F.cross_entropy(-torch.cdist(h[K:], h[:K]).square(), y[K:])


def _dots(model: Any, x: Tensor, y: Tensor) -> Tensor:
    """As a recommender of two towers."""
    one, other = model(x), F.normalize(model(x.flip(0)), dim=-1)
    return F.binary_cross_entropy_with_logits((one * other).sum(-1), (y > 2).float())


def _contrasted(model: Any, x: Tensor, y: Tensor) -> Tensor:
    h = F.normalize(model(torch.cat([x, x + 0.1])), dim=-1)
    z = (h @ h.T / 0.1).masked_fill(torch.eye(24).bool(), -1e9)
    return F.cross_entropy(z, torch.arange(24).roll(12))


@pytest.mark.parametrize("loss", [_distances, _dots, _contrasted])
@pytest.mark.parametrize("width", [D, 7])
@pytest.mark.parametrize("before", [True, False])
def test_a_layer_that_makes_embeddings_is_no_head(loss: Loss, width: int, before: bool) -> None:
    """Also if no other layer has its width, as is usual for a head."""
    monitor = _train(_projection(width), loss, before=before)
    assert _head(monitor) is None and "no_head" in _texts(monitor)
    assert not _texts(monitor).keys() & {"head_guessed", "rows_after_head", "logits_changed"}
    assert "head_loss" not in monitor.history


def test_gated_logits_are_no_dot_product() -> None:
    model = Body(
        lambda m, x: m.last(m.trunk(x)) * m.gate(m.trunk(x)).sigmoid(),
        trunk=nn.Linear(6, D), gate=nn.Linear(D, D), last=nn.Linear(D, D),
    )  # fmt: skip
    monitor = _train(model, lambda m, x, y: F.cross_entropy(m(x), y))
    assert _head(monitor) == "last" and "no_head" not in _texts(monitor)
    assert monitor.history["head_loss"][1] == pytest.approx(monitor.history["loss"][1][-6:], rel=1e-5)


class Cosine(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.W = nn.Linear(6, D), nn.Parameter(torch.randn(K, D))

    def forward(self, x: Tensor) -> Tensor:
        return 16 * F.linear(F.normalize(self.trunk(x)), F.normalize(self.W))


def test_a_normalised_weight_is_not_called_a_feature() -> None:
    monitor = _train(Cosine(), lambda m, x, y: F.cross_entropy(m(x), y))
    text = _texts(monitor)["no_head"]
    assert (
        _head(monitor) is None and "computed from a parameter [5, 8]" in text and "two features" not in text
    )


class CosineLayer(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 16 * F.linear(F.normalize(x), F.normalize(self.weight))


def test_a_layer_that_normalises_its_weight_is_the_head() -> None:
    model = Body(lambda m, x: m.last(m.trunk(x)), trunk=nn.Linear(6, D), last=CosineLayer(D, D))
    monitor = _train(model, lambda m, x, y: F.cross_entropy(m(x), y))
    assert _head(monitor) == "last" and "no_head" not in _texts(monitor)
    assert monitor.history["head_loss"][1] == pytest.approx(monitor.history["loss"][1], rel=1e-5)


def test_a_frozen_head_that_is_no_usual_one_is_kept() -> None:
    model = Body(lambda m, x: m.last(m.trunk(x)), trunk=nn.Linear(6, D), last=nn.Linear(D, D))
    model.last.requires_grad_(False)
    monitor = _train(model, lambda m, x, y: F.cross_entropy(m(x), y))
    assert _head(monitor) == "last" and not _texts(monitor).keys() & {"no_head", "head_guessed"}


def test_a_layer_that_is_trained_later_than_the_first_steps_was_named() -> None:
    """A named head stays, whatever arrives."""
    monitor = _train(_encoder(), _cosine, head="pooler")
    assert _head(monitor) == "pooler" and "no_head" not in _texts(monitor)
    assert "head_never_fired" in _texts(monitor)


@pytest.mark.parametrize("observe", [True, False])
def test_the_check_ends_with_the_first_loss_and_its_hook_is_removed(observe: bool) -> None:
    model = Body(lambda m, x: m.last(m.trunk(x)), trunk=nn.Linear(6, D), last=nn.Linear(D, K))
    optimizer = torch.optim.Adam(model.parameters())
    with Monitor(model, optimizer, console=False, every=1) as monitor:
        for step in range(4):
            loss = F.cross_entropy(model(torch.randn(12, 6)), torch.randint(0, K, (12,)))
            loss.backward()
            if observe:
                monitor.observe_loss(loss)
            optimizer.step()
            assert len(model._forward_hooks) == (step < 2 and not observe)
        assert monitor._loop.probe.nodes is None and monitor._loop.loss_sources.look is None
