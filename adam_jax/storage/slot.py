"""`MomentSlot`: a moment that a stage keeps, and how it is stored and read."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

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
from adam_jax.storage.codec import HALF, Codec, pack, to_float, undifferentiable, unpack
from adam_jax.storage.formats import Codes, Float, Form
from adam_jax.storage.random_bits import random_bits, rotate, stream_keys

Scales: TypeAlias = dict[str, Any]
"""By "mu_scale" and the like, the scales of the leaves of a moment that are stored as codes, by the
leaf's path: int16."""


SHORTEST = 128
"""The smallest number of elements that share a scale, where a leaf has that many. Measured with the
compiler of TPU v5e, a scale costs 120 bytes of memory traffic per step: 6 % of what 128 elements of
parameter, gradient and moments move, 1.5 % of 512."""


_REMEDY = (
    "Carry a run over with convert_state(state, from_tx, to_tx, params), or pass the state that "
    "`init` of this very transformation made."
)


LARGEST = 2.0**125
"""More than float32 moments can be, and two octaves below infinity: rounding up stays finite."""


@dataclasses.dataclass(frozen=True)
class MomentSlot:
    """A moment that a stage keeps: how it is stored between two steps, and what it is.

    Attributes:
      name: its field in the state.
      form: its storage.
      signed: whether it can be negative. A μ can, a ν cannot.
      turn: where in the random bits of an element it begins. Moments of one step share them, and
        must not share an end.
      start: the value of all elements before the first step.
      meaning: what it is. "{}" stands for what it is made of (gradients, directions, steps), "{nu}"
        for the ν in front.
      gathers: whether it starts at zero weight, for which `correct_bias` makes up. The state then
        has its weight.
      whole: whether it has all of its weight at once, as a sum and a maximum do.
      decay: the name of the hyperparameter by which it decays, if any.
      delayed: whether the ν that is handed on is that of the step before.
      kind: what other libraries call such a moment; its name if empty.
      label: how tables show it, for example "ν"; its name if empty.
      of_gradient: (g, ν of zero steps, 1 − decay) -> ν after one step whose gradient was g.
    """

    name: str
    form: Form
    signed: bool = True
    turn: int = 0
    start: float = 0.0
    meaning: str = ""
    gathers: bool = False
    whole: bool = False
    decay: str | None = None
    delayed: bool = False
    kind: str = ""
    label: str = ""
    of_gradient: Callable[[Array, Array, Array], Array] | None = None

    @property
    def part(self) -> str:
        """What `state_bytes` counts it as: "mu" or "nu"."""
        return "mu" if self.signed else "nu"

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
        codec = self._codec
        code = codec.narrow(
            jnp.full((), self.start, np.float32), codec.first_exponent(self.start), HALF
        )
        return jnp.full(shape, code, codec.dtype)

    def init(self, params: PyTree) -> PyTree:
        """Returns the start of the moment, stored, for each parameter that takes part.

        Real where the moment has no sign.
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
        first = pack(*2 * (self._codec.first_exponent(self.start),))
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
            return self._codec.widen(resting, unpack(self._scale_of(path, resting, scales))[0])

        return jax.tree.map(leaf, tree)

    def _scale_of(self, path: str, resting: Array, scales: Scales) -> Array:
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
            code = self._codec.narrow(held, unit, random)
            code = code if selector is None else selector.choose(code, old)
            following[path] = pack(unit, self._codec.next_exponent(code, unit))
            return code

        kept = like_params(leaf, tree)
        return kept, {self._scale: following} if following else self.first_scales(kept)

    def tops(
        self, tree: PyTree, scales: Scales, mu: PyTree | None, mu_form: Form | None, grads: PyTree
    ) -> list[Array | None]:
        """Returns for each trained leaf the largest number that its storage can hold now.

        It broadcasts against the leaf. It is `None` where no gradient is too large for the storage,
        or where μ saturates with ν: both are codes from zero on, and the same elements share their
        scales.

        Args:
          tree: the moment as it is stored.
          scales: those of the state.
          mu: the first moment beside it as it is stored, if there is one.
          mu_form: its storage.
          grads: the gradients, whose dtypes say how large they can be.
        """
        leaves = [leaf for leaf in jax.tree.leaves(grads) if takes_part(leaf)]
        stored = jax.tree.leaves(tree)
        beside = [None] * len(stored) if mu is None else jax.tree.leaves(mu)
        if not len(leaves) == len(stored) == len(beside):
            return []  # other gradients: `lift` says in what they differ
        alike = (
            isinstance(self.form, Codes)
            and isinstance(mu_form, Codes)
            and mu_form.axis == self.form.axis
            and self.start == 0
        )
        found: list[Array | None] = []
        for path, x, m, grad in zip(names(tree), stored, beside, leaves, strict=True):
            computed = as_wide(grad).dtype
            largest = (
                finfo(computed).maxexp // 2 * 2 - 4
            )  # of the square of a gradient: see `widen`
            if is_code(x) and not (alike and m is not None and is_code(m)):
                found.append(self._codec.top(unpack(self._scale_of(path, x, scales))[1]))
            elif not is_code(x) and finfo(x.dtype).maxexp <= largest:
                found.append(jnp.asarray(finfo(x.dtype).max).astype(np.float32))
            else:
                found.append(None)
        return found

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
            resting.dtype
            == (self.form.dtype if isinstance(self.form, Float) else self._codec.dtype)
        )

    @property
    def _scale(self) -> str:
        """The key of its scales: another one than its name.

        By which `optax.tree.get` finds moments.
        """
        return scale_key(self.name)

    @property
    def _codec(self) -> Codec:
        return Codec(self.signed)


def no_derivative(moment: str) -> str:
    """Returns what the error says where a derivative is taken through a stored moment."""
    return (
        f"storage: found a derivative that is taken through {moment} as it is stored, in "
        f"fewer bits than float32; expected none: rounding has no derivative. To differentiate "
        f'through steps of the optimizer, make it with storage="float32", and without mu_dtype and '
        f"nu_dtype."
    )


def scale_key(name: str) -> str:
    """The key in `scales` of the moment in the field `name`."""
    return f"{name}_scale"


def is_code(leaf: Any) -> bool:
    """Whether a stored leaf consists of codes."""
    return bool(jnp.issubdtype(leaf.dtype, jnp.integer))


def all_first_scales(slots: Sequence[MomentSlot], trees: dict[str, PyTree]) -> Scales:
    """The scales of several fresh moments by name."""
    return {
        name: scale for slot in slots for name, scale in slot.first_scales(trees[slot.name]).items()
    }


def all_narrow(
    slots: Sequence[MomentSlot],
    trees: dict[str, PyTree],
    before: Any,
    count: Array,
    stream: str,
    selector: Any,
) -> tuple[dict[str, PyTree], Scales]:
    """The resting forms of several moments by name, and their scales.

    `before` is the state that holds those they come from.
    """
    narrowed = {
        slot.name: slot.narrow(
            trees[slot.name], getattr(before, slot.name), before.scales, count, stream, selector
        )
        for slot in slots
    }
    kept = {name: tree for name, (tree, _) in narrowed.items()}
    return kept, {name: scale for _, its in narrowed.values() for name, scale in its.items()}
