"""Small images, small networks and a keeper of checkpoints, for short runs of the demo."""

import re

import flax.linen as nn
import numpy as np

IMAGES = {
    # Two classes of 6×5 pixels, bright on the left or on the right, in the order of their labels as
    # files often are.
    f"{kind}_{split}": array
    for split, n in (("train", 80), ("test", 20))
    for kind, array in (
        (
            "x",
            np.random.default_rng(n).integers(0, 100, (n, 6, 5))
            + 150 * (np.arange(5) < 2) * (np.arange(n) < n // 2)[:, None, None],
        ),
        ("y", (np.arange(n) >= n // 2).astype(np.int64)),
    )
}


def save(path, **changed):
    """Writes IMAGES with some arrays replaced, or left out where None, and returns the path."""
    np.savez(
        path, **{name: array for name, array in (IMAGES | changed).items() if array is not None}
    )
    return path


class Dense(nn.Module):
    """One dense layer instead of the network, which takes seconds to compile for each optimizer."""

    classes: int

    @nn.compact
    def __call__(self, images):
        return nn.Dense(self.classes)(images.reshape(len(images), -1))


def table(out):
    """The rows of the table, by optimizer."""
    rows = re.split(r"\n\n", out)[1].splitlines()[1:]
    return {cells[0]: cells[1:] for cells in map(str.split, rows)}


class Hidden(nn.Module):
    classes: int

    @nn.compact
    def __call__(self, images):
        return nn.Dense(self.classes)(nn.relu(nn.Dense(256)(images.reshape(len(images), -1))))


class Kept:
    """Keeps what the last save was given, and hands all on to another keeper if there is one."""

    def __init__(self, inner=None):
        self.inner = inner
        self.progress = inner.progress if inner else None

    def load(self, like):
        return self.inner.load(like)

    def save(self, carry, progress, last):
        self.carry = carry
        if self.inner:
            self.inner.save(carry, progress, last)
