"""The links that round the new parameter: what `params + update` then is, and what it never loses.

The oracle is NumPy's float32, which knows the two numbers of a dtype that enclose a sum, and the
float32 run itself. XLA's CPU takes subnormal numbers for zero, and so does the oracle where this
backend does."""

import functools
import itertools
import warnings

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from helpers import QUICKLY, refused
from jax import lax

import adam_jax as aj

LINKS = {"stochastic": aj.round_stochastically(3), "compensate": aj.compensate()}
LOW = {"bfloat16": jnp.bfloat16, "float16": jnp.float16}
RATE = (
    0.125  # a power of two: with it a product is exact, and however it is fused makes no difference
)
TINY = np.float32(2.0**-126)


@pytest.fixture(params=LINKS)
def link(request):
    return LINKS[request.param]


def f32(x):
    return np.asarray(x).astype(np.float32)


def bits(x):
    return np.asarray(x).view(f"u{np.asarray(x).dtype.itemsize}")


# The oracle


@functools.cache
def flushes():
    """Whether this backend takes subnormal float32 numbers for zero."""
    return bool(jax.jit(lambda x: x + x)(jnp.float32(2.0**-127)) == 0)


def flushed(x):
    return np.where(np.abs(x) < TINY, np.copysign(np.float32(0), x), x) if flushes() else x


def add(x, y):
    with np.errstate(over="ignore", invalid="ignore"):
        return flushed(flushed(x) + flushed(y))


@functools.cache
def finite(dtype):
    """Every finite number of a 16-bit dtype, in order."""
    every = np.arange(2**16, dtype=np.uint16).view(dtype).astype(np.float32)
    return np.unique(every[np.isfinite(every)])


def enclosing(x, dtype):
    """The two numbers of a dtype around finite x, or x twice; the largest where x is larger."""
    numbers = finite(dtype)
    below = np.maximum(np.searchsorted(numbers, x, "right") - 1, 0)
    above = np.minimum(np.searchsorted(numbers, x, "left"), len(numbers) - 1)
    return numbers[below], numbers[above]


def nearest(x, dtype):
    """The nearer of the two, half way the one that is larger in size."""
    below, above = enclosing(x, dtype)
    middle = (below.astype(float) + above) / 2
    return np.where(np.where(x > 0, x >= middle, x > middle), above, below)


def recombined(params, lost):
    """The float32 that a parameter and its lost bits are."""
    return (bits(f32(params)) + np.asarray(lost).astype(np.int32).view(np.uint32)).view(np.float32)


def apply_eagerly(tx, params, state, updates):
    """One step, as Optax's users write it."""
    updates, state = tx.update(updates, state, params)
    with jax.numpy_dtype_promotion("standard"):
        return optax.apply_updates(params, updates), state


apply = jax.jit(apply_eagerly, static_argnums=0)


# The sum that the caller forms


def some_numbers(dtype):
    """Every exponent with both signs, and mantissas at both ends and between: zeros, subnormals and
    the largest among them.
    """
    digits = int(jnp.finfo(dtype).nmant)
    mantissas = np.unique([0, 1, (1 << digits) - 1] + ([3, 0x155] if digits > 8 else []))
    exponents = np.arange(2 ** (15 - digits) - 1)
    positive = ((exponents[:, None] << digits) + mantissas).ravel()
    return np.concatenate([positive, positive | 0x8000]).astype(np.uint16).view(dtype)


@functools.cache
def pairs(dtype):
    """From each of them to each of them: parameters, targets, updates, and the sum in float32."""
    numbers = some_numbers(dtype)
    params, targets = (
        np.ascontiguousarray(x) for x in np.meshgrid(numbers, numbers, indexing="ij")
    )
    with np.errstate(over="ignore"):
        updates = (targets.astype(float) - params.astype(float)).astype(np.float32)
    return params, f32(targets), updates, add(f32(params), updates)


@functools.cache
def rounded_pairs(dtype, name):
    """What their finite sums may become."""
    new = pairs(dtype)[-1]
    new = new[np.isfinite(new)]
    return enclosing(new, dtype) if name == "stochastic" else (nearest(new, dtype),) * 2


@pytest.mark.parametrize("how", ["eager", "jit"])
@pytest.mark.parametrize("name", LINKS)
@pytest.mark.parametrize("dtype", LOW.values(), ids=LOW)
def test_the_sum_is_the_rounded_number_for_all_pairs_of_exponents(dtype, name, how):
    params, targets, updates, new = pairs(dtype)
    tx = LINKS[name]

    def step(
        params, minus
    ):  # the update is made in the same computation, where XLA may simplify what comes of it
        return apply_eagerly(tx, params, tx.init(params), -minus)[0]

    found = (jax.jit(step) if how == "jit" else step)(jnp.asarray(params), jnp.asarray(-updates))
    assert found.dtype == dtype
    found, old, ok = f32(found), flushed(f32(params)), np.isfinite(new)

    assert (
        found[~ok] == new[~ok]
    ).all()  # the update is not finite either: the two were too far apart
    found, old, targets, new = found[ok], old[ok], targets[ok], new[ok]
    candidates = rounded_pairs(dtype, name)
    # A difference that is subnormal is lost where those are zero: with any other optimizer, too.
    vanishing = np.any([(np.abs(r - old) < TINY) & (r != old) & flushes() for r in candidates], 0)
    exact = (found == candidates[0]) | (found == candidates[1])
    assert exact[~vanishing].all()
    assert (exact | (found == old)).all()
    assert vanishing.mean() < 1e-3

    there = (new == targets) & ~vanishing
    assert (found == targets)[there].all()
    assert there.mean() > 0.5
    assert (np.abs(targets[there]) < 2.0**-16 * np.abs(old[there])).any() or dtype == jnp.float16
    assert (np.abs(old[there]) < 2.0**-16 * np.abs(targets[there])).any()


