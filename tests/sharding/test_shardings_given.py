"""What `state_shardings` takes for shardings, what it warns of, and what it refuses.

The expected messages are written out here.
"""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from abstract_mesh import EVEN, MESH, PARAMS, at, mesh_of, specs
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import adam_jax as aj

SPECS = {"w": P(None, "model"), "deep": [P("model", None, None)], "b": P(), "n": P()}


def test_what_cannot_be_cut_is_said():
    with pytest.warns(UserWarning, match="divides by the 4 devices") as caught:
        made = aj.state_shardings(
            aj.adam(0.1), PARAMS, SPECS | {"deep": [P()]}, mesh=MESH, zero="data"
        )
    (said,) = (str(warning.message) for warning in caught)
    assert all(f"{moment}['deep'][0] (3, 6, 10)" in said for moment in ("mu", "nu"))
    assert "['w']" not in said
    assert at(specs(made), "mu['deep']") == [()]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        aj.state_shardings(aj.adam(0.1), PARAMS, P(), mesh=mesh_of(data=1), zero="data")
        aj.state_shardings(aj.adam(0.1), {"empty": jnp.zeros((0, 3))}, P(), mesh=MESH, zero="data")


def test_shardings_may_be_one_or_a_prefix_or_those_of_the_arrays():
    tx = aj.adam(0.1)
    one = NamedSharding(MESH, P())
    everywhere = aj.state_shardings(tx, PARAMS, one)
    assert set(specs(everywhere).values()) == {()}
    whole = {"w": P("data"), "deep": [P()], "b": P(), "n": P()}
    prefix = {"w": P("data"), "deep": P(), "b": P(), "n": P()}
    assert specs(aj.state_shardings(tx, PARAMS, whole, mesh=MESH)) == specs(
        aj.state_shardings(tx, PARAMS, prefix, mesh=MESH)
    )
    placed = jax.tree.map(
        lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=NamedSharding(MESH, P("data"))),
        EVEN,
    )
    assert specs(aj.state_shardings(tx, placed, None)) == specs(
        aj.state_shardings(tx, EVEN, P("data"), mesh=MESH)
    )
    leaf = jax.ShapeDtypeStruct((16, 8), jnp.float32)
    assert at(specs(aj.state_shardings(tx, leaf, P("data"), mesh=MESH)), ".mu") == [("data",)]


REFUSED = {
    "no transformation": (
        lambda: aj.state_shardings(aj.adam, EVEN, P()),
        TypeError,
        "expected a gradient transformation",
    ),
    "no mesh": (
        lambda: aj.state_shardings(aj.adam(0.1), EVEN, P()),
        ValueError,
        "as mesh=, or by jax.set_mesh",
    ),
    "no sharding": (
        lambda: aj.state_shardings(aj.adam(0.1), EVEN, {"w": "data", "b": P()}, mesh=MESH),
        TypeError,
        "['w'] found 'data'",
    ),
    "no arrays": (
        lambda: aj.state_shardings(aj.adam(0.1), {"w": np.ones(3)}, None),
        TypeError,
        "['w'] found None",
    ),
    "another tree": (
        lambda: aj.state_shardings(aj.adam(0.1), EVEN, {"w": P()}, mesh=MESH),
        ValueError,
        "shardings: found the structure",
    ),
    "no such axis": (
        lambda: aj.state_shardings(aj.adam(0.1), EVEN, P(), mesh=MESH, zero="x"),
        ValueError,
        "zero: found 'x'; expected axes",
    ),
    "indivisible": (
        lambda: aj.state_shardings(aj.adam(0.1), {"w": np.ones(3)}, P("data"), mesh=MESH),
        ValueError,
        "of shape (3,)",
    ),
    "no name": (
        lambda: aj.state_shardings(aj.adam(0.1), EVEN, P(), mesh=MESH, zero=3),
        ValueError,
        "zero: found 3; expected the name",
    ),
    "twice": (
        lambda: aj.state_shardings(aj.adam(0.1), EVEN, P(), mesh=MESH, zero=("data",) * 2),
        ValueError,
        "several different ones",
    ),
    "no mesh at all": (
        lambda: aj.state_shardings(aj.adam(0.1), EVEN, P(), mesh="data"),
        TypeError,
        "mesh: found 'data'",
    ),
    "unconstrained": (
        lambda: aj.state_shardings(aj.adam(0.1), EVEN, P(P.UNCONSTRAINED), mesh=MESH),
        ValueError,
        "UNCONSTRAINED",
    ),
    "two meshes": (
        lambda: aj.state_shardings(
            aj.adam(0.1), EVEN, NamedSharding(mesh_of(data=2), P()), mesh=MESH
        ),
        ValueError,
        "found 2 meshes",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    call, error, message = REFUSED[case]
    with pytest.raises(error, match="state_shardings") as caught:
        call()
    assert message in str(caught.value)
