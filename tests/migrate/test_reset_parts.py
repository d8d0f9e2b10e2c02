"""`reset` of one moment, of schedules alone, of a group: everything else stays.

The oracles are the state before, and runs that go on from it.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from before_reset import HEAD, INNER, PARAMS, head, moments, trained, tree
from helpers import same

import adam_jax as aj
from adam_jax._core.configuration import slots_of
from adam_jax.storage.stored_leaf import unpack_moment


def test_leaves_are_named_as_groups_name_them():
    _, state = trained(aj.adam(0.1))
    same(aj.reset(state, INNER, match="^head/w$"), aj.reset(state, INNER, match=HEAD))


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
