"""What a sum is once it is rounded to 16 bits, in NumPy, and parameters and gradients of bfloat16.

XLA's CPU takes subnormal numbers for zero, and so does this where the backend does.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax

import adam_jax as aj

LINKS = {"stochastic": aj.round_stochastically(3), "compensate": aj.compensate()}
LOW = {"bfloat16": jnp.bfloat16, "float16": jnp.float16}
RATE = (
    0.125  # a power of two: with it a product is exact, and however it is fused makes no difference
)


def f32(x):
    return np.asarray(x).astype(np.float32)


def bits(x):
    return np.asarray(x).view(f"u{np.asarray(x).dtype.itemsize}")


@functools.cache
def finite(dtype):
    """Every finite number of a 16-bit dtype, in order."""
    every = np.arange(2**16, dtype=np.uint16).view(dtype).astype(np.float32)
    return np.unique(every[np.isfinite(every)])


def enclosing(x, dtype):
    """The two numbers of a dtype around finite x, or x twice; the largest where x is larger."""
    numbers = finite(dtype)
    below = np.maximum(np.searchsorted(numbers, x, "right") - 1, 0)
    above = np.minimum(np.searchsorted(numbers, x, "left"), len(numbers) - 1)
    return numbers[below], numbers[above]


def nearest(x, dtype):
    """The nearer of the two, half way the one that is larger in size."""
    below, above = enclosing(x, dtype)
    middle = (below.astype(float) + above) / 2
    return np.where(np.where(x > 0, x >= middle, x > middle), above, below)


def recombined(params, lost):
    """The float32 that a parameter and its lost bits are."""
    return (bits(f32(params)) + np.asarray(lost).astype(np.int32).view(np.uint32)).view(np.float32)


def apply_eagerly(tx, params, state, updates):
    """One step, as Optax's users write it."""
    updates, state = tx.update(updates, state, params)
    with jax.numpy_dtype_promotion("standard"):
        return optax.apply_updates(params, updates), state


apply = jax.jit(apply_eagerly, static_argnums=0)


def grads_of(params, steps=6, seed=0):
    """Small ones in bfloat16, as a backward pass gives them: for the plain sum most
    are too small.
    """
    draw = np.random.default_rng(seed)
    return [
        {
            k: jnp.asarray(
                draw.standard_normal(p.shape) * 2.0 ** draw.integers(-8, 0, p.shape), p.dtype
            )
            for k, p in params.items()
        }
        for _ in range(steps)
    ]


def small_params():
    draw = np.random.default_rng(5)
    return {
        "w": jnp.asarray(draw.standard_normal((8, 6)), jnp.bfloat16),
        "b": jnp.asarray(draw.standard_normal(4), jnp.float32),
    }


def check_path(link, path, grads, name="w"):
    """Whether parameters went where gradients took them:

    `path` begins at the start, and has one more entry than `grads`.
    """
    exact = f32(path[0])
    for before, after, g in zip(path, path[1:], grads, strict=False):
        assert after.dtype == jnp.bfloat16
        if link is LINKS["compensate"]:
            exact = exact - np.float32(RATE) * f32(g)
            np.testing.assert_array_equal(f32(after), nearest(exact, jnp.bfloat16), err_msg=name)
        else:
            below, above = enclosing(f32(before) - np.float32(RATE) * f32(g), jnp.bfloat16)
            assert ((f32(after) == below) | (f32(after) == above)).all()
    if link is LINKS["compensate"]:
        assert (f32(path[-1]) != exact).mean() > 0.5
    assert len(path) == len(grads) + 1
    assert any((f32(a) != f32(b)).any() for a, b in itertools.pairwise(path))


def descent(link, rate=RATE):
    return aj.chain(aj.scale_by_learning_rate(rate), link)


def walk(tx, params, grads):
    path, state = [params], jax.jit(tx.init)(params)
    for g in grads:
        params, state = apply(tx, params, state, g)
        path.append(params)
    return path, state
