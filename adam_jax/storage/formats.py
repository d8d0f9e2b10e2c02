"""The formats in which a moment is stored between two steps.

`Float` for floats of a dtype, `Codes` for codes of 8 bits.
"""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any, Literal, TypeAlias

import jax.numpy as jnp
import numpy as np
from jax import Array

from adam_jax._core.errors import brief
from adam_jax._core.leaves import as_wide, finfo
from adam_jax.storage.codec import Codec, to_float
from adam_jax.storage.format import Format
from adam_jax.storage.scales import largest_along, pack, row_shape, unpack


@dataclasses.dataclass(frozen=True)
class Float(Format):
    """Moments rest as floats of a dtype.

    Infinities and what is too large saturate at its largest number, NaN stays.

    A dtype of a small range, float16 or one of 8 bits, suits μ better than ν: below its smallest
    number a positive ν is stored as that, so that no update loses its denominator, and steps there
    are too short.

    Attributes:
      dtype: a floating dtype; `None` for the one that a leaf is computed in, float32 or wider.
      rounding: as in `Format`.
      seed: as in `Format`.
      smallest: as in `Format`.

    Raises:
      ValueError: for a dtype that is not floating, has no zero or less than 8 bits, an unknown
        rounding, or a negative size.
      TypeError: if `seed` or `smallest` is no integer.
    """

    dtype: Any = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", _floating(self.dtype, "storage.Float: dtype"))
        super().__post_init__()

    def why_wide(self, shape: tuple[int, ...], dtype: Any) -> str | None:
        """Why a moment of that shape and computing dtype is stored as it is computed, or `None`."""
        if self.dtype is None:
            return "storage is float32"
        if (why := super().why_wide(shape, dtype)) is not None:
            return why
        held = finfo(self.dtype).bits >= finfo(dtype).bits
        return "no wider than that already" if held else None

    def dtype_of(self, signed: bool) -> Any:
        """The dtype."""
        return self.dtype

    def store(self, x: Array, scale: Any, random: Any, signed: bool) -> Array:
        """Returns numbers rounded to the dtype."""
        return to_float(x, self.dtype, random, positive=not signed)

    def read(self, stored: Array, scale: Any, signed: bool) -> Array:
        """Returns numbers in float32."""
        return as_wide(stored)


@dataclasses.dataclass(frozen=True)
class Codes(Format):
    """Stores moments as integers that count in ratios.

    Relative to a power of two that each row of a leaf has.

    A code has 8 bits. It is a small float: below 1 unit eight equal steps (they count as an
    octave), then eight steps an octave, and where those end, for elements that suddenly outgrow the
    row, one step an octave. The unit of a step follows from the largest code of the step before,
    with an octave to spare, so that encoding needs no second look at the moments. Before there is a
    largest code, at the first step or in a row that has been all zero, all codes are whole octaves,
    127 of them.

    A row is what lies along the last axis. Rows of fewer than 128 elements are taken together,
    along the axes before the last, until there are 128 or the leaf ends: a kernel of shape (768,
    12, 64) has 768 scales, one of (3, 3, 64, 64) has 9, and a vector has one. Scales are int16
    arrays with the leaf's number of axes, of size 1 along those that share: they broadcast against
    their leaf and are sharded as it is.

    =========  =====  ============  =================  ==============  =======================
    moment     dtype  fine octaves  below the largest  coarse octaves  below the smallest code
    =========  =====  ============  =================  ==============  =======================
    μ, signed  int8   14            2⁻¹⁴               15              0 or that code
    ν, ≥ 0     uint8  28            2⁻²⁸, √ν 2⁻¹⁴      31              that code; 0 stays 0
    =========  =====  ============  =================  ==============  =======================

    A step is 1/8 of the power of two below it. A positive ν never becomes 0, so that no update
    loses its denominator: what is smaller than the smallest code is stored as it. NaN is stored as
    0.

    Attributes:
      rounding: as in `Format`.
      seed: as in `Format`.
      smallest: as in `Format`.
      axis: the axis along which elements share a scale: -1, or -2 where the columns of a matrix
        differ more than its rows, as those of an output layer of shape (features, vocabulary) do;
        `None` for one scale per leaf.

    Raises:
      ValueError: for an unknown rounding, another axis, or a negative size.
      TypeError: if `seed` or `smallest` is no integer.
    """

    axis: int | None = -1

    def __post_init__(self) -> None:
        if self.axis is not None:
            if not isinstance(self.axis, (int, np.integer)) or self.axis not in (-1, -2):
                raise ValueError(
                    f"storage.Codes: axis: found {self.axis!r}; expected -1, -2 or None."
                )
            object.__setattr__(self, "axis", int(self.axis))
        super().__post_init__()

    def dtype_of(self, signed: bool) -> Any:
        """int8, or uint8 without a sign."""
        return Codec(signed).dtype

    def store(self, x: Array, scale: Any, random: Any, signed: bool) -> Array:
        """Returns codes of numbers."""
        if x.dtype != np.float32:
            # What float64 holds beyond float32 saturates, with two octaves to spare: a code of
            # infinity would be NaN a step later.
            x = jnp.clip(x, -(2.0**125), 2.0**125).astype(np.float32)
        return Codec(signed).narrow(x, unpack(scale)[1], random)

    def read(self, stored: Array, scale: Any, signed: bool) -> Array:
        """Returns what codes stand for."""
        return Codec(signed).widen(stored, unpack(scale)[0])

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...] | None:
        """The shape of the scales of a leaf's codes: 1 along the axes that share one."""
        return row_shape(shape, self.axis)

    def first_scale(self, start: float, signed: bool) -> Any:
        """Returns the scale for codes of a number that is known beforehand."""
        return pack(*2 * (Codec(signed).first_exponent(start),))

    def next_scale(self, stored: Array, scale: Any, signed: bool) -> Any:
        """Returns the unit that codes were made with, and the one for the next step."""
        unit = unpack(scale)[1]
        return pack(unit, Codec(signed).next_exponent(stored, unit))

    def fitting_scale(self, x: Array, like: Any, signed: bool) -> Any:
        """Returns the scale in which the largest number of a row has a fine code."""
        unit = Codec(signed).exponent(largest_along(jnp.where(jnp.isnan(x), 0, jnp.abs(x)), like))
        return pack(unit, unit)

    def largest(self, scale: Any, signed: bool) -> Array:
        """The largest number that codes of each row can stand for."""
        return Codec(signed).top(unpack(scale)[1])

    def saturates_with(self, other: Format) -> bool:
        """Both are codes, and the same elements share their scales."""
        return isinstance(other, Codes) and other.axis == self.axis


