"""`reset`: what starts afresh steps as a new run does, and what does not as if nothing had
happened.

The oracles are the uninterrupted run and a fresh state whose counts alone are those of the run.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from before_reset import HEAD, INNER, PARAMS, head, moments, tree

import adam_jax as aj

# Every member, and each kind of moment at rest in fewer bits.
NARROW = ("amsgrad", "adopt", "ademamix")
MEMBERS = {
    name: (getattr(aj, name.split()[0])(0.1, storage=form))
    for name, form in [
        *((name, "float32") for name in aj.family.__all__),
        *((f"{name} narrow", ("8bit", "bfloat16")) for name in NARROW),
    ]
}
WRAPPERS = {
    "chain": optax.chain(optax.clip_by_global_norm(1.0), INNER),
    "masked": optax.masked(INNER, {"b": True, "head": True, "w": False}),
    "MultiSteps": optax.MultiSteps(INNER, 1).gradient_transformation(),
    "inject": optax.inject_hyperparams(aj.adam)(learning_rate=0.1),
    "partition": optax.partition(
        {0: INNER, 1: aj.adabelief(0.2)}, {"b": 0, "head": {"w": 1}, "w": 1}
    ),
    "nested": aj.chain(
        aj.chain(INNER, aj.stages.cautious(after_learning_rate=True)),
        aj.stages.average_parameters(0.9),
    ),
}
INSIDE = dict.fromkeys(WRAPPERS, INNER) | {
    "partition": aj.adabelief(0.2),
    "nested": WRAPPERS["nested"],
}
"""What of this package the head is trained by, inside a wrapper."""

TXS = MEMBERS | WRAPPERS


@jax.jit
def step_all(states, grads):
    """All of these, in one program, which is compiled once more where weights have an
    entry a leaf.
    """
    return {name: TXS[name].update(grads, state, PARAMS) for name, state in states.items()}


def go_on(states, seed):
    with jax.numpy_dtype_promotion("standard"):  # Optax mixes dtypes
        made = step_all(states, tree(seed))
    return tuple({name: its[i] for name, its in made.items()} for i in (0, 1))


@functools.cache
def course(steps):
    """The states of all these after some steps; the parameters stand still, so that no run depends
    on another's.
    """
    if steps == 0:
        return jax.jit(lambda: {name: tx.init(PARAMS) for name, tx in TXS.items()})()
    return go_on(course(steps - 1), steps)[1]


@functools.cache
def further():
    """Three more steps of each, by name: after a reset of the head, as before, and from fresh
    moments at the same counts.
    """
    names = course(5)
    part = {
        name: aj.reset(state, INSIDE.get(name, TXS[name]), match=HEAD)
        for name, state in names.items()
    }
    fresh = {
        name: counted(state, 5) if name in MEMBERS else state for name, state in course(0).items()
    }
    before, steps = names, []
    for seed in range(6, 9):
        (ours, part), (theirs, before), (new, fresh) = (
            go_on(states, seed) for states in (part, before, fresh)
        )
        steps.append({name: (ours[name], theirs[name], new[name]) for name in names})
    return {name: [step[name] for step in steps] for name in names}


def counted(state, count):
    """A state with its counts at `count`."""

    def leaf(path, x):
        return jnp.full_like(x, count) if getattr(path[-1], "name", "") in ("count", "step") else x

    return jax.tree_util.tree_map_with_path(leaf, state)


@pytest.mark.parametrize("name", MEMBERS)
def test_some_leaves_step_as_new_ones_and_the_others_as_before(name):
    for i, (ours, before, new) in enumerate(
        further()[name]
    ):  # not only the step after: weights have to grow as they should
        np.testing.assert_allclose(head(ours), head(new), rtol=2e-6, atol=1e-12)
        for other in ("w", "b"):
            np.testing.assert_allclose(ours[other], before[other], rtol=2e-6, atol=1e-12)
        assert i < 1 or not np.allclose(
            head(before), head(new), rtol=1e-2
        )  # the first of adopt is 0


@pytest.mark.parametrize("name", MEMBERS)
def test_all_leaves_are_those_of_a_fresh_state(name):
    state, expected = course(5)[name], moments(course(0)[name])
    for old in (
        state,
        aj.reset(state, MEMBERS[name], match=HEAD),
    ):  # of the second the weights have an entry a leaf
        found = moments(aj.reset(old, MEMBERS[name]))
        assert found.keys() == expected.keys()
        for path, x in expected.items():
            assert (found[path].dtype, found[path].shape) == (x.dtype, x.shape), path
            np.testing.assert_array_equal(found[path], x, err_msg=path)


@pytest.mark.parametrize("name", WRAPPERS)
def test_inside_wrappers(name):
    # A gradient clipped by the norm of all, or counted by MultiSteps, is the same one for both.
    ours, before, new = further()[name][0]
    np.testing.assert_allclose(head(ours), head(new), rtol=1e-5, atol=1e-12)
    np.testing.assert_allclose(ours["b"], before["b"], rtol=1e-6)
    np.testing.assert_allclose(ours["w"], before["w"], rtol=1e-6)
    assert not np.allclose(head(before), head(new), rtol=1e-2)
