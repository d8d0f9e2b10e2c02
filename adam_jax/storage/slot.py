"""`MomentSlot`: a moment that a stage keeps, and how it is stored and read."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from adam_jax._core.leaves import (
    PyTree,
    as_wide,
    finfo,
    like_params,
    narrower_than_float32,
    real_dtype,
    takes_part,
    wide_dtype,
)
from adam_jax._core.paths import names
from adam_jax._core.slots import Slot
from adam_jax.storage.codec import HALF, Codec, to_float, undifferentiable
from adam_jax.storage.formats import Codes, Float, Form
from adam_jax.storage.random_bits import random_bits, rotate, stream_keys
from adam_jax.storage.scales import SHORTEST, Scales, is_code, pack, scale_key, unpack

_REMEDY = (
    "Carry a run over with convert_state(state, from_tx, to_tx, params), or pass the state that "
    "`init` of this very transformation made."
)


LARGEST = 2.0**125
"""More than float32 moments can be, and two octaves below infinity: rounding up stays finite."""


@dataclasses.dataclass(frozen=True)
class MomentSlot(Slot):
    """A moment that a stage keeps: what it is, and how it is stored between two steps.

    Attributes:
      form: its storage.
    """

    form: Form

    def why_wide(self, shape: tuple[int, ...], dtype: Any) -> str | None:
        """Why a moment of that shape and computing dtype rests as it is computed.

        `None` if it is narrowed.
        """
        if isinstance(self.form, Float) and self.form.dtype is None:
            return "storage is float32"
        if jnp.issubdtype(dtype, jnp.complexfloating):
            return "complex"
        if math.prod(shape) < self.form.smallest:
            return f"fewer than {self.form.smallest} elements"
        if isinstance(self.form, Float) and finfo(self.form.dtype).bits >= finfo(dtype).bits:
            return "no wider than that already"
        return None

    def first(self, shape: tuple[int, ...], dtype: Any) -> Array:
        """The start at rest, in an array of a shape and of the dtype that it is computed in."""
        if self.why_wide(shape, dtype):
            return jnp.full(shape, self.start, dtype)
        if isinstance(self.form, Float):
            return jnp.full(shape, self.start, self.form.dtype)
        codec = self.codec
        code = codec.narrow(
            jnp.full((), self.start, np.float32), codec.first_exponent(self.start), HALF
        )
        return jnp.full(shape, code, codec.dtype)

    def init(self, params: PyTree) -> PyTree:
        """Returns the start of the moment, stored, for each trained parameter.

        It is real if the moment has no sign.
        """
        return like_params(
            lambda p: self.first(jnp.shape(p), wide_dtype(p) if self.signed else real_dtype(p)),
            params,
        )

    def first_scales(self, tree: PyTree) -> Scales:
        """Returns the scales of a moment before the first step."""
        if isinstance(self.form, Float):
            return {}
        leaves = jax.tree.leaves(tree)
        if not leaves:
            # `optax.tree.map_params` makes a state of placeholders, which have no leaves. Where it
            # finds one array there, it leaves alone what stands in its place here: all scales.
            return {self._scale: jnp.zeros((), jnp.int16)}
        first = pack(*2 * (self.codec.first_exponent(self.start),))
        coded = {
            name: leaf for name, leaf in zip(names(tree), leaves, strict=True) if is_code(leaf)
        }
        return {
            self._scale: {
                name: jnp.full(self.scale_shape(leaf.shape), first) for name, leaf in coded.items()
            }
        }

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the scales of a leaf's codes: 1 along the axes that share one."""
        assert isinstance(self.form, Codes)
        ndim, axis = len(shape), self.form.axis
        last = max(ndim - 1 if axis is None else ndim + axis, 0)
        first = 0 if axis is None else last
        while first > 0 and math.prod(shape[first : last + 1]) < SHORTEST:
            first -= 1
        return tuple(1 if first <= i <= last else size for i, size in enumerate(shape))

    def widen(self, tree: PyTree, scales: Scales) -> PyTree:
        """A tree at rest in float32, or in what is wider."""
        paths = iter(names(tree))

        def leaf(resting: Array) -> Array:
            path = next(paths)
            if not self._keeps(resting):
                raise ValueError(
                    f"the state's {self.name} of shape {resting.shape} rests as {resting.dtype}, "
                    f"which is not how {self.form} keeps it. {_REMEDY}"
                )
            if not is_code(resting):
                return as_wide(resting)
            return self.codec.widen(resting, unpack(self.scale_of(path, resting, scales))[0])

        return jax.tree.map(leaf, tree)

    def scale_of(self, path: str, resting: Array, scales: Scales) -> Array:
        """Returns the scales of a leaf's codes, if they are shared as this storage shares them.

        They may be finer than `scale_shape` says: `jax.shard_map` shows parts of leaves, whose rows
        are short, and a sample of a leaf may have no elements. They are never coarser.
        """
        assert isinstance(self.form, Codes)
        by_path = scales.get(self._scale)
        scale = by_path.get(path) if isinstance(by_path, dict) else None
        if scale is None:
            raise ValueError(
                f"the state has no scale for the {self.name} at {path!r}, which {self.form} keeps. "
                f"{_REMEDY}"
            )
        shape, axis = jnp.shape(scale), self.form.axis
        shared = shape if axis is None else shape[axis : axis + 1 or None]
        fits = len(shape) == resting.ndim and all(
            n in (1, size) for n, size in zip(shape, resting.shape, strict=True)
        )
        finest = self.scale_shape(resting.shape)
        if (
            not fits
            or any(n > 1 for n in shared)
            or any(n < least for n, least in zip(shape, finest, strict=True))
        ):
            raise ValueError(
                f"the state's {self.name} at {path!r} of shape {resting.shape} has scales of shape "
                f"{shape}, which is not how {self.form} shares them. {_REMEDY}"
            )
        return scale  # type: ignore[no-any-return]

    def narrow(
        self,
        tree: PyTree,
        before: PyTree,
        scales: Scales,
        count: Array,
        stream: str,
        selector: Any = None,
    ) -> tuple[PyTree, Scales]:
        """The resting form of a tree of moments, and its scales.

        Args:
          tree: moments, float32 or wider; leaves that take no part are dropped.
          before: the tree that was widened. It says which leaves are narrowed: `jax.shard_map`
            shows parts of leaves, whose size is not the leaf's.
          scales: those of `before`.
          count: the step, for the random bits.
          stream: the name of the stage's random bits, as `Context.stream` gives it.
          selector: what chooses between new and old, where a wrapper may skip the step: here,
            before the largest code is looked for.
        """
        paths = names(before)
        resting = iter(zip(paths, jax.tree.leaves(before), strict=True))
        moments = list(filter(takes_part, jax.tree.leaves(tree)))
        narrowed = [
            x.dtype != old.dtype and (is_code(old) or narrower_than_float32(old))
            for x, old in zip(moments, jax.tree.leaves(before), strict=True)
        ]
        thresholds = self._thresholds(moments, narrowed, paths, count, stream)
        rounded = iter(
            undifferentiable(list(itertools.compress(moments, narrowed)), no_derivative(self.name))
        )
        following: dict[str, Array] = {}

        def leaf(x: Array) -> Array:
            (path, old), random = next(resting), next(thresholds)
            if old.dtype == x.dtype:
                return x
            if takes_part(old) and not narrower_than_float32(old):
                # A float64 gradient of a float32 parameter. A complex one of a real parameter is no
                # gradient.
                return (
                    x if jnp.iscomplexobj(x) and not jnp.iscomplexobj(old) else x.astype(old.dtype)
                )
            x = next(rounded)
            if isinstance(self.form, Float):
                return to_float(x, self.form.dtype, random, positive=not self.signed)
            unit = unpack(scales[self._scale][path])[1]
            # What float64 holds beyond float32 saturates: a code of infinity would be NaN a step
            # later.
            held = (
                x if x.dtype == jnp.float32 else jnp.clip(x, -LARGEST, LARGEST).astype(jnp.float32)
            )
            code = self.codec.narrow(held, unit, random)
            code = code if selector is None else selector.choose(code, old)
            following[path] = pack(unit, self.codec.next_exponent(code, unit))
            return code

        kept = like_params(leaf, tree)
        return kept, {self._scale: following} if following else self.first_scales(kept)

    def _thresholds(
        self,
        leaves: Sequence[Array],
        narrowed: Sequence[bool],
        paths: Sequence[str],
        count: Array,
        stream: str,
    ) -> Iterator[Any]:
        """The random bits by which each leaf is rounded, in order.

        `HALF` where they are rounded to nearest, or not at all.
        """
        if self.form.rounding == "nearest" or not any(narrowed):
            yield from itertools.repeat(HALF)
        of = [path for path, its in zip(paths, narrowed, strict=True) if its]
        keys = iter(stream_keys(stream, of, self.form.seed, count))
        for x, its in zip(leaves, narrowed, strict=True):
            yield rotate(random_bits(next(keys), x.shape), self.turn) if its else HALF

    def _keeps(self, resting: Array) -> bool:
        """Whether this is how a leaf of that shape rests."""
        if not is_code(resting) and not narrower_than_float32(resting):
            return self.why_wide(resting.shape, resting.dtype) is not None
        return bool(
            resting.dtype == (self.form.dtype if isinstance(self.form, Float) else self.codec.dtype)
        )

    @property
    def _scale(self) -> str:
        """The key of its scales.

        It is not its name, because `optax.tree.get` finds moments by that.
        """
        return scale_key(self.name)

    @property
    def codec(self) -> Codec:
        """The codec of its codes."""
        return Codec(self.signed)


def no_derivative(moment: str) -> str:
    """Returns what the error says where a derivative is taken through a stored moment."""
    return (
        f"storage: found a derivative that is taken through {moment} as it is stored, in "
        f"fewer bits than float32; expected none: rounding has no derivative. To differentiate "
        f'through steps of the optimizer, make it with storage="float32", and without mu_dtype and '
        f"nu_dtype."
    )
