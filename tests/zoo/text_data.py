"""Make a tokenizer, sentences and a causal language model from what Python itself ships."""

from __future__ import annotations

import functools
import pydoc_data.topics
import tempfile
from typing import Any

import torch
from torch import nn

VOCABULARY = 300
_MODELS = tempfile.TemporaryDirectory(prefix="nfi-zoo-models-")  # removed at exit


def model_folder() -> str:
    """Return a new folder for a saved model."""
    return tempfile.mkdtemp(dir=_MODELS.name)


@functools.cache
def sentences(count: int = 64, length: int = 60) -> tuple[str, ...]:
    """Return pieces of Python's own help texts."""
    whole = " ".join(
        "\n".join(pydoc_data.topics.topics[key] for key in sorted(pydoc_data.topics.topics)).split()
    )
    return tuple(whole[i * length : (i + 1) * length] for i in range(count))


@functools.cache
def tokenizer() -> Any:
    """Return a byte-level BPE tokenizer, trained here."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.train_from_iterator(
        sentences(),
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=["<unk>", "<pad>", "<s>", "</s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


@functools.cache
def word_tokenizer() -> Any:
    """Return a tokenizer of BERT's kind."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    made.train_from_iterator(
        sentences(), trainers.WordPieceTrainer(vocab_size=VOCABULARY, special_tokens=special)
    )
    made.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )


def llama(name: str = "LlamaForCausalLM", **config: Any) -> nn.Module:
    """Return a tiny model with this tokenizer's vocabulary, saved and loaded as from a hub."""
    import transformers

    cls = getattr(transformers, name)
    made = cls(
        cls.config_class(
            **{
                "vocab_size": len(tokenizer()),
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "max_position_embeddings": 256,
                "pad_token_id": 1,
                "bos_token_id": 2,
                "eos_token_id": 3,
                **config,
            }
        )
    )
    folder = model_folder()
    made.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    loaded: nn.Module = cls.from_pretrained(folder, dtype=torch.float32)
    return loaded
