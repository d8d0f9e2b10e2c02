"""Numbers in fewer bits: rounding to a narrower float, and codes that count in ratios.

Every operation is exact, but for one addition and the rounding that is meant, so every backend
makes the same numbers.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from adam_jax._core.leaves import PyTree, finfo
from adam_jax._core.sums import all_reduce, scale_axes
from adam_jax._core.tracing import traced_once
from adam_jax.storage.scales import UNKNOWN, largest_along

HALF = np.uint32(2**31)
"""The random bits that round to nearest, halves up."""

_ONE = np.int32(0x3F800000)
"""The bits of 1.0: what the bits of a number exceed them by is its logarithm, straight between
powers of two."""


def bits_of(x: Array) -> Array:
    """Returns the bits of float32 numbers, as int32."""
    return lax.bitcast_convert_type(x, np.int32)


def float_of(bits: Array) -> Array:
    """Returns the float32 numbers that have these bits."""
    return lax.bitcast_convert_type(bits, np.float32)


def _threshold(random: Any, dropped: int) -> Any:
    """As many random bits as are dropped.

    Added to the others, they carry into them as often as is unbiased.
    """
    return (random >> np.uint32(32 - dropped)).astype(np.int32)


def undifferentiable(tree: PyTree, message: str) -> PyTree:
    """Returns a tree of arrays as it is, and refuses derivatives through it when they are traced.

    What is rounded passes through here. JAX would take integers, and bits that are read as
    integers, for constants: the rest of the derivative would be a number, and wrong. One call takes
    all leaves, because each call costs time to trace.

    Args:
      tree: arrays that are to be rounded.
      message: what the error says.

    Raises:
      ValueError: where a derivative is taken with respect to something on which one of the arrays
        depends.
    """
    leaves, structure = jax.tree.flatten(tree)
    return jax.tree.unflatten(structure, _refusing(message)(*leaves)) if leaves else tree


@functools.cache
def _refusing(message: str) -> Callable[..., Any]:
    @jax.custom_jvp
    def same(*leaves: Any) -> tuple[Any, ...]:
        return leaves

    @same.defjvp
    def refuse(primals: Any, tangents: Any) -> Any:
        raise ValueError(message)

    return same


@traced_once("dtype", "positive")
def to_float(x: Array, dtype: Any, random: Any, positive: bool = False) -> Array:
    """Rounds to a floating dtype, saturating; unbiased in all of its range, subnormal numbers too.

    What is below 2⁻¹⁴ of the smallest number is 0, and so is a subnormal bfloat16 on backends that
    flush those of float32.

    Args:
      x: real.
      dtype: the dtype.
      random: 32 random bits for each element, or `HALF`.
      positive: whether what is above 0 has to stay so, in a dtype of a smaller range than
        float32's.

    Returns:
      `x` in that dtype; NaN stays NaN.
    """
    info = finfo(dtype)
    largest = np.asarray(info.max, x.dtype)
    x = lax.clamp(-largest, x, largest)
    dropped = 23 - info.nmant
    if dropped <= 0:
        return x.astype(dtype)
    x = x.astype(np.float32)
    kept = np.int32(-(2**dropped))
    if info.minexp == finfo(np.float32).minexp:
        rounded = float_of(bits_of(x) + _threshold(random, dropped) & kept)
    else:
        tiny = np.float32(info.tiny)
        rounded = (
            _from_log(
                float_of(bits_of(_to_log(lax.abs(x) / tiny)) + _threshold(random, dropped) & kept)
            )
            * tiny
        )
        if positive:
            rounded = jnp.where(
                x > 0, lax.max(rounded, jnp.full_like(rounded, info.smallest_subnormal)), rounded
            )
        rounded = lax.min(jnp.where(x < 0, -rounded, rounded), largest.astype(np.float32))
    return jnp.where(jnp.isnan(x), x, rounded).astype(dtype)


def small_float(k: Array) -> Array:
    """Returns an integer in [0, 2²³) as a float, whose lowest bits it becomes.

    It is on its way to be stored as an integer of fewer bits.

    A conversion would do, but the TPU's compiler can make two passes over memory of a step that
    stores what was a float's bits.
    """
    return float_of(k | np.int32(0x4B000000)) - np.float32(2**23)


def _to_log(y: Array) -> Array:
    """From y ≥ 0 to t ≥ 1 whose bits step evenly.

    Y + 1 below 1, where a small float has its subnormal numbers, 2y above.
    """
    return lax.max(y + np.float32(1), y * np.float32(2))


def _from_log(t: Array) -> Array:
    return lax.min(t - np.float32(1), t * np.float32(0.5))


_FRACTION = 3
"""The number of bits that divide a fine octave."""

_COARSER = 3
"""Coarse octaves have an eighth of the codes of fine ones."""

_OCTAVES = 127
"""How many of them a float32 has above 1: no code may stand for more, or it would stand for
infinity."""


@dataclasses.dataclass(frozen=True)
class Codec:
    """Codes of one kind. See `adam_jax.storage.Codes` for what they can hold.

    With y = |x|/unit and t = max(y + 1, 2y), b = bits(t) − bits(1) is a logarithm of y that is a
    straight line between powers of two. It is the code with more digits. What lies above the fine
    octaves is divided by 8, and then all but 3 bits of an octave are rounded off.

    Attributes:
      signed: whether a bit is a sign.
    """

    signed: bool

    @property
    def dtype(self) -> Any:
        """That of the codes."""
        return np.dtype(np.int8 if self.signed else np.uint8)

    @property
    def fine(self) -> int:
        """The number of fine octaves: half of them below in √ν, whose range then is that of μ."""
        return 14 if self.signed else 28

    @property
    def widest(self) -> int:
        """The exponent that stands in for an unknown one.

        √ν reaches no less far than μ, or steps would be too long.

        μ lies between 2⁻¹⁰⁷ and 2¹⁹ and ν between 2⁻⁸⁶ and 2⁴⁰: of gradients from 4e-12 to 5e6, at
        the usual decays.
        """
        return -107 if self.signed else -86

    def _layout(self, unit: Any) -> tuple[Array, Array]:
        """The exponent of the unit, and the code at which coarse octaves begin."""
        known = unit != UNKNOWN
        return (
            jnp.where(known, unit, np.int32(self.widest)),
            jnp.where(known, np.int32(self.fine << _FRACTION), np.int32(0)),
        )

    def _even(self, size: Array, coarse: Array) -> Array:
        """Codes as they would be, were the coarse octaves as fine as the others."""
        return jnp.maximum(size, (size - coarse << np.int32(_COARSER)) + coarse)

    # Inline: behind a call, the TPU's compiler made two passes of a step with `compensate`.
    @traced_once("self", inline=True)
    def widen(self, code: Array, unit: Any) -> Array:
        """What codes stand for, in float32."""
        exponent, coarse = self._layout(unit)
        k = code.astype(np.int32)
        even = self._even(lax.abs(k), coarse)
        size = _from_log(float_of((even << np.int32(23 - _FRACTION)) + _ONE)) * float_of(
            exponent + 127 << 23
        )
        return jnp.where(k < 0, -size, size) if self.signed else size

    @traced_once("self")
    def narrow(self, x: Array, unit: Any, random: Any) -> Array:
        """Codes of float32 numbers, rounded by random bits or `HALF`."""
        exponent, coarse = self._layout(unit)
        dropped = 23 - _FRACTION
        # The sign of the factor says that no octave is fine: a second scalar would be one operand
        # too many for a TPU's pass.
        sign = jnp.where(coarse == 0, np.int32(-(2**31)), np.int32(0))
        y = lax.abs(x) * float_of((127 - exponent << 23) | sign)
        start = (self.fine << 23) - (self.fine << 23 - _COARSER)
        b = bits_of(_to_log(lax.abs(y))) - _ONE
        b = lax.min(b, jnp.full_like(b, _OCTAVES << 23))
        b = lax.min(
            b, (b >> np.int32(_COARSER)) + (~(bits_of(y) >> np.int32(31)) & np.int32(start))
        )
        k = b + _threshold(random, dropped) >> np.int32(dropped)
        k = lax.min(k, jnp.full_like(k, np.iinfo(self.dtype).max))
        k = (
            jnp.where(jnp.isnan(x), 0, k)
            if self.signed
            else jnp.where(x > 0, lax.max(k, jnp.ones_like(k)), 0)
        )
        size = small_float(k)
        return (jnp.where(x < 0, -size, size) if self.signed else size).astype(self.dtype)

    def next_exponent(self, code: Array, unit: Any) -> Any:
        """Returns the exponents of the units in which the next step encodes.

        They have the shape of `unit`, which is 1 where codes share one.

        From the codes and not from the moments: a CPU would compute those once more.
        """
        return self._next_exponent(code, unit, scale_axes(code, unit))

    # What is traced once is traced for all that it depends on: the axes are an argument.
    @traced_once("self", "axes")
    def _next_exponent(self, code: Array, unit: Any, axes: tuple[str, ...]) -> Any:
        exponent, coarse = self._layout(unit)
        largest = largest_along(lax.abs(code.astype(np.float32)), unit)
        largest = all_reduce(largest, lax.pmax, axes).astype(np.int32)
        octave = exponent + (self._even(largest, coarse) >> _FRACTION)
        return jnp.where(largest == 0, UNKNOWN, self._clear(octave))

    @traced_once("self")
    def top(self, unit: Any) -> Array:
        """The largest number that the codes of a unit can be, float32, of its shape."""
        last = int(np.iinfo(self.dtype).max)
        return self.widen(
            jnp.where(unit == UNKNOWN, np.int32(min(_OCTAVES, last)), np.int32(last)), unit
        )

    def _clear(self, octave: Any) -> Any:
        """Returns the exponent of a unit such that no factor overflows.

        With it code octave `octave` is the last but one of the fine ones.
        """
        return jnp.clip(octave - (self.fine - 2), -126, 126)

    def exponent(self, largest: Array) -> Any:
        """The exponents for codes of numbers, float32, of which the largest size is known."""
        octave = (bits_of(largest) >> np.int32(23)) - np.int32(126)
        return jnp.where(largest == 0, UNKNOWN, self._clear(octave))

    def first_exponent(self, value: float) -> Any:
        """The exponent for codes of a number that is known beforehand."""
        if value == 0:
            return UNKNOWN
        return np.int32(np.clip(int(np.frexp(np.float32(value))[1]) - (self.fine - 2), -126, 126))
