"""A mesh of real devices, a step of the parameters, and the bytes of a tree."""

import math

import jax
import numpy as np
import optax


def mesh_on(shape, names, mode="Auto"):
    devices = np.array(jax.devices()[: math.prod(shape)]).reshape(shape)
    return jax.sharding.Mesh(
        devices, names, axis_types=(getattr(jax.sharding.AxisType, mode),) * len(shape)
    )


def apply(params, updates):
    with jax.numpy_dtype_promotion("standard"):
        return optax.apply_updates(params, updates)


def raw(tree):
    return {
        jax.tree_util.keystr(path): np.asarray(x).tobytes()
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
    }
