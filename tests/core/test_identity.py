"""A state is refused where it is not the transformation's own, or it is right: for every ordered
pair, wrapper and group.

What may be taken is written down here: states whose moments, weights and storage are the same.
"""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import normals, refused, same

import adam_jax as aj
from adam_jax import presets, storage

PARAMS = {"b": normals(3), "w": normals(64, 128)}
FADING = optax.linear_schedule(1.0, 0.0, 10)

TXS = {
    **{name: getattr(aj, name)(0.1) for name in aj.family.__all__},
    "adam 8bit": aj.adam(0.1, storage="8bit"),
    "adam columns": aj.adam(0.1, storage=storage.Codes(axis=-2)),
    "adam leaf": aj.adam(0.1, storage=storage.Codes(axis=None)),
    "adam bfloat16": aj.adam(0.1, storage="bfloat16"),
    "adam scheduled": aj.adam(FADING),
    "adam settable": aj.adam(aj.settable(0.1)),
    "adamw l2": aj.adamw(0.1, decay="l2"),
    "adamw independent": aj.adamw(0.1, decay="independent"),
    "adam_mini leaf": aj.adam_mini(0.1, blocks="leaf"),
    "amsgrad raw": aj.amsgrad(0.1, maximum="raw"),
    "momentum dampened": aj.momentum(0.1, dampened=True),
    "rmsprop centered": aj.rmsprop(0.1, centered=True),
    "rmsprop corrected": aj.rmsprop(0.1, bias_correction=True),
    "rmsprop momentum": aj.rmsprop(0.1, momentum=0.9),
    "adopt free": aj.adopt(0.1, use_clipping=False),
    "torch.nadam": presets.torch.nadam(),
    "keras.adam": presets.keras.adam(),
    "sgd": aj.chain(aj.scale_by_learning_rate(0.1)),
    "compensated": aj.chain(aj.adam(0.1), aj.compensate()),
    "averaged": aj.chain(aj.adam(0.1), aj.stages.average_parameters(0.9)),
    "skip_nonfinite": aj.skip_nonfinite(aj.adam(0.1)),
    "skip_spikes": aj.skip_spikes(aj.adam(0.1)),
    "observe": aj.observe(aj.adam(0.1)),
    "grouped": aj.by_path({"b": {"b1": 0.5}}, aj.adam(0.1)),
    "optax.adam": optax.adam(0.1),
    "optax.adamw": optax.adamw(0.1),
}

ALIKE = [
    # Averages of gradients and of their squares, whatever the numbers are and whatever is done with
    # them.
    {"adam", "yogi", "keras.adam"},
    {"adamax"},
]
"""The groups of transformations whose states are the same."""

TAKEN = {("adam scheduled", "adam"), ("adam scheduled", "yogi"), ("adam scheduled", "keras.adam")}
"""Ordered pairs of a state and a transformation that takes it: one that needs no counter leaves it
where it is."""

REFUSAL = re.compile(
    r"got the state of another transformation: .*(convert_state|from_optax)\(|"
    r"the state's \w+ .*which is not how .*convert_state\(|"
    r"the state has no scale .*convert_state\(|"
    r"the state's nu has shape .*convert_state\(|found a state of .*convert_state",
    re.DOTALL,
)


@pytest.fixture(scope="module")
def states():
    with jax.numpy_dtype_promotion("standard"):
        return {name: tx.init(PARAMS) for name, tx in TXS.items()}


def take(tx, state):
    """Traces a step; computes nothing."""
    with jax.numpy_dtype_promotion("standard"):
        return jax.eval_shape(tx.update, PARAMS, state, PARAMS)


@pytest.mark.parametrize("here", [name for name in TXS if not name.startswith("optax")])
def test_every_ordered_pair(here, states):
    for there in TXS:
        alike = (
            there == here
            or any({there, here} <= group for group in ALIKE)
            or (there, here) in TAKEN
        )
        if alike:
            take(TXS[here], states[there])
            continue
        with pytest.raises(ValueError, match=REFUSAL) as caught:
            take(TXS[here], states[there])
        message = str(caught.value)
        assert len(message) < 900, message


