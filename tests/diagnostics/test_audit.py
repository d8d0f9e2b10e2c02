"""`state_bytes` against bytes counted by hand, and against the arrays themselves."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adam_jax as aj

PARAMS = {
    "w": jax.ShapeDtypeStruct((64, 72), jnp.bfloat16),
    "b": jax.ShapeDtypeStruct((7,), jnp.float32),
}
SCALARS = 4 + 2 * 2 * 4  # count; weights


def test_by_hand():
    found = aj.state_bytes(
        aj.chain(aj.adam(1e-3, storage=("8bit", "bfloat16")), aj.compensate()), PARAMS
    )
    assert found.elements == 64 * 72 + 7
    assert found.parameters == 64 * 72 * 2 + 7 * 4
    assert found.mu == 64 * 72 + 7 * 4 + 2  # codes, the small leaf in float32, a scale
    assert found.nu == 64 * 72 * 2 + 7 * 4
    assert found.rounding == 64 * 72 * 2
    assert found.other == SCALARS
    assert (found.state, found.total) == (
        found.mu + found.nu + found.rounding + SCALARS,
        found.parameters + found.state,
    )


@pytest.mark.parametrize("storage", ["float32", "bfloat16", "8bit"])
def test_all_that_a_state_holds(member, storage):
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), PARAMS)
    tx = member(1e-3, storage=storage)
    assert aj.state_bytes(tx, PARAMS).state == sum(
        leaf.nbytes for leaf in jax.tree.leaves(tx.init(params))
    )


def test_the_maximum_is_a_second_moment_and_the_slow_mean_a_first():
    adam = aj.state_bytes(aj.adam(1e-3, storage="8bit"), PARAMS)
    assert aj.state_bytes(aj.amsgrad(1e-3, storage="8bit"), PARAMS).nu == 2 * adam.nu
    assert aj.state_bytes(aj.ademamix(1e-3, storage="8bit"), PARAMS).mu == 2 * adam.mu


def test_which_leaves_stay_wide_and_why():
    found = aj.state_bytes(aj.amsgrad(1e-3, storage="8bit"), PARAMS)
    assert [(leaf.moment, leaf.path, leaf.elements) for leaf in found.wide] == [
        (moment, "b", 7) for moment in ("mu", "nu", "nu_max")
    ]
    assert {leaf.why for leaf in found.wide} == {"fewer than 4096 elements"}
    assert {leaf.why for leaf in aj.state_bytes(aj.adam(1e-3), PARAMS).wide} == {
        "storage is float32"
    }
    assert aj.state_bytes(aj.adam(1e-3, storage=aj.storage.Codes(smallest=0)), PARAMS).wide == ()
    hidden = aj.state_bytes(optax.chain(aj.adam(1e-3, storage="8bit")), PARAMS).wide
    assert [leaf.path for leaf in hidden] == ["b"] * 2
    assert all("inside <chain of optax>" in leaf.why for leaf in hidden)


def test_what_is_printed():
    text = str(
        aj.state_bytes(
            aj.adam(1e-3, storage="8bit"), {"w": np.zeros((100, 100), np.float32), "b": np.zeros(7)}
        )
    )
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines()[1:7]}
    assert rows["μ"] == [f"{10_000 + 7 * 4 + 2:,}", "1.002"]
    assert "mu stays wide in b (7 elements): fewer than 4096 elements" in text
    assert "stays wide" not in str(
        aj.state_bytes(aj.adam(1e-3), {"w": np.zeros((100, 100), np.float32)})
    )


def test_of_others():
    found = aj.state_bytes(optax.adam(1e-3), PARAMS)
    assert (found.mu, found.nu, found.other) == (found.parameters, found.parameters, 4)


def test_no_transformation():
    with pytest.raises(TypeError, match="state_bytes: found .* expected a gradient transformation"):
        aj.state_bytes(PARAMS, aj.adam(1e-3))
