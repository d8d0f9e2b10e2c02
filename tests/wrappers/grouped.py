"""Parameters of a small network, steps along gradients that change, and the leaves of one group."""

import re

import jax
import jax.numpy as jnp
import optax
from helpers import draw_tree

import adam_jax as aj
from adam_jax._core.paths import paths

SHAPES = {
    "embed": {"table": (64, 80)},
    "encoder": {"layer_0": {"bias": (3,), "kernel": (2, 3)}, "layer_1": {"bias": (3,)}},
    "head": {"kernel": (64, 80)},
}


def tree(seed, shapes=SHAPES):
    return draw_tree(seed, shapes)


PARAMS = tree(0)
BIAS = r".*/bias"
DEFAULT = aj.adamw(0.1, weight_decay=0.1)


def run(tx, params, grads, steps=3, jit=lambda f: f):
    """Parameters and state after some steps along gradients that change; unjitted, which compiles
    each operation but once.
    """
    state, update = tx.init(params), jit(tx.update)
    for i in range(1, steps + 1):
        updates, state = update(
            jax.tree.map(lambda g, i=i: g * jnp.asarray(i, g.dtype), grads), state, params
        )
        params = optax.apply_updates(params, updates)
    return params, state


def named(tree):
    """Leaves by path."""
    return dict(zip(paths(tree), jax.tree.leaves(tree), strict=True))


def only(pattern, params, others=()):
    """The sub-tree of a group, as a dict by path."""
    keep = lambda path: (
        re.fullmatch(pattern, path) and not any(re.fullmatch(other, path) for other in others)
    )
    return {path: leaf for path, leaf in named(params).items() if keep(path)}


halved = optax.linear_schedule(0.1, 0.01, 5)
adam = aj.adam(0.1)
