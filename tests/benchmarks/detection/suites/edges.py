"""Trainings by optimizers without Adam's second moment, for tuning: ordinary ones, and ones that diverge.

Full batches at the edge of stability oscillate for long and converge all the same (Cohen et al. 2021).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.benchmarks.detection import data, models
from tests.benchmarks.detection.families import EDGE, SECOND_MOMENT, TUNING, Family
from tests.benchmarks.detection.suites.checked import CheckedTraining, epochs, part_of
from tests.benchmarks.detection.suites.common import of_output, trained
from tests.benchmarks.detection.suites.digits import perceptron
from tests.benchmarks.detection.suites.registry import family_of
from tests.benchmarks.detection.training import LogitChange, full_batch


def squares(z: Tensor, y: Tensor) -> Tensor:
    """Squared error from a one-hot target, or from a target of the output's shape."""
    wanted = F.one_hot(y, z.shape[-1]).to(z.dtype) if y.dtype is torch.int64 else y
    return 0.5 * (z - wanted).square().sum(-1).mean()


LOSSES: dict[str, Callable[..., Tensor]] = {
    "cross_entropy": F.cross_entropy,
    "squares": squares,
    "hinges": F.multi_margin_loss,
    "smoothed": partial(F.cross_entropy, label_smoothing=0.1),
}


class Reader(nn.Module):
    """Bytes → class, by one layer of attention."""

    def __init__(self, classes: int, width: int = 32, length: int = 16) -> None:
        super().__init__()
        self.embedding = nn.Embedding(128, width)
        self.places = nn.Parameter(0.1 * torch.randn(length, width))
        self.layer = models.Block(width, 2, norm=True, causal=False)
        self.classes = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classes(self.layer(self.embedding(x) + self.places).mean(1))


def _network(net: str, inputs: int, width: int, outputs: int, dropout: float) -> nn.Module:
    if net == "conv":
        return nn.Sequential(
            nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(256, outputs),
        )  # fmt: skip
    if net == "reader":
        return Reader(outputs, width)
    act = {"relu": nn.ReLU, "tanh": nn.Tanh, "gelu": nn.GELU, "elu": nn.ELU}[net]
    return perceptron(inputs, width, 3 if net == "tanh" else 2, outputs, dropout=dropout, act=act)


def _rows(task: str, rows: int, seed: int, noise: float) -> tuple[Tensor, Tensor, int]:
    if task == "waves":
        x = 2 * torch.rand(rows, 3) - 1
        return x, torch.stack([(4 * x[:, 0]).sin() * x[:, 1], x[:, 2].abs()], 1), 2
    if task == "spaces":  # how many words begin in a window of text
        x, _ = data.text_windows(rows, 16, seed=seed)
        return x, (x == 32).sum(1).clamp(1, 4) - 1, 4
    x, y = data.digits(rows, seed=seed)
    return x, torch.where(torch.rand(len(y)) < noise, torch.randint(0, 10, (len(y),)), y), 10


def run(
    seed: int,
    arm: LogitChange,
    *,
    net: str = "relu",
    task: str = "digits",
    loss: str = "cross_entropy",
    rows: int = 1200,
    batch: int | None = 32,
    width: int = 48,
    dropout: float = 0.0,
    noise: float = 0.0,
    momentum: float | None = None,
    **how: Any,
) -> CheckedTraining:
    """``batch`` None: all rows at each step. ``momentum``: SGD with it."""
    torch.manual_seed(seed)
    x, y, outputs = _rows(task, rows, seed, noise)
    model = _network(net, x.shape[1], width, outputs, dropout)
    how = {"decay": 0.0} | how
    if momentum is not None:
        how["kind"], how["options"] = "sgd", {"momentum": momentum} | how.get("options", {})
    if batch is None:
        return trained(model, of_output(LOSSES[loss]), full_batch(x, y), arm, **how)
    draw = epochs(x, y, size=batch, seed=seed)
    return trained(model, of_output(LOSSES[loss]), draw, arm, part=part_of(x, y), check_every=5, **how)


