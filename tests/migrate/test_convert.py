"""`convert_state`: what two configurations share goes on, the rest starts afresh or is dropped, and
the report says which.

The oracles are a table of what each member's moments mean, written here by hand, and the new member
run from the start on the same gradients, which do not depend on the parameters."""

import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import avals, draw_tree, refused, same

import adam_jax as aj
from adam_jax import storage
from adam_jax._core.configuration import slots_of
from adam_jax._core.decorators import wrapper
from adam_jax.storage.stored_leaf import unpack_moment

ROUNDS = (aj.round_stochastically, aj.compensate)
MEMBERS = aj.family.__all__
SHAPES = {"b": (3,), "w": (64, 80)}

# What moments are, by hand. Everything else has the mean of gradients and the mean of their
# squares.
MU = {"momentum": "sum", "adopt": "of scaled gradients", "rmsprop": None}
NU = {"momentum": None, "adamax": "maximum", "adamaxw": "maximum", "adabelief": "belief"}


tree = functools.partial(draw_tree, shapes=SHAPES)
PARAMS = tree(0)

FORMS = {"float32": "float32", "bfloat16": "bfloat16", "8bit": "8bit"}
STORED = {
    name: (aj.ademamix(0.1, storage=form), aj.amsgrad(0.1, storage=form))
    for name, form in FORMS.items()
}
# All of these have adam's moments.
LIKE_ADAM = {
    name: getattr(aj, name)(0.1)
    for name in ("adam", "adamw", "nadam", "nadamw", "radam", "lamb", "adam_mini", "adam_atan2")
}
SHORT = aj.adam(0.1, b2=0.9)
LIKE_ADAM["nadam_radam"] = aj.radam(0.1, b2=0.9, nesterov=True)

OFTEN = tuple(
    dict.fromkeys(
        [
            *(getattr(aj, name)(0.1) for name in MEMBERS),
            *LIKE_ADAM.values(),
            SHORT,
            *sum(STORED.values(), ()),
        ]
    )
)
"""What more than one test steps, in one program."""


@jax.jit
def step_all(states, grads):
    return [tx.update(grads, state, PARAMS) for tx, state in zip(OFTEN, states, strict=True)]


@functools.cache
def course(steps):
    """The states of all these after some steps."""
    if steps == 0:
        return jax.jit(lambda: [tx.init(PARAMS) for tx in OFTEN])()
    return [state for _, state in step_all(course(steps - 1), tree(steps))]


def go_on(states, seed):
    """A step of some of these, each from a state of its own: the updates and the state by
    transformation.
    """
    made = step_all(
        [states.get(tx, state) for tx, state in zip(OFTEN, course(0), strict=True)], tree(seed)
    )
    return {tx: its for tx, its in zip(OFTEN, made, strict=True) if tx in states}


@functools.cache
def jitted(tx):
    return jax.jit(tx.update)


def run(tx, state, steps, params=PARAMS):
    """Each step's updates, and the state after them; `steps` number the gradients."""
    updates = []
    often = tx in OFTEN and params is PARAMS and avals(state) == avals(course(0)[OFTEN.index(tx)])
    for seed in steps:
        update, state = (
            go_on({tx: state}, seed)[tx] if often else jitted(tx)(tree(seed), state, params)
        )
        updates.append(update)
    return updates, state


@functools.cache
def after(tx, steps=5):
    return (
        course(steps)[OFTEN.index(tx)]
        if tx in OFTEN
        else run(tx, tx.init(PARAMS), range(1, steps + 1))[1]
    )


def tracked(state, field):
    """The states of tracking stages that have a moment."""
    return [s for s in state if hasattr(s, "weights") and hasattr(s, field)]


def column(state, field):
    """Which of the weights a moment's is."""
    return -1 if field == "nu" else 0


def places(entries):
    return [entry.place for entry in entries]


# Members


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


# Storage

PRECISIONS = {"float32": 0, "bfloat16": 2**-8, "8bit": 1 / 16}


def unpacked(tx, state, field):
    """The leaves of a moment of the first stage."""
    slot = slots_of(tx.stages[0])[field]
    return unpack_moment(slot, getattr(state[0], field), state[0].scales)


@functools.cache
def converted_in_jit():
    """Every storage as every other, by the old one and the new one."""

    @jax.jit
    def convert(states):
        made = {(old, new): (STORED[old][0], STORED[new][1]) for old in FORMS for new in FORMS}
        return {
            (old, new): aj.convert_state(states[old], *pair, PARAMS).state
            for (old, new), pair in made.items()
        }

    return convert({old: after(STORED[old][0]) for old in FORMS})


