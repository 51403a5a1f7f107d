"""Sequence and token classification, question answering and multiple choice of transformers."""

from __future__ import annotations

from typing import Any

from tests.zoo.configuration import Configuration, Table
from tests.zoo.kits import ROWS, WORDS, as_rows, labels, reals, tokens
from tests.zoo.tables.causal_lm import EXPERTS, GPT, GROUPED
from tests.zoo.tables.hub_models import PACKAGES, SMALL, VOCABULARY, case, text_with
from tests.zoo.tables.masked_lm import DEBERTA, DISTIL
from tests.zoo.tables.seq2seq import BART, T5

CLASSES = 5
SENTENCE = text_with(labels=labels(CLASSES))
WORD = text_with(labels=labels(CLASSES, WORDS))
ANSWER = text_with(start_positions=labels(WORDS), end_positions=labels(WORDS))
FIVE: dict[str, Any] = {"num_labels": CLASSES}


def _ending(model: Any) -> list[dict[str, Any]]:
    """Rows for BART and T5, which classify the last end token."""
    found = tokens(VOCABULARY)
    found[:, -1] = 3
    return as_rows(input_ids=found, labels=labels(CLASSES))


def _choice(model: Any) -> list[dict[str, Any]]:
    return as_rows(input_ids=tokens(VOCABULARY, 3 * WORDS).view(ROWS, 3, WORDS), labels=labels(3))


def _sequences() -> list[Configuration]:
    return [
        case("BertForSequenceClassification", "classifier", SENTENCE, SMALL | FIVE),
        case("RobertaForSequenceClassification", "classifier.out_proj", SENTENCE, SMALL | FIVE),
        case("DistilBertForSequenceClassification", "classifier", SENTENCE, DISTIL | FIVE),
        case(
            "AlbertForSequenceClassification", "classifier", SENTENCE, {**SMALL, "embedding_size": 16} | FIVE
        ),
        case(
            "ElectraForSequenceClassification",
            "classifier.out_proj",
            SENTENCE,
            {**SMALL, "embedding_size": 32} | FIVE,
        ),
        case("DebertaV2ForSequenceClassification", "classifier", SENTENCE, DEBERTA | FIVE),
        case("MPNetForSequenceClassification", "classifier.out_proj", SENTENCE, SMALL | FIVE),
        case(
            "ModernBertForSequenceClassification",
            "classifier",
            SENTENCE,
            {**SMALL, "cls_token_id": 2, "sep_token_id": 3, "reference_compile": False} | FIVE,
        ),
        case(
            "XLNetForSequenceClassification",
            "logits_proj",
            SENTENCE,
            {"vocab_size": VOCABULARY, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64} | FIVE,
        ),
        case("FNetForSequenceClassification", "classifier", text_with(labels=labels(CLASSES)), SMALL | FIVE),
        case("GPT2ForSequenceClassification", "score", SENTENCE, {**GPT, "pad_token_id": 1} | FIVE),
        case("LlamaForSequenceClassification", "score", SENTENCE, GROUPED | FIVE),
        case("Qwen2ForSequenceClassification", "score", SENTENCE, GROUPED | FIVE),
        case(
            "OPTForSequenceClassification",
            "score",
            SENTENCE,
            {**SMALL, "ffn_dim": 64, "word_embed_proj_dim": 32} | FIVE,
        ),
        case("MixtralForSequenceClassification", "score", SENTENCE, EXPERTS | FIVE),
        case("BartForSequenceClassification", "classification_head.out_proj", _ending, BART | FIVE),
        case("T5ForSequenceClassification", "classification_head.out_proj", _ending, T5 | FIVE),
        case(
            "BertForSequenceClassification",
            "classifier",
            text_with(labels=reals()),
            {**SMALL, "num_labels": 1},
            label="regression",
            classes=False,
        ),
        case(
            "BertForSequenceClassification",
            "classifier",
            text_with(labels=reals(3)),
            {**SMALL, "num_labels": 3, "problem_type": "regression"},
            label="regression, 3 outputs",
            classes=False,
        ),
        case(
            "BertForSequenceClassification",
            "classifier",
            text_with(labels=labels(2, CLASSES).float()),
            {**SMALL, "problem_type": "multi_label_classification"} | FIVE,
            label="multi-label",
            shift_invariant=False,
            soft=True,
        ),
        case(
            "GPT2DoubleHeadsModel",
            "lm_head",
            lambda model: as_rows(
                input_ids=tokens(VOCABULARY, 2 * WORDS).view(ROWS, 2, WORDS),
                labels=tokens(VOCABULARY, 2 * WORDS).view(ROWS, 2, WORDS),
                mc_labels=labels(2),
                mc_token_ids=labels(WORDS, 2),
            ),
            {**GPT, "summary_first_dropout": 0.0},
            loss=False,
            true_notes=("several_heads",),
        ),
    ]


def _make() -> list[Configuration]:
    return [
        *_sequences(),
        case("BertForTokenClassification", "classifier", WORD, SMALL | FIVE),
        case("RobertaForTokenClassification", "classifier", WORD, SMALL | FIVE),
        case("DistilBertForTokenClassification", "classifier", WORD, DISTIL | FIVE),
        case("DebertaV2ForTokenClassification", "classifier", WORD, DEBERTA | FIVE),
        case("ElectraForTokenClassification", "classifier", WORD, {**SMALL, "embedding_size": 32} | FIVE),
        case("LlamaForTokenClassification", "score", WORD, GROUPED | FIVE),
        case("GPT2ForTokenClassification", "classifier", WORD, GPT | FIVE),
        case("BloomForTokenClassification", "classifier", WORD, {**SMALL, "n_layer": 2, "n_head": 4} | FIVE),
        case("BertForQuestionAnswering", "qa_outputs", ANSWER, classes=True, true_notes=_SPANS),
        case("DistilBertForQuestionAnswering", "qa_outputs", ANSWER, DISTIL, true_notes=_SPANS),
        case("RobertaForQuestionAnswering", "qa_outputs", ANSWER, true_notes=_SPANS),
        case("LlamaForQuestionAnswering", "qa_outputs", ANSWER, GROUPED, true_notes=_SPANS),
        case("BertForMultipleChoice", "classifier", _choice, classes=False),
        case("RobertaForMultipleChoice", "classifier", _choice, classes=False),
    ]


_SPANS = ("not_shift_invariant", "soft_targets")
"""The softmax of a span's start runs along the positions, not along the head's two outputs."""

TABLE = Table("transformers: classification", PACKAGES, _make)
