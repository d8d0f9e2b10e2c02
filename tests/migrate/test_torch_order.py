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
