"""Slips are answered with the name that there is: storages by another word, state and
transformation swapped, names of arguments.

No message prints an array or grows with the model. The expected messages are written out here.
"""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import refused
from refused_params import PARAMS

import adam_jax
from adam_jax import (
    chain,
)

MEANT = {
    "lr": (lambda: adam_jax.adam(lr=0.1), "adam: found the argument 'lr'", "learning_rate?"),
    "betas": (lambda: adam_jax.adam(0.1, betas=(0.9, 0.99)), "'betas'", "b1 and b2?"),
    "beta_2": (lambda: adam_jax.adamw(0.1, beta_2=0.9), "adamw: found", "Did you mean b2?"),
    "epsilon": (lambda: adam_jax.track_moments(epsilon=1.0), "track_moments: found", "only b1, b2"),
    "decay": (lambda: adam_jax.adam(0.1, weight_decay=0.1), "adamw(..., weight_decay=...)?"),
    "slip": (lambda: adam_jax.adam(0.1, storge="8bit"), "Did you mean storage?"),
    "wrapper": (lambda: adam_jax.skip_spikes(adam_jax.adam(0.1), cehck=True), "mean check?"),
    "torch": (lambda: adam_jax.presets.torch.adam(learning_rate=0.1), "Did you mean lr?"),
    "none": (adam_jax.adam, "adam: missing a required argument: 'learning_rate'"),
    "many": (lambda: adam_jax.compensate(1), "compensate: too many positional arguments"),
    "list": (lambda: chain([adam_jax.adam(0.1)]), "did you mean chain(*transformations), not a li"),
    "MultiSteps": (
        lambda: chain(optax.MultiSteps(adam_jax.adam(0.1), 2)),
        "chain: found",
        "did you mean its .gradient_transformation()?",
    ),
    "state_bytes": (
        lambda: adam_jax.state_bytes(optax.MultiSteps(adam_jax.adam(0.1), 2), PARAMS),
        "state_bytes: tx: found",
        "did you mean its .gradient_transformation()?",
    ),
    "describe": (
        lambda: adam_jax.describe(optax.MultiSteps(adam_jax.adam(0.1), 2), PARAMS),
        "did you mean its .gradient_transformation()?",
    ),
}


@pytest.mark.parametrize(
    ("call", "says"), [(call, says) for call, *says in MEANT.values()], ids=MEANT
)
def test_what_was_probably_meant(call, says):
    """D15: a slip is answered with the name that there is."""
    with refused(TypeError, *says):
        call()


STORAGES = {
    "int8": "'8bit'?",
    "8-bit": "'8bit'?",
    jnp.uint8: "'8bit'?",
    jnp.bfloat16: "'bfloat16'?",
    jnp.dtype(jnp.bfloat16): "'bfloat16'?",
    "bf16": "'bfloat16'?",
    "float16": "storage.Float('float16')?",
    jnp.float16: "storage.Float('float16')?",
    None: "'float32'?",
    "bfloat": "'bfloat16'?",
    adam_jax.storage.Codes: "storage.Codes()?",
}


@pytest.mark.parametrize(("storage", "meant"), STORAGES.items(), ids=map(str, STORAGES))
def test_a_storage_by_another_word(storage, meant):
    """D15: for both moments, and in a pair."""
    for given in (storage, ("float32", storage)):
        with refused(ValueError, "storage: found", "expected 'float32'", f"Did you mean {meant}"):
            adam_jax.adam(0.1, storage=given)


def test_a_storage_that_means_nothing():
    """D15: no guess where there is none; an array has a dtype, and is no storage."""
    for storage in (True, "mixed", jnp.ones((3, 3)), jnp.int32):
        with refused(ValueError, "storage: found") as caught:
            adam_jax.adam(0.1, storage=storage)
        assert "mean" not in str(caught.value)
    with refused(
        ValueError, "found ['8bit', 'float32']", "Did you mean tuple(['8bit', 'float32'])?"
    ):
        adam_jax.adam(0.1, storage=["8bit", "float32"])


def test_where_every_leaf_is_too_small_for_a_storage_it_is_said():
    """D15: no warning, because small leaves in float32 cost nothing and lose nothing."""
    said = str(adam_jax.state_bytes(adam_jax.adam(0.1, storage="8bit"), {"w": jnp.ones((8, 8))}))
    assert "mu stays wide in w (64 elements): fewer than 4096 elements" in said
    assert "nu stays wide in w (64 elements): fewer than 4096 elements" in said


