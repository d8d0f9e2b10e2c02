"""What cannot be right is refused: numbers and orders when a transformation is made, trees when an
update is traced.

A message names the thing, shows what was found, and says what to do. A traced number cannot be
looked at, and is not."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import refused

import adam_jax
from adam_jax import (
    add_decayed_weights,
    chain,
    correct_bias,
    scale_by_learning_rate,
    scale_by_moments,
    track_moments,
)
from adam_jax.stages import average_parameters, cautious, scale_by_trust_ratio

NAN, INF = float("nan"), float("inf")
PARAMS = {"head": {"b": jnp.ones(3), "w": jnp.ones((2, 3))}}


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


def arguments(*names):
    """Those of the named arguments that each member takes."""
    members = {name: getattr(adam_jax, name) for name in adam_jax.family.__all__}
    return [
        pytest.param(make, argument, id=f"{name}-{argument}")
        for name, make in members.items()
        for argument in inspect.signature(make).parameters
        if argument in names
    ]


# Numbers, when they are given


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


# Orders, when they are chained

track, correct, scale, rate = (
    track_moments(),
    correct_bias(),
    scale_by_moments(),
    scale_by_learning_rate(0.1),
)
ORDERS = {
    "no_moments": (
        [optax.clip(1.0), correct, scale],
        "correct_bias()",
        "position 1",
        "takes Moments",
        "track_moments",
    ),
    "scale_twice": (
        [track, scale, scale],
        "scale_by_moments",
        "position 2",
        "position 1",
        "takes Moments",
        "track_moments",
    ),
    "correct_after_scale": (
        [track, scale, correct],
        "correct_bias()",
        "position 2",
        "gives plain updates",
        "Put it between",
    ),
    "rate_on_moments": (
        [track, rate],
        "scale_by_learning_rate",
        "position 1",
        "takes plain updates",
        "Put scale_by_moments",
    ),
    "optax_on_moments": (
        [track, optax.clip(1.0), scale],
        "position 1",
        "takes plain updates",
        "Put scale_by_moments",
    ),
    "track_twice": (
        [track, track, scale],
        "track_moments",
        "position 1",
        "position 0",
        "gives Moments",
    ),
    "two_rates": (
        [track, scale, rate, rate],
        "scale_by_learning_rate",
        "position 3",
        "second one",
        "Put it before",
    ),
    "two_members": (
        [adam_jax.adam(0.1), adam_jax.adamw(0.1)],
        "adamw",
        "position 1",
        "second one",
        ".stages",
    ),
    "decay_after_member": (
        [adam_jax.adam(0.1), add_decayed_weights(0.1)],
        "add_decayed_weights",
        "position 1",
        "Put it before",
    ),
    "trust_after_member": (
        [adam_jax.adam(0.1), scale_by_trust_ratio()],
        "scale_by_trust_ratio()",
        "position 1",
        "Put it before",
    ),
    "average_before_rate": (
        [average_parameters(0.9), adam_jax.adam(0.1)],
        "average_parameters",
        "position 0",
        "Move it behind",
    ),
    "moments behind a guard": (
        [adam_jax.skip_nonfinite(optax.identity()), adam_jax.adam(0.1)],
        "adam(",
        "position 1",
        "comes after skip_nonfinite(",
        "around the whole chain",
    ),
    "decay behind a chain with a guard": (
        [chain(adam_jax.skip_spikes(optax.identity())), add_decayed_weights(0.1)],
        "add_decayed_weights(",
        "comes after chain(skip_spikes(",
    ),
    "nothing": ([], "found no stages", "expected at least one"),
}


@pytest.mark.parametrize(
    ("stages", "says"), [(stages, says) for stages, *says in ORDERS.values()], ids=ORDERS
)
def test_an_order_that_cannot_work(stages, says):
    with refused(ValueError, "chain:", *says):
        chain(*stages)


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


@pytest.mark.parametrize(
    ("part", "says"),
    [
        (adam_jax.adam, "did you mean to call it?"),
        (0.1, "found 0.1"),
        (None, "found None"),
        ((1, 2), "(1, 2)"),
    ],
    ids=["uncalled", "number", "None", "pair"],
)
def test_a_part_that_is_no_transformation(part, says):
    with refused(
        TypeError, "chain: found", "at position 1", says, "expected a gradient transformation"
    ):
        chain(optax.clip(1.0), part)


# Trees, when an update is traced

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
    "other", [optax.adam(0.1), adam_jax.momentum(0.1)], ids=["optax.adam", "momentum"]
)
def test_the_state_of_another_transformation(other):
    with refused(
        ValueError, "adam(", "got the state of another transformation", "where it keeps 4", "(state"
    ):
        adam_jax.adam(0.1).update(PARAMS, other.init(PARAMS), PARAMS)


LISTED = {
    "adam": (adam_jax.adam(0.1), "[0].mu['head']['b']"),
    "8bit": (adam_jax.adam(0.1, storage=adam_jax.storage.Codes(smallest=0)), "[0].mu['head']['b']"),
    "one array": (adam_jax.adam(0.1), "[0].mu"),
    "a number": (adam_jax.adam(0.1), "[0].mu"),
    "skip_spikes": (adam_jax.skip_spikes(adam_jax.adam(0.1)), ".norms"),
    "by_path": (
        adam_jax.by_path({"head/w": {"b1": 0.5}}, adam_jax.adam(0.1)),
        ".inner_states['head/w'][0].mu['head']['w']",
    ),
    "average": (chain(adam_jax.adam(0.1), average_parameters(0.9)), "[0][0].mu['head']['b']"),
}


@pytest.mark.parametrize("name", LISTED)
def test_a_state_whose_arrays_became_lists(name):
    tx, place = LISTED[name]
    params = {"one array": jnp.ones((2, 3)), "a number": jnp.ones(())}.get(name, PARAMS)
    state = jax.tree.map(lambda x: x.tolist(), tx.init(params))
    kind = "float" if name == "a number" else "list"
    says = f"the state has a {kind} at {place}; expected an array", "target", "jnp.asarray"
    for caller, use in {
        "update": lambda: tx.update(params, state, params),
        "reset": lambda: adam_jax.reset(state, tx),
        "hyperparameters": lambda: adam_jax.hyperparameters(state, tx),
    }.items():
        with refused(TypeError, f"{caller}: the state has", *says):
            use()
    with (
        refused(TypeError, ".weights; expected an array")
        if name != "skip_spikes"
        else refused(TypeError, "expected an array")
    ):
        jax.eval_shape(
            tx.update, params, state, params
        )  # traced, the numbers in the lists are arrays


def test_numbers_may_stand_for_counts_and_for_settable_values():
    tx = adam_jax.adam(adam_jax.settable(0.1))
    state = optax.tree.set(tx.init(PARAMS), count=3, learning_rate=0.2)
    tx.update(PARAMS, state)


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


@pytest.mark.parametrize("stage", [correct_bias(), scale_by_moments()], ids=repr)
def test_a_stage_alone_that_is_given_no_moments(stage):
    with refused(TypeError, "takes Moments, but was given dict", "track_moments(...)"):
        optax.chain(stage).update(PARAMS, optax.chain(stage).init(PARAMS), PARAMS)


def test_a_cautious_link_that_knows_no_gradient():
    tx = optax.chain(adam_jax.adam(0.1), cautious())
    with refused(ValueError, "cautious() does not know", "gradient=grads"):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS)


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


@pytest.mark.parametrize(
    "mask", [{"head": "decay"}, {"head": {"b": "no", "w": True}}, {"head": 0.5}]
)
def test_a_mask_of_no_booleans(mask):
    tx = adam_jax.adamw(0.1, mask=mask)
    with refused(ValueError, "mask: found", "True or False"):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS)


@pytest.mark.parametrize(
    "build",
    [
        scale_by_moments,
        adam_jax.stages.scale_by_atan2,
        adam_jax.stages.keep_maximum,
        adam_jax.stages.clip_update_rms,
    ],
)
def test_a_second_moment_that_is_not_tracked(build):
    tx = chain(track_moments(0.9, None), build())
    with refused(ValueError, build.__name__, "needs ν", "b2"):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS)


def test_belief_in_no_mean():
    with refused(ValueError, "nu_rule='belief'", "b1=None"):
        track_moments(None, 0.9, nu_rule="belief")


def test_a_rate_that_no_float_can_hold():
    with refused(ValueError, "learning_rate: found inf"):
        adam_jax.adam(10**400)


def test_tracking_nothing():
    with refused(ValueError, "b1 and b2", "at least one"):
        track_moments(None, None)


def test_blocks_along_axes_that_a_leaf_does_not_have():
    tx = adam_jax.adam_mini(0.1, blocks=lambda path, shape: (2,))
    with refused(ValueError, "blocks: found the axes (2,)", "['head']['b']", "(3,)"):
        tx.init(PARAMS)


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


def test_a_slip_in_a_name_of_update():
    """Other names are for transformations of others, which take what they know."""
    tx = adam_jax.adam(0.1)
    state = tx.init(PARAMS)
    tx.update(PARAMS, state, PARAMS, value=1.0, grad=PARAMS, loss=2.0)
    with refused(TypeError, "adam: update: found the argument 'param'", "did you mean params?"):
        tx.update(PARAMS, state, param=PARAMS)


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


def test_weights_of_another_shape():
    """One for both moments would be broadcast to both."""
    tx = adam_jax.adam(0.1)
    moments, *others = tx.init(PARAMS)
    state = (moments._replace(weights=moments.weights[:, :1]), *others)
    with refused(ValueError, "found weights of shape (2, 1)", "expected (2, 2)"):
        tx.update(PARAMS, state, PARAMS)


def test_a_schedule_cannot_be_set():
    tx = adam_jax.adam(adam_jax.settable(0.1))
    with refused(TypeError, "learning_rate: found ", "expected a number"):
        adam_jax.set_hyperparameters(tx.init(PARAMS), tx, learning_rate=lambda count: 0.1)


def test_a_state_that_was_made_under_vmap_and_is_updated_without():
    """With as many members as moments its debias factors were taken for those of leaves."""
    tx, stacked = adam_jax.adam(0.1), jnp.ones((2, 3))
    state = jax.vmap(tx.init)(stacked)
    state = jax.vmap(tx.update)(stacked, state, stacked)[1]
    with refused(ValueError, "[0].count of shape (2,)", "under jax.vmap"):
        tx.update(stacked, state, stacked)


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
