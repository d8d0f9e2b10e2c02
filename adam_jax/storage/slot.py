"""`MomentSlot`: a moment that a stage keeps, and how it is stored and read."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from adam_jax._core.leaves import (
    PyTree,
    full_beside,
    like_params,
    narrower_than_float32,
    real_dtype,
    takes_part,
    wide_dtype,
)
from adam_jax._core.paths import names
from adam_jax._core.slots import Slot
from adam_jax.storage.codec import HALF, undifferentiable
from adam_jax.storage.format import Format
from adam_jax.storage.random_bits import StepBits
from adam_jax.storage.scales import Scales, is_code

_REMEDY = (
    "Carry a run over with convert_state(state, from_tx, to_tx, params), or pass the state that "
    "`init` of this very transformation made."
)


_LONG = 2**40
"""Longer than any axis: no rows are as short."""


@dataclasses.dataclass(frozen=True)
class MomentSlot(Slot):
    """A moment that a stage keeps: what it is, and how it is stored between two steps.

    Attributes:
      form: its storage.
    """

    form: Format

    def why_wide(self, shape: tuple[int, ...], dtype: Any) -> str | None:
        """Why a moment of that shape and computing dtype is stored as it is computed.

        `None` if it is narrowed.
        """
        return self.form.why_wide(shape, dtype)

    def first(self, param: Any, shape: tuple[int, ...] | None = None) -> Array:
        """Returns the start as it is stored, on the devices on which a parameter is.

        It is real if the moment has no sign.

        Args:
          param: a trained parameter, or its shape.
          shape: that of the moment, 1 along axes that share a number. `None`: the parameter's.
        """
        shape = jnp.shape(param) if shape is None else shape
        dtype = wide_dtype(param) if self.signed else real_dtype(param)
        if self.why_wide(shape, dtype):
            return full_beside(param, self.start, dtype, shape)
        start, scale = np.float32(self.start), self.form.first_scale(self.start, self.signed)
        stored = self.form.store(jnp.full((), start), scale, HALF, self.signed)
        return full_beside(param, stored, stored.dtype, shape)

    def init(self, params: PyTree) -> PyTree:
        """Returns the start of the moment, stored, for each trained parameter."""
        return like_params(self.first, params)

    def first_scales(self, tree: PyTree) -> Scales:
        """Returns the scales of a moment before the first step."""
        if self.form.scale_shape(()) is None:
            return {}
        leaves = jax.tree.leaves(tree)
        if not leaves:
            # `optax.tree.map_params` makes a state of placeholders, which have no leaves. Where it
            # finds one array there, it leaves alone what stands in its place here: all scales.
            return {self.scale_key: jnp.zeros((), jnp.int16)}
        first = jnp.asarray(self.form.first_scale(self.start, self.signed))
        codes = {
            name: leaf for name, leaf in zip(names(tree), leaves, strict=True) if is_code(leaf)
        }
        return {
            self.scale_key: {
                name: full_beside(leaf, first, first.dtype, self.form.scale_shape(leaf.shape))
                for name, leaf in codes.items()
            }
        }

    def widen(self, tree: PyTree, scales: Scales) -> PyTree:
        """A stored tree in float32, or in what is wider."""
        paths = iter(names(tree))

        def leaf(stored: Array) -> Array:
            path = next(paths)
            if not self._keeps(stored):
                raise ValueError(
                    f"the state's {self.name} of shape {stored.shape} rests as {stored.dtype}, "
                    f"which is not how {self.form} keeps it. {_REMEDY}"
                )
            if not (is_code(stored) or narrower_than_float32(stored)):
                return stored
            return self.form.read(stored, self.scale_of(path, stored, scales), self.signed)

        return jax.tree.map(leaf, tree)

    def scale_of(self, path: str, stored: Array, scales: Scales) -> Array | None:
        """Returns the scales of a leaf, if they are shared as this storage shares them.

        They may be finer than the format's `scale_shape` says: `jax.shard_map` shows parts of
        leaves, whose rows are short. They are never coarser. `None` where the leaf has none.
        """
        coarsest = self.form.scale_shape(stored.shape)
        if coarsest is None or not is_code(stored):
            return None
        by_path = scales.get(self.scale_key)
        scale = by_path.get(path) if isinstance(by_path, dict) else None
        if scale is None:
            raise ValueError(
                f"the state has no scale for the {self.name} at {path!r}, which {self.form} keeps. "
                f"{_REMEDY}"
            )
        if not stored.size:
            return scale  # type: ignore[no-any-return]  # a sample that took nothing of a leaf
        shape, finest = jnp.shape(scale), self.form.scale_shape((_LONG,) * stored.ndim)
        assert finest is not None
        if len(shape) != stored.ndim or not all(
            n in (1, size) and least <= n <= most
            for n, size, least, most in zip(shape, stored.shape, coarsest, finest, strict=True)
        ):
            raise ValueError(
                f"the state's {self.name} at {path!r} of shape {stored.shape} has scales of shape "
                f"{shape}, which is not how {self.form} shares them. {_REMEDY}"
            )
        return scale  # type: ignore[no-any-return]

    def narrow(
        self, tree: PyTree, before: PyTree, scales: Scales, bits: StepBits, selector: Any = None
    ) -> tuple[PyTree, Scales]:
        """A tree of moments as it is stored, and its scales.

        Args:
          tree: moments, float32 or wider; leaves that take no part are dropped.
          before: the tree that was widened. It says which leaves are narrowed: `jax.shard_map`
            shows parts of leaves, whose size is not the leaf's.
          scales: those of `before`.
          bits: the random bits of the step.
          selector: what chooses between new and old, where a wrapper may skip the step: here,
            before the largest code is looked for.
        """
        stored = iter(zip(names(before), jax.tree.leaves(before), strict=True))
        moments = list(filter(takes_part, jax.tree.leaves(tree)))
        narrowed = [
            x.dtype != old.dtype and (is_code(old) or narrower_than_float32(old))
            for x, old in zip(moments, jax.tree.leaves(before), strict=True)
        ]
        rounded = iter(
            undifferentiable(list(itertools.compress(moments, narrowed)), no_derivative(self.name))
        )
        following: dict[str, Array] = {}

        def leaf(x: Array) -> Array:
            path, old = next(stored)
            if old.dtype == x.dtype:
                return x
            if takes_part(old) and not narrower_than_float32(old):
                # A float64 gradient of a float32 parameter. A complex one of a real parameter is no
                # gradient.
                return (
                    x if jnp.iscomplexobj(x) and not jnp.iscomplexobj(old) else x.astype(old.dtype)
                )
            x = next(rounded)
            random: Any = HALF
            if self.form.rounding != "nearest":
                random = bits.of(path, x.shape, self.form.seed, self.turn)
            scale = self.scale_of(path, old, scales)
            new = self.form.store(x, scale, random, self.signed)
            if scale is not None:
                new = new if selector is None else selector.choose(new, old)
                following[path] = self.form.next_scale(new, scale, self.signed)
            return new

        kept = like_params(leaf, tree)
        return kept, {self.scale_key: following} if following else self.first_scales(kept)

    def _keeps(self, stored: Array) -> bool:
        """Whether this is how a leaf of that shape is stored."""
        if not is_code(stored) and not narrower_than_float32(stored):
            return self.why_wide(stored.shape, stored.dtype) is not None
        return bool(stored.dtype == self.form.dtype_of(self.signed))

    @property
    def scale_key(self) -> str:
        """The key in `scales` of its scales.

        It is not its name, because `optax.tree.get` finds moments by that.
        """
        return f"{self.name}_scale"


def no_derivative(moment: str) -> str:
    """Returns what the error says where a derivative is taken through a stored moment."""
    return (
        f"storage: found a derivative that is taken through {moment} as it is stored, in "
        f"fewer bits than float32; expected none: rounding has no derivative. To differentiate "
        f'through steps of the optimizer, make it with storage="float32", and without mu_dtype and '
        f"nu_dtype."
    )
