"""`observe`: each metric against a float64 transcription of its definition from whole arrays;
looking changes nothing.
"""

import contextlib
import csv
import functools
import io
import json
import os
import subprocess
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from helpers import QUICKLY, bits, has_float16, moves, refused
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import adam_jax as aj
from adam_jax.diagnostics import sampling
from adam_jax.diagnostics.metrics import METRICS

RATE, EPS, CLIP, STEPS = 0.01, 0.3, 0.5, 3
ALL = 10**7
"""A sample of every element."""

draw = np.random.default_rng(0)


def some(shape, dtype=jnp.float32, scale=1.0):
    made = draw.standard_normal(shape) * scale
    if jnp.issubdtype(dtype, jnp.complexfloating):
        made = made + 1j * draw.standard_normal(shape) * scale
    return jnp.asarray(made, dtype)


PARAMS = {
    "w": some((24, 20)),
    "b": some(
        (40,), jnp.bfloat16, 30 * 10.0 ** np.linspace(-4, 0, 40)
    ),  # the smallest move, the largest do not
    "h": some((40,), jnp.float16 if has_float16() else jnp.bfloat16, 30.0),
    "z": some((40,), jnp.complex64),
    "s": some(()),
    "empty": jnp.zeros((0, 3)),
    "n": jnp.arange(3),
    "none": None,
}


def gradients(params=PARAMS):
    """Of many sizes, so that ε rules some elements and not others."""

    def one(leaf):
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            return np.zeros(leaf.shape, jax.dtypes.float0)
        sizes = jnp.asarray(10.0 ** draw.uniform(-2, 1, leaf.shape), jnp.float32)
        return (some(leaf.shape, leaf.dtype) * sizes.astype(leaf.dtype)).astype(leaf.dtype)

    return jax.tree.map(one, params)


COURSE = [gradients() for _ in range(STEPS)]


def wide(x):
    """A leaf in double precision."""
    return np.asarray(x, np.complex128 if np.iscomplexobj(x) else np.float64)


def run(tx, course=COURSE, params=PARAMS, compiled=False, options=QUICKLY):
    """(params before, state before, gradients, updates, state after) of each step.

    Operation by operation: most operations of one optimizer are those of another one, and are
    compiled once for all of them. Where it matters what XLA makes of a whole step, or operations
    have shapes of their own, the step is compiled."""

    @functools.partial(jax.jit, compiler_options=options)
    def step(params, state, grads):
        updates, after = tx.update(grads, state, params)
        with jax.numpy_dtype_promotion("standard"):
            return optax.apply_updates(params, updates), after, updates

    with contextlib.nullcontext() if compiled else jax.disable_jit():
        state, steps = jax.jit(tx.init)(params), []
        for grads in course:
            moved, after, updates = step(params, state, grads)
            steps.append((params, state, grads, updates, after))
            params, state = moved, after
    return steps


def names_after_a_step(tx, params=PARAMS):
    """What is observed, from a step that is traced and not run."""

    def step(params, grads):
        return aj.observations(tx.update(grads, tx.init(params), params)[1])

    return jax.eval_shape(step, params, gradients(params)).keys()


# The oracle: what a member does to one leaf, in double precision, from the moments in its state.


def quotient(mu, root, eps=EPS, **more):
    """Adam's: mean, √ν̂, the size of what divides, and where ε is more than the root."""
    return {"mean": mu, "root": root, "rate": RATE / (root + eps), "ruled": eps > root} | more


def adam(g, m, before, t):
    return quotient(m["mu"] / (1 - 0.9**t), np.sqrt(m["nu"] / (1 - 0.999**t)))


def amsgrad(g, m, before, t):
    return quotient(m["mu"] / (1 - 0.9**t), np.sqrt(m["nu_max"]))


def adamax(g, m, before, t):
    return quotient(m["mu"] / (1 - 0.9**t), m["nu"], eps=0.0)


def momentum(g, m, before, t):
    return {"mean": m["mu"], "rate": np.full(g.shape, RATE)}


def rmsprop(g, m, before, t):
    divisor = np.sqrt(m["nu"] + EPS)
    root = np.sqrt(m["nu"] / (1 - 0.9**t))
    return {
        "mean": g,
        "root": root,
        "rate": RATE / divisor,
        "ruled": divisor > 2 * np.sqrt(m["nu"]),
    }


