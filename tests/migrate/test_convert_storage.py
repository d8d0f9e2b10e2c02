"""`convert_state` between storages keeps moments within the precision of the new one.

The oracle is the moment before, read back in float32.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from before_convert import FORMS, PARAMS, STORED, after, run
from helpers import avals, draw_tree

import adam_jax as aj
from adam_jax import storage
from adam_jax._core.configuration import slots_of
from adam_jax.storage.stored_leaf import unpack_moment

PRECISIONS = {"float32": 0, "bfloat16": 2**-8, "8bit": 1 / 16}


def unpacked(tx, state, field):
    """The leaves of a moment of the first stage."""
    slot = slots_of(tx.stages[0])[field]
    return unpack_moment(slot, getattr(state[0], field), state[0].scales)


@functools.cache
def converted_in_jit():
    """Every storage as every other, by the old one and the new one."""

    @jax.jit
    def convert(states):
        made = {(old, new): (STORED[old][0], STORED[new][1]) for old in FORMS for new in FORMS}
        return {
            (old, new): aj.convert_state(states[old], *pair, PARAMS).state
            for (old, new), pair in made.items()
        }

    return convert({old: after(STORED[old][0]) for old in FORMS})


@pytest.mark.parametrize("old", FORMS)
@pytest.mark.parametrize("new", FORMS)
@pytest.mark.parametrize("jit", [False, True])
def test_storages_become_one_another_within_their_precision(old, new, jit):
    txs = STORED[old][0], STORED[new][1]
    state = after(txs[0])
    found = converted_in_jit()[old, new] if jit else aj.convert_state(state, *txs, PARAMS).state
    assert avals(found) == avals(txs[1].init(PARAMS))
    for field in ("mu", "nu"):
        before, now = (unpacked(tx, s, field) for tx, s in zip(txs, (state, found), strict=True))
        for x, y in zip(before, now, strict=True):
            x, y = np.asarray(x.widen()), np.asarray(y.widen())  # noqa: PLW2901
            # The smallest code of 8 bits is 2⁻¹⁵ of the power of two above the leaf's largest. Half
            # of it is lost.
            coarse = 2.0**-16 * 2 ** np.ceil(np.log2(np.abs(x).max())) * (new == "8bit")
            np.testing.assert_allclose(y, x, rtol=PRECISIONS[new] + 1e-7, atol=coarse)
            assert field == "mu" or np.all((y > 0) == (x > 0))
    if new == "bfloat16" and old == "float32":
        np.testing.assert_array_equal(found[0].mu["w"], state[0].mu["w"].astype(jnp.bfloat16))
    run(txs[1], found, [6])


def test_a_leaf_of_zeros_or_of_extremes_in_codes():
    old, new = aj.adam(0.1), aj.adam(0.1, storage="8bit")
    for value in (0.0, 1e-30, 1e18, jnp.nan):
        grads = jax.tree.map(lambda x, value=value: jnp.full_like(x, value), PARAMS)
        state = old.update(grads, old.init(PARAMS), PARAMS)[1]
        mu = aj.convert_state(state, old, new, PARAMS).state[0]
        (_, code) = unpacked(new, (mu,), "mu")
        np.testing.assert_allclose(code.widen(), jnp.nan_to_num(0.1 * value), rtol=1 / 15)


AXES = (-1, -2, None)


def test_codes_whose_scales_are_shared_otherwise_become_one_another():
    params = {"w": jnp.zeros((130, 140))}
    scales = {-1: (130, 1), -2: (1, 140), None: (1, 1)}
    txs = {
        axis: aj.adam(0.1, storage=storage.Codes(axis=axis, rounding="nearest")) for axis in AXES
    }
    grads, notes = draw_tree(1, {"w": (130, 140)}), {}

    @jax.jit
    def convert():
        made = {}
        for old, new in itertools.product(AXES, AXES):
            state = txs[old].update(grads, txs[old].init(params))[1]
            found = aj.convert_state(state, txs[old], txs[new], params)
            notes[old, new] = [entry.note for entry in found.kept]
            made[f"{old} {new}"] = state, found.state, txs[new].update(grads, found.state)
        return made

    made = convert()
    for old, new in itertools.product(AXES, AXES):
        before, after, (updates, _) = made[f"{old} {new}"]
        for field in ("mu", "nu"):
            ((x,), (y,)) = (
                unpacked(txs[axis], state, field) for axis, state in ((old, before), (new, after))
            )
            assert y.scale.shape == scales[new]
            largest = np.abs(x.widen()).max()
            np.testing.assert_allclose(
                y.widen(),
                x.widen(),
                rtol=1 / 16 if old != new else 0,
                atol=2.0**-15 * largest * (old != new),
            )
        np.testing.assert_allclose(np.abs(updates["w"]).max(), 0.1, rtol=0.2)
        assert notes[old, new] == 2 * [
            f"scales of shape {scales[old]} → {scales[new]}" if old != new else ""
        ]
