"""How a moment rests between two steps: as it is computed, as a narrower float, or as codes of eight bits.

A resting moment has the shape of its parameter, and each of its elements depends on that element alone. So a parameter's
sharding is its moment's too, and a step stays one pass over memory. Narrowing is unbiased: with β₂ = 0.999 a moment moves by
0.1 % a step, far less than the last bit of a narrow number, and rounded to nearest it would never move.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from adam_jax._codec import HALF, Codec, largest_along, pack, to_float, undifferentiable, unpack
from adam_jax._hyperparams import expect_integer, expect_one_of
from adam_jax._noise import as_seed, random_bits, rotate, stream_keys
from adam_jax._paths import names
from adam_jax._tree import PyTree, as_wide, brief, finfo, like_params, narrower_than_float32, real_dtype, takes_part, wide_dtype

Rounding: TypeAlias = Literal["stochastic", "nearest"]

Scales: TypeAlias = dict[str, Any]
"""By "mu_scale" and the like, the scales of the leaves of a moment that are stored as codes, by the leaf's path: int16."""

SMALLEST = 4096

SHORTEST = 128
"""The smallest number of elements that share a scale, where a leaf has that many. Measured with the compiler of TPU v5e, a scale
costs 120 bytes of memory traffic per step: 6 % of what 128 elements of parameter, gradient and moments move, 1.5 % of 512."""

_REMEDY = (
    "Carry a run over with convert_state(state, from_tx, to_tx, params), or pass the state that `init` of this very "
    "transformation made."
)

LARGEST = 2.0**125
"""More than float32 moments can be, and two octaves below infinity: rounding up stays finite."""


@dataclasses.dataclass(frozen=True)
class Float:
    """Moments rest as floats of a dtype; infinities and what is too large saturate at its largest number, NaN stays.

    A dtype of a small range, float16 or one of 8 bits, suits μ better than ν: below its smallest number a positive ν is stored as
    that, so that no update loses its denominator, and steps there are too short.

    Attributes:
      dtype: a floating dtype; `None` for the one that a leaf is computed in, float32 or wider.
      rounding: "stochastic" rounds up as often as keeps the mean right, "nearest" freezes what moves by less than half its last
        bit a step.
      seed: of the random bits: an integer from 0 to 2³² − 1, or a traced integer scalar, such as the number of a member under
        `jax.vmap`. Stages, leaves and groups have bits of their own whatever the seed.
      smallest: leaves of fewer elements stay as they are computed.

    Raises:
      ValueError: for a dtype that is not floating, has no zero or less than 8 bits, an unknown rounding, or a negative size.
      TypeError: if `seed` or `smallest` is no integer.
    """

    dtype: Any = None
    rounding: Rounding = "stochastic"
    seed: int = 0
    smallest: int = SMALLEST

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", _floating(self.dtype, "storage.Float: dtype"))
        _check(self)


@dataclasses.dataclass(frozen=True)
class Codes:
    """Stores moments as integers that count in ratios, relative to a power of two that each row of a leaf has.

    A code has 8 bits. It is a small float: below 1 unit eight equal steps (they count as an octave), then eight steps an octave,
    and where those end, for elements that suddenly outgrow the row, one step an octave. The unit of a step follows from the
    largest code of the step before, with an octave to spare, so that encoding needs no second look at the moments. Before there
    is a largest code, at the first step or in a row that has been all zero, all codes are whole octaves, 127 of them.

    A row is what lies along the last axis. Rows of fewer than 128 elements are taken together, along the axes before the last,
    until there are 128 or the leaf ends: a kernel of shape (768, 12, 64) has 768 scales, one of (3, 3, 64, 64) has 9, and a
    vector has one. Scales are int16 arrays with the leaf's number of axes, of size 1 along those that share: they broadcast
    against their leaf and are sharded as it is.

    =========  =====  ============  =================  ==============  =======================
    moment     dtype  fine octaves  below the largest  coarse octaves  below the smallest code
    =========  =====  ============  =================  ==============  =======================
    μ, signed  int8   14            2⁻¹⁴               15              0 or that code
    ν, ≥ 0     uint8  28            2⁻²⁸, √ν 2⁻¹⁴      31              that code; 0 stays 0
    =========  =====  ============  =================  ==============  =======================

    A step is 1/8 of the power of two below it. A positive ν never becomes 0, so that no update loses its denominator:
    what is smaller than the smallest code is stored as it. NaN is stored as 0.

    Attributes:
      rounding: as in `Float`.
      seed: as in `Float`.
      smallest: as in `Float`.
      axis: the axis along which elements share a scale: -1, or -2 where the columns of a matrix differ more than its rows, as
        those of an output layer of shape (features, vocabulary) do; `None` for one scale per leaf.

    Raises:
      ValueError: for an unknown rounding, another axis, or a negative size.
      TypeError: if `seed` or `smallest` is no integer.
    """

    rounding: Rounding = "stochastic"
    seed: int = 0
    smallest: int = SMALLEST
    axis: int | None = -1

    def __post_init__(self) -> None:
        if self.axis is not None:
            if not isinstance(self.axis, (int, np.integer)) or self.axis not in (-1, -2):
                raise ValueError(f"storage.Codes: axis: found {self.axis!r}; expected -1, -2 or None.")
            object.__setattr__(self, "axis", int(self.axis))
        _check(self)