def adam_atan2(g, m, before, t):
    mu, root = m["mu"] / (1 - 0.9**t), np.sqrt(m["nu"] / (1 - 0.999**t))
    angle = 1.27 * np.arctan2(np.abs(mu), root)
    rate = RATE * np.divide(angle, np.abs(mu), where=mu != 0, out=np.zeros(mu.shape))
    return {"mean": mu, "root": root, "rate": rate, "ruled": np.zeros(g.shape, bool)}


def adopt(g, m, before, t):
    root = np.sqrt(before["nu"])
    divisor = np.maximum(root, EPS)
    seen = clipped(g / divisor, (t - 1) ** 0.25)
    mu = m["mu"] / (1 - 0.9**t)
    return {
        "mean": mu,
        "root": root,
        "rate": RATE / divisor,
        "ruled": root < EPS,
        "seen": seen,
        "signal": np.abs(mu),
    }


def ademamix(g, m, before, t):
    return quotient(m["mu"] / (1 - 0.9**t) + 5 * m["mu_slow"], np.sqrt(m["nu"] / (1 - 0.999**t)))


def adam_mini(g, m, before, t):
    return quotient(
        m["mu"] / (1 - 0.9**t), np.broadcast_to(np.sqrt(m["nu"] / (1 - 0.999**t)), g.shape)
    )


ORACLES = {
    "adam": (aj.adam(RATE, eps=EPS), adam),
    "adamw": (aj.adamw(RATE, eps=EPS, weight_decay=0.05), adam),
    "amsgrad": (aj.amsgrad(RATE, eps=EPS), amsgrad),
    "adamax": (aj.adamax(RATE), adamax),
    "momentum": (aj.momentum(RATE), momentum),
    "rmsprop": (aj.rmsprop(RATE, eps=EPS), rmsprop),
    "rmsprop, momentum": (aj.rmsprop(RATE, eps=EPS, momentum=0.9), rmsprop),
    "adam_atan2": (aj.adam_atan2(RATE, a=1.27, b=1.0), adam_atan2),
    "lamb": (aj.lamb(RATE, eps=EPS), adam),
    "adopt": (aj.adopt(RATE, eps=EPS), adopt),
    "ademamix": (aj.ademamix(RATE, eps=EPS), ademamix),
    "adam_mini": (aj.adam_mini(RATE, eps=EPS), adam_mini),
    "behind clipping": (aj.chain(aj.stages.clip_elements(CLIP), aj.adam(RATE, eps=EPS)), adam),
    "links behind": (
        aj.chain(aj.adam(RATE, eps=EPS), aj.stages.cautious(), aj.stages.clip_update_rms(0.1)),
        adam,
    ),
    "Optax's behind": (aj.chain(aj.adam(RATE, eps=EPS), optax.identity()), adam),
    "Optax's between": (
        aj.chain(
            *aj.adam(1.0, eps=EPS).stages[:-1], optax.identity(), aj.scale_by_learning_rate(RATE)
        ),
        adam,
    ),
    "stages": (
        aj.chain(aj.chain(*aj.adam(1.0, eps=EPS).stages[:-1]), aj.scale_by_learning_rate(RATE)),
        adam,
    ),
    "guarded": (aj.skip_nonfinite(aj.adam(RATE, eps=EPS)), adam),
}
FEWER = ("lamb", "adam_mini", "links behind")
"""Of these not all leaves: they have sums of their own for each shape, which take long to compile.
"""
NAMES = ["mu", "nu", "mu_slow", "nu_max"]
INEXACT = ["w", "b", "h", "z", "s", "empty"]


def moments_of(state, leaf):
    """By name, from anywhere in a state, in double precision."""
    found = {}
    for path, x in jax.tree_util.tree_leaves_with_path(state):
        fields = [getattr(key, "name", None) for key in path]
        if jax.tree_util.keystr(path[-1:]) == f"[{leaf!r}]":
            found |= {name: wide(x) for name in NAMES if name in fields}
    return found


def quantile(x, q):
    """The smallest number that at least such a share is not above."""
    inorder = np.sort(x)
    return inorder[int(np.ceil(q * len(x))) - 1] if len(x) else 0.0


def rms(x):
    return np.sqrt(np.mean(np.abs(x) ** 2)) if len(x) else 0.0


def joined(parts):
    return np.concatenate([np.ravel(part) for part in parts]) if parts else np.zeros(0)


