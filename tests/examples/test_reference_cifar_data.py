"""The image readers on small files of every form they accept, written here byte by byte, and broken ones."""

from __future__ import annotations

import gzip
import io
import pickle
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from examples.reference import vision_data
from examples.reference.packages import require
from examples.reference.results import StudyError
from examples.reference.vision_data import Split, fashion_mnist, load, subset


def pictures(rows: int, side: int = 32) -> tuple[np.ndarray, np.ndarray]:
    """``(bytes [rows, side, side, 3], labels [rows])``, every row different."""
    random = np.random.default_rng(0)
    return random.integers(0, 256, (rows, side, side, 3), np.uint8), random.integers(0, 10, rows)


def assert_holds(split: Split, images: np.ndarray, labels: np.ndarray) -> None:
    assert split.x.dtype == torch.float32
    assert split.y.tolist() == labels.tolist()
    expected = torch.from_numpy(images).permute(0, 3, 1, 2).double() / 255
    torch.testing.assert_close(split.x.double(), expected, rtol=0, atol=1e-7)


# --- digits ----------------------------------------------------------------------------------------------


def test_digits_are_the_library_s_rows_scaled_up_with_no_row_in_both_splits() -> None:
    from sklearn.datasets import load_digits

    train, test = load("digits")
    assert train.x.shape == (1437, 3, 32, 32) and test.x.shape == (360, 3, 32, 32)
    assert torch.equal(train.x[:, 0], train.x[:, 1]) and torch.equal(train.x[:, 0], train.x[:, 2])
    data = load_digits()
    assert sorted([*train.y.tolist(), *test.y.tolist()]) == sorted(data.target.tolist())
    # Bilinear by 4 with aligned edges: the mean over a block is near the pixel, over the image it is equal.
    small = torch.tensor(data.images[1] / 16.0, dtype=torch.float32)
    assert train.x[0, 0].mean().item() == pytest.approx(small.mean().item(), abs=2e-3)


def test_a_subset_is_the_same_for_a_seed_and_another_for_another() -> None:
    train, _ = load("digits")
    one, same, other = subset(train, 50, 3), subset(train, 50, 3), subset(train, 50, 4)
    assert torch.equal(one.x, same.x) and torch.equal(one.y, same.y)
    assert not torch.equal(one.y, other.y)
    assert len(subset(train, 10**6, 0).y) == len(train.y)


# --- CIFAR-10, binary -------------------------------------------------------------------------------------


def write_binary(directory: Path, images: np.ndarray, labels: np.ndarray, name: str) -> None:
    planes = images.transpose(0, 3, 1, 2).reshape(len(labels), -1)
    content = np.concatenate([labels.astype(np.uint8)[:, None], planes], axis=1).tobytes()
    directory.mkdir(parents=True, exist_ok=True)
    (directory / name).write_bytes(content)


def test_the_binary_version_is_read_in_the_order_of_its_batches(tmp_path: Path) -> None:
    images, labels = pictures(7)
    folder = tmp_path / "cifar-10-batches-bin"
    write_binary(folder, images[:3], labels[:3], "data_batch_1.bin")
    write_binary(folder, images[3:5], labels[3:5], "data_batch_2.bin")
    write_binary(folder, images[5:], labels[5:], "test_batch.bin")
    train, test = vision_data.cifar10_from_files(tmp_path)
    assert_holds(train, images[:5], labels[:5])
    assert_holds(test, images[5:], labels[5:])


def test_a_binary_batch_that_is_cut_short_is_named(tmp_path: Path) -> None:
    images, labels = pictures(2)
    write_binary(tmp_path, images, labels, "data_batch_1.bin")
    whole = (tmp_path / "data_batch_1.bin").read_bytes()
    (tmp_path / "data_batch_1.bin").write_bytes(whole[:-1])
    with pytest.raises(
        StudyError, match=r"data_batch_1.bin is cut short .* 6,145 bytes, no multiple of 3,073"
    ):
        load("cifar10", str(tmp_path))


