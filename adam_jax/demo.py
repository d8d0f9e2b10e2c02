"""The demonstration behind `python -m adam_jax`: one small network, one start, one order of the batches, many optimizers.

Data flows from top to bottom: images → network → the training of one rate → a sweep over rates → the final run.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import time
import warnings
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import adam_jax
from adam_jax._tree import as_wide

ARRAYS = ("x_train", "y_train", "x_test", "y_test")
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0)
GOAL = 0.95
EVALUATIONS = 50
LARGEST = 16  # pixels: larger images are halved until they fit, so that a sweep over MNIST takes a minute or two
SLICE = 512  # images evaluated at once
LAST = 5  # evaluations at the end of a sweep whose mean chooses the rate, so that one lucky step does not
MOST = 1000  # images that validate a rate or draw a curve: enough to tell, and little beside the training on MNIST

Factory: TypeAlias = Callable[[Any], optax.GradientTransformationExtraArgs]
Tell: TypeAlias = Callable[[str, int], None]
Log: TypeAlias = Callable[[int, Mapping[str, float]], None]

# Some versions of JAX leave these without types.
_wait: Callable[[Any], Any] = jax.block_until_ready
_spec: Any = PartitionSpec


class Data(NamedTuple):
    """Images (n, height, width, channels) of float32, none in x_train beyond ±1, and labels (n,) of int32 from 0."""

    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray


class Course(NamedTuple):
    """What one optimizer did.

    Attributes:
      rate: its learning rate.
      edge: "smallest" or "largest" if the sweep chose the end of its range, where a better rate may lie beyond; else "".
      steps, losses, accuracies: the curves: training loss and test accuracy after so many steps, on at most `MOST` images.
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
        return next((step for step, found in zip(self.steps, self.accuracies, strict=True) if found >= GOAL), None)


class Progress(NamedTuple):
    """What a run has to show so far, as in `Course`, and all that it goes on from beside its arrays."""

    rate: float
    edge: str
    steps: list[int]
    losses: list[float]
    accuracies: list[float]
    seconds: float


class Keeper(Protocol):
    """What keeps a run: what it goes on from, where there is something, and what is saved as it goes."""

    progress: Progress | None

    def load(self, like: Any) -> Any:
        """The arrays that belong to `progress`."""

    def save(self, carry: Any, progress: Progress, last: bool) -> None:
        """Takes the arrays, unchanged until they are written, after an evaluation; `last`: the run is over."""


