"""The images, the network, the start and the batches, which all optimizers share."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from adam_jax._cli.data import Data
from adam_jax._cli.network import Network

# Images that validate a rate or draw a curve: enough to tell, and little beside the training on
# MNIST
MOST = 1000


class Setting(NamedTuple):
    """What all optimizers share.

    `fit` and `validation` are indices into the training images, `devices` how many train.
    """

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
    data: Data,
    steps: int,
    batch_size: int,
    seed: int,
    sweeps: bool,
    dtype: Any = jnp.float32,
    devices: int = 1,
) -> Setting:
    """Makes the network, its start, and the split of the training images.

    Some images are to be fitted, the others choose the learning rate.

    Args:
      data: the images.
      steps: of the final run, and of each rate of the sweep.
      batch_size: images a step.
      seed: of start, batches and split.
      sweeps: whether images are held out to choose the rate.
      dtype: of the parameters.
      devices: how many train together.

    Raises:
      ValueError: if a batch is larger than the set that it is drawn from, or cannot be cut into a
        part for each device.
    """
    network = Network(int(data.y_train.max()) + 1)
    order = np.random.default_rng(seed).permutation(len(data.x_train))
    held = min(max(len(order) // 5, 1), MOST) if sweeps else 0
    if batch_size > len(order) - held:
        aside = f" ({held} more are held out to choose the rate)" if held else ""
        raise ValueError(
            f"--batch-size: found {batch_size}; expected at most the {len(order) - held} training "
            f"images{aside}"
        )
    if batch_size % devices:
        raise ValueError(
            f"--batch-size: found {batch_size}; expected a multiple of the {devices} devices"
        )
    key = jax.random.key(
        seed, impl="rbg"
    )  # on the CPU the default generator takes seconds more to compile
    params = jax.tree.map(
        lambda leaf: leaf.astype(dtype), jax.jit(network.init)(key, data.x_train[:1])
    )
    return Setting(
        network, params, data, order[held:], order[:held], steps, batch_size, seed, devices
    )


def shapes(dtype: Any) -> Any:
    """Returns the shapes of the network's parameters for `digits`.

    Nothing is read and no array is made.
    """

    def make(key: Array, images: Array) -> Any:
        return jax.tree.map(lambda leaf: leaf.astype(dtype), Network(10).init(key, images))

    return jax.eval_shape(make, jax.random.key(0, impl="rbg"), jnp.zeros((1, 8, 8, 1)))


def batches(setting: Setting, indices: np.ndarray) -> Array:
    """The images of each step, (steps, batch_size).

    Every image once, in random order, before any comes again.
    """
    random = np.random.default_rng(setting.seed)
    wanted = setting.steps * setting.batch_size
    epochs = [random.permutation(indices) for _ in range(-(-wanted // len(indices)))]
    return jnp.asarray(np.concatenate(epochs)[:wanted].reshape(setting.steps, -1), jnp.int32)