def test_fewer_rows_than_cifar_10_has_are_refused(tmp_path: Path) -> None:
    images, labels = pictures(4)
    write_binary(tmp_path, images, labels, "data_batch_1.bin")
    write_binary(tmp_path, images, labels, "test_batch.bin")
    with pytest.raises(StudyError, match="cifar10 has 50,000 training rows, 4 were found"):
        load("cifar10", str(tmp_path))


def test_a_label_that_is_none_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels = pictures(4)
    monkeypatch.setitem(vision_data.TRAIN_ROWS, "cifar10", 4)
    monkeypatch.setitem(vision_data.TEST_ROWS, "cifar10", 4)
    write_binary(tmp_path, images, labels, "data_batch_1.bin")
    write_binary(tmp_path, images, np.full(4, 11), "test_batch.bin")
    with pytest.raises(StudyError, match="labels 0–9, 11–11 were found"):
        load("cifar10", str(tmp_path))


def test_the_pickled_version_is_never_opened(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.touch, (tmp_path / "executed",))  # type: ignore[return-value]

    (tmp_path / "data_batch_1").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(StudyError, match="pickled Python, which is never opened"):
        load("cifar10", str(tmp_path))
    assert not (tmp_path / "executed").exists()


def test_a_missing_test_batch_is_named(tmp_path: Path) -> None:
    images, labels = pictures(2)
    write_binary(tmp_path, images, labels, "data_batch_1.bin")
    with pytest.raises(StudyError, match=r"test_batch.bin cannot be read: No such file"):
        load("cifar10", str(tmp_path))


# --- CIFAR-10, parquet ------------------------------------------------------------------------------------


def png(image: np.ndarray) -> bytes:
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(image).save(out, "PNG")
    return out.getvalue()


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


@pytest.mark.usefixtures("hub_cache")
@pytest.mark.parametrize(("column", "as_image"), [("img", True), ("image", False)])
def test_parquet_files_are_read_with_and_without_the_hub_s_image_type(
    tmp_path: Path, column: str, as_image: bool
) -> None:
    import datasets

    images, labels = pictures(6)
    folder = tmp_path / "data" / "plain_text"
    folder.mkdir(parents=True)
    for part, rows in (("train", slice(0, 4)), ("test", slice(4, 6))):
        table = datasets.Dataset.from_dict(
            {
                column: [{"bytes": png(image), "path": None} for image in images[rows]],
                "label": labels[rows].tolist(),
            }
        )
        if as_image:
            table = table.cast_column(column, datasets.Image())
        table.to_parquet(folder / f"{part}-00000-of-00001.parquet")
    train, test = vision_data.cifar10_from_files(tmp_path / "data")
    assert_holds(train, images[:4], labels[:4])
    assert_holds(test, images[4:], labels[4:])


@pytest.mark.usefixtures("hub_cache")
def test_what_save_to_disk_wrote_is_read(tmp_path: Path) -> None:
    import datasets

    images, labels = pictures(3)
    rows = {"img": [{"bytes": png(image), "path": None} for image in images], "label": labels.tolist()}
    table = datasets.Dataset.from_dict(rows).cast_column("img", datasets.Image())
    datasets.DatasetDict({"train": table, "test": table}).save_to_disk(tmp_path / "saved")
    train, test = vision_data.cifar10_from_files(tmp_path / "saved")
    assert_holds(train, images, labels)
    assert_holds(test, images, labels)


@pytest.mark.usefixtures("hub_cache")
def test_a_parquet_file_that_is_none_is_named(tmp_path: Path) -> None:
    for part in ("train", "test"):
        (tmp_path / f"{part}.parquet").write_bytes(b"no parquet")
    with pytest.raises(StudyError, match="cannot be read as a data set"):
        load("cifar10", str(tmp_path))


