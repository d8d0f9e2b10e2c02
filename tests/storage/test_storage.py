"""Moments at rest: the codes and their arithmetic, the random bits, what long runs do to them, and
every place a state goes.

The oracles are the table of codes written out, expectations in float64, and the same member with
float32 moments."""

import functools
import inspect
import itertools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import QUICKLY, avals, normals, refused, same

import adam_jax as aj
from adam_jax import storage
from adam_jax.storage.codec import HALF, Codec, to_float
from adam_jax.storage.formats import resolve_storage
from adam_jax.storage.random_bits import StepBits, random_bits
from adam_jax.storage.scales import UNKNOWN, unpack
from adam_jax.storage.slot import MomentSlot
from benchmarks import outliers
from benchmarks._data import small_digits

OPTIMIZED = True  # it computes for longer than it compiles

DRAWS = 100_000
WIDE = 4096
FLOATS = [
    "bfloat16",
    "float16",
    "float8_e3m4",
    "float8_e4m3",
    "float8_e4m3b11fnuz",
    "float8_e4m3fn",
    "float8_e4m3fnuz",
    "float8_e5m2",
    "float8_e5m2fnuz",
]
FLOATS = [name for name in FLOATS if hasattr(jnp, name)]
CODECS = [Codec(signed) for signed in (True, False)]
NARROW = {
    "bfloat16": "bfloat16",
    "8bit": "8bit",
    "float16": storage.Float(jnp.float16),
    "pair": ("bfloat16", "8bit"),
}


def padded(x):
    return np.pad(x, (0, (256 if len(x) <= 256 else 2**16) - len(x)))


_narrow = jax.jit(lambda codec, x, unit, random: codec.narrow(x, unit, random), static_argnums=0)
_widen = jax.jit(lambda codec, code, unit: codec.widen(code, unit), static_argnums=0)
_to_float = jax.jit(lambda dtype, x, random: to_float(x, dtype, random), static_argnums=0)


# Of few sizes, so that few are compiled.


def narrowed(codec, x, unit, random=HALF):
    return np.asarray(
        _narrow(
            codec, padded(np.asarray(x, np.float32)), np.full(1, unit, np.int32), np.uint32(random)
        )
    )[: len(x)]


def widened(codec, code, unit):
    return np.asarray(
        _widen(codec, padded(np.asarray(code)), np.full(1, unit, np.int32)), np.float64
    )[: len(code)]


def next_unit(codec, code, unit):
    (found,) = codec.next_exponent(jnp.asarray(code), jnp.full(1, unit, jnp.int32))
    return int(found)


def as_float(dtype, x, random=HALF):
    found = _to_float(dtype, padded(np.asarray(x, np.float32)), np.uint32(random))[: len(x)]
    assert found.dtype == dtype
    return np.asarray(found, np.float64)


# What codes stand for

PER_OCTAVE = 8
"""The number of codes in a fine octave."""


def table(codec, unit):
    """What the codes from 0 on stand for, in float64: steps below a unit, steps an octave, one an
    octave. Up to 2¹²⁶ units.
    """
    known = unit != UNKNOWN
    code = np.arange(np.iinfo(codec.dtype).max + 1, dtype=np.float64)
    coarse, fine = (codec.fine * PER_OCTAVE, codec.fine) if known else (0, 0)
    below, above = np.divmod(code, PER_OCTAVE), code - coarse + fine
    octave = np.where(code < coarse, below[0], above)
    part = np.where(code < coarse, below[1] / PER_OCTAVE, 0)
    size = np.where(octave == 0, part, 2.0 ** np.minimum(octave - 1, 200) * (1 + part))
    size = size[size <= 2.0**126] * 2.0 ** (int(unit) if known else codec.widest)
    return size[size < 2.0**128]


UNITS = {"known": 0, "small": -90, "unknown": UNKNOWN}
GRIDS = [
    pytest.param(codec, np.int32(unit), id=f"{codec.dtype}-{name}")
    for codec in CODECS
    for name, unit in UNITS.items()
]


@pytest.mark.parametrize(("codec", "unit"), GRIDS)
def test_every_code_stands_for_its_place_in_the_table(codec, unit):
    expected = table(codec, unit)
    assert len(expected) >= 127
    code = np.arange(len(expected)).astype(codec.dtype)
    found = widened(codec, code, unit)
    normal = expected >= 2.0**-126
    np.testing.assert_array_equal(found[normal], expected[normal])
    assert found[0] == 0
    if codec.signed:
        np.testing.assert_array_equal(widened(codec, -code, unit), -found)


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: str(codec.dtype))
def test_a_relative_step_is_an_eighth_of_an_octave_where_the_range_says_so(codec):
    """And the fine octaves reach as far below the largest moment of the step before as the table of
    `Codes` promises.
    """
    for largest in (1.0, 1.9, 3e-9, 7e5):
        unit = UNKNOWN
        for _ in range(
            3
        ):  # whole octaves may have rounded up; from the second step on the unit is exact
            unit = next_unit(codec, narrowed(codec, [largest], unit), unit)
        size = table(codec, unit)
        assert (np.diff(size) > 0).all()
        positive = size[1:]
        assert positive[0] <= largest * 2.0**-codec.fine
        octaves = 2.0 ** np.floor(np.log2(positive[:-1]))
        fine = (octaves >= 2.0 ** int(unit)) & (positive[:-1] < 2 * largest)
        assert fine.sum() >= (codec.fine - 2) * PER_OCTAVE
        np.testing.assert_allclose((np.diff(positive) / octaves)[fine], 1 / PER_OCTAVE)
        assert positive[-1] >= largest * 2.0 ** (15 if codec.signed else 31)


@pytest.mark.parametrize("random", [0, 0x9E3779B9, 2**32 - 1], ids=hex)
@pytest.mark.parametrize(("codec", "unit"), GRIDS)
def test_what_is_a_code_already_is_kept_by_any_random_bits(codec, unit, random):
    size = table(codec, unit)
    x = size[(size == 0) | (size >= 2.0**-126)].astype(np.float32)
    codes = np.flatnonzero((size == 0) | (size >= 2.0**-126))
    np.testing.assert_array_equal(narrowed(codec, x, unit, random), codes)
    if codec.signed:
        np.testing.assert_array_equal(narrowed(codec, -x, unit, random), -codes)


FRACTIONS = np.array([0.07, 0.5, 0.9])


