"""`from_optax` and `to_optax`: a run of Optax goes on in ours with the same steps, and the other
way round.

The oracle is Optax going on by itself. Steps are compared to what float32 allows, the states that
were moved exactly."""

import functools
import inspect
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import normals, refused, same

import adam_jax as aj
from adam_jax import storage

STEPS = 60
"""Of each half of a run."""
RATE = optax.warmup_cosine_decay_schedule(0.0, 3e-3, 20, 400)
B = {"b2": 0.99}


def decayed(make, **options):
    return make(
        RATE, weight_decay=0.03, mask=lambda p: jax.tree.map(lambda x: x.ndim > 1, p), **options
    )


def contrib(name):
    return getattr(optax.contrib, name, None)


# Optax, ours.
MEMBERS = {
    "adam": (optax.adam, aj.adam),
    "adam eps_root": (
        functools.partial(optax.adam, eps_root=1e-6),
        functools.partial(aj.adam, eps_root=1e-6),
    ),
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
    "lamb": (
        functools.partial(optax.lamb, weight_decay=0.01),
        functools.partial(aj.lamb, weight_decay=0.01),
    ),
    "rmsprop": (optax.rmsprop, aj.rmsprop),
    "rmsprop all": (
        functools.partial(
            optax.rmsprop, centered=True, momentum=0.8, nesterov=True, initial_scale=0.1, eps=1e-6
        ),
        functools.partial(
            aj.rmsprop, centered=True, momentum=0.8, nesterov=True, initial_scale=0.1, eps=1e-6
        ),
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
    # Groups of `optax.partition` are groups by path, behind what has no moments.
    "groups": (
        lambda rate: optax.chain(
            optax.clip_by_global_norm(1e9),
            optax.partition(
                {"matrix": optax.adamw(rate, b2=0.99, weight_decay=0.03), "rest": optax.adam(rate)},
                {"w": "matrix", "b": "rest"},
            ),
        ),
        lambda rate: aj.chain(
            optax.clip_by_global_norm(1e9),
            aj.by_path(
                {"w": {"b2": 0.99}, "b": {"weight_decay": 0.0}}, aj.adamw(rate, weight_decay=0.03)
            ),
        ),
    ),
    # The groups of ours need not be those of Optax: the moments are by leaf.
    "finer groups": (optax.adam, lambda rate: aj.by_path({"b": {"b2": 0.999}}, aj.adam(rate))),
}


def is_known(theirs):
    """Whether this version of Optax has the optimizer, with these arguments."""
    if not isinstance(theirs, functools.partial) or theirs.func is decayed:
        return theirs is not None
    return theirs.keywords.keys() <= inspect.signature(theirs.func).parameters.keys()


MEMBERS = {name: pair for name, pair in MEMBERS.items() if is_known(pair[0])}


def make(name, side):
    pair = MEMBERS[name][side]
    return pair() if isinstance(pair, functools.partial) and pair.func is decayed else pair(RATE)


UNIT = 2**-24
"""The largest relative error of one rounding in float32."""

DECAYS = {
    "adam 0.99": (0.9, 0.99),
    "radam 0.9": (0.9, 0.9),
    "rmsprop": (0.0, 0.9),
    "rmsprop all": (0.9, 0.9),
    "rmsprop corrected": (0.0, 0.9),
    "momentum": (0.9, 0.0),
    "momentum nesterov": (0.9, 0.0),
    "momentum dampened": (0.9, 0.0),
    "adopt": (0.9, 0.9999),
    "ademamix": (0.9999, 0.999),
}
"""Those of the longest mean of gradients and of ν, where they are not 0.9 and 0.999."""


def gathered(b):
    """What two moments differ by that were gathered apart, relative to the moment.

    In a step each side rounds b, its product with the moment, and the sum: 3 UNIT. The moment
    forgets them as it forgets gradients, after 1/(1 − b) steps. Either side rounds 1 − b, g² and
    their product once."""
    return 6 * UNIT * (min(STEPS, 1 / (1 - b)) + 1)


def corrected(b):
    """The relative error of Optax's 1 − bᵗ, and one rounding of ours.

    Optax raises a b rounded to float32 to the power t, which multiplies that error by t. The power
    is good to 4 units in the last place, which are 8 UNIT. The difference from 1 makes both larger
    by bᵗ/(1 − bᵗ). The first t is the worst."""
    t = STEPS + 1
    return (
        (t * abs(float(np.float32(b)) / b - 1) + 8 * UNIT) * b**t / (1 - b**t) + 2 * UNIT
        if b
        else 0.0
    )


def rectified(b):
    """The relative error of Optax's √((ρ − 4)(ρ − 2)ρ∞ / ((ρ∞ − 4)(ρ∞ − 2)ρ)) for ρ = ρ∞ − 2t·bᵗ/(1
    − bᵗ).

    ρ is a difference of numbers that agree in all but their last digits; at most 1/(ρ − 4) of its
    error is in the root."""
    t, limit = STEPS + 1, 2 / (1 - b) - 1
    off = 2 * t * b**t / (1 - b**t)
    power = t * abs(float(np.float32(b)) / b - 1) + 8 * UNIT
    return (off * (power + corrected(b) + 3 * UNIT) + 2 * limit * UNIT) / (limit - off - 4)


def tolerance(name):
    """Of a step, relative to the longest of the same element. A root halves the error of ν."""
    b1, b2 = DECAYS.get(name, (0.9, 0.999))
    error = (
        gathered(b1) + corrected(b1) + (gathered(b2) + corrected(b2)) / 2 + 20 * UNIT
    )  # the quotient, the rate, the decay
    if "radam" in name:
        error += rectified(b2)
    if name == "lamb":
        error *= 2  # the trust ratio has once more the error of the step
    if name == "rmsprop all":
        error *= 10  # ν − μ² is a tenth of ν and more; see the gradients below
    return error


def draw(seed):
    """Gradients of all sizes, from 1e-5 to 1e2 by element, that do not depend on the parameters."""
    rng = np.random.default_rng(seed)
    sizes = {name: 10 ** np.linspace(-5, 2, p.size).reshape(p.shape) for name, p in START.items()}
    return {
        name: jnp.asarray(size * rng.standard_normal((STEPS, *size.shape)), jnp.float32)
        for name, size in sizes.items()
    }


START = {"w": normals(4, 6), "b": normals(5, seed=1)}
FIRST, THEN = draw(2), draw(3)
TXS = {(name, side): make(name, side) for name in MEMBERS for side in (0, 1)}


def scan(tx, state, grads, params=START):
    """The state after some steps, and their updates; the parameters stand still."""
    return jax.lax.scan(lambda state, grad: tx.update(grad, state, params)[::-1], state, grads)


@jax.jit
def go_on(states, grads):
    """Every member of either side, in one program."""
    return {key: scan(tx, states[key], grads) for key, tx in TXS.items()}


class Runs(NamedTuple):
    """What a member's run in one library is in the other, and how both go on.

    Attributes:
      state: after the first half.
      moved: that state in the other library.
      expected: the steps of the second half.
      found: those of the other library from the state moved.
      afresh: those of the other library from a fresh state.
    """

    state: Any
    moved: Any
    expected: Any
    found: Any
    afresh: Any


@functools.cache
def runs():
    """By member and side, the side that made the first half."""
    fresh = {key: tx.init(START) for key, tx in TXS.items()}
    states = {key: state for key, (state, _) in go_on(fresh, FIRST).items()}
    moved = {}
    for name in MEMBERS:
        moved[name, 0] = aj.migrate.from_optax(states[name, 0], TXS[name, 1], START)
        moved[name, 1] = aj.migrate.to_optax(states[name, 1], TXS[name, 1], fresh[name, 0])
    expected = go_on(states, THEN)
    found = go_on({(name, side): moved[name, 1 - side] for name, side in TXS}, THEN)
    afresh = go_on(fresh, THEN)
    return {
        (name, side): Runs(
            states[name, side],
            moved[name, side],
            expected[name, side][1],
            found[name, 1 - side][1],
            afresh[name, 1 - side][1],
        )
        for name, side in TXS
    }


def apart(found, expected):
    """How far the steps of two runs are apart: at most, in units of the longest step of the same
    element.
    """

    def leaf(a, b):
        a, b = (np.asarray(x, np.float64) for x in (a, b))
        return np.max(np.abs(a - b) / np.max(np.abs(b), axis=0))

    return max(jax.tree.leaves(jax.tree.map(leaf, found, expected)))


def moments(state):
    """The leaves that have the shape of a parameter, as bytes, in any order."""
    shapes = {p.shape for p in START.values()}
    return sorted(
        (x.shape, x.dtype.name, np.asarray(x).tobytes())
        for x in jax.tree.leaves(state)
        if x.shape in shapes
    )


def without_moments(state):
    """The state with zeros in place of its moments: their number, shapes and dtypes stay."""
    shapes = {p.shape for p in START.values()}
    return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype) if x.shape in shapes else x, state)


