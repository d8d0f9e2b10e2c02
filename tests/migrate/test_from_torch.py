"""`from_torch` and its relatives: runs go on where PyTorch left them, and the other way round.

The oracle is PyTorch itself, where it is installed. What is refused, and the rules of names and
transposes, need none: NumPy arrays stand for tensors."""

import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from helpers import refused

import adam_jax as aj

BATCH = 32
RULES = {
    "mapping": {"conv1": "Conv_0", "conv2": "Conv_1", "fc": "Dense_0"},
    "transpose": {"fc.weight": aj.migrate.after_flatten((16, 4, 4))},
}


@pytest.fixture
def torch():
    found = pytest.importorskip("torch", reason="PyTorch is an optional oracle: pip install torch")
    threads = found.get_num_threads()
    found.set_num_threads(1)  # these arrays are too small to share
    yield found
    found.set_num_threads(threads)


# A small convolutional network on the digits, in three frameworks


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


def into_torch(torch, model, optimizer, params, state, tx, names=None, **rules):
    """Loads a run of ours, as the docs say it."""
    weights = aj.migrate.params_to_torch(params, model.state_dict(), **rules)
    model.load_state_dict({n: torch.tensor(x) for n, x in weights.items()})
    found = aj.migrate.to_torch(state, tx, optimizer.state_dict(), names=names, **rules)
    found["state"] = {
        i: {k: torch.tensor(v) for k, v in its.items()} for i, its in found["state"].items()
    }
    optimizer.load_state_dict(found)


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


# Parameter groups


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


# Other optimizers


PRESETS = {
    "Adam": {"weight_decay": 0.1},
    "Adam amsgrad": {"amsgrad": True},
    "AdamW": {},
    "NAdam": {},
    "RAdam": {},
    "Adamax": {},
    "RMSprop": {},
    "RMSprop centered": {"alpha": 0.97, "centered": True, "momentum": 0.8},
    "SGD": {"momentum": 0.8},
    "SGD nesterov": {"momentum": 0.8, "nesterov": True},
}


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("name", PRESETS)
def test_presets_go_on_in_either_direction(torch, name):
    """On gradients that do not depend on the parameters, so that what differs is the step: 40
    steps, then 20 in both.
    """
    options, kind = PRESETS[name], name.split()[0]
    tx = getattr(aj.presets.torch, kind.lower())(0.01, **options)
    rng = np.random.default_rng(0)
    gradients = (rng.standard_normal((60, 4, 3)) * 10 ** rng.uniform(-2, 2, (60, 1, 3))).astype(
        np.float32
    )
    # Built from names, which its state dict then has.
    layer = torch.nn.Linear(3, 4, bias=False)
    optimizer = getattr(torch.optim, kind)(layer.named_parameters(), lr=0.01, **options)
    params = {"kernel": jnp.array(layer.weight.detach().numpy().T)}

    def theirs(optimizer, layer, steps):
        for g in gradients[steps]:
            layer.weight.grad = torch.tensor(g)
            optimizer.step()
        return layer.weight.detach().numpy().T.copy()

    def ours(params, state, steps):
        update = jax.jit(tx.update)
        for g in gradients[steps]:
            updates, state = update({"kernel": jnp.asarray(g.T)}, state, params)
            params = optax.apply_updates(params, updates)
        return params, state

    first, then = slice(0, 40), slice(40, 60)
    start = theirs(optimizer, layer, first)
    count = 40 if "SGD" in name else None
    moved = aj.migrate.params_from_torch(layer.state_dict(), params)
    state = aj.migrate.from_torch(optimizer.state_dict(), tx, moved, count=count)
    found, _ = ours(moved, state, then)
    np.testing.assert_allclose(
        found["kernel"] - start, theirs(optimizer, layer, then) - start, rtol=2e-5, atol=2e-6
    )

    # Back, from a run of ours.
    params, state = ours(params, tx.init(params), first)
    start = np.asarray(params["kernel"])
    again = torch.nn.Linear(3, 4, bias=False)
    optimizer = type(optimizer)(again.named_parameters(), lr=0.01, **options)
    into_torch(torch, again, optimizer, params, state, tx)
    found, _ = ours(params, state, then)
    np.testing.assert_allclose(
        theirs(optimizer, again, then) - start, found["kernel"] - start, rtol=2e-5, atol=2e-6
    )


