"""Ordinary trainings on sequences: names, numerals, signals, recall, and what somebody takes next."""

from __future__ import annotations

import unicodedata
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.benchmarks.detection.suites.checked import CheckedTraining, epochs, part_of
from tests.benchmarks.detection.suites.common import each_place, of_output, trained
from tests.benchmarks.detection.suites.held_out_2.shared import generator_of
from tests.benchmarks.detection.training import LogitChange

LETTERS = " -ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"


@cache
def names() -> Tensor:
    """Names of Unicode's characters, 24 letters of each; 38 is padding, 39 the beginning."""
    said = [unicodedata.name(chr(code), "") for code in range(0x20, 0x2000)]
    rows = [[LETTERS.find(letter) for letter in name[:24]] for name in said if name]
    return torch.tensor([row + [38] * (24 - len(row)) for row in rows if min(row) >= 0])


class Namer(nn.Module):
    """An LSTM; the loss is an adaptive softmax (Grave et al. 2017): rare letters share."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embedding = nn.Embedding(40, 16)
        self.layer = nn.LSTM(16, width, batch_first=True)
        self.dropout = nn.Dropout(0.2)
        self.out = nn.AdaptiveLogSoftmaxWithLoss(width, 39, cutoffs=[16, 28])

    def forward(self, x: Tensor) -> Tensor:
        given = F.pad(x[:, :-1], (1, 0), value=39)
        found = self.dropout(self.layer(self.embedding(given))[0])
        return self.out(found.flatten(0, 1), x.flatten()).loss


def naming(seed: int, arm: LogitChange, *, rows: int = 3000, batch: int = 16, **how: Any) -> CheckedTraining:
    torch.manual_seed(seed)
    x = names()[torch.randperm(len(names()), generator=generator_of(seed, 0))[:rows]]
    draw = epochs(x, size=batch, seed=seed)

    def loss(training: Any, given: Any, monitor: Any) -> Tensor:
        return training.model(given[0])  # type: ignore[no-any-return]

    part = part_of(x, rows=64)
    return trained(Namer(), loss, draw, arm, part=part, watch={"head": False}, **how)


class Scripts(nn.Module):
    """Convolutions of three lengths over letters, the largest over time (Kim 2014)."""

    def __init__(self, outputs: int, width: int = 16) -> None:
        super().__init__()
        self.embedding = nn.Embedding(40, 12)
        self.sizes = nn.ModuleList(nn.Conv1d(12, width, k) for k in (2, 3, 4))
        self.dropout = nn.Dropout(0.5)
        self.classifier = nn.Linear(3 * width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedding(x).transpose(1, 2)
        found = [F.relu(size(x)).amax(-1) for size in self.sizes]
        return self.classifier(self.dropout(torch.cat(found, 1)))


def words(seed: int, arm: LogitChange, *, batch: int = 32, **how: Any) -> CheckedTraining:
    """The first letter of a name from the rest of it; classes as rare as they are."""
    torch.manual_seed(seed)
    every = names()
    kept = every[(every[:, 0] >= 2) & (every[:, 0] < 28)]
    kept = kept[torch.randperm(len(kept), generator=generator_of(seed, 0))]
    x, y = kept[:, 1:].contiguous(), kept[:, 0] - 2
    draw, loss = epochs(x, y, size=batch, seed=seed), of_output(F.cross_entropy)
    return trained(Scripts(26), loss, draw, arm, part=part_of(x, y), **how)


# --- numerals ----------------------------------------------------------------------------------------------


def numeral(number: int) -> str:
    """Return a number from 1 to 399 in Roman numerals."""
    said = ""
    for worth, sign in ((100, "C"), (90, "XC"), (50, "L"), (40, "XL"), (10, "X"), (9, "IX"), (5, "V"),
                        (4, "IV"), (1, "I")):  # fmt: skip
        said, number = said + sign * (number // worth), number % worth
    return said


class Copyist(nn.Module):
    """A bidirectional GRU reads; a GRU cell writes, attending by addition (Bahdanau et al. 2015)."""

    def __init__(self, read: int, written: int, width: int = 24) -> None:
        super().__init__()
        self.given, self.said = nn.Embedding(read, width), nn.Embedding(written + 1, width)
        self.reader = nn.GRU(width, width, batch_first=True, bidirectional=True)
        self.cell = nn.GRUCell(3 * width, width)
        self.match, self.ask, self.score = (
            nn.Linear(2 * width, width),
            nn.Linear(width, width),
            nn.Linear(width, 1),
        )
        self.generator = nn.Linear(width, written)

    def forward(self, given: tuple[Tensor, Tensor, float]) -> Tensor:
        source, target, odds = given
        read, _ = self.reader(self.given(source))
        keys = self.match(read)
        state, last = read.new_zeros(len(read), keys.shape[-1]), torch.full((len(read),), 10)
        made = []
        for k in range(target.shape[1]):
            weight = self.score(torch.tanh(keys + self.ask(state)[:, None])).softmax(1)
            state = self.cell(torch.cat([(weight * read).sum(1), self.said(last)], 1), state)
            made.append(state)
            last = target[:, k]
            if odds:
                own = self.generator(state.detach()).argmax(-1)
                last = torch.where(torch.rand(len(own)) < odds, own, last)
        return self.generator(torch.stack(made, 1))


def numerals(
    seed: int, arm: LogitChange, *, batch: int = 16, most: float = 0.3, full: int = 2000, **how: Any
) -> CheckedTraining:
    """Roman numerals → three digits; more and more of its own answers are fed back."""
    torch.manual_seed(seed)
    order = torch.randperm(399) + 1
    signs = [["IVXLC".index(sign) + 1 for sign in numeral(int(k))] for k in order]
    x = torch.tensor([row + [0] * (14 - len(row)) for row in signs])[:300]
    y = torch.stack([order // 100, order // 10 % 10, order % 10], 1)[:300]
    plain = epochs(x, y, size=batch, seed=seed)

    def draw(step: int) -> Any:
        rows, target = plain(step)[0]
        return [((rows, target, most * min(step / full, 1.0)), target)]

    part = ((x[:100], y[:100], 0.0), y[:100])
    watch = {"head": False}
    return trained(Copyist(6, 10), of_output(each_place), draw, arm, part=part, watch=watch, **how)


# --- signals -----------------------------------------------------------------------------------------------


class Alone(nn.Module):
    """A recurrent layer in which each unit sees its own past alone (Li et al. 2018)."""

    def __init__(self, inputs: int, width: int = 32) -> None:
        super().__init__()
        self.inner = nn.Linear(inputs, width)
        self.own = nn.Parameter(torch.linspace(0.5, 1, width))
        self.last = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        state = torch.zeros_like(x[:, 0])
        for k in range(x.shape[1]):
            state = F.relu(x[:, k] + self.own * state)
        return self.last(state).squeeze(1)


def adding(seed: int, arm: LogitChange, *, length: int = 16, batch: int = 32, **how: Any) -> CheckedTraining:
    """The sum of the two numbers that are marked; new rows at each step."""
    torch.manual_seed(seed)

    def rows(count: int, number: int) -> tuple[Tensor, Tensor]:
        generator = generator_of(seed, number)
        values = torch.rand(count, length, generator=generator)
        marked = torch.rand(count, length, generator=generator).topk(2, 1).indices
        marks = torch.zeros(count, length).scatter_(1, marked, 1.0)
        return torch.stack([values, marks], -1), (values * marks).sum(1)

    loss = of_output(F.mse_loss)
    return trained(Alone(2), loss, lambda step: [rows(batch, step)], arm, part=rows(256, 0), **how)


def listening(seed: int, arm: LogitChange, *, batch: int = 32, **how: Any) -> CheckedTraining:
    """Which of six chirps is in the noise; stretches of time are hidden (Park et al. 2019)."""
    torch.manual_seed(seed)
    y = torch.randint(0, 6, (1200,))
    time = torch.linspace(0, 1, 64)
    begin, end = torch.tensor([3.0, 3, 6, 6, 9, 12]), torch.tensor([9.0, 12, 3, 12, 3, 6])
    pitch = begin[y][:, None] * time + 0.5 * (end - begin)[y][:, None] * time.square()
    x = (6.28 * (pitch + torch.rand(1200, 1))).sin() + 0.8 * torch.randn(1200, 64)
    model = nn.Sequential(
        nn.Unflatten(1, (1, 64)), nn.Conv1d(1, 12, 8, stride=4), nn.BatchNorm1d(12), nn.ReLU(),
        nn.Conv1d(12, 24, 4, stride=2), nn.BatchNorm1d(24), nn.ReLU(), nn.AdaptiveAvgPool1d(2), nn.Flatten(),
        nn.Linear(48, 6),
    )  # fmt: skip
    plain = epochs(x, y, size=batch, seed=seed)

    def draw(step: int) -> Any:
        rows, target = plain(step)[0]
        start = torch.randint(0, 56, (len(rows), 1), generator=generator_of(seed, step))
        place = torch.arange(64)
        return [(rows * ((place < start) | (place >= start + 8)), target)]

    return trained(model, of_output(F.cross_entropy), draw, arm, part=part_of(x, y), **how)


class FastWeights(nn.Module):
    """Attention without a softmax (Katharopoulos et al. 2020), causal."""

    def __init__(self, tokens: int, width: int = 32) -> None:
        super().__init__()
        self.embedding = nn.Embedding(tokens, width)
        self.shift = nn.Conv1d(width, width, 2)
        self.asked = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.unembed = nn.Linear(width, tokens, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedding(x)
        x = x + self.shift(F.pad(x.transpose(1, 2), (1, 0))).transpose(1, 2)
        for asked, norm in zip(self.asked, self.norms, strict=True):
            q, k, v = asked(norm(x)).chunk(3, -1)
            odds = ((F.elu(q) + 1) @ (F.elu(k) + 1).transpose(1, 2)).tril()
            x = x + odds / odds.sum(-1, keepdim=True).clamp_min(1e-6) @ v
        return self.unembed(x)


def recall(seed: int, arm: LogitChange, *, pairs: int = 4, batch: int = 32, **how: Any) -> CheckedTraining:
    """Keys and values, then a key whose value is wanted; new rows at each step."""
    torch.manual_seed(seed)

    def rows(count: int, number: int) -> tuple[Tensor, Tensor]:
        generator = generator_of(seed, number)
        keys = torch.rand(count, 8, generator=generator).argsort(1)[:, :pairs]
        values = torch.randint(8, 16, (count, pairs), generator=generator)
        which = torch.randint(0, pairs, (count, 1), generator=generator)
        given = torch.stack([keys, values], -1).flatten(1)
        x = torch.cat([given, keys.gather(1, which)], 1)
        y = torch.full_like(x, -100)
        y[:, -1:] = values.gather(1, which)
        return x, y

    loss, draw = of_output(each_place), lambda step: [rows(batch, step)]
    return trained(FastWeights(16), loss, draw, arm, part=rows(256, 0), **how)


class Next(nn.Module):
    """What was taken last, and before, with falling weights → an affinity to each item."""

    def __init__(self, items: int, width: int = 16) -> None:
        super().__init__()
        self.taken, self.items = nn.Embedding(items, width), nn.Embedding(items, width)
        self.fading = nn.Parameter(torch.linspace(-1, 1, 5))

    def forward(self, given: tuple[Tensor, Tensor]) -> Tensor:
        history, asked = given
        person = (self.fading.softmax(0)[:, None] * self.taken(history)).sum(1)
        return (person[:, None] * self.items(asked)).sum(-1)


def taking(seed: int, arm: LogitChange, *, items: int = 60, batch: int = 64, **how: Any) -> CheckedTraining:
    """What is taken next comes before what is not (Rendle et al. 2009)."""
    torch.manual_seed(seed)
    leads = torch.randn(items, 6) @ torch.randn(6, items)
    walk = torch.randint(0, items, (3000, 1))
    for _ in range(5):
        following = torch.multinomial((2 * leads[walk[:, -1]]).softmax(-1), 1)
        walk = torch.cat([walk, following], 1)
    plain = epochs(walk, size=batch, seed=seed)

    def with_others(rows: Tensor, number: int) -> Any:
        other = torch.randint(0, items, (len(rows), 1), generator=generator_of(seed, number))
        return ((rows[:, :5], torch.cat([rows[:, 5:], other], 1)),)

    loss = of_output(lambda z: F.softplus(z[:, 1] - z[:, 0]).mean())
    draw = lambda step: [with_others(plain(step)[0][0], step)]  # noqa: E731
    part = with_others(walk[:256], 0)
    return trained(Next(items), loss, draw, arm, part=part, watch={"head": False}, **how)
