"""The random bits of storage and rounding: they never change, are even, and no two positions share
them.

The oracles are the hash in Python's integers, and statistics of noise.
"""

import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import adam_jax as aj
from adam_jax import storage
from adam_jax.storage.random_bits import StepBits, position, rotate

OPTIMIZED = True  # it computes for longer than it compiles


def draws(stream="track_moments 0", path="w", seed=0, count=1, shape=(512, 513)):
    return np.asarray(StepBits(stream, jnp.int32(count)).of(path, shape, seed))


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
