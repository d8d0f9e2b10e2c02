"""`describe`: what it says of each parameter is what the transformation does and keeps."""

import io
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adam_jax as aj


@pytest.fixture
def params():
    return {
        "embed": {"w": jnp.ones((700, 64), jnp.bfloat16)},
        "enc": {"k": jnp.ones((70, 64)), "bias": jnp.ones(4, jnp.bfloat16)},
        "head": {"k": jnp.ones((3, 3)), "n": jnp.int32(3)},
    }


def grouped():
    groups = {
        ".*/bias": {"weight_decay": 0.0},
        "embed/.*": {"learning_rate_multiplier": 0.1, "storage": "8bit"},
        "enc/k": "frozen",
        "head/k": aj.amsgrad(1e-2),
    }
    return aj.by_path(groups, aj.adamw(1e-3, weight_decay=0.1, mask="matrices"))


STAGES = ("track_moments", "correct_bias", "scale_by_moments")


def test_of_each_parameter(params):
    tx = aj.chain(
        aj.skip_nonfinite(aj.chain(optax.clip_by_global_norm(1.0), grouped())), aj.compensate()
    )
    found = {leaf.path: leaf for leaf in aj.describe(tx, params).leaves}
    assert list(found) == ["embed/w", "enc/bias", "enc/k", "head/k", "head/n"]
    before, behind = (
        ("skip_nonfinite", "<clip_by_global_norm of optax>"),
        ("scale_by_learning_rate", "compensate"),
    )
    assert found["embed/w"].stages == (*before, *STAGES, "add_decayed_weights", *behind)
    assert found["enc/k"].stages == (*before, "frozen", "compensate")
    assert found["head/k"].stages == (*before, *STAGES[:2], "keep_maximum", STAGES[2], *behind)
    assert [leaf.group for leaf in found.values()] == [
        "embed/.*",
        ".*/bias",
        "enc/k",
        "head/k",
        "default",
    ]
    assert [leaf.decay for leaf in found.values()] == [0.1, 0.0, 0.0, 0.0, 0.0]
    assert [leaf.rate for leaf in found.values()] == pytest.approx(
        [1e-4, 1e-3, 0, 1e-2, 0]
    )  # an integer does not move
    assert [leaf.dtype for leaf in found.values()] == [
        "bfloat16",
        "bfloat16",
        "float32",
        "float32",
        "int32",
    ]
    assert found["embed/w"].state == {"mu": "int8", "nu": "uint8", "lost": "int16"}
    assert found["head/k"].state == {"mu": "float32", "nu": "float32", "nu_max": "float32"}
    assert found["enc/k"].state == {}
    assert [leaf.bytes for leaf in found.values()] == [
        44800 * (2 + 1 + 1 + 2) + 2 * 2,
        4 * (2 + 4 + 4 + 2),
        4480 * 4,
        9 * 16,
        4,
    ]


@pytest.mark.parametrize(
    "make", [grouped, lambda: aj.lamb(1e-3, storage="bfloat16"), lambda: optax.adamw(1e-3)]
)
def test_bytes_add_up(make, params):
    """What belongs to no parameter is counts and scalars."""
    found = aj.describe(make(), params)
    assert found.totals == aj.state_bytes(make(), params)
    shared = found.totals.total - sum(leaf.bytes for leaf in found.leaves)
    scalars = [leaf for leaf in jax.tree.leaves(make().init(params)) if leaf.size <= 4]
    assert 0 <= shared <= sum(leaf.nbytes for leaf in scalars)


def test_a_scalar_has_moments_and_a_count_is_not_one_of_them():
    found = {
        leaf.path: leaf
        for leaf in aj.describe(aj.adam(1e-3), {"count": jnp.ones(()), "w": jnp.ones(2)}).leaves
    }
    assert found["count"].state == {"mu": "float32", "nu": "float32"}
    assert (found["count"].bytes, found["w"].bytes) == (12, 24)
    assert aj.describe(aj.adam(1e-3), {"i": jnp.arange(3)}).leaves[0].decay == 0


def test_scales_of_codes_are_counted():
    """All that rests is the leaves' or one of the scalars."""
    tx, params = (
        aj.adam(1e-3, storage="8bit"),
        {"w": jnp.ones((64, 80)), "v": jnp.ones((64, 80)), "b": jnp.ones(3)},
    )
    found = aj.describe(tx, params)
    assert sum(leaf.bytes for leaf in found.leaves) + found.totals.other == found.totals.total


