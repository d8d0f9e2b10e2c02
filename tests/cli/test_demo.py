"""The command line: what it trains, what it writes, and what it says when something is wrong."""

import contextlib
import functools
import io
import json
import os
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import ROOT, TESTS, same

import adam_jax
from adam_jax._cli import choices, demo
from adam_jax._cli import setting as shared
from adam_jax._cli.choices import OPTIMIZERS
from adam_jax._cli.course import GOAL, RATES
from adam_jax._cli.data import check, digits, read
from adam_jax._cli.main import main
from adam_jax._cli.network import convolve
from adam_jax._cli.setting import batches, prepare

pytest.importorskip("rich")

IMAGES = {
    # Two classes of 6×5 pixels, bright on the left or on the right, in the order of their labels as
    # files often are.
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


def save(path, **changed):
    """Writes IMAGES with some arrays replaced, or left out where None, and returns the path."""
    np.savez(
        path, **{name: array for name, array in (IMAGES | changed).items() if array is not None}
    )
    return path


@pytest.fixture
def write(tmp_path):
    return functools.partial(save, tmp_path / "images.npz")


class Dense(nn.Module):
    """One dense layer instead of the network, which takes seconds to compile for each optimizer."""

    classes: int

    @nn.compact
    def __call__(self, images):
        return nn.Dense(self.classes)(images.reshape(len(images), -1))


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(demo, "Network", Dense)


@pytest.fixture
def demonstrate(tmp_path, capsys):
    """Runs the command line in a few steps; gives what it printed and the path of the figure."""

    def call(*arguments, output="figure.png"):
        path = tmp_path / output
        assert (
            main(
                ["--steps", "12", "--batch-size", "16", "--output", str(path), *map(str, arguments)]
            )
            == 0
        )
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
        (
            ("--storage", "4bit"),
            "--storage: found '4bit'; expected float32, bfloat16, 8bit, or two",
        ),
        (("--storage", "8bit,8bit,8bit"), "--storage: found"),
        (("--storage", ""), "--storage: found ''"),
        (
            ("--precision", "float16"),
            "--precision: found 'float16'; expected float32, bfloat16, bfloat16-stochastic",
        ),
        (("--devices", 0), "--devices: found 0"),
        (("--checkpoint-every", 0), "--checkpoint-every: found 0"),
        (("--resume",), "--resume: found no --checkpoint-dir"),
        (("--checkpoint-every", 4), "--checkpoint-every: found no --checkpoint-dir"),
        (("--checkpoint-dir", ""), "--checkpoint-dir: found ''; expected the name of a directory"),
        (("--log-dir", " "), "--log-dir: found ' '; expected the name of a directory"),
        (("--checkpoint-dir", __file__), "--checkpoint-dir: cannot write in"),
        (("--log-dir", "/proc/logs"), "--log-dir: cannot write in '/proc/logs': No such file"),
        (
            ("docter",),
            "command: found 'docter'; did you mean doctor? known are train, describe, doctor",
        ),
        (("train", "--steps", 0), "--steps: found 0"),
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
        (
            {"x_train": np.ones((0, 6, 5)), "y_train": np.ones(0, int)},
            "x_train: found shape (0, 6, 5)",
        ),
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


# Low precision, devices


class Hidden(nn.Module):
    classes: int

    @nn.compact
    def __call__(self, images):
        return nn.Dense(self.classes)(nn.relu(nn.Dense(256)(images.reshape(len(images), -1))))


@pytest.fixture
def wide(monkeypatch):
    """A hidden layer of enough elements that `storage` narrows its moments."""
    monkeypatch.setattr(demo, "Network", Hidden)


class Kept:
    """Keeps what the last save was given, and hands all on to another keeper if there is one."""

    def __init__(self, inner=None):
        self.inner = inner
        self.progress = inner.progress if inner else None

    def load(self, like):
        return self.inner.load(like)

    def save(self, carry, progress, last):
        self.carry = carry
        if self.inner:
            self.inner.save(carry, progress, last)


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


DEVICES = """
import sys
import jax
from pathlib import Path
from adam_jax._cli import choices, demo
from adam_jax._cli.data import read
from adam_jax._cli import setting as shared
from adam_jax._cli.setting import prepare
from adam_jax._cli.main import main
from adam_jax._cli.options import check_devices

tests, path, output = {paths!r}
check_devices(2)
sys.path.insert(0, tests)
from test_demo import Hidden, Kept

shared.Network = Hidden
courses = []
for devices in (1, 2):
    setting = prepare(read(Path(path)), 10, 16, 0, sweeps=False, devices=devices)
    kept = Kept()
    make = choices.factory("adam", "float32", "float32")
    courses.append(demo.run(make, setting, 0.01, lambda *_: None, kept))
params, state = kept.carry
assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(params))
kernel = state[0].nu["params"]["Dense_1"]["kernel"]
assert len(kernel.sharding.device_set) == 2, kernel.sharding
assert not kernel.sharding.is_fully_replicated, kernel.sharding
one, two = courses
assert all(abs(a - b) < 1e-3 * b for a, b in zip(one.losses, two.losses, strict=True)), (one, two)
assert main(["--data", path, "--devices", "2", "--batch-size", "16", "--steps", "2",
             "--optimizers", "adam", "--learning-rate",
             "0.01", "--output", output]) == 0
"""
THERE = """
import jax
from adam_jax._cli.options import check_devices

assert len(jax.devices()) == 2
check_devices(2)
"""


def alone(code, **environment):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", **environment}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_on_two_devices_the_state_is_cut_and_the_losses_are_those_of_one(write, tmp_path):
    """Of devices that JAX makes when it is asked for two."""
    alone(DEVICES.format(paths=(str(TESTS / "cli"), str(write()), str(tmp_path / "a.png"))))


def test_devices_that_are_there_will_do():
    alone(THERE, XLA_FLAGS="--xla_force_host_platform_device_count=2")


def test_more_devices_than_there_are(refusal):
    there = len(jax.devices())  # now it is too late for more
    says = (
        f"--devices: found 1000; there are {there} (cpu). CPUs can be cut into as many: set "
        "JAX_PLATFORMS=cpu XLA_FLAGS="
    )
    assert says in refusal("--devices", 1000)


def test_a_batch_that_devices_cannot_share_is_refused(write):
    with pytest.raises(
        ValueError, match="--batch-size: found 16; expected a multiple of the 3 devices"
    ):
        prepare(read(write()), 2, 16, 0, sweeps=False, devices=3)


# Checkpoints


class Interrupted(Exception):
    pass


@pytest.fixture
def keep(tmp_path):
    """A run in which something may go wrong at a step, kept in a directory; the course, and the
    arrays at its end.
    """
    pytest.importorskip("orbax.checkpoint")
    from adam_jax._cli.checkpoints import checkpoints

    def run(make, setting, rate, directory=None, resume=False, fails=None):
        def tell(doing, done):
            if (
                fails is not None
                and doing.startswith("training")
                and done - (rate is None) * setting.steps >= fails
            ):
                raise Interrupted

        if directory is None:
            kept = Kept()
            return demo.run(make, setting, rate, tell, kept), kept.carry
        with checkpoints(tmp_path / directory, {"steps": setting.steps}, 4, resume) as inner:
            kept = Kept(inner)
            return demo.run(make, setting, rate, tell, kept), kept.carry

    return run


def alike(ours, theirs):
    """Every number of the courses but the time, and every bit of the arrays."""
    assert ours[0]._replace(seconds=0) == theirs[0]._replace(seconds=0)
    same(ours[1], theirs[1])


@pytest.mark.parametrize(
    ("name", "storage", "precision"),
    [
        ("adamw", "8bit", "bfloat16-stochastic"),
        ("amsgrad", "bfloat16,8bit", "bfloat16-compensated"),
    ],
)
def test_an_interrupted_run_ends_with_the_same_bits(write, wide, keep, name, storage, precision):
    dtype, _ = choices.PRECISIONS[precision]
    setting = prepare(read(write()), 14, 16, 0, sweeps=False, dtype=dtype)
    make = choices.factory(name, choices.storage(storage), precision)
    for fails in (7, 10):
        with pytest.raises(Interrupted):
            keep(make, setting, 0.01, "run", resume=fails > 7, fails=fails)
    alike(keep(make, setting, 0.01, "run", resume=True), keep(make, setting, 0.01))


def test_a_state_without_codes_is_kept_too(write, quick, keep):
    """Its scales are an array without elements, of which Orbax takes none."""
    setting = prepare(read(write()), 8, 16, 0, sweeps=False)
    make = choices.factory("adam", "8bit", "float32")
    with pytest.raises(Interrupted):
        keep(make, setting, 0.01, "run", fails=5)
    alike(keep(make, setting, 0.01, "run", resume=True), keep(make, setting, 0.01))


def test_the_rate_that_a_sweep_chose_is_kept(write, quick, keep, monkeypatch):
    setting = prepare(read(write()), 8, 16, 0, sweeps=True)
    make = OPTIMIZERS["sgd"]
    whole = keep(make, setting, None)
    with pytest.raises(Interrupted):
        keep(make, setting, None, "run", fails=0)
    monkeypatch.setattr(demo, "sweep", lambda *_: pytest.fail("it sweeps again"))
    alike(keep(make, setting, None, "run", resume=True), whole)


class Logged(NamedTuple):
    directory: Path
    options: list
    out: str
    courses: list


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    """A run that is kept and logged, for all tests that look at one; its options, what it printed,
    and its courses.
    """
    pytest.importorskip("orbax.checkpoint")
    pytest.importorskip("tensorboardX")
    directory, courses, run = tmp_path_factory.mktemp("logged"), [], demo.run
    data = save(directory / "images.npz")
    options = [
        "--data",
        data,
        "--optimizers",
        "sgd,adam",
        "--learning-rate",
        0.01,
        "--log-dir",
        directory / "logs",
    ]
    options += ["--checkpoint-every", 4, "--checkpoint-dir", directory / "runs"]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
        patch.setattr(demo, "Network", Dense)
        patch.setattr(demo, "run", lambda *its: courses.append(run(*its)) or courses[-1])
        numbers = ["--steps", "12", "--batch-size", "16", "--output", str(directory / "figure.png")]
        assert main([*numbers, *map(str, options)]) == 0
    return Logged(directory, options, out.getvalue(), courses)


def test_a_run_that_is_over_is_not_trained_again(logged, demonstrate, quick):
    options = [
        its if its != logged.directory / "logs" else logged.directory / "again"
        for its in logged.options
    ]
    again, _ = demonstrate(*options, "--resume")
    assert table(logged.out) == table(again)  # the seconds, too
    assert "adam: going on from step 12\n" in again
    assert "adam: training" not in again


def test_checkpoints_of_another_run_are_refused(logged, refusal, write, quick):
    options = [
        "--steps",
        12,
        "--batch-size",
        16,
        "--optimizers",
        "adam",
        "--checkpoint-dir",
        logged.directory / "runs",
    ]
    data, rate = ["--data", write()], ["--learning-rate", 0.01]
    setting = [*options, *data, *rate]
    said = refusal(*setting)
    assert "--checkpoint-dir: found checkpoints in" in said
    assert "Add --resume" in said
    for changed, says in (
        (["--seed", 1], "made with --seed 0; this run has --seed 1."),
        (
            ["--steps", 13, "--storage", "8bit"],
            "made with --steps 12 --storage float32; this run has --steps 13 --storage 8bit.",
        ),
    ):
        assert says in refusal(*setting, "--resume", *changed)
    assert "made with --learning-rate 0.01; this run has --learning-rate not given" in refusal(
        *options, *data, "--resume"
    )
    assert "made with --data" in refusal(
        *options, *rate, "--resume", "--data", write(x_test=IMAGES["x_test"] + 1)
    )


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_gone_on_from(
    write, wide, keep, tmp_path
):
    setting = prepare(read(write()), 12, 16, 0, sweeps=False)
    whole = keep(adam_jax.adam, setting, 0.01, "run")
    parts = [
        path
        for path in (tmp_path / "run" / "12" / "arrays").rglob("*")
        if path.is_file() and path.parent.name == "d"
    ]
    largest = max(parts, key=lambda path: path.stat().st_size)
    run = next(path for path in (tmp_path / "run" / "12" / "run").rglob("*") if path.is_file())
    for path, place in (
        (run, run.read_bytes().index(b'"progress"') + 15),  # E3: other curves, which are valid too
        (largest, largest.stat().st_size // 2),
    ):
        before = path.read_bytes()
        content = bytearray(before)
        content[place] ^= 1
        path.write_bytes(content)
        with pytest.raises(
            ValueError,
            match=r"run/12 is damaged \(.*\). Delete it to go on from the checkpoint before it",
        ):
            keep(adam_jax.adam, setting, 0.01, "run", resume=True)
        path.write_bytes(before)
    shutil.rmtree(tmp_path / "run" / "12")
    alike(keep(adam_jax.adam, setting, 0.01, "run", resume=True), whole)


@pytest.mark.slow
def test_killed_it_goes_on(write, tmp_path):
    """By the operating system, in a process of its own, at any moment after the first
    checkpoints.
    """
    checkpoints = pytest.importorskip("adam_jax._cli.checkpoints").checkpoints

    def options(directory):
        return [
            *(
                "--data",
                str(write()),
                "--optimizers",
                "adam",
                "--learning-rate",
                "0.01",
                "--steps",
                "600",
                "--batch-size",
                "16",
            ),
            *(
                "--checkpoint-every",
                "10",
                "--checkpoint-dir",
                str(tmp_path / directory),
                "--output",
                str(tmp_path / "a.png"),
            ),
        ]

    killed = tmp_path / "killed" / "adam"
    command = [sys.executable, "-m", "adam_jax", *options("killed")]
    # Compiled as the run that goes on: compiled otherwise, the last bits differ.
    compiled = {
        "JAX_DISABLE_MOST_OPTIMIZATIONS": str(
            int(jax.config.read("jax_disable_most_optimizations"))
        )
    }
    with subprocess.Popen(
        command, env={**os.environ, "JAX_PLATFORMS": "cpu", **compiled}, stdout=subprocess.DEVNULL
    ) as run:
        limit = time.monotonic() + 300
        while sum(path.name.isdigit() for path in killed.glob("*")) < 3:
            assert run.poll() is None
            assert time.monotonic() < limit
            time.sleep(0.001)
        time.sleep(random.Random(0).uniform(0, 0.05))
        run.send_signal(signal.SIGKILL)
    newest = max(int(path.name) for path in killed.iterdir() if path.name.isdigit())
    assert newest < 600
    assert main([*options("killed"), "--resume"]) == 0
    assert main(options("whole")) == 0

    def progress(directory):
        settings = json.loads(
            next((tmp_path / directory / "adam" / "600" / "run").glob("*")).read_text()
        )["options"]
        with checkpoints(tmp_path / directory / "adam", settings, 1, resume=True) as kept:
            return kept.progress._replace(seconds=0)

    assert progress("killed") == progress("whole")


def test_without_what_checkpoints_and_events_need(refusal, monkeypatch, quick):
    for module, option, extra in (
        ("orbax", "--checkpoint-dir", "scale"),
        ("tensorboardX", "--log-dir", "log"),
    ):
        monkeypatch.setitem(sys.modules, module, None)
        assert (
            f'{module} not installed; run, in its folder: pip install -e ".[{extra}]"'
            in refusal(option, "runs")
        )


# Events


def events(directory):
    """The events of all files in a folder, oldest first:

    TFRecords of length, its checksum, the event, its checksum.
    """
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted(directory.iterdir(), key=lambda path: path.stat().st_mtime_ns):
        content = path.read_bytes()
        while content:
            (length,) = struct.unpack("<Q", content[:8])
            found.append(Event.FromString(content[12 : 12 + length]))
            content = content[16 + length :]
    return found


def scalars(found):
    """(tag, step) -> value, where what a later start overrides is dropped, as TensorBoard does."""
    kept = {}
    for event in found:
        if event.HasField("session_log"):
            kept = {key: value for key, value in kept.items() if key[1] < event.step}
        for value in event.summary.value:
            kept[value.tag.replace("_", " "), event.step] = value.simple_value
    return kept


def test_events_hold_the_curves(logged):
    assert f"tensorboard --logdir {logged.directory / 'logs'}\n" in logged.out
    for name, course in zip(("sgd", "adam"), logged.courses, strict=True):
        found = scalars(events(logged.directory / "logs" / name))
        expected = {
            ("training loss", s): loss for s, loss in zip(course.steps, course.losses, strict=True)
        }
        expected |= {
            ("test accuracy", s): found
            for s, found in zip(course.steps, course.accuracies, strict=True)
        }
        expected |= {("learning rate", s): course.rate for s in course.steps}
        looks = {key: found.pop(key) for key in list(found) if key[0].startswith("all/")}
        assert found == {key: pytest.approx(value, rel=1e-6) for key, value in expected.items()}
        norms = {step: value for (tag, step), value in looks.items() if tag == "all/gradient norm"}
        assert set(norms) == set(range(1, max(course.steps) + 1, 10))
        assert min(norms.values()) > 0


def test_a_resumed_run_logs_each_step_once(
    logged, demonstrate, write, quick, tmp_path, monkeypatch, capsys
):
    options = [
        "--data",
        write(),
        "--optimizers",
        "adam",
        "--learning-rate",
        0.01,
        "--checkpoint-every",
        4,
    ]
    from adam_jax._cli import report

    draw = report.progress

    class Failing:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

        def __call__(self, name, doing, done):
            if doing.startswith("training") and done >= 7:
                raise KeyboardInterrupt

    monkeypatch.setattr(report, "progress", lambda *_: Failing())
    options += ["--checkpoint-dir", tmp_path / "runs", "--log-dir", tmp_path / "logs"]
    assert (
        main(
            [
                "--steps",
                "12",
                "--batch-size",
                "16",
                "--output",
                str(tmp_path / "a.png"),
                *map(str, options),
            ]
        )
        == 130
    )
    assert "Interrupted. The same command with --resume goes on" in capsys.readouterr().err
    monkeypatch.setattr(report, "progress", draw)
    time.sleep(1.1)  # the files are told apart by the second in their names
    demonstrate(*options, "--resume")
    found, whole = (
        events(tmp_path / "logs" / "adam"),
        scalars(events(logged.directory / "logs" / "adam")),
    )
    assert len(list((tmp_path / "logs" / "adam").iterdir())) == 2
    assert scalars(found) == whole
    assert sum(bool(event.summary.value) for event in found) > len(
        whole
    )  # steps that were lost are logged again


def test_a_folder_that_is_a_file_is_refused(refusal, tmp_path):
    pytest.importorskip("tensorboardX")
    (tmp_path / "adam").touch()
    assert "--log-dir: cannot write in" in refusal("--optimizers", "adam", "--log-dir", tmp_path)


# Commands


def test_version(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert (stopped.value.code, capsys.readouterr().out) == (
        0,
        f"adam_jax {adam_jax.__version__}\n",
    )


def test_describe_weighs_the_network(capsys):
    assert (
        main(
            [
                "describe",
                "--optimizer",
                "adamw",
                "--storage",
                "8bit",
                "--precision",
                "bfloat16-compensated",
            ]
        )
        == 0
    )
    said = capsys.readouterr().out
    tx = adam_jax.chain(adam_jax.adamw(1e-3, storage="8bit"), adam_jax.compensate())
    params = jax.eval_shape(
        lambda: jax.tree.map(
            lambda leaf: leaf.astype(jnp.bfloat16),
            prepare(digits(), 1, 1, 0, sweeps=False).params,
        )
    )
    audit = adam_jax.state_bytes(tx, params)
    assert str(adam_jax.describe(tx, params)) in said
    assert f"{tx}\n" in said
    assert main(["describe", "--optimizer", "adamw", "--storage", "8bit", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["totals"]["elements"] == audit.elements
    assert found["totals"]["parameters"] == 2 * audit.parameters


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--optimizer", "adm"), "--optimizer: found 'adm'; did you mean adam?"),
        (("--storage", "4bit"), "--storage: found '4bit'"),
        (("--precision", "half"), "--precision: found 'half'"),
        (("--learning-rate", "0"), "--learning-rate: found 0.0"),
        (("--steps", "3"), "unrecognized arguments: --steps"),
    ],
)
def test_wrong_options_of_describe(capsys, arguments, says):
    with pytest.raises(SystemExit) as stopped:
        main(["describe", *arguments])
    assert stopped.value.code == 2
    printed = capsys.readouterr()
    assert re.fullmatch(r"adam_jax describe: error: [^\n]+\n", printed.err)
    assert says in printed.err


def test_train_may_be_said(capsys):
    assert main(["train", "--list"]) == 0
    assert capsys.readouterr().out.startswith("sgd ")


def helped(capsys, *command):
    with pytest.raises(SystemExit) as stopped:
        main([*command, "--help"])
    assert stopped.value.code == 0
    return capsys.readouterr().out


PAGE = ROOT / "docs" / "command-line.md"


def test_the_page_has_every_option(capsys, monkeypatch):
    """And says of each what --help says."""
    monkeypatch.setenv("COLUMNS", "120")
    text = PAGE.read_text()
    for command in ([], ["describe"], ["doctor"]):
        options = helped(capsys, *command).partition("options:\n")[2].partition("\n\n")[0].rstrip()
        assert options in text, f"docs/command-line.md lacks, of {command}:\n{options}"


def test_the_page_shows_what_describe_prints(capsys):
    assert main(["describe", "--optimizer", "adamw", "--storage", "8bit"]) == 0
    assert capsys.readouterr().out.rstrip() in PAGE.read_text()
