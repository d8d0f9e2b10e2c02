"""Parameters on an abstract mesh, which needs no devices, and the specs of a state's arrays by
path.
"""

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh


def mesh_of(mode="Auto", **axes):
    """An abstract mesh."""
    return AbstractMesh(
        tuple(axes.values()),
        tuple(axes),
        axis_types=(getattr(jax.sharding.AxisType, mode),) * len(axes),
    )


MESH = mesh_of(data=4, model=2)
PARAMS = {
    "w": jax.ShapeDtypeStruct((16, 8), jnp.float32),
    "deep": [jax.ShapeDtypeStruct((3, 6, 10), jnp.bfloat16)],
    "b": jax.ShapeDtypeStruct((8,), jnp.float32),
    "n": jax.ShapeDtypeStruct((8,), jnp.int32),
}
EVEN = {"w": PARAMS["w"], "b": PARAMS["b"]}


def specs(tree):
    """The spec of each array by its path, without the `None`s at its end."""
    found = {}
    for path, sharding in jax.tree_util.tree_leaves_with_path(tree):
        entries = list(sharding.spec)
        while entries and entries[-1] is None:
            entries.pop()
        found[jax.tree_util.keystr(path)] = tuple(entries)
    return found


def at(found, *parts):
    """The specs of the arrays whose path has all parts."""
    return [spec for path, spec in found.items() if all(part in path for part in parts)]
