"""How long a step takes to trace, lower and compile, beside Optax: `python -m benchmarks.compile`.

Each compilation has a process of its own, with no cache, and reports its time and its peak memory.
Contenders take turns. Where libtpu is installed, the TPU's compiler is timed too; it needs no TPU.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import optax

import adam_jax
from benchmarks._table import Table, installed, show

LEAVES = (30, 100, 300)
SHAPES = ((64, 128), (128, 64), (96, 96))
"""Those of the leaves, in turn."""

OBSERVED = 40
"""How many leaves an observed step is timed with."""

TPU_LEAVES, TPU_SHAPE = 24, (768, 768)

OPTAX, AGAIN, FLOAT32 = "Optax", "Optax again", "float32"
ROUNDED = "8bit, bf16 and round_stochastically"

CONTENDERS: dict[str, Callable[[], Any]] = {
    OPTAX: lambda: optax.adamw(1e-3),
    AGAIN: lambda: optax.adamw(1e-3),
    FLOAT32: lambda: adam_jax.adamw(1e-3),
    "bfloat16": lambda: adam_jax.adamw(1e-3, storage="bfloat16"),
    "8bit": lambda: adam_jax.adamw(1e-3, storage="8bit"),
    ROUNDED: lambda: adam_jax.chain(
        adam_jax.adamw(1e-3, storage="8bit"), adam_jax.round_stochastically()
    ),
}

WATCHED: dict[str, Callable[[], Any]] = {
    FLOAT32: CONTENDERS[FLOAT32],
    "float32, observed": lambda: adam_jax.observe(CONTENDERS[FLOAT32](), every=10),
    "8bit": CONTENDERS["8bit"],
    "8bit, observed": lambda: adam_jax.observe(CONTENDERS["8bit"](), every=10),
}


def compile_once(contender: str, leaves: int, backend: str) -> dict[str, float]:
    """Compiles one step in this process.

    Args:
      contender: a name in `CONTENDERS` or `WATCHED`.
      leaves: how many there are.
      backend: "cpu" or "tpu".

    Returns:
      "seconds" of tracing, lowering and compiling, and the process' "peak" of memory in MB.
    """
    tx = (CONTENDERS | WATCHED)[contender]()
    dtype = jnp.bfloat16 if contender == ROUNDED else jnp.float32
    if backend == "tpu":
        from benchmarks.tpu import compile_step

        compile_step(optax.sgd(1.0), [jax.ShapeDtypeStruct((8,), dtype)], "v5e")  # loads libtpu
        params: Any = [jax.ShapeDtypeStruct(TPU_SHAPE, dtype)] * leaves
        start = time.perf_counter()
        compile_step(tx, params, "v5e")
        return _cost(start)
    shapes = {f"layer{i:03}": SHAPES[i % len(SHAPES)] for i in range(leaves)}
    params = {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in shapes.items()}

    def step(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        updates, state = tx.update(grads, state, params)
        return adam_jax.apply_updates(params, updates), state

    jax.jit(lambda x: x + 1).lower(jnp.float32(0)).compile()
    state = jax.eval_shape(tx.init, params)
    start = time.perf_counter()
    jax.jit(step, donate_argnums=(0, 1)).lower(params, state, params).compile()
    return _cost(start)


def _cost(start: float) -> dict[str, float]:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    return {"seconds": time.perf_counter() - start, "peak": peak}


def measure(
    contenders: Sequence[str], leaves: int, rounds: int, backend: str = "cpu"
) -> dict[str, list[dict[str, float]]]:
    """Compiles each contender several times, in turn, in processes of their own."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name in contenders:
            command = [sys.executable, "-m", "benchmarks.compile", "--one", name, str(leaves)]
            run = subprocess.run([*command, backend], check=True, capture_output=True, text=True)
            found[name].append(json.loads(run.stdout.splitlines()[-1]))
    return found


def compile_table(title: str, sizes: dict[int, dict[str, list[dict[str, float]]]]) -> Table:
    """Returns medians of seconds and memory, and their ratios to those of float32."""
    rows = []
    for leaves, found in sizes.items():
        base = {key: median(run[key] for run in found[FLOAT32]) for key in ("seconds", "peak")}
        for name, runs in found.items():
            seconds, peak = (median(run[key] for run in runs) for key in ("seconds", "peak"))
            ratios = f"{seconds / base['seconds']:.2f}", f"{peak / base['peak']:.2f}"
            rows.append((str(leaves), name, f"{seconds:.2f}", ratios[0], f"{peak:.0f}", ratios[1]))
    heads = ("leaves", "adamw", "s", "of float32", "peak MB", "of float32")
    note = "Medians of trace + lower + compile. No cache; each in a process of its own."
    return Table(title, heads, rows, note)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compile", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="six leaves, once, no TPU")
    parser.add_argument("--output", type=Path, help="a markdown file to write the tables to")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.one is not None:
        name, leaves, backend = chosen.one
        print(json.dumps(compile_once(name, int(leaves), backend)))
        return
    rounds, sizes, observed = (1, (6,), 6) if chosen.quick else (3, LEAVES, OBSERVED)
    trees = {leaves: measure(list(CONTENDERS), leaves, rounds) for leaves in sizes}
    tables = [
        compile_table("Compiling a step on the CPU", trees),
        compile_table(
            "Compiling an observed step", {observed: measure(list(WATCHED), observed, rounds)}
        ),
    ]
    if installed("libtpu") and not chosen.quick:
        on_tpu = {TPU_LEAVES: measure(list(CONTENDERS), TPU_LEAVES, 1, "tpu")}
        tables.append(compile_table("The TPU's compiler, v5e, leaves of 768×768", on_tpu))
    show(tables, chosen.output)


if __name__ == "__main__":
    main()