def between(lower, upper):
    """Float32 numbers between neighbours, and how far up each is: three for every pair."""
    lower, upper = np.repeat(lower, 3), np.repeat(upper, 3)
    x = (lower + np.tile(FRACTIONS, len(lower) // 3) * (upper - lower)).astype(np.float32)
    return x, (x.astype(np.float64) - lower) / (upper - lower)


def some(count, limit=24):
    """Indices of 0 … count − 1, dense at both ends."""
    ends = np.unique(
        np.concatenate([np.arange(12), np.geomspace(1, count, limit - 12).astype(int)])
    )
    return np.unique(np.concatenate([ends[ends < count], count - 1 - np.arange(4)]))


def within_four_standard_errors(share, expected):
    error = np.sqrt(expected * (1 - expected) / DRAWS)
    assert (np.abs(share - expected) <= 4 * error + 1e-12).all(), np.max(
        np.abs(share - expected) / error
    )


@pytest.mark.parametrize(("codec", "unit"), GRIDS)
def test_codes_are_unbiased(codec, unit):
    """In fine and coarse octaves, below one unit, and where no unit is known yet.

    Below its first code ν is not: see below.
    """
    size = table(codec, unit)
    usable = np.flatnonzero(size[:-1] >= 2.0**-122)
    chosen = usable[some(len(usable))]
    if codec.signed:
        chosen = np.concatenate([[0], chosen])
    x, expected = between(size[chosen], size[chosen + 1])
    lower = np.repeat(chosen, 3)
    sign = np.where(np.arange(len(x)) % 2, -1, 1) if codec.signed else np.ones(len(x), int)

    @jax.jit
    def draw(x):
        return codec.narrow(
            jnp.broadcast_to(x, (DRAWS, len(x))),
            jnp.full((1, 1), unit, jnp.int32),
            random_bits(np.uint32([1, 1]), (DRAWS, len(x))),
        )

    up = np.asarray(draw((x * sign).astype(np.float32))).astype(np.int32) * sign - lower
    assert up.min() == 0
    assert up.max() == 1
    within_four_standard_errors(up.mean(0), expected)
    nearest = narrowed(codec, x, unit)
    clear = FRACTIONS[np.arange(len(x)) % 3] != 0.5
    np.testing.assert_array_equal(nearest[clear], (lower + (expected > 0.5))[clear])


def grid(dtype):
    """The numbers from 0 on that a dtype has and float32 keeps: below 2⁻¹²⁶ a CPU knows none."""
    bits = np.arange(2 ** (jnp.finfo(dtype).bits - 1)).astype(f"uint{jnp.finfo(dtype).bits}")
    with np.errstate(invalid="ignore"):
        values = bits.view(dtype).astype(np.float64)
    values = values[np.isfinite(values)]
    return np.sort(values[(values == 0) | (values >= 2.0**-126)])


@pytest.mark.parametrize("name", FLOATS)
def test_floats_are_unbiased(name):
    dtype = jnp.dtype(name)
    values = grid(dtype)
    lower = some(len(values) - 1)
    if name == "bfloat16":
        lower = lower[lower > 0]
    x, expected = between(values[lower], values[lower + 1])
    sign = np.where(np.arange(len(x)) % 2, -1, 1)

    @jax.jit
    def draw(x):
        random = random_bits(np.uint32([1, 1]), (DRAWS, len(x)))
        return to_float(jnp.broadcast_to(x, random.shape), dtype, random).astype(jnp.float32)

    found = np.asarray(draw((x * sign).astype(np.float32)), np.float64) * sign
    low, high = np.repeat(values[lower], 3), np.repeat(values[lower + 1], 3)
    assert ((found == low) | (found == high)).all()
    within_four_standard_errors((found == high).mean(0), expected)
    nearest = as_float(dtype, x)
    clear = FRACTIONS[np.arange(len(x)) % 3] != 0.5
    np.testing.assert_array_equal(nearest[clear], np.where(expected > 0.5, high, low)[clear])


@pytest.mark.parametrize("random", [0, 0x9E3779B9, 2**32 - 1], ids=hex)
@pytest.mark.parametrize("name", FLOATS)
def test_floats_keep_what_they_have_saturate_and_stay_nan(name, random):
    dtype = jnp.dtype(name)
    values = grid(dtype)
    x = np.concatenate([values, -values])
    np.testing.assert_array_equal(as_float(dtype, x, random), x)
    largest = values[-1]
    beyond = [np.inf, 3.3e38 if name != "bfloat16" else 3.395e38, -np.inf, np.nan]
    np.testing.assert_array_equal(
        as_float(dtype, beyond, random), [largest, largest, -largest, np.nan]
    )
    nans = np.array(
        [0x7F800001, 0x7FC00000, 0x7FFFFFFF, 0xFF800001, 0xFFFFFFFF], np.uint32
    )  # the random bits carry out of these
    assert np.isnan(as_float(dtype, nans.view(np.float32), random)).all()


@pytest.mark.parametrize("random", [0, 2**32 - 1], ids=hex)
@pytest.mark.parametrize(("codec", "unit"), GRIDS)
def test_zero_nan_and_what_is_smaller_than_every_code(codec, unit, random):
    smallest = table(codec, unit)[1]
    np.testing.assert_array_equal(
        narrowed(codec, [0.0, -0.0, np.nan, -np.nan], unit, random), np.zeros(4)
    )
    tiny = narrowed(codec, [smallest / 64], unit, random)
    if codec.signed:
        assert tiny == (random == 2**32 - 1)
        assert narrowed(codec, [-smallest / 64], unit, random) == -tiny
    else:
        assert tiny == 1
        np.testing.assert_array_equal(
            narrowed(codec, [smallest * 2.0**-20, 1.2e-38], unit, random), [1, 1]
        )
        np.testing.assert_array_equal(narrowed(codec, [-1.0, -np.inf], unit, random), np.zeros(2))


@pytest.mark.parametrize("random", [0, 2**32 - 1], ids=hex)
@pytest.mark.parametrize(
    ("codec", "unit"),
    GRIDS,
)
def test_what_is_larger_than_every_code_becomes_the_largest_and_stays_finite(codec, unit, random):
    huge = np.float32([2.0**124, 3.4e38, np.inf])
    code = narrowed(codec, huge, unit, random)
    found = widened(codec, code, unit)
    assert np.isfinite(found).all()
    assert found[0] >= min(2.0**123, table(codec, unit)[-1])
    if codec.signed:
        same(narrowed(codec, -huge, unit, random), -code)


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: str(codec.dtype))
def test_the_unit_follows_the_largest_code_and_leaves_an_octave_to_spare(codec):
    for unit in (UNKNOWN, -20, 0, 1):
        exponent = next_unit(codec, narrowed(codec, [0.0, 0.1, 3.0], unit, 0), unit)
        assert 2.0 ** (codec.fine - 3) <= 3.0 / 2.0 ** int(exponent) < 2.0 ** (codec.fine - 1), (
            unit,
            exponent,
        )
    nothing = np.zeros(3, codec.dtype)
    assert next_unit(codec, nothing, 5) == next_unit(codec, nothing[:0], 5) == UNKNOWN
    falls = next_unit(codec, nothing + np.ones(1, codec.dtype), 5)
    assert falls == 5 - (codec.fine - 2)
    assert next_unit(codec, nothing + np.ones(1, codec.dtype), -126) == -126


# A step


def mixed():
    """Leaves above and below the 4096 elements from which moments are narrowed."""
    return {"w": normals(64, 72, seed=1), "b": normals(7, seed=2)}


def rests_of(how):
    mu, nu = resolve_storage(how)
    return MomentSlot("mu", mu), MomentSlot("nu", nu, signed=False, turn=16)


@pytest.mark.parametrize("how", NARROW.values(), ids=NARROW)
def test_a_step_uses_the_moments_before_they_are_narrowed(how):
    """To the last bit, so not jitted: a compiler may round sums and products of two
    programs apart.
    """
    params = normals(64, 72)
    narrow, wide = aj.adam(0.1, storage=how), aj.adam(0.1)
    state, other = narrow.init(params), wide.init(params)
    same(narrow.update(params, state)[0], wide.update(params, other)[0])
    for i in range(3):
        state = jax.jit(narrow.update)((i + 1) * params, state)[1]
    first = state[0]
    mu, nu = (rest.widen(getattr(first, rest.name), first.scales) for rest in rests_of(how))
    updates, after = wide.update(params, (first._replace(mu=mu, nu=nu, scales={}), *state[1:]))
    found, kept = narrow.update(params, state)
    same(found, updates)
    for rest in rests_of(how):
        wide_moments, before = getattr(after[0], rest.name), getattr(first, rest.name)
        same(
            getattr(kept[0], rest.name),
            rest.narrow(
                wide_moments, before, first.scales, StepBits("track_moments 0", kept[0].count)
            )[0],
        )


@pytest.mark.parametrize("how", NARROW.values(), ids=NARROW)
def test_a_resting_moment_has_its_parameters_shape_and_two_bytes_more_per_row_at_most(how):
    params = {"w": normals(40, 128), "v": normals(5000), "b": normals(7)}
    state = aj.adam(0.1, storage=how).init(params)[0]
    per_element = [
        2 if form in ("bfloat16", NARROW["float16"]) else 1 for form in storage_pair(how)
    ]
    for name, size in zip(("mu", "nu"), per_element, strict=True):
        resting = getattr(state, name)
        assert jax.tree.map(jnp.shape, resting) == jax.tree.map(jnp.shape, params)
        assert {key: leaf.dtype.itemsize for key, leaf in resting.items()} == {
            "w": size,
            "v": size,
            "b": 4,
        }
    coded = [isinstance(form, storage.Codes) for form in resolve_storage(how)]
    assert list(state.scales) == [
        f"{name}_scale" for name, its in zip(("mu", "nu"), coded, strict=True) if its
    ]
    for scales in state.scales.values():
        assert {path: (scale.shape, scale.dtype) for path, scale in scales.items()} == {
            "w": ((40, 1), jnp.int16),
            "v": ((1,), jnp.int16),
        }


ROWS = {
    (): ((), (), ()),
    (4096,): ((1,), (1,), (1,)),
    (64, 128): ((64, 1), (1, 128), (1, 1)),
    (64, 127): ((1, 1), (1, 127), (1, 1)),
    (128, 64): ((1, 1), (1, 64), (1, 1)),
    (768, 12, 64): ((768, 1, 1), (1, 1, 64), (1, 1, 1)),
    (768, 2, 63): ((1, 1, 1), (1, 1, 63), (1, 1, 1)),
    (3, 3, 64, 64): ((3, 3, 1, 1), (3, 1, 1, 64), (1, 1, 1, 1)),
    (16, 512, 256): ((16, 512, 1), (16, 1, 256), (1, 1, 1)),
}


@pytest.mark.parametrize("shape", ROWS, ids=str)
def test_which_elements_share_a_scale(shape):
    """Those of a row, or of a column; short rows are taken together with their neighbours until
    there are 128 elements.
    """
    found = [
        MomentSlot("mu", storage.Codes(axis=axis)).form.scale_shape(shape)
        for axis in (-1, -2, None)
    ]
    assert tuple(found) == ROWS[shape]


def storage_pair(how):
    return how if isinstance(how, tuple) else (how, how)


@functools.cache
def run_of(how, steps=6, seed=5):
    """Jitted steps along drawn gradients: -> the state."""
    tx, params = aj.adam(0.1, storage=how), mixed()
    grads = {"w": normals(steps, 64, 72, seed=seed), "b": normals(steps, 7, seed=seed + 1)}
    return jax.jit(lambda s: jax.lax.scan(lambda s, g: (tx.update(g, s)[1], None), s, grads)[0])(
        tx.init(params)
    )


@pytest.mark.parametrize("how", ["bfloat16", "8bit"])
def test_the_same_run_twice_is_the_same_to_the_last_bit(how):
    same(run_of.__wrapped__(how), run_of(how))


@pytest.mark.parametrize(
    "make", [storage.Codes, functools.partial(storage.Float, jnp.bfloat16)], ids=["codes", "float"]
)
def test_another_seed_rounds_otherwise(make):
    default, other, nearest = (
        run_of(make(**named)) for named in ({}, {"seed": 1}, {"rounding": "nearest"})
    )
    for name in ("mu", "nu"):
        left, right, still = (
            np.asarray(getattr(state[0], name)["w"], np.float32)
            for state in (default, other, nearest)
        )
        assert 0.2 < np.mean(left != right) < 0.999
        assert 0.2 < np.mean(left != still) < 0.999


@pytest.mark.parametrize("how", ["bfloat16", "8bit"])
def test_equal_leaves_elements_and_steps_round_apart(how):
    """Two leaves of one constant: with the same bits for all, they would agree everywhere."""
    params = [jnp.full((64, 64), 1.001953125 * 1.06)] * 2
    for rest in rests_of(how):
        scales = {f"{rest.name}_scale": dict.fromkeys("01", jnp.zeros((1, 1), jnp.int16))}
        before = [rest.first(jnp.zeros((64, 64)))] * 2
        narrow = jax.jit(
            lambda count, rest=rest, old=before, scales=scales: rest.narrow(
                params, old, scales, StepBits("s", count)
            )[0]
        )
        seen = [
            np.asarray(leaf, np.float32) for count in (1, 2) for leaf in narrow(jnp.int32(count))
        ]
        for i, one in enumerate(seen):
            assert len(np.unique(one)) == 2
            assert min(len(np.unique(one, axis=0)), len(np.unique(one, axis=1).T)) > 32
            for other in seen[:i]:
                assert 0.05 < (one != other).mean() < 0.9


def test_mu_and_nu_do_not_round_by_the_same_bits():
    """Both halfway between two codes: with one and the same threshold they would go up together."""
    ups = []
    for rest in rests_of("8bit"):
        scales = {f"{rest.name}_scale": {"0": jnp.zeros((1, 1), jnp.int16)}}
        before = [rest.first(jnp.zeros((64, 64)))]
        kept, after = rest.narrow(
            [jnp.full((64, 64), 1.0625)], before, scales, StepBits("s", jnp.int32(1))
        )
        assert set(np.unique(kept[0])) == {8, 9}
        assert after[f"{rest.name}_scale"]["0"].shape == (1, 1)
        ups.append(np.asarray(kept[0]) == 9)
    assert abs(np.mean(ups[0] == ups[1]) - 0.5) < 5 * 0.5 / 64


def test_the_scales_say_how_the_codes_are_read_and_how_the_next_are_written():
    """Each row's by itself, and those of a row that is all zero are unknown."""
    tx = aj.track_moments(storage="8bit")
    params = {
        "w": jnp.ones((32, 128)).at[:, :].multiply(jnp.array([[1.0], [1e-6], [0.0], [1e6]] * 8)),
        "v": jnp.full(4096, 1e-6),
    }
    state = tx.init(params)
    assert all(
        (np.asarray(unit) == UNKNOWN).all()
        for scale in jax.tree.leaves(state.scales)
        for unit in unpack(scale)
    )
    step = jax.jit(tx.update)
    for _ in range(3):
        before, (_, state) = state, step(params, state)
        for old, new in zip(
            jax.tree.leaves(before.scales), jax.tree.leaves(state.scales), strict=True
        ):
            np.testing.assert_array_equal(unpack(new)[0], unpack(old)[1])
    written = {
        path: np.asarray(unpack(scale)[1]) for path, scale in state.scales["nu_scale"].items()
    }
    rows = written["w"][:, 0]
    assert len(set(zip(rows[0::4], rows[1::4], rows[2::4], rows[3::4], strict=True))) == 1
    assert rows[2] == UNKNOWN
    assert 36 <= rows[0] - rows[1] <= 44  # 10⁻¹² is 40 octaves
    assert 36 <= rows[3] - rows[0] <= 44
    assert written["v"].tolist() == [rows[1]]


def test_a_row_with_huge_gradients_costs_the_others_nothing():
    """Nor does a column, where columns have the scales.

    One scale for the leaf would leave the others no digits.
    """
    inputs, outputs = map(jnp.asarray, outliers.pixels(small_digits().train.inputs))
    for along, axis in ((0, -1), (1, -2)):
        run = outliers.trainer(inputs, outputs, 300, along)
        exact, one_scale, found = (
            float(run(form, 1e5)[1:].mean())
            for form in ("float32", storage.Codes(axis=None), storage.Codes(axis=axis))
        )
        assert one_scale > 1.1 * exact
        assert found < 1.02 * exact


# Long runs


def means_at(how, grads_of, times, shape=(WIDE,)):
    """Mean moments after each of `times` steps: [(mu, nu)], in float32.

    `grads_of`: a traced step from 0 -> gradient.
    """
    rests, tx = rests_of(how), aj.track_moments(storage=how)

    @jax.jit
    def run(state, start, stop):
        state = jax.lax.fori_loop(start, stop, lambda t, s: tx.update(grads_of(t), s)[1], state)
        return state, [rest.widen(getattr(state, rest.name), state.scales) for rest in rests]

    state, done, found = tx.init(jnp.zeros(shape)), 0, []
    for t in times:
        state, moments = run(state, done, t)
        found.append([np.asarray(m, np.float64) for m in moments])
        done = t
    return found


@pytest.mark.parametrize(
    ("how", "within"),
    [("bfloat16", 0.01), ("8bit", 0.03), (storage.Float(jnp.float16), 0.01)],
    ids=["bfloat16", "8bit", "float16"],
)
def test_a_constant_gradient_is_believed_in_the_end(how, within):
    times = (100, 1000, 20_000)
    for t, (mu, nu) in zip(times, means_at(how, lambda t: jnp.ones(WIDE), times), strict=True):
        np.testing.assert_allclose(nu.mean(), 1 - 0.999**t, rtol=within)
        np.testing.assert_allclose(mu.mean(), 1 - 0.9**t, rtol=within)


@pytest.mark.parametrize(
    ("how", "below"),
    [
        (storage.Float(jnp.bfloat16, rounding="nearest"), 0.55),
        (storage.Codes(rounding="nearest"), 0.2),
    ],
    ids=["bfloat16", "8bit"],
)
def test_rounded_to_nearest_a_moment_freezes(how, below):
    """What stochastic rounding is for. A bfloat16 ν of Optax stops here too."""
    (_, early), (_, late) = means_at(how, lambda t: jnp.ones(WIDE), (3000, 20_000))
    assert late.max() < below
    np.testing.assert_array_equal(early, late)


@pytest.mark.parametrize("before", [0, 1000], ids=["first", "later"])
@pytest.mark.parametrize("how", ["bfloat16", "8bit"])
def test_a_spike_decays_as_in_float32(how, before):
    """100 among gradients of 0.01, in every other element: ν of the others is 10⁻⁵ of theirs, and
    is kept as well.
    """
    hit = np.arange(WIDE) % 2 == 0

    def grads(t):
        return jnp.where((t == before) & hit, jnp.float32(100), jnp.float32(0.01))

    after = (1, 10, 100, 1000, 10_000)
    mu, nu, exact = np.zeros(2), np.zeros(2), {}
    for t in range(before + after[-1]):
        g = np.array([100.0 if t == before else 0.01, 0.01])
        mu, nu = 0.9 * mu + 0.1 * g, 0.999 * nu + 0.001 * g**2
        exact[t + 1] = mu, nu
    times = [before + t for t in after]
    for t, found in zip(times, means_at(how, grads, times), strict=True):
        for moment, expected in zip(found, exact[t], strict=True):
            np.testing.assert_allclose(
                [moment[hit].mean(), moment[~hit].mean()], expected, rtol=0.05, err_msg=str(t)
            )


STEPS = 2400


def courses():
    """The size of the gradient at every step, and the steps by which the updates must be those of
    float32 again.
    """
    t = np.arange(STEPS)
    grows = 1e-9 * 1.02 ** np.minimum(t, 2000.0)
    return {
        "up": (np.where(t < 1200, 1.0, 1e3), 1220),
        "down": (np.where(t < 1200, 1e3, 1.0), 1220),
        "down_and_up": (np.where((t > 1000) & (t < 1200), 1e-3, 1.0), 1220),
        "one_spike": (np.where(t == 1200, 1e3, 1.0), 1220),
        "grows": (grows, 20),
        "shrinks": (1e6 * 1.02 ** -np.minimum(t, 2000.0), 20),
        "pauses": (np.where((t >= 1200) & (t < 1300), 0.0, 1.0), 1320),
        "starts_late": (np.where(t < 1200, 0.0, 1.0), 1220),
        "large": (np.full(STEPS, 1e6), 20),
        "tiny": (np.full(STEPS, 1e-11), 20),
    }


@functools.cache
def together(how):
    """(sizes, gradients of size 1) -> of every step, the RMS and largest update of float32 and of
    `how`, and if all is finite.
    """
    pair = [aj.adam(1.0, eps=1e-20), aj.adam(1.0, eps=1e-20, storage=how)]

    @jax.jit
    def run(sizes, bank):
        def step(states, t):
            grad = sizes[t] * bank[t % len(bank)]
            made = [tx.update(grad, state) for tx, state in zip(pair, states, strict=True)]
            updates = jnp.stack([u for u, _ in made])
            states = [state for _, state in made]
            finite = [jnp.isfinite(leaf).all() for leaf in jax.tree.leaves((updates, states[1]))]
            return states, (
                jnp.sqrt(jnp.mean(updates**2, 1)),
                jnp.abs(updates).max(1),
                jnp.stack(finite).all(),
            )

        return jax.lax.scan(step, [tx.init(bank[0]) for tx in pair], jnp.arange(len(sizes)))[1]

    return run


@pytest.mark.parametrize("kind", ["constant", "normal"])
@pytest.mark.parametrize("course", courses())
@pytest.mark.parametrize("how", ["bfloat16", "8bit"])
def test_a_scale_that_moves(how, course, kind):
    sizes, back = courses()[course]
    bank = normals(37, WIDE) if kind == "normal" else jnp.ones((37, WIDE))
    rms, largest, finite = map(np.asarray, together(how)(jnp.asarray(sizes, jnp.float32), bank))
    assert finite.all()
    assert largest.max() <= 10
    known = rms[back:, 0] > 0
    # What a ν of eight bits remembers from long ago has wandered, and the mean of 1/√ν lies above
    # that of an exact one: 12 % after two thousand steps of decay, 10.5 % after one from whole
    # octaves.
    limit = 0.15 if how == "8bit" and course in ("shrinks", "one_spike") else 0.1
    np.testing.assert_allclose(rms[back:, 1][known], rms[back:, 0][known], rtol=limit)
    np.testing.assert_array_equal(rms[back:, 1][~known], 0)


@pytest.mark.parametrize("how", NARROW.values(), ids=NARROW)
def test_a_leaf_that_stays_zero_stays_zero(how):
    tx = aj.adam(0.1, storage=how)
    params = jnp.zeros(WIDE)
    state, step = tx.init(params), jax.jit(tx.update)
    for _ in range(30):
        updates, state = step(params, state)
        np.testing.assert_array_equal(updates, np.zeros(WIDE))
    assert not np.asarray(state[0].mu).any()
    assert not np.asarray(state[0].nu).any()


@pytest.mark.parametrize("then", [1.0, None], ids=["then_1", "then_the_same"])
@pytest.mark.parametrize("first", [1e7, 1e9, np.inf], ids="{:g}".format)
@pytest.mark.parametrize("how", ["bfloat16", "8bit"])
def test_a_huge_first_gradient_leaves_a_finite_state_and_bounded_steps(how, first, then):
    tx = aj.adam(1.0, storage=how)
    state, step = tx.init(jnp.zeros(WIDE)), jax.jit(tx.update)
    for t in range(30):
        updates, state = step(jnp.full(WIDE, first if t == 0 or then is None else then), state)
        assert np.isfinite(updates).all(), t
        assert np.abs(updates).max() <= 10, t


SPIKED = {
    "wide and codes": aj.adam(1.0, storage=("float32", "8bit")),
    "bfloat16 and codes": aj.adam(1.0, storage=("bfloat16", "8bit")),
    "bfloat16 and float16": aj.adam(1.0, storage=("bfloat16", storage.Float(jnp.float16))),
    "codes that start elsewhere": aj.yogi(1.0, storage="8bit"),
    "a slow mean": aj.ademamix(1.0, storage=("float32", "8bit")),
    "a maximum": aj.adamax(1.0, storage=("float32", "8bit")),
    "a block": aj.adam_mini(1.0, storage=("float32", storage.Codes(smallest=0))),
}
COURSES = np.array(
    [
        [1, 1, 1, 1e10, 1, 1],
        [1e10, 1, 1, 1, 1, 1],
        [1e-3, 1e-3, 1e-3, 1e4, 1, 1e-3],
        [1, 1e7, 1, 1, 1e8, 1],
    ]
)


def longest_steps(txs, dtype):
    """The longest step of each optimizer on each course of gradients, the same for all elements."""

    @functools.partial(jax.jit, compiler_options=QUICKLY)
    def run(courses):
        def follow(tx):
            def step(state, g):
                grads = jnp.full((32, 128), g, dtype)
                updates, state = tx.update(grads, state, jnp.ones_like(grads))
                return state, jnp.max(jnp.abs(updates))

            first = tx.init(jnp.ones((32, 128), dtype))
            return jax.lax.map(
                lambda course: jnp.max(jax.lax.scan(step, first, course)[1]), courses
            )

        return {name: follow(tx) for name, tx in txs.items()}

    return jax.device_get(run(COURSES))


def test_no_gradient_is_stored_in_mu_that_is_too_large_for_nu():
    """Else μ over the root of a ν that has saturated is a step of thousands of learning rates.

    Adam's bound is 7.3 of them.
    """
    for name, longest in longest_steps(SPIKED, jnp.float32).items():
        assert (longest < 10).all(), (name, longest)
    (longest,) = longest_steps({"complex": aj.adam(1.0, storage="8bit")}, jnp.complex64).values()
    assert (longest < 10).all(), longest


CODED_APART = {
    "axes": ((storage.Codes(axis=-2), "8bit"), (64, 128)),
    "leaf and rows": ((storage.Codes(axis=None), "8bit"), (64, 128)),
    "sizes": (("8bit", storage.Codes(smallest=0)), (16, 128)),
}


@pytest.mark.parametrize("name", CODED_APART)
def test_codes_of_mu_and_nu_that_do_not_share_scales_alike(name):
    """A row whose gradients grow ten billion times, among others that are as large already; then
    all of them.
    """
    how, shape = CODED_APART[name]
    tx, ones = aj.adam(1.0, storage=how), jnp.ones(shape)
    state, step = tx.init(ones), jax.jit(tx.update, compiler_options=QUICKLY)
    for grads in [ones.at[0].set(1e-10)] * 3 + [
        ones,
        ones.at[0].set(1e-10),
        ones * 1e10,
        ones,
        ones,
    ]:
        updates, state = step(grads, state)
        assert np.abs(updates).max() < 10


def test_no_gradient_of_float64_is_too_large_for_a_narrow_nu(x64):
    txs = {how: aj.adam(1.0, storage=how) for how in ("bfloat16", "8bit")}
    for dtype in (jnp.float64, jnp.complex128):
        tx_grads = np.array([1, 1e100, 1, 1])
        for how, tx in txs.items():
            params = jnp.ones((32, 128), dtype)
            state = tx.init(params)
            for g in tx_grads:
                updates, state = tx.update(jnp.full_like(params, g), state, params)
                assert float(jnp.max(jnp.abs(updates))) < 10, (how, dtype)


# A NaN is shown once by its own step; codes have none, so the element learns again.


def test_nan_is_stored_as_zero_in_codes_and_as_nan_in_floats():
    grads = jnp.ones(WIDE).at[5].set(jnp.nan)
    for how, lasts in (("8bit", False), ("bfloat16", True)):
        tx = aj.adam(1.0, storage=how)
        updates, state = tx.update(grads, tx.init(grads))
        assert np.isnan(updates[5])
        assert np.isfinite(np.delete(np.asarray(updates), 5)).all()
        updates, state = tx.update(jnp.ones(WIDE), state)
        assert np.isnan(updates[5]) == lasts
        assert np.isfinite(np.delete(np.asarray(updates), 5)).all()


# Members


def target(params, batch):
    return (
        jnp.mean((params["w"] - batch["w"]) ** 2) * 20
        + jnp.mean((params["b"] - batch["b"]) ** 2) * 3
    )


BATCHES = {"w": normals(50, 64, 72, seed=3) * 0.3 + 1, "b": normals(50, 7, seed=4) * 0.3 - 1}


@functools.cache
def trained(how):
    """Of each member -> (parameters, state, updates of the first step) after 50 jitted, scanned
    steps: one program for all.
    """
    txs = {name: getattr(aj, name)(0.01, storage=how) for name in aj.family.__all__}

    def run(tx):
        def step(carry, batch):
            params, state = carry
            updates, state = tx.update(jax.grad(target)(params, batch), state, params)
            return (optax.apply_updates(params, updates), state), updates

        carry, updates = jax.lax.scan(step, (mixed(), tx.init(mixed())), BATCHES)
        return *carry, jax.tree.map(lambda u: u[0], updates)

    return jax.jit(lambda: {name: run(tx) for name, tx in txs.items()}).lower().compile(QUICKLY)()


@pytest.mark.parametrize("how", ["bfloat16", "8bit"])
@pytest.mark.parametrize("member", aj.family.__all__)
def test_every_member_trains_as_with_float32_moments(member, how, agree):
    start = mixed()
    wide, narrow = (trained(its)[member] for its in ("float32", how))
    # Yogi's ν begins with a number that has to be narrowed itself.
    agree(narrow[2], wide[2], rtol=1e-6 if member != "yogi" else 0.05)
    for name, limit in (("w", 0.1 if how == "bfloat16" else 0.3), ("b", 1e-4)):
        moved = np.asarray(wide[0][name] - start[name])
        error = np.asarray(narrow[0][name] - wide[0][name])
        assert np.sqrt(np.mean(moved**2)) > 0.01
        assert np.sqrt(np.mean(error**2)) < limit * np.sqrt(np.mean(moved**2))
        assert abs(error.mean()) < 0.05 * np.abs(moved).mean()
    tx = getattr(aj, member)(0.01, storage=how)
    assert avals(narrow[1]) == avals(tx.init(start)) == avals(jax.eval_shape(tx.init, start))
    moments = {
        jax.tree_util.keystr(path): leaf.dtype
        for path, leaf in jax.tree_util.tree_leaves_with_path(narrow[1])
        if jnp.shape(leaf) == (64, 72)
    }
    assert len(moments) == moments_of(member)
    for path, dtype in moments.items():
        codes = jnp.int8 if ".mu" in path else jnp.uint8
        assert dtype == (jnp.bfloat16 if how == "bfloat16" else codes), path


def moments_of(member):
    return {"momentum": 1, "rmsprop": 1, "adam_mini": 1, "amsgrad": 3, "ademamix": 3}.get(member, 2)


def test_storage_is_keyword_only_and_float32_by_default(member):
    for make in (member, aj.track_moments, aj.stages.keep_maximum, aj.stages.mix_slow_mean):
        parameter = inspect.signature(make).parameters["storage"]
        assert parameter.kind is inspect.Parameter.KEYWORD_ONLY
        assert parameter.default == "float32"
    start = mixed()
    same(member(0.1, storage="float32").init(start), member(0.1).init(start))


# The choice


@pytest.mark.parametrize(
    "dtype",
    [jnp.bfloat16, "float16", np.float32, jnp.float8_e4m3fn, jnp.dtype("float8_e5m2")],
    ids=repr,
)
def test_mu_dtype_and_nu_dtype_narrow_leaves_of_any_size(dtype):
    params = {"w": normals(4, 3), "b": normals(7), "empty": jnp.zeros((0, 3))}
    for name, other in (("mu", "nu"), ("nu", "mu")):
        tx = aj.track_moments(**{f"{name}_dtype": dtype})
        state = tx.init(params)
        expected = avals(state)
        assert {leaf.dtype for leaf in jax.tree.leaves(getattr(state, name))} == {jnp.dtype(dtype)}
        assert {leaf.dtype for leaf in jax.tree.leaves(getattr(state, other))} == {
            jnp.dtype(jnp.float32)
        }
        state = jax.jit(tx.update)(params, state)[1]
        assert avals(state) == expected
        np.testing.assert_allclose(
            state.mu["w"].astype(jnp.float32), 0.1 * params["w"], rtol=0.3, atol=0.01
        )


@pytest.mark.parametrize(
    "options",
    [{"mu_dtype": jnp.bfloat16}, {"storage": storage.Codes(smallest=0)}],
    ids=["float", "codes"],
)
@pytest.mark.parametrize("shape", [(), (1,), (3, 0)], ids=str)
def test_the_smallest_leaves_are_narrowed_where_it_is_asked_for(shape, options):
    tx = aj.adam(0.1, **options)
    state, step = tx.init(jnp.ones(shape)), jax.jit(tx.update)
    for _ in range(2):
        updates, state = step(jnp.ones(shape), state)
        assert state[0].mu.shape == shape
        assert state[0].mu.dtype != jnp.float32
        np.testing.assert_allclose(updates, np.full(shape, -0.1), rtol=0.5)


@pytest.mark.parametrize(
    "form",
    [storage.Codes(smallest=8), storage.Float(jnp.bfloat16, smallest=8)],
    ids=["codes", "float"],
)
def test_smallest_is_the_smallest_that_is_narrowed(form):
    state = aj.adam(0.1, storage=form).init([jnp.ones(7), jnp.ones(8), jnp.ones((2, 4))])[0]
    assert [leaf.dtype == jnp.float32 for leaf in state.mu] == [True, False, False]


def test_a_pair_is_for_mu_and_for_nu_and_for_what_is_like_them():
    params = jnp.ones(WIDE)
    amsgrad = aj.amsgrad(0.1, storage=("bfloat16", "8bit")).init(params)
    assert (amsgrad[0].mu.dtype, amsgrad[0].nu.dtype, amsgrad[2].nu_max.dtype) == (
        jnp.bfloat16,
        jnp.uint8,
        jnp.uint8,
    )
    mixing = aj.ademamix(0.1, storage=("8bit", "float32")).init(params)
    assert (mixing[0].mu.dtype, mixing[0].nu.dtype, mixing[2].mu_slow.dtype) == (
        jnp.int8,
        jnp.float32,
        jnp.int8,
    )
    adopt = aj.adopt(0.1, storage=("bfloat16", "8bit")).init(params)
    assert (adopt[0].nu.dtype, adopt[3].mu.dtype) == (jnp.uint8, jnp.bfloat16)
    both = aj.amsgrad(0.1, mu_dtype=jnp.bfloat16, nu_dtype=jnp.float16).init(params)
    assert (both[0].mu.dtype, both[0].nu.dtype, both[2].nu_max.dtype) == (
        jnp.bfloat16,
        jnp.float16,
        jnp.float16,
    )
    beside = aj.ademamix(0.1, mu_dtype=jnp.bfloat16, storage=("float32", "8bit")).init(params)
    assert (beside[0].mu.dtype, beside[0].nu.dtype, beside[2].mu_slow.dtype) == (
        jnp.bfloat16,
        jnp.uint8,
        jnp.bfloat16,
    )


def test_yogi_starts_where_it_says_in_codes_too():
    state = aj.yogi(0.1, storage="8bit", initial_accumulator_value=1e-6).init(jnp.ones(WIDE))[0]
    nu = MomentSlot("nu", storage.Codes(), signed=False).widen(state.nu, state.scales)
    np.testing.assert_allclose(nu, np.full(WIDE, 1e-6), rtol=1 / 16)


# Where a state goes

GOES = {"bfloat16": "bfloat16", "8bit": "8bit"}


@pytest.mark.parametrize("how", GOES)
def test_vmap_over_states(how):
    """Each model has the bits it would have alone: they are of its own array."""
    tx = aj.adamw(0.1, storage=how)
    models = jax.tree.map(lambda p: jnp.stack([p, 1e4 * p, -p]), mixed())

    def walk(params):
        def step(carry, i):
            params, state = carry
            updates, state = tx.update(jax.tree.map(lambda p: p * (1 + i), params), state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), jnp.arange(4.0))[0]

    batched = jax.jit(jax.vmap(walk))(models)
    alone = jax.jit(walk)
    for i in range(3):
        one = alone(jax.tree.map(lambda p, i=i: p[i], models))
        found = jax.tree.map(lambda p, i=i: p[i], batched)
        assert avals(found) == avals(one)
        for left, right in zip(jax.tree.leaves(found), jax.tree.leaves(one), strict=True):
            # Two compilations differ in a last bit, and so here and there in a rounding.
            close = np.isclose(
                np.asarray(left, np.float64), np.asarray(right, np.float64), rtol=1e-4, atol=1e-6
            )
            assert np.mean(~close) < 0.01


