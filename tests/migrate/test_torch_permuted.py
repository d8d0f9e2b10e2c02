"""Random small models of PyTorch, whose names, groups and layouts come in every order.

What is accepted without a warning is right, and every leaf that is wrong after a warning stands in
its list. NumPy arrays stand for tensors; the oracle is the list of true leaves that each layer
below makes beside its tensors."""

import functools
import warnings
from collections import Counter

import numpy as np
import pytest

import adam_jax as aj
from adam_jax.migrate import LayoutWarning, foreign_state

SIZES = [3, 4, 4, 4]  # many are equal
TX = aj.adam(1e-3)


class Drawn:
    """A model: PyTorch's arrays by name in the order of its modules, and the leaves they are.

    `mapping` and `told` are the entries that a careful user writes.
    """

    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)
        self.tensors, self.leaves, self.mapping, self.told = {}, {}, {}, {}
        self.rules = {"split": {}, "heads": {}}
        self.flax = bool(self.rng.integers(2))
        kinds = [linear, conv, embedding, layer_norm, attention, conv1d]
        # "z" before "a": the order of modules is not that of the alphabet.
        letters = self.rng.permutation(list("zyxba"))
        for i in range(self.rng.integers(2, 5)):
            kinds[self.rng.integers(len(kinds))](self, f"{letters[i]}")

    def size(self):
        return int(self.rng.choice(SIZES))

    def add(self, name, shape, path, there, told):
        x = self.rng.standard_normal(shape).astype(np.float32)
        self.tensors[name], self.leaves[path] = x, there(x)
        self.mapping[name], self.told[name] = path, told

    def kernel(self, name, shape, path, conv1d=False):
        """A weight that is multiplied from the right in Flax and Haiku, and lies otherwise in
        PyTorch.
        """
        axes = (*range(2, len(shape)), 1, 0)
        leaf = f"{path}/{'kernel' if self.flax else 'w'}"
        if conv1d:
            self.add(name, shape, leaf, lambda x: x, "same")
        else:
            self.add(name, shape, leaf, lambda x: x.transpose(axes), "kernel")


def linear(model, name):
    out, inside = model.size(), model.size()
    model.kernel(f"{name}.weight", (out, inside), name)
    if model.rng.integers(2):
        model.add(f"{name}.bias", (out,), f"{name}/bias", lambda x: x, "same")


def conv(model, name):
    out, inside, width = model.size(), model.size(), model.size()
    model.kernel(f"{name}.weight", (out, inside, width, *[3] * model.rng.integers(2)), name)


def embedding(model, name):
    shape = model.size(), model.size()
    model.add(f"{name}.weight", shape, f"{name}/embedding", lambda x: x, "same")


def layer_norm(model, name):
    shape = (model.size(),)
    model.add(f"{name}.weight", shape, f"{name}/scale", lambda x: x, "same")
    model.add(f"{name}.bias", shape, f"{name}/bias", lambda x: x, "same")


def attention(model, name):
    """With its projections in one leaf, or cut into three, of which each has heads."""
    d = model.size()
    if model.flax and d == 4 and model.rng.integers(2):
        for kind in ("weight", "bias"):
            fused = f"{name}.in_proj_{kind}"
            shape = (3 * d, d) if kind == "weight" else (3 * d,)
            x = model.tensors[fused] = model.rng.standard_normal(shape).astype(np.float32)
            model.rules["split"][fused] = [f"{name}.{part}.{kind}" for part in "qkv"]
            for i, part in enumerate("qkv"):
                own, path = x[i * d : (i + 1) * d], f"{name}/{part}"
                path += "/kernel" if kind == "weight" else "/bias"
                model.leaves[path] = own.T.reshape(*own.T.shape[:-1], 2, 2)
                cut = f"{name}.{part}.{kind}"
                model.mapping[cut], model.rules["heads"][cut] = path, 2
                model.told[cut] = "kernel" if kind == "weight" else "same"
    else:
        model.kernel(f"{name}.in_proj_weight", (3 * d, d), f"{name}/in")
        model.add(f"{name}.in_proj_bias", (3 * d,), f"{name}/in/bias", lambda x: x, "same")
    model.kernel(f"{name}.out_proj.weight", (d, d), f"{name}/out")
    model.add(f"{name}.out_proj.bias", (d,), f"{name}/out/bias", lambda x: x, "same")


def conv1d(model, name):
    inside, out = model.size(), model.size()
    model.kernel(f"{name}.weight", (inside, out), name, conv1d=True)
    model.add(f"{name}.bias", (out,), f"{name}/bias", lambda x: x, "same")


