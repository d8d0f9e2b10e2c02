"""Trains the demo's network on all devices of all processes, and survives being killed at any
moment.

    python docs/scripts/train.py --directory runs/digits
    python docs/scripts/cluster.py --processes 4 --devices 2 -- \\
        docs/scripts/train.py --cluster --directory runs/digits

The data is parallel and the optimizer's state is shared out over the devices (ZeRO). Run the same
command again and it goes on from the last checkpoint. What it ends with is the same, bit for bit,
however often it was killed."""

from __future__ import annotations

import argparse
import faulthandler
import hashlib
import inspect
import json
import os
import traceback
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax import Array
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import adam_jax
from adam_jax._cli.data import Data, digits, read
from adam_jax._cli.network import Network

# Seconds without a sign of life after which a process counts as dead, and all others end with an
# error
HEARTBEAT = 10
ROUNDING: dict[str, list[Any]] = {
    "none": [],
    "stochastic": [adam_jax.round_stochastically()],
    "compensate": [adam_jax.compensate()],
}


def join() -> None:
    """Makes this process one of a cluster. Leave it out and the same program runs alone: nothing
    below asks which it is.

    Cloud TPU, GKE, SLURM and Open MPI tell JAX who takes part, and `jax.distributed.initialize()`
    needs no arguments. The variables are those of `cluster.py`. Some versions of JAX take no limit
    here and wait for 100 seconds."""
    variables = {"num_processes": "JAX_NUM_PROCESSES", "process_id": "JAX_PROCESS_ID"}
    given = {
        name: int(os.environ[variable])
        for name, variable in variables.items()
        if variable in os.environ
    }
    if "heartbeat_timeout_seconds" in inspect.signature(jax.distributed.initialize).parameters:
        given["heartbeat_timeout_seconds"] = HEARTBEAT
    jax.distributed.initialize(**given)
    if jax.process_index():
        warnings.simplefilter("ignore")  # all processes have the same to say


def batch(step: int, size: int, total: int) -> np.ndarray:
    """Which images a step sees.

    It follows from the step alone, so a checkpoint need not remember where the data was.
    """
    epoch, place = divmod(step, total // size)
    return np.random.default_rng((0, epoch)).permutation(total)[place * size : (place + 1) * size]


@jax.jit
def checksums(tree: Any) -> Any:
    """A number for each array, the same however it is sharded; it changes if any one element does.

    Orbax refuses a file that is cut short, but of a flipped byte among an array's it notices
    nothing. Each element is mixed with its position by steps that can be undone, and integers are
    added: that is exact in any order."""

    def one(x: Array) -> Array:
        bits = jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}").astype(jnp.uint32)
        place = jnp.zeros(x.shape, jnp.uint32)
        for axis, size in enumerate(x.shape):
            place = place * np.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
        mixed = (bits ^ place * np.uint32(0x9E3779B9)) * np.uint32(0x85EBCA6B)
        mixed = (mixed ^ mixed >> np.uint32(15)) * np.uint32(0xC2B2AE35)
        return jnp.sum(mixed ^ mixed >> np.uint32(13), dtype=jnp.uint32)

    return jax.tree.map(one, tree)