@pytest.mark.parametrize("how", GOES)
def test_donation_device_put_and_tree_map(how):
    tx, params = aj.amsgrad(0.1, storage=how), mixed()
    keeping, giving = jax.jit(tx.update), jax.jit(tx.update, donate_argnums=1)
    state = other = tx.init(params)
    for _ in range(3):
        _, state = keeping(params, state)
        other = jax.tree.map(jnp.copy, jax.device_put(other, jax.devices()[0]))
        given = [leaf for leaf in jax.tree.leaves(other) if jnp.ndim(leaf) == 2 and leaf.size > 4]
        _, other = giving(params, other)
        assert len(given) == 3
        assert all(leaf.is_deleted() for leaf in given)
    same(other, state)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state))


@pytest.mark.parametrize("how", GOES)
# Orbax of JAX 0.6's time warns that it takes the sharding from the checkpoint, as the template has
# none.
@pytest.mark.filterwarnings("ignore:Sharding info not provided when restoring:UserWarning")
def test_a_run_goes_on_from_a_checkpoint(how, tmp_path):
    orbax = pytest.importorskip("orbax.checkpoint")
    tx, params = aj.adam(0.1, storage=how), mixed()
    step = jax.jit(tx.update)
    state = tx.init(params)
    for _ in range(3):
        _, state = step(params, state)
    with orbax.StandardCheckpointer() as saver:
        saver.save(tmp_path / "state", state)
        saver.wait_until_finished()
        restored = saver.restore(tmp_path / "state", jax.eval_shape(tx.init, params))
    same(restored, state)
    same(step(params, restored), step(params, state))


