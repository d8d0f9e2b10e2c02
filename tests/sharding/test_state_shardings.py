"""`state_shardings` puts every array of a state where it belongs.

The oracle is the rules of its documentation, written out for small trees on an abstract mesh.
"""

import collections
import warnings

import jax
import jax.numpy as jnp
import optax
import pytest
from abstract_mesh import EVEN, MESH, PARAMS, at, mesh_of, specs
from jax.sharding import PartitionSpec as P

import adam_jax as aj


def test_moments_follow_their_parameter_and_all_else_is_everywhere(member):
    tx = aj.chain(member(0.1), aj.compensate())
    specs_of = {"w": P(None, "model"), "deep": [P(None, "model")], "b": P(), "n": P()}
    made = aj.state_shardings(tx, PARAMS, specs_of, mesh=MESH)
    shapes = jax.eval_shape(tx.init, PARAMS)
    assert jax.tree.structure(made) == jax.tree.structure(shapes)
    for (path, its), leaf in zip(
        jax.tree_util.tree_leaves_with_path(made), jax.tree.leaves(shapes), strict=True
    ):
        place = jax.tree_util.keystr(path)
        whole = {"['w']": (16, 8), "['deep'][0]": (3, 6, 10)}
        owner = next((name for name in whole if place.endswith(name)), None)
        expected = [None] * leaf.ndim
        if owner and leaf.shape[1] == whole[owner][1]:
            expected[1] = "model"
        assert list(its.spec) + [None] * (leaf.ndim - len(its.spec)) == expected, place
        assert its.mesh == MESH
        its.shard_shape(leaf.shape)


def test_a_block_shares_what_is_not_cut():
    """ν of a block has one row: cut along the columns it follows, cut along the rows it is
    everywhere.
    """
    tx = aj.adam_mini(0.1)
    columns = specs(aj.state_shardings(tx, EVEN, {"w": P(None, "model"), "b": P()}, mesh=MESH))
    rows = specs(aj.state_shardings(tx, EVEN, {"w": P("model"), "b": P()}, mesh=MESH))
    assert at(columns, "nu['w']") == [(None, "model")]
    assert (at(rows, "mu['w']"), at(rows, "nu['w']")) == ([("model",)], [()])


def test_zero_cuts_along_the_first_axis_that_is_whole_and_divides():
    params = {
        "first": jnp.zeros((8, 8)),
        "second": jnp.zeros((6, 8)),
        "behind": jnp.zeros((8, 8)),
        "within": jnp.zeros((16, 3)),
        "done": jnp.zeros((8, 4)),
        "both": jnp.zeros((16, 5)),
    }
    given = {
        "first": P(),
        "second": P(),
        "behind": P("model"),
        "within": P("model"),
        "done": P("data"),
        "both": P(("model", "data")),
    }
    made = specs(aj.state_shardings(aj.momentum(0.1), params, given, mesh=MESH, zero="data"))
    expected = {
        "first": ("data",),
        "second": (None, "data"),
        "behind": ("model", "data"),
        "within": (("model", "data"),),
        "done": ("data",),
        "both": (("model", "data"),),
    }
    assert {name: at(made, f"mu['{name}']")[0] for name in params} == expected


def test_zero_over_two_axes_and_over_what_the_parameters_leave():
    made = specs(aj.state_shardings(aj.adam(0.1), EVEN, P(), mesh=MESH, zero=("data", "model")))
    assert at(made, "mu['w']") == at(made, "nu['b']") == [(("data", "model"),)]
    made = specs(
        aj.state_shardings(
            aj.adam(0.1), EVEN, {"w": P(None, "data"), "b": P()}, mesh=MESH, zero=("data", "model")
        )
    )
    assert at(made, "mu['w']") == [("model", "data")]


def test_all_arrays_of_a_parameter_are_cut_alike():
    """Along the columns, for the rows of adam_mini's ν are one: μ and ν of one element are then on
    one device.
    """
    made = specs(aj.state_shardings(aj.adam_mini(0.1), EVEN, P(), mesh=MESH, zero="data"))
    assert at(made, "mu['w']") == at(made, "nu['w']") == [(None, "data")]


def test_zero_shares_out_the_state_of_rounding_and_averages_too():
    tx = aj.chain(aj.adam(0.1, storage="8bit"), aj.compensate(), aj.stages.average_parameters(0.9))
    half = {"w": jax.ShapeDtypeStruct((64, 128), jnp.bfloat16)}
    made = specs(aj.state_shardings(tx, half, P(), mesh=MESH, zero="data"))
    assert at(made, "['w']") == [("data",)] * 6
    assert at(made, "scale") == [("data",)] * 2


