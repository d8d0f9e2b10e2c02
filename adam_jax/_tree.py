"""Leaves: which ones have moments, how wide they are computed, and mathematics written once for a leaf and lifted to trees.

Three kinds of leaf travel through every stage. A floating or complex leaf takes part. `None` and `optax.MaskedNode` are
empty subtrees to JAX and so are never seen. An integer leaf, whose gradient is `float0`, is handed on as it came and has
`None` in the state.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, dtypes, lax

PyTree: TypeAlias = Any


def finfo(dtype: Any) -> Any:
    """`jnp.finfo`, which also knows bfloat16 and the complex dtypes."""
    return jnp.finfo(dtype)  # type: ignore[no-untyped-call]


def dtype_of(leaf: Any) -> Any:
    """The dtype of an array, or the one that JAX gives to a Python number or a NumPy array."""
    if isinstance(leaf, np.ndarray) and leaf.dtype != dtypes.float0:
        return jnp.result_type(leaf)
    dtype = leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf)
    if type(dtype).__module__.partition(".")[0] == "torch":
        raise TypeError(f"found a tensor of PyTorch, of {dtype}; expected arrays of JAX or NumPy: params_from_torch makes them.")
    return dtype


def brief(value: Any) -> str:
    """Returns how an error shows a value that was not expected: in short, and never with the elements of an array."""
    if _is_array(value):
        return f"an array of {value.dtype} and shape {value.shape}" if value.shape else repr(value)
    if any(map(_is_array, jax.tree.leaves(value))):
        return f"a value of type {type(value).__name__} that holds arrays"
    text = getattr(value, "__qualname__", None) or repr(value)
    return text if len(text) <= 200 else f"a value of type {type(value).__name__}"


def _is_array(value: Any) -> bool:
    return isinstance(getattr(value, "shape", None), tuple) and hasattr(value, "dtype")


def expect_array(leaf: Any, who: str) -> None:
    """Refuses what is neither an array nor its shape, before JAX does in its own words.

    Raises:
      TypeError: for a function in a module, a string, a tensor of PyTorch.
    """
    try:
        dtype_of(leaf)
    except TypeError as error:
        hint = "Of an Equinox module pass eqx.filter(model, eqx.is_array)."
        said = str(error) if "PyTorch" in str(error) else f"found {brief(leaf)}; expected an array or its shape. {hint}"
        raise TypeError(f"{who}: {said}") from error


def takes_part(leaf: Any) -> bool:
    """Whether a leaf has a gradient that can be averaged: floating or complex, of any width."""
    return bool(jnp.issubdtype(dtype_of(leaf), jnp.inexact))


def narrower_than_float32(leaf: Any) -> bool:
    """Whether a leaf is real and has fewer bits than it is computed in."""
    return takes_part(leaf) and bool(finfo(dtype_of(leaf)).bits < 32)


def is_half(leaf: Any) -> bool:
    """Whether a leaf is bfloat16 or float16."""
    return takes_part(leaf) and bool(finfo(dtype_of(leaf)).bits == 16)


def wide_dtype(leaf: Any) -> Any:
    """The dtype a leaf is computed in: its own, but never narrower than float32."""
    dtype = dtype_of(leaf)
    return dtype if finfo(dtype).bits >= 32 else jnp.dtype(jnp.float32)


def real_dtype(leaf: Any) -> Any:
    """The real dtype a leaf's ν and scalars have: that of its parts where it is complex."""
    return finfo(wide_dtype(leaf)).dtype


def scalar_dtype(tree: PyTree) -> Any:
    """The dtype of a stage's scalars: float64 if any leaf is, else float32, whatever else the tree holds."""
    wide = (real_dtype(leaf) for leaf in jax.tree.leaves(tree) if takes_part(leaf))
    return jnp.dtype(jnp.float64) if any(dtype == jnp.float64 for dtype in wide) else jnp.dtype(jnp.float32)


def wider_dtype(leaf: Any, other: Any) -> Any:
    """The wider dtype of two leaves that take part.

    It is what `jnp.promote_types` gives: of bfloat16 and float16 it is float32, because neither holds the other. Unlike that
    function it works under strict promotion, and for dtypes of 8 bits, of which the wider one is at least float32.
    """
    a, b = dtype_of(leaf), dtype_of(other)
    return a if a == b else np.promote_types(wide_dtype(leaf), wide_dtype(other))


def leaving_dtype(gradient: Any, param: Any) -> Any:
    """The dtype in which the update of a leaf leaves the outermost chain.

    A float32 parameter with a bfloat16 gradient needs a float32 update. In bfloat16 it would lose 16 of its 24 bits.

    Args:
      gradient: the leaf as it entered.
      param: its parameter, or `None`.
    """
    return wider_dtype(gradient, param) if param is not None and takes_part(param) else dtype_of(gradient)


