"""`from_optax` and `to_optax`: a run of Optax goes on in ours with the same steps, and the other way round.

The oracle is Optax going on by itself. It forms b2ᵗ of a b2 rounded to float32: at t = 150 and b2 = 0.999 its steps are off by
6e-6, at 0.99 by 3e-7. Trajectories are compared to that accuracy, the states that were moved exactly.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adam_jax as aj
from adam_jax import storage

STEPS = 150
RATE = optax.warmup_cosine_decay_schedule(0.0, 3e-3, 20, 400)
B = {"b2": 0.99}


def decayed(make, **options):
    return make(RATE, weight_decay=0.03, mask=lambda p: jax.tree.map(lambda x: x.ndim > 1, p), **options)


def contrib(name):
    return getattr(optax.contrib, name, None)


# Optax, ours.
MEMBERS = {
    "adam": (optax.adam, aj.adam),
    "adam eps_root": (functools.partial(optax.adam, eps_root=1e-6), functools.partial(aj.adam, eps_root=1e-6)),
    "adam 0.99": (functools.partial(optax.adam, **B), functools.partial(aj.adam, **B)),
    "adamw": (functools.partial(decayed, optax.adamw), functools.partial(decayed, aj.adamw)),
    "adamax": (optax.adamax, aj.adamax),
    "adamaxw": (functools.partial(decayed, optax.adamaxw), functools.partial(decayed, aj.adamaxw)),
    "amsgrad": (optax.amsgrad, aj.amsgrad),
    "amsgrad uncorrected": (
        functools.partial(optax.amsgrad, bias_correction_mu=False, bias_correction_nu=False),
        functools.partial(aj.amsgrad, bias_correction_mu=False, bias_correction_nu=False),
    ),
    "nadam": (optax.nadam, aj.nadam),
    "nadamw": (functools.partial(decayed, optax.nadamw), functools.partial(decayed, aj.nadamw)),
    "radam": (optax.radam, aj.radam),
    "radam 0.9": (functools.partial(optax.radam, b2=0.9), functools.partial(aj.radam, b2=0.9)),
    "adabelief": (optax.adabelief, aj.adabelief),
    "yogi": (optax.yogi, aj.yogi),
    "lamb": (functools.partial(optax.lamb, weight_decay=0.01), functools.partial(aj.lamb, weight_decay=0.01)),
    "rmsprop": (optax.rmsprop, aj.rmsprop),
    "rmsprop all": (
        functools.partial(optax.rmsprop, centered=True, momentum=0.8, nesterov=True, initial_scale=0.1, eps=1e-6),
        functools.partial(aj.rmsprop, centered=True, momentum=0.8, nesterov=True, initial_scale=0.1, eps=1e-6),
    ),
    "rmsprop corrected": (
        functools.partial(optax.rmsprop, bias_correction=True, eps_in_sqrt=False),
        functools.partial(aj.rmsprop, bias_correction=True, eps_in_sqrt=False),
    ),
    "momentum": (functools.partial(optax.sgd, momentum=0.9), aj.momentum),
    "momentum nesterov": (
        functools.partial(optax.sgd, momentum=0.9, nesterov=True),
        functools.partial(aj.momentum, nesterov=True),
    ),
    "momentum dampened": (
        lambda rate: optax.chain(optax.ema(0.9), optax.scale_by_learning_rate(rate)),
        functools.partial(aj.momentum, dampened=True),
    ),
    "adopt": (contrib("adopt"), aj.adopt),
    "ademamix": (contrib("ademamix"), aj.ademamix),
}
MEMBERS = {name: pair for name, pair in MEMBERS.items() if pair[0] is not None}


def make(name, side):
    pair = MEMBERS[name][side]
    return pair() if isinstance(pair, functools.partial) and pair.func is decayed else pair(RATE)


EXACT = ("adamax", "adamaxw", "amsgrad", "lamb", "rmsprop", "momentum", "adopt")
"""Those whose steps do not depend on 1 − b2ᵗ, or hardly."""


# A network whose leaves have gradients from 1e-6 to 1e2


SIZES = {"in": 1e-4, "out": 1.0, "scale": 30.0}


def problem():
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    params = {"in": {"kernel": draw(4, 8), "bias": draw(8)}, "out": {"kernel": draw(8, 3)}, "scale": draw(3)}
    return params, (draw(2 * STEPS, 16, 4), draw(2 * STEPS, 16, 3))


def loss(params, batch):
    x, y = batch
    x = jnp.tanh(x @ params["in"]["kernel"] + params["in"]["bias"]) @ params["out"]["kernel"]
    return jnp.mean((params["scale"] * x - y) ** 2)


def gradients(params, batch):
    grads = jax.grad(loss)(params, batch)
    return {name: jax.tree.map(lambda g, size=SIZES[name]: size * g, grads[name]) for name in grads}


@functools.cache
def runner(tx):
    @jax.jit
    def run(params, state, data):
        def step(carry, batch):
            params, state = carry
            updates, state = tx.update(gradients(params, batch), state, params)
            params = optax.apply_updates(params, updates)
            return (params, state), params

        return jax.lax.scan(step, (params, state), data)

    return run


def halves(data):
    return tuple(x[:STEPS] for x in data), tuple(x[STEPS:] for x in data)


def apart(found, expected, start):
    """How far two trajectories are apart, in units of the way that was gone: of the leaf where that is farthest.

    A way that is short beside the parameter itself counts as a hundredth of it: its steps are rounded to the last bit of that.
    """

    def leaf(a, b, start):
        a, b, start = (np.asarray(x, np.float64) for x in (a, b, start))
        return np.max(np.linalg.norm((a - b).reshape(len(a), -1), axis=1)) / (
            np.linalg.norm(b[-1] - start) + 0.01 * np.linalg.norm(start)
        )

    return max(jax.tree.leaves(jax.tree.map(leaf, found, expected, start)))


def same(found, expected):
    """To the last bit, dtype and place."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for (path, left), right in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        assert left.dtype == right.dtype
        np.testing.assert_array_equal(left, right, err_msg=jax.tree_util.keystr(path))