def test_scales_are_sharded_as_their_rows_are():
    """Where the axis that shares a scale is cut, each device has the scale; one scale per leaf is
    on every device.
    """
    shapes = {"rows": (32, 256), "heads": (16, 4, 64), "short": (128, 64), "vector": (4096,)}
    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    for tx in (
        aj.adam(0.1, storage="8bit"),
        optax.chain(aj.skip_nonfinite(aj.adam(0.1, storage="8bit"))),
    ):
        first = specs(aj.state_shardings(tx, params, P("data"), mesh=MESH))
        last = specs(
            aj.state_shardings(
                tx,
                params,
                {n: P(*[None] * (len(shape) - 1), "data") for n, shape in shapes.items()},
                mesh=MESH,
            )
        )
        for name in shapes:
            cut = ("data",) if name in ("rows", "heads") else ()
            assert at(first, "scale", f"['{name}']") == [cut] * 2
            assert at(last, "scale", f"['{name}']") == [()] * 2


def test_scales_find_their_parameter_in_flax_boxes():
    """Boxes carry names of axes, which scales do not have."""
    linen = pytest.importorskip("flax.linen")
    boxed = {"w": linen.Partitioned(jnp.zeros((32, 256)), ("rows", None))}
    tx = aj.adam(0.1, storage="8bit")
    made = aj.state_shardings(tx, boxed, P("data"), mesh=MESH)
    assert at(specs(made), "scale") == [("data",)] * 2
    assert [type(leaf) for leaf in jax.tree.leaves(tx.init(boxed)[0].scales)] == [
        type(jnp.zeros(()))
    ] * 2


def foreign():
    labels = {"w": "a", "b": "b"}
    yield "optax.adam", optax.adam(0.1), 4
    yield "chain", optax.chain(optax.clip(1.0), aj.adam(0.1)), 4
    yield "masked", optax.masked(aj.adam(0.1), {"w": True, "b": False}), 2
    yield "partition", optax.partition({"a": aj.adam(0.1), "b": aj.momentum(0.1)}, labels), 3
    yield "MultiSteps", optax.MultiSteps(aj.adam(0.1), 2), 6
    yield "inject", optax.inject_hyperparams(aj.adam)(0.1), 4
    yield "guard", aj.skip_nonfinite(aj.adam(0.1)), 4
    yield "adafactor", optax.adafactor(0.1, min_dim_size_to_factor=4), 1


@pytest.mark.parametrize(
    ("name", "tx", "arrays"), list(foreign()), ids=[name for name, *_ in foreign()]
)
@pytest.mark.usefixtures("standard_promotion")
def test_states_of_others(name, tx, arrays):
    """How many of their arrays are a parameter's; of a factored ν, rows and columns are no
    parameter's.
    """
    made = specs(aj.state_shardings(tx, EVEN, {"w": P("data"), "b": P("data")}, mesh=MESH))
    cut = {path: spec for path, spec in made.items() if spec}
    assert set(cut.values()) == {("data",)}
    assert len(cut) == arrays, cut


def test_a_single_array_owns_its_moments_alone():
    """By its path, which is empty, every array would end in it; weights and rings of its shape are
    not its.
    """
    for shape, own in (((2, 2), 2), ((128,), 2), ((), 0)):
        leaf = jax.ShapeDtypeStruct(shape, jnp.float32)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            made = aj.state_shardings(
                aj.skip_spikes(aj.adam(0.1)), leaf, P(), mesh=mesh_of(data=2), zero="data"
            )
        assert len(list(filter(None, specs(made).values()))) == own
    named = {
        "b1": jax.ShapeDtypeStruct((4,), jnp.float32),
        "weight": jax.ShapeDtypeStruct((4, 4), jnp.float32),
    }
    module = collections.namedtuple("Module", named)(**named)
    for tree in (named, module):
        made = specs(aj.state_shardings(aj.adam(0.1), tree, P("data"), mesh=MESH))
        assert len(list(filter(None, made.values()))) == 4


def test_along_explicit_axes_nothing_is_cut_twice():
    """JAX would refuse to add a gradient that is cut otherwise."""
    mesh = mesh_of("Explicit", data=4, model=2)
    with pytest.warns(UserWarning, match="nu"):
        made = specs(
            aj.state_shardings(
                aj.adam_mini(0.1), EVEN, {"w": P(None, "model"), "b": P()}, mesh=mesh, zero="data"
            )
        )
    assert (at(made, "mu['w']"), at(made, "nu['w']")) == ([("data", "model")], [(None, "model")])
