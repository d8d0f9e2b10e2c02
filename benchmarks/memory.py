"""Memory a device needs for parameters and state, on paper: `python -m benchmarks.memory`.

From the shapes of published models and `state_shardings` on a mesh that need not be there. Nothing
is allocated.
"""

from __future__ import annotations

import argparse
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, PartitionSpec

import adam_jax
from benchmarks._table import Table, show


class Decoder(NamedTuple):
    """The sizes of a decoder of Llama's kind."""

    layers: int
    width: int
    hidden: int
    heads: int
    shared_heads: int
    words: int = 32_000

    def shapes(self, dtype: Any) -> dict[str, jax.ShapeDtypeStruct]:
        """Its parameters, those of all layers stacked, as `jax.lax.scan` over layers has them."""
        narrow = self.width * self.shared_heads // self.heads
        matrices = {
            "q": self.width,
            "k": narrow,
            "v": narrow,
            "o": self.width,
            "gate": self.hidden,
            "up": self.hidden,
        }
        layer = {name: (self.layers, self.width, columns) for name, columns in matrices.items()}
        layer |= {
            "down": (self.layers, self.hidden, self.width),
            "norms": (self.layers, 2, self.width),
        }
        ends = {
            "embedding": (self.words, self.width),
            "head": (self.width, self.words),
            "norm": (self.width,),
        }
        return {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in (layer | ends).items()}


MODELS = {
    "TinyLlama": Decoder(22, 2048, 5632, 32, 4),
    "Llama 2 7B": Decoder(32, 4096, 11008, 32, 32),
    "Llama 2 70B": Decoder(80, 8192, 28672, 64, 8),
}
ADAM = adam_jax.adam
SETUPS: dict[str, tuple[Any, Any]] = {
    "f32, f32 moments": (ADAM(1e-3), jnp.float32),
    "f32, bf16 moments": (ADAM(1e-3, storage="bfloat16"), jnp.float32),
    "f32, 8-bit moments": (ADAM(1e-3, storage="8bit"), jnp.float32),
    "bf16 compensated, 8-bit moments": (
        adam_jax.chain(ADAM(1e-3, storage="8bit"), adam_jax.compensate()),
        jnp.bfloat16,
    ),
    "bf16 stochastic, 8-bit moments": (
        adam_jax.chain(ADAM(1e-3, storage="8bit"), adam_jax.round_stochastically()),
        jnp.bfloat16,
    ),
}
WAYS = (1, 8, 64)


def resting(tx: Any, params: Any, ways: int) -> int:
    """Bytes on each of so many data-parallel devices between two steps.

    Whole parameters, and a share of the state.
    """
    everywhere = PartitionSpec()
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # norms of 22 layers divide by 64 no more: they are kept whole, and counted so
        shardings = adam_jax.state_shardings(
            tx, params, everywhere, mesh=AbstractMesh((ways,), ("data",)), zero="data"
        )
    state = jax.tree.leaves(jax.eval_shape(tx.init, params))
    parts = [
        math.prod(its.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for its, leaf in zip(jax.tree.leaves(shardings), state, strict=True)
    ]
    return sum(parts) + sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))


def memory_table() -> Table:
    """A row for each model and way to train it."""
    rows = []
    for model, decoder in MODELS.items():
        for name, (tx, dtype) in SETUPS.items():
            params = decoder.shapes(dtype)
            count = sum(leaf.size for leaf in params.values())
            gib = [resting(tx, params, ways) / 2**30 for ways in WAYS]
            rows.append(
                (
                    model,
                    f"{count / 1e9:.2f}",
                    name,
                    *(f"{size:.1f}" for size in [*gib, gib[0] / WAYS[-1]]),
                )
            )
    return Table(
        "GiB a device for parameters and Adam's state, between two steps",
        (
            "model",
            "10⁹ parameters",
            "",
            "no ZeRO",
            *(f"ZeRO over {ways}" for ways in WAYS[1:]),
            f"all cut over {WAYS[-1]}",
        ),
        rows,
        "ZeRO: every device holds all parameters, and its share of the state. All cut: parameters "
        "too (fully sharded, or model parallel). During a step there are gradients as well, as "
        "large as the parameters in their dtype, and activations.",
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Counts and prints."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__)
    parser.add_argument("--output", type=Path, help="a markdown file to write the table to")
    show([memory_table()], parser.parse_args(arguments).output)


if __name__ == "__main__":
    main()
