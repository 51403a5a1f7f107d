"""Every optimizer of torch.optim on a plain classifier, and its usual variants."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tests.zoo.configuration import Configuration, Table
from tests.zoo.kits import loop
from tests.zoo.tables.plain_loops import cross_entropy, mlp


def _with(name: str, **options: Any) -> Callable[[nn.Module], Any]:
    def made(model: nn.Module) -> Any:
        return getattr(torch.optim, name)(model.parameters(), lr=1e-3, **options)

    return made


def _muon(model: nn.Module) -> Any:
    """Muon takes matrices only."""
    return torch.optim.Muon([parameter for parameter in model.parameters() if parameter.dim() == 2], lr=1e-3)


def _averaged(session: Any) -> nn.Module:
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    average = torch.optim.swa_utils.AveragedModel(model)
    session.attach(model, optimizer)
    for step in range(8):
        optimizer.zero_grad()
        loss = cross_entropy(model, step)
        loss.backward()
        session.observe(loss)
        optimizer.step()
        average.update_parameters(model)
    return average


def _make() -> list[Configuration]:
    def one(name: str, label: str = "", tau: float | None = None, **options: Any) -> Configuration:
        return Configuration(
            f"{name} ({label})" if label else name,
            loop(mlp, cross_entropy, _with(name, **options)),
            "4",
            tau=tau,
        )

    return [
        one("Adam", tau=1000),
        one("AdamW", tau=1000),
        one("NAdam", tau=1000),
        one("RAdam", tau=1000),
        one("Adamax"),
        one("Adafactor"),
        one("Adadelta"),
        one("Adagrad"),
        one("ASGD"),
        one("RMSprop"),
        one("Rprop"),
        one("SGD"),
        one("SGD", "momentum, Nesterov", momentum=0.9, nesterov=True),
        one("RMSprop", "centered, momentum", centered=True, momentum=0.9),
        one("AdamW", "amsgrad", amsgrad=True),
        one("AdamW", "fused", fused=True),
        one("AdamW", "foreach", foreach=True),
        one("AdamW", "betas=(.9, .95)", tau=20, betas=(0.9, 0.95)),
        one("AdamW", "maximize", maximize=True),
        one("AdamW", "capturable=False, weight decay 0", weight_decay=0.0),
        Configuration(
            "LBFGS",
            loop(
                mlp,
                cross_entropy,
                lambda model: torch.optim.LBFGS(model.parameters(), max_iter=1),
                closure=True,
            ),
            "4",
        ),
        Configuration("AdamW (closure)", loop(mlp, cross_entropy, _with("AdamW"), closure=True), "4"),
        Configuration("Muon", loop(mlp, cross_entropy, _muon), "4"),
        Configuration("AdamW, AveragedModel", _averaged, ("4", "module.4")),
    ]


TABLE = Table("torch.optim", ("torch",), _make)
