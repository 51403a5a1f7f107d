"""Plain PyTorch loops that train language models as public repositories do: fused losses, caps, Muon."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from tests.zoo.configuration import STEPS, Configuration, Table
from tests.zoo.kits import loop
from tests.zoo.session import Session

VOCABULARY, WIDTH = 40, 32


class LanguageModel(nn.Module):
    """A transformer of one layer. ``forward`` returns hidden states [B, T, WIDTH], or logits of them."""

    def __init__(self, *, tied: bool = False, bias: bool = False, ahead: int = 0) -> None:
        super().__init__()
        self.wte = nn.Embedding(VOCABULARY, WIDTH)
        self.block = nn.TransformerEncoderLayer(WIDTH, 4, 64, dropout=0.0, batch_first=True, norm_first=True)
        self.norm = nn.LayerNorm(WIDTH)
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=bias)
        self.ahead = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(ahead))
        if tied:
            self.wte.weight = self.lm_head.weight

    def hidden(self, tokens: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        out: Tensor = self.norm(self.block(self.wte(tokens), src_mask=mask, is_causal=True))
        return out

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.lm_head(self.hidden(tokens))
        return out


def text(step: int, length: int = 9) -> tuple[Tensor, Tensor]:
    """Return tokens [4, length − 1] and the ones that follow."""
    found = torch.randint(0, VOCABULARY, (4, length), generator=torch.Generator().manual_seed(step))
    return found[:, :-1], found[:, 1:]


def _plain(logits: Tensor, wanted: Tensor, **options: Any) -> Tensor:
    return F.cross_entropy(logits.reshape(-1, VOCABULARY), wanted.reshape(-1), **options)


def _ordinary(model: nn.Module, step: int) -> Tensor:
    tokens, wanted = text(step)
    return _plain(model(tokens), wanted)


def _ignored(model: nn.Module, step: int) -> Tensor:
    tokens, wanted = text(step)
    return _plain(model(tokens), wanted.where(wanted % 3 > 0, -100), ignore_index=-100)


def _by_token(model: nn.Module, step: int) -> Tensor:
    tokens, wanted = text(step)
    return _plain(model(tokens), wanted, reduction="sum") / wanted.numel()


def _padded(model: nn.Module, step: int) -> Tensor:
    """Unreduced losses times a mask."""
    tokens, wanted = text(step)
    mask = (wanted % 3 > 0).float().reshape(-1)
    return (_plain(model(tokens), wanted, reduction="none") * mask).sum() / mask.sum()


def _capped(model: nn.Module, step: int) -> Tensor:
    tokens, wanted = text(step)
    return _plain(15 * torch.tanh(model(tokens).float() / 15), wanted)


def _z_loss(model: nn.Module, step: int) -> Tensor:
    tokens, wanted = text(step)
    logits = model(tokens)
    return _plain(logits, wanted) + 1e-4 * logits.logsumexp(-1).square().mean()


def _functional(options: bool) -> Callable[[Any, int], Tensor]:
    """``F.linear_cross_entropy``, which multiplies by the head's weight itself."""

    def loss(model: Any, step: int) -> Tensor:
        tokens, wanted = text(step)
        return F.linear_cross_entropy(
            model.hidden(tokens).reshape(-1, WIDTH),
            model.lm_head.weight,
            wanted.reshape(-1),
            options=nn.LinearCrossEntropyOptions() if options else None,
        )

    return loss


class _Capped(LanguageModel):
    """A model that caps its logits and returns its loss, as nanochat's."""

    def forward(self, tokens: Tensor, wanted: Tensor | None = None) -> Tensor:
        logits = 15 * torch.tanh(super().forward(tokens).float() / 15)
        return logits if wanted is None else _plain(logits, wanted)


class _LossWithHead(nn.Module):
    """A model whose head is torch's fused loss."""

    def __init__(self, options: bool) -> None:
        super().__init__()
        self.body = LanguageModel()
        self.body.lm_head = nn.Identity()
        chosen = nn.LinearCrossEntropyOptions() if options else None
        self.loss = nn.LinearCrossEntropyLoss(WIDTH, VOCABULARY, options=chosen)

    def forward(self, tokens: Tensor, wanted: Tensor) -> Tensor:
        found: Tensor = self.loss(self.body(tokens).reshape(-1, WIDTH), wanted.reshape(-1))
        return found