def digits() -> Data:
    """The 1,797 digits of scikit-learn, 8×8 pixels, a fifth of them for the test: the same fifth whatever the seed."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    train, test = order[360:], order[:360]
    return check(digits.images[train], digits.target[train], digits.images[test], digits.target[test])


def read(path: Path) -> Data:
    """The four arrays of an .npz file.

    Raises:
      ValueError: if there is no such file, or it cannot be read, or an array is missing, or `check` refuses one.
    """
    try:
        with path.open("rb") as opened:
            if not zipfile.is_zipfile(opened):
                raise ValueError("it is not an .npz file, which numpy.savez writes")
        with np.load(path, allow_pickle=False) as file:
            missing = [name for name in ARRAYS if name not in file.files]
            if missing:
                raise ValueError(f"found no array {', '.join(missing)}; expected {', '.join(ARRAYS)}")
            arrays = [file[name] for name in ARRAYS]
        return check(*arrays)
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"--data: {path}: {getattr(error, 'strerror', None) or error}") from error


def fingerprint(data: Data) -> str:
    """Tells these images and labels from others."""
    found = hashlib.sha256()
    for array in data:
        found.update(f"{array.shape}".encode() + array.tobytes())
    return found.hexdigest()[:16]


def check(x_train: np.ndarray, y_train: np.ndarray, x_test: np.ndarray, y_test: np.ndarray) -> Data:
    """Images of any numeric dtype and integer labels: checked, scaled and shuffled.

    Raises:
      ValueError: naming the array that does not fit, what was found in it and what was expected.
    """
    for split, images, labels in (("train", x_train, y_train), ("test", x_test, y_test)):
        _check_images(f"x_{split}", images)
        _check_labels(f"y_{split}", labels)
        if len(images) != len(labels):
            raise ValueError(f"found {len(images)} images in x_{split} but {len(labels)} labels in y_{split}")
    if x_test.shape[1:] != x_train.shape[1:]:
        raise ValueError(f"x_test: found images of shape {x_test.shape[1:]}; expected {x_train.shape[1:]}, as in x_train")
    known, top = np.unique(y_train), int(y_train.max())
    if len(known) < 2 or top != len(known) - 1:
        raise ValueError(f"y_train: found {len(known)} classes, the highest {top}; expected two or more, 0 to k - 1, none empty")
    if strange := np.setdiff1d(y_test, known).tolist():
        raise ValueError(f"y_test: found label {strange[0]}, which is not in y_train; expected 0 to {top}")
    scale = np.abs(x_train.astype(np.promote_types(x_train.dtype, np.float32), copy=False)).max() or 1
    # Shuffled, so that the first so many images of a file sorted by label are a fair sample too.
    train, test = (np.random.default_rng(0).permutation(len(labels)) for labels in (y_train, y_test))
    return Data(
        _scaled(x_train, scale)[train],
        y_train[train].astype(np.int32),
        _scaled(x_test, scale)[test],
        y_test[test].astype(np.int32),
    )


def _check_images(name: str, images: np.ndarray) -> None:
    if images.dtype.kind not in "buif":
        raise ValueError(f"{name}: found dtype {images.dtype}; expected numbers")
    if images.ndim not in (3, 4) or 0 in images.shape or min(images.shape[1:3]) < 4:
        raise ValueError(
            f"{name}: found shape {images.shape}; expected (n, height, width) or (n, height, width, channels), "
            f"one image or more, of 4x4 pixels or more"
        )
    if not np.isfinite(images).all():
        raise ValueError(f"{name}: found pixels that are NaN or infinite; expected finite numbers")


def _check_labels(name: str, labels: np.ndarray) -> None:
    if labels.dtype.kind not in "ui":
        raise ValueError(f"{name}: found dtype {labels.dtype}; expected integer labels")
    if labels.ndim != 1 or not len(labels):
        raise ValueError(f"{name}: found shape {labels.shape}; expected (n,), one label for each image")
    if labels.min() < 0:
        raise ValueError(f"{name}: found label {labels.min()}; expected labels from 0")


def _scaled(images: np.ndarray, scale: Any) -> np.ndarray:
    images = np.divide(images, scale, dtype=np.promote_types(images.dtype, np.float32)).astype(np.float32)
    images = images if images.ndim == 4 else images[..., None]
    while min(images.shape[1:3]) > LARGEST:
        images = _halve(images)
    return images


def _halve(images: Any) -> Any:
    """The mean of every 2×2 pixels; of an odd number of rows or columns the last is dropped."""
    n, height, width, channels = images.shape
    even = images[:, : height // 2 * 2, : width // 2 * 2]
    return even.reshape(n, height // 2, 2, width // 2, 2, channels).mean((2, 4))


def _convolve(images: Array, kernel: Array, *_: Any, **__: Any) -> Array:
    """A 3×3 convolution that keeps the size, as one matrix product.

    Mapped over rates each network has its own kernel, and XLA has no fast code on the CPU for the grouped convolution that
    this becomes: as a batch of matrix products the sweep takes a tenth of the time.
    """
    height, width = images.shape[1:3]
    padded = jnp.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
    columns = jnp.concatenate([padded[:, i : i + height] for i in range(3)], axis=-1)
    patches = jnp.concatenate([columns[:, :, j : j + width] for j in range(3)], axis=-1)
    return patches @ kernel.swapaxes(0, 1).reshape(-1, kernel.shape[-1])


class Network(nn.Module):
    """Two convolutions, each halving the image, and a dense layer: images to logits (n, classes)."""

    classes: int

    @nn.compact
    def __call__(self, images: Array) -> Array:
        """The logits of a batch of images."""
        for features in (16, 32):
            images = _halve(nn.relu(nn.Conv(features, (3, 3), conv_general_dilated=_convolve)(images)))
        logits: Array = nn.Dense(self.classes)(images.reshape(len(images), -1))
        return logits


class Setting(NamedTuple):
    """What all optimizers share; `fit` and `validation` are indices into the training images, `devices` how many train."""

    network: Network
    params: Any
    data: Data
    fit: np.ndarray
    validation: np.ndarray
    steps: int
    batch_size: int
    seed: int
    devices: int = 1


def prepare(
    data: Data, steps: int, batch_size: int, seed: int, sweeps: bool, dtype: Any = jnp.float32, devices: int = 1
) -> Setting:
    """The network, its start, and the split of the training images into those to fit and those that choose the rate.

    Args:
      data: the images.
      steps: of the final run, and of each rate of the sweep.
      batch_size: images a step.
      seed: of start, batches and split.
      sweeps: whether images are held out to choose the rate.
      dtype: of the parameters.
      devices: how many train together.

    Raises:
      ValueError: if a batch is larger than the set that it is drawn from, or cannot be cut into a part for each device.
    """
    network = Network(int(data.y_train.max()) + 1)
    order = np.random.default_rng(seed).permutation(len(data.x_train))
    held = min(max(len(order) // 5, 1), MOST) if sweeps else 0
    if batch_size > len(order) - held:
        aside = f" ({held} more are held out to choose the rate)" if held else ""
        raise ValueError(f"--batch-size: found {batch_size}; expected at most the {len(order) - held} training images{aside}")
    if batch_size % devices:
        raise ValueError(f"--batch-size: found {batch_size}; expected a multiple of the {devices} devices")
    key = jax.random.key(seed, impl="rbg")  # on the CPU the default generator takes seconds more to compile
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), jax.jit(network.init)(key, data.x_train[:1]))
    return Setting(network, params, data, order[held:], order[:held], steps, batch_size, seed, devices)


def shapes(dtype: Any) -> Any:
    """The shapes of the network's parameters for `digits`, of which nothing is read and nothing made."""

    def make(key: Array, images: Array) -> Any:
        return jax.tree.map(lambda leaf: leaf.astype(dtype), Network(10).init(key, images))

    return jax.eval_shape(make, jax.random.key(0, impl="rbg"), jnp.zeros((1, 8, 8, 1)))


