"""Random bits without a key to carry.

A hash of what the bits are for, so that a run repeats itself on any number of devices.

A stream of bits is named by the stage that draws it, by the leaf's path in the whole tree, and by a
seed. The name is hashed to 64 bits before the step is added. Short salts, or sums of small numbers,
are not enough. In version 0.1.0 the moments at one step and the parameters at the next drew the
same words, and parameters drifted outward on noise that should not move them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.core import Tracer

from adam_jax._core.errors import expect_integer

_FIRST, _SECOND = np.uint32(0x7FEB352D), np.uint32(0x846CA68B)


WORD = 2**32
"""How many values a uint32 has."""


def stream_keys(stream: str, paths: Sequence[str], seed: Any, count: Array) -> Array:
    """Returns the keys of one step, one for each leaf that a stage rounds.

    No stream is another stream some steps later. Two keys may be equal at steps t and t' by chance,
    as random numbers may. They are not equal for all pairs of steps at one distance, because the
    step is hashed between the two words of a name.

    Args:
      stream: the name of the stage's stream, as `Context.stream` gives it.
      paths: the paths of the leaves in the whole tree of parameters.
      seed: an integer from 0 to 2³² − 1, or an integer scalar array.
      count: the step, an int32 scalar.

    Returns:
      uint32, of shape (leaves,).
    """
    digests = [
        hashlib.blake2b(repr((stream, path)).encode(), digest_size=8).digest() for path in paths
    ]
    first, second = np.frombuffer(b"".join(digests), "<u4").reshape(-1, 2).T.astype(np.uint32)
    word = seed.astype(np.uint32) if isinstance(seed, Array) else np.uint32(seed)
    steps = lax.bitcast_convert_type(count, np.uint32)
    keys: Array = _mix(_mix(steps + _mix(first + word)) ^ second)
    return keys


def random_bits(key: Array, shape: tuple[int, ...]) -> Array:
    """Returns 32 random bits for each element of an array.

    `jax.random.bits` would need several times the arithmetic. The bits depend on the position in
    the whole array, which under `jax.jit` does not change with the sharding. Inside `jax.shard_map`
    and `jax.vmap` the whole array is the part that the function sees.

    Args:
      key: a uint32 scalar, one of `stream_keys`.
      shape: the shape of the array.

    Returns:
      uint32, of that shape. Any of the bits are as good as the others.

    Source: the mixing function, two multiplications and three shifts, is lowbias32 of C. Wellons'
    hash prospector.
    """
    *rows, column = position(shape)
    # The key once more behind the hash: without it, arrays whose keys are close would share rows.
    bits: Array = _mix(rows[0] + key if rows else key) + key
    for index in rows[1:]:
        bits = _mix(index + bits) + key
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
