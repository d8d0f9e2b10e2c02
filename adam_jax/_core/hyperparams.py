"""Hyperparameters: numbers, traced scalars and schedules.

A settable number is kept in the state, so that it can be changed during a run.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from adam_jax._core.errors import brief, call_user
from adam_jax._core.leaves import narrower_than_float32

Scalar: TypeAlias = float | Array

_LARGEST = float(np.finfo(np.float32).max)
"""The largest float32: the scalars of a state have that dtype unless a leaf is float64."""


@dataclasses.dataclass(frozen=True)
class Settable:
    """A hyperparameter that is kept in the state. `settable` makes it.

    Attributes:
      value: the value in a fresh state.
    """

    value: Any

    def __repr__(self) -> str:
        return f"settable({self.value!r})"


ScalarOrSchedule: TypeAlias = Scalar | Callable[[Any], Any] | Settable


@dataclasses.dataclass(frozen=True)
class Multiplied:
    """A schedule or a settable number, times a factor.

    Attributes:
      base: the schedule, or the settable number, whose state holds it without the factor.
      factor: a number or a traced scalar.
    """

    base: Any
    factor: Any

    def __call__(self, count: Any) -> Any:
        """Returns the value of the schedule at a step, times the factor."""
        return self.base(count) * self.factor


def settable(value: Scalar) -> Settable:
    """Keeps a hyperparameter in the state, from which every step reads it.

        tx = adamw(settable(1e-3))
        state = tx.init(params)
        state = set_hyperparameters(state, tx, learning_rate=3e-4)     # no step is compiled again
        state = optax.tree.set(state, learning_rate=3e-4)              # the same

    Args:
      value: a number or a traced scalar, the value in a fresh state. A state that is handed on
        keeps its own.

    Returns:
      What any hyperparameter of any optimizer and stage takes in place of a number.

    Raises:
      TypeError: for a schedule. What is computed from the step cannot be set.
    """
    if callable(value) or isinstance(value, Settable):
        raise TypeError(
            f"settable: found {brief(value)}; expected a number or a traced scalar. A schedule "
            "cannot be set."
        )
    Hyperparameter("settable", value)
    return Settable(value)


class Hyperparameter:
    """A validated hyperparameter.

    Args:
      name: as the user knows it. Errors, the state and `hyperparameters` use it.
      value: a Python or NumPy number, a JAX scalar (traced or not), a schedule (a callable from the
        number of steps already taken, int32, 0 at the first, to a scalar), or what `settable`
        returns.
      within: the interval that a number has to lie in, as mathematics writes it: "[0, 1)".
      hint: what else to say to a number outside of it.

    Attributes:
      scheduled: whether it depends on the step.
      settable: whether the state keeps it.

    Raises:
      TypeError: if `value` is none of those.
      ValueError: if it is an array with dimensions, or a number that is NaN or outside `within`. A
        traced value cannot be looked at, and is not.
    """

    def __init__(self, name: str, value: Any, within: str = "(-inf, inf)", hint: str = "") -> None:
        self.name = name
        self.hint = hint and f" {hint}"
        self.value = value
        self.within = within
        base = value.base if isinstance(value, Multiplied) else value
        self.settable = isinstance(base, Settable)
        self.scheduled = callable(value) and not self.settable
        if not self.scheduled:
            self._check(self.first, name)

    @property
    def first(self) -> Any:
        """The value that a fresh state keeps: a number, without the multiplier of its group."""
        base = self.value.base if isinstance(self.value, Multiplied) else self.value
        return base.value if isinstance(base, Settable) else base

    def _check(self, value: Any, name: str) -> None:
        if isinstance(value, (bool, np.bool_)) or not isinstance(
            value, (int, float, np.generic, np.ndarray, Array)
        ):
            raise TypeError(
                f"{name}: found {brief(value)}; expected a number, a traced scalar, or a "
                f"schedule (a callable from the step count to a scalar)."
            )
        if jnp.shape(value) != ():
            raise ValueError(
                f"{name}: found an array of shape {jnp.shape(value)}; expected a scalar. For one "
                "value a leaf, give each group of leaves its own transformation (optax.partition)."
            )
        dtype = (
            jnp.result_type(value)
            if isinstance(value, (Array, np.ndarray))
            else np.result_type(getattr(value, "dtype", type(value)))
        )
        if not (jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)):
            raise TypeError(f"{name}: found the {dtype} {value!r}; expected a real number.")
        if self.within == "[0, 1)" and hasattr(value, "dtype") and narrower_than_float32(value):
            # 1 − 0.999 has one digit in bfloat16, and 0.999 is 1 there.
            raise TypeError(
                f"{name}: found a decay in {dtype}; expected float32 or a Python number: what a "
                "decay lacks to 1 has no digits left in fewer bits."
            )
        if isinstance(value, jax.core.Tracer):
            return
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        low, high = (float(bound) for bound in self.within[1:-1].split(","))
        above = number >= low if self.within[0] == "[" else number > low
        below = number <= high if self.within[-1] == "]" else number < high
        if not (above and below):
            raise ValueError(
                f"{name}: found {number!r}; expected a number in {self.within}."
                + self.hint * (number < low)
            )
        if _LARGEST < abs(number) < math.inf:
            raise ValueError(f"{name}: found {number!r}; expected a number that float32 holds.")

    def at(self, count: Array | None, kept: Mapping[str, Array] = {}) -> Scalar:
        """Returns the value for a step. A Python number stays one.

        Args:
          count: the steps taken before, int32; needed by schedules alone.
          kept: the settable values in the state, by name.
        """
        if self.settable:
            value = jnp.asarray(
                kept[self.name]
            )  # `optax.tree.set` may have put a Python number there
            return (
                value * cast(self.value.factor, value.dtype)
                if isinstance(self.value, Multiplied)
                else value
            )
        if not self.scheduled:
            return self.value if isinstance(self.value, Array) else float(self.value)
        name = f"the schedule {self.name}"
        value = call_user(name, self.value, count, "the number of steps taken before")
        self._check(value, name)
        return value if isinstance(value, Array) else float(value)


class Hyperparameters(dict[str, Hyperparameter]):
    """Those of one stage, by name. What a stage's state keeps for them is as little as can be.

    Args:
      *all_of_them: the hyperparameters.
    """

    def __init__(self, *all_of_them: Hyperparameter) -> None:
        super().__init__({its.name: its for its in all_of_them})

    @property
    def scheduled(self) -> bool:
        """Whether any depends on the step."""
        return any(its.scheduled for its in self.values())

    def first_step(self) -> Array | None:
        """Returns the counter of a fresh state, int32; `None` where no schedule reads it."""
        return jnp.zeros((), jnp.int32) if self.scheduled else None

    def kept(self, dtype: Any) -> dict[str, Array]:
        """Returns the settable values of a fresh state, scalars of `dtype` by name.

        Raises:
          TypeError, ValueError: for a schedule whose first value cannot be. That is seen here,
            before the first step.
        """
        for its in self.values():
            its.at(jnp.zeros((), jnp.int32), {its.name: its.first})
        return {name: cast(its.first, dtype) for name, its in self.items() if its.settable}

    def at(self, count: Array | None, kept: Mapping[str, Array] = {}) -> dict[str, Scalar]:
        """Returns all values for a step: see `Hyperparameter.at`."""
        return {name: its.at(count, kept) for name, its in self.items()}


def cast(value: Scalar, dtype: Any) -> Array:
    """The value as a strongly typed scalar of `dtype`."""
    return (
        jnp.asarray(value).astype(dtype)
        if isinstance(value, Array)
        else jnp.asarray(np.asarray(value, dtype))
    )


def complement(value: Scalar, dtype: Any) -> Array:
    """1 − value, rounded to `dtype` once.

    For a Python number formed in float64, from the decimal that the user wrote.

    In float32, 1 − 0.999999 would be off by 3 %: 0.999999 itself has no better neighbour. A traced
    β is a float32 number already, and its complement is exact.
    """
    return cast(1.0 - value, dtype)


def increment(count: Any) -> Any:
    """Returns count + 1, which stays at the largest int32 and does not wrap.

    For a counter that is `None` it returns `None`.
    """
    if count is None:
        return None
    return jnp.minimum(count, np.int32(np.iinfo(np.int32).max - 1)) + np.int32(1)


def peak(value: ScalarOrSchedule) -> Scalar:
    """The largest value that a schedule takes, or the first of a settable one.

    It is looked for at every count below 2²⁰ and at the powers of two above.
    """
    if isinstance(value, Settable):
        return value.value  # type: ignore[no-any-return]
    if not callable(value):
        return value
    counts = np.concatenate([np.arange(2**20), 2 ** np.arange(20, 31)]).astype(np.int32)
    # Now, even where the transformation is made inside a jitted function: XLA would fold a million
    # constants.
    with jax.ensure_compile_time_eval():
        highest = jnp.max(jax.vmap(lambda count: jnp.asarray(value(count)))(jnp.asarray(counts)))
    if not isinstance(highest, jax.core.Tracer) and not 0 < float(highest) < math.inf:
        raise ValueError(
            "decay='independent' follows the learning rate relative to its peak, and the peak of "
            f"this schedule is {float(highest)}; expected a positive number."
        )
    return highest