def without_moments(state):
    """What of a state of ours is no moment."""
    fields = {"mu", "nu", "nu_max", "mu_slow"}
    return [{f: getattr(part, f) for f in part._fields if f not in fields} for part in state]


# RAdam's length of ν is in Optax a difference of numbers that agree in all but their last digits.
TOLERANCE = {"radam": 2e-4}


@pytest.mark.usefixtures("standard_promotion")  # Optax mixes dtypes
@pytest.mark.parametrize("name", MEMBERS)
def test_a_run_goes_on_in_either_direction(name):
    """150 steps, then 150 more in both."""
    start, data = problem()
    first, then = halves(data)
    theirs, tx = make(name, 0), make(name, 1)
    tolerance = TOLERANCE.get(name, 3e-6 if name.split()[0] in EXACT or "0.9" in name else 2e-5)

    (params, state), _ = runner(theirs)(start, theirs.init(start), first)
    moved = aj.from_optax(state, tx, params)
    _, expected = runner(theirs)(params, state, then)
    _, found = runner(tx)(params, moved, then)
    assert apart(found, expected, params) < tolerance
    same(aj.to_optax(moved, tx, theirs.init(params)), state)

    # What is no moment is as if ours had made the steps. So these know their length, their schedules and their weights.
    (params, state), _ = runner(tx)(start, tx.init(start), first)
    assert jax.tree.structure(moved) == jax.tree.structure(state)
    same(without_moments(moved), without_moments(state))

    back = aj.to_optax(state, tx, theirs.init(params))
    _, expected = runner(tx)(params, state, then)
    _, found = runner(theirs)(params, back, then)
    assert apart(found, expected, params) < tolerance
    same(aj.from_optax(back, tx, params), state)
    # From fresh moments it goes elsewhere: the test would see it.
    _, afresh = runner(theirs)(params, theirs.init(params), then)
    assert apart(afresh, expected, params) > 100 * tolerance


# Where the state is, how it rests, and what it counts

LARGE = {"w": jnp.ones((64, 80)), "b": jnp.ones(3)}


def steps_of(tx, params, steps=5):
    """A state after some steps on gradients of all sizes, that do not depend on the parameters."""
    state = tx.init(params)
    with jax.numpy_dtype_promotion("standard"):
        for seed in range(steps):
            rng = np.random.default_rng(seed)
            draw = lambda p, rng=rng: jnp.asarray(rng.standard_normal(p.shape) * 10 ** rng.uniform(-6, 3, p.shape), p.dtype)  # noqa: E731
            _, state = tx.update(jax.tree.map(draw, params), state, params)
    return state


