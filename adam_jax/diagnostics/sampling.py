"""A few elements of what travels through a chain."""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import AxisType, PartitionSpec

from adam_jax._core.configuration import scalar_fields
from adam_jax._core.context import Context, Interceptor
from adam_jax._core.leaves import PyTree, takes_part
from adam_jax._core.paths import Parameters, owner
from adam_jax._core.transformation import Transformation, call_update
from adam_jax.stages.moments import Moments

LEAVES = 32
"""So many leaves of a group are looked at: a few operations for each of a thousand leaves would be
minutes of compiling."""


SLICED = 16
"""The largest stride of a slice. For larger ones a TPU's compiler copies codes, or wants more of
the chip's own memory than there is; to gather takes longer to compile."""


class WholeStep(NamedTuple):
    """A step of a transformation.

    Attributes:
      tx: the transformation.
      gradient: what came in.
      made: the updates that came out.
      state: the state before the step.
      params: the parameters before the step.
    """

    tx: Any
    gradient: PyTree
    made: PyTree
    state: Any
    params: PyTree


class Probe(Interceptor):
    """Follows the updates through a chain, and into each group inside.

    It takes a few elements of every leaf.

    The stages run on these few once more. To take them from what the stages make would be shorter;
    but XLA would then keep whole arrays for it, of directions and updates, which otherwise never
    leave the registers.

    Args:
      quota: how many elements of a leaf to take, from how many it has.
    """

    def __init__(self, quota: Callable[[int], int]) -> None:
        self.quota = quota
        self.groups: dict[str, Probe] = {}
        self.flowing: Any = None
        self.lost = False
        self.quotients: list[tuple[Any, Moments, Any, PyTree]] = []
        self.selector: Any = None
        self.step: WholeStep | None = None

    def group(self, name: str) -> Probe:
        """The probe of a group."""
        self.groups[name] = Probe(self.quota)
        return self.groups[name]

    def before(self, part: Any, updates: Any, state: Any, params: PyTree, context: Context) -> None:
        """Runs a stage on the elements.

        It begins with the first stage that makes moments or stands behind groups, and ends before
        the one that rounds.
        """
        begun = self.flowing is not None or bool(self.groups)
        self.selector = context.selector or self.selector
        if not isinstance(part, Transformation):
            self.lost = begun
        elif part.init.spec.stages or part.init.spec.inner or part.interface.end or self.lost:
            return
        elif begun or part.interface.gives == "moments":
            few = functools.partial(self.few, shapes=shapes_of(params))
            held = self.few(state, shapes_of(params, part, state))
            taken = few(updates) if self.flowing is None else self.flowing
            gradient = None if context.gradient is None else few(context.gradient)
            inner = context._replace(gradient=gradient, probe=None)
            given, _ = call_update(part, taken, held, few(params), inner)
            if (
                isinstance(taken, Moments)
                and not isinstance(given, Moments)
                and not context.applied
            ):
                self.quotients.append((part, taken, held, given))
            self.flowing = given

    def end(self, tx: Any, gradient: PyTree, made: PyTree, state: Any, params: PyTree) -> None:
        """Notes the whole step."""
        self.step = WholeStep(tx, gradient, made, state, params)

    def few(self, tree: PyTree, shapes: Parameters) -> PyTree:
        """Returns the tree with some elements of each array that belongs to a parameter.

        They are at the same places in all arrays.
        """
        chosen = _chosen(shapes)

        def leaf(path: Any, x: Any) -> Any:
            whole = owner(path, jnp.shape(x), shapes)
            if whole is None:
                return x
            x = jnp.asarray(x)
            return (
                self._take(x, shapes[whole]) if whole in chosen else _everywhere(lambda x: x[:0], x)
            )

        return jax.tree_util.tree_map_with_path(leaf, tree)

    def _take(self, leaf: Array, shape: tuple[int, ...]) -> Array:
        """Elements from a grid as wide as the quota wants it.

        It is cut as the leaf is, over many devices too.
        """
        strides = [1] * len(shape)
        while math.prod(-(-n // s) for n, s in zip(shape, strides, strict=True)) > self.quota(
            math.prod(shape)
        ):
            longest = max(range(len(shape)), key=lambda i: shape[i] / strides[i])
            strides[longest] *= 2
        strides = [
            s if n > 1 else 1 for n, s in zip(leaf.shape, strides, strict=True)
        ]  # an axis along which ν is shared
        # From the middle of a cell: the first row of a table is often one of a kind.
        starts = [min(s // 2, max(n - 1, 0)) for n, s in zip(leaf.shape, strides, strict=True)]
        return _everywhere(functools.partial(_grid, starts=starts, strides=strides), leaf)


def _grid(leaf: Array, starts: Sequence[int], strides: Sequence[int]) -> Array:
    """The elements of a grid."""
    if max(strides, default=1) <= SLICED:
        return lax.slice(leaf, starts, leaf.shape, strides)
    places = jnp.ix_(
        *(np.arange(start, n, s) for start, n, s in zip(starts, leaf.shape, strides, strict=True))
    )
    taken: Array = leaf.at[places].get(
        indices_are_sorted=True, unique_indices=True, mode="promise_in_bounds"
    )
    return taken


def _everywhere(take: Callable[[Array], Array], leaf: Array) -> Array:
    """Returns what `take` makes of a leaf, on all devices where mesh axes are explicit.

    There JAX neither slices an axis into parts that do not divide, nor joins samples of leaves that
    are sharded differently.
    """
    sharding: Any = getattr(jax.typeof(leaf), "sharding", None)
    explicit = sharding is not None and AxisType.Explicit in (sharding.mesh.axis_types or ())
    if not explicit or not hasattr(jax.sharding, "auto_axes"):  # which JAX 0.6 has elsewhere
        return take(leaf)
    spec: Any = PartitionSpec  # some versions of JAX leave it without types
    # The mesh of the leaf, because a program need not be in that of `jax.set_mesh`.
    with jax.sharding.use_abstract_mesh(sharding.mesh):
        taken: Array = jax.sharding.auto_axes(take, out_sharding=spec())(leaf)
    return taken


def _chosen(shapes: Parameters) -> set[Any]:
    """The leaves that are looked at.

    The largest, and of those that are alike some from everywhere.
    """

    def rank(path: Any) -> tuple[int, int]:
        return -math.prod(shapes[path]), zlib.crc32(jax.tree_util.keystr(path).encode())

    return set(sorted(shapes, key=rank)[:LEAVES])


def shapes_of(params: PyTree, tx: Any = None, state: Any = None) -> Parameters:
    """Returns the shapes of the trained leaves by their keys.

    Args:
      params: the parameters.
      tx: for arrays of a state: the transformation that it is of.
      state: for arrays of a state: the state.
    """
    located = jax.tree_util.tree_flatten_with_path(params)[0]
    shapes = {path: jnp.shape(leaf) for path, leaf in located if takes_part(leaf)}
    return Parameters(shapes, () if state is None else scalar_fields(tx, state))