def players(seed: int, arm: LogitChange, *, kind: str = "rmsprop", lr: float = 2e-4) -> CheckedTraining:
    """The discriminator of two small networks that make and judge digits; the other player steps after it."""
    torch.manual_seed(seed)
    x, _ = data.digits(1200, seed=seed)
    judge, maker = perceptron(64, 48, 2, 1, act=nn.ELU), perceptron(8, 48, 2, 64)
    other = torch.optim.RMSprop(maker.parameters(), lr=lr)
    noise = torch.Generator().manual_seed(seed)
    real = epochs(x, size=32, seed=seed)

    def draw(step: int) -> Any:
        with torch.no_grad():
            made = maker(torch.randn(32, 8, generator=noise)).sigmoid()
        return [(torch.cat([real(step)[0][0], made]), torch.arange(64) < 32)]

    def loss(training: Any, given: Any, monitor: Any) -> Tensor:
        return F.binary_cross_entropy_with_logits(training.model(given[0]).squeeze(1), given[1].float())

    def play(training: CheckedTraining, number: int) -> None:
        z = training.model(maker(torch.randn(32, 8, generator=noise)).sigmoid()).squeeze(1)
        (gradients) = torch.autograd.grad(F.softplus(-z).mean(), [*maker.parameters()])
        for parameter, gradient in zip(maker.parameters(), gradients, strict=True):
            parameter.grad = gradient
        other.step()

    return trained(judge, loss, draw, arm, kind=kind, lr=lr, decay=0.0, after_update=play)


def _ordinary() -> list[Family]:
    family = partial(family_of, TUNING)
    full: dict[str, Any] = {"rows": 100, "batch": None}
    return [
        family("g-momentum", run, 2000, momentum=0.9, lr=0.02),
        family("g-conv-cosine", run, 2000, net="conv", kind="nesterov", lr=0.05, decay=5e-4,
               schedule=("cosine", 2000, 100)),
        family("g-restarts", run, 2000, momentum=0.9, lr=0.05, schedule=("restarts", 500)),
        family("g-dropout", run, 2000, momentum=0.9, lr=0.05, dropout=0.3),
        family("g-label-noise", run, 2000, momentum=0.9, lr=0.03, noise=0.2, decay=1e-3),
        family("g-plain", run, 2000, momentum=0.0, lr=0.3, net="gelu"),
        family("g-one-cycle", run, 2000, momentum=0.9, lr=0.1, schedule=("one_cycle", 2000)),
        family("g-reader", run, 2000, net="reader", task="spaces", momentum=0.9, lr=0.05,
               schedule=("cosine", 2000, 100)),
        family("g-edge-squares", run, 2000, net="tanh", loss="squares", momentum=0.0, lr=0.1, nats=False,
               **full),
        family("g-edge-squares-steep", run, 2000, net="tanh", loss="squares", momentum=0.0, lr=0.3,
               nats=False, **full),
        family("g-edge-relu", run, 2000, loss="squares", momentum=0.0, lr=0.2, nats=False, **full),
        family("g-edge-cross-entropy", run, 2000, net="tanh", momentum=0.0, lr=1.0, **full),
        family("g-edge-momentum", run, 2000, net="tanh", loss="squares", momentum=0.9, lr=0.15, nats=False,
               **full),
        family("g-edge-momentum-cross-entropy", run, 2000, net="tanh", momentum=0.9, lr=0.5, **full),
        family("g-edge-nesterov", run, 2000, net="elu", loss="squares", kind="nesterov", lr=0.07, nats=False,
               **full),
        family("g-edge-waves", run, 2000, net="tanh", task="waves", loss="squares", momentum=0.0, lr=0.2,
               nats=False, **full),
        family("g-edge-waves-momentum", run, 2000, net="gelu", task="waves", loss="squares", momentum=0.9,
               lr=0.2, nats=False, **full),
        family("g-edge-smoothed", run, 2000, net="gelu", loss="smoothed", momentum=0.0, lr=0.5, **full),
        family("g-edge-rmsprop", run, 2000, net="tanh", loss="squares", kind="rmsprop", lr=1e-4, nats=False,
               **full),
        family("g-rmsprop", run, 2000, kind="rmsprop", lr=1e-3),
        family("g-rmsprop-decay", run, 2000, kind="rmsprop", lr=1e-3, decay=1e-3, dropout=0.2),
        family("g-centred", run, 2000, net="gelu", kind="centred", lr=3e-4),
        family("g-adagrad", run, 2000, kind="adagrad", lr=0.03),
        family("g-adadelta", run, 2000, kind="adadelta", lr=1.0),
        family("g-asgd", run, 2000, kind="asgd", lr=0.2),
        family("g-adamax", run, 2000, net="gelu", kind="adamax", lr=2e-3),
        family("g-nadam-full", run, 2000, net="gelu", kind="nadam", lr=1e-3, **full),
        family("g-players", players, 2000, floor=False),
        family("g-players-momentum", players, 2000, kind="momentum", lr=0.01, floor=False),
    ]  # fmt: skip


