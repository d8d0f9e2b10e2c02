"""The ends of the road: counts at their limit, ten thousand steps, what the package never does,
what hostile input has found.
"""

import ast
import functools
import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import QUICKLY

import adam_jax as aj

OPTIMIZED = True  # it computes for longer than it compiles

LAST = 2**31 - 1
PACKAGE = Path(aj.__file__).parent


def start():
    draw = np.random.default_rng(0).standard_normal
    params = {"w": jnp.asarray(draw((3, 2)), jnp.float32), "b": jnp.asarray(draw(3), jnp.bfloat16)}
    return params, jax.tree.map(lambda p: p * jnp.asarray(0.5, p.dtype), params)


# Counts


def counts(state):
    """The step counts in a state, by path."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {
        jax.tree_util.keystr(path): leaf
        for path, leaf in leaves
        if leaf.dtype == jnp.int32 and leaf.shape == ()
    }


def counted(state, count):
    """The state of someone who has counted that far."""
    return jax.tree.map(
        lambda x: jnp.int32(count) if x.dtype == jnp.int32 and x.shape == () else x, state
    )


COUNTS = (LAST - 1, LAST, -1, 0, -(2**31))


@functools.cache
def counting():
    """By first count and name: updates and states of three steps; one program for all members, and
    for links behind one.
    """
    params, grads = start()
    links = (
        aj.stages.cautious(),
        aj.stages.clip_update_rms(),
        aj.round_stochastically(),
        aj.stages.average_parameters(0.9),
    )
    txs = {name: getattr(aj, name)(0.1) for name in aj.family.__all__} | {
        "links": aj.chain(aj.adam(0.1), *links)
    }

    @functools.partial(jax.jit, compiler_options=QUICKLY)
    def update(states):
        return {name: tx.update(grads, states[name], params) for name, tx in txs.items()}

    def states(found):
        return {name: state for name, (_, state) in found.items()}

    first, found = states(update({name: tx.init(params) for name, tx in txs.items()})), {}
    for count in COUNTS:
        steps = [update(counted(first, count))]
        for _ in range(2):
            steps.append(update(states(steps[-1])))
        found[count] = jax.device_get(steps)
    return found


@pytest.mark.parametrize("name", [*aj.family.__all__, "links"])
def test_a_count_saturates_and_all_stays_finite(name):
    for count in COUNTS:
        for step, found in enumerate(counting()[count], 1):
            updates, state = found[name]
            assert len(counts(state)) > (1 if name == "links" else 0)
            assert {int(found) for found in counts(state).values()} == {min(count + step, LAST)}
            assert all(
                np.isfinite(np.asarray(x, np.float32)).all()
                for x in jax.tree.leaves((updates, state))
            )


@pytest.mark.parametrize("count", [LAST - 1, -1, 0])
def test_weights_do_not_know_the_count(count):
    """After n steps they are 1 − βⁿ, whatever the count says; and so is all that is divided by
    them.
    """
    tx = aj.adam(1.0, 0.5, 0.75, 0.0)
    grad = jnp.asarray([3.0, -2.0])
    _, state = tx.update(grad, tx.init(grad))
    state = counted(state, count)
    for n in (2, 3):
        updates, state = tx.update(grad, state)
        np.testing.assert_array_equal(state[0].weights, [[1 - 0.5**n, 1 - 0.75**n], [0, 0]])
        np.testing.assert_allclose(updates, [-1, 1], rtol=1e-6)


def test_the_parts_that_count_take_their_limits_for_what_they_are():
    """By hand:

    ADOPT clips to t^¼ and takes a count of 0, and only that, for its first step, at which it stands
    still.
    """
    tx, grad = aj.adopt(1.0, 0.5, 0.75, 0.0), jnp.asarray([3.0, -2.0])
    _, first = tx.update(grad, tx.init(grad))
    for count, moves, nu_weight in [(LAST - 1, True, 1.0), (-1, True, 1.0), (0, False, 1.0)]:
        updates, state = tx.update(grad, counted(first, count))
        # d = g/|g|, which a limit of 0 clips: counts below 0 have the limit of 0.
        np.testing.assert_allclose(
            updates, [-0.5, 0.5] if moves and count > 0 else [0, 0], rtol=1e-6
        )
        assert state[0].weights[0, 0] == nu_weight


# Memory


@pytest.mark.parametrize("donated", [True, False])
def test_ten_thousand_steps_leak_nothing(donated):
    """No array more than at the start, and not 200 bytes a step of anything else: in one of three
    thousands at least, because the rest of the process has memory of its own.
    """
    tx = aj.chain(aj.adamw(1e-3, storage=aj.storage.Codes(smallest=0)), aj.round_stochastically())
    params, grads = start()
    state = tx.init(params)

    def step(params, state):
        updates, state = tx.update(grads, state, params)
        with jax.numpy_dtype_promotion("standard"):
            return optax.apply_updates(params, updates), state

    jitted = jax.jit(step, donate_argnums=(0, 1) if donated else ())

    def run(steps):
        nonlocal params, state
        for _ in range(steps):
            params, state = jitted(params, state)
        jax.block_until_ready(state)
        gc.collect()
        return len(jax.live_arrays()), resident()

    arrays, memory = zip(*(run(steps) for steps in (1000, 3000, 3000, 3000)), strict=True)
    assert len(set(arrays)) == 1
    assert min(np.diff(memory)) < 200 * 3000
    assert int(state[0][0].count) == 10_000


def resident():
    """Bytes of memory that the process has, by Linux's count; 0 elsewhere."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else 0


