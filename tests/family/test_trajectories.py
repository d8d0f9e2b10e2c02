"""Every optimizer, 200 steps in float64, against its paper: to 1e-10.

The oracle is `papers.py`, in long double.
"""

import functools

import jax.numpy as jnp
import numpy as np
import papers
import pytest
from trajectories import STEPS, agree, all_of_ours, problem

import adam_jax as aj

pytestmark = pytest.mark.usefixtures("x64")
MUS = [0.9 * (1 - 0.5 * 0.96 ** (t * 0.01)) for t in range(1, STEPS + 2)]


def scheduled(values):
    return lambda count: jnp.asarray(values)[count]


PAPERS = {
    "adam": (
        lambda: aj.adam(0.03, 0.87, 0.983, 1e-5),
        lambda g, p: papers.adam(g, p, 0.03, 0.87, 0.983, 1e-5),
    ),
    "adamw": (
        lambda: aj.adamw(0.03, 0.87, 0.983, 1e-5, weight_decay=0.07),
        lambda g, p: papers.adam(g, p, 0.03, 0.87, 0.983, 1e-5, 0.07),
    ),
    # AdaMax's paper has no ε, and ν = 0 cannot occur here.
    "adamax": (
        lambda: aj.adamax(0.03, 0.87, 0.983, 0.0),
        lambda g, p: papers.adamax(g, p, 0.03, 0.87, 0.983),
    ),
    "amsgrad": (
        lambda: aj.amsgrad(
            0.03, 0.87, 0.983, 1e-5, bias_correction_mu=False, bias_correction_nu=False
        ),
        lambda g, p: papers.amsgrad(g, p, 0.03, 0.87, 0.983, 1e-5),
    ),
    "nadam": (
        lambda: aj.nadam(0.03, scheduled(MUS), 0.983, 1e-5),
        lambda g, p: papers.nadam(g, p, 0.03, MUS, 0.983, 1e-5),
    ),
    # RAdam's paper has no ε and a threshold of 4.
    "radam": (
        lambda: aj.radam(0.03, 0.87, 0.983, 0.0, threshold=4.0),
        lambda g, p: papers.radam(g, p, 0.03, 0.87, 0.983, 4),
    ),
    "adabelief": (
        lambda: aj.adabelief(0.03, 0.87, 0.983, 1e-7, 1e-7),
        lambda g, p: papers.adabelief(g, p, 0.03, 0.87, 0.983, 1e-7),
    ),
    "yogi": (
        lambda: aj.yogi(0.03, 0.87, 0.983, 1e-3, initial_accumulator_value=1e-5),
        lambda g, p: papers.yogi(g, p, 0.03, 0.87, 0.983, 1e-3, 1e-5),
    ),
    "lamb": (
        lambda: aj.lamb(0.03, 0.87, 0.983, 1e-5, weight_decay=0.07),
        lambda g, p: papers.lamb(g, p, 0.03, 0.87, 0.983, 1e-5, 0.07),
    ),
    "adopt": (
        lambda: aj.adopt(0.03, 0.87, 0.983, 1e-5),
        lambda g, p: papers.adopt(g, p, 0.03, 0.87, 0.983, 1e-5),
    ),
    "ademamix": (
        lambda: aj.ademamix(0.03, 0.87, 0.983, 0.995, 3.0, 1e-5, weight_decay=0.07),
        lambda g, p: papers.ademamix(g, p, 0.03, 0.87, 0.983, 0.995, 3.0, 1e-5, 0.07),
    ),
    "adam_mini": (
        lambda: aj.adam_mini(0.03, 0.87, 0.983, 1e-5),
        lambda g, p: papers.adam_mini(g, p, 0.03, 0.87, 0.983, 1e-5, 0),
    ),
    "adam_mini leaf": (
        lambda: aj.adam_mini(0.03, 0.87, 0.983, 1e-5, blocks="leaf"),
        lambda g, p: papers.adam_mini(g, p, 0.03, 0.87, 0.983, 1e-5, (0, 1)),
    ),
    "adam_atan2": (
        lambda: aj.adam_atan2(0.03, 0.87, 0.983),
        lambda g, p: papers.adam_atan2(g, p, 0.03, 0.87, 0.983),
    ),
    "rmsprop": (
        lambda: aj.rmsprop(0.03, 0.87, 1e-5),
        lambda g, p: papers.rmsprop(g, p, 0.03, 0.87, 1e-5, False),
    ),
    "rmsprop centered": (
        lambda: aj.rmsprop(0.03, 0.87, 1e-5, centered=True),
        lambda g, p: papers.rmsprop(g, p, 0.03, 0.87, 1e-5, True),
    ),
    "momentum": (
        lambda: aj.momentum(0.03, 0.87),
        lambda g, p: papers.momentum(g, p, 0.03, 0.87, False),
    ),
    "momentum nesterov": (
        lambda: aj.momentum(0.03, 0.87, True),
        lambda g, p: papers.momentum(g, p, 0.03, 0.87, True),
    ),
    "stable adamw": (
        lambda: aj.chain(
            aj.track_moments(0.87, 0.983),
            aj.correct_bias(),
            aj.stages.clip_update_rms(),
            aj.scale_by_moments(1e-5),
            aj.scale_by_learning_rate(0.03),
        ),
        lambda g, p: papers.stable_adamw(g, p, 0.03, 0.87, 0.983, 1e-5),
    ),
    "cautious adamw": (
        lambda: aj.chain(
            aj.track_moments(0.87, 0.983),
            aj.correct_bias(),
            aj.scale_by_moments(1e-5),
            aj.stages.cautious(),
            aj.add_decayed_weights(0.07),
            aj.scale_by_learning_rate(0.03),
        ),
        lambda g, p: papers.cautious_adamw(g, p, 0.03, 0.87, 0.983, 1e-5, 0.07),
    ),
}


@functools.cache
def paper_paths():
    return all_of_ours({name: build() for name, (build, _) in PAPERS.items()}, *problem())


@pytest.mark.parametrize("name", PAPERS)
def test_paper(name):
    gradients, theta = problem()
    agree(np.asarray(paper_paths()[name]), PAPERS[name][1](gradients, theta), theta)


def test_every_member_has_an_oracle():
    derived = {
        "adamaxw": "adamax and decay, against Optax",
        "nadamw": "nadam and decay, against Optax",
    }
    assert set(aj.family.__all__) <= {name.split()[0] for name in PAPERS} | derived.keys()