def test_a_number_is_rounded_to_either_neighbour_and_past_the_largest_to_it():
    """Sums that are in no way special, but for the last, which no bfloat16 reaches."""
    draw = np.random.default_rng(0)
    old = jnp.asarray(
        draw.standard_normal(20_000) * 2.0 ** draw.integers(-40, 40, 20_000), jnp.bfloat16
    )
    update = (
        f32(old) * draw.standard_normal(20_000) * 2.0 ** draw.integers(-12, 4, 20_000)
    ).astype(np.float32)
    old, update = (
        old.at[:4].set(jnp.asarray([3e38, -3e38, 3.3e38, -3.3e38], old.dtype)),
        update.copy(),
    )
    update[:4] = np.float32([3.95e37, -3.95e37, 1e37, -1e37])
    new = f32(old) + update
    below, above = enclosing(new, jnp.bfloat16)
    stochastic, near = (
        f32(apply(tx, old, tx.init(old), jnp.asarray(update))[0]) for tx in LINKS.values()
    )
    assert ((stochastic == below) | (stochastic == above)).all()
    np.testing.assert_array_equal(near, nearest(new, jnp.bfloat16))
    assert 0.4 < np.mean((stochastic == above)[below < above]) < 0.6
    np.testing.assert_array_equal(np.abs(stochastic[:4]), finite(jnp.bfloat16)[-1])


def test_where_a_compensated_parameter_falls_to_next_to_nothing_the_sum_is_off_by_next_to_nothing():
    """Its lost bits reach to 2⁻²⁴ of it, and so may what is left; a difference that is larger than
    it does not.
    """
    draw = np.random.default_rng(0)
    old = jnp.asarray(
        draw.choice([-1, 1], 4096) * (1 + draw.integers(0, 128, 4096) / 128), jnp.bfloat16
    )
    lost = jnp.asarray(draw.integers(-(2**15), 2**15, 4096), jnp.int16)
    before = recombined(old, lost)
    left = (draw.integers(-600, 600, 4096) * 2.0**-24).astype(np.float32)
    update = left - before
    new = before + update
    tx = LINKS["compensate"]
    found, _ = apply(tx, old, tx.init(old)._replace(lost=lost), jnp.asarray(update))
    assert (
        np.abs(f32(found).astype(float) - nearest(new, jnp.bfloat16)) <= 2.0**-24 * np.abs(f32(old))
    ).all()
    assert (np.abs(new) < 2.0**-16).mean() > 0.3


def test_a_finite_sum_stays_finite_where_the_difference_overflows(link):
    old = jnp.full(16, 3e38, jnp.bfloat16)
    found, _ = apply(link, old, link.init(old), jnp.full(16, -3.4028e38, jnp.float32))
    assert np.isfinite(f32(found)).all()


# Without bias


@pytest.mark.parametrize("dtype", LOW.values(), ids=LOW)
def test_the_mean_over_many_draws_is_the_sum(dtype):
    """10⁵ draws a number, over positions and steps: up as often as a fair coin of that weight,
    within 4 standard errors.
    """
    olds = np.array(
        [1.0, -1.0, 0.75, -3.0, 0.0, 0.0, 1e4, *[2.0**-20, -(2.0**-16)] * (dtype == jnp.float16)]
    )
    moves = np.array(
        [1e-3, 1e-3, -1e-5, 1e-2, 1e-6, -3e-5, 1.0, *[1.3e-8, 0.7e-8] * (dtype == jnp.float16)]
    )
    tx = LINKS["stochastic"]
    old = jnp.asarray(np.repeat(olds[:, None], 2500, 1), dtype)
    update = jnp.asarray(np.repeat(moves[:, None], 2500, 1), jnp.float32)

    def step(state, _):
        new, state = apply(tx, old, state, update)
        return state, new

    drawn = f32(jax.jit(lambda: lax.scan(step, tx.init(old), None, length=40)[1])())
    new = f32(old[:, 0]) + f32(update[:, 0])
    below, above = (x.astype(float) for x in enclosing(new, dtype))
    assert (above > below).all()
    assert ((drawn == above[:, None]) | (drawn == below[:, None])).all()
    share = (new - below) / (above - below)
    ups = (drawn == above[:, None]).mean((0, 2))
    error = np.sqrt(share * (1 - share) / 100_000)
    assert (np.abs(ups - share) <= 4 * error).all(), (ups, share, error)


