"""`clip_global_norm`: the rule of Optax's clipping, in float32, as one factor.

The oracle is NumPy in long double, and Optax.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import draw_tree, refused, same
from jax.sharding import PartitionSpec as P

import adam_jax as aj
from adam_jax.stages import clip_global_norm

GRADS = draw_tree(3, {"a": (4, 8), "b": {"w": (16, 5), "v": (3,)}})
NORM = np.sqrt(sum(np.sum(np.square(np.longdouble(x))) for x in jax.tree.leaves(GRADS)))
EPS = float(np.finfo(np.float32).eps)


def clipped(limit, grads=GRADS, **kwargs):
    tx = clip_global_norm(limit)
    return tx.update(grads, tx.init(grads), **kwargs)[0]


@pytest.mark.parametrize("limit", [1e-30, 0.5, 5.0, 1e3])
def test_it_is_the_rule_of_optax(limit):
    found = clipped(limit)
    factor = min(1, limit / NORM)
    theirs = optax.clip_by_global_norm(limit)
    with jax.numpy_dtype_promotion("standard"):
        as_theirs, _ = theirs.update(GRADS, theirs.init(GRADS))
    for path, g in jax.tree_util.tree_leaves_with_path(GRADS):
        at = lambda tree, path=path: dict(jax.tree_util.tree_leaves_with_path(tree))[path]
        expected = np.longdouble(g) * factor
        # Of the sum half its terms' roundings, at most; then a root, a quotient and a product.
        np.testing.assert_allclose(at(found), expected, rtol=8 * EPS)
        np.testing.assert_allclose(at(found), at(as_theirs), rtol=8 * EPS)


def test_below_the_limit_no_bit_changes():
    same(clipped(float(NORM) * 1.01), GRADS)


def test_half_precision_and_complex_numbers():
    """Squares of bfloat16 are summed in float32, and both parts of a complex number count."""
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), GRADS)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), half)
    same(clipped(1.0, half), clipped(1.0, wide))
    turned = {"z": jnp.asarray([3 + 4j, 0j], jnp.complex64)}
    np.testing.assert_allclose(clipped(1.0, turned)["z"], [0.6 + 0.8j, 0], rtol=4 * EPS)


def test_norms_that_are_not_finite():
    """As with Optax: infinite norms leave zeros, infinite elements NaN, and a NaN makes all NaN."""
    huge = {"a": jnp.full(4, 1e20), "b": jnp.ones(2)}
    assert all(not np.any(x) for x in jax.tree.leaves(clipped(1.0, huge)))
    infinite = clipped(1.0, {"a": jnp.array([np.inf, 1.0]), "b": jnp.ones(2)})
    np.testing.assert_array_equal(infinite["a"], [np.nan, 0])
    poison = {"a": jnp.array([np.nan, 1.0]), "b": jnp.ones(2)}
    assert all(np.all(np.isnan(x)) for x in jax.tree.leaves(clipped(1.0, poison)))
    tx = aj.skip_nonfinite(aj.chain(clip_global_norm(1.0), aj.adam(0.1)))
    state = tx.init(poison)
    moved, after = tx.step(poison, state, poison)
    same(moved, poison)
    assert after.skipped == 1


def test_a_limit_may_be_a_schedule_or_settable():
    tx = clip_global_norm(lambda count: jnp.where(count < 1, 1.0, 2.0))
    state = tx.init(GRADS)
    for limit in (1.0, 2.0):
        updates, state = tx.update(GRADS, state)
        np.testing.assert_allclose(optax.tree.norm(updates), limit, rtol=1e-6)
    tx = clip_global_norm(aj.settable(1.0))
    state = aj.set_hyperparameters(tx.init(GRADS), tx, limit=3.0)
    np.testing.assert_allclose(optax.tree.norm(tx.update(GRADS, state)[0]), 3.0, rtol=1e-6)
    with refused(ValueError, "limit: found 0", "(0, inf)"):
        clip_global_norm(0.0)


def test_in_groups():
    """In front of the groups it sees all leaves, inside a group those of the group."""
    rate = aj.scale_by_learning_rate(1.0)
    one = aj.by_path({"a": aj.chain(clip_global_norm(1.0), rate)}, rate)
    updates, _ = one.update(GRADS, one.init(GRADS), GRADS)
    np.testing.assert_allclose(optax.tree.norm(updates["a"]), 1.0, rtol=1e-6)
    same(updates["b"], jax.tree.map(jnp.negative, GRADS["b"]))
    whole = aj.chain(clip_global_norm(1.0), aj.by_path({"a": "frozen"}, rate))
    updates, _ = whole.update(GRADS, whole.init(GRADS), GRADS)
    same(updates["b"], jax.tree.map(jnp.negative, clipped(1.0)["b"]))


def test_it_writes_no_gradients():
    """The moments read the gradient and the factor."""

    def temporary(tx):
        grads = {"w": jax.ShapeDtypeStruct((512, 512), jnp.float32)}
        state = jax.eval_shape(tx.init, grads)
        compiled = jax.jit(tx.step, donate_argnums=(1, 2)).lower(grads, state, grads).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    alone, behind = aj.adamw(0.1), aj.chain(clip_global_norm(1.0), aj.adamw(0.1))
    assert temporary(behind) <= temporary(alone) + 1024


def test_it_has_a_derivative_at_zero():
    zero = {"w": jnp.zeros(3)}
    slope = jax.grad(lambda g: jnp.sum(clipped(1.0, g)["w"]))(zero)
    np.testing.assert_array_equal(slope["w"], 1.0)


# Inside `jax.shard_map`, on one device with axes of one: what is summed is in the program.


def mapped(tx, check_vma=True):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("x",))
    specs = {"cut": P("x"), "whole": P()}
    grads = {"cut": jnp.full(4, 3.0), "whole": jnp.full(4, 4.0)}
    state = tx.init(grads)
    call = lambda grads: tx.update(grads, state)[0]
    shard_map = getattr(jax, "shard_map", None)
    if shard_map is None:
        pytest.skip("this version of JAX has no types of manual axes")
    return jax.make_jaxpr(
        shard_map(call, mesh=mesh, in_specs=(specs,), out_specs=P("x"), check_vma=check_vma)
    )(grads)


def test_inside_shard_map_leaves_are_summed_along_the_axes_that_cut_them():
    told = aj.manual_axes(clip_global_norm(1.0), shared="x")
    program = str(mapped(told))
    assert program.count("psum") == 1  # of the leaf that is cut


def test_inside_shard_map_what_jax_cannot_tell_is_refused():
    with refused(ValueError, "clip_global_norm: found the manual axis 'x'", "manual_axes(tx"):
        mapped(clip_global_norm(1.0))
    with refused(ValueError, "clip_global_norm: found the manual axis 'x'", "check_vma=True"):
        mapped(aj.manual_axes(clip_global_norm(1.0), shared="x"), check_vma=False)
    assert "psum" not in str(mapped(aj.manual_axes(clip_global_norm(1.0), independent="x")))
