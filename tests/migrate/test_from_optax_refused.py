"""What `from_optax` and `to_optax` refuse: other optimizers, other hyperparameters, what is no
state of Optax.

The expected messages are written out here.
"""

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import refused
from optax_states import LARGE, RATE

import adam_jax as aj


@pytest.mark.parametrize(
    "state", [None, "x", {"state": {}}, optax.EmptyState(), aj.adam(1e-3).init(LARGE)]
)
def test_what_is_no_state_of_optax_is_refused(state):
    with refused(
        ValueError, "from_optax: found no moments of Optax in a", "optax.adam(1e-3).init(params)"
    ):
        aj.migrate.from_optax(state, aj.adam(1e-3), LARGE)


INJECTED = {
    "eps": ((optax.adam, {"eps": 1e-4}), aj.adam(1e-2), aj.adam(1e-2, eps=1e-4)),
    "eps_root": ((optax.adam, {"eps_root": 1e-6}), aj.adam(1e-2), aj.adam(1e-2, eps_root=1e-6)),
    "weight_decay": (
        (optax.adamw, {"weight_decay": 0.1}),
        aj.adamw(1e-2, weight_decay=0.01),
        aj.adamw(1e-2, weight_decay=0.1, mask={"w": True}),
    ),
    "weight_decay of 0": (
        (optax.adamw, {"weight_decay": 0.0}),
        aj.adamw(1e-2, weight_decay=0.1),
        aj.adamw(1e-2, weight_decay=0.0),
    ),
    "a schedule": (
        (optax.adamw, {"weight_decay": optax.linear_schedule(0.1, 0.0, 10)}),
        aj.adamw(1e-2, weight_decay=optax.linear_schedule(0.2, 0.0, 10)),
        aj.adamw(1e-2, weight_decay=optax.linear_schedule(0.1, 0.0, 10)),
    ),
    "momentum": ((optax.sgd, {"momentum": 0.8}), aj.momentum(1e-2), aj.momentum(1e-2, 0.8)),
}


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("case", INJECTED)
def test_what_inject_hyperparams_recorded_is_that_of_tx(case):
    """A10: another weight decay or ε than that of the run was accepted."""
    (make, values), wrong, right = INJECTED[case]
    params = {"w": jnp.ones((2, 3))}
    theirs = optax.inject_hyperparams(make)(0.5, **values)
    state = theirs.init(params)
    for _ in range(3):
        _, state = theirs.update(params, state, params)
    moved = aj.migrate.from_optax(state, right, params)  # another learning rate is no matter
    name = case.split()[0] if case != "a schedule" else "weight_decay"
    with refused(ValueError, f"found {name}=", "in inject_hyperparams", "for w", "convert_state"):
        aj.migrate.from_optax(state, wrong, params)
    # B12: the way back writes down what the last step of ours used.
    back = aj.migrate.to_optax(moved, right, theirs.init(params))
    np.testing.assert_allclose(back.hyperparams["learning_rate"], 1e-2, rtol=1e-6)
    for value in values:
        np.testing.assert_allclose(back.hyperparams[value], state.hyperparams[value], rtol=1e-6)


@pytest.mark.usefixtures("standard_promotion")
def test_what_inject_hyperparams_recorded_in_groups_and_under_other_names():
    """A10: each record is compared where its moments are; what cannot be compared is told."""
    params = {"a": jnp.ones(2), "b": jnp.ones(2)}
    inject = optax.inject_hyperparams(optax.adamw)
    theirs = optax.partition(
        {"a": inject(0.1, weight_decay=0.1), "b": inject(0.2, weight_decay=0.3)},
        {"a": "a", "b": "b"},
    )
    state, adam = theirs.init(params), aj.adamw(0.1, weight_decay=0.3)
    aj.migrate.from_optax(state, aj.by_path({"a": {"weight_decay": 0.1}}, adam), params)
    with refused(ValueError, "found weight_decay=0.3", "and 0.1 in tx, for b"):
        aj.migrate.from_optax(state, aj.adamw(0.1, weight_decay=0.1), params)
    tx = aj.by_path({"a": {"weight_decay": 0.1}}, aj.adamw(aj.settable(0.1), weight_decay=0.3))
    with refused(ValueError, "learning_rate=0.1 and 0.2 in two", "set_hyperparameters"):
        aj.migrate.from_optax(state, tx, params)

    def own(rate, wd):
        return optax.adamw(rate, weight_decay=wd)

    state = optax.inject_hyperparams(own)(rate=0.1, wd=0.3).init(params)
    with pytest.warns(UserWarning, match=r"recorded rate=0.1, wd=0.3, which tx has no argument"):
        aj.migrate.from_optax(state, adam, params)


