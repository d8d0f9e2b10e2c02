"""Flax's boxes, which name the axes that their arrays are sharded by, around moments of other
shapes (B5).

The oracle is the same run without boxes, and for shardings those of the parameters on the axes that
a moment has.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from jax.sharding import PartitionSpec

import adam_jax as aj

DRAW = np.random.default_rng(0).standard_normal((3, 8, 4)).astype(np.float32)


@pytest.fixture
def mesh():
    """NNX names axes only where a mesh has them."""
    auto = (jax.sharding.AxisType.Auto,) * 2
    devices = np.array(jax.devices()[:1]).reshape(1, 1)
    return jax.sharding.Mesh(devices, ("rows", "columns"), axis_types=auto)


def boxed(kernel):
    return {
        "kernel": linen.Partitioned(kernel, ("rows", "columns")),
        "bias": linen.Partitioned(kernel[0], ("columns",)),
        "plain": kernel,
        "none": None,
        "count": jnp.int32(1),
    }


def types(tree):
    return jax.tree.structure(tree), [(x.shape, x.dtype) for x in jax.tree.leaves(tree)]


OPTIMIZERS = {
    "adam_mini": lambda: aj.adam_mini(0.1, weight_decay=0.1, mask="matrices"),
    "leaf": lambda: aj.adam_mini(0.1, blocks="leaf"),
    "8bit": lambda: aj.adam_mini(0.1, storage=aj.storage.Codes(smallest=1)),
    "group": lambda: aj.by_path({"kernel": {"b1": 0.8}}, aj.adam_mini(0.1)),
    "skip": lambda: aj.skip_nonfinite(aj.adam_mini(0.1)),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_boxes_change_no_step_and_no_type(name):
    """B5: the box of a shared ν names the axes that ν has."""
    tx = OPTIMIZERS[name]()
    with_boxes = jax.tree.map(jnp.asarray, boxed(DRAW[0]))
    plain = linen.unbox(with_boxes)
    gradients = [
        jax.tree.map(lambda x: x if x.dtype != jnp.int32 else np.zeros((), jax.dtypes.float0), g)
        for g in map(boxed, DRAW)
    ]
    found, state = with_boxes, tx.init(with_boxes)
    expected, of_plain = plain, tx.init(plain)
    first = types(state)
    for gradient in gradients:
        updates, state = tx.update(gradient, state, found)
        found = aj.apply_updates(found, updates)
        updates, of_plain = tx.update(linen.unbox(gradient), of_plain, expected)
        expected = aj.apply_updates(expected, updates)
        assert types(state) == first
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)


def test_names_of_axes_that_nu_does_not_have_are_gone():
    """B5: Flax shards a state by its boxes; an axis of size 1 cannot be divided."""
    tx, params = aj.adam_mini(0.1), boxed(jnp.asarray(DRAW[0]))
    state = jax.eval_shape(tx.init, params)[0]
    assert (state.nu["kernel"].value.shape, state.nu["kernel"].names) == ((1, 4), (None, "columns"))
    specs = linen.get_partition_spec(state)
    assert specs.mu["kernel"] == PartitionSpec("rows", "columns")
    assert specs.nu["kernel"] == PartitionSpec(None, "columns")
    assert specs.nu["bias"] == PartitionSpec("columns")


class Model(nnx.Module):
    def __init__(self):
        init = nnx.with_partitioning(nnx.initializers.ones, ("rows", "columns"))
        self.linear = nnx.Linear(8, 4, kernel_init=init, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("blocks", ["output", "leaf"])
def test_nnx_shards_a_shared_nu(mesh, blocks):
    """B5: `nnx.Optimizer` shards each array as its box says, as soon as it is made."""
    with (jax.set_mesh if hasattr(jax, "set_mesh") else jax.sharding.use_mesh)(mesh):
        model = Model()
        tx = aj.adam_mini(0.5, blocks=blocks)
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

        @nnx.jit
        def step(model, optimizer):
            gradients = nnx.grad(lambda model: model.linear(jnp.ones((2, 8))).sum())(model)
            optimizer.update(model, gradients)

        for _ in range(2):
            step(model, optimizer)
        nu = optimizer.opt_state[0].nu["linear"]["kernel"]
        expected = PartitionSpec(None, "columns" if blocks == "output" else None)
        said = nu.get_metadata()
        assert tuple(said.get("out_sharding") or said["sharding"]) == tuple(expected)
        np.testing.assert_allclose(model.linear.kernel[...], 0.0, atol=1e-6)


def test_a_run_becomes_one_with_a_shared_nu():
    """The converted ν is in boxes that fit the next step, as a fresh one is."""
    params = boxed(jnp.asarray(DRAW[0]))
    params.pop("count")
    old, new = aj.adam(0.1), aj.adam_mini(0.1)
    updates, state = old.update(params, old.init(params), params)
    converted = aj.convert_state(state, old, new, params).state
    assert types(converted) == types(new.init(params))
    updates, after = new.update(params, converted, params)
    assert types(after) == types(converted)
    assert jax.tree.structure(updates) == jax.tree.structure(params)
