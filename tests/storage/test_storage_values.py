"""Storages are values: they compare, print and pickle, and equal ones compile once.

The oracle is an equal storage, made again or spelled otherwise.
"""

import functools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import normals, same
from stored import WIDE, mixed

import adam_jax as aj
from adam_jax import storage

OPTIMIZED = True  # it computes for longer than it compiles
VALUES = [
    "float32",
    "bfloat16",
    "8bit",
    ("bfloat16", "8bit"),
    storage.Codes(rounding="nearest", seed=3, smallest=0),
    storage.Float("float16", seed=2),
]


@pytest.mark.parametrize("how", VALUES, ids=range(len(VALUES)))
def test_transformations_with_a_storage_are_values(how):
    tx = aj.adamw(0.1, storage=how)
    again = aj.adamw(0.1, storage=pickle.loads(pickle.dumps(how)))
    assert tx == again
    assert hash(tx) == hash(again)
    thawed = pickle.loads(pickle.dumps(tx))
    assert thawed == tx
    assert repr(thawed) == repr(tx)
    assert (repr(how) in repr(tx)) == (how != "float32")
    others = [aj.adamw(0.1, storage=other) for other in VALUES if other is not how]
    assert all(tx != other for other in others)
    same(thawed.init(mixed()), tx.init(mixed()))


def test_settings_tell_storages_apart_and_spellings_of_a_dtype_do_not():
    assert (
        storage.Float("bfloat16")
        == storage.Float(jnp.bfloat16)
        == storage.Float(jnp.dtype(jnp.bfloat16))
    )
    assert hash(storage.Float("bfloat16")) == hash(storage.Float(jnp.bfloat16))
    forms = [storage.Codes(), storage.Codes(seed=1), storage.Codes(rounding="nearest")]
    forms += [
        storage.Codes(smallest=1),
        storage.Float(),
        storage.Float("float16"),
        storage.Float("float16", seed=1),
    ]
    assert len({aj.adam(0.1, storage=form) for form in forms}) == len(set(forms)) == len(forms)
    for form in forms:
        assert (
            eval(repr(form), {"Codes": storage.Codes, "Float": storage.Float, "dtype": np.dtype})
            == form
        )


def test_every_spelling_of_a_storage_makes_an_equal_transformation():
    spellings = {
        "8bit": storage.Codes(),
        "bfloat16": storage.Float(jnp.bfloat16),
        "float32": storage.Float(),
    }
    for make in (aj.adam, aj.amsgrad, aj.ademamix):
        for name, form in spellings.items():
            assert make(0.1, storage=form) == make(0.1, storage=name)
            assert hash(make(0.1, storage=form)) == hash(make(0.1, storage=name))
            assert make(0.1, storage=(form, "8bit")) == make(0.1, storage=(name, "8bit"))
        assert make(0.1, storage=storage.Codes(seed=1)) != make(0.1, storage="8bit")
    numpys = storage.Codes(axis=np.int64(-2), smallest=np.int64(9), seed=np.uint32(3))
    assert repr(numpys) == repr(storage.Codes(axis=-2, smallest=9, seed=3))


def test_an_equal_storage_does_not_retrace():
    traces = []

    @functools.partial(jax.jit, static_argnums=0)
    def step(tx, grads, state):
        traces.append(tx)
        return tx.update(grads, state)

    params = normals(WIDE)
    for _ in range(3):
        tx = aj.adam(0.1, storage=storage.Codes(seed=4))
        step(tx, params, tx.init(params))
    assert len(traces) == 1