@pytest.mark.parametrize("old", FORMS)
@pytest.mark.parametrize("new", FORMS)
@pytest.mark.parametrize("jit", [False, True])
def test_storages_become_one_another_within_their_precision(old, new, jit):
    txs = STORED[old][0], STORED[new][1]
    state = after(txs[0])
    found = converted_in_jit()[old, new] if jit else aj.convert_state(state, *txs, PARAMS).state
    assert avals(found) == avals(txs[1].init(PARAMS))
    for field in ("mu", "nu"):
        before, now = (unpacked(tx, s, field) for tx, s in zip(txs, (state, found), strict=True))
        for x, y in zip(before, now, strict=True):
            x, y = np.asarray(x.widen()), np.asarray(y.widen())  # noqa: PLW2901
            # The smallest code of 8 bits is 2⁻¹⁵ of the power of two above the leaf's largest. Half
            # of it is lost.
            coarse = 2.0**-16 * 2 ** np.ceil(np.log2(np.abs(x).max())) * (new == "8bit")
            np.testing.assert_allclose(y, x, rtol=PRECISIONS[new] + 1e-7, atol=coarse)
            assert field == "mu" or np.all((y > 0) == (x > 0))
    if new == "bfloat16" and old == "float32":
        np.testing.assert_array_equal(found[0].mu["w"], state[0].mu["w"].astype(jnp.bfloat16))
    run(txs[1], found, [6])


def test_a_leaf_of_zeros_or_of_extremes_in_codes():
    old, new = aj.adam(0.1), aj.adam(0.1, storage="8bit")
    for value in (0.0, 1e-30, 1e18, jnp.nan):
        grads = jax.tree.map(lambda x, value=value: jnp.full_like(x, value), PARAMS)
        state = old.update(grads, old.init(PARAMS), PARAMS)[1]
        mu = aj.convert_state(state, old, new, PARAMS).state[0]
        (_, code) = unpacked(new, (mu,), "mu")
        np.testing.assert_allclose(code.widen(), jnp.nan_to_num(0.1 * value), rtol=1 / 15)


AXES = (-1, -2, None)


def test_codes_whose_scales_are_shared_otherwise_become_one_another():
    params = {"w": jnp.zeros((130, 140))}
    scales = {-1: (130, 1), -2: (1, 140), None: (1, 1)}
    txs = {
        axis: aj.adam(0.1, storage=storage.Codes(axis=axis, rounding="nearest")) for axis in AXES
    }
    grads, notes = draw_tree(1, {"w": (130, 140)}), {}

    @jax.jit
    def convert():
        made = {}
        for old, new in itertools.product(AXES, AXES):
            state = txs[old].update(grads, txs[old].init(params))[1]
            found = aj.convert_state(state, txs[old], txs[new], params)
            notes[old, new] = [entry.note for entry in found.kept]
            made[f"{old} {new}"] = state, found.state, txs[new].update(grads, found.state)
        return made

    made = convert()
    for old, new in itertools.product(AXES, AXES):
        before, after, (updates, _) = made[f"{old} {new}"]
        for field in ("mu", "nu"):
            ((x,), (y,)) = (
                unpacked(txs[axis], state, field) for axis, state in ((old, before), (new, after))
            )
            assert y.scale.shape == scales[new]
            largest = np.abs(x.widen()).max()
            np.testing.assert_allclose(
                y.widen(),
                x.widen(),
                rtol=1 / 16 if old != new else 0,
                atol=2.0**-15 * largest * (old != new),
            )
        np.testing.assert_allclose(np.abs(updates["w"]).max(), 0.1, rtol=0.2)
        assert notes[old, new] == 2 * [
            f"scales of shape {scales[old]} → {scales[new]}" if old != new else ""
        ]


# Links, wrappers, chains


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


# Leaves, and what cannot be


def test_leaves_of_all_kinds(x64):
    params = {
        "c": jnp.ones(3, jnp.complex64),
        "d": jnp.ones(3, jnp.float64),
        "e": jnp.ones((0, 3), jnp.float32),
        "h": jnp.ones(2, jnp.float16),
        "i": jnp.arange(3),
        "n": None,
        "s": jnp.ones((), jnp.float32),
        "m": optax.MaskedNode(),
    }
    grads = params | {"i": np.zeros(3, jax.dtypes.float0)}
    narrow = storage.Codes(smallest=0)
    old = aj.adam(0.1)
    state = jax.jit(lambda: old.update(grads, old.init(params), params)[1])()
    others = (
        aj.nadam(0.1, storage=narrow),
        aj.adabelief(0.1, storage=narrow),
        aj.adam_mini(0.1),
        aj.adopt(0.1),
    )
    convert = lambda state, new: aj.convert_state(state, old, new, params).state
    # Codes in one program, which otherwise are one for each operation and leaf.
    found = [
        *jax.jit(lambda: [convert(state, new) for new in others[:2]])(),
        *(convert(state, new) for new in others[2:]),
    ]
    for new, its in zip(others, found, strict=True):
        assert avals(its) == jax.tree.map(
            lambda x: (x.shape, x.dtype, x.weak_type), jax.eval_shape(new.init, params)
        )
    step = jax.jit(
        lambda states: [
            new.update(grads, its, params)[0] for new, its in zip(others, states, strict=True)
        ]
    )
    assert all(np.isfinite(u).all() for u in jax.tree.leaves(step(found)))


