"""Data sets: what the readers make of well-formed files, and what they say about others."""

import gzip
import pickle
import struct

import numpy as np
import pytest
import torch

from mgd.errors import BadData
from mgd.recipes import data

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 5, 4), dtype=np.uint8)
LABELS = np.array([3, 0, 9, 1, 1, 7], dtype=np.uint8)


def idx(array):
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


@pytest.fixture
def mnist(tmp_path):
    folder = tmp_path / "my-mnist"
    folder.mkdir()
    (folder / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(PIXELS)))
    (folder / "train-labels-idx1-ubyte").write_bytes(idx(LABELS))
    (folder / "t10k-images-idx3-ubyte").write_bytes(idx(PIXELS[:2]))
    (folder / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(LABELS[:2])))
    return folder


def test_idx_files_gzipped_or_not_are_read_exactly(mnist):
    train, test = data.load(mnist), data.load(mnist, train=False)
    assert torch.equal(train.images, torch.from_numpy(PIXELS)[:, None])
    assert train.labels.tolist() == LABELS.tolist() and train.labels.dtype == torch.int64
    assert torch.equal(test.images, torch.from_numpy(PIXELS[:2])[:, None])
    assert (train.name, train.classes) == ("my-mnist", tuple("0123456789"))


def test_a_folder_called_fashion_has_fashion_classes(mnist):
    folder = mnist.rename(mnist.with_name("Fashion-MNIST"))
    assert data.load(folder).classes[9] == "ankle boot"


@pytest.mark.parametrize(
    "content, says",
    [
        (b"", "begins 00 00 08"),
        (b"\x00\x00\x0d\x01" + b"\x00" * 8, "begins 00 00 0d 01"),
        (b"\x00\x00\x08\x03\x00\x00", "ends within its header"),
        (idx(PIXELS)[:-1], r"expected 120 bytes of data in .*, \[6, 5, 4\]; got 119"),
        (idx(PIXELS) + b"x", "got 121"),
        (idx(LABELS), r"expected images \[n, height, width\]"),
        (idx(PIXELS[:3]), "3 images and 6 labels"),
    ],
)
def test_a_bad_idx_file_is_named_with_what_was_expected(mnist, content, says):
    (mnist / "train-images-idx3-ubyte.gz").unlink()
    (mnist / "train-images-idx3-ubyte").write_bytes(content)
    with pytest.raises(BadData, match=says):
        data.load(mnist)


def test_a_broken_gzip_file_is_an_error_of_ours(mnist):
    path = mnist / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(BadData, match=r"cannot read .*train-images"):
        data.load(mnist)


def test_labels_outside_the_classes_are_refused(mnist):
    (mnist / "train-labels-idx1-ubyte").write_bytes(idx(LABELS + 5))
    with pytest.raises(BadData, match=r"in 0\.\.9; got 5\.\.14"):
        data.load(mnist)


def test_missing_files_and_folders_are_named(mnist, tmp_path):
    (mnist / "train-labels-idx1-ubyte").unlink()
    with pytest.raises(BadData, match=r"train-labels-idx1-ubyte\.gz"):
        data.load(mnist)
    with pytest.raises(BadData, match="nowhere is not one"):
        data.load(tmp_path / "nowhere")


# --- CIFAR-10 --------------------------------------------------------------------------------------------------------


@pytest.fixture
def cifar(tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    generator = np.random.default_rng(1)
    rows = generator.integers(0, 256, (18, 3072), dtype=np.uint8)
    labels = generator.integers(0, 10, 18).tolist()
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    for i, name in enumerate(names):
        part = slice(3 * i, 3 * i + 3)
        batch = {b"data": rows[part], b"labels": labels[part], b"filenames": [b"a.png"] * 3}
        (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
    return folder, rows, labels


def test_cifar_batches_are_read_exactly_from_either_folder(cifar):
    folder, rows, labels = cifar
    for place in (folder, folder.parent):
        train, test = data.load(place), data.load(place, train=False)
        assert train.images.shape == (15, 3, 32, 32) and train.labels.tolist() == labels[:15]
        # A row holds the red plane, then green, then blue, each row by row.
        assert int(train.images[4, 1, 2, 3]) == rows[4, 1024 + 2 * 32 + 3]
        assert test.labels.tolist() == labels[15:]
    assert train.classes[3] == "cat"


@pytest.mark.parametrize("protocol", [2, 5])
def test_cifar_pickles_of_old_and_new_protocols_are_read(cifar, protocol):
    folder, rows, _ = cifar
    batch = {"data": rows[:3], "labels": [1, 2, 3]}
    (folder / "test_batch").write_bytes(pickle.dumps(batch, protocol=protocol))
    assert data.load(folder, train=False).labels.tolist() == [1, 2, 3]


def test_a_pickle_that_would_run_code_is_refused(cifar, tmp_path):
    class Attack:
        def __reduce__(self):
            return (exec, (f"open({str(tmp_path / 'owned')!r}, 'w').close()",))

    folder = cifar[0]
    (folder / "data_batch_2").write_bytes(pickle.dumps({"data": Attack()}))
    with pytest.raises(BadData, match=r"builtins\.exec"):
        data.load(folder)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    "batch, says",
    [
        ({"labels": [1]}, "'data' .*got NoneType"),
        ({"data": np.zeros((2, 3071), np.uint8), "labels": [1, 2]}, r"uint8 \[n, 3072\] .* got uint8 \[2, 3071\]"),
        ({"data": np.zeros((2, 3072), np.float32), "labels": [1, 2]}, "got float32"),
        ({"data": np.zeros((2, 3072), np.uint8)}, "'labels' .*got NoneType"),
        ({"data": np.zeros((2, 3072), np.uint8), "labels": [1]}, "2 images and 1 labels"),
    ],
)
def test_a_bad_cifar_batch_is_named_with_what_was_expected(cifar, batch, says):
    (cifar[0] / "test_batch").write_bytes(pickle.dumps(batch))
    with pytest.raises(BadData, match=says):
        data.load(cifar[0], train=False)


def test_a_truncated_or_missing_cifar_batch_is_an_error_of_ours(cifar):
    folder = cifar[0]
    (folder / "data_batch_3").write_bytes((folder / "data_batch_3").read_bytes()[:100])
    with pytest.raises(BadData, match="data_batch_3"):
        data.load(folder)
    (folder / "data_batch_3").unlink()
    with pytest.raises(BadData, match="data_batch_1 to _5"):
        data.load(folder)


# --- digits, and what all sets share ---------------------------------------------------------------------------------


def test_digits_are_split_into_disjoint_training_and_test_images(monkeypatch, tmp_path):
    monkeypatch.setattr(data.images, "FASHION_MNIST", tmp_path / "not-there")
    train, test = data.load(), data.load(train=False)
    assert train.name == "digits" and len(train) + len(test) == 1797
    assert len(train) == 1348 and train.images.shape[1:] == (1, 8, 8)
    assert int(train.images.max()) == 255 and set(train.labels.tolist()) == set(range(10))


def test_floats_have_mean_zero_and_variance_one():
    x = data.digits()[:100].floats()
    assert abs(float(x.mean())) < 1e-5 and abs(float(x.std()) - 1) < 1e-5  # float32 rounding of 6,400 pixels


def test_indexing_keeps_images_and_labels_together():
    digits = data.digits()
    some = digits[torch.tensor([5, 2])]
    assert torch.equal(some.images[1], digits.images[2]) and int(some.labels[0]) == int(digits.labels[5])