@pytest.mark.usefixtures("standard_promotion")  # Optax mixes dtypes
@pytest.mark.parametrize("name", MEMBERS)
@pytest.mark.parametrize("side", [0, 1], ids=["theirs becomes ours", "ours becomes theirs"])
def test_a_run_goes_on_in_either_direction(name, side):
    """60 steps, then 60 more in both."""
    run = runs()[name, side]
    assert apart(run.found, run.expected) < tolerance(name)
    # From fresh moments it goes elsewhere: the test would see it.
    assert apart(run.afresh, run.expected) > 100 * tolerance(name)
    # Moments are moved to the last bit. What is no moment is as if the other library had made the
    # steps: it knows its length, its schedules and its weights.
    assert moments(run.moved) == moments(run.state)
    same(without_moments(run.moved), without_moments(runs()[name, 1 - side].state))


# Where the state is, how it rests, and what it counts

LARGE = {"w": jnp.ones((64, 80)), "b": jnp.ones(3)}


def steps_of(tx, params, steps=5):
    """A state after some steps on gradients of all sizes, that do not depend on the parameters."""
    rng = np.random.default_rng(0)
    draw = lambda p: jnp.asarray(
        rng.standard_normal((steps, *p.shape)) * 10 ** rng.uniform(-6, 3, (steps, *p.shape)),
        p.dtype,
    )
    with jax.numpy_dtype_promotion("standard"):
        return jax.jit(lambda grads: scan(tx, tx.init(params), grads, params)[0])(
            jax.tree.map(draw, params)
        )