def test_weights_of_each_leaf_are_carried_along():
    old = aj.adam(0.1)
    state = aj.reset(after(old), old, match=r"\['b'\]")
    txs = (
        aj.nadam(0.1),
        aj.radam(0.1, nesterov=True),
        aj.amsgrad(0.1, storage="8bit"),
        aj.adopt(0.1),
        aj.adabelief(0.1),
    )
    part, whole = (
        [aj.convert_state(its, old, new, PARAMS).state for new in txs]
        for its in (state, after(old))
    )
    step = jax.jit(
        lambda states: [
            new.update(tree(6), its, PARAMS) for new, its in zip(txs, states, strict=True)
        ]
    )
    for found, (ours, later), (theirs, _) in zip(part, step(part), step(whole), strict=True):
        assert avals(later) == avals(found)
        np.testing.assert_allclose(ours["w"], theirs["w"], rtol=1e-5)
        assert not np.allclose(ours["b"], theirs["b"], rtol=1e-2)


def test_what_cannot_be_is_an_error():
    old, state = aj.adam(0.1), after(aj.adam(0.1))
    small = {"b": PARAMS["b"], "w": PARAMS["w"][:32]}
    with refused(TypeError, "from_tx", "expected a gradient transformation"):
        aj.convert_state(state, aj.adam, old, PARAMS)
    with refused(TypeError, "to_tx"):
        aj.convert_state(state, old, 0.1, PARAMS)
    with refused(
        ValueError,
        "[0].mu['w']",
        "float32[64, 80]",
        "float32[32, 80]",
        "Pass a state that from_tx made",
    ):
        aj.convert_state(state, old, old, small)
    with refused(ValueError, "[0].mu['w']", "float32[64, 80]", "bfloat16[64, 80]"):
        aj.convert_state(state, aj.adam(0.1, storage="bfloat16"), old, PARAMS)
    with refused(ValueError, "from_tx has [0].scales['mu_scale']", "the state does not"):
        aj.convert_state(state, aj.adam(0.1, storage="8bit"), old, PARAMS)
    with refused(ValueError, "from_tx: rmsprop(", "got the state of another transformation"):
        aj.convert_state(state, aj.rmsprop(0.1), old, PARAMS)
    with refused(ValueError, "from_tx", "from_optax(state, tx, params)"):
        aj.convert_state(optax.adam(0.1).init(PARAMS), old, old, PARAMS)
    with refused(ValueError, "to_tx of others", "to_optax(state, tx, like)"):
        aj.convert_state(state, old, optax.adam(0.1), PARAMS)
    with refused(ValueError, "structure"):
        aj.convert_state((*state, optax.EmptyState()), old, old, PARAMS)


def test_a_run_of_others_is_no_run_of_ours():
    theirs = optax.adam(0.1)
    with refused(ValueError, "found from_tx of others", "from_optax"):
        aj.convert_state(theirs.init(PARAMS), theirs, aj.adam(0.1), PARAMS)


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


def test_the_report_is_a_table():
    old, new = aj.adam(0.1), aj.adamax(0.1, storage="8bit")
    rows = str(aj.convert_state(after(old), old, new, PARAMS)).splitlines()
    assert [row.split()[:2] for row in rows] == [
        ["kept", "[0].mu"],
        ["fresh", "[0].nu"],
        ["dropped", "[0].nu"],
    ]
    assert rows[0].endswith("float32 → int8")
    assert "the mean of squared gradients" in rows[2]


def test_leaves_whose_joined_paths_are_equal_keep_their_own_moments():
    """E6."""
    params = {"a/b": jnp.ones(3), "a": {"b": jnp.zeros(3)}}
    old, new = aj.adam(0.1), aj.adamw(0.1)
    state = old.update(jax.tree.map(lambda p: p + 1, params), old.init(params), params)[1]
    found = aj.convert_state(state, old, new, params)
    assert not found.fresh
    same(found.state[0], state[0])


def test_a_group_without_trained_leaves_keeps_its_debias_factors():
    """E10."""
    params = {"n": jnp.zeros(3, jnp.int32), "w": jnp.ones(3)}
    grads = {"n": np.zeros(3, jax.dtypes.float0), "w": jnp.ones(3)}
    old, new = (aj.by_path({"n": make(0.1)}, make(0.1)) for make in (aj.adam, aj.adamw))
    state = old.init(params)
    for _ in range(3):
        state = old.update(grads, state, params)[1]
    found = aj.convert_state(state, old, new, params).state
    for group in ("n", "default"):
        same(found.inner_states[group][0], state.inner_states[group][0])
