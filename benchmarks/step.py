"""What one step of Adam costs: `python -m benchmarks.step`.

One jitted update + apply with donated parameters and state, ours and Optax's, next to PyTorch's fused Adam in a process of
its own. Machines are noisy, so contenders take turns call by call in every order, arrays are made afresh several times,
and each call is compared with the one of Optax beside it. Optax takes part twice: the ratio of it to itself is what this
machine, at this hour, cannot tell from 1.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from itertools import permutations
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

import adam_jax
from benchmarks._table import NOT_INSTALLED, Table, installed, show
from benchmarks._torch_step import TorchProcess
from benchmarks._trees import GRADIENT, TREES, WARM_UP

LEARNING_RATE = 1e-3
OURS, OPTAX, AGAIN, TORCH = "ours", "Optax", "Optax again", "PyTorch"
OPTIMIZERS = {OURS: adam_jax.adam(LEARNING_RATE), OPTAX: optax.adam(LEARNING_RATE), AGAIN: optax.adam(LEARNING_RATE)}
ORDERS = list(permutations(OPTIMIZERS))
ROUNDS = 5
"""How often arrays are made afresh: where they happen to lie in memory changes the time by more than noise does."""

STEP_BOUND, COMPILE_BOUND = 1.02, 1.0

Times: TypeAlias = dict[str, list[float]]


class Compiled(NamedTuple):
    """A compiled step.

    Attributes:
      call: (params, state, gradients) -> (params, state), the first two donated.
      seconds: what tracing, lowering and compiling took.
      accessed: bytes that it reads and writes, by XLA's count; `None` where the backend does not count.
      temporary: bytes that it needs beside its arguments and results, by XLA's count, or `None`.
    """

    call: Any
    seconds: float
    accessed: int | None
    temporary: int | None


class Result(NamedTuple):
    """What was measured on one tree.

    Attributes:
      tree: its name in `TREES`.
      steps: seconds of each call, by contender; no entry for PyTorch where it is not installed.
      compiles: seconds of each compilation.
      compiled: one compiled step for each of `OPTIMIZERS`.
    """

    tree: str
    steps: Times
    compiles: Times
    compiled: dict[str, Compiled]


class Ratio(NamedTuple):
    """The median of paired ratios, and the quartiles around it."""

    low: float
    median: float
    high: float


# Measuring.


def compile_step(optimizer: optax.GradientTransformation, tree: str) -> Compiled:
    """Compiles a step with nothing in JAX's caches."""

    def step(params: Any, state: Any, gradients: Any) -> tuple[Any, Any]:
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    params = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in TREES[tree]]
    state = jax.eval_shape(optimizer.init, params)
    jax.clear_caches()
    gc.collect()
    start = time.perf_counter()
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, params).compile()
    seconds = time.perf_counter() - start
    accessed = (compiled.cost_analysis() or {}).get("bytes accessed")
    memory = compiled.memory_analysis()
    return Compiled(compiled, seconds, accessed and int(accessed), memory and int(memory.temp_size_in_bytes))


def time_compiles(tree: str, repeats: int) -> tuple[Times, dict[str, Compiled]]:
    """Seconds of `repeats` compilations of each optimizer's step, in turns, and the last compiled ones."""
    seconds: Times = {name: [] for name in OPTIMIZERS}
    compiled = {}
    for repeat in range(repeats):
        for name in _order(repeat):
            compiled[name] = compile_step(OPTIMIZERS[name], tree)
            seconds[name].append(compiled[name].seconds)
    return seconds, compiled


class _Run:
    """A compiled step and the arrays that it moves."""

    def __init__(self, name: str, compiled: Compiled, gradients: Any) -> None:
        self._call, self._gradients = compiled.call, gradients
        self._params = jax.tree.map(jnp.zeros_like, gradients)
        self._state = OPTIMIZERS[name].init(self._params)

    def seconds(self) -> float:
        start = time.perf_counter()
        self._params, self._state = self._call(self._params, self._state, self._gradients)
        jax.block_until_ready(self._params)
        return time.perf_counter() - start


def time_steps(tree: str, compiled: dict[str, Compiled], calls: int, turn: int = 0) -> Times:
    """Seconds of `calls` steps of each optimizer, in turns, on fresh arrays; `turn` says whose are made first."""
    gradients = [jnp.full(shape, GRADIENT) for shape in TREES[tree]]
    runs = {name: _Run(name, compiled[name], gradients) for name in _order(turn)}
    seconds: Times = {name: [] for name in OPTIMIZERS}
    for call in range(-WARM_UP, calls):
        for name in _order(call):
            took = runs[name].seconds()
            if call >= 0:
                seconds[name].append(took)
    return seconds


