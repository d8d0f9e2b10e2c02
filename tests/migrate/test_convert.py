"""`convert_state` from optimizer to optimizer: what both have goes on, the rest starts afresh or is
dropped.

The oracles are a table of what each optimizer's moments mean, written here by hand, and the new
optimizer run from the start on the same gradients.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from before_convert import LIKE_ADAM, MEMBERS, PARAMS, SHORT, after, go_on, places, run, tree
from helpers import avals, same

import adam_jax as aj

# What moments are, by hand. Everything else has the mean of gradients and the mean of their
# squares.
MU = {"momentum": "sum", "adopt": "of scaled gradients", "rmsprop": None}
NU = {"momentum": None, "adamax": "maximum", "adamaxw": "maximum", "adabelief": "belief"}


def tracked(state, field):
    """The states of tracking stages that have a moment."""
    return [s for s in state if hasattr(s, "weights") and hasattr(s, field)]


def column(state, field):
    """Which of the weights a moment's is."""
    return -1 if field == "nu" else 0


def test_every_member_becomes_every_other(member):
    old = member(0.1)
    state, converted = after(old), {}
    for name in MEMBERS:
        new = getattr(aj, name)(0.1)
        found = aj.convert_state(state, old, new, PARAMS)
        assert avals(found.state) == avals(new.init(PARAMS)), name
        counts = [
            getattr(s, f)
            for s in found.state
            for f in {"count", "step"} & set(getattr(s, "_fields", ()))
        ]
        assert {int(count) for count in counts if count is not None} == {5}
        for field, meanings in [("mu", MU), ("nu", NU)]:
            theirs, ours = meanings.get(member.__name__, "mean"), meanings.get(name, "mean")
            kept = [entry for entry in found.kept if entry.place.endswith(f".{field}")]
            assert len(kept) == (theirs == ours is not None), (name, field)
            if theirs == ours is not None:
                (before,), (now,) = tracked(state, field), tracked(found.state, field)
                blocks = field == "nu" and (name == "adam_mini") != (member is aj.adam_mini)
                if not blocks and not (field == "nu" and name == "adopt" != member.__name__):
                    same(getattr(now, field), getattr(before, field))
                    if now.weights is not None and before.weights is not None:
                        same(
                            now.weights[:, column(now, field)],
                            before.weights[:, column(before, field)],
                        )
            elif ours is not None:
                assert [e.place for e in found.fresh if e.place.endswith(f".{field}")]
            if theirs is not None and theirs != ours:
                assert [e.place for e in found.dropped if e.place.endswith(f".{field}")]
        converted[new] = found.state
    # 1/√(1 − b2), and 1.47 of it in nadam: a fresh μ over adopt's ν, which after five steps is
    # little but the first gradient.
    for new, (updates, _) in go_on(converted, 6).items():
        assert all(float(np.max(np.abs(u))) < 0.1 * 47 for u in jax.tree.leaves(updates)), new


@pytest.mark.parametrize("form", ["float32", "8bit"])
def test_to_itself_is_the_same_state(member, form):
    wide, tx = member(0.1), member(0.1, storage=form)
    state = (
        after(wide) if form == "float32" else aj.convert_state(after(wide), wide, tx, PARAMS).state
    )
    found = aj.convert_state(state, tx, member(0.1, storage=form), PARAMS)
    same(found.state, state)
    assert found.fresh == found.dropped == ()


# The gradients do not depend on the parameters: a run of adam that becomes one of the others is as
# one of them from the start.
@pytest.mark.parametrize("steps", [1, 5, 60])
@pytest.mark.parametrize("name", LIKE_ADAM)
def test_goes_on_as_if_it_had_been_so_from_the_start(name, steps):
    new = LIKE_ADAM[name]
    old = SHORT if name == "nadam_radam" else LIKE_ADAM["adam"]
    ours, theirs = aj.convert_state(after(old, steps), old, new, PARAMS).state, after(new, steps)
    for seed in range(steps + 1, steps + 4):
        (found, ours), (expected, theirs) = (
            go_on({new: ours}, seed)[new],
            go_on({new: theirs}, seed)[new],
        )
        close = functools.partial(
            np.testing.assert_allclose, rtol=1e-5 if "radam" in name else 2e-6, atol=1e-9
        )
        jax.tree.map(close, found, expected)


def test_adamw_without_decay_is_adam_to_the_last_bit():
    old, new = aj.adam(0.1), aj.adamw(0.1, weight_decay=0.0)
    found = aj.convert_state(after(old), old, new, PARAMS)
    same(run(new, found.state, range(6, 11))[0], run(old, after(old), range(6, 11))[0])


