"""Blocks: elements of a leaf that share one ν."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
from jax import Array

from adam_jax._core.boxes import without_shared_names
from adam_jax._core.leaves import PyTree, takes_part
from adam_jax._core.sums import mean
from adam_jax.storage.slot import MomentSlot

Blocks: TypeAlias = Literal["leaf", "output"] | Callable[[str, tuple[int, ...]], tuple[int, ...]]


def block_mean(x: Array, shape: tuple[int, ...]) -> Array:
    """The mean over the axes that are 1 in `shape`, of which blocks share one number."""
    shared = tuple(axis for axis, size in enumerate(shape) if size == 1 != x.shape[axis])
    return mean(x, shared) if shared else x


def expect_blocks(blocks: Blocks | None, grads: PyTree, nu: PyTree) -> None:
    """Refuses a ν whose elements are shared by other blocks than here.

    One that no block shares would fit all gradients.
    """
    leaves = jax.tree.leaves(nu)
    located = [(path, g) for path, g in jax.tree_util.tree_leaves_with_path(grads) if takes_part(g)]
    if len(leaves) != len(located):
        return  # another tree: `lift` says in what it differs
    for (path, grad), x in zip(located, leaves, strict=True):
        expected = shape_of_nu(blocks, path, grad)
        in_blocks = len(expected) == x.ndim and all(
            n in (1, m) for n, m in zip(x.shape, jnp.shape(grad), strict=True)
        )
        if x.shape != expected and in_blocks:
            raise ValueError(
                f"track_moments: at leaf {jax.tree_util.keystr(path)} the state's nu has shape "
                f"{x.shape}; expected {expected} with blocks={blocks!r}: another transformation "
                "shares it otherwise. Carry the run over with convert_state(state, from_tx, "
                "to_tx, params), or pass the state that `init` of this one made."
            )


def first_nu(blocks: Blocks | None, slot: MomentSlot, params: PyTree) -> PyTree:
    """Returns ν before the first step, in the shapes that its blocks have."""

    def first(path: Any, p: Any) -> Array | None:
        return slot.first(p, shape_of_nu(blocks, path, p)) if takes_part(p) else None

    nu = jax.tree_util.tree_map_with_path(first, params)
    return nu if blocks is None else without_shared_names(nu)


def shape_of_nu(blocks: Blocks | None, path: Any, leaf: Any) -> tuple[int, ...]:
    """The shape of a leaf's ν: 1 along every axis that a block spans."""
    shape = jnp.shape(leaf)
    if blocks is None:
        return shape
    all_but_last = tuple(range(len(shape) - 1))
    whole = tuple(range(len(shape)))
    axes = (
        blocks(jax.tree_util.keystr(path), shape)
        if callable(blocks)
        else whole
        if blocks == "leaf"
        else all_but_last
    )
    if not all(-len(shape) <= axis < len(shape) for axis in axes):
        raise ValueError(
            f"blocks: found the axes {axes} for {jax.tree_util.keystr(path)} of shape {shape}; "
            "expected its own."
        )
    shared = {axis % len(shape) for axis in axes}
    return tuple(1 if axis in shared else size for axis, size in enumerate(shape))
