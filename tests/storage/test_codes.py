"""What the codes of 8-bit moments stand for, and what becomes of zero, NaN, and numbers outside of
the table.

The oracle is the table of codes, written out in float64.
"""

import numpy as np
import pytest
from helpers import same
from narrowing import CODECS, GRIDS, PER_OCTAVE, narrowed, next_unit, table, widened

from adam_jax.storage.scales import UNKNOWN

OPTIMIZED = True  # it computes for longer than it compiles


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
