"""SetFit: a sentence encoder trained on pairs, then a classifier on its embeddings."""

from __future__ import annotations

from typing import Any

from torch import nn

from tests.zoo.configuration import STEPS, Configuration, Table
from tests.zoo.session import Session
from tests.zoo.tables.sentences import encoder
from tests.zoo.text_data import sentences


def _train(differentiable: bool) -> Any:
    def train(session: Session) -> nn.Module:
        from datasets import Dataset
        from setfit import SetFitHead, SetFitModel, Trainer, TrainingArguments

        body = encoder()
        head = SetFitHead(in_features=32, out_features=3) if differentiable else None
        model = SetFitModel(model_body=body, model_head=head)
        if head is None:
            from sklearn.linear_model import LogisticRegression

            model.model_head = LogisticRegression()
        texts = Dataset.from_dict({"text": list(sentences(12)), "label": [i % 3 for i in range(12)]})
        ran = Trainer(
            model=model,
            train_dataset=texts,
            callbacks=session.trainer_callbacks(),
            args=TrainingArguments(
                output_dir=session.folder, max_steps=STEPS, batch_size=4, report_to="none", save_strategy="no"
            ),
        )
        ran.train()
        session.optimizer = None
        return body

    return train


def _make() -> list[Configuration]:
    return [
        Configuration("logistic regression on top", _train(False), None, classes=False),
    ]


TABLE = Table("setfit", ("setfit", "sentence-transformers"), _make)
