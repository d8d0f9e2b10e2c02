"""Step counts at their limit saturate, and every update stays finite.

The oracle is the limit of int32, and debias factors computed by hand.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from counted import counted, start
from helpers import QUICKLY

import adam_jax as aj

OPTIMIZED = True  # it computes for longer than it compiles

LAST = 2**31 - 1


def counts(state):
    """The step counts in a state, by path."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {
        jax.tree_util.keystr(path): leaf
        for path, leaf in leaves
        if leaf.dtype == jnp.int32 and leaf.shape == ()
    }


COUNTS = (LAST - 1, LAST, -1, 0, -(2**31))


@functools.cache
def counting():
    """By first count and name: updates and states of three steps; one program for all members, and
    for links behind one.
    """
    params, grads = start()
    links = (
        aj.stages.cautious(),
        aj.stages.clip_update_rms(),
        aj.round_stochastically(),
        aj.stages.average_parameters(0.9),
    )
    txs = {name: getattr(aj, name)(0.1) for name in aj.family.__all__} | {
        "links": aj.chain(aj.adam(0.1), *links)
    }

    @functools.partial(jax.jit, compiler_options=QUICKLY)
    def update(states):
        return {name: tx.update(grads, states[name], params) for name, tx in txs.items()}

    def states(found):
        return {name: state for name, (_, state) in found.items()}

    first, found = states(update({name: tx.init(params) for name, tx in txs.items()})), {}
    for count in COUNTS:
        steps = [update(counted(first, count))]
        for _ in range(2):
            steps.append(update(states(steps[-1])))
        found[count] = jax.device_get(steps)
    return found


@pytest.mark.parametrize("name", [*aj.family.__all__, "links"])
def test_a_count_saturates_and_all_stays_finite(name):
    for count in COUNTS:
        for step, found in enumerate(counting()[count], 1):
            updates, state = found[name]
            assert len(counts(state)) > (1 if name == "links" else 0)
            assert {int(found) for found in counts(state).values()} == {min(count + step, LAST)}
            assert all(
                np.isfinite(np.asarray(x, np.float32)).all()
                for x in jax.tree.leaves((updates, state))
            )


@pytest.mark.parametrize("count", [LAST - 1, -1, 0])
def test_weights_do_not_know_the_count(count):
    """After n steps they are 1 − βⁿ, whatever the count says; and so is all that is divided by
    them.
    """
    tx = aj.adam(1.0, 0.5, 0.75, 0.0)
    grad = jnp.asarray([3.0, -2.0])
    _, state = tx.update(grad, tx.init(grad))
    state = counted(state, count)
    for n in (2, 3):
        updates, state = tx.update(grad, state)
        np.testing.assert_array_equal(state[0].weights, [[1 - 0.5**n, 1 - 0.75**n], [0, 0]])
        np.testing.assert_allclose(updates, [-1, 1], rtol=1e-6)


def test_the_parts_that_count_take_their_limits_for_what_they_are():
    """By hand:

    ADOPT clips to t^¼ and takes a count of 0, and only that, for its first step, at which it stands
    still.
    """
    tx, grad = aj.adopt(1.0, 0.5, 0.75, 0.0), jnp.asarray([3.0, -2.0])
    _, first = tx.update(grad, tx.init(grad))
    for count, moves, nu_weight in [(LAST - 1, True, 1.0), (-1, True, 1.0), (0, False, 1.0)]:
        updates, state = tx.update(grad, counted(first, count))
        # d = g/|g|, which a limit of 0 clips: counts below 0 have the limit of 0.
        np.testing.assert_allclose(
            updates, [-0.5, 0.5] if moves and count > 0 else [0, 0], rtol=1e-6
        )
        assert state[0].weights[0, 0] == nu_weight
