"""Arithmetic on one leaf, real or complex, in float32 or wider."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from adam_jax._core.leaves import as_wide, finfo
from adam_jax._core.tracing import traced_once


def widen(grad: Any) -> Array:
    """Returns a gradient leaf in its computing dtype, saturated where its square overflows.

    If there were no limit (2⁶² ≈ 4.6e18 in float32), one gradient of 1e20 would make ν infinite,
    and the parameter would never move again. The same limited value feeds both moments, so the step
    keeps its bound. An infinity saturates like any large number; NaN stays NaN.
    """
    g = as_wide(grad)
    real = finfo(g.dtype)
    largest = np.asarray(2.0 ** (real.maxexp // 2 - 2), real.dtype)
    if jnp.iscomplexobj(g):
        return lax.complex(
            lax.clamp(-largest, lax.real(g), largest), lax.clamp(-largest, lax.imag(g), largest)
        )
    return lax.clamp(-largest, g, largest)


# What runs once for every leaf is written in lax: jnp's operators cost three times as long to
# trace, and at five hundred leaves tracing is a fifth of the compile time.


def square(x: Array) -> Array:
    """|x|², real."""
    return (
        lax.add(square(lax.real(x)), square(lax.imag(x))) if jnp.iscomplexobj(x) else lax.mul(x, x)
    )


def multiply(x: Array, factor: Array) -> Array:
    """x·factor for a real factor of any float dtype.

    Also where x is complex (strict promotion does not mix the two).
    """
    return _on_parts(lax.mul, x, factor)


def divide(x: Array, divisor: Array) -> Array:
    """x/divisor for a real divisor; complex division would square it, and overflow."""
    return _on_parts(lax.div, x, divisor)


def _on_parts(f: Callable[[Any, Any], Array], x: Array, real: Array) -> Array:
    if jnp.iscomplexobj(x):
        return lax.complex(_on_parts(f, lax.real(x), real), _on_parts(f, lax.imag(x), real))
    return f(x, real if real.dtype == x.dtype else real.astype(x.dtype))


@traced_once(inline=True)
def sqrt(x: Array) -> Array:
    """√x, of derivative 0 where x is 0.

    Infinity, the derivative there, would make NaN of a product with 0. What is divided by √ν + ε is
    0 as well where ν is, so its own derivative is all there is.
    """
    return _sqrt(x)


@jax.custom_jvp
def _sqrt(x: Array) -> Array:
    return lax.sqrt(x)


@_sqrt.defjvp
def _sqrt_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    (root,) = map(lax.sqrt, primals)
    zero = root == 0
    slope = jnp.where(zero, 0, 0.5 / jnp.where(zero, 1, root))
    return root, tangents[0] * slope


@jax.custom_jvp
def atan2(y: Array, x: Array) -> Array:
    """The angle of (x, y), of derivative 0 at the origin, where it has none."""
    return lax.atan2(y, x)


@atan2.defjvp
def _atan2_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    (y, x), (dy, dx) = primals, tangents
    square_of_size = x * x + y * y
    nowhere = square_of_size == 0
    slope = (x * dy - y * dx) / jnp.where(nowhere, 1, square_of_size)
    return atan2(y, x), jnp.where(nowhere, 0, slope)


def lerp(start: Array, end: Array, share: Array) -> Array:
    """Start + share·(end − start).

    What is added is small where `share` is, and so is its rounding error.
    """
    return lax.add(start, multiply(lax.sub(end, start), share))


def make_ema(decay: float | Array, keep: Array, rate: Array) -> Callable[[Array, Array], Array]:
    """Returns the step of an exponential moving average.

    The function is (average, x) -> decay·average + (1 − decay)·x, in the form whose rounding errors
    do not grow.

    From the average towards x where little of x is taken. From x towards the average where little
    of the average is kept: with a decay of 0 that is x itself, where the other form leaves the last
    bits of an average that may be far larger.

    Args:
      decay: the decay as it was given; for a traced one both forms are computed, and one is
        selected.
      keep: the decay as a scalar array.
      rate: 1 − decay, likewise.
    """

    def little_taken(average: Array, x: Array) -> Array:
        return lerp(average, x, rate)

    def little_kept(average: Array, x: Array) -> Array:
        return lerp(x, average, keep)

    if isinstance(decay, float):
        return little_taken if decay >= 0.5 else little_kept
    return lambda average, x: jnp.where(
        keep < 0.5, little_kept(average, x), little_taken(average, x)
    )
