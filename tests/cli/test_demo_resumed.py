"""A run of the demo that was interrupted or killed goes on and ends with the same bits.

The oracle is the run that was not interrupted.
"""

import gc
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import jax
import pytest
from helpers import same
from small_demo import Hidden, Kept

import adam_jax
from adam_jax._cli import choices, demo
from adam_jax._cli.choices import OPTIMIZERS
from adam_jax._cli.data import read
from adam_jax._cli.main import main
from adam_jax._cli.setting import prepare

pytest.importorskip("rich")


@pytest.fixture
def wide(monkeypatch):
    """A hidden layer of enough elements that `storage` narrows its moments."""
    monkeypatch.setattr(demo, "Network", Hidden)


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


# Orbax reads arrays side by side. Where one fails it leaves the others unread, and Python may say
# so when it collects them.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
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
    gc.collect()
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
