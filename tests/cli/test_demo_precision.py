"""Storage and precision reach the demo's run.

The oracle is the run in float32.
"""

import jax
import jax.numpy as jnp
import pytest
from small_demo import Hidden, Kept, save

from adam_jax._cli import choices, demo
from adam_jax._cli import setting as shared
from adam_jax._cli.choices import OPTIMIZERS
from adam_jax._cli.data import read
from adam_jax._cli.setting import prepare

pytest.importorskip("rich")


def dtypes(tree):
    return {str(leaf.dtype) for leaf in jax.tree.leaves(tree)}


@pytest.fixture(scope="module")
def low(tmp_path_factory):
    """By precision the course of a run, and the arrays at its end, at a rate whose steps a bfloat16
    cannot hold.
    """
    data, found = read(save(tmp_path_factory.mktemp("low") / "images.npz")), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared, "Network", Hidden)
        for precision, (dtype, _) in choices.PRECISIONS.items():
            setting = prepare(data, 100, 16, 0, sweeps=False, dtype=dtype)
            kept, make = (
                Kept(),
                choices.factory("adam", choices.storage("bfloat16, 8bit"), precision),
            )
            found[precision] = demo.run(make, setting, 3e-5, lambda *_: None, kept), kept.carry
    return found


@pytest.mark.parametrize("precision", choices.PRECISIONS)
def test_storage_and_precision_reach_the_run(low, precision):
    dtype, links = choices.PRECISIONS[precision]
    params, state = low[precision][1]
    assert dtypes(params) == {jnp.dtype(dtype).name}
    stages = state[0] if links else state
    assert stages[0].mu["params"]["Dense_1"]["kernel"].dtype == jnp.bfloat16
    assert stages[0].nu["params"]["Dense_1"]["kernel"].dtype == jnp.uint8
    assert ("int16" in dtypes(state[1:]) if links else False) == (
        precision == "bfloat16-compensated"
    )


def test_compensated_parameters_follow_float32_ones_and_nearest_ones_stay_behind(low):
    losses = {
        precision: course.losses[0] - course.losses[-1] for precision, (course, _) in low.items()
    }
    assert losses["bfloat16"] < 0.5 * losses["float32"]
    assert losses["bfloat16-stochastic"] == pytest.approx(losses["float32"], rel=0.3)
    assert losses["bfloat16-compensated"] == pytest.approx(losses["float32"], rel=0.1)


@pytest.mark.parametrize("storage", ["bfloat16", "8bit", "float32,8bit"])
def test_every_member_takes_every_storage_and_precision(storage):
    params = {"w": jnp.ones((64, 64), jnp.bfloat16)}
    for name in OPTIMIZERS:
        tx = choices.factory(name, choices.storage(storage), "bfloat16-compensated")(
            jnp.float32(0.01)
        )
        jax.eval_shape(lambda p, tx=tx: tx.update(p, tx.init(p), p), params)