WRAPPERS = {
    "chain": lambda tx: optax.chain(optax.clip_by_global_norm(1.0), tx, optax.scale(0.5)),
    "masked": lambda tx: optax.masked(tx, {"w": True, "b": False}),
    "partition": lambda tx: optax.partition(
        {"in": tx, "out": optax.sgd(0.01)}, {"w": "in", "b": "out"}
    ),
    "multi_transform": lambda tx: optax.multi_transform(
        {0: tx, 1: optax.chain(tx, optax.scale(0.5))}, {"w": 0, "b": 1}
    ),
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 2),
}


@pytest.mark.parametrize("name", WRAPPERS)
# Optax before 0.2.6 warns of itself, under a JAX of its time.
@pytest.mark.filterwarnings("ignore:unzip2 was deprecated:DeprecationWarning")
def test_under_optax_wrappers(name, train, standard_promotion):
    batches = jax.tree.map(lambda b: b[:20], BATCHES)
    both = (
        WRAPPERS[name](aj.adamw(0.01, storage=how)) for how in ("float32", ("bfloat16", "8bit"))
    )
    wide, narrow = (train(tx, mixed(), batches, target) for tx in both)
    moved = np.asarray(wide[0]["w"] - mixed()["w"])
    error = np.asarray(narrow[0]["w"] - wide[0]["w"])
    assert 0 < np.sqrt(np.mean(error**2)) < 0.2 * np.sqrt(np.mean(moved**2))
    np.testing.assert_allclose(narrow[0]["b"], wide[0]["b"], rtol=1e-4)
    assert [
        leaf.dtype
        for leaf in jax.tree.leaves(narrow[1])
        if jnp.ndim(leaf) == 2 and leaf.dtype.itemsize < 4
    ][:2] == [
        jnp.bfloat16,
        jnp.uint8,
    ]


