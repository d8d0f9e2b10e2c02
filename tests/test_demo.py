"""The command line: what it trains, what it writes, and what it says when something is wrong."""

import io
import re
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import adam_jax
from adam_jax import demo
from adam_jax.__main__ import OPTIMIZERS, main

pytest.importorskip("rich")

IMAGES = {
    # Two classes of 6×5 pixels, bright on the left or on the right, in the order of their labels as files often are.
    f"{kind}_{split}": array
    for split, n in (("train", 80), ("test", 20))
    for kind, array in (
        (
            "x",
            np.random.default_rng(n).integers(0, 100, (n, 6, 5))
            + 150 * (np.arange(5) < 2) * (np.arange(n) < n // 2)[:, None, None],
        ),
        ("y", (np.arange(n) >= n // 2).astype(np.int64)),
    )
}


@pytest.fixture
def write(tmp_path):
    """Writes IMAGES with some arrays replaced, or left out where None, and returns the path."""

    def save(**changed):
        path = tmp_path / "images.npz"
        np.savez(path, **{name: array for name, array in (IMAGES | changed).items() if array is not None})
        return path

    return save


@pytest.fixture
def quick(monkeypatch):
    """One dense layer instead of the network, which takes seconds to compile for each optimizer."""

    class Dense(nn.Module):
        classes: int

        @nn.compact
        def __call__(self, images):
            return nn.Dense(self.classes)(images.reshape(len(images), -1))

    monkeypatch.setattr(demo, "Network", Dense)


@pytest.fixture
def demonstrate(tmp_path, capsys):
    """Runs the command line in a few steps; gives what it printed and the path of the figure."""

    def call(*arguments, output="figure.png"):
        path = tmp_path / output
        assert main(["--steps", "12", "--batch-size", "16", "--output", str(path), *map(str, arguments)]) == 0
        printed = capsys.readouterr()
        assert printed.err == ""
        return printed.out, path

    return call


@pytest.fixture
def refusal(tmp_path, capsys, monkeypatch):
    """Runs the command line on wrong arguments; gives its one line on stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "run", lambda *_: pytest.fail("it went on to train"))

    def call(*arguments):
        with pytest.raises(SystemExit) as stopped:
            main(list(map(str, arguments)))
        printed = capsys.readouterr()
        assert stopped.value.code == 2
        assert printed.out == ""
        assert re.fullmatch(r"adam_jax: error: [^\n]+\n", printed.err)
        return printed.err

    return call


def table(out):
    """The rows of the table, by optimizer."""
    rows = re.split(r"\n\n", out)[1].splitlines()[1:]
    return {cells[0]: cells[1:] for cells in map(str.split, rows)}


def test_digits_with_the_default_optimizers(demonstrate, quick):
    out, figure = demonstrate()
    assert list(table(out)) == ["sgd", "momentum", "rmsprop", "adam"]
    assert all(float(rate.strip("*")) in demo.RATES for rate, *_ in table(out).values())
    assert "\x1b" not in out
    assert out.startswith("sgd: compiling 10 rates\nsgd: trying 10 rates\n")
    assert "best rate" in out
    assert figure.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    width, height = (int.from_bytes(figure.read_bytes()[at : at + 4], "big") for at in (16, 20))
    assert width >= 1200
    assert height >= 600


def test_every_member_trains_and_is_drawn(demonstrate, write, quick):
    out, figure = demonstrate(
        "--data", write(), "--optimizers", ",".join(OPTIMIZERS), "--learning-rate", 0.01, "--steps", 2, output="all.svg"
    )
    rows = table(out)
    assert list(rows) == ["sgd", *adam_jax.family.__all__]
    assert {row[0] for row in rows.values()} == {"0.01"}
    assert all(np.isfinite(float(row[1])) for row in rows.values())
    assert b"<svg" in figure.read_bytes()


def test_adam_learns(write):
    setting = demo.prepare(demo.read(write()), steps=30, batch_size=16, seed=0, sweeps=True)
    course = demo.run(adam_jax.adam, setting, None, lambda *_: None)
    assert course.loss < 0.2 * course.losses[0]
    assert course.accuracy == course.accuracies[-1] == 1.0
    assert course.steps[0] == 0
    assert course.steps[-1] == 30
    assert course.accuracies[course.steps.index(course.steps_to_goal)] >= demo.GOAL
    assert course.seconds > 0


def test_all_start_alike_and_repeat_exactly(write, quick):
    setting = demo.prepare(demo.read(write()), steps=5, batch_size=16, seed=3, sweeps=False)
    first, again = (demo.run(adam_jax.adam, setting, 0.01, lambda *_: None) for _ in range(2))
    other = demo.run(adam_jax.rmsprop, setting, 0.01, lambda *_: None)
    assert first.losses == again.losses
    assert first.losses[0] == other.losses[0]
    assert first.losses[-1] != other.losses[-1]


def test_the_convolution_is_that_of_flax():
    images = jax.random.normal(jax.random.key(0), (2, 6, 5, 3))
    ours, flax = nn.Conv(4, (3, 3), conv_general_dilated=demo._convolve), nn.Conv(4, (3, 3))
    params = flax.init(jax.random.key(1), images)
    np.testing.assert_allclose(ours.apply(params, images), flax.apply(params, images), rtol=1e-5, atol=1e-5)


def test_the_sweep_trains_each_rate_as_it_would_alone(write, quick):
    """Mapped over rates, training ends where it ends with one of them."""
    setting = demo.prepare(demo.read(write()), steps=4, batch_size=16, seed=0, sweeps=True)
    order = demo._batches(setting, setting.fit)
    begin, advance = demo._trainer(adam_jax.adam, setting.network)
    rates = jnp.array([1e-3, 1e-2, 1e-1])
    data = *map(jnp.asarray, setting.data[:2]), order, 0, 4
    together = jax.vmap(lambda rate: advance(begin(setting.params, rate), rate, *data)[0])(rates)
    alone = advance(begin(setting.params, rates[1]), rates[1], *data)[0]
    for many, one in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(many[1], one, rtol=1e-3, atol=1e-5)


def test_the_sweep_does_not_look_at_test_images(write, quick):
    chosen = {
        demo.sweep(adam_jax.adam, demo.prepare(demo.read(write(y_test=labels)), 8, 16, 0, sweeps=True), lambda *_: None)
        for labels in (IMAGES["y_test"], 1 - IMAGES["y_test"])
    }
    assert len(chosen) == 1


def test_rates_that_diverge_lose(write, monkeypatch):
    monkeypatch.setattr(demo, "RATES", (1e-3, 1e-2, 1e37))
    setting = demo.prepare(demo.read(write()), 8, 16, 0, sweeps=True)
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
    found, expected = demo.read(write(**changed)), demo.read(write())
    assert np.abs(found.x_train).max() == 1
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def test_large_images_are_halved():
    images = np.random.default_rng(0).random((4, 35, 40, 3))
    data = demo.check(images, np.array([0, 1, 0, 1]), images, np.array([0, 1, 0, 1]))
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


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--optimizers", "adm"), "did you mean adam?"),
        (("--optimizers", "adam-mini"), "did you mean adam_mini?"),
        (("--optimizers", "lbfgs"), "known are sgd, adam"),
        (("--optimizers", ","), "no name"),
        (("--steps", 0), "--steps: found 0"),
        (("--steps", "many"), "--steps: invalid int"),
        (("--batch-size", 0), "--batch-size: found 0"),
        (("--batch-size", 1151), "at most the 1150 training images (287 more"),
        (("--batch-size", 1438, "--learning-rate", 0.1), "at most the 1437 training images"),
        (("--learning-rate", 0), "--learning-rate: found 0"),
        (("--learning-rate", "nan"), "--learning-rate: found nan"),
        (("--learning-rate", "inf"), "--learning-rate: found inf"),
        (("--learning-rate", "1e39"), "--learning-rate: found 1e+39"),
        (("--seed", -1), "--seed: found -1"),
        (("--output", "figure.txt"), "ends in .png"),
        (("--output", "nowhere/figure.png"), "No such file or directory"),
        (("--output", "/proc/figure.png"), "cannot write '/proc/figure.png'"),
        (("--data", "nowhere.npz"), "nowhere.npz: No such file"),
        (("--data", "."), "Is a directory"),
        (("--data", __file__), "not an .npz file"),
        (("--rate", 1), "unrecognized arguments"),
    ],
)
def test_wrong_options(refusal, arguments, says):
    assert says in refusal(*arguments)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"y_test": None, "x_test": None}, "no array x_test, y_test"),
        ({"y_train": np.arange(7)}, "80 images in x_train but 7 labels"),
        ({"x_test": np.ones((20, 6, 6))}, "x_test: found images of shape (6, 6); expected (6, 5)"),
        ({"x_train": np.ones((80, 30))}, "x_train: found shape (80, 30)"),
        ({"x_train": np.ones((80, 3, 8))}, "4x4 pixels"),
        ({"x_train": np.ones((0, 6, 5)), "y_train": np.ones(0, int)}, "x_train: found shape (0, 6, 5)"),
        ({"x_train": np.full((80, 6, 5), np.nan)}, "x_train: found pixels that are NaN"),
        ({"x_test": np.full((20, 6, 5), "a")}, "x_test: found dtype <U1"),
        ({"x_test": np.full((20, 6, 5), None)}, "Object arrays"),
        ({"y_train": IMAGES["y_train"] / 2}, "y_train: found dtype float64"),
        ({"y_train": IMAGES["y_train"][:, None]}, "y_train: found shape (80, 1)"),
        ({"y_train": IMAGES["y_train"] - 1}, "y_train: found label -1"),
        ({"y_train": IMAGES["y_train"] * 10**9}, "2 classes, the highest 1000000000"),
        ({"y_train": IMAGES["y_train"] * 0}, "1 classes"),
        ({"y_test": IMAGES["y_test"] + 1}, "y_test: found label 2"),
    ],
)
def test_wrong_data(refusal, write, changed, says):
    assert says in refusal("--data", write(**changed), "--batch-size", 16)


def test_a_damaged_file(refusal, write):
    path = write()
    content = bytearray(path.read_bytes())
    content[200:300] = bytes(100)
    path.write_bytes(content)
    assert "images.npz" in refusal("--data", path)


def test_without_the_extras(refusal, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "flax", None)
    assert 'flax not installed; run, in its folder: pip install -e ".[demo]"' in refusal()
    assert main(["--list"]) == 0
    assert capsys.readouterr().out


def test_checking_leaves_the_output_as_it_was(refusal, tmp_path):
    old = tmp_path / "old.png"
    old.write_bytes(b"kept")
    refusal("--output", old, "--data", "nowhere.npz")
    refusal("--output", tmp_path / "new.png", "--data", "nowhere.npz")
    assert old.read_bytes() == b"kept"
    assert not (tmp_path / "new.png").exists()
