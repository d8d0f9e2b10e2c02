"""How a run of the demo went, and what keeps it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, TypeAlias

import optax

RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0)

GOAL = 0.95

Factory: TypeAlias = Callable[[Any], optax.GradientTransformationExtraArgs]

Tell: TypeAlias = Callable[[str, int], None]

Log: TypeAlias = Callable[[int, Mapping[str, float]], None]


class Course(NamedTuple):
    """The course of one optimizer's run.

    Attributes:
      rate: its learning rate.
      edge: "smallest" or "largest" if the sweep chose the end of its range, where a better rate may
        lie beyond; else "".
      steps, losses, accuracies: the curves: training loss and test accuracy after so many steps, on
        at most `MOST` images.
      loss: the training loss at the end, on the first 10,000 training images.
      accuracy: the test accuracy at the end, on all test images.
      seconds: spent on the steps of the final run, neither compiling nor evaluating.
    """

    rate: float
    edge: str
    steps: list[int]
    losses: list[float]
    accuracies: list[float]
    loss: float
    accuracy: float
    seconds: float

    @property
    def steps_to_goal(self) -> int | None:
        """The first evaluated step at which the test accuracy was at least `GOAL`."""
        return next(
            (
                step
                for step, found in zip(self.steps, self.accuracies, strict=True)
                if found >= GOAL
            ),
            None,
        )


class Progress(NamedTuple):
    """The curves of a run so far, as in `Course`.

    It also has what the run goes on from beside its arrays.
    """

    rate: float
    edge: str
    steps: list[int]
    losses: list[float]
    accuracies: list[float]
    seconds: float


class Keeper(Protocol):
    """Saves a run and loads it.

    It says what the run goes on from, if there is something, and saves it as it goes.
    """

    progress: Progress | None

    def load(self, like: Any) -> Any:
        """The arrays that belong to `progress`."""

    def save(self, carry: Any, progress: Progress, last: bool) -> None:
        """Takes the arrays, unchanged until they are written, after an evaluation.

        `last`: the run is over.
        """
