"""The parameters and the gradients of a `Case` of `hostile.py`: finite numbers in the dtype of each
leaf.
"""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from hostile import SIZES


def precision(x64):
    if not x64:
        return contextlib.nullcontext()
    return jax.enable_x64(True) if hasattr(jax, "enable_x64") else jax.experimental.enable_x64()


def is_integer(leaf):
    return leaf.dtype.startswith("int")


def values(kind, leaf, t):
    """Of a kind, at a step from 0: finite, in the leaf's dtype."""
    dtype = jnp.dtype(leaf.dtype)
    info = jnp.finfo(dtype)
    rng = np.random.default_rng([leaf.seed, t])

    def part(kind):
        if kind == "mixed":
            found = [part(each) for each in SIZES]
            choice = np.random.default_rng(leaf.seed).integers(0, len(found), leaf.shape)
            return np.choose(choice, found) if leaf.shape else found[int(choice)]
        return SIZES[kind](info, 2.0**leaf.power, t, rng, leaf.shape)

    with np.errstate(all="ignore"):
        x = part(kind)
        x = x + 1j * part(kind) if dtype.kind == "c" else x
        parts = [
            np.clip(p, -float(info.max), float(info.max))
            for p in ((x.real, x.imag) if dtype.kind == "c" else (x,))
        ]
        whole = np.asarray(parts[0] + 1j * parts[1] if dtype.kind == "c" else parts[0])
        return whole.reshape(leaf.shape).astype(dtype)


def parameters(case):
    """Where the case starts: finite, at most half of what its dtype holds."""

    def make(leaf):
        if is_integer(leaf):
            return jnp.full(leaf.shape, leaf.seed, leaf.dtype)
        return jnp.asarray(values(leaf.start, dataclasses.replace(leaf, power=0), 99))

    return jax.tree.map(make, case.tree)


def gradients(case, t):
    """Those of a step from 0, as NumPy arrays; `float0` for integers."""
    return jax.tree.map(
        lambda leaf: (
            np.zeros(leaf.shape, jax.dtypes.float0)
            if is_integer(leaf)
            else values(leaf.grad, leaf, t)
        ),
        case.tree,
    )


def is_half(leaf):
    return leaf.dtype in ("bfloat16", "float16")