def clipped(g, limit):
    size = np.abs(g)
    return g * np.minimum(1, limit / np.where(size > 0, size, 1))


def expected(step, t, oracle, names=INEXACT, clip=np.inf):
    """All metrics of a step, from whole arrays; `t` is its number, or one for each leaf."""
    params, before, grads, updates, after = step
    g, u, p = ({name: wide(tree[name]) for name in names} for tree in (grads, updates, params))
    per_leaf = []
    for name in names:
        seen = clipped(g[name], clip)
        its = oracle(
            seen,
            moments_of(after, name),
            moments_of(before, name),
            t[name] if isinstance(t, dict) else t,
        )
        own = {"seen": seen, "raw": seen} | its
        per_leaf.append(
            {key: np.ravel(np.broadcast_to(x, own["raw"].shape)) for key, x in own.items()}
        )
    of = {key: joined([its[key] for its in per_leaf]) for key in per_leaf[0]}
    has_nu = "root" in of
    sized = of["root"] > 0 if has_nu else np.zeros(len(of["raw"]), bool)
    root = np.where(sized, of["root"], 1) if has_nu else 1
    moved = np.abs(of["mean"]) > 0
    along = np.real(of["seen"] * np.conj(of["mean"])).mean()
    lengths = rms(of["seen"]) * rms(of["mean"])
    half = [
        (p[name], u[name], params[name].dtype) for name in names if params[name].dtype.itemsize == 2
    ]
    moves = joined([step != 0 for _, step, _ in half]).astype(bool)
    stays = joined(
        [(old + step).astype(np.float32).astype(dtype) == old for old, step, dtype in half]
    )
    size = rms(joined(list(p.values())))
    return {
        "gradient_norm": np.linalg.norm(joined(list(g.values()))),
        "update_rms": rms(joined(list(u.values()))),
        "update_ratio": rms(joined(list(u.values()))) / size
        if size
        else rms(joined(list(u.values()))),
        "learning_rate_median": quantile(of["rate"][moved], 0.5),
        "learning_rate_p99": quantile(of["rate"][moved], 0.99),
        "eps_fraction": of["ruled"].mean() if has_nu else 0.0,
        "normalized_gradient_rms": rms((np.abs(of["raw"]) / root)[sized]),
        "momentum_cosine": along / lengths if lengths else 0.0,
        "signal_to_noise": quantile(
            (of["signal"] if "signal" in of else np.abs(of["mean"]) / root)[sized], 0.5
        ),
        "stalled_fraction": stays[moves].mean() if moves.any() else 0.0,
        "saturated_fraction": 0.0,
        "skipped": 0.0,
    }


def check(found, wanted, group="all", rtol=2e-3, skip=()):
    for name, value in wanted.items():
        if name not in skip:
            its = found.get(f"{group}/{name}", 0.0)  # absent where there is no such thing
            np.testing.assert_allclose(its, value, rtol=rtol, atol=1e-7, err_msg=f"{group}/{name}")


@pytest.mark.parametrize("name", ORACLES)
def test_every_metric_is_its_definition(name):
    """Of real, half, complex, scalar and empty leaves together, beside integers and `None`."""
    tx, oracle = ORACLES[name]
    keep = (
        ["w", "b", "h", "z"]
        if name in FEWER
        else [k for k in PARAMS if "Optax" not in name or k != "n"]
    )  # it knows no float0
    params, *course = ({k: tree[k] for k in keep} for tree in (PARAMS, *COURSE))
    clip = CLIP if "clipping" in name else np.inf
    for t, step in enumerate(run(aj.observe(tx, every=1, sample=ALL), course, params), start=1):
        found = aj.observations(step[-1])
        assert found["step"] == t
        wanted = expected(step, t, oracle, [k for k in INEXACT if k in keep], clip)
        half = (
            "update_rms",
            "update_ratio",
            "stalled_fraction",
        )  # seen before an update is rounded to its leaf's 16 bits
        check(found, wanted, rtol=5e-3)
        check(found, wanted, rtol=1e-4, skip=half)
    assert 0 < found["all/stalled_fraction"] < 1
    assert found.keys() <= {"step", *(f"all/{metric}" for metric in METRICS)}