def measure(tree: str, calls: int, compiles: int, torch: TorchProcess | None) -> Result:
    """Everything about one tree."""
    compile_seconds, compiled = time_compiles(tree, compiles)
    steps: Times = {name: [] for name in (*OPTIMIZERS, *([TORCH] if torch else []))}
    for turn, part in enumerate(np.array_split(np.arange(calls), min(ROUNDS, calls))):
        found = time_steps(tree, compiled, len(part), turn)
        if torch:
            found[TORCH] = torch.time_steps(tree, len(part))
        for name, seconds in found.items():
            steps[name] += seconds
    return Result(tree, steps, compile_seconds, compiled)


def ratio(times: Times, name: str) -> Ratio:
    """How many times as long as Optax, call by call."""
    return Ratio(*np.quantile(np.divide(times[name], times[OPTAX]), (0.25, 0.5, 0.75)))


def _order(turn: int) -> tuple[str, ...]:
    return ORDERS[turn % len(ORDERS)]


# The tables.


def cost_table(results: Iterable[Result], torch_device: str) -> Table:
    """What a step takes of time and memory, a row for each tree and contender."""
    ratio_head = "× Optax (quartiles)"
    return Table(
        "Adam: update and apply in one jitted, donated step",
        ("tree", "", "step", ratio_head, "compile", ratio_head, "bytes accessed", "a parameter", "temporary bytes"),
        [_cost_row(result, name, torch_device) for result in results for name in (*OPTIMIZERS, TORCH)],
        "Medians. Compile: trace, lower and compile with empty caches. Bytes: XLA's count, a float32.",
    )


def _cost_row(result: Result, name: str, torch_device: str) -> tuple[str, ...]:
    label = f"{TORCH} fused, {torch_device}" if name == TORCH else name
    if name not in result.steps:
        return (result.tree, name, NOT_INSTALLED, *[""] * 6)
    step = (f"{np.median(result.steps[name]) * 1e3:.2f} ms", _ratio_cell(result.steps, name))
    if name not in result.compiled:
        return (result.tree, label, *step, *[""] * 5)
    compiled = result.compiled[name]
    parameters = sum(int(np.prod(shape)) for shape in TREES[result.tree])
    return (
        result.tree,
        label,
        *step,
        f"{np.median(result.compiles[name]):.3f} s",
        _ratio_cell(result.compiles, name),
        _count_cell(compiled.accessed),
        "" if compiled.accessed is None else f"{compiled.accessed / parameters:.2f}",
        _count_cell(compiled.temporary),
    )


def _count_cell(count: int | None) -> str:
    return "not counted" if count is None else f"{count:,}"


def _ratio_cell(times: Times, name: str) -> str:
    if name == OPTAX:
        return "1"
    low, median, high = ratio(times, name)
    return f"{median:.3f} ({low:.3f}–{high:.3f})"


def bound_table(results: Iterable[Result]) -> Table:
    """Whether ours keeps within its bounds."""
    return Table(
        "Ours against its bounds",
        ("tree", "", "ours / Optax", "bound", "kept", "Optax again / Optax"),
        [row for result in results for row in _bound_rows(result)],
    )


def _bound_rows(result: Result) -> Iterator[tuple[str, ...]]:
    for what, times, bound in (("step", result.steps, STEP_BOUND), ("compile", result.compiles, COMPILE_BOUND)):
        found, noise = (ratio(times, name).median for name in (OURS, AGAIN))
        yield result.tree, what, f"{found:.3f}", f"≤ {bound:.2f}", _yes(found <= bound), f"{noise:.3f}"
    mine, theirs = (result.compiled[name].accessed for name in (OURS, OPTAX))
    if mine is not None and theirs is not None:
        yield result.tree, "bytes accessed", f"{mine / theirs:.7f} ({mine - theirs:+,} bytes)", "≤ 1", _yes(mine <= theirs), "1"


def _yes(kept: bool) -> str:
    return "yes" if kept else "no"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=__doc__)
    parser.add_argument("--trees", nargs="+", choices=TREES, default=list(TREES), help="default: all")
    parser.add_argument("--repeats", type=int, help="timed calls of each step; default: 100")
    parser.add_argument("--compiles", type=int, help="timed compilations of each step; default: 9")
    parser.add_argument("--quick", action="store_true", help="10 calls and 2 compilations: to see that it runs")
    parser.add_argument("--output", type=Path, help="a markdown file to write the tables to")
    options = parser.parse_args(arguments)
    calls = options.repeats or (10 if options.quick else 100)
    compiles = options.compiles or (2 if options.quick else 9)

    jax.config.update("jax_enable_compilation_cache", False)
    for optimizer in OPTIMIZERS.values():
        compile_step(optimizer, "4096x4096")  # the first in a process pays for what is loaded once
    with ExitStack() as stack:
        device = "cuda" if jax.default_backend() == "gpu" else "cpu"
        torch = stack.enter_context(TorchProcess(device)) if installed("torch") else None
        results = [measure(tree, calls, compiles, torch) for tree in options.trees]
        show([cost_table(results, torch.device if torch else ""), bound_table(results)], options.output)


if __name__ == "__main__":
    main()
