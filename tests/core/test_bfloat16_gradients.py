"""bfloat16 gradients move float32 parameters as the same numbers in float32 do.

The oracles are the run whose gradients are widened before it, and Adam in long double.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import papers
import pytest
from helpers import QUICKLY
from typed_runs import BFLOAT16, FLOAT32, PARAMS, course, dtypes, gradients

import adam_jax as aj
from adam_jax import presets

MEMBERS = {name: getattr(aj, name) for name in aj.family.__all__}


def both(txs, steps=100):
    """By name: the course of each transformation along bfloat16 gradients, and along the same
    numbers in float32.
    """
    low, high = gradients(steps), gradients(steps, FLOAT32)
    return jax.jit(
        lambda: {
            name: (course(tx, PARAMS, low), course(tx, PARAMS, high)) for name, tx in txs.items()
        },
        compiler_options=QUICKLY,
    )()


def agree(low, high):
    """Equal structures, shapes and dtypes, and numbers that differ by less than roundings do.

    These are two programs: each may fuse other products with sums, which changes the last bit of a
    step, 2⁻²⁴. In 100 steps that is 1e-5 at most. An update that was rounded to bfloat16 is 2e-3
    off. Codes and bfloat16 numbers may then round to a neighbour."""
    assert jax.tree.structure(low) == jax.tree.structure(high)
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(low), jax.tree.leaves(high), strict=True
    ):
        place = jax.tree_util.keystr(path)
        assert (x.dtype, x.shape) == (y.dtype, y.shape), place
        if x.dtype.itemsize >= 4:
            np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-6, err_msg=place)
        else:
            assert np.mean(np.asarray(x) != np.asarray(y)) <= 0.01, place


@functools.cache
def members():
    return both({name: member(0.1) for name, member in MEMBERS.items()})


def test_bfloat16_gradients_move_float32_parameters_as_float32_ones_do(member):
    low, high = members()[member.__name__]
    assert dtypes(low[2]) == {"w": FLOAT32, "b": FLOAT32, "n": jnp.dtype("int32")}
    agree(low, high)


@functools.cache
def stages():
    """Chained by Optax, which rounds no updates itself."""
    return both(
        {name: optax.chain(*member(0.1).stages) for name, member in MEMBERS.items()}, steps=20
    )


def test_chained_by_optax_they_do_so_too(member):
    low, high = stages()[member.__name__]
    assert low[2]["w"].dtype == FLOAT32
    agree(low, high)


WRAPPED = {
    "chain": aj.chain(aj.chain(aj.adamw(0.1)), aj.stages.cautious()),
    "by_path": aj.by_path({"w": {"weight_decay": 0.0}, "b": aj.yogi(0.1)}, aj.adamw(0.1)),
    "by_path in a chain": aj.chain(
        aj.by_path({"w": "frozen"}, aj.adamw(0.1)), aj.stages.average_parameters(0.9)
    ),
    "by_path of a stage": aj.by_path({"w": aj.scale_by_learning_rate(0.1)}, aj.adamw(0.1)),
    "skip_nonfinite": aj.skip_nonfinite(aj.adamw(0.1)),
    "skip_spikes": aj.skip_spikes(aj.chain(aj.adamw(0.1), aj.stages.average_parameters(0.9))),
    "observe": aj.observe(aj.skip_nonfinite(aj.adamw(0.1)), every=3),
    "average_parameters": aj.chain(aj.adamw(0.1), aj.stages.average_parameters(0.9)),
    "optax.chain of averages": optax.chain(aj.adamw(0.1), aj.stages.average_parameters(0.9)),
    "8bit": aj.adamw(0.1, storage=aj.storage.Codes(smallest=0)),
    "round_stochastically": aj.chain(aj.adamw(0.1), aj.round_stochastically()),
    "compensate": aj.chain(aj.adamw(0.1), aj.compensate()),
    "optax.chain": optax.chain(aj.adamw(0.1), aj.scale_by_learning_rate(0.1)),
    "the learning rate alone": aj.scale_by_learning_rate(0.1),
    "optax.masked": optax.masked(aj.adamw(0.1), {"w": True, "b": True, "n": False}),
    "presets": presets.torch.adamw(0.1),
}


@functools.cache
def wrapped():
    with jax.numpy_dtype_promotion("standard"):  # for wrappers of Optax
        return both(WRAPPED, steps=20)


@pytest.mark.parametrize("name", WRAPPED)
def test_in_wrappers_they_do_so_too(name):
    low, high = wrapped()[name]
    assert low[2]["w"].dtype == low[2]["b"].dtype == FLOAT32
    agree(low, high)


def test_adam_with_bfloat16_gradients_against_long_double():
    """Rounded to bfloat16, updates would be off by 1e-3."""
    grads = np.asarray(gradients(100)["w"].astype(FLOAT32)).reshape(100, -1)
    start = np.zeros(grads.shape[1], np.float32)
    expected = np.stack(list(papers.adam(grads, start, 0.1, 0.9, 0.999, 1e-8)))
    found = course(aj.adam(0.1), jnp.asarray(start), jnp.asarray(grads, BFLOAT16))[2]
    np.testing.assert_allclose(
        np.cumsum(found, 0, dtype=np.longdouble), expected, rtol=0, atol=1e-5
    )
