"""What one step of Adam costs: `python -m benchmarks.step`.

One jitted update + apply with donated parameters and state, ours and Optax's, next to PyTorch's
fused Adam in a process of its own. Machines are noisy, so contenders take turns call by call in
every order, arrays are made afresh several times, and each call is compared with the one of Optax
beside it. Optax takes part twice: the ratio of it to itself is what this machine, at this hour,
cannot tell from 1.

Then the storages of the moments, ours against ours, and against a copy of the parameters: what
memory alone would take.
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
from benchmarks._trees import GRADIENT, LEAVES, TREES, WARM_UP

LEARNING_RATE = 1e-3
OURS, OPTAX, AGAIN, TORCH = "ours", "Optax", "Optax again", "PyTorch"
FLOAT32, COPY = "f32", "copy"
ROUNDS = 5
"""How often arrays are made afresh: where they happen to lie in memory changes the time by more
than noise does."""

STEP_BOUND, COMPILE_BOUND = 1.02, 1.0

Times: TypeAlias = dict[str, list[float]]

SHAPES = TREES | LEAVES


class Contender(NamedTuple):
    """What takes part.

    Attributes:
      optimizer: a transformation.
      dtype: that of parameters and gradients.
    """

    optimizer: Any
    dtype: str = "float32"


Contenders: TypeAlias = dict[str, Contender]

OPTIMIZERS: Contenders = {
    OURS: Contender(adam_jax.adam(LEARNING_RATE)),
    OPTAX: Contender(optax.adam(LEARNING_RATE)),
    AGAIN: Contender(optax.adam(LEARNING_RATE)),
}


def _stored(storage: Any, *links: Any) -> Any:
    return adam_jax.chain(adam_jax.adam(LEARNING_RATE, storage=storage), *links)


STORAGES: Contenders = {
    FLOAT32: Contender(_stored("float32")),
    "bf16 moments": Contender(_stored("bfloat16")),
    "8-bit moments": Contender(_stored("8bit")),
    "8-bit moments, bf16 parameters rounded stochastically": Contender(
        _stored("8bit", adam_jax.round_stochastically()), "bfloat16"
    ),
    "bf16 parameters, compensated": Contender(
        _stored("float32", adam_jax.compensate()), "bfloat16"
    ),
    COPY: Contender(optax.scale(1.0)),
}
"""The copy reads parameters and gradients and writes their sum: 12 bytes a parameter, and no
arithmetic to speak of."""


class Compiled(NamedTuple):
    """A compiled step.

    Attributes:
      call: (params, state, gradients) -> (params, state), the first two donated.
      seconds: what tracing, lowering and compiling took.
      accessed: bytes that it reads and writes, by XLA's count; `None` where the backend does not
        count.
      temporary: bytes that it needs beside its arguments and results, by XLA's count, or `None`.
    """

    call: Any
    seconds: float
    accessed: int | None
    temporary: int | None


class Result(NamedTuple):
    """What was measured on one tree.

    Attributes:
      tree: its name in `SHAPES`.
      steps: seconds of each call, by contender; no entry for PyTorch where it is not installed.
      compiles: seconds of each compilation.
      compiled: one compiled step for each contender.
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


def compile_step(contender: Contender, tree: str) -> Compiled:
    """Compiles a step with nothing in JAX's caches."""

    def step(params: Any, state: Any, gradients: Any) -> tuple[Any, Any]:
        updates, state = contender.optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    params = [jax.ShapeDtypeStruct(shape, contender.dtype) for shape in SHAPES[tree]]
    state = jax.eval_shape(contender.optimizer.init, params)
    jax.clear_caches()
    gc.collect()
    start = time.perf_counter()
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, params).compile()
    seconds = time.perf_counter() - start
    accessed = (compiled.cost_analysis() or {}).get("bytes accessed")
    memory = compiled.memory_analysis()
    return Compiled(
        compiled, seconds, accessed and int(accessed), memory and int(memory.temp_size_in_bytes)
    )


