"""Ordinary trainings on the digits that are no plain classification, or are trained in another way."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.benchmarks.detection import data
from tests.benchmarks.detection.suites.checked import CheckedTraining, epochs, part_of
from tests.benchmarks.detection.suites.common import Draw, of_output, trained
from tests.benchmarks.detection.suites.held_out.shared import cross_entropy, generator_of, squares
from tests.benchmarks.detection.training import LogitChange


def _images(seed: int, rows: int = 1500) -> tuple[Tensor, Tensor]:
    x, y = data.digits(rows, seed=seed)
    return x.reshape(-1, 1, 8, 8), y


# --- classifiers ---------------------------------------------------------------------------------------


def grouped(width: int = 8) -> nn.Sequential:
    """Convolutions with GroupNorm."""
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1), nn.GroupNorm(2, width), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(width, 2 * width, 3, padding=1), nn.GroupNorm(4, 2 * width), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(8 * width, 10),
    )  # fmt: skip


def separable(width: int = 16) -> nn.Sequential:
    """Depthwise and pointwise convolutions, hard swish, BatchNorm."""
    return nn.Sequential(
        nn.Conv2d(1, width, 2, stride=2), nn.Hardswish(),
        nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False), nn.BatchNorm2d(width),
        nn.Conv2d(width, 2 * width, 1), nn.Hardswish(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.1), nn.Linear(2 * width, 10),
    )  # fmt: skip


class Residuals(nn.Module):
    """Blocks of affine rescaling and a perceptron, without a norm (Touvron et al. 2021)."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.first = nn.Linear(64, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
            for _ in range(3)
        )
        self.scales = nn.ParameterList(torch.full((width,), 0.1) for _ in range(3))
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x.flatten(1))
        for block, scale in zip(self.blocks, self.scales, strict=True):
            x = x + scale * block(x)
        return self.head(x)


NETS: dict[str, Callable[[], nn.Module]] = {
    "grouped": grouped,
    "separable": separable,
    "residuals": Residuals,
}


def classified(
    seed: int,
    arm: LogitChange,
    *,
    net: str,
    batch: int = 32,
    accumulate: int = 1,
    smoothing: float = 0.0,
    low: bool = False,
    **how: Any,
) -> CheckedTraining:
    """``accumulate``: micro-batches a step. ``low``: all but the loss is bfloat16."""
    torch.manual_seed(seed)
    x, y = _images(seed)
    model = NETS[net]()
    if low:
        model, x = model.bfloat16(), x.bfloat16()
    plain = epochs(x, y, size=batch * accumulate, seed=seed)

    def draw(step: int) -> Any:
        inputs, target = plain(step)[0]
        return list(zip(inputs.split(batch), target.split(batch), strict=True))

    loss = of_output(lambda z, t: F.cross_entropy(z.float(), t, label_smoothing=smoothing))
    return trained(model, loss, draw, arm, part=part_of(x, y), **how)


def sharpness_aware(seed: int, arm: LogitChange, *, radius: float = 0.05, **how: Any) -> CheckedTraining:
    """SAM (Foret et al. 2021): the gradient is taken again after a small step uphill."""
    torch.manual_seed(seed)
    x, y = _images(seed)
    model = grouped()
    plain = epochs(x, y, size=32, seed=seed)
    held: dict[str, Any] = {}

    def draw(step: int) -> Any:
        held["batch"] = plain(step)[0]
        return [held["batch"]]

    def uphill(network: nn.Module) -> None:
        parameters = list(network.parameters())
        norm = torch.stack([p.grad.norm() for p in parameters]).norm() + 1e-12  # type: ignore[union-attr]
        moves = [radius / norm * p.grad for p in parameters]  # type: ignore[operator]
        with torch.no_grad():
            for parameter, move in zip(parameters, moves, strict=True):
                parameter.add_(move)
                parameter.grad = None
        inputs, target = held["batch"]
        F.cross_entropy(network(inputs), target).backward()
        with torch.no_grad():
            for parameter, move in zip(parameters, moves, strict=True):
                parameter.sub_(move)

    return trained(model, cross_entropy, draw, arm, part=part_of(x, y), before_update=uphill, **how)


