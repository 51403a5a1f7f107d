"""Ordinary trainings on tokens: names of places, entities, sums, pointers; other kinds of attention."""

from __future__ import annotations

import zoneinfo
from functools import cache
from html.entities import html5
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.benchmarks.detection.suites.checked import CheckedTraining, epochs, part_of
from tests.benchmarks.detection.suites.common import each_place, of_output, trained
from tests.benchmarks.detection.suites.held_out_3.shared import generator_of
from tests.benchmarks.detection.training import LogitChange

# --- data ------------------------------------------------------------------------------------------------

LENGTH = 20
_SIGNS = "abcdefghijklmnopqrstuvwxyz0123456789_/-+;"
PADDING, TOKENS = len(_SIGNS), len(_SIGNS) + 1


@cache
def entities() -> Tensor:
    """Names of HTML's entities, of more than three letters, 20 of them; the last token is padding."""
    return _spelled(sorted({name.lower() for name in html5 if len(name) > 3}))


@cache
def zones() -> Tensor:
    """Names of time zones, as :func:`entities`."""
    known = zoneinfo.available_timezones()
    return _spelled(sorted(name.lower() for name in known if "/" in name))


def _spelled(names: list[str]) -> Tensor:
    rows = [[_SIGNS.find(letter) for letter in name[:LENGTH]] for name in names]
    return torch.tensor([row + [PADDING] * (LENGTH - len(row)) for row in rows if min(row) >= 0])


def _rows(names: Tensor, seed: int, rows: int | None) -> tuple[Tensor, Tensor]:
    """(all letters but the last, all but the first; −100 where there is none)."""
    chosen = names[torch.randperm(len(names), generator=generator_of(seed, 0))[:rows]]
    y = chosen[:, 1:]
    return chosen[:, :-1].contiguous(), torch.where(y == PADDING, -100, y)


# --- language models -------------------------------------------------------------------------------------