@pytest.mark.parametrize("form", ["bfloat16", "8bit", ("8bit", storage.Float(jnp.float16))])
def test_moments_are_rounded_to_the_storage_as_in_a_conversion(form):
    state, wide, tx = steps_of(optax.amsgrad(1e-3), LARGE), aj.amsgrad(1e-3), aj.amsgrad(1e-3, storage=form)
    moved = aj.from_optax(state, tx, LARGE)
    same(moved, aj.convert_state(aj.from_optax(state, wide, LARGE), wide, tx, LARGE).state)
    back = aj.to_optax(moved, tx, state)
    np.testing.assert_allclose(back[0].mu["w"], state[0].mu["w"], rtol=2**-4, atol=1e-2)
    assert back[0].mu["w"].dtype == jnp.float32
    same(back[0].mu["b"], state[0].mu["b"])  # too small to be narrowed


def test_narrow_moments_of_optax_are_widened_and_come_back_the_same():
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), LARGE)
    for theirs, its in [(optax.adam(1e-3, mu_dtype=jnp.bfloat16), LARGE), (optax.adam(1e-3), params)]:
        state, tx = steps_of(theirs, its), aj.adam(1e-3)
        moved = aj.from_optax(state, tx, its)
        assert moved[0].mu["w"].dtype == moved[0].nu["w"].dtype == jnp.float32
        np.testing.assert_array_equal(moved[0].mu["w"], state[0].mu["w"].astype(jnp.float32))
        same(aj.to_optax(moved, tx, state), state)


def test_leaves_of_every_kind():
    params = {"z": jnp.ones(3, jnp.complex64), "n": jnp.ones(2, jnp.int32), "none": None, "x": jnp.ones(2)}
    theirs, tx = optax.adam(1e-3), aj.adam(1e-3)
    state = theirs.init(params)
    fill = lambda x: (x + 1 if jnp.iscomplexobj(x) else x + 2).astype(x.dtype)  # noqa: E731
    state = (
        state[0]._replace(count=jnp.int32(7), mu=jax.tree.map(fill, state[0].mu), nu=jax.tree.map(fill, state[0].nu)),
        state[1],
    )
    moved = aj.from_optax(state, tx, params)
    assert jax.tree.structure(moved) == jax.tree.structure(tx.init(params))
    assert moved[0].nu["z"].dtype == jnp.float32
    assert moved[0].nu["n"] is None
    back = aj.to_optax(moved, tx, state)
    same(back, state)


@pytest.mark.usefixtures("standard_promotion")  # Optax's schedules mix dtypes
def test_found_inside_of_wrappers():
    chained = optax.chain(optax.clip(1.0), optax.adam(RATE))
    ours = aj.skip_nonfinite(aj.chain(optax.clip(1.0), aj.adam(RATE)))
    for theirs in [
        optax.apply_if_finite(optax.adam(RATE), 3),
        optax.inject_hyperparams(optax.adam)(RATE),
        optax.with_extra_args_support(optax.adam(RATE)),
    ]:
        state = steps_of(theirs, LARGE)
        plain = aj.from_optax(getattr(state, "inner_state", state), aj.adam(RATE), LARGE)
        same(aj.from_optax(state, aj.adam(RATE), LARGE), plain)
        assert int(plain[0].count) == int(plain[3].step) == 5
        np.testing.assert_array_equal(plain[0].mu["w"], optax.tree.get(state, "mu")["w"])
        same(aj.to_optax(plain, aj.adam(RATE), state), state)
    state = steps_of(chained, LARGE)
    moved = aj.from_optax(state, ours, LARGE)
    assert int(moved.inner_state[1][3].step) == int(moved.inner_state[1][0].count) == 5
    same(aj.to_optax(moved, ours, chained.init(LARGE)), state)


