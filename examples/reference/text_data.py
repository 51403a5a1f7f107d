"""Load text for the GPT study: English that ships with Python, or FineWeb streamed from the hub.

The embedded text is the language reference of ``help()`` (``pydoc_data.topics``), some hundred thousand
words, with a byte-pair encoding trained on it. Both sources give ``batch(step)`` → tokens. The order depends
on the seed alone, so that all arms of a pair read the same text. ``fixed()`` returns the tokens for
measurements.
"""

from __future__ import annotations

import functools
import io
import os
from collections.abc import Iterator
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from examples.reference.packages import require
from examples.reference.results import StudyError

FINEWEB = "HuggingFaceFW/fineweb"
END = "<|endoftext|>"


def python_reference() -> str:
    """Return the language topics of ``help()``, in alphabetical order."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def byte_pair_encoding(text: str, vocabulary: int) -> Any:
    """Train a ``tokenizers.Tokenizer``: byte-level BPE with exactly ``vocabulary`` entries, reproducibly.

    Raises StudyError if the text is too short for so many entries, or if ``tokenizers`` is missing.
    """
    tokenizers = require("tokenizers", "text")
    # The tokenizer's threads conflict with forked workers, and one text does not need threads.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    found = tokenizer.get_vocab_size()
    if found != vocabulary:
        raise StudyError(f"a vocabulary of {vocabulary:,} was asked for, this text gives {found:,}")
    return tokenizer


@functools.cache  # several runs of one process read the same text
def excerpt(tokens: int, vocabulary: int) -> tuple[Tensor, Any]:
    """Return ``(the reference's first tokens [tokens] int64, tokenizer)``.

    The encoding is trained on the whole reference.
    """
    text = python_reference()
    tokenizer = byte_pair_encoding(text, vocabulary)
    ids = tokenizer.encode(text).ids
    if len(ids) < tokens:
        raise StudyError(f"{tokens:,} tokens were asked for, Python's reference has {len(ids):,}")
    return torch.tensor(ids[:tokens]), tokenizer


class Excerpt:
    """Cut a text into windows of equal length; each epoch reads all of them in another order.

    The windows do not move. So a model can learn by heart all tokens except a few after an ambiguous
    beginning. A small model then reaches in minutes the confidence that absorption needs.
    """

    def __init__(self, stream: Tensor, *, rows: int, length: int, seed: int) -> None:
        whole = (len(stream) - 1) // length
        if whole < rows:
            raise StudyError(
                f"{rows:,} windows of {length:,} tokens need a longer text than {len(stream):,} tokens"
            )
        starts = torch.arange(whole)[:, None] * length
        self.windows = stream[starts + torch.arange(length + 1)]
        self.rows, self.seed = rows, seed

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Return ``(tokens, next tokens)``, both [rows, length], of step ``step`` ≥ 1; keep no state."""
        epoch, place = divmod(step - 1, len(self.windows) // self.rows)
        generator = torch.Generator().manual_seed(1_000_003 * (self.seed + 1) + epoch)
        order = torch.randperm(len(self.windows), generator=generator)
        return _shifted(self.windows[order[place * self.rows : (place + 1) * self.rows]])

    def fixed(self) -> tuple[Tensor, Tensor]:
        """Return all windows, for measurements."""
        return _shifted(self.windows)


def _shifted(windows: Tensor) -> tuple[Tensor, Tensor]:
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


class TokenStream:
    """Encode documents one after the other, cut them into windows, and remember the position.

    ``documents`` is a ``datasets.IterableDataset`` with a column ``text``. Its ``state_dict`` says which
    document is next, so a resumed run does not read terabytes again.
    """

    def __init__(self, documents: Any, tokenizer: Any, *, rows: int, length: int) -> None:
        self.documents, self.tokenizer, self.rows, self.length = documents, tokenizer, rows, length
        self.end = tokenizer.token_to_id(END)
        if self.end is None:
            raise StudyError(f"the tokenizer has no {END}, which stands between documents")
        self.rest = torch.empty(0, dtype=torch.int64)
        self._reading: Iterator[Any] | None = None

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Return ``(tokens, next tokens)``, both [rows, length]; call it in the order of ``step``.

        Raises StudyError when no documents are left or the connection fails for good.
        """
        wanted = self.rows * self.length + 1
        parts, have = [self.rest], len(self.rest)
        if self._reading is None:
            self._reading = iter(self.documents)
        while have < wanted:
            try:
                document = next(self._reading)
            except StopIteration:
                raise StudyError(
                    f"the text is used up at step {step:,}: fewer --steps, or more files"
                ) from None
            except OSError as error:
                raise StudyError(
                    f"the text broke off at step {step:,}: {error}; start again to resume"
                ) from error
            parts.append(torch.tensor([*self.tokenizer.encode(document["text"]).ids, self.end]))
            have += len(parts[-1])
        flat = torch.cat(parts)
        # The last target is also the next batch's first input, so every token but the first is predicted
        # once.
        self.rest = flat[wanted - 1 :].clone()
        shape = (self.rows, self.length)
        return flat[: wanted - 1].reshape(shape).contiguous(), flat[1:wanted].reshape(shape).contiguous()

    def fixed(self) -> tuple[Tensor, Tensor]:
        """Return the first ``rows`` windows, which are never trained on; call it once, before any batch."""
        return self.batch(0)

    def state_dict(self) -> dict[str, Any]:
        return {"documents": self.documents.state_dict(), "rest": self.rest}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.documents.load_state_dict(state["documents"])
        self.rest, self._reading = state["rest"], None


def fineweb(*, rows: int, length: int, data_dir: str | None = None) -> TokenStream:
    """Stream FineWeb's 10-billion-token sample in GPT-2's encoding, from the hub or from ``data_dir``.

    ``data_dir`` holds parquet files with a column ``text`` and GPT-2's ``tokenizer.json``. Raises StudyError
    without network or files.
    """
    datasets, tokenizers = require("datasets", "FineWeb"), require("tokenizers", "text")
    if data_dir is not None:
        files = sorted(map(str, Path(data_dir).rglob("*.parquet")))
        encoding = Path(data_dir) / "tokenizer.json"
        if not files or not encoding.is_file():
            raise StudyError(f"expected parquet files and a tokenizer.json in {data_dir}")
        try:
            documents = datasets.load_dataset("parquet", data_files=files, split="train", streaming=True)
            tokenizer = tokenizers.Tokenizer.from_file(str(encoding))
            columns = documents.column_names or list(next(iter(documents)))
        except Exception as error:  # a broken file can raise any exception of its reader
            raise StudyError(f"{data_dir} cannot be read as text: {str(error).splitlines()[0]}") from error
    else:
        try:
            with redirect_stderr(io.StringIO()):  # the client logs every retry; we report one line below
                tokenizer = tokenizers.Tokenizer.from_pretrained("gpt2")
                documents = datasets.load_dataset(FINEWEB, "sample-10BT", split="train", streaming=True)
                columns = documents.column_names or list(next(iter(documents)))
        except Exception as error:
            raise StudyError(
                f"no FineWeb without a network ({str(error).splitlines()[0]}): pass --data-dir with parquet "
                "files and a tokenizer.json, or run on --data python"
            ) from error
    if "text" not in columns:
        raise StudyError(f"expected a column text, found {', '.join(columns)}")
    return TokenStream(documents.select_columns(["text"]), tokenizer, rows=rows, length=length)
