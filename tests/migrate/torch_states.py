"""State dicts as PyTorch's Adam makes them, with NumPy arrays for tensors, and the way in both
directions.
"""

import jax.numpy as jnp
import numpy as np

import adam_jax as aj


def into_torch(torch, model, optimizer, params, state, tx, names=None, **rules):
    """Loads a run of ours, as the docs say it."""
    weights = aj.migrate.params_to_torch(params, model.state_dict(), **rules)
    model.load_state_dict({n: torch.tensor(x) for n, x in weights.items()})
    found = aj.migrate.to_torch(state, tx, optimizer.state_dict(), names=names, **rules)
    found["state"] = {
        i: {k: torch.tensor(v) for k, v in its.items()} for i, its in found["state"].items()
    }
    optimizer.load_state_dict(found)


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