def test_pytorchs_distributed_checkpoints_are_read(torch):
    """B4: what `get_optimizer_state_dict` itself returns, nested and flattened."""
    from torch.distributed.checkpoint import state_dict as checkpoint

    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    groups = [{"params": model[1].parameters()}, {"params": model[0].parameters(), "lr": 0.01}]
    optimizer = torch.optim.AdamW(groups, lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.ones(5, 3)).square().sum().backward()
        optimizer.step()
    tx = aj.presets.torch.adamw(0.01)
    params = {name: {} for name in "01"}
    for name, tensor in model.named_parameters():
        params[name[0]][name[2:]] = jnp.zeros(tuple(tensor.shape))
    for flat in (False, True):
        options = checkpoint.StateDictOptions(flatten_optimizer_state_dict=flat)
        saved = checkpoint.get_optimizer_state_dict(model, optimizer, options=options)
        assert ("state.0.weight.step" in saved) == flat
        state = aj.migrate.from_torch(saved, tx, params)
        assert int(state[0].count) == 3
        for name, tensor in model.named_parameters():
            expected = optimizer.state[tensor]["exp_avg"].numpy()
            np.testing.assert_array_equal(state[0].mu[name[0]][name[2:]], expected)
        back = aj.migrate.to_torch(state, tx, saved)
        assert back.keys() == saved.keys()


@pytest.mark.parametrize("name", ["Adam", "RMSprop"])
def test_complex_parameters_step_as_in_pytorch(torch, name):
    """A7: as two parts, of which each has its own ν."""
    param = torch.nn.Parameter(torch.tensor([1 + 1j, 0.3 - 2j]))
    optimizer = getattr(torch.optim, name)([param], lr=0.01)
    rng = np.random.default_rng(0)
    parts = rng.standard_normal((20, 2, 2)).astype(np.float32) * [1, 0.01]

    def step(g):
        param.grad = torch.view_as_complex(torch.tensor(g, dtype=torch.float32))
        optimizer.step()

    for g in parts[:10]:
        step(g)
    rules = {"transpose": {"w": aj.migrate.as_real()}}
    tx = getattr(aj.presets.torch, name.lower())(0.01)
    params = aj.migrate.params_from_torch({"w": param}, {"w": jnp.zeros((2, 2))}, **rules)
    state = aj.migrate.from_torch(optimizer.state_dict(), tx, params, names=["w"], **rules)
    update = jax.jit(tx.update)
    for g in parts[10:]:
        step(g)
        updates, state = update({"w": jnp.asarray(g, jnp.float32)}, state, params)
        params = optax.apply_updates(params, updates)
    expected = torch.view_as_real(param.detach()).numpy()
    np.testing.assert_allclose(params["w"], expected, atol=2e-6)


def test_tensors_are_copied_and_bfloat16_is_read(torch):
    tensor = torch.ones(3, 2, dtype=torch.bfloat16, requires_grad=True)
    params = aj.migrate.params_from_torch(
        {"weight": tensor}, {"kernel": jnp.zeros((2, 3), jnp.bfloat16)}
    )
    plain = torch.ones(64, 64)
    copied = aj.migrate.params_from_torch({"weight": plain}, {"embedding": jnp.zeros((64, 64))})
    with torch.no_grad():
        tensor.zero_()
        plain.zero_()
    assert params["kernel"].dtype == jnp.bfloat16
    assert bool((params["kernel"] == 1).all())
    assert bool((copied["embedding"] == 1).all())
    assert aj.migrate.params_to_torch(params, {"weight": tensor})["weight"].dtype == np.float32
    with refused(ValueError, "weight: found a sparse tensor"):
        aj.migrate.params_from_torch(
            {"weight": torch.eye(3).to_sparse()}, {"kernel": jnp.zeros((3, 3))}
        )


# Names, transposes, and what is refused: with arrays for tensors