def run(
    make: Factory, setting: Setting, rate: float | None, tell: Tell, keeper: Keeper | None = None, log: Log | None = None
) -> Course:
    """Trains with the best rate of a sweep, or with the one given, or goes on with a run that was kept.

    A sweep is not kept: interrupted in it, a run sweeps anew, and finds the same rate. Once that is chosen it is kept.

    Args:
      make: from a learning rate to an optimizer.
      setting: what all optimizers share.
      rate: the learning rate, or `None` to sweep over `RATES`.
      tell: called with what is being done and the number of steps done so far.
      keeper: what the run goes on from, and is saved by.
      log: called with the step and a flat dict of numbers at each evaluation.
    """
    edge, done = "", setting.steps if rate is None else 0
    if keeper and keeper.progress:
        rate, edge = keeper.progress.rate, keeper.progress.edge
    elif rate is None:
        best = sweep(make, setting, tell)
        rate = RATES[best]
        edge = {0: "smallest", len(RATES) - 1: "largest"}.get(best, "")
    return train(make, setting, rate, edge, lambda doing, steps: tell(doing, done + steps), keeper, log)


def sweep(make: Factory, setting: Setting, tell: Tell) -> int:
    """Which of `RATES` has the lowest loss on the validation images near the end of as many steps as the final run takes.

    All rates train at once, in one compiled function. Test images are not looked at.
    """
    tell(f"compiling {len(RATES)} rates", 0)
    x, y = setting.data.x_train, setting.data.y_train
    images, labels, order = jnp.asarray(x), jnp.asarray(y), _batches(setting, setting.fit)
    held_out = x[setting.validation], y[setting.validation]
    rates = jnp.asarray(RATES, jnp.float32)
    begin, advance = _trainer(make, setting.network)
    carry = jax.jit(jax.vmap(begin, (None, 0)))(setting.params, rates)
    advance_all = jax.jit(jax.vmap(advance, (0, 0, None, None, None, None, None)))

    losses = []
    chunks = _chunks(setting.steps)
    for first, last in chunks:
        carry = _wait(advance_all(carry, rates, images, labels, order, first, last))
        if (first, last) in chunks[-LAST:]:
            stacked = jax.device_get(carry[0])
            each = [jax.tree.map(lambda leaf, i=i: leaf[i], stacked) for i in range(len(RATES))]
            losses.append([_evaluate(setting.network, params, *held_out)[0] for params in each])
        tell(f"trying {len(RATES)} rates", int(last))
    mean = np.mean(losses, axis=0)
    # A rate that diverged is infinitely bad; if all did, the smallest is the one to show.
    return int(np.argmin(np.where(np.isfinite(mean), mean, np.inf)))