def _floating(dtype: Any, name: str) -> Any:
    if dtype is None:
        return None
    try:
        found = jnp.dtype(dtype)
    except TypeError:
        found = None
    if found is None or not jnp.issubdtype(found, jnp.floating):
        raise ValueError(
            f"{name}: found {dtype!r}; expected a floating dtype such as jnp.bfloat16, or None for "
            "float32."
        )
    if finfo(found).bits < 8 or np.zeros((), found) != 0:
        raise ValueError(
            f"{name}: found {dtype!r}, of less than 8 bits or without a zero; expected one such as "
            "jnp.bfloat16."
        )
    return found


Storage: TypeAlias = Literal["float32", "bfloat16", "8bit"] | Format | tuple[Any, Any]

NAMED: dict[str, Format] = {"float32": Float(), "bfloat16": Float(jnp.bfloat16), "8bit": Codes()}


def canonical(storage: Any) -> Any:
    """Returns a storage under its name, if it has one.

    So that `Codes()` and "8bit" make equal transformations.
    """
    if isinstance(storage, tuple):
        return tuple(map(canonical, storage))
    # A traced seed has no value to compare.
    if not isinstance(storage, Format) or not isinstance(storage.seed, int):
        return storage
    return next((name for name, form in NAMED.items() if form == storage), storage)


def _real(dtype: Any) -> Any:
    """The dtype of the parts, where Optax has complex moments in one."""
    try:
        complex_valued = jnp.issubdtype(jnp.dtype(dtype), jnp.complexfloating)
    except TypeError:
        return dtype
    return finfo(dtype).dtype if complex_valued else dtype


def resolve_storage(
    storage: Storage, mu_dtype: Any = None, nu_dtype: Any = None
) -> tuple[Format, Format]:
    """Returns how μ and ν are stored.

    `storage` is for both, or a pair of them. As in Optax, a dtype is for all leaves, however small.

    Raises:
      ValueError: for what is no storage, or where a dtype is given beside a storage that says
        otherwise.
    """
    pair = storage if isinstance(storage, tuple) else (storage, storage)
    if len(pair) != 2:
        raise ValueError(
            f"storage: found a tuple of {len(pair)}; expected one storage, or a tuple of two (for "
            "mu, for nu)."
        )
    chosen = []
    for one, dtype, name in zip(pair, (mu_dtype, nu_dtype), ("mu_dtype", "nu_dtype"), strict=True):
        form = NAMED.get(one) if isinstance(one, str) else one
        if not isinstance(form, Format):
            raise ValueError(
                f"storage: found {brief(one)}; expected 'float32', 'bfloat16', '8bit', an object "
                "of storage.Float or storage.Codes, or a tuple of two of these, for mu and nu."
                f"{_meant(one)}"
            )
        if dtype is not None:
            if form != Float():
                raise ValueError(
                    f"found both {name}={dtype!r} and storage={one!r}; expected one of them."
                )
            form = Float(_floating(_real(dtype), name), smallest=0)
        chosen.append(form)
    return chosen[0], chosen[1]


def _meant(value: Any) -> str:
    """Returns what an error adds where a dtype, or another word for a storage, was given."""
    if isinstance(value, list) and len(value) == 2:
        return f" Did you mean tuple({brief(value)})?"
    word = value if isinstance(value, str) else getattr(value, "__name__", brief(value))
    if isinstance(value, type) and issubclass(value, Format):
        return f" Did you mean storage.{word}()?"
    name = {name: word for word, names in WORDS.items() for name in names}.get(word.lower())
    if name is None:
        try:
            is_array = isinstance(value, (np.ndarray, Array))
            name = None if is_array else jnp.dtype(value).name
        except (TypeError, ValueError):
            name = next(iter(difflib.get_close_matches(word.lower(), NAMED, n=1)), None)
    if name is None or name in NAMED:
        return f" Did you mean {name!r}?" if name else ""
    floating = jnp.issubdtype(jnp.dtype(name), jnp.floating)
    return f" Did you mean storage.Float({name!r})?" if floating else ""


WORDS = {
    "float32": ("none", "f32", "fp32", "float", "full"),
    "bfloat16": ("bf16", "16bit"),
    "8bit": ("int8", "uint8", "i8", "u8", "8", "fp8", "8-bit", "8bits", "quantized"),
}
"""Other spellings of each named storage."""
