"""Numbers narrowed to codes and floats of few bits and read back; the table of what the codes stand
for.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adam_jax.storage.codec import HALF, Codec, to_float
from adam_jax.storage.scales import UNKNOWN

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


def grid(dtype):
    """The numbers from 0 on that a dtype has and float32 keeps: below 2⁻¹²⁶ a CPU knows none."""
    bits = np.arange(2 ** (jnp.finfo(dtype).bits - 1)).astype(f"uint{jnp.finfo(dtype).bits}")
    with np.errstate(invalid="ignore"):
        values = bits.view(dtype).astype(np.float64)
    values = values[np.isfinite(values)]
    return np.sort(values[(values == 0) | (values >= 2.0**-126)])
