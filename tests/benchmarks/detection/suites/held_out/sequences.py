"""Ordinary trainings on sequences: forecasts, transcription, translation, tagging, preferences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.benchmarks.detection import data
from tests.benchmarks.detection.suites.checked import CheckedTraining, epochs, part_of
from tests.benchmarks.detection.suites.common import of_output, trained
from tests.benchmarks.detection.suites.held_out.shared import (
    code_windows,
    cross_entropy,
    everywhere,
    generator_of,
    pinball,
)
from tests.benchmarks.detection.training import LogitChange

# --- forecasts -----------------------------------------------------------------------------------------

SEEN, AHEAD = 32, 8
"""Hours that a forecast is made from, and hours that it is made for."""


class Causal(nn.Module):
    """Dilated convolutions that see the past alone (Bai et al. 2018): [B, C, T] → [B, W, T]."""

    def __init__(self, inputs: int, width: int, layers: int = 3, dropout: float = 0.1) -> None:
        super().__init__()
        self.first = nn.Conv1d(inputs, width, 1)
        self.layers = nn.ModuleList(nn.Conv1d(width, width, 3, dilation=2**k) for k in range(layers))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for k, layer in enumerate(self.layers):
            x = x + self.dropout(F.relu(layer(F.pad(x, (2 * 2**k, 0)))))
        return x


class Forecast(nn.Module):
    """A network of the past → ``outputs`` numbers for each hour ahead."""

    def __init__(self, net: str, outputs: int, width: int = 24) -> None:
        super().__init__()
        self.net, self.outputs = net, outputs
        if net == "causal":
            self.inner: nn.Module = Causal(1, width)
            self.head = nn.Linear(width, AHEAD * outputs)
        elif net == "patches":
            layer = nn.TransformerEncoderLayer(width, 2, 2 * width, 0.1, "gelu", batch_first=True)
            self.inner = nn.Sequential(nn.Linear(8, width), layer, nn.Flatten())
            self.head = nn.Linear(SEEN // 8 * width, AHEAD * outputs)
        else:
            self.inner = nn.Linear(SEEN, AHEAD * outputs)
            self.head = nn.Linear(SEEN, AHEAD * outputs)

    def forward(self, x: Tensor) -> Tensor:
        if self.net == "causal":
            made = self.head(self.inner(x[:, None])[..., -1])
        elif self.net == "patches":
            made = self.head(self.inner(x.reshape(len(x), -1, 8)))
        else:  # a trend and the rest, each by a linear map (Zeng et al. 2023)
            trend = F.avg_pool1d(F.pad(x[:, None], (4, 4), mode="replicate"), 9, 1).squeeze(1)
            made = self.inner(trend) + self.head(x - trend)
        return made.reshape(len(x), AHEAD, self.outputs).squeeze(-1)


def _gaussian(z: Tensor, y: Tensor) -> Tensor:
    mean, log_variance = z.unbind(-1)
    return F.gaussian_nll_loss(mean, y, log_variance.clamp(-6, 6).exp())


FORECASTS: dict[str, tuple[int, Callable[..., Tensor]]] = {
    "quantiles": (3, pinball(0.1, 0.5, 0.9)), "squares": (1, F.mse_loss), "absolute": (1, F.l1_loss),
    "gaussian": (2, _gaussian),
}  # fmt: skip


def forecast(
    seed: int, arm: LogitChange, *, net: str, loss: str, batch: int = 32, **how: Any
) -> CheckedTraining:
    """A series of a day's and a week's rhythm, and noise that lasts."""
    torch.manual_seed(seed)
    hours = torch.arange(1500.0)
    noise = torch.randn(1500)
    for k in range(1, 1500):
        noise[k] += 0.8 * float(noise[k - 1])
    series = (hours * 6.2832 / 24).sin() + 0.5 * (hours * 6.2832 / 168).cos() + 0.3 * noise
    windows = series.unfold(0, SEEN + AHEAD, 1)
    x, y = windows[:, :SEEN].contiguous(), windows[:, SEEN:].contiguous()
    outputs, function = FORECASTS[loss]
    model = Forecast(net, outputs)
    draw = epochs(x, y, size=batch, seed=seed)
    return trained(model, of_output(function), draw, arm, part=part_of(x, y), watch={"head": "head"}, **how)


# --- texts ---------------------------------------------------------------------------------------------


class CausalReader(nn.Module):
    """A language model of causal convolutions: tokens [B, T] → logits [B, T, V]."""

    def __init__(self, tokens: int = 128, width: int = 32) -> None:
        super().__init__()
        self.embedding = nn.Embedding(tokens, width)
        self.inner = Causal(width, width)
        self.lm_head = nn.Linear(width, tokens)

    def forward(self, x: Tensor) -> Tensor:
        return self.lm_head(self.inner(self.embedding(x).transpose(1, 2)).transpose(1, 2))


def code_reader(
    seed: int, arm: LogitChange, *, rows: int = 4000, batch: int = 8, **how: Any
) -> CheckedTraining:
    """A language model of Python's source."""
    torch.manual_seed(seed)
    windows = code_windows(rows, 33, seed)
    x, y = windows[:, :-1], windows[:, 1:]
    draw = epochs(x, y, size=batch, seed=seed)
    return trained(CausalReader(), everywhere, draw, arm, part=part_of(x, y, rows=32), check_every=20, **how)


