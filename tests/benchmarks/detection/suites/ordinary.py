"""The ordinary suite: how people train. One half is for tuning, one is frozen, four are held out.

No slingshot is expected in any of them, so a warning is false unless the recorded loss shows one (truth.py).
The architecture classes of the halves differ: perceptrons, convolutions, plain transformers, autoencoders and
GANs on one side; recurrent networks, fine-tuned models of ``transformers``, LoRA, policies, variational and
graph models and others on the other.
"""

from __future__ import annotations

from functools import partial

from tests.benchmarks.detection.families import FROZEN, TUNING, Family
from tests.benchmarks.detection.suites import (
    control,
    digits,
    fine_tuning,
    generative,
    images,
    language,
    others,
    recurrent,
    various,
)
from tests.benchmarks.detection.suites.held_out.ordinary import ordinary as held_out
from tests.benchmarks.detection.suites.held_out_2.ordinary import ordinary as held_out_2
from tests.benchmarks.detection.suites.held_out_3.ordinary import ordinary as held_out_3
from tests.benchmarks.detection.suites.held_out_4.ordinary import ordinary as held_out_4
from tests.benchmarks.detection.suites.held_out_5.ordinary import ordinary as held_out_5
from tests.benchmarks.detection.suites.registry import family_of


def _tuning() -> list[Family]:
    family = partial(family_of, TUNING)
    mlp, gpt = digits.digits, language.modern_gpt
    restarts = ("restarts", 1500)
    return [
        family("o-dropout", mlp, 12_000, dropout=0.2),
        family("o-after-fit", mlp, 16_000, width=128),
        family("o-single-batch", mlp, 8000, batch=16, kind="adam", lr=2e-3, betas=(0.9, 0.98), decay=0.0),
        family("o-label-noise", mlp, 12_000, noise=0.1, width=128),
        family("o-augmentation", mlp, 12_000, augment=True),
        family("o-restarts", mlp, 12_000, schedule=restarts),
        family("o-restarts-few-rows", mlp, 12_000, schedule=restarts, rows=200, batch=100, decay=0.0),
        family("o-restarts-growing", mlp, 12_000, schedule=("restarts", 800, 2.0), dropout=0.1),
        family("o-decay-1", mlp, 12_000, decay=1.0),
        family("o-decay-tenth", mlp, 12_000, decay=0.1, lr=3e-3, schedule=("cosine", 12_000, 500)),
        family("o-clipping", mlp, 10_000, clip=1.0, betas=(0.9, 0.95)),
        family("o-curriculum", mlp, 10_000, pacing=4000),
        family("o-imbalance", mlp, 12_000, imbalance=True, loss=("class_weighted", 0.2, 3.0)),
        family("o-focal", mlp, 8000, loss=("focal", 2.0)),
        family("o-mixup", mlp, 8000, mixup=0.4),
        family("o-label-smoothing", mlp, 8000, loss=("smoothed", 0.1)),
        family("o-soft-capped", mlp, 8000, loss=("soft_capped", 15.0)),
        family("o-stablemax", mlp, 8000, loss=("stablemax",)),
        family("o-scaled-logits", mlp, 8000, width=128, batch=64, loss=("scaled", 50.0, 0.2), kind="adam",
               decay=0.0),
        family("o-hinge-decay", mlp, 8000, loss=("multi_margin",), decay=0.1, nats=False),
        family("o-warm-up-high-rate", mlp, 8000, lr=1e-2, schedule=("cosine", 8000, 400), batch=64),
        family("o-one-cycle", mlp, 8000, lr=5e-3, schedule=("one_cycle", 8000), dropout=0.1),
        family("o-tiny-batches", mlp, 12_000, batch=4, lr=5e-4),
        family("o-sgd", mlp, 8000, kind="sgd", lr=0.05, decay=1e-4),
        family("o-nadam", mlp, 8000, kind="nadam", decay=0.0),
        family("o-rmsprop", mlp, 8000, kind="rmsprop", decay=0.0),
        family("o-distillation", digits.distilled, 8000),
        family("o-continued", digits.continued, 8000, lr=3e-4),
        family("o-multi-label", digits.labelled_blobs, 4000, kind="adam", lr=1e-2,
               betas=(0.9, 0.95), decay=0.0),
        family("o-multi-label-batches", digits.labelled_blobs, 10_000, rows=800, batch=32),
        family("o-text-topics", digits.text_topics, 10_000),
        family("o-mnist-example", images.example_net, 6000, decaying=1500),
        family("o-mnist-example-long", images.example_net, 6000),
        family("o-batch-norm", images.normed_net, 5000, total=5000),
        family("o-regression", others.regression, 8000, nats=False),
        family("o-regression-unit", others.regression, 8000, nats=False, unit=30.0, huber=True),
        family("o-regression-16", others.few_rows, 8000, nats=False),
        family("o-autoencoder", others.autoencoder, 8000, nats=False, noise=0.1),
        family("o-discriminator", others.discriminator, 6000, floor=False),
        family("o-contrastive", others.two_views, 5000),
        family("o-text-once", language.reader, 5000, windows=60_000, betas=(0.9, 0.95), decay=0.1, clip=1.0),
        family("o-text-by-heart", language.reader, 6000, windows=64),
        family("o-gpt-bf16", gpt, 4000, windows=30_000),
        family("o-gpt-bf16-by-heart", gpt, 5000, windows=64, prefix=6, betas=(0.9, 0.999), decay=0.01),
        family("o-gpt-bf16-high-rate", gpt, 4000, windows=2000, lr=4e-3),
        family("o-gpt-bf16-few-windows", gpt, 4000, windows=16, prefix=4, lr=3e-3, decay=0.01),
        family("o-restarts-absorbing", mlp, 8000, schedule=("restarts", 800), rows=200, batch=200, lr=2e-3,
               decay=0.0),
        family("o-sorting", language.sorting, 5000),
    ]  # fmt: skip


