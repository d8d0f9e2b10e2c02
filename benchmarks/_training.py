"""The networks, the data and the training of `benchmarks.low_precision`.

Plain functions of dictionaries of arrays.

A network computes in float32 whatever its parameters rest in: on a CPU products of bfloat16 are
slow, and the question is what resting costs. So the gradients of bfloat16 parameters come in
bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax

from benchmarks._data import Data, Examples
from benchmarks._networks import (
    convolutional,
    mlp,
    next_word,
    start_convolutional,
    start_mlp,
    start_small_mlp,
    start_transformer,
    start_words,
    transformer,
)

SLICE = 40
"""Examples evaluated at once."""


# The tasks, and the training.


class Task(NamedTuple):
    """What is trained, and how long.

    Attributes:
      name: in a word.
      title: in words.
      reads: "digits", "text" or "words".
      start: from a random generator to float32 parameters.
      logits: from parameters and inputs to logits.
      steps, batch_size: of the training.
      learning_rate: a constant: the same for every variant.
      judged: on how many examples of the training set, and at most of the test set.
      examples: how many of the training set are used; `None` for all.
    """

    name: str
    title: str
    reads: str
    start: Callable[[np.random.Generator], Any]
    logits: Callable[[Any, Array], Array]
    steps: int
    batch_size: int
    learning_rate: float
    judged: int
    examples: int | None = None

    def training_set(self, data: Data) -> Examples:
        """Returns the examples that the task trains on."""
        return data.train if self.examples is None else data.train.spread(self.examples)

    def judged_on(self, data: Data) -> Examples:
        """Returns the training examples for the loss at the end.

        Of words, those behind frequent words.
        """
        trained = self.training_set(data)
        return (trained.behind_frequent() if self.reads == "words" else trained).spread(self.judged)


TASKS = {
    task.name: task
    for task in (
        Task("mlp", "MLP 784-1000-1000-10", "digits", start_mlp, mlp, 938, 128, 1e-4, 10_000),
        Task(
            "conv",
            "Convolutional network",
            "digits",
            start_convolutional,
            convolutional,
            400,
            64,
            3e-4,
            10_000,
        ),
        Task(
            "transformer",
            "Character transformer",
            "text",
            start_transformer,
            transformer,
            500,
            4,
            3e-4,
            240,
        ),
        Task(
            "converged",
            "MLP 784-300-100-10 to convergence",
            "digits",
            start_small_mlp,
            mlp,
            3000,
            64,
            1e-3,
            2000,
            2000,
        ),
        Task(
            "words",
            "Next word, embedding 4096 × 256",
            "words",
            start_words,
            next_word,
            1000,
            64,
            2e-3,
            4000,
        ),
    )
}


def quick(task: Task) -> Task:
    """As little of it as still touches everything.

    What is left is compiling, and of that one layer of the transformer.
    """
    start = partial(start_transformer, layers=1) if task.start is start_transformer else task.start
    return task._replace(start=start, steps=6, judged=80)


class Outcome(NamedTuple):
    """What a training run gives.

    Attributes:
      losses: of each step's batch, (steps,).
      loss: at the end, over examples of the training set: the same ones in every run.
      test_loss, test_accuracy: at the end, over the test set.
    """

    losses: Any
    loss: Any
    test_loss: Any
    test_accuracy: Any


def begin(task: Task, train: Examples, seed: int) -> tuple[Any, np.ndarray]:
    """What a seed decides: the parameters at the start, float32.

    And the examples of each step (steps, batch_size).

    Every example is seen once, in random order, before any comes again.
    """
    random = np.random.default_rng(seed)
    params, count = task.start(random), task.steps * task.batch_size
    epochs = [random.permutation(len(train.inputs)) for _ in range(-(-count // len(train.inputs)))]
    return params, np.concatenate(epochs)[:count].reshape(task.steps, -1).astype(np.int32)


def trainer(
    task: Task, optimizer: optax.GradientTransformation, dtype: Any
) -> Callable[..., Outcome]:
    """A whole run as one pure function of (params, order, train, judged, test).

    `begin`'s, and three `Examples`.
    """

    def logits(params: Any, inputs: Array) -> Array:
        return task.logits(rest(params, jnp.float32), inputs)

    def loss(params: Any, inputs: Array, targets: Array) -> Array:
        return _cross_entropy(logits(params, inputs), targets).mean()

    def run(
        params: Any, order: Array, train: Examples, judged: Examples, test: Examples
    ) -> Outcome:
        def step(carry: Any, chosen: Array) -> Any:
            params, state = carry
            found, grads = jax.value_and_grad(loss)(
                params, train.inputs[chosen], train.targets[chosen]
            )
            updates, state = optimizer.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), found

        def judge(examples: Examples) -> tuple[Array, Array]:
            def one(example: Examples) -> tuple[Array, Array]:
                found = logits(params, example.inputs[None])[0]
                return _cross_entropy(found, example.targets), found.argmax(-1) == example.targets

            losses, hits = lax.map(one, examples, batch_size=SLICE)
            return losses.mean(), hits.mean()

        params = rest(params, dtype)
        (params, _), losses = lax.scan(step, (params, optimizer.init(params)), order)
        return Outcome(losses, judge(judged)[0], *judge(test))

    return run


def rest(params: Any, dtype: Any) -> Any:
    """The parameters in a dtype."""
    return jax.tree.map(lambda leaf: leaf.astype(dtype), params)


def _cross_entropy(logits: Array, targets: Array) -> Array:
    losses: Array = optax.softmax_cross_entropy_with_integer_labels(
        logits, targets.astype(jnp.int32)
    )
    return losses
