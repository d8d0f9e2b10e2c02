"""Random bits: no two streams ever meet, so that rounding moves no parameter on average.

The oracles are statistics of noise: a mean that must be zero, correlations that must vanish, and
the same run in float32."""

import functools
import hashlib
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adam_jax as aj
from adam_jax import storage
from adam_jax.storage.random_bits import StepBits, position, rotate

OPTIMIZED = True  # it computes for longer than it compiles

MEMBERS = aj.family.__all__


def draws(stream="track_moments 0", path="w", seed=0, count=1, shape=(512, 513)):
    return np.asarray(StepBits(stream, jnp.int32(count)).of(path, shape, seed))


# The hash


def mix(x):
    """lowbias32, in Python's integers."""
    x = (x ^ x >> 16) * 0x7FEB352D & 0xFFFFFFFF
    x = (x ^ x >> 15) * 0x846CA68B & 0xFFFFFFFF
    return x ^ x >> 16


def words(stream, path, seed, count, row, column):
    digest = hashlib.blake2b(repr((stream, path)).encode(), digest_size=8).digest()
    first, second = (int.from_bytes(digest[i : i + 4], "little") for i in (0, 4))
    step = mix(count)
    first = mix(first + seed & 0xFFFFFFFF) + step
    second = mix(second + seed & 0xFFFFFFFF) + mix(step + 0x7FEB352D & 0xFFFFFFFF)
    return mix((mix(row + first & 0xFFFFFFFF) + second & 0xFFFFFFFF) ^ column)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        (("track_moments 0", "w", 0, 1), (2, 3)),
        (("", "", 2**32 - 1, 2**31 - 1), (5,)),
        (("x 1", "a/b", 7, 9), (2, 3, 2)),
    ],
    ids=["small", "extreme", "three axes"],
)
def test_the_random_bits_are_those_of_every_version(name, shape):
    """A run is repeated with them: they may not change."""
    stream, path, seed, count = name
    expected = [words(*name, *divmod(i, shape[-1])) for i in range(int(np.prod(shape)))]
    found = draws(*name, shape)
    assert found.dtype == np.uint32
    np.testing.assert_array_equal(found.ravel(), expected)
    traced = jax.jit(lambda seed, count: StepBits(stream, count).of(path, shape, seed))
    np.testing.assert_array_equal(traced(jnp.uint32(seed), jnp.int32(count)), found)


def test_the_hash_is_written_down():
    """Against a slip in both this file and the other."""
    np.testing.assert_array_equal(
        draws(shape=(2, 2)).ravel(), [0xB548C4E6, 0x0B12CA39, 0xF28C6DAC, 0xAD136B8E]
    )


@pytest.mark.parametrize("shape", [(512, 513), (262_144,), (8, 64, 513), (262_144, 1)], ids=str)
def test_all_bits_are_even(shape):
    bits = draws(count=3, shape=shape)
    n = bits.size
    for shift in range(0, 32, 8):
        found = np.bincount((bits.ravel() >> shift) & 255, minlength=256)
        chi2 = ((found - n / 256) ** 2).sum() / (n / 256)
        assert abs(chi2 - 255) < 5 * np.sqrt(2 * 255), shift
    for bit in range(32):
        assert abs(((bits >> bit) & 1).mean() - 0.5) < 5 * 0.5 / np.sqrt(n), bit
    assert len(np.unique(bits)) > 0.999 * n


def independent(left, right):
    """No correlation of the numbers, nor of any bit of one with the same of the other; top bytes
    fill a square evenly.
    """
    left, right = left.ravel(), right.ravel()
    limit = 5 / np.sqrt(left.size)
    assert abs(np.corrcoef(left.astype(float), right.astype(float))[0, 1]) < limit
    for bit in range(32):
        assert abs(((left ^ right) >> bit & 1).mean() - 0.5) < limit / 2, bit
    found = np.bincount((left >> 28 << 4) + (right >> 28), minlength=256)
    chi2 = ((found - left.size / 256) ** 2).sum() / (left.size / 256)
    assert abs(chi2 - 255) < 5 * np.sqrt(2 * 255)