def _frozen() -> list[Family]:
    family = partial(family_of, FROZEN)
    tuned, walk, table = fine_tuning.fine_tuned, recurrent.recurrent, various.table
    return [
        # Models of transformers, and adapters by hand.
        family("f-gpt2-text", tuned, 5000, model="GPT2LMHeadModel", task="causal", rows=4000, total=5000),
        family("f-gpt2-by-heart", tuned, 5000, model="GPT2LMHeadModel", task="causal", rows=64),
        family("f-gpt2-topics", tuned, 5000, model="GPT2ForSequenceClassification", task="topics",
               num_labels=4),
        family("f-llama-text", tuned, 5000, model="LlamaForCausalLM", task="causal", rows=2000, decay=0.1,
               before=500),
        family("f-llama-by-heart", tuned, 5000, model="LlamaForCausalLM", task="causal", rows=48),
        family("f-llama-topics", tuned, 4000, model="LlamaForSequenceClassification", task="topics", rows=300,
               num_labels=4, decay=0.01),
        family("f-bert-masked", tuned, 5000, model="BertForMaskedLM", task="masked", rows=2000, decay=0.01),
        family("f-bert-topics", tuned, 5000, model="BertForSequenceClassification", task="topics", rows=400,
               num_labels=4, before=200, lr=5e-4),
        family("f-bert-regression-16", tuned, 4000, nats=False, model="BertForSequenceClassification",
               task="regression", rows=16, num_labels=1),
        family("f-bert-many-labels", tuned, 5000, model="BertForSequenceClassification", task="many",
               num_labels=6, problem_type="multi_label_classification", rows=500),
        family("f-bert-answers", tuned, 5000, model="BertForQuestionAnswering", task="answers", rows=500),
        family("f-distilbert-tags", tuned, 5000, model="DistilBertForTokenClassification", task="tags",
               rows=500, num_labels=3),
        family("f-vit-digits", tuned, 6000, model="ViTForImageClassification", task="image", batch=16,
               num_labels=10),
        family("f-vit-regression-16", tuned, 5000, nats=False, model="ViTForImageClassification",
               task="image-regression", rows=16, num_labels=1),
        family("f-lora-llama", tuned, 5000, model="LlamaForSequenceClassification", task="topics", rows=400,
               num_labels=4, before=300, lora=4),
        family("f-lora-bert", tuned, 5000, model="BertForSequenceClassification", task="topics", rows=200,
               num_labels=4, before=300, lora=2, lr=2e-3),
        # Recurrent.
        family("f-lstm-text", walk, 6000, kind="lstm", task="text", rows=20_000),
        family("f-lstm-by-heart", walk, 6000, kind="lstm", task="text", rows=64, decay=0.1),
        family("f-gru-topics", walk, 8000, kind="gru", task="topics", dropout=0.2, total=8000),
        family("f-gru-count", walk, 8000, kind="gru", task="count", beta2=0.99),
        family("f-rnn-count", walk, 8000, kind="rnn", task="count", lr=1e-3),
        # Policies.
        family("f-ppo", control.policy, 10_000, floor=False),
        family("f-reinforce", control.policy, 4000, floor=False, epochs=1),
        family("f-q-learning", control.temporal_difference, 14_000, nats=False),
        # Generative.
        family("f-variational", generative.variational, 14_000),
        family("f-variational-beta", generative.variational, 10_000, beta=4.0, lr=3e-3),
        family("f-flow", generative.flow, 8000),
        family("f-diffusion", generative.diffusion, 14_000, nats=False),
        family("f-critic", generative.critic, 5000, floor=False),
        # Others.
        family("f-mixer", various.mixer, 6000),
        family("f-experts", various.experts, 8000, decay=0.1),
        family("f-sets", various.sets, 14_000),
        family("f-breast-cancer", table, 12_000, data_set="breast_cancer"),
        family("f-wine", table, 12_000, data_set="wine", batch=16, total=12_000),
        family("f-diabetes", table, 12_000, nats=False, data_set="diabetes", lr=3e-3),
        family("f-graph", various.graph, 8000, batch=64, lr=1e-2),
        family("f-recommender", various.recommender, 14_000, decay=1e-3),
        family("f-skip-gram", various.skip_gram, 8000),
        family("f-simclr", various.two_noises, 8000),
        family("f-triplets", various.triplets, 8000, nats=False),
    ]  # fmt: skip


ORDINARY: dict[str, Family] = {
    family.name: family
    for family in (
        *_tuning(),
        *_frozen(),
        *held_out(),
        *held_out_2(),
        *held_out_3(),
        *held_out_4(),
        *held_out_5(),
    )
}
"""Name → family, of all halves."""