@pytest.mark.usefixtures("x64")
def test_in_double_precision():
    params = {
        "w": some((6, 5), jnp.float64),
        "z": some((4,), jnp.complex128),
        "b": some((9,), jnp.bfloat16, 30.0),
    }
    tx = aj.observe(aj.adam(RATE, eps=EPS), every=1, sample=ALL)
    for t, step in enumerate(
        run(tx, [gradients(params) for _ in range(2)], params, compiled=True), start=1
    ):
        found = aj.observations(step[-1])
        assert {name: x.dtype for name, x in found.items() if x.dtype != jnp.float32} == {
            "step": jnp.dtype("int32")
        }
        check(found, expected(step, t, adam, names=list(params)), rtol=5e-3)


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


def test_after_a_reset_of_some_leaves():
    """Each leaf has weights of its own then."""
    tx = aj.observe(aj.adam(RATE, eps=EPS), every=1, sample=ALL)
    *_, last = run(tx)
    state = aj.reset(last[-1], tx, match="w")
    for t in (1, 2):
        grads = gradients()
        with jax.disable_jit():
            updates, after = tx.update(grads, state, PARAMS)
        ages = {name: t if name == "w" else STEPS + t for name in INEXACT}
        check(
            aj.observations(after),
            expected((PARAMS, state, grads, updates, after), ages, adam),
            rtol=5e-3,
        )
        state = after


def test_codes_at_their_ends():
    tx = aj.observe(aj.adam(RATE, storage="8bit"), every=1, sample=ALL)
    params = {"w": some((64, 100)), "v": some((100, 80))}
    course = [
        jax.tree.map(
            lambda x: x * 10.0 ** jnp.asarray(draw.uniform(-9, 3, x.shape), jnp.float32), params
        )
        for _ in "123"
    ]
    for _, before, *_, after in run(tx, course, params, compiled=True):
        state = before.inner_state[0]
        codes = [
            np.abs(np.asarray(x).astype(int))
            for moment in (state.mu, state.nu)
            for x in moment.values()
        ]
        most = [np.iinfo(x.dtype).max for moment in (state.mu, state.nu) for x in moment.values()]
        ends = joined(
            [(code == 1) | (code == top) for code, top in zip(codes, most, strict=True)]
        ).mean()
        np.testing.assert_allclose(
            aj.observations(after)["all/saturated_fraction"], ends, rtol=1e-5
        )
    assert 0.01 < ends < 1


def test_a_module_may_call_its_parameters_as_states_do():
    class Encoder(eqx.Module):
        mu: jax.Array
        skipped: jax.Array

    params = Encoder(some((8, 9), jnp.bfloat16), some((3,)))
    tx = aj.observe(aj.chain(aj.adam(RATE), aj.compensate()), every=1)
    assert not {"all/skipped", "all/saturated_fraction"} & names_after_a_step(tx, params)


def test_steps_that_a_guard_skips():
    """They are counted, and their update is 0."""
    poison = COURSE[1] | {"w": COURSE[1]["w"].at[0, 0].set(jnp.nan)}
    for inner in (aj.adam(RATE), optax.sgd(RATE, 0.9)):
        tx, keep = (
            aj.observe(aj.skip_nonfinite(inner), every=1),
            ["w", "b", "s"] if isinstance(inner, aj.extend.Transformation) else "w",
        )
        params, *course = (
            {k: tree[k] for k in keep} for tree in (PARAMS, COURSE[0], poison, COURSE[2])
        )
        found = [aj.observations(step[-1]) for step in run(tx, course, params)]
        assert [int(its["all/skipped"]) for its in found] == [0, 0, 1]
        assert np.isnan(found[1]["all/gradient_norm"])
        assert [float(its["all/update_rms"]) > 0 for its in found] == [True, False, True]
        assert found[1]["all/update_rms"] == found[1].get("all/stalled_fraction", 0) == 0


# Extremes.


