"""Load images for the CIFAR-10 study: digits that need no network, CIFAR-10, Fashion-MNIST.

All images become 32×32×3 in [0, 1], so that one network fits all three. There is no augmentation and no
whitening: Liu et al. 2026 mention neither. Nothing is ever unpickled, because CIFAR-10's Python archive can
run any code. Its binary version and the parquet files hold the same rows.
"""

from __future__ import annotations

import gzip
import io
from collections.abc import Sequence
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from examples.reference.packages import require
from examples.reference.results import StudyError

CLASSES = 10
CIFAR_HUB = "uoft-cs/cifar10"
CIFAR_BINARY_ROW = 1 + 3 * 32 * 32  # the label, then the red, green and blue planes
TRAIN_ROWS = {"digits": 1_437, "cifar10": 50_000, "fashion-mnist": 60_000}
TEST_ROWS = {"digits": 360, "cifar10": 10_000, "fashion-mnist": 10_000}


class Split(NamedTuple):
    """Hold ``x`` [N, 3, 32, 32] float32 in [0, 1] and ``y`` [N] int64 below 10."""

    x: Tensor
    y: Tensor


def load(name: str, data_dir: str | None = None) -> tuple[Split, Split]:
    """Return ``(train, test)`` of "digits", "cifar10" or "fashion-mnist", row counts verified.

    Raises StudyError, in one line that says what to do. Causes: an unknown name, files that are missing,
    broken or incomplete, no network, a package that is not installed.
    """
    if name == "digits":
        train, test = digits()
    elif name == "cifar10":
        train, test = cifar10_from_hub() if data_dir is None else cifar10_from_files(Path(data_dir))
    elif name == "fashion-mnist":
        if data_dir is None:
            raise StudyError(
                "fashion-mnist is read from local files: pass --data-dir with its four idx files in it"
            )
        train, test = fashion_mnist(Path(data_dir))
    else:
        raise StudyError(f"no data called {name!r}: use one of {', '.join(TRAIN_ROWS)}")
    for part, split, rows in (("training", train, TRAIN_ROWS[name]), ("test", test, TEST_ROWS[name])):
        if len(split.y) != rows:
            raise StudyError(
                f"{name} has {rows:,} {part} rows, {len(split.y):,} were found: something is missing"
            )
        if not (int(split.y.min()) >= 0 and int(split.y.max()) < CLASSES):
            raise StudyError(f"{name} has labels 0–9, {int(split.y.min())}–{int(split.y.max())} were found")
    return train, test


def subset(split: Split, rows: int, seed: int) -> Split:
    """Return ``rows`` random rows, the same for every arm of a seed; all, shuffled, if there are fewer."""
    order = torch.randperm(len(split.y), generator=torch.Generator().manual_seed(seed))[:rows]
    return Split(split.x[order], split.y[order])


# --- digits ---------------------------------------------------------------------------------------------


def digits() -> tuple[Split, Split]:
    """Load scikit-learn's 1,797 digits of 8×8 pixels, scaled up; every fifth is a test row."""
    data = require("sklearn.datasets", "the digits").load_digits()
    small = torch.tensor(data.images / 16.0, dtype=torch.float32).unsqueeze(1)
    x = F.interpolate(small, size=(32, 32), mode="bilinear", align_corners=False).expand(-1, 3, -1, -1)
    y = torch.tensor(data.target, dtype=torch.int64)
    held_out = torch.arange(len(y)) % 5 == 0
    return Split(x[~held_out].contiguous(), y[~held_out]), Split(x[held_out].contiguous(), y[held_out])


# --- CIFAR-10 -------------------------------------------------------------------------------------------


def cifar10_from_hub() -> tuple[Split, Split]:
    datasets = require("datasets", "CIFAR-10")
    try:
        with redirect_stderr(io.StringIO()):  # the client logs every retry; we report one line below
            found = datasets.load_dataset(CIFAR_HUB)
    except (OSError, ValueError) as error:
        raise StudyError(
            f"no {CIFAR_HUB} without a network ({_first_line(error)}): pass --data-dir with its parquet "
            "files or the binary version's data_batch_*.bin, or run on --data digits"
        ) from error
    return _rows(found["train"]), _rows(found["test"])


