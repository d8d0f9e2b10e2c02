"""Hyperparameters that cannot be right are refused when a transformation is made: numbers,
schedules, flags, choices.

A message names the hyperparameter, shows what was found, and says what to do; it is written out
here. A traced number cannot be looked at, and is not.
"""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import refused
from refused_params import PARAMS

import adam_jax
from adam_jax import (
    track_moments,
)

NAN, INF = float("nan"), float("inf")


def arguments(*names):
    """Those of the named arguments that each member takes."""
    members = {name: getattr(adam_jax, name) for name in adam_jax.family.__all__}
    return [
        pytest.param(make, argument, id=f"{name}-{argument}")
        for name, make in members.items()
        for argument in inspect.signature(make).parameters
        if argument in names
    ]


@pytest.mark.parametrize(
    "value", [1.0, 1.5, -0.1, NAN, INF, 1, np.float32(1), np.array(2.0)], ids=repr
)
@pytest.mark.parametrize(("make", "name"), arguments("b1", "b2", "b3"))
def test_a_beta_outside_0_to_1(make, name, value):
    with refused(ValueError, f"{name}: found {float(value)!r}", "[0, 1)"):
        make(0.1, **{name: value})


@pytest.mark.parametrize("value", [-1e-8, NAN, -INF, INF], ids=repr)
@pytest.mark.parametrize(("make", "name"), arguments("eps", "eps_root", "weight_decay"))
def test_a_negative_or_nan_epsilon_or_decay(make, name, value):
    stage_says = (
        "eps" if name.startswith("eps") else name
    )  # the stage's name for it may be another ε's
    with refused(ValueError, stage_says, f"found {value!r}", "[0, inf)"):
        make(0.1, **{name: value})


@pytest.mark.parametrize("value", [NAN, INF, -INF], ids=repr)
def test_a_learning_rate_that_is_not_finite(member, value):
    with refused(ValueError, f"learning_rate: found {value!r}", "expected a number in [0, inf)"):
        member(value)


def test_a_learning_rate_below_0(member):
    """D11: maximizing is asked for by a word, not by a sign."""
    with refused(ValueError, "learning_rate: found -0.1", "chain(optax.scale(-1), adam(...))"):
        member(-0.1)


def test_numbers_that_float32_does_not_hold_and_numbers_of_other_kinds(member):
    """B9: 1e39 was checked in float64, and stepped by −inf; a number of ml_dtypes was none."""
    with refused(ValueError, "learning_rate: found 1e+39", "expected a number that float32 holds"):
        member(1e39)
    tx = member(np.zeros((), jnp.bfloat16)[()] + np.ones((), jnp.bfloat16)[()])
    state = tx.init(jnp.ones(3))
    assert adam_jax.hyperparameters(state, tx)["learning_rate"] == 1.0


@pytest.mark.parametrize(("make", "name"), arguments("b1", "b2"))
def test_a_decay_in_bfloat16(make, name):
    """E7: 0.999 is 1 there, which eagerly was an error and under jit a NaN."""
    tx = make(0.1, **{name: lambda t: jnp.bfloat16(0.999)})
    for init in (tx.init, jax.jit(tx.init)):
        with refused(TypeError, "the schedule b", "bfloat16", "expected float32"):
            init(jnp.ones(3))
    with refused(TypeError, name, "bfloat16", "expected float32"):
        make(0.1, **{name: jnp.bfloat16(0.875)})


@pytest.mark.parametrize(
    "value", ["0.1", None, True, [0.1], {"a": 0.1}, 0.1 + 1j, Ellipsis], ids=repr
)
def test_a_learning_rate_that_is_no_number(member, value):
    with refused(TypeError, "learning_rate: found", repr(value), "expected"):
        member(value)


@pytest.mark.parametrize(
    "value", [np.ones(3), jnp.ones((1,)), np.zeros((2, 2))], ids=["(3,)", "(1,)", "(2, 2)"]
)
def test_a_hyperparameter_with_dimensions(member, value):
    with refused(
        ValueError,
        f"learning_rate: found an array of shape {value.shape}",
        "expected a scalar",
        "optax.partition",
    ):
        member(value)


