"""Adapters of PEFT, trained by the transformers Trainer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from tests.zoo.configuration import STEPS, Configuration, Table
from tests.zoo.kits import trainer
from tests.zoo.tables.causal_lm import GPT, GROUPED
from tests.zoo.tables.classification import ANSWER, CLASSES, SENTENCE, WORD
from tests.zoo.tables.hub_models import SMALL, language, make
from tests.zoo.tables.seq2seq import T5
from tests.zoo.tables.seq2seq import _translation as translation
from tests.zoo.tables.vision import PATCHES, PICTURES

LM = "base_model.model.lm_head"
QV = ["q_proj", "v_proj"]


def _adapted(base: Callable[[], nn.Module], kind: str, **config: Any) -> Callable[[], nn.Module]:
    def made() -> nn.Module:
        import peft

        return peft.get_peft_model(base(), getattr(peft, f"{kind}Config")(**config))

    return made


def _lm(
    label: str, kind: str = "Lora", *, head: Any = LM, facts: dict[str, Any] | None = None, **config: Any
) -> Configuration:
    base = make("LlamaForCausalLM", **GROUPED)
    train = trainer(_adapted(base, kind, task_type="CAUSAL_LM", **config), language)
    return Configuration(label, train, head, **(facts or {}))


def _make() -> list[Configuration]:
    bert = make("BertForSequenceClassification", **SMALL, num_labels=CLASSES)
    saved = "base_model.model.classifier.modules_to_save.default"
    return [
        _lm("LoRA", r=4, target_modules=QV),
        _lm("LoRA (all linear)", r=4, target_modules="all-linear"),
        _lm("LoRA (head adapted)", r=4, target_modules=[*QV, "lm_head"]),
        _lm(
            "LoRA (modules_to_save)",
            head=(LM, f"{LM}.modules_to_save.default"),
            r=4,
            target_modules=QV,
            modules_to_save=["lm_head"],
        ),
        _lm(
            "LoRA (modules_to_save, embeddings too)",
            head=(LM, f"{LM}.modules_to_save.default"),
            r=4,
            target_modules=QV,
            modules_to_save=["embed_tokens", "lm_head"],
        ),
        _lm(
            "LoRA (trainable tokens)",
            r=4,
            target_modules=QV,
            trainable_token_indices={"embed_tokens": [5, 6]},
        ),
        _lm("DoRA", r=4, target_modules=QV, use_dora=True),
        _lm("rsLoRA", r=4, target_modules=QV, use_rslora=True),
        _lm(
            "AdaLoRA", "AdaLora", init_r=4, target_r=2, total_step=STEPS, tinit=2, tfinal=2, target_modules=QV
        ),
        _lm("LoHa", "LoHa", r=4, target_modules=QV),
        _lm("LoKr", "LoKr", r=4, target_modules=QV),
        _lm(
            "IA3", "IA3", target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
        ),
        _lm("OFT", "OFT", target_modules=QV, oft_block_size=8, r=0),
        _lm("BOFT", "BOFT", target_modules=QV, boft_block_size=4),
        _lm("VeRA", "Vera", r=4, target_modules=["q_proj"]),
        _lm("FourierFT", "FourierFT", n_frequency=16, target_modules=["q_proj"]),
        _lm("HRA", "HRA", r=4, target_modules=QV),
        _lm("LN tuning", "LNTuning", target_modules=["input_layernorm", "norm"]),
        _lm("MiSS", "Miss", r=4, target_modules=QV),
        _lm("PiSSA", r=4, target_modules=QV, init_lora_weights="pissa"),
        _lm("OLoRA", r=4, target_modules=QV, init_lora_weights="olora"),
        _lm("RandLoRA", "RandLora", r=4, target_modules=QV),
        _lm("C3A", "C3A", block_size=8, target_modules=QV),
        _lm("SHiRA", "Shira", r=4, target_modules=QV),
        _lm("GraLoRA", "Gralora", r=4, gralora_k=2, target_modules=QV),
        _lm("RoAd", "Road", group_size=8, target_modules=QV),
        _lm("WaveFT", "WaveFT", n_frequency=16, target_modules=["q_proj"]),
        _lm("DeLoRA", "Delora", r=4, target_modules=QV),
        _lm("OSF", "OSF", effective_rank=4, target_modules=QV),
        _lm("VB-LoRA", "VBLoRA", r=4, num_vectors=8, vector_length=8, topk=2, target_modules=QV),
        _lm("LoRA (embeddings and head tied, both adapted)", r=4, target_modules=["embed_tokens", "lm_head"]),
        _lm("LoRA (parameters of the head)", r=4, target_modules=QV, target_parameters=["lm_head.weight"]),
        _lm("prompt tuning", "PromptTuning", head="base_model.lm_head", num_virtual_tokens=4),
        _lm("prefix tuning", "PrefixTuning", head="base_model.lm_head", num_virtual_tokens=4),
        _lm(
            "P-tuning",
            "PromptEncoder",
            head="base_model.lm_head",
            num_virtual_tokens=4,
            encoder_hidden_size=16,
        ),
        Configuration(
            "LoRA (GPT-2, tied)",
            trainer(
                _adapted(
                    make("GPT2LMHeadModel", **GPT),
                    "Lora",
                    r=4,
                    target_modules=["c_attn"],
                    fan_in_fan_out=True,
                    task_type="CAUSAL_LM",
                ),
                language,
            ),
            LM,
        ),
        Configuration(
            "LoRA (T5)",
            trainer(
                _adapted(
                    make("T5ForConditionalGeneration", **T5),
                    "Lora",
                    r=4,
                    target_modules=["q", "v"],
                    task_type="SEQ_2_SEQ_LM",
                ),
                translation,
            ),
            LM,
        ),
        Configuration(
            "LoRA (BERT classifier)",
            trainer(_adapted(bert, "Lora", r=4, target_modules=["query"], task_type="SEQ_CLS"), SENTENCE),
            saved,
        ),
        Configuration(
            "IA3 (BERT classifier)",
            trainer(
                _adapted(
                    bert,
                    "IA3",
                    target_modules=["key", "value", "output.dense"],
                    feedforward_modules=["output.dense"],
                    task_type="SEQ_CLS",
                ),
                SENTENCE,
            ),
            saved,
        ),
        Configuration(
            "prompt tuning (BERT classifier)",
            trainer(_adapted(bert, "PromptTuning", num_virtual_tokens=4, task_type="SEQ_CLS"), SENTENCE),
            ("base_model.classifier.modules_to_save.default", "base_model.classifier"),
        ),
        Configuration(
            "LoRA (token classifier)",
            trainer(
                _adapted(
                    make("BertForTokenClassification", **SMALL, num_labels=CLASSES),
                    "Lora",
                    r=4,
                    target_modules=["query"],
                    task_type="TOKEN_CLS",
                ),
                WORD,
            ),
            saved,
        ),
        Configuration(
            "LoRA (question answering)",
            trainer(
                _adapted(
                    make("BertForQuestionAnswering", **SMALL),
                    "Lora",
                    r=4,
                    target_modules=["query"],
                    task_type="QUESTION_ANS",
                ),
                ANSWER,
            ),
            "base_model.model.qa_outputs.modules_to_save.default",
            true_notes=("not_shift_invariant", "soft_targets"),
        ),
        Configuration(
            "LoRA (ViT, modules_to_save)",
            trainer(
                _adapted(
                    make("ViTForImageClassification", **PATCHES),
                    "Lora",
                    r=4,
                    target_modules=["query", "q_proj"],
                    modules_to_save=["classifier"],
                ),
                PICTURES,
            ),
            saved,
        ),
    ]


TABLE = Table("peft", ("peft", "transformers"), _make)
