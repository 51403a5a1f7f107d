"""Trainings that several tables share: a plain loop, and a transformers Trainer, each on made data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tests.zoo.configuration import STEPS
from tests.zoo.session import Session

Loss = Callable[[nn.Module, int], Tensor]
"""``loss(model, step)`` computes the loss of a step."""
Train = Callable[[Session], nn.Module]


def loop(
    make: Callable[[], nn.Module],
    loss: Loss,
    optimizer: Callable[[nn.Module], Any] | None = None,
    *,
    steps: int = STEPS,
    closure: bool = False,
    **options: Any,
) -> Train:
    """Return a plain training loop with the two lines of the README and ``observe_loss``."""

    def train(session: Session) -> nn.Module:
        model = make().train()
        opt = torch.optim.AdamW(model.parameters(), 1e-3) if optimizer is None else optimizer(model)
        session.attach(model, opt, **options)
        for step in range(steps):

            def compute(create_graph: bool = False, step: int = step) -> Tensor:
                opt.zero_grad()
                found = loss(model, step)
                found.backward(create_graph=create_graph)
                session.observe(found)
                return found

            if closure:
                opt.step(compute)
            else:
                compute()
                before = moments(opt) if not session.watching else None
                opt.step()
                if before is not None:
                    session.averages = min(session.averages or (10**9, 0), following(opt, before))
        return model

    return train


Moments = dict[Tensor, tuple[Tensor, Tensor, float]]


def moments(optimizer: Any) -> Moments:
    """Return second moment, squared gradient and β2 of each tensor of an optimizer's state, before a step."""
    found: Moments = {}
    groups, state = getattr(optimizer, "param_groups", []), getattr(optimizer, "state", {})
    for group in groups:
        betas = group.get("betas", (0.0, 0.0))
        for parameter in group["params"]:
            own = state.get(parameter)
            kept = own.get("exp_avg_sq") if isinstance(own, dict) else torch.zeros_like(parameter)
            if type(kept) is Tensor and kept.shape == parameter.shape and parameter.grad is not None:
                found[parameter] = (
                    kept.clone(),
                    parameter.grad.square(),
                    float(betas[-1 if len(betas) > 2 else 1]),
                )
    return found


def following(optimizer: Any, before: Moments) -> tuple[int, int]:
    """Return how many tensors have the moment β2 v + (1 − β2) g² after the step, and how many there are."""
    follow = 0
    for parameter, (kept, square, beta) in before.items():
        now = optimizer.state[parameter].get("exp_avg_sq")
        if type(now) is Tensor and now.shape == kept.shape and bool(square.any()):
            follow += torch.allclose(now.float(), beta * kept + (1 - beta) * square, rtol=1e-3, atol=0)
    return follow, sum(len(group["params"]) for group in optimizer.param_groups)


def trainer(
    make: Callable[[], nn.Module],
    rows: Callable[[nn.Module], Sequence[dict[str, Any]]],
    *,
    steps: int = STEPS,
    trainer_class: Callable[[], type] | None = None,
    keywords: Callable[[nn.Module], dict[str, Any]] | None = None,
    options: dict[str, Any] | None = None,
    **arguments: Any,
) -> Train:
    """Return a training with the transformers Trainer. ``rows`` makes the data set, a list of dicts."""

    def train(session: Session) -> nn.Module:
        from transformers import Trainer, TrainingArguments

        torch.manual_seed(0)
        model = make()
        more = {} if keywords is None else keywords(model)
        ran = (Trainer if trainer_class is None else trainer_class())(
            model=model,
            args=TrainingArguments(**{**quiet_arguments(session, steps), **arguments}),
            train_dataset=list(rows(model)),
            callbacks=session.trainer_callbacks(**(options or {})),
            **more,
        )
        return finish(session, ran)

    return train


def quiet_arguments(session: Session, steps: int) -> dict[str, Any]:
    """Return the arguments of every Trainer of the zoo."""
    return {
        "output_dir": session.folder,
        "max_steps": steps,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 0,
        "logging_steps": 10**6,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-4,
    }


def finish(session: Session, ran: Any) -> nn.Module:
    """Run a Trainer and return its model."""
    ran.train()
    session.optimizer = ran.optimizer
    model: nn.Module = ran.model
    return model


# --- data ---

ROWS = 4 * STEPS
WORDS = 12
"""Tokens of a made sentence."""


def tokens(vocabulary: int, length: int = WORDS, least: int = 4) -> Tensor:
    """Return random token ids [ROWS, length] that are no special tokens."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(least, vocabulary, (ROWS, length), generator=generator)


def labels(classes: int, *shape: int) -> Tensor:
    """Return random class numbers [ROWS, *shape]."""
    generator = torch.Generator().manual_seed(2)
    return torch.randint(0, classes, (ROWS, *shape), generator=generator)


def reals(*shape: int) -> Tensor:
    """Return normal random numbers [ROWS, *shape]."""
    return torch.randn(ROWS, *shape, generator=torch.Generator().manual_seed(3))


def as_rows(**columns: Tensor) -> list[dict[str, Any]]:
    """Return a data set of dicts from columns [ROWS, ...]."""
    return [{name: column[i] for name, column in columns.items()} for i in range(ROWS)]
