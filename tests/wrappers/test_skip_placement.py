"""Skip wrappers inside and outside of other wrappers, in chains, in Flax and under `jax.vmap`.

The oracle is the same run without the skipped steps.
"""

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from helpers import bits, same
from skipped import PARAMS, gradients, poisoned, run

import adam_jax as aj


def wrappers():
    adam = aj.adam(1e-2, storage="8bit")
    guarded = aj.skip_nonfinite(adam)
    mask = {"w": True, "b": True, "s": False, "none": None}
    labels = {"w": "a", "b": "b", "s": "a", "none": None}
    yield "chain", aj.skip_nonfinite(optax.chain(optax.clip(1.0), adam))
    yield "in a chain", aj.chain(optax.clip(10.0), guarded)
    yield "in Optax's chain", optax.chain(guarded, optax.scale(0.5))
    yield "masked", optax.masked(guarded, mask)
    yield "around masked", aj.skip_nonfinite(optax.masked(adam, mask))
    yield (
        "partition",
        aj.skip_nonfinite(optax.partition({"a": adam, "b": aj.momentum(0.1)}, labels)),
    )
    yield "MultiSteps", aj.skip_nonfinite(optax.MultiSteps(adam, 2).gradient_transformation())
    yield (
        "inject",
        optax.inject_hyperparams(lambda learning_rate: aj.skip_nonfinite(aj.adam(learning_rate)))(
            1e-2
        ),
    )
    yield "Optax's Adam", aj.skip_nonfinite(optax.adam(1e-2))
    yield "noise", aj.skip_nonfinite(optax.chain(optax.add_noise(0.1, 0.5, 0), adam))
    yield "twice", aj.skip_spikes(aj.skip_nonfinite(adam))


@pytest.mark.parametrize(("name", "tx"), list(wrappers()), ids=[name for name, _ in wrappers()])
@pytest.mark.usefixtures("standard_promotion")
def test_inside_and_outside_of_wrappers(name, tx):
    """Without the integer leaf, at which Optax's own transformations stop."""
    params, good, sick = (
        {k: v for k, v in tree.items() if k != "n"}
        for tree in (PARAMS, gradients(), poisoned(gradients()))
    )
    expected, _ = run(tx, params, [good, good])
    after, state = run(tx, params, [good, sick, good])
    passes = (
        {"['s']"} if name == "masked" else set()
    )  # what is masked a wrapper hands on around the guard
    assert {path: its for path, its in bits(after).items() if path not in passes} == {
        path: its for path, its in bits(expected).items() if path not in passes
    }
    # Of two guards the outer one skips the inner one's step, and its count with it.
    assert max(int(count) for _, count in optax.tree.get_all_with_path(state, "skipped")) == 1
    assert jax.tree.structure(state) == jax.tree.structure(tx.init(params))


def test_the_order_of_links_is_checked_through_a_guard():
    rounds = aj.chain(aj.adam(1e-3), aj.round_stochastically())
    with pytest.raises(ValueError, match="comes after"):
        aj.chain(aj.skip_nonfinite(rounds), aj.stages.cautious())
    with pytest.raises(ValueError, match="turning descent into ascent"):
        aj.chain(aj.skip_nonfinite(aj.adam(1e-3)), aj.scale_by_learning_rate(0.1))
    hidden = aj.chain(aj.skip_nonfinite(optax.chain(rounds)), optax.scale(1.0))
    with pytest.raises(ValueError, match="holds a link that rounds"):
        hidden.init({"x": jnp.ones(2, jnp.bfloat16)})


@pytest.mark.usefixtures("standard_promotion")
def test_the_guard_goes_around_what_accumulates():
    """Inside, Optax's accumulator would keep the NaN: it is cleared by a factor of 0."""
    tx = aj.skip_nonfinite(optax.MultiSteps(aj.adam(0.1), 2).gradient_transformation())
    good, sick = {"x": jnp.ones(3)}, {"x": jnp.full(3, jnp.nan)}
    params, _ = run(tx, {"x": jnp.ones(3)}, [good, sick, good, sick, good, good])
    expected, _ = run(tx, {"x": jnp.ones(3)}, [good] * 4)
    same(params, expected)
    with pytest.raises(TypeError, match=r"gradient_transformation\(\)"):
        aj.skip_nonfinite(optax.MultiSteps(aj.adam(0.1), 2))


def test_progress_of_mapped_states_of_flax_and_of_none():
    tx = aj.skip_nonfinite(aj.adam(0.1), max_consecutive=2)
    params = jnp.ones((3, 2))
    state = jax.jit(jax.vmap(tx.init))(params)
    aj.expect_progress(state)
    update = jax.jit(jax.vmap(tx.update))
    for _ in range(2):
        _, state = update(params.at[1].set(jnp.nan), state)
    with pytest.raises(RuntimeError, match=r"\[0 2 0\] steps skipped in all"):
        aj.expect_progress(state)
    model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    aj.expect_progress(nnx.Optimizer(model, tx, wrt=nnx.Param).opt_state)
    with pytest.raises(ValueError, match="found no guard"):
        aj.expect_progress(aj.adam(0.1).init(params))