PARAMS = {
    "dense": {"kernel": jnp.zeros((2, 3)), "bias": jnp.zeros(3)},
    "norm": {"scale": jnp.zeros(3)},
}
NAMES = ["fc.weight", "fc.bias", "norm.weight"]
TABLE = {"fc": "dense"}


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def saved(**changes):
    """A state dict of Adam after 5 steps."""
    shapes = [(3, 2), (3,), (3,)]
    state = {
        i: {"step": np.float32(5), "exp_avg": draw(*s), "exp_avg_sq": draw(*s) ** 2}
        for i, s in enumerate(shapes)
    }
    return {
        "state": state,
        "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.999), "params": [0, 1, 2]} | changes],
    }


def moved(state_dict=None, tx=None, params=PARAMS, **options):
    options = {"names": NAMES, "mapping": TABLE} | options
    return aj.migrate.from_torch(
        saved() if state_dict is None else state_dict,
        aj.adam(1e-3) if tx is None else tx,
        params,
        **options,
    )


def test_moments_lie_and_rest_as_ours_do():
    state = moved()
    np.testing.assert_array_equal(state[0].mu["dense"]["kernel"], draw(3, 2).T)
    np.testing.assert_array_equal(state[0].nu["norm"]["scale"], draw(3) ** 2)
    np.testing.assert_allclose(state[0].weights[0], [1 - 0.9**5, 1 - 0.999**5], rtol=1e-6)
    assert int(state[0].count) == 5
    back = aj.migrate.to_torch(state, aj.adam(1e-3), saved(), names=NAMES, mapping=TABLE)
    jax.tree.map(np.testing.assert_array_equal, back, saved())

    tx = aj.adam(1e-3, storage=aj.storage.Codes(smallest=0))
    narrow = moved(tx=tx)
    converted = aj.convert_state(state, aj.adam(1e-3), tx, PARAMS).state
    jax.tree.map(np.testing.assert_array_equal, narrow, converted)


@pytest.mark.parametrize(
    ("torch_shape", "flax_shape", "axes"),
    [
        ((4, 3), (3, 4), (1, 0)),
        ((4, 3, 5), (5, 3, 4), (2, 1, 0)),
        ((4, 3, 5, 6), (5, 6, 3, 4), (2, 3, 1, 0)),
        ((4, 3, 5, 6, 7), (5, 6, 7, 3, 4), (2, 3, 4, 1, 0)),
    ],
)
def test_kernels_have_their_first_axes_last_and_other_leaves_stay(torch_shape, flax_shape, axes):
    x = draw(*torch_shape)
    for leaf, expected, shape in [
        ("kernel", x.transpose(axes), flax_shape),
        ("embedding", x, torch_shape),
    ]:
        params = {"layers": [{leaf: jnp.zeros(shape)}]}
        made = aj.migrate.params_from_torch({"layers.0.weight": x}, params)
        np.testing.assert_array_equal(made["layers"][0][leaf], expected)
        np.testing.assert_array_equal(
            aj.migrate.params_to_torch(made, {"layers.0.weight": x})["layers.0.weight"], x
        )


@pytest.mark.usefixtures("standard_promotion")
def test_a_transposed_convolution_of_flax_with_a_transposed_kernel(torch):
    up = torch.nn.ConvTranspose2d(3, 5, 3, stride=2)
    layer = linen.ConvTranspose(5, (3, 3), strides=(2, 2), padding="VALID", transpose_kernel=True)
    x = draw(1, 4, 4, 3)
    shapes = jax.eval_shape(layer.init, jax.random.key(0), x)["params"]
    found = layer.apply({"params": aj.migrate.params_from_torch(up.state_dict(), shapes)}, x)
    theirs = up(torch.tensor(x.transpose(0, 3, 1, 2))).detach().numpy().transpose(0, 2, 3, 1)
    np.testing.assert_allclose(found, theirs, atol=1e-6)