def test_the_draws_depend_on_seed_step_leaf_and_position_and_on_nothing_else():
    shape = (300, 100)
    params = {
        "a": jnp.ones(shape, jnp.bfloat16),
        "wide": jnp.ones(shape),
        "b": jnp.ones(shape, jnp.bfloat16),
    }
    updates = jax.tree.map(
        lambda p: jnp.full(p.shape, 2.0**-8, jnp.float32), params
    )  # an even coin

    def ups(seed, step, leaf="a"):
        tx = aj.round_stochastically(seed)
        state = tx.init(params)._replace(step=jnp.int32(step))
        return f32(jax.jit(tx.update)(updates, state, params)[0][leaf]) > 0

    coin = ups(0, 0)
    np.testing.assert_array_equal(coin, ups(0, 0))
    np.testing.assert_array_equal(coin, ups(np.int64(0), 0))
    others = [ups(1, 0), ups(2**32 - 1, 0), ups(0, 1), ups(0, 2**31 - 1), ups(0, 0, "b")]
    others += [
        np.roll(coin, 1, 0),
        np.roll(coin, 1, 1),
        np.roll(coin, 64, 1),
        coin[::-1],
        ups(1, 1),
    ]
    for other in others:
        assert abs(np.mean(coin == other) - 0.5) < 4 * 0.5 / np.sqrt(coin.size)
    for axis in (0, 1):  # no row and no column is one-sided
        means = coin.mean(axis)
        assert (np.abs(means - 0.5) < 5 * 0.5 / np.sqrt(shape[axis])).all()


# Shapes and seeds


@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 0), (2, 1, 3)], ids=str)
def test_every_shape(link, shape):
    old = jnp.ones(shape, jnp.bfloat16)
    found, _ = apply(link, old, link.init(old), jnp.full(shape, 0.5))
    np.testing.assert_array_equal(f32(found), np.full(shape, 1.5, np.float32))


# Nothing lost


def compensated_run(dtype, params, updates):
    """Parameters and lost bits after every step, and the float32 run."""
    tx = LINKS["compensate"]

    def low(carry, update):
        carry = apply(tx, *carry, update)
        return carry, carry

    def high(carry, update):
        return carry + update, carry + update

    params = jnp.asarray(params, dtype)
    _, (found, state) = jax.jit(lambda u: lax.scan(low, (params, tx.init(params)), u))(updates)
    _, expected = jax.jit(lambda u: lax.scan(high, params.astype(jnp.float32), u))(updates)
    return found, state.lost, f32(expected)


@pytest.mark.parametrize("dtype", LOW.values(), ids=LOW)
def test_parameters_with_their_lost_bits_are_the_float32_run(dtype):
    """Bit for bit over 400 steps, of all sizes for bfloat16; for float16 of those that it holds as
    normal numbers.
    """
    draw = np.random.default_rng(0)
    if dtype == jnp.bfloat16:
        params = draw.standard_normal(1024) * 2.0 ** draw.integers(-40, 40, 1024)
        updates = (
            draw.standard_normal((400, 1024))
            * np.abs(params)
            * 2.0 ** draw.integers(-26, 1, (400, 1024))
        )
    else:
        params = draw.choice([-1, 1], 1024) * 2.0 ** draw.uniform(-6, 12, 1024)
        updates = (
            draw.standard_normal((400, 1024))
            * np.abs(params)
            * 2.0 ** draw.integers(-26, -8, (400, 1024))
        )
    updates = updates.astype(np.float32)
    found, lost, expected = compensated_run(dtype, params, updates)
    assert lost.dtype == jnp.int16
    assert lost.shape == expected.shape
    np.testing.assert_array_equal(bits(recombined(found, lost)), bits(expected))
    np.testing.assert_array_equal(f32(found), nearest(expected, dtype))
    assert (f32(found) != expected).mean() > 0.99
    assert (np.diff(np.sign(expected), axis=0) != 0).any() == (dtype == jnp.bfloat16)


@pytest.mark.parametrize("dtype", LOW.values(), ids=LOW)
def test_the_lost_bits_never_make_it_worse(dtype):
    """Where there are too many of them they saturate: subnormal float16 numbers, and beyond the
    largest number.
    """
    draw = np.random.default_rng(0)
    update = draw.standard_normal(4096) * 2.0 ** draw.integers(-30, -14, 4096)
    top = float(jnp.finfo(dtype).max)
    update[:64] = np.linspace(0.999, 1.0019 if dtype == jnp.bfloat16 else 1.5, 64) * top
    update[64:128] = -update[:64]
    update = update.astype(np.float32)
    found, lost, expected = compensated_run(dtype, np.zeros(4096), update[None])
    alone, together = np.abs(f32(found) - expected), np.abs(recombined(found, lost) - expected)
    assert (together <= alone).all()
    assert (together < alone).mean() > 0.5
    if dtype == jnp.bfloat16:
        assert (together[:, 128:] == 0).all()


def test_what_is_lost_is_kept_only_for_narrow_leaves():
    params = {
        "low": jnp.ones((3, 2), jnp.bfloat16),
        "half": jnp.ones(2, jnp.float16),
        "wide": jnp.ones(2),
        "i": jnp.arange(3),
        "z": jnp.ones(2, jnp.complex64),
        "none": None,
    }
    tx = LINKS["compensate"]
    state = tx.init(params)
    for _ in range(2):
        assert jax.tree.map(lambda x: (x.shape, x.dtype.name), state.lost) == {
            "low": ((3, 2), "int16"),
            "half": ((2,), "int16"),
            **dict.fromkeys(["wide", "i", "z", "none"]),
        }
        _, state = jax.jit(tx.update)(params, state, params)
    assert jax.tree.leaves(LINKS["stochastic"].init(params)) == [0]