@pytest.mark.parametrize("form", ["bfloat16", ("8bit", storage.Float(jnp.float16))])
def test_moments_are_rounded_to_the_storage_as_in_a_conversion(form):
    state, wide, tx = (
        steps_of(optax.amsgrad(1e-3), LARGE),
        aj.amsgrad(1e-3),
        aj.amsgrad(1e-3, storage=form),
    )
    moved = aj.migrate.from_optax(state, tx, LARGE)
    same(moved, aj.convert_state(aj.migrate.from_optax(state, wide, LARGE), wide, tx, LARGE).state)
    back = aj.migrate.to_optax(moved, tx, state)
    np.testing.assert_allclose(back[0].mu["w"], state[0].mu["w"], rtol=2**-4, atol=1e-2)
    assert back[0].mu["w"].dtype == jnp.float32
    same(back[0].mu["b"], state[0].mu["b"])  # too small to be narrowed


def test_narrow_moments_of_optax_are_widened_and_come_back_the_same():
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), LARGE)
    for theirs, its in [
        (optax.adam(1e-3, mu_dtype=jnp.bfloat16), LARGE),
        (optax.adam(1e-3), params),
    ]:
        state, tx = steps_of(theirs, its), aj.adam(1e-3)
        moved = aj.migrate.from_optax(state, tx, its)
        assert moved[0].mu["w"].dtype == moved[0].nu["w"].dtype == jnp.float32
        np.testing.assert_array_equal(moved[0].mu["w"], state[0].mu["w"].astype(jnp.float32))
        same(aj.migrate.to_optax(moved, tx, state), state)


