"""Plain PyTorch loops: the shapes of head and loss that people write by hand."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.zoo.configuration import STEPS, Configuration, Table
from tests.zoo.kits import labels, loop, reals
from tests.zoo.session import Session

CLASSES = 5


def mlp(inputs: int = 12, width: int = 32, outputs: int = CLASSES) -> nn.Sequential:
    """Return a classifier whose head is layer 4."""
    return nn.Sequential(
        nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, outputs)
    )


def batch(step: int, *shape: int) -> tuple[Tensor, Tensor]:
    """Return the inputs [4, *shape] and classes [4] of a step."""
    rows = slice(4 * (step % STEPS), 4 * (step % STEPS) + 4)
    return reals(*(shape or (12,)))[rows], labels(CLASSES)[rows]


def cross_entropy(model: nn.Module, step: int) -> Tensor:
    """Return the loss of a classifier at a step."""
    x, y = batch(step)
    return F.cross_entropy(model(x), y)


class _Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.lstm = nn.LSTM(16, 32, batch_first=True)
        self.decoder = nn.Linear(32, 20)

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.decoder(self.lstm(self.embed(tokens))[0])
        return out


class _Tied(nn.Module):
    """Logits made with the embedding's weight, without a module."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 32)
        self.body = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
        self.norm = nn.LayerNorm(32)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.norm(self.body(self.embed(tokens))) @ self.embed.weight.T


class _BareHead(nn.Module):
    """A head that is a bare parameter, as in interpretability code."""

    def __init__(self) -> None:
        super().__init__()
        self.W_E = nn.Parameter(torch.randn(20, 32) / 6)
        self.mlp = nn.Linear(32, 32)
        self.W_U = nn.Parameter(torch.randn(32, 20) / 6)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = F.relu(self.mlp(self.W_E[tokens]))
        return hidden @ self.W_U


