"""Image data sets that are already on this machine: IDX files (Fashion-MNIST), CIFAR-10 batches, scikit-learn's digits.

Nothing is downloaded. Readers check what they read and say what they expected.
"""

from __future__ import annotations

import gzip
import importlib
import importlib.util
import pickle
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mgd.errors import BadData

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # where Debian's dataset-fashion-mnist puts it
FASHION_CLASSES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
INSTALL = (
    "install Fashion-MNIST (apt-get install dataset-fashion-mnist), name its folder with --data, "
    "or install scikit-learn, whose digits come with it (pip install 'mgd-kernels[demo]')"
)


@dataclass(frozen=True)
class Images:
    """images: uint8 `[n, channels, height, width]`. labels: int64 `[n]`, indices into `classes`."""

    name: str
    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        if len(self.images) != len(self.labels):
            raise BadData(f"{self.name} has {len(self.images)} images and {len(self.labels)} labels; expected as many")
        if len(self.labels) and not 0 <= int(self.labels.min()) <= int(self.labels.max()) < len(self.classes):
            raise BadData(
                f"expected labels of {self.name} in 0..{len(self.classes) - 1}; got {int(self.labels.min())}.."
                f"{int(self.labels.max())}"
            )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Any) -> Images:
        return Images(self.name, self.images[index], self.labels[index], self.classes)

    def floats(self) -> Tensor:
        """The images as float32, shifted and scaled to mean 0 and variance 1 over the whole set."""
        x = self.images.float()
        return (x - x.mean()) / x.std()


def load(folder: str | Path | None = None, train: bool = True) -> Images:
    """The data set in `folder`; without one, Fashion-MNIST where it is installed, else scikit-learn's digits."""
    if folder is None:
        return fashion_mnist(FASHION_MNIST, train) if FASHION_MNIST.is_dir() else digits(train)
    folder = Path(folder)
    if not folder.is_dir():
        raise BadData(f"expected a folder with a data set; {folder} is not one. Without --data: {INSTALL}")
    for cifar in (folder, folder / "cifar-10-batches-py"):
        if (cifar / "data_batch_1").exists():
            return cifar10(cifar, train)
    return fashion_mnist(folder, train)


def installed() -> dict[str, str | None]:
    """The data sets that `load` knows: None where it is there, else what to do."""
    sklearn = importlib.util.find_spec("sklearn") is not None
    return {
        "Fashion-MNIST": None
        if FASHION_MNIST.is_dir()
        else f"not in {FASHION_MNIST}; apt-get install dataset-fashion-mnist",
        "digits": None if sklearn else "needs scikit-learn; pip install 'mgd-kernels[demo]'",
    }


# --- IDX -------------------------------------------------------------------------------------------------------------


def read_idx(path: str | Path) -> Tensor:
    """The uint8 array of an IDX file, gzipped or not: two zero bytes, the type, the number of dimensions, big-endian
    sizes, data."""
    path = Path(path)
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, ValueError) as error:
        raise BadData(f"cannot read {path}: {error}") from error
    if len(content) < 4 or content[:3] != b"\x00\x00\x08":
        raise BadData(f"expected an IDX file of bytes (it begins 00 00 08); {path} begins {content[:4].hex(' ')}")
    start = 4 + 4 * content[3]
    if len(content) < start:
        raise BadData(f"{path} ends within its header")
    shape = struct.unpack(f">{content[3]}I", content[4:start])
    if len(content) - start != prod(shape):
        raise BadData(f"expected {prod(shape)} bytes of data in {path}, {list(shape)}; got {len(content) - start}")
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=start).reshape(shape).copy())