def test_leaves_of_every_kind():
    params = {
        "z": jnp.ones(3, jnp.complex64),
        "n": jnp.ones(2, jnp.int32),
        "none": None,
        "x": jnp.ones(2),
    }
    theirs, tx = optax.adam(1e-3), aj.adam(1e-3)
    state = theirs.init(params)
    fill = lambda x: (x + 1 if jnp.iscomplexobj(x) else x + 2).astype(x.dtype)
    state = (
        state[0]._replace(
            count=jnp.int32(7),
            mu=jax.tree.map(fill, state[0].mu),
            nu=jax.tree.map(fill, state[0].nu),
        ),
        state[1],
    )
    moved = aj.migrate.from_optax(state, tx, params)
    assert jax.tree.structure(moved) == jax.tree.structure(tx.init(params))
    assert moved[0].nu["z"].dtype == jnp.float32
    assert moved[0].nu["n"] is None
    back = aj.migrate.to_optax(moved, tx, state)
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
        plain = aj.migrate.from_optax(getattr(state, "inner_state", state), aj.adam(RATE), LARGE)
        same(aj.migrate.from_optax(state, aj.adam(RATE), LARGE), plain)
        assert int(plain[0].count) == int(plain[3].step) == 5
        np.testing.assert_array_equal(plain[0].mu["w"], optax.tree.get(state, "mu")["w"])
        back = aj.migrate.to_optax(plain, aj.adam(RATE), state)
        # The last bit of a recorded rate depends on how its schedule was compiled.
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-7), back, state)
    state = steps_of(chained, LARGE)
    moved = aj.migrate.from_optax(state, ours, LARGE)
    assert int(moved.inner_state[1][3].step) == int(moved.inner_state[1][0].count) == 5
    same(aj.migrate.to_optax(moved, ours, chained.init(LARGE)), state)


def test_an_nnx_optimizer():
    nnx = pytest.importorskip("flax.nnx")
    pure = getattr(nnx, "as_pure", None) or nnx.pure
    model, tx = nnx.Linear(2, 3, rngs=nnx.Rngs(0)), aj.adam(RATE)
    old = nnx.Optimizer(model, optax.adam(RATE), wrt=nnx.Param)

    @nnx.jit
    def update(optimizer, model):
        optimizer.update(model, nnx.grad(lambda model: (model(jnp.ones((4, 2))) ** 2).sum())(model))

    with jax.numpy_dtype_promotion("standard"):
        for _ in range(3):
            update(old, model)
        new = nnx.Optimizer(model, tx, wrt=nnx.Param)
        for state in (old.opt_state, pure(old.opt_state)):
            moved = aj.migrate.from_optax(state, tx, nnx.state(model, nnx.Param))
            nnx.update(new.opt_state, nnx.state(moved))
            assert int(new.opt_state[0].count[...]) == int(new.opt_state[3].step[...]) == 3
            new.step[...] = old.step[...]  # B12: Flax counts as well, and began at 0
            assert int(new.step[...]) == 3
            np.testing.assert_array_equal(
                new.opt_state[0].mu["kernel"][...], old.opt_state[0].mu["kernel"][...]
            )
        update(new, model)


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("taken", [3, 4])
def test_accumulated_gradients_move_with_multi_steps(taken):
    """B12: `tx=MultiSteps(ours)` was a TypeError, and the lines that work were nowhere."""
    params = {"w": jnp.ones((2, 3))}
    theirs = optax.MultiSteps(optax.adamw(RATE), 2)
    ours = optax.MultiSteps(aj.adamw(RATE), 2)
    state = theirs.init(params)
    grads = [normals(2, 3, seed=i) for i in range(8)]
    for g in grads[:taken]:
        _, state = theirs.update({"w": g}, state, params)
    moved = aj.migrate.from_optax(state, ours, params)
    inner = aj.migrate.from_optax(state.inner_opt_state, ours.inner_opt, params)
    same(moved, state._replace(inner_opt_state=inner))
    for g in grads[taken:]:
        expected, state = theirs.update({"w": g}, state, params)
        found, moved = ours.update({"w": g}, moved, params)
        np.testing.assert_allclose(found["w"], expected["w"], rtol=1e-4, atol=1e-8)
    with refused(ValueError, "a tx without it", "tx=optax.MultiSteps(tx", "inner_opt_state"):
        aj.migrate.from_optax(state, aj.adamw(RATE), params)
    with refused(ValueError, "expected one of MultiSteps", "_replace(inner_opt_state=state)"):
        aj.migrate.from_optax(state.inner_opt_state, ours, params)