def plateau(
    seed: int, arm: LogitChange, *, every: int = 100, patience: int = 5, **how: Any
) -> CheckedTraining:
    """Go back to the best weights and halve the rate where the loss of other rows has stopped falling."""
    torch.manual_seed(seed)
    x, y = _images(seed, 1700)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.Mish(), nn.Dropout(0.3), nn.Linear(64, 10))
    best: dict[str, Any] = {"loss": float("inf"), "bad": 0}

    def look(training: Any, number: int) -> None:
        if number % every:
            return
        model.eval()
        with torch.no_grad():
            loss = float(F.cross_entropy(model(x[1200:]), y[1200:]))
        model.train()
        if loss < best["loss"]:
            best.update(loss=loss, bad=0, weights=copy.deepcopy(model.state_dict()))
            return
        best["bad"] += 1
        if best["bad"] == patience:
            best["bad"] = 0
            model.load_state_dict(best["weights"])
            for group in training.optimizer.param_groups:
                group["lr"] *= 0.5

    draw = epochs(x[:1200], y[:1200], size=32, seed=seed)
    return trained(model, cross_entropy, draw, arm, part=part_of(x, y), after_update=look, **how)


def born_again(seed: int, arm: LogitChange, *, heat: float = 4.0, **how: Any) -> CheckedTraining:
    """Self-distillation: labels, and a trained network of the same kind (Furlanello et al. 2018)."""
    torch.manual_seed(seed)
    x, y = _images(seed)
    draw = epochs(x, y, size=32, seed=seed)
    teacher = grouped()
    before = trained(teacher, cross_entropy, draw, arm).optimizer
    for number in range(1, 300):
        inputs, target = draw(number)[0]
        F.cross_entropy(teacher(inputs), target).backward()
        before.step()
        before.zero_grad()
    with torch.no_grad():
        soft = teacher(x)

    def both(z: Tensor, target: Tensor, taught: Tensor) -> Tensor:
        far = F.kl_div((z / heat).log_softmax(-1), (taught / heat).softmax(-1), reduction="batchmean")
        return 0.5 * F.cross_entropy(z, target) + 0.5 * heat**2 * far

    batches = epochs(x, y, soft, size=32, seed=seed + 1)
    return trained(grouped(), of_output(both), batches, arm, part=part_of(x, y, soft), **how)