@pytest.mark.parametrize(
    "what",
    [
        "rows",
        "columns",
        "diagonals",
        "counts",
        "far counts",
        "leaves",
        "seeds",
        "streams",
        "ends of a word",
    ],
)
def test_neighbours_have_nothing_in_common(what):
    bits = draws()
    pairs = {
        "rows": (bits[1:], bits[:-1]),
        "columns": (bits[:, 1:], bits[:, :-1]),
        "diagonals": (bits[1:, :-1], bits[:-1, 1:]),
        "counts": (bits, draws(count=2)),
        "far counts": (bits, draws(count=1 + 2**20)),
        "leaves": (bits, draws(path="v")),
        "seeds": (bits, draws(seed=1)),
        "streams": (bits, draws("track_moments 1")),
        "ends of a word": (bits, np.asarray(rotate(jnp.asarray(bits), 16))),
    }
    independent(*pairs[what])


def test_no_stream_is_another_one_a_few_steps_later():
    """Sums of step, salt and row would be: the row of a leaf at one step is not that of any leaf at
    any other step.
    """
    rows = {}
    for name in ("a", "b", "c"):
        for seed in range(3):
            for count in range(1, 8):
                for i, row in enumerate(draws(path=name, seed=seed, count=count, shape=(40, 4))):
                    assert rows.setdefault(row.tobytes(), (name, seed, count, i)) == (
                        name,
                        seed,
                        count,
                        i,
                    )