def test_inject_hyperparams(train, standard_promotion):
    how = ("bfloat16", "8bit")
    batches = jax.tree.map(lambda b: b[:20], BATCHES)
    tx = optax.inject_hyperparams(aj.adam, static_args=("storage",))(
        optax.constant_schedule(0.01), storage=how
    )
    found, state = train(tx, mixed(), batches, target)
    plain = train(aj.adam(0.01, storage=how), mixed(), batches, target)[0]
    assert (state.inner_state[0].mu["w"].dtype, state.inner_state[0].nu["w"].dtype) == (
        jnp.bfloat16,
        jnp.uint8,
    )
    for name in ("w", "b"):
        assert np.mean(~np.isclose(found[name], plain[name], rtol=1e-4, atol=1e-6)) < 0.01


@pytest.mark.parametrize("name", ["mu", "nu"])
def test_tree_get_finds_a_resting_moment(name):
    found = optax.tree.get(aj.adam(0.1, storage="8bit").init(mixed()), name)
    assert avals(found)["w"][:2] == ((64, 72), jnp.int8 if name == "mu" else jnp.uint8)


def test_map_params_maps_resting_moments_and_nothing_else():
    tx = aj.adam(0.1, storage="8bit")
    state = tx.init(mixed())
    mapped = optax.tree.map_params(tx, lambda leaf: leaf + jnp.ones((), leaf.dtype), state)
    for (path, leaf), before in zip(
        jax.tree_util.tree_leaves_with_path(mapped), jax.tree.leaves(state), strict=True
    ):
        moment = ".mu" in jax.tree_util.keystr(path) or ".nu" in jax.tree_util.keystr(path)
        np.testing.assert_array_equal(leaf, before + np.asarray(moment, before.dtype))