def test_after_flatten_puts_rows_where_flax_flattens():
    images, x = draw(5, 3, 2, 4), draw(7, 24, seed=1)
    there, back = aj.migrate.after_flatten((3, 2, 4))
    ours = images.transpose(0, 2, 3, 1).reshape(5, -1) @ there(x)
    np.testing.assert_allclose(ours, images.reshape(5, -1) @ x.T, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(back(there(x)), x)


def test_transposes_can_be_given_by_table_and_by_function():
    x, params = draw(3, 5, 2, 2), {"up": {"kernel": jnp.zeros((2, 2, 3, 5))}}
    for transpose in (
        {"up.weight": (2, 3, 0, 1)},
        lambda name, path: (2, 3, 0, 1) if path == "up/kernel" else None,
    ):
        made = aj.migrate.params_from_torch({"up.weight": x}, params, transpose=transpose)
        np.testing.assert_array_equal(made["up"]["kernel"], x.transpose(2, 3, 0, 1))


def test_names_of_statistics_and_of_what_has_no_place():
    state_dict = {
        "bn.weight": draw(2),
        "bn.running_mean": draw(2),
        "bn.num_batches_tracked": np.int64(3),
        "extra.bias": draw(1),
    }
    params = {"bn": {"scale": jnp.zeros(2), "mean": jnp.zeros(2)}}
    made = aj.migrate.params_from_torch(state_dict, params, mapping={"extra": None})
    np.testing.assert_array_equal(made["bn"]["mean"], state_dict["bn.running_mean"])
    back = aj.migrate.params_to_torch(
        made, state_dict, mapping=lambda name: None if name.startswith("extra") else name
    )
    jax.tree.map(np.testing.assert_array_equal, back, state_dict)


def test_names_in_the_state_dict_are_used():
    params = {
        "b": {"bias": jnp.zeros(3)},
        "a": {"kernel": jnp.zeros((2, 3))},
        "norm": {"scale": jnp.zeros(3)},
    }
    state = moved(
        saved(param_names=["a.weight", "norm.weight", "b.bias"]),
        params=params,
        names=None,
        mapping=None,
    )
    np.testing.assert_array_equal(state[0].mu["a"]["kernel"], draw(3, 2).T)


def test_refuses_names_that_do_not_meet():
    with refused(ValueError, "from_torch", "does not name them", "model.named_parameters()"):
        moved(names=None)
    with refused(ValueError, "found 2 names for 3 parameters"):
        moved(names=NAMES[:2])
    with refused(
        ValueError,
        "left over fc.weight, fc.bias of PyTorch; missing dense/bias, dense/kernel of the "
        "parameters",
    ):
        moved(mapping=None)
    with refused(ValueError, "'fc.bias' and 'norm.weight' are both mapped to dense/bias"):
        moved(mapping={"fc": "dense", "norm.weight": "dense.bias"})
    with refused(ValueError, "missing dense/bias"):
        moved(mapping={"fc": "dense", "fc.bias": None})
    with refused(ValueError, "found fc.wieght in transpose", "such as fc.weight"):
        moved(transpose={"fc.wieght": (1, 0)})
    # A table serves the parameters, the statistics and the optimizer, and not all have all names.
    jax.tree.map(
        np.testing.assert_array_equal, moved(), moved(mapping=TABLE | {"head": "out", "tail": None})
    )


def test_refuses_shapes_that_differ():
    wide = {
        "dense": {"kernel": jnp.zeros((2, 4)), "bias": jnp.zeros(3)},
        "norm": {"scale": jnp.zeros(3)},
    }
    with refused(
        ValueError,
        "fc.weight: found the shape (3, 2), transposed (2, 3); expected (2, 4), of dense/kernel",
        "transpose=",
    ):
        moved(params=wide)
    with refused(ValueError, "found (0, 0) for fc.weight; expected a permutation of the 2 axes"):
        moved(transpose={"fc.weight": (0, 0)})
    with refused(ValueError, "norm.weight: found the shape (3, 1)", "cannot be transposed so"):
        aj.migrate.params_from_torch({"norm.weight": draw(3, 1)}, {"norm": {"scale": jnp.zeros(3)}})


@pytest.mark.parametrize("kind", ["adam", "radam", "adamw"])
def test_leaves_that_have_taken_other_steps_go_on_each_from_its_own(kind):
    """As in PyTorch, where a layer was thawed later: each leaf steps as in a state of its own
    count.
    """
    tx, state_dict = getattr(aj, kind)(0.1), saved()
    state_dict["state"][1]["step"] = np.float32(2)
    state_dict["state"][2]["step"] = np.float32(0)
    grads = jax.tree.map(jnp.ones_like, PARAMS)
    updates, after = tx.update(grads, moved(state_dict, tx), PARAMS)
    assert int(after[0].count) == 6
    for i, (step, leaf) in enumerate(
        [(5, ("dense", "kernel")), (2, ("dense", "bias")), (0, ("norm", "scale"))]
    ):
        alone = saved()
        for its in alone["state"].values():
            its["step"] = np.float32(step)
        expected, _ = tx.update(grads, moved(alone, tx), PARAMS)
        np.testing.assert_allclose(
            updates[leaf[0]][leaf[1]], expected[leaf[0]][leaf[1]], rtol=1e-6, err_msg=str(i)
        )
    with refused(ValueError, "have gathered weights that", "Others keep a count alone"):
        aj.migrate.to_torch(after, tx, saved(), names=NAMES, mapping=TABLE)


def test_refuses_steps_that_are_not_known():
    state_dict = saved()
    with refused(ValueError, "count=7, and step 5"):
        moved(count=7)
    for step in (-1.0, 1.5, np.nan, np.inf, 3e9, np.ones(2)):
        state_dict["state"][1]["step"] = step
        with refused(ValueError, "steps; expected a whole number from 0 on"):
            moved(state_dict)
    del state_dict["state"][1]["step"]
    with refused(ValueError, "found no step of dense/bias"):
        moved(state_dict)
    buffers = {i: {"momentum_buffer": its["exp_avg"]} for i, its in saved()["state"].items()}
    sgd = {
        "state": buffers,
        "param_groups": [{"momentum": 0.9, "dampening": 0, "params": [0, 1, 2]}],
    }
    with refused(ValueError, "keeps no step", "count=1000"):
        moved(sgd, aj.momentum(1.0))
    assert int(moved(sgd, aj.momentum(1.0), count=9)[0].count) == 9


def test_refuses_states_that_are_not_whole():
    state_dict = saved()
    del state_dict["state"][2]
    with refused(ValueError, "found no state of norm.weight", "never had a gradient"):
        moved(state_dict)
    frozen = {"dense": PARAMS["dense"]}
    assert "norm" not in moved(state_dict, params=frozen, mapping=TABLE | {"norm": None})[0].mu
    state_dict = saved()
    del state_dict["state"][1]["exp_avg_sq"]
    with refused(ValueError, "found no exp_avg_sq of fc.bias"):
        moved(state_dict)
    state_dict["state"][1]["exp_avg_cube"] = draw(3)
    with refused(ValueError, "left over exp_avg_cube"):
        moved(state_dict)


def test_refuses_another_optimizer():
    with refused(
        ValueError, "tx has a maximum of the raw ν, corrected later, which the state dict has not"
    ):
        moved(tx=aj.amsgrad(1.0, maximum="raw"))
    with refused(
        ValueError, "found the decay 0.999 of nu in the param_group of fc.weight, and 0.99 in tx"
    ):
        moved(tx=aj.adam(1.0, b2=0.99))
    buffers = {
        i: its | {"max_exp_avg_sq": its["exp_avg_sq"]} for i, its in saved()["state"].items()
    }
    with refused(
        ValueError, "a maximum of the raw ν, corrected later (max_exp_avg_sq), which tx has not"
    ):
        moved(saved() | {"state": buffers}, tx=aj.amsgrad(1.0))
    with refused(
        ValueError, "to_torch", "the optimizer has a maximum of the raw ν", "which tx has not"
    ):
        aj.migrate.to_torch(moved(), aj.adam(1e-3), saved(amsgrad=True), names=NAMES, mapping=TABLE)
    rms = {"state": {}, "param_groups": [{"alpha": 0.9, "momentum": 0.5, "params": [0, 1, 2]}]}
    tx = aj.rmsprop(1.0, 0.9, momentum=0.5)
    with refused(
        ValueError, "a sum of steps, behind the learning rate, which the optimizer has not"
    ):
        aj.migrate.to_torch(tx.init(PARAMS), tx, rms, names=NAMES, mapping=TABLE)
    tx = aj.adam_mini(1.0)
    with refused(ValueError, "to_torch: at dense/kernel found the shape (1, 3); expected (2, 3)"):
        aj.migrate.to_torch(tx.init(PARAMS), tx, saved(), names=NAMES, mapping=TABLE)


def test_settings_of_groups_are_those_of_their_leaves():
    adam = aj.adamw(1e-3, weight_decay=0.1)
    tx = aj.by_path(
        {"dense/kernel": {"eps": 1e-6}, "norm/.*": {"weight_decay": 0.0, "b2": 0.99}}, adam
    )
    groups = [
        {"params": [0], "betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 0.1},
        {"params": [1], "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1},
        {"params": [2], "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0},
    ]
    state_dict, names = saved() | {"param_groups": groups}, [[name] for name in NAMES]
    state = moved(state_dict, tx, names=names)
    np.testing.assert_allclose(
        state.inner_states["norm/.*"][0].weights[0, 1], 1 - 0.99**5, rtol=1e-6
    )
    np.testing.assert_allclose(
        state.inner_states["default"][0].weights[0, 1], 1 - 0.999**5, rtol=1e-6
    )
    back = aj.migrate.to_torch(state, tx, state_dict, names=names, mapping=TABLE)
    jax.tree.map(np.testing.assert_array_equal, back, state_dict)

    for i, changes, says in [
        (0, {"eps": 1e-8}, "found eps=1e-08 in the param_group of fc.weight, and 1e-06 in tx"),
        (
            1,
            {"weight_decay": 0},
            "found weight_decay=0 in the param_group of fc.bias, and 0.1 in tx",
        ),
        (
            2,
            {"weight_decay": 0.1},
            "found weight_decay=0.1 in the param_group of norm.weight, and 0.0 in tx",
        ),
        (
            2,
            {"betas": (0.9, 0.999)},
            "found the decay 0.999 of nu in the param_group of norm.weight, and 0.99 in tx",
        ),
    ]:
        with refused(ValueError, says):
            moved(
                state_dict
                | {
                    "param_groups": [
                        group | changes if i == j else group for j, group in enumerate(groups)
                    ]
                },
                tx,
                names=names,
            )
    for decoupled, decay in [(True, "l2"), (False, "lr")]:
        with refused(
            ValueError, f"found decoupled_weight_decay={decoupled}", f"and {not decoupled} in tx"
        ):
            its = aj.adamw(1e-3, weight_decay=0.1, decay=decay)
            moved(saved(weight_decay=0.1, decoupled_weight_decay=decoupled), its)


@pytest.mark.parametrize(
    "tx",
    [
        aj.by_path({"norm/.*": "frozen"}, aj.adam(1e-3)),
        aj.by_path({"dense/.*": aj.adam(1e-3)}, "frozen"),
    ],
)
def test_frozen_leaves_have_no_state_to_take(tx):
    state_dict = saved()
    with refused(
        ValueError, "left over the state of norm.weight, of which tx keeps none", "convert_state"
    ):
        moved(state_dict, tx)
    del state_dict["state"][2]  # it never had a gradient
    state = moved(state_dict, tx)
    state_dict["param_groups"][0]["params"] = [0, 1]  # nor was it given to the optimizer
    jax.tree.map(np.testing.assert_array_equal, state, moved(state_dict, tx, names=NAMES[:2]))
    back = aj.migrate.to_torch(state, tx, state_dict, names=NAMES[:2], mapping=TABLE)
    jax.tree.map(np.testing.assert_array_equal, back, state_dict)
    del (whole := saved())["state"][2]  # an optimizer that was given all
    back = aj.migrate.to_torch(state, tx, whole, names=NAMES, mapping=TABLE)
    jax.tree.map(np.testing.assert_array_equal, back, whole)


def test_proportions_of_learning_rates_stay():
    groups = [
        {"lr": 0.5, "betas": (0.9, 0.999), "params": [0]},
        {"lr": 0.05, "betas": (0.9, 0.999), "params": [1, 2]},
    ]
    state_dict, names = saved() | {"param_groups": groups}, dict(enumerate(NAMES))
    with refused(
        ValueError,
        "lr is 0.5 for fc.weight and 0.05 for fc.bias, and in tx 0.001 and 0.001",
        "learning_rate_multiplier",
    ):
        moved(state_dict, names=names)
    tenth = {"learning_rate_multiplier": 0.1}
    moved(state_dict, aj.by_path({"dense/bias|norm/.*": tenth}, aj.adam(1e-3)), names=names)
    moved(
        state_dict,
        aj.by_path({"dense/bias|norm/.*": tenth}, aj.adam(optax.linear_schedule(1e-3, 0.0, 10))),
        names=names,
    )


def test_loads_no_files_and_takes_no_objects():
    for found in ("model.pt", b"\x80\x02}"):
        with refused(TypeError, "expected a state dict", "torch.load(path, weights_only=True)"):
            aj.migrate.from_torch(found, aj.adam(1.0), PARAMS)
        with refused(TypeError, "expected a state dict"):
            aj.migrate.params_from_torch(found, PARAMS)
        with refused(TypeError, "bias: found", "expected a tensor or an array"):
            aj.migrate.params_from_torch({"bias": found}, {"bias": jnp.zeros(3)})
    with refused(ValueError, "found a dict of fc.weight", "Weights are for params_from_torch"):
        aj.migrate.from_torch({"fc.weight": draw(3, 2)}, aj.adam(1.0), PARAMS)
    with refused(ValueError, "found a dict of model, optimizer", "Pass what is in ['optimizer']"):
        aj.migrate.from_torch({"model": {}, "optimizer": saved()}, aj.adam(1.0), PARAMS)
    with refused(ValueError, "found a dict of nothing"):
        aj.migrate.from_torch({}, aj.adam(1.0), PARAMS)
    for changes in (
        {"state": []},
        {"state": {0: 1}},
        {"param_groups": None},
        {"param_groups": ["a"]},
        {"param_groups": [{}]},
    ):
        with refused(ValueError, "found param_groups or a state that are not PyTorch's"):
            moved(saved() | changes)
    with refused(
        ValueError, "found the parameter numbers '0', '1', '2'; expected integers", "JSON"
    ):
        moved(saved() | {"state": {str(i): its for i, its in saved()["state"].items()}})
    with refused(ValueError, "left over the state of 7"):
        moved(saved() | {"state": saved()["state"] | {7: saved()["state"][0]}})


MALFORMED = {
    "names": ({"names": 3}, TypeError, "names: found 3; expected a list of strings"),
    "a name": ({"names": ["a", None, "b"]}, TypeError, "names: found ['a', None, 'b']"),
    "one string": ({"names": "abc"}, TypeError, "names: found 'abc'"),
    "mapping": ({"mapping": ["a"]}, TypeError, "mapping: found ['a']; expected a table"),
    "a number": ({"mapping": {"fc": 3}}, TypeError, "mapping: found 3 for 'fc'; expected a path"),
    "numbers": ({"mapping": {0: "fc"}}, TypeError, "mapping: found {0: 'fc'}"),
    "a function": ({"mapping": lambda name: 3}, TypeError, "mapping: found 3 for 'fc.weight'"),
    "transpose": ({"transpose": [1]}, TypeError, "transpose: found [1]; expected a table"),
    "three": (
        {"transpose": {"fc.weight": (abs, abs, abs)}},
        ValueError,
        "expected a permutation of the 2 axes, one of 'same', 'kernel', 'rule', or a pair of",
    ),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_rules_that_are_none_are_refused(case):
    options, error, says = MALFORMED[case]
    with refused(error, says):
        moved(**options)


def test_arrays_that_cannot_be_moments_or_weights_are_refused():
    def with_moment(field, value):
        state_dict = saved()
        state_dict["state"][1][field] = value
        return state_dict

    assert (
        moved(with_moment("exp_avg", np.ones(3, int)))[0].mu["dense"]["bias"].dtype == jnp.float32
    )
    for value in (np.array([1, None, 2], object), np.array(["a", "b", "c"])):
        with refused(TypeError, "fc.bias: found", "expected a tensor or an array of numbers"):
            moved(with_moment("exp_avg", value))
        with refused(TypeError, "bias: found"):
            aj.migrate.params_from_torch({"bias": value}, {"bias": jnp.zeros(3)})
    with refused(ValueError, "fc.bias: found exp_avg_sq below 0"):
        moved(with_moment("exp_avg_sq", -np.ones(3)))
    with refused(ValueError, "bias: found complex128; expected real numbers, as bias has"):
        aj.migrate.params_from_torch({"bias": np.ones(3, complex)}, {"bias": jnp.zeros(3)})
    with refused(ValueError, "found betas=0.9 in param_groups; expected a pair"):
        moved(saved(betas=0.9))
    for shape in (None, 3, (), (16, 4, 4.0), (-1, 4, 4), "abc"):
        with refused(
            ValueError, "after_flatten: found", "expected the sizes that PyTorch flattens"
        ):
            aj.migrate.after_flatten(shape)


def test_tied_weights_have_one_leaf():
    table, mapping = {"embed": {"embedding": jnp.zeros((5, 4))}}, {"out.weight": "embed/embedding"}
    weight = draw(5, 4)
    found = aj.migrate.params_from_torch(
        {"embed.weight": weight, "out.weight": weight}, table, mapping=mapping
    )
    np.testing.assert_array_equal(found["embed"]["embedding"], weight)
    back = aj.migrate.params_to_torch(
        table, {"embed.weight": weight, "out.weight": weight}, mapping=mapping
    )
    assert not back["embed.weight"].any()
    assert not back["out.weight"].any()
    with refused(
        ValueError, "'out.weight' and another name are both mapped to embed/embedding, and differ"
    ):
        aj.migrate.params_from_torch(
            {"embed.weight": weight, "out.weight": 2 * weight}, table, mapping=mapping
        )
    with refused(TypeError, "tx: found None"):
        aj.migrate.from_torch(saved(), None, PARAMS)


SETTINGS = {
    "eps": ({"eps": 0.5}, "found eps=0.5 in the param_group of w, and 1e-08 in tx"),
    "weight decay": (
        {"weight_decay": 0.1},
        "found weight_decay=0.1 in the param_group of w, and 0.0 in tx",
    ),
    "ascent": ({"maximize": True}, "found maximize=True in the param_group of w"),
    "amsgrad": ({"amsgrad": True}, "found amsgrad=True in the param_group of w, and False in tx"),
    "RAdam": (
        {"decoupled_weight_decay": False, "foreach": None},
        "the param_group of w is RAdam's, and tx does not rectify",
    ),
}


def adams_state(**more):
    entry = {
        "step": 3.0,
        "exp_avg": np.ones(2, np.float32),
        "exp_avg_sq": np.ones(2, np.float32),
    } | more
    return {
        "state": {0: entry},
        "param_groups": [{"lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-8, "params": [0]}],
    }


@pytest.mark.parametrize("case", SETTINGS)
def test_settings_of_another_optimizer_are_refused(case):
    settings, message = SETTINGS[case]
    found, params, tx = adams_state(), {"w": jnp.ones(2)}, aj.presets.torch.adam(1e-3)
    aj.migrate.from_torch(found, tx, params, names=["w"])
    found["param_groups"][0] |= settings
    with pytest.raises(ValueError, match=re.escape(message)):
        aj.migrate.from_torch(found, tx, params, names=["w"])


def test_decay_in_the_gradient_is_not_that_beside_the_moments():
    params = {"w": jnp.ones(2)}
    found, torch = adams_state(), aj.presets.torch
    for decoupled, right, wrong in [
        (True, torch.adamw, torch.adam),
        (False, torch.adam, torch.adamw),
    ]:
        found["param_groups"][0] |= {
            "weight_decay": 0.1,
            "decoupled_weight_decay": decoupled,
            "amsgrad": False,
        }
        aj.migrate.from_torch(found, right(1e-3, weight_decay=0.1), params, names=["w"])
        with pytest.raises(
            ValueError,
            match=f"found decoupled_weight_decay={decoupled} .* and {not decoupled} in tx",
        ):
            aj.migrate.from_torch(found, wrong(1e-3, weight_decay=0.1), params, names=["w"])
    with pytest.raises(ValueError, match="is Adam's, and tx rectifies"):
        aj.migrate.from_torch(found, torch.radam(1e-3, weight_decay=0.1), params, names=["w"])


def test_nadam_is_told_by_its_product():
    params = {"w": jnp.ones(2)}
    with pytest.raises(ValueError, match="not NAdam's, and tx looks ahead"):
        aj.migrate.from_torch(adams_state(), aj.presets.torch.nadam(1e-3), params, names=["w"])
    with pytest.raises(ValueError, match="has the mu_product of NAdam, and tx does not look ahead"):
        aj.migrate.from_torch(
            adams_state(mu_product=0.1), aj.presets.torch.adam(1e-3), params, names=["w"]
        )
