"""Times of steps and of compilations, taken in turn."""

from __future__ import annotations

import gc
import time
from itertools import permutations
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks._torch_step import TorchProcess
from benchmarks._trees import GRADIENT, LEAVES, TREES, WARM_UP

LEARNING_RATE = 1e-3


OURS, OPTAX, AGAIN, TORCH = "ours", "Optax", "Optax again", "PyTorch"


FLOAT32, COPY = "f32", "copy"


ROUNDS = 5
"""How often arrays are made afresh: where they happen to lie in memory changes the time by more
than noise does."""


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
