"""How PyTorch's arrays lie in ours: told, plain from the shapes, or warned of.

NumPy arrays stand for tensors."""

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import refused

import adam_jax as aj
from adam_jax.migrate import LayoutWarning

SQUARE = np.arange(16, dtype=np.float32).reshape(4, 4)


def load(tensor, leaf, **options):
    """The leaf that a tensor called "x.weight" becomes."""
    params = {"x": {leaf: jnp.zeros(tensor.shape)}}
    mapping = {"x.weight": f"x/{leaf}"}
    made = aj.migrate.params_from_torch({"x.weight": tensor}, params, mapping=mapping, **options)
    back = aj.migrate.params_to_torch(made, {"x.weight": tensor}, mapping=mapping, **options)
    np.testing.assert_array_equal(back["x.weight"], tensor)
    return made["x"][leaf]


OPEN = {
    "a kernel, of Linear or of GPT-2's Conv1D": ("kernel", SQUARE, SQUARE.T),
    "Haiku's w": ("w", SQUARE, SQUARE),
    "a weight": ("weight", SQUARE, SQUARE),
    "a stack that looks like a convolution": (
        "kernel",
        np.arange(64, dtype=np.float32).reshape(4, 4, 4),
        np.arange(64, dtype=np.float32).reshape(4, 4, 4).transpose(2, 1, 0),
    ),
}


@pytest.mark.parametrize("case", OPEN)
def test_a_layout_that_shapes_do_not_tell_is_warned_of_until_it_is_said(case):
    """A2: square matrices were transposed, or not, on faith."""
    leaf, tensor, expected = OPEN[case]
    params, state = {"x": {leaf: jnp.zeros(expected.shape)}}, {"x.weight": tensor}
    options = {"mapping": {"x.weight": f"x/{leaf}"}}
    with pytest.warns(LayoutWarning, match=f"1 leaf lies.*x/{leaf}.*'rule'") as seen:
        made = aj.migrate.params_from_torch(state, params, **options)
    np.testing.assert_array_equal(made["x"][leaf], expected)
    assert [warning.message.leaves for warning in seen] == [(f"x/{leaf}",)]
    assert seen[0].filename == __file__
    with pytest.warns(LayoutWarning):
        aj.migrate.params_to_torch(made, state, **options)
    entry = {"step": 1.0, "exp_avg": tensor, "exp_avg_sq": tensor**2}
    adams = {"state": {0: entry}, "param_groups": [{"betas": (0.9, 0.999), "params": [0]}]}
    tx, options = aj.adam(1e-3), options | {"names": ["x.weight"]}
    with pytest.warns(LayoutWarning, match="^from_torch"):
        moved = aj.migrate.from_torch(adams, tx, params, **options)
    with pytest.warns(LayoutWarning, match="^to_torch"):
        aj.migrate.to_torch(moved, tx, adams, **options)

    # Said in one word, for a pattern of names, by a function, and by axes.
    same = tuple(range(tensor.ndim))
    for said in ({".*": "rule"}, {r"x\.\w+": "rule"}, lambda name, path: "rule"):
        np.testing.assert_array_equal(load(tensor, leaf, transpose=said), expected)
    for said in ({"x.weight": "same"}, {".*": "same"}, {"x.weight": same}):
        np.testing.assert_array_equal(load(tensor, leaf, transpose=said), tensor)
    swapped = tensor.transpose(*range(2, tensor.ndim), 1, 0)
    np.testing.assert_array_equal(load(tensor, leaf, transpose={".*": "kernel"})[:], swapped)


def test_what_shapes_or_names_tell_is_not_warned_of():
    """A2: a warning that always comes is read by nobody."""
    for tensor, leaf in [
        (SQUARE, "embedding"),
        (SQUARE, "scale"),
        (np.zeros((1, 1), np.float32), "kernel"),
        (np.zeros((4, 1, 4), np.float32), "w"),
        (np.zeros(4, np.float32), "w"),
        (np.zeros((2, 3, 5), np.float32), "w"),
        (np.zeros((8, 1, 3, 3), np.float32), "weight"),  # a convolution of Equinox
    ]:
        if tensor.shape == (4, 1, 4):
            with pytest.warns(LayoutWarning):
                load(tensor, leaf)
        else:
            load(tensor, leaf)
    params = {"kernel": jnp.zeros((3, 3, 2, 4))}
    aj.migrate.params_from_torch({"weight": np.zeros((4, 2, 3, 3))}, params)
    # A transposed convolution has its channels the other way round.
    x, params = np.zeros((4, 4, 3, 3)), {"kernel": jnp.zeros((3, 3, 4, 4))}
    with pytest.warns(LayoutWarning):
        aj.migrate.params_from_torch({"weight": x}, params)
    aj.migrate.params_from_torch({"weight": x}, params, transpose={".*": "kernel"})