def _check(form: Form) -> None:
    who = f"storage.{type(form).__name__}"
    expect_one_of(f"{who}: rounding", form.rounding, ("stochastic", "nearest"))
    object.__setattr__(form, "seed", as_seed(f"{who}: seed", form.seed))
    expect_integer(f"{who}: smallest", form.smallest)
    if form.smallest < 0:
        raise ValueError(f"{who}: smallest: found {form.smallest}; expected 0 or more elements.")
    object.__setattr__(form, "smallest", int(form.smallest))


def _floating(dtype: Any, name: str) -> Any:
    if dtype is None:
        return None
    try:
        found = jnp.dtype(dtype)
    except TypeError:
        found = None
    if found is None or not jnp.issubdtype(found, jnp.floating):
        raise ValueError(f"{name}: found {dtype!r}; expected a floating dtype such as jnp.bfloat16, or None for float32.")
    if finfo(found).bits < 8 or np.zeros((), found) != 0:
        raise ValueError(f"{name}: found {dtype!r}, of less than 8 bits or without a zero; expected one such as jnp.bfloat16.")
    return found


Form: TypeAlias = Float | Codes
Storage: TypeAlias = Literal["float32", "bfloat16", "8bit"] | Form | tuple[Any, Any]

NAMED: dict[str, Form] = {"float32": Float(), "bfloat16": Float(jnp.bfloat16), "8bit": Codes()}


def canonical(storage: Any) -> Any:
    """Returns a storage under its name, if it has one, so that `Codes()` and "8bit" make equal transformations."""
    if isinstance(storage, tuple):
        return tuple(map(canonical, storage))
    # A traced seed has no value to compare.
    if not isinstance(storage, (Float, Codes)) or not isinstance(storage.seed, int):
        return storage
    return next((name for name, form in NAMED.items() if form == storage), storage)


def forms(storage: Storage, mu_dtype: Any = None, nu_dtype: Any = None) -> tuple[Form, Form]:
    """How μ and ν rest: `storage` for both or a pair of them, or, as in Optax, a dtype for all leaves however small.

    Raises:
      ValueError: for what is no storage, or where a dtype is given beside a storage that says otherwise.
    """
    pair = storage if isinstance(storage, tuple) else (storage, storage)
    if len(pair) != 2:
        raise ValueError(f"storage: found a tuple of {len(pair)}; expected one storage, or a tuple of two (for mu, for nu).")
    chosen = []
    for one, dtype, name in zip(pair, (mu_dtype, nu_dtype), ("mu_dtype", "nu_dtype"), strict=True):
        form = NAMED.get(one) if isinstance(one, str) else one
        if not isinstance(form, (Float, Codes)):
            raise ValueError(
                f"storage: found {brief(one)}; expected 'float32', 'bfloat16', '8bit', an object of storage.Float or "
                f"storage.Codes, or a tuple of two of these, for mu and nu."
            )
        if dtype is not None:
            if form != Float():
                raise ValueError(f"found both {name}={dtype!r} and storage={one!r}; expected one of them.")
            form = Float(_floating(dtype, name), smallest=0)
        chosen.append(form)
    return chosen[0], chosen[1]


