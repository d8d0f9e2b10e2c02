"""`reset`: what starts afresh steps as a new run does, and what does not as if nothing had
happened.

The oracles are the uninterrupted run and a fresh state whose counts alone are those of the run.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import draw_tree, same

import adam_jax as aj
from adam_jax._core.configuration import slots_of
from adam_jax.storage.stored_leaf import unpack_moment

SHAPES = {"b": (3,), "head": {"w": (64, 80)}, "w": (64, 80)}
HEAD = r"\['head'\]"

tree = functools.partial(draw_tree, shapes=SHAPES, scale=0.1)
PARAMS = tree(0)

# Every member, and each kind of moment at rest in fewer bits.
NARROW = ("amsgrad", "adopt", "ademamix")
MEMBERS = {
    name: (getattr(aj, name.split()[0])(0.1, storage=form))
    for name, form in [
        *((name, "float32") for name in aj.family.__all__),
        *((f"{name} narrow", ("8bit", "bfloat16")) for name in NARROW),
    ]
}

INNER = aj.adam(0.1)
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


@functools.cache
def jitted(tx):
    return jax.jit(tx.update)


def trained(tx, steps=5, params=PARAMS, state=None, first=1):
    """The last updates and the state after some steps."""
    state, updates = tx.init(params) if state is None else state, None
    for seed in range(first, first + steps):
        updates, state = jitted(tx)(tree(seed), state, params)
    return updates, state


def counted(state, count):
    """A state with its counts at `count`."""

    def leaf(path, x):
        return jnp.full_like(x, count) if getattr(path[-1], "name", "") in ("count", "step") else x

    return jax.tree_util.tree_map_with_path(leaf, state)


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


def test_leaves_are_named_as_groups_name_them():
    _, state = trained(aj.adam(0.1))
    same(aj.reset(state, INNER, match="^head/w$"), aj.reset(state, INNER, match=HEAD))


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


def test_a_nu_that_does_not_start_at_zero_starts_there_again():
    for tx in (
        aj.yogi(0.1, initial_accumulator_value=0.25),
        aj.rmsprop(0.1, initial_scale=0.25, storage="8bit"),
    ):
        state = aj.reset(trained(tx)[1], tx, match=r"(mu|nu)\['w'\]")
        wide = unpack_moment(slots_of(tx.stages[0])["nu"], state[0].nu, state[0].scales)
        assert float(jnp.min(wide[2].widen())) == float(jnp.max(wide[2].widen())) == 0.25
        assert not np.allclose(wide[1].widen(), 0.25)


MATCHES = (r"\.mu\['w'\]", r"\['w'\]", r"\.mu\b", HEAD, None)


@pytest.mark.parametrize("tx", [aj.nadam(0.1), aj.radam(0.1, b2=0.9), aj.radam(0.1, nesterov=True)])
def test_a_state_keeps_its_form_from_step_to_step(tx):
    state = trained(tx)[1]
    states = [aj.reset(state, tx, match=match) for match in MATCHES]
    step = lambda states, _: ([tx.update(tree(9), state, PARAMS)[1] for state in states], None)
    after = jax.jit(lambda states: jax.lax.scan(step, states, length=3)[0])(states)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(after))


def test_one_moment_alone():
    tx = aj.adam(0.1)
    _, state = trained(tx)
    found = aj.reset(state, tx, match=r"\.mu\b")
    assert found[0].weights.shape == (2, 2)
    assert not any(np.any(x) for x in jax.tree.leaves(found[0].mu))
    same((found[0].nu, found[0].weights[:, 1]), (state[0].nu, state[0].weights[:, 1]))
    assert not np.any(found[0].weights[:, 0])


def test_adopt_fills_a_nu_that_starts_again_before_it_divides_by_it():
    tx = aj.adopt(0.1)
    _, state = trained(tx)
    first, state = trained(tx, 1, state=aj.reset(state, tx, match=HEAD), first=6)
    second, _ = trained(tx, 1, state=state, first=7)
    assert not np.any(head(first))
    assert np.any(first["w"])
    assert 0 < np.max(np.abs(head(second))) < 0.02  # 0.1·(1 − b1)·⁴√6


def test_what_is_no_moment_is_kept():
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    links = (aj.compensate(), aj.stages.average_parameters(0.9))
    tx = aj.chain(aj.adam(0.1), *links)
    _, state = trained(tx, params=params)
    same(aj.reset(state, tx)[1:], state[1:])
    assert int(aj.reset(state, tx)[0][0].count) == 5


def test_schedules_start_again_and_moments_do_not():
    rate = optax.linear_schedule(1.0, 0.0, 10)
    tx, still = aj.adam(rate, b1=optax.linear_schedule(0.9, 0.8, 10)), aj.adam(1.0)
    _, state = trained(tx)
    found = aj.reset(state, tx, moments=False, schedule=True)
    same(moments(found), moments(state))
    _, after = trained(tx, 1, state=found, first=6)
    assert aj.hyperparameters(after, tx)["learning_rate"] == 1.0
    np.testing.assert_allclose(aj.hyperparameters(after, tx)["b1"], 0.9)
    # and for the correction the run goes on: the same step as one with that rate
    _, steady = trained(still)
    again = steady[0]._replace(count=jnp.zeros((), jnp.int32)), *steady[1:]
    expected, _ = trained(still, 1, state=again, first=6)
    uninterrupted, _ = trained(still, 1, state=steady, first=6)
    same(expected, uninterrupted)
    rate_alone = aj.reset(state, tx, moments=False, schedule=True, match=r"\[3\]\.step")
    assert (int(rate_alone[0].count), int(rate_alone[3].step)) == (5, 0)


def test_moments_start_again_and_schedules_do_not():
    tx = aj.adopt(optax.linear_schedule(1.0, 0.0, 10))
    state = aj.reset(trained(tx)[1], tx)
    _, after = trained(tx, 1, state=state)
    np.testing.assert_allclose(aj.hyperparameters(after, tx)["learning_rate"], 0.5)


@pytest.mark.parametrize("name", WRAPPERS)
def test_inside_wrappers(name):
    # A gradient clipped by the norm of all, or counted by MultiSteps, is the same one for both.
    ours, before, new = further()[name][0]
    np.testing.assert_allclose(head(ours), head(new), rtol=1e-5, atol=1e-12)
    np.testing.assert_allclose(ours["b"], before["b"], rtol=1e-6)
    np.testing.assert_allclose(ours["w"], before["w"], rtol=1e-6)
    assert not np.allclose(head(before), head(new), rtol=1e-2)


def test_schedules_of_optax(standard_promotion):
    rate = optax.linear_schedule(1.0, 0.0, 10)
    scheduled = optax.chain(aj.adam(1.0), optax.scale_by_schedule(rate))
    injected = optax.inject_hyperparams(aj.adam)(learning_rate=rate)
    for tx in (scheduled, injected):
        _, state = trained(tx)
        found = aj.reset(state, aj.adam(1.0), moments=False, schedule=True)
        fast, _ = trained(tx, 1, state=found, first=6)
        slow, _ = trained(tx, 1, state=state, first=6)
        np.testing.assert_allclose(slow["w"], 0.5 * fast["w"], rtol=1e-5)


def test_a_group_is_found_by_its_label():
    tx = optax.partition(
        {"a": aj.adam(0.1), "b": aj.adam(0.1)}, {"b": "a", "head": {"w": "b"}, "w": "a"}
    )
    _, state = trained(tx)
    found = aj.reset(state, aj.adam(0.1), match=lambda path: path.startswith(".inner_states['a']"))
    its = {label: masked.inner_state[0] for label, masked in found.inner_states.items()}
    assert its["a"].weights.shape == (2, 2)
    assert (int(its["a"].count), int(its["b"].count)) == (5, 5)
    assert not np.any(its["a"].weights)
    assert np.any(its["b"].weights)


@pytest.mark.parametrize("form", ["float32", "8bit"])
def test_under_jit_and_vmap(form):
    tx = aj.radam(0.1, storage=form, nesterov=True)
    _, state = trained(tx)
    same(jax.jit(lambda s: aj.reset(s, tx, match=HEAD))(state), aj.reset(state, tx, match=HEAD))
    many = jax.tree.map(lambda x: jnp.stack([x] * 4), state)
    found = jax.jit(jax.vmap(lambda s: aj.reset(s, tx, match=HEAD)))(many)
    same(jax.tree.map(lambda x: x[2], found), aj.reset(state, tx, match=HEAD))
    with pytest.raises(ValueError, match=r"jax\.vmap"):
        aj.reset(many, tx, match=HEAD)


def test_leaves_of_all_kinds():
    params = {
        "c": jnp.ones(3, jnp.complex64),
        "h": jnp.ones(2, jnp.float16),
        "i": jnp.arange(3),
        "n": None,
        "s": jnp.ones(()),
        "m": optax.MaskedNode(),
    }
    grads = params | {"i": np.zeros(3, jax.dtypes.float0)}
    tx = aj.adam(0.1)
    step = jax.jit(lambda state: tx.update(grads, state, params))
    _, state = step(step(tx.init(params))[1])
    found = aj.reset(state, tx, match=r"\['(c|s)'\]")
    assert found[0].weights.shape == (2, 2, 3)  # c, h and s, in the order of the tree
    np.testing.assert_array_equal(found[0].weights[0, 0] == 0, [True, False, True])
    updates, _ = step(found)
    for name in ("c", "h", "s"):
        np.testing.assert_allclose(np.asarray(updates[name], np.complex64), -0.1, rtol=1e-3)


SGD = aj.chain(aj.scale_by_learning_rate(0.1))
FADING = aj.adam(optax.linear_schedule(1.0, 0.0, 10))
SCHEDULED = {"tx": FADING, "state": FADING.init(PARAMS)}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            {"match": "tail"},
            "found no moments whose path matches 'tail'; expected one of \"[0].mu['b']\"",
        ),
        (
            {"match": "mu", "schedule": True, **SCHEDULED},
            "found no counts of a schedule whose path matches 'mu'; expected one of '[3].step'.",
        ),
        ({"schedule": True, "moments": False}, "found no counts of a schedule in the state"),
        ({"moments": False}, "expected at least one"),
        (
            {"state": optax.adam(0.1).init(PARAMS)},
            "reset: adam(learning_rate=0.1, b1=0.9, b2=0.999, eps=1e-08, eps_root=0.0) got",
        ),
        ({"state": (), "tx": aj.chain(aj.scale_by_learning_rate(0.1))}, "where it keeps 1"),
        (
            {"state": SGD.init(PARAMS), "tx": SGD},
            "found no moments in the state; expected that of a transformation which has",
        ),
    ],
)
def test_nothing_to_reset_is_an_error(arguments, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        aj.reset(**{"state": INNER.init(PARAMS), "tx": INNER} | arguments)


def test_a_nu_without_its_mu_is_refused():
    """The next gradient may be tiny: a step of 90,000 learning rates was seen."""
    _, state = trained(aj.adam(0.1))
    with pytest.raises(ValueError, match="the ν of .* matches, and their μ does not"):
        aj.reset(state, INNER, match=r"\.nu")
    aj.reset(trained(aj.rmsprop(0.1))[1], aj.rmsprop(0.1), match=r"\.nu")


def test_a_state_that_was_mapped_over_is_refused_whatever_its_shapes():
    """Two members of two leaves have weights as two leaves of their own have."""
    state = jax.vmap(aj.adam(0.1).init)({"w": jnp.ones((2, 3)), "b": jnp.ones((2, 2))})
    with pytest.raises(ValueError, match=r"under jax\.vmap"):
        aj.reset(state, INNER, match="w")


@pytest.mark.parametrize(
    ("match", "error"), [("[", ValueError), (b"w", TypeError), (["w"], TypeError)]
)
def test_what_is_no_pattern_is_refused(match, error):
    with pytest.raises(error, match="reset: match: found"):
        aj.reset(INNER.init(jnp.ones(3)), INNER, match=match)
