"""A3, `mask="matrices"`: weight decay goes to matrices, by what leaves are and not by their shapes.

The oracle of each model is the list of what decays in it, written by hand from what its modules
are for.
"""

import equinox as eqx
import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

import adam_jax as aj
from adam_jax._core.paths import paths


@pytest.fixture
def unsharded():
    """NNX names axes without a mesh to lay them on, as older versions of Flax always do."""
    before = getattr(flax.config, "flax_always_shard_variable", None)
    if before is None:
        yield
        return
    flax.config.update("flax_always_shard_variable", False)
    yield
    flax.config.update("flax_always_shard_variable", before)


def ones(shapes):
    return jax.tree.map(lambda p: np.ones(p.shape, p.dtype), shapes)


def decayed(params, **options):
    """The paths of the leaves that decay in `update`, which are those that `describe` says."""
    tx = aj.add_decayed_weights(1.0, "matrices", **options)
    zeros = jax.tree.map(np.zeros_like, params)
    updates, _ = tx.update(zeros, tx.init(params), params)
    moved = {
        path for path, u in zip(paths(updates), jax.tree.leaves(updates), strict=True) if u.any()
    }
    said = {leaf.path for leaf in aj.describe(tx, params).leaves if leaf.decay}
    assert said == moved
    return moved


class Block(linen.Module):
    @linen.compact
    def __call__(self, x, _=None):
        h = linen.LayerNorm(name="ln")(x)
        h = linen.MultiHeadDotProductAttention(2)(h)
        h = linen.Dense(8, kernel_init=linen.with_partitioning(init, ("in", "out")))(h)
        return x + linen.Conv(8, (3,))(h), None


def init(key, shape, dtype):
    return jnp.ones(shape, dtype)


class Net(linen.Module):
    @linen.compact
    def __call__(self, ids):
        x = linen.Embed(5, 8)(ids)
        names = {linen.PARTITION_NAME: "layers"}
        split = {"params": True}
        scan = linen.scan(Block, {"params": 0}, split_rngs=split, length=3, metadata_params=names)
        return linen.RMSNorm()(scan()(x, None)[0])


def linen_model():
    return ones(jax.eval_shape(Net().init, jax.random.key(0), jnp.zeros((2, 4), int))["params"])


IN_ATTENTION = [f"{part}/kernel" for part in ("key", "out", "query", "value")]


scans = pytest.mark.skipif(
    not hasattr(jax.sharding.NamedSharding, "update"),
    reason="linen.scan of Flax 0.11 needs a newer JAX",
)


@scans
def test_linen_with_attention_and_scanned_layers():
    """A3: biases (heads, head_dim), and biases and scales (layers, d)."""
    scanned = {f"ScanBlock_0/MultiHeadDotProductAttention_0/{name}" for name in IN_ATTENTION}
    scanned |= {"ScanBlock_0/Dense_0/kernel", "ScanBlock_0/Conv_0/kernel"}
    assert decayed(linen_model()) == {"Embed_0/embedding"} | scanned