def test_a_hundred_small_updates():
    """The design's example: each is a quarter of 1.0's last bit downwards, and rounded to nearest
    none of them is seen.
    """
    old = jnp.ones(4096, jnp.bfloat16)
    grads = jnp.ones((100, 4096), jnp.bfloat16)

    def run(*links):
        tx = aj.chain(aj.scale_by_learning_rate(1e-3), *links)
        return jax.jit(
            lambda: lax.scan(
                lambda carry, g: (apply(tx, *carry, g), None), (old, tx.init(old)), grads
            )[0]
        )()

    assert (f32(run()[0]) == 1).all()
    expected = np.float32(1)
    for _ in range(100):
        expected -= np.float32(1e-3)
    compensated, (_, state) = run(LINKS["compensate"])
    np.testing.assert_array_equal(recombined(compensated, state.lost), expected)
    np.testing.assert_array_equal(f32(compensated), nearest(expected, jnp.bfloat16))
    stochastic = f32(run(LINKS["stochastic"])[0])
    # A step's variance is below (last bit)²/4, and there are a hundred.
    assert abs(stochastic.mean() - 0.9) < 4 * np.sqrt(100 / 4 * 2.0**-16 / stochastic.size)
    assert stochastic.std() > 2.0**-8


# Other leaves


def mixed(seed=0):
    draw = np.random.default_rng(seed).standard_normal
    return {
        "low": jnp.asarray(draw((3, 2)), jnp.bfloat16),
        "half": jnp.asarray(draw(3), jnp.float16),
        "f32": jnp.asarray(draw((2, 2)), jnp.float32),
        "f64": jnp.asarray(draw(2), jnp.float64),
        "z": jnp.asarray(draw(2) + 1j * draw(2), jnp.complex64),
        "i": jnp.arange(4, dtype=jnp.int32),
        "masked": optax.MaskedNode(),
        "none": None,
    }


WIDE = ("f32", "f64", "z")


@pytest.mark.parametrize("form", ["alone", "chained"])
def test_other_leaves_pass_bit_for_bit(link, form, x64):
    params, grads = mixed(0), {**mixed(1), "i": np.zeros(4, jax.dtypes.float0)}
    if form == "alone":
        expected, _ = grads, None
        found, _ = link.update(grads, link.init(params), params)
        assert found["i"] is grads["i"]
    else:
        plain, tx = aj.adam(0.1), aj.chain(aj.adam(0.1), link)
        expected, _ = plain.update(grads, plain.init(params), params)
        found, _ = tx.update(grads, tx.init(params), params)
        assert found["i"].dtype == params["i"].dtype
        np.testing.assert_array_equal(found["i"], np.zeros(4))
    assert jax.tree.structure(found) == jax.tree.structure(params)
    for name in WIDE:
        assert found[name].dtype == params[name].dtype
        assert np.asarray(found[name]).tobytes() == np.asarray(expected[name]).tobytes()
    for name in ("low", "half"):
        assert found[name].dtype == jnp.float32
        moved = f32(params[name]) + f32(found[name])
        np.testing.assert_array_equal(moved, moved.astype(params[name].dtype).astype(np.float32))


def test_a_tree_without_narrow_leaves_has_nothing_to_do(link):
    params = {"w": jnp.ones((3, 2)), "b": jnp.ones(2)}
    updates, _ = link.update(params, link.init(params), params)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), updates, params))


# Where a transformation goes


def grads_of(params, steps=6, seed=0):
    """Small ones in bfloat16, as a backward pass gives them: for the plain sum most
    are too small.
    """
    draw = np.random.default_rng(seed)
    return [
        {
            k: jnp.asarray(
                draw.standard_normal(p.shape) * 2.0 ** draw.integers(-8, 0, p.shape), p.dtype
            )
            for k, p in params.items()
        }
        for _ in range(steps)
    ]


def large_grads_of(params, steps):
    """With these parameters move by more than their size, and a difference of two has more bits
    than either.
    """
    return [jax.tree.map(lambda g: (16 * g).astype(g.dtype), g) for g in grads_of(params, steps)]


def small_params():
    draw = np.random.default_rng(5)
    return {
        "w": jnp.asarray(draw.standard_normal((8, 6)), jnp.bfloat16),
        "b": jnp.asarray(draw.standard_normal(4), jnp.float32),
    }


def check_path(link, path, grads, name="w"):
    """Whether parameters went where gradients took them:

    `path` begins at the start, and has one more entry than `grads`.
    """
    exact = f32(path[0])
    for before, after, g in zip(path, path[1:], grads, strict=False):
        assert after.dtype == jnp.bfloat16
        if link is LINKS["compensate"]:
            exact = exact - np.float32(RATE) * f32(g)
            np.testing.assert_array_equal(f32(after), nearest(exact, jnp.bfloat16), err_msg=name)
        else:
            below, above = enclosing(f32(before) - np.float32(RATE) * f32(g), jnp.bfloat16)
            assert ((f32(after) == below) | (f32(after) == above)).all()
    if link is LINKS["compensate"]:
        assert (f32(path[-1]) != exact).mean() > 0.5
    assert len(path) == len(grads) + 1
    assert any((f32(a) != f32(b)).any() for a, b in itertools.pairwise(path))


def descent(link, rate=RATE):
    return aj.chain(aj.scale_by_learning_rate(rate), link)


