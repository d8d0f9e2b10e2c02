"""A step that is skipped changes nothing, is counted, and costs no memory; a poisoned run ends
where a clean one does.
"""

import functools
import itertools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import bits, normals, refused, same
from jax.experimental import checkify
from sklearn.datasets import load_digits

import adam_jax as aj

STORAGES = ["float32", "bfloat16", "8bit"]
GUARDS = {
    "nonfinite": aj.skip_nonfinite,
    "spikes": functools.partial(aj.skip_spikes, window=8, warmup=4),
}
seeds = itertools.count()


def some(shape, dtype=jnp.float32):
    return normals(*shape, seed=next(seeds), dtype=dtype)


PARAMS = {
    "w": some((64, 80)),
    "b": some((7,), jnp.bfloat16).at[0].set(-0.0),
    "s": some(()),
    "n": jnp.arange(3),
    "none": None,
}


def gradients(scale=1.0):
    made = {
        name: some(leaf.shape, leaf.dtype) * scale
        if name != "n"
        else np.zeros(3, jax.dtypes.float0)
        for name, leaf in PARAMS.items()
        if leaf is not None
    }
    return made | {"none": None}


def poisoned(gradients, leaf="w", value=np.nan):
    sick = gradients[leaf]
    return gradients | {leaf: sick.at[(-1,) * sick.ndim].set(value)}


@functools.partial(jax.jit, static_argnums=0)
def step(tx, params, state, gradients):
    updates, state = tx.update(gradients, state, params)
    with jax.numpy_dtype_promotion("standard"):
        return optax.apply_updates(params, updates), state


def run(tx, params, course):
    """Parameters and state after a course of gradients, each step jitted as a user would; compiled
    once for equal `tx`.
    """
    state = tx.init(params)
    for gradients in course:
        params, state = step(tx, params, state, gradients)
    return params, state


# Each pair of a storage and a guard meets two or three members.
POINTS = [
    (name, storage, guard)
    for name, (storage, guard) in zip(
        aj.family.__all__, itertools.cycle(itertools.product(STORAGES, GUARDS)), strict=False
    )
]


@pytest.mark.parametrize(("name", "storage", "guard"), POINTS)
def test_a_poisoned_step_is_as_if_it_had_not_been(name, storage, guard):
    """Counts, random bits and all, of every member, with bf16 parameters rounded stochastically
    behind it.
    """
    tx = GUARDS[guard](
        aj.chain(getattr(aj, name)(1e-2, storage=storage), aj.round_stochastically())
    )
    good = [gradients() for _ in range(3)]
    params, state = run(tx, PARAMS, good)
    after, skipped = run(
        tx, PARAMS, [good[0], poisoned(good[0]), good[1], poisoned(good[1], "b", -np.inf), good[2]]
    )
    same(after, params)
    same(skipped.inner_state, state.inner_state)
    assert (state.skipped, skipped.skipped, skipped.consecutive, skipped.too_many) == (
        0,
        2,
        0,
        False,
    )
    assert bits(params) != bits(PARAMS)


MORE = {"c": some((5,), jnp.complex64), "h": some((4,), jnp.float16)}


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("leaf", ["w", "b", "s", "c", "h"])
def test_any_element_of_any_leaf_is_poison(leaf, value):
    params, good = PARAMS | MORE, gradients() | MORE
    sick = poisoned(good, leaf, complex(0, value) if leaf == "c" else value)
    after, state = run(aj.skip_nonfinite(aj.adam(0.1)), params, [sick])
    same(after, params)
    assert state.skipped == 1
    assert run(aj.skip_nonfinite(aj.adam(0.1)), params, [good])[1].skipped == 0


def test_a_parameter_of_minus_zero_keeps_its_sign():
    params = {"x": jnp.array([-0.0, 0.0, 1.0])}
    after, _ = run(aj.skip_nonfinite(aj.adam(0.1)), params, [{"x": jnp.array([jnp.nan, 1.0, 1.0])}])
    same(after, params)


def test_large_and_absent_numbers_are_not_poison():
    params = {"x": jnp.ones(3), "empty": jnp.zeros((0, 2))}
    _, state = run(
        aj.skip_nonfinite(aj.adam(0.1)),
        params,
        [{"x": jnp.full(3, 3e38), "empty": jnp.zeros((0, 2))}],
    )
    assert state.skipped == 0
    assert run(aj.skip_nonfinite(aj.adam(0.1)), {}, [{}])[1].skipped == 0


