"""Random runs are the same, jitted, scanned or neither, up to last digits.

The oracle is the jitted step, from the same state. `pytest -m fuzz` takes hundreds of new examples.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from drawn_runs import OUR_LINKS, assert_same, moved, nightly, ordinary, ready, start
from helpers import QUICKLY
from hostile import cases
from hostile_values import gradients, is_integer
from hypothesis import given

FEW_SHAPES = ((3,), (2, 3), (3, 0), (1, 2, 1, 2, 1, 2))
"""Unjitted operations are compiled once a shape.

No scalars: inside a scan XLA makes other instructions of them.
"""


@ordinary(6)
@given(cases(FEW_SHAPES[1:2], most=2, links=OUR_LINKS))
def test_jitted_scanned_or_not_is_the_same(case):
    check_ways(case)


@nightly(600)
@given(cases(FEW_SHAPES, most=2, links=OUR_LINKS))
def test_thousands_of_ways_are_the_same(case):
    check_ways(case)


def check_ways(case):
    """Each way takes each step from the same state, because a last digit may become a code."""
    with ready(case):
        params, state, step = start(case)
        jitted = jax.jit(step, compiler_options=QUICKLY)

        def body(carry, grads):
            whole = jax.tree.unflatten(jax.tree.structure(carry[0]), fill(case, grads))
            updates, after = step(*carry, whole)
            return (moved(carry[0], updates), after), updates

        @functools.partial(jax.jit, compiler_options=QUICKLY)
        def scanned(params, state, grads):
            stacked = jax.tree.map(
                lambda g: None if g.dtype == jax.dtypes.float0 else jnp.asarray(g)[None], grads
            )
            (_, after), updates = jax.lax.scan(body, (params, state), stacked, length=1)
            return jax.tree.map(lambda update: update[0], updates), after

        for t in range(3):
            grads = gradients(case, t)
            updates, after = jitted(params, state, grads)
            assert_same((updates, after), step(params, state, grads), "jit", exact=False)
            assert_same((updates, after), scanned(params, state, grads), "scan", exact=False)
            params, state = moved(params, updates), after


def fill(case, grads):
    """The leaves of gradients, with a `float0` where an integer has none."""
    left = iter(jax.tree.leaves(grads))
    return [
        np.zeros(leaf.shape, jax.dtypes.float0) if is_integer(leaf) else next(left)
        for leaf in jax.tree.leaves(case.tree)
    ]
