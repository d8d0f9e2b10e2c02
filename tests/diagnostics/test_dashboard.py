"""`plot`: the lines are the numbers of the history."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import QUICKLY, ROOT

import adam_jax as aj
from adam_jax.diagnostics.plots import PANELS

pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def history():
    tx = aj.observe(aj.by_path({"b": {"weight_decay": 0.0}}, aj.adamw(1e-2)), every=2)
    params = {"w": jnp.ones((4, 3)), "b": jnp.ones(3)}

    @functools.partial(jax.jit, compiler_options=QUICKLY)
    def step(params, state, t):
        grads = jax.tree.map(lambda p: p + 0.1 * t, params)
        updates, state = tx.update(grads, state, params)
        return aj.apply_updates(params, updates), state

    state, looks = tx.init(params), []
    for t in range(7):
        looks.append(aj.observations(state))
        params, state = step(params, state, np.float32(t))
    return [*looks, aj.observations(state)]


def lines(figure, title):
    (axes,) = [axes for axes in figure.axes if axes.get_title().endswith("\n" + title)]
    return [line for line in axes.get_lines() if len(line.get_xdata()) > 2]


def test_lines_are_the_history(history):
    figure = aj.plot(history)
    looks = {int(look["step"]): look for look in history if look["step"]}
    assert sorted(looks) == [1, 3, 5, 7]
    for title, metric in [
        ("norm of the gradient", "gradient_norm"),
        ("RMS of g/√ν̂", "normalized_gradient_rms"),
    ]:
        for group, line in zip(("all", "b", "default"), lines(figure, title), strict=True):
            np.testing.assert_array_equal(line.get_xdata(), [1, 3, 5, 7])
            np.testing.assert_array_equal(
                line.get_ydata(), [float(looks[t][f"{group}/{metric}"]) for t in sorted(looks)]
            )
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["all", "b", "default"]


def test_each_look_is_drawn_once_in_order(history):
    shuffled = aj.plot(history[::-1] + history)
    (first,) = lines(aj.plot(history, groups=["all"]), "RMS of the update")
    assert np.array_equal(lines(shuffled, "RMS of the update")[0].get_ydata(), first.get_ydata())


def test_what_a_run_has_not_is_left_out(history):
    titles = {axes.get_title().split("\n")[0] for axes in aj.plot(history).axes}
    assert "gradient_norm" in titles
    assert not titles & {"skipped", "saturated_fraction", "stalled_fraction"}


def test_zero_is_seen_on_a_logarithmic_axis(history):
    """A dead layer's gradient is."""
    dead = [look | {"b/gradient_norm": 0.0} for look in history]
    drawn = lines(aj.plot(dead), "norm of the gradient")
    assert [line.get_marker() for line in drawn] == [".", "v", "."]
    np.testing.assert_array_equal(drawn[1].get_xdata(), [1, 3, 5, 7])


def test_what_is_not_finite_is_left_out(history):
    broken = [
        look | {"all/gradient_norm": np.inf if look["step"] == 3 else look["all/gradient_norm"]}
        for look in history
    ]
    (line,) = lines(aj.plot(broken, groups=["all"]), "norm of the gradient")
    np.testing.assert_array_equal(line.get_xdata(), [1, 5, 7])


def test_of_looks_that_differ_the_later_one_is_drawn(history):
    """D14: a run that went back to a checkpoint repeats steps, and may differ in last digits."""
    again = history[-1] | {"all/gradient_norm": 3.0}
    with pytest.warns(UserWarning, match="two looks at step 7 that differ; expected .* later one"):
        figure = aj.plot([*history, again], groups="all")
    assert lines(figure, "norm of the gradient")[0].get_ydata()[-1] == 3.0
    aj.plot([*history, history[-1] | {"loss": 1.0}, history[-1] | {"loss": 2.0}])  # one look


def test_loss_and_learning_rate_are_drawn_if_they_are_there(history):
    """D14: also where they are only at some looks."""
    more = [
        look | ({"loss": 0.5 * i} if i % 2 else {}) | {"learning_rate": 0.1, "b/learning_rate": 0.2}
        for i, look in enumerate(history)
        if look["step"]
    ]
    figure = aj.plot(more)
    assert [axes.get_title().split("\n")[0] for axes in figure.axes[:2]] == [
        "loss",
        "learning_rate",
    ]
    loss, rates = (axes.get_lines() for axes in figure.axes[:2])
    (loss,) = loss
    assert loss.get_ydata().tolist() == [0.5 * i for i in (1, 3, 5, 7)]
    assert [set(line.get_ydata()) for line in rates] == [{0.1}, {0.2}]
    known = {axes.get_title().split("\n")[0] for axes in aj.plot(history).axes}
    assert not known & {"loss", "learning_rate"}


def test_what_is_not_drawn_is_said(history):
    """D14."""
    other = [look | {"epoch": 1, "head/.*/weight_decay": 0.1} for look in history]
    with pytest.warns(UserWarning, match=r"found 'epoch', 'head/\.\*/weight_decay' in the history"):
        figure = aj.plot(other)
    assert len(figure.axes) == len(aj.plot(history).axes)


def test_ranges_of_healthy_runs_are_those_of_the_page():
    """D14."""
    page = (ROOT / "docs" / "diagnose.md").read_text()
    rows = {row.split("`")[1]: row.split("|")[2] for row in page.splitlines() if row[:3] == "| `"}
    for panel in PANELS:
        if panel.healthy is not None:
            low, high = panel.healthy
            says = {f"{low:g} to {high:g}", f"< {high:g}", f"> {low:g}"}
            says.add(f"{low:.0e} to {high:.0e}".replace("e-0", "e-"))
            assert rows[panel.metrics[0]].strip() in says, panel


def test_refused(history):
    with pytest.raises(ValueError, match="plot: found no look in the history"):
        aj.plot(history[:1])
    with pytest.raises(ValueError, match="plot: found no look in the history"):
        aj.plot([])
    for groups in (["head"], "head", [], 3):
        with pytest.raises(
            ValueError, match=r"groups: found .*; expected one or some of \['all', 'b', 'default'\]"
        ):
            aj.plot(history, groups=groups)
    for wrong, says in {"history": "found str", 1: "found int"}.items():
        with pytest.raises(TypeError, match=f"{says}; expected a list of what observations"):
            aj.plot(wrong)
    for wrong, says in [
        (1.0, "found float at place 1"),
        ({"loss": 1.0}, "found the names loss at place 1"),
        ({}, r"the names \(none\)"),
    ]:
        with pytest.raises(TypeError, match=says):
            aj.plot([history[-1], wrong])
    for wrong, says in [
        ("x", "'x' as 'all/gradient_norm'"),
        (None, "None as"),
        (np.ones(3), r"an array of shape \(3,\) as"),
    ]:
        with pytest.raises(
            TypeError, match=f"plot: found {says}.* at place 0 of the history; expected a number"
        ):
            aj.plot([{"step": 1, "all/gradient_norm": wrong}])
