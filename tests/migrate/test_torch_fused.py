"""One tensor of PyTorch for several leaves, several layers in one leaf, and heads: both ways.

The oracle is attention in NumPy, written with PyTorch's arrays as PyTorch documents them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen
from helpers import refused

import adam_jax as aj
from adam_jax.migrate import LayoutWarning, Split

D, HEADS, LAYERS = 6, 2, 3
TX = aj.adam(1e-3)


def draw(seed, **shapes):
    rng = np.random.default_rng(seed)
    return {n.replace("__", "."): rng.standard_normal(s).astype("f4") for n, s in shapes.items()}


def fused(seed=0):
    """`torch.nn.MultiheadAttention(6, 2).state_dict()`, in arrays."""
    return draw(
        seed,
        in_proj_weight=(3 * D, D),
        in_proj_bias=(3 * D,),
        out_proj__weight=(D, D),
        out_proj__bias=(D,),
    )


RULES = {
    "split": {r"(.*)in_proj_(weight|bias)": (r"\1query.\2", r"\1key.\2", r"\1value.\2")},
    "heads": {r"(.*\.)?(query|key|value|out_proj)\..*": HEADS},
    "mapping": {"out_proj": "out"},
    "transpose": {r".*weight": "kernel"},
}


def adams(weights, names, steps=3.0):
    """Adam's state, in which the first moment of each tensor is the tensor."""
    entries = {
        i: {"step": np.float32(steps), "exp_avg": weights[n], "exp_avg_sq": weights[n] ** 2}
        for i, n in enumerate(names)
    }
    group = {"betas": (0.9, 0.999), "params": list(range(len(names)))}
    return {"state": entries, "param_groups": [group]}


def there_and_back(weights, like, **rules):
    """The leaves that tensors and their moments become, which have to be the same, and back."""
    made = aj.migrate.params_from_torch(weights, like, **rules)
    back = aj.migrate.params_to_torch(made, weights, **rules)
    jax.tree.map(np.testing.assert_array_equal, back, weights)
    found, names = adams(weights, list(weights)), list(weights)
    state = aj.migrate.from_torch(found, TX, like, names=dict(enumerate(names)), **rules)
    jax.tree.map(np.testing.assert_array_equal, state[0].mu, made)
    jax.tree.map(lambda nu, mu: np.testing.assert_array_equal(nu, mu**2), state[0].nu, made)
    again = aj.migrate.to_torch(state, TX, found, names=dict(enumerate(names)), **rules)
    jax.tree.map(np.testing.assert_array_equal, again, found)
    return made


