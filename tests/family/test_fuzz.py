"""Whatever is legal: random trees, optimizers, numbers, storages, stages and gradients. A run keeps
its types, stays finite and within its bound.

The tests run over some examples in every run, the same ones each time; `pytest -m fuzz` takes
thousands of new ones. The oracle is the bound of `hostile_bounds.py`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn_runs import FOUND_AS_IT_IS, LENIENT, moved, nightly, ready, start
from helpers import QUICKLY, avals
from hostile import cases
from hostile_bounds import bound
from hostile_values import gradients, is_half, is_integer
from hypothesis import given, seed, settings

import adam_jax as aj

STEPS = 8


@pytest.mark.parametrize("name", aj.family.__all__)
def test_a_run_keeps_its_types_stays_finite_and_within_its_bound(name):
    @seed(
        aj.family.__all__.index(name)
    )  # or every member would get the same trees, storages and links
    @settings(max_examples=3, **FOUND_AS_IT_IS, **LENIENT)
    @given(cases(most=2, members=(name,)))
    def run(case):
        check_run(case, QUICKLY)  # which compiles faster

    run()


@nightly(4200)
@given(cases())
def test_thousands_of_runs_do(case):
    check_run(case)


def check_run(case, options=None):
    with ready(case):
        params, state, step = start(case)
        types = avals(state)
        assert avals(jax.eval_shape(case.transformation().init, params)) == types

        def whole_step(params, state, grads):
            updates, state = step(params, state, grads)
            return updates, state, moved(params, updates)

        compiled = jax.jit(whole_step, compiler_options=options)
        history = []
        for t in range(STEPS):
            grads = gradients(case, t)
            history.append((params, grads))
            updates, state, params = compiled(params, state, grads)
            assert avals(state) == types
            assert_fits(case, updates, params)
            within = assert_bounded(case, t, updates, history)
            assert_finite(state, within)
            assert avals(params) == avals(history[0][0])


def assert_fits(case, updates, params):
    """The tree and the dtypes are the gradients'; an integer's update is a zero that
    can be added.
    """
    rounds = {"round_stochastically", "compensate"} & set(case.links)

    def expected(leaf, p):
        return (leaf.shape, jnp.dtype("float32" if rounds and is_half(leaf) else leaf.dtype), False)

    assert avals(updates) == jax.tree.map(expected, case.tree, params)


def assert_bounded(case, t, updates, history):
    """An update is finite and within its bound.

    An infinity is right where the bound is more than the dtype holds, NaN never.
    """
    within = True
    columns = [jax.tree.leaves(tree) for pair in history for tree in pair]
    for i, (path, leaf) in enumerate(jax.tree_util.tree_leaves_with_path(case.tree)):
        update = np.asarray(jax.tree.leaves(updates)[i])
        if is_integer(leaf):
            assert not update.any(), path
            continue
        with np.errstate(all="ignore"):  # a bound may be infinite
            most = (
                bound(case, leaf, t, [c[i] for c in columns[::2]], [c[i] for c in columns[1::2]])
                * 1.02
            )
        size = np.max(np.abs(update.astype(np.complex128)), initial=0)
        assert not np.isnan(size), (jax.tree_util.keystr(path), t)
        info = jnp.finfo(update.dtype)
        if most < float(info.max):
            assert size <= most + float(info.smallest_subnormal), (
                jax.tree_util.keystr(path),
                t,
                size,
                most,
            )
        else:
            within = False
    return within


def assert_finite(state, within):
    """All of a state is; but an average of parameters whose update their dtype cannot hold."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        if jnp.issubdtype(leaf.dtype, jnp.inexact) and (
            within or "average" not in jax.tree_util.keystr(path)
        ):
            assert np.isfinite(np.asarray(leaf, np.complex128)).all(), jax.tree_util.keystr(path)
