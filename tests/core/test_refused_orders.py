"""Orders of stages that cannot work are refused when they are chained.

A message names the stages and where they stand; it is written out here.
"""

import optax
import pytest
from helpers import refused
from refused_params import PARAMS

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


@pytest.mark.parametrize("stage", [correct_bias(), scale_by_moments()], ids=repr)
def test_a_stage_alone_that_is_given_no_moments(stage):
    with refused(TypeError, "takes Moments, but was given dict", "track_moments(...)"):
        optax.chain(stage).update(PARAMS, optax.chain(stage).init(PARAMS), PARAMS)


def test_a_cautious_link_that_knows_no_gradient():
    tx = optax.chain(adam_jax.adam(0.1), cautious())
    with refused(ValueError, "cautious() does not know", "gradient=grads"):
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
