"""Plain PyTorch loops of other kinds: self-supervision, several networks, heads written by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from tests.zoo.configuration import STEPS, Configuration, Table
from tests.zoo.kits import loop
from tests.zoo.session import Session
from tests.zoo.tables.plain_loops import CLASSES, batch, cross_entropy, mlp

WIDTH = 32


class _WithLogSoftmax(nn.Module):
    """The model of PyTorch's own MNIST example: it returns log-probabilities."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(12, WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return F.log_softmax(self.fc2(F.relu(self.fc1(x))), dim=1)


def _nll(model: nn.Module, step: int) -> Tensor:
    x, y = batch(step)
    return F.nll_loss(model(x), y)


def _softmax_twice() -> nn.Module:
    return nn.Sequential(*mlp(), nn.Softmax(-1))


def _log_of_softmax(model: nn.Module, step: int) -> Tensor:
    x, y = batch(step)
    return F.nll_loss(torch.log(model(x)), y)


def _weighted(model: nn.Module, step: int) -> Tensor:
    x, y = batch(step)
    return F.cross_entropy(model(x), y, weight=torch.arange(1.0, CLASSES + 1))


def _mixed(model: nn.Module, step: int) -> Tensor:
    """Mixup, as two cross-entropies of one mixed batch."""
    x, y = batch(step)
    logits = model(0.7 * x + 0.3 * x.flip(0))
    return 0.7 * F.cross_entropy(logits, y) + 0.3 * F.cross_entropy(logits, y.flip(0))


def _entropy_bonus(model: nn.Module, step: int) -> Tensor:
    x, y = batch(step)
    logits = model(x)
    p = logits.softmax(-1)
    return F.cross_entropy(logits, y) + 0.01 * (p * p.clamp(min=1e-9).log()).sum(-1).mean()


class _Distilled(nn.Module):
    """A student, and its frozen teacher in the same module."""

    def __init__(self) -> None:
        super().__init__()
        self.student, self.teacher = mlp(), mlp(width=48)
        self.teacher.requires_grad_(False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            wanted = self.teacher(x)
        return self.student(x), wanted


def _distillation(model: nn.Module, step: int) -> Tensor:
    x, y = batch(step)
    logits, wanted = model(x)
    soft = F.kl_div((logits / 2).log_softmax(-1), (wanted / 2).softmax(-1), reduction="batchmean")
    return F.cross_entropy(logits, y) + 4 * soft


class _Encoder(nn.Module):
    def __init__(self, outputs: int = 16) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(12, WIDTH), nn.ReLU())
        self.projector = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, outputs))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.projector(self.body(x))
        return out


def _views(step: int) -> tuple[Tensor, Tensor]:
    x, _ = batch(step)
    noise = torch.randn(2, *x.shape, generator=torch.Generator().manual_seed(step))
    return x + 0.1 * noise[0], x + 0.1 * noise[1]


