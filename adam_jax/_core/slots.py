"""`Slot`: what a stage says about a moment that it keeps."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from jax import Array


@dataclasses.dataclass(frozen=True)
class Slot:
    """What a stage says about a moment that it keeps.

    Attributes:
      name: its field in the state.
      signed: whether it can be negative. A μ can, a ν cannot.
      turn: where in the random bits of an element it begins. Moments of one step share them, and
        must not share an end.
      start: the value of all elements before the first step.
      meaning: what it is. "{}" stands for what it is made of (gradients, directions, steps), "{nu}"
        for the ν in front.
      gathers: whether it starts at zero weight, for which `correct_bias` makes up. The state then
        has its weight.
      whole: whether it has all of its weight at once, as a sum and a maximum do.
      decay: the name of the hyperparameter by which it decays, if any.
      delayed: whether the ν that is handed on is that of the step before.
      kind: what other libraries call such a moment; its name if empty.
      label: how tables show it, for example "ν"; its name if empty.
      of_gradient: (g, ν of zero steps, 1 − decay) -> ν after one step whose gradient was g.
    """

    name: str
    _: dataclasses.KW_ONLY
    signed: bool = True
    turn: int = 0
    start: float = 0.0
    meaning: str = ""
    gathers: bool = False
    whole: bool = False
    decay: str | None = None
    delayed: bool = False
    kind: str = ""
    label: str = ""
    of_gradient: Callable[[Array, Array, Array], Array] | None = None

    def why_wide(self, shape: tuple[int, ...], dtype: Any) -> str | None:
        """Why a moment of that shape and computing dtype is stored as it is computed, or `None`."""
        return None

    @property
    def part(self) -> str:
        """What `state_bytes` counts it as: "mu" or "nu"."""
        return "mu" if self.signed else "nu"
