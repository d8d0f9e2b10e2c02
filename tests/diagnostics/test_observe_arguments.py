"""An observed transformation is a value, and `observe` and `observations` refuse wrong arguments.

The expected messages are written out here.
"""

import optax
import pytest
from helpers import refused
from observed import PARAMS, RATE

import adam_jax as aj


def test_it_is_a_value():
    tx = aj.observe(aj.adam(RATE), every=5)
    assert tx == aj.observe(aj.adam(RATE), every=5) != aj.observe(aj.adam(RATE))
    assert hash(tx) == hash(aj.observe(aj.adam(RATE), every=5))
    assert repr(tx).startswith("observe(tx=adam(learning_rate=0.01")
    assert "every=5" in repr(tx)


REFUSED = {
    "observed already": (
        lambda: aj.observe(aj.chain(aj.skip_nonfinite(aj.observe(aj.adam(0.1))), optax.scale(1.0))),
        ValueError,
        "observed already; expected one observer",
    ),
    "no transformation": (lambda: aj.observe(aj.adam), TypeError, "did you mean to call it"),
    "moments": (lambda: aj.observe(aj.track_moments()), ValueError, "expected a whole optimizer"),
    "every": (lambda: aj.observe(aj.adam(0.1), every=-1), ValueError, "every"),
    "every half": (lambda: aj.observe(aj.adam(0.1), every=0.5), TypeError, "every"),
    "sample": (lambda: aj.observe(aj.adam(0.1), sample=0), ValueError, "sample"),
    "no params": (
        lambda: (tx := aj.observe(aj.adam(0.1))).update(PARAMS["w"], tx.init(PARAMS["w"])),
        ValueError,
        "observe()",
    ),
    "every for ever": (
        lambda: aj.observe(aj.adam(0.1), every=10**12),
        ValueError,
        "every: found 1000000000000; expected fewer",
    ),
    "a group called all": (
        lambda: aj.observe(aj.skip_nonfinite(aj.by_path({"all": {}}, aj.adam(0.1)))),
        ValueError,
        "a group 'all', which is the name of everything; write its pattern as 'all()'",
    ),
    "a run not observed": (
        lambda: aj.observe(aj.adam(0.1)).update(
            PARAMS["w"], aj.adam(0.1).init(PARAMS["w"]), PARAMS["w"]
        ),
        ValueError,
        "observe: update: observe(",
        "got the state of another transformation",
        "convert_state(state, from_tx, to_tx, params)",
    ),
    "nothing observed": (
        lambda: aj.observations(aj.adam(0.1).init(PARAMS)),
        ValueError,
        "found 0 observers",
    ),
    "two": (
        lambda: aj.observations(
            aj.chain(aj.observe(aj.adam(0.1)), aj.observe(optax.identity())).init(PARAMS)
        ),
        ValueError,
        "found 2 observers",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    call, *error_and_words = REFUSED[case]
    with refused(*error_and_words):
        call()
