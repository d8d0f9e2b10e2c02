"""Settings and fixtures of all tests: strict promotion, one compilation cache per run, other
settings, a training loop.
"""

import ctypes
import gc
import os
import re
import shutil
import sys
import tempfile
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import pytest

# What several tests share is in modules beside them, whose asserts say as much as those of tests.
TESTS = Path(__file__).parent
modules = {path.stem for path in TESTS.rglob("*.py") if not path.stem.startswith(("test_", "conf"))}
pytest.register_assert_rewrite(*modules)

OURS = "ADAM_JAX_TESTS_CACHE"

# Processes that tests start find the helpers, whatever folder a test is in.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")]))

# The workers of a run, and the processes that tests start, share what they compile. It begins empty
# and ends with the run. Not with JAX 0.6: what it reads back has forgotten which arguments were
# donated, and parameters stay what they were.
shares = tuple(map(int, version("jax").split(".")[:2])) >= (0, 10)
made = tempfile.mkdtemp(prefix="adam_jax-tests-") if shares and OURS not in os.environ else None
if made is not None:
    os.environ[OURS] = os.environ["JAX_COMPILATION_CACHE_DIR"] = made
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import jax  # noqa: E402  (reads what is set above)
import numpy as np  # noqa: E402
import optax  # noqa: E402
from helpers import has_float16  # noqa: E402

import adam_jax  # noqa: E402

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_unconfigure(config):
    if made is not None:
        shutil.rmtree(made, ignore_errors=True)


def pytest_xdist_auto_num_workers(config):
    """One test by itself starts no workers, which would take longer to start than most
    tests take.
    """
    if len(config.args) == 1 and "::" in config.args[0]:
        config.option.dist = "no"
        return 0
    return None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Skips tests that need float16 on a processor for which XLA cannot compile it, such as one
    without F16C.
    """
    report = yield
    missing = report.failed and re.search(
        "__(extendhfsf2|truncsfhf2)|Failed to materialize symbols", str(call.excinfo.value)
    )
    if missing and not has_float16():
        report.outcome = "skipped"
        report.longrepr = (
            str(item.path),
            item.location[1],
            "Skipped: XLA cannot compile float16 for this processor",
        )
    return report


LONGEST = {
    f"test_{name}": i
    for i, name in enumerate(
        (
            "demo",
            "metrics",
            "stored_training",
            "skipped_steps",
            "transforms",
            "fuzz",
            "sharded_steps",
            "long_runs",
            "observe_places",
        )
    )
}


def pytest_addoption(parser):
    parser.addoption(
        "--optimized", action="store_true", help="compile as users' programs are compiled"
    )
    parser.addoption(
        "--thin", type=int, default=1, metavar="N", help="of each test's parameters run one in N"
    )


def pytest_collection_modifyitems(config, items):
    seen = Counter()
    kept, dropped = [], []
    for item in items:
        test = item.nodeid.partition("[")[0]
        (dropped if seen[test] % config.getoption("--thin") else kept).append(item)
        seen[test] += 1
    # A worker takes one file after the other, so the long ones go first.
    items[:] = sorted(kept, key=lambda item: LONGEST.get(item.path.stem, len(LONGEST)))
    config.hook.pytest_deselected(items=dropped)


@pytest.fixture(autouse=True, scope="module")
def compiling(request):
    """Compiles with less work of LLVM, because most programs run once. Files that compute for long
    say OPTIMIZED.

    Drops a file's programs behind it, because they serve no other file. Kept, they are gigabytes by
    the end."""
    optimized = request.config.getoption("--optimized") or getattr(
        request.module, "OPTIMIZED", False
    )
    jax.config.update("jax_disable_most_optimizations", not optimized)
    yield
    jax.clear_caches()
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


@pytest.fixture(params=adam_jax.family.__all__)
def member(request):
    """Each member of the family in turn: the function that makes it."""
    return getattr(adam_jax, request.param)


@pytest.fixture
def x64():
    with jax.enable_x64(True) if hasattr(jax, "enable_x64") else jax.experimental.enable_x64():
        yield


@pytest.fixture
def standard_promotion():
    """For wrappers of others, which mix dtypes and ranks themselves."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture
def train():
    """(tx, params, data, loss) -> (params, state) after one jitted scan over `data`."""

    def run(tx, params, data, loss):
        def step(carry, batch):
            params, state = carry
            updates, state = tx.update(jax.grad(loss)(params, batch), state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.jit(lambda: jax.lax.scan(step, (params, tx.init(params)), data)[0])()

    return run


@pytest.fixture
def agree():
    """(found, expected, **tolerances): equal structures, and leaves that are close; a state's other
    types do not matter.
    """

    def check(found, expected, **tolerances):
        assert jax.tree.structure(found) == jax.tree.structure(expected)
        for (path, left), right in zip(
            jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True
        ):
            np.testing.assert_allclose(
                left, right, err_msg=jax.tree_util.keystr(path), **tolerances
            )

    return check