def _inside(model: nn.Module, step: int) -> Tensor:
    found: Tensor = model(*text(step))
    return found


def _beside() -> nn.Module:
    """The model without a head, and the loss that holds it, in one module for the monitor."""
    model = LanguageModel()
    model.lm_head = nn.Identity()  # type: ignore[assignment]
    options = nn.LinearCrossEntropyOptions()
    return nn.ModuleList([model, nn.LinearCrossEntropyLoss(WIDTH, VOCABULARY, options=options)])


def _by_two(both: Any, step: int) -> Tensor:
    tokens, wanted = text(step)
    found: Tensor = both[1](both[0](tokens).reshape(-1, WIDTH), wanted.reshape(-1))
    return found


def _tapped_features(session: Session) -> nn.Module:
    model = LanguageModel(bias=True)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    session.attach(model, optimizer)
    for step in range(STEPS):
        tokens, wanted = text(step)
        hidden = session.tap_features(model.hidden(tokens).reshape(-1, WIDTH), wanted.reshape(-1))
        loss = F.linear_cross_entropy(
            hidden,
            model.lm_head.weight,
            wanted.reshape(-1),
            linear_bias=model.lm_head.bias,
            options=nn.LinearCrossEntropyOptions(),
        )
        loss.backward()
        session.observe(loss)
        optimizer.step()
        optimizer.zero_grad()
    return model


def _in_chunks(recompute: bool) -> Callable[[Any, int], Tensor]:
    """Logits of a few positions at a time: the head is called several times a step."""

    def loss(model: Any, step: int) -> Tensor:
        tokens, wanted = text(step)

        def piece(hidden: Tensor, wanted: Tensor) -> Tensor:
            return _plain(model.lm_head(hidden), wanted, reduction="sum")

        total = torch.zeros(())
        for part, right in zip(model.hidden(tokens).split(2, 1), wanted.split(2, 1), strict=True):
            total = total + (
                checkpoint(piece, part, right, use_reentrant=False) if recompute else piece(part, right)
            )
        return total / wanted.numel()

    return loss


def _further_ahead(model: Any, step: int) -> Tensor:
    """Predict the next tokens too, through one head."""
    tokens, wanted = text(step)
    hidden = model.hidden(tokens)
    loss = _plain(model.lm_head(hidden), wanted)
    for number, body in enumerate(model.ahead, 1):
        loss = loss + 0.3 * _plain(model.lm_head(body(hidden[:, :-number])), wanted[:, number:])
    return loss


def _recomputed_body(model: Any, step: int) -> Tensor:
    tokens, wanted = text(step)
    hidden = checkpoint(model.hidden, tokens, use_reentrant=False)
    return _plain(model.lm_head(hidden), wanted)


def _with_muon(session: Session) -> nn.Module:
    """Muon for the matrices of the body, AdamW for the rest."""
    model = LanguageModel()
    matrices = [p for p in model.block.parameters() if p.dim() == 2]
    chosen = {id(p) for p in matrices}
    both = [
        torch.optim.Muon(matrices, 1e-3),
        torch.optim.AdamW([p for p in model.parameters() if id(p) not in chosen], 1e-3, betas=(0.8, 0.95)),
    ]
    session.attach(model, both)
    session.optimizer = both[1]
    for step in range(STEPS):
        loss = _ordinary(model, step)
        loss.backward()
        session.observe(loss)
        for optimizer in both:
            optimizer.step()
        model.zero_grad(set_to_none=True)
    return model


def _in_backward(session: Session) -> nn.Module:
    """One optimizer a parameter, which steps as soon as its gradient is there."""
    model = LanguageModel()
    each = {p: torch.optim.AdamW([p], 1e-3) for p in model.parameters()}
    session.attach(model, list(each.values()))
    session.optimizer = each[model.lm_head.weight]

    def step_now(parameter: Tensor) -> None:
        each[parameter].step()  # type: ignore[index]
        each[parameter].zero_grad()  # type: ignore[index]

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(step_now)
    for step in range(STEPS):
        loss = _ordinary(model, step)
        session.observe(loss)
        loss.backward()
    return model


