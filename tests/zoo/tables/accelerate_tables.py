"""Loops with Accelerate."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from tests.zoo.configuration import STEPS, Configuration, Table
from tests.zoo.kits import as_rows, labels, reals
from tests.zoo.session import Session
from tests.zoo.tables.causal_lm import GPT, GROUPED
from tests.zoo.tables.hub_models import language, make
from tests.zoo.tables.plain_loops import mlp


def _hub(model: str, config: dict[str, Any], accumulate: int = 1, **options: Any) -> Any:
    def train(session: Session) -> nn.Module:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(reset_partial_state=True)
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate, **options)
        made = make(model, **config)()
        data = DataLoader(language(made), batch_size=4 // accumulate)  # type: ignore[arg-type]
        made, optimizer, data = accelerator.prepare(made, torch.optim.AdamW(made.parameters(), 1e-3), data)
        session.attach_accelerate(accelerator, made, optimizer)
        made.train()
        for batch in data:
            with accelerator.accumulate(made):
                accelerator.backward(made(**batch).loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(made.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
        unwrapped: nn.Module = accelerator.unwrap_model(made)
        return unwrapped

    return train


def _own(session: Session) -> nn.Module:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = mlp()
    data = DataLoader(as_rows(x=reals(12), y=labels(5)), batch_size=4)  # type: ignore[arg-type]
    model, optimizer, data = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), 1e-3), data)
    session.attach_accelerate(accelerator, model, optimizer)
    for batch in data:
        loss = F.cross_entropy(model(batch["x"]), batch["y"])
        session.observe(loss)
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    unwrapped: nn.Module = accelerator.unwrap_model(model)
    return unwrapped


def _make() -> list[Configuration]:
    assert STEPS == 8
    return [
        Configuration("causal LM (Llama)", _hub("LlamaForCausalLM", GROUPED), "lm_head"),
        Configuration("causal LM (GPT-2, tied)", _hub("GPT2LMHeadModel", GPT), "lm_head"),
        Configuration("accumulation, clipping", _hub("LlamaForCausalLM", GROUPED, accumulate=2), "lm_head"),
        Configuration("bf16", _hub("LlamaForCausalLM", GROUPED, mixed_precision="bf16"), "lm_head"),
        Configuration("loop with a loss of its own", _own, "4"),
    ]


TABLE = Table("accelerate", ("accelerate",), _make)