def test_masked_leaves_are_frozen():
    theirs = optax.masked(optax.adam(1e-3), {"w": True, "b": False})
    tx = aj.by_path({"b": "frozen"}, aj.adam(1e-3))
    state = steps_of(theirs, LARGE)
    moved = aj.migrate.from_optax(state, tx, LARGE)
    np.testing.assert_array_equal(
        moved.inner_states["default"][0].mu["w"], state.inner_state[0].mu["w"]
    )
    same(aj.migrate.to_optax(moved, tx, theirs.init(LARGE)), state)
    with refused(ValueError, "to_optax: like: missing b; left over w"):
        aj.migrate.to_optax(
            moved, tx, optax.masked(optax.adam(1e-3), {"w": False, "b": True}).init(LARGE)
        )


@pytest.mark.parametrize(
    "state", [None, "x", {"state": {}}, optax.EmptyState(), aj.adam(1e-3).init(LARGE)]
)
def test_what_is_no_state_of_optax_is_refused(state):
    with refused(
        ValueError, "from_optax: found no moments of Optax in a", "optax.adam(1e-3).init(params)"
    ):
        aj.migrate.from_optax(state, aj.adam(1e-3), LARGE)


@pytest.mark.usefixtures("standard_promotion")
def test_decays_that_a_state_keeps_are_those_of_tx():
    state = steps_of(optax.inject_hyperparams(optax.adam)(1e-2, b2=0.99), LARGE)
    aj.migrate.from_optax(state, aj.adam(1e-2, b2=0.99), LARGE)
    with refused(
        ValueError, "found b2=0.99 in inject_hyperparams, and 0.999 in tx", "convert_state"
    ):
        aj.migrate.from_optax(state, aj.adam(1e-2), LARGE)