@pytest.mark.usefixtures("hub_cache")
def test_without_a_network_one_line_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(StudyError) as stopped:
        load("cifar10")
    assert "no uoft-cs/cifar10 without a network" in str(stopped.value)
    assert "--data-dir" in str(stopped.value) and "--data digits" in str(stopped.value)
    assert "\n" not in str(stopped.value)


def test_an_empty_folder_and_an_unknown_name_say_what_is_expected(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=r"no CIFAR-10 in .*: expected data_batch_\*.bin"):
        load("cifar10", str(tmp_path))
    with pytest.raises(StudyError, match="no data called 'mnist': use one of digits, cifar10, fashion-mnist"):
        load("mnist")


# --- Fashion-MNIST ----------------------------------------------------------------------------------------


def write_idx(directory: Path, name: str, array: np.ndarray, *, zipped: bool) -> Path:
    header = struct.pack(f">HBB{array.ndim}i", 0, 8, array.ndim, *array.shape)
    content = header + array.astype(np.uint8).tobytes()
    path = directory / (f"{name}.gz" if zipped else name)
    path.write_bytes(gzip.compress(content) if zipped else content)
    return path


@pytest.mark.parametrize("zipped", [True, False])
def test_idx_files_are_framed_in_black_and_get_three_channels(tmp_path: Path, zipped: bool) -> None:
    gray, labels = pictures(3, side=28)[0][..., 0], np.array([9, 0, 4])
    for part in ("train", "t10k"):
        write_idx(tmp_path, f"{part}-images-idx3-ubyte", gray, zipped=zipped)
        write_idx(tmp_path, f"{part}-labels-idx1-ubyte", labels, zipped=zipped)
    train, _ = fashion_mnist(tmp_path)
    framed = np.pad(gray, ((0, 0), (2, 2), (2, 2)))
    assert_holds(train, np.repeat(framed[..., None], 3, axis=3), labels)
    with pytest.raises(StudyError, match="fashion-mnist has 60,000 training rows, 3 were found"):
        load("fashion-mnist", str(tmp_path))


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "is cut short or no idx file"),
        (b"\x00\x00\x08\x03\x00\x00", "is cut short or no idx file"),
        (struct.pack(">HBB3i", 0, 8, 3, 2, 28, 28) + bytes(2 * 28 * 28 - 1), "is cut short or no idx file"),
        (struct.pack(">HBB1i", 0, 13, 1, 1) + bytes(4), "is cut short or no idx file"),  # floats
        (struct.pack(">HBB3i", 0, 8, 3, 2, 28, 27) + bytes(2 * 28 * 27), r"expected \(N, 28, 28\)"),
    ],
)
def test_a_broken_idx_file_is_named(tmp_path: Path, content: bytes, complaint: str) -> None:
    (tmp_path / "train-images-idx3-ubyte").write_bytes(content)
    write_idx(tmp_path, "train-labels-idx1-ubyte", np.zeros(2), zipped=False)
    with pytest.raises(StudyError, match=complaint):
        load("fashion-mnist", str(tmp_path))


def test_missing_idx_files_and_a_missing_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=r"no train-images-idx3-ubyte or train-images-idx3-ubyte\.gz in"):
        load("fashion-mnist", str(tmp_path))
    with pytest.raises(StudyError, match="pass --data-dir"):
        load("fashion-mnist")


def test_a_gzip_file_that_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(b"\x1f\x8b broken")
    with pytest.raises(StudyError, match="cannot be unzipped"):
        load("fashion-mnist", str(tmp_path))


# --- packages ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", ["sklearn.datasets", "datasets", "tokenizers", "transformers"])
def test_a_missing_package_is_asked_for_by_its_pip_line(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [module, *[name for name in sys.modules if name.startswith(f"{module}.")]]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(
        StudyError, match=r'needed for x and not installed: pip install "nfi-monitor\[examples\]"'
    ):
        require(module, "x")
