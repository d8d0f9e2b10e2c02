"""Presets take the steps of the framework they are named for: PyTorch, Keras and Optax."""

import functools
import inspect
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import paths_of

import adam_jax as aj
from adam_jax import presets

STEPS = 250
SHAPE = (6, 5)
EXACT = 1e-10  # float64 on both sides; most agree to 1e-13
FLOAT32 = 2e-5
PRESETS = [(which, name) for which in presets.__all__ for name in getattr(presets, which).__all__]


def problem(seed=0):
    """Gradients from 10 down to 1e-10 of an element, so that most ε are larger than some of them,
    and where they start.
    """
    rng = np.random.default_rng(seed)
    size = 10.0 ** rng.uniform(-2, 1, (STEPS, 1, 1)) * 10.0 ** np.linspace(-8, 0, 30).reshape(SHAPE)
    return rng.standard_normal((STEPS, *SHAPE)) * size, rng.standard_normal(SHAPE)


def leaves(array):
    """The same as two leaves, so that norms of a leaf and of all differ."""
    return [array[..., :2, :], array[..., 2:, :]]


def all_of_ours(txs, gradients, theta, dtype="float64"):
    """Of several transformations by name: the parameters after every step, from one program."""
    gradients, theta = (leaves(jnp.asarray(array, dtype)) for array in (gradients, theta))
    return {name: np.concatenate(path, 1) for name, path in paths_of(txs, gradients, theta).items()}


def ours(tx, gradients, theta, dtype="float64"):
    """The parameters after every step of one."""
    return all_of_ours({"": tx}, gradients, theta, dtype)[""]


def agree(found, expected, theta, rtol):
    """The way from the start agrees element by element: those that move by little, where ε is all,
    count like the others.
    """
    found, expected = (np.asarray(path, np.float64) - theta for path in (found, expected))
    moved = np.abs(expected).max(0)
    assert moved.min() > 0
    error = (np.abs(found - expected).max(0) / moved).max()
    assert error <= rtol


def rate(count):
    """A learning rate that changes, for what depends on the order of rate and momentum."""
    return 0.03 / (1 + 0.02 * jnp.asarray(count, float))


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
