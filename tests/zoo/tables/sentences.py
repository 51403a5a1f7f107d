"""sentence-transformers and SetFit: embeddings, cross-encoders and few-shot classifiers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from tests.zoo.configuration import STEPS, Configuration, Table
from tests.zoo.kits import finish, quiet_arguments
from tests.zoo.session import Session
from tests.zoo.text_data import VOCABULARY, model_folder, sentences, word_tokenizer

BERT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}


def _saved(name: str, **config: Any) -> str:
    import transformers

    cls = getattr(transformers, name)
    folder = model_folder()
    cls(cls.config_class(**BERT, **config)).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


def encoder() -> Any:
    """Return a sentence encoder: BERT and a mean over its tokens."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Pooling, Transformer

    body = Transformer(_saved("BertModel"))
    return SentenceTransformer(modules=[body, Pooling(32)], device="cpu")


def _columns(kind: str) -> dict[str, list[Any]]:
    texts = list(sentences(64))
    pairs: dict[str, list[Any]] = {"anchor": texts[:32], "positive": texts[32:]}
    if kind == "triplet":
        return pairs | {"negative": texts[16:48]}
    if kind == "score":
        return pairs | {"label": [(i % 5) / 5 for i in range(32)]}
    if kind == "class":
        return pairs | {"label": [i % 3 for i in range(32)]}
    if kind == "binary":
        return pairs | {"label": [float(i % 2) for i in range(32)]}
    if kind == "alone":
        return {"text": texts[:32], "label": [i % 4 for i in range(32)]}
    return pairs


def _train(kind: str, loss: Callable[[Any], Any], steps: int = STEPS) -> Callable[[Session], nn.Module]:
    def train(session: Session) -> nn.Module:
        from datasets import Dataset
        from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments

        model = encoder()
        return finish(
            session,
            SentenceTransformerTrainer(
                model=model,
                args=SentenceTransformerTrainingArguments(**quiet_arguments(session, steps)),
                train_dataset=Dataset.from_dict(_columns(kind)),
                loss=loss(model),
                callbacks=session.trainer_callbacks(),
            ),
        )

    return train


def _cross(kind: str, labels: int, loss: str) -> Callable[[Session], nn.Module]:
    def train(session: Session) -> nn.Module:
        from datasets import Dataset
        from sentence_transformers.cross_encoder import (
            CrossEncoder,
            CrossEncoderTrainer,
            CrossEncoderTrainingArguments,
            losses,
        )

        model = CrossEncoder(
            _saved("BertForSequenceClassification", num_labels=labels), num_labels=labels, device="cpu"
        )
        return finish(
            session,
            CrossEncoderTrainer(
                model=model,
                args=CrossEncoderTrainingArguments(**quiet_arguments(session, STEPS)),
                train_dataset=Dataset.from_dict(_columns(kind)),
                loss=getattr(losses, loss)(model),
                callbacks=session.trainer_callbacks(),
            ),
        )

    return train


def _embedding(name: str, kind: str, loss: Callable[[Any], Any], **facts: Any) -> Configuration:
    return Configuration(name, _train(kind, loss), None, classes=False, **facts)


def _make() -> list[Configuration]:
    from sentence_transformers import losses

    return [
        _embedding("MultipleNegativesRankingLoss", "pair", losses.MultipleNegativesRankingLoss),
        _embedding(  # its forward pass has a backward pass of its own
            "CachedMultipleNegativesRankingLoss",
            "pair",
            losses.CachedMultipleNegativesRankingLoss,
            either=True,
        ),
        _embedding("CosineSimilarityLoss", "score", losses.CosineSimilarityLoss),
        _embedding("CoSENTLoss", "score", losses.CoSENTLoss),
        _embedding("TripletLoss", "triplet", losses.TripletLoss),
        _embedding("ContrastiveLoss", "binary", losses.ContrastiveLoss),
        _embedding("BatchAllTripletLoss", "alone", losses.BatchAllTripletLoss),
        _embedding(
            "MatryoshkaLoss",
            "pair",
            lambda model: losses.MatryoshkaLoss(model, losses.MultipleNegativesRankingLoss(model), [32, 16]),
        ),
        Configuration(
            "SoftmaxLoss",
            _train("class", lambda model: losses.SoftmaxLoss(model, 32, 3)),
            ("classifier", "loss.classifier", None),
            classes=True,
            true_notes=HEAD_IN_LOSS,
        ),
        Configuration(
            "CrossEncoder, BinaryCrossEntropyLoss",
            _cross("binary", 1, "BinaryCrossEntropyLoss"),
            CROSS,
            classes=False,
        ),
        Configuration("CrossEncoder, CrossEntropyLoss", _cross("class", 3, "CrossEntropyLoss"), CROSS),
    ]


CROSS = ("model.classifier", "0.model.classifier", "classifier")
HEAD_IN_LOSS = ("no_head", "optimizer_without_head")
"""SoftmaxLoss has the classifier; the model that the Trainer shows has none."""

TABLE = Table("sentence-transformers", ("sentence-transformers", "transformers"), _make)
