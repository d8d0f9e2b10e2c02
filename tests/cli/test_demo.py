"""The demo trains every optimizer, sweeps learning rates, and writes a table and a figure.

The oracles are a run with one rate alone, and Flax.
"""

import io
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_demo import IMAGES, table

import adam_jax
from adam_jax._cli import demo
from adam_jax._cli.choices import OPTIMIZERS
from adam_jax._cli.course import GOAL, RATES
from adam_jax._cli.data import check, read
from adam_jax._cli.main import main
from adam_jax._cli.network import convolve
from adam_jax._cli.setting import batches, prepare

pytest.importorskip("rich")


def test_digits_with_the_default_optimizers(demonstrate, quick):
    out, figure = demonstrate("--steps", 40)
    assert list(table(out)) == ["sgd", "momentum", "rmsprop", "adam"]
    assert all(float(rate.strip("*")) in RATES for rate, *_ in table(out).values())
    assert "\x1b" not in out
    assert out.startswith("sgd: compiling 10 rates\nsgd: trying 10 rates\n")
    assert "best rate" in out
    assert figure.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    width, height = (int.from_bytes(figure.read_bytes()[at : at + 4], "big") for at in (16, 20))
    assert width >= 1200
    assert height >= 600


@pytest.mark.slow
def test_every_member_trains_and_is_drawn(demonstrate, write, quick):
    out, figure = demonstrate(
        "--data",
        write(),
        "--optimizers",
        ",".join(OPTIMIZERS),
        "--learning-rate",
        0.01,
        "--steps",
        2,
        output="all.svg",
    )
    rows = table(out)
    assert list(rows) == ["sgd", *adam_jax.family.__all__]
    assert {row[0] for row in rows.values()} == {"0.01"}
    assert all(np.isfinite(float(row[1])) for row in rows.values())
    assert b"<svg" in figure.read_bytes()


def test_adam_learns(write):
    setting = prepare(read(write()), steps=30, batch_size=16, seed=0, sweeps=True)
    course = demo.run(adam_jax.adam, setting, None, lambda *_: None)
    assert course.loss < 0.2 * course.losses[0]
    assert course.accuracy == course.accuracies[-1] == 1.0
    assert course.steps[0] == 0
    assert course.steps[-1] == 30
    assert course.accuracies[course.steps.index(course.steps_to_goal)] >= GOAL
    assert course.seconds > 0


def test_all_start_alike_and_repeat_exactly(write, quick):
    setting = prepare(read(write()), steps=5, batch_size=16, seed=3, sweeps=False)
    first, again = (demo.run(adam_jax.adam, setting, 0.01, lambda *_: None) for _ in range(2))
    other = demo.run(adam_jax.rmsprop, setting, 0.01, lambda *_: None)
    assert first.losses == again.losses
    assert first.losses[0] == other.losses[0]
    assert first.losses[-1] != other.losses[-1]


def test_the_convolution_is_that_of_flax():
    images = jax.random.normal(jax.random.key(0), (2, 6, 5, 3))
    ours, flax = nn.Conv(4, (3, 3), conv_general_dilated=convolve), nn.Conv(4, (3, 3))

    @jax.jit
    def both():
        params = flax.init(jax.random.key(1), images)
        return ours.apply(params, images), flax.apply(params, images)

    np.testing.assert_allclose(*both(), rtol=1e-5, atol=1e-5)


def test_the_sweep_trains_each_rate_as_it_would_alone(write, quick):
    """Mapped over rates, training ends where it ends with one of them."""
    setting = prepare(read(write()), steps=4, batch_size=16, seed=0, sweeps=True)
    order = batches(setting, setting.fit)
    begin, advance = demo._trainer(adam_jax.adam, setting.network)
    rates = jnp.array([1e-3, 1e-2, 1e-1])
    data = *map(jnp.asarray, setting.data[:2]), order, 0, 4
    together = jax.vmap(lambda rate: advance(begin(setting.params, rate), rate, *data)[0])(rates)
    alone = advance(begin(setting.params, rates[1]), rates[1], *data)[0]
    for many, one in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(many[1], one, rtol=1e-3, atol=1e-5)


def test_the_sweep_does_not_look_at_test_images(write, quick):
    chosen = {
        demo.sweep(
            OPTIMIZERS["sgd"],
            prepare(read(write(y_test=labels)), 8, 16, 0, sweeps=True),
            lambda *_: None,
        )
        for labels in (IMAGES["y_test"], 1 - IMAGES["y_test"])
    }
    assert len(chosen) == 1


def test_rates_that_diverge_lose(write, quick, monkeypatch):
    monkeypatch.setattr(demo, "RATES", (1e-3, 1e-2, 1e37))
    setting = prepare(read(write()), 8, 16, 0, sweeps=True)
    assert demo.run(OPTIMIZERS["sgd"], setting, None, lambda *_: None).rate == 1e-2


def test_divergence_is_reported(demonstrate, write):
    out, _ = demonstrate("--data", write(), "--optimizers", "sgd", "--learning-rate", 1e37)
    assert table(out)["sgd"][:2] == ["1e+37", "diverged"]


def test_the_edge_of_the_sweep_is_reported(demonstrate, write, quick, monkeypatch):
    monkeypatch.setattr(demo, "RATES", (1e-5, 1e-2))
    out, _ = demonstrate("--data", write(), "--optimizers", "sgd")
    assert table(out)["sgd"][0] == "0.01*"
    assert "sgd (largest)" in out


@pytest.mark.parametrize("dtype", [np.uint8, np.float16, np.float64])
def test_images_of_any_number_are_scaled_alike(write, dtype):
    changed = {name: IMAGES[name].astype(dtype)[..., None] for name in ("x_train", "x_test")}
    found, expected = read(write(**changed)), read(write())
    assert np.abs(found.x_train).max() == 1
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def test_large_images_are_halved():
    images = np.random.default_rng(0).random((4, 35, 40, 3))
    data = check(images, np.array([0, 1, 0, 1]), images, np.array([0, 1, 0, 1]))
    assert data.x_train.shape == (4, 8, 10, 3)
    assert abs(data.x_train.mean() * images.max() - images[:, :32].mean()) < 1e-6


def test_a_terminal_gets_bars(demonstrate, write, quick, monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    demonstrate("--data", write(), "--optimizers", "adam", "--learning-rate", 0.01)
    assert "\x1b[" in screen.getvalue()
    assert "100%" in screen.getvalue()
    assert "adam" in screen.getvalue()


def test_list_shows_every_member_with_its_description(capsys):
    assert main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["sgd", *adam_jax.family.__all__]
    for line in lines:
        name, description = line.split(maxsplit=1)
        assert description == OPTIMIZERS[name].__doc__.splitlines()[0]
