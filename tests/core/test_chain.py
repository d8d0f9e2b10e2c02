"""Transformations are values, and a chain refuses an order that cannot work."""

import copy
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adam_jax as aj

STAGES = [
    aj.track_moments(0.8, 0.95),
    aj.correct_bias(),
    aj.scale_by_moments(1e-7),
    aj.scale_by_learning_rate(0.3),
    aj.add_decayed_weights(0.1, "matrices"),
    aj.stages.cautious(after_learning_rate=True),
    aj.stages.clip_update_rms(2.0),
    aj.stages.average_parameters(0.9),
    aj.chain(aj.scale_by_learning_rate(0.1), optax.scale(2.0)),
]


def test_adam_is_its_four_stages():
    tx = aj.adam(3e-4, 0.8, 0.95, 1e-6)
    stages = (
        aj.track_moments(0.8, 0.95),
        aj.correct_bias(),
        aj.scale_by_moments(1e-6),
        aj.scale_by_learning_rate(3e-4),
    )
    assert tx == aj.chain(*stages)
    assert hash(tx) == hash(aj.chain(*stages))
    assert tx.stages == stages
    assert repr(tx) == "adam(learning_rate=0.0003, b1=0.8, b2=0.95, eps=1e-06, eps_root=0.0)"
    assert repr(stages[0]) == "track_moments(b1=0.8, b2=0.95)"


@pytest.mark.parametrize("tx", STAGES[:-1], ids=repr)
def test_a_stage_is_a_value(tx):
    assert isinstance(tx, optax.GradientTransformationExtraArgs)
    assert eval(repr(tx), vars(aj) | vars(aj.stages)) == tx
    assert tx.stages == (tx,)
    for other in (
        copy.copy(tx),
        copy.deepcopy(tx),
        pickle.loads(pickle.dumps(tx)),
        jax.tree.map(lambda x: x, tx),
    ):
        assert other == tx
        assert hash(other) == hash(tx)
        assert repr(other) == repr(tx)


def test_a_member_is_a_value(member):
    tx = member(0.1)
    assert isinstance(tx, optax.GradientTransformationExtraArgs)
    assert eval(repr(tx), vars(aj) | vars(aj.stages)) == tx == member(0.1)
    assert hash(tx) == hash(member(learning_rate=0.1))
    assert tx != member(0.2)
    assert repr(tx).startswith(f"{member.__name__}(learning_rate=0.1")
    assert aj.chain(*tx.stages) == tx
    assert pickle.loads(pickle.dumps(tx)) == tx


def test_arguments_decide_equality():
    schedule = optax.constant_schedule(0.1)
    assert aj.adam(schedule) == aj.adam(schedule) != aj.adam(optax.constant_schedule(0.1))
    assert aj.adam(jnp.float32(0.1)) == aj.adam(jnp.float32(0.1)) != aj.adam(jnp.float32(0.2))
    assert aj.adamw(0.1, mask={"w": True, "b": [False]}) == aj.adamw(
        0.1, mask={"w": True, "b": [False]}
    )
    assert aj.adamw(0.1, mask={"w": True, "b": [False]}) != aj.adamw(
        0.1, mask={"w": True, "b": [True]}
    )
    assert aj.adam(0.1, mu_dtype=jnp.bfloat16) != aj.adam(0.1)
    assert aj.scale_by_moments(0.1) != aj.stages.clip_update_rms(0.1)
    assert aj.adam(0.1) != optax.adam(0.1)
    assert len({aj.adam(0.1), aj.adam(0.1), aj.adam(0.2)}) == 2


def test_schedules_and_options_are_shown():
    assert "learning_rate=constant_schedule" in repr(aj.adam(optax.constant_schedule(0.1)))
    assert repr(aj.adam(1, nesterov=True)).startswith("adam(learning_rate=1, ")
    assert repr(aj.adam(0.1, nesterov=True)).endswith("nesterov=True)")
    assert "nesterov" not in repr(aj.adam(0.1))


