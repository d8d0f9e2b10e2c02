"""Which metrics a run has: those of each group and of all, and only those of what the run keeps.

The oracle is a float64 transcription of the definitions, from the leaves of the group.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from metric_oracles import INEXACT, adam, amsgrad, check, expected, quotient
from observed import ALL, COURSE, EPS, PARAMS, RATE, STEPS, gradients, joined, run, some, wide

import adam_jax as aj


def names_after_a_step(tx, params=PARAMS):
    """What is observed, from a step that is traced and not run."""

    def step(params, grads):
        return aj.observations(tx.update(grads, tx.init(params), params)[1])

    return jax.eval_shape(step, params, gradients(params)).keys()


def test_groups_each_and_all():
    groups = {
        "w": {"learning_rate_multiplier": 100.0},
        "(b|h)": aj.amsgrad(RATE, eps=EPS),
        "z": "frozen",
    }
    tx = aj.observe(aj.by_path(groups, aj.adam(RATE, eps=EPS)), every=1, sample=ALL)
    *_, step = run(tx, compiled=True)
    found = aj.observations(step[-1])
    assert {name.rpartition("/")[0] for name in found} == {"", "all", "w", "(b|h)", "default"}
    scaled = lambda *its: (made := adam(*its)) | {"rate": 100 * made["rate"]}
    of = {"w": (scaled, ["w"]), "(b|h)": (amsgrad, ["b", "h"]), "default": (adam, ["s", "empty"])}
    for group, (oracle, names) in of.items():
        check(found, expected(step, STEPS, oracle, names), group, rtol=5e-3)
    joint = expected(
        step,
        STEPS,
        lambda g, m, *rest: (amsgrad if "nu_max" in m else adam)(g, m, *rest),
        list("wbhs"),
    )
    rates = (
        "learning_rate_median",
        "learning_rate_p99",
        "gradient_norm",
    )  # which is of the frozen leaf too
    check(found, joint, rtol=5e-3, skip=rates)
    np.testing.assert_allclose(
        found["all/gradient_norm"],
        np.linalg.norm(joined([wide(step[2][name]) for name in INEXACT])),
        rtol=1e-5,
    )


def test_groups_within_a_chain():
    """What stands behind groups is seen: the rate, and the links."""
    direction = lambda eps: aj.chain(*aj.adam(1.0, eps=eps).stages[:-1])
    grouped = aj.by_path({"w": direction(1.0)}, direction(EPS))
    tx = aj.observe(
        aj.chain(grouped, aj.scale_by_learning_rate(RATE), aj.stages.clip_update_rms(0.1)),
        every=1,
        sample=ALL,
    )
    params, *course = ({k: tree[k] for k in "wbs"} for tree in (PARAMS, *COURSE))
    *_, step = run(tx, course, params)
    found = aj.observations(step[-1])
    wanted = expected(
        step, STEPS, lambda *its: quotient(*map(adam(*its).get, ("mean", "root")), eps=1.0), ["w"]
    )
    check(
        found, wanted, "w", skip=("update_rms", "update_ratio")
    )  # the group's own, before the rate
    wanted = expected(step, STEPS, adam, "wbs")
    check(
        found,
        {name: wanted[name] for name in ("update_rms", "update_ratio", "momentum_cosine")},
        rtol=5e-3,
    )


def test_the_gradient_of_a_group_is_the_one_that_came_in():
    """D5: behind a clipping, a group whose gradients grow is seen to grow."""
    tx = aj.observe(
        aj.chain(optax.clip_by_global_norm(1.0), aj.by_path({"w": {}}, aj.adam(RATE))), every=1
    )
    params = {"w": jnp.ones(4), "b": jnp.ones(3)}
    grads = {"w": jnp.full(4, 300.0), "b": jnp.full(3, 1.0)}
    _, state = tx.update(grads, tx.init(params), params)
    found = aj.observations(state)
    assert float(found["w/gradient_norm"]) == pytest.approx(600.0, rel=1e-6)
    assert float(found["default/gradient_norm"]) == pytest.approx(3**0.5, rel=1e-6)
    assert float(found["all/gradient_norm"]) == pytest.approx((600.0**2 + 3) ** 0.5, rel=1e-6)


def test_groups_in_groups_have_paths():
    inner = aj.by_path({"b": aj.adam(0.1)}, aj.adam(RATE))
    tx = aj.observe(aj.by_path({"(b|h)": inner}, aj.adam(RATE)), every=1)
    params, *course = ({k: tree[k] for k in "bhs"} for tree in (PARAMS, *COURSE))
    *_, step = run(tx, course, params)
    found = aj.observations(step[-1])
    prefixes = {name.rpartition("/")[0] for name in found} - {""}
    assert prefixes == {"all", "(b|h)", "(b|h)/b", "(b|h)/default", "default"}
    check(found, {"gradient_norm": np.linalg.norm(wide(step[2]["b"]))}, "(b|h)/b")


def test_a_module_may_call_its_parameters_as_states_do():
    class Encoder(eqx.Module):
        mu: jax.Array
        skipped: jax.Array

    params = Encoder(some((8, 9), jnp.bfloat16), some((3,)))
    tx = aj.observe(aj.chain(aj.adam(RATE), aj.compensate()), every=1)
    assert not {"all/skipped", "all/saturated_fraction"} & names_after_a_step(tx, params)


def test_groups_without_parameters_that_train_are_left_out():
    tx = aj.observe(aj.by_path({"w|b|h|z|s|empty": {}, "n": aj.adam(0.1)}, aj.adam(RATE)), every=1)
    groups = {name.rpartition("/")[0] for name in names_after_a_step(tx)}
    assert groups == {"", "all", "w|b|h|z|s|empty"}


def test_what_a_run_has_decides_what_is_seen():
    def names(tx, **params):
        return {name.removeprefix("all/") for name in aj.observations(aj.observe(tx).init(params))}

    small, half = jnp.ones(3), jnp.ones(3, jnp.bfloat16)
    always = {"step", "gradient_norm", "update_rms", "update_ratio"}
    mean = {"learning_rate_median", "learning_rate_p99", "momentum_cosine"}
    square = {"eps_fraction", "normalized_gradient_rms", "signal_to_noise"}
    assert names(optax.sgd(0.1), w=small) == always
    assert names(aj.momentum(0.1), w=small) == always | mean
    assert names(aj.rmsprop(0.1), w=small) == names(aj.adam(0.1), w=small) == always | mean | square
    assert names(aj.skip_nonfinite(aj.adam(0.1)), w=half) == always | mean | square | {
        "stalled_fraction",
        "skipped",
    }
    codes = aj.storage.Codes(smallest=0)
    assert names(aj.adam(0.1, storage=codes), w=small) == always | mean | square | {
        "saturated_fraction"
    }
