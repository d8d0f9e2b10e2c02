"""`convert_state` where stages and wrappers come and go: the moments inside stay to the bit.

The oracle is the state before.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from before_convert import PARAMS, after, places, run, tree
from flax import nnx
from helpers import avals, refused, same

import adam_jax as aj
from adam_jax._core.decorators import wrapper

ROUNDS = (aj.round_stochastically, aj.compensate)


def test_links_come_and_go():
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    plain, average = aj.adam(0.1), aj.stages.average_parameters(lambda count: 0.9)
    for link in (make() for make in ROUNDS):
        linked = aj.chain(plain, link, average)
        _, state = run(linked, linked.init(half), range(1, 6), half)
        without = aj.convert_state(state, linked, plain, half)
        same(without.state, state[0])
        lost = ["[1].lost"] if hasattr(state[1], "lost") else []
        assert sorted(places(without.dropped)) == [*lost, "[2].average", "[2].average_weight"]
        found = aj.convert_state(without.state, plain, linked, half)
        assert avals(found.state) == avals(linked.init(half))
        assert places(found.kept) == ["[0][0].mu", "[0][0].nu"]
        assert all("from [0]" in entry.note for entry in found.kept)
        assert int(found.state[2].step) == 5
        again = aj.convert_state(
            state, linked, aj.chain(*aj.adamw(0.1).stages, link, average), half
        )
        same(again.state[-2:], state[-2:])  # lost bits and averages stay, however chains nest


def test_float32_parameters_drop_the_bits_that_bfloat16_ones_lost():
    tx = aj.chain(aj.adam(0.1), aj.compensate())
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    _, state = run(tx, tx.init(half), range(1, 6), half)
    found = aj.convert_state(state, tx, tx, PARAMS)
    assert avals(found.state) == avals(tx.init(PARAMS))
    assert places(found.dropped) == ["[1].lost"]


class GuardState(NamedTuple):
    inner_state: Any
    met: jax.Array


@wrapper
def guard(tx, limit=1.0):
    """A wrapper of a stranger."""

    def init(params):
        return GuardState(tx.init(params), jnp.zeros(()))

    def update(updates, state, params, context):
        updates, inner = tx.update(updates, state.inner_state, params)
        return updates, GuardState(inner, state.met + 1)

    return init, update


def test_wrappers_of_ours_are_looked_through():
    old, new = aj.adam(0.1), guard(aj.chain(aj.nadamw(0.1)))
    there = aj.convert_state(after(old), old, new, PARAMS)
    assert avals(there.state) == avals(new.init(PARAMS))
    assert places(there.kept)[:2] == [".inner_state[0][0].mu", ".inner_state[0][0].nu"]
    assert places(there.fresh) == [".met"]
    _, state = run(new, there.state, [6])
    kept = aj.convert_state(state, new, guard(aj.adam(0.1, storage="8bit"), 2.0), PARAMS)
    assert kept.state.met == 1
    back = aj.convert_state(there.state, new, old, PARAMS)
    same(back.state, after(old))
    assert places(back.dropped) == [".met"]


@pytest.mark.parametrize("guarded", [aj.skip_nonfinite, aj.skip_spikes])
def test_a_run_is_guarded_and_unguarded(guarded):
    """The learning rate inside of a guard is not before what else is inside."""
    old, new = aj.adam(0.1), aj.chain(guarded(aj.adam(0.1)), aj.stages.average_parameters(0.9))
    there = aj.convert_state(after(old), old, new, PARAMS)
    assert avals(there.state) == avals(new.init(PARAMS))
    same(there.state[0].inner_state, after(old))
    back = aj.convert_state(there.state, new, old, PARAMS)
    same(back.state, after(old))
    assert not back.fresh


def test_a_ring_of_norms_is_carried_whole_or_not_at_all():
    """So many norms are known, of this ring: with another ring of zeros every healthy step would be
    a spike.
    """
    old = aj.skip_spikes(aj.adam(0.1))
    _, state = run(old, old.init(PARAMS), range(40))
    new = aj.skip_spikes(aj.adam(0.1), window=64)
    converted = aj.convert_state(state, old, new, PARAMS).state
    assert (converted.seen, converted.skipped) == (0, 0)
    same(converted.inner_state, state.inner_state)
    wider = aj.skip_spikes(aj.adam(0.1), deviations=9.0)
    same(aj.convert_state(state, old, wider, PARAMS).state, state)


def test_random_bits_are_no_schedule():
    """After a schedule was reset, what is new goes on at the step of the schedules, not of the
    roundings.
    """
    rate = optax.linear_schedule(1.0, 0.0, 10)
    old = aj.chain(aj.adam(rate), aj.round_stochastically())
    _, state = run(old, old.init(PARAMS), range(5))
    new = aj.adamw(rate, weight_decay=rate)
    converted = aj.convert_state(
        aj.reset(state, old, moments=False, schedule=True), old, new, PARAMS
    ).state
    assert {int(its.step) for its in converted if hasattr(its, "step")} == {0}


def test_transformations_of_others():
    trace = optax.trace(0.9)
    clip = optax.clip_by_global_norm(1.0)
    old, new = aj.chain(clip, trace, aj.adam(0.1)), aj.chain(aj.adamw(0.1), aj.stages.cautious())
    state = after(old)
    found = aj.convert_state(state, old, new, PARAMS)
    assert places(found.dropped) == ["[1]"]
    same(found.state[0][0], state[2][0])
    again = aj.convert_state(state, old, aj.chain(optax.trace(0.5), aj.amsgrad(0.1)), PARAMS)
    same(again.state[0], state[1])
    fresh = aj.convert_state(found.state, new, old, PARAMS)
    assert places(fresh.fresh) == ["[1]"]


def test_moments_inside_a_transformation_of_others(standard_promotion):
    masked = functools.partial(optax.masked, mask={"b": True, "w": False})
    old, new = masked(aj.adam(0.1)), masked(aj.nadam(0.1))
    state = after(old)
    same(aj.convert_state(state, old, old, PARAMS).state, state)
    outer = aj.chain(aj.add_decayed_weights(0.1), old)
    assert places(aj.convert_state(state, old, outer, PARAMS).kept) == ["[1]"]
    for pair in [
        (old, new),
        (aj.adam(0.1), new),
        (old, aj.adam(0.1)),
        (old, optax.chain(aj.adam(0.1))),
    ]:
        with refused(
            ValueError,
            "moments inside",
            "state._replace(inner_state=convert_state(state.inner_state",
        ):
            aj.convert_state(after(pair[0]), *pair, PARAMS)
    inside = {"b": PARAMS["b"], "w": optax.MaskedNode()}
    converted = aj.convert_state(state.inner_state, aj.adam(0.1), aj.nadam(0.1), inside).state
    updates, _ = new.update(tree(6), state._replace(inner_state=converted), PARAMS)
    expected, _ = new.update(tree(6), after(new), PARAMS)
    np.testing.assert_allclose(updates["b"], expected["b"], rtol=1e-5)


def test_an_nnx_optimizer_goes_on_with_another():
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    gradient = nnx.grad(lambda model: (model(jnp.ones((1, 2))) ** 2).sum())
    old, new = (
        nnx.Optimizer(model, aj.adam(0.1), wrt=nnx.Param),
        nnx.Optimizer(model, aj.amsgrad(0.1), wrt=nnx.Param),
    )
    old.update(model, gradient(model))
    found = aj.convert_state(old.opt_state, old.tx, new.tx, nnx.state(model, nnx.Param))
    assert [entry.place for entry in found.fresh] == ["[2].nu_max"]
    nnx.update(new.opt_state, nnx.state(found.state))
    np.testing.assert_array_equal(
        new.opt_state[0].mu["kernel"][...], old.opt_state[0].mu["kernel"][...]
    )
    new.update(model, gradient(model))
    assert int(new.opt_state[0].count[...]) == 2
