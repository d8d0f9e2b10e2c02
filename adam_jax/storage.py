"""How moments rest between two steps. So far: in the dtype they are computed in, or in a floating dtype of the user's."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from adam_jax._tree import finfo


class Resting(NamedTuple):
    """The resting form of a moment.

    Attributes:
      dtype: the dtype that an array rests in; `None` for the one it is computed in.
    """

    dtype: Any = None

    def narrow(self, wide: Array) -> Array:
        """The resting form: rounded to nearest, saturating at the largest finite number."""
        if self.dtype is None or jnp.iscomplexobj(wide):
            return wide
        largest = float(finfo(self.dtype).max)
        return jnp.clip(wide, -largest, largest).astype(self.dtype)

    def widen(self, resting: Array, dtype: Any) -> Array:
        """The form that a step computes with."""
        return resting.astype(dtype)


def resting(dtype: Any, name: str) -> Resting:
    """The storage that a user's `mu_dtype` names.

    Raises:
      ValueError: if it is no floating dtype.
    """
    if dtype is None:
        return Resting()
    try:
        found = jnp.dtype(dtype)
    except TypeError:
        found = None
    if found is None or not jnp.issubdtype(found, jnp.floating):
        raise ValueError(f"{name}: found {dtype!r}; expected a floating dtype such as jnp.bfloat16, or None for float32.")
    return Resting(found)