@pytest.mark.parametrize("how", [*GOES, "float32"])
def test_double_precision_parameters(how, x64):
    params = {
        "w": jnp.ones((64, 72), jnp.float64),
        "v": jnp.ones((64, 72), jnp.float32),
        "b": jnp.ones(7, jnp.float64),
    }
    tx = aj.adam(0.1, storage=how)
    state, step = tx.init(params), jax.jit(tx.update)
    expected = avals(state)
    rests = {
        "bfloat16": [jnp.bfloat16] * 2,
        "8bit": [jnp.int8] * 2,
        "float32": [jnp.float64, jnp.float32],
    }[how]
    assert [state[0].mu[key].dtype for key in "wv"] == rests
    assert state[0].mu["b"].dtype == jnp.float64
    for i in range(4):
        updates, state = step(params, state)
        assert avals(state) == expected
        assert jax.tree.map(jnp.result_type, updates) == jax.tree.map(jnp.result_type, params)
        np.testing.assert_allclose(
            np.mean(updates["w"]), -0.1, rtol=1e-7 if i == 0 or how == "float32" else 0.1
        )


def test_a_float32_rest_of_double_precision_is_asked_for_by_its_dtype(x64):
    tx = aj.adam(0.1, mu_dtype=jnp.float32, nu_dtype=jnp.float32)
    params = jnp.ones(3, jnp.float64)
    state = tx.init(params)
    for _ in range(3):
        updates, state = tx.update(params, state)
        assert state[0].mu.dtype == state[0].nu.dtype == jnp.float32
        assert updates.dtype == jnp.float64
        np.testing.assert_allclose(updates, np.full(3, -0.1), rtol=1e-5)