def test_there_and_back():
    old, between = aj.adam(0.1), aj.amsgrad(0.1)
    there = aj.convert_state(after(old), old, between, PARAMS)
    assert places(there.fresh) == ["[2].nu_max"]
    back = aj.convert_state(there.state, between, old, PARAMS)
    assert places(back.dropped) == ["[2].nu_max"]
    same(back.state, after(old))


def test_the_maximum_of_raw_moments_is_another_than_that_of_corrected_ones():
    old, new = aj.amsgrad(0.1), aj.amsgrad(0.1, maximum="raw")
    found = aj.convert_state(after(old), old, new, PARAMS)
    assert (places(found.fresh), places(found.dropped)) == (["[1].nu_max"], ["[2].nu_max"])
    plain = functools.partial(aj.amsgrad, 0.1, bias_correction_nu=False)
    old, new = plain(), plain(maximum="raw")
    assert places(aj.convert_state(after(old), old, new, PARAMS).kept) == [
        "[0].mu",
        "[0].nu",
        "[1].nu_max",
    ]


@functools.cache
def ages():
    """The states of adam and of radam after each of 3000 steps, by b2."""

    @jax.jit
    def run():
        params = jnp.ones(2)
        step = lambda tx: lambda state, _: (tx.update(params, state, params)[1],) * 2
        txs = {b2: (aj.adam(0.1, b2=b2), aj.radam(0.1, b2=b2)) for b2 in (0.9, 0.999)}
        return {
            b2: [jax.lax.scan(step(tx), tx.init(params), length=3000)[1] for tx in pair]
            for b2, pair in txs.items()
        }

    return run()


@pytest.mark.parametrize("b2", [0.9, 0.999])
@pytest.mark.parametrize("steps", [1, 2, 30, 3000])
def test_the_age_of_nu_is_that_of_a_run_with_rectify(b2, steps):
    state, expected = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)[steps - 1]), ages()[b2])
    found = aj.convert_state(state, aj.adam(0.1, b2=b2), aj.radam(0.1, b2=b2), jnp.ones(2))
    np.testing.assert_allclose(found.state[1].age, expected[1].age, rtol=2e-6)


def test_adopt_reads_a_corrected_nu_and_one_that_is_not_there_yet_is_filled_first():
    old, new = aj.adam(0.1, b2=0.9999), aj.adopt(0.1)
    found = aj.convert_state(after(old), old, new, PARAMS)
    squares = np.mean([np.square(tree(seed)["w"], dtype=np.float64) for seed in range(1, 6)], 0)
    np.testing.assert_allclose(found.state[0].nu["w"], squares, rtol=1e-3)
    np.testing.assert_array_equal(found.state[0].weights[:, 1], [1, 0])
    old = aj.adamax(0.1)
    found = aj.convert_state(after(old), old, new, PARAMS)
    (updates, second), _ = run(new, found.state, [6, 7])
    assert not np.any(updates["w"])
    assert 0 < float(jnp.max(jnp.abs(second["w"]))) < 0.1


def test_a_fresh_nu_beside_a_kept_mu_bounds_the_step():
    """The next gradient is nearly 0 where μ is not."""
    old, new = aj.momentum(0.1, dampened=True), aj.adam(1.0)
    found = aj.convert_state(after(old), old, new, PARAMS)
    updates, _ = new.update(jax.tree.map(lambda x: 1e-6 * x, PARAMS), found.state, PARAMS)
    assert 0.5 < float(jnp.max(jnp.abs(updates["w"]))) < 2
    assert "as if μ had been one gradient" in str(found)


def test_blocks_share_their_mean_and_are_spread():
    old, new = aj.adam(0.1), aj.adam_mini(0.1)
    there = aj.convert_state(after(old), old, new, PARAMS)
    np.testing.assert_allclose(
        there.state[0].nu["w"], np.mean(after(old)[0].nu["w"], 0, keepdims=True), rtol=1e-6
    )
    back = aj.convert_state(there.state, new, old, PARAMS)
    np.testing.assert_array_equal(
        back.state[0].nu["w"], np.broadcast_to(there.state[0].nu["w"], (64, 80))
    )
    assert "the mean over each block" in str(there)
    assert "spread over its block" in str(back)


def test_schedules_go_on():
    rate = optax.linear_schedule(1.0, 0.0, 10)
    old, new = (
        aj.adam(rate),
        aj.adamw(rate, weight_decay=lambda count: jnp.where(count == 5, 0.5, 0.0)),
    )
    found = aj.convert_state(after(old), old, new, PARAMS)
    _, state = run(new, found.state, [6])
    assert aj.hyperparameters(state, new)["weight_decay"] == 0.5
    np.testing.assert_allclose(aj.hyperparameters(state, new)["learning_rate"], 0.5)
