"""Every metric of `observe` is its definition, for every optimizer and every kind of leaf.

The oracle is a float64 transcription of the definitions, from whole arrays.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from metric_oracles import (
    INEXACT,
    adam,
    amsgrad,
    check,
    clipped,
    expected,
    moments_of,
    momentum,
    quotient,
)
from observed import (
    ALL,
    CLIP,
    COURSE,
    EPS,
    PARAMS,
    RATE,
    STEPS,
    draw,
    gradients,
    joined,
    rms,
    run,
    some,
    wide,
)

import adam_jax as aj
from adam_jax.diagnostics.metrics import METRICS


def adamax(g, m, before, t):
    return quotient(m["mu"] / (1 - 0.9**t), m["nu"], eps=0.0)


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
