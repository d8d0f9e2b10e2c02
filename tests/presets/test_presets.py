"""Presets take the steps of the framework they are named for: PyTorch, Keras and Optax.

The oracle is the framework itself, where it is installed.
"""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from preset_paths import EXACT, FLOAT32, SHAPE, agree, all_of_ours, leaves, problem, rate

import adam_jax as aj
from adam_jax import presets


def ours(tx, gradients, theta, dtype="float64"):
    """The parameters after every step of one."""
    return all_of_ours({"": tx}, gradients, theta, dtype)[""]


# Of each optimizer: what both get, in arguments of the framework.
BETAS = {"betas": (0.87, 0.983), "eps": 1e-5}
TORCH = {
    "adam": ("Adam", BETAS),
    "adam l2 amsgrad": ("Adam", BETAS | {"weight_decay": 0.07, "amsgrad": True}),
    "adam decoupled": ("Adam", BETAS | {"weight_decay": 0.07, "decoupled_weight_decay": True}),
    "adam maximize": ("Adam", BETAS | {"weight_decay": 0.07, "maximize": True}),
    "adam default": ("Adam", {}),
    "adamw": ("AdamW", BETAS | {"weight_decay": 0.07}),
    "adamw amsgrad maximize": ("AdamW", BETAS | {"amsgrad": True, "maximize": True}),
    "adamw default": ("AdamW", {}),
    "adamax": ("Adamax", BETAS | {"weight_decay": 0.07}),
    "adamax default": ("Adamax", {}),
    "nadam": ("NAdam", BETAS | {"weight_decay": 0.07, "momentum_decay": 0.02}),
    "nadam decoupled": ("NAdam", BETAS | {"weight_decay": 0.07, "decoupled_weight_decay": True}),
    "nadam default": ("NAdam", {}),
    "radam": ("RAdam", BETAS | {"weight_decay": 0.07}),
    "radam decoupled": ("RAdam", BETAS | {"weight_decay": 0.07, "decoupled_weight_decay": True}),
    "radam default": ("RAdam", {}),
    "rmsprop": ("RMSprop", {"alpha": 0.97, "eps": 1e-5, "momentum": 0.6, "weight_decay": 0.07}),
    "rmsprop centered": ("RMSprop", {"eps": 1e-5, "centered": True}),
    "rmsprop default": ("RMSprop", {}),
    "sgd": ("SGD", {"momentum": 0.87, "weight_decay": 0.07, "maximize": True}),
    "sgd nesterov": ("SGD", {"momentum": 0.87, "nesterov": True}),
    "sgd default": ("SGD", {}),
}


def torch_path(name, options, gradients, theta, dtype):
    """PyTorch's parameters after every step, the learning rate set by hand before each."""
    torch = pytest.importorskip("torch", reason="PyTorch is an optional oracle: pip install torch")
    before = torch.get_default_dtype()
    # NAdam keeps the product of its momenta in the default dtype, whatever the parameters have.
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        param = torch.tensor(np.asarray(theta, dtype), requires_grad=True)
        optimizer = getattr(torch.optim, name)([param], **options)
        path = []
        for count, g in enumerate(np.asarray(gradients, dtype)):
            optimizer.param_groups[0]["lr"] = float(rate(count))
            param.grad = torch.tensor(g)
            optimizer.step()
            path.append(param.detach().numpy().copy())
    finally:
        torch.set_default_dtype(before)
    return np.asarray(path)


@pytest.mark.parametrize("name", TORCH)
def test_torch(name, x64):
    theirs, options = TORCH[name]
    gradients, theta = problem()
    expected = torch_path(theirs, options, gradients, theta, "float64")
    agree(
        ours(getattr(presets.torch, name.split()[0])(rate, **options), gradients, theta),
        expected,
        theta,
        EXACT,
    )


# Of an element that starts at 1 and moves by 1e-7, float32 shows one digit: these start at 0.
# PyTorch's own rounding errors are 1e-6 of a way then, and those of Keras, which rounds β₂ᵗ and 1 −
# β₂ apart, 8e-6.
@pytest.mark.parametrize("name", [name for name in TORCH if "default" in name])
def test_torch_in_float32(name):
    theirs, options = TORCH[name]
    gradients, theta = problem()[0], np.zeros(SHAPE)
    expected = torch_path(theirs, options, gradients, theta, "float32")
    found = ours(
        getattr(presets.torch, name.split()[0])(rate, **options), gradients, theta, "float32"
    )
    agree(found, expected, theta, FLOAT32)


SOME = {"beta_1": 0.87, "beta_2": 0.983, "epsilon": 1e-5}
KERAS = {
    "adam": ("Adam", SOME),
    "adam decay amsgrad": ("Adam", SOME | {"weight_decay": 0.07, "amsgrad": True}),
    "adam clipnorm": ("Adam", SOME | {"clipnorm": 0.1}),
    "adam clipvalue": ("Adam", SOME | {"clipvalue": 0.1}),
    "adam global_clipnorm": ("Adam", SOME | {"global_clipnorm": 0.1, "weight_decay": 0.07}),
    "adam default": ("Adam", {}),
    "adamw": ("AdamW", SOME | {"weight_decay": 0.07}),
    "adamw default": ("AdamW", {}),
    "adamax": ("Adamax", SOME | {"weight_decay": 0.07, "clipvalue": 0.1}),
    "adamax default": ("Adamax", {}),
    "nadam": ("Nadam", SOME | {"weight_decay": 0.07, "global_clipnorm": 0.1}),
    "nadam default": ("Nadam", {}),
    "rmsprop": ("RMSprop", {"rho": 0.97, "momentum": 0.6, "epsilon": 1e-5, "weight_decay": 0.07}),
    "rmsprop centered": (
        "RMSprop",
        {"rho": 0.97, "momentum": 0.6, "centered": True, "clipnorm": 0.1},
    ),
    "rmsprop decay": ("RMSprop", {"weight_decay": 0.07}),
    "rmsprop default": ("RMSprop", {}),
    "lamb": ("Lamb", SOME | {"clipnorm": 0.1}),
    "lamb default": ("Lamb", {}),
    "sgd": ("SGD", {"momentum": 0.87, "weight_decay": 0.07}),
    "sgd nesterov": (
        "SGD",
        {"momentum": 0.87, "nesterov": True, "weight_decay": 0.07, "global_clipnorm": 0.1},
    ),
    "sgd default": ("SGD", {}),
}


