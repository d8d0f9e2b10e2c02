"""`observe` works scanned, under `jax.vmap`, in Flax, in chains and around transformations of
Optax, and its state goes where states go.

The oracle is the plain step, observed by itself.
"""

import csv
import io

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from helpers import QUICKLY, bits
from jax.sharding import PartitionSpec as P
from metric_oracles import check, expected, momentum
from observed import ALL, CODES, COURSE, EPS, PARAMS, RATE, STEPS, run, some

import adam_jax as aj


def test_a_history_outlives_the_state_it_is_from():
    tx = aj.observe(aj.adam(RATE), every=1)
    params = {"w": some((4, 3))}
    step = jax.jit(lambda state, grads: tx.update(grads, state, params)[1], donate_argnums=0)
    first = step(tx.init(params), params)
    look = aj.observations(first)
    step(first, params)
    assert float(look["all/gradient_norm"]) == pytest.approx(
        float(jnp.linalg.norm(params["w"])), rel=1e-6
    )


def test_jit_or_not_and_scanned_is_the_same():
    params, *course = ({"w": tree["w"]} for tree in (PARAMS, *COURSE))
    tx = aj.observe(aj.adam(RATE), every=2, sample=ALL)
    state = tx.init(params)

    def step(carry, grads):
        params, state = carry
        updates, state = tx.update(grads, state, params)
        with jax.numpy_dtype_promotion("standard"):
            params = optax.apply_updates(params, updates)
        return (params, state), aj.observations(state)

    stacked = jax.tree.map(lambda *x: jnp.stack(x), *course)
    _, scanned = jax.jit(lambda carry: jax.lax.scan(step, carry, stacked))((params, state))
    carry = params, state
    for t, grads in enumerate(course):
        with jax.disable_jit():
            carry, found = step(carry, grads)
        for name, value in found.items():
            np.testing.assert_allclose(scanned[name][t], value, rtol=1e-4, atol=1e-7, err_msg=name)


def test_an_ensemble_observes_each_member():
    tx = aj.observe(aj.adam(RATE), every=1, sample=ALL)
    params, grads = ({"w": some((3, 8, 5))} for _ in range(2))

    def look(params, grads):
        return aj.observations(tx.update(grads, tx.init(params), params)[1])

    alone, together = (jax.jit(its, compiler_options=QUICKLY) for its in (look, jax.vmap(look)))
    found = together(params, grads)
    for i in range(3):
        for name, value in alone(*jax.tree.map(lambda x, i=i: x[i], (params, grads))).items():
            np.testing.assert_allclose(found[name][i], value, rtol=1e-4, err_msg=name)


def test_in_flax():
    tx = aj.observe(aj.by_path({"bias": aj.adam(0.1)}, aj.adam(RATE)), every=1)
    model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    grads = nnx.grad(lambda model: jnp.sum(model(jnp.ones((2, 4)))))(model)
    with jax.disable_jit():
        optimizer.update(model, grads)
    found = {
        name: float(jnp.asarray(x[...])) for name, x in aj.observations(optimizer.opt_state).items()
    }
    arrays = {"kernel": np.full((4, 3), 2.0, np.float32), "bias": np.full(3, 2.0, np.float32)}
    np.testing.assert_allclose(found["bias/gradient_norm"], np.linalg.norm(arrays["bias"]))
    np.testing.assert_allclose(found["all/gradient_norm"], np.sqrt(15 * 4))
    np.testing.assert_allclose(found["bias/learning_rate_median"], 0.1 / 2)

    training = TrainState.create(apply_fn=None, params=arrays, tx=tx)
    with jax.disable_jit():
        training = training.apply_gradients(grads=arrays)
    np.testing.assert_allclose(
        aj.observations(training.opt_state)["default/learning_rate_median"], RATE / 2, rtol=1e-6
    )


@pytest.mark.parametrize(
    "inner", [optax.adam(RATE), optax.chain(optax.clip(0.5), aj.adam(RATE))], ids=["adam", "chain"]
)
@pytest.mark.usefixtures("standard_promotion")
def test_of_others_gradients_and_updates_are_seen(inner):
    params, *course = ({k: tree[k] for k in ("w", "b", "s")} for tree in (PARAMS, *COURSE))
    step = run(aj.observe(inner, every=1, sample=ALL), course, params, compiled=True)[-1]
    wanted = expected(step, STEPS, momentum, list(params))
    seen = ("gradient_norm", "update_rms", "update_ratio", "stalled_fraction")
    found = aj.observations(step[-1])
    check(found, {name: wanted[name] for name in seen}, rtol=1e-4)
    assert found.keys() == {"step", *(f"all/{name}" for name in seen)}


@pytest.mark.parametrize(
    "outer", [lambda tx: aj.chain(tx, aj.compensate()), optax.chain], ids=["ours", "optax"]
)
def test_inside_of_chains(outer):
    params, *course = ({"w": tree["w"]} for tree in (PARAMS, *COURSE))
    seen = aj.observe(aj.adam(RATE, eps=EPS), every=1, sample=ALL)
    alone, within = (aj.observations(run(tx, course, params)[-1][-1]) for tx in (seen, outer(seen)))
    assert alone.keys() == within.keys()
    for name, value in alone.items():
        np.testing.assert_allclose(within[name], value, rtol=1e-4, err_msg=name)


def test_a_history_is_a_csv():
    """As docs/diagnose.md writes it: names to columns, numbers that come back."""
    history = [
        jax.device_get(aj.observations(step[-1]))
        for step in run(aj.observe(aj.adam(RATE), every=1))
    ]
    file = io.StringIO()
    writer = csv.DictWriter(file, sorted(history[0]))
    writer.writeheader()
    writer.writerows(history)
    file.seek(0)
    back = list(csv.DictReader(file))
    assert [{name: np.float32(x) for name, x in row.items()} for row in back] == history


# Orbax of JAX 0.6's time warns that it takes the sharding from the checkpoint, as the template has
# none.
@pytest.mark.filterwarnings("ignore:Sharding info not provided when restoring:UserWarning")
def test_what_others_do_with_a_state(tmp_path):
    params, *course = ({k: tree[k] for k in ("w", "b")} for tree in (PARAMS, *COURSE))
    plain = aj.chain(aj.adam(RATE, storage=CODES), aj.compensate())
    tx = aj.observe(plain, every=2)
    state = run(tx, course, params, compiled=True)[-1][-1]
    inner = state.inner_state

    on = aj.convert_state(inner, plain, tx, params).state
    off = aj.convert_state(state, tx, plain, params).state
    assert bits(on.inner_state) == bits(off) == bits(inner)
    assert aj.observations(on)["step"] == 0

    more = aj.state_bytes(tx, params).total - aj.state_bytes(plain, params).total
    assert more == 4 * (1 + len(state.observed))

    mesh = jax.sharding.AbstractMesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    shardings = aj.state_shardings(tx, params, {"w": P("data"), "b": P()}, mesh=mesh)
    assert {its.spec for its in jax.tree.leaves((shardings.step, shardings.observed))} == {P()}
    assert sorted(map(str, jax.tree.leaves(shardings.inner_state))) == sorted(
        map(
            str,
            jax.tree.leaves(
                aj.state_shardings(plain, params, {"w": P("data"), "b": P()}, mesh=mesh)
            ),
        )
    )

    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", jax.eval_shape(tx.init, params))
    assert bits(restored) == bits(state)
