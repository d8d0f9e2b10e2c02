"""What is no storage, and what is the state of another storage, is refused.

The expected messages are written out here.
"""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import normals, refused, same
from stored import WIDE

import adam_jax as aj
from adam_jax import storage
from adam_jax.storage.formats import resolve_storage

OPTIMIZED = True  # it computes for longer than it compiles


@pytest.mark.parametrize(
    "value", ["int8", "BFLOAT16", None, 8, ["8bit", "8bit"], jnp.bfloat16, storage.Codes], ids=str
)
def test_what_is_no_storage(member, value):
    shown = f"found {value!r}" if not isinstance(value, type) else "found"
    with refused(
        ValueError,
        "storage: ",
        shown,
        "expected 'float32', 'bfloat16', '8bit'",
        "storage.Codes",
        "tuple of two",
    ):
        member(0.1, storage=value)


def test_a_pair_with_a_wrong_member():
    with refused(ValueError, "storage: found '9bit'", "expected 'float32'"):
        aj.adam(0.1, storage=("8bit", "9bit"))


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_pair_that_is_none(count):
    with refused(
        ValueError, f"storage: found a tuple of {count}", "a tuple of two (for mu, for nu)"
    ):
        aj.adam(0.1, storage=("8bit",) * count)


@pytest.mark.parametrize("value", [jnp.int8, "complex64", bool, "nonsense", 3.5], ids=str)
def test_a_dtype_that_is_not_floating(value):
    # Optax takes the dtype of complex moments, which stay what they are.
    for name in ("mu_dtype", "nu_dtype") if value != "complex64" else ():
        with refused(
            ValueError, f"{name}: found {value!r}", "expected a floating dtype such as jnp.bfloat16"
        ):
            aj.adam(0.1, **{name: value})
    with refused(ValueError, f"storage.Float: dtype: found {value!r}", "expected a floating dtype"):
        storage.Float(value)


def test_a_dtype_without_a_zero():
    with refused(ValueError, "mu_dtype: found", "without a zero", "expected one such as"):
        aj.adam(0.1, mu_dtype=jnp.float8_e8m0fnu)


@pytest.mark.parametrize("make", [storage.Codes, storage.Float], ids=["Codes", "Float"])
def test_settings_of_a_storage(make):
    name = f"storage.{make.__name__}"
    for value in ("up", None, True):
        with refused(
            ValueError,
            f"{name}: rounding: found {value!r}",
            "expected one of 'stochastic', 'nearest'",
        ):
            make(rounding=value)
    for value in (1.0, "1", None, True, np.float32(2)):
        with refused(TypeError, f"{name}: smallest: found {value!r}", "expected an integer"):
            make(smallest=value)


@pytest.mark.parametrize("name", ["mu_dtype", "nu_dtype"])
@pytest.mark.parametrize("how", ["bfloat16", "8bit"])
def test_a_dtype_beside_a_storage(name, how):
    with refused(
        ValueError, f"found both {name}=", "bfloat16", f"storage={how!r}", "expected one of them"
    ):
        aj.adam(0.1, storage=how, **{name: jnp.bfloat16})


@pytest.mark.parametrize("how", ["8bit", "bfloat16", storage.Codes(), ("float32", "8bit")], ids=str)
def test_centered_with_a_narrow_storage(how):
    with refused(
        ValueError, "rmsprop: found centered=True", f"storage={how!r}", "expected storage='float32'"
    ):
        aj.rmsprop(0.1, centered=True, storage=how)


FORMS = {
    "float32": "float32",
    "bfloat16": "bfloat16",
    "float16": storage.Float(jnp.float16),
    "8bit": "8bit",
}


@pytest.mark.parametrize(("there", "here"), list(itertools.permutations(FORMS, 2)))
def test_a_state_of_another_storage(there, here):
    params = normals(WIDE)
    state = aj.adam(0.1, storage=FORMS[there]).init(params)
    form = resolve_storage(FORMS[here])[0]
    with refused(
        ValueError,
        "the state's mu of shape (4096,) rests as",
        state[0].mu.dtype.name,
        str(form),
        "`init`",
    ):
        aj.adam(0.1, storage=FORMS[here]).update(params, state)


@pytest.mark.parametrize(("there", "here"), [(-1, -2), (-2, -1), (-1, None), (-2, None)], ids=str)
def test_a_state_whose_scales_are_shared_otherwise(there, here):
    params = {"w": normals(64, 128)}
    state = aj.adam(0.1, storage=storage.Codes(axis=there)).init(params)
    with refused(
        ValueError,
        "the state's mu at 'w' of shape (64, 128) has scales of shape",
        f"axis={here}",
        "`init`",
    ):
        aj.adam(0.1, storage=storage.Codes(axis=here)).update(params, state)


def test_a_state_without_scales():
    """As of version 0.1.0, which kept them in one array, or of parameters with other names."""
    params = {"w": normals(64, 128)}
    tx = aj.adam(0.1, storage="8bit")
    first, *rest = tx.init(params)
    for scales in (
        {},
        {"mu_scale": jnp.zeros((1, 2), jnp.int16)},
        {"mu_scale": {"v": first.scales["mu_scale"]["w"]}},
    ):
        with refused(
            ValueError, "the state has no scale for the mu at 'w'", "Codes(rounding=", "`init`"
        ):
            tx.update(params, (first._replace(scales=scales), *rest))


@pytest.mark.parametrize("value", [0, 1, -3, "rows", True, 1.0], ids=repr)
def test_an_axis_that_is_none(value):
    with refused(ValueError, f"storage.Codes: axis: found {value!r}", "expected -1, -2 or None"):
        storage.Codes(axis=value)


@pytest.mark.parametrize("how", ["8bit", "bfloat16"])
def test_a_state_whose_small_leaves_rest_wide(how):
    params, form = normals(9), resolve_storage(how)[0]
    eager = type(form)(**{**vars(form), "smallest": 0})
    with refused(ValueError, "the state's mu of shape (9,) rests as", str(eager)):
        aj.adam(0.1, storage=eager).update(params, aj.adam(0.1, storage=form).init(params))


@pytest.mark.parametrize("how", ["8bit", "bfloat16"])
def test_a_state_whose_small_leaves_rest_narrow_is_taken_as_it_is(how):
    """`jax.shard_map` shows parts of a leaf, which may be smaller than a leaf that is narrowed."""
    params, form = normals(9), resolve_storage(how)[0]
    eager = type(form)(**{**vars(form), "smallest": 0})
    state = aj.adam(0.1, storage=eager).init(params)
    same(
        aj.adam(0.1, storage=form).update(params, state),
        aj.adam(0.1, storage=eager).update(params, state),
    )


def test_a_negative_size():
    with refused(ValueError, "storage.Codes: smallest: found -1", "expected 0 or more"):
        storage.Codes(smallest=-1)