def test_a_tx_without_moments_has_nothing_to_move():
    with refused(
        ValueError, "keeps no moments, so there is nothing to move: begin with tx.init(params)"
    ):
        aj.migrate.from_optax(optax.adam(1e-3).init(LARGE), aj.presets.torch.sgd(1e-3), LARGE)
    tx = aj.adamw(1e-3)  # as many stages as amsgrad
    with refused(ValueError, "to_optax: found", "expected the state of keep_maximum"):
        aj.migrate.to_optax(tx.init(LARGE), aj.amsgrad(1e-3), optax.amsgrad(1e-3).init(LARGE))


@pytest.mark.parametrize(
    ("theirs", "tx", "says"),
    [
        (optax.adam(1.0), aj.amsgrad(1.0), ["tx has a maximum of ν", "which the state has not"]),
        (optax.amsgrad(1.0), aj.adam(1.0), ["[0].nu_max", "which tx has not"]),
        (
            optax.amsgrad(1.0),
            aj.amsgrad(1.0, maximum="raw"),
            ["a maximum of the raw ν, corrected later, which the state has not"],
        ),
        (
            optax.adabelief(1.0),
            aj.adam(1.0),
            ["a mean of squared distances from the mean ([0].nu), which tx has not"],
        ),
        (optax.adam(1.0), aj.adabelief(1.0), ["a mean of squares ([0].nu), which tx has not"]),
        (optax.lion(1.0), aj.adam(1.0), ["found no moments of Optax in a tuple"]),
        (
            optax.chain(optax.adam(1.0), optax.adam(1.0)),
            aj.adam(1.0),
            ["a mean of gradients of b at [0][0].mu and at [1][0].mu"],
        ),
        (
            optax.adam(1.0),
            aj.chain(*aj.adam(1.0).stages[:-1], aj.adam(1.0)),
            ["tx has a mean", "at [0] and at [3][0]"],
        ),
        (optax.chain(optax.adam(1.0), optax.lion(1.0)), aj.adam(1.0), ["left over [1][0].mu['b']"]),
        (
            optax.adam(1.0),
            optax.chain(aj.adam(1.0)),
            ["no moments in", "build chains with adam_jax.chain"],
        ),
    ],
)
def test_refuses_moments_that_only_one_side_has(theirs, tx, says):
    with refused(ValueError, "from_optax", *says):
        aj.migrate.from_optax(theirs.init(LARGE), tx, LARGE)


def test_refuses_what_does_not_fit():
    state, tx = optax.adam(1.0).init(LARGE), aj.adam(1.0)
    with refused(TypeError, "tx: found 'adam'"):
        aj.migrate.from_optax(state, "adam", LARGE)
    with refused(ValueError, "at w found the shape (64, 80); expected (80, 64)"):
        aj.migrate.from_optax(state, tx, {"w": LARGE["w"].T, "b": LARGE["b"]})
    with refused(ValueError, "missing c; left over b"):
        aj.migrate.from_optax(state, tx, {"w": LARGE["w"], "c": LARGE["b"]})
    with refused(ValueError, "counts 0 at [0][1].count, 3 at [1].count"):
        scheduled = optax.chain(optax.adam(RATE), optax.scale_by_schedule(RATE)).init(LARGE)
        aj.migrate.from_optax((scheduled[0], scheduled[1]._replace(count=jnp.int32(3))), tx, LARGE)
    with refused(ValueError, "to_optax: like: left over b"):
        aj.migrate.to_optax(tx.init(LARGE), tx, optax.adam(1.0).init({"w": LARGE["w"]}))
    with refused(ValueError, "to_optax", "which like has not"):
        aj.migrate.to_optax(tx.init(LARGE), tx, optax.sgd(1.0, 0.9).init(LARGE))


def test_a_state_of_another_transformation_and_leaves_that_do_not_train():
    params = {"w": jnp.ones((4, 3)), "b": jnp.ones(3)}
    theirs = optax.adam(1e-3).init(params)
    with pytest.raises(ValueError, match="found a state that is not one of amsgrad"):
        aj.migrate.to_optax(aj.adam(1e-3).init(params), aj.amsgrad(1e-3), theirs)
    with pytest.raises(ValueError, match="left over b; expected the leaves"):
        aj.migrate.from_optax(theirs, aj.by_path({"b": "frozen"}, default=aj.adam(1e-3)), params)