class Layer(nnx.Module):
    def __init__(self, rngs):
        init = nnx.with_partitioning(nnx.initializers.ones, ("in", "out"))
        self.norm = nnx.LayerNorm(8, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
        self.linear = nnx.Linear(8, 8, kernel_init=init, rngs=rngs)
        self.lora = nnx.LoRA(8, 2, 8, rngs=rngs)


@nnx.split_rngs(splits=3)
@nnx.vmap(in_axes=0, out_axes=0, transform_metadata={nnx.PARTITION_NAME: "layers"})
def layers(rngs):
    return Layer(rngs)


def nnx_model():
    return nnx.state(nnx.eval_shape(lambda: layers(nnx.Rngs(0))), nnx.Param)


def test_nnx_with_attention_and_stacked_layers(unsharded):
    """A3: one decision for the boxes that `init` gets and the arrays that `update` gets."""
    expected = {f"attention/{name}" for name in IN_ATTENTION}
    expected |= {"linear/kernel", "lora/lora_a", "lora/lora_b"}
    boxed = nnx_model()
    pure = getattr(nnx, "as_pure", None) or nnx.pure
    assert decayed(ones(pure(boxed))) == expected
    described = aj.describe(aj.adamw(1e-3, mask="matrices"), boxed).leaves
    assert {leaf.path for leaf in described if leaf.decay} == expected


class Model(eqx.Module):
    norm: eqx.nn.LayerNorm
    conv: eqx.nn.Conv2d
    attention: eqx.nn.MultiheadAttention
    mlp: eqx.nn.MLP
    cell: eqx.nn.GRUCell
    wn: eqx.nn.WeightNorm
    more: list

    def __init__(self, key):
        self.norm = eqx.nn.LayerNorm((4, 4))
        self.conv = eqx.nn.Conv2d(2, 3, 3, key=key)
        self.attention = eqx.nn.MultiheadAttention(2, 8, use_query_bias=True, key=key)
        self.mlp = eqx.nn.MLP(4, 4, 4, 1, key=key)
        self.cell = eqx.nn.GRUCell(4, 4, key=key)
        self.wn = eqx.nn.WeightNorm(eqx.nn.Linear(4, 4, key=key))
        self.more = [eqx.nn.GroupNorm(1, 4), eqx.nn.Embedding(3, 4, key=key)]


@pytest.mark.parametrize("stacked", [False, True])
def test_equinox(stacked):
    """A3: `Conv2d`'s bias is (c, 1, 1), and `LayerNorm` scales over several axes."""
    keys = jax.random.split(jax.random.key(0), 3)
    make = eqx.filter_vmap(Model) if stacked else Model
    model = eqx.filter_eval_shape(make, keys if stacked else keys[0])
    params = ones(eqx.filter(model, lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct)))
    projections = {f"attention/{name}_proj/weight" for name in ("query", "key", "value", "output")}
    assert decayed(params) == projections | {
        "conv/weight",
        "mlp/layers/0/weight",
        "mlp/layers/1/weight",
        "cell/weight_hh",
        "cell/weight_ih",
        "wn/layer/weight",
        "more/1/weight",
    }


def test_haiku_and_plain_dicts():
    """Haiku's parameters are dicts of dicts, named as here."""
    stack, two = jnp.ones((3, 8)), jnp.ones((8, 8))
    haiku = {
        "net/~/linear": {"w": two, "b": jnp.ones(8)},
        "net/~/layer_norm": {"scale": stack, "offset": stack},
        "net/__layer_stack_no_per_layer/linear": {"w": jnp.ones((3, 8, 8)), "b": stack},
        "net/embed": {"embeddings": two},
    }
    assert decayed(haiku) == {
        "net/~/linear/w",
        "net/__layer_stack_no_per_layer/linear/w",
        "net/embed/embeddings",
    }
    torch = {
        "wte": {"weight": two},
        "h": {"ln_1": {"weight": stack, "bias": stack}, "c_attn": {"weight": two, "bias": stack}},
        "input_layernorm": {"weight": stack},
        "norms": [{"weight": stack}],
    }
    assert decayed(torch) == {"wte/weight", "h/c_attn/weight"}
    plain = {"W1": two, "b1": stack, "w_q": two, "b_q": stack, "g": jnp.ones(3), "keys": [two]}
    assert decayed(plain) == {"W1", "w_q", "keys/0"}
    assert decayed({"a": two, "b": two, "c": jnp.ones(8)}) == {"a", "b"}
    assert decayed([two, jnp.ones(8)]) == {"0"}
    assert decayed(two) == {""}


def test_layer_axes_take_away_axes():
    params = {"layers": {"alpha": jnp.ones((3, 8)), "mix": jnp.ones((8, 3, 8))}, "mix": jnp.ones(3)}
    assert decayed(params) == {"layers/alpha", "layers/mix"}
    assert decayed(params, layer_axes={"layers/alpha": 0}) == {"layers/mix"}
    axes = {"layers/alpha": -2, "layers/mix": (1, 0), "layers/.*a": 0}
    assert decayed(params, layer_axes=axes) == set()


def test_a_group_of_by_path_decides_as_the_whole_tree_does():
    """A leaf's neighbours are in other groups, and so may be all that a pattern matches."""
    params = {"w": jnp.ones((8, 8)), "b": jnp.ones((3, 8)), "stack": jnp.ones((3, 8))}
    adamw = aj.adamw(1e-3, weight_decay=0.1, mask="matrices", layer_axes={"stack": 0})
    tx = aj.by_path({"b": {"b1": 0.8}, "w": {"b1": 0.7}}, adamw)
    for made in (tx, adamw):
        found = {leaf.path: leaf.decay for leaf in aj.describe(made, params).leaves}
        assert found == {"w": 0.1, "b": 0.0, "stack": 0.0}
    tx.update(params, tx.init(params), params)


