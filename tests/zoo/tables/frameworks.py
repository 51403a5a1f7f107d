"""fastai, Ignite and skorch, which have no adapter: the monitor is attached by hand."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from tests.zoo.configuration import STEPS, Configuration, Table
from tests.zoo.kits import labels, reals
from tests.zoo.session import Session
from tests.zoo.tables.plain_loops import mlp


def _data(shape: tuple[int, ...] = (12,)) -> TensorDataset:
    return TensorDataset(reals(*shape), labels(5))


def _fastai(make: Any, shape: tuple[int, ...] = (12,), one_cycle: bool = False, **options: Any) -> Any:
    def train(session: Session) -> nn.Module:
        from fastai.callback.core import Callback
        from fastai.callback.schedule import fit_one_cycle  # noqa: F401  (adds the method)
        from fastai.data.core import DataLoaders
        from fastai.learner import Learner

        class Watch(Callback):
            def before_fit(self) -> None:
                session.attach(self.learn.model, self.learn.opt)

            def after_loss(self) -> None:
                if self.learn.training:
                    session.observe(self.learn.loss_grad)

        data = _data(shape)
        loaders = DataLoaders(DataLoader(data, batch_size=4), DataLoader(data, batch_size=4))
        learner = Learner(
            loaders, make(), loss_func=nn.CrossEntropyLoss(), cbs=[Watch()], path=session.folder, **options
        )
        with learner.no_bar(), learner.no_logging():
            if one_cycle:
                learner.fit_one_cycle(1, 1e-3)
            else:
                learner.fit(1, 1e-3)
        model: nn.Module = learner.model
        return model

    return train


def _fastai_cnn() -> nn.Module:
    from fastai.layers import ConvLayer, Flatten
    from torch.nn import AdaptiveAvgPool2d

    return nn.Sequential(ConvLayer(3, 16), AdaptiveAvgPool2d(1), Flatten(), nn.Linear(16, 5))


def _xresnet() -> nn.Module:
    from fastai.vision.models.xresnet import xresnet18

    made: nn.Module = xresnet18(n_out=5)
    return made


def _ignite(session: Session) -> nn.Module:
    from ignite.engine import Engine

    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    session.attach(model, optimizer)

    def update(engine: Any, pair: Any) -> float:
        model.train()
        optimizer.zero_grad()
        loss = F.cross_entropy(model(pair[0]), pair[1])
        session.observe(loss)
        loss.backward()
        optimizer.step()
        return loss.item()

    Engine(update).run(DataLoader(_data(), batch_size=4), max_epochs=1)
    return model


def _ignite_supervised(accumulate: int = 1) -> Any:
    def train(session: Session) -> nn.Module:
        from ignite.engine import create_supervised_trainer

        model = mlp()
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
        session.attach(model, optimizer)
        trainer = create_supervised_trainer(
            model, optimizer, nn.CrossEntropyLoss(), gradient_accumulation_steps=accumulate
        )
        trainer.run(DataLoader(_data(), batch_size=4 // accumulate), max_epochs=1)
        return model

    return train


def _skorch(criterion: Any = nn.CrossEntropyLoss, optimizer: Any = torch.optim.AdamW) -> Any:
    def train(session: Session) -> nn.Module:
        from skorch import NeuralNetClassifier
        from skorch.callbacks import Callback

        class Watch(Callback):
            def on_train_begin(self, net: Any, **kwargs: Any) -> None:
                session.attach(net.module_, net.optimizer_)

        net = NeuralNetClassifier(
            mlp,
            criterion=criterion,
            optimizer=optimizer,
            lr=1e-3,
            batch_size=4,
            max_epochs=1,
            iterator_train__shuffle=False,
            train_split=None,
            verbose=0,
            callbacks=[Watch()],
        )
        net.fit(reals(12).numpy(), labels(5).numpy())
        model: nn.Module = net.module_
        return model

    return train


def _make() -> list[Configuration]:
    from fastai import optimizer

    assert STEPS == 8
    return [
        Configuration("fastai: Learner (Adam)", _fastai(mlp), "4", tau=100.0),
        Configuration("fastai: fit_one_cycle", _fastai(mlp, one_cycle=True), "4"),
        Configuration("fastai: convolutional", _fastai(_fastai_cnn, (3, 16, 16)), "3"),
        Configuration("fastai: xresnet18", _fastai(_xresnet, (3, 32, 32)), "11"),
        Configuration("fastai: ranger", _fastai(mlp, opt_func=optimizer.ranger), "4"),
        Configuration("fastai: SGD", _fastai(mlp, opt_func=optimizer.SGD), "4"),
        Configuration(
            "fastai: OptimWrapper(AdamW)",
            _fastai(mlp, opt_func=lambda params, **kw: optimizer.OptimWrapper(params, torch.optim.AdamW)),
            "4",
        ),
        Configuration("ignite: Engine", _ignite, "4"),
        Configuration("ignite: create_supervised_trainer", _ignite_supervised(), "4"),
        Configuration("ignite: accumulation", _ignite_supervised(2), "4"),
        Configuration("skorch: NeuralNetClassifier", _skorch(), "4"),
        Configuration("skorch: SGD", _skorch(optimizer=torch.optim.SGD), "4"),
    ]


TABLE = Table("fastai, ignite, skorch", ("fastai", "pytorch-ignite", "skorch"), _make)