def preferences(seed: int, arm: LogitChange, *, beta: float = 0.1, **how: Any) -> CheckedTraining:
    """DPO (Rafailov et al. 2023): of two ends of a text the true one is preferred to a shuffled one."""
    torch.manual_seed(seed)
    windows = code_windows(600, 25, seed)
    model, reference = CausalReader(), CausalReader()
    before = torch.optim.AdamW(model.parameters())
    warm = epochs(windows, size=16, seed=seed)
    for number in range(1, 300):
        (rows,) = warm(number)[0]
        F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten()).backward()
        before.step()
        before.zero_grad()
    reference.load_state_dict(model.state_dict())
    reference.eval()
    ends = torch.stack([row[torch.randperm(12)] for row in windows[:, -12:]])
    worse = torch.cat([windows[:, :-12], ends], 1)

    def odds(logits: Tensor, rows: Tensor) -> Tensor:
        """Log probability of each text's last twelve bytes."""
        own = logits.log_softmax(-1).gather(-1, rows[:, 1:, None]).squeeze(-1)
        return own[:, -12:].sum(1)

    def loss(training: Any, batch: Any, monitor: Any) -> Tensor:
        rows = torch.cat(batch)
        with torch.no_grad():
            usual = odds(reference(rows[:, :-1]), rows)
        chosen, rejected = (odds(training.model(rows[:, :-1]), rows) - usual).chunk(2)
        return -F.logsigmoid(beta * (chosen - rejected)).mean()

    draw = epochs(windows, worse, size=8, seed=seed)
    part = part_of(windows, worse, rows=64)
    return trained(model, loss, draw, arm, part=part, check_every=20, **how)


# --- transcription, tagging ------------------------------------------------------------------------------


class Listener(nn.Module):
    """A bidirectional GRU with a head at every frame."""

    def __init__(self, inputs: int, outputs: int, width: int = 24, dropout: float = 0.1) -> None:
        super().__init__()
        self.layer = nn.GRU(inputs, width, batch_first=True, bidirectional=True)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(2 * width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.dropout(self.layer(x)[0]))


def transcription(seed: int, arm: LogitChange, *, batch: int = 16, **how: Any) -> CheckedTraining:
    """CTC (Graves et al. 2006): five symbols, each two to four frames of noisy sound long."""
    torch.manual_seed(seed)
    sounds = torch.randn(9, 8)
    symbols = torch.randint(1, 9, (600, 5))
    rows = []
    for row in symbols:
        lengths = torch.randint(2, 5, (5,))
        heard = sounds[row.repeat_interleave(lengths)]
        rows.append(F.pad(heard, (0, 0, 0, 20 - len(heard))))
    x = torch.stack(rows) + 0.5 * torch.randn(600, 20, 8)

    def loss(z: Tensor, target: Tensor) -> Tensor:
        rows = len(target)
        frames, lengths = torch.full((rows,), 20), torch.full((rows,), 5)
        return F.ctc_loss(z.log_softmax(-1).transpose(0, 1), target, frames, lengths)

    draw = epochs(x, symbols, size=batch, seed=seed)
    return trained(Listener(8, 9), of_output(loss), draw, arm, part=part_of(x, symbols, rows=64), **how)