class _Scaled(nn.Module):
    """muP: the logits are multiplied after the head."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.body, self.head, self.factor = nn.Linear(12, 32), nn.Linear(32, CLASSES), factor

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(F.relu(self.body(x))) * self.factor
        return out


class _MultiTask(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(12, 32)
        self.kinds, self.places = nn.Linear(32, CLASSES), nn.Linear(32, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = F.relu(self.body(x))
        return self.kinds(hidden), self.places(hidden)


def _language(model: nn.Module, step: int) -> Tensor:
    found = torch.randint(0, 20, (4, 9), generator=torch.Generator().manual_seed(step))
    logits = model(found[:, :-1])
    return F.cross_entropy(logits.reshape(-1, 20), found[:, 1:].reshape(-1))


def _smoothed(model: nn.Module, step: int) -> Tensor:
    x, y = batch(step)
    return F.cross_entropy(model(x), y, label_smoothing=0.1)


def _binary(model: nn.Module, step: int) -> Tensor:
    x, y = batch(step)
    return F.binary_cross_entropy_with_logits(model(x), F.one_hot(y, CLASSES).float())


def _regression(model: nn.Module, step: int) -> Tensor:
    x, _ = batch(step)
    return F.mse_loss(model(x), x[:, :CLASSES])


def _one_output(model: nn.Module, step: int) -> Tensor:
    x, _ = batch(step)
    return F.mse_loss(model(x), x[:, :1])


def _double(model: nn.Module, step: int) -> Tensor:
    x, y = batch(step)
    return F.cross_entropy(model(x).double(), y)


def _nll(model: nn.Module, step: int) -> Tensor:
    x, y = batch(step)
    return F.nll_loss(model(x).log_softmax(-1), y)


def _two_tasks(model: nn.Module, step: int) -> Tensor:
    x, y = batch(step)
    kinds, places = model(x)
    return F.cross_entropy(kinds, y) + F.cross_entropy(places, y % 3)


def _focal(model: nn.Module, step: int) -> Tensor:
    x, y = batch(step)
    logp = model(x).log_softmax(-1).gather(1, y[:, None])[:, 0]
    return -((1 - logp.exp()) ** 2 * logp).mean()


def _autocast(model: nn.Module, step: int) -> Tensor:
    x, y = batch(step)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(x)
    return F.cross_entropy(logits.float(), y)


def _pixels(model: nn.Module, step: int) -> Tensor:
    x, _ = batch(step, 3, 8, 8)
    return F.cross_entropy(model(x), (x[:, 0] > 0).long())


def _penalty_first(session: Session) -> nn.Module:
    """Two backward passes of one graph: a penalty, then the loss."""
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    session.attach(model, optimizer)
    for step in range(STEPS):
        x, y = batch(step)
        logits = model(x)
        penalty, loss = 1e-9 * logits.square().mean(), F.cross_entropy(logits, y)
        penalty.backward(retain_graph=True)
        loss.backward()
        session.observe(penalty.detach() + loss.detach())
        optimizer.step()
        optimizer.zero_grad()
    return model


def _two_optimizers(session: Session) -> nn.Module:
    model = mlp()
    body = torch.optim.AdamW(model[:4].parameters(), 1e-3)
    head = torch.optim.AdamW(model[4].parameters(), 1e-2)
    session.attach(model, [body, head])
    session.optimizer = head
    for step in range(STEPS):
        loss = cross_entropy(model, step)
        loss.backward()
        session.observe(loss)
        for optimizer in (body, head):
            optimizer.step()
            optimizer.zero_grad()
    return model


def _tapped(session: Session) -> nn.Module:
    model = _Scaled(0.25)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    session.attach(model, optimizer)
    for step in range(STEPS):
        x, y = batch(step)
        loss = F.cross_entropy(session.tap(model(x)), y)
        loss.backward()
        session.observe(loss)
        optimizer.step()
        optimizer.zero_grad()
    return model


def _not_reported(loss: Callable[[nn.Module, int], Tensor]) -> Callable[[Session], nn.Module]:
    """Return a loop with the README's two lines alone."""

    def train(session: Session) -> nn.Module:
        model = mlp()
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
        session.attach(model, optimizer)
        for step in range(STEPS):
            loss(model, step).backward()
            optimizer.step()
            optimizer.zero_grad()
        return model

    return train


def _policy_gradient(model: nn.Module, step: int) -> Tensor:
    x, y = batch(step)
    advantage = torch.randn(len(y), generator=torch.Generator().manual_seed(step))
    return -(advantage * model(x).log_softmax(-1).gather(1, y[:, None])[:, 0]).mean()


def _gradient_penalty(model: nn.Module, step: int) -> Tensor:
    """Penalise the gradient at the inputs (R1)."""
    x, y = batch(step)
    x = x.clone().requires_grad_()
    logits = model(x)
    (slope,) = torch.autograd.grad(logits.sum(), x, create_graph=True)
    return F.cross_entropy(logits, y) + 0.1 * slope.square().sum(-1).mean()


def _curvature(model: nn.Module, step: int) -> Tensor:
    """Look at the Hessian, with rows of its own, before the loss is computed."""
    x, y = batch(step + 1)
    params = [*model.parameters()]
    gradients = torch.autograd.grad(F.nll_loss(model(x).log_softmax(-1), y), params, create_graph=True)
    torch.autograd.grad(gradients, params, [torch.ones_like(one) for one in params])
    return cross_entropy(model, step)


def _first_order_maml(model: nn.Module, step: int) -> Tensor:
    x, y = batch(step + 1)
    params = dict(model.named_parameters())
    inner = F.nll_loss(torch.func.functional_call(model, params, (x,)).log_softmax(-1), y)
    gradients = torch.autograd.grad(inner, [*params.values()])
    fast = {name: p - 0.1 * g for (name, p), g in zip(params.items(), gradients, strict=True)}
    x, y = batch(step)
    return F.cross_entropy(torch.func.functional_call(model, fast, (x,)), y)