INJECTED = {
    "eps": ((optax.adam, {"eps": 1e-4}), aj.adam(1e-2), aj.adam(1e-2, eps=1e-4)),
    "eps_root": ((optax.adam, {"eps_root": 1e-6}), aj.adam(1e-2), aj.adam(1e-2, eps_root=1e-6)),
    "weight_decay": (
        (optax.adamw, {"weight_decay": 0.1}),
        aj.adamw(1e-2, weight_decay=0.01),
        aj.adamw(1e-2, weight_decay=0.1, mask={"w": True}),
    ),
    "weight_decay of 0": (
        (optax.adamw, {"weight_decay": 0.0}),
        aj.adamw(1e-2, weight_decay=0.1),
        aj.adamw(1e-2, weight_decay=0.0),
    ),
    "a schedule": (
        (optax.adamw, {"weight_decay": optax.linear_schedule(0.1, 0.0, 10)}),
        aj.adamw(1e-2, weight_decay=optax.linear_schedule(0.2, 0.0, 10)),
        aj.adamw(1e-2, weight_decay=optax.linear_schedule(0.1, 0.0, 10)),
    ),
    "momentum": ((optax.sgd, {"momentum": 0.8}), aj.momentum(1e-2), aj.momentum(1e-2, 0.8)),
}


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("case", INJECTED)
def test_what_inject_hyperparams_recorded_is_that_of_tx(case):
    """A10: another weight decay or ε than that of the run was accepted."""
    (make, values), wrong, right = INJECTED[case]
    params = {"w": jnp.ones((2, 3))}
    theirs = optax.inject_hyperparams(make)(0.5, **values)
    state = theirs.init(params)
    for _ in range(3):
        _, state = theirs.update(params, state, params)
    moved = aj.migrate.from_optax(state, right, params)  # another learning rate is no matter
    name = case.split()[0] if case != "a schedule" else "weight_decay"
    with refused(ValueError, f"found {name}=", "in inject_hyperparams", "for w", "convert_state"):
        aj.migrate.from_optax(state, wrong, params)
    # B12: the way back writes down what the last step of ours used.
    back = aj.migrate.to_optax(moved, right, theirs.init(params))
    np.testing.assert_allclose(back.hyperparams["learning_rate"], 1e-2, rtol=1e-6)
    for value in values:
        np.testing.assert_allclose(back.hyperparams[value], state.hyperparams[value], rtol=1e-6)


@pytest.mark.usefixtures("standard_promotion")
def test_what_inject_hyperparams_recorded_in_groups_and_under_other_names():
    """A10: each record is compared where its moments are; what cannot be compared is told."""
    params = {"a": jnp.ones(2), "b": jnp.ones(2)}
    inject = optax.inject_hyperparams(optax.adamw)
    theirs = optax.partition(
        {"a": inject(0.1, weight_decay=0.1), "b": inject(0.2, weight_decay=0.3)},
        {"a": "a", "b": "b"},
    )
    state, adam = theirs.init(params), aj.adamw(0.1, weight_decay=0.3)
    aj.migrate.from_optax(state, aj.by_path({"a": {"weight_decay": 0.1}}, adam), params)
    with refused(ValueError, "found weight_decay=0.3", "and 0.1 in tx, for b"):
        aj.migrate.from_optax(state, aj.adamw(0.1, weight_decay=0.1), params)
    tx = aj.by_path({"a": {"weight_decay": 0.1}}, aj.adamw(aj.settable(0.1), weight_decay=0.3))
    with refused(ValueError, "learning_rate=0.1 and 0.2 in two", "set_hyperparameters"):
        aj.migrate.from_optax(state, tx, params)

    def own(rate, wd):
        return optax.adamw(rate, weight_decay=wd)

    state = optax.inject_hyperparams(own)(rate=0.1, wd=0.3).init(params)
    with pytest.warns(UserWarning, match=r"recorded rate=0.1, wd=0.3, which tx has no argument"):
        aj.migrate.from_optax(state, adam, params)


@pytest.mark.parametrize("count", [-1, 1.5, True, "x", 10**10, np.nan])
def test_counts_that_are_none_are_refused(count):
    state = optax.rmsprop(1e-3).init(LARGE)
    with refused(ValueError, f"found {count!r} steps; expected a whole number from 0 on"):
        aj.migrate.from_optax(state, aj.rmsprop(1e-3), LARGE, count=count)


def test_a_tx_without_moments_has_nothing_to_move():
    with refused(
        ValueError, "keeps no moments, so there is nothing to move: begin with tx.init(params)"
    ):
        aj.migrate.from_optax(optax.adam(1e-3).init(LARGE), aj.presets.torch.sgd(1e-3), LARGE)
    tx = aj.adamw(1e-3)  # as many stages as amsgrad
    with refused(ValueError, "to_optax: found", "expected the state of keep_maximum"):
        aj.migrate.to_optax(tx.init(LARGE), aj.amsgrad(1e-3), optax.amsgrad(1e-3).init(LARGE))


