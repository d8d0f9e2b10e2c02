"""Presets are values; their arguments may be numbers, schedules or traced; what they do not support
is refused.

The oracles are the preset with numbers, and steps computed by hand.
"""

import functools
import inspect
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from preset_paths import EXACT, PRESETS, agree, all_of_ours, leaves, problem, rate

import adam_jax as aj
from adam_jax import presets


def test_what_is_not_supported_is_refused():
    for call in (
        lambda: presets.torch.sgd(1e-3, 0.9, 0.5),
        lambda: presets.torch.adam(fused=True),
        lambda: presets.keras.adam(use_ema=True),
        lambda: presets.keras.lamb(weight_decay=0.1),
        lambda: presets.optax.nadam(1e-3, nesterov=False),
    ):
        with pytest.raises(TypeError, match=r"argument"):
            call()
    with pytest.raises(
        ValueError, match=r"betas: found 0.9; expected a pair, as in betas=\(0.9, 0.999\)"
    ):
        presets.torch.adam(1e-3, 0.9)
    with pytest.raises(
        ValueError, match=r"sgd: found nesterov=True with momentum=0.0; expected a momentum above 0"
    ):
        presets.torch.sgd(nesterov=True)
    with pytest.raises(
        ValueError, match="found clipnorm and clipvalue; expected one of them at most"
    ):
        presets.keras.adam(clipnorm=1.0, clipvalue=1.0)
    with pytest.raises(ValueError, match="clipnorm: found -1"):
        presets.keras.adam(clipnorm=-1.0)
    for preset in (presets.keras.adam, presets.torch.adamw):
        with pytest.raises(ValueError, match="amsgrad: found 'yes'; expected True or False"):
            preset(amsgrad="yes")
    with pytest.raises(ValueError, match="betas: found 0.001; .* Parameters are no argument"):
        presets.torch.adam([jnp.ones(3)], 1e-3)
    with pytest.raises(ValueError, match="global_clipnorm: found 0.0; expected a number in"):
        presets.keras.adam(global_clipnorm=0.0)


def build(which, name, learning_rate=0.03, **options):
    """The preset with momentum where it has one, so that there is a state."""
    function = getattr(getattr(presets, which), name)
    if "momentum" in inspect.signature(function).parameters:
        options = {"momentum": 0.9} | options
    return function(learning_rate, **options)


@pytest.mark.parametrize(("which", "name"), PRESETS)
def test_is_a_value(which, name):
    tx = build(which, name)
    assert tx == build(which, name)
    assert hash(tx) == hash(build(which, name))
    assert tx != build(which, name, 0.02)
    assert pickle.loads(pickle.dumps(tx)) == tx
    first = "lr" if which == "torch" else "learning_rate"
    whose = "" if which == "optax" and name != "sgd" else f"presets.{which}."
    assert repr(tx).startswith(f"{whose}{name}({first}=0.03")


def test_prints_as_the_call():
    assert (
        repr(presets.torch.adamw()) == "presets.torch.adamw(lr=0.001, eps=1e-08, weight_decay=0.01)"
    )
    assert repr(presets.keras.adam(clipnorm=1.0)) == (
        "presets.keras.adam(learning_rate=0.001, beta_1=0.9, beta_2=0.999, epsilon=1e-07, "
        "clipnorm=1.0)"
    )
    assert presets.keras.rmsprop(rate, momentum=0.9, weight_decay=0.1) == presets.keras.rmsprop(
        rate, momentum=0.9, weight_decay=0.1
    )


def few_steps(which, name, learning_rate):
    """The last updates and the state after 3 steps."""
    params = {"w": jnp.asarray(problem()[1], jnp.float32), "none": None, "count": jnp.arange(3)}
    grads = {
        "w": jnp.asarray(problem()[0][7], jnp.float32),
        "none": None,
        "count": np.zeros(3, jax.dtypes.float0),
    }
    tx = build(which, name, learning_rate)
    state = tx.init(params)
    for _ in range(3):
        updates, state = tx.update(grads, state, params)
    return updates["w"], state