def test_a_thousand_equal_transformations_compile_once_and_leave_nothing():
    params, grads = start()
    traces = []

    def step(tx, params, state):
        traces.append(tx)
        return tx.update(grads, state, params)

    jitted = jax.jit(step, static_argnums=0)

    def make():
        return aj.chain(
            aj.adamw(1e-3, b1=0.8, mask={"w": True, "b": False}, storage="8bit"),
            aj.stages.average_parameters(0.9),
        )

    state = make().init(params)
    jitted(make(), params, state)
    gc.collect()
    before = len(gc.get_objects())
    for _ in range(1000):
        jitted(make(), params, state)
    gc.collect()
    assert len(traces) == jitted._cache_size() == 1
    assert len(gc.get_objects()) - before < 500  # half an object each


# What the package never does

USE = '''
import sys, os, json
import jax, jax.numpy as jnp, numpy as np, optax, optax.contrib
jax.jit(lambda x: x + 1)(1.0)  # whatever JAX opens for itself, it has opened

PACKAGE = sys.argv[1]
found, listening = [], True

def ours(frame):
    return frame.f_code.co_filename.startswith(PACKAGE)

def hook(event, args):
    if not listening:
        return
    if event == "open":
        mode, flags = args[1] or "", args[2] or 0
        bad = set(str(mode)) & set("wax+") or flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    elif event in ("compile", "exec"):
        # NamedTuple and dataclass make their methods so: called by the package, not in it
        bad = ours(sys._getframe(1))
    elif event.startswith("sys._getframe") or event.startswith("object."):
        return
    else:
        modules = "socket", "pickle", "marshal", "subprocess", "urllib", "ctypes", "shutil"
        calls = "system", "exec", "posix_spawn", "fork", "remove", "rename", "mkdir", "rmdir"
        first, _, call = event.partition(".")
        bad = first in modules or (first == "os" and call in calls)
        bad = bad and event != "marshal.loads"  # importing
    frame = sys._getframe(1) if bad else None
    while frame is not None:
        if ours(frame):
            found.append(event)
            return
        frame = frame.f_back

sys.addaudithook(hook)
import adam_jax as aj

params = {"w": jnp.ones((3, 2)), "b": jnp.ones(3, jnp.bfloat16)}
from adam_jax.stages import average_parameters, cautious, clip_update_rms
links = (cautious(), clip_update_rms(), aj.round_stochastically(), average_parameters(0.9))
for name in aj.family.__all__:
    tx = aj.chain(getattr(aj, name)(0.1), *links)
    state = tx.init(params)
    step = jax.jit(tx.update) if name == "adam" else lambda *args: jax.eval_shape(tx.update, *args)
    step(params, state, params)
    repr(tx), hash(tx), tx == tx.stages[0], str(aj.state_bytes(tx, params))
    aj.hyperparameters(state, tx), aj.stages.averaged_parameters(state)
    try:
        tx.update({"w": jnp.ones(3)}, state, params)
    except ValueError:
        pass
said = list(found)
control = """
import io, os, pickle, socket, fractions
data = pickle.dumps(fractions.Fraction(1, 2))
writes, evaluates = lambda: open(os.devnull, 'w').close(), lambda: eval('1')
for act in (writes, evaluates, lambda: pickle.loads(data), lambda: socket.socket().close()):
    act()
"""
act = compile(control, PACKAGE + "/planted.py", "exec")
exec(act)
listening = False
print(json.dumps({"said": said, "control": found[len(said):]}))
'''


def test_it_evaluates_no_string_unpickles_nothing_opens_no_socket_and_writes_no_file():
    """Python's own audit hook listens while every member is imported, made, run and printed."""
    command = [sys.executable, "-B", "-c", USE, str(PACKAGE)]
    # JAX's compilation cache is a file, and would be written while the package calls.
    environment = {
        name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"
    }
    environment["JAX_PLATFORMS"] = "cpu"
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    heard = json.loads(done.stdout.splitlines()[-1])
    assert heard["said"] == []
    assert {"open", "compile", "exec", "pickle.find_class", "socket.__new__"} <= set(
        heard["control"]
    )


NEVER = {
    "eval", "exec", "compile", "__import__", "open", "pickle", "marshal", "shelve", "dill",
    "joblib", "socket", "ssl", "http", "urllib", "requests", "subprocess", "ctypes", "system",
    "popen", "write_text", "write_bytes",
}  # fmt: skip
ASKED = {"options.py": {"open"}, "data.py": {"open"}}
"""What a user asks for: the demo's figure, whose file is opened before the work is done, and its
data."""