def wrappers():
    adam = aj.adam(1e-2, storage="8bit")
    guarded = aj.skip_nonfinite(adam)
    mask = {"w": True, "b": True, "s": False, "none": None}
    labels = {"w": "a", "b": "b", "s": "a", "none": None}
    yield "chain", aj.skip_nonfinite(optax.chain(optax.clip(1.0), adam))
    yield "in a chain", aj.chain(optax.clip(10.0), guarded)
    yield "in Optax's chain", optax.chain(guarded, optax.scale(0.5))
    yield "masked", optax.masked(guarded, mask)
    yield "around masked", aj.skip_nonfinite(optax.masked(adam, mask))
    yield (
        "partition",
        aj.skip_nonfinite(optax.partition({"a": adam, "b": aj.momentum(0.1)}, labels)),
    )
    yield "MultiSteps", aj.skip_nonfinite(optax.MultiSteps(adam, 2).gradient_transformation())
    yield (
        "inject",
        optax.inject_hyperparams(lambda learning_rate: aj.skip_nonfinite(aj.adam(learning_rate)))(
            1e-2
        ),
    )
    yield "Optax's Adam", aj.skip_nonfinite(optax.adam(1e-2))
    yield "noise", aj.skip_nonfinite(optax.chain(optax.add_noise(0.1, 0.5, 0), adam))
    yield "twice", aj.skip_spikes(aj.skip_nonfinite(adam))


@pytest.mark.parametrize(("name", "tx"), list(wrappers()), ids=[name for name, _ in wrappers()])
@pytest.mark.usefixtures("standard_promotion")
def test_inside_and_outside_of_wrappers(name, tx):
    """Without the integer leaf, at which Optax's own transformations stop."""
    params, good, sick = (
        {k: v for k, v in tree.items() if k != "n"}
        for tree in (PARAMS, gradients(), poisoned(gradients()))
    )
    expected, _ = run(tx, params, [good, good])
    after, state = run(tx, params, [good, sick, good])
    passes = (
        {"['s']"} if name == "masked" else set()
    )  # what is masked a wrapper hands on around the guard
    assert {path: its for path, its in bits(after).items() if path not in passes} == {
        path: its for path, its in bits(expected).items() if path not in passes
    }
    # Of two guards the outer one skips the inner one's step, and its count with it.
    assert max(int(count) for _, count in optax.tree.get_all_with_path(state, "skipped")) == 1
    assert jax.tree.structure(state) == jax.tree.structure(tx.init(params))


def test_too_many_in_a_row_are_told():
    tx = aj.chain(aj.skip_nonfinite(aj.adam(0.1), max_consecutive=3))
    good, sick = gradients(), poisoned(gradients())
    _, state = run(tx, PARAMS, [sick, sick, good, sick, sick])
    assert (state[0].skipped, state[0].consecutive, state[0].too_many) == (4, 2, False)
    aj.expect_progress(state)
    _, state = run(tx, PARAMS, [sick, sick, sick, good])
    assert (state[0].skipped, state[0].consecutive, state[0].too_many) == (3, 0, True)
    with pytest.raises(
        RuntimeError, match=r"SkipNonfinite at \[0\]: 3 steps skipped in all, 0 in a row now"
    ):
        aj.expect_progress({"optimizer": state}["optimizer"])


def test_checkify_raises_on_the_device():
    tx = aj.skip_nonfinite(aj.adam(0.1), max_consecutive=2, check=True)
    step = jax.jit(checkify.checkify(tx.update, errors=checkify.user_checks))
    state = tx.init({"x": jnp.ones(2)})
    error, (_, state) = step({"x": jnp.full(2, jnp.nan)}, state)
    error.throw()
    error, _ = step({"x": jnp.full(2, jnp.nan)}, state)
    with pytest.raises(
        checkify.JaxRuntimeError, match="skip_nonfinite has skipped 2 steps in a row"
    ):
        error.throw()


def test_counters_saturate():
    tx = aj.skip_nonfinite(aj.adam(0.1))
    top = jnp.int32(2**31 - 1)
    state = tx.init({"x": jnp.ones(2)})._replace(skipped=top, consecutive=top)
    _, after = tx.update({"x": jnp.full(2, jnp.nan)}, state)
    assert (after.skipped, after.consecutive) == (top, top)