def train(
    make: Factory, setting: Setting, rate: float, edge: str, tell: Tell, keeper: Keeper | None = None, log: Log | None = None
) -> Course:
    """One run on all training images, evaluated as it goes: the batches and the state are cut over the devices."""
    tell(f"compiling rate {rate:g}", 0)
    data, network = setting.data, setting.network
    mesh = Mesh(np.array(jax.devices()[: setting.devices]), ("data",))
    everywhere = NamedSharding(mesh, _spec())
    images, labels, traced_rate = jax.device_put((data.x_train, data.y_train, np.float32(rate)), everywhere)
    order = jax.device_put(_batches(setting, np.arange(len(images))), NamedSharding(mesh, _spec(None, "data")))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a layer of ten outputs does not divide by most numbers of devices
        shardings = everywhere, adam_jax.state_shardings(make(rate), setting.params, everywhere, zero="data")
    begin, advance = (jax.jit(its, out_shardings=shardings) for its in _trainer(make, network))
    carry = begin(setting.params, traced_rate)

    progress = Progress(rate, edge, [], [], [], 0.0)
    if keeper and keeper.progress:
        progress, carry = keeper.progress, keeper.load(carry)
        tell(f"going on from step {progress.steps[-1]}", progress.steps[-1])
    begun_at = np.int32(progress.steps[-1] if progress.steps else 0)
    # The first chunk has no step: it compiles, which is not timed, and lets the curves begin at the start.
    for first, last in [(begun_at, begun_at), *(chunk for chunk in _chunks(setting.steps) if chunk[0] >= begun_at)]:
        begun = time.perf_counter()
        carry = _wait(advance(carry, traced_rate, images, labels, order, first, last))
        if int(last) in progress.steps:
            continue
        seconds = progress.seconds + (time.perf_counter() - begun if last else 0.0)
        params = jax.device_get(carry[0])  # or each device would evaluate all images
        loss = _evaluate(network, params, data.x_train[:MOST], data.y_train[:MOST])[0]
        accuracy = _evaluate(network, params, data.x_test[:MOST], data.y_test[:MOST])[1]
        progress = Progress(
            rate, edge, [*progress.steps, int(last)], [*progress.losses, loss], [*progress.accuracies, accuracy], seconds
        )
        if log:
            log(int(last), _scalars(make(rate), carry[1], loss, accuracy))
            look = {name: float(value) for name, value in adam_jax.observations(carry[1]).items()}
            if step := int(look.pop("step")):
                log(step, look)
        if keeper:
            keeper.save(carry, progress, int(last) == setting.steps)
        tell(f"training at rate {rate:g}", int(last))
    params = jax.device_get(carry[0])
    loss = _evaluate(network, params, data.x_train[:10_000], data.y_train[:10_000])[0]
    accuracy = _evaluate(network, params, data.x_test, data.y_test)[1]
    return Course(rate, edge, progress.steps, progress.losses, progress.accuracies, loss, accuracy, progress.seconds)