@pytest.mark.parametrize("how", GOES)
def test_complex_and_integer_leaves(how):
    """A complex μ stays; its ν is real, and narrow.

    An integer leaf has no moments, and moves no other leaf's bits.
    """
    params = {"c": jax.lax.complex(normals(64, 72), normals(64, 72)), "w": normals(64, 72)}
    grads = params | {"i": np.zeros(3, jax.dtypes.float0)}
    tx = aj.adam(0.1, storage=how)
    state = tx.init(params | {"i": jnp.arange(3)})
    plain = tx.init(params)
    expected = avals(state)
    for _ in range(2):
        updates, state = tx.update(grads, state, params | {"i": jnp.arange(3)})
        _, plain = tx.update(params, plain, params)
        assert avals(state) == expected
    assert state[0].mu["c"].dtype == jnp.complex64
    assert state[0].nu["c"].dtype == (jnp.bfloat16 if how == "bfloat16" else jnp.uint8)
    assert state[0].mu["i"] is None
    np.testing.assert_array_equal(updates["i"], np.zeros(3))
    np.testing.assert_allclose(np.mean(np.abs(updates["c"])), 0.1, rtol=0.1)
    same((state[0].mu["w"], state[0].nu["w"]), (plain[0].mu["w"], plain[0].nu["w"]))


@pytest.mark.parametrize(
    ("how", "dtype"), [("8bit", jnp.bfloat16), ("bfloat16", jnp.float16)], ids=["8bit", "bfloat16"]
)
def test_half_precision_parameters(how, dtype):
    params = normals(WIDE).astype(dtype)
    wide = params.astype(jnp.float32)
    tx = aj.adam(0.1, storage=how)
    state, other, step = tx.init(params), tx.init(wide), jax.jit(tx.update)
    for _ in range(3):
        updates, state = step(params, state)
        exact, other = step(wide, other)
        assert updates.dtype == dtype
        assert np.mean(np.asarray(updates) == np.asarray(exact.astype(dtype))) > 0.99
    assert avals(state) == avals(other)


def test_blocks_share_a_nu_that_rests_narrow_too():
    tx = aj.adam_mini(0.1, storage=storage.Codes(smallest=64))
    params = {"w": normals(8, 64), "v": normals(8, 63)}
    state = tx.init(params)
    step = jax.jit(tx.update)
    for _ in range(3):
        updates, state = step(params, state, params)
    assert {k: (v.shape, v.dtype) for k, v in state[0].nu.items()} == {
        "w": ((1, 64), jnp.uint8),
        "v": ((1, 63), jnp.float32),
    }
    assert all(np.isfinite(u).all() for u in updates.values())


# Derivatives


def end_of_a_run(tx):
    """The mean of a parameter after three steps, of which each gradient depends on the
    parameter.
    """
    params = jnp.ones((64, 128))
    state = tx.init(params)
    for t in range(3):
        updates, state = tx.update(params * (t - 0.5), state, params)
        params = params + updates
    return params.mean()


WAYS = {
    "grad": jax.grad,
    "jacfwd": jax.jacfwd,
    "jit": lambda f: jax.grad(jax.jit(f)),
    "vmap": lambda f: lambda x: jax.vmap(jax.grad(f))(jnp.stack([x, x])),
    "scan": lambda f: jax.grad(
        lambda x: jax.lax.scan(lambda c, _: (c + f(x), None), 0.0, None, length=2)[0]
    ),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "options", [{"storage": "8bit"}, {"storage": "bfloat16"}, {"mu_dtype": "bfloat16"}], ids=str
)
def test_a_derivative_through_stored_moments_is_refused(options, way):
    with refused(
        ValueError,
        "storage: found a derivative",
        "through mu",
        "rounding has no derivative",
        'storage="float32"',
    ):
        jax.eval_shape(WAYS[way](lambda b1: end_of_a_run(aj.adam(1e-2, b1=b1, **options))), 0.9)


def test_a_derivative_through_a_nu_and_through_a_conversion_is_refused():
    with refused(ValueError, "storage: found a derivative", "through nu"):
        jax.eval_shape(
            jax.grad(lambda b2: end_of_a_run(aj.adam(1e-2, b2=b2, storage=("float32", "8bit")))),
            0.99,
        )
    params = {"w": normals(64, 128)}
    wide, narrow = aj.adam(1e-2), aj.adam(1e-2, storage="bfloat16")

    def converted(grads):
        state = aj.convert_state(
            wide.update(grads, wide.init(params))[1], wide, narrow, params
        ).state
        return state[0].mu["w"].astype(jnp.float32).mean()

    with refused(ValueError, "storage: found a derivative", "through a moment"):
        jax.eval_shape(jax.grad(converted), params)


def test_a_derivative_through_float32_moments_is_the_difference_quotient():
    end = jax.jit(lambda b1: end_of_a_run(aj.adam(1e-2, b1=b1)))
    slope = jax.jit(jax.grad(end))(0.9)
    np.testing.assert_allclose(slope, (end(0.901) - end(0.899)) / 0.002, rtol=0.02)
    assert slope > 0.01


def test_training_is_no_derivative_of_the_optimizer(standard_promotion):
    """Gradients of a loss inside a scan, and a derivative that does not depend on the steps beside
    it.
    """
    tx = aj.chain(aj.adam(1e-2, storage="8bit"), aj.round_stochastically())

    def trained(scale):
        def step(carry, _):
            params, state = carry
            loss, grads = jax.value_and_grad(lambda p: (p.astype(jnp.float32) ** 2).sum())(params)
            updates, state = tx.update(grads, state, params)
            return (aj.apply_updates(params, updates), state), loss

        params = jnp.ones((64, 128), jnp.bfloat16)
        return scale * jax.lax.scan(step, (params, tx.init(params)), None, length=2)[1].sum()

    assert jax.eval_shape(jax.grad(trained), 1.0).shape == ()


# Refused


@pytest.mark.parametrize(
    "value", ["int8", "BFLOAT16", None, 8, ["8bit", "8bit"], jnp.bfloat16, storage.Codes], ids=str
)
def test_what_is_no_storage(member, value):
    shown = f"found {value!r}" if not isinstance(value, type) else "found"
    with refused(
        ValueError,
        "storage: ",
        shown,
        "expected 'float32', 'bfloat16', '8bit'",
        "storage.Codes",
        "tuple of two",
    ):
        member(0.1, storage=value)


def test_a_pair_with_a_wrong_member():
    with refused(ValueError, "storage: found '9bit'", "expected 'float32'"):
        aj.adam(0.1, storage=("8bit", "9bit"))


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_pair_that_is_none(count):
    with refused(
        ValueError, f"storage: found a tuple of {count}", "a tuple of two (for mu, for nu)"
    ):
        aj.adam(0.1, storage=("8bit",) * count)


@pytest.mark.parametrize("value", [jnp.int8, "complex64", bool, "nonsense", 3.5], ids=str)
def test_a_dtype_that_is_not_floating(value):
    # Optax takes the dtype of complex moments, which stay what they are.
    for name in ("mu_dtype", "nu_dtype") if value != "complex64" else ():
        with refused(
            ValueError, f"{name}: found {value!r}", "expected a floating dtype such as jnp.bfloat16"
        ):
            aj.adam(0.1, **{name: value})
    with refused(ValueError, f"storage.Float: dtype: found {value!r}", "expected a floating dtype"):
        storage.Float(value)


def test_a_dtype_without_a_zero():
    with refused(ValueError, "mu_dtype: found", "without a zero", "expected one such as"):
        aj.adam(0.1, mu_dtype=jnp.float8_e8m0fnu)