SHAPES = [
    (),
    (7,),
    (16,),
    (17,),
    (33,),
    (3, 5),
    (4, 4, 3),
    (5, 4, 3),
    (2, 17, 3),
    (19, 2, 40),
    (0, 3),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_position_has_words_of_its_own(shape):
    """With words of 16 values in place of 2³², so that the long axes are short."""
    found = [np.broadcast_to(word, shape).ravel() for word in position(shape, word=16)]
    assert all(word.size == 0 or word.max() < 16 for word in found)
    assert len(set(zip(*found, strict=True))) == int(np.prod(shape))


@pytest.mark.parametrize(
    ("shape", "count"), [((2**33,), 2), ((2**20, 2**20, 8), 3), ((2**16, 2**16, 2**33), 3)], ids=str
)
def test_a_leaf_of_more_elements_than_a_word_counts(shape, count):
    made = jax.eval_shape(lambda: position(shape))
    assert [(word.shape, word.dtype) for word in made] == [(shape, jnp.uint32)] * count


def normals(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def applied(params, updates):
    """What Optax's function of that name makes where dtypes may mix."""
    return jax.tree.map(
        lambda p, u: (p.astype(jnp.float32) + u.astype(jnp.float32)).astype(p.dtype),
        params,
        updates,
    )


# Streams of real steps


def stage_of_everything(seed):
    """An average ahead of groups, which together have every stage that rounds moments, and round
    their parameters.
    """
    form = storage.Codes(seed=seed, smallest=0)

    def rounded(tx):
        return aj.chain(tx, aj.round_stochastically(seed))

    groups = {
        "a/.*": rounded(aj.amsgrad(1e-3, storage=form)),
        "b/.*": rounded(aj.ademamix(1e-3, storage=form)),
        "c/.*": rounded(aj.adopt(1e-3, storage=form)),
        "d/.*": rounded(aj.adam(1e-3, storage=storage.Float(jnp.bfloat16, seed=seed))),
    }
    inner = aj.by_path(groups, default=rounded(aj.adam(1e-3, storage=form)))
    ahead = aj.chain(aj.track_moments(storage=form), aj.correct_bias(), aj.scale_by_moments())
    return aj.chain(ahead, inner)


def recorded(make, params, seeds, steps, monkeypatch):
    """The words that each rounding of a run reads: (members, steps, streams, elements)."""
    seen = []

    def record(function):
        @functools.wraps(function)
        def wrapper(*args):
            seen.append(function(*args))
            return seen[-1]

        return wrapper

    monkeypatch.setattr(StepBits, "of", record(StepBits.of))

    def run(seed):
        tx = make(seed)

        def step(state, _):
            seen.clear()
            _, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
            return state, jnp.stack([bits.ravel() for bits in seen])

        return jax.lax.scan(step, tx.init(params), None, length=steps)[1]

    return np.asarray(jax.jit(jax.vmap(run))(seeds))


def test_no_two_streams_are_correlated_at_any_lag(monkeypatch):
    """Of every stage, slot, leaf, group and member of a `vmap` with every other, and with itself, 0
    to 3 steps later.
    """
    leaves = {
        f"{group}/{i}": jnp.ones((64, 64), jnp.bfloat16) for group in "abcde" for i in range(2)
    }
    params = {group: {i: leaves[f"{group}/{i}"] for i in "01"} for group in "abcde"}
    found = recorded(stage_of_everything, params, jnp.arange(2), 12, monkeypatch)
    members, steps, streams, elements = found.shape
    # μ and ν in front; of two leaves a group μ and ν, a maximum, a slow mean, twice one in ADOPT;
    # those that round parameters.
    assert streams == 2 * 10 + 2 * (3 + 3 + 2 + 2 + 2) + 10
    x = (found.astype(np.float64) - 2.0**31) / (2.0**32 / np.sqrt(12))
    x = x.transpose(1, 0, 2, 3).reshape(steps, members * streams, elements)
    for lag in range(4):
        n = (steps - lag) * elements
        found = np.einsum("tin,tjn->ij", x[lag:], x[: steps - lag], optimize=True) / n
        if lag == 0:
            np.testing.assert_allclose(np.diag(found), 1, atol=0.02)
            np.fill_diagonal(found, 0)
        assert np.abs(found).max() * np.sqrt(n) < 4 * 1.25, lag
        # Not only the largest: the sum of squares of so many standard normal numbers.
        pairs = found.size if lag else found.size - len(found)
        assert abs((found**2).sum() * n / pairs - 1) < 5 * np.sqrt(2 / (pairs / 2)), lag


def test_equal_names_have_equal_bits_wherever_they_stand():
    """A stage rounds by the same bits in a chain, in a group, and in a chain or
    partition of Optax.
    """
    params = {name: jnp.full((64, 64), 1.25, jnp.bfloat16) for name in "ab"}
    grads = {name: normals(64, 64, seed=i) for i, name in enumerate("ab")}

    def inner():
        return aj.chain(aj.adam(1e-3, storage="8bit"), aj.round_stochastically())

    forms = {
        "chain": inner(),
        "behind others": aj.chain(optax.identity(), aj.stages.clip_elements(1e9), inner()),
        "groups": aj.by_path({"a": inner()}, default=inner()),
        "optax.partition": optax.partition({0: inner(), 1: inner()}, {"a": 0, "b": 1}),
        "optax.chain": optax.chain(aj.adam(1e-3, storage="8bit"), aj.round_stochastically()),
        "guarded": aj.skip_nonfinite(inner()),
    }

    def run(tx):
        def step(carry, _):
            params, state = carry
            updates, state = tx.update(grads, state, params)
            return (applied(params, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), None, length=8)[0][0]

    found = jax.jit(lambda: {name: run(tx) for name, tx in forms.items()})()
    for other in found.values():
        for name in "ab":
            # Other bits agree in six of ten elements. Programs may differ in a last digit, and then
            # a code or two.
            assert np.mean(np.asarray(other[name] == found["chain"][name])) > 0.99


# Drift


def outward(groups, sizes, columns, steps, rate, dtype=jnp.bfloat16):
    """By group and size, how far parameters move outward per step under gradients of pure noise:
    mean and standard error.

    In learning rates. Half of the parameters are positive and half negative, under the same
    gradients, so that what a gradient does to one it undoes in the other; what is left is what
    rounding does."""
    start = jnp.asarray([[size, -size] for size in sizes], dtype)[..., None] * jnp.ones(
        (1, 1, columns), dtype
    )
    params = dict.fromkeys(groups, start)
    tx = aj.by_path(groups, default="frozen")

    def step(carry, key):
        params, state = carry
        grad = jnp.broadcast_to(0.3 * jax.random.normal(key, (len(sizes), 1, columns)), start.shape)
        updates, state = tx.update(dict.fromkeys(params, grad), state, params)
        return (applied(params, updates), state), None

    @jax.jit
    def run(key):
        return jax.lax.scan(step, (params, tx.init(params)), jax.random.split(key, steps))[0][0]

    moved = {}
    for name, after in run(jax.random.key(0, impl="rbg")).items():
        way = (
            (np.asarray(after, np.float64) - np.asarray(start, np.float64))
            * np.array([[1], [-1]])
            / (rate * steps)
        )
        pair = way.mean(1)
        moved[name] = np.stack([pair.mean(-1), pair.std(-1) / np.sqrt(columns)])
    return moved


def test_noise_drives_no_parameter_outward():
    """In version 0.1.0 it did by 0.006 learning rates per step: moments and parameters were rounded
    by the same bits.
    """
    links = {"rounded": aj.round_stochastically, "compensated": aj.compensate}
    members = {name: getattr(aj, name) for name in MEMBERS}
    decaying = [
        name
        for name, make in members.items()
        if "weight_decay" in inspect.signature(make).parameters
    ]
    groups = {
        f"{name}-{how}": aj.chain(
            make(1e-2, storage="8bit", **({"weight_decay": 0.0} if name in decaying else {})),
            link(),
        )
        for name, make in members.items()
        for how, link in links.items()
    }
    for name, (drift, error) in outward(groups, (1.25, 0.3), 1 << 13, 200, 1e-2).items():
        assert (np.abs(drift) < 3 * error).all(), (name, drift, error)
        assert (np.abs(drift) < 0.001).all(), (name, drift, error)


def test_weights_decay_under_noise_as_in_float32():
    sizes = (0.06, 0.02)
    four_bytes = {
        how: aj.chain(aj.adamw(1e-3, weight_decay=0.1, storage="8bit"), link())
        for how, link in {"rounded": aj.round_stochastically, "compensated": aj.compensate}.items()
    }
    exact = outward(
        {"float32": aj.adamw(1e-3, weight_decay=0.1)}, sizes, 1 << 14, 250, 1e-3, jnp.float32
    )["float32"]
    np.testing.assert_allclose(exact[0], [-0.006, -0.002], rtol=0.1)
    for name, (drift, error) in outward(four_bytes, sizes, 1 << 14, 250, 1e-3).items():
        difference = np.abs(drift - exact[0])
        assert (difference < 3 * np.hypot(error, exact[1])).all(), (name, drift, exact)
        assert (difference < 0.0005).all(), (name, drift, exact)


def test_each_member_of_a_vmap_can_have_bits_of_its_own():
    params = jnp.full((64, 64), 1.25, jnp.bfloat16)

    def step(seed):
        tx = aj.chain(
            aj.adam(1e-3, storage=storage.Codes(seed=seed)), aj.round_stochastically(seed)
        )
        updates, state = tx.update(jnp.full((64, 64), 0.3), tx.init(params), params)
        return applied(params, updates), state[0][0].mu, state[0][0].nu

    together = jax.jit(jax.vmap(step))(jnp.arange(3))
    for found in together:
        for one, other in ((0, 1), (0, 2), (1, 2)):
            assert 0.1 < np.mean(np.asarray(found[one] == found[other])) < 0.9
    for alone, found in zip(
        jax.jit(lambda: step(2))(), together, strict=True
    ):  # a number is the seed that it is traced
        assert np.mean(np.asarray(alone == found[2])) > 0.999


@pytest.mark.parametrize(
    "make", [aj.round_stochastically, storage.Codes, storage.Float], ids=lambda make: make.__name__
)
def test_what_is_no_seed(make):
    name = {"round_stochastically": "round_stochastically"}.get(
        make.__name__, f"storage.{make.__name__}"
    )
    for value in (True, 1.0, "1", None, np.float32(2)):
        with pytest.raises(TypeError, match=f"{name}: seed: found .*; expected an integer"):
            make(seed=value)
    for value in (jnp.ones(2, int), jnp.float32(1)):
        with pytest.raises(
            TypeError,
            match=rf"{name}: seed: found an array of .* and shape \(.*; expected an integer scalar",
        ):
            make(seed=value)
    for key in (jax.random.key(0), jax.random.PRNGKey(0)):
        for how in (make, lambda seed: jax.eval_shape(lambda seed: make(seed=seed) and seed, seed)):
            with pytest.raises(
                TypeError,
                match=rf"{name}: seed: found an array of .*; expected an integer scalar. Pass an",
            ):
                how(seed=key)
    with pytest.raises(ValueError, match=f"{name}: seed: found -1; expected 0 or more"):
        make(seed=-1)
    with pytest.raises(
        ValueError, match=f"{name}: seed: found 4294967296; expected less than 2\\^32"
    ):
        make(seed=2**32)
    for seed in (np.int64(7), jnp.int32(7)):
        assert make(seed=seed) == make(seed=7)
        assert hash(make(seed=seed)) == hash(make(seed=7))
        assert repr(make(seed=seed)) == repr(make(seed=7))