@pytest.fixture(scope="module")
def keras(tmp_path_factory):
    """Keras on JAX, which says so in the environment, and leaves its settings in a
    home of its own.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KERAS_BACKEND", "jax")
        patch.setenv("KERAS_HOME", str(tmp_path_factory.mktemp("keras")))
        return pytest.importorskip("keras", reason="Keras is an optional oracle: pip install keras")


def keras_path(keras, name, options, gradients, theta, dtype):
    """Keras' parameters after every step, from one jitted scan of its stateless form."""

    class Rate(keras.optimizers.schedules.LearningRateSchedule):
        def __call__(self, step):
            return rate(jnp.asarray(step)).astype(dtype)

    before = keras.config.floatx()
    keras.config.set_floatx(dtype)
    try:
        variables = [keras.Variable(part, dtype=dtype) for part in leaves(theta)]
        optimizer = getattr(keras.optimizers, name)(learning_rate=Rate(), **options)
        optimizer.build(variables)

        def step(carry, g):
            params, state = optimizer.stateless_apply(carry[1], g, carry[0])
            return (params, state), params

        first = tuple([v.value for v in part] for part in (variables, optimizer.variables))
        gradients = leaves(jnp.asarray(gradients, dtype))
        return np.concatenate(jax.jit(lambda g: jax.lax.scan(step, first, g)[1])(gradients), 1)
    finally:
        keras.config.set_floatx(before)


@pytest.mark.parametrize("name", KERAS)
def test_keras(name, keras, x64):
    theirs, options = KERAS[name]
    gradients, theta = problem()
    with jax.numpy_dtype_promotion("standard"):
        expected = keras_path(keras, theirs, options, gradients, theta, "float64")
    agree(
        ours(getattr(presets.keras, name.split()[0])(rate, **options), gradients, theta),
        expected,
        theta,
        EXACT,
    )


@pytest.mark.parametrize("name", [name for name in KERAS if "default" in name])
def test_keras_in_float32(name, keras):
    theirs, options = KERAS[name]
    gradients, theta = problem()[0], np.zeros(SHAPE)
    with jax.numpy_dtype_promotion("standard"):
        expected = keras_path(keras, theirs, options, gradients, theta, "float32")
    found = ours(
        getattr(presets.keras, name.split()[0])(rate, **options), gradients, theta, "float32"
    )
    agree(found, expected, theta, FLOAT32)


def test_optax(x64):
    """The others are members of the family, which `test_trajectories_optax.py` compares
    with Optax.
    """
    assert all(
        getattr(presets.optax, name) is getattr(aj, name)
        for name in presets.optax.__all__
        if name != "sgd"
    )
    gradients, theta = problem()
    options = ({}, {"momentum": 0.87}, {"momentum": 0.87, "nesterov": True})
    txs = {
        f"{which} {i}": sgd(rate, **its)
        for i, its in enumerate(options)
        for which, sgd in [("ours", presets.optax.sgd), ("theirs", optax.sgd)]
    }
    with jax.numpy_dtype_promotion("standard"):
        paths = all_of_ours(txs, gradients, theta)
    for i in range(len(options)):
        agree(paths[f"ours {i}"], paths[f"theirs {i}"], theta, EXACT)


def test_every_preset_has_an_oracle():
    for which, cases in (("torch", TORCH), ("keras", KERAS)):
        assert {name.split()[0] for name in cases} == set(getattr(presets, which).__all__)


def arguments(function, *without):
    return [
        p
        for p in inspect.signature(function).parameters.values()
        if p.name not in (*without, "storage")
    ]


def same_arguments(mine, theirs):
    """Positions, names and defaults: what may be given by position there means the same here, or is
    refused.
    """
    positional = [p for p in mine if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert [p.name for p in positional] == [p.name for p in theirs[: len(positional)]]
    defaults = {p.name: p.default for p in theirs}
    for p in mine:
        # A default that is a function is another object in every module.
        assert p.name in defaults
        assert callable(p.default) or p.default == defaults[p.name], p.name


@pytest.mark.parametrize("name", presets.torch.__all__)
def test_arguments_of_torch(name):
    torch = pytest.importorskip("torch", reason="PyTorch is an optional oracle: pip install torch")
    same_arguments(
        arguments(getattr(presets.torch, name)),
        arguments(getattr(torch.optim, TORCH[name][0]).__init__, "self", "params"),
    )


@pytest.mark.parametrize("name", presets.keras.__all__)
def test_arguments_of_keras(name, keras):
    same_arguments(
        arguments(getattr(presets.keras, name)),
        arguments(getattr(keras.optimizers, KERAS[name][0]).__init__, "self"),
    )


@pytest.mark.parametrize("name", presets.optax.__all__)
def test_arguments_of_optax(name):
    theirs = getattr(optax, name, None) or getattr(optax.contrib, name)
    mine = arguments(getattr(presets.optax, name))
    names = inspect.signature(theirs).parameters
    same_arguments(
        [p for p in mine if p.kind is p.POSITIONAL_OR_KEYWORD and p.name in names],
        arguments(theirs),
    )