def test_wrappers_with_arrays_of_their_own_give_the_state_inside():
    tx = aj.adam(1e-3)
    several = steps_of(optax.MultiSteps(optax.adam(1e-3), 2), LARGE, 6)
    with refused(ValueError, "the state of optax.MultiSteps", "state.inner_opt_state"):
        aj.migrate.from_optax(several, tx, LARGE)
    assert int(aj.migrate.from_optax(several.inner_opt_state, tx, LARGE)[0].count) == 3

    masked = steps_of(optax.masked(optax.adam(1e-3), {"w": True, "b": False}), LARGE)
    with refused(ValueError, "missing b", "the parameters that were trained"):
        aj.migrate.from_optax(masked, tx, LARGE)
    inside = {"w": LARGE["w"], "b": optax.MaskedNode()}
    assert jax.tree.structure(aj.migrate.from_optax(masked, tx, inside)) == jax.tree.structure(
        tx.init(inside)
    )

    groups = steps_of(
        optax.partition({"a": optax.adam(1e-3), "b": optax.sgd(1e-3, 0.9)}, {"w": "a", "b": "b"}),
        LARGE,
    )
    with refused(ValueError, "tx has not", "a sum of gradients (.inner_states['b']"):
        aj.migrate.from_optax(groups, tx, LARGE)
    aj.migrate.from_optax(groups.inner_states["a"], tx, inside)


@pytest.mark.usefixtures("standard_promotion")  # Optax's schedules mix dtypes
def test_counts_of_schedules_and_of_moments_are_each_kept():
    theirs, tx = optax.adam(RATE), aj.adam(RATE)
    first, schedule = steps_of(theirs, LARGE)
    state = (first, schedule._replace(count=jnp.int32(2)))
    moved = aj.migrate.from_optax(state, tx, LARGE)
    assert (int(moved[0].count), int(moved[3].step)) == (5, 2)
    same(aj.migrate.to_optax(moved, tx, theirs.init(LARGE)), state)


def test_a_schedule_of_decays_is_taken_step_by_step():
    b1 = optax.linear_schedule(0.5, 0.95, 50)
    moved = aj.migrate.from_optax(
        steps_of(optax.adam(1e-3), LARGE, 30), aj.adam(1e-3, b1=b1), LARGE
    )
    left = np.prod([float(b1(i)) for i in range(30)])
    np.testing.assert_allclose(
        moved[0].weights[0], [1 - left, -np.expm1(30 * np.log(0.999))], rtol=1e-6
    )


def test_a_count_is_asked_for_where_the_state_has_none():
    state, tx = steps_of(optax.rmsprop(1e-3), LARGE), aj.rmsprop(1e-3)
    with refused(ValueError, "keeps no count", "count=1000"):
        aj.migrate.from_optax(state, tx, LARGE)
    moved = aj.migrate.from_optax(state, tx, LARGE, count=5)
    assert moved[0].count == 5
    there = aj.convert_state(moved, tx, aj.rmsprop(1e-3, bias_correction=True), LARGE).state
    np.testing.assert_allclose(there[0].weights[0, 0], 1 - 0.9**5, rtol=1e-6)
    with refused(ValueError, "count=7, and 5"):
        aj.migrate.from_optax(steps_of(optax.adam(1e-3), LARGE), aj.adam(1e-3), LARGE, count=7)


def test_a_long_run_is_counted_out():
    state = steps_of(optax.adam(1e-3), LARGE)
    state = (state[0]._replace(count=jnp.int32(300_000)), state[1])
    moved = aj.migrate.from_optax(state, aj.adam(1e-3, b2=0.999999), LARGE)
    np.testing.assert_allclose(
        moved[0].weights.sum(0), [1, -np.expm1(300_000 * np.log(0.999999))], rtol=2e-7
    )