def cifar10_from_files(directory: Path) -> tuple[Split, Split]:
    """Load the binary version, parquet files named train* and test*, or the output of ``save_to_disk``."""
    batches = sorted(directory.rglob("data_batch_*.bin"))
    if batches:
        return cifar10_binary(batches), cifar10_binary([batches[0].with_name("test_batch.bin")])
    parquet = {part: sorted(map(str, directory.rglob(f"{part}*.parquet"))) for part in ("train", "test")}
    if all(parquet.values()):
        datasets = require("datasets", "parquet files")
        found = _opened(directory, datasets.load_dataset, "parquet", data_files=parquet)
        return _rows(found["train"]), _rows(found["test"])
    if (directory / "dataset_dict.json").is_file():
        found = _opened(directory, require("datasets", "a saved data set").load_from_disk, str(directory))
        return _rows(found["train"]), _rows(found["test"])
    pickled = " (data_batch_1 is pickled Python, which is never opened)" if _pickled(directory) else ""
    raise StudyError(
        f"no CIFAR-10 in {directory}{pickled}: expected data_batch_*.bin and test_batch.bin of the binary "
        "version, or train*.parquet and test*.parquet"
    )


def cifar10_binary(paths: Sequence[Path]) -> Split:
    """Read rows of 3,073 bytes: a label, then 1,024 bytes each of red, green and blue."""
    rows = []
    for path in paths:
        content = np.frombuffer(_read(path), np.uint8)
        if len(content) % CIFAR_BINARY_ROW or not len(content):
            raise StudyError(
                f"{path} is cut short or no CIFAR-10: {len(content):,} bytes, no multiple of "
                f"{CIFAR_BINARY_ROW:,}"
            )
        rows.append(content.reshape(-1, CIFAR_BINARY_ROW))
    table = torch.from_numpy(np.concatenate(rows))
    return Split(table[:, 1:].reshape(-1, 3, 32, 32).float() / 255, table[:, 0].long())


def _pickled(directory: Path) -> bool:
    return any(path.suffix == "" for path in directory.rglob("data_batch_1"))


def _opened(directory: Path, opener: Any, *args: Any, **kwargs: Any) -> Any:
    try:
        return opener(*args, **kwargs)
    except Exception as error:  # a broken file can raise any exception of its reader
        raise StudyError(f"{directory} cannot be read as a data set: {_first_line(error)}") from error


def _rows(dataset: Any) -> Split:
    """Convert a ``datasets.Dataset`` with an image and a label per row, under any known names."""
    image = next((name for name in ("img", "image") if name in dataset.column_names), None)
    if image is None or "label" not in dataset.column_names:
        raise StudyError(f"expected the columns img and label, found {', '.join(dataset.column_names)}")
    if not isinstance(dataset.features[image], (datasets := require("datasets", "CIFAR-10")).Image):
        dataset = dataset.cast_column(image, datasets.Image())
    require("PIL", "decoding images")
    pixels = np.stack([np.asarray(row.convert("RGB")) for row in dataset[image]])
    if pixels.shape[1:] != (32, 32, 3):
        raise StudyError(f"expected images of 32×32×3, found {'×'.join(map(str, pixels.shape[1:]))}")
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    return Split(x.contiguous(), torch.tensor(dataset["label"], dtype=torch.int64))


# --- Fashion-MNIST --------------------------------------------------------------------------------------


def fashion_mnist(directory: Path) -> tuple[Split, Split]:
    """Load the four idx files, gzipped or not; pad 28×28 pixels with black, make three equal channels."""
    splits = []
    for part in ("train", "t10k"):
        images, labels = (
            idx(directory, f"{part}-images-idx3-ubyte"),
            idx(directory, f"{part}-labels-idx1-ubyte"),
        )
        if images.shape[1:] != (28, 28) or labels.dim() != 1 or len(images) != len(labels):
            raise StudyError(
                f"{directory}: {part} holds images {tuple(images.shape)} and labels {tuple(labels.shape)}, "
                "expected (N, 28, 28) and (N,)"
            )
        x = F.pad(images.float() / 255, (2, 2, 2, 2)).unsqueeze(1).expand(-1, 3, -1, -1)
        splits.append(Split(x.contiguous(), labels.long()))
    return splits[0], splits[1]


def idx(directory: Path, name: str) -> Tensor:
    """Read an idx file of unsigned bytes: 0 0 8 dims, each size as a big-endian int32, then the bytes."""
    found = next((path for path in (directory / name, directory / f"{name}.gz") if path.is_file()), None)
    if found is None:
        raise StudyError(f"no {name} or {name}.gz in {directory}")
    try:
        content = gzip.decompress(_read(found)) if found.suffix == ".gz" else _read(found)
    except (OSError, EOFError) as error:
        raise StudyError(f"{found} cannot be unzipped: {_first_line(error)}") from error
    dims = content[3] if content[:3] == b"\x00\x00\x08" and len(content) > 3 else 0
    sizes = np.frombuffer(content, ">i4", dims, 4).tolist() if dims and len(content) >= 4 + 4 * dims else []
    if not sizes or len(content) != 4 + 4 * dims + int(np.prod(sizes)):
        raise StudyError(f"{found} is cut short or no idx file of bytes")
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=4 + 4 * dims).copy()).reshape(sizes)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise StudyError(f"{path} cannot be read: {error.strerror}") from error


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__
