"""`Context` carries facts from stage to stage beside the updates.

`StepSelector` chooses between the new state and the old.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from adam_jax._core.leaves import PyTree


class Interceptor:
    """What looks at the stages of a chain, or selects between their states. The chain calls it."""

    def before(self, part: Any, updates: Any, state: Any, params: Any, context: Context) -> None:
        """Is called with what a stage is about to get."""

    def after(self, after: PyTree, before: PyTree, updates: Any) -> tuple[PyTree, Any]:
        """Returns the state and the updates that go on from a stage that made `after`."""
        return after, updates


class StepSelector(Interceptor):
    """Whether a step is taken, and the choice between new and old arrays that follows.

    Args:
      takes: a boolean scalar.
    """

    def __init__(self, takes: jax.Array) -> None:
        self.takes = takes
        self._chosen: dict[int, Any] = {}

    def choose(self, new: Any, old: Any) -> Any:
        """The new array or the old.

        What was chosen before is not chosen again: a TPU would write it twice.
        """
        if id(new) in self._chosen:
            return new
        if jnp.issubdtype(new.dtype, jnp.floating) and new.dtype.itemsize < 4:
            # Chosen as narrow numbers they would be a second pass over memory.
            chosen = jnp.where(self.takes, new.astype(np.float32), old.astype(np.float32)).astype(
                new.dtype
            )
        else:
            chosen = jnp.where(self.takes, new, old)
        self._chosen[id(chosen)] = chosen
        return chosen

    def after(self, after: PyTree, before: PyTree, updates: Any) -> tuple[PyTree, Any]:
        """The state after a step that may not be taken, and the updates with it.

        What is in both, a moment that flows on as it rests, is the chosen one in both. Otherwise
        the next stage would need a number that is not stored, and a CPU, which makes a loop of each
        array, would copy the state to compute it again.
        """
        chosen = jax.tree.map(self.choose, after, before)
        same = {
            id(new): its
            for new, its in zip(jax.tree.leaves(after), jax.tree.leaves(chosen), strict=True)
        }
        return chosen, jax.tree.map(lambda x: same.get(id(x), x), updates)


class Context(NamedTuple):
    """Facts that a stage gets beside the updates.

    Attributes:
      gradient: the updates as they entered the outermost chain; outside of one, the extra argument
        `gradient`, if given.
      applied: whether the learning rate is already in the updates; `None` where that cannot be
        known.
      learning_rate: returns the learning rate that was applied last in this chain, a scalar; `None`
        where there is none.
      inside: whether a chain of this package is calling. It rounds the final updates itself, so a
        stage need not.
      extra: the extra arguments of `update`, for stages of others.
      wide: whether updates leave as wide as they were computed, for `step`, which rounds the sums.
      rounded: whether the updates step from one number of the parameters' dtype to another.
      selector: what chooses between the new states of stages and the old, where a wrapper may skip
        the step.
      probe: what looks at the values between stages, for `observe`.
      earlier: how many stages of each name stand before this one, in its chain and in those around
        it.
      incoming: the updates as they entered the outermost chain: their dtypes decide those in which
        they leave it. `None` outside.
    """

    gradient: PyTree | None = None
    applied: bool | None = None
    learning_rate: Callable[[], Any] | None = None
    inside: bool = False
    extra: Mapping[str, Any] = {}
    wide: bool = False
    rounded: bool = False
    selector: StepSelector | None = None
    probe: Any = None
    earlier: Mapping[str, int] = {}
    incoming: PyTree | None = None

    @property
    def interceptors(self) -> tuple[Interceptor, ...]:
        """The probe and the selector, as far as they are there."""
        return tuple(one for one in (self.probe, self.selector) if one is not None)

    def stream(self, name: str) -> str:
        """The name of a stage's random bits.

        Its own, and how many stages of that name come before it in the chain.

        Not the position: the same bits serve a stage whether something stands in front of it or
        not.
        """
        return f"{name} {self.earlier.get(name, 0)}"