def test_an_nnx_optimizer():
    nnx = pytest.importorskip("flax.nnx")
    pure = getattr(nnx, "as_pure", None) or nnx.pure
    model, tx = nnx.Linear(2, 3, rngs=nnx.Rngs(0)), aj.adam(RATE)
    old = nnx.Optimizer(model, optax.adam(RATE), wrt=nnx.Param)
    loss = lambda model: (model(jnp.ones((4, 2))) ** 2).sum()  # noqa: E731
    with jax.numpy_dtype_promotion("standard"):
        for _ in range(3):
            old.update(model, nnx.grad(loss)(model))
        new = nnx.Optimizer(model, tx, wrt=nnx.Param)
        for state in (old.opt_state, pure(old.opt_state)):
            moved = aj.from_optax(state, tx, nnx.state(model, nnx.Param))
            nnx.update(new.opt_state, nnx.state(moved))
            assert int(new.opt_state[0].count[...]) == int(new.opt_state[3].step[...]) == 3
            np.testing.assert_array_equal(new.opt_state[0].mu["kernel"][...], old.opt_state[0].mu["kernel"][...])
        new.update(model, nnx.grad(loss)(model))


@pytest.mark.usefixtures("standard_promotion")  # Optax mixes dtypes
def test_groups_of_partition_are_groups_by_path():
    theirs = optax.chain(
        optax.clip_by_global_norm(1e9),
        optax.partition(
            {
                "in": optax.adamw(RATE, b2=0.99, weight_decay=0.03),
                "scale": optax.adam(RATE),
                "rest": optax.adamw(RATE, weight_decay=0.03),
            },
            {"in": "in", "scale": "scale", "out": "rest"},
        ),
    )
    groups = {"in/.*": {"b2": 0.99}, "scale": {"weight_decay": 0.0}}
    tx = aj.chain(optax.clip_by_global_norm(1e9), aj.by_path(groups, aj.adamw(RATE, weight_decay=0.03)))
    start, data = problem()
    first, then = halves(data)
    (params, state), _ = runner(theirs)(start, theirs.init(start), first)
    moved = aj.from_optax(state, tx, params)
    same(aj.to_optax(moved, tx, theirs.init(params)), state)
    _, expected = runner(theirs)(params, state, then)
    _, found = runner(tx)(params, moved, then)
    assert apart(found, expected, params) < 2e-5
    (_, ours), _ = runner(tx)(start, tx.init(start), first)
    for name, its in ours[1].inner_states.items():
        same(without_moments(moved[1].inner_states[name]), without_moments(its))

    # The groups of ours need not be those of Optax: the moments are by leaf.
    finer = aj.by_path(
        {"in/kernel": {"b2": 0.99}, "in/bias": {"b2": 0.99}, "scale": aj.adam(RATE)}, aj.adamw(RATE, weight_decay=0.03)
    )
    _, found = runner(finer)(params, aj.from_optax(state, finer, params), then)
    assert apart(found, expected, params) < 2e-5


def test_masked_leaves_are_frozen():
    theirs = optax.masked(optax.adam(1e-3), {"w": True, "b": False})
    tx = aj.by_path({"b": "frozen"}, aj.adam(1e-3))
    state = steps_of(theirs, LARGE)
    moved = aj.from_optax(state, tx, LARGE)
    np.testing.assert_array_equal(moved.inner_states["default"][0].mu["w"], state.inner_state[0].mu["w"])
    same(aj.to_optax(moved, tx, theirs.init(LARGE)), state)
    with refused(ValueError, "to_optax: like: missing b; left over w"):
        aj.to_optax(moved, tx, optax.masked(optax.adam(1e-3), {"w": False, "b": True}).init(LARGE))


@pytest.mark.parametrize("state", [None, "x", {"state": {}}, optax.EmptyState(), aj.adam(1e-3).init(LARGE)])
def test_what_is_no_state_of_optax_is_refused(state):
    with refused(ValueError, "from_optax: found no moments of Optax in a", "optax.adam(1e-3).init(params)"):
        aj.from_optax(state, aj.adam(1e-3), LARGE)


@pytest.mark.usefixtures("standard_promotion")
def test_decays_that_a_state_keeps_are_those_of_tx():
    state = steps_of(optax.inject_hyperparams(optax.adam)(1e-2, b2=0.99), LARGE)
    aj.from_optax(state, aj.adam(1e-2, b2=0.99), LARGE)
    with refused(ValueError, "found b2=0.99 in inject_hyperparams, and 0.999 in tx", "convert_state"):
        aj.from_optax(state, aj.adam(1e-2), LARGE)


