"""Names and numbers of a PyTorch optimizer: no order is taken on faith.

NumPy arrays stand for tensors. Each parameter's moment has its name's own number in every element,
so that one on another leaf is seen."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import refused

import adam_jax as aj

LINE = "name_of = {id(p): n for n, p in model.named_parameters()}"


def state_dict_of(tensors, groups, own_names=False, fresh=False):
    """That of Adam: `tensors` are the first moments by name, `groups` the names of each group."""
    order = [name for its in groups for name in its]
    state = {
        i: {"step": 3.0, "exp_avg": tensors[name], "exp_avg_sq": tensors[name] ** 2}
        for i, name in enumerate(order)
    }
    made, start = [], 0
    for its in groups:
        numbers = list(range(start, start + len(its)))
        named = {"param_names": list(its)} if own_names else {}
        made.append({"lr": 1e-3, "betas": (0.9, 0.999), "params": numbers, **named})
        start += len(its)
    return {"state": {} if fresh else state, "param_groups": made}


def marked(shapes):
    """Arrays that are full of the number of their name, from 1."""
    return {n: np.full(s, i, np.float32) for i, (n, s) in enumerate(shapes.items(), 1)}


def tree_of(shapes):
    """The parameters of plain dicts, as PyTorch has them."""
    made = {}
    for name, shape in shapes.items():
        *folders, last = name.split(".")
        node = made
        for folder in folders:
            node = node.setdefault(folder, {})
        node[last] = jnp.zeros(shape)
    return made


TWO = {"0.weight": (4, 3), "0.bias": (4,), "1.weight": (4, 3), "1.bias": (4,)}
TX = aj.adam(1e-3)


def means(tensors, groups, names, **options):
    """Whether every first moment is where its name says."""
    shapes = {name: x.shape for name, x in tensors.items()}
    found = state_dict_of(tensors, groups, **options)
    state = aj.migrate.from_torch(found, TX, tree_of(shapes), names=names)
    for name, x in tensors.items():
        ours = state[0].mu
        for part in name.split("."):
            ours = ours[part]
        np.testing.assert_array_equal(ours, x, err_msg=name)
    back = aj.migrate.to_torch(state, TX, found, names=names)
    jax.tree.map(np.testing.assert_array_equal, back["state"], found["state"])


HEAD_FIRST = [["1.weight", "1.bias"], ["0.weight", "0.bias"]]
TRAINER = [["0.weight", "1.weight"], ["0.bias", "1.bias"]]


@pytest.mark.parametrize("groups", [HEAD_FIRST, TRAINER])
def test_names_of_several_groups_come_group_by_group(groups):
    """A1: in module order, one list put the moments of the head on the first layer."""
    tensors, flat = marked(TWO), [name for its in groups for name in its]
    for names in (list(TWO), flat):
        with refused(ValueError, "one list of names for 2 groups", "list for each group", LINE):
            means(tensors, groups, names)
    means(tensors, groups, groups)
    means(tensors, groups, dict(enumerate(flat)))
    means(tensors, groups, None, own_names=True)
    # Also where the state to fill is fresh, and no shape could show it.
    state = TX.init(tree_of(TWO))
    with refused(ValueError, "to_torch", "one list of names for 2 groups", "0 (no state)"):
        aj.migrate.to_torch(state, TX, state_dict_of(tensors, groups, fresh=True), names=flat)


def test_one_list_for_several_groups_passes_where_all_shapes_differ():
    """A1: then a wrong order is a shape that differs."""
    tensors = marked({"0.weight": (4, 3), "0.bias": (4,), "1.weight": (5, 4), "1.bias": (5,)})
    groups = [["1.weight", "1.bias"], ["0.weight", "0.bias"]]
    means(tensors, groups, [name for its in groups for name in its])
    with refused(ValueError, "0.weight: found the shape (5, 4)", "the order of names=", LINE):
        means(tensors, groups, list(tensors))


def test_names_in_alphabetical_order_are_refused_where_shapes_are_equal():
    """A1: names from safetensors, of a model whose order is q, k, v, o."""
    order = [f"layers.{i}.w{part}" for i in range(2) for part in "qkvo"]
    tensors, names = marked(dict.fromkeys(order, (3,))), sorted(order)
    means(tensors, [order], order)
    for found in (names, [names]):
        with refused(ValueError, "alphabetical order", "safetensors", "layers.0.wk", LINE):
            means(tensors, [order], found)
    means(tensors, [names], dict(enumerate(names)))
    # "layers.10" before "layers.2" gives it away, in layers of one name too.
    many = [f"layers.{i}.w" for i in range(12)]
    means(marked(dict.fromkeys(many, (3,))), [many], many)
    with refused(ValueError, "alphabetical order"):
        means(marked(dict.fromkeys(many, (3,))), [many], sorted(many))
    # Long names, and a group without parameters beside.
    many = [
        f"transformer.encoder.layers.{i}.self_attention.{key}_projection"
        for i in "01"
        for key in "qk"
    ]
    tensors = marked(dict.fromkeys(many, (3,)))
    means(tensors, [many, []], many)
    with refused(ValueError, "alphabetical order") as error:
        means(tensors, [many], sorted(many))
    assert len(str(error.value)) <= 600
    # By groups, of which each is sorted.
    groups = [["b.weight", "a.weight"], ["b.bias", "a.bias"]]
    tensors = marked({"b.weight": (4, 3), "b.bias": (4,), "a.weight": (4, 3), "a.bias": (4,)})
    means(tensors, groups, groups)
    with refused(ValueError, "alphabetical order", "a.weight, b.weight"):
        means(tensors, groups, [sorted(its) for its in groups])


def test_names_that_do_not_fit_the_groups_are_refused():
    """A1: and each of the errors is short."""
    tensors = marked(TWO)
    with refused(ValueError, "found lists of 1, 3 names", "of 2, 2", LINE):
        means(tensors, TRAINER, [["0.weight"], ["1.weight", "0.bias", "1.bias"]])
    with refused(ValueError, "found other numbers than the state dict has, 0, 4"):
        means(tensors, TRAINER, dict(enumerate(TWO, 1)))
    with refused(TypeError, "names: found", "expected a string per number"):
        means(tensors, TRAINER, {0: 1})
    with refused(ValueError, "found '1.bias' for parameter 1", "calls '0.bias'", "Leave names="):
        names = ["0.weight", "1.bias", "1.weight", "0.bias"]
        means(tensors, [list(TWO)], names, own_names=True)
    with refused(ValueError, "does not name them", LINE) as error:
        means(tensors, TRAINER, None)
    assert len(str(error.value)) <= 600


# State dicts in other forms


FIELDS = ("step", "exp_avg", "exp_avg_sq")
NAMED = {"0.weight": (4, 3), "0.bias": (4,), "1.weight": (4, 3), "1.bias": (4,)}


def in_form(kind, prefix=""):
    """A distributed checkpoint with two groups, of which the head is first."""
    tensors = {prefix + name: x for name, x in marked(NAMED).items()}
    groups = [[prefix + "1.weight", prefix + "1.bias"], [prefix + "0.weight", prefix + "0.bias"]]
    entries = {
        name: {"step": np.float32(3), "exp_avg": x, "exp_avg_sq": x**2}
        for name, x in tensors.items()
    }
    settings = {"lr": 1e-3, "betas": (0.9, 0.999)}
    if kind == "named":
        return {"state": entries, "param_groups": [{"params": its, **settings} for its in groups]}
    flat = {f"state.{n}.{f}": entry[f] for n, entry in entries.items() for f in FIELDS}
    names = [name for its in groups for name in its]
    return flat | {f"param_groups.{n}.{key}": x for n in names for key, x in settings.items()}


@pytest.mark.parametrize("prefix", ["", "module._orig_mod."])
@pytest.mark.parametrize("kind", ["named", "flattened"])
def test_distributed_checkpoints_are_read_by_their_names_and_written_back(kind, prefix):
    """B4: keys that are names were refused with a hint about JSON."""
    saved, params = in_form(kind, prefix), tree_of(NAMED)
    rules = {"mapping": {"module._orig_mod": "", "0": "0"}} if prefix else {}
    state = aj.migrate.from_torch(saved, TX, params, **rules)
    for i, (name, x) in enumerate(marked(NAMED).items()):
        layer, last = name.split(".")
        np.testing.assert_array_equal(state[0].mu[layer][last], x, err_msg=str(i))
    back = aj.migrate.to_torch(state, TX, saved, **rules)
    assert back.keys() == saved.keys()
    jax.tree.map(np.testing.assert_array_equal, back, saved)
    with refused(ValueError, "keys are names already", "Leave names= out"):
        aj.migrate.from_torch(saved, TX, params, names=list(NAMED), **rules)
    if prefix:
        with refused(ValueError, "mapping={'module._orig_mod': ''}"):
            aj.migrate.from_torch(saved, TX, params)
        weights = {prefix + name: x for name, x in marked(NAMED).items()}
        rules["transpose"] = {"0.weight": "same", r"1\..*": "same"}  # names with or without it
        made = aj.migrate.params_from_torch(weights, params, **rules)
        np.testing.assert_array_equal(made["1"]["bias"], weights[prefix + "1.bias"])
        back = aj.migrate.params_to_torch(made, weights, mapping={"module._orig_mod.": ""})
        jax.tree.map(np.testing.assert_array_equal, back, weights)


def test_checkpoints_that_are_not_whole_are_refused():
    """B4: each part that is missing is named."""
    params, flat = tree_of(NAMED), in_form("flattened")
    with refused(ValueError, "found no param_groups.0.bias.… for the state of 0.bias"):
        its = {key: x for key, x in flat.items() if not key.startswith("param_groups.0.bias")}
        aj.migrate.from_torch(its, TX, params)
    with refused(ValueError, "found 'epoch' beside keys of a flattened state dict"):
        aj.migrate.from_torch(flat | {"epoch": 3}, TX, params)
    with refused(ValueError, "Pass what is in ['optim']"):
        aj.migrate.from_torch({"model": {}, "optim": flat}, TX, params)
    with refused(TypeError, "found a tuple, such as get_state_dict returns", "second one"):
        aj.migrate.from_torch(({}, in_form("named")), TX, params)
    named = in_form("named")
    named["param_groups"][0]["params"] = ["1.weight", "0.weight"]
    with refused(ValueError, "found 0.weight twice in param_groups"):
        aj.migrate.from_torch(named, TX, params)
    del named["param_groups"][1]
    with refused(ValueError, "left over the state of 0.bias, 1.bias"):
        aj.migrate.from_torch(named, TX, params)


def test_steps_in_the_groups_are_read_and_written_there():
    """B13: apex and TransformerEngine keep one step for each group."""
    tensors, groups = marked(NAMED), [list(NAMED)]
    saved = state_dict_of(tensors, groups)
    for entry in saved["state"].values():
        del entry["step"]
    saved["param_groups"][0] |= {"step": 7, "bias_correction": True}
    state = aj.migrate.from_torch(saved, TX, tree_of(NAMED), names=list(NAMED))
    assert int(state[0].count) == 7
    np.testing.assert_allclose(state[0].weights[0], [1 - 0.9**7, 1 - 0.999**7], rtol=1e-5)
    back = aj.migrate.to_torch(state, TX, saved, names=list(NAMED))
    jax.tree.map(np.testing.assert_array_equal, back, saved)
    saved["param_groups"][0]["bias_correction"] = False
    with refused(ValueError, "found bias_correction=False", "tx corrects the bias"):
        aj.migrate.from_torch(saved, TX, tree_of(NAMED), names=list(NAMED))
    saved["param_groups"][0]["bias_correction"] = True
    saved["state"][1]["step"] = 6
    with refused(ValueError, "found step 6 of 0.bias, and 7 in its group"):
        aj.migrate.from_torch(saved, TX, tree_of(NAMED), names=list(NAMED))


def test_quantized_states_are_named():
    """B13: bitsandbytes keeps codes and tables; so may others, as integers of 8 bits."""
    saved = state_dict_of(marked(NAMED), [list(NAMED)])

    def with_fields(rename):
        entries = {
            i: {rename.get(field, field): x for field, x in entry.items()}
            for i, entry in saved["state"].items()
        }
        return saved | {"state": entries}

    def move(found):
        aj.migrate.from_torch(found, TX, tree_of(NAMED), names=list(NAMED))

    with refused(ValueError, "the quantized state of bitsandbytes", "dequantize_blockwise"):
        move(with_fields({"exp_avg": "state1", "exp_avg_sq": "absmax1"}))
    with refused(ValueError, "as bitsandbytes calls moments", "state1 as exp_avg"):
        move(with_fields({"exp_avg": "state1", "exp_avg_sq": "state2"}))
    saved["state"][1]["exp_avg"] = np.zeros(4, np.uint8)
    with refused(ValueError, "0.bias: found exp_avg of uint8", "quantized"):
        move(saved)
