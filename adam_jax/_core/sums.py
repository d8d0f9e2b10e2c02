"""Sums that come out the same in any order, and so on any number of devices.

A floating sum depends on the order of its terms, and each way to cut an array has another one. So a
number that a whole leaf shares, a norm or a mean, would differ in its last bit from mesh to mesh,
and a run would not repeat itself. A sum without rounding does not depend on the order: each term is
cut into parts so short that the parts of all terms add up exactly.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from adam_jax._core.leaves import finfo

optimization_barrier: Any = lax.optimization_barrier
"""From the compiler, which then computes a number once, and as it is written. (Some versions of JAX
leave it without types.)"""


def mean(x: Array, axes: tuple[int, ...] | None = None) -> Array:
    """The mean of numbers ≥ 0 over all axes, or, keeping them, over some.

    0, not NaN, where there are no elements.
    """
    for axis in _last_first(x, axes):
        unit, ratio = _in_units(x, axis)
        share = np.asarray(
            1 / max(x.shape[axis], 1), x.dtype
        )  # XLA divides by a constant now in one way, now in another
        x = unit * (sum_of_small(ratio, axis) * share)
    return x.reshape(()) if axes is None else x


def norm(x: Array) -> Array:
    """The Euclidean norm, saturated where it is infinite, of finite numbers; x may be complex."""
    x = jnp.abs(jnp.stack([lax.real(x), lax.imag(x)], -1) if jnp.iscomplexobj(x) else x)
    largest = np.asarray(finfo(x.dtype).max, x.dtype)
    for axis in _last_first(x, None):
        unit, ratio = _in_units(x, axis)
        # None is above 16. Without the limit between them, a compiler may add products that it has
        # not rounded, in one loop only.
        total = sum_of_small(lax.min(ratio * ratio, jnp.full_like(ratio, 16)), axis)
        x = unit * jnp.where(
            total > 0, jnp.sqrt(jnp.where(total > 0, total, 1)), total
        )  # √0 has no derivative
        x = jnp.where(x > largest, largest, x)
    return x.reshape(())


def _last_first(x: Array, axes: tuple[int, ...] | None) -> list[int]:
    """Axis by axis, because few terms need few parts.

    The last leaves next to nothing for the others.
    """
    return sorted(range(x.ndim) if axes is None else axes, reverse=True)


def _in_units(x: Array, axis: int) -> tuple[Array, Array]:
    """Returns a power of two close to the largest number along an axis.

    It also returns all numbers in units of it. That rounds nothing.
    """
    info = finfo(x.dtype)
    largest = lax.stop_gradient(jnp.max(x, axis, keepdims=True, initial=0))
    # Neither it nor its reciprocal may be subnormal.
    held = lax.clamp(
        np.asarray(info.tiny, x.dtype), largest, np.asarray(2.0 ** (info.maxexp - 2), x.dtype)
    )
    unit = lax.reduce_precision(held, exponent_bits=info.nexp, mantissa_bits=0)
    return unit, x * (1 / unit)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def sum_of_small(x: Array, axis: int) -> Array:
    """The sum along an axis, kept, of numbers from 0 to 16 of which the largest is about 1.

    Right to its own last bit.

    Source: Demmel & Nguyen, "Fast Reproducible Floating-Point Summation" (2013), §3.
    """
    info, terms = finfo(x.dtype), x.shape[axis].bit_length()
    # Floats hold fewer digits than integers, and a CPU sums them ten times as fast.
    held, dtype = (
        (info.nmant + 1, x.dtype)
        if terms <= 2 * info.nmant // 3
        else (info.bits - 1, f"int{info.bits}")
    )
    total = jnp.zeros((), x.dtype)
    last = max(held - terms - 4, 1)
    while True:
        # Adding a number whose last bit is 2**-last, and taking it off again, leaves a multiple of
        # that. Were it a constant, XLA would add nothing instead.
        cut = optimization_barrier(np.asarray(1.5 * 2.0 ** (info.nmant - last), x.dtype))
        part = (x + cut) - cut
        x = x - part
        part = (part * np.asarray(2.0**last, x.dtype)).astype(dtype)
        total += jnp.sum(part, axis, keepdims=True).astype(x.dtype) * np.asarray(
            2.0**-last, x.dtype
        )
        if last >= info.nmant + 2 + terms:
            # An integer cannot be NaN: what is left of a NaN still is.
            return total if dtype == x.dtype else total + jnp.sum(x - x, axis, keepdims=True)
        last += max(held - terms + 1, 1)


@sum_of_small.defjvp
def _jvp(axis: int, primals: Any, tangents: Any) -> Any:
    return sum_of_small(primals[0], axis), jnp.sum(tangents[0], axis, keepdims=True)


def all_reduce(x: Array, reduce: Callable[..., Any], like: Any = None) -> Array:
    """A number that all devices share.

    `reduce` is `lax.pmax` or the like, over the axes along which `jax.shard_map` has cut.

    Under `jax.jit` a reduction sees the whole array. Inside `jax.shard_map` it sees a part, and
    what a state holds once must not come out differently on two devices. Along an axis that has not
    cut the array the exchange is superfluous, and of one number.

    Args:
      x: what each device has found in its part.
      reduce: (x, axis name) -> what all devices along that axis have found.
      like: an array that varies from device to device as the result has to: along axes on which it
        varies nothing is exchanged. JAX does not know them under `check_vma=False`.
    """
    varies = () if like is None else _varies_along(like)
    for axis in jax.sharding.get_abstract_mesh().manual_axes:
        x = x if axis in varies else reduce(x, axis)
    return x


def _varies_along(x: Array) -> Any:
    """Returns the axes of `jax.shard_map` along which an array differs between devices.

    It returns those that JAX knows of.
    """
    kind: Any = jax.typeof(x)
    # JAX 0.10 calls them so; JAX from 0.7 on has a set. Before, and under check_vma=False, nothing
    # is known.
    manual = getattr(kind, "manual_axis_type", None)
    return getattr(kind, "vma", ()) if manual is None else manual.varying