def _scalars(tx: Any, state: Any, loss: float, accuracy: float) -> dict[str, float]:
    """What is logged at an evaluation."""
    rate = adam_jax.hyperparameters(state, tx)["learning_rate"]
    return {"training loss": loss, "test accuracy": accuracy, "learning rate": float(rate)}


def _trainer(make: Factory, network: Network) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """`begin(params, rate)` makes what training carries on; `advance` takes it from step `first` to step `last`.

    The bounds are arguments, so that chunks of any length, which a progress bar needs, are one compiled function.
    """

    def begin(params: Any, rate: Array) -> Any:
        return params, make(rate).init(params)

    def advance(carry: Any, rate: Array, images: Array, labels: Array, order: Array, first: Array, last: Array) -> Any:
        optimizer = make(rate)

        def loss(params: Any, chosen: Array) -> Array:
            logits = _logits(network, params, images[chosen])
            mean: Array = optax.softmax_cross_entropy_with_integer_labels(logits, labels[chosen]).mean()
            return mean

        def step(i: Array, carry: Any) -> Any:
            params, state = carry
            updates, state = optimizer.update(jax.grad(loss)(params, order[i]), state, params)
            with jax.numpy_dtype_promotion("standard"):  # a bfloat16 parameter's update may be float32, and Optax adds them
                return optax.apply_updates(params, updates), state

        return jax.lax.fori_loop(first, last, step, carry)

    return begin, advance


def _logits(network: Network, params: Any, images: Array) -> Any:
    """Computed in float32 from parameters of any dtype, so that what sets two runs apart is how their parameters round."""
    return network.apply(jax.tree.map(as_wide, params), images)


def _evaluate(network: Network, params: Any, images: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """The mean loss and the accuracy, in slices of one size, so that every set of images shares one compiled function."""
    total, right = 0.0, 0
    for start in range(0, len(images), SLICE):
        x, y = images[start : start + SLICE], labels[start : start + SLICE]
        absent = SLICE - len(x)
        x = np.pad(x, ((0, absent), (0, 0), (0, 0), (0, 0)))
        losses, hits = jax.device_get(_score(network, params, x, np.pad(y, (0, absent))))
        total += float(losses[: len(y)].sum(dtype=np.float64))
        right += int(hits[: len(y)].sum())
    return total / len(images), right / len(images)


@functools.partial(jax.jit, static_argnums=0)
def _score(network: Network, params: Any, images: Array, labels: Array) -> tuple[Array, Array]:
    logits = _logits(network, params, images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels), logits.argmax(-1) == labels


def _batches(setting: Setting, indices: np.ndarray) -> Array:
    """The images of each step, (steps, batch_size): every image once, in random order, before any comes again."""
    random = np.random.default_rng(setting.seed)
    wanted = setting.steps * setting.batch_size
    epochs = [random.permutation(indices) for _ in range(-(-wanted // len(indices)))]
    return jnp.asarray(np.concatenate(epochs)[:wanted].reshape(setting.steps, -1), jnp.int32)


def _chunks(steps: int) -> list[tuple[Any, Any]]:
    ends = np.unique(np.linspace(0, steps, min(steps, EVALUATIONS) + 1).astype(np.int32))
    return list(itertools.pairwise(ends))