@dataclasses.dataclass(frozen=True)
class MomentSlot:
    """A moment that a stage keeps: how it is stored between two steps, and what it is.

    Attributes:
      name: its field in the state.
      form: its storage.
      signed: whether it can be negative. A μ can, a ν cannot.
      turn: where in the random bits of an element it begins. Moments of one step share them, and must not share an end.
      start: the value of all elements before the first step.
      meaning: what it is. "{}" stands for what it is made of (gradients, directions, steps), "{nu}" for the ν in front.
      gathers: whether it starts at zero weight, for which `correct_bias` makes up. The state then has its weight.
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
        """Why a moment of that shape and computing dtype rests as it is computed; `None` if it is narrowed."""
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
        code = codec.narrow(jnp.full((), self.start, np.float32), codec.first_exponent(self.start), HALF)
        return jnp.full(shape, code, codec.dtype)

    def init(self, params: PyTree) -> PyTree:
        """Returns the start of the moment, stored, for each parameter that takes part; real where the moment has no sign."""
        return like_params(lambda p: self.first(jnp.shape(p), wide_dtype(p) if self.signed else real_dtype(p)), params)

    def first_scales(self, tree: PyTree) -> Scales:
        """Returns the scales of a moment before the first step."""
        if isinstance(self.form, Float):
            return {}
        leaves = jax.tree.leaves(tree)
        if not leaves:
            # `optax.tree.map_params` makes a state of placeholders, which have no leaves. Where it finds one array there, it
            # leaves alone what stands in its place here: all scales.
            return {self._scale: jnp.zeros((), jnp.int16)}
        first = pack(*2 * (self._codec.first_exponent(self.start),))
        coded = {name: leaf for name, leaf in zip(names(tree), leaves, strict=True) if _is_code(leaf)}
        return {self._scale: {name: jnp.full(self.scale_shape(leaf.shape), first) for name, leaf in coded.items()}}

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
                    f"the state's {self.name} of shape {resting.shape} rests as {resting.dtype}, which is not how {self.form} "
                    f"keeps it. {_REMEDY}"
                )
            if not _is_code(resting):
                return as_wide(resting)
            return self._codec.widen(resting, unpack(self._scale_of(path, resting, scales))[0])

        return jax.tree.map(leaf, tree)

    def _scale_of(self, path: str, resting: Array, scales: Scales) -> Array:
        """Returns the scales of a leaf's codes, if they are shared as this storage shares them.

        They may be finer than `scale_shape` says: `jax.shard_map` shows parts of leaves, whose rows are short, and a sample of a
        leaf may have no elements. They are never coarser.
        """
        assert isinstance(self.form, Codes)
        by_path = scales.get(self._scale)
        scale = by_path.get(path) if isinstance(by_path, dict) else None
        if scale is None:
            raise ValueError(f"the state has no scale for the {self.name} at {path!r}, which {self.form} keeps. {_REMEDY}")
        shape, axis = jnp.shape(scale), self.form.axis
        shared = shape if axis is None else shape[axis : axis + 1 or None]
        fits = len(shape) == resting.ndim and all(n in (1, size) for n, size in zip(shape, resting.shape, strict=True))
        finest = self.scale_shape(resting.shape)
        if not fits or any(n > 1 for n in shared) or any(n < least for n, least in zip(shape, finest, strict=True)):
            raise ValueError(
                f"the state's {self.name} at {path!r} of shape {resting.shape} has scales of shape {shape}, which is not how "
                f"{self.form} shares them. {_REMEDY}"
            )
        return scale  # type: ignore[no-any-return]

    def narrow(
        self, tree: PyTree, before: PyTree, scales: Scales, count: Array, stream: str, gate: Any = None
    ) -> tuple[PyTree, Scales]:
        """The resting form of a tree of moments, and its scales.

        Args:
          tree: moments, float32 or wider; leaves that take no part are dropped.
          before: the tree that was widened. It says which leaves are narrowed: `jax.shard_map` shows parts of leaves, whose size
            is not the leaf's.
          scales: those of `before`.
          count: the step, for the random bits.
          stream: the name of the stage's random bits, as `Context.stream` gives it.
          gate: what chooses between new and old, where a guard may skip the step: here, before the largest code is looked for.
        """
        paths = names(before)
        resting = iter(zip(paths, jax.tree.leaves(before), strict=True))
        moments = list(filter(takes_part, jax.tree.leaves(tree)))
        narrowed = [
            x.dtype != old.dtype and (_is_code(old) or narrower_than_float32(old))
            for x, old in zip(moments, jax.tree.leaves(before), strict=True)
        ]
        thresholds = self._thresholds(moments, narrowed, paths, count, stream)
        rounded = iter(undifferentiable(list(itertools.compress(moments, narrowed)), _no_derivative(self.name)))
        following: dict[str, Array] = {}

        def leaf(x: Array) -> Array:
            (path, old), random = next(resting), next(thresholds)
            if old.dtype == x.dtype:
                return x
            if takes_part(old) and not narrower_than_float32(old):
                # A float64 gradient of a float32 parameter. A complex one of a real parameter is no gradient.
                return x if jnp.iscomplexobj(x) and not jnp.iscomplexobj(old) else x.astype(old.dtype)
            x = next(rounded)
            if isinstance(self.form, Float):
                return to_float(x, self.form.dtype, random, positive=not self.signed)
            unit = unpack(scales[self._scale][path])[1]
            # What float64 holds beyond float32 saturates: a code of infinity would be NaN a step later.
            held = x if x.dtype == jnp.float32 else jnp.clip(x, -LARGEST, LARGEST).astype(jnp.float32)
            code = self._codec.narrow(held, unit, random)
            code = code if gate is None else gate.choose(code, old)
            following[path] = pack(unit, self._codec.next_exponent(code, unit))
            return code

        kept = like_params(leaf, tree)
        return kept, {self._scale: following} if following else self.first_scales(kept)

    def tops(self, tree: PyTree, scales: Scales, mu: PyTree | None, mu_form: Form | None, grads: PyTree) -> list[Array | None]:
        """Returns for each leaf that takes part the largest number that its storage can hold at this step.

        It broadcasts against the leaf. It is `None` where no gradient is too large for the storage, or where μ saturates with ν:
        both are codes from zero on, and the same elements share their scales.

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
        alike = isinstance(self.form, Codes) and isinstance(mu_form, Codes) and mu_form.axis == self.form.axis and self.start == 0
        found: list[Array | None] = []
        for path, x, m, grad in zip(names(tree), stored, beside, leaves, strict=True):
            computed = as_wide(grad).dtype
            largest = finfo(computed).maxexp // 2 * 2 - 4  # of the square of a gradient: see `widen`
            if _is_code(x) and not (alike and m is not None and _is_code(m)):
                found.append(self._codec.top(unpack(self._scale_of(path, x, scales))[1]))
            elif not _is_code(x) and finfo(x.dtype).maxexp <= largest:
                found.append(jnp.asarray(finfo(x.dtype).max).astype(np.float32))
            else:
                found.append(None)
        return found

    def _thresholds(
        self, leaves: Sequence[Array], narrowed: Sequence[bool], paths: Sequence[str], count: Array, stream: str
    ) -> Iterator[Any]:
        """The random bits by which each leaf is rounded, in order; `HALF` where they are rounded to nearest, or not at all."""
        if self.form.rounding == "nearest" or not any(narrowed):
            yield from itertools.repeat(HALF)
        of = [path for path, its in zip(paths, narrowed, strict=True) if its]
        keys = iter(stream_keys(stream, of, self.form.seed, count))
        for x, its in zip(leaves, narrowed, strict=True):
            yield rotate(random_bits(next(keys), x.shape), self.turn) if its else HALF

    def _keeps(self, resting: Array) -> bool:
        """Whether this is how a leaf of that shape rests."""
        if not _is_code(resting) and not narrower_than_float32(resting):
            return self.why_wide(resting.shape, resting.dtype) is not None
        return bool(resting.dtype == (self.form.dtype if isinstance(self.form, Float) else self._codec.dtype))

    @property
    def _scale(self) -> str:
        """The key of its scales: another one than its name, by which `optax.tree.get` finds moments."""
        return scale_key(self.name)

    @property
    def _codec(self) -> Codec:
        return Codec(self.signed)


