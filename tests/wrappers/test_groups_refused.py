"""What `by_path` refuses: wrong arguments, patterns that match nothing or the same leaf, other
trees and states.

The expected messages are written out here.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from grouped import BIAS, DEFAULT, PARAMS, adam, halved
from helpers import refused

import adam_jax as aj
from adam_jax import by_path

AT_ONCE = {
    "no_mapping": (
        lambda: by_path([BIAS], adam),
        TypeError,
        "groups: found ['.*/bias']",
        "expected a mapping",
    ),
    "no_groups": (lambda: by_path({}, adam), ValueError, "groups: found {}", "expected a mapping"),
    "no_string": (
        lambda: by_path({re.compile("a"): "frozen"}, adam),
        TypeError,
        "found the pattern re.compile('a')",
    ),
    "default_as_pattern": (
        lambda: by_path({"default": "frozen"}, adam),
        ValueError,
        "the name of the rest",
        "'default()'",
    ),
    "no_expression": (
        lambda: by_path({"*bias": "frozen"}, adam),
        ValueError,
        "found the pattern '*bias'",
        "nothing to repeat",
    ),
    "frozn": (
        lambda: by_path({"a": "frozn"}, adam),
        ValueError,
        "by_path: 'a': found 'frozn'; expected one of 'frozen'",
    ),
    "ordered": (
        lambda: by_path({"a": "frozen"}, adam, ordered=1),
        ValueError,
        "by_path: ordered: found 1",
    ),
    "no_group": (
        lambda: by_path({"a": None}, adam),
        TypeError,
        "by_path: 'a': found None",
        "such as adam(1e-3)",
    ),
    "uncalled": (lambda: by_path({"a": aj.adam}, adam), TypeError, "did you mean to call it?"),
    "no_default": (lambda: by_path({"a": "frozen"}, 0.1), TypeError, "by_path: default: found 0.1"),
    "default_frozn": (
        lambda: by_path({"a": adam}, "frozn"),
        ValueError,
        "by_path: default: found 'frozn'; expected one of 'frozen'",
    ),
    "all_frozen": (
        lambda: by_path({"a": "frozen"}, "frozen"),
        ValueError,
        "all groups and the default are 'frozen'",
    ),
    "overrides_of_frozen": (
        lambda: by_path({"a": {"b1": 0.5}}, "frozen"),
        TypeError,
        "the overrides {'b1': 0.5} of 'frozen'",
    ),
    "another_name": (
        lambda: by_path({"a": {"learning_rate": 0.5}}, aj.presets.torch.adamw()),
        TypeError,
        "found 'learning_rate'; did you mean lr?",
    ),
    "moments": (
        lambda: by_path({"a": aj.track_moments()}, adam),
        ValueError,
        "by_path: 'a': found track_moments",
        "a whole optimizer",
    ),
    "default_moments": (
        lambda: by_path({"a": "frozen"}, aj.correct_bias()),
        ValueError,
        "by_path: default: found correct_bias()",
    ),
    "misspelt": (
        lambda: by_path({"a": {"wieght_decay": 0.0}}, DEFAULT),
        TypeError,
        "found 'wieght_decay'; did you mean weight_decay?",
    ),
    "unknown": (
        lambda: by_path({"a": {"zzz": 0}}, adam),
        TypeError,
        "found 'zzz'; adam has learning_rate, b1,",
        "learning_rate_multiplier",
    ),
    "no_rate": (
        lambda: by_path({"a": {"learning_rate_multiplier": 2}}, aj.stages.clip_elements(1.0)),
        TypeError,
        "found 'learning_rate_multiplier'; clip_elements has",
    ),
    "chain": (
        lambda: by_path({"a": {"eps": 0.1}}, aj.chain(optax.clip(1.0), adam)),
        TypeError,
        "by_path: 'a': found the overrides {'eps': 0.1} of chain(",
        "around by_path(...)",
    ),
    "wrapper": (
        lambda: by_path({"a": {"eps": 0.1}}, aj.skip_nonfinite(adam)),
        TypeError,
        "the overrides",
        "skip_nonfinite(",
    ),
    "optax": (
        lambda: by_path({"a": {"eps": 0.1}}, optax.adam(0.1)),
        TypeError,
        "the overrides",
        "which has no arguments by name",
    ),
    "value": (lambda: by_path({"a": {"b1": 2.0}}, adam), ValueError, "b1: found 2.0"),
    "schedule_of_multipliers": (
        lambda: by_path({"a": {"learning_rate_multiplier": halved}}, adam),
        TypeError,
        "by_path: 'a': learning_rate_multiplier: found <function",
        "Or give a learning_rate",
    ),
    "nan": (
        lambda: by_path({"a": {"learning_rate_multiplier": np.nan}}, adam),
        ValueError,
        "'a': learning_rate_multiplier: found nan",
    ),
    "some_rates": (
        lambda: by_path({"a": aj.chain(aj.track_moments(), aj.scale_by_moments())}, adam),
        ValueError,
        "'default' applies a learning rate, and 'a', chain(track_moments",
        "uphill",
    ),
}


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [(make, error, says) for make, error, *says in AT_ONCE.values()],
    ids=AT_ONCE,
)
def test_what_cannot_be_is_refused_at_once(make, error, says):
    with refused(error, *says):
        make()


@pytest.mark.parametrize(
    "how",
    [lambda tx: tx.init(PARAMS), lambda tx: jax.eval_shape(tx.init, PARAMS)],
    ids=["init", "shapes"],
)
@pytest.mark.parametrize(
    ("groups", "says"),
    [
        (
            {"bias": "frozen"},
            [
                "no leaf that 'bias' matches",
                "part of 'encoder/layer_0/bias': did you mean '.*/bias'?",
                "'embed/table'",
            ],
        ),
        ({"bias|table": "frozen"}, ["did you mean '.*(bias|table).*'?"]),
        (
            {"tail/.*": "frozen"},
            [
                "no leaf that 'tail/.*' matches",
                "match of the whole path. Paths are 'embed/table', 'encoder",
            ],
        ),
        (
            {BIAS: "frozen", "encoder/.*": adam},
            [
                "2 patterns that match 'encoder/layer_0/bias': '.*/bias', 'encoder/.*'",
                "ordered=True",
            ],
        ),
    ],
)
def test_patterns_that_match_nothing_or_together(groups, says, how):
    with refused(ValueError, "by_path: found", *says):
        how(by_path(groups, adam))


def test_many_paths_are_not_all_shown():
    with refused(ValueError, "'07' and 2 more."):
        by_path({"x": "frozen"}, adam).init({f"{i:02}": 1.0 for i in range(10)})


def test_trees_and_states_that_do_not_fit():
    tx = by_path({BIAS: "frozen"}, adam)
    state = tx.init(PARAMS)
    with refused(
        ValueError,
        "by_path: update: by_path(",
        "the states of 4 stages (TrackMeanSquareState",
        "convert_state",
    ):
        tx.update(PARAMS, adam.init(PARAMS), PARAMS)
    with refused(
        ValueError, f"the groups {BIAS!r}, 'default', where it has 'default'", "convert_state"
    ):
        tx.update(PARAMS, by_path({BIAS: adam}, adam).init(PARAMS), PARAMS)
    less = {"encoder": PARAMS["encoder"]}
    with refused(ValueError, "params", "['embed']['table']"):
        tx.update(PARAMS, state, less)
    with refused(ValueError, "without a gradient", "['embed']['table']"):
        tx.update(less, state, less)


@pytest.mark.parametrize(
    ("pattern", "meant"),
    [
        ("a/*", "a/.*"),
        ("*/bias", ".*/bias"),
        ("head/.*", "params/head/.*"),
        ("head", ".*/head/.*"),
        ("kernel", ".*/kernel"),
    ],
)
def test_what_may_have_been_meant_by_a_pattern(pattern, meant):
    """B10, D3: "a/*" was answered by ".*(a/*).*", which freezes all that has an "a" in it."""
    tree = {
        "params": {"a": {"kernel": jnp.ones(2), "bias": jnp.ones(2)}, "head": {"w": jnp.ones(2)}}
    }
    tree = tree["params"] if pattern == "a/*" else tree
    if pattern == "*/bias":
        with pytest.raises(ValueError, match="expected a regular expression"):
            by_path({pattern: "frozen"}, aj.adam(0.1))
        return
    with pytest.raises(ValueError, match=f"did you mean {re.escape(repr(meant))}"):
        by_path({pattern: "frozen"}, aj.adam(0.1)).init(tree)
