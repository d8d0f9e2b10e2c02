"""Random bits without a key to carry.

A hash of what the bits are for, so that a run repeats itself on any number of devices.

A stream of bits is named by the stage that draws it, by the leaf's path in the whole tree, and by a
seed. The name is hashed to 64 bits before the step is added. Short salts, or sums of small numbers,
are not enough. In version 0.1.0 the moments at one step and the parameters at the next drew the
same words, and parameters drifted outward on noise that should not move them.
"""

from __future__ import annotations

import functools
import hashlib
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.core import Tracer

from adam_jax._core.errors import expect_integer
from adam_jax._core.tracing import traced_once

_FIRST, _SECOND = np.uint32(0x7FEB352D), np.uint32(0x846CA68B)


WORD = 2**32
"""How many values a uint32 has."""


class StepBits:
    """The random bits that a stage draws in one step.

    A stream is named by 64 bits: a hash of the stage's stream and the leaf's path, hashed once more
    with the seed. The step is hashed too before it is added to them, so that no stream is another
    stream some steps later. The bits of a leaf are made once: moments of one leaf share them, and
    read different ends of them (see `rotate`).

    Each leaf has an array of its own for its name. They were columns of one array once, and XLA
    compiled a kernel for every leaf, because each read another column. Now all leaves of one shape
    share a kernel, which takes the name as an operand.
    """

    def __init__(self, stream: str, count: Array) -> None:
        """Names the stage and the step.

        Args:
          stream: the name of the stage's stream, as `Context.stream` gives it.
          count: the step, an int32 scalar.
        """
        self._stream, self._count = stream, count
        self._made: dict[Any, Array] = {}

    def of(self, path: str, shape: tuple[int, ...], seed: Any, turn: int = 0) -> Array:
        """Returns the bits of a leaf: uint32, of its shape.

        Args:
          path: the leaf's path in the whole tree of parameters.
          shape: its shape.
          seed: an integer from 0 to 2³² − 1, or an integer scalar array.
          turn: the bit at which they begin: see `Slot`.
        """
        key = path, shape, id(seed) if isinstance(seed, Array) else seed
        if key not in self._made:
            self._made[key] = random_bits(self._words(path, seed), shape)
        return rotate(self._made[key], turn)

    def _words(self, path: str, seed: Any) -> Array:
        digest = hashlib.blake2b(repr((self._stream, path)).encode(), digest_size=8).digest()
        name = np.frombuffer(digest, "<u4").astype(np.uint32)
        word = seed.astype(np.uint32) if isinstance(seed, Array) else np.array([seed], np.uint32)
        return _mix(name + word) + self._steps  # type: ignore[no-any-return]

    @functools.cached_property
    def _steps(self) -> Array:
        step = _mix(lax.bitcast_convert_type(self._count, np.uint32))
        return jnp.stack([step, _mix(step + _FIRST)])


@traced_once("shape")
def random_bits(words: Array, shape: tuple[int, ...]) -> Array:
    """Returns 32 random bits for each element of an array.

    `jax.random.bits` would need several times the arithmetic. The bits depend on the position in
    the whole array, which under `jax.jit` does not change with the sharding. Inside `jax.shard_map`
    and `jax.vmap` the whole array is the part that the function sees.

    Args:
      words: what the bits are for, hashed: uint32, of shape (2,).
      shape: the shape of the array.

    Returns:
      uint32, of that shape. Any of the bits are as good as the others.

    Source: the mixing function, two multiplications and three shifts, is lowbias32 of C. Wellons'
    hash prospector.
    """
    first, second = (lax.index_in_dim(words, i, keepdims=False) for i in (0, 1))
    *rows, column = position(shape)
    # The second word stands behind the hash: without it, arrays whose first words are close would
    # share rows.
    bits: Array = _mix(rows[0] + first if rows else first) + second
    for index in rows[1:]:
        bits = _mix(index + bits) + second
    return _mix(bits ^ column)  # type: ignore[no-any-return]


def rotate(bits: Array, by: int) -> Array:
    """The same bits, beginning at another one.

    The moments of one stage share a hash, and read different ends of it.
    """
    return bits if by == 0 else (bits << np.uint32(by)) | (bits >> np.uint32(32 - by))


def position(shape: tuple[int, ...], word: int = WORD) -> list[Array]:
    """The position of every element, as one or more words of less than `word`.

    No two elements have the same words.

    The last word is the index along the last axis. The words before it are row-major indices along
    the other axes, as many axes together as fit in a word; an axis that is longer than a word has
    two words.
    """
    words: list[Array] = []
    together, stride = None, 1
    for axis in reversed(range(len(shape))):
        size = shape[axis]
        if together is not None and stride * size > word:
            words.append(together)
            together, stride = None, 1
        if size > word:
            words += _long_axis(shape, axis, word)
            continue
        index = lax.broadcasted_iota(np.uint32, shape, axis)
        if axis == len(shape) - 1:
            words.append(index)
            continue
        together = index if together is None else together + index * np.uint32(stride)
        stride *= size
    words += [] if together is None else [together]
    return words[::-1] or [lax.full(shape, np.uint32(0))]


def _long_axis(shape: tuple[int, ...], axis: int, word: int) -> list[Array]:
    """The two words of an index along an axis that is longer than `word`, the lower one first."""
    size = shape[axis]
    grid = (-(-size // word), word)
    words = (lax.broadcasted_iota(np.uint32, grid, i).reshape(-1)[:size] for i in (1, 0))
    return [lax.broadcast_in_dim(index, shape, (axis,)) for index in words]


def as_seed(name: str, seed: Any) -> Any:
    """Returns a seed as a Python integer, or as the traced integer scalar that it is.

    Raises:
      TypeError: if the seed is neither an integer nor an integer scalar array.
      ValueError: if the integer does not fit into a uint32. It would be taken for another one.
    """
    if isinstance(seed, Array) and (seed.ndim or not jnp.issubdtype(seed.dtype, jnp.integer)):
        raise TypeError(
            f"{name}: found an array of {seed.dtype} and shape {seed.shape}; expected an integer "
            "scalar. Pass an integer, for example seed=0, and not a key of jax.random."
        )
    if isinstance(seed, Tracer):
        return seed
    seed = int(seed) if isinstance(seed, Array) else seed
    expect_integer(name, seed, least=0)
    if seed >= WORD:
        raise ValueError(f"{name}: found {seed}; expected less than 2^32.")
    return int(seed)


def _mix(x: Any) -> Any:
    x = (x ^ (x >> np.uint32(16))) * _FIRST
    x = (x ^ (x >> np.uint32(15))) * _SECOND
    return x ^ (x >> np.uint32(16))
