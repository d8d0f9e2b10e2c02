"""`from_torch` into the presets of PyTorch's optimizers, from its checkpoints and its tensors.

The oracle is PyTorch itself, going on by itself.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen
from helpers import refused
from torch_states import draw, into_torch

import adam_jax as aj

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


@pytest.mark.usefixtures("standard_promotion")
def test_a_transposed_convolution_of_flax_with_a_transposed_kernel(torch):
    up = torch.nn.ConvTranspose2d(3, 5, 3, stride=2)
    layer = linen.ConvTranspose(5, (3, 3), strides=(2, 2), padding="VALID", transpose_kernel=True)
    x = draw(1, 4, 4, 3)
    shapes = jax.eval_shape(layer.init, jax.random.key(0), x)["params"]
    found = layer.apply({"params": aj.migrate.params_from_torch(up.state_dict(), shapes)}, x)
    theirs = up(torch.tensor(x.transpose(0, 3, 1, 2))).detach().numpy().transpose(0, 2, 3, 1)
    np.testing.assert_allclose(found, theirs, atol=1e-6)
