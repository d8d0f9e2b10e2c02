"""Whatever is legal: random trees, members, numbers, storages, links and gradients, and what holds
of all of them.

Each property runs over some examples in every run, the same ones each time, 61 in all; `pytest -m
fuzz` takes 5,000 new ones. `hostile.py` draws them, and has the bound on a step."""

import contextlib
import functools
import os
import subprocess
import sys
import warnings

import hostile
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import QUICKLY, avals
from hostile import bound, cases, gradients, is_half, is_integer, parameters, precision
from hypothesis import HealthCheck, Phase, given, seed, settings

import adam_jax as aj

STEPS = 8
FEW_SHAPES = ((3,), (2, 3), (3, 0), (1, 2, 1, 2, 1, 2))
"""Unjitted operations are compiled once a shape.

No scalars: inside a scan XLA makes other instructions of them.
"""
CUT_SHAPES = ((8,), (), (4, 8), (16, 1, 4), (4, 0), (40,))
"""Most of them can be laid out over four devices."""

OUR_LINKS = tuple(name for name in hostile.LINKS if name not in hostile.OPTAX_LINKS)

LENIENT = {
    "deadline": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large],
}


FOUND_AS_IT_IS = {"phases": (Phase.generate,), "database": None}
"""Each smaller example would be compiled anew, for minutes; `Case` prints all that one has to know.
"""


def ordinary(examples):
    return settings(max_examples=examples, derandomize=True, **FOUND_AS_IT_IS, **LENIENT)


def nightly(examples):
    return lambda test: pytest.mark.fuzz(
        settings(max_examples=examples, print_blob=True, **LENIENT)(test)
    )


# What holds of a run


@pytest.mark.parametrize("name", aj.family.__all__)
def test_a_run_keeps_its_types_stays_finite_and_within_its_bound(name):
    @seed(
        aj.family.__all__.index(name)
    )  # or every member would get the same trees, storages and links
    @settings(max_examples=3, **FOUND_AS_IT_IS, **LENIENT)
    @given(cases(most=2, members=(name,)))
    def run(case):
        check_run(case, QUICKLY)  # which compiles faster

    run()


@nightly(4200)
@given(cases())
def test_thousands_of_runs_do(case):
    check_run(case)


def check_run(case, options=None):
    with ready(case):
        params, state, step = start(case)
        types = avals(state)
        assert avals(jax.eval_shape(case.transformation().init, params)) == types

        def whole_step(params, state, grads):
            updates, state = step(params, state, grads)
            return updates, state, moved(params, updates)

        compiled = jax.jit(whole_step, compiler_options=options)
        history = []
        for t in range(STEPS):
            grads = gradients(case, t)
            history.append((params, grads))
            updates, state, params = compiled(params, state, grads)
            assert avals(state) == types
            assert_fits(case, updates, params)
            within = assert_bounded(case, t, updates, history)
            assert_finite(state, within)
            assert avals(params) == avals(history[0][0])


def assert_fits(case, updates, params):
    """The tree and the dtypes are the gradients'; an integer's update is a zero that
    can be added.
    """
    rounds = {"round_stochastically", "compensate"} & set(case.links)

    def expected(leaf, p):
        return (leaf.shape, jnp.dtype("float32" if rounds and is_half(leaf) else leaf.dtype), False)

    assert avals(updates) == jax.tree.map(expected, case.tree, params)


def assert_bounded(case, t, updates, history):
    """An update is finite and within its bound.

    An infinity is right where the bound is more than the dtype holds, NaN never.
    """
    within = True
    columns = [jax.tree.leaves(tree) for pair in history for tree in pair]
    for i, (path, leaf) in enumerate(jax.tree_util.tree_leaves_with_path(case.tree)):
        update = np.asarray(jax.tree.leaves(updates)[i])
        if is_integer(leaf):
            assert not update.any(), path
            continue
        with np.errstate(all="ignore"):  # a bound may be infinite
            most = (
                bound(case, leaf, t, [c[i] for c in columns[::2]], [c[i] for c in columns[1::2]])
                * 1.02
            )
        size = np.max(np.abs(update.astype(np.complex128)), initial=0)
        assert not np.isnan(size), (jax.tree_util.keystr(path), t)
        info = jnp.finfo(update.dtype)
        if most < float(info.max):
            assert size <= most + float(info.smallest_subnormal), (
                jax.tree_util.keystr(path),
                t,
                size,
                most,
            )
        else:
            within = False
    return within


