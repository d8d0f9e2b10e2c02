"""Every hyperparameter may be a number, a traced number or a schedule, and the state says its last
value.

The oracle is the run with numbers.
"""

import functools

import numpy as np
import optax
from fitted import MEMBERS, numbers, scanned, start, together
from helpers import avals

import adam_jax

IN_THE_STATE = {
    ("momentum", "momentum"): "b1",
    ("rmsprop", "decay"): "b2",
    ("rmsprop", "eps"): "eps_root",
    ("adamax", "eps"): "nu_eps",
    ("adamaxw", "eps"): "nu_eps",
    ("adabelief", "eps_root"): "nu_eps",
}
"""What the stages call a hyperparameter, where it is not as the optimizer does."""


def chosen(member):
    return {"learning_rate": 0.1, **numbers(member)}


@functools.cache
def given():
    """By member: parameters and state after a run whose hyperparameters are numbers, arguments,
    schedules.
    """
    arguments = {name: chosen(member) for name, member in MEMBERS.items()}

    def run(member, traced):
        schedules = {
            name: lambda count, value=value: value + 0 * (count / 1)
            for name, value in chosen(member).items()
        }
        settable = {name: adam_jax.settable(value) for name, value in chosen(member).items()}
        ways = {
            "numbers": chosen(member),
            "traced": traced[member.__name__],
            "schedules": schedules,
            "settable": settable,
        }
        return {name: scanned(member(**values), start()) for name, values in ways.items()}

    return together(run, arguments)


def test_every_hyperparameter_may_be_a_number_traced_or_a_schedule(member, agree):
    assert len(chosen(member)) > 1
    number, traced, schedule = (
        given()[member.__name__][way] for way in ("numbers", "traced", "schedules")
    )
    assert avals(number) == avals(traced) == avals((start(), member(0.1).init(start())))
    agree(traced, number, rtol=2e-4, atol=1e-6)  # 1 - 0.999 has four digits in float32
    agree(schedule[0], number[0], rtol=2e-4, atol=1e-6)  # the state has counters besides
    settable = given()[member.__name__]["settable"]
    agree(settable[0], number[0], rtol=2e-4, atol=1e-6)
    for name, value in chosen(member).items():
        kept = optax.tree.get(settable[1], IN_THE_STATE.get((member.__name__, name), name))
        np.testing.assert_array_equal(kept, np.float32(value))


def courses(member):
    each = {
        name: lambda t, value=value: value * (1 - t / 100)
        for name, value in numbers(member).items()
    }
    return {"learning_rate": lambda t: 0.1 / (1 + t / 7)} | each


@functools.cache
def scheduled():
    return together(
        lambda member: scanned(optax.chain(optax.clip(1.0), member(**courses(member))), start())[1]
    )


def test_hyperparameters_are_those_of_the_last_step(member):
    found = adam_jax.hyperparameters(scheduled()[member.__name__], member(**courses(member)))
    np.testing.assert_allclose(found["learning_rate"], 0.1 / (1 + 2 / 7), rtol=1e-6)
    for name, course in courses(member).items():
        assert any(np.isclose(value, course(2), rtol=1e-6, atol=0) for value in found.values()), (
            name,
            found,
        )