def wrapped(link):
    """name -> transformation, the label says how the leaves and steps are to be read."""
    mask = {"w": True, "b": False}
    return {
        "chain": descent(link),
        "nested": aj.chain(
            optax.identity(), aj.chain(aj.chain(aj.scale_by_learning_rate(RATE)), aj.chain(link))
        ),
        "optax.chain": optax.chain(optax.identity(), descent(link)),
        "optax.chain of stages": optax.chain(optax.scale(-RATE), link),
        "behind optax": aj.chain(optax.scale(-RATE), link),
        "masked": optax.masked(descent(link), mask),
        "masked link": optax.chain(optax.scale(-RATE), optax.masked(link, mask)),
        "partition": optax.partition({0: descent(link), 1: optax.sgd(0.1)}, {"w": 0, "b": 1}),
        "inject_hyperparams": optax.inject_hyperparams(
            lambda learning_rate: descent(link, learning_rate)
        )(RATE),
        "MultiSteps": optax.MultiSteps(descent(link), 2).gradient_transformation(),
        "averaged": aj.chain(descent(link), aj.stages.average_parameters(0.9)),
        "apply_if_finite inside": optax.chain(optax.apply_if_finite(optax.scale(-RATE), 3), link),
    }


def walk(tx, params, grads):
    path, state = [params], jax.jit(tx.init)(params)
    for g in grads:
        params, state = apply(tx, params, state, g)
        path.append(params)
    return path, state


@pytest.mark.parametrize("how", wrapped(LINKS["compensate"]))
def test_under_wrappers(link, how, standard_promotion):
    params = small_params()
    grads = grads_of(params, 8)
    if how == "MultiSteps":  # both of two steps see the same, whose mean it is
        grads = [g for g in grads[:4] for _ in range(2)]
    path, _ = walk(wrapped(link)[how], params, grads)
    path = [p["w"] for p in path]
    if how == "MultiSteps":
        assert all((f32(a) == f32(b)).all() for a, b in zip(path[::2], path[1::2], strict=False))
        path, grads = path[::2], grads[::2]
    check_path(link, path, [g["w"] for g in grads])


def test_a_step_skipped_inside_leaves_the_parameter_where_it_was(link, standard_promotion):
    """Optax's own `apply_if_finite` wants updates of the gradients' dtype back, so it stands before
    a link, not around it.
    """
    params = small_params()
    tx = wrapped(link)["apply_if_finite inside"]
    grads = grads_of(params, 2)
    path, _ = walk(tx, params, [grads[0], jax.tree.map(lambda g: g.at[0].set(jnp.nan), grads[1])])
    np.testing.assert_array_equal(f32(path[1]["w"]), f32(path[2]["w"]))


def test_around_a_link_apply_if_finite_needs_wide_gradients(link, standard_promotion):
    params = small_params()
    grads = [jax.tree.map(lambda g: g.astype(jnp.float32), g) for g in grads_of(params, 4)]
    path, _ = walk(optax.apply_if_finite(descent(link), 3), params, grads)
    check_path(link, [p["w"] for p in path], [g["w"] for g in grads])


def test_the_seed_is_a_hyperparameter_to_inject(standard_promotion):
    old, step = jnp.ones(512, jnp.bfloat16), jnp.full(512, 1e-3)
    tx = optax.inject_hyperparams(aj.round_stochastically)(seed=7)
    found = tx.update(step, tx.init(old), old)[0]
    np.testing.assert_array_equal(
        found, aj.round_stochastically(7).update(step, aj.round_stochastically().init(old), old)[0]
    )


def test_a_derivative_through_rounded_parameters_is_refused(link, standard_promotion):
    def end(rate, dtype):
        params = {"w": jnp.ones(4, dtype)}
        tx = aj.chain(aj.scale_by_learning_rate(rate), link)
        updates, _ = tx.update(params, tx.init(params), params)
        return aj.apply_updates(params, updates)["w"].astype(jnp.float32).sum()

    name = link.init.spec.constructor.__name__
    says = f"{name}: found a derivative", "rounding has no derivative", f"leave out {name}()"
    for way in (jax.grad, jax.jacfwd, lambda f, **of: jax.grad(jax.jit(f, static_argnums=1), **of)):
        with refused(ValueError, *says):
            jax.eval_shape(lambda rate, way=way: way(end, argnums=0)(rate, jnp.bfloat16), 0.5)
    assert jax.grad(end)(0.5, jnp.float32) == -4  # these are not rounded


@pytest.mark.parametrize(
    "wrap",
    [lambda link: optax.masked(link, {"w": True, "b": False}), optax.chain],
    ids=["masked", "optax.chain"],
)
def test_a_chain_refuses_what_it_cannot_see(link, wrap):
    tx = aj.chain(aj.scale_by_learning_rate(RATE), wrap(link))
    with pytest.raises(
        ValueError, match="at position 1 holds a link that rounds parameters.*optax.chain"
    ):
        tx.init(small_params())