def test_what_is_taken_is_right(states):
    """A step from another's state, of equal meaning, is the step that `convert_state` leads to."""
    grads = jax.tree.map(lambda x: x + 1, PARAMS)
    for there, here in [
        ("adam", "yogi"),
        ("yogi", "adam"),
        ("adam scheduled", "adam"),
        ("keras.adam", "adam"),
    ]:
        before = TXS[there].update(PARAMS, states[there], PARAMS)[1]
        converted = aj.convert_state(before, TXS[there], TXS[here], PARAMS).state
        found, expected = (
            TXS[here].update(grads, state, PARAMS)[0] for state in (before, converted)
        )
        jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_numbers_do_not_matter():
    others = aj.adamw(1.0, b2=0.9, eps=1e-3, weight_decay=0.5, mask="matrices")
    for one, other in itertools.permutations([aj.adamw(1e-3), others], 2):
        take(one, other.init(PARAMS))


WRAPPERS = {
    "chain": lambda tx: aj.chain(optax.clip(1.0), tx),
    "skip": aj.skip_nonfinite,
    "observe": aj.observe,
    "group": lambda tx: aj.by_path({"b": tx}, aj.adam(0.1)),
    "nested": lambda tx: aj.by_path({"b": aj.skip_spikes(tx)}, "frozen"),
    "optax.chain": lambda tx: optax.chain(optax.clip(1.0), tx),
    "masked": lambda tx: optax.masked(tx, {"b": True, "w": False}),
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_inside_wrappers_and_groups(name):
    wrap = WRAPPERS[name]
    for here, there in [
        (aj.adam(0.1), aj.adamax(0.1)),
        (aj.adamw(0.1), aj.adam(0.1)),
        (aj.adam(FADING), aj.adam(0.1)),
    ]:
        with pytest.raises(ValueError, match=REFUSAL):
            take(wrap(here), wrap(there).init(PARAMS))


def test_groups_that_were_swapped():
    groups = [aj.adam(0.1), aj.adabelief(0.1)]
    one, other = (
        aj.by_path({"b": first, "w": second}, "frozen") for first, second in (groups, groups[::-1])
    )
    with refused(
        ValueError,
        "at .inner_states['b'][0] a TrackMeanBeliefState, where it keeps a TrackMeanSquareState",
    ):
        take(one, other.init(PARAMS))


def test_arguments_in_another_order():
    """D8, D13: of `update` and of `apply_updates`; no message prints an array."""
    tx = aj.adam(0.1)
    state = tx.init(PARAMS)
    for wrong in ((state, PARAMS, PARAMS), (PARAMS, PARAMS, state)):
        with refused(ValueError, "update(gradients, state, params)") as caught:
            tx.update(*wrong)
        assert "\n" not in str(caught.value)
    for wrong in ((tx, PARAMS), (PARAMS, tx), (PARAMS, {"b": PARAMS["b"]})):
        with refused(ValueError, "apply_updates(params, updates)") as caught:
            aj.apply_updates(*wrong)
        assert len(str(caught.value)) < 400


def test_states_of_numpy_are_taken():
    """B6: `jax.device_get` and `flax.serialization` give them."""
    for tx in (aj.skip_spikes(aj.adam(0.1)), aj.observe(aj.adam(0.1, storage="8bit"), every=1)):
        state = tx.init(PARAMS)
        same(tx.update(PARAMS, jax.device_get(state), PARAMS), tx.update(PARAMS, state, PARAMS))


def test_what_comes_back_from_a_checkpoint_without_a_target():
    tx = aj.adam(0.1)
    first, *rest = tx.init(PARAMS)
    for state in ([first._asdict(), *rest], {"0": first._asdict()}, None):
        with refused(
            ValueError,
            "adam(",
            "got the state of another transformation",
            "tx.init(params)" if state is None else "target",
        ):
            take(tx, state)


def test_every_class_of_states_can_be_imported():
    from adam_jax.stages import rules

    for kind in rules.STATES.values():
        assert getattr(rules, kind.__name__) is kind
        assert kind.__doc__.startswith("State of `track_moments`")
    assert type(aj.adam(0.1).init(jnp.ones(2))[0]).__name__ == "TrackMeanSquareState"


def test_a_strangers_state_that_is_a_tree_like_the_parameters():
    @aj.extend.stage(takes="updates", gives="updates")
    def remember():
        return lambda params: params, lambda updates, state, params, context: (updates, updates)

    tx = aj.chain(remember(), aj.scale_by_learning_rate(0.1))
    state = take(tx, tx.init(PARAMS))[1]
    assert jax.tree.structure(state[0]) == jax.tree.structure(PARAMS)
