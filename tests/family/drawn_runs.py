"""Runs of the cases that `hostile.py` draws: settings of hypothesis, a step, and how two runs are
compared.
"""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import QUICKLY
from hostile import LINKS, OPTAX_LINKS
from hostile_values import parameters, precision
from hypothesis import HealthCheck, Phase, settings

OUR_LINKS = tuple(name for name in LINKS if name not in OPTAX_LINKS)

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


def ready(case):
    stack = contextlib.ExitStack()
    stack.enter_context(precision(case.x64))
    theirs = set(case.links) & set(OPTAX_LINKS)
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