def _no_derivative(moment: str) -> str:
    """Returns what the error says where a derivative is taken through a stored moment."""
    return (
        f"storage: found a derivative that is taken through {moment} as it is stored, in fewer bits than float32; expected none: "
        f'rounding has no derivative. To differentiate through steps of the optimizer, make it with storage="float32", and '
        f"without mu_dtype and nu_dtype."
    )


def scale_key(name: str) -> str:
    """The key in `scales` of the moment in the field `name`."""
    return f"{name}_scale"


class Resting(NamedTuple):
    """One leaf of a moment, taken out of its state: an array that says by its dtype alone how it rests.

    Attributes:
      array: the moment at rest.
      scale: of codes, theirs; else `None`.
    """

    array: Array
    scale: Array | None = None

    def widen(self) -> Array:
        """The moment in float32, or in what is wider."""
        return as_wide(self.array) if self.scale is None else _codec_of(self.array).widen(self.array, unpack(self.scale)[0])


def narrow_to_nearest(x: Array, like: Resting, signed: bool) -> Resting:
    """A moment, float32 or wider, at rest as another one does.

    Rounded to nearest: of one rounding no bias accumulates, and there is none to start with.

    Args:
      x: the moment.
      like: a stored leaf. The result has its storage.
      signed: whether the moment can be negative.
    """
    if like.scale is not None or narrower_than_float32(like.array):
        x = undifferentiable(x, _no_derivative("a moment"))
    if like.scale is not None:
        codec, x = _codec_of(like.array), x.astype(jnp.float32)
        unit = codec.exponent(largest_along(jnp.where(jnp.isnan(x), 0, jnp.abs(x)), like.scale))
        return Resting(codec.narrow(x, unit, HALF), pack(unit, unit))
    if narrower_than_float32(like.array):
        return Resting(to_float(x, like.array.dtype, HALF, positive=not signed))
    return Resting(x.astype(like.array.dtype))


