"""Where in a chain a stage that rounds can stand, and what an average of its parameters holds.

The expected messages are written out here; the oracle of an average is the path of the parameters.
"""

import jax
import numpy as np
import optax
import pytest
from rounded import LINKS, RATE, descent, f32, grads_of, small_params, walk

import adam_jax as aj


def large_grads_of(params, steps):
    """With these parameters move by more than their size, and a difference of two has more bits
    than either.
    """
    return [jax.tree.map(lambda g: (16 * g).astype(g.dtype), g) for g in grads_of(params, steps)]


@pytest.mark.parametrize(
    "wrap",
    [lambda link: optax.masked(link, {"w": True, "b": False}), optax.chain],
    ids=["masked", "optax.chain"],
)
def test_a_chain_refuses_what_it_cannot_see(link, wrap):
    tx = aj.chain(aj.scale_by_learning_rate(RATE), wrap(link))
    with pytest.raises(
        ValueError, match="at position 1 holds a link that rounds parameters.*optax.chain"
    ):
        tx.init(small_params())


ORDERS = {
    "optax.scale": lambda link: aj.chain(aj.adam(0.1), link, optax.scale(0.5)),
    "optax.clip": lambda link: aj.chain(aj.adam(0.1), link, optax.clip(0.5)),
    "optax.identity": lambda link: aj.chain(link, optax.identity()),
    "decay": lambda link: aj.chain(
        aj.adam(0.1), link, aj.add_decayed_weights(0.1, learning_rate=0.1)
    ),
    "clip_update_rms": lambda link: aj.chain(aj.adam(0.1), link, aj.stages.clip_update_rms(0.5)),
    "cautious": lambda link: aj.chain(aj.adam(0.1), link, aj.stages.cautious()),
    "stochastic": lambda link: aj.chain(aj.adam(0.1), link, aj.round_stochastically()),
    "compensate": lambda link: aj.chain(aj.adam(0.1), link, aj.compensate()),
    "behind the average": lambda link: aj.chain(
        aj.adam(0.1), link, aj.stages.average_parameters(0.9), optax.scale(1.0)
    ),
    "nested": lambda link: aj.chain(aj.chain(aj.adam(0.1), aj.chain(link)), optax.scale(0.5)),
    "nested both": lambda link: aj.chain(aj.chain(aj.adam(0.1), link), aj.chain(optax.scale(0.5))),
}


@pytest.mark.parametrize("order", ORDERS)
def test_nothing_follows_that_could_change_the_updates(link, order):
    with pytest.raises(
        ValueError,
        match=r"chain: .* at position \d comes after .*, whose updates must reach the parameters",
    ):
        ORDERS[order](link)


def test_an_error_of_order_names_both_and_where_they_stand(link):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        aj.chain(optax.clip(1.0), aj.adam(0.1), link, aj.stages.cautious())
    assert str(error.value) == (
        f"chain: cautious() at position 3 comes after {link} at position 2, whose updates must "
        "reach the parameters as they are. Put it before."
    )


@pytest.mark.parametrize(
    "build",
    [
        lambda link: aj.chain(link, aj.adam(0.1)),
        lambda link: aj.chain(
            aj.track_moments(), aj.scale_by_moments(), link, aj.scale_by_learning_rate(0.1)
        ),
        lambda link: aj.chain(aj.chain(link), aj.scale_by_learning_rate(0.1)),
    ],
    ids=["before a member", "before the rate", "nested"],
)
def test_it_does_not_stand_before_the_learning_rate(link, build):
    with pytest.raises(
        ValueError,
        match="is right only after the learning rate was applied, but .* comes later. Move it "
        "behind",
    ):
        build(link)


def test_it_does_not_take_moments(link):
    with pytest.raises(ValueError, match="takes plain updates, but .* gives Moments"):
        aj.chain(aj.track_moments(), link)


@pytest.mark.parametrize(
    "build",
    [
        lambda average, link: aj.chain(aj.adam(0.1), average, link),
        lambda average, link: aj.chain(aj.adam(0.1), aj.chain(average), link),
        lambda average, link: aj.chain(aj.adam(0.1), average, aj.chain(link)),
        lambda average, link: aj.chain(aj.adam(0.1), aj.chain(average, link)),
    ],
    ids=["flat", "average nested", "link nested", "both nested"],
)
def test_the_average_does_not_stand_before_it(link, build):
    with pytest.raises(
        ValueError,
        match=r"average_parameters\(decay=0.9\).* reads the updates .* rounded later. Move it last",
    ):
        build(aj.stages.average_parameters(0.9), link)


@pytest.mark.parametrize(
    "build",
    [
        lambda tx: tx,
        lambda tx: aj.chain(aj.adam(0.1), tx),
        lambda tx: optax.chain(optax.sgd(0.1), tx),
    ],
    ids=["alone", "chain", "optax.chain"],
)
def test_without_params(link, build):
    params = small_params()
    tx = build(link)
    caller = "round_stochastically" if link is LINKS["stochastic"] else "compensate"
    with pytest.raises(ValueError) as error:  # noqa: PT011
        tx.update(params, tx.init(params))
    expected = (
        f"{caller}() needs the parameters, and `update` was called without: call update(grads, "
        "state, params)."
    )
    assert str(error.value) == expected


AVERAGED = {
    "flat": lambda link, average: aj.chain(aj.scale_by_learning_rate(RATE), link, average),
    "around": lambda link, average: aj.chain(
        aj.chain(aj.scale_by_learning_rate(RATE), link), average
    ),
    "within": lambda link, average: aj.chain(
        aj.scale_by_learning_rate(RATE), aj.chain(link, average)
    ),
    "all within": lambda link, average: aj.chain(
        optax.identity(), aj.chain(aj.scale_by_learning_rate(RATE), link, average)
    ),
    "optax.chain": lambda link, average: optax.chain(
        aj.chain(aj.scale_by_learning_rate(RATE), link), average
    ),
}


@pytest.mark.parametrize("order", AVERAGED)
def test_the_average_is_of_what_the_parameters_become(link, order, standard_promotion):
    params = small_params()
    grads = large_grads_of(params, 7)
    path, state = walk(AVERAGED[order](link, aj.stages.average_parameters(0.75)), params, grads)
    weights = 0.75 ** np.arange(7.0)[::-1]
    expected = np.tensordot(
        weights / weights.sum(), [f32(p["w"]).astype(float) for p in path[1:]], 1
    )
    np.testing.assert_allclose(
        aj.stages.averaged_parameters(state)["w"], expected, rtol=1e-5, atol=1e-6
    )
    np.testing.assert_array_equal(
        f32(path[-1]["w"]), f32(walk(descent(link), params, grads)[0][-1]["w"])
    )