def test_its_source_names_none_of_that():
    for path in sorted(PACKAGE.rglob("*.py")):
        named = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                named |= {part for alias in node.names for part in alias.name.split(".")}
            elif isinstance(node, ast.ImportFrom):
                named |= {*(node.module or "").split("."), *(alias.name for alias in node.names)}
            elif isinstance(node, ast.Name):
                named.add(node.id)
            elif isinstance(node, ast.Attribute) and node.attr != "compile":  # of a jitted function
                named.add(node.attr)
        assert named & NEVER == ASKED.get(path.name, set()), path


# What hostile input has found


def test_a_tree_that_is_one_integer_or_nothing_passes(member):
    """Its ν is `None`, which is not to say that none is tracked."""
    tx = member(0.1)
    for params in (jnp.arange(3), (None,), optax.MaskedNode(), {}):
        grads = jax.tree.map(lambda p: np.zeros(p.shape, jax.dtypes.float0), params)
        updates, _ = tx.update(grads, tx.init(params), params)
        assert jax.tree.structure(updates) == jax.tree.structure(params)
        assert not any(map(np.any, jax.tree.leaves(updates)))


def test_radam_with_a_falling_b2_is_finite():
    """ν then holds squares of more steps than the new b2 ever would, and the rectification was the
    root of a negative number.
    """
    tx, grad = aj.radam(1.0, b2=lambda t: jnp.where(t < 1000, 0.99, 0.5)), jnp.asarray([3.0, -2.0])
    state = jax.lax.scan(
        lambda state, _: (tx.update(grad, state)[1], None), tx.init(grad), length=1000
    )[0]
    updates, state = tx.update(grad, state)
    # rho_inf is 2/(1 − 0.5) − 1 = 3, too short for ν to be trusted: the update is the mean
    # gradient.
    np.testing.assert_allclose(updates, -grad, rtol=1e-5)


def test_adopt_with_a_wrapped_count_is_finite():
    """The fourth root of a count below 0 was NaN, and with it the limit that the update is clipped
    to.
    """
    tx, grad = aj.adopt(0.1), jnp.asarray([3.0, -2.0])
    _, state = tx.update(grad, tx.init(grad))
    for _ in range(3):
        updates, state = tx.update(grad, counted(state, -1))
        assert np.isfinite(updates).all()


def test_adopt_clips_a_complex_leaf_beside_a_float64_one(x64):
    """Its limit is a float64 there, and strict promotion mixes no dtypes."""
    tx = aj.adopt(0.1)
    params = {"narrow": jnp.ones(2, jnp.complex64), "wide": jnp.ones(2, jnp.float64)}
    _, state = tx.update(params, tx.init(params), params)
    updates, _ = tx.update(params, state, params)
    # d = 1 in both, unclipped at the second step; a tenth of it, the mean's share, times the rate.
    assert updates["narrow"].dtype == jnp.complex64
    np.testing.assert_allclose(updates["narrow"], [-0.01, -0.01], rtol=1e-6)
    np.testing.assert_allclose(updates["wide"], [-0.01, -0.01], rtol=1e-6)


def test_codes_of_float64_moments_stay_finite(x64):
    """A ν beyond float32 was stored as the code of an infinity, and was NaN a step later."""
    tx = aj.adam(0.1, 0.1, 0.5, storage=aj.storage.Codes(smallest=0))
    for dtype in (jnp.float64, jnp.complex128):
        grad = jnp.full(3, 1e200, dtype)
        step = lambda state, _, grad=grad: tx.update(grad, state)[::-1]
        assert np.isfinite(jax.lax.scan(step, tx.init(grad), length=9)[1]).all()


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_a_huge_update_is_shortened_to_the_threshold(decay):
    """Squares of updates beyond 2⁶³ are infinite, and the step was 0 or NaN.

    Decay of huge parameters makes such updates.
    """
    params = jnp.asarray([1.5e38, -1.5e38, 0.75e38])
    tx = aj.chain(aj.adamw(0.1, weight_decay=decay), aj.stages.clip_update_rms())
    updates, _ = tx.update(jnp.ones(3), tx.init(params), params)
    # By hand: 2, -2 and 1 in units of their root mean square, √3.
    direction = np.array([-2, 2, -1]) / 3**0.5 if decay else -np.ones(3)
    np.testing.assert_allclose(updates, 0.1 * direction, rtol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.complex64])
def test_lamb_with_parameters_close_to_the_largest_number(dtype):
    """The quotient of the norms was infinite, and so was the size of a complex number before any
    sum.
    """
    size = 2e38 if dtype == jnp.float32 else 2e38 + 3e38j
    params = jnp.asarray([size, -size, 0.5 * size], dtype)
    tx = aj.lamb(0.1, eps_root=1e-8)
    updates, _ = jax.jit(tx.update)(0.1 * jnp.ones(3, dtype), tx.init(params), params)
    assert np.isfinite(updates).all()
    bound = 0.1 * min(
        float(np.linalg.norm(np.asarray(params, complex))), float(np.finfo(np.float32).max)
    )
    np.testing.assert_allclose(np.linalg.norm(np.asarray(updates, complex)), bound, rtol=1e-5)
