"""TRL's trainers: their losses are fused, chunked or of whole answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from tests.zoo.configuration import STEPS, Configuration, Table
from tests.zoo.kits import finish, quiet_arguments
from tests.zoo.session import Session
from tests.zoo.text_data import llama, sentences, tokenizer

Columns = Callable[[], dict[str, list[Any]]]
QUESTIONS = ["what is a list", "how do I import", "name a keyword", "what raises errors"] * 8
GOOD = ["a mutable sequence", "use the import statement", "yield", "the raise statement"] * 8
BAD = ["a kind of number", "you can not", "banana", "nothing at all"] * 8


def _texts() -> dict[str, list[Any]]:
    return {"text": list(sentences(32))}


def _completions() -> dict[str, list[Any]]:
    return {"prompt": [text + " " for text in QUESTIONS], "completion": GOOD}


def _pairs() -> dict[str, list[Any]]:
    return {"prompt": [text + " " for text in QUESTIONS], "chosen": GOOD, "rejected": BAD}


def _judged() -> dict[str, list[Any]]:
    return {
        "prompt": [text + " " for text in QUESTIONS],
        "completion": GOOD[:16] + BAD[:16],
        "label": [True] * 16 + [False] * 16,
    }


def _triples() -> dict[str, list[Any]]:
    return {**_pairs(), "reference": GOOD}


def _prompts() -> dict[str, list[Any]]:
    return {"prompt": [text + " " for text in QUESTIONS]}


def _variety(completions: list[Any], **columns: Any) -> list[float]:
    return [float(len(set(str(completion)))) for completion in completions]


def _train(
    kind: str,
    columns: Columns,
    *,
    model: Callable[[], nn.Module] = llama,
    peft: bool = False,
    module: str = "trl",
    more: dict[str, Any] | None = None,
    teacher: bool = False,
    **arguments: Any,
) -> Callable[[Session], nn.Module]:
    """Return a training with ``trl.<kind>Trainer``."""

    def train(session: Session) -> nn.Module:
        import importlib

        from datasets import Dataset

        trl = importlib.import_module(module)
        config = getattr(trl, f"{kind}Config")
        base = {
            **quiet_arguments(session, STEPS),
            "bf16": False,
            "gradient_checkpointing": False,
            "max_length": 48,
        }
        if kind in ("GRPO", "RLOO", "GMPO"):
            base |= {"num_generations": 4, "max_completion_length": 8}
        if kind in ("GRPO", "RLOO", "GMPO", "Distillation"):
            base.pop("max_length")
        keywords: dict[str, Any] = dict(more or {})
        if teacher:
            keywords["teacher_model"] = llama()
        if peft:
            from peft import LoraConfig

            keywords["peft_config"] = LoraConfig(
                r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
            )
        return finish(
            session,
            getattr(trl, f"{kind}Trainer")(
                model=model(),
                args=config(**{**base, **arguments}),
                train_dataset=Dataset.from_dict(columns()),
                processing_class=tokenizer(),
                callbacks=session.trainer_callbacks(),
                **keywords,
            ),
        )

    return train


def _reward_model() -> nn.Module:
    return llama("LlamaForSequenceClassification", num_labels=1)


def _tied() -> nn.Module:
    return llama(tie_word_embeddings=True)


def _make() -> list[Configuration]:
    fused: dict[str, Any] = {"logits": False}
    policy: dict[str, Any] = {"soft": True}
    answers: dict[str, Any] = {"logits": False, **policy}
    lora_fused = {**fused}
    reward = {"reward_funcs": _variety}
    return [
        Configuration("SFT", _train("SFT", _texts), "lm_head", **fused),
        Configuration("SFT (tied embeddings)", _train("SFT", _texts, model=_tied), "lm_head", **fused),
        Configuration(
            "SFT (packing)", _train("SFT", _texts, packing=True, max_length=32), "lm_head", **fused
        ),
        Configuration("SFT (completions only)", _train("SFT", _completions), "lm_head", **fused),
        Configuration(
            "SFT (accumulation)",
            _train("SFT", _texts, gradient_accumulation_steps=2, per_device_train_batch_size=2),
            "lm_head",
            **fused,
        ),
        Configuration("SFT (LoRA)", _train("SFT", _texts, peft=True), LORA_HEAD, **lora_fused),
        Configuration("SFT (dft)", _train("SFT", _texts, loss_type="dft"), "lm_head", soft=True),
        Configuration(
            "SFT (chunked nll)", _train("SFT", _texts, loss_type="chunked_nll"), "lm_head", **fused
        ),
        Configuration(
            "SFT (label smoothing)", _train("SFT", _texts, label_smoothing_factor=0.1), "lm_head", soft=True
        ),
        Configuration("DPO", _train("DPO", _pairs), "lm_head", **answers),
        Configuration("DPO (hinge)", _train("DPO", _pairs, loss_type=["hinge"]), "lm_head", **answers),
        Configuration("DPO (ipo)", _train("DPO", _pairs, loss_type=["ipo"]), "lm_head", **answers),
        Configuration("DPO (LoRA)", _train("DPO", _pairs, peft=True), LORA_HEAD, **answers),
        Configuration(
            "DPO (sigmoid and sft)",
            _train("DPO", _pairs, loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.5]),
            "lm_head",
            **answers,
        ),
        Configuration("KTO", _train("KTO", _judged), "lm_head", **answers),
        Configuration("CPO", _train("CPO", _pairs, module="trl.experimental.cpo"), "lm_head", **policy),
        Configuration("ORPO", _train("ORPO", _pairs, module="trl.experimental.orpo"), "lm_head", **policy),
        Configuration("Reward", _train("Reward", _pairs, model=_reward_model), "score", classes=False),
        Configuration("GRPO", _train("GRPO", _prompts, more=reward), "lm_head", logits=False, **policy),
        Configuration(
            "GRPO (LoRA)", _train("GRPO", _prompts, more=reward, peft=True), LORA_HEAD, logits=False, **policy
        ),
        Configuration(
            "GRPO (KL to a reference, dr_grpo)",
            _train("GRPO", _prompts, more=reward, beta=0.04, loss_type="dr_grpo"),
            "lm_head",
            **answers,
        ),
        Configuration(
            "GRPO (cispo)", _train("GRPO", _prompts, more=reward, loss_type="cispo"), "lm_head", **answers
        ),
        Configuration(
            "GRPO (two updates a batch)",
            _train("GRPO", _prompts, more=reward, num_iterations=2),
            "lm_head",
            **answers,
        ),
        Configuration(
            "GMPO",
            _train("GMPO", _prompts, more=reward, module="trl.experimental.gmpo"),
            "lm_head",
            **answers,
        ),
        Configuration(
            "DPO (reference computed before)",
            _train("DPO", _pairs, precompute_ref_log_probs=True),
            "lm_head",
            **answers,
        ),
        Configuration(
            "DPO (robust)",
            _train("DPO", _pairs, loss_type=["robust"], label_smoothing=0.1),
            "lm_head",
            **answers,
        ),
        Configuration(
            "Distillation",
            _train("Distillation", _prompts, teacher=True, max_completion_length=8),
            "lm_head",
            **answers,
        ),
        Configuration("TPO", _train("TPO", _triples, module="trl.experimental.tpo"), "lm_head", **policy),
        Configuration(
            "SFT (padding-free)",
            _train("SFT", _texts, padding_free=True, max_length=None),
            "lm_head",
            **fused,
        ),
        Configuration("SFT (bf16)", _train("SFT", _texts, bf16=True), "lm_head", **fused),
        Configuration("RLOO", _train("RLOO", _prompts, more=reward), "lm_head", logits=False, **policy),
    ]


LORA_HEAD = ("base_model.model.lm_head", "lm_head")

TABLE = Table("trl", ("trl", "transformers", "datasets"), _make)