def as_wide(leaf: Any) -> Array:
    """A leaf in the dtype it is computed in."""
    wide = wide_dtype(leaf)
    return leaf if isinstance(leaf, Array) and leaf.dtype == wide else jnp.asarray(leaf, wide)


def as_wide_as(leaf: Any, *others: Any) -> Any:
    """Returns a leaf in a dtype that holds it and the others, if the dtype that it is computed in does not.

    Args:
      leaf: a leaf that takes part.
      *others: leaves that take part, or `None`.
    """
    wide = np.result_type(*(wide_dtype(x) for x in (leaf, *others) if x is not None))
    return leaf if wide == wide_dtype(leaf) else jnp.asarray(leaf, wide)


def widen(grad: Any) -> Array:
    """A gradient leaf in its computing dtype, saturated where its square would overflow.

    Without the limit (2⁶² ≈ 4.6e18 in float32) one gradient of 1e20 makes ν infinite, and the parameter never moves again.
    The same limited value feeds both moments, so the step keeps its bound. An infinity saturates like any large number; NaN
    stays NaN.
    """
    g = as_wide(grad)
    real = finfo(g.dtype)
    largest = np.asarray(2.0 ** (real.maxexp // 2 - 2), real.dtype)
    if jnp.iscomplexobj(g):
        return lax.complex(lax.clamp(-largest, lax.real(g), largest), lax.clamp(-largest, lax.imag(g), largest))
    return lax.clamp(-largest, g, largest)


# What runs once for every leaf is written in lax: jnp's operators cost three times as long to trace, and at five hundred
# leaves tracing is a fifth of the compile time.


def square(x: Array) -> Array:
    """|x|², real."""
    return lax.add(square(lax.real(x)), square(lax.imag(x))) if jnp.iscomplexobj(x) else lax.mul(x, x)


def times(x: Array, factor: Array) -> Array:
    """x·factor for a real factor of any float dtype, also where x is complex (strict promotion does not mix the two)."""
    return _on_parts(lax.mul, x, factor)


def over(x: Array, divisor: Array) -> Array:
    """x/divisor for a real divisor; complex division would square it, and overflow."""
    return _on_parts(lax.div, x, divisor)


def _on_parts(f: Callable[[Any, Any], Array], x: Array, real: Array) -> Array:
    if jnp.iscomplexobj(x):
        return lax.complex(_on_parts(f, lax.real(x), real), _on_parts(f, lax.imag(x), real))
    return f(x, real if real.dtype == x.dtype else real.astype(x.dtype))


def lerp(start: Array, end: Array, share: Array) -> Array:
    """Start + share·(end − start): what is added is small where `share` is, and so is its rounding error."""
    return lax.add(start, times(lax.sub(end, start), share))


def averaging(decay: float | Array, keep: Array, rate: Array) -> Callable[[Array, Array], Array]:
    """The step of an average, (average, x) -> decay·average + (1 − decay)·x, in the form whose rounding errors do not grow.

    From the average towards x where little of x is taken. From x towards the average where little of the average is kept: with
    a decay of 0 that is x itself, where the other form leaves the last bits of an average that may be far larger.

    Args:
      decay: the decay as it was given; for a traced one both forms are computed, and one is selected.
      keep: the decay as a scalar array.
      rate: 1 − decay, likewise.
    """

    def little_taken(average: Array, x: Array) -> Array:
        return lerp(average, x, rate)

    def little_kept(average: Array, x: Array) -> Array:
        return lerp(x, average, keep)

    if isinstance(decay, float):
        return little_taken if decay >= 0.5 else little_kept
    return lambda average, x: jnp.where(keep < 0.5, little_kept(average, x), little_taken(average, x))


def like_params(make: Callable[[Any], Any], params: PyTree) -> PyTree:
    """A state tree: `make(leaf)` where a leaf takes part, `None` where it does not."""
    return jax.tree.map(lambda p: make(p) if takes_part(p) else None, params)


def lift(f: Callable[..., Any], updates: PyTree, /, *, outputs: int = 1, free: tuple[str, ...] = (), **others: PyTree) -> Any:
    """Applies a leaf's mathematics to trees, and is where trees that do not fit are refused.

    Args:
      f: takes a leaf of `updates` and, by position, the leaves of the other trees at its place.
      updates: the tree whose structure and shapes the others must have.
      outputs: how many trees `f` makes. The first stands where `updates` stood: leaves that take no part are handed on in
        it, and are `None` in the rest.
      free: names among `others` whose leaves may be 1 along any axis (a ν that a block shares).
      **others: trees under the names that an error message gives them; `None` stands for a tree that is not there.

    Raises:
      ValueError: where the trees differ, with the path of the leaf, both shapes, and what to do.
    """
    located, structure = _located(updates)
    columns = []
    for name, other in others.items():
        if other is None:
            columns.append([None] * len(located))
            continue
        try:
            column = structure.flatten_up_to(other)
        except (ValueError, TypeError):
            column = None
        if column is None or not _fits(located, column, name in free):
            raise ValueError(_misfit(located, updates, name, other, name in free))
        columns.append(column)
    rows = []
    for (_, leaf), *rest in zip(located, *columns, strict=True):
        if takes_part(leaf):
            made = f(leaf, *rest)
            rows.append((made,) if outputs == 1 else made)
        else:
            rows.append((leaf,) + (None,) * (outputs - 1))
    trees = tuple(structure.unflatten([row[i] for row in rows]) for i in range(outputs))
    return trees[0] if outputs == 1 else trees


def _located(tree: PyTree) -> tuple[list[Any], Any]:
    return jax.tree_util.tree_flatten_with_path(tree)


def _fits(located: list[Any], column: list[Any], free: bool) -> bool:
    return all(
        _matches(leaf, other, free) if takes_part(leaf) else not _is_moment(other)
        for (_, leaf), other in zip(located, column, strict=True)
    )


def _is_moment(other: Any) -> bool:
    return hasattr(other, "dtype") and takes_part(other)


def _matches(leaf: Any, other: Any, free: bool) -> bool:
    if isinstance(other, bool):
        return True  # a flag of the leaf, not an array
    if not (hasattr(other, "shape") or jnp.isscalar(other)):
        return False
    shape, found = jnp.shape(leaf), jnp.shape(other)
    return shape == found or (free and len(shape) == len(found) and all(n in (1, m) for n, m in zip(found, shape, strict=True)))


def _misfit(located: list[Any], updates: PyTree, name: str, other: PyTree, free: bool) -> str:
    remedy = (
        "Shapes are never broadcast. Pass gradients of the very parameters that `init` was given, "
        "or call `init` again for the new ones."
    )
    found = {jax.tree_util.keystr(path): jnp.shape(leaf) for path, leaf in located if takes_part(leaf)}
    wanted = {jax.tree_util.keystr(path): jnp.shape(leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(other)[0]}
    for path, shape in found.items():
        if path in wanted and wanted[path] != shape and not (free and len(shape) == len(wanted[path])):
            return f"at leaf {path} the gradient has shape {shape}, but {name} has shape {wanted[path]}. {remedy}"
    for path, leaf in located:
        name_of = jax.tree_util.keystr(path)
        if not takes_part(leaf) and name_of in wanted:
            return (
                f"at leaf {name_of} the gradient has dtype {dtype_of(leaf)}, but {name} is floating there; expected a floating "
                f"gradient. {remedy}"
            )
    extra, missing = sorted(found.keys() - wanted.keys()), sorted(wanted.keys() - found.keys())
    says = [f"leaves with a gradient that {name} does not have: {_some(extra)}"] if extra else []
    says += [f"leaves of {name} without a gradient: {_some(missing)}"] if missing else []
    if not says:
        says = [f"the gradients are {jax.tree.structure(updates)}, {name} is {jax.tree.structure(other)}"]
    return f"the gradients' tree is not that of {name}: {'; '.join(says)}. {remedy}"


def _some(paths: list[str]) -> str:
    shown = ", ".join(paths[:3])
    return shown + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")


def nodes(tree: PyTree, kind: type) -> list[Any]:
    """The nodes of a kind, wherever in a tree they are."""
    found = jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, kind))
    return [node for node in found if isinstance(node, kind)]


def all_wide(tree: PyTree) -> PyTree:
    """A tree whose leaves have the dtypes they are computed in; those that take no part stay."""
    return jax.tree.map(lambda leaf: as_wide(leaf) if takes_part(leaf) else leaf, tree)


def expect_params(params: PyTree | None, who: str) -> PyTree:
    """`params`, if they are there."""
    if params is None:
        raise ValueError(f"{who} needs the parameters, and `update` was called without: call update(grads, state, params).")
    return params


def narrow(updates: PyTree, gradient: PyTree, params: PyTree | None, rounded: bool = False) -> PyTree:
    """Rounds updates, once, to the wider of the dtypes of `gradient` and `params`.

    The update of an integer leaf is zero: in its parameter's dtype, since `float0` cannot be added and `optax.apply_updates`
    would stop at it. Without `params` a `float0` stays what it is.

    Args:
      updates: what the stages made, float32 or wider.
      gradient: a tree whose leaves have the gradients' dtypes.
      params: the parameters. Without them the dtypes are those of `gradient`.
      rounded: whether the updates of half-precision parameters step from number to number. These stay as they are.
    """

    def leaf(u: Array, g: Any, p: Any) -> Array:
        return u if rounded and is_half(p) else u.astype(leaving_dtype(g, p))

    narrowed = lift(leaf, updates, incoming=gradient, params=params)

    def still(u: Any, p: Any = None) -> Any:
        if takes_part(u) or (p is None and dtype_of(u) == dtypes.float0):
            return u
        return jnp.zeros(jnp.shape(u), dtype_of(u if p is None else p))

    return jax.tree.map(still, narrowed, *([] if params is None else [params]))
