"""`Format`: what a way of storing a moment has to say about itself."""

from __future__ import annotations

import abc
import dataclasses
import math
from typing import Any, Literal, TypeAlias

import jax.numpy as jnp
import numpy as np
from jax import Array

from adam_jax._core.errors import expect_integer, expect_one_of
from adam_jax._core.leaves import finfo
from adam_jax.storage.random_bits import as_seed

Rounding: TypeAlias = Literal["stochastic", "nearest"]

SMALLEST = 4096


@dataclasses.dataclass(frozen=True)
class Format(abc.ABC):
    """How a moment is stored between two steps. A format of your own is a subclass of it.

    What is stored has the leaf's shape, and each element depends on that element alone and on a
    scale that it may share with others. So a moment is sharded as its parameter is, and a step
    stays one pass over memory. CONTRIBUTING writes one.

    Attributes:
      rounding: "stochastic" rounds up as often as keeps the mean right, "nearest" freezes what
        moves by less than half its last bit a step.
      seed: of the random bits: an integer from 0 to 2³² − 1, or a traced integer scalar, such as
        the number of a member under `jax.vmap`. Stages, leaves and groups have bits of their own
        whatever the seed.
      smallest: leaves of fewer elements stay as they are computed.

    Raises:
      ValueError: for an unknown rounding or a negative size.
      TypeError: if `seed` or `smallest` is no integer.
    """

    _: dataclasses.KW_ONLY
    rounding: Rounding = "stochastic"
    seed: int = 0
    smallest: int = SMALLEST

    def __post_init__(self) -> None:
        caller = f"storage.{type(self).__name__}"
        expect_one_of(f"{caller}: rounding", self.rounding, ("stochastic", "nearest"))
        object.__setattr__(self, "seed", as_seed(f"{caller}: seed", self.seed))
        expect_integer(f"{caller}: smallest", self.smallest)
        if self.smallest < 0:
            raise ValueError(
                f"{caller}: smallest: found {self.smallest}; expected 0 or more elements."
            )
        object.__setattr__(self, "smallest", int(self.smallest))

    def why_wide(self, shape: tuple[int, ...], dtype: Any) -> str | None:
        """Why a moment of that shape and computing dtype is stored as it is computed, or `None`."""
        if jnp.issubdtype(dtype, jnp.complexfloating):
            return "complex"
        return f"fewer than {self.smallest} elements" if math.prod(shape) < self.smallest else None

    @abc.abstractmethod
    def dtype_of(self, signed: bool) -> Any:
        """The dtype that is stored: an integer, or a float of fewer bits than 32.

        Args:
          signed: whether the moment can be negative: a μ can, a ν cannot.
        """

    @abc.abstractmethod
    def store(self, x: Array, scale: Any, random: Any, signed: bool) -> Array:
        """Returns what is stored of a moment.

        Args:
          x: float32, or float64 where a leaf is computed so. What is too large is to saturate.
          scale: that of the leaf, as `next_scale` made it one step ago; `None` without scales.
          random: uint32 of the shape of `x`, or 2³¹ for rounding to nearest. Rounded down, a number
            goes up if what is lost of it, as a share of 2³², plus `random` is 2³² or more.
          signed: as in `dtype_of`.
        """

    @abc.abstractmethod
    def read(self, stored: Array, scale: Any, signed: bool) -> Array:
        """Returns the float32 numbers that are stored."""

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...] | None:
        """The shape of the scales of a leaf: 1 along axes that share one. `None` without scales."""
        return None

    def first_scale(self, start: float, signed: bool) -> Any:
        """Returns the scale of a moment all of whose elements are `start`."""
        return None

    def next_scale(self, stored: Array, scale: Any, signed: bool) -> Any:
        """Returns the scale that reads `stored`, and stores the moment of the next step.

        Args:
          stored: what was stored by `scale`.
          scale: the scale of the step before.
          signed: as in `dtype_of`.
        """
        return scale

    def fitting_scale(self, x: Array, like: Any, signed: bool) -> Any:
        """Returns the scale by which `x` fits best, of the shape of `like`."""
        return like

    def largest(self, scale: Any, signed: bool) -> Array:
        """The largest number that codes can stand for now. Gradients beyond its root saturate."""
        return jnp.asarray(finfo(np.float32).max, np.float32)

    def saturates_with(self, other: Format) -> bool:
        """Whether ν in this format is at its largest wherever a μ in the other one is."""
        return False