LEAVES, SHAPE = 8, (64, 1024)


@functools.cache
def temporary(tx):
    """Temporary bytes of the compiled, donated step, for each parameter."""

    def step(params, state, gradients):
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    params = [jax.ShapeDtypeStruct(SHAPE, jnp.float32)] * LEAVES
    compiled = (
        jax.jit(step, donate_argnums=(0, 1))
        .lower(params, jax.eval_shape(tx.init, params), params)
        .compile()
    )
    return compiled.memory_analysis().temp_size_in_bytes / (LEAVES * np.prod(SHAPE))


@pytest.mark.parametrize(
    ("storage", "guard"), [*((storage, "nonfinite") for storage in STORAGES), ("float32", "spikes")]
)
def test_no_second_copy_of_the_state(storage, guard):
    """No more than the step that is not guarded and two leaves' gradients, which are one byte for
    each parameter.

    The state has eight bytes or two for each.
    """
    summed = jax.jit(lambda x: jnp.sum(2 * x)).lower(jnp.ones(SHAPE)).compile()
    if summed.memory_analysis().temp_size_in_bytes > 4 * 64 * 1024 - 1:
        pytest.skip("this version of XLA makes an array of all that it sums on a CPU")
    adam = aj.adam(1e-3, storage=storage)
    assert temporary(GUARDS[guard](adam)) <= temporary(adam) + 2 * 4 / LEAVES + 0.01


def test_guards_are_values():
    for make in (aj.skip_nonfinite, aj.skip_spikes):
        tx = make(aj.adam(1e-3), max_consecutive=5)
        assert tx == make(aj.adam(1e-3), max_consecutive=5) != make(aj.adam(1e-3))
        assert hash(tx) == hash(pickle.loads(pickle.dumps(tx)))
        assert eval(repr(tx), vars(aj)) == tx
        assert tx.interface == aj.adam(1e-3).interface._replace(skips=True)
        assert (
            aj.state_bytes(make(aj.adam(1e-3)), jnp.ones(5000)).wide
            == aj.state_bytes(aj.adam(1e-3), jnp.ones(5000)).wide
        )


def test_the_order_of_links_is_checked_through_a_guard():
    rounds = aj.chain(aj.adam(1e-3), aj.round_stochastically())
    with pytest.raises(ValueError, match="comes after"):
        aj.chain(aj.skip_nonfinite(rounds), aj.stages.cautious())
    with pytest.raises(ValueError, match="turning descent into ascent"):
        aj.chain(aj.skip_nonfinite(aj.adam(1e-3)), aj.scale_by_learning_rate(0.1))
    hidden = aj.chain(aj.skip_nonfinite(optax.chain(rounds)), optax.scale(1.0))
    with pytest.raises(ValueError, match="holds a link that rounds"):
        hidden.init({"x": jnp.ones(2, jnp.bfloat16)})


REFUSED = {
    "a function": (lambda make: make(aj.adam), TypeError, "did you mean to call it?"),
    "no optimizer": (
        lambda make: make(None),
        TypeError,
        "found None; expected a gradient transformation, such as adam",
    ),
    "moments": (
        lambda make: make(aj.track_moments()),
        ValueError,
        "takes or gives Moments; expected a whole optimizer",
    ),
    "none in a row": (
        lambda make: make(aj.adam(0.1), max_consecutive=0),
        ValueError,
        "max_consecutive: found 0; expected 1 or more",
    ),
    "half in a row": (
        lambda make: make(aj.adam(0.1), max_consecutive=2.5),
        TypeError,
        "found 2.5; expected an integer",
    ),
}


@pytest.mark.parametrize("make", [aj.skip_nonfinite, aj.skip_spikes])
@pytest.mark.parametrize("case", REFUSED)
def test_refused(case, make):
    call, error, message = REFUSED[case]
    with pytest.raises(error) as caught:
        call(make)
    assert message in str(caught.value)
    assert make.__name__ in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"deviations": 0.0}, "deviations: found 0.0; expected a number in (0, inf)"),
        ({"deviations": np.nan}, "deviations: found nan"),
        ({"least_ratio": 0.5}, "least_ratio: found 0.5; expected a number in [1, inf)"),
        ({"window": 1}, "window: found 1; expected 2 or more"),
        ({"window": 16, "warmup": 17}, "found warmup=17 with window=16"),
    ],
)
def test_spikes_refused(arguments, message):
    with pytest.raises(ValueError, match="skip_spikes") as caught:
        aj.skip_spikes(aj.adam(0.1), **arguments)
    assert message in str(caught.value)