def fashion_mnist(folder: str | Path = FASHION_MNIST, train: bool = True) -> Images:
    """The 60,000 (or 10,000 test) images of Fashion-MNIST (arXiv 1708.07747), or any set in the same four files."""
    folder, part = Path(folder), "train" if train else "t10k"

    def find(stem: str) -> Tensor:
        for path in (folder / stem, folder / f"{stem}.gz"):
            if path.exists():
                return read_idx(path)
        raise BadData(
            f"expected {stem} or {stem}.gz in {folder} (IDX, as MNIST and Fashion-MNIST), or data_batch_1 (CIFAR-10's "
            "Python batches); found neither"
        )

    images, labels = find(f"{part}-images-idx3-ubyte"), find(f"{part}-labels-idx1-ubyte")
    if images.ndim != 3 or labels.ndim != 1:
        raise BadData(
            f"expected images [n, height, width] and labels [n] in {folder}; got {list(images.shape)} and "
            f"{list(labels.shape)}"
        )
    fashion = "fashion" in folder.name.lower()
    classes = FASHION_CLASSES if fashion else tuple(map(str, range(10)))
    return Images("Fashion-MNIST" if fashion else folder.name, images[:, None], labels.long(), classes)


# --- scikit-learn ----------------------------------------------------------------------------------------------------


def digits(train: bool = True) -> Images:
    """scikit-learn's 1,797 handwritten digits 8×8, grey levels 0..16; every fourth one is a test image."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise BadData(f"no data set found: {INSTALL}") from error
    bunch = load_digits()
    images = torch.from_numpy(np.minimum(bunch.images * 16, 255).astype(np.uint8))[:, None]
    test = torch.arange(len(images)) % 4 == 3
    keep = ~test if train else test
    labels = torch.from_numpy(bunch.target).long()
    return Images("digits", images[keep], labels[keep], tuple(map(str, range(10))))


# --- CIFAR-10 --------------------------------------------------------------------------------------------------------


class _Arrays(pickle.Unpickler):
    """Unpickles containers and numpy arrays, and refuses everything else: a pickle can run any code."""

    _ALLOWED = frozenset(
        {
            ("numpy.core.multiarray", "_reconstruct"),
            ("numpy._core.multiarray", "_reconstruct"),
            ("numpy._core.numeric", "_frombuffer"),
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
            ("_codecs", "encode"),
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        if module.startswith("numpy.core") and hasattr(np, "_core"):
            module = module.replace("numpy.core", "numpy._core")
        return getattr(importlib.import_module(module), name)


def cifar10(folder: str | Path, train: bool = True) -> Images:
    """The 50,000 (or 10,000 test) colour images 32×32 of CIFAR-10, from its folder `cifar-10-batches-py`."""
    folder = Path(folder)
    names = [f"data_batch_{i}" for i in range(1, 6)] if train else ["test_batch"]
    parts = [_cifar_batch(folder / name) for name in names]
    images = torch.cat([images for images, _ in parts])
    return Images("CIFAR-10", images, torch.cat([labels for _, labels in parts]), CIFAR10_CLASSES)


def _cifar_batch(path: Path) -> tuple[Tensor, Tensor]:
    try:
        with path.open("rb") as file:
            batch = _Arrays(file, encoding="bytes").load()
    except FileNotFoundError as error:
        raise BadData(f"expected {path}; CIFAR-10's Python version has data_batch_1 to _5 and test_batch") from error
    except Exception as error:  # a damaged pickle may raise anything
        raise BadData(f"cannot read {path} as a CIFAR-10 batch: {error}") from error
    batch = {key.decode() if isinstance(key, bytes) else key: value for key, value in dict(batch).items()}
    data, labels = batch.get("data"), batch.get("labels")
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != 3072:
        got = f"{data.dtype} {list(data.shape)}" if isinstance(data, np.ndarray) else type(data).__name__
        raise BadData(f"expected uint8 [n, 3072] under 'data' in {path}; got {got}")
    if not isinstance(labels, list):
        raise BadData(f"expected a list under 'labels' in {path}; got {type(labels).__name__}")
    return torch.from_numpy(data.reshape(-1, 3, 32, 32).copy()), torch.tensor(labels, dtype=torch.int64)