def tree(leaves):
    made = {}
    for path, x in leaves.items():
        *folders, last = path.split("/")
        node = made
        for folder in folders:
            node = node.setdefault(folder, {})
        node[last] = x
    return made


def leaf(tree, path):
    for part in path.split("/"):
        tree = tree[part]
    return np.asarray(tree)


def groups_of(model):
    """The names of each group: in module order if there is one, else dealt in any order."""
    names, count = list(model.tensors), model.rng.integers(1, 4)
    if count == 1:
        return [names]
    dealt = [model.rng.integers(count) for _ in names]
    groups = [[n for n, g in zip(names, dealt, strict=True) if g == i] for i in range(count)]
    groups = [list(model.rng.permutation(its)) if model.rng.integers(2) else its for its in groups]
    return [list(map(str, its)) for its in groups if its]


def said(model, groups):
    """What users say of the names, right and wrong."""
    module, flat = list(model.tensors), [name for its in groups for name in its]
    return {
        "by group": groups,
        "by number": dict(enumerate(flat)),
        "flat": flat,
        "in module order": module,
        "alphabetical": sorted(module),
        "alphabetical by group": [sorted(its) for its in groups],
    }


def optimizer(model, groups, trained=True):
    state, made, numbers = {}, [], iter(range(99))
    for its in groups:
        made.append({"betas": (0.9, 0.999), "params": [next(numbers) for _ in its]})
    for i, name in enumerate(name for its in groups for name in its):
        x = model.tensors[name]
        state[i] = {"step": 3.0, "exp_avg": x, "exp_avg_sq": x**2}
    return {"state": state if trained else {}, "param_groups": made}


def attempt(function, *args, **options):
    """What it returned and the leaves that it warned of, or `None` where it refused."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        try:
            made = function(*args, **options)
        except ValueError:
            return None
    assert all(issubclass(warning.category, LayoutWarning) for warning in seen)
    return made, {path for warning in seen for path in warning.message.leaves}


@pytest.fixture
def compiled_once(monkeypatch):
    """What follows from the count is the same for all models here, and is no subject of the test:
    compiled for each it would take a minute.
    """
    made = foreign_state.after_steps

    @functools.cache
    def once(count):
        params = {"w": np.zeros(1, np.float32)}
        parts, _ = foreign_state.memories(TX, TX.init(params), "")
        return made(parts, params, count)

    monkeypatch.setattr(foreign_state, "after_steps", lambda parts, params, count: once(count))


def judged(model, result, of):
    """How a result is to be called; a leaf that is silently wrong is a failure."""
    if result is None:
        return "refused"
    made, listed = result
    wrong = {path for path, x in model.leaves.items() if not np.array_equal(of(made, path), x)}
    assert wrong <= listed, (wrong, listed)
    return "wrong and listed" if wrong else "right and listed" if listed else "accepted"


@pytest.mark.usefixtures("compiled_once")
def test_what_is_accepted_without_a_warning_is_right():
    """A1, A2: over 200 models, every way to say names, with and without layouts said."""
    told = Counter()
    for seed in range(200):
        model = Drawn(seed)
        groups = groups_of(model)
        like = tree({path: np.zeros(x.shape, np.float32) for path, x in model.leaves.items()})
        rules = {"mapping": model.mapping, **model.rules}
        if model.rng.integers(2):
            rules["transpose"] = model.told
        result = attempt(aj.migrate.params_from_torch, model.tensors, like, **rules)
        told["weights", judged(model, result, leaf)] += 1
        assert result is not None or "transpose" not in rules

        found, ways = optimizer(model, groups), said(model, groups)
        way = [*ways][seed % len(ways)]
        result = attempt(aj.migrate.from_torch, found, TX, like, names=ways[way], **rules)
        told[way, judged(model, result, lambda state, path: leaf(state[0].mu, path))] += 1
        assert result is not None or way != "by number" or "transpose" not in rules
        if result is None:
            continue
        # The way back is right wherever the way there was, into a fresh optimizer too.
        state, _ = result
        for trained in (True, False):
            fresh = optimizer(model, groups, trained)
            back = attempt(aj.migrate.to_torch, state, TX, fresh, names=ways[way], **rules)
            assert back is not None or not trained
            for i, entry in back[0]["state"].items() if back else ():
                np.testing.assert_array_equal(entry["exp_avg"], found["state"][i]["exp_avg"])
            told["back", "refused" if back is None else "accepted"] += 1
    kinds = Counter()
    for (_, case), count in told.items():
        kinds[case] += count
    assert min(kinds.values()) >= 10, told
    assert told["by group", "accepted"] >= 10, told
    assert told["in module order", "refused"] > 0 < told["alphabetical", "refused"]