class _OwnOptimizer:
    """A user's own class, not derived from torch's."""

    def __init__(self, model: nn.Module) -> None:
        self.param_groups = [{"params": list(model.parameters()), "lr": 0.1}]
        self.state: defaultdict[Tensor, dict[str, Tensor]] = defaultdict(dict)

    def step(self) -> None:
        with torch.no_grad():
            for param in self.param_groups[0]["params"]:  # type: ignore[attr-defined]
                param -= 0.1 * param.grad

    def zero_grad(self) -> None:
        for param in self.param_groups[0]["params"]:  # type: ignore[attr-defined]
            param.grad = None


def _convolutions() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 2, 1))


def _make() -> list[Configuration]:
    return [
        Configuration("MLP", loop(mlp, cross_entropy), "4"),
        Configuration("MLP, loss not reported", _not_reported(cross_entropy), "4"),
        Configuration("MLP, nll_loss(log_softmax)", loop(mlp, _nll), "4"),
        Configuration("MLP, loss in float64", loop(mlp, _double), "4"),
        Configuration("MLP, label smoothing", loop(mlp, _smoothed), "4", soft=True),
        Configuration("MLP, focal loss", loop(mlp, _focal), "4", soft=True, shift_invariant=True),
        Configuration("MLP, one-vs-rest BCE", loop(mlp, _binary), "4", soft=True, shift_invariant=False),
        Configuration("MLP, regression, 5 outputs", loop(mlp, _regression), "4", classes=False),
        Configuration(
            "MLP, regression, 1 output", loop(lambda: mlp(outputs=1), _one_output), "4", classes=False
        ),
        Configuration("MLP, bf16 autocast", loop(mlp, _autocast), "4"),
        Configuration("MLP, penalty before the loss", _penalty_first, "4"),
        Configuration("MLP, two optimizers", _two_optimizers, "4"),
        Configuration("MLP, an optimizer class of one's own", loop(mlp, cross_entropy, _OwnOptimizer), "4"),
        Configuration(
            "MLP, policy gradient, loss not reported",
            _not_reported(_policy_gradient),
            "4",
            soft=True,
            loss=False,
        ),
        Configuration("MLP, focal loss, not reported", _not_reported(_focal), "4", soft=True, loss=False),
        Configuration("MLP, gradient penalty (R1)", loop(mlp, _gradient_penalty), "4"),
        Configuration("MLP, products with the Hessian", loop(mlp, _curvature), "4"),
        Configuration("MLP, first-order MAML", loop(mlp, _first_order_maml), "4"),
        Configuration("LSTM language model", loop(_Recurrent, _language), "decoder"),
        Configuration(
            "tied weight without a module",
            loop(_Tied, _language),
            ("embed.weight", None),
        ),
        Configuration("bare parameter W_U, named", loop(_BareHead, _language, head="W_U"), "W_U"),
        Configuration(
            "logits times 0.25 (muP)", loop(lambda: _Scaled(0.25), cross_entropy), "head", scaled=True
        ),
        Configuration("logits times 8", loop(lambda: _Scaled(8.0), cross_entropy), "head", scaled=True),
        Configuration("logits times 0.25, tapped", _tapped, "head"),
        Configuration(
            "two heads",
            loop(_MultiTask, _two_tasks),
            ("kinds", "kinds, places"),
            true_notes=("several_heads",),
        ),
        Configuration("two heads, one named", loop(_MultiTask, _two_tasks, head="kinds"), "kinds"),
        Configuration("convolutional classifier", loop(_convolutions, _pixels), "2"),
        Configuration(
            "torch.compile (eager backend)",
            loop(lambda: torch.compile(mlp(), backend="eager"), cross_entropy),
            ("4", "_orig_mod.4"),
        ),
    ]


TABLE = Table("PyTorch: plain loops", ("torch",), _make)