def assert_finite(state, within):
    """All of a state is; but an average of parameters whose update their dtype cannot hold."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        if jnp.issubdtype(leaf.dtype, jnp.inexact) and (
            within or "average" not in jax.tree_util.keystr(path)
        ):
            assert np.isfinite(np.asarray(leaf, np.complex128)).all(), jax.tree_util.keystr(path)


# One run, whatever runs it


@ordinary(6)
@given(cases(FEW_SHAPES[1:2], most=2, links=OUR_LINKS))
def test_jitted_scanned_or_not_is_the_same(case):
    check_ways(case)


@nightly(600)
@given(cases(FEW_SHAPES, most=2, links=OUR_LINKS))
def test_thousands_of_ways_are_the_same(case):
    check_ways(case)


def check_ways(case):
    """Each way takes each step from the same state, because a last digit may become a code."""
    with ready(case):
        params, state, step = start(case)
        jitted = jax.jit(step, compiler_options=QUICKLY)

        def body(carry, grads):
            whole = jax.tree.unflatten(jax.tree.structure(carry[0]), fill(case, grads))
            updates, after = step(*carry, whole)
            return (moved(carry[0], updates), after), updates

        @functools.partial(jax.jit, compiler_options=QUICKLY)
        def scanned(params, state, grads):
            stacked = jax.tree.map(
                lambda g: None if g.dtype == jax.dtypes.float0 else jnp.asarray(g)[None], grads
            )
            (_, after), updates = jax.lax.scan(body, (params, state), stacked, length=1)
            return jax.tree.map(lambda update: update[0], updates), after

        for t in range(3):
            grads = gradients(case, t)
            updates, after = jitted(params, state, grads)
            assert_same((updates, after), step(params, state, grads), "jit", exact=False)
            assert_same((updates, after), scanned(params, state, grads), "scan", exact=False)
            params, state = moved(params, updates), after


def fill(case, grads):
    """The leaves of gradients, with a `float0` where an integer has none."""
    left = iter(jax.tree.leaves(grads))
    return [
        np.zeros(leaf.shape, jax.dtypes.float0) if is_integer(leaf) else next(left)
        for leaf in jax.tree.leaves(case.tree)
    ]


def assert_same(one, other, what, exact=True):
    """To the bit, but that the absolute value of a complex number has several forms, which differ
    in the last ones; or up to last digits, with which a code may become the next.
    """
    exact = exact and not any(jnp.iscomplexobj(x) for x in jax.tree.leaves(one))
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(one), jax.tree.leaves(other), strict=True
    ):
        where = f"{what} {jax.tree_util.keystr(path)}"
        if not jnp.issubdtype(a.dtype, jnp.inexact):
            away = np.abs(np.asarray(a, np.int64) - np.asarray(b, np.int64))
            assert np.max(away, initial=0) <= (not exact), (where, a, b)
            continue
        near = 0 if exact else 16 * float(jnp.finfo(a.dtype).eps)
        found, expected = (np.asarray(x).astype(np.complex128) for x in (a, b))
        largest = np.max(np.abs(found), initial=0, where=np.isfinite(found))
        np.testing.assert_allclose(found, expected, rtol=near, atol=near * largest, err_msg=where)


# Sharded or not: this file, as a script, in a process with four devices


def check_in_another_process(examples, derandomize):
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-W", "error", __file__, str(examples), str(int(derandomize))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
    assert done.stdout.splitlines()[-1] == f"{examples} examples"


def test_sharded_or_not_is_the_same_to_the_bit():
    check_in_another_process(4, derandomize=True)


@pytest.mark.fuzz
def test_hundreds_of_layouts_are_the_same():
    check_in_another_process(200, derandomize=False)


def adds_up(case):
    """Whether a number of it is a sum over a leaf: XLA chooses the order of its terms."""
    return case.member in ("lamb", "adam_mini") or bool(
        {"clip_update_rms", "clip_by_global_norm"} & set(case.links)
    )


def check_layout(case):
    """Where a number is a sum over a leaf, its terms are added in another order: there up to
    rounding.
    """
    sums = adds_up(case)
    with ready(case):
        params, state, step = start(case)
        mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(2, 2), ("x", "y"))
        specs = {
            (8,): ("x",),
            (4, 8): ("x", "y"),
            (16, 1, 4): (("x", "y"),),
            (4, 0): ("y",),
            (40,): (("y", "x"),),
        }

        def place(x):
            if x.dtype == jax.dtypes.float0:
                return x
            return jax.device_put(
                x,
                jax.sharding.NamedSharding(
                    mesh, jax.sharding.PartitionSpec(*specs.get(x.shape, ()))
                ),
            )

        compiled = jax.jit(step, compiler_options=QUICKLY)
        one, other = (params, state), jax.tree.map(place, (params, state))
        history = []
        for t in range(4):
            grads = gradients(case, t)
            history.append((one[0], grads))
            (updates, after), (theirs, their_after) = (
                compiled(*one, grads),
                compiled(*other, jax.tree.map(place, grads)),
            )
            if sums:
                columns = [jax.tree.leaves(tree) for pair in history for tree in pair]
                for i, leaf in enumerate(jax.tree.leaves(case.tree)):
                    a, b = (
                        np.asarray(jax.tree.leaves(u)[i]).astype(np.complex128)
                        for u in (updates, theirs)
                    )
                    most = (
                        0
                        if is_integer(leaf)
                        else bound(
                            case,
                            leaf,
                            t,
                            [c[i] for c in columns[::2]],
                            [c[i] for c in columns[1::2]],
                        )
                    )
                    info = jnp.finfo("float32" if is_integer(leaf) else leaf.dtype)
                    np.testing.assert_allclose(a, b, rtol=float(info.eps) * 8, atol=1e-4 * most)
            else:
                assert_same((updates, after), (theirs, their_after), "sharded")
            one = moved(one[0], updates), after
            other = jax.tree.map(
                place, (one[0] if sums else moved(other[0], theirs), after if sums else their_after)
            )


def main(examples, derandomize):
    done = []
    warnings.filterwarnings("ignore", ".*rounds nothing")  # as pytest does

    @settings(max_examples=examples, derandomize=derandomize, **FOUND_AS_IT_IS, **LENIENT)
    @given(cases(CUT_SHAPES, most=2, links=("clip_by_global_norm", *OUR_LINKS)))
    def layouts(case):
        check_layout(case)
        done.append(case)

    layouts()
    assert len(done) >= examples
    sys.stdout.write(f"{examples} examples\n")


# What all of them share


def ready(case):
    stack = contextlib.ExitStack()
    stack.enter_context(precision(case.x64))
    theirs = set(case.links) & set(hostile.OPTAX_LINKS)
    stack.enter_context(jax.numpy_dtype_promotion("standard" if theirs else "strict"))
    return stack


def start(case):
    """Parameters, state, and a step (params, state, gradients) -> (updates, state); traced numbers
    are its first arguments.
    """
    numbers = (
        {name: jnp.asarray(value, float) for name, value in case.plain.items()}
        if case.traced
        else {}
    )
    params = parameters(case)

    def step(params, state, grads, **numbers):
        return case.transformation(**numbers).update(grads, state, params)

    init = jax.jit(
        lambda params, numbers: case.transformation(**numbers).init(params),
        compiler_options=QUICKLY,
    )
    return params, init(params, numbers), functools.partial(step, **numbers)


def moved(params, updates):
    """The parameters after a step; where that is more than their dtype holds, as they were: input
    stays finite.
    """
    with jax.numpy_dtype_promotion("standard"):
        after = optax.apply_updates(params, updates)
    return jax.tree.map(lambda p, new: jnp.where(jnp.isfinite(new), new, p), params, after)


if __name__ == "__main__":
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    main(int(sys.argv[1]), sys.argv[2] == "1")
