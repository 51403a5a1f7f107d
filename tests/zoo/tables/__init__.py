"""List the tables of the zoo, one a library (transformers has several)."""

from __future__ import annotations

import importlib

from tests.zoo.configuration import Table
from tests.zoo.tables import not_here

_MODULES = (
    "causal_lm",
    "recent_models",
    "masked_lm",
    "seq2seq",
    "classification",
    "vision",
    "segmentation",
    "speech",
    "multimodal",
    "trainer_modes",
    "trl_tables",
    "peft_tables",
    "sentences",
    "few_shot",
    "accelerate_tables",
    "lightning_tables",
    "plain_loops",
    "language_loops",
    "written_loops",
    "timm_tables",
    "vision_others",
    "diffusion",
    "frameworks",
    "reinforcement",
    "graphs",
    "tabular",
    "torch_optim",
    "optimizers",
    "torchao_tables",
)

TABLES: tuple[Table, ...] = (
    *(importlib.import_module(f"tests.zoo.tables.{name}").TABLE for name in _MODULES),
    *not_here.TABLES,
)
