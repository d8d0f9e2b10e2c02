"""The leaves of a tree of parameters: which ones are trained, and in which dtype they are computed.

A floating or complex leaf is trained. `None` and `optax.MaskedNode` are empty subtrees to JAX, so
no function sees them. An integer leaf, whose gradient is `float0`, is handed on as it came and has
`None` in the state. A module of Equinox has leaves that are no arrays, such as functions and rates
of dropout. They are taken for `None`, as are the gradients that Equinox gives them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, dtypes, lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

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


def full_beside(leaf: Any, value: Any, dtype: Any, shape: tuple[int, ...] | None = None) -> Array:
    """Returns an array full of one number, on the devices on which a leaf is.

    `jnp.full` would make all of it on the first device. `jnp.full_like` does what is needed of an
    array whose shape is the leaf's, but neither for other shapes nor for a leaf that is traced: a
    constant in a program has no reason to be sharded, so XLA makes it whole on each device.

    Args:
      leaf: an array, its shape, or a traced array.
      value: the number, a scalar.
      dtype: of the array.
      shape: of the array; 1 along axes whose elements share a number. `None`: that of the leaf.
    """
    own = jnp.shape(leaf)
    shape = own if shape is None else shape
    number = jnp.asarray(value, dtype)
    if not isinstance(leaf, jax.core.Tracer):
        made = jnp.full(shape, number, device=_sharding_beside(leaf, own, shape))
        # A program that is being traced may close over an array.
        if not isinstance(leaf, Array) or not isinstance(made, jax.core.Tracer):
            return made
    # A choice that always falls on the number, but that the compiler takes for a function of the
    # leaf: it then has the leaf's sharding, its type where mesh axes are explicit, and varies along
    # the manual axes along which the leaf does.
    barrier: Any = lax.optimization_barrier  # some versions of JAX leave it without types
    never = barrier(np.asarray(False))
    unread = lax.stop_gradient(leaf)
    unread = (lax.real(unread) if jnp.iscomplexobj(unread) else unread).astype(dtype)
    whole = jnp.where(never, unread, number)
    shared = tuple(i for i, n in enumerate(shape) if n != own[i])
    return jnp.max(whole, shared, keepdims=True, initial=number) if shared else whole


def _sharding_beside(leaf: Any, own: tuple[int, ...], shape: tuple[int, ...]) -> Any:
    """Returns the sharding of an array beside a leaf, or `None` for the default device.

    Axes along which the array has 1 are not cut.
    """
    sharding = getattr(leaf, "sharding", None)
    # As JAX does: an array that was put nowhere in particular says nothing of others.
    if sharding is None or not getattr(leaf, "_committed", True):
        return None
    if isinstance(sharding, NamedSharding) and shape != own:
        entries = [*sharding.spec, *[None] * (len(own) - len(sharding.spec))]
        kept = [e if n == of else None for e, n, of in zip(entries, shape, own, strict=True)]
        return compiled_sharding(sharding.mesh, kept, sharding.memory_kind)
    return sharding if shape == own or sharding.is_fully_replicated else None


def compiled_sharding(mesh: Any, entries: Sequence[Any], memory_kind: Any = None) -> NamedSharding:
    """Returns a sharding as a compiled program says it of what it returns.

    Another spelling is another sharding to `jax.jit`, which then compiles a step twice: for the
    fresh state and for the one that it returned.

    Args:
      mesh: the mesh.
      entries: the mesh axes of each axis of an array, or `None`.
      memory_kind: of the devices. `None`: the usual one.
    """
    kept = list(entries)
    while kept and kept[-1] is None and AxisType.Explicit not in (mesh.axis_types or ()):
        kept.pop()
    spec: Any = PartitionSpec  # some versions of JAX leave it without types
    return NamedSharding(mesh, spec(*kept), memory_kind=memory_kind)
