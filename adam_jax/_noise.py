"""Random bits without a key: a hash of what they are for, so that a run repeats itself on any number of devices."""

from __future__ import annotations

import numpy as np
from jax import Array, lax

_FIRST, _SECOND = 0x7FEB352D, 0x846CA68B


def noise(seed: int, leaf: int, count: Array, shape: tuple[int, ...]) -> Array:
    """32 random bits for each element of an array.

    `jax.random.bits` would do, with a key to thread and several times the arithmetic. The bits depend on the position in the
    whole array, which under `jax.jit` does not change with the sharding. Inside `jax.shard_map` and `jax.vmap` the whole array
    is the part that the function sees.

    Args:
      seed: any integer.
      leaf: which array of a tree it is.
      count: the step, an int32 scalar.
      shape: that of the array.

    Returns:
      uint32, of that shape. Any of the bits are as good as the others.

    Source: the mixing function, two multiplications and three shifts, is lowbias32 of C. Wellons' hash prospector.
    """
    salt = np.uint32(_mixed(_mixed(int(seed) & 0xFFFFFFFF) + leaf & 0xFFFFFFFF))
    key = _mix(lax.bitcast_convert_type(count, np.uint32) + salt)
    # First the row, with the key, which makes one operand of two: a TPU's pass over memory has 16 at most.
    axes = range(len(shape))
    rows = _mix(_index(shape, axes[:-1]) + key)
    return _mix(rows ^ _index(shape, axes[-1:]))


def rotate(bits: Array, by: int) -> Array:
    """The same bits from another one on: one hash serves several moments, which look at different ends of it."""
    return bits if by == 0 else (bits << np.uint32(by)) | (bits >> np.uint32(32 - by))


def _index(shape: tuple[int, ...], axes: range) -> Array:
    """The row-major index of every element along some axes, modulo 2³²."""
    index = lax.full(shape, np.uint32(0))
    stride = 1
    for axis in reversed(axes):
        index += lax.broadcasted_iota(np.uint32, shape, axis) * np.uint32(stride % 2**32)
        stride *= shape[axis]
    return index


def _mix(x: Array) -> Array:
    x = (x ^ (x >> np.uint32(16))) * np.uint32(_FIRST)
    x = (x ^ (x >> np.uint32(15))) * np.uint32(_SECOND)
    return x ^ (x >> np.uint32(16))


def _mixed(x: int) -> int:
    """`_mix` of a Python number."""
    x = (x ^ x >> 16) * _FIRST & 0xFFFFFFFF
    x = (x ^ x >> 15) * _SECOND & 0xFFFFFFFF
    return x ^ x >> 16