def _diverging() -> list[Family]:
    family = partial(family_of, TUNING, mechanism=EDGE)
    full: dict[str, Any] = {"rows": 100, "batch": None}
    faster = ("growing", 100, 1.3)
    return [
        family("d-growing", run, 2000, net="tanh", loss="squares", momentum=0.0, lr=0.1, nats=False,
               schedule=faster, **full),
        family("d-growing-relu", run, 2000, loss="squares", momentum=0.0, lr=0.1, nats=False,
               schedule=faster, **full),
        family("d-growing-momentum", run, 2000, net="gelu", loss="squares", momentum=0.9, lr=0.01, nats=False,
               schedule=faster, **full),
        family("d-growing-nesterov", run, 2000, net="gelu", task="waves", loss="squares", kind="nesterov",
               lr=0.02, nats=False, schedule=faster, **full),
        family("d-growing-dampened", run, 2000, net="elu", task="waves", loss="squares", momentum=0.9,
               options={"dampening": 0.5}, lr=0.05, nats=False, schedule=faster, **full),
        family("d-growing-smoothed", run, 1500, net="tanh", loss="smoothed", momentum=0.9, lr=0.3,
               schedule=faster, **full),
        family("d-growing-conv", run, 1200, net="conv", loss="smoothed", kind="nesterov", lr=0.05,
               schedule=faster, **full),
        family("d-growing-reader", run, 1200, net="reader", task="spaces", loss="squares", momentum=0.9,
               lr=0.05, schedule=faster, nats=False, **full),
        family("d-growing-batches", run, 2000, momentum=0.9, lr=0.02, schedule=faster),
        family("d-growing-batches-squares", run, 2000, loss="squares", momentum=0.0, lr=0.05, nats=False,
               schedule=faster),
        family("d-warm-up", run, 2000, net="gelu", loss="squares", momentum=0.9, lr=1.0, nats=False,
               schedule=("cosine", 4000, 2000), **full),
        family("d-warm-up-smoothed", run, 1500, net="relu", loss="smoothed", momentum=0.9, lr=10.0,
               schedule=("cosine", 4000, 1500), **full),
        family("d-sharpening", run, 2000, net="gelu", loss="squares", momentum=0.9, lr=0.3, nats=False,
               **full),
        family("d-sharpening-waves", run, 2000, net="tanh", task="waves", loss="squares", momentum=0.95,
               lr=0.25, nats=False, **full),
        family("d-rmsprop-growing", run, 2000, net="gelu", loss="squares", kind="rmsprop", lr=1e-4,
               nats=False, schedule=faster, **full),
        family("d-rmsprop", run, 2000, net="gelu", kind="rmsprop", lr=3e-3, options={"alpha": 0.95}, **full),
        family("d-rmsprop-momentum", run, 2000, net="tanh", kind="rmsprop", lr=1e-3,
               options={"momentum": 0.9}, **full),
        family("d-rmsprop-hinges", run, 2000, mechanism=SECOND_MOMENT, loss="hinges", kind="rmsprop", lr=1e-3,
               decay=1e-3, nats=False, **full),
        family("d-rmsprop-decay", run, 2000, mechanism=SECOND_MOMENT, net="gelu", kind="rmsprop", lr=3e-3,
               options={"alpha": 0.98}, decay=1e-3, **full),
        family("d-adamax-growing", run, 2000, net="gelu", loss="squares", kind="adamax", lr=2e-3, nats=False,
               schedule=faster, **full),
        family("d-nadam-growing", run, 2000, net="gelu", loss="squares", kind="nadam", lr=1e-3, nats=False,
               beta2=0.99, schedule=faster, **full),
    ]  # fmt: skip


EDGES: dict[str, Family] = {family.name: family for family in (*_ordinary(), *_diverging())}
"""Name → family."""
