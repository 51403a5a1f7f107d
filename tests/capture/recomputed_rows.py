"""Hold recomputed rows against the true rows of the same run, whose loss makes logits.

``python -m tests.capture.recomputed_rows`` trains ten small models in three precisions and writes the table
``tests/capture/RECOMPUTED.md``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nfi_monitor.capture.head import Head, find_head
from nfi_monitor.capture.head_probe import HeadProbe, Rows, rows_of
from nfi_monitor.capture.recomputed import ROWS, RowRecomputer
from nfi_monitor.capture.sampling import offset
from nfi_monitor.measure.rows import MASKS, RowKinds, _view, shown_precision
from nfi_monitor.measure.views import RowView

PAGE = Path(__file__).parent / "RECOMPUTED.md"
PRECISIONS = ("float32", "bfloat16", "float16")
STEPS = 60


class Language(nn.Module):
    """A small transformer; ``tied``: the head shares the weight of the embedding."""

    def __init__(self, classes: int, width: int = 32, *, tied: bool = False, bias: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(classes, width)
        self.layer = nn.TransformerEncoderLayer(width, 4, 64, dropout=0.0, batch_first=True)
        self.norm = nn.LayerNorm(width)
        self.lm_head = nn.Linear(width, classes, bias=bias)
        if tied:
            self.lm_head.weight = self.embed.weight

    def body(self, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        return self.norm(self.layer(self.embed(x), mask, is_causal=True))


class Recurrent(nn.Module):
    def __init__(self, classes: int, width: int = 32) -> None:
        super().__init__()
        self.embed, self.cell = nn.Embedding(classes, width), nn.GRU(width, width, batch_first=True)
        self.lm_head = nn.Linear(width, classes)

    def body(self, x: Tensor) -> Tensor:
        return self.cell(self.embed(x))[0]


class Dense(nn.Module):
    def __init__(self, classes: int, width: int, depth: int, act: type[nn.Module] = nn.ReLU) -> None:
        super().__init__()
        layers = [part for _ in range(depth) for part in (nn.Linear(width, width), act())]
        self.net, self.lm_head = nn.Sequential(*layers), nn.Linear(width, classes)

    def body(self, x: Tensor) -> Tensor:
        return self.net(x)


class Pictures(nn.Module):
    def __init__(self, classes: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 16, 3, 2),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(32, 32),
        )
        self.lm_head = nn.Linear(32, classes)

    def body(self, x: Tensor) -> Tensor:
        return self.net(x)


def _tokens(classes: int) -> Callable[[torch.Generator], tuple[Tensor, Tensor]]:
    def draw(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        x = torch.randint(classes, (6, 25), generator=generator)
        targets = (3 * x + 1) % classes
        targets[:, :3] = -100  # a prompt
        return x, targets

    return draw


def _vectors(width: int, classes: int) -> Callable[[torch.Generator], tuple[Tensor, Tensor]]:
    def draw(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        x = torch.randn(160, width, generator=generator)
        return x, x[:, :classes].argmax(-1)

    return draw


def _pictures(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    x = torch.randn(96, 1, 8, 8, generator=generator)
    return x, x.flatten(1)[:, :10].argmax(-1)


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[torch.Generator], tuple[Tensor, Tensor]]]] = {
    "transformer, 50 tokens": (lambda: Language(50), _tokens(50)),
    "transformer, tied head": (lambda: Language(64, tied=True), _tokens(64)),
    "transformer, 600 tokens, bias": (lambda: Language(600, bias=True), _tokens(600)),
    "transformer, width 64": (lambda: Language(97, width=64), _tokens(97)),
    "recurrent, 50 tokens": (lambda: Recurrent(50), _tokens(50)),
    "recurrent, 300 tokens": (lambda: Recurrent(300), _tokens(300)),
    "dense, 7 classes": (lambda: Dense(7, 24, 2), _vectors(24, 7)),
    "dense, 2 classes": (lambda: Dense(2, 16, 1), _vectors(16, 2)),
    "dense, GELU, 100 classes": (lambda: Dense(100, 128, 2, nn.GELU), _vectors(128, 100)),
    "convolutions, 10 classes": (lambda: Pictures(10), _pictures),
}


@dataclass
class Comparison:
    """Sums over the rows of a run."""

    rows: int = 0
    refused: int = 0
    different: dict[str, int] = field(default_factory=lambda: dict.fromkeys((*MASKS, "partial"), 0))
    found: dict[str, int] = field(default_factory=lambda: dict.fromkeys((*MASKS, "partial"), 0))
    margin: float = 0.0
    violation: float = 0.0

    def add(self, true: Rows, made: Rows) -> None:
        assert made.recomputed is not None
        self.refused += not bool(made.recomputed)
        kind = shown_precision(true.grad)
        view, kinds = _view(true.grad, true.logits, true.total, kind)
        again, others = _view(made.grad, made.logits, made.total, kind)
        self.rows += len(true.grad)
        for name, one, two in _masks(kinds, others):
            self.different[name] += int((one != two).sum())
            self.found[name] += int(one.sum())
        counts = view.counts & again.counts & (view.target == again.target)
        self.margin = max(self.margin, _largest((view.margin - again.margin).abs(), counts))
        self.violation = max(self.violation, _violation(view, again))


def _masks(one: RowKinds, two: RowKinds) -> Iterator[tuple[str, Tensor, Tensor]]:
    for name in MASKS:
        yield name, getattr(one, name), getattr(two, name)
    yield "partial", one.above_floor & ~one.absorbed, two.above_floor & ~two.absorbed


def _largest(values: Tensor, where: Tensor) -> float:
    return float(values[where].max()) if bool(where.any()) else 0.0


def _violation(view: RowView, again: RowView) -> float:
    """Difference of the mean violations: of single rows near absorption one rounding is a half of them."""
    if not bool(view.live.any()) or not bool(again.live.any()):
        return 0.0
    return abs(float(view.violation[view.live].mean()) - float(again.violation[again.live].mean()))


def compare(name: str, precision: str, *, half_loss: bool = False, steps: int = STEPS) -> Comparison:
    """Train a model with logits, and recompute its rows. ``half_loss``: model and loss in ``precision``."""
    make, draw = MODELS[name]
    torch.manual_seed(0)
    model, dtype = make(), getattr(torch, precision)
    if half_loss:
        model.to(dtype)
    head = find_head(model, "lm_head")
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02 if not half_loss else 0.005)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, enabled=precision == "float16" and not half_loss)
    result, batches = Comparison(), [draw(generator) for _ in range(3)]
    clock, seen = [0], list[Rows]()
    recomputer = _recomputer(head, clock, seen)
    for step in range(1, steps + 1):
        clock[0] = step
        x, targets = batches[step % 3]
        x = x.to(dtype) if half_loss and x.is_floating_point() else x
        with torch.autocast("cpu", dtype, enabled=precision != "float32" and not half_loss):
            hidden = model.body(x)
            recomputer.tap(hidden, targets)
            logits = head.module(hidden)
            loss = F.cross_entropy(logits.flatten(0, -2), targets.flatten())
        kept: list[Tensor] = []
        logits.register_hook(lambda grad, kept=kept: kept.append(grad.clone()))
        scaler.scale(loss).backward()
        stride = -(-targets.numel() // ROWS)
        first = offset(step, stride)
        true = Rows(
            rows_of(kept[0], first, stride), rows_of(logits.detach(), first, stride), None, targets.numel()
        )
        result.add(true, seen.pop().finished(loss.dtype))
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if step == steps // 3:  # far margins, as after long training
            with torch.no_grad():
                head.module.weight.mul_(3 if precision == "float32" else 2)
    return result


def _recomputer(head: Head, clock: list[int], seen: list[Rows]) -> RowRecomputer:
    def failed(part: str, error: BaseException) -> None:
        raise error

    def step() -> int:
        return clock[0]

    probe = HeadProbe(step, seen.append, failed)  # it sees no call of the head
    return RowRecomputer(head, probe, step, seen.append, failed, lambda seconds: None)


def table() -> str:
    """Return the page."""
    lines = [
        "# Recomputed rows against true rows",
        "",
        "Made by `python -m tests.capture.recomputed_rows`. Each model is trained with a loss that makes "
        f"logits. In each of {STEPS} steps, up to {ROWS} rows are recomputed from hidden states, targets and "
        "the gradient that arrives at the hidden states, and held against the rows at the logits. bfloat16: "
        "autocast. float16: autocast and a gradient scaler. "
        "*Equal*: rows of the same kind (live, absorbed, partially absorbed, underflowed, ignored, finite). "
        "*Margin*: largest difference of a row, in nats. *Violation*: largest difference of a step's mean.",
        "",
        "| model | precision | rows | absorbed | partially | equal | margin | violation |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in MODELS:
        for precision in PRECISIONS:
            found = compare(name, precision)
            equal = 1 - max(found.different.values()) / found.rows
            lines.append(
                f"| {name} | {precision} | {found.rows:,} | {found.found['absorbed']:,} | "
                f"{found.found['partial']:,} | {equal:.2%} | {found.margin:.1e} | {found.violation:.1e} |"
            )
            print(lines[-1], flush=True)
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    torch.set_num_threads(1)
    PAGE.write_text(table(), encoding="utf-8")