# What is refused


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
        (
            optax.adabelief(1.0),
            aj.adam(1.0),
            ["a mean of squared distances from the mean ([0].nu), which tx has not"],
        ),
        (optax.adam(1.0), aj.adabelief(1.0), ["a mean of squares ([0].nu), which tx has not"]),
        (optax.lion(1.0), aj.adam(1.0), ["found no moments of Optax in a tuple"]),
        (
            optax.chain(optax.adam(1.0), optax.adam(1.0)),
            aj.adam(1.0),
            ["a mean of gradients of b at [0][0].mu and at [1][0].mu"],
        ),
        (
            optax.adam(1.0),
            aj.chain(*aj.adam(1.0).stages[:-1], aj.adam(1.0)),
            ["tx has a mean", "at [0] and at [3][0]"],
        ),
        (optax.chain(optax.adam(1.0), optax.lion(1.0)), aj.adam(1.0), ["left over [1][0].mu['b']"]),
        (
            optax.adam(1.0),
            optax.chain(aj.adam(1.0)),
            ["no moments in", "build chains with adam_jax.chain"],
        ),
    ],
)
def test_refuses_moments_that_only_one_side_has(theirs, tx, says):
    with refused(ValueError, "from_optax", *says):
        aj.migrate.from_optax(theirs.init(LARGE), tx, LARGE)


def test_refuses_what_does_not_fit():
    state, tx = optax.adam(1.0).init(LARGE), aj.adam(1.0)
    with refused(TypeError, "tx: found 'adam'"):
        aj.migrate.from_optax(state, "adam", LARGE)
    with refused(ValueError, "at w found the shape (64, 80); expected (80, 64)"):
        aj.migrate.from_optax(state, tx, {"w": LARGE["w"].T, "b": LARGE["b"]})
    with refused(ValueError, "missing c; left over b"):
        aj.migrate.from_optax(state, tx, {"w": LARGE["w"], "c": LARGE["b"]})
    with refused(ValueError, "counts 0 at [0][1].count, 3 at [1].count"):
        scheduled = optax.chain(optax.adam(RATE), optax.scale_by_schedule(RATE)).init(LARGE)
        aj.migrate.from_optax((scheduled[0], scheduled[1]._replace(count=jnp.int32(3))), tx, LARGE)
    with refused(ValueError, "to_optax: like: left over b"):
        aj.migrate.to_optax(tx.init(LARGE), tx, optax.adam(1.0).init({"w": LARGE["w"]}))
    with refused(ValueError, "to_optax", "which like has not"):
        aj.migrate.to_optax(tx.init(LARGE), tx, optax.sgd(1.0, 0.9).init(LARGE))


def test_refuses_a_state_whose_weights_no_count_says():
    tx = aj.adam(1.0)
    state = steps_of(tx, LARGE)
    for changed in (
        aj.reset(state, tx),
        aj.reset(state, tx, match="'w'"),
        (state[0]._replace(count=jnp.int32(0)), *state[1:]),
    ):
        with refused(ValueError, "to_optax", "[0]", "as after `reset`"):
            aj.migrate.to_optax(changed, tx, optax.adam(1.0).init(LARGE))


def test_a_state_of_another_transformation_and_leaves_that_do_not_train():
    params = {"w": jnp.ones((4, 3)), "b": jnp.ones(3)}
    theirs = optax.adam(1e-3).init(params)
    with pytest.raises(ValueError, match="found a state that is not one of amsgrad"):
        aj.migrate.to_optax(aj.adam(1e-3).init(params), aj.amsgrad(1e-3), theirs)
    with pytest.raises(ValueError, match="left over b; expected the leaves"):
        aj.migrate.from_optax(theirs, aj.by_path({"b": "frozen"}, default=aj.adam(1e-3)), params)
