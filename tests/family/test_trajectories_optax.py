"""Optimizers that Optax has too, 200 steps in float64, against Optax: to 1e-10.

Where the two do not define the same algorithm, the test says how they are made to, or which one we
follow.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib
from packaging.version import Version
from trajectories import RATE, agree, all_of_ours, problem

import adam_jax as aj

pytestmark = pytest.mark.usefixtures("x64")


def optax_yogi(*args):
    """Optax starts μ at 1e-6, which the paper does not; with that undone it is the
    same algorithm.
    """
    tx = optax.yogi(*args)

    def init(params):
        first, *rest = tx.init(params)
        return first._replace(mu=jax.tree.map(jnp.zeros_like, first.mu)), *rest

    return optax.GradientTransformationExtraArgs(init, tx.update)


OPTAX = {
    "adam": (aj.adam, optax.adam, (RATE, 0.87, 0.983, 1e-5, 1e-7), {}),
    "adam nesterov": (aj.adam, optax.adam, (RATE, 0.87, 0.983, 1e-5, 1e-7), {"nesterov": True}),
    "adamw": (
        aj.adamw,
        optax.adamw,
        (RATE, 0.87, 0.983, 1e-5, 1e-7, None, 0.07, lambda p: True),
        {},
    ),
    "adamw mask": (
        aj.adamw,
        optax.adamw,
        (RATE, 0.87, 0.983, 1e-5, 1e-7, None, 0.07, lambda p: False),
        {"nesterov": True},
    ),
    "adamw decay": (
        aj.adamw,
        optax.adamw,
        (RATE, 0.87, 0.983, 1e-5, 0.0, None, lambda c: 0.1 / (1 + c)),
        {},
    ),
    "adamax": (aj.adamax, optax.adamax, (RATE, 0.87, 0.983, 1e-5), {}),
    "adamaxw": (aj.adamaxw, optax.adamaxw, (RATE, 0.87, 0.983, 1e-5, 0.07), {}),
    "amsgrad": (aj.amsgrad, optax.amsgrad, (RATE, 0.87, 0.983, 1e-5, 1e-7), {}),
    "amsgrad uncorrected": (
        aj.amsgrad,
        optax.amsgrad,
        (RATE, 0.87, 0.983, 1e-5, 1e-7, None, False, False),
        {},
    ),
    "amsgrad half": (
        aj.amsgrad,
        optax.amsgrad,
        (RATE, 0.87, 0.983, 1e-5, 1e-7, None, True, False),
        {},
    ),
    "nadam": (aj.nadam, optax.nadam, (RATE, 0.87, 0.983, 1e-5, 1e-7), {}),
    "nadamw": (aj.nadamw, optax.nadamw, (RATE, 0.87, 0.983, 1e-5, 1e-7, None, 0.07), {}),
    "radam": (aj.radam, optax.radam, (RATE, 0.87, 0.983, 1e-5, 1e-7, 5.0), {}),
    "radam nesterov": (
        aj.radam,
        optax.radam,
        (RATE, 0.87, 0.983, 1e-5, 1e-7, 7.0),
        {"nesterov": True},
    ),
    "adabelief": (aj.adabelief, optax.adabelief, (RATE, 0.87, 0.983, 1e-7, 1e-8), {}),
    "adabelief nesterov": (
        aj.adabelief,
        optax.adabelief,
        (RATE, 0.87, 0.983, 1e-7, 1e-8),
        {"nesterov": True},
    ),
    "yogi": (aj.yogi, optax_yogi, (RATE, 0.87, 0.983, 1e-3), {}),
    "lamb": (aj.lamb, optax.lamb, (RATE, 0.87, 0.983, 1e-5, 1e-7, 0.07), {}),
    "sgd": (aj.momentum, optax.sgd, (RATE, 0.87), {}),
    "sgd nesterov": (aj.momentum, optax.sgd, (RATE, 0.87, True), {}),
    "rmsprop": (aj.rmsprop, optax.rmsprop, (RATE, 0.87, 1e-5, 0.3), {}),
    "rmsprop all": (
        aj.rmsprop,
        optax.rmsprop,
        (RATE, 0.87, 1e-5, 0.3, False, True, 0.6, True, True),
        {},
    ),
    "rmsprop momentum": (aj.rmsprop, optax.rmsprop, (RATE, 0.87, 1e-5, 0.0, True, False, 0.6), {}),
    "adopt": (aj.adopt, contrib.adopt, (RATE, 0.87, 0.983, 1e-5), {}),
    "adopt unclipped": (
        aj.adopt,
        contrib.adopt,
        (RATE, 0.87, 0.983, 1e-5),
        {"use_clipping": False, "nesterov": True},
    ),
    "ademamix": (
        aj.ademamix,
        contrib.ademamix,
        (RATE, 0.87, 0.983, 0.995, 3.0, 1e-5, 1e-7, None, 0.07),
        {},
    ),
    "ademamix warm": (
        aj.ademamix,
        contrib.ademamix,
        (RATE, 0.87, 0.983, lambda c: 0.9 + 0.0005 * jnp.minimum(c, 150), lambda c: 0.01 * c, 1e-5),
        {},
    ),
}


OPTAX_0_2_8 = ("adamw decay", "amsgrad uncorrected", "amsgrad half")


@functools.cache
def optax_paths():
    """Of each name ours and theirs."""
    old = Version(optax.__version__) < Version("0.2.8")  # which does not have these arguments yet
    cases = {name: case for name, case in OPTAX.items() if not (old and name in OPTAX_0_2_8)}
    txs = {
        name: [make(*args, **options) for make in pair]
        for name, (*pair, args, options) in cases.items()
    }
    with jax.numpy_dtype_promotion("standard"):
        return [
            all_of_ours({name: pair[side] for name, pair in txs.items()}, *problem(1))
            for side in (0, 1)
        ]


@pytest.mark.parametrize("name", OPTAX)
def test_optax(name):
    if name not in optax_paths()[0]:
        pytest.skip("this Optax does not have these arguments yet")
    found, expected = (np.asarray(paths[name]) for paths in optax_paths())
    agree(found, expected, problem(1)[1])