# Spikes


@functools.partial(jax.jit, static_argnums=0)
def course(tx, norms):
    def step(state, norm):
        # Two leaves of which no element has the norm, so that it has to be put together from all.
        updates, state = tx.update(
            {"a": jnp.full((4,), 0.6 * norm / 2), "b": jnp.full((1,), 0.8 * norm)}, state
        )
        return state, updates["b"][0] == 0

    return jax.lax.scan(step, tx.init({"a": jnp.zeros(4), "b": jnp.zeros(1)}), norms)


def judged(norms, **arguments):
    """Which of a course of gradient norms are skipped; one program for courses of up
    to 600 norms.
    """
    tx = aj.skip_spikes(optax.identity(), **arguments)
    state, skipped = course(
        tx, np.pad(np.asarray(norms, np.float32), (0, 600 - len(norms)), constant_values=1.0)
    )
    assert int(state.skipped) == skipped.sum()
    return np.asarray(skipped)[: len(norms)]


def far(norms, deviations, least_ratio, window, warmup):
    """The rule, as its docstring has it, in NumPy and in double precision."""
    seen, skipped = [], []
    for norm in norms:
        logs = np.log(seen[-window:]) if seen else np.zeros(1)
        center = np.sort(logs)[(len(logs) - 1) // 2]
        spread = 1.4826 * np.sort(abs(logs - center))[(len(logs) - 1) // 2]
        limit = center + max(deviations * spread, np.log(least_ratio))
        is_far = len(seen) >= warmup and np.log(norm) > limit if np.isfinite(norm) else True
        skipped.append(is_far)
        seen += [norm] if np.isfinite(norm) else []
    return np.array(skipped)


@pytest.mark.parametrize("arguments", [(6.0, 2.0, 128, 32), (3.0, 1.0, 16, 1), (4.0, 1.5, 9, 9)])
def test_the_rule_is_the_one_in_the_docstring(arguments):
    random = np.random.default_rng(1)
    norms = np.exp(random.normal(0, 0.3, 600) - np.linspace(0, 4, 600))
    norms[random.integers(0, 600, 30)] *= np.exp(random.normal(0, 3, 30))
    norms[random.integers(0, 600, 5)] = np.inf
    found = judged(
        norms,
        **dict(zip(("deviations", "least_ratio", "window", "warmup"), arguments, strict=True)),
    )
    expected = far(norms.astype(np.float32).astype(float), *arguments)
    np.testing.assert_array_equal(found, expected)
    assert 5 < expected.sum() < 300


def test_a_narrow_distribution_allows_twice_its_median():
    assert not judged([1.0] * 40 + [1.99] * 40).any()
    assert judged([1.0] * 40 + [2.1]).sum() == 1


def test_smaller_norms_are_never_far_and_a_new_level_is_taken_after_half_a_window():
    assert not judged(np.concatenate([np.ones(40), np.full(40, 1e-6), np.full(40, 1e-18)])).any()
    skipped = judged(np.concatenate([np.ones(128), np.full(200, 100.0)]))
    assert skipped[128:192].all()
    assert not skipped[193:].any()


def test_spikes_that_are_a_part_of_the_data_are_too_many():
    """E9: every twentieth batch has five times the norm of the others, and none was ever learned
    from, without a word. One in a hundred is a spike.
    """
    norms = np.exp(np.random.default_rng(0).normal(0, 0.05, 600)).astype(np.float32)
    rare, regular = norms.copy(), norms.copy()
    rare[::100] *= 5
    regular[::20] *= 5
    states = [course(aj.skip_spikes(optax.identity()), x)[0] for x in (rare, regular)]
    assert [bool(state.too_many) for state in states] == [False, True]
    aj.expect_progress(states[0])
    with refused(RuntimeError, "too many steps were skipped", "SkipSpikes at the top"):
        aj.expect_progress(states[1])


def test_a_ring_that_was_filled_many_times_stays_a_ring():
    tx = aj.skip_spikes(optax.identity(), window=4, warmup=2)
    norms = 1 + jnp.arange(23.0)[:, None] / 100
    state = jax.lax.scan(
        lambda state, norm: (tx.update(norm, state)[1], None), tx.init(jnp.zeros(1)), norms
    )[0]
    np.testing.assert_allclose(np.sort(state.norms), [1.19, 1.2, 1.21, 1.22], rtol=1e-6)
    assert 4 <= state.seen < 8


# A real training run, of which one step in a hundred is poison

STEPS, BATCH, SEEDS = 1000, 32, 5

POISON = {
    "nothing": lambda row, tree: tree,
    "NaN": lambda row, tree: tree | {"w1": tree["w1"].at[row, 3].set(jnp.nan)},
    "infinity": lambda row, tree: jax.tree.map(lambda x: x / 0.0, tree),
    "spike": lambda row, tree: jax.tree.map(lambda x: x * 1e4, tree),
}
RUNS = {
    "plain": (optax.adam(2e-3), ["nothing", "NaN", "infinity"]),
    "skip_nonfinite": (aj.skip_nonfinite(aj.adam(2e-3)), ["NaN", "infinity"]),
    "skip_spikes": (aj.skip_spikes(aj.adam(2e-3)), ["NaN", "spike"]),
}


@functools.cache
def losses(optimizer):
    """By poison the training losses of a small network and the skipped steps, by seed; and the
    poisoned steps, by seed.
    """
    (tx, poisons), random = RUNS[optimizer], np.random.default_rng(0)
    images, labels = load_digits(return_X_y=True)
    images, labels = jnp.asarray(images / 16, jnp.float32), jnp.asarray(labels, jnp.int32)
    start = {
        "w1": random.normal(size=(SEEDS, 64, 32)) / 8,
        "w2": random.normal(size=(SEEDS, 32, 10)) / 6,
    }
    start |= {"b1": np.zeros((SEEDS, 32)), "b2": np.zeros((SEEDS, 10))}
    batches = random.integers(0, len(images), (SEEDS, STEPS, BATCH))
    sick = random.random((SEEDS, STEPS)) < 0.01  # one step in a hundred
    sick[:, :32] = False  # before so many norms no spike is told from a norm
    rows = random.integers(0, 64, (SEEDS, STEPS))

    def loss(params, x, y):
        hidden = jax.nn.relu(x @ params["w1"] + params["b1"])
        return optax.softmax_cross_entropy_with_integer_labels(
            hidden @ params["w2"] + params["b2"], y
        ).mean()

    def train(kind, params, *course):
        def step(carry, each):
            params, state = carry
            chosen, sick, row = each
            gradients = jax.grad(loss)(params, images[chosen], labels[chosen])
            poison = jax.lax.switch(kind, POISON.values(), row, gradients)
            gradients = jax.tree.map(
                lambda bad, good: jnp.where(sick, bad, good), poison, gradients
            )
            updates, state = tx.update(gradients, state, params)
            return (optax.apply_updates(params, updates), state), None

        (params, state), _ = jax.lax.scan(step, (params, tx.init(params)), course)
        return loss(params, images, labels), state

    kinds = np.array([list(POISON).index(kind) for kind in poisons], np.int32)
    each = jax.jit(jax.vmap(jax.vmap(train, (None, 0, 0, 0, 0)), (0, None, None, None, None)))
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        found, state = each(
            kinds,
            jax.tree.map(jnp.float32, start),
            batches.astype(np.int32),
            sick,
            rows.astype(np.int32),
        )
    parts = jax.tree.map(
        lambda x: dict(zip(poisons, np.asarray(x), strict=True)),
        (found, getattr(state, "skipped", found)),
    )
    return *parts, sick.sum(1)


@pytest.mark.parametrize(
    ("guard", "poison"),
    [
        ("skip_nonfinite", "NaN"),
        ("skip_nonfinite", "infinity"),
        ("skip_spikes", "NaN"),
        ("skip_spikes", "spike"),
    ],
)
def test_a_poisoned_run_ends_where_a_clean_one_does(guard, poison):
    """Within the noise of the seeds: the means differ by less than the standard deviation."""
    clean = losses("plain")[0]["nothing"]
    found, skipped, sick = losses(guard)
    assert abs(found[poison].mean() - clean.mean()) <= clean.std(ddof=1)
    assert (sick > 5).all()
    if guard == "skip_nonfinite":
        np.testing.assert_array_equal(skipped[poison], sick)
    # A real run has norms of its own that are far, of all steps less than one in a hundred.
    np.testing.assert_array_less(sick - 2, skipped[poison])
    np.testing.assert_array_less(skipped[poison], sick + STEPS // 100)


@pytest.mark.parametrize("poison", ["NaN", "infinity"])
def test_the_same_poison_is_the_end_of_plain_adam(poison):
    assert np.isnan(losses("plain")[0][poison]).all()


# What attacks have found


def test_gradients_of_zero_say_nothing_of_a_level():
    """A masked loss, a frozen phase: the first real gradient is no spike."""
    norms = np.concatenate([np.zeros(40), np.ones(41)])
    tx = aj.skip_spikes(aj.adam(0.1))
    _, state = run(tx, {"x": jnp.ones(1)}, [{"x": jnp.full(1, norm)} for norm in norms])
    assert (state.skipped, state.seen) == (0, 41)


def test_a_window_smaller_than_the_usual_warmup():
    assert judged([1.0] * 16 + [100.0], window=16).sum() == 1


def test_traced_limits():
    @jax.jit
    def skipped(ratio):
        tx = aj.skip_spikes(
            optax.identity(), least_ratio=ratio, deviations=ratio, window=4, warmup=2
        )
        state = tx.init(jnp.zeros(1))
        for norm in (1.0, 1.0, 1.0, 3.0):
            _, state = tx.update(jnp.full(1, norm), state)
        return state.skipped

    assert (skipped(2.0), skipped(4.0)) == (1, 0)


@pytest.mark.usefixtures("standard_promotion")
def test_the_guard_goes_around_what_accumulates():
    """Inside, Optax's accumulator would keep the NaN: it is cleared by a factor of 0."""
    tx = aj.skip_nonfinite(optax.MultiSteps(aj.adam(0.1), 2).gradient_transformation())
    good, sick = {"x": jnp.ones(3)}, {"x": jnp.full(3, jnp.nan)}
    params, _ = run(tx, {"x": jnp.ones(3)}, [good, sick, good, sick, good, good])
    expected, _ = run(tx, {"x": jnp.ones(3)}, [good] * 4)
    same(params, expected)
    with pytest.raises(TypeError, match=r"gradient_transformation\(\)"):
        aj.skip_nonfinite(optax.MultiSteps(aj.adam(0.1), 2))


def test_progress_of_mapped_states_of_flax_and_of_none():
    tx = aj.skip_nonfinite(aj.adam(0.1), max_consecutive=2)
    params = jnp.ones((3, 2))
    state = jax.jit(jax.vmap(tx.init))(params)
    aj.expect_progress(state)
    update = jax.jit(jax.vmap(tx.update))
    for _ in range(2):
        _, state = update(params.at[1].set(jnp.nan), state)
    with pytest.raises(RuntimeError, match=r"\[0 2 0\] steps skipped in all"):
        aj.expect_progress(state)
    model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    aj.expect_progress(nnx.Optimizer(model, tx, wrt=nnx.Param).opt_state)
    with pytest.raises(ValueError, match="found no guard"):
        aj.expect_progress(aj.adam(0.1).init(params))


def test_states_of_others_are_refused():
    params = {"x": jnp.ones(3)}
    guarded = aj.skip_nonfinite(aj.adam(0.1))
    for state, says in [
        (aj.adam(0.1).init(params), "got the state of"),
        (aj.skip_spikes(aj.adam(0.1)).init(params), "found a state"),
    ]:
        with pytest.raises(ValueError, match=f"skip_nonfinite: .*{says}.*convert_state"):
            guarded.update(params, state, params)
    with pytest.raises(ValueError, match="skip_spikes: found a state of"):
        aj.skip_spikes(aj.adam(0.1), window=64).update(
            params, aj.skip_spikes(aj.adam(0.1)).init(params), params
        )


def test_schedules_and_strings_are_refused():
    with pytest.raises(TypeError, match="deviations: found the schedule"):
        aj.skip_spikes(aj.adam(0.1), deviations=lambda count: 6.0)
    with pytest.raises(ValueError, match="check: found 'no'"):
        aj.skip_nonfinite(aj.adam(0.1), check="no")