class Scaled(nn.Module):
    """RMSNorm without a learned scale."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:])


class Faded(nn.Module):
    """h ← a(x) · h + (1 − a(x)) · f(x), computed for all places at once by logarithms (Feng et al. 2024)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.maps, self.out = nn.Linear(width, 2 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        gate, new = self.maps(x).chunk(2, -1)
        kept = F.logsigmoid(gate).cumsum(1)
        added = F.logsigmoid(-gate) + F.logsigmoid(new) - kept
        return self.out((kept + added.logcumsumexp(1)).exp())


class Windowed(nn.Module):
    """Attention to the last four places and to the first one (Beltagy et al. 2020)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.maps, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        far = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)
        seen = ((far >= 0) & (far < 4)) | ((torch.arange(LENGTH) == 0) & (far >= 0))
        self.register_buffer("seen", seen)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.maps(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        seen = self.seen[: x.shape[1], : x.shape[1]]
        return self.out(F.scaled_dot_product_attention(q, k, v, seen).transpose(1, 2).flatten(2))


class Switched(nn.Module):
    """Each token goes to one of four perceptrons; ``balance`` is low where all get as many."""

    def __init__(self, width: int, count: int = 4) -> None:
        super().__init__()
        self.router = nn.Linear(width, count, bias=False)
        self.up = nn.Parameter(torch.randn(count, width, width) * width**-0.5)
        self.down = nn.Parameter(torch.randn(count, width, width) * width**-0.5)
        self.balance = torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        odds = self.router(x).softmax(-1)
        share, chosen = odds.max(-1)
        taken = F.one_hot(chosen, odds.shape[-1]).to(x.dtype)
        self.balance = len(self.up) * (taken.mean((0, 1)) * odds.mean((0, 1))).sum()
        inner = F.relu(torch.einsum("btw,ewv->btev", x, self.up))
        each = torch.einsum("btev,evw->btew", inner, self.down)
        return (each * taken[..., None]).sum(-2) * share[..., None]


class Speller(nn.Module):
    """A language model of ``mix`` ("faded", "windowed") and ``feed`` ("plain", "switched") layers; the
    embedding is the head where ``tied``."""

    def __init__(
        self, mix: str, feed: str, *, width: int = 32, tied: bool = False, norm: bool = True
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(TOKENS, width)
        self.places = nn.Parameter(0.02 * torch.randn(LENGTH, width))
        self.mixes = nn.ModuleList({"faded": Faded, "windowed": Windowed}[mix](width) for _ in range(2))
        plain = [
            nn.Sequential(nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width))
            for _ in range(2)
        ]
        self.feeds = nn.ModuleList([Switched(width) for _ in range(2)] if feed == "switched" else plain)
        self.norm = Scaled() if norm else nn.Identity()
        self.head = nn.Linear(width, TOKENS, bias=False)
        if tied:
            nn.init.normal_(self.embedding.weight, std=0.1)
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.places[: tokens.shape[1]]
        for mix, feed in zip(self.mixes, self.feeds, strict=True):
            x = x + mix(self.norm(x))
            x = x + feed(self.norm(x))
        return self.head(self.norm(x))


def spelling(
    seed: int,
    arm: LogitChange,
    *,
    names: str,
    mix: str,
    feed: str = "plain",
    rows: int | None = None,
    batch: int = 16,
    tied: bool = False,
    norm: bool = True,
    low: str | None = None,
    **how: Any,
) -> CheckedTraining:
    """Names letter by letter. ``low``: "weights" of bfloat16, or "autocast" in bfloat16."""
    torch.manual_seed(seed)
    x, y = _rows({"zones": zones, "entities": entities}[names](), seed, rows)
    model = Speller(mix, feed, tied=tied, norm=norm)
    if low == "weights":
        model = model.bfloat16()

    def loss(training: Any, given: Any, monitor: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=low == "autocast"):
            z = training.arm(training.model(given[0]))
        found = each_place(z if low == "weights" else z.float(), given[1])
        balance = [module.balance for module in training.model.modules() if isinstance(module, Switched)]
        return found + 0.01 * sum(balance) if balance else found

    draw = epochs(x, y, size=batch, seed=seed)
    return trained(model, loss, draw, arm, part=part_of(x, y, rows=64), check_every=20, **how)


class TwoAhead(nn.Module):
    """A GRU with a head for the next letter and one for the letter after it (Gloeckle et al. 2024)."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embedding = nn.Embedding(TOKENS, width)
        self.layer = nn.GRU(width, width, batch_first=True)
        self.next, self.after = nn.Linear(width, TOKENS), nn.Linear(width, TOKENS)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        found = self.layer(self.embedding(x))[0]
        return self.next(found), self.after(found[:, :-1])


def two_ahead(seed: int, arm: LogitChange, *, batch: int = 16, **how: Any) -> CheckedTraining:
    torch.manual_seed(seed)
    x, y = _rows(entities(), seed, 1000)

    def loss(training: Any, given: Any, monitor: Any) -> Tensor:
        one, two = training.model(given[0])
        return each_place(one, given[1]) + 0.5 * each_place(two, given[1][:, 1:])

    draw = epochs(x, y, size=batch, seed=seed)
    part, watch = part_of(x, y, rows=64), {"head": "next"}
    return trained(TwoAhead(), loss, draw, arm, part=part, watch=watch, check_every=20, **how)


# --- other tasks -----------------------------------------------------------------------------------------


class Latents(nn.Module):
    """Four learned vectors ask the letters, then each other (Jaegle et al. 2021)."""

    def __init__(self, outputs: int, width: int = 24) -> None:
        super().__init__()
        self.embedding = nn.Embedding(TOKENS, width)
        self.places = nn.Parameter(0.1 * torch.randn(LENGTH, width))
        self.latents = nn.Parameter(0.5 * torch.randn(4, width))
        self.ask, self.talk = (nn.MultiheadAttention(width, 2, batch_first=True) for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.out = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        given = self.embedding(x) + self.places
        asked = self.latents.expand(len(x), -1, -1)
        asked = self.norms[0](asked + self.ask(asked, given, given, need_weights=False)[0])
        asked = self.norms[1](asked + self.talk(asked, asked, asked, need_weights=False)[0])
        return self.out(asked.mean(1))


def continents(seed: int, arm: LogitChange, *, batch: int = 16, **how: Any) -> CheckedTraining:
    """Of which part of the world a time zone is, from what stands behind the stroke; few rows, rare parts."""
    torch.manual_seed(seed)
    every = zones()[torch.randperm(len(zones()), generator=generator_of(seed, 0))]
    stroke = (every == _SIGNS.index("/")).long().argmax(1)
    place = (torch.arange(LENGTH) + stroke[:, None] + 1).clamp_max(LENGTH - 1)
    x = every.gather(1, place)
    _, y = every[:, :2].unique(dim=0, return_inverse=True)
    draw, loss = epochs(x, y, size=batch, seed=seed), of_output(F.cross_entropy)
    return trained(Latents(int(y.max()) + 1), loss, draw, arm, part=part_of(x, y), **how)


class Pointer(nn.Module):
    """What points at a place are products of a question and each place's own vector (Vinyals et al. 2015)."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.first = nn.Linear(2, width)
        self.layer = nn.TransformerEncoderLayer(width, 2, 2 * width, dropout=0.0, batch_first=True)
        self.ask, self.key = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(self.first(x))
        return (self.key(x) @ self.ask(x.mean(1))[..., None]).squeeze(-1) * x.shape[-1] ** -0.5


def pointing(seed: int, arm: LogitChange, *, batch: int = 32, **how: Any) -> CheckedTraining:
    """Which of nine points is the farthest from the middle of all; new rows at each step."""
    torch.manual_seed(seed)

    def rows(count: int, number: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(count, 9, 2, generator=generator_of(seed, number))
        return x, (x - x.mean(1, keepdim=True)).norm(dim=-1).argmax(1)

    part = rows(256, 0)
    draw = lambda step: [rows(batch, step)]  # noqa: E731
    return trained(Pointer(), of_output(F.cross_entropy), draw, arm, part=part, watch={"head": False}, **how)


class Calculator(nn.Module):
    """A decoder with GELU and LayerNorm after each addition, as the first ones had it."""

    def __init__(self, tokens: int, length: int, width: int = 32) -> None:
        super().__init__()
        self.embedding = nn.Embedding(tokens, width)
        self.places = nn.Embedding(length, width)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, activation="gelu", batch_first=True)
            for _ in range(2)
        )
        self.lm_head = nn.Linear(width, tokens)

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        later = torch.ones(length, length, dtype=torch.bool).triu(1)
        x = self.embedding(x) + self.places(torch.arange(length))
        for layer in self.layers:
            x = layer(x, src_mask=later)
        return self.lm_head(x)


def carrying(seed: int, arm: LogitChange, *, batch: int = 32, **how: Any) -> CheckedTraining:
    """a + b = c with three digits, the last digit of c first; new rows at each step."""
    torch.manual_seed(seed)

    def digits(number: Tensor, count: int) -> Tensor:
        return number[:, None] // 10 ** torch.arange(count) % 10

    def rows(count: int, number: int) -> tuple[Tensor, Tensor]:
        a, b = torch.randint(0, 1000, (2, count), generator=generator_of(seed, number))
        plus, equals = (torch.full((count, 1), sign) for sign in (10, 11))
        x = torch.cat([digits(a, 3), plus, digits(b, 3), equals, digits(a + b, 4)], 1)
        y = x[:, 1:].clone()
        y[:, :7] = -100
        return x[:, :-1], y

    draw = lambda step: [rows(batch, step)]  # noqa: E731
    part = rows(128, 0)
    return trained(Calculator(12, 11), of_output(each_place), draw, arm, part=part, check_every=20, **how)
