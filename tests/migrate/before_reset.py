"""Parameters, and the state of an optimizer after some steps on drawn gradients."""

import functools
import re

import jax
import numpy as np
from helpers import draw_tree

import adam_jax as aj

SHAPES = {"b": (3,), "head": {"w": (64, 80)}, "w": (64, 80)}
HEAD = r"\['head'\]"

tree = functools.partial(draw_tree, shapes=SHAPES, scale=0.1)
PARAMS = tree(0)
INNER = aj.adam(0.1)


@functools.cache
def jitted(tx):
    return jax.jit(tx.update)


def trained(tx, steps=5, params=PARAMS, state=None, first=1):
    """The last updates and the state after some steps."""
    state, updates = tx.init(params) if state is None else state, None
    for seed in range(first, first + steps):
        updates, state = jitted(tx)(tree(seed), state, params)
    return updates, state


def moments(state):
    """All arrays of moments, by path."""
    located = jax.tree_util.tree_leaves_with_path(state)
    paths = {jax.tree_util.keystr(path): np.asarray(x) for path, x in located}
    return {
        path: x
        for path, x in paths.items()
        if re.search(r"\.(mu|nu|nu_max|mu_slow|scales|weights|weight|age)\b", path)
    }


def head(x):
    return x["head"]["w"]