@pytest.mark.parametrize("how", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_a_schedule_that_returns_a_vector(member, how):
    tx = member(lambda count: jnp.ones(3))
    with refused(ValueError, "schedule learning_rate", "shape (3,)", "expected a scalar"):
        how(tx.init)(PARAMS)


@pytest.mark.parametrize(
    ("value", "error", "says"),
    [
        (lambda count: "0.1", TypeError, "'0.1'"),
        (lambda count: None, TypeError, "None"),
        (lambda count: np.ones(2), ValueError, "shape (2,)"),
        (lambda count: 1.5, ValueError, "found 1.5"),
    ],
    ids=["string", "None", "array", "outside"],
)
def test_a_schedule_that_returns_what_cannot_be(value, error, says):
    with refused(error, "schedule b1", says, "expected"):
        adam_jax.adam(0.1, b1=value).init(PARAMS)


def test_a_traced_number_is_not_looked_at():
    def used(b1):
        tx = adam_jax.adam(0.1, b1=b1)
        return adam_jax.hyperparameters(tx.init(PARAMS), tx)["b1"]

    assert jax.jit(used)(1.5) == 1.5


CHOICES = {
    "decay": lambda: adam_jax.adamw(0.1, decay="weights"),
    "mask": lambda: adam_jax.adamw(0.1, mask="vectors"),
    "maximum": lambda: adam_jax.amsgrad(0.1, maximum="largest"),
    "blocks": lambda: adam_jax.adam_mini(0.1, blocks="rows"),
    "nu_rule": lambda: track_moments(nu_rule="cube"),
    "mu_rule": lambda: track_moments(mu_rule="product"),
    "mu_dtype": lambda: adam_jax.adam(0.1, mu_dtype=jnp.int8),
    "threshold": lambda: adam_jax.radam(0.1, threshold=3.0),
    "nu_init": lambda: adam_jax.yogi(0.1, initial_accumulator_value=-1.0),
}


@pytest.mark.parametrize(("name", "make"), CHOICES.items(), ids=CHOICES)
def test_a_choice_that_does_not_exist(name, make):
    with refused(ValueError, f"{name}: found", "expected"):
        make()


@pytest.mark.parametrize(
    "schedule",
    [
        lambda c: jnp.float32(1.5),
        lambda c: jnp.array(True),
        lambda c: jnp.complex64(0.5),
        lambda c: None,
        lambda c: "1",
    ],
)
def test_a_schedule_that_returns_no_decay(schedule):
    """Seen where it is concrete, and its dtype even where it is traced."""
    with refused((ValueError, TypeError), "the schedule b1: found"):
        adam_jax.adam(0.1, schedule).init(PARAMS)


def test_belief_in_no_mean():
    with refused(ValueError, "nu_rule='belief'", "b1=None"):
        track_moments(None, 0.9, nu_rule="belief")


def test_a_rate_that_no_float_can_hold():
    with refused(ValueError, "learning_rate: found inf"):
        adam_jax.adam(10**400)


def test_tracking_nothing():
    with refused(ValueError, "b1 and b2", "at least one"):
        track_moments(None, None)


@pytest.mark.parametrize("value", ["False", "no", None, 2, []], ids=repr)
def test_a_flag_that_is_none(value):
    """The string "False" counts as true."""
    for make, name in [
        (adam_jax.adam, "nesterov"),
        (adam_jax.rmsprop, "centered"),
        (adam_jax.scale_by_moments, "floor"),
        (adam_jax.presets.torch.adam, "amsgrad"),
    ]:
        rate = () if make is adam_jax.scale_by_moments else (0.1,)
        with refused(ValueError, f"{name}: found {value!r}; expected True or False"):
            make(*rate, **{name: value})
    tx = adam_jax.adam(0.1)
    for name in ("moments", "schedule"):
        with refused(ValueError, f"reset: {name}: found {value!r}; expected True or False"):
            adam_jax.reset(tx.init(PARAMS), tx, **{name: value})


@pytest.mark.parametrize("function", [lambda: 1.0, lambda a, b: 1.0], ids=["none", "two"])
def test_a_function_of_another_number_of_arguments(function):
    says = ["found <lambda>", "which cannot be called with one argument"]
    with refused(TypeError, "the schedule learning_rate", *says, "steps taken before"):
        adam_jax.adam(function).init(PARAMS)
    tx = adam_jax.adamw(0.1, mask=function)
    with refused(TypeError, "mask: ", *says, "the parameters alone"):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS)


def test_an_error_inside_a_users_function_is_its_own():
    def schedule(count):
        raise TypeError("mine")

    with pytest.raises(TypeError, match="^mine$"):
        adam_jax.adam(schedule).init(PARAMS)


def test_a_schedule_cannot_be_set():
    tx = adam_jax.adam(adam_jax.settable(0.1))
    with refused(TypeError, "learning_rate: found ", "expected a number"):
        adam_jax.set_hyperparameters(tx.init(PARAMS), tx, learning_rate=lambda count: 0.1)