@pytest.mark.parametrize("size", [3e20, 1.0, 3e-25])
def test_gradients_of_any_size(size):
    params = {"w": some((24, 20))}
    course = [jax.tree.map(lambda g: g * np.float32(size), {"w": some((24, 20))}) for _ in range(3)]
    *_, step = run(
        aj.observe(aj.momentum(RATE, dampened=True), every=1, sample=ALL),
        course,
        params,
        compiled=True,
    )
    found, g = aj.observations(step[-1]), wide(step[2]["w"])
    mean = moments_of(step[-1], "w")["mu"]
    np.testing.assert_allclose(found["all/gradient_norm"], np.linalg.norm(g), rtol=1e-5)
    np.testing.assert_allclose(
        found["all/momentum_cosine"], (g * mean).mean() / rms(g) / rms(mean), rtol=1e-4
    )


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_poison_is_seen(poison):
    grads = {"w": COURSE[0]["w"].at[0, 0].set(poison), "s": COURSE[0]["s"]}
    *_, step = run(
        aj.observe(aj.adam(RATE), every=1, sample=ALL),
        [grads],
        {name: PARAMS[name] for name in grads},
    )
    found = aj.observations(step[-1])
    np.testing.assert_equal(float(found["all/gradient_norm"]), poison)
    assert np.isnan(found["all/momentum_cosine"])
    if np.isnan(poison):  # of infinite moments Adam makes a step that is finite
        for name in ("update_rms", "learning_rate_median", "signal_to_noise", "eps_fraction"):
            assert np.isnan(found[f"all/{name}"]), name


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


def test_a_history_outlives_the_state_it_is_from():
    tx = aj.observe(aj.adam(RATE), every=1)
    params = {"w": some((4, 3))}
    step = jax.jit(lambda state, grads: tx.update(grads, state, params)[1], donate_argnums=0)
    first = step(tx.init(params), params)
    look = aj.observations(first)
    step(first, params)
    assert float(look["all/gradient_norm"]) == pytest.approx(
        float(jnp.linalg.norm(params["w"])), rel=1e-6
    )


# Sampling.


def test_a_sample_is_close_to_the_whole():
    params = {"w": some((512, 700)), "v": some((300, 7, 40)), "b": some((700,), jnp.bfloat16, 3.0)}
    course = [gradients(params) for _ in range(3)]
    *_, step = run(
        aj.observe(aj.adam(RATE / 10, eps=EPS), every=1, sample=2**13),
        course,
        params,
        compiled=True,
    )
    slow = lambda *its: (made := adam(*its)) | {"rate": made["rate"] / 10}
    few, whole = aj.observations(step[-1]), expected(step, 3, slow, list(params))
    np.testing.assert_allclose(few["all/gradient_norm"], whole["gradient_norm"], rtol=1e-5)
    for name, value in whole.items():
        np.testing.assert_allclose(
            few.get(f"all/{name}", 0.0), value, rtol=0.06, atol=0.01, err_msg=name
        )
    np.testing.assert_raises(AssertionError, check, few, whole)


def test_a_leaf_counts_by_its_elements_not_by_its_sample():
    """A small leaf is seen whole, of the large one a thousandth."""
    params = {"large": jnp.zeros((1000, 100)), "small": jnp.ones(16)}
    grads = {"large": jnp.full((1000, 100), 1e-9), "small": jnp.ones(16)}
    tx = aj.observe(aj.adam(RATE, eps=1e-6), every=1, sample=100)
    step = run(tx, [grads], params, compiled=True)[0]
    found = aj.observations(step[-1])
    np.testing.assert_allclose(found["all/eps_fraction"], 1e5 / (1e5 + 16), rtol=1e-5)
    np.testing.assert_allclose(
        found["all/update_ratio"],
        rms(joined(step[3].values())) / np.sqrt(16 / (1e5 + 16)),
        rtol=1e-4,
    )


# When it looks.


def test_it_looks_at_the_first_step_and_every_so_many_after_it():
    tx = aj.observe(aj.adam(RATE), every=3)
    state = tx.init(PARAMS)
    assert {float(x) for x in aj.observations(state).values()} == {0.0}
    steps = run(tx, [gradients() for _ in range(8)])
    found = [aj.observations(step[-1]) for step in steps]
    assert [int(its["step"]) for its in found] == [1, 1, 1, 4, 4, 4, 7, 7]
    np.testing.assert_allclose(
        found[5]["all/gradient_norm"], expected(steps[3], 4, adam)["gradient_norm"], rtol=1e-5
    )
    assert bits(found[3]) == bits(found[5]) != bits(found[6])


@contextlib.contextmanager
def compilations():
    """The names of what JAX compiles."""
    found = []

    def note(name, seconds, **more):
        if "backend_compile" in name:
            found.append(name)

    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        yield found
    finally:
        jax.monitoring.clear_event_listeners()


