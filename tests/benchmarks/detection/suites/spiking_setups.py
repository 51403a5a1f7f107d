"""Networks and tasks that no constant was fitted on, full batch, where slingshots are to be expected."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.benchmarks.detection import data, losses
from tests.benchmarks.detection.suites.checked import CheckedTraining
from tests.benchmarks.detection.training import LogitChange, LossOf, full_batch

# --- networks ----------------------------------------------------------------------------------------


class RootMeanSquare(nn.Module):
    """RMSNorm with a learned scale."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()


class Gated(nn.Module):
    """silu(a) · b, two linear maps of the input."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(inputs, width), nn.Linear(inputs, width)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.gate(x)) * self.up(x)


class Added(nn.Module):
    """x + f(x)."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


class LastOf(nn.Module):
    """Embedded tokens through a recurrent layer; the last state goes to the head."""

    def __init__(self, layer: type[nn.Module], tokens: int, width: int, outputs: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(tokens, width)
        self.layer: Any = layer(width, width, batch_first=True)
        self.head = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.embedding(x))[0][:, -1])


class TokenMixer(nn.Module):
    """MLP-Mixer on embedded tokens; ``norm`` before the head is RMSNorm or nothing."""

    def __init__(self, tokens: int, length: int, width: int, outputs: int, *, norm: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(tokens, width)
        self.across = nn.Sequential(nn.Linear(length, 16), nn.GELU(), nn.Linear(16, length))
        self.within = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.norm = RootMeanSquare(width) if norm else nn.Identity()
        self.head = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedding(x)
        x = x + self.across(x.transpose(1, 2)).transpose(1, 2)
        return self.head(self.norm((x + self.within(x)).mean(1)))


class GatedTransformer(nn.Module):
    """One attention layer and a gated feed-forward layer; ``tied``: head and embedding share weights."""

    def __init__(self, tokens: int, width: int, *, tied: bool, norm: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(tokens, width)
        nn.init.normal_(self.embedding.weight, std=width**-0.5)
        self.positions = nn.Parameter(0.02 * torch.randn(3, width))
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.feed = nn.Sequential(Gated(width, 2 * width), nn.Linear(2 * width, width))
        self.norm = RootMeanSquare(width) if norm else nn.Identity()
        self.head = nn.Linear(width, tokens, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedding(x) + self.positions
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head(self.norm((x + self.feed(x))[:, -1]))


def dense(name: str, inputs: int, width: int, outputs: int) -> nn.Sequential:
    """Perceptrons by name: an activation's, "gated", "residual", "root_mean_square" or "linear"."""
    activations: dict[str, type[nn.Module]] = {
        "gelu": nn.GELU, "silu": nn.SiLU, "tanh": nn.Tanh, "elu": nn.ELU, "linear": nn.Identity,
    }  # fmt: skip
    if name == "gated":
        body: list[nn.Module] = [Gated(inputs, width), Gated(width, width)]
    elif name == "residual":
        inner = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
        body = [nn.Linear(inputs, width), Added(inner), nn.ReLU()]
    elif name == "root_mean_square":
        body = [nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), RootMeanSquare(width)]
    else:
        act = activations[name]
        body = [nn.Linear(inputs, width), act(), nn.Linear(width, width), act()]
    return nn.Sequential(*body, nn.Linear(width, outputs))


def convolutional(outputs: int, width: int, act: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, width, 3, stride=2, padding=1), act(),
        nn.Conv2d(width, 2 * width, 3, stride=2, padding=1), act(),
        nn.Flatten(), nn.Linear(8 * width, outputs),
    )  # fmt: skip


# --- what happens to gradients -----------------------------------------------------------------------


def slow_gradients_amplified(model: nn.Module, decay: float = 0.98, factor: float = 2.0) -> Any:
    """Grokfast (Lee et al. 2024): add the gradients' running average, amplified, to the gradients."""
    averages: dict[Tensor, Tensor] = {}

    def amplify(_: nn.Module) -> None:
        for parameter in model.parameters():
            if parameter.grad is None:
                continue
            average = averages.setdefault(parameter, parameter.grad.detach().clone())
            average.mul_(decay).add_(parameter.grad, alpha=1 - decay)
            parameter.grad.add_(average, alpha=factor)

    return amplify


# --- losses --------------------------------------------------------------------------------------------


def many_hinges(training: Any, batch: Any, monitor: Any) -> Tensor:
    """The multi-class hinge, in the precision of the arm."""
    inputs, target = batch
    return F.multi_margin_loss(training.arm(training.model(inputs)), target)


def squared_hinges(training: Any, batch: Any, monitor: Any) -> Tensor:
    inputs, target = batch
    return F.multi_margin_loss(training.arm(training.model(inputs)), target, p=2)


def squares(training: Any, batch: Any, monitor: Any) -> Tensor:
    """Mean squared error against one-hot targets."""
    inputs, target = batch
    output = training.arm(training.model(inputs))
    return F.mse_loss(output, F.one_hot(target, output.shape[-1]).to(output.dtype))


_OWN: dict[str, LossOf] = {
    "many_hinges": many_hinges, "squared_hinges": squared_hinges, "squares": squares,
}  # fmt: skip

# --- trainings -----------------------------------------------------------------------------------------


def _trained(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    arm: LogitChange,
    *,
    lr: float = 1e-3,
    beta2: float = 0.95,
    decay: float = 0.0,
    penalty: float = 0.0,
    kind: str = "adam",
    loss: losses.LossName = ("cross_entropy",),
    grokfast: bool = False,
    warm: int = 10,
) -> CheckedTraining:
    """``decay``: AdamW's. ``penalty``: Adam's own, which is added to the gradients (L2)."""
    optimizers: dict[str, Callable[..., torch.optim.Optimizer]] = {
        "adam": torch.optim.AdamW if decay else torch.optim.Adam, "nadam": torch.optim.NAdam,
    }  # fmt: skip
    optimizer = optimizers[kind](model.parameters(), lr=lr, betas=(0.9, beta2), weight_decay=decay or penalty)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / warm))
    return CheckedTraining(
        model,
        optimizer,
        _OWN.get(loss[0]) or losses.named(loss),
        full_batch(x, y),
        scheduler,
        arm,
        before_update=slow_gradients_amplified(model) if grokfast else None,
    )


