"""A state that shares no memory with what it was made of, so that it can be donated."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from adam_jax._core.leaves import PyTree


def owned(made: PyTree, *given: PyTree) -> PyTree:
    """Returns a tree whose arrays share no buffer with given ones, nor with one another.

    A training step donates its state. If a part of the state were an array that the caller still
    has, the step would delete it; if it were two leaves, the step would fail. Only arrays that are
    shared are copied, where they live and as they are sharded. Under `jax.jit` there are no buffers
    yet, and nothing is done.

    Args:
      made: the new state.
      *given: what the caller keeps: the old state, the parameters.
    """
    seen: set[Any] = set()
    for leaf in jax.tree.leaves(given):
        seen |= _buffers(leaf)

    def own(leaf: Any) -> Any:
        buffers = _buffers(leaf)
        shared = bool(buffers & seen)
        seen.update(buffers)
        return jnp.copy(leaf) if shared else leaf

    return jax.tree.map(own, made)


def _buffers(leaf: Any) -> set[Any]:
    """The memory of an array, by keys to compare: its object, and the addresses of its shards."""
    if not isinstance(leaf, jax.Array) or isinstance(leaf, jax.core.Tracer):
        return set()
    found: set[Any] = {("object", id(leaf))}
    try:
        for shard in leaf.addressable_shards:
            if shard.data.size:
                found.add((shard.device, shard.data.unsafe_buffer_pointer()))
    except (RuntimeError, ValueError, TypeError, AttributeError, NotImplementedError):
        pass  # deleted, a key, or a backend without pointers: the object alone tells it
    return found
