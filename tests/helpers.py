"""Helpers of several test files: drawn trees, runs, comparisons to the last bit,
expected errors.
"""

import functools
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

TESTS = Path(__file__).parent
ROOT = TESTS.parent

QUICKLY = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
"""Compiler options with which LLVM does less. What XLA makes of a program and of its memory stays
the same. A product and a sum are rounded one after the other, as they are unjitted."""


@functools.cache
def has_float16():
    """Whether XLA can compile float16 for this processor.

    For one without F16C it cannot: symbols are missing.
    """
    try:
        jax.jit(lambda x: (x.astype(jnp.float32) + 1).astype(jnp.float16))(jnp.ones(9, jnp.float16))
    except jax.errors.JaxRuntimeError:
        return False
    return True


def normals(*shape, seed=0, scale=1.0, dtype=jnp.float32):
    """Normal random numbers, drawn in float64."""
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape) * scale, dtype)


def draw_tree(seed, shapes, scale=1.0, dtype=jnp.float32):
    """A tree of normal random numbers, of the shapes (tuples of integers) in a tree."""
    rng = np.random.default_rng(seed)
    is_shape = lambda x: isinstance(x, tuple) and all(isinstance(n, int) for n in x)
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.standard_normal(shape) * scale, dtype),
        shapes,
        is_leaf=is_shape,
    )


def paths_of(txs, gradients, start):
    """Of several transformations by name: the parameters after every step along `gradients`, from
    one program.
    """

    def run(tx, gradients):
        def step(carry, g):
            params, state = carry
            updates, state = tx.update(g, state, params)
            params = optax.apply_updates(params, updates)
            return (params, state), params

        return jax.lax.scan(step, (start, tx.init(start)), gradients)[1]

    return jax.jit(lambda gradients: {name: run(tx, gradients) for name, tx in txs.items()})(
        gradients
    )


def avals(tree):
    """The tree with shape, dtype and weak type in place of each array."""
    return jax.tree.map(lambda x: (jnp.shape(x), jnp.result_type(x), jax.typeof(x).weak_type), tree)


def bits(tree):
    """Every array by its path, as dtype, shape and bytes: −0 is not 0, and NaN is itself."""
    return {
        jax.tree_util.keystr(path): (leaf.dtype, leaf.shape, np.asarray(leaf).tobytes())
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def same(found, expected):
    """Equal structures, and equal arrays to the last bit."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for (place, left), right in zip(bits(found).items(), bits(expected).values(), strict=True):
        assert left[:2] == right[:2], place
        assert left[2] == right[2], place


def refused(error, *says):
    """A context that expects an error whose message has all of `says`."""
    return pytest.raises(error, match="(?s)" + "".join(f"(?=.*{re.escape(part)})" for part in says))


MOVES = re.compile(
    r"= (.*?) (all-gather|all-to-all|all-reduce|collective-permute|collective-broadcast|"
    r"reduce-scatter|send|recv)(?:-start)?\("
)


def moves(text):
    """Kind and number of elements of what each collective of a compiled program returns."""
    matches = filter(None, map(MOVES.search, text.splitlines()))
    return [
        [match[2], math.prod(map(int, filter(None, shape.split(",")))) if shape else 1]
        for match in matches
        for shape in re.findall(r"\w\[([\d,]*)\]", match[1])
    ]


QUICK_FLAGS = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
"""What `QUICKLY` says, for a whole process."""


def on_eight_devices(script, *arguments, flags=""):
    """What a test file prints as a script, in a process whose eight devices are this CPU: JSON on
    its last line.
    """
    count = "--xla_force_host_platform_device_count=8"
    flags = f"{os.environ.get('XLA_FLAGS', '')} {count} {flags}"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-W", "error", script, *arguments]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])