def on_digits(
    seed: int, arm: LogitChange, *, net: str, rows: int = 200, width: int = 64, **how: Any
) -> CheckedTraining:
    """``net``: "conv", "conv_silu" or a name of :func:`dense`."""
    torch.manual_seed(seed)
    x, y = data.digits(rows, seed=seed)
    if net.startswith("conv"):
        x = x.reshape(-1, 1, 8, 8)
        model = convolutional(10, width, nn.SiLU if net == "conv_silu" else nn.ReLU)
    else:
        model = dense(net, 64, width, 10)
    return _trained(model, x, y, arm, **how)


def on_pairs(
    seed: int,
    arm: LogitChange,
    *,
    net: str,
    p: int = 17,
    width: int = 64,
    operation: str = "+",
    **how: Any,
) -> CheckedTraining:
    """a∘b mod p. ``net``: a network of tokens (below), or of one-hot pairs a name of :func:`dense`."""
    torch.manual_seed(seed)
    pairs, y = data.modular(p, operation, seed=seed)
    tokens = torch.cat([pairs, torch.full((len(y), 1), p)], 1)
    nets: dict[str, Callable[[], nn.Module]] = {
        "gru": lambda: LastOf(nn.GRU, p + 1, width, p),
        "lstm": lambda: LastOf(nn.LSTM, p + 1, width, p),
        "mixer": lambda: TokenMixer(p + 1, 3, width, p, norm=False),
        "mixer_norm": lambda: TokenMixer(p + 1, 3, width, p, norm=True),
        "tied": lambda: GatedTransformer(p + 1, width, tied=True, norm=False),
        "gated_transformer": lambda: GatedTransformer(p + 1, width, tied=False, norm=False),
        "normed_transformer": lambda: GatedTransformer(p + 1, width, tied=False, norm=True),
    }
    if net in nets:
        return _trained(nets[net](), tokens, y, arm, **how)
    return _trained(dense(net, 2 * p, width, p), data.one_hot_pairs(pairs, p), y, arm, **how)


def on_noise(
    seed: int,
    arm: LogitChange,
    *,
    rows: int = 64,
    inputs: int = 20,
    width: int = 32,
    classes: int = 5,
    deep: bool = False,
    **how: Any,
) -> CheckedTraining:
    """Random rows with random labels; by default 837 parameters."""
    torch.manual_seed(seed)
    x, y = torch.randn(rows, inputs), torch.randint(0, classes, (rows,))
    shallow = nn.Sequential(nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, classes))
    model = dense("elu", inputs, width, classes) if deep else shallow
    return _trained(model, x, y, arm, **how)


def on_bits(
    seed: int, arm: LogitChange, *, net: str, rows: int = 300, bits: int = 20, width: int = 64, **how: Any
) -> CheckedTraining:
    """The parity of three bits."""
    torch.manual_seed(seed)
    x, y = data.parity(rows, bits, 3, seed=seed)
    return _trained(dense(net, bits, width, 2), x, y, arm, **how)


def on_text(seed: int, arm: LogitChange, *, rows: int = 100, width: int = 24, **how: Any) -> CheckedTraining:
    """Which of four parts of the manual a window of 16 bytes is from: embedded bytes side by side."""
    torch.manual_seed(seed)
    stream = data.text()
    starts = torch.randint(0, len(stream) - 17, (rows,))
    x, y = stream[starts[:, None] + torch.arange(16)], starts * 4 // len(stream)
    model = nn.Sequential(
        nn.Embedding(128, width), nn.Flatten(), nn.Linear(16 * width, 48), nn.SiLU(), nn.Linear(48, 4)
    )
    return _trained(model, x, y, arm, **how)


def on_table(seed: int, arm: LogitChange, *, data_set: str, net: str, **how: Any) -> CheckedTraining:
    """scikit-learn's iris, wine or breast_cancer."""
    from sklearn import datasets

    torch.manual_seed(seed)
    found = getattr(datasets, f"load_{data_set}")()
    x, y = torch.tensor(found.data, dtype=torch.float32), torch.tensor(found.target)
    x = (x - x.mean(0)) / x.std(0)
    return _trained(dense(net, x.shape[1], 48, int(y.max()) + 1), x, y, arm, **how)