class ThreeTasks(nn.Module):
    """Class, amount of ink and quarter turns, weighted by learned uncertainties (Kendall et al. 2018)."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Flatten(), nn.Linear(64, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()
        )
        self.kind, self.ink, self.turn = nn.Linear(width, 10), nn.Linear(width, 1), nn.Linear(width, 4)
        self.doubts = nn.Parameter(torch.zeros(3))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = self.trunk(x)
        return self.kind(x), self.ink(x).squeeze(1), self.turn(x)


def three_tasks(seed: int, arm: LogitChange, **how: Any) -> CheckedTraining:
    torch.manual_seed(seed)
    x, y = _images(seed)
    turn = torch.randint(0, 4, (len(y),))
    x = torch.stack([torch.rot90(image, int(k), (1, 2)) for image, k in zip(x, turn, strict=True)])
    ink = x.mean((1, 2, 3))

    def loss(training: Any, batch: Any, monitor: Any) -> Tensor:
        inputs, kind, amount, turned = batch
        a, b, c = training.model(inputs)
        each = torch.stack([F.cross_entropy(a, kind), F.mse_loss(b, amount), F.cross_entropy(c, turned)])
        doubts = training.model.doubts
        return ((-doubts).exp() * each + doubts).sum()

    draw = epochs(x, y, ink, turn, size=32, seed=seed)
    return trained(
        ThreeTasks(), loss, draw, arm, part=part_of(x, y, ink, turn), watch={"head": "kind"}, **how
    )


# --- pixels --------------------------------------------------------------------------------------------


class UNet(nn.Module):
    """Two levels and a skip connection (Ronneberger et al. 2015); as many outputs as pixels."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.ReLU())
        self.low = nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(width, 2 * width, 3, padding=1), nn.ReLU())
        self.up = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.last = nn.Sequential(
            nn.Conv2d(2 * width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, 1, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        high = self.down(x)
        return self.last(torch.cat([high, self.up(self.low(high))], 1))


def dice(z: Tensor, ink: Tensor) -> Tensor:
    """Binary cross-entropy + 1 − Dice's coefficient."""
    shown = z.sigmoid()
    overlap = (2 * (shown * ink).sum() + 1) / (shown.sum() + ink.sum() + 1)
    return F.binary_cross_entropy_with_logits(z, ink) + 1 - overlap


def pixels(seed: int, arm: LogitChange, *, task: str, noise: float = 0.3, **how: Any) -> CheckedTraining:
    """``task``: "segment" the ink of a noisy digit, or "clean" it."""
    torch.manual_seed(seed)
    x, _ = _images(seed)
    noisy = x + noise * torch.randn(x.shape)
    target = (x > 0.5).float() if task == "segment" else x
    loss = of_output(dice if task == "segment" else F.l1_loss)
    draw = epochs(noisy, target, size=16, seed=seed)
    return trained(
        UNet(), loss, draw, arm, part=part_of(noisy, target, rows=64), watch={"head": "last.2"}, **how
    )


class Sines(nn.Module):
    """sin(ω(Wx + b)) (Sitzmann et al. 2020)."""

    def __init__(self, inputs: int, outputs: int, speed: float = 10.0) -> None:
        super().__init__()
        self.linear, self.speed = nn.Linear(inputs, outputs), speed
        nn.init.uniform_(self.linear.weight, -((6 / inputs) ** 0.5) / speed, (6 / inputs) ** 0.5 / speed)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(self.speed * self.linear(x))


def picture_by_heart(seed: int, arm: LogitChange, **how: Any) -> CheckedTraining:
    """A network of sines is a picture: place → brightness; random places each step."""
    torch.manual_seed(seed)
    picture = data.digits(16, seed=seed)[0].reshape(4, 4, 8, 8).permute(0, 2, 1, 3).reshape(32, 32)
    places = torch.cartesian_prod(torch.linspace(-1, 1, 32), torch.linspace(-1, 1, 32))
    order = torch.randperm(len(places))
    places, bright = places[order], picture.flatten()[order][:, None]
    model = nn.Sequential(Sines(2, 48), Sines(48, 48), nn.Linear(48, 1))
    draw = epochs(places, bright, size=128, seed=seed)
    return trained(model, squares, draw, arm, part=part_of(places, bright), **how)


class Codes(nn.Module):
    """A vector-quantised autoencoder (van den Oord et al. 2017); returns (picture, codebook's loss)."""

    def __init__(self, codes: int = 32, width: int = 8) -> None:
        super().__init__()
        self.inner = nn.Sequential(
            nn.Conv2d(1, 16, 2, stride=2), nn.ReLU(), nn.Conv2d(16, width, 2, stride=2)
        )
        self.codes = nn.Embedding(codes, width)
        self.outer = nn.Sequential(
            nn.ConvTranspose2d(width, 16, 2, stride=2), nn.ReLU(), nn.ConvTranspose2d(16, 1, 2, stride=2)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        found = self.inner(x).permute(0, 2, 3, 1)
        far = torch.cdist(found.flatten(0, 2).detach(), self.codes.weight.detach())
        near = self.codes(far.argmin(1)).reshape(found.shape)
        apart = F.mse_loss(near, found.detach()) + 0.25 * F.mse_loss(found, near.detach())
        through = found + (near - found).detach()
        return self.outer(through.permute(0, 3, 1, 2)), apart


def quantised(seed: int, arm: LogitChange, **how: Any) -> CheckedTraining:
    torch.manual_seed(seed)
    x, _ = _images(seed)

    def loss(training: Any, batch: Any, monitor: Any) -> Tensor:
        shown, apart = training.model(batch[0])
        return F.mse_loss(shown, batch[0]) + apart

    draw = epochs(x, size=32, seed=seed)
    return trained(Codes(), loss, draw, arm, part=part_of(x), watch={"head": "outer.2"}, **how)


class MaskedPatches(nn.Module):
    """Sixteen patches, most of them hidden, are drawn from the others (He et al. 2022)."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.patches = nn.Linear(4, width)
        self.places = nn.Parameter(0.02 * torch.randn(16, width))
        self.hidden = nn.Parameter(torch.zeros(width))
        self.layer = nn.TransformerEncoderLayer(
            width, 2, 2 * width, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.head = nn.Linear(width, 4)

    def forward(self, given: tuple[Tensor, Tensor]) -> Tensor:
        patches, hidden = given
        x = torch.where(hidden[..., None], self.hidden, self.patches(patches))
        return self.head(self.layer(x + self.places))


def masked_patches(seed: int, arm: LogitChange, **how: Any) -> CheckedTraining:
    torch.manual_seed(seed)
    x, _ = _images(seed)
    patches = x.reshape(-1, 4, 2, 4, 2).transpose(2, 3).reshape(-1, 16, 4)
    plain = epochs(patches, size=32, seed=seed)

    def hide(rows: Tensor, number: int) -> tuple[tuple[Tensor, Tensor], Tensor]:
        return (rows, torch.rand(rows.shape[:2], generator=generator_of(seed, number)) < 0.6), rows

    def loss(training: Any, batch: Any, monitor: Any) -> Tensor:
        given, target = batch
        wrong = (training.model(given) - target).square().mean(-1)
        return (wrong * given[1]).sum() / given[1].sum()

    draw: Draw = lambda step: [hide(plain(step)[0][0], step)]  # noqa: E731
    return trained(MaskedPatches(), loss, draw, arm, part=hide(patches[:128], 0), **how)