def attention(x, w):
    """What PyTorch's attention gives, by its documentation."""
    parts = np.split(w["in_proj_weight"], 3), np.split(w["in_proj_bias"], 3)
    q, k, v = (
        (x @ weight.T + bias).reshape(-1, HEADS, D // HEADS)
        for weight, bias in zip(*parts, strict=True)
    )
    scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(D // HEADS)
    scores = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    joined = np.einsum("hqk,khd->qhd", scores, v).reshape(-1, D)
    return joined @ w["out_proj.weight"].T + w["out_proj.bias"]


@pytest.mark.usefixtures("standard_promotion")
def test_fused_projections_become_the_attention_of_flax_and_back():
    """B14: cut, transposed and in heads, for parameters and moments."""
    net, x = linen.MultiHeadDotProductAttention(HEADS), draw(7, x=(5, D))["x"]
    like = net.init(jax.random.key(0), x[None])["params"]
    weights = fused()
    made = there_and_back(weights, like, **RULES)
    assert made["query"]["kernel"].shape == (D, HEADS, D // HEADS)
    assert made["out"]["kernel"].shape == (HEADS, D // HEADS, D)
    np.testing.assert_allclose(
        net.apply({"params": made}, x[None])[0], attention(x, weights), rtol=1e-4, atol=1e-5
    )
    # Without a word on their layout the square parts are warned of.
    untold = {key: rule for key, rule in RULES.items() if key != "transpose"}
    with pytest.warns(LayoutWarning) as seen:
        aj.migrate.params_from_torch(weights, like, **untold)
    kernels = {f"{name}/kernel" for name in ("query", "key", "value", "out")}
    assert set(seen[0].message.leaves) == kernels


def gpt2(seed=0):
    """The blocks of a small GPT-2, whose `Conv1D` stores (in, out)."""
    return {
        f"h.{i}.{name}": x
        for i in range(LAYERS)
        for name, x in draw(
            seed + i,
            ln_1__weight=(D,),
            attn__c_attn__weight=(D, 3 * D),
            attn__c_attn__bias=(3 * D,),
            mlp__c_fc__weight=(D, 4 * D),
            mlp__c_fc__bias=(4 * D,),
        ).items()
    }


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_layers_become_one_leaf_whose_parts_are_cut(axis):
    """B14: of GPT-2's blocks q, k, v in heads, all layers in one leaf."""

    def stacked(*shape):
        place = axis % (len(shape) + 1)
        return jnp.zeros((*shape[:place], LAYERS, *shape[place:]))

    of_head, axis_of_scale = (HEADS, D // HEADS), axis
    like = {
        "blocks": {
            "ln_1": {"scale": stacked(D)},
            "attn": {
                key: {"kernel": stacked(D, *of_head), "bias": stacked(*of_head)} for key in "qkv"
            },
            "mlp": {"c_fc": {"kernel": stacked(D, 4 * D), "bias": stacked(4 * D)}},
        }
    }
    weights = gpt2()
    names = tuple(rf"\1.{key}.\2" for key in "qkv")
    made = there_and_back(
        weights,
        like,
        split={r"(.*)\.c_attn\.(weight|bias)": Split(names, axis=-1)},
        stack={"h": axis},
        heads={r".*attn\.[qkv]\..*": HEADS},
        transpose={r"h\.attn\..*": "same", "h.1.mlp.c_fc.weight": "same", r".*c_fc.*": "same"},
        mapping={"h": "blocks"},
    )["blocks"]
    made = jax.tree.map(np.asarray, made)
    for i in range(LAYERS):
        parts = np.split(weights[f"h.{i}.attn.c_attn.weight"], 3, axis=1)
        biases = np.split(weights[f"h.{i}.attn.c_attn.bias"], 3)
        for key, part, bias in zip("qkv", parts, biases, strict=True):
            kernel = np.take(made["attn"][key]["kernel"], i, axis)
            np.testing.assert_array_equal(kernel, part.reshape(D, *of_head))
            found = np.take(made["attn"][key]["bias"], i, axis)
            np.testing.assert_array_equal(found, bias.reshape(of_head))
        found = np.take(made["mlp"]["c_fc"]["kernel"], i, axis)
        np.testing.assert_array_equal(found, weights[f"h.{i}.mlp.c_fc.weight"])
        scale = np.take(made["ln_1"]["scale"], i, axis_of_scale)
        np.testing.assert_array_equal(scale, weights[f"h.{i}.ln_1.weight"])


def test_parts_of_other_sizes_and_names_that_are_wrapped():
    """B14: grouped queries have fewer keys than queries."""
    weights = {"module.qkv.weight": draw(0, x=(8, 5))["x"]}
    like = {"q": {"kernel": jnp.zeros((5, 4))}, "kv": {"kernel": jnp.zeros((5, 4))}}
    entry = Split(("q.weight", "kv.weight"), sizes=(4, 4))
    rules = {"split": {"qkv.weight": entry}, "mapping": {"module": ""}}
    made = there_and_back(weights, like, **rules)
    np.testing.assert_array_equal(made["kv"]["kernel"], weights["module.qkv.weight"][4:].T)
    like["q"]["kernel"], like["kv"]["kernel"] = jnp.zeros((5, 6)), jnp.zeros((5, 2))
    rules["split"] = {"qkv.weight": entry._replace(sizes=(6, 2))}
    made = there_and_back(weights, like, **rules)
    np.testing.assert_array_equal(made["q"]["kernel"], weights["module.qkv.weight"][:6].T)


def test_layers_of_one_leaf_have_taken_the_same_steps():
    """B14: their debias factor is one."""
    weights = {f"h.{i}.w": draw(i, x=(3,))["x"] for i in range(2)}
    like, names = {"h": {"w": jnp.zeros((2, 3))}}, dict(enumerate(weights))
    found = adams(weights, list(weights))
    aj.migrate.from_torch(found, TX, like, names=names, stack={"h": 0})
    found["state"][1]["step"] = 2.0
    with refused(ValueError, "layers of h/w have taken other steps"):
        aj.migrate.from_torch(found, TX, like, names=names, stack={"h": 0})
    del found["state"][1]
    with refused(ValueError, "found no state of h.1.w"):
        aj.migrate.from_torch(found, TX, like, names=names, stack={"h": 0})


def test_rules_that_do_not_fit_are_refused():
    """B14: and none of them guesses."""
    x, like = draw(0, x=(6, 5))["x"], {"a": jnp.zeros((3, 5)), "b": jnp.zeros((3, 5))}

    def move(like=like, tensors=None, **rules):
        aj.migrate.params_from_torch({"ab": x} if tensors is None else tensors, like, **rules)

    with refused(
        ValueError, "shape (6, 5) of ab; expected one that has 2 equal parts along axis 1"
    ):
        move(split={"ab": Split(("a", "b"), axis=1)})
    with refused(ValueError, "2 parts of (2, 2) along axis 0"):
        move(split={"ab": Split(("a", "b"), sizes=(2, 2))})
    with refused(ValueError, "found 1 sizes for 2 names"):
        move(split={"ab": Split(("a", "b"), sizes=(6,))})
    with refused(ValueError, "several parts are called a"):
        move(split={"ab": ("a", "a")})
    with refused(TypeError, "split: found 3 for 'ab'; expected the names of the parts"):
        move(split={"ab": 3})
    with refused(ValueError, "does not fill", r"expected \1 for"):
        move(split={"a(b)": (r"\2", r"\1")})
    with refused(ValueError, "found cd in split, which is no name of PyTorch's"):
        move(split={"cd": ("a", "b")})
    with refused(TypeError, "stack: found 'a' for 'h'; expected an axis"):
        move(stack={"h": "a"})
    with refused(TypeError, "heads: found 0 for 'ab'"):
        move(heads={"ab": 0})
    with refused(TypeError, "heads: found", "expected a table by PyTorch's names."):
        move(heads=lambda name, path: 2)
    layers = {"h.0.w": np.zeros(3), "h.2.w": np.zeros(3)}
    leaf = {"h": {"w": jnp.zeros((2, 3))}}
    with refused(
        ValueError, "found the layers 0, 2 for h/w; expected 0 to 1, for axis 0 of (2, 3)"
    ):
        move(leaf, layers, stack={"h": 0})
    with refused(ValueError, "are both mapped to h/w", "stack={'layers': 0}"):
        found = adams(layers, list(layers))
        aj.migrate.from_torch(found, TX, leaf, names=list(layers), mapping=lambda name: "h/w")
    with refused(ValueError, "found the axis 2 for h.0.w, and 2 axes at h/w"):
        move(leaf, layers, stack={"h": 2})
    kernel = {"q": {"kernel": jnp.zeros((6, 2, 3))}}
    with refused(ValueError, "q.weight: found the shape (6, 6)", "in 4 heads; expected (6, 2, 3)"):
        move(kernel, {"q.weight": np.zeros((6, 6))}, heads={"q.weight": 4})
    # A part that has no leaf leaves a hole on the way back.
    made = {"a": jnp.zeros((3, 5))}
    rules = {"split": {"ab": ("a", "b")}, "mapping": {"b": None}}
    move(made, **rules)
    with refused(ValueError, "found no leaf for b, a part of ab"):
        aj.migrate.params_to_torch(made, {"ab": x}, **rules)
