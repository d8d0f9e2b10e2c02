"""Updates of Adam as each library makes them, and as long double has them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax

import adam_jax
from benchmarks._table import installed

B1 = 0.9


EPS = 1e-8


class Task(NamedTuple):
    """What every contender is given.

    Attributes:
      gradients: one row a step, float32, and exact in `dtype`.
      b2: β₂, or one for every step.
      steps: at which steps to look, ascending, from 1.
      dtype: of the parameters and of the gradients.
    """

    gradients: np.ndarray
    b2: float | tuple[float, ...]
    steps: tuple[int, ...]
    dtype: str = "float32"

    def b2_at(self, step: int) -> float:
        """β₂ of the step with this number."""
        return self.b2[step - 1] if isinstance(self.b2, tuple) else self.b2


class Seen(NamedTuple):
    """What a contender shows at a step: its update at learning rate 1, and its ν as it rests."""

    update: np.ndarray
    nu: np.ndarray


Contender: TypeAlias = Callable[[Task], Iterator[Seen]]


# The contenders.


def exact(
    task: Task, rest: Callable[[np.ndarray], np.ndarray] = lambda moment: moment
) -> Iterator[Seen]:
    """Algorithm 1 in long double.

    Args:
      task: see `Task`.
      rest: what becomes of a moment between two steps.
    """
    long = np.longdouble
    mu = nu = np.zeros(task.gradients.shape[1], long)
    b1, eps, one = long(str(B1)), long(str(EPS)), long(1)
    b1_power = b2_power = one
    for step, gradient in enumerate(task.gradients[: task.steps[-1]].astype(np.float32), 1):
        b2, g = long(str(task.b2_at(step))), gradient.astype(long)
        mu = rest(b1 * mu + (one - b1) * g)
        nu = rest(b2 * nu + (one - b2) * g * g)
        b1_power, b2_power = b1_power * b1, b2_power * b2
        if step in task.steps:
            yield Seen(mu / (one - b1_power) / (np.sqrt(nu / (one - b2_power)) + eps), nu)


def floor(task: Task) -> Iterator[Seen]:
    """The same, but for moments rounded to float32 between two steps.

    What that alone costs, however exact the rest.
    """
    return exact(task, lambda moment: moment.astype(np.float32).astype(np.longdouble))


def ours(task: Task) -> Iterator[Seen]:
    """`adam_jax.adam`, jitted."""
    return _in_jax(task, adam_jax.adam(1.0, B1, _number_or_schedule(task), EPS))


def by_optax(task: Task) -> Iterator[Seen]:
    """`optax.adam`, jitted; in `optax.inject_hyperparams` for a schedule.

    Which it does not take otherwise.
    """
    make = optax.inject_hyperparams(optax.adam) if isinstance(task.b2, tuple) else optax.adam
    return _in_jax(task, make(1.0, B1, _number_or_schedule(task), EPS))


def by_torch(task: Task) -> Iterator[Seen]:
    """`torch.optim.Adam` as it is by default.

    For a schedule, the betas of its parameter group are set before each step.
    """
    import torch

    torch.set_num_threads(
        1
        # So few elements gain nothing from a second one, and wait for it on a busy machine.
    )
    parameter = torch.nn.Parameter(
        torch.zeros(task.gradients.shape[1], dtype=getattr(torch, task.dtype))
    )
    optimizer = torch.optim.Adam([parameter], lr=1.0, eps=EPS)
    for step, gradient in enumerate(torch.from_numpy(task.gradients[: task.steps[-1]]), 1):
        optimizer.param_groups[0]["betas"] = (B1, task.b2_at(step))
        parameter.grad = gradient.to(parameter.dtype)
        # So that the sum of parameter and update rounds nothing off the update
        parameter.data.zero_()
        optimizer.step()
        if step in task.steps:
            nu = optimizer.state[parameter]["exp_avg_sq"]
            yield Seen(-parameter.detach().double().numpy(), nu.double().numpy())


def _in_jax(task: Task, optimizer: optax.GradientTransformation) -> Iterator[Seen]:
    params = jnp.zeros(task.gradients.shape[1], task.dtype)
    gradients = jnp.asarray(task.gradients, task.dtype)

    @jax.jit
    def advance(state: Any, gradients: Array, done: int, until: int) -> Any:
        return lax.fori_loop(
            done,
            until,
            lambda i, carry: optimizer.update(gradients[i], carry[1], params),
            (params, state),
        )

    state, done = optimizer.init(params), 0
    for step in task.steps:
        update, state = advance(state, gradients, done, step)
        done = step
        yield Seen(
            -np.asarray(update, np.float64), np.asarray(optax.tree.get(state, "nu"), np.float64)
        )


def _number_or_schedule(task: Task) -> Any:
    if not isinstance(task.b2, tuple):
        return task.b2
    values = np.asarray(task.b2, np.float32)
    return lambda count: jnp.asarray(values)[count]


CONTENDERS: dict[str, Contender | None] = {
    "ours": ours,
    "floor": floor,
    "Optax": by_optax,
    "PyTorch": by_torch if installed("torch") else None,
}
"""In the order of the columns; `None` for what is not installed."""