@functools.cache
def traced_steps():
    """Every preset with a traced learning rate, in one program."""
    return jax.jit(lambda rate: {preset: few_steps(*preset, rate) for preset in PRESETS})(
        jnp.float32(0.03)
    )


@pytest.mark.parametrize(("which", "name"), PRESETS)
def test_a_number_a_schedule_and_a_traced_scalar_are_one(which, name):
    number = few_steps(which, name, 0.03)
    traced, scheduled = (
        traced_steps()[which, name],
        few_steps(which, name, lambda count: jnp.float32(0.03)),
    )
    assert jax.tree.structure(number) == jax.tree.structure(traced)
    np.testing.assert_allclose(number[0], traced[0], rtol=1e-6)
    np.testing.assert_allclose(number[0], scheduled[0], rtol=1e-6)


ARGUMENTS = {
    "torch.nadam": (presets.torch.nadam, {"betas": (0.87, 0.983), "momentum_decay": 0.02}),
    "torch.radam": (presets.torch.radam, {"betas": (0.87, 0.983), "eps": 1e-5}),
    "keras.adam": (
        presets.keras.adam,
        {"beta_1": 0.87, "beta_2": 0.983, "epsilon": 1e-5, "global_clipnorm": 0.1},
    ),
    "keras.nadam": (
        presets.keras.nadam,
        {"beta_1": 0.87, "beta_2": 0.983, "weight_decay": 0.07, "clipvalue": 0.1},
    ),
    "keras.rmsprop": (
        presets.keras.rmsprop,
        {"rho": 0.9, "momentum": 0.6, "weight_decay": 0.07, "clipnorm": 0.1},
    ),
}


@functools.cache
def number_and_schedule_paths():
    numbers = {
        f"{name} number": preset(0.03, **options) for name, (preset, options) in ARGUMENTS.items()
    }
    scheduled = {
        f"{name} schedule": preset(
            0.03, **jax.tree.map(lambda value: lambda count: jnp.asarray(value), options)
        )
        for name, (preset, options) in ARGUMENTS.items()
    }
    return all_of_ours(numbers | scheduled, *problem())


@functools.cache
def traced_first_steps():
    gradients, theta = problem()
    parts = leaves(jnp.asarray(theta))

    def first(preset, options):
        tx = preset(0.03, **options)
        return tx.update(leaves(jnp.asarray(gradients[0])), tx.init(parts), parts)[0]

    options = {name: jax.tree.map(jnp.float32, its) for name, (_, its) in ARGUMENTS.items()}
    return jax.jit(
        lambda options: {name: first(ARGUMENTS[name][0], its) for name, its in options.items()}
    )(options)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_other_arguments_may_be_schedules_or_traced(name, x64):
    theta = problem()[1]
    expected = number_and_schedule_paths()[f"{name} number"]
    agree(number_and_schedule_paths()[f"{name} schedule"], expected, theta, EXACT)
    found = np.concatenate(traced_first_steps()[name]) + theta
    agree(found[None], expected[:1], theta, 1e-6)


@pytest.mark.parametrize(
    ("option", "expected"),
    [("clipnorm", ([0.6, 0.8], [1.0])), ("global_clipnorm", ([0.3, 0.4], [0.75**0.5]))],
)
def test_clipping_by_hand(option, expected):
    """Of leaves as long as 5 and 5√3, in half precision, beside leaves that take no part; and a
    gradient of 0 stays 0.
    """
    params = {
        "a": jnp.zeros(2, jnp.bfloat16),
        "b": jnp.zeros(1),
        "none": None,
        "count": jnp.arange(3),
    }
    grads = {"a": jnp.asarray([3, 4], jnp.bfloat16), "b": jnp.full(1, 75**0.5), "none": None}
    grads["count"] = np.zeros(3, jax.dtypes.float0)
    tx = presets.keras.sgd(1.0, **{option: 1.0})
    updates, state = tx.update(grads, tx.init(params), params)
    np.testing.assert_allclose(
        updates["a"].astype(jnp.float32), -np.asarray(expected[0]), rtol=2**-8
    )
    np.testing.assert_allclose(updates["b"], -np.asarray(expected[1]), rtol=1e-6)
    assert updates["none"] is None
    updates, _ = tx.update(grads | {"a": grads["a"] * 0, "b": grads["b"] * 0}, state, params)
    np.testing.assert_array_equal(
        np.concatenate([updates["a"].astype(jnp.float32), updates["b"]]), np.zeros(3)
    )