def _scaled_halves(session: Session) -> nn.Module:
    """float16 autocast with a GradScaler."""
    model = LanguageModel()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    session.attach(model, optimizer)
    for step in range(STEPS):
        tokens, wanted = text(step)
        with torch.autocast("cpu", torch.float16):
            logits = model(tokens)
        loss = _plain(logits.float(), wanted)
        scaler.scale(loss).backward()
        session.trained(loss)
        session.observe(loss)
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    return model


def _accumulated(session: Session) -> nn.Module:
    """The loop of nanoGPT: two micro-batches, clipping, a fused AdamW with groups."""
    return _nano(session, lambda loss: session.observe(2 * loss))


def _reported_divided(session: Session) -> nn.Module:
    return _nano(session, session.observe)


def _nano(session: Session, report: Callable[[Tensor], None]) -> nn.Module:
    model = LanguageModel(tied=True)
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, 1e-3, betas=(0.9, 0.95), fused=True)
    session.attach(model, optimizer)
    for step in range(STEPS):
        for micro in range(2):
            loss = _ordinary(model, 2 * step + micro) / 2
            loss.backward()
            report(loss.detach())
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return model


def _weight_normed() -> nn.Module:
    model = LanguageModel()
    parametrizations.weight_norm(model.lm_head)
    return model


def _make() -> list[Configuration]:
    fused: dict[str, Any] = {"logits": False}
    head = "lm_head"
    return [
        Configuration("nanoGPT's loop (tied, fused AdamW, accumulation)", _accumulated, head),
        Configuration("nanoGPT's loop, loss reported divided", _reported_divided, head),
        Configuration("Muon and AdamW", _with_muon, head),
        Configuration("an optimizer a parameter, stepping in the backward pass", _in_backward, head),
        Configuration("float16 and GradScaler", _scaled_halves, head, true_notes=("half_precision_loss",)),
        Configuration("ignored tokens", loop(LanguageModel, _ignored), head),
        Configuration("sum over tokens, divided", loop(LanguageModel, _by_token), head),
        Configuration("losses of tokens, masked", loop(LanguageModel, _padded), head, soft=True),
        Configuration("logits capped by tanh", loop(LanguageModel, _capped), head, changed=True),
        Configuration(
            "logits capped by tanh, loss inside of the model", loop(_Capped, _inside), head, changed=True
        ),
        Configuration("z-loss", loop(LanguageModel, _z_loss), head, soft=True, shift_invariant=False),
        Configuration("F.linear_cross_entropy", loop(LanguageModel, _functional(False)), head, **fused),
        Configuration(
            "F.linear_cross_entropy, in chunks", loop(LanguageModel, _functional(True)), head, **fused
        ),
        Configuration(
            "F.linear_cross_entropy, in chunks, tied",
            loop(lambda: LanguageModel(tied=True), _functional(True)),
            head,
            **fused,
        ),
        Configuration(
            "LinearCrossEntropyLoss as the head",
            loop(lambda: _LossWithHead(False), _inside),
            "loss.linear",
            **fused,
        ),
        Configuration(
            "LinearCrossEntropyLoss as the head, in chunks",
            loop(lambda: _LossWithHead(True), _inside),
            "loss.linear",
            **fused,
        ),
        Configuration(
            "LinearCrossEntropyLoss beside the model, in chunks", loop(_beside, _by_two), "1.linear", **fused
        ),
        Configuration("F.linear_cross_entropy, in chunks, bias, tapped", _tapped_features, head, **fused),
        Configuration("logits of some tokens at a time", loop(LanguageModel, _in_chunks(False)), head),
        Configuration(
            "logits of some tokens at a time, recomputed", loop(LanguageModel, _in_chunks(True)), head
        ),
        Configuration(
            "several tokens ahead, one head",
            loop(lambda: LanguageModel(ahead=2), _further_ahead),
            head,
            soft=True,
        ),
        Configuration("body recomputed", loop(LanguageModel, _recomputed_body), head),
        Configuration("head with weight norm", loop(_weight_normed, _ordinary), head),
    ]


TABLE = Table("PyTorch: language models", ("torch",), _make)
