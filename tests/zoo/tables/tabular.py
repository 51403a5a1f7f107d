"""pytorch-tabnet, and losses of pytorch-metric-learning."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.zoo.configuration import STEPS, Configuration, Table
from tests.zoo.kits import loop
from tests.zoo.session import Session
from tests.zoo.tables.plain_loops import batch, mlp


def _tabnet() -> nn.Module:
    from pytorch_tabnet.tab_network import TabNet

    return TabNet(12, 5, n_d=8, n_a=8, n_steps=2, group_attention_matrix=torch.eye(12))


def _tabnet_loss(model: nn.Module, step: int) -> Tensor:
    x, y = batch(step)
    logits, mask_loss = model(x)
    return nn.functional.cross_entropy(logits, y) - 1e-3 * mask_loss


def _metric(name: str, **options: Any) -> Any:
    """Train an embedding; losses with weights of their own have an optimizer of their own."""

    def train(session: Session) -> nn.Module:
        from pytorch_metric_learning import losses

        model = mlp(outputs=16)
        criterion = getattr(losses, name)(**options)
        both = nn.ModuleList([model, criterion])
        optimizer = torch.optim.AdamW(both.parameters(), 1e-3)
        session.attach(both, optimizer)
        for step in range(STEPS):
            x, y = batch(step)
            loss = criterion(model(x), y)
            session.observe(loss)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return both

    return train


def _make() -> list[Configuration]:
    proxies: dict[str, Any] = {"num_classes": 5, "embedding_size": 16}
    none: dict[str, Any] = {
        "classes": False,
        "soft": True,
        "shift_invariant": False,
        "scaled": True,
        "true_notes": ("all_rows_ignored",),
    }
    return [
        Configuration("TabNet", loop(_tabnet, _tabnet_loss), "tabnet.final_mapping"),
        Configuration(
            "metric learning: TripletMarginLoss", _metric("TripletMarginLoss"), ("0.4", None), **none
        ),
        Configuration("metric learning: NTXentLoss", _metric("NTXentLoss"), ("0.4", None), **none),
        Configuration(
            "metric learning: ArcFaceLoss", _metric("ArcFaceLoss", **proxies), ("0.4", "1.W", None), **none
        ),
        Configuration(
            "metric learning: ProxyNCALoss",
            _metric("ProxyNCALoss", **proxies),
            ("0.4", "1.proxies", None),
            **none,
        ),
    ]


TABLE = Table("tabular, metric learning", ("pytorch-tabnet", "pytorch-metric-learning"), _make)