def take_out(name: str, tree: PyTree, scales: Scales) -> list[Resting]:
    """The leaves of the moment in the field `name`."""
    its = zip(names(tree), jax.tree.leaves(tree), strict=True)
    return [Resting(x, scales[scale_key(name)][path] if _is_code(x) else None) for path, x in its]


def put_back(name: str, tree: PyTree, scales: Scales, leaves: Sequence[Resting]) -> tuple[PyTree, Scales]:
    """The tree with `leaves` in the place of its own, and all scales of its state."""
    its = {path: leaf.scale for path, leaf in zip(names(tree), leaves, strict=True) if leaf.scale is not None}
    kept = jax.tree.unflatten(jax.tree.structure(tree), [leaf.array for leaf in leaves])
    return kept, scales | ({scale_key(name): its} if its else {})


def _codec_of(code: Array) -> Codec:
    return Codec(bool(jnp.issubdtype(code.dtype, jnp.signedinteger)))


def _is_code(leaf: Any) -> bool:
    return bool(jnp.issubdtype(leaf.dtype, jnp.integer))


def all_first_scales(slots: Sequence[MomentSlot], trees: dict[str, PyTree]) -> Scales:
    """The scales of several fresh moments by name."""
    return {name: scale for slot in slots for name, scale in slot.first_scales(trees[slot.name]).items()}


def all_narrow(
    slots: Sequence[MomentSlot], trees: dict[str, PyTree], before: Any, count: Array, stream: str, gate: Any
) -> tuple[dict[str, PyTree], Scales]:
    """The resting forms of several moments by name, and their scales; `before` is the state that holds those they come from."""
    narrowed = {
        slot.name: slot.narrow(trees[slot.name], getattr(before, slot.name), before.scales, count, stream, gate) for slot in slots
    }
    kept = {name: tree for name, (tree, _) in narrowed.items()}
    return kept, {name: scale for _, its in narrowed.values() for name, scale in its.items()}
