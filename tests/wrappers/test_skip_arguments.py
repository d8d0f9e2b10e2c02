"""Skip wrappers compare, print and pickle as values, and refuse wrong arguments and foreign states.

The expected messages are written out here.
"""

import pickle

import jax.numpy as jnp
import numpy as np
import pytest

import adam_jax as aj


def test_guards_are_values():
    for make in (aj.skip_nonfinite, aj.skip_spikes):
        tx = make(aj.adam(1e-3), max_consecutive=5)
        assert tx == make(aj.adam(1e-3), max_consecutive=5) != make(aj.adam(1e-3))
        assert hash(tx) == hash(pickle.loads(pickle.dumps(tx)))
        assert eval(repr(tx), vars(aj)) == tx
        assert tx.interface == aj.adam(1e-3).interface._replace(skips=True)
        assert (
            aj.state_bytes(make(aj.adam(1e-3)), jnp.ones(5000)).wide
            == aj.state_bytes(aj.adam(1e-3), jnp.ones(5000)).wide
        )


REFUSED = {
    "a function": (lambda make: make(aj.adam), TypeError, "did you mean to call it?"),
    "no optimizer": (
        lambda make: make(None),
        TypeError,
        "found None; expected a gradient transformation, such as adam",
    ),
    "moments": (
        lambda make: make(aj.track_moments()),
        ValueError,
        "takes or gives Moments; expected a whole optimizer",
    ),
    "none in a row": (
        lambda make: make(aj.adam(0.1), max_consecutive=0),
        ValueError,
        "max_consecutive: found 0; expected 1 or more",
    ),
    "half in a row": (
        lambda make: make(aj.adam(0.1), max_consecutive=2.5),
        TypeError,
        "found 2.5; expected an integer",
    ),
}


@pytest.mark.parametrize("make", [aj.skip_nonfinite, aj.skip_spikes])
@pytest.mark.parametrize("case", REFUSED)
def test_refused(case, make):
    call, error, message = REFUSED[case]
    with pytest.raises(error) as caught:
        call(make)
    assert message in str(caught.value)
    assert make.__name__ in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"deviations": 0.0}, "deviations: found 0.0; expected a number in (0, inf)"),
        ({"deviations": np.nan}, "deviations: found nan"),
        ({"least_ratio": 0.5}, "least_ratio: found 0.5; expected a number in [1, inf)"),
        ({"window": 1}, "window: found 1; expected 2 or more"),
        ({"window": 16, "warmup": 17}, "found warmup=17 with window=16"),
    ],
)
def test_spikes_refused(arguments, message):
    with pytest.raises(ValueError, match="skip_spikes") as caught:
        aj.skip_spikes(aj.adam(0.1), **arguments)
    assert message in str(caught.value)


def test_states_of_others_are_refused():
    params = {"x": jnp.ones(3)}
    guarded = aj.skip_nonfinite(aj.adam(0.1))
    for state, says in [
        (aj.adam(0.1).init(params), "got the state of"),
        (aj.skip_spikes(aj.adam(0.1)).init(params), "found a state"),
    ]:
        with pytest.raises(ValueError, match=f"skip_nonfinite: .*{says}.*convert_state"):
            guarded.update(params, state, params)
    with pytest.raises(ValueError, match="skip_spikes: found a state of"):
        aj.skip_spikes(aj.adam(0.1), window=64).update(
            params, aj.skip_spikes(aj.adam(0.1)).init(params), params
        )


def test_schedules_and_strings_are_refused():
    with pytest.raises(TypeError, match="deviations: found the schedule"):
        aj.skip_spikes(aj.adam(0.1), deviations=lambda count: 6.0)
    with pytest.raises(ValueError, match="check: found 'no'"):
        aj.skip_nonfinite(aj.adam(0.1), check="no")
