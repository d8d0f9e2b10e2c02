"""Random runs are the same, sharded or not: to the bit, but where a number is a sum over a leaf.

The oracle is the run on one device. One process with four devices that are this machine's CPU runs
both: this file, as a script. `pytest -m fuzz` takes hundreds of new examples.
"""

import os
import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn_runs import FOUND_AS_IT_IS, LENIENT, OUR_LINKS, assert_same, moved, ready, start
from helpers import QUICKLY
from hostile import cases
from hostile_bounds import bound
from hostile_values import gradients, is_integer
from hypothesis import given, settings

CUT_SHAPES = ((8,), (), (4, 8), (16, 1, 4), (4, 0), (40,))
"""Most of them can be laid out over four devices."""


def check_in_another_process(examples, derandomize):
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-W", "error", __file__, str(examples), str(int(derandomize))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
    assert done.stdout.splitlines()[-1] == f"{examples} examples"


def test_sharded_or_not_is_the_same_to_the_bit():
    check_in_another_process(4, derandomize=True)


@pytest.mark.fuzz
def test_hundreds_of_layouts_are_the_same():
    check_in_another_process(200, derandomize=False)


def adds_up(case):
    """Whether a number of it is a sum over a leaf: XLA chooses the order of its terms."""
    return case.member in ("lamb", "adam_mini") or bool(
        {"clip_update_rms", "clip_by_global_norm"} & set(case.links)
    )


def check_layout(case):
    """Where a number is a sum over a leaf, its terms are added in another order: there up to
    rounding.
    """
    sums = adds_up(case)
    with ready(case):
        params, state, step = start(case)
        mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(2, 2), ("x", "y"))
        specs = {
            (8,): ("x",),
            (4, 8): ("x", "y"),
            (16, 1, 4): (("x", "y"),),
            (4, 0): ("y",),
            (40,): (("y", "x"),),
        }

        def place(x):
            if x.dtype == jax.dtypes.float0:
                return x
            return jax.device_put(
                x,
                jax.sharding.NamedSharding(
                    mesh, jax.sharding.PartitionSpec(*specs.get(x.shape, ()))
                ),
            )

        compiled = jax.jit(step, compiler_options=QUICKLY)
        one, other = (params, state), jax.tree.map(place, (params, state))
        history = []
        for t in range(4):
            grads = gradients(case, t)
            history.append((one[0], grads))
            (updates, after), (theirs, their_after) = (
                compiled(*one, grads),
                compiled(*other, jax.tree.map(place, grads)),
            )
            if sums:
                columns = [jax.tree.leaves(tree) for pair in history for tree in pair]
                for i, leaf in enumerate(jax.tree.leaves(case.tree)):
                    a, b = (
                        np.asarray(jax.tree.leaves(u)[i]).astype(np.complex128)
                        for u in (updates, theirs)
                    )
                    most = (
                        0
                        if is_integer(leaf)
                        else bound(
                            case,
                            leaf,
                            t,
                            [c[i] for c in columns[::2]],
                            [c[i] for c in columns[1::2]],
                        )
                    )
                    info = jnp.finfo("float32" if is_integer(leaf) else leaf.dtype)
                    np.testing.assert_allclose(a, b, rtol=float(info.eps) * 8, atol=1e-4 * most)
            else:
                assert_same((updates, after), (theirs, their_after), "sharded")
            one = moved(one[0], updates), after
            other = jax.tree.map(
                place, (one[0] if sums else moved(other[0], theirs), after if sums else their_after)
            )


def main(examples, derandomize):
    done = []
    warnings.filterwarnings("ignore", ".*rounds nothing")  # as pytest does

    @settings(max_examples=examples, derandomize=derandomize, **FOUND_AS_IT_IS, **LENIENT)
    @given(cases(CUT_SHAPES, most=2, links=("clip_by_global_norm", *OUR_LINKS)))
    def layouts(case):
        check_layout(case)
        done.append(case)

    layouts()
    assert len(done) >= examples
    sys.stdout.write(f"{examples} examples\n")


if __name__ == "__main__":
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    main(int(sys.argv[1]), sys.argv[2] == "1")
