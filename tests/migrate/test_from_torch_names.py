"""Names and transposes of `from_torch` and `params_from_torch`: each tensor becomes the leaf of its
name, turned as it should lie.

NumPy arrays stand for tensors; the oracle is the array, transposed by hand.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import refused
from torch_states import NAMES, PARAMS, TABLE, draw, moved, saved

import adam_jax as aj


def test_moments_lie_and_rest_as_ours_do():
    state = moved()
    np.testing.assert_array_equal(state[0].mu["dense"]["kernel"], draw(3, 2).T)
    np.testing.assert_array_equal(state[0].nu["norm"]["scale"], draw(3) ** 2)
    np.testing.assert_allclose(state[0].weights[0], [1 - 0.9**5, 1 - 0.999**5], rtol=1e-6)
    assert int(state[0].count) == 5
    back = aj.migrate.to_torch(state, aj.adam(1e-3), saved(), names=NAMES, mapping=TABLE)
    jax.tree.map(np.testing.assert_array_equal, back, saved())

    tx = aj.adam(1e-3, storage=aj.storage.Codes(smallest=0))
    narrow = moved(tx=tx)
    converted = aj.convert_state(state, aj.adam(1e-3), tx, PARAMS).state
    jax.tree.map(np.testing.assert_array_equal, narrow, converted)


@pytest.mark.parametrize(
    ("torch_shape", "flax_shape", "axes"),
    [
        ((4, 3), (3, 4), (1, 0)),
        ((4, 3, 5), (5, 3, 4), (2, 1, 0)),
        ((4, 3, 5, 6), (5, 6, 3, 4), (2, 3, 1, 0)),
        ((4, 3, 5, 6, 7), (5, 6, 7, 3, 4), (2, 3, 4, 1, 0)),
    ],
)
def test_kernels_have_their_first_axes_last_and_other_leaves_stay(torch_shape, flax_shape, axes):
    x = draw(*torch_shape)
    for leaf, expected, shape in [
        ("kernel", x.transpose(axes), flax_shape),
        ("embedding", x, torch_shape),
    ]:
        params = {"layers": [{leaf: jnp.zeros(shape)}]}
        made = aj.migrate.params_from_torch({"layers.0.weight": x}, params)
        np.testing.assert_array_equal(made["layers"][0][leaf], expected)
        np.testing.assert_array_equal(
            aj.migrate.params_to_torch(made, {"layers.0.weight": x})["layers.0.weight"], x
        )


def test_after_flatten_puts_rows_where_flax_flattens():
    images, x = draw(5, 3, 2, 4), draw(7, 24, seed=1)
    there, back = aj.migrate.after_flatten((3, 2, 4))
    ours = images.transpose(0, 2, 3, 1).reshape(5, -1) @ there(x)
    np.testing.assert_allclose(ours, images.reshape(5, -1) @ x.T, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(back(there(x)), x)


def test_transposes_can_be_given_by_table_and_by_function():
    x, params = draw(3, 5, 2, 2), {"up": {"kernel": jnp.zeros((2, 2, 3, 5))}}
    for transpose in (
        {"up.weight": (2, 3, 0, 1)},
        lambda name, path: (2, 3, 0, 1) if path == "up/kernel" else None,
    ):
        made = aj.migrate.params_from_torch({"up.weight": x}, params, transpose=transpose)
        np.testing.assert_array_equal(made["up"]["kernel"], x.transpose(2, 3, 0, 1))


def test_names_of_statistics_and_of_what_has_no_place():
    state_dict = {
        "bn.weight": draw(2),
        "bn.running_mean": draw(2),
        "bn.num_batches_tracked": np.int64(3),
        "extra.bias": draw(1),
    }
    params = {"bn": {"scale": jnp.zeros(2), "mean": jnp.zeros(2)}}
    made = aj.migrate.params_from_torch(state_dict, params, mapping={"extra": None})
    np.testing.assert_array_equal(made["bn"]["mean"], state_dict["bn.running_mean"])
    back = aj.migrate.params_to_torch(
        made, state_dict, mapping=lambda name: None if name.startswith("extra") else name
    )
    jax.tree.map(np.testing.assert_array_equal, back, state_dict)


def test_names_in_the_state_dict_are_used():
    params = {
        "b": {"bias": jnp.zeros(3)},
        "a": {"kernel": jnp.zeros((2, 3))},
        "norm": {"scale": jnp.zeros(3)},
    }
    state = moved(
        saved(param_names=["a.weight", "norm.weight", "b.bias"]),
        params=params,
        names=None,
        mapping=None,
    )
    np.testing.assert_array_equal(state[0].mu["a"]["kernel"], draw(3, 2).T)


def test_refuses_names_that_do_not_meet():
    with refused(ValueError, "from_torch", "does not name them", "model.named_parameters()"):
        moved(names=None)
    with refused(ValueError, "found 2 names for 3 parameters"):
        moved(names=NAMES[:2])
    with refused(
        ValueError,
        "left over fc.weight, fc.bias of PyTorch; missing dense/bias, dense/kernel of the "
        "parameters",
    ):
        moved(mapping=None)
    with refused(ValueError, "'fc.bias' and 'norm.weight' are both mapped to dense/bias"):
        moved(mapping={"fc": "dense", "norm.weight": "dense.bias"})
    with refused(ValueError, "missing dense/bias"):
        moved(mapping={"fc": "dense", "fc.bias": None})
    with refused(ValueError, "found fc.wieght in transpose", "such as fc.weight"):
        moved(transpose={"fc.wieght": (1, 0)})
    # A table serves the parameters, the statistics and the optimizer, and not all have all names.
    jax.tree.map(
        np.testing.assert_array_equal, moved(), moved(mapping=TABLE | {"head": "out", "tail": None})
    )


def test_refuses_shapes_that_differ():
    wide = {
        "dense": {"kernel": jnp.zeros((2, 4)), "bias": jnp.zeros(3)},
        "norm": {"scale": jnp.zeros(3)},
    }
    with refused(
        ValueError,
        "fc.weight: found the shape (3, 2), transposed (2, 3); expected (2, 4), of dense/kernel",
        "transpose=",
    ):
        moved(params=wide)
    with refused(ValueError, "found (0, 0) for fc.weight; expected a permutation of the 2 axes"):
        moved(transpose={"fc.weight": (0, 0)})
    with refused(ValueError, "norm.weight: found the shape (3, 1)", "cannot be transposed so"):
        aj.migrate.params_from_torch({"norm.weight": draw(3, 1)}, {"norm": {"scale": jnp.zeros(3)}})


MALFORMED = {
    "names": ({"names": 3}, TypeError, "names: found 3; expected a list of strings"),
    "a name": ({"names": ["a", None, "b"]}, TypeError, "names: found ['a', None, 'b']"),
    "one string": ({"names": "abc"}, TypeError, "names: found 'abc'"),
    "mapping": ({"mapping": ["a"]}, TypeError, "mapping: found ['a']; expected a table"),
    "a number": ({"mapping": {"fc": 3}}, TypeError, "mapping: found 3 for 'fc'; expected a path"),
    "numbers": ({"mapping": {0: "fc"}}, TypeError, "mapping: found {0: 'fc'}"),
    "a function": ({"mapping": lambda name: 3}, TypeError, "mapping: found 3 for 'fc.weight'"),
    "transpose": ({"transpose": [1]}, TypeError, "transpose: found [1]; expected a table"),
    "three": (
        {"transpose": {"fc.weight": (abs, abs, abs)}},
        ValueError,
        "expected a permutation of the 2 axes, one of 'same', 'kernel', 'rule', or a pair of",
    ),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_rules_that_are_none_are_refused(case):
    options, error, says = MALFORMED[case]
    with refused(error, says):
        moved(**options)


def test_tied_weights_have_one_leaf():
    table, mapping = {"embed": {"embedding": jnp.zeros((5, 4))}}, {"out.weight": "embed/embedding"}
    weight = draw(5, 4)
    found = aj.migrate.params_from_torch(
        {"embed.weight": weight, "out.weight": weight}, table, mapping=mapping
    )
    np.testing.assert_array_equal(found["embed"]["embedding"], weight)
    back = aj.migrate.params_to_torch(
        table, {"embed.weight": weight, "out.weight": weight}, mapping=mapping
    )
    assert not back["embed.weight"].any()
    assert not back["out.weight"].any()
    with refused(
        ValueError, "'out.weight' and another name are both mapped to embed/embedding, and differ"
    ):
        aj.migrate.params_from_torch(
            {"embed.weight": weight, "out.weight": 2 * weight}, table, mapping=mapping
        )
    with refused(TypeError, "tx: found None"):
        aj.migrate.from_torch(saved(), None, PARAMS)