def _simclr(model: nn.Module, step: int) -> Tensor:
    z = F.normalize(model(torch.cat(_views(step))), dim=-1)
    alike = (z @ z.T / 0.1).masked_fill(torch.eye(len(z), dtype=torch.bool), -1e9)
    return F.cross_entropy(alike, torch.arange(len(z)).roll(len(z) // 2))


def _barlow(model: nn.Module, step: int) -> Tensor:
    one, two = (F.batch_norm(model(view), None, None, training=True) for view in _views(step))
    close = one.T @ two / len(one)
    off = close - torch.diag(close.diagonal())
    return (close.diagonal() - 1).square().sum() + 0.01 * off.square().sum()


def _dino(session: Session) -> nn.Module:
    """A student follows the softmax of a moving average of itself."""
    model = _Encoder(24)
    teacher = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    session.attach(model, optimizer)
    center = torch.zeros(24)
    for step in range(STEPS):
        one, two = _views(step)
        wanted = teacher(one)
        loss = -(((wanted - center) / 0.04).softmax(-1) * (model(two) / 0.1).log_softmax(-1)).sum(-1).mean()
        loss.backward()
        session.observe(loss)
        optimizer.step()
        optimizer.zero_grad()
        center = 0.9 * center + 0.1 * wanted.mean(0)
        with torch.no_grad():
            for slow, fast in zip(teacher.parameters(), model.parameters(), strict=True):
                slow.lerp_(fast, 0.01)
    return model


def _adversarial(session: Session) -> nn.Module:
    """A generator and its discriminator, which is watched."""
    makes, judges = mlp(4, WIDTH, 12), mlp(outputs=1)
    of_makes = torch.optim.AdamW(makes.parameters(), 1e-3, betas=(0.5, 0.999))
    of_judges = torch.optim.AdamW(judges.parameters(), 1e-3, betas=(0.5, 0.999))
    session.attach(judges, of_judges)
    for step in range(STEPS):
        real, _ = batch(step)
        made = makes(torch.randn(4, 4, generator=torch.Generator().manual_seed(step)))
        loss = F.softplus(-judges(real)).mean() + F.softplus(judges(made.detach())).mean()
        loss.backward()
        session.observe(loss)
        of_judges.step()
        of_judges.zero_grad()
        other = F.softplus(-judges(made)).mean()
        of_makes.zero_grad()
        other.backward()
        of_makes.step()
        of_judges.zero_grad()
    return judges


class _Cosine(nn.Module):
    """CosFace: cosines with a normalised weight, a margin at the right class, a scale."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(12, WIDTH)
        self.weight = nn.Parameter(torch.randn(CLASSES, WIDTH) / 6)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        cosines = F.linear(F.normalize(self.body(x)), F.normalize(self.weight))
        return 30 * (cosines - 0.35 * F.one_hot(y, CLASSES))


def _with_labels(model: nn.Module, step: int) -> Tensor:
    x, y = batch(step)
    return F.cross_entropy(model(x, y), y)


class _Mixture(nn.Module):
    """Experts behind a gate, whose balance is a part of the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(12, 4)
        self.experts = nn.ModuleList(nn.Linear(12, WIDTH) for _ in range(4))
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        p = self.gate(x).softmax(-1)
        mixed = sum(p[:, k, None] * expert(x) for k, expert in enumerate(self.experts))
        return self.head(F.relu(mixed)), 4 * p.mean(0).square().sum()


def _balanced(model: nn.Module, step: int) -> Tensor:
    x, y = batch(step)
    logits, balance = model(x)
    return F.cross_entropy(logits, y) + 0.01 * balance


class _Adaptive(nn.Module):
    """torch's adaptive softmax: classes in clusters, the head is inside of the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(12, WIDTH)
        self.loss = nn.AdaptiveLogSoftmaxWithLoss(WIDTH, 20, cutoffs=[6])

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        found: Tensor = self.loss(F.relu(self.body(x)), y * 4).loss
        return found


def _inside(model: nn.Module, step: int) -> Tensor:
    found: Tensor = model(*batch(step))
    return found


class _Pair(nn.Module):
    """A sequence tagger: features by a GRU, classes for each place, padded places ignored."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 16, padding_idx=0)
        self.gru = nn.GRU(16, 16, batch_first=True, bidirectional=True)
        self.tags = nn.Linear(32, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.tags(self.gru(self.embedding(tokens))[0])
        return out


def _tagged(model: nn.Module, step: int) -> Tensor:
    tokens = torch.randint(0, 20, (4, 7), generator=torch.Generator().manual_seed(step))
    return F.cross_entropy(model(tokens).transpose(1, 2), (tokens % CLASSES).where(tokens > 0, -100))


def _ctc(model: nn.Module, step: int) -> Tensor:
    tokens = torch.randint(0, 20, (4, 7), generator=torch.Generator().manual_seed(step))
    logs = model(tokens).log_softmax(-1).transpose(0, 1)
    wanted = torch.randint(1, CLASSES, (4, 2), generator=torch.Generator().manual_seed(step))
    return F.ctc_loss(logs, wanted, torch.full((4,), 7), torch.full((4,), 2))


def _spectral() -> nn.Module:
    model = mlp()
    parametrizations.spectral_norm(model[4])
    return model


def _binary(model: nn.Module, step: int) -> Tensor:
    x, y = batch(step)
    return F.binary_cross_entropy_with_logits(model(x)[:, 0], (y > 2).float())


def _two_logits(model: nn.Module, step: int) -> Tensor:
    x, y = batch(step)
    return F.cross_entropy(model(x), (y > 2).long())


def _averaged_heads() -> nn.Module:
    class Ensemble(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(12, WIDTH)
            self.heads = nn.ModuleList(nn.Linear(WIDTH, CLASSES) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            hidden = F.relu(self.body(x))
            return torch.stack([head(hidden) for head in self.heads]).mean(0)

    return Ensemble()


def _vectorised(session: Session) -> nn.Module:
    """An ensemble by ``torch.func``: no module of the optimizer's own is called."""
    models = [mlp() for _ in range(3)]
    parameters, buffers = torch.func.stack_module_state(models)
    base = copy.deepcopy(models[0])
    holder = nn.ParameterDict({name.replace(".", "_"): value for name, value in parameters.items()})
    optimizer = torch.optim.AdamW(holder.parameters(), 1e-3)
    session.attach(holder, optimizer, head=False)
    for step in range(STEPS):
        x, y = batch(step)
        stacked = {name: holder[name.replace(".", "_")] for name in parameters}
        each = torch.func.vmap(
            lambda p, b, x: torch.func.functional_call(base, (p, b), (x,)), in_dims=(0, 0, None)
        )(stacked, buffers, x)
        loss = sum(F.cross_entropy(one, y) for one in each) / 3
        loss.backward()
        session.observe(loss)
        optimizer.step()
        optimizer.zero_grad()
    return holder


def _make() -> list[Configuration]:
    soft: dict[str, Any] = {"soft": True}
    none: dict[str, Any] = {"classes": False, "soft": True, "scaled": True}
    made: Callable[[], nn.Module] = mlp
    return [
        Configuration("log_softmax in the model (MNIST example)", loop(_WithLogSoftmax, _nll), "fc2"),
        Configuration(
            "softmax in the model, its log in the loss", loop(_softmax_twice, _log_of_softmax), "4"
        ),
        Configuration(
            "softmax in the model, cross-entropy of it",
            loop(_softmax_twice, cross_entropy),
            "4",
            changed=True,
        ),
        Configuration("weights of classes", loop(made, _weighted), "4", soft=True),
        Configuration("mixup, two cross-entropies", loop(made, _mixed), "4", **soft),
        Configuration("entropy bonus", loop(made, _entropy_bonus), "4", **soft),
        Configuration(
            "distillation, teacher in the model",
            loop(_Distilled, _distillation),
            "student.4",
            scaled=True,
            **soft,
        ),
        Configuration("SimCLR", loop(_Encoder, _simclr), None, **none),
        Configuration("Barlow Twins", loop(_Encoder, _barlow), ("projector.2", None), **none),
        Configuration("DINO, EMA teacher", _dino, ("projector.2", None), scaled=True, **soft),
        Configuration("GAN, discriminator watched", _adversarial, "4", classes=False, either=True),
        Configuration("CosFace", loop(_Cosine, _with_labels), ("weight", None), scaled=True, **soft),
        Configuration("mixture of experts, balance loss", loop(_Mixture, _balanced), "head"),
        Configuration("adaptive softmax", loop(_Adaptive, _inside), "loss.head", **soft),
        Configuration("GRU tagger, padded", loop(_Pair, _tagged), "tags"),
        Configuration("CTC", loop(_Pair, _ctc), "tags", **soft),
        Configuration("head with spectral norm", loop(_spectral, cross_entropy), "4"),
        Configuration("binary, one logit", loop(lambda: mlp(outputs=1), _binary), "4", classes=False),
        Configuration("binary, two logits", loop(lambda: mlp(outputs=2), _two_logits), "4"),
        Configuration(
            "three heads, averaged",
            loop(_averaged_heads, cross_entropy),
            ("heads.0", "heads.1", "heads.2"),
            changed=True,
            true_notes=("several_heads",),
        ),
        Configuration("ensemble by torch.func", _vectorised, None, **none),
    ]


TABLE = Table("PyTorch: further loops", ("torch",), _make)
