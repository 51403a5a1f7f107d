"""Ordinary trainings of convolutional networks on the digits."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.benchmarks.detection import data, losses
from tests.benchmarks.detection.suites.checked import CheckedTraining, cosine, epochs, part_of, scheduled
from tests.benchmarks.detection.training import LogitChange


class ExampleNet(nn.Module):
    """The network of PyTorch's MNIST example, an eighth of its width and for 8×8 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 16, 3, padding=1)
        self.dropout1, self.dropout2 = nn.Dropout(0.25), nn.Dropout(0.5)
        self.fc1 = nn.Linear(256, 32)
        self.fc2 = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv2(F.relu(self.conv1(x))))
        x = self.dropout1(F.max_pool2d(x, 2).flatten(1))
        return F.log_softmax(self.fc2(self.dropout2(F.relu(self.fc1(x)))), 1)


def negative_log_likelihood(training: Any, batch: Any, monitor: Any) -> Tensor:
    inputs, target = batch
    return F.nll_loss(training.model(inputs), target)


def example_net(
    seed: int, arm: LogitChange, *, batch: int = 32, decaying: int = 0, decay: float = 0.01, lr: float = 1e-3
) -> CheckedTraining:
    """PyTorch's MNIST example on the digits; ``decaying``: the rate × .7 every so many steps, as there."""
    torch.manual_seed(seed)
    x, y = data.digits(1500, seed=seed)
    images = x.reshape(-1, 1, 8, 8)
    model = ExampleNet()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=decay)
    schedule = (lambda step: 0.7 ** (step // decaying)) if decaying else None
    return CheckedTraining(
        model,
        optimizer,
        negative_log_likelihood,
        epochs(images, y, size=batch, seed=seed),
        scheduled(optimizer, schedule),
        arm,
        part=part_of(images, y, rows=128),
        check_every=10,
    )


def normed_net(seed: int, arm: LogitChange, *, batch: int = 32, total: int = 0) -> CheckedTraining:
    """Convolutions with BatchNorm and random flips; ``total``: a cosine over so many."""
    torch.manual_seed(seed)
    x, y = data.digits(1500, seed=seed)
    images = x.reshape(-1, 1, 8, 8)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    plain = epochs(images, y, size=batch, seed=seed)

    def draw(step: int) -> Any:
        generator = torch.Generator().manual_seed(step)
        (inputs, target), flip = plain(step)[0], torch.rand(batch, generator=generator) < 0.5
        return [(torch.where(flip[:, None, None, None], inputs.flip(-1), inputs), target)]

    return CheckedTraining(
        model,
        optimizer,
        losses.cross_entropy,
        draw,
        scheduled(optimizer, cosine(total, 100) if total else None),
        arm,
        part=part_of(images, y, rows=128),
        check_every=10,
    )
