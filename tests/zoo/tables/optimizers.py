"""Every optimizer of pytorch_optimizer that a plain loop can run, and the wrappers of several libraries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from tests.zoo.configuration import STEPS, Configuration, Table
from tests.zoo.kits import loop
from tests.zoo.session import Session
from tests.zoo.tables.plain_loops import batch, cross_entropy, mlp

Made = Callable[[nn.Module], Any]

_NOT_HERE = {
    "demo": "needs several processes",
    "distributedmuon": "needs several processes",
    "spectralsphere": "takes matrices only",
    "muonclip": "needs an attention's weights",
    "bsam": "its own step fails here",
}
_CLOSURE = ("lbfgs",)
_GRAPH = ("adahessian", "sophiah")
_OPTIONS: dict[str, dict[str, Any]] = {
    "ranger21": {"num_iterations": STEPS},
    "lbfgs": {"max_iter": 1},
}
_TAU = {
    "adam": 1000,
    "adamw": 1000,
    "adan": 100,
    "adapnm": 1000,
    "lamb": 1000,
    "radam": 1000,
    "yogi": 1000,
    "adabelief": 1000,
}


def _named(name: str) -> Made:
    def made(model: nn.Module) -> Any:
        import pytorch_optimizer

        cls = pytorch_optimizer.load_optimizer(name)
        options = {"lr": 1e-3, **_OPTIONS.get(name, {})}
        if name in ("adalomo", "adammini", "lomo"):
            return cls(model, **options)
        if name in ("adago", "adamuon", "muon", "normuon"):
            matrices = [p for p in model.parameters() if p.dim() == 2]
            others = [p for p in model.parameters() if p.dim() != 2]
            return cls(
                [{"params": matrices, "use_muon": True}, {"params": others, "use_muon": False}], **options
            )
        return cls(model.parameters(), **options)

    return made


def _hessian(name: str) -> Any:
    def train(session: Session) -> nn.Module:
        model = mlp()
        optimizer = _named(name)(model)
        session.attach(model, optimizer)
        for step in range(STEPS):
            optimizer.zero_grad()
            loss = cross_entropy(model, step)
            loss.backward(create_graph=True)
            session.observe(loss)
            optimizer.step()
        return model

    return train


def _lomo(name: str) -> Any:
    """Fused with the backward pass: no optimizer step is called."""

    def train(session: Session) -> nn.Module:
        model = mlp()
        optimizer = _named(name)(model)
        session.attach(model, optimizer)
        for step in range(STEPS):
            loss = cross_entropy(model, step)
            session.observe(loss)
            optimizer.fused_backward(loss, 1e-3)
        return model

    return train


def _two_steps(wrap: Made) -> Any:
    """SAM: a step to the neighbour, a second pass, a step back and on."""

    def train(session: Session) -> nn.Module:
        model = mlp()
        optimizer = wrap(model)
        session.attach(model, optimizer)
        for step in range(STEPS):
            loss = cross_entropy(model, step)
            session.observe(loss)
            loss.backward()
            optimizer.first_step(zero_grad=True)
            cross_entropy(model, step).backward()
            optimizer.second_step(zero_grad=True)
        return model

    return train


def _by_number(session: Session) -> nn.Module:
    """AliG takes the loss as a number."""
    model = mlp()
    optimizer = _named("alig")(model)
    session.attach(model, optimizer)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = cross_entropy(model, step)
        loss.backward()
        session.observe(loss)
        optimizer.step(lambda loss=loss: float(loss))
    return model


def _wrapped(name: str, inner: str = "adamw", **options: Any) -> Made:
    def made(model: nn.Module) -> Any:
        import pytorch_optimizer

        return getattr(pytorch_optimizer, name)(_named(inner)(model), **options)

    return made


def _sam(name: str, **options: Any) -> Made:
    def made(model: nn.Module) -> Any:
        import pytorch_optimizer

        return getattr(pytorch_optimizer, name)(
            model.parameters(), base_optimizer=torch.optim.AdamW, lr=1e-3, **options
        )

    return made


def _free(name: str, **options: Any) -> Made:
    def made(model: nn.Module) -> Any:
        import schedulefree

        optimizer = getattr(schedulefree, name)(model.parameters(), lr=1e-3, **options)
        optimizer.train()
        return optimizer

    return made


def _free_wrapper(model: nn.Module) -> Any:
    import schedulefree

    optimizer = schedulefree.ScheduleFreeWrapper(torch.optim.SGD(model.parameters(), 1e-3))
    optimizer.train()
    return optimizer


def _free_closure(model: nn.Module) -> Any:
    import schedulefree

    return schedulefree.AdamWScheduleFreeClosure(model.parameters(), lr=1e-3)


def _heavy(name: str, **options: Any) -> Made:
    def made(model: nn.Module) -> Any:
        import heavyball

        heavyball.utils.compile_mode = None
        return getattr(heavyball, name)(model.parameters(), lr=1e-3, **options)

    return made


def _other(module: str, name: str, **options: Any) -> Made:
    def made(model: nn.Module) -> Any:
        import importlib

        return getattr(importlib.import_module(module), name)(model.parameters(), **{"lr": 1e-3, **options})

    return made


def _galore(name: str) -> Made:
    def made(model: nn.Module) -> Any:
        import galore_torch

        matrices = [p for p in model.parameters() if p.dim() == 2]
        others = [p for p in model.parameters() if p.dim() != 2]
        low = {"params": matrices, "rank": 4, "update_proj_gap": 4, "scale": 0.25, "proj_type": "std"}
        return getattr(galore_torch, name)([{"params": others}, low], lr=1e-3)

    return made


def _soft_sam(session: Session) -> nn.Module:
    """SAM given a closure for its second pass, as its documentation shows."""
    model = mlp()
    optimizer = _sam("SAM")(model)
    session.attach(model, optimizer)
    for step in range(STEPS):
        x, y = batch(step)

        def second(x: Any = x, y: Any = y) -> Any:
            found = F.cross_entropy(model(x), y)
            found.backward()
            return found

        loss = F.cross_entropy(model(x), y)
        session.observe(loss)
        loss.backward()
        optimizer.step(second)
        optimizer.zero_grad()
    return model


def _make() -> list[Configuration]:
    import pytorch_optimizer

    def one(label: str, made: Made, **facts: Any) -> Configuration:
        closure = facts.pop("closure", False)
        return Configuration(label, loop(mlp, cross_entropy, made, closure=closure), "4", **facts)

    sam: dict[str, Any] = {"either": True}
    found = [
        one(name, _named(name), closure=name in _CLOSURE, tau=_TAU.get(name))
        for name in pytorch_optimizer.get_supported_optimizers()
        if name not in _NOT_HERE and name not in _GRAPH and name not in ("lomo", "adalomo", "alig")
    ]
    return [
        *found,
        Configuration("alig", _by_number, "4"),
        *(Configuration(name, _hessian(name), "4") for name in _GRAPH),
        *(Configuration(name, _lomo(name), "4") for name in ("lomo", "adalomo")),
        Configuration("SAM, two steps", _two_steps(_sam("SAM")), "4", **sam),
        Configuration("SAM, closure", _soft_sam, "4", **sam),
        Configuration(
            "WSAM",
            _two_steps(
                lambda model: pytorch_optimizer.WSAM(model, model.parameters(), torch.optim.AdamW, lr=1e-3)
            ),
            "4",
            **sam,
        ),
        one("Lookahead", _wrapped("Lookahead")),
        one("OrthoGrad", _wrapped("OrthoGrad")),
        one(
            "ScheduleFreeWrapper (pytorch_optimizer)",
            lambda model: _trained(_wrapped("ScheduleFreeWrapper")(model)),
        ),
        one("TRAC", _wrapped("TRAC")),
        one("schedulefree: AdamWScheduleFree", _free("AdamWScheduleFree"), tau=1000),
        one(
            "schedulefree: AdamWScheduleFree (foreach=False)",
            _free("AdamWScheduleFree", foreach=False),
            tau=1000,
        ),
        one("schedulefree: SGDScheduleFree", _free("SGDScheduleFree")),
        one("schedulefree: RAdamScheduleFree", _free("RAdamScheduleFree")),
        one("schedulefree: ScheduleFreeWrapper", _free_wrapper),
        one(
            "schedulefree: AdamWScheduleFreeClosure",
            _free_closure,
            closure=True,
            true_notes=("no_second_moment", "state_unreadable"),
        ),
        one("galore-torch: GaLoreAdamW", _galore("GaLoreAdamW")),
        one("prodigyopt: Prodigy", _other("prodigyopt", "Prodigy", lr=1.0)),
        one("lion-pytorch: Lion", _other("lion_pytorch", "Lion")),
        one("heavyball: AdamW", _heavy("AdamW")),
        one("heavyball: SOAP", _heavy("SOAP")),
        one("heavyball: Muon", _heavy("Muon")),
        one("heavyball: PSGDKron", _heavy("PSGDKron")),
    ]


def _trained(optimizer: Any) -> Any:
    optimizer.train()
    return optimizer


TABLE = Table(
    "optimizers",
    ("pytorch_optimizer", "schedulefree", "galore-torch", "prodigyopt", "lion-pytorch", "heavyball"),
    _make,
)