def test_outside_of_jit_nothing_compiles_after_the_first_step():
    """D1: with and without an observation, an extra argument that changes, and groups."""
    groups = aj.by_path({"h": {"eps": 1e-6}}, default=aj.adam(1e-2))
    tx = aj.chain(aj.observe(aj.skip_nonfinite(groups), every=2))
    params, gradient = ({name: tree[name] for name in "wh"} for tree in (PARAMS, COURSE[0]))
    state, seen = tx.init(params), []
    with compilations() as found:
        for t in range(5):
            first = len(found)
            updates, state = tx.update(
                gradient, state, params, value=float(t), value_fn=some, gradient=gradient
            )
            params = aj.apply_updates(params, updates)
            seen.append(aj.observations(state))
            if t == 0:
                assert len(found) > first  # the listener hears of compilations
            elif t > 1:
                assert found[first:] == []
    assert [int(its["step"]) for its in seen] == [1, 1, 3, 3, 5]
    changed = seen[0]["all/update_rms"] != seen[2]["all/update_rms"]
    assert changed
    copies = [its["all/gradient_norm"] for its in seen]
    assert len({x.unsafe_buffer_pointer() for x in copies}) == len(copies)


CODES = aj.storage.Codes(smallest=0)
LINKS = {
    "plain": lambda tx: tx,
    "rounded": lambda tx: aj.chain(tx, aj.round_stochastically()),
    "compensated": lambda tx: aj.chain(tx, aj.compensate()),
    "guarded": lambda tx: aj.skip_nonfinite(aj.chain(tx, aj.stages.average_parameters(0.9))),
}


@pytest.mark.parametrize(
    ("link", "storage"),
    [
        ("plain", "8bit"),
        ("rounded", "bfloat16"),
        ("compensated", "float32"),
        ("guarded", "float32"),
    ],
)
def test_a_run_that_is_observed_is_the_same_to_the_bit(link, storage):
    tx = LINKS[link](aj.adamw(RATE, storage=CODES if storage == "8bit" else storage))
    params, *course = ({k: tree[k] for k in ("w", "b")} for tree in (PARAMS, *COURSE))
    plain, seen = (
        run(its, course, params, compiled=True, options=None)
        for its in (tx, aj.observe(tx, every=2))
    )
    for one, other in zip(plain, seen, strict=True):
        assert bits(one[3]) == bits(other[3])
        assert bits(one[4]) == bits(other[4].inner_state)


def test_a_guard_outside_holds_what_was_seen():
    poison = COURSE[1] | {"w": COURSE[1]["w"].at[0, 0].set(jnp.nan)}
    course = [COURSE[0], poison, COURSE[1]]
    plain = run(aj.skip_nonfinite(aj.adam(RATE)), course)
    seen = run(aj.skip_nonfinite(aj.observe(aj.adam(RATE), every=1)), course)
    assert bits(plain[-1][3]) == bits(seen[-1][3])
    assert [int(aj.observations(step[-1])["step"]) for step in seen] == [1, 1, 2]


# What it costs.


def step_of(tx):
    def step(params, state, gradients):
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(step, donate_argnums=(0, 1))


def test_off_it_is_not_there(monkeypatch):
    tx = aj.skip_nonfinite(aj.by_path({"b": {"weight_decay": 0.0}}, aj.adamw(RATE)))
    assert aj.observe(tx, every=0) is tx
    params = {"w": PARAMS["w"], "b": PARAMS["s"]}
    arguments = params, tx.init(params), params
    text = step_of(tx).lower(*arguments).as_text()

    def never(*_):
        raise AssertionError("a probe where nothing observes")

    for hook in ("__init__", "before", "end", "group"):
        monkeypatch.setattr(sampling.Probe, hook, never)
    lowered = step_of(tx).lower(*arguments)
    assert lowered.as_text() == text
    assert len(jax.tree.leaves(lowered.out_info)) == len(jax.tree.leaves(arguments[:2]))
    assert not any(word in text for word in ("stablehlo.case", "stablehlo.if"))


@pytest.mark.parametrize(
    ("guard", "storage"),
    [(lambda tx: tx, "8bit"), (aj.skip_nonfinite, "float32")],
    ids=["plain", "guarded"],
)
def test_on_it_copies_nothing(guard, storage):
    """Temporary bytes of the compiled, donated step, against those of the step that is not
    observed.
    """
    params = {"w": jax.ShapeDtypeStruct((1000, 1000), jnp.float32)}

    def temporary(tx):
        compiled = (
            step_of(tx).lower(params, jax.eval_shape(tx.init, params), params).compile(QUICKLY)
        )
        return compiled.memory_analysis().temp_size_in_bytes

    summed = (
        jax.jit(lambda x: jnp.sum(x * x))
        .lower(params["w"])
        .compile()
        .memory_analysis()
        .temp_size_in_bytes
    )
    if summed > 10**5:
        pytest.skip("this version of XLA makes an array of all that it sums on a CPU")
    tx = guard(aj.adam(1e-3, storage=storage))
    assert temporary(aj.observe(tx, sample=2**10)) <= temporary(tx) + 1e5  # 8-bit moments are 1e6


