"""A run that is observed is the same to the bit, copies nothing, and compiles nothing more.

The oracle is the run that is not observed.
"""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import QUICKLY, bits
from metric_oracles import adam, expected
from observed import CODES, COURSE, PARAMS, RATE, gradients, run, some

import adam_jax as aj
from adam_jax.diagnostics import sampling


def test_it_looks_at_the_first_step_and_every_so_many_after_it():
    tx = aj.observe(aj.adam(RATE), every=3)
    state = tx.init(PARAMS)
    assert {float(x) for x in aj.observations(state).values()} == {0.0}
    steps = run(tx, [gradients() for _ in range(8)])
    found = [aj.observations(step[-1]) for step in steps]
    assert [int(its["step"]) for its in found] == [1, 1, 1, 4, 4, 4, 7, 7]
    np.testing.assert_allclose(
        found[5]["all/gradient_norm"], expected(steps[3], 4, adam)["gradient_norm"], rtol=1e-5
    )
    assert bits(found[3]) == bits(found[5]) != bits(found[6])


@contextlib.contextmanager
def compilations():
    """The names of what JAX compiles."""
    found = []

    def note(name, seconds, **more):
        if "backend_compile" in name:
            found.append(name)

    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        yield found
    finally:
        jax.monitoring.clear_event_listeners()


def test_outside_of_jit_nothing_compiles_after_the_first_step():
    """D1: with and without an observation, an extra argument that changes, and groups."""
    groups = aj.by_path({"h": {"eps": 1e-6}}, default=aj.adam(1e-2))
    tx = aj.chain(aj.observe(aj.skip_nonfinite(groups), every=2))
    params, gradient = ({name: tree[name] for name in "wh"} for tree in (PARAMS, COURSE[0]))
    state, seen = tx.init(params), []
    with compilations() as found:
        for t in range(5):
            first = len(found)
            updates, state = tx.update(
                gradient, state, params, value=float(t), value_fn=some, gradient=gradient
            )
            params = aj.apply_updates(params, updates)
            seen.append(aj.observations(state))
            if t == 0:
                assert len(found) > first  # the listener hears of compilations
            elif t > 1:
                assert found[first:] == []
    assert [int(its["step"]) for its in seen] == [1, 1, 3, 3, 5]
    changed = seen[0]["all/update_rms"] != seen[2]["all/update_rms"]
    assert changed
    copies = [its["all/gradient_norm"] for its in seen]
    assert len({x.unsafe_buffer_pointer() for x in copies}) == len(copies)


LINKS = {
    "plain": lambda tx: tx,
    "rounded": lambda tx: aj.chain(tx, aj.round_stochastically()),
    "compensated": lambda tx: aj.chain(tx, aj.compensate()),
    "guarded": lambda tx: aj.skip_nonfinite(aj.chain(tx, aj.stages.average_parameters(0.9))),
}


@pytest.mark.parametrize(
    ("link", "storage"),
    [
        ("plain", "8bit"),
        ("rounded", "bfloat16"),
        ("compensated", "float32"),
        ("guarded", "float32"),
    ],
)
def test_a_run_that_is_observed_is_the_same_to_the_bit(link, storage):
    tx = LINKS[link](aj.adamw(RATE, storage=CODES if storage == "8bit" else storage))
    params, *course = ({k: tree[k] for k in ("w", "b")} for tree in (PARAMS, *COURSE))
    plain, seen = (
        run(its, course, params, compiled=True, options=None)
        for its in (tx, aj.observe(tx, every=2))
    )
    for one, other in zip(plain, seen, strict=True):
        assert bits(one[3]) == bits(other[3])
        assert bits(one[4]) == bits(other[4].inner_state)


def test_a_guard_outside_holds_what_was_seen():
    poison = COURSE[1] | {"w": COURSE[1]["w"].at[0, 0].set(jnp.nan)}
    course = [COURSE[0], poison, COURSE[1]]
    plain = run(aj.skip_nonfinite(aj.adam(RATE)), course)
    seen = run(aj.skip_nonfinite(aj.observe(aj.adam(RATE), every=1)), course)
    assert bits(plain[-1][3]) == bits(seen[-1][3])
    assert [int(aj.observations(step[-1])["step"]) for step in seen] == [1, 1, 2]


def step_of(tx):
    def step(params, state, gradients):
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(step, donate_argnums=(0, 1))


def test_off_it_is_not_there(monkeypatch):
    tx = aj.skip_nonfinite(aj.by_path({"b": {"weight_decay": 0.0}}, aj.adamw(RATE)))
    assert aj.observe(tx, every=0) is tx
    params = {"w": PARAMS["w"], "b": PARAMS["s"]}
    arguments = params, tx.init(params), params
    text = step_of(tx).lower(*arguments).as_text()

    def never(*_):
        raise AssertionError("a probe where nothing observes")

    for hook in ("__init__", "before", "end", "group"):
        monkeypatch.setattr(sampling.Probe, hook, never)
    lowered = step_of(tx).lower(*arguments)
    assert lowered.as_text() == text
    assert len(jax.tree.leaves(lowered.out_info)) == len(jax.tree.leaves(arguments[:2]))
    assert not any(word in text for word in ("stablehlo.case", "stablehlo.if"))


@pytest.mark.parametrize(
    ("guard", "storage"),
    [(lambda tx: tx, "8bit"), (aj.skip_nonfinite, "float32")],
    ids=["plain", "guarded"],
)
def test_on_it_copies_nothing(guard, storage):
    """Temporary bytes of the compiled, donated step, against those of the step that is not
    observed.
    """
    params = {"w": jax.ShapeDtypeStruct((1000, 1000), jnp.float32)}

    def temporary(tx):
        compiled = (
            step_of(tx).lower(params, jax.eval_shape(tx.init, params), params).compile(QUICKLY)
        )
        return compiled.memory_analysis().temp_size_in_bytes

    summed = (
        jax.jit(lambda x: jnp.sum(x * x))
        .lower(params["w"])
        .compile()
        .memory_analysis()
        .temp_size_in_bytes
    )
    if summed > 10**5:
        pytest.skip("this version of XLA makes an array of all that it sums on a CPU")
    tx = guard(aj.adam(1e-3, storage=storage))
    assert temporary(aj.observe(tx, sample=2**10)) <= temporary(tx) + 1e5  # 8-bit moments are 1e6