def test_scan_donation_and_vmap_are_the_loop(link, standard_promotion):
    params, tx = small_params(), descent(link)
    grads = grads_of(params)
    path, state = walk(tx, params, grads)
    expected = jax.tree.leaves((path[-1], state))

    stacked = jax.tree.map(lambda *g: jnp.stack(g), *grads)
    loop = jax.jit(
        lambda p, s, g: lax.scan(lambda c, g: (apply(tx, *c, g), None), (p, s), g, unroll=3)[0]
    )
    step = jax.jit(functools.partial(apply_eagerly, tx), donate_argnums=(0, 1))
    donated = jax.tree.map(jnp.copy, (params, tx.init(params)))
    for g in grads:
        donated = step(*donated, g)
    batch = jax.tree.map(lambda x: jnp.stack([x, x]), (params, tx.init(params)))
    batched = jax.jit(jax.vmap(functools.partial(apply, tx)))
    for g in grads:
        batch = batched(*batch, jax.tree.map(lambda x: jnp.stack([x, x]), g))
    found = {"scan": loop(params, tx.init(params), stacked), "donated": donated}
    found |= {f"vmap {i}": jax.tree.map(lambda x, i=i: x[i], batch) for i in range(2)}
    for name, tree in found.items():
        for a, b in zip(jax.tree.leaves(tree), expected, strict=True):
            np.testing.assert_array_equal(bits(a), bits(b), err_msg=name)


def test_flax_train_state(link, standard_promotion):
    params = small_params()
    state = TrainState.create(apply_fn=None, params=params, tx=descent(link))
    grads, path = grads_of(params, 8), [params["w"]]
    step = jax.jit(lambda state, grads: state.apply_gradients(grads=grads))
    for g in grads:
        state = step(state, g)
        path.append(state.params["w"])
    check_path(link, path, [g["w"] for g in grads])


def test_flax_linen_model_in_bfloat16(link, standard_promotion):
    """With gradients of its own, and a member in front: a model that would stand still learns."""
    model = nn.Dense(4, param_dtype=jnp.bfloat16, dtype=jnp.bfloat16)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((32, 8)), jnp.bfloat16)
    start = model.init(jax.random.key(0), x)

    def run(*links):
        def loss(params):
            return jnp.mean((model.apply(params, x).astype(jnp.float32) - 10) ** 2)

        def step(state, _):
            return state.apply_gradients(grads=jax.grad(loss)(state.params)), None

        state = TrainState.create(
            apply_fn=model.apply, params=start, tx=aj.chain(aj.adam(1e-4), *links)
        )
        return jax.jit(lambda s: lax.scan(step, s, None, length=200)[0].params["params"]["kernel"])(
            state
        )

    kernel = f32(start["params"]["kernel"])
    plain, linked = (np.abs(f32(run(*links)) - kernel).mean() for links in ((), (link,)))
    assert linked > 0.01  # of the 0.02 that 200 steps of 1e-4 can do
    assert linked > 3 * plain


def test_nnx_optimizer(link, standard_promotion):
    model = nnx.Linear(8, 6, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, descent(link), wrt=nnx.Param)
    path, grads = [jnp.copy(model.kernel[...])], []

    @nnx.jit
    def step(model, optimizer, x):
        g = nnx.grad(lambda model: jnp.sum(model(x).astype(jnp.float32) * 2.0**-6))(model)
        optimizer.update(model, g)
        return g.kernel[...]

    for x in np.random.default_rng(0).standard_normal((8, 3, 8)):
        grads.append(step(model, optimizer, jnp.asarray(x, jnp.bfloat16)))
        path.append(jnp.copy(model.kernel[...]))
    check_path(link, path, grads)


def test_equinox_keeps_its_dtype(link):
    """A11: for three steps, behind `compensate` those of a plain list of the module's arrays."""
    tx = aj.chain(aj.adam(0.1), link)
    start = eqx.nn.MLP(2, 2, 4, 1, dtype=jnp.bfloat16, key=jax.random.key(0))
    arrays = jax.tree.leaves(eqx.filter(start, eqx.is_inexact_array))

    @eqx.filter_jit
    def step(model, state):
        params = eqx.filter(model, eqx.is_inexact_array)
        updates, state = tx.update(params, state, params)
        return aj.apply_updates(model, updates), state

    def run(model, state):
        for _ in range(3):
            model, state = step(model, state)
        return jax.tree.leaves(eqx.filter(model, eqx.is_inexact_array))

    found = run(start, tx.init(eqx.filter(start, eqx.is_inexact_array)))
    assert {leaf.dtype for leaf in found} == {jnp.dtype(jnp.bfloat16)}
    assert not any((a == b).all() for a, b in zip(found, arrays, strict=True) if b.any())
    if link == LINKS["compensate"]:  # the random bits of the other depend on the leaves' names
        for a, b in zip(found, run(arrays, tx.init(arrays)), strict=True):
            np.testing.assert_array_equal(bits(a), bits(b))


@pytest.mark.parametrize("add", [eqx.apply_updates, functools.partial(jax.tree.map, jnp.add)])
def test_a_sum_that_was_not_cast_back_is_named(link, add, standard_promotion):
    """A11: the second step says what to call. Silence would be a run in float32."""
    tx = aj.chain(aj.adam(0.1), link)
    params = {"w": jnp.ones(3, jnp.bfloat16), "n": jnp.ones(3)}
    updates, state = tx.update(params, tx.init(params), params)
    params = add(params, updates)
    assert params["w"].dtype == jnp.float32
    if link == LINKS["compensate"]:
        with refused(
            ValueError,
            "compensate(): at 'w' found a parameter of float32; expected bfloat16 or float16",
            "adam_jax.apply_updates(params, updates)",
        ):
            tx.update(params, state, params)
    else:
        with pytest.warns(UserWarning, match=r"rounds nothing.*adam_jax\.apply_updates\("):
            tx.update(params, state, params)


