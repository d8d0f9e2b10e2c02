"""`init` of shapes makes the arrays that `init` of parameters makes, as Optax's does."""

import jax
import jax.numpy as jnp
import optax
import pytest
from helpers import avals, bits

import adam_jax as aj
from adam_jax import family, presets
from adam_jax.stages import average_parameters, averaged_parameters

SHAPES = {
    "w": jax.ShapeDtypeStruct((8, 256), jnp.bfloat16),
    "b": [jax.ShapeDtypeStruct((3,), jnp.float32)],
    "z": jax.ShapeDtypeStruct((2, 3), jnp.complex64),
    "n": jax.ShapeDtypeStruct((3,), jnp.int32),
}
PARAMS = jax.tree.map(lambda p: jnp.zeros(p.shape, p.dtype), SHAPES)


AROUND = {
    "guarded": lambda tx: aj.skip_spikes(aj.chain(tx, aj.round_stochastically())),
    "observed": lambda tx: aj.observe(aj.skip_nonfinite(tx), every=2),
    "compensated": lambda tx: aj.chain(tx, aj.compensate(), average_parameters(0.9)),
    "in groups": lambda tx: aj.by_path({"w": {"storage": "8bit"}, "b/.*": "frozen"}, default=tx),
    "before Optax's": lambda tx: aj.chain(tx, optax.ema(0.9), optax.trace(0.9)),
    "in Optax's": lambda tx: optax.MultiSteps(tx, 2),
}
CASES = {
    f"{name} {storage}": lambda name=name, storage=storage: getattr(aj, name)(1e-3, storage=storage)
    for name in family.__all__
    for storage in ("float32", "bfloat16", "8bit")
} | {
    f"adamw {name}": lambda around=around: around(aj.adamw(1e-3)) for name, around in AROUND.items()
}


@pytest.mark.parametrize("case", CASES)
def test_a_state_of_shapes_is_that_of_parameters(case):
    """B2."""
    tx = CASES[case]()
    state = tx.init(SHAPES)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state))
    assert avals(state) == avals(tx.init(PARAMS))
    assert bits(state) == bits(tx.init(PARAMS))


def test_every_preset_and_stage_takes_shapes():
    """B2."""
    members = [
        make(1e-3)
        for module in (presets.torch, presets.keras, presets.optax)
        for make in (getattr(module, name) for name in module.__all__)
    ]
    shapes, params = ({name: x for name, x in of.items() if name != "z"} for of in (SHAPES, PARAMS))
    for tx in members:  # those of PyTorch refuse complex leaves
        assert bits(tx.init(shapes)) == bits(tx.init(params)), tx


def test_an_average_that_began_with_a_shape_is_the_parameters_after_a_step():
    """B2: what stands in place of unknown parameters has no weight."""
    tx = aj.chain(aj.adam(1e-3), average_parameters(0.99))
    params = {"w": jnp.full((4,), 3.0)}
    for first in (params, jax.eval_shape(lambda: params)):
        updates, state = tx.update(params, tx.init(first), params)
        assert bits(averaged_parameters(state)) == bits(aj.apply_updates(params, updates))