@pytest.mark.parametrize("count", [-1, 1.5, True, "x", 10**10, np.nan])
def test_counts_that_are_none_are_refused(count):
    state = optax.rmsprop(1e-3).init(LARGE)
    with refused(ValueError, f"found {count!r} steps; expected a whole number from 0 on"):
        aj.from_optax(state, aj.rmsprop(1e-3), LARGE, count=count)


def test_a_tx_without_moments_has_nothing_to_move():
    with refused(ValueError, "keeps no moments, so there is nothing to move: begin with tx.init(params)"):
        aj.from_optax(optax.adam(1e-3).init(LARGE), aj.presets.torch.sgd(1e-3), LARGE)
    tx = aj.presets.torch.adamw(1e-3)  # as many stages as amsgrad
    with refused(ValueError, "to_optax: found", "expected the state of keep_maximum"):
        aj.to_optax(tx.init(LARGE), aj.amsgrad(1e-3), optax.amsgrad(1e-3).init(LARGE))


def test_wrappers_with_arrays_of_their_own_give_the_state_inside():
    tx = aj.adam(1e-3)
    several = steps_of(optax.MultiSteps(optax.adam(1e-3), 2), LARGE, 6)
    with refused(ValueError, "left over .acc_grads['b']", "the state inside"):
        aj.from_optax(several, tx, LARGE)
    assert int(aj.from_optax(several.inner_opt_state, tx, LARGE)[0].count) == 3

    masked = steps_of(optax.masked(optax.adam(1e-3), {"w": True, "b": False}), LARGE)
    with refused(ValueError, "missing b", "the parameters that were trained"):
        aj.from_optax(masked, tx, LARGE)
    inside = {"w": LARGE["w"], "b": optax.MaskedNode()}
    assert jax.tree.structure(aj.from_optax(masked, tx, inside)) == jax.tree.structure(tx.init(inside))

    groups = steps_of(optax.partition({"a": optax.adam(1e-3), "b": optax.sgd(1e-3, 0.9)}, {"w": "a", "b": "b"}), LARGE)
    with refused(ValueError, "tx has not", "a sum of gradients (.inner_states['b']"):
        aj.from_optax(groups, tx, LARGE)
    aj.from_optax(groups.inner_states["a"], tx, inside)


@pytest.mark.usefixtures("standard_promotion")  # Optax's schedules mix dtypes
def test_counts_of_schedules_and_of_moments_are_each_kept():
    theirs, tx = optax.adam(RATE), aj.adam(RATE)
    first, schedule = steps_of(theirs, LARGE)
    state = (first, schedule._replace(count=jnp.int32(2)))
    moved = aj.from_optax(state, tx, LARGE)
    assert (int(moved[0].count), int(moved[3].step)) == (5, 2)
    same(aj.to_optax(moved, tx, theirs.init(LARGE)), state)


def test_a_schedule_of_decays_is_taken_step_by_step():
    b1 = optax.linear_schedule(0.5, 0.95, 50)
    moved = aj.from_optax(steps_of(optax.adam(1e-3), LARGE, 30), aj.adam(1e-3, b1=b1), LARGE)
    left = np.prod([float(b1(i)) for i in range(30)])
    np.testing.assert_allclose(moved[0].weights[0], [1 - left, -np.expm1(30 * np.log(0.999))], rtol=1e-6)


def test_a_count_is_asked_for_where_the_state_has_none():
    state, tx = steps_of(optax.rmsprop(1e-3), LARGE), aj.rmsprop(1e-3)
    with refused(ValueError, "keeps no count", "count=1000"):
        aj.from_optax(state, tx, LARGE)
    moved = aj.from_optax(state, tx, LARGE, count=5)
    np.testing.assert_allclose(moved[0].weights[0, 1], 1 - 0.9**5, rtol=1e-6)
    with refused(ValueError, "count=7, and 5"):
        aj.from_optax(steps_of(optax.adam(1e-3), LARGE), aj.adam(1e-3), LARGE, count=7)


def test_a_long_run_is_counted_out():
    state = steps_of(optax.adam(1e-3), LARGE)
    state = (state[0]._replace(count=jnp.int32(300_000)), state[1])
    moved = aj.from_optax(state, aj.adam(1e-3, b2=0.999999), LARGE)
    np.testing.assert_allclose(moved[0].weights.sum(0), [1, -np.expm1(300_000 * np.log(0.999999))], rtol=2e-7)


