"""`from_torch` holds the settings of PyTorch's groups against those of tx, leaf by leaf.

NumPy arrays stand for tensors; the expected messages are written out here.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import refused
from torch_states import NAMES, PARAMS, TABLE, moved, saved

import adam_jax as aj


def test_refuses_another_optimizer():
    with refused(
        ValueError, "tx has a maximum of the raw ν, corrected later, which the state dict has not"
    ):
        moved(tx=aj.amsgrad(1.0, maximum="raw"))
    with refused(
        ValueError, "found the decay 0.999 of nu in the param_group of fc.weight, and 0.99 in tx"
    ):
        moved(tx=aj.adam(1.0, b2=0.99))
    buffers = {
        i: its | {"max_exp_avg_sq": its["exp_avg_sq"]} for i, its in saved()["state"].items()
    }
    with refused(
        ValueError, "a maximum of the raw ν, corrected later (max_exp_avg_sq), which tx has not"
    ):
        moved(saved() | {"state": buffers}, tx=aj.amsgrad(1.0))
    with refused(
        ValueError, "to_torch", "the optimizer has a maximum of the raw ν", "which tx has not"
    ):
        aj.migrate.to_torch(moved(), aj.adam(1e-3), saved(amsgrad=True), names=NAMES, mapping=TABLE)
    rms = {"state": {}, "param_groups": [{"alpha": 0.9, "momentum": 0.5, "params": [0, 1, 2]}]}
    tx = aj.rmsprop(1.0, 0.9, momentum=0.5)
    with refused(
        ValueError, "a sum of steps, behind the learning rate, which the optimizer has not"
    ):
        aj.migrate.to_torch(tx.init(PARAMS), tx, rms, names=NAMES, mapping=TABLE)
    tx = aj.adam_mini(1.0)
    with refused(ValueError, "to_torch: at dense/kernel found the shape (1, 3); expected (2, 3)"):
        aj.migrate.to_torch(tx.init(PARAMS), tx, saved(), names=NAMES, mapping=TABLE)


def test_settings_of_groups_are_those_of_their_leaves():
    adam = aj.adamw(1e-3, weight_decay=0.1)
    tx = aj.by_path(
        {"dense/kernel": {"eps": 1e-6}, "norm/.*": {"weight_decay": 0.0, "b2": 0.99}}, adam
    )
    groups = [
        {"params": [0], "betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 0.1},
        {"params": [1], "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1},
        {"params": [2], "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0},
    ]
    state_dict, names = saved() | {"param_groups": groups}, [[name] for name in NAMES]
    state = moved(state_dict, tx, names=names)
    np.testing.assert_allclose(
        state.inner_states["norm/.*"][0].weights[0, 1], 1 - 0.99**5, rtol=1e-6
    )
    np.testing.assert_allclose(
        state.inner_states["default"][0].weights[0, 1], 1 - 0.999**5, rtol=1e-6
    )
    back = aj.migrate.to_torch(state, tx, state_dict, names=names, mapping=TABLE)
    jax.tree.map(np.testing.assert_array_equal, back, state_dict)

    for i, changes, says in [
        (0, {"eps": 1e-8}, "found eps=1e-08 in the param_group of fc.weight, and 1e-06 in tx"),
        (
            1,
            {"weight_decay": 0},
            "found weight_decay=0 in the param_group of fc.bias, and 0.1 in tx",
        ),
        (
            2,
            {"weight_decay": 0.1},
            "found weight_decay=0.1 in the param_group of norm.weight, and 0.0 in tx",
        ),
        (
            2,
            {"betas": (0.9, 0.999)},
            "found the decay 0.999 of nu in the param_group of norm.weight, and 0.99 in tx",
        ),
    ]:
        with refused(ValueError, says):
            moved(
                state_dict
                | {
                    "param_groups": [
                        group | changes if i == j else group for j, group in enumerate(groups)
                    ]
                },
                tx,
                names=names,
            )
    for decoupled, decay in [(True, "l2"), (False, "lr")]:
        with refused(
            ValueError, f"found decoupled_weight_decay={decoupled}", f"and {not decoupled} in tx"
        ):
            its = aj.adamw(1e-3, weight_decay=0.1, decay=decay)
            moved(saved(weight_decay=0.1, decoupled_weight_decay=decoupled), its)


def test_proportions_of_learning_rates_stay():
    groups = [
        {"lr": 0.5, "betas": (0.9, 0.999), "params": [0]},
        {"lr": 0.05, "betas": (0.9, 0.999), "params": [1, 2]},
    ]
    state_dict, names = saved() | {"param_groups": groups}, dict(enumerate(NAMES))
    with refused(
        ValueError,
        "lr is 0.5 for fc.weight and 0.05 for fc.bias, and in tx 0.001 and 0.001",
        "learning_rate_multiplier",
    ):
        moved(state_dict, names=names)
    tenth = {"learning_rate_multiplier": 0.1}
    moved(state_dict, aj.by_path({"dense/bias|norm/.*": tenth}, aj.adam(1e-3)), names=names)
    moved(
        state_dict,
        aj.by_path({"dense/bias|norm/.*": tenth}, aj.adam(optax.linear_schedule(1e-3, 0.0, 10))),
        names=names,
    )


SETTINGS = {
    "eps": ({"eps": 0.5}, "found eps=0.5 in the param_group of w, and 1e-08 in tx"),
    "weight decay": (
        {"weight_decay": 0.1},
        "found weight_decay=0.1 in the param_group of w, and 0.0 in tx",
    ),
    "ascent": ({"maximize": True}, "found maximize=True in the param_group of w"),
    "amsgrad": ({"amsgrad": True}, "found amsgrad=True in the param_group of w, and False in tx"),
    "RAdam": (
        {"decoupled_weight_decay": False, "foreach": None},
        "the param_group of w is RAdam's, and tx does not rectify",
    ),
}


def adams_state(**more):
    entry = {
        "step": 3.0,
        "exp_avg": np.ones(2, np.float32),
        "exp_avg_sq": np.ones(2, np.float32),
    } | more
    return {
        "state": {0: entry},
        "param_groups": [{"lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-8, "params": [0]}],
    }


@pytest.mark.parametrize("case", SETTINGS)
def test_settings_of_another_optimizer_are_refused(case):
    settings, message = SETTINGS[case]
    found, params, tx = adams_state(), {"w": jnp.ones(2)}, aj.presets.torch.adam(1e-3)
    aj.migrate.from_torch(found, tx, params, names=["w"])
    found["param_groups"][0] |= settings
    with pytest.raises(ValueError, match=re.escape(message)):
        aj.migrate.from_torch(found, tx, params, names=["w"])


def test_decay_in_the_gradient_is_not_that_beside_the_moments():
    params = {"w": jnp.ones(2)}
    found, torch = adams_state(), aj.presets.torch
    for decoupled, right, wrong in [
        (True, torch.adamw, torch.adam),
        (False, torch.adam, torch.adamw),
    ]:
        found["param_groups"][0] |= {
            "weight_decay": 0.1,
            "decoupled_weight_decay": decoupled,
            "amsgrad": False,
        }
        aj.migrate.from_torch(found, right(1e-3, weight_decay=0.1), params, names=["w"])
        with pytest.raises(
            ValueError,
            match=f"found decoupled_weight_decay={decoupled} .* and {not decoupled} in tx",
        ):
            aj.migrate.from_torch(found, wrong(1e-3, weight_decay=0.1), params, names=["w"])
    with pytest.raises(ValueError, match="is Adam's, and tx rectifies"):
        aj.migrate.from_torch(found, torch.radam(1e-3, weight_decay=0.1), params, names=["w"])


def test_nadam_is_told_by_its_product():
    params = {"w": jnp.ones(2)}
    with pytest.raises(ValueError, match="not NAdam's, and tx looks ahead"):
        aj.migrate.from_torch(adams_state(), aj.presets.torch.nadam(1e-3), params, names=["w"])
    with pytest.raises(ValueError, match="has the mu_product of NAdam, and tx does not look ahead"):
        aj.migrate.from_torch(
            adams_state(mu_product=0.1), aj.presets.torch.adam(1e-3), params, names=["w"]
        )