def time_compiles(
    contenders: Contenders, tree: str, repeats: int
) -> tuple[Times, dict[str, Compiled]]:
    """Seconds of `repeats` compilations of each contender's step, in turns.

    And the last compiled ones.
    """
    seconds: Times = {name: [] for name in contenders}
    compiled = {}
    for repeat in range(repeats):
        for name in _order(contenders, repeat):
            compiled[name] = compile_step(contenders[name], tree)
            seconds[name].append(compiled[name].seconds)
    return seconds, compiled


class _Run:
    """A compiled step and the arrays that it moves."""

    def __init__(self, contender: Contender, compiled: Compiled, tree: str) -> None:
        self._call = compiled.call
        self._gradients = [jnp.full(shape, GRADIENT, contender.dtype) for shape in SHAPES[tree]]
        self._params = jax.tree.map(jnp.zeros_like, self._gradients)
        self._state = contender.optimizer.init(self._params)

    def seconds(self) -> float:
        start = time.perf_counter()
        self._params, self._state = self._call(self._params, self._state, self._gradients)
        jax.block_until_ready(self._params)
        return time.perf_counter() - start


def time_steps(
    contenders: Contenders, tree: str, compiled: dict[str, Compiled], calls: int, turn: int = 0
) -> Times:
    """Seconds of `calls` steps of each contender, in turns, on fresh arrays.

    `turn` says whose are made first.
    """
    runs = {name: _Run(contenders[name], compiled[name], tree) for name in _order(contenders, turn)}
    seconds: Times = {name: [] for name in contenders}
    for call in range(-WARM_UP, calls):
        for name in _order(contenders, call):
            took = runs[name].seconds()
            if call >= 0:
                seconds[name].append(took)
    return seconds


def measure(
    contenders: Contenders, tree: str, calls: int, compiles: int, torch: TorchProcess | None = None
) -> Result:
    """Everything about one tree."""
    compile_seconds, compiled = time_compiles(contenders, tree, compiles)
    steps: Times = {name: [] for name in (*contenders, *([TORCH] if torch else []))}
    for turn, part in enumerate(np.array_split(np.arange(calls), min(ROUNDS, calls))):
        found = time_steps(contenders, tree, compiled, len(part), turn)
        if torch:
            found[TORCH] = torch.time_steps(tree, len(part))
        for name, seconds in found.items():
            steps[name] += seconds
    return Result(tree, steps, compile_seconds, compiled)


def ratio(times: Times, name: str, to: str = OPTAX) -> Ratio:
    """How many times as long as another, call by call."""
    return Ratio(*np.quantile(np.divide(times[name], times[to]), (0.25, 0.5, 0.75)))


def _order(contenders: Contenders, turn: int) -> tuple[str, ...]:
    orders = (
        list(permutations(contenders))
        if len(contenders) <= 3
        else [np.roll(list(contenders), k) for k in range(len(contenders))]
    )
    return tuple(orders[turn % len(orders)])


# The tables.


def cost_table(results: Iterable[Result], torch_device: str) -> Table:
    """What a step takes of time and memory, a row for each tree and contender."""
    ratio_head = "× Optax (quartiles)"
    return Table(
        "Adam: update and apply in one jitted, donated step",
        (
            "tree",
            "",
            "step",
            ratio_head,
            "compile",
            ratio_head,
            "bytes accessed",
            "a parameter",
            "temporary bytes",
        ),
        [
            _cost_row(result, name, torch_device)
            for result in results
            for name in (*OPTIMIZERS, TORCH)
        ],
        "Medians. Compile: trace, lower and compile with empty caches. Bytes: XLA's count, a "
        "float32.",
    )


def _cost_row(result: Result, name: str, torch_device: str) -> tuple[str, ...]:
    label = f"{TORCH} fused, {torch_device}" if name == TORCH else name
    if name not in result.steps:
        return (result.tree, name, NOT_INSTALLED, *[""] * 6)
    step = (f"{np.median(result.steps[name]) * 1e3:.2f} ms", ratio_cell(result.steps, name))
    if name not in result.compiled:
        return (result.tree, label, *step, *[""] * 5)
    compiled = result.compiled[name]
    parameters = sum(int(np.prod(shape)) for shape in SHAPES[result.tree])
    return (
        result.tree,
        label,
        *step,
        f"{np.median(result.compiles[name]):.3f} s",
        ratio_cell(result.compiles, name),
        _count_cell(compiled.accessed),
        "" if compiled.accessed is None else f"{compiled.accessed / parameters:.2f}",
        _count_cell(compiled.temporary),
    )