class Chain(nn.Module):
    """Embedded tokens → GRU → scores of tags → −log p of a path (Lafferty et al. 2001)."""

    def __init__(self, tokens: int, tags: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(tokens, 16)
        self.listener = Listener(16, tags)
        self.steps = nn.Parameter(torch.zeros(tags, tags))

    def forward(self, given: tuple[Tensor, Tensor]) -> Tensor:
        tokens, path = given
        scores = self.listener(self.embedding(tokens))
        own = scores.gather(-1, path[..., None]).sum((1, 2)) + self.steps[path[:, :-1], path[:, 1:]].sum(1)
        total = scores[:, 0]
        for k in range(1, scores.shape[1]):
            total = (total[:, :, None] + self.steps).logsumexp(1) + scores[:, k]
        return total.logsumexp(1) - own


def tagging(seed: int, arm: LogitChange, *, batch: int = 16, **how: Any) -> CheckedTraining:
    """Tags of bytes of source text: a letter that begins a word, one inside it, a digit, the rest."""
    torch.manual_seed(seed)
    tokens = code_windows(800, 12, seed)
    letter = (tokens >= 65) & (tokens <= 122)
    begins = letter & ~F.pad(letter[:, :-1], (1, 0))
    path = torch.where(begins, 1, torch.where(letter, 2, torch.where((tokens >= 48) & (tokens <= 57), 3, 0)))

    def loss(training: Any, batch: Any, monitor: Any) -> Tensor:
        return training.model(batch).mean() / 12  # type: ignore[no-any-return]

    draw = epochs(tokens, path, size=batch, seed=seed)
    part, watch = part_of(tokens, path, rows=64), {"head": "listener.head"}
    return trained(Chain(128, 4), loss, draw, arm, part=part, watch=watch, **how)


# --- from sequence to sequence ---------------------------------------------------------------------------


class Translator(nn.Module):
    """An encoder and a decoder with dropout (Vaswani et al. 2017)."""

    def __init__(self, tokens: int, length: int, width: int = 32) -> None:
        super().__init__()
        self.embedding = nn.Embedding(tokens, width)
        self.places = nn.Parameter(0.02 * torch.randn(length, width))
        encoder = nn.TransformerEncoderLayer(width, 2, 64, 0.1, batch_first=True)
        decoder = nn.TransformerDecoderLayer(width, 2, 64, 0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(encoder, 1, enable_nested_tensor=False)
        self.decoder = nn.TransformerDecoder(decoder, 1)
        self.head = nn.Linear(width, tokens)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(length))

    def forward(self, given: tuple[Tensor, Tensor]) -> Tensor:
        source, said = (self.embedding(tokens) + self.places[: tokens.shape[1]] for tokens in given)
        size = said.shape[1]
        return self.head(self.decoder(said, self.encoder(source), tgt_mask=self.mask[:size, :size]))


def translation(
    seed: int, arm: LogitChange, *, length: int = 7, batch: int = 32, smoothing: float = 0.1, **how: Any
) -> CheckedTraining:
    """Reverse six symbols and add one to each; the word before is given (teacher forcing)."""
    torch.manual_seed(seed)

    def rows(count: int, number: int) -> Any:
        given = torch.randint(0, 10, (count, length), generator=generator_of(seed, number))
        target = (given.flip(1) + 1) % 10
        return (given, F.pad(target[:, :-1], (1, 0), value=10)), target

    loss = of_output(lambda z, y: F.cross_entropy(z.flatten(0, 1), y.flatten(), label_smoothing=smoothing))
    draw = lambda step: [rows(batch, step)]  # noqa: E731
    return trained(Translator(11, length), loss, draw, arm, part=rows(128, 0), check_every=20, **how)


class Remembering(nn.Module):
    """A GRU reads, another writes with dot-product attention on what was read."""

    def __init__(self, tokens: int, width: int = 32) -> None:
        super().__init__()
        self.embedding = nn.Embedding(tokens, width)
        self.reader = nn.GRU(width, width, batch_first=True)
        self.writer = nn.GRU(width, width, batch_first=True)
        self.head = nn.Linear(2 * width, tokens)

    def forward(self, given: tuple[Tensor, Tensor]) -> Tensor:
        source, said = (self.embedding(tokens) for tokens in given)
        read, state = self.reader(source)
        written, _ = self.writer(said, state)
        weight = (written @ read.transpose(1, 2) * read.shape[-1] ** -0.5).softmax(-1)
        return self.head(torch.cat([written, weight @ read], -1))


def longer_and_longer(seed: int, arm: LogitChange, *, full: int = 3000, **how: Any) -> CheckedTraining:
    """Copying symbols, a curriculum of lengths: 3 first, 10 after ``full`` steps."""
    torch.manual_seed(seed)

    def rows(count: int, length: int, number: int) -> Any:
        target = torch.randint(0, 8, (count, length), generator=generator_of(seed, number))
        return (target, F.pad(target[:, :-1], (1, 0), value=8)), target

    draw = lambda step: [rows(24, 3 + min(7 * step // full, 7), step)]  # noqa: E731
    return trained(Remembering(9), everywhere, draw, arm, part=rows(64, 10, 0), check_every=20, **how)


class StateSpace(nn.Module):
    """A diagonal linear recurrence as a long convolution (Gu et al. 2022), a gate, and the mean over time."""

    def __init__(self, outputs: int, width: int = 24, states: int = 8) -> None:
        super().__init__()
        self.first = nn.Linear(1, width)
        self.decay = nn.Parameter(torch.linspace(-4, 0, states).repeat(width, 1))
        self.speed = nn.Parameter(torch.arange(states).float().repeat(width, 1))
        self.weight = nn.Parameter(torch.randn(width, states) / states)
        self.gate = nn.Linear(width, 2 * width)
        self.head = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x[..., None]).transpose(1, 2)
        time = torch.arange(x.shape[-1])
        waves = torch.exp(-self.decay.exp()[..., None] * time) * torch.cos(self.speed[..., None] * time)
        kernel = (self.weight[..., None] * waves).sum(1)
        size = 2 * x.shape[-1]
        y = torch.fft.irfft(torch.fft.rfft(x, size) * torch.fft.rfft(kernel, size), size)[..., : x.shape[-1]]
        return self.head(F.glu(self.gate(F.gelu(y).transpose(1, 2))).mean(1))


def pixel_by_pixel(seed: int, arm: LogitChange, *, batch: int = 32, **how: Any) -> CheckedTraining:
    """A digit read pixel by pixel."""
    torch.manual_seed(seed)
    x, y = data.digits(1500, seed=seed)
    draw = epochs(x, y, size=batch, seed=seed)
    return trained(StateSpace(10), cross_entropy, draw, arm, part=part_of(x, y, rows=128), **how)
