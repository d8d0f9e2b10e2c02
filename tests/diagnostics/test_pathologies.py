"""Runs that go wrong are found by the metric that docs/diagnose.md names, and healthy ones of the
same network are not.
"""

import re

import numpy as np
import pytest
from helpers import ROOT

from benchmarks.pathologies import PATHOLOGIES, ROUNDED, SHIFT, found, train

# The network adds vectors to matrices, and Optax before 0.2.6 a float32 to a bfloat16.
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("standard_promotion")]
OPTIMIZED = True  # runs of thousands of steps

PAGE = (ROOT / "docs" / "diagnose.md").read_text()
SHIFTED, EPS, HALF, DEAD = PATHOLOGIES


@pytest.mark.parametrize("name", PATHOLOGIES)
def test_the_metric_finds_it_and_only_it(name):
    its = PATHOLOGIES[name]
    sick, healthy = (
        (found(its, case) > its.limit) == its.sick_is_above for case in (its.sick, its.healthy)
    )
    assert (sick, healthy) == (True, False)


@pytest.mark.parametrize("name", PATHOLOGIES)
def test_the_page_names_the_metric_and_its_limit(name):
    its = PATHOLOGIES[name]
    (row,) = re.findall(rf"^\| *{re.escape(name)} \| *`{re.escape(its.metric)}` .*$", PAGE, re.M)
    assert f"{'>' if its.sick_is_above else '<'} {its.limit:g} " in row


def test_a_stale_second_moment_announces_the_spike():
    """At the first step after the shift the metric is above its limit, and the loss is not large
    yet.
    """
    its = PATHOLOGIES[SHIFTED]
    sick, healthy = train(its.sick), train(its.healthy)
    seen = sick.seen[its.metric]
    assert seen[SHIFT - 50 : SHIFT].max() < its.limit < 10 < seen[SHIFT]
    assert sick.losses[SHIFT:].max() > 1.5 * sick.losses[SHIFT]
    assert healthy.losses[SHIFT:].max() < 1.1 * healthy.losses[SHIFT]
    assert healthy.losses[-50:].mean() < 0.5
    assert sick.losses[-50:].mean() > 2


def test_where_eps_rules_it_hardly_trains():
    assert found(PATHOLOGIES[EPS], PATHOLOGIES[EPS].sick) > 0.99
    sick, healthy = (
        train(case).losses[-50:].mean()
        for case in (PATHOLOGIES[EPS].sick, PATHOLOGIES[EPS].healthy)
    )
    assert sick > 2
    assert healthy < 0.2


def test_bf16_that_does_not_move_stalls_and_rounded_stochastically_goes_on():
    sick, rounded, wide = (
        train(case) for case in (PATHOLOGIES[HALF].sick, ROUNDED, PATHOLOGIES[HALF].healthy)
    )
    metric = PATHOLOGIES[HALF].metric
    assert np.median(sick.seen[metric]) > 0.9
    assert np.median(rounded.seen[metric]) > 0.5  # what rounding to nearest would lose
    ends = [its.losses[-50:].mean() for its in (sick, rounded, wide)]
    assert ends[0] - ends[2] > 0.3 > 10 * abs(ends[1] - ends[2])


def test_a_dead_layer_has_no_gradient_and_does_not_move():
    its = PATHOLOGIES[DEAD]
    dead = train(its.sick).seen
    for name in ("gradient_norm", "update_rms", "update_ratio"):
        assert dead[f"hidden/.*/{name}"].max() == 0
    assert dead["default/gradient_norm"].min() > 0
    assert train(its.healthy).seen["hidden/.*/update_ratio"].min() > 0
