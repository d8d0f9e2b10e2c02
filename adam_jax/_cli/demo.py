"""The demonstration behind `python -m adam_jax`.

One small network, one start, one order of the batches, many optimizers.

Data flows from top to bottom: images → network → the training of one rate → a sweep over rates →
the final run.
"""

from __future__ import annotations

import itertools
import time
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import adam_jax
from adam_jax._cli.course import RATES, Course, Factory, Keeper, Log, Progress, Tell
from adam_jax._cli.evaluation import evaluate, logits
from adam_jax._cli.network import Network
from adam_jax._cli.setting import MOST, Setting, batches

EVALUATIONS = 50

# Evaluations at the end of a sweep whose mean chooses the rate, so that one lucky step does not
LAST = 5

# Some versions of JAX leave these without types.
_wait: Callable[[Any], Any] = jax.block_until_ready

_spec: Any = PartitionSpec


def run(
    make: Factory,
    setting: Setting,
    rate: float | None,
    tell: Tell,
    keeper: Keeper | None = None,
    log: Log | None = None,
) -> Course:
    """Trains with the best rate of a sweep, or with the one given.

    A run that was kept goes on.

    A sweep is not kept: interrupted in it, a run sweeps anew, and finds the same rate. Once that is
    chosen it is kept.

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
    return train(
        make, setting, rate, edge, lambda doing, steps: tell(doing, done + steps), keeper, log
    )


def sweep(make: Factory, setting: Setting, tell: Tell) -> int:
    """Returns which of `RATES` has the lowest loss on the validation images near the end.

    Each rate is trained for as many steps as the final run takes.

    All rates train at once, in one compiled function. Test images are not looked at.
    """
    tell(f"compiling {len(RATES)} rates", 0)
    x, y = setting.data.x_train, setting.data.y_train
    images, labels, order = jnp.asarray(x), jnp.asarray(y), batches(setting, setting.fit)
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
            losses.append([evaluate(setting.network, params, *held_out)[0] for params in each])
        tell(f"trying {len(RATES)} rates", int(last))
    mean = np.mean(losses, axis=0)
    # A rate that diverged is infinitely bad; if all did, the smallest is the one to show.
    return int(np.argmin(np.where(np.isfinite(mean), mean, np.inf)))


def train(
    make: Factory,
    setting: Setting,
    rate: float,
    edge: str,
    tell: Tell,
    keeper: Keeper | None = None,
    log: Log | None = None,
) -> Course:
    """One run on all training images, evaluated as it goes.

    The batches and the state are cut over the devices.
    """
    tell(f"compiling rate {rate:g}", 0)
    data, network = setting.data, setting.network
    mesh = Mesh(np.array(jax.devices()[: setting.devices]), ("data",))
    everywhere = NamedSharding(mesh, _spec())
    images, labels, traced_rate = jax.device_put(
        (data.x_train, data.y_train, np.float32(rate)), everywhere
    )
    order = jax.device_put(
        batches(setting, np.arange(len(images))), NamedSharding(mesh, _spec(None, "data"))
    )
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", UserWarning
        )  # a layer of ten outputs does not divide by most numbers of devices
        shardings = (
            everywhere,
            adam_jax.state_shardings(make(rate), setting.params, everywhere, zero="data"),
        )
    begin, advance = (jax.jit(its, out_shardings=shardings) for its in _trainer(make, network))
    carry = begin(setting.params, traced_rate)

    progress = Progress(rate, edge, [], [], [], 0.0)
    if keeper and keeper.progress:
        progress, carry = keeper.progress, keeper.load(carry)
        tell(f"going on from step {progress.steps[-1]}", progress.steps[-1])
    begun_at = np.int32(progress.steps[-1] if progress.steps else 0)
    # The first chunk has no step: it compiles, which is not timed, and lets the curves begin at the
    # start.
    for first, last in [
        (begun_at, begun_at),
        *(chunk for chunk in _chunks(setting.steps) if chunk[0] >= begun_at),
    ]:
        begun = time.perf_counter()
        carry = _wait(advance(carry, traced_rate, images, labels, order, first, last))
        if int(last) in progress.steps:
            continue
        seconds = progress.seconds + (time.perf_counter() - begun if last else 0.0)
        params = jax.device_get(carry[0])  # or each device would evaluate all images
        loss = evaluate(network, params, data.x_train[:MOST], data.y_train[:MOST])[0]
        accuracy = evaluate(network, params, data.x_test[:MOST], data.y_test[:MOST])[1]
        progress = Progress(
            rate,
            edge,
            [*progress.steps, int(last)],
            [*progress.losses, loss],
            [*progress.accuracies, accuracy],
            seconds,
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
    loss = evaluate(network, params, data.x_train[:10_000], data.y_train[:10_000])[0]
    accuracy = evaluate(network, params, data.x_test, data.y_test)[1]
    return Course(
        rate,
        edge,
        progress.steps,
        progress.losses,
        progress.accuracies,
        loss,
        accuracy,
        progress.seconds,
    )


def _scalars(tx: Any, state: Any, loss: float, accuracy: float) -> dict[str, float]:
    """What is logged at an evaluation."""
    rate = adam_jax.hyperparameters(state, tx)["learning_rate"]
    return {"training loss": loss, "test accuracy": accuracy, "learning rate": float(rate)}


def _trainer(make: Factory, network: Network) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """`begin(params, rate)` makes what training carries on.

    `advance` takes it from step `first` to step `last`.

    The bounds are arguments, so that chunks of any length, which a progress bar needs, are one
    compiled function.
    """

    def begin(params: Any, rate: Array) -> Any:
        return params, make(rate).init(params)

    def advance(
        carry: Any,
        rate: Array,
        images: Array,
        labels: Array,
        order: Array,
        first: Array,
        last: Array,
    ) -> Any:
        optimizer = make(rate)

        def loss(params: Any, chosen: Array) -> Array:
            scores = logits(network, params, images[chosen])
            mean: Array = optax.softmax_cross_entropy_with_integer_labels(
                scores, labels[chosen]
            ).mean()
            return mean

        def step(i: Array, carry: Any) -> Any:
            params, state = carry
            updates, state = optimizer.update(jax.grad(loss)(params, order[i]), state, params)
            with jax.numpy_dtype_promotion(
                "standard"
            ):  # a bfloat16 parameter's update may be float32, and Optax adds them
                return optax.apply_updates(params, updates), state

        return jax.lax.fori_loop(first, last, step, carry)

    return begin, advance


def _chunks(steps: int) -> list[tuple[Any, Any]]:
    ends = np.unique(np.linspace(0, steps, min(steps, EVALUATIONS) + 1).astype(np.int32))
    return list(itertools.pairwise(ends))
