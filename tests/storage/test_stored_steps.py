"""One step with stored moments: when they are narrowed, what shape they have, who shares a scale,
whose bits they round by.

The oracles are the same step with float32 moments, and shapes written out.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import normals, same
from stored import NARROW, mixed, rests_of

import adam_jax as aj
from adam_jax import storage
from adam_jax.storage.formats import resolve_storage
from adam_jax.storage.random_bits import StepBits
from adam_jax.storage.scales import UNKNOWN, unpack
from adam_jax.storage.slot import MomentSlot
from benchmarks import outliers
from benchmarks._data import small_digits

OPTIMIZED = True  # it computes for longer than it compiles


@pytest.mark.parametrize("how", NARROW.values(), ids=NARROW)
def test_a_step_uses_the_moments_before_they_are_narrowed(how):
    """To the last bit, so not jitted: a compiler may round sums and products of two
    programs apart.
    """
    params = normals(64, 72)
    narrow, wide = aj.adam(0.1, storage=how), aj.adam(0.1)
    state, other = narrow.init(params), wide.init(params)
    same(narrow.update(params, state)[0], wide.update(params, other)[0])
    for i in range(3):
        state = jax.jit(narrow.update)((i + 1) * params, state)[1]
    first = state[0]
    mu, nu = (rest.widen(getattr(first, rest.name), first.scales) for rest in rests_of(how))
    updates, after = wide.update(params, (first._replace(mu=mu, nu=nu, scales={}), *state[1:]))
    found, kept = narrow.update(params, state)
    same(found, updates)
    for rest in rests_of(how):
        wide_moments, before = getattr(after[0], rest.name), getattr(first, rest.name)
        same(
            getattr(kept[0], rest.name),
            rest.narrow(
                wide_moments, before, first.scales, StepBits("track_moments 0", kept[0].count)
            )[0],
        )


@pytest.mark.parametrize("how", NARROW.values(), ids=NARROW)
def test_a_resting_moment_has_its_parameters_shape_and_two_bytes_more_per_row_at_most(how):
    params = {"w": normals(40, 128), "v": normals(5000), "b": normals(7)}
    state = aj.adam(0.1, storage=how).init(params)[0]
    per_element = [
        2 if form in ("bfloat16", NARROW["float16"]) else 1 for form in storage_pair(how)
    ]
    for name, size in zip(("mu", "nu"), per_element, strict=True):
        resting = getattr(state, name)
        assert jax.tree.map(jnp.shape, resting) == jax.tree.map(jnp.shape, params)
        assert {key: leaf.dtype.itemsize for key, leaf in resting.items()} == {
            "w": size,
            "v": size,
            "b": 4,
        }
    coded = [isinstance(form, storage.Codes) for form in resolve_storage(how)]
    assert list(state.scales) == [
        f"{name}_scale" for name, its in zip(("mu", "nu"), coded, strict=True) if its
    ]
    for scales in state.scales.values():
        assert {path: (scale.shape, scale.dtype) for path, scale in scales.items()} == {
            "w": ((40, 1), jnp.int16),
            "v": ((1,), jnp.int16),
        }


ROWS = {
    (): ((), (), ()),
    (4096,): ((1,), (1,), (1,)),
    (64, 128): ((64, 1), (1, 128), (1, 1)),
    (64, 127): ((1, 1), (1, 127), (1, 1)),
    (128, 64): ((1, 1), (1, 64), (1, 1)),
    (768, 12, 64): ((768, 1, 1), (1, 1, 64), (1, 1, 1)),
    (768, 2, 63): ((1, 1, 1), (1, 1, 63), (1, 1, 1)),
    (3, 3, 64, 64): ((3, 3, 1, 1), (3, 1, 1, 64), (1, 1, 1, 1)),
    (16, 512, 256): ((16, 512, 1), (16, 1, 256), (1, 1, 1)),
}


@pytest.mark.parametrize("shape", ROWS, ids=str)
def test_which_elements_share_a_scale(shape):
    """Those of a row, or of a column; short rows are taken together with their neighbours until
    there are 128 elements.
    """
    found = [
        MomentSlot("mu", storage.Codes(axis=axis)).form.scale_shape(shape)
        for axis in (-1, -2, None)
    ]
    assert tuple(found) == ROWS[shape]


def storage_pair(how):
    return how if isinstance(how, tuple) else (how, how)


@functools.cache
def run_of(how, steps=6, seed=5):
    """Jitted steps along drawn gradients: -> the state."""
    tx, params = aj.adam(0.1, storage=how), mixed()
    grads = {"w": normals(steps, 64, 72, seed=seed), "b": normals(steps, 7, seed=seed + 1)}
    return jax.jit(lambda s: jax.lax.scan(lambda s, g: (tx.update(g, s)[1], None), s, grads)[0])(
        tx.init(params)
    )


@pytest.mark.parametrize("how", ["bfloat16", "8bit"])
def test_the_same_run_twice_is_the_same_to_the_last_bit(how):
    same(run_of.__wrapped__(how), run_of(how))


@pytest.mark.parametrize(
    "make", [storage.Codes, functools.partial(storage.Float, jnp.bfloat16)], ids=["codes", "float"]
)
def test_another_seed_rounds_otherwise(make):
    default, other, nearest = (
        run_of(make(**named)) for named in ({}, {"seed": 1}, {"rounding": "nearest"})
    )
    for name in ("mu", "nu"):
        left, right, still = (
            np.asarray(getattr(state[0], name)["w"], np.float32)
            for state in (default, other, nearest)
        )
        assert 0.2 < np.mean(left != right) < 0.999
        assert 0.2 < np.mean(left != still) < 0.999


@pytest.mark.parametrize("how", ["bfloat16", "8bit"])
def test_equal_leaves_elements_and_steps_round_apart(how):
    """Two leaves of one constant: with the same bits for all, they would agree everywhere."""
    params = [jnp.full((64, 64), 1.001953125 * 1.06)] * 2
    for rest in rests_of(how):
        scales = {f"{rest.name}_scale": dict.fromkeys("01", jnp.zeros((1, 1), jnp.int16))}
        before = [rest.first(jnp.zeros((64, 64)))] * 2
        narrow = jax.jit(
            lambda count, rest=rest, old=before, scales=scales: rest.narrow(
                params, old, scales, StepBits("s", count)
            )[0]
        )
        seen = [
            np.asarray(leaf, np.float32) for count in (1, 2) for leaf in narrow(jnp.int32(count))
        ]
        for i, one in enumerate(seen):
            assert len(np.unique(one)) == 2
            assert min(len(np.unique(one, axis=0)), len(np.unique(one, axis=1).T)) > 32
            for other in seen[:i]:
                assert 0.05 < (one != other).mean() < 0.9


def test_mu_and_nu_do_not_round_by_the_same_bits():
    """Both halfway between two codes: with one and the same threshold they would go up together."""
    ups = []
    for rest in rests_of("8bit"):
        scales = {f"{rest.name}_scale": {"0": jnp.zeros((1, 1), jnp.int16)}}
        before = [rest.first(jnp.zeros((64, 64)))]
        kept, after = rest.narrow(
            [jnp.full((64, 64), 1.0625)], before, scales, StepBits("s", jnp.int32(1))
        )
        assert set(np.unique(kept[0])) == {8, 9}
        assert after[f"{rest.name}_scale"]["0"].shape == (1, 1)
        ups.append(np.asarray(kept[0]) == 9)
    assert abs(np.mean(ups[0] == ups[1]) - 0.5) < 5 * 0.5 / 64


def test_the_scales_say_how_the_codes_are_read_and_how_the_next_are_written():
    """Each row's by itself, and those of a row that is all zero are unknown."""
    tx = aj.track_moments(storage="8bit")
    params = {
        "w": jnp.ones((32, 128)).at[:, :].multiply(jnp.array([[1.0], [1e-6], [0.0], [1e6]] * 8)),
        "v": jnp.full(4096, 1e-6),
    }
    state = tx.init(params)
    assert all(
        (np.asarray(unit) == UNKNOWN).all()
        for scale in jax.tree.leaves(state.scales)
        for unit in unpack(scale)
    )
    step = jax.jit(tx.update)
    for _ in range(3):
        before, (_, state) = state, step(params, state)
        for old, new in zip(
            jax.tree.leaves(before.scales), jax.tree.leaves(state.scales), strict=True
        ):
            np.testing.assert_array_equal(unpack(new)[0], unpack(old)[1])
    written = {
        path: np.asarray(unpack(scale)[1]) for path, scale in state.scales["nu_scale"].items()
    }
    rows = written["w"][:, 0]
    assert len(set(zip(rows[0::4], rows[1::4], rows[2::4], rows[3::4], strict=True))) == 1
    assert rows[2] == UNKNOWN
    assert 36 <= rows[0] - rows[1] <= 44  # 10⁻¹² is 40 octaves
    assert 36 <= rows[3] - rows[0] <= 44
    assert written["v"].tolist() == [rows[1]]


def test_a_row_with_huge_gradients_costs_the_others_nothing():
    """Nor does a column, where columns have the scales.

    One scale for the leaf would leave the others no digits.
    """
    inputs, outputs = map(jnp.asarray, outliers.pixels(small_digits().train.inputs))
    for along, axis in ((0, -1), (1, -2)):
        run = outliers.trainer(inputs, outputs, 300, along)
        exact, one_scale, found = (
            float(run(form, 1e5)[1:].mean())
            for form in ("float32", storage.Codes(axis=None), storage.Codes(axis=axis))
        )
        assert one_scale > 1.1 * exact
        assert found < 1.02 * exact