# What is refused


def refused(error, *says):
    return pytest.raises(error, match="(?s)" + "".join(f"(?=.*{re.escape(part)})" for part in says))


@pytest.mark.parametrize(
    ("theirs", "tx", "says"),
    [
        (optax.adam(1.0), aj.amsgrad(1.0), ["tx has a maximum of ν", "which the state has not"]),
        (optax.amsgrad(1.0), aj.adam(1.0), ["[0].nu_max", "which tx has not"]),
        (
            optax.amsgrad(1.0),
            aj.amsgrad(1.0, maximum="raw"),
            ["a maximum of the raw ν, corrected later, which the state has not"],
        ),
        (optax.adabelief(1.0), aj.adam(1.0), ["a mean of squared distances from the mean ([0].nu), which tx has not"]),
        (optax.adam(1.0), aj.adabelief(1.0), ["a mean of squares ([0].nu), which tx has not"]),
        (optax.lion(1.0), aj.adam(1.0), ["found no moments of Optax in a tuple"]),
        (optax.chain(optax.adam(1.0), optax.adam(1.0)), aj.adam(1.0), ["a mean of gradients of b at [0][0].mu and at [1][0].mu"]),
        (optax.adam(1.0), aj.chain(*aj.adam(1.0).stages[:-1], aj.adam(1.0)), ["tx has a mean", "at [0] and at [3][0]"]),
        (optax.chain(optax.adam(1.0), optax.lion(1.0)), aj.adam(1.0), ["left over [1][0].mu['b']"]),
        (optax.adam(1.0), optax.chain(aj.adam(1.0)), ["no moments in", "build chains with adam_jax.chain"]),
    ],
)
def test_refuses_moments_that_only_one_side_has(theirs, tx, says):
    with refused(ValueError, "from_optax", *says):
        aj.from_optax(theirs.init(LARGE), tx, LARGE)


def test_refuses_what_does_not_fit():
    state, tx = optax.adam(1.0).init(LARGE), aj.adam(1.0)
    with refused(TypeError, "tx: found 'adam'"):
        aj.from_optax(state, "adam", LARGE)
    with refused(ValueError, "at w found the shape (64, 80); expected (80, 64)"):
        aj.from_optax(state, tx, {"w": LARGE["w"].T, "b": LARGE["b"]})
    with refused(ValueError, "missing c; left over b"):
        aj.from_optax(state, tx, {"w": LARGE["w"], "c": LARGE["b"]})
    with refused(ValueError, "counts 0 at [0][1].count, 3 at [1].count"):
        scheduled = optax.chain(optax.adam(RATE), optax.scale_by_schedule(RATE)).init(LARGE)
        aj.from_optax((scheduled[0], scheduled[1]._replace(count=jnp.int32(3))), tx, LARGE)
    with refused(ValueError, "to_optax: like: left over b"):
        aj.to_optax(tx.init(LARGE), tx, optax.adam(1.0).init({"w": LARGE["w"]}))
    with refused(ValueError, "to_optax", "which like has not"):
        aj.to_optax(tx.init(LARGE), tx, optax.sgd(1.0, 0.9).init(LARGE))


def test_refuses_a_state_whose_weights_no_count_says():
    tx = aj.adam(1.0)
    state = steps_of(tx, LARGE)
    for changed in (aj.reset(state), aj.reset(state, match="'w'"), aj.reset(state, moments=False, schedule=True)):
        with refused(ValueError, "to_optax", "[0]", "as after `reset`"):
            aj.to_optax(changed, tx, optax.adam(1.0).init(LARGE))


def test_a_state_of_another_transformation_and_leaves_that_do_not_train():
    params = {"w": jnp.ones((4, 3)), "b": jnp.ones(3)}
    theirs = optax.adam(1e-3).init(params)
    with pytest.raises(ValueError, match="found a state that is not one of amsgrad"):
        aj.to_optax(aj.adam(1e-3).init(params), aj.amsgrad(1e-3), theirs)
    with pytest.raises(ValueError, match="left over b; expected the leaves"):
        aj.from_optax(theirs, aj.by_path({"b": "frozen"}, default=aj.adam(1e-3)), params)