@pytest.mark.parametrize("caller", ["describe", "state_bytes"])
def test_what_is_no_array_is_named(caller):
    for leaf, says in [
        ("x", "found 'x'; expected an array"),
        (jax.nn.relu, "eqx.filter(model, eqx.is_array)"),
    ]:
        with pytest.raises(
            TypeError, match=re.escape(f"{caller}: params at ['w']: ") + ".*" + re.escape(says)
        ):
            getattr(aj, caller)(aj.adam(1e-3), {"w": leaf})


def test_shapes_will_do(params):
    shapes = jax.eval_shape(lambda: params)
    assert aj.describe(grouped(), shapes) == aj.describe(grouped(), params)


def test_rates_in_words(params):
    def rates(tx):
        return [leaf.rate for leaf in aj.describe(tx, params).leaves[:2]]

    groups = {"embed/.*": {"learning_rate_multiplier": 0.5}}
    assert rates(aj.by_path(groups, aj.adam(lambda count: 0.1))) == ["schedule × 0.5", "schedule"]
    assert rates(optax.adam(0.1)) == ["unknown", "unknown"]
    assert rates(aj.chain(aj.track_moments(), aj.scale_by_moments())) == [0.0, 0.0]


def test_decay_in_words(params):
    said = {
        "schedule": aj.adamw(1e-3, weight_decay=lambda count: 0.1),
        "unknown": optax.adamw(1e-3),
        0.1: aj.chain(aj.adamw(1e-3, weight_decay=0.1), aj.stages.cautious()),
        0.2: aj.adamw(1e-3, weight_decay=0.2, decay="l2"),
        0.0: aj.adamw(1e-3, weight_decay=0.2, mask={"embed": False, "enc": False, "head": False}),
    }
    for decay, tx in said.items():
        assert {leaf.decay for leaf in aj.describe(tx, params).leaves if leaf.path != "head/n"} == {
            decay
        }
    decays = []
    jax.jit(
        lambda d: decays.append(aj.describe(aj.adamw(1e-3, weight_decay=d), params).leaves[0].decay)
    )(0.1)
    assert decays == ["traced"]


def test_it_prints(params):
    found = aj.describe(grouped(), params)
    lines = str(found).splitlines()
    assert lines[0] == "embed/.*: " + " → ".join(
        (*STAGES, "add_decayed_weights", "scale_by_learning_rate")
    )
    row = next(line for line in lines if line.startswith("embed/w"))
    assert row.split() == [
        "embed/w",
        "700×64",
        "bfloat16",
        "embed/.*",
        "μ",
        "int8,",
        "ν",
        "uint8",
        "179,204",
        "0.0001",
        "0.1",
        "called",
        "'w'",
    ]
    assert str(found).endswith(str(found.totals))
    assert json.loads(json.dumps(found.as_dict()))["leaves"][0]["state"] == {
        "mu": "int8",
        "nu": "uint8",
    }


def test_rich_draws_the_same(params):
    rich = pytest.importorskip("rich.console")
    console = rich.Console(width=200, record=True, file=io.StringIO())
    console.print(aj.describe(grouped(), params))
    drawn = console.export_text()
    for leaf in aj.describe(grouped(), params).leaves:
        assert f"{leaf.bytes:,}" in drawn
        assert leaf.path in drawn


def test_one_array_and_none():
    (leaf,) = aj.describe(aj.adam(1e-3), np.ones(3, np.float32)).leaves
    assert (leaf.path, leaf.shape) == ("", (3,))
    assert "the only leaf" in str(aj.describe(aj.adam(1e-3), np.ones(3, np.float32)))
    assert str(aj.describe(aj.adam(1e-3), {"a": None}))


def test_refused(params):
    with pytest.raises(
        TypeError, match=r"describe: found adam \(a function: did you mean to call it\?\); expected"
    ):
        aj.describe(aj.adam, params)
    with pytest.raises(ValueError, match="no leaf that 'nothing' matches"):
        aj.describe(aj.by_path({"nothing": "frozen"}, aj.adam(1e-3)), params)
