"""What `reset` refuses: patterns that match nothing, states that are not the transformation's own.

The expected messages are written out here.
"""

import re

import jax
import jax.numpy as jnp
import optax
import pytest
from before_reset import INNER, PARAMS, trained

import adam_jax as aj

SGD = aj.chain(aj.scale_by_learning_rate(0.1))
FADING = aj.adam(optax.linear_schedule(1.0, 0.0, 10))
SCHEDULED = {"tx": FADING, "state": FADING.init(PARAMS)}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            {"match": "tail"},
            "found no moments whose path matches 'tail'; expected one of \"[0].mu['b']\"",
        ),
        (
            {"match": "mu", "schedule": True, **SCHEDULED},
            "found no counts of a schedule whose path matches 'mu'; expected one of '[3].step'.",
        ),
        ({"schedule": True, "moments": False}, "found no counts of a schedule in the state"),
        ({"moments": False}, "expected at least one"),
        (
            {"state": optax.adam(0.1).init(PARAMS)},
            "reset: adam(learning_rate=0.1, b1=0.9, b2=0.999, eps=1e-08, eps_root=0.0) got",
        ),
        ({"state": (), "tx": aj.chain(aj.scale_by_learning_rate(0.1))}, "where it keeps 1"),
        (
            {"state": SGD.init(PARAMS), "tx": SGD},
            "found no moments in the state; expected that of a transformation which has",
        ),
    ],
)
def test_nothing_to_reset_is_an_error(arguments, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        aj.reset(**{"state": INNER.init(PARAMS), "tx": INNER} | arguments)


def test_a_nu_without_its_mu_is_refused():
    """The next gradient may be tiny: a step of 90,000 learning rates was seen."""
    _, state = trained(aj.adam(0.1))
    with pytest.raises(ValueError, match="the ν of .* matches, and their μ does not"):
        aj.reset(state, INNER, match=r"\.nu")
    aj.reset(trained(aj.rmsprop(0.1))[1], aj.rmsprop(0.1), match=r"\.nu")


def test_a_state_that_was_mapped_over_is_refused_whatever_its_shapes():
    """Two members of two leaves have weights as two leaves of their own have."""
    state = jax.vmap(aj.adam(0.1).init)({"w": jnp.ones((2, 3)), "b": jnp.ones((2, 2))})
    with pytest.raises(ValueError, match=r"under jax\.vmap"):
        aj.reset(state, INNER, match="w")


@pytest.mark.parametrize(
    ("match", "error"), [("[", ValueError), (b"w", TypeError), (["w"], TypeError)]
)
def test_what_is_no_pattern_is_refused(match, error):
    with pytest.raises(error, match="reset: match: found"):
        aj.reset(INNER.init(jnp.ones(3)), INNER, match=match)
