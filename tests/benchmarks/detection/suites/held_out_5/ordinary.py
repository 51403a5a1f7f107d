"""The ordinary families of the fifth held-out half: recipes of every day, nearly all with minibatches."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.benchmarks.detection import data
from tests.benchmarks.detection.families import HELD_OUT_5, Family
from tests.benchmarks.detection.suites.checked import CheckedTraining, epochs, part_of
from tests.benchmarks.detection.suites.common import each_place, generators, of_output, trained
from tests.benchmarks.detection.suites.held_out_5.networks import language_model, of_rows, of_tokens
from tests.benchmarks.detection.suites.held_out_5.unstable import number_rows, token_rows
from tests.benchmarks.detection.suites.registry import family_of
from tests.benchmarks.detection.training import LogitChange

generator_of = generators(15_485_867)


def ordinary() -> list[Family]:
    return [*_classifiers(), *_others()]


def _classifiers() -> list[Family]:
    family = partial(family_of, HELD_OUT_5)
    long = ("cosine", 2000, 50)
    return [
        family("c-joined-defaults", digits, 2000, net="joined"),
        family("c-many-defaults", digits, 2000, net="many", drop=0.3),
        family("c-ternary", digits, 2000, net="ternary", lr=3e-3, schedule=long),
        family("c-recalled-clipped", digits, 2000, net="recalled", clip=1.0, decay=0.1),
        family("c-reflections-high-decay", digits, 2000, net="reflections", decay=1.0),
        family("c-competing-noise", digits, 2000, net="competing", wrong=0.2, lr=3e-3),
        family("c-monomials-half", digits, 2000, net="monomials", rows=400),
        family("c-small-batches", digits, 2000, net="joined", batch=8),
        family("c-waist-sgd", digits, 2000, net="narrow_waist", kind="momentum", lr=3e-2, decay=1e-4),
        family("c-shifted-lion", digits, 2000, net="shifted", kind="lion", lr=1e-4, decay=0.1),
        family("c-given-rmsprop", digits, 2000, net="given", kind="rmsprop", lr=1e-3, decay=0.0),
        family("c-instance-restarts", digits, 2000, net="instance", schedule=("restarts", 400), lr=3e-3),
        family("c-mixed-rows", digits, 2000, net="joined", mixed=True),
        family("c-by-heart", digits, 2000, net="joined", rows=120, lr=1e-3),
        family("c-tokens-found", tokens, 2000, net="found", task="first_again", rows=1500),
        family("c-tokens-sloped", tokens, 2000, net="sloped", task="mirrors", rows=1500, lr=3e-3),
        family("c-many-labels", many_labels, 2000, net="joined", nats=True),
    ]


def _others() -> list[Family]:
    family = partial(family_of, HELD_OUT_5)
    return [
        family("c-text-read-once", text, 2000, net="sloped", lr=3e-3, schedule=("cosine", 2000, 100)),
        family("c-text-by-heart", text, 2000, net="shifted", windows=24, lr=3e-3),
        family("c-pendulum", numbers, 2000, nats=False, net="joined", task="pendulum", rows=1000),
        family("c-friedman", numbers, 2000, nats=False, net="many", task="friedman", rows=1000, lr=3e-3),
        family("c-sugar", numbers, 2000, nats=False, net="reflections", task="sugar", rows=400, decay=0.1),
        family("c-same-digit", same_digit, 2000, lr=2e-3),
        family("c-denoised", denoised, 2000, nats=False),
        family("c-taught", taught, 2000, nats=False, lr=2e-3),
    ]


def digits(
    seed: int, arm: LogitChange, *, net: str, rows: int = 1400, batch: int = 32, drop: float = 0.0,
    wrong: float = 0.0, mixed: bool = False, **how: Any,
) -> CheckedTraining:  # fmt: skip
    """``wrong``: share of labels of chance. ``mixed``: mixup."""
    torch.manual_seed(seed)
    x, y = data.digits(rows, seed=seed)
    y = torch.where(torch.rand(len(y)) < wrong, torch.randint(0, 10, (len(y),)), y)
    inner = of_rows(net, 64, 60, 10)
    model = nn.Sequential(nn.Dropout(drop), inner) if drop else inner
    plain = epochs(x, y, size=batch, seed=seed)

    def draw(step: int) -> Any:
        if not mixed:
            return plain(step)
        ((a, b),) = plain(step)
        generator = generator_of(seed, step)
        share, order = torch.rand(len(a), 1, generator=generator), torch.randperm(len(a), generator=generator)
        hot = F.one_hot(b, 10).float()
        return [(share * a + (1 - share) * a[order], share * hot + (1 - share) * hot[order])]

    part = None if mixed else part_of(x, y)
    return trained(model, of_output(F.cross_entropy), draw, arm, part=part, **how)


def tokens(
    seed: int, arm: LogitChange, *, net: str, task: str, rows: int, batch: int = 32, **how: Any
) -> CheckedTraining:
    torch.manual_seed(seed)
    x, y, count, classes = token_rows(task, rows)
    draw = epochs(x, y, size=batch, seed=seed)
    model = of_tokens(net, count, x.shape[1], 24, classes)
    return trained(model, of_output(F.cross_entropy), draw, arm, part=part_of(x, y), **how)


def numbers(
    seed: int, arm: LogitChange, *, net: str, task: str, rows: int, batch: int = 32, **how: Any
) -> CheckedTraining:
    torch.manual_seed(seed)
    x, y, outputs = number_rows(task, rows, seed)
    draw = epochs(x, y, size=batch, seed=seed)
    model = of_rows(net, x.shape[1], 40, outputs)
    return trained(model, of_output(F.mse_loss), draw, arm, part=part_of(x, y), **how)


def many_labels(seed: int, arm: LogitChange, *, net: str, batch: int = 32, **how: Any) -> CheckedTraining:
    """Even, more than four, with a hole: several answers for each digit."""
    torch.manual_seed(seed)
    x, y = data.digits(1400, seed=seed)
    holes = torch.isin(y, torch.tensor([0, 4, 6, 8, 9]))
    wanted = torch.stack([y % 2 == 0, y > 4, holes, y % 3 == 0], 1).float()
    draw = epochs(x, wanted, size=batch, seed=seed)
    loss = of_output(F.binary_cross_entropy_with_logits)
    return trained(of_rows(net, 64, 48, 4), loss, draw, arm, part=part_of(x, wanted), **how)


def text(
    seed: int, arm: LogitChange, *, net: str, windows: int = 4000, batch: int = 16, **how: Any
) -> CheckedTraining:
    torch.manual_seed(seed)
    x, following = data.text_windows(windows, 16, seed=seed)
    draw = epochs(x, following, size=min(batch, windows), seed=seed)
    return trained(language_model(net, 128, 16, 32), of_output(each_place), draw, arm,
                   part=part_of(x, following, rows=64), **how)  # fmt: skip


def same_digit(seed: int, arm: LogitChange, *, batch: int = 32, **how: Any) -> CheckedTraining:
    """Two noisy copies of each digit: which belong together (Chen et al. 2020)."""
    torch.manual_seed(seed)
    (x, _) = data.digits(1400, seed=seed)
    plain = epochs(x, size=batch, seed=seed)

    def draw(step: int) -> Any:
        ((rows,),) = plain(step)
        generator = generator_of(seed, step)
        noise = 0.3 * torch.randn(2, *rows.shape, generator=generator)
        return [(torch.cat([rows + noise[0], rows + noise[1]]),)]

    def loss(training: Any, given: Any, monitor: Any) -> Tensor:
        found = F.normalize(training.model(given[0]), dim=1)
        near = (found @ found.T / 0.2).fill_diagonal_(-1e4)
        half = len(near) // 2
        return F.cross_entropy(near, (torch.arange(len(near)) + half) % len(near))

    return trained(of_rows("joined", 64, 48, 16), loss, draw, arm, watch={"head": False}, **how)


def denoised(seed: int, arm: LogitChange, *, batch: int = 32, **how: Any) -> CheckedTraining:
    torch.manual_seed(seed)
    (x, _) = data.digits(1400, seed=seed)
    plain = epochs(x, size=batch, seed=seed)

    def draw(step: int) -> Any:
        ((rows,),) = plain(step)
        hidden = torch.rand(rows.shape, generator=generator_of(seed, step)) < 0.3
        return [(rows.masked_fill(hidden, 0.0), rows)]

    return trained(of_rows("narrow_waist", 64, 48, 64), of_output(F.mse_loss), draw, arm, **how)


def taught(seed: int, arm: LogitChange, *, batch: int = 32, **how: Any) -> CheckedTraining:
    """A small network learns what a large random one says: KL divergence at temperature 2."""
    torch.manual_seed(seed)
    teacher = of_rows("many", 64, 100, 10).requires_grad_(False)
    x, _ = data.digits(1400, seed=seed)
    draw = epochs(x, (6 * teacher(x) / 2).softmax(1), size=batch, seed=seed)

    def loss(training: Any, given: Any, monitor: Any) -> Tensor:
        z = training.arm(training.model(given[0]))
        return F.kl_div((z / 2).log_softmax(1), given[1], reduction="batchmean")

    return trained(of_rows("joined", 64, 40, 10), loss, draw, arm, **how)
