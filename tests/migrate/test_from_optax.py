"""`from_optax` and `to_optax`: a run of Optax goes on in ours with the same steps, and the other
way round.

The oracle is Optax going on by itself. Steps are compared to what float32 allows, the states that
were moved exactly.
"""

import functools
import inspect
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import same
from optax_states import RATE, START, scan

import adam_jax as aj

STEPS = 60
"""Of each half of a run."""
B = {"b2": 0.99}


def decayed(make, **options):
    return make(
        RATE, weight_decay=0.03, mask=lambda p: jax.tree.map(lambda x: x.ndim > 1, p), **options
    )


def contrib(name):
    return getattr(optax.contrib, name, None)


# Optax, ours.
MEMBERS = {
    "adam": (optax.adam, aj.adam),
    "adam eps_root": (
        functools.partial(optax.adam, eps_root=1e-6),
        functools.partial(aj.adam, eps_root=1e-6),
    ),
    "adam 0.99": (functools.partial(optax.adam, **B), functools.partial(aj.adam, **B)),
    "adamw": (functools.partial(decayed, optax.adamw), functools.partial(decayed, aj.adamw)),
    "adamax": (optax.adamax, aj.adamax),
    "adamaxw": (functools.partial(decayed, optax.adamaxw), functools.partial(decayed, aj.adamaxw)),
    "amsgrad": (optax.amsgrad, aj.amsgrad),
    "amsgrad uncorrected": (
        functools.partial(optax.amsgrad, bias_correction_mu=False, bias_correction_nu=False),
        functools.partial(aj.amsgrad, bias_correction_mu=False, bias_correction_nu=False),
    ),
    "nadam": (optax.nadam, aj.nadam),
    "nadamw": (functools.partial(decayed, optax.nadamw), functools.partial(decayed, aj.nadamw)),
    "radam": (optax.radam, aj.radam),
    "radam 0.9": (functools.partial(optax.radam, b2=0.9), functools.partial(aj.radam, b2=0.9)),
    "adabelief": (optax.adabelief, aj.adabelief),
    "yogi": (optax.yogi, aj.yogi),
    "lamb": (
        functools.partial(optax.lamb, weight_decay=0.01),
        functools.partial(aj.lamb, weight_decay=0.01),
    ),
    "rmsprop": (optax.rmsprop, aj.rmsprop),
    "rmsprop all": (
        functools.partial(
            optax.rmsprop, centered=True, momentum=0.8, nesterov=True, initial_scale=0.1, eps=1e-6
        ),
        functools.partial(
            aj.rmsprop, centered=True, momentum=0.8, nesterov=True, initial_scale=0.1, eps=1e-6
        ),
    ),
    "rmsprop corrected": (
        functools.partial(optax.rmsprop, bias_correction=True, eps_in_sqrt=False),
        functools.partial(aj.rmsprop, bias_correction=True, eps_in_sqrt=False),
    ),
    "momentum": (functools.partial(optax.sgd, momentum=0.9), aj.momentum),
    "momentum nesterov": (
        functools.partial(optax.sgd, momentum=0.9, nesterov=True),
        functools.partial(aj.momentum, nesterov=True),
    ),
    "momentum dampened": (
        lambda rate: optax.chain(optax.ema(0.9), optax.scale_by_learning_rate(rate)),
        functools.partial(aj.momentum, dampened=True),
    ),
    "adopt": (contrib("adopt"), aj.adopt),
    "ademamix": (contrib("ademamix"), aj.ademamix),
    # Groups of `optax.partition` are groups by path, behind what has no moments.
    "groups": (
        lambda rate: optax.chain(
            optax.clip_by_global_norm(1e9),
            optax.partition(
                {"matrix": optax.adamw(rate, b2=0.99, weight_decay=0.03), "rest": optax.adam(rate)},
                {"w": "matrix", "b": "rest"},
            ),
        ),
        lambda rate: aj.chain(
            optax.clip_by_global_norm(1e9),
            aj.by_path(
                {"w": {"b2": 0.99}, "b": {"weight_decay": 0.0}}, aj.adamw(rate, weight_decay=0.03)
            ),
        ),
    ),
    # The groups of ours need not be those of Optax: the moments are by leaf.
    "finer groups": (optax.adam, lambda rate: aj.by_path({"b": {"b2": 0.999}}, aj.adam(rate))),
}


def is_known(theirs):
    """Whether this version of Optax has the optimizer, with these arguments."""
    if not isinstance(theirs, functools.partial) or theirs.func is decayed:
        return theirs is not None
    return theirs.keywords.keys() <= inspect.signature(theirs.func).parameters.keys()


MEMBERS = {name: pair for name, pair in MEMBERS.items() if is_known(pair[0])}


def make(name, side):
    pair = MEMBERS[name][side]
    return pair() if isinstance(pair, functools.partial) and pair.func is decayed else pair(RATE)


UNIT = 2**-24
"""The largest relative error of one rounding in float32."""

DECAYS = {
    "adam 0.99": (0.9, 0.99),
    "radam 0.9": (0.9, 0.9),
    "rmsprop": (0.0, 0.9),
    "rmsprop all": (0.9, 0.9),
    "rmsprop corrected": (0.0, 0.9),
    "momentum": (0.9, 0.0),
    "momentum nesterov": (0.9, 0.0),
    "momentum dampened": (0.9, 0.0),
    "adopt": (0.9, 0.9999),
    "ademamix": (0.9999, 0.999),
}
"""Those of the longest mean of gradients and of ν, where they are not 0.9 and 0.999."""


def gathered(b):
    """What two moments differ by that were gathered apart, relative to the moment.

    In a step each side rounds b, its product with the moment, and the sum: 3 UNIT. The moment
    forgets them as it forgets gradients, after 1/(1 − b) steps. Either side rounds 1 − b, g² and
    their product once."""
    return 6 * UNIT * (min(STEPS, 1 / (1 - b)) + 1)