def test_a_state_of_compensate_for_wide_parameters_is_named():
    """A11, the other way round: what was float32 in `init` has 16 bits now."""
    tx, wide = aj.compensate(), {"w": jnp.ones(3), "b": jnp.ones(3, jnp.bfloat16)}
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), wide)
    with refused(ValueError, "at 'w' found a parameter of bfloat16", "convert_state"):
        tx.update(params, tx.init(wide), params)
    state = aj.convert_state(tx.init(wide), tx, tx, params).state
    tx.update(params, state, params)


def test_nothing_to_round_is_said_once_in_init():
    """D15: of arrays, and neither of shapes nor of a group."""
    params = {"a": jnp.ones(3), "b": jnp.ones(3)}
    for link, name in zip(LINKS.values(), ("round_stochastically", "compensate"), strict=True):
        tx = aj.chain(aj.adam(0.1), link)
        with pytest.warns(UserWarning, match=rf"^{name}\(\) rounds nothing: .* float32") as caught:
            tx.init(params)
        assert len(caught) == 1
        assert "warnings.filterwarnings" in str(caught[0].message)
        assert len(str(caught[0].message)) <= 600
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            aj.describe(tx, params)
            aj.state_bytes(tx, params)
            tx.init({"a": jnp.ones(3, jnp.bfloat16), "b": jnp.ones(3)})
            tx.init({"n": jnp.int32(1)})
            grouped = aj.by_path({"a": tx}, aj.adam(0.1))
            state = grouped.init(params)
            grouped.update(params, state, params)


# Order


ORDERS = {
    "optax.scale": lambda link: aj.chain(aj.adam(0.1), link, optax.scale(0.5)),
    "optax.clip": lambda link: aj.chain(aj.adam(0.1), link, optax.clip(0.5)),
    "optax.identity": lambda link: aj.chain(link, optax.identity()),
    "decay": lambda link: aj.chain(
        aj.adam(0.1), link, aj.add_decayed_weights(0.1, learning_rate=0.1)
    ),
    "clip_update_rms": lambda link: aj.chain(aj.adam(0.1), link, aj.stages.clip_update_rms(0.5)),
    "cautious": lambda link: aj.chain(aj.adam(0.1), link, aj.stages.cautious()),
    "stochastic": lambda link: aj.chain(aj.adam(0.1), link, aj.round_stochastically()),
    "compensate": lambda link: aj.chain(aj.adam(0.1), link, aj.compensate()),
    "behind the average": lambda link: aj.chain(
        aj.adam(0.1), link, aj.stages.average_parameters(0.9), optax.scale(1.0)
    ),
    "nested": lambda link: aj.chain(aj.chain(aj.adam(0.1), aj.chain(link)), optax.scale(0.5)),
    "nested both": lambda link: aj.chain(aj.chain(aj.adam(0.1), link), aj.chain(optax.scale(0.5))),
}


@pytest.mark.parametrize("order", ORDERS)
def test_nothing_follows_that_could_change_the_updates(link, order):
    with pytest.raises(
        ValueError,
        match=r"chain: .* at position \d comes after .*, whose updates must reach the parameters",
    ):
        ORDERS[order](link)


def test_an_error_of_order_names_both_and_where_they_stand(link):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        aj.chain(optax.clip(1.0), aj.adam(0.1), link, aj.stages.cautious())
    assert str(error.value) == (
        f"chain: cautious() at position 3 comes after {link} at position 2, whose updates must "
        "reach the parameters as they are. Put it before."
    )


@pytest.mark.parametrize(
    "build",
    [
        lambda link: aj.chain(link, aj.adam(0.1)),
        lambda link: aj.chain(
            aj.track_moments(), aj.scale_by_moments(), link, aj.scale_by_learning_rate(0.1)
        ),
        lambda link: aj.chain(aj.chain(link), aj.scale_by_learning_rate(0.1)),
    ],
    ids=["before a member", "before the rate", "nested"],
)
def test_it_does_not_stand_before_the_learning_rate(link, build):
    with pytest.raises(
        ValueError,
        match="is right only after the learning rate was applied, but .* comes later. Move it "
        "behind",
    ):
        build(link)


def test_it_does_not_take_moments(link):
    with pytest.raises(ValueError, match="takes plain updates, but .* gives Moments"):
        aj.chain(aj.track_moments(), link)


@pytest.mark.parametrize(
    "build",
    [
        lambda average, link: aj.chain(aj.adam(0.1), average, link),
        lambda average, link: aj.chain(aj.adam(0.1), aj.chain(average), link),
        lambda average, link: aj.chain(aj.adam(0.1), average, aj.chain(link)),
        lambda average, link: aj.chain(aj.adam(0.1), aj.chain(average, link)),
    ],
    ids=["flat", "average nested", "link nested", "both nested"],
)
def test_the_average_does_not_stand_before_it(link, build):
    with pytest.raises(
        ValueError,
        match=r"average_parameters\(decay=0.9\).* reads the updates .* rounded later. Move it last",
    ):
        build(aj.stages.average_parameters(0.9), link)


@pytest.mark.parametrize(
    "build",
    [
        lambda tx: tx,
        lambda tx: aj.chain(aj.adam(0.1), tx),
        lambda tx: optax.chain(optax.sgd(0.1), tx),
    ],
    ids=["alone", "chain", "optax.chain"],
)
def test_without_params(link, build):
    params = small_params()
    tx = build(link)
    caller = "round_stochastically" if link is LINKS["stochastic"] else "compensate"
    with pytest.raises(ValueError) as error:  # noqa: PT011
        tx.update(params, tx.init(params))
    expected = (
        f"{caller}() needs the parameters, and `update` was called without: call update(grads, "
        "state, params)."
    )
    assert str(error.value) == expected


