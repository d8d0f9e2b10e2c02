"""Gradients that arrive in another layout than the parameters and their state.

One process with eight devices that are this machine's CPU runs all cases and prints what it found:
this file, as a script.
"""

import json
import sys

import pytest
from helpers import on_eight_devices

CASES = ("adam", "adamw in 8 bits", "lamb")


@pytest.fixture(scope="module")
def found():
    return on_eight_devices(__file__)


@pytest.mark.parametrize("case", CASES)
def test_gradients_put_in_the_layout_of_the_parameters_give_the_same_bits(found, case):
    """E5: rows on each device, gradients by columns, and one line that puts them by rows.

    Without the line XLA may step in the layout of the gradients, where it contracts products and
    sums otherwise. docs/scaling-out.md says so.
    """
    assert found[case]["put"] == []


@pytest.mark.parametrize("case", CASES)
def test_without_it_they_are_the_same_but_for_last_digits(found, case):
    """E5."""
    assert found[case]["largest difference"] < 1e-5


# In a process with eight devices


def main():
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import Mesh, NamedSharding
    from jax.sharding import PartitionSpec as P

    import adam_jax as aj

    mesh = Mesh(np.array(jax.devices()), ("devices",))
    rows, columns = NamedSharding(mesh, P("devices")), NamedSharding(mesh, P(None, "devices"))
    rng = np.random.default_rng(0)
    start, *gradients = (jnp.asarray(rng.standard_normal((64, 256)), jnp.float32) for _ in range(6))

    def run(tx, at, gradients_at, *, put=False):
        params = start if at is None else jax.device_put(start, at)
        state = tx.init(params)
        placed = jax.tree.map(lambda x: x.sharding, (params, state))

        def step(params, state, gradient):
            if put:
                gradient = jax.lax.with_sharding_constraint(gradient, at)
            updates, state = tx.update(gradient, state, params)
            return aj.apply_updates(params, updates), state

        step = jax.jit(step, out_shardings=None if at is None else placed)
        for drawn in gradients:
            gradient = drawn if at is None else jax.device_put(drawn, gradients_at)
            params, state = step(params, state, gradient)
        return params, state

    found = {}
    for case, tx in zip(
        CASES, [aj.adam(1e-2), aj.adamw(1e-2, storage="8bit"), aj.lamb(1e-2)], strict=True
    ):
        alone, put = run(tx, None, None), run(tx, rows, columns, put=True)
        pairs = zip(jax.tree_util.tree_leaves_with_path(alone), jax.tree.leaves(put), strict=True)
        found[case] = {
            "put": [
                jax.tree_util.keystr(path)
                for (path, x), y in pairs
                if np.asarray(x).tobytes() != np.asarray(y).tobytes()
            ],
            "largest difference": float(
                np.abs(np.asarray(alone[0]) - np.asarray(run(tx, rows, columns)[0])).max()
            ),
        }
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main()
