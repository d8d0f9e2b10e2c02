"""Leaves that change groups in the middle of a run go on as if they had always been there.

The oracle is a run with the new groups from the start.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from grouped import run, tree
from helpers import same

import adam_jax as aj
from adam_jax import by_path

SHAPES_ALIKE = {"a": (3,), "b": (3,), "c": (2, 2)}
ALIKE = tree(0, SHAPES_ALIKE)
MEMBERS = [
    "adam",
    "nadam",
    "radam",
    "amsgrad",
    "adopt",
    "adabelief",
    "yogi",
    "adamax",
    "ademamix",
    "momentum",
    "rmsprop",
]
SPLITS = {"whole": (), "a": ("a",), "b": ("b",), "ab": ("a|b",), "each": ("a", "b")}


def remembered(state):
    """All of a state but the records of what the last step used, which a new group
    does not have.
    """
    located = jax.tree_util.tree_leaves_with_path(state)
    return {
        keys: x for path, x in located if ".hyperparams" not in (keys := jax.tree_util.keystr(path))
    }


def split(tx, patterns):
    return by_path({pattern: {} for pattern in patterns}, tx) if patterns else tx


@pytest.mark.parametrize("member", MEMBERS)
def test_leaves_that_change_groups_go_on_as_if_they_had_been_there_from_the_start(member):
    tx = getattr(aj, member)(0.1)
    runs = {
        name: run(split(tx, patterns), ALIKE, tree(1, SHAPES_ALIKE))[1]
        for name, patterns in SPLITS.items()
    }
    for old, new in itertools.permutations(SPLITS, 2):
        before, after = split(tx, SPLITS[old]), split(tx, SPLITS[new])
        found = aj.convert_state(runs[old], before, after, ALIKE)
        same(remembered(found.state), remembered(runs[new]))
        assert found.fresh == found.dropped == ()


@pytest.mark.parametrize("jit", [False, True])
def test_leaves_of_other_decays_come_together(jit):
    """Of gradients that are always the same, the mean is that one and the step the learning rate,
    however long ago each began.
    """
    params, grads = jax.tree.map(jnp.zeros_like, ALIKE), jax.tree.map(jnp.sign, ALIKE)
    before = by_path(
        {"a": {"b1": 0.5, "b2": 0.9}, "b": aj.momentum(0.1, 0.9, dampened=True)},
        aj.adam(0.1, eps=0.0),
    )
    after = aj.adam(0.1, eps=0.0)
    _, state = run(before, params, grads, steps=1)
    convert = lambda state: aj.convert_state(state, before, after, params).state
    state = (jax.jit(convert) if jit else convert)(state)
    assert state[0].weights.shape == (2, 2, 3)
    for _ in range(3):
        updates, state = after.update(grads, state, params)
        jax.tree.map(
            lambda u, g: np.testing.assert_allclose(u, -0.1 * g, rtol=1e-5), updates, grads
        )


def test_layers_thaw_one_after_the_other():
    """Those that have moved go on to the bit; one that thaws steps as in a new run."""
    grads, new = tree(1, SHAPES_ALIKE), aj.adam(0.1)
    before, then = by_path({"a|b": "frozen"}, new), by_path({"a": "frozen"}, new)
    _, state = run(before, ALIKE, grads)
    found = aj.convert_state(state, before, then, ALIKE)
    fresh = {entry.place: entry.note for entry in found.fresh}
    assert fresh == {
        ".inner_states['default'][0].mu": "of b",
        ".inner_states['default'][0].nu": "of b",
    }
    updates, after = then.update(grads, found.state, ALIKE)
    same(updates["c"], before.update(grads, state, ALIKE)[0]["c"])
    np.testing.assert_allclose(
        updates["b"], new.update(grads, new.init(ALIKE), ALIKE)[0]["b"], rtol=1e-6
    )
    assert (updates["a"] == 0).all()

    found = aj.convert_state(after, then, new, ALIKE)
    again, _ = new.update(grads, found.state, ALIKE)
    expected, _ = then.update(grads, after, ALIKE)
    same({"b": again["b"], "c": again["c"]}, {"b": expected["b"], "c": expected["c"]})

    back = aj.convert_state(after, then, before, ALIKE)
    assert {(entry.place, entry.note) for entry in back.dropped} == {
        (".inner_states['default'][0].mu", "of b"),
        (".inner_states['default'][0].nu", "of b"),
    }