# Every function that takes a transformation, called with the state or the parameters in its place.
TAKES_TX = {
    "reset": lambda state, tx: adam_jax.reset(tx, state),
    "hyperparameters": lambda state, tx: adam_jax.hyperparameters(tx, state),
    "set_hyperparameters": lambda state, tx: adam_jax.set_hyperparameters(tx, state, b1=0.5),
    "set_step": lambda state, tx: adam_jax.set_step(tx, state, 3),
    "convert_state": lambda state, tx: adam_jax.convert_state(tx, state, tx, PARAMS),
    "state_bytes": lambda state, tx: adam_jax.state_bytes(PARAMS, tx),
    "describe": lambda state, tx: adam_jax.describe(PARAMS, tx),
    "state_shardings": lambda state, tx: adam_jax.state_shardings(PARAMS, tx, None),
    "from_optax": lambda state, tx: adam_jax.migrate.from_optax(
        optax.adam(0.1).init(PARAMS), PARAMS, tx
    ),
    "to_optax": lambda state, tx: adam_jax.migrate.to_optax(
        tx, state, optax.adam(0.1).init(PARAMS)
    ),
    "from_torch": lambda state, tx: adam_jax.migrate.from_torch(TORCH, PARAMS, tx),
    "to_torch": lambda state, tx: adam_jax.migrate.to_torch(tx, state, TORCH),
    "skip_nonfinite": lambda state, tx: adam_jax.skip_nonfinite(state),
    "skip_spikes": lambda state, tx: adam_jax.skip_spikes(state),
    "manual_axes": lambda state, tx: adam_jax.manual_axes(state),
    "observe": lambda state, tx: adam_jax.observe(state),
}
TORCH = {"state": {}, "param_groups": [{"params": [0], "param_names": ["w"]}]}


@pytest.mark.parametrize("name", TAKES_TX)
def test_a_state_in_the_place_of_the_transformation(name):
    tx = adam_jax.adam(0.1)
    wraps = name in ("skip_nonfinite", "skip_spikes", "manual_axes", "observe")
    says = (
        ()
        if wraps
        else ("It looks like a state or parameters: are two arguments swapped?", f"help({name})")
    )
    with refused(
        TypeError, f"{name}: ", "holds arrays; expected a gradient transformation", *says
    ) as caught:
        TAKES_TX[name](tx.init(PARAMS), tx)
    assert "Array(" not in str(caught.value)
    assert "[[" not in str(caught.value)


def test_every_function_that_takes_a_transformation_is_in_the_table():
    modules = (adam_jax, adam_jax.stages, adam_jax.diagnostics, adam_jax.migrate)
    public = {name: getattr(module, name) for module in modules for name in module.__all__}
    functions = {name: f for name, f in public.items() if inspect.isfunction(f)}
    taking = {
        name
        for name, f in functions.items()
        if {"tx", "from_tx"} & inspect.signature(f).parameters.keys()
    }
    assert taking == TAKES_TX.keys()


ARRAYS = {
    "a learning rate": lambda: adam_jax.adam(PARAMS),
    "a storage": lambda: adam_jax.adam(0.1, storage=PARAMS),
    "a seed": lambda: adam_jax.round_stochastically(np.ones(9)),
    "a step": lambda: adam_jax.set_step(
        adam_jax.adam(0.1).init(PARAMS), adam_jax.adam(0.1), PARAMS
    ),
    "a part": lambda: chain(adam_jax.adam(0.1), PARAMS),
    "groups": lambda: adam_jax.by_path((PARAMS,), adam_jax.adam(0.1)),
    "a group": lambda: adam_jax.by_path({"head": PARAMS["head"]["w"]}, adam_jax.adam(0.1)),
    "a mask": lambda: jax.eval_shape(
        adam_jax.adamw(0.1, mask=PARAMS).update, PARAMS, adam_jax.adamw(0.1).init(PARAMS), PARAMS
    ),
    "a match": lambda: adam_jax.reset(
        adam_jax.adam(0.1).init(PARAMS), adam_jax.adam(0.1), match=PARAMS
    ),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_no_message_prints_an_array(name):
    with pytest.raises(
        (TypeError, ValueError), match=r"found an? (array of|value of type)"
    ) as caught:
        ARRAYS[name]()
    assert "1." not in str(caught.value)


def test_a_slip_in_a_name_of_update():
    """Other names are for transformations of others, which take what they know."""
    tx = adam_jax.adam(0.1)
    state = tx.init(PARAMS)
    tx.update(PARAMS, state, PARAMS, value=1.0, grad=PARAMS, loss=2.0)
    with refused(TypeError, "adam: update: found the argument 'param'", "did you mean params?"):
        tx.update(PARAMS, state, param=PARAMS)


def test_no_message_grows_with_the_model():
    many = {f"layer{i}": jnp.ones(2) for i in range(200)}
    grouped = adam_jax.by_path({name: adam_jax.adam(0.1) for name in many}, adam_jax.adam(0.2))
    masked = adam_jax.adamw(0.1, mask=dict.fromkeys(many, True))
    foreign = adam_jax.adam(0.1).init(many)
    for call in (
        lambda: grouped.update(many, foreign, many),
        lambda: masked.update(many, foreign, many),
        lambda: adam_jax.set_hyperparameters(grouped.init(many), grouped, learning_rate=1.0),
        lambda: adam_jax.reset(foreign, grouped),
        lambda: adam_jax.chain(grouped, grouped),
        lambda: adam_jax.adamw(0.1, mask=dict.fromkeys(many, 3)).update(many, foreign, many),
        lambda: adam_jax.by_path({"|".join(many) + "|x": "frozen"}, grouped).init({"y": many}),
        lambda: adam_jax.state_shardings(grouped, many, {"w": jax.sharding.PartitionSpec()}),
    ):
        with pytest.raises((ValueError, TypeError)) as caught:
            call()
        assert len(str(caught.value)) < 800, str(caught.value)[:1000]
