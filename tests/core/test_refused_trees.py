"""Trees that do not fit are refused when an update is traced: gradients, parameters, masks.

A message names the leaf; it is written out here.
"""

import jax
import jax.numpy as jnp
import pytest
from helpers import refused
from refused_params import PARAMS

import adam_jax
from adam_jax import (
    chain,
)
from adam_jax.stages import average_parameters


def test_leaves_that_are_no_arrays_are_named():
    tx = adam_jax.adamw(1e-3)
    with refused(
        TypeError, "adamw: init: at ['f']: found", "expected an array or its shape", "eqx.filter"
    ):
        tx.init({"f": jax.nn.relu, "w": jnp.ones(3)})
    observed = adam_jax.observe(tx)
    with refused(TypeError, "observe: update: at ['f']: found 'x'"):
        observed.update(PARAMS, observed.init(PARAMS), {"f": "x"})


def test_tensors_of_pytorch_are_told_apart():
    torch = pytest.importorskip("torch", reason="PyTorch is an optional oracle: pip install torch")
    with refused(TypeError, "adam: init: at ['w']: found a tensor of PyTorch", "params_from_torch"):
        adam_jax.adam(1e-3).init({"w": torch.ones(3)})


FULL, ROW = jnp.ones((2, 3)), jnp.ones(3)
WRONG = {
    "shape_that_would_broadcast": (
        {"head": {"b": FULL, "w": FULL}},
        "['head']['b']",
        "(2, 3)",
        "(3,)",
        "never broadcast",
    ),
    "shape_to_broadcast": (
        {"head": {"b": ROW, "w": ROW}},
        "['head']['w']",
        "(3,)",
        "(2, 3)",
        "never broadcast",
    ),
    "one_for_three": (
        {"head": {"b": jnp.ones(1), "w": FULL}},
        "['head']['b']",
        "(1,)",
        "(3,)",
        "never broadcast",
    ),
    "number": ({"head": {"b": 1.0, "w": FULL}}, "['head']['b']", "()", "(3,)", "never broadcast"),
    "transposed": (
        {"head": {"b": ROW, "w": FULL.T}},
        "['head']['w']",
        "(3, 2)",
        "(2, 3)",
        "call `init` again",
    ),
    "missing": ({"head": {"w": FULL}}, "without a gradient", "['head']['b']", "call `init` again"),
    "None": (
        {"head": {"b": None, "w": FULL}},
        "without a gradient",
        "['head']['b']",
        "call `init` again",
    ),
    "extra": (
        {"head": {"b": ROW, "w": FULL, "x": ROW}},
        "does not have",
        "['head']['x']",
        "call `init` again",
    ),
    "renamed": (
        {"tail": {"b": ROW, "w": FULL}},
        "['tail']['b']",
        "['head']['b']",
        "call `init` again",
    ),
    "list": ({"head": [ROW, FULL]}, "['head'][0]", "['head']['b']", "call `init` again"),
    "bare": (ROW, "['head']['b']", "call `init` again"),
    "integers": ({"head": {"b": jnp.arange(3), "w": FULL}}, "['head']['b']", "int32", "floating"),
}


@pytest.mark.parametrize("how", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize(
    ("grads", "says"), [(grads, says) for grads, *says in WRONG.values()], ids=WRONG
)
def test_gradients_that_do_not_fit_the_state(member, grads, says, how):
    tx = member(0.1)
    with refused(ValueError, *says):
        how(tx.update)(grads, tx.init(PARAMS), PARAMS)


@pytest.mark.parametrize(
    "name", ["shape_that_would_broadcast", "missing", "extra", "one_for_three"]
)
def test_parameters_that_do_not_fit_the_gradients(member, name):
    tx, (wrong, *says) = member(0.1), WRONG[name]
    with refused(ValueError, "params", next(part for part in says if part.startswith("['"))):
        jax.eval_shape(tx.update, PARAMS, tx.init(PARAMS), wrong)


@pytest.mark.parametrize("how", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize(
    ("tx", "caller"),
    [
        (adam_jax.adamw(0.1), "add_decayed_weights()"),
        (adam_jax.adamw(0.1, decay="l2"), "add_decayed_weights()"),
        (adam_jax.adamw(0.1, decay="independent"), "add_decayed_weights()"),
        (adam_jax.adamaxw(0.1), "add_decayed_weights()"),
        (adam_jax.nadamw(0.1), "add_decayed_weights()"),
        (adam_jax.ademamix(0.1, weight_decay=0.1), "add_decayed_weights()"),
        (adam_jax.lamb(0.1), "needs the parameters"),
        (chain(adam_jax.adam(0.1), average_parameters(0.9)), "average_parameters()"),
    ],
    ids=repr,
)
def test_an_update_without_the_parameters_that_it_needs(tx, caller, how):
    with refused(ValueError, caller, "call update(grads, state, params)"):
        how(tx.update)(PARAMS, tx.init(PARAMS))


def test_a_mask_that_does_not_fit():
    tx = adam_jax.adamw(0.1, mask={"tail": True})
    with refused(ValueError, "mask: found", "'tail'", "'head'", "prefix"):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS)


@pytest.mark.parametrize(
    "mask", [{"head": "decay"}, {"head": {"b": "no", "w": True}}, {"head": 0.5}]
)
def test_a_mask_of_no_booleans(mask):
    tx = adam_jax.adamw(0.1, mask=mask)
    with refused(ValueError, "mask: found", "True or False"):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS)


def test_blocks_along_axes_that_a_leaf_does_not_have():
    tx = adam_jax.adam_mini(0.1, blocks=lambda path, shape: (2,))
    with refused(ValueError, "blocks: found the axes (2,)", "['head']['b']", "(3,)"):
        tx.init(PARAMS)


def test_a_whole_run_in_the_place_of_parameters():
    """Its moments would be trained: a `TrainState` and an `nnx.Optimizer` are trees of arrays."""
    linen = pytest.importorskip("flax.training.train_state").TrainState
    nnx, tx = pytest.importorskip("flax.nnx"), adam_jax.adam(0.1)
    model = nnx.Linear(1, 1, rngs=nnx.Rngs(0))
    runs = [
        linen.create(apply_fn=None, params=PARAMS, tx=tx),
        nnx.Optimizer(model, tx, wrt=nnx.Param),
    ]
    for run in runs:
        for call in (tx.init, lambda its: adam_jax.describe(tx, its)):
            with refused(TypeError, f"params: found {type(run).__name__}", "parameters alone"):
                call(run)
