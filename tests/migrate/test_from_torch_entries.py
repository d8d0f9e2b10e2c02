"""What `from_torch` reads of a state dict: steps, moments and frozen leaves; and what of it is
refused.

NumPy arrays stand for tensors; the expected messages are written out here.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import refused
from torch_states import NAMES, PARAMS, TABLE, draw, moved, saved

import adam_jax as aj


@pytest.mark.parametrize("kind", ["adam", "radam", "adamw"])
def test_leaves_that_have_taken_other_steps_go_on_each_from_its_own(kind):
    """As in PyTorch, where a layer was thawed later: each leaf steps as in a state of its own
    count.
    """
    tx, state_dict = getattr(aj, kind)(0.1), saved()
    state_dict["state"][1]["step"] = np.float32(2)
    state_dict["state"][2]["step"] = np.float32(0)
    grads = jax.tree.map(jnp.ones_like, PARAMS)
    updates, after = tx.update(grads, moved(state_dict, tx), PARAMS)
    assert int(after[0].count) == 6
    for i, (step, leaf) in enumerate(
        [(5, ("dense", "kernel")), (2, ("dense", "bias")), (0, ("norm", "scale"))]
    ):
        alone = saved()
        for its in alone["state"].values():
            its["step"] = np.float32(step)
        expected, _ = tx.update(grads, moved(alone, tx), PARAMS)
        np.testing.assert_allclose(
            updates[leaf[0]][leaf[1]], expected[leaf[0]][leaf[1]], rtol=1e-6, err_msg=str(i)
        )
    with refused(ValueError, "have gathered weights that", "Others keep a count alone"):
        aj.migrate.to_torch(after, tx, saved(), names=NAMES, mapping=TABLE)


def test_refuses_steps_that_are_not_known():
    state_dict = saved()
    with refused(ValueError, "count=7, and step 5"):
        moved(count=7)
    for step in (-1.0, 1.5, np.nan, np.inf, 3e9, np.ones(2)):
        state_dict["state"][1]["step"] = step
        with refused(ValueError, "steps; expected a whole number from 0 on"):
            moved(state_dict)
    del state_dict["state"][1]["step"]
    with refused(ValueError, "found no step of dense/bias"):
        moved(state_dict)
    buffers = {i: {"momentum_buffer": its["exp_avg"]} for i, its in saved()["state"].items()}
    sgd = {
        "state": buffers,
        "param_groups": [{"momentum": 0.9, "dampening": 0, "params": [0, 1, 2]}],
    }
    with refused(ValueError, "keeps no step", "count=1000"):
        moved(sgd, aj.momentum(1.0))
    assert int(moved(sgd, aj.momentum(1.0), count=9)[0].count) == 9


def test_refuses_states_that_are_not_whole():
    state_dict = saved()
    del state_dict["state"][2]
    with refused(ValueError, "found no state of norm.weight", "never had a gradient"):
        moved(state_dict)
    frozen = {"dense": PARAMS["dense"]}
    assert "norm" not in moved(state_dict, params=frozen, mapping=TABLE | {"norm": None})[0].mu
    state_dict = saved()
    del state_dict["state"][1]["exp_avg_sq"]
    with refused(ValueError, "found no exp_avg_sq of fc.bias"):
        moved(state_dict)
    state_dict["state"][1]["exp_avg_cube"] = draw(3)
    with refused(ValueError, "left over exp_avg_cube"):
        moved(state_dict)


@pytest.mark.parametrize(
    "tx",
    [
        aj.by_path({"norm/.*": "frozen"}, aj.adam(1e-3)),
        aj.by_path({"dense/.*": aj.adam(1e-3)}, "frozen"),
    ],
)
def test_frozen_leaves_have_no_state_to_take(tx):
    state_dict = saved()
    with refused(
        ValueError, "left over the state of norm.weight, of which tx keeps none", "convert_state"
    ):
        moved(state_dict, tx)
    del state_dict["state"][2]  # it never had a gradient
    state = moved(state_dict, tx)
    state_dict["param_groups"][0]["params"] = [0, 1]  # nor was it given to the optimizer
    jax.tree.map(np.testing.assert_array_equal, state, moved(state_dict, tx, names=NAMES[:2]))
    back = aj.migrate.to_torch(state, tx, state_dict, names=NAMES[:2], mapping=TABLE)
    jax.tree.map(np.testing.assert_array_equal, back, state_dict)
    del (whole := saved())["state"][2]  # an optimizer that was given all
    back = aj.migrate.to_torch(state, tx, whole, names=NAMES, mapping=TABLE)
    jax.tree.map(np.testing.assert_array_equal, back, whole)


def test_loads_no_files_and_takes_no_objects():
    for found in ("model.pt", b"\x80\x02}"):
        with refused(TypeError, "expected a state dict", "torch.load(path, weights_only=True)"):
            aj.migrate.from_torch(found, aj.adam(1.0), PARAMS)
        with refused(TypeError, "expected a state dict"):
            aj.migrate.params_from_torch(found, PARAMS)
        with refused(TypeError, "bias: found", "expected a tensor or an array"):
            aj.migrate.params_from_torch({"bias": found}, {"bias": jnp.zeros(3)})
    with refused(ValueError, "found a dict of fc.weight", "Weights are for params_from_torch"):
        aj.migrate.from_torch({"fc.weight": draw(3, 2)}, aj.adam(1.0), PARAMS)
    with refused(ValueError, "found a dict of model, optimizer", "Pass what is in ['optimizer']"):
        aj.migrate.from_torch({"model": {}, "optimizer": saved()}, aj.adam(1.0), PARAMS)
    with refused(ValueError, "found a dict of nothing"):
        aj.migrate.from_torch({}, aj.adam(1.0), PARAMS)
    for changes in (
        {"state": []},
        {"state": {0: 1}},
        {"param_groups": None},
        {"param_groups": ["a"]},
        {"param_groups": [{}]},
    ):
        with refused(ValueError, "found param_groups or a state that are not PyTorch's"):
            moved(saved() | changes)
    with refused(
        ValueError, "found the parameter numbers '0', '1', '2'; expected integers", "JSON"
    ):
        moved(saved() | {"state": {str(i): its for i, its in saved()["state"].items()}})
    with refused(ValueError, "left over the state of 7"):
        moved(saved() | {"state": saved()["state"] | {7: saved()["state"][0]}})


def test_arrays_that_cannot_be_moments_or_weights_are_refused():
    def with_moment(field, value):
        state_dict = saved()
        state_dict["state"][1][field] = value
        return state_dict

    assert (
        moved(with_moment("exp_avg", np.ones(3, int)))[0].mu["dense"]["bias"].dtype == jnp.float32
    )
    for value in (np.array([1, None, 2], object), np.array(["a", "b", "c"])):
        with refused(TypeError, "fc.bias: found", "expected a tensor or an array of numbers"):
            moved(with_moment("exp_avg", value))
        with refused(TypeError, "bias: found"):
            aj.migrate.params_from_torch({"bias": value}, {"bias": jnp.zeros(3)})
    with refused(ValueError, "fc.bias: found exp_avg_sq below 0"):
        moved(with_moment("exp_avg_sq", -np.ones(3)))
    with refused(ValueError, "bias: found complex128; expected real numbers, as bias has"):
        aj.migrate.params_from_torch({"bias": np.ones(3, complex)}, {"bias": jnp.zeros(3)})
    with refused(ValueError, "found betas=0.9 in param_groups; expected a pair"):
        moved(saved(betas=0.9))
    for shape in (None, 3, (), (16, 4, 4.0), (-1, 4, 4), "abc"):
        with refused(
            ValueError, "after_flatten: found", "expected the sizes that PyTorch flattens"
        ):
            aj.migrate.after_flatten(shape)