# Where it runs.


def test_jit_or_not_and_scanned_is_the_same():
    params, *course = ({"w": tree["w"]} for tree in (PARAMS, *COURSE))
    tx = aj.observe(aj.adam(RATE), every=2, sample=ALL)
    state = tx.init(params)

    def step(carry, grads):
        params, state = carry
        updates, state = tx.update(grads, state, params)
        with jax.numpy_dtype_promotion("standard"):
            params = optax.apply_updates(params, updates)
        return (params, state), aj.observations(state)

    stacked = jax.tree.map(lambda *x: jnp.stack(x), *course)
    _, scanned = jax.jit(lambda carry: jax.lax.scan(step, carry, stacked))((params, state))
    carry = params, state
    for t, grads in enumerate(course):
        with jax.disable_jit():
            carry, found = step(carry, grads)
        for name, value in found.items():
            np.testing.assert_allclose(scanned[name][t], value, rtol=1e-4, atol=1e-7, err_msg=name)


def test_an_ensemble_observes_each_member():
    tx = aj.observe(aj.adam(RATE), every=1, sample=ALL)
    params, grads = ({"w": some((3, 8, 5))} for _ in range(2))

    def look(params, grads):
        return aj.observations(tx.update(grads, tx.init(params), params)[1])

    alone, together = (jax.jit(its, compiler_options=QUICKLY) for its in (look, jax.vmap(look)))
    found = together(params, grads)
    for i in range(3):
        for name, value in alone(*jax.tree.map(lambda x, i=i: x[i], (params, grads))).items():
            np.testing.assert_allclose(found[name][i], value, rtol=1e-4, err_msg=name)


def test_in_flax():
    tx = aj.observe(aj.by_path({"bias": aj.adam(0.1)}, aj.adam(RATE)), every=1)
    model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    grads = nnx.grad(lambda model: jnp.sum(model(jnp.ones((2, 4)))))(model)
    with jax.disable_jit():
        optimizer.update(model, grads)
    found = {
        name: float(jnp.asarray(x[...])) for name, x in aj.observations(optimizer.opt_state).items()
    }
    arrays = {"kernel": np.full((4, 3), 2.0, np.float32), "bias": np.full(3, 2.0, np.float32)}
    np.testing.assert_allclose(found["bias/gradient_norm"], np.linalg.norm(arrays["bias"]))
    np.testing.assert_allclose(found["all/gradient_norm"], np.sqrt(15 * 4))
    np.testing.assert_allclose(found["bias/learning_rate_median"], 0.1 / 2)

    training = TrainState.create(apply_fn=None, params=arrays, tx=tx)
    with jax.disable_jit():
        training = training.apply_gradients(grads=arrays)
    np.testing.assert_allclose(
        aj.observations(training.opt_state)["default/learning_rate_median"], RATE / 2, rtol=1e-6
    )


@pytest.mark.parametrize(
    "inner", [optax.adam(RATE), optax.chain(optax.clip(0.5), aj.adam(RATE))], ids=["adam", "chain"]
)
@pytest.mark.usefixtures("standard_promotion")
def test_of_others_gradients_and_updates_are_seen(inner):
    params, *course = ({k: tree[k] for k in ("w", "b", "s")} for tree in (PARAMS, *COURSE))
    step = run(aj.observe(inner, every=1, sample=ALL), course, params, compiled=True)[-1]
    wanted = expected(step, STEPS, momentum, list(params))
    seen = ("gradient_norm", "update_rms", "update_ratio", "stalled_fraction")
    found = aj.observations(step[-1])
    check(found, {name: wanted[name] for name in seen}, rtol=1e-4)
    assert found.keys() == {"step", *(f"all/{name}" for name in seen)}