def _count_cell(count: int | None) -> str:
    return "not counted" if count is None else f"{count:,}"


def ratio_cell(times: Times, name: str) -> str:
    """The median of paired ratios to Optax, and the quartiles around it."""
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
    for what, times, bound in (
        ("step", result.steps, STEP_BOUND),
        ("compile", result.compiles, COMPILE_BOUND),
    ):
        found, noise = (ratio(times, name).median for name in (OURS, AGAIN))
        yield (
            result.tree,
            what,
            f"{found:.3f}",
            f"≤ {bound:.2f}",
            _yes(found <= bound),
            f"{noise:.3f}",
        )
    mine, theirs = (result.compiled[name].accessed for name in (OURS, OPTAX))
    if mine is not None and theirs is not None:
        yield (
            result.tree,
            "bytes accessed",
            f"{mine / theirs:.7f} ({mine - theirs:+,} bytes)",
            "≤ 1",
            _yes(mine <= theirs),
            "1",
        )


def storage_table(results: Iterable[Result]) -> Table:
    """What each storage takes, and how much memory it moves in that time."""
    return Table(
        "Adam by storage: the same step, ours",
        (
            "tree",
            "",
            "step",
            "× f32 (quartiles)",
            "bytes a parameter at rest",
            "moved in a step",
            "GB/s",
        ),
        [_storage_row(result, name) for result in results for name in STORAGES],
        "Moved: parameters and state read and written once, gradients read once. More is moved "
        "where XLA makes several loops.",
    )


def _storage_row(result: Result, name: str) -> tuple[str, ...]:
    contender = STORAGES[name]
    params = [jax.ShapeDtypeStruct(shape, contender.dtype) for shape in SHAPES[result.tree]]
    sizes = adam_jax.state_bytes(contender.optimizer, params)
    moved = (2 * sizes.total + sizes.parameters) / sizes.elements
    seconds = float(np.median(result.steps[name]))
    low, median, high = ratio(result.steps, name, FLOAT32)
    times = "1" if name == FLOAT32 else f"{median:.2f} ({low:.2f}–{high:.2f})"
    speed = moved * sizes.elements / seconds / 1e9
    rests = f"{sizes.total / sizes.elements:.2f}"
    return (
        result.tree,
        name,
        f"{seconds * 1e3:.2f} ms",
        times,
        rests,
        f"{moved:.2f}",
        f"{speed:.1f}",
    )


def _yes(kept: bool) -> str:
    return "yes" if kept else "no"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=__doc__)
    parser.add_argument(
        "--trees", nargs="+", choices=TREES, default=list(TREES), help="default: all"
    )
    parser.add_argument(
        "--storage-trees",
        nargs="*",
        choices=TREES,
        default=["4096x4096"],
        help="for the storages; default: 4096x4096",
    )
    parser.add_argument("--repeats", type=int, help="timed calls of each step; default: 100")
    parser.add_argument("--compiles", type=int, help="timed compilations of each step; default: 9")
    parser.add_argument(
        "--quick", action="store_true", help="10 calls and 2 compilations: to see that it runs"
    )
    parser.add_argument("--output", type=Path, help="a markdown file to write the tables to")
    options = parser.parse_args(arguments)
    calls = options.repeats or (10 if options.quick else 100)
    compiles = options.compiles or (2 if options.quick else 9)

    jax.config.update("jax_enable_compilation_cache", False)
    for contender in OPTIMIZERS.values():
        compile_step(contender, "4096x4096")  # the first in a process pays for what is loaded once
    with ExitStack() as stack:
        device = "cuda" if jax.default_backend() == "gpu" else "cpu"
        torch = stack.enter_context(TorchProcess(device)) if installed("torch") else None
        results = [measure(OPTIMIZERS, tree, calls, compiles, torch) for tree in options.trees]
    stored = [measure(STORAGES, tree, calls, compiles=1) for tree in options.storage_trees]
    tables = [
        cost_table(results, torch.device if torch else ""),
        bound_table(results),
        storage_table(stored),
    ]
    show(tables, options.output)


if __name__ == "__main__":
    main()