def test_describe_says_why_and_where_it_is_unsure():
    params = {
        "bias": jnp.ones((2, 4)),
        "kernel": jnp.ones((2, 4)),
        "mystery": jnp.ones((2, 4)),
        "n": jnp.int32(1),
        "scale": jnp.ones(4),
    }
    tx = aj.by_path({"kernel": {"weight_decay": 0.0}}, aj.adamw(1e-3, mask="matrices"))
    found = aj.describe(tx, params)
    assert [leaf.why for leaf in found.leaves] == [
        "called 'bias'",
        "weight_decay is 0",
        "unsure: 2 axes, and no name that tells",
        "not trained",
        "1 axis",
    ]
    text = str(found)
    assert "why" in text
    assert 'mask="matrices" is unsure of mystery.' in text
    assert found.as_dict()["leaves"][0]["why"] == "called 'bias'"
    layered = aj.adamw(1e-3, mask="matrices", layer_axes={"mystery": 0})
    assert aj.describe(layered, params).leaves[2].why == "1 axis besides layers"
    assert "unsure" not in str(aj.describe(layered, params))
    assert aj.describe(aj.adamw(1e-3), params).leaves[0].why == "no mask"
    assert "why" not in str(aj.describe(aj.adamw(1e-3), params))
    given = aj.adamw(1e-3, mask=jax.tree.map(lambda p: True, params))
    assert aj.describe(given, params).leaves[0].why == "the mask"


@scans
def test_flax_layer_axes_reads_the_names_of_boxes(unsharded):
    assert aj.stages.flax_layer_axes(linen_model()) == {r"ScanBlock_0/Dense_0/kernel": 0}
    boxed = nnx_model()
    axes = aj.stages.flax_layer_axes(boxed)
    assert axes == {"linear/kernel": 0}
    tx = aj.adamw(1e-3, mask="matrices", layer_axes=axes)
    assert {leaf.path: leaf.why for leaf in aj.describe(tx, boxed).leaves}["linear/bias"] == (
        "called 'bias'"
    )
    with pytest.raises(ValueError, match="found no box with an axis 'stages'; names of axes are"):
        aj.stages.flax_layer_axes(boxed, "stages")
    with pytest.raises(ValueError, match="in no box"):
        aj.stages.flax_layer_axes({"w": jnp.ones((2, 2))})


PARAMS = {"layers": {"w": jnp.ones((3, 2, 2))}}


@pytest.mark.parametrize(
    ("layer_axes", "error", "says"),
    [
        ({"layer/.*": 0}, ValueError, "no leaf that 'layer/.*' matches"),
        ({"layers/.*": 3}, ValueError, "found axis 3 for 'layers/w'"),
        ({"layers/.*": 0, ".*/w": 1}, ValueError, "with different axes for 'layers/w'"),
        (0, TypeError, "found 0; expected a mapping"),
        ({"layers/.*": "0"}, TypeError, "found '0' for the pattern"),
        ({"layers/(": 0}, ValueError, "expected a regular expression"),
        (PARAMS, TypeError, "that holds arrays"),
    ],
)
def test_layer_axes_that_cannot_be(layer_axes, error, says):
    def step():
        tx = aj.add_decayed_weights(0.1, "matrices", layer_axes=layer_axes)
        tx.update(PARAMS, tx.init(PARAMS), PARAMS)

    with pytest.raises(error, match=says) as caught:
        step()
    assert len(str(caught.value)) <= 600


def test_every_optimizer_with_a_mask_takes_layer_axes():
    params = {"kernel": jnp.ones((3, 4)), "mystery": jnp.ones((3, 4))}
    for name in aj.family.__all__:
        build = getattr(aj, name)
        tx = build(1e-3)
        if "mask" in tx.init.spec.config:
            tx = build(1e-3, weight_decay=0.1, mask="matrices", layer_axes={"mystery": 0})
            assert [leaf.decay for leaf in aj.describe(tx, params).leaves] == [0.1, 0.0], name


def test_masked_by_optax():
    tx = optax.masked(aj.adamw(1e-3, mask="matrices", layer_axes={"b": 0}), {"a": True, "b": False})
    params = {"a": jnp.ones((2, 2)), "b": jnp.ones((2, 2))}
    tx.update(params, tx.init(params), params)