@pytest.mark.parametrize(
    "outer", [lambda tx: aj.chain(tx, aj.compensate()), optax.chain], ids=["ours", "optax"]
)
def test_inside_of_chains(outer):
    params, *course = ({"w": tree["w"]} for tree in (PARAMS, *COURSE))
    seen = aj.observe(aj.adam(RATE, eps=EPS), every=1, sample=ALL)
    alone, within = (aj.observations(run(tx, course, params)[-1][-1]) for tx in (seen, outer(seen)))
    assert alone.keys() == within.keys()
    for name, value in alone.items():
        np.testing.assert_allclose(within[name], value, rtol=1e-4, err_msg=name)


def test_a_history_is_a_csv():
    """As docs/diagnose.md writes it: names to columns, numbers that come back."""
    history = [
        jax.device_get(aj.observations(step[-1]))
        for step in run(aj.observe(aj.adam(RATE), every=1))
    ]
    file = io.StringIO()
    writer = csv.DictWriter(file, sorted(history[0]))
    writer.writeheader()
    writer.writerows(history)
    file.seek(0)
    back = list(csv.DictReader(file))
    assert [{name: np.float32(x) for name, x in row.items()} for row in back] == history


# The life of a state.


# Orbax of JAX 0.6's time warns that it takes the sharding from the checkpoint, as the template has
# none.
@pytest.mark.filterwarnings("ignore:Sharding info not provided when restoring:UserWarning")
def test_what_others_do_with_a_state(tmp_path):
    params, *course = ({k: tree[k] for k in ("w", "b")} for tree in (PARAMS, *COURSE))
    plain = aj.chain(aj.adam(RATE, storage=CODES), aj.compensate())
    tx = aj.observe(plain, every=2)
    state = run(tx, course, params, compiled=True)[-1][-1]
    inner = state.inner_state

    on = aj.convert_state(inner, plain, tx, params).state
    off = aj.convert_state(state, tx, plain, params).state
    assert bits(on.inner_state) == bits(off) == bits(inner)
    assert aj.observations(on)["step"] == 0

    more = aj.state_bytes(tx, params).total - aj.state_bytes(plain, params).total
    assert more == 4 * (1 + len(state.observed))

    mesh = jax.sharding.AbstractMesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    shardings = aj.state_shardings(tx, params, {"w": P("data"), "b": P()}, mesh=mesh)
    assert {its.spec for its in jax.tree.leaves((shardings.step, shardings.observed))} == {P()}
    assert sorted(map(str, jax.tree.leaves(shardings.inner_state))) == sorted(
        map(
            str,
            jax.tree.leaves(
                aj.state_shardings(plain, params, {"w": P("data"), "b": P()}, mesh=mesh)
            ),
        )
    )

    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", jax.eval_shape(tx.init, params))
    assert bits(restored) == bits(state)


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


# On eight devices: this file, as a script.


def test_on_eight_devices_it_sees_the_same_and_gathers_no_array():
    """Of means in float32 and of squares in 8 bits."""
    more = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    flags = f"{os.environ.get('XLA_FLAGS', '')} {more}"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, __file__],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    alone, cut, sizes = json.loads(done.stdout.splitlines()[-1])
    for name, value in alone.items():
        np.testing.assert_allclose(cut[name], value, rtol=1e-5, atol=1e-7, err_msg=name)
    assert alone["all/update_rms"] > 0
    assert max(sizes, default=0) <= 2 * SHARDED_SAMPLE


SHARDED_SAMPLE = 2**10


def main():
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
    params = {"w": some((256, 512)), "v": some((64, 1024)), "b": some((64,))}
    grads = [gradients(params) for _ in range(2)]
    tx = aj.observe(
        aj.adam(RATE, eps=EPS, storage=("float32", "8bit")), every=1, sample=SHARDED_SAMPLE
    )
    split = {"w": P("data"), "v": P(None, "data"), "b": P()}
    shardings = {name: NamedSharding(mesh, spec) for name, spec in split.items()}
    found = []
    for place, states in (
        (lambda tree: tree, None),
        (functools.partial(jax.device_put, device=shardings), shardings),
    ):
        held = place(params)
        out = None if states is None else aj.state_shardings(tx, held, states)
        state = jax.jit(tx.init, out_shardings=out)(held)
        update = jax.jit(tx.update, out_shardings=None if out is None else (states, out))
        compiled = update.lower(place(grads[0]), state, held).compile()
        for g in grads:
            _, state = compiled(place(g), state, held)
        found.append({name: float(x) for name, x in aj.observations(state).items()})
    found.append([size for _, size in moves(compiled.as_text())])
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