@pytest.mark.parametrize(("which", "name"), PRESETS)
def test_storage_reaches_every_moment(which, name):
    params = jnp.zeros((64, 128))
    options = (
        {"amsgrad": True}
        if "amsgrad" in inspect.signature(getattr(getattr(presets, which), name)).parameters
        else {}
    )
    state = build(which, name, storage="bfloat16", **options).init(params)
    resting = [leaf.dtype for leaf in jax.tree.leaves(state) if leaf.shape == params.shape]
    assert resting
    assert set(resting) == {jnp.dtype("bfloat16")}


def test_correct_last_by_hand():
    """A first gradient of 1e-7: g/(g + ε) where ε is beside the corrected root, √0.001·g/(√0.001·g
    + ε) where it is not.
    """
    for tx, expected in (
        (presets.torch.adam(1.0), 1 / 1.1),
        (presets.torch.adam(1.0, eps=1e-7), 1 / 2),
        (presets.keras.adam(1.0), 0.001**0.5 / (0.001**0.5 + 1)),
        (presets.keras.adam(1.0, amsgrad=True), 0.001**0.5 / (0.001**0.5 + 1)),
    ):
        params = jnp.zeros(2)
        updates, _ = tx.update(jnp.full(2, 1e-7), tx.init(params), params)
        np.testing.assert_allclose(updates, -expected, rtol=2e-6)


def test_correct_last_after_a_reset_of_one_leaf():
    """Its weight is young again, while that of the other is not."""
    tx = presets.keras.adam(1.0)
    params = {"old": jnp.zeros(2), "young": jnp.zeros(2)}
    state, grads = tx.init(params), jax.tree.map(lambda p: p + 1e-7, params)
    for _ in range(10):
        first, state = tx.update(grads, state, params)
    again, _ = tx.update(grads, aj.reset(state, tx, match="young"), params)
    np.testing.assert_allclose(again["young"], -(0.001**0.5) / (0.001**0.5 + 1), rtol=2e-6)
    assert (again["old"] < first["old"]).all()


@pytest.mark.parametrize("name", [name for name in presets.torch.__all__ if name != "sgd"])
def test_complex_leaves_of_torch_are_refused(name):
    """A7: PyTorch gives each part its own ν; a step of ours was another one, without a word."""
    tx = getattr(presets.torch, name)(0.1)
    with pytest.raises(TypeError, match="found complex64 at w; expected real leaves.*as_real"):
        tx.init({"w": jnp.ones(1, jnp.complex64)})
    nested = aj.chain(optax.clip(1.0), tx)
    with pytest.raises(TypeError, match="complex64"):
        nested.init({"w": jnp.ones(1, jnp.complex64)})


def test_the_two_parts_step_as_in_torch_and_sgd_takes_complex_leaves():
    """A7: `torch.optim.Adam([1+1j], lr=.1)` with gradient 1+.01j steps by −0.1−0.1j."""
    parts = {"w": jnp.array([[1.0, 1.0]])}
    tx = presets.torch.adam(0.1)
    updates, _ = tx.update({"w": jnp.array([[1.0, 0.01]])}, tx.init(parts), parts)
    np.testing.assert_allclose(updates["w"], [[-0.1, -0.1]], rtol=1e-5)
    params, tx = {"w": jnp.ones(1, jnp.complex64)}, presets.torch.sgd(0.1, 0.9)
    updates, _ = tx.update({"w": jnp.array([1 + 0.01j], "c8")}, tx.init(params), params)
    np.testing.assert_allclose(updates["w"], [-0.1 - 0.001j], rtol=1e-5)