@pytest.mark.parametrize("make", [storage.Codes, storage.Float], ids=["Codes", "Float"])
def test_settings_of_a_storage(make):
    name = f"storage.{make.__name__}"
    for value in ("up", None, True):
        with refused(
            ValueError,
            f"{name}: rounding: found {value!r}",
            "expected one of 'stochastic', 'nearest'",
        ):
            make(rounding=value)
    for value in (1.0, "1", None, True, np.float32(2)):
        with refused(TypeError, f"{name}: smallest: found {value!r}", "expected an integer"):
            make(smallest=value)


@pytest.mark.parametrize("name", ["mu_dtype", "nu_dtype"])
@pytest.mark.parametrize("how", ["bfloat16", "8bit"])
def test_a_dtype_beside_a_storage(name, how):
    with refused(
        ValueError, f"found both {name}=", "bfloat16", f"storage={how!r}", "expected one of them"
    ):
        aj.adam(0.1, storage=how, **{name: jnp.bfloat16})


@pytest.mark.parametrize("how", ["8bit", "bfloat16", storage.Codes(), ("float32", "8bit")], ids=str)
def test_centered_with_a_narrow_storage(how):
    with refused(
        ValueError, "rmsprop: found centered=True", f"storage={how!r}", "expected storage='float32'"
    ):
        aj.rmsprop(0.1, centered=True, storage=how)


FORMS = {
    "float32": "float32",
    "bfloat16": "bfloat16",
    "float16": storage.Float(jnp.float16),
    "8bit": "8bit",
}


@pytest.mark.parametrize(("there", "here"), list(itertools.permutations(FORMS, 2)))
def test_a_state_of_another_storage(there, here):
    params = normals(WIDE)
    state = aj.adam(0.1, storage=FORMS[there]).init(params)
    form = resolve_storage(FORMS[here])[0]
    with refused(
        ValueError,
        "the state's mu of shape (4096,) rests as",
        state[0].mu.dtype.name,
        str(form),
        "`init`",
    ):
        aj.adam(0.1, storage=FORMS[here]).update(params, state)


@pytest.mark.parametrize(("there", "here"), [(-1, -2), (-2, -1), (-1, None), (-2, None)], ids=str)
def test_a_state_whose_scales_are_shared_otherwise(there, here):
    params = {"w": normals(64, 128)}
    state = aj.adam(0.1, storage=storage.Codes(axis=there)).init(params)
    with refused(
        ValueError,
        "the state's mu at 'w' of shape (64, 128) has scales of shape",
        f"axis={here}",
        "`init`",
    ):
        aj.adam(0.1, storage=storage.Codes(axis=here)).update(params, state)


def test_a_state_without_scales():
    """As of version 0.1.0, which kept them in one array, or of parameters with other names."""
    params = {"w": normals(64, 128)}
    tx = aj.adam(0.1, storage="8bit")
    first, *rest = tx.init(params)
    for scales in (
        {},
        {"mu_scale": jnp.zeros((1, 2), jnp.int16)},
        {"mu_scale": {"v": first.scales["mu_scale"]["w"]}},
    ):
        with refused(
            ValueError, "the state has no scale for the mu at 'w'", "Codes(rounding=", "`init`"
        ):
            tx.update(params, (first._replace(scales=scales), *rest))


@pytest.mark.parametrize("value", [0, 1, -3, "rows", True, 1.0], ids=repr)
def test_an_axis_that_is_none(value):
    with refused(ValueError, f"storage.Codes: axis: found {value!r}", "expected -1, -2 or None"):
        storage.Codes(axis=value)


@pytest.mark.parametrize("how", ["8bit", "bfloat16"])
def test_a_state_whose_small_leaves_rest_wide(how):
    params, form = normals(9), resolve_storage(how)[0]
    eager = type(form)(**{**vars(form), "smallest": 0})
    with refused(ValueError, "the state's mu of shape (9,) rests as", str(eager)):
        aj.adam(0.1, storage=eager).update(params, aj.adam(0.1, storage=form).init(params))


@pytest.mark.parametrize("how", ["8bit", "bfloat16"])
def test_a_state_whose_small_leaves_rest_narrow_is_taken_as_it_is(how):
    """`jax.shard_map` shows parts of a leaf, which may be smaller than a leaf that is narrowed."""
    params, form = normals(9), resolve_storage(how)[0]
    eager = type(form)(**{**vars(form), "smallest": 0})
    state = aj.adam(0.1, storage=eager).init(params)
    same(
        aj.adam(0.1, storage=form).update(params, state),
        aj.adam(0.1, storage=eager).update(params, state),
    )


# Values

VALUES = [
    "float32",
    "bfloat16",
    "8bit",
    ("bfloat16", "8bit"),
    storage.Codes(rounding="nearest", seed=3, smallest=0),
    storage.Float("float16", seed=2),
]


@pytest.mark.parametrize("how", VALUES, ids=range(len(VALUES)))
def test_transformations_with_a_storage_are_values(how):
    tx = aj.adamw(0.1, storage=how)
    again = aj.adamw(0.1, storage=pickle.loads(pickle.dumps(how)))
    assert tx == again
    assert hash(tx) == hash(again)
    thawed = pickle.loads(pickle.dumps(tx))
    assert thawed == tx
    assert repr(thawed) == repr(tx)
    assert (repr(how) in repr(tx)) == (how != "float32")
    others = [aj.adamw(0.1, storage=other) for other in VALUES if other is not how]
    assert all(tx != other for other in others)
    same(thawed.init(mixed()), tx.init(mixed()))


def test_settings_tell_storages_apart_and_spellings_of_a_dtype_do_not():
    assert (
        storage.Float("bfloat16")
        == storage.Float(jnp.bfloat16)
        == storage.Float(jnp.dtype(jnp.bfloat16))
    )
    assert hash(storage.Float("bfloat16")) == hash(storage.Float(jnp.bfloat16))
    forms = [storage.Codes(), storage.Codes(seed=1), storage.Codes(rounding="nearest")]
    forms += [
        storage.Codes(smallest=1),
        storage.Float(),
        storage.Float("float16"),
        storage.Float("float16", seed=1),
    ]
    assert len({aj.adam(0.1, storage=form) for form in forms}) == len(set(forms)) == len(forms)
    for form in forms:
        assert (
            eval(repr(form), {"Codes": storage.Codes, "Float": storage.Float, "dtype": np.dtype})
            == form
        )


def test_every_spelling_of_a_storage_makes_an_equal_transformation():
    spellings = {
        "8bit": storage.Codes(),
        "bfloat16": storage.Float(jnp.bfloat16),
        "float32": storage.Float(),
    }
    for make in (aj.adam, aj.amsgrad, aj.ademamix):
        for name, form in spellings.items():
            assert make(0.1, storage=form) == make(0.1, storage=name)
            assert hash(make(0.1, storage=form)) == hash(make(0.1, storage=name))
            assert make(0.1, storage=(form, "8bit")) == make(0.1, storage=(name, "8bit"))
        assert make(0.1, storage=storage.Codes(seed=1)) != make(0.1, storage="8bit")
    numpys = storage.Codes(axis=np.int64(-2), smallest=np.int64(9), seed=np.uint32(3))
    assert repr(numpys) == repr(storage.Codes(axis=-2, smallest=9, seed=3))


def test_an_equal_storage_does_not_retrace():
    traces = []

    @functools.partial(jax.jit, static_argnums=0)
    def step(tx, grads, state):
        traces.append(tx)
        return tx.update(grads, state)

    params = normals(WIDE)
    for _ in range(3):
        tx = aj.adam(0.1, storage=storage.Codes(seed=4))
        step(tx, params, tx.init(params))
    assert len(traces) == 1


@pytest.mark.parametrize("dtype", [name for name in FLOATS if name != "bfloat16"])
def test_a_positive_nu_stays_positive_in_a_float_of_a_small_range(dtype):
    """Or its next update would have no denominator: gradients of 1e-5 square to less than float16's
    smallest number.
    """
    tx = aj.adam(1.0, nu_dtype=jnp.dtype(dtype))
    state, step = tx.init(jnp.zeros(WIDE)), jax.jit(tx.update)
    for seed in range(20):
        updates, state = step(1e-5 * normals(WIDE, seed=seed), state)
        assert np.abs(updates).max() <= 1.5
    assert (np.asarray(state[0].nu, np.float32) > 0).all()


def test_a_negative_size():
    with refused(ValueError, "storage.Codes: smallest: found -1", "expected 0 or more"):
        storage.Codes(smallest=-1)