AVERAGED = {
    "flat": lambda link, average: aj.chain(aj.scale_by_learning_rate(RATE), link, average),
    "around": lambda link, average: aj.chain(
        aj.chain(aj.scale_by_learning_rate(RATE), link), average
    ),
    "within": lambda link, average: aj.chain(
        aj.scale_by_learning_rate(RATE), aj.chain(link, average)
    ),
    "all within": lambda link, average: aj.chain(
        optax.identity(), aj.chain(aj.scale_by_learning_rate(RATE), link, average)
    ),
    "optax.chain": lambda link, average: optax.chain(
        aj.chain(aj.scale_by_learning_rate(RATE), link), average
    ),
}


@pytest.mark.parametrize("order", AVERAGED)
def test_the_average_is_of_what_the_parameters_become(link, order, standard_promotion):
    params = small_params()
    grads = large_grads_of(params, 7)
    path, state = walk(AVERAGED[order](link, aj.stages.average_parameters(0.75)), params, grads)
    weights = 0.75 ** np.arange(7.0)[::-1]
    expected = np.tensordot(
        weights / weights.sum(), [f32(p["w"]).astype(float) for p in path[1:]], 1
    )
    np.testing.assert_allclose(
        aj.stages.averaged_parameters(state)["w"], expected, rtol=1e-5, atol=1e-6
    )
    np.testing.assert_array_equal(
        f32(path[-1]["w"]), f32(walk(descent(link), params, grads)[0][-1]["w"])
    )


# What is not finite


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("of", ["update", "parameter"])
@pytest.mark.parametrize("dtype", LOW.values(), ids=LOW)
def test_what_is_not_finite_stays_to_be_seen(link, bad, of, dtype):
    old, update = (
        jnp.asarray([1.0, -1.0, 0.0, 6e4], dtype),
        jnp.asarray([1e-3, 1.0, 0.0, -1.0], jnp.float32),
    )
    expected = f32(old)
    if of == "update":
        update = update.at[:3].set(bad)
    else:
        old = old.at[:3].set(bad)
    tx, state = link, link.init(old)
    found, state = apply(tx, old, state, update)
    np.testing.assert_array_equal(f32(found)[:3], np.full(3, bad, np.float32))
    assert np.isfinite(f32(found)[3])
    found, _ = apply(tx, found, state, jnp.zeros(4))
    assert not np.isfinite(f32(found)[:3]).any()
    np.testing.assert_allclose(f32(found)[3], expected[3] - 1, rtol=2.0**-7)


def test_a_sum_beyond_float32_is_infinite_and_one_beyond_bfloat16_is_the_largest(link):
    old, update = (
        jnp.asarray([3.3e38, 3.3e38, -3.3e38], jnp.bfloat16),
        jnp.asarray([3e38, 1e37, -1e37], jnp.float32),
    )
    found, _ = apply(link, old, link.init(old), update)
    top = finite(jnp.bfloat16)[-1]
    np.testing.assert_array_equal(f32(found), np.float32([np.inf, top, -top]))


# With the family


@functools.cache
def both_runs():
    """Of each member the parameters after 30 steps in four bytes and in float32, in one program;
    start, and the way down.
    """
    draw = np.random.default_rng(0)
    shape = (64, 64)
    way = np.where(np.arange(64) % 3 == 0, -1, 1)  # most gradients of a column agree
    grads = jnp.asarray((0.5 + np.abs(draw.standard_normal((30, *shape)))) * way, jnp.bfloat16)
    start = jnp.asarray(draw.choice([-1, 1], shape) * draw.uniform(1, 2, shape), jnp.bfloat16)

    def run(member):
        low, high = aj.chain(member(5e-4, storage="8bit"), LINKS["stochastic"]), member(5e-4)

        def step(carry, g):
            return (apply(low, *carry[0], g), apply(high, *carry[1], g.astype(jnp.float32))), None

        wide = start.astype(jnp.float32)
        (found, _), (expected, _) = lax.scan(
            step, ((start, low.init(start)), (wide, high.init(wide))), grads
        )[0]
        return found, expected

    made = (
        jax.jit(lambda: {name: run(getattr(aj, name)) for name in aj.family.__all__})
        .lower()
        .compile(QUICKLY)()
    )
    return made, start, way


@pytest.mark.parametrize("member", aj.family.__all__)
def test_every_member_stays_close_to_its_float32_run(member):
    """bfloat16 parameters, 8-bit moments, 30 steps, each below half of most
    parameters' last bit.
    """
    made, start, way = both_runs()
    found, expected = made[member]
    assert found.dtype == jnp.bfloat16
    moved, should = ((f32(x) - f32(start)) * way for x in (found, expected))
    noise = np.std(moved - should) / np.sqrt(moved.size)
    assert should.mean() < -10 * noise
    np.testing.assert_allclose(moved.mean(), should.mean(), rtol=0.02, atol=4 * noise)
    assert (
        np.abs(moved - should).max() < 6 * np.sqrt(30 / 4) * 2.0**-7
    )  # a walk of 30 steps, each with half a last bit's noise
