"""A derivative through stored moments is refused, and one through float32 moments is right.

The oracle is the difference quotient.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import normals, refused

import adam_jax as aj

OPTIMIZED = True  # it computes for longer than it compiles


def end_of_a_run(tx):
    """The mean of a parameter after three steps, of which each gradient depends on the
    parameter.
    """
    params = jnp.ones((64, 128))
    state = tx.init(params)
    for t in range(3):
        updates, state = tx.update(params * (t - 0.5), state, params)
        params = params + updates
    return params.mean()


WAYS = {
    "grad": jax.grad,
    "jacfwd": jax.jacfwd,
    "jit": lambda f: jax.grad(jax.jit(f)),
    "vmap": lambda f: lambda x: jax.vmap(jax.grad(f))(jnp.stack([x, x])),
    "scan": lambda f: jax.grad(
        lambda x: jax.lax.scan(lambda c, _: (c + f(x), None), 0.0, None, length=2)[0]
    ),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "options", [{"storage": "8bit"}, {"storage": "bfloat16"}, {"mu_dtype": "bfloat16"}], ids=str
)
def test_a_derivative_through_stored_moments_is_refused(options, way):
    with refused(
        ValueError,
        "storage: found a derivative",
        "through mu",
        "rounding has no derivative",
        'storage="float32"',
    ):
        jax.eval_shape(WAYS[way](lambda b1: end_of_a_run(aj.adam(1e-2, b1=b1, **options))), 0.9)


def test_a_derivative_through_a_nu_and_through_a_conversion_is_refused():
    with refused(ValueError, "storage: found a derivative", "through nu"):
        jax.eval_shape(
            jax.grad(lambda b2: end_of_a_run(aj.adam(1e-2, b2=b2, storage=("float32", "8bit")))),
            0.99,
        )
    params = {"w": normals(64, 128)}
    wide, narrow = aj.adam(1e-2), aj.adam(1e-2, storage="bfloat16")

    def converted(grads):
        state = aj.convert_state(
            wide.update(grads, wide.init(params))[1], wide, narrow, params
        ).state
        return state[0].mu["w"].astype(jnp.float32).mean()

    with refused(ValueError, "storage: found a derivative", "through a moment"):
        jax.eval_shape(jax.grad(converted), params)


def test_a_derivative_through_float32_moments_is_the_difference_quotient():
    end = jax.jit(lambda b1: end_of_a_run(aj.adam(1e-2, b1=b1)))
    slope = jax.jit(jax.grad(end))(0.9)
    np.testing.assert_allclose(slope, (end(0.901) - end(0.899)) / 0.002, rtol=0.02)
    assert slope > 0.01


def test_training_is_no_derivative_of_the_optimizer(standard_promotion):
    """Gradients of a loss inside a scan, and a derivative that does not depend on the steps beside
    it.
    """
    tx = aj.chain(aj.adam(1e-2, storage="8bit"), aj.round_stochastically())

    def trained(scale):
        def step(carry, _):
            params, state = carry
            loss, grads = jax.value_and_grad(lambda p: (p.astype(jnp.float32) ** 2).sum())(params)
            updates, state = tx.update(grads, state, params)
            return (aj.apply_updates(params, updates), state), loss

        params = jnp.ones((64, 128), jnp.bfloat16)
        return scale * jax.lax.scan(step, (params, tx.init(params)), None, length=2)[1].sum()

    assert jax.eval_shape(jax.grad(trained), 1.0).shape == ()
