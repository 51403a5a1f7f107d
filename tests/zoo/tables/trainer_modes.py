"""What people do with the transformers Trainer: losses of their own, precisions, optimizers, clipping."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.zoo.configuration import Configuration, Table
from tests.zoo.kits import trainer
from tests.zoo.tables.causal_lm import GROUPED
from tests.zoo.tables.classification import CLASSES, SENTENCE
from tests.zoo.tables.hub_models import PACKAGES, SMALL, language, make

BERT = make("BertForSequenceClassification", **SMALL, num_labels=CLASSES)
LLAMA = make("LlamaForCausalLM", **GROUPED)


def _weighted() -> type:
    """A Trainer whose loss weighs the classes, and leaves the labels in the inputs."""
    from transformers import Trainer

    class Weighted(Trainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
            outputs = model(**inputs)
            loss = 100 * F.cross_entropy(
                outputs.logits, inputs["labels"], weight=torch.arange(1.0, CLASSES + 1)
            )
            return (loss, outputs) if return_outputs else loss

    return Weighted


def _popped() -> type:
    """A Trainer that takes the labels out of the inputs, as the documentation's example does."""
    from transformers import Trainer

    class Popped(Trainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
            wanted = inputs.pop("labels")
            outputs = model(**inputs)
            loss = F.cross_entropy(outputs.logits, wanted)
            return (loss, outputs) if return_outputs else loss

    return Popped


def _distilled() -> type:
    """A Trainer with a frozen teacher, whose output is softened."""
    from transformers import Trainer

    class Distilled(Trainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
            outputs = model(**inputs)
            with torch.random.fork_rng():
                torch.manual_seed(7)
                teacher = torch.randn_like(outputs.logits)
            loss = 0.5 * outputs.loss + 0.5 * F.kl_div(
                outputs.logits.log_softmax(-1), teacher.softmax(-1), reduction="batchmean"
            )
            return (loss, outputs) if return_outputs else loss

    return Distilled


def _own_loss(outputs: Any, wanted: Tensor, num_items_in_batch: Any = None) -> Tensor:
    return 3 * F.cross_entropy(outputs["logits"], wanted)


def _metrics(model: nn.Module) -> dict[str, Any]:
    return {"eval_dataset": list(SENTENCE(model))[:8]}


def _classifier(
    name: str,
    *,
    make_model: Callable[[], nn.Module] = BERT,
    facts: dict[str, Any] | None = None,
    **arguments: Any,
) -> Configuration:
    return Configuration(name, trainer(make_model, SENTENCE, **arguments), "classifier", **(facts or {}))


def _lm(name: str, *, facts: dict[str, Any] | None = None, **arguments: Any) -> Configuration:
    return Configuration(name, trainer(LLAMA, language, **arguments), "lm_head", **(facts or {}))


def _frozen_body() -> nn.Module:
    model = BERT()
    model.bert.requires_grad_(False)
    return model


def _frozen_head() -> nn.Module:
    model = LLAMA()
    model.lm_head.requires_grad_(False)
    return model


def _optimizer(name: str, true_notes: tuple[str, ...] = (), **arguments: Any) -> Configuration:
    return _lm(f"optim={name}", optim=name, facts={"true_notes": true_notes}, **arguments)


def _make() -> list[Configuration]:
    targets = {"optim_target_modules": ["q_proj", "up_proj"]}
    return [
        _lm("accumulation", gradient_accumulation_steps=2, per_device_train_batch_size=2),
        _lm("bf16", bf16=True),
        _lm("gradient checkpointing", gradient_checkpointing=True),
        _lm("label smoothing", label_smoothing_factor=0.1, facts={"soft": True}),
        _lm("clipping", max_grad_norm=0.1),
        _lm("scheduler, warm-up", lr_scheduler_type="cosine", warmup_steps=3),
        _lm("NEFTune", neftune_noise_alpha=5),
        Configuration("frozen head", trainer(_frozen_head, language), "lm_head"),
        Configuration("frozen body", trainer(_frozen_body, SENTENCE), "classifier"),
        _classifier("classifier, label smoothing", label_smoothing_factor=0.1, facts={"soft": True}),
        _classifier(
            "compute_loss_func",
            keywords=lambda model: {"compute_loss_func": _own_loss},
            facts={"scaled": True},
        ),
        _classifier("compute_loss, weighted, labels stay", trainer_class=_weighted, facts={"scaled": True}),
        _classifier("compute_loss, labels popped", trainer_class=_popped),
        _classifier("compute_loss, distillation", trainer_class=_distilled, facts={"soft": True}),
        _classifier("evaluation in between", keywords=_metrics, eval_strategy="steps", eval_steps=3),
        _classifier("dropped last batch", dataloader_drop_last=True),
        _classifier("save in between", save_strategy="steps", save_steps=4),
        _classifier("torch_compile (eager backend)", torch_compile=True, torch_compile_backend="eager"),
        _optimizer("adamw_torch"),
        _optimizer("adamw_torch_fused"),
        _optimizer("adafactor"),
        _optimizer("sgd"),
        _optimizer("rmsprop"),
        _optimizer("adagrad"),
        _optimizer("schedule_free_adamw", lr_scheduler_type="constant"),
        _optimizer("schedule_free_sgd", lr_scheduler_type="constant"),
        _optimizer("galore_adamw", optim_args="rank=4", **targets),
        _optimizer("galore_adafactor", optim_args="rank=4", **targets),
        _optimizer("lomo", true_notes=("optimizer_unwatched", "no_steps")),
        _optimizer("schedule_free_radam", lr_scheduler_type="constant"),
        _optimizer("adamw_torch_8bit"),
    ]


TABLE = Table("transformers: Trainer", PACKAGES, _make)
