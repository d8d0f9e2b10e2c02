"""A sample is close to the whole, and on eight devices it is the same.

The oracles are the metrics of whole arrays, and the run on one device. One process with eight
devices that are this machine's CPU runs both: this file, as a script.
"""

import functools
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
from helpers import moves
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from metric_oracles import adam, check, expected
from observed import EPS, RATE, gradients, joined, rms, run, some

import adam_jax as aj


def test_a_sample_is_close_to_the_whole():
    params = {"w": some((512, 700)), "v": some((300, 7, 40)), "b": some((700,), jnp.bfloat16, 3.0)}
    course = [gradients(params) for _ in range(3)]
    *_, step = run(
        aj.observe(aj.adam(RATE / 10, eps=EPS), every=1, sample=2**13),
        course,
        params,
        compiled=True,
    )
    slow = lambda *its: (made := adam(*its)) | {"rate": made["rate"] / 10}
    few, whole = aj.observations(step[-1]), expected(step, 3, slow, list(params))
    np.testing.assert_allclose(few["all/gradient_norm"], whole["gradient_norm"], rtol=1e-5)
    for name, value in whole.items():
        np.testing.assert_allclose(
            few.get(f"all/{name}", 0.0), value, rtol=0.06, atol=0.01, err_msg=name
        )
    np.testing.assert_raises(AssertionError, check, few, whole)


def test_a_leaf_counts_by_its_elements_not_by_its_sample():
    """A small leaf is seen whole, of the large one a thousandth."""
    params = {"large": jnp.zeros((1000, 100)), "small": jnp.ones(16)}
    grads = {"large": jnp.full((1000, 100), 1e-9), "small": jnp.ones(16)}
    tx = aj.observe(aj.adam(RATE, eps=1e-6), every=1, sample=100)
    step = run(tx, [grads], params, compiled=True)[0]
    found = aj.observations(step[-1])
    np.testing.assert_allclose(found["all/eps_fraction"], 1e5 / (1e5 + 16), rtol=1e-5)
    np.testing.assert_allclose(
        found["all/update_ratio"],
        rms(joined(step[3].values())) / np.sqrt(16 / (1e5 + 16)),
        rtol=1e-4,
    )


def test_of_many_leaves_in_codes_some_are_not_looked_at():
    """A scale for all of a leaf, whose rows are short: nothing of it was not how codes share it."""
    tx = aj.observe(aj.adam(0.1, storage=aj.storage.Codes(smallest=0)), every=1)
    params = {str(i): jnp.full((8, 2), 0.5) for i in range(40)}
    _, state = tx.update(params, tx.init(params), params)
    np.testing.assert_allclose(aj.observations(state)["all/gradient_norm"], 640**0.5 / 2, rtol=1e-5)


def test_on_eight_devices_it_sees_the_same_and_gathers_no_array():
    """Of means in float32 and of squares in 8 bits."""
    more = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    flags = f"{os.environ.get('XLA_FLAGS', '')} {more}"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, __file__],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    alone, cut, sizes = json.loads(done.stdout.splitlines()[-1])
    for name, value in alone.items():
        np.testing.assert_allclose(cut[name], value, rtol=1e-5, atol=1e-7, err_msg=name)
    assert alone["all/update_rms"] > 0
    assert max(sizes, default=0) <= 2 * SHARDED_SAMPLE


SHARDED_SAMPLE = 2**10


def main():
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
    params = {"w": some((256, 512)), "v": some((64, 1024)), "b": some((64,))}
    grads = [gradients(params) for _ in range(2)]
    tx = aj.observe(
        aj.adam(RATE, eps=EPS, storage=("float32", "8bit")), every=1, sample=SHARDED_SAMPLE
    )
    split = {"w": P("data"), "v": P(None, "data"), "b": P()}
    shardings = {name: NamedSharding(mesh, spec) for name, spec in split.items()}
    found = []
    for place, states in (
        (lambda tree: tree, None),
        (functools.partial(jax.device_put, device=shardings), shardings),
    ):
        held = place(params)
        out = None if states is None else aj.state_shardings(tx, held, states)
        state = jax.jit(tx.init, out_shardings=out)(held)
        update = jax.jit(tx.update, out_shardings=None if out is None else (states, out))
        compiled = update.lower(place(grads[0]), state, held).compile()
        for g in grads:
            _, state = compiled(place(g), state, held)
        found.append({name: float(x) for name, x in aj.observations(state).items()})
    found.append([size for _, size in moves(compiled.as_text())])
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
