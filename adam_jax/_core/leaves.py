"""The leaves of a tree of parameters: which ones are trained, and in which dtype they are computed.

A floating or complex leaf is trained. `None` and `optax.MaskedNode` are empty subtrees to JAX, so
no function sees them. An integer leaf, whose gradient is `float0`, is handed on as it came and has
`None` in the state. A module of Equinox has leaves that are no arrays, such as functions and rates
of dropout. They are taken for `None`, as are the gradients that Equinox gives them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, dtypes

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
        raise TypeError(
            f"found a tensor of PyTorch, of {dtype}; expected arrays of JAX or NumPy: "
            "params_from_torch makes them."
        )
    return dtype


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
    """The dtype of a stage's scalars.

    Float64 if any leaf is, else float32, whatever else the tree holds.
    """
    wide = (real_dtype(leaf) for leaf in jax.tree.leaves(tree) if takes_part(leaf))
    return (
        jnp.dtype(jnp.float64)
        if any(dtype == jnp.float64 for dtype in wide)
        else jnp.dtype(jnp.float32)
    )


def wider_dtype(leaf: Any, other: Any) -> Any:
    """The wider dtype of two leaves that take part.

    It is what `jnp.promote_types` gives: of bfloat16 and float16 it is float32, because neither
    holds the other. Unlike that function it works under strict promotion, and for dtypes of 8 bits,
    of which the wider one is at least float32.
    """
    a, b = dtype_of(leaf), dtype_of(other)
    return a if a == b else np.promote_types(wide_dtype(leaf), wide_dtype(other))


def leaving_dtype(gradient: Any, param: Any) -> Any:
    """The dtype in which the update of a leaf leaves the outermost chain.

    A float32 parameter with a bfloat16 gradient needs a float32 update. In bfloat16 it would lose
    16 of its 24 bits.

    Args:
      gradient: the leaf as it entered.
      param: its parameter, or `None`.
    """
    return (
        wider_dtype(gradient, param)
        if param is not None and takes_part(param)
        else dtype_of(gradient)
    )


def as_wide(leaf: Any) -> Array:
    """A leaf in the dtype it is computed in."""
    wide = wide_dtype(leaf)
    return leaf if isinstance(leaf, Array) and leaf.dtype == wide else jnp.asarray(leaf, wide)


def as_wide_as(leaf: Any, *others: Any) -> Any:
    """Returns a leaf in a dtype that holds it and the others.

    If the dtype that it is computed in does not.

    Args:
      leaf: a leaf that takes part.
      *others: leaves that take part, or `None`.
    """
    wide = np.result_type(*(wide_dtype(x) for x in (leaf, *others) if x is not None))
    return leaf if wide == wide_dtype(leaf) else jnp.asarray(leaf, wide)


def like_params(make: Callable[[Any], Any], params: PyTree) -> PyTree:
    """A state tree: `make(leaf)` where a leaf takes part, `None` where it does not."""
    return jax.tree.map(lambda p: make(p) if takes_part(p) else None, params)


def is_module(node: Any) -> bool:
    """Whether it is a module of Equinox, by its classes' names. Equinox need not be there."""
    return any(
        kind.__name__ == "Module" and kind.__module__.startswith("equinox.")
        for kind in type(node).__mro__
    )


def arrays_of(params: PyTree) -> PyTree:
    """Returns parameters with `None` for the leaves of Equinox's modules that are no arrays.

    Elsewhere a Python number is a parameter, and a function is an error. In a module a number is a
    setting: `eqx.nn.Dropout` has its rate among the leaves.
    """
    if not any(map(is_module, jax.tree.leaves(params, is_leaf=is_module))):
        return params

    def kept(node: Any) -> Any:
        if not is_module(node):
            return node
        return jax.tree.map(lambda leaf: leaf if _is_array(leaf) else None, node)

    return jax.tree.map(kept, params, is_leaf=is_module)


def beside(updates: PyTree, params: PyTree) -> PyTree:
    """Returns parameters without the leaves that have no gradient and cannot be trained.

    Beside the gradients of `eqx.filter_grad`, which are `None` for them, a whole module stands:
    functions, settings, arrays of integers. A leaf that could be trained stays, so that `lift` says
    that its gradient is missing.
    """
    given: Any = jax.tree.structure(params)
    if params is None or given == jax.tree.structure(updates):
        return params

    def kept(update: Any, param: Any) -> Any:
        if update is None and not any(map(_trainable, jax.tree.leaves(param))):
            return None
        return param

    try:
        return jax.tree.map(kept, updates, params, is_leaf=lambda update: update is None)
    except (ValueError, TypeError):
        return params  # another tree: `lift` says in what it differs


def _is_array(leaf: Any) -> bool:
    """Whether it is an array or its shape. A Python number is none."""
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


def _trainable(leaf: Any) -> bool:
    return _is_array(leaf) and takes_part(leaf)


def find_nodes(tree: PyTree, kind: type) -> list[Any]:
    """The nodes of a kind, wherever in a tree they are."""
    found = jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, kind))
    return [node for node in found if isinstance(node, kind)]


def all_wide(tree: PyTree) -> PyTree:
    """A tree whose leaves have the dtypes they are computed in; those that take no part stay.

    A shape stays a shape: Optax makes states of `jax.ShapeDtypeStruct`s, too.
    """

    def leaf(x: Any) -> Any:
        if not takes_part(x):
            return x
        if is_shape(x):
            shape: Any = jax.ShapeDtypeStruct  # some versions of JAX leave it without types
            return shape(x.shape, wide_dtype(x), sharding=x.sharding)
        return as_wide(x)

    return jax.tree.map(leaf, tree)


def is_shape(leaf: Any) -> bool:
    """Whether a leaf says a shape and a dtype, and has no values."""
    return isinstance(leaf, jax.ShapeDtypeStruct)
