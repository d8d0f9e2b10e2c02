"""The images that the demo trains on."""

from __future__ import annotations

import hashlib
import zipfile
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

ARRAYS = ("x_train", "y_train", "x_test", "y_test")

# Pixels: larger images are halved until they fit, so that a sweep over MNIST takes a minute or two
LARGEST = 16


class Data(NamedTuple):
    """Images and labels.

    Images are float32 of shape (n, height, width, channels), none in x_train beyond ±1. Labels are
    int32 of shape (n,), from 0.
    """

    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray


def digits() -> Data:
    """The 1,797 digits of scikit-learn, 8×8 pixels, a fifth of them for the test.

    The same fifth whatever the seed.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    train, test = order[360:], order[:360]
    return check(
        digits.images[train], digits.target[train], digits.images[test], digits.target[test]
    )


def read(path: Path) -> Data:
    """The four arrays of an .npz file.

    Raises:
      ValueError: if there is no such file, or it cannot be read, or an array is missing, or `check`
        refuses one.
    """
    try:
        with path.open("rb") as opened:
            if not zipfile.is_zipfile(opened):
                raise ValueError("it is not an .npz file, which numpy.savez writes")
        with np.load(path, allow_pickle=False) as file:
            missing = [name for name in ARRAYS if name not in file.files]
            if missing:
                raise ValueError(
                    f"found no array {', '.join(missing)}; expected {', '.join(ARRAYS)}"
                )
            arrays = [file[name] for name in ARRAYS]
        return check(*arrays)
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"--data: {path}: {getattr(error, 'strerror', None) or error}") from error


def fingerprint(data: Data) -> str:
    """Tells these images and labels from others."""
    found = hashlib.sha256()
    for array in data:
        found.update(f"{array.shape}".encode() + array.tobytes())
    return found.hexdigest()[:16]


def check(x_train: np.ndarray, y_train: np.ndarray, x_test: np.ndarray, y_test: np.ndarray) -> Data:
    """Images of any numeric dtype and integer labels: checked, scaled and shuffled.

    Raises:
      ValueError: naming the array that does not fit, what was found in it and what was expected.
    """
    for split, images, labels in (("train", x_train, y_train), ("test", x_test, y_test)):
        _check_images(f"x_{split}", images)
        _check_labels(f"y_{split}", labels)
        if len(images) != len(labels):
            raise ValueError(
                f"found {len(images)} images in x_{split} but {len(labels)} labels in y_{split}"
            )
    if x_test.shape[1:] != x_train.shape[1:]:
        raise ValueError(
            f"x_test: found images of shape {x_test.shape[1:]}; expected {x_train.shape[1:]}, as "
            "in x_train"
        )
    known, top = np.unique(y_train), int(y_train.max())
    if len(known) < 2 or top != len(known) - 1:
        raise ValueError(
            f"y_train: found {len(known)} classes, the highest {top}; expected two or more, 0 to k "
            "- 1, none empty"
        )
    if strange := np.setdiff1d(y_test, known).tolist():
        raise ValueError(
            f"y_test: found label {strange[0]}, which is not in y_train; expected 0 to {top}"
        )
    scale = (
        np.abs(x_train.astype(np.promote_types(x_train.dtype, np.float32), copy=False)).max() or 1
    )
    # Shuffled: a file may be sorted by label, and its first images must be a fair sample.
    train, test = (
        np.random.default_rng(0).permutation(len(labels)) for labels in (y_train, y_test)
    )
    return Data(
        _scaled(x_train, scale)[train],
        y_train[train].astype(np.int32),
        _scaled(x_test, scale)[test],
        y_test[test].astype(np.int32),
    )


def _check_images(name: str, images: np.ndarray) -> None:
    if images.dtype.kind not in "buif":
        raise ValueError(f"{name}: found dtype {images.dtype}; expected numbers")
    if images.ndim not in (3, 4) or 0 in images.shape or min(images.shape[1:3]) < 4:
        raise ValueError(
            f"{name}: found shape {images.shape}; expected (n, height, width) or (n, height, "
            "width, channels), one image or more, of 4x4 pixels or more"
        )
    if not np.isfinite(images).all():
        raise ValueError(f"{name}: found pixels that are NaN or infinite; expected finite numbers")


def _check_labels(name: str, labels: np.ndarray) -> None:
    if labels.dtype.kind not in "ui":
        raise ValueError(f"{name}: found dtype {labels.dtype}; expected integer labels")
    if labels.ndim != 1 or not len(labels):
        raise ValueError(
            f"{name}: found shape {labels.shape}; expected (n,), one label for each image"
        )
    if labels.min() < 0:
        raise ValueError(f"{name}: found label {labels.min()}; expected labels from 0")


def _scaled(images: np.ndarray, scale: Any) -> np.ndarray:
    images = np.divide(images, scale, dtype=np.promote_types(images.dtype, np.float32)).astype(
        np.float32
    )
    images = images if images.ndim == 4 else images[..., None]
    while min(images.shape[1:3]) > LARGEST:
        images = halve(images)
    return images


def halve(images: Any) -> Any:
    """The mean of every 2×2 pixels; of an odd number of rows or columns the last is dropped."""
    n, height, width, channels = images.shape
    even = images[:, : height // 2 * 2, : width // 2 * 2]
    return even.reshape(n, height // 2, 2, width // 2, 2, channels).mean((2, 4))