def test_equal_static_arguments_do_not_retrace():
    traces = []

    def step(tx, grads, state):
        traces.append(tx)
        return tx.update(grads, state)

    jitted = jax.jit(step, static_argnums=0)
    g = jnp.ones(3)
    for rate in (0.1, 0.1, 0.2, 0.1):
        tx = aj.adam(rate)
        jitted(tx, g, tx.init(g))
    assert len(traces) == 2


def test_optax_chain_of_the_stages_gives_the_same(member):
    rng = np.random.default_rng(0)
    params = {
        "w": jnp.asarray(rng.standard_normal((3, 2)), jnp.bfloat16),
        "b": jnp.asarray(rng.standard_normal(2), jnp.float32),
    }
    tx = member(0.05)
    theirs = optax.chain(*tx.stages)
    state, other = tx.init(params), theirs.init(params)
    for _ in range(5):
        grads = jax.tree.map(lambda p: jnp.asarray(rng.standard_normal(p.shape), p.dtype), params)
        found, state = tx.update(grads, state, params)
        expected, other = theirs.update(grads, other, params)
        jax.tree.map(np.testing.assert_array_equal, (found, state), (expected, other))
        assert jax.tree.map(jnp.result_type, found) == jax.tree.map(jnp.result_type, expected)


def test_stays_wide_between_stages_and_rounds_once():
    """Nested, and with a stage of Optax behind: still the float32 result, rounded once."""
    tx = aj.chain(optax.identity(), aj.chain(aj.adam(0.1)), optax.scale(1.7))
    rng = np.random.default_rng(0)
    state, wide_state = tx.init(jnp.zeros(1000, jnp.bfloat16)), tx.init(jnp.zeros(1000))
    for _ in range(3):
        grads = jnp.asarray(rng.standard_normal(1000), jnp.bfloat16)
        update, state = tx.update(grads, state)
        wide, wide_state = tx.update(grads.astype(jnp.float32), wide_state)
        assert update.dtype == jnp.bfloat16
        np.testing.assert_array_equal(update, wide.astype(jnp.bfloat16))


def test_state_is_a_tuple_a_stage_each():
    tx = aj.chain(optax.clip_by_global_norm(1.0), aj.adam(0.1), aj.stages.average_parameters(0.9))
    state = tx.init(jnp.ones(2))
    assert isinstance(state, tuple)
    assert len(state) == 3
    assert isinstance(state[1], tuple)
    assert len(state[1]) == 4
    np.testing.assert_array_equal(optax.tree.get(state, "mu"), np.zeros(2))
    assert int(optax.tree.get(state, "count")) == 0


track, correct, scale, rate = STAGES[:4]
IMPOSSIBLE = [
    (
        (track, rate),
        [
            "scale_by_learning_rate(learning_rate=0.3) at position 1",
            "track_moments(b1=0.8, b2=0.95) at position 0",
        ],
    ),
    (
        (track, scale, correct),
        ["correct_bias() at position 2", "takes Moments", "gives plain updates"],
    ),
    ((rate, correct), ["correct_bias() at position 1", "track_moments(...)"]),
    (
        (track, optax.clip_by_global_norm(1.0)),
        [
            "<clip_by_global_norm of optax> at position 1 takes plain updates",
            "gives Moments",
            "scale_by_moments(...)",
        ],
    ),
    ((track, track, scale), ["at position 1 takes plain updates"]),
    ((aj.adam(0.1), rate), ["position 1", "a second one"]),
    (
        (aj.adam(0.1), aj.add_decayed_weights(0.1)),
        ["add_decayed_weights(weight_decay=0.1) at position 1", "only before it"],
    ),
    (
        (aj.adam(0.1), optax.scale(2.0), aj.chain(aj.stages.scale_by_trust_ratio())),
        ["position 2", "only before it"],
    ),
    (
        (aj.stages.average_parameters(0.9), rate),
        ["average_parameters(decay=0.9) at position 0", "comes later"],
    ),
    ((aj.add_decayed_weights(0.1, learning_rate=0.1), aj.adam(0.1)), ["position 0", "comes later"]),
    (
        (track, correct, aj.stages.look_ahead(), scale),
        ["look_ahead() at position 2", "after correct_bias()"],
    ),
    (
        (aj.chain(track, correct), aj.stages.rectify(), scale),
        ["rectify(threshold=5.0) at position 1", "after correct_bias()"],
    ),
    ((), ["at least one"]),
]