def test_one_warning_lists_the_first_leaves_and_holds_all():
    """A2: few in the message, and how many more there are."""
    names = [f"h.{i}.{kind}" for i in range(6) for kind in ("kernel", "w")]
    params = {
        "h": {str(i): {"kernel": jnp.zeros((4, 4)), "w": jnp.zeros((4, 4))} for i in range(6)}
    }
    table = dict.fromkeys(names, SQUARE)
    with pytest.warns(LayoutWarning) as seen:
        aj.migrate.params_from_torch(table, params)
    (message,) = [warning.message for warning in seen]
    assert set(message.leaves) == {name.replace(".", "/") for name in names}
    text = str(message)
    assert "12 leaves lie" in text
    assert "as kernels, with PyTorch's first two axes last: h/0/kernel, h/1/kernel" in text
    assert "as in PyTorch: h/0/w" in text
    assert text.count("and 4 more") == 2
    assert len(text) <= 600
    with pytest.warns(LayoutWarning) as seen:
        aj.migrate.params_from_torch(table, params, transpose={".*kernel": "same"})
    assert all(path.endswith("w") for path in seen[0].message.leaves)


def test_a_shape_that_differs_names_the_word_that_fits():
    """A2: Conv1D of GPT-2 lies (in, out)."""
    params, state = {"c": {"kernel": jnp.zeros((2, 6))}}, {"c.weight": np.zeros((2, 6))}
    with refused(ValueError, "transposed (6, 2)", "transpose={'c.weight': 'same'}"):
        aj.migrate.params_from_torch(state, params)
    aj.migrate.params_from_torch(state, params, transpose={"c.weight": "same"})
    params = {"c": {"w": jnp.zeros((6, 2))}}
    with refused(ValueError, "transpose={'c.weight': 'kernel'}"):
        aj.migrate.params_from_torch(state, params, mapping={"c.weight": "c/w"})


def test_words_and_patterns_that_are_none_are_refused():
    """A2: a word or a pattern that means nothing must not silence the warning."""
    with refused(ValueError, "found 'sam' for x.weight", "'same', 'kernel', 'rule'"):
        load(SQUARE, "kernel", transpose={"x.weight": "sam"})
    with refused(ValueError, "found '*'", "regular expression of whole names"):
        load(SQUARE, "kernel", transpose={"*": "rule"})
    with refused(ValueError, "found y.* in transpose, which is no name"):
        load(SQUARE, "kernel", transpose={"y.*": "rule", ".*": "rule"})


@pytest.mark.parametrize("axes", [None, (1, 0)])
def test_complex_parameters_move_as_their_two_parts(axes):
    """A7: the imaginary part of `exp_avg_sq` was dropped, and one ν served both parts."""
    rng = np.random.default_rng(0)
    draw = lambda: (rng.standard_normal((2, 3)) + 1j * rng.standard_normal((2, 3))).astype("c8")
    weight, mu, nu = draw(), draw(), draw()
    nu = (nu.real**2 + 1j * nu.imag**2).astype("c8")  # as PyTorch keeps it
    shape = (*(2, 3)[:: -1 if axes else 1], 2)
    like, tx = {"w": jnp.zeros(shape)}, aj.presets.torch.adam(1e-3)
    rules = {"transpose": {"w": aj.migrate.as_real(axes)}}
    entry = {"step": np.float32(3), "exp_avg": mu, "exp_avg_sq": nu}
    adams = {"state": {0: entry}, "param_groups": [{"betas": (0.9, 0.999), "params": [0]}]}
    params = aj.migrate.params_from_torch({"w": weight}, like, **rules)
    state = aj.migrate.from_torch(adams, tx, params, names=["w"], **rules)
    ours = nu.T if axes else nu
    np.testing.assert_array_equal(state[0].nu["w"], np.stack([ours.real, ours.imag], -1))
    back = aj.migrate.params_to_torch(params, {"w": weight}, **rules)["w"]
    assert back.dtype == np.complex64
    np.testing.assert_array_equal(back, weight)
    back = aj.migrate.to_torch(state, tx, adams, names=["w"], **rules)["state"][0]
    np.testing.assert_array_equal(back["exp_avg"], mu)
    np.testing.assert_array_equal(back["exp_avg_sq"], nu)

    with refused(ValueError, "w: found complex64; expected real", "'w': as_real()"):
        aj.migrate.params_from_torch({"w": weight}, {"w": jnp.zeros((2, 3))})
    for kind in ("from_torch", "to_torch"):
        params, tx = {"w": jnp.zeros((2, 3), jnp.complex64)}, aj.adam(1e-3)
        with refused(ValueError, kind, "complex leaves at w", "as_real()"):
            if kind == "from_torch":
                aj.migrate.from_torch(adams, tx, params, names=["w"])
            else:
                aj.migrate.to_torch(tx.init(params), tx, adams, names=["w"])
