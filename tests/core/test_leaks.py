"""Ten thousand steps and a thousand transformations leave no memory behind.

The oracles are JAX's list of live arrays, and Linux's count of bytes.
"""

import gc
import os
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from counted import start

import adam_jax as aj

OPTIMIZED = True  # it computes for longer than it compiles


@pytest.mark.parametrize("donated", [True, False])
def test_ten_thousand_steps_leak_nothing(donated):
    """No array more than at the start, and not 200 bytes a step of anything else: in one of three
    thousands at least, because the rest of the process has memory of its own.
    """
    tx = aj.chain(aj.adamw(1e-3, storage=aj.storage.Codes(smallest=0)), aj.round_stochastically())
    params, grads = start()
    state = tx.init(params)

    def step(params, state):
        updates, state = tx.update(grads, state, params)
        with jax.numpy_dtype_promotion("standard"):
            return optax.apply_updates(params, updates), state

    jitted = jax.jit(step, donate_argnums=(0, 1) if donated else ())

    def run(steps):
        nonlocal params, state
        for _ in range(steps):
            params, state = jitted(params, state)
        jax.block_until_ready(state)
        gc.collect()
        return len(jax.live_arrays()), resident()

    arrays, memory = zip(*(run(steps) for steps in (1000, 3000, 3000, 3000)), strict=True)
    assert len(set(arrays)) == 1
    assert min(np.diff(memory)) < 200 * 3000
    assert int(state[0][0].count) == 10_000


def resident():
    """Bytes of memory that the process has, by Linux's count; 0 elsewhere."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else 0


def test_a_thousand_equal_transformations_compile_once_and_leave_nothing():
    params, grads = start()
    traces = []

    def step(tx, params, state):
        traces.append(tx)
        return tx.update(grads, state, params)

    jitted = jax.jit(step, static_argnums=0)

    def make():
        return aj.chain(
            aj.adamw(1e-3, b1=0.8, mask={"w": True, "b": False}, storage="8bit"),
            aj.stages.average_parameters(0.9),
        )

    state = make().init(params)
    jitted(make(), params, state)
    gc.collect()
    before = len(gc.get_objects())
    for _ in range(1000):
        jitted(make(), params, state)
    gc.collect()
    assert len(traces) == jitted._cache_size() == 1
    assert len(gc.get_objects()) - before < 500  # half an object each