@pytest.mark.parametrize(("stages", "says"), IMPOSSIBLE)
def test_impossible_orders(stages, says):
    with pytest.raises(ValueError, match="chain: ") as error:
        aj.chain(*stages)
    for words in says:
        assert words in str(error.value)


@pytest.mark.parametrize("part", [aj.adam, 0.1, "adam", None, (1, 2)])
def test_not_a_transformation(part):
    with pytest.raises(
        TypeError, match="chain: found .* at position 1.*expected a gradient transformation"
    ):
        aj.chain(track, part)


@pytest.mark.parametrize(
    "stages",
    [
        (optax.scale_by_adam(), rate),
        (aj.chain(track, correct), scale, rate),
        (aj.chain(track), aj.chain(correct, aj.stages.clip_update_rms(), scale), rate),
        (
            optax.clip(1.0),
            aj.adamw(0.1),
            optax.scale(0.5),
            aj.stages.cautious(),
            aj.stages.average_parameters(0.9),
        ),
    ],
)
def test_possible_orders(stages, standard_promotion):
    tx = aj.chain(*stages)
    params = jnp.ones((2, 2))
    updates, _ = jax.jit(lambda: tx.update(params, tx.init(params), params))()
    assert (np.asarray(updates) < 0).all()


def test_what_others_keep_behind_ours_is_wide(standard_promotion):
    """A stateful stage of Optax behind ours gets float32 updates, and keeps its avals from step to
    step.
    """
    params = jnp.ones(3, jnp.bfloat16)
    tx = aj.chain(aj.adam(0.1), optax.trace(0.9))
    state = tx.init(params)
    run = jax.jit(
        lambda: jax.lax.scan(
            lambda s, g: (tx.update(g, s, params)[1], None), state, jnp.ones((4, 3), jnp.bfloat16)
        )
    )
    assert run()[0][1].trace.dtype == jnp.float32


def test_a_stage_with_a_typing_error():
    with pytest.raises(ValueError, match="stage: takes: found 'moment'; expected one of 'moments'"):
        aj.extend.stage(takes="moment")


def test_a_state_of_another_chain_is_refused():
    tx = aj.adam(0.1)
    with pytest.raises(
        ValueError, match="the states of 1 stages .EmptyState., where it keeps 4.*convert_state"
    ):
        tx.update(jnp.ones(1), (optax.EmptyState(),))
    with pytest.raises(
        ValueError, match="a dict, where it keeps the states of 4 stages.*in this order"
    ):
        tx.update(jnp.ones(1), {})


def test_a_stage_of_ones_own():
    """The fifteen lines a user writes: printed, compared, checked and composed like ours."""

    @aj.extend.stage(takes="updates", gives="updates", rate="before")
    def scale_by_sign(strength=1.0):
        def init(params):
            return optax.EmptyState()

        def update(updates, state, params, context):
            return jax.tree.map(lambda u: strength * jnp.sign(u), updates), state

        return init, update

    tx = aj.chain(scale_by_sign(2.0), aj.scale_by_learning_rate(0.5))
    assert repr(tx.stages[0]) == "scale_by_sign(strength=2.0)"
    assert tx == aj.chain(scale_by_sign(strength=2.0), aj.scale_by_learning_rate(0.5))
    updates, _ = tx.update(jnp.array([3.0, -0.1]), tx.init(jnp.zeros(2)))
    np.testing.assert_array_equal(updates, [-1.0, 1.0])
    with pytest.raises(ValueError, match="only before it"):
        aj.chain(aj.adam(0.1), scale_by_sign())
