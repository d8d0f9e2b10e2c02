"""Sums that come out the same in any order, and so on any number of devices.

A floating sum depends on the order of its terms, and each way to cut an array has another one. So a
number that a whole leaf shares, a norm or a mean, would differ in its last bit from mesh to mesh,
and a run would not repeat itself. A sum without rounding does not depend on the order: each term is
cut into parts so short that the parts of all terms add up exactly.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from adam_jax._core.arithmetic import square
from adam_jax._core.leaves import as_wide, finfo, scalar_dtype, takes_part

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


def sums_of_squares(tree: Any) -> list[Array]:
    """The sum of |x|² over each leaf that takes part, in the dtype of the tree's scalars.

    Floating sums, whose last digits depend on the order.
    """
    wide = scalar_dtype(tree)
    leaves = filter(takes_part, jax.tree.leaves(tree))
    return [jnp.sum(square(as_wide(leaf))).astype(wide) for leaf in leaves]


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


class ManualAxes(NamedTuple):
    """What manual mesh axes mean, those of `jax.shard_map` and `jax.pmap`.

    Attributes:
      shared: axes along which devices train the same parameters: what they decide is one decision.
      independent: axes along which each device trains parameters of its own.
    """

    shared: tuple[str, ...] = ()
    independent: tuple[str, ...] = ()


_NOTHING = ManualAxes()
_TOLD: contextvars.ContextVar[ManualAxes] = contextvars.ContextVar("_TOLD", default=_NOTHING)


@contextlib.contextmanager
def told(axes: ManualAxes) -> Iterator[None]:
    """While a step is traced, says what manual axes mean; those that are known already stay known.

    It is no field of `Context`, because that does not pass through transformations of others.
    """
    known = _TOLD.get()
    reset = _TOLD.set(ManualAxes(*(a + b for a, b in zip(known, axes, strict=True))))
    try:
        yield
    finally:
        _TOLD.reset(reset)


def agreeing_axes(x: Any, like: Any, caller: str) -> tuple[str, ...]:
    """Returns the manual axes along which devices have to agree on a number of the whole run.

    Under `jax.jit` a number is of the whole arrays. Inside `jax.shard_map` it is of a device's
    part, and what a state holds once must not come out differently on two devices. But members of a
    population are not one run, and JAX does not know which is which.

    Args:
      x: what the device has found.
      like: what the state holds in its place. Where JAX knows that it differs from device to
        device, there are several runs.
      caller: the function that the user called.

    Raises:
      ValueError: where devices may have found different numbers, and nobody has said whether they
        have to agree.
    """
    axes = []
    for axis in _manual_axes():
        known = axis in _varies_along(lax.axis_index(axis))
        if axis in _TOLD.get().independent or (known and axis not in _varies_along(x)):
            continue
        if axis in _TOLD.get().shared:
            axes.append(axis)
        elif not (known and axis in _varies_along(like)):
            raise ValueError(_unknown(axis, caller))
    return tuple(axes)


def scale_axes(codes: Any, scale: Any) -> tuple[str, ...]:
    """Returns the manual axes along which devices hold parts of what shares a scale.

    Where JAX knows what differs from device to device, the types say so: codes that differ and have
    one scale are parts of a row.

    Raises:
      ValueError: where JAX does not know, and nobody has said it.
    """
    axes = []
    for axis in _manual_axes():
        if axis in _TOLD.get().independent:
            continue
        if axis in _varies_along(lax.axis_index(axis)):
            if axis in _varies_along(codes) and axis not in _varies_along(scale):
                axes.append(axis)
        elif axis in _TOLD.get().shared:
            axes.append(axis)
        else:
            raise ValueError(_unknown(axis, "storage"))
    return tuple(axes)


def cut_axes(x: Any, caller: str) -> tuple[str, ...]:
    """Returns the manual axes along which devices hold parts of one leaf.

    Args:
      x: what a device has found in its part.
      caller: the function that the user called.

    Raises:
      ValueError: where JAX does not know whether devices hold parts of the leaf or all of it, and
        where nobody has said whether they are one run.
    """
    axes = []
    for axis in _manual_axes():
        if axis in _TOLD.get().independent:
            continue
        if axis not in _varies_along(lax.axis_index(axis)):
            raise ValueError(
                f"{caller}: found the manual axis {axis!r} of jax.pmap, or of jax.shard_map with "
                "check_vma=False; expected to know which leaves are cut along it. Use "
                "jax.shard_map with check_vma=True, or limit the gradients before `update`."
            )
        if axis in _varies_along(x):
            if axis not in _TOLD.get().shared:
                raise ValueError(_unknown(axis, caller))
            axes.append(axis)
    return tuple(axes)


def _unknown(axis: str, caller: str) -> str:
    return (
        f"{caller}: found the manual axis {axis!r} of jax.shard_map or jax.pmap, along which "
        f"gradients may differ; expected to know whether its devices are one run. Wrap the whole "
        f"optimizer: manual_axes(tx, shared={axis!r}) if all of them train the same parameters, "
        f"whole or cut; manual_axes(tx, independent={axis!r}) if each trains a member of a "
        "population. (With jax.pmap, give the axis a name: axis_name=.)"
    )


def all_reduce(x: Array, reduce: Callable[..., Any], axes: tuple[str, ...]) -> Array:
    """A number that the devices along some axes share.

    Args:
      x: what each device has found in its part.
      reduce: (x, axis name) -> what all devices along that axis have found, `lax.pmax` or the like.
      axes: the axes.
    """
    for axis in axes:
        x = reduce(x, axis)
    return x


def vary_along(x: Any, axes: tuple[str, ...]) -> Any:
    """Returns an array whose type says that it may differ along manual axes.

    A choice between the array and itself, by something that differs: JAX has had several names for
    the conversion.
    """
    for axis in axes:
        index = lax.axis_index(axis)
        if axis in _varies_along(index) and axis not in _varies_along(x):
            x = jnp.where(index >= 0, x, x)
    return x


def vary_as(x: Any, like: Any) -> Any:
    """Returns an array whose type differs along the manual axes along which another one's does."""
    return vary_along(x, tuple(_varies_along(like)))


def independent_axes(axes: ManualAxes) -> tuple[str, ...]:
    """Returns those of the independent axes that are manual now."""
    return tuple(axis for axis in _manual_axes() if axis in axes.independent)


def _manual_axes() -> tuple[str, ...]:
    return tuple(jax.sharding.get_abstract_mesh().manual_axes)


def _varies_along(x: Any) -> Any:
    """Returns the axes of `jax.shard_map` along which an array differs between devices.

    It returns those that JAX knows of.
    """
    kind: Any = jax.typeof(x)
    # JAX 0.10 calls them so; JAX from 0.7 on has a set. Before, and under check_vma=False, nothing
    # is known.
    manual = getattr(kind, "manual_axis_type", None)
    return getattr(kind, "vma", ()) if manual is None else manual.varying