def corrected(b):
    """The relative error of Optax's 1 − bᵗ, and one rounding of ours.

    Optax raises a b rounded to float32 to the power t, which multiplies that error by t. The power
    is good to 4 units in the last place, which are 8 UNIT. The difference from 1 makes both larger
    by bᵗ/(1 − bᵗ). The first t is the worst."""
    t = STEPS + 1
    return (
        (t * abs(float(np.float32(b)) / b - 1) + 8 * UNIT) * b**t / (1 - b**t) + 2 * UNIT
        if b
        else 0.0
    )


def rectified(b):
    """The relative error of Optax's √((ρ − 4)(ρ − 2)ρ∞ / ((ρ∞ − 4)(ρ∞ − 2)ρ)) for ρ = ρ∞ − 2t·bᵗ/(1
    − bᵗ).

    ρ is a difference of numbers that agree in all but their last digits; at most 1/(ρ − 4) of its
    error is in the root."""
    t, limit = STEPS + 1, 2 / (1 - b) - 1
    off = 2 * t * b**t / (1 - b**t)
    power = t * abs(float(np.float32(b)) / b - 1) + 8 * UNIT
    return (off * (power + corrected(b) + 3 * UNIT) + 2 * limit * UNIT) / (limit - off - 4)


def tolerance(name):
    """Of a step, relative to the longest of the same element. A root halves the error of ν."""
    b1, b2 = DECAYS.get(name, (0.9, 0.999))
    error = (
        gathered(b1) + corrected(b1) + (gathered(b2) + corrected(b2)) / 2 + 20 * UNIT
    )  # the quotient, the rate, the decay
    if "radam" in name:
        error += rectified(b2)
    if name == "lamb":
        error *= 2  # the trust ratio has once more the error of the step
    if name == "rmsprop all":
        error *= 10  # ν − μ² is a tenth of ν and more; see the gradients below
    return error


def draw(seed):
    """Gradients of all sizes, from 1e-5 to 1e2 by element, that do not depend on the parameters."""
    rng = np.random.default_rng(seed)
    sizes = {name: 10 ** np.linspace(-5, 2, p.size).reshape(p.shape) for name, p in START.items()}
    return {
        name: jnp.asarray(size * rng.standard_normal((STEPS, *size.shape)), jnp.float32)
        for name, size in sizes.items()
    }


FIRST, THEN = draw(2), draw(3)
TXS = {(name, side): make(name, side) for name in MEMBERS for side in (0, 1)}


@jax.jit
def go_on(states, grads):
    """Every member of either side, in one program."""
    return {key: scan(tx, states[key], grads) for key, tx in TXS.items()}


class Runs(NamedTuple):
    """What a member's run in one library is in the other, and how both go on.

    Attributes:
      state: after the first half.
      moved: that state in the other library.
      expected: the steps of the second half.
      found: those of the other library from the state moved.
      afresh: those of the other library from a fresh state.
    """

    state: Any
    moved: Any
    expected: Any
    found: Any
    afresh: Any


@functools.cache
def runs():
    """By member and side, the side that made the first half."""
    fresh = {key: tx.init(START) for key, tx in TXS.items()}
    states = {key: state for key, (state, _) in go_on(fresh, FIRST).items()}
    moved = {}
    for name in MEMBERS:
        moved[name, 0] = aj.migrate.from_optax(states[name, 0], TXS[name, 1], START)
        moved[name, 1] = aj.migrate.to_optax(states[name, 1], TXS[name, 1], fresh[name, 0])
    expected = go_on(states, THEN)
    found = go_on({(name, side): moved[name, 1 - side] for name, side in TXS}, THEN)
    afresh = go_on(fresh, THEN)
    return {
        (name, side): Runs(
            states[name, side],
            moved[name, side],
            expected[name, side][1],
            found[name, 1 - side][1],
            afresh[name, 1 - side][1],
        )
        for name, side in TXS
    }


def apart(found, expected):
    """How far the steps of two runs are apart: at most, in units of the longest step of the same
    element.
    """

    def leaf(a, b):
        a, b = (np.asarray(x, np.float64) for x in (a, b))
        return np.max(np.abs(a - b) / np.max(np.abs(b), axis=0))

    return max(jax.tree.leaves(jax.tree.map(leaf, found, expected)))


def moments(state):
    """The leaves that have the shape of a parameter, as bytes, in any order."""
    shapes = {p.shape for p in START.values()}
    return sorted(
        (x.shape, x.dtype.name, np.asarray(x).tobytes())
        for x in jax.tree.leaves(state)
        if x.shape in shapes
    )


def without_moments(state):
    """The state with zeros in place of its moments: their number, shapes and dtypes stay."""
    shapes = {p.shape for p in START.values()}
    return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype) if x.shape in shapes else x, state)


@pytest.mark.usefixtures("standard_promotion")  # Optax mixes dtypes
@pytest.mark.parametrize("name", MEMBERS)
@pytest.mark.parametrize("side", [0, 1], ids=["theirs becomes ours", "ours becomes theirs"])
def test_a_run_goes_on_in_either_direction(name, side):
    """60 steps, then 60 more in both."""
    run = runs()[name, side]
    assert apart(run.found, run.expected) < tolerance(name)
    # From fresh moments it goes elsewhere: the test would see it.
    assert apart(run.afresh, run.expected) > 100 * tolerance(name)
    # Moments are moved to the last bit. What is no moment is as if the other library had made the
    # steps: it knows its length, its schedules and its weights.
    assert moments(run.moved) == moments(run.state)
    same(without_moments(run.moved), without_moments(runs()[name, 1 - side].state))
