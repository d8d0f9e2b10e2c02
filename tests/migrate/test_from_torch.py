"""`from_torch` and `to_torch`: a training run goes on where PyTorch left it, and the other way
round.

The oracle is PyTorch itself: a small convolutional network on digits, in four frameworks.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from torch_states import into_torch

import adam_jax as aj

BATCH = 32
RULES = {
    "mapping": {"conv1": "Conv_0", "conv2": "Conv_1", "fc": "Dense_0"},
    "transpose": {"fc.weight": aj.migrate.after_flatten((16, 4, 4))},
}


@pytest.fixture(scope="module")
def batches():
    from sklearn.datasets import load_digits

    found = load_digits()
    order = np.random.default_rng(0).permutation(len(found.target))
    images, labels = found.images[order].astype(np.float32) / 16, found.target[order]

    def batch(i):
        rows = np.arange(i * BATCH, (i + 1) * BATCH) % len(labels)
        return images[rows], labels[rows]

    return batch


def torch_net(torch):
    """As a PyTorch user writes it: images (batch, channels, height, width), flattened in that
    order.
    """
    from torch import nn

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1 = nn.Conv2d(1, 8, 3, padding=1)
            self.conv2 = nn.Conv2d(8, 16, 3, padding=1)
            self.fc = nn.Linear(16 * 4 * 4, 10)

        def forward(self, x):
            x = nn.functional.max_pool2d(torch.relu(self.conv1(x)), 2)
            return self.fc(torch.relu(self.conv2(x)).flatten(1))

    torch.manual_seed(0)
    return Net()


class LinenNet(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = linen.max_pool(linen.relu(linen.Conv(8, (3, 3))(x)), (2, 2), (2, 2))
        x = linen.relu(linen.Conv(16, (3, 3))(x))
        return linen.Dense(10)(x.reshape(len(x), -1))


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.conv1 = nnx.Conv(1, 8, (3, 3), rngs=rngs)
        self.conv2 = nnx.Conv(8, 16, (3, 3), rngs=rngs)
        self.fc = nnx.Linear(256, 10, rngs=rngs)

    def __call__(self, x):
        x = nnx.max_pool(nnx.relu(self.conv1(x)), (2, 2), (2, 2))
        return self.fc(nnx.relu(self.conv2(x)).reshape(len(x), -1))


class EqxNet(eqx.Module):
    conv1: eqx.nn.Conv2d
    conv2: eqx.nn.Conv2d
    fc: eqx.nn.Linear

    def __init__(self, key):
        self.conv1 = eqx.nn.Conv2d(1, 8, 3, padding=1, key=key)
        self.conv2 = eqx.nn.Conv2d(8, 16, 3, padding=1, key=key)
        self.fc = eqx.nn.Linear(256, 10, key=key)

    def __call__(self, x):
        x = eqx.nn.MaxPool2d(2, 2)(jax.nn.relu(self.conv1(x)))
        return self.fc(jax.nn.relu(self.conv2(x)).ravel())


def train_torch(torch, model, optimizer, batches, steps):
    losses = []
    for i in steps:
        x, y = batches(i)
        loss = torch.nn.functional.cross_entropy(model(torch.tensor(x[:, None])), torch.tensor(y))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def trainer(apply, tx, batches):
    """(params, state, steps) -> (losses, params, state)."""

    def loss(params, x, y):
        return optax.softmax_cross_entropy_with_integer_labels(apply(params, x), y).mean()

    @jax.jit
    def step(params, state, x, y):
        value, grads = jax.value_and_grad(loss)(params, x, y)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    def train(params, state, steps):
        losses = []
        for i in steps:
            x, y = batches(i)
            params, state, value = step(params, state, x[..., None], y)
            losses.append(float(value))
        return losses, params, state

    return train


def jax_net(kind):
    """(shapes of the parameters, apply, rules) of the network in a framework."""
    if kind == "linen":
        net = LinenNet()
        shapes = jax.eval_shape(net.init, jax.random.key(1), jnp.zeros((1, 8, 8, 1)))["params"]
        return shapes, lambda p, x: net.apply({"params": p}, x), RULES
    if kind == "nnx":
        graph, shapes = nnx.split(nnx.eval_shape(lambda: NnxNet(nnx.Rngs(1))), nnx.Param)
        return shapes, lambda p, x: nnx.merge(graph, p)(x), {"transpose": RULES["transpose"]}
    shapes, static = eqx.partition(
        eqx.filter_eval_shape(EqxNet, jax.random.key(1)), lambda x: hasattr(x, "shape")
    )
    # Equinox has PyTorch's arrays, but for the biases of convolutions, (out, 1, 1).
    column = (lambda b: b.reshape(-1, 1, 1), lambda b: b.ravel())
    transpose = {"conv1.bias": column, "conv2.bias": column}
    return (
        shapes,
        lambda p, x: jax.vmap(eqx.combine(p, static))(jnp.moveaxis(x, -1, 1)),
        {"transpose": transpose},
    )


OPTIMIZERS = {
    "Adam": ({}, lambda: aj.adam(1e-3)),
    "AdamW": ({"weight_decay": 0.1}, lambda: aj.adamw(1e-3, weight_decay=0.1)),
    "Adam amsgrad": ({"amsgrad": True}, lambda: aj.amsgrad(1e-3, maximum="raw")),
}


@pytest.mark.usefixtures("standard_promotion")  # the networks mix dtypes themselves
@pytest.mark.parametrize(
    ("kind", "name"),
    [*(("linen", name) for name in OPTIMIZERS), ("nnx", "Adam"), ("equinox", "Adam")],
)
def test_a_training_run_moves_from_pytorch_and_goes_on_with_the_same_losses(
    torch, batches, name, kind
):
    options, member = OPTIMIZERS[name]
    model = torch_net(torch)
    optimizer = getattr(torch.optim, name.split()[0])(model.parameters(), lr=1e-3, **options)
    before = train_torch(torch, model, optimizer, batches, range(60))

    shapes, apply, rules = jax_net(kind)
    tx, names = member(), [n for n, _ in model.named_parameters()]
    params = aj.migrate.params_from_torch(model.state_dict(), shapes, **rules)
    state = aj.migrate.from_torch(optimizer.state_dict(), tx, params, names=names, **rules)
    assert jax.tree.structure(params) == jax.tree.structure(shapes)

    train = trainer(apply, tx, batches)
    theirs = train_torch(torch, model, optimizer, batches, range(60, 120))
    ours, *_ = train(params, state, range(60, 120))
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    assert before[0] > 2 > before[-1] > 2 * ours[-1]  # it learns all the while
    # Without its state Adam makes other losses from the second step on: the test would see it.
    afresh, *_ = train(params, tx.init(params), range(60, 62))
    assert afresh[0] == ours[0]
    assert abs(afresh[1] / ours[1] - 1) > 1e-3


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("name", ["Adam", "Adam amsgrad"])
def test_a_training_run_moves_to_pytorch_and_goes_on_with_the_same_losses(torch, batches, name):
    options, member = OPTIMIZERS[name]
    shapes, apply, rules = jax_net("linen")
    tx, model = member(), torch_net(torch)
    train = trainer(apply, tx, batches)
    params = aj.migrate.params_from_torch(model.state_dict(), shapes, **rules)
    _, params, state = train(params, tx.init(params), range(60))

    optimizer = getattr(torch.optim, name.split()[0])(model.parameters(), lr=1e-3, **options)
    names = [n for n, _ in model.named_parameters()]
    into_torch(torch, model, optimizer, params, state, tx, names=names, **rules)

    theirs = train_torch(torch, model, optimizer, batches, range(60, 120))
    ours, *_ = train(params, state, range(60, 120))
    np.testing.assert_allclose(theirs, ours, rtol=1e-5)


NO_DECAY = {".*/bias": {"weight_decay": 0.0}}
DECAYED = aj.presets.torch.adamw(1e-3, weight_decay=0.1)
IN_GROUPS = {
    "by_path": lambda: aj.by_path(NO_DECAY, DECAYED),
    "a mask": lambda: aj.adamw(1e-3, weight_decay=0.1, mask="matrices"),
    "chained": lambda: aj.skip_nonfinite(
        aj.chain(optax.clip_by_global_norm(1e9), aj.by_path(NO_DECAY, DECAYED))
    ),
}


def in_groups(torch, model):
    """AdamW that decays no biases, as PyTorch users write it, and its names in the
    groups' order.
    """
    decays = {name: param for name, param in model.named_parameters() if param.ndim > 1}
    rests = {name: param for name, param in model.named_parameters() if param.ndim < 2}
    groups = [
        {"params": decays.values(), "weight_decay": 0.1},
        {"params": rests.values(), "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=1e-3), [[*decays], [*rests]]


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("name", IN_GROUPS)
def test_a_run_with_parameter_groups_moves_and_moves_back(torch, batches, name):
    tx, model = IN_GROUPS[name](), torch_net(torch)
    optimizer, names = in_groups(torch, model)
    train_torch(torch, model, optimizer, batches, range(30))
    shapes, apply, rules = jax_net("linen")
    params = aj.migrate.params_from_torch(model.state_dict(), shapes, **rules)
    state = aj.migrate.from_torch(optimizer.state_dict(), tx, params, names=names, **rules)
    assert all(
        int(count) == 30
        for path, count in jax.tree_util.tree_leaves_with_path(state)
        if getattr(path[-1], "name", "") == "count"
    )

    train = trainer(apply, tx, batches)
    theirs = train_torch(torch, model, optimizer, batches, range(30, 60))
    ours, params, state = train(params, state, range(30, 60))
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)

    again = torch_net(torch)
    optimizer, names = in_groups(torch, again)
    into_torch(torch, again, optimizer, params, state, tx, names=names, **rules)
    theirs = train_torch(torch, again, optimizer, batches, range(60, 90))
    ours, *_ = train(params, state, range(60, 90))
    np.testing.assert_allclose(theirs, ours, rtol=1e-5)


@pytest.mark.usefixtures("standard_promotion")
def test_what_pytorch_did_not_train_is_frozen(torch, batches):
    model = torch_net(torch)
    model.conv1.requires_grad_(False)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    train_torch(torch, model, optimizer, batches, range(30))
    shapes, apply, rules = jax_net("linen")
    params, tx = (
        aj.migrate.params_from_torch(model.state_dict(), shapes, **rules),
        aj.by_path({"Conv_0/.*": "frozen"}, aj.adam(1e-3)),
    )
    trained = {name: path for name, path in rules["mapping"].items() if name != "conv1"}
    state = aj.migrate.from_torch(
        optimizer.state_dict(), tx, params, names=names, **rules | {"mapping": trained}
    )
    assert state.inner_states["default"][0].mu["Conv_0"]["kernel"] == optax.MaskedNode()
    theirs = train_torch(torch, model, optimizer, batches, range(30, 60))
    ours, *_ = trainer(apply, tx, batches)(params, state, range(30, 60))
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)