def sealed(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings with a hash of them: a flipped bit makes other settings, which are valid too."""
    own = {name: value for name, value in settings.items() if name != "seal"}
    text = json.dumps(own, sort_keys=True).encode()
    return own | {"seal": hashlib.sha256(text).hexdigest()}


def resume(manager: ocp.CheckpointManager, start: Any, settings: dict[str, Any]) -> tuple[int, Any]:
    """The newest checkpoint that is as it was saved, and its step; `start` and 0 if there is none
    at all.

    Raises:
      ValueError: if it was made with other settings, or if there are checkpoints and all are
        damaged. None is deleted then.
    """
    # Each process reads its part by itself: in a read that they share, one that fails would leave
    # the others waiting for it.
    mine = {jax.process_index()}
    alone = ocp.options.MultiprocessingOptions(
        primary_host=None, active_processes=mine, barrier_sync_key_prefix="read"
    )
    reader = ocp.Checkpointer(ocp.CompositeCheckpointHandler(), multiprocessing_options=alone)
    wanted = ocp.args.StandardRestore((start, checksums(start)))
    damaged: list[int] = []
    for step in sorted(manager.all_steps(), reverse=True):
        made, found, problem = sealed(settings), None, ""
        try:
            path = manager.directory / str(step)
            made = reader.restore(
                path, args=ocp.args.Composite(settings=ocp.args.JsonRestore())
            ).settings
            if made != sealed(made):
                problem, made = "its settings are not those that were saved", sealed(settings)
            elif made == sealed(settings):
                found = reader.restore(path, args=ocp.args.Composite(arrays=wanted)).arrays
        except Exception as error:  # whatever a damaged file makes of it: there are dozens of kinds
            problem = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        if made != sealed(settings):
            made.pop("seal")
            raise ValueError(
                f"found a checkpoint of {made}; expected {settings}. Choose another --directory."
            )
        if multihost_utils.process_allgather(np.array(found is None)).any():
            problem = problem or "another process cannot read it"
        elif jax.device_get(checksums(found[0])) != jax.device_get(found[1]):
            problem = "its numbers are not those that were saved"
        else:
            for step_after in damaged:
                manager.delete(step_after)  # steps that are going to be made, and saved, once more
            return step, found[0]
        print(f"checkpoint of step {step} is damaged, trying the one before: {problem}", flush=True)
        damaged.append(step)
    if damaged:
        raise ValueError(
            f"{manager.directory}: all checkpoints are damaged: steps {damaged}. Delete it to "
            "start anew."
        )
    return 0, start


def digest(tree: Any) -> str:
    """SHA-256 of every byte."""
    found = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        found.update(np.asarray(multihost_utils.process_allgather(leaf, tiled=True)).tobytes())
    return found.hexdigest()


def train(
    data: Data,
    steps: int,
    every: int,
    size: int,
    directory: Path,
    storage: str,
    rounding: str,
    limit: float,
) -> None:
    """From the last checkpoint in `directory`, or from the start, to `steps`; a checkpoint after
    `every` so many.
    """
    if every < 1:
        raise ValueError(f"--every: found {every}; expected 1 or more steps.")
    if not 0 < size <= len(data.x_train) or size % jax.device_count():
        raise ValueError(
            f"--batch: found {size}; expected a multiple of the {jax.device_count()} devices, and "
            f"no more than the {len(data.x_train)} training images."
        )
    mesh = Mesh(np.array(jax.devices()), ("data",))
    everywhere, split = (
        NamedSharding(mesh, PartitionSpec()),
        NamedSharding(mesh, PartitionSpec("data")),
    )
    network = Network(int(data.y_train.max()) + 1)
    tx = adam_jax.chain(adam_jax.adamw(1e-3, storage=storage), *ROUNDING[rounding])

    def make(key: Array) -> Any:
        params = network.init(key, data.x_train[:1])
        return (
            params if rounding == "none" else jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
        )

    key = jax.random.key(
        0, impl="rbg"
    )  # on the CPU the default generator takes seconds more to compile
    params = jax.jit(make, out_shardings=everywhere)(key)
    shardings = adam_jax.state_shardings(tx, params, everywhere, zero="data")
    state = jax.jit(tx.init, out_shardings=shardings)(params)

    def step(params: Any, state: Any, images: Array, labels: Array) -> Any:
        def loss(params: Any) -> Array:
            return optax.softmax_cross_entropy_with_integer_labels(
                network.apply(params, images), labels
            ).mean()

        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    step = jax.jit(step, out_shardings=(everywhere, shardings, everywhere), donate_argnums=(0, 1))

    def feed(i: int, array: np.ndarray) -> Array:
        """The batch of step `i`, of which each process reads its own part only."""
        mine = batch(i, size, len(array)).reshape(jax.process_count(), -1)[jax.process_index()]
        return jax.make_array_from_process_local_data(split, array[mine])

    say = print if jax.process_index() == 0 else lambda *_, **__: None
    # Written beside, then renamed: a checkpoint is there as a whole or not at all. What a killed
    # process left is cleared away.
    options = ocp.CheckpointManagerOptions(max_to_keep=3, cleanup_tmp_directories=True)
    settings = {"storage": storage, "rounding": rounding, "batch": size}
    with ocp.CheckpointManager(directory.resolve(), options=options) as manager:
        first, (params, state) = resume(manager, (params, state), settings)
        say(
            f"{jax.device_count()} devices of {jax.process_count()} processes, from step {first}",
            flush=True,
        )
        for i in range(first, steps):
            # A process that is dead misses its heartbeats. One that is stuck does not, and all
            # others would wait for it for ever.
            faulthandler.dump_traceback_later(limit, exit=True)
            params, state, value = step(params, state, feed(i, data.x_train), feed(i, data.y_train))
            if (i + 1) % every == 0 or i + 1 == steps:
                arrays = ((params, state), checksums((params, state)))
                # Waits until the one before is complete, copies the arrays, and writes while
                # training goes on.
                saved = ocp.args.Composite(
                    arrays=ocp.args.StandardSave(arrays),
                    settings=ocp.args.JsonSave(sealed(settings)),
                )
                manager.save(i + 1, args=saved)
                say(f"step {i + 1}: loss {float(value):.9g}", flush=True)
    print(f"digest {digest((params, state))}", flush=True)


def main() -> None:
    """Reads the command line, joins the cluster, trains."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cluster", action="store_true", help="this is a process of a cluster")
    parser.add_argument(
        "--directory", type=Path, required=True, help="of the checkpoints, one for all processes"
    )
    parser.add_argument(
        "--data", type=Path, help="images in an .npz file, as `python -m adam_jax --data` reads it"
    )
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--every", type=int, default=20, help="steps between two checkpoints")
    parser.add_argument("--batch", type=int, default=64, help="images per step, of all devices")
    storages = ["float32", "bfloat16", "8bit"]
    parser.add_argument("--storage", choices=storages, default="float32", help="of the moments")
    parser.add_argument(
        "--rounding", choices=list(ROUNDING), default="none", help="of parameters; none: in float32"
    )
    parser.add_argument(
        "--limit", type=float, default=300, help="seconds without a step before a process gives up"
    )
    args = parser.parse_args()
    if args.cluster:
        join()
    try:
        data = read(args.data) if args.data else digits()
        train(
            data,
            args.steps,
            args.every,
            args.batch,
            args.directory,
            args.storage,
            args.rounding,
            args.limit,
        )
    except BaseException:
        # Leave at once. Python's way out would wait for the other processes, which wait for this
        # one.
        traceback.print_exc()
        os._exit(1)


if __name__ == "__main__":
    main()
