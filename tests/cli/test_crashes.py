"""A run that is killed again and again ends with the same bits, and a damaged checkpoint is never
taken for a good one.
"""

import gc
import importlib.util
import os
import random
import re
import shutil
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from helpers import ROOT

from adam_jax._cli.data import digits

TRAIN = ROOT / "docs" / "scripts" / "train.py"
EVERY, KILLS = 3, 5
TEMPORARY = "*.orbax-checkpoint-tmp*"
CASES = {
    "float32": [],
    "8-bit moments": ["--storage", "8bit"],
    "8-bit moments, bfloat16 parameters rounded stochastically": [
        "--storage",
        "8bit",
        "--rounding",
        "stochastic",
    ],
    "bfloat16 parameters, compensated": ["--rounding", "compensate"],
}


# A read that fails leaves others behind that Orbax began beside it: they end here, and not in the
# test of another file.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True)
def collected():
    yield
    gc.collect()


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("train", TRAIN)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SETTINGS = {"storage": "float32", "batch": 64}


def tree(step):
    """Arrays of the dtypes of a state, other ones at each step, one of them large enough for a file
    of its own.
    """
    draw = np.random.default_rng(step)
    wide = draw.standard_normal((40, 200)).astype(np.float32)
    codes = draw.integers(0, 256, (64, 32)).astype(np.uint8)
    return {
        "wide": jnp.asarray(wide),
        "narrow": jnp.asarray(wide[:8], jnp.bfloat16),
        "codes": jnp.asarray(codes),
        "count": jnp.asarray(step, jnp.int32),
    }


def save(script, directory, steps=(1, 2)):
    with ocp.CheckpointManager(directory) as manager:
        for step in steps:
            arrays = tree(step), script.checksums(tree(step))
            args = ocp.args.Composite(
                arrays=ocp.args.StandardSave(arrays),
                settings=ocp.args.JsonSave(script.sealed(SETTINGS)),
            )
            manager.save(step, args=args)


def resume(script, directory, settings=SETTINGS, like=None):
    with ocp.CheckpointManager(directory) as manager:
        return script.resume(manager, jax.tree.map(jnp.zeros_like, like or tree(0)), settings)


def same(found, expected):
    return all(
        np.asarray(a).tobytes() == np.asarray(b).tobytes()
        for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True)
    )


def flip(path, draw):
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


DAMAGES = {
    "a flipped bit": flip,
    "cut short": lambda path, draw: os.truncate(path, draw.randrange(path.stat().st_size)),
    "gone": lambda path, draw: path.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_costs_a_checkpoint_at_most(script, tmp_path, damage, capsys):
    """Every file of the newest in turn: what comes back is the newest, or the one before, in every
    bit. E3: of settings in which one letter is another, too.
    """
    save(script, tmp_path / "whole")
    draw, found = random.Random(damage), []
    for number, path in enumerate(
        sorted(path for path in (tmp_path / "whole" / "2").rglob("*") if path.is_file())
    ):
        for again in range(3 if damage == "a flipped bit" else 1):
            copy = tmp_path / f"{number} {again}"
            shutil.copytree(tmp_path / "whole", copy)
            DAMAGES[damage](copy / path.relative_to(tmp_path / "whole"), draw)
            step, arrays = resume(script, copy)
            assert same(arrays, tree(step)), path
            found.append(step)
            said = capsys.readouterr().out
            assert ("checkpoint of step 2 is damaged" in said) == (step == 1), path
            assert (copy / "2").exists() == (step == 2)  # it can be made and saved once more
    assert set(found) == {1, 2}  # some files of a checkpoint are read, some are not


def test_of_a_flipped_bit_among_numbers_orbax_says_nothing(script, tmp_path):
    """Why the script has sums of its own.

    If this fails, Orbax has some, and the script can do without.
    """
    save(script, tmp_path)
    parts = (tmp_path / "2" / "arrays" / "ocdbt.process_0" / "d").iterdir()
    flip(max(parts, key=lambda path: path.stat().st_size), random.Random(0))
    with ocp.CheckpointManager(tmp_path) as manager:
        wanted = ocp.args.Composite(
            arrays=ocp.args.StandardRestore((tree(0), script.checksums(tree(0))))
        )
        arrays, _ = manager.restore(2, args=wanted).arrays
    assert not same(arrays, tree(2))
    assert resume(script, tmp_path)[0] == 1


def test_without_a_checkpoint_it_starts_anew(script, tmp_path):
    step, arrays = resume(script, tmp_path)
    assert (step, same(arrays, jax.tree.map(jnp.zeros_like, tree(0)))) == (0, True)


def test_if_all_are_damaged_it_says_so_and_deletes_none(script, tmp_path, capsys):
    save(script, tmp_path)
    for step in "12":
        (tmp_path / step / "arrays" / "manifest.ocdbt").unlink()
    with pytest.raises(
        ValueError, match=r"all checkpoints are damaged: steps \[2, 1\]. Delete it to start anew."
    ):
        resume(script, tmp_path)
    assert (tmp_path / "1").exists()
    assert (tmp_path / "2").exists()


def test_other_settings_are_refused_before_anything_is_deleted(script, tmp_path):
    save(script, tmp_path)
    with pytest.raises(
        ValueError, match=r"found a checkpoint of .*'batch': 64.*; expected .*'batch': 32"
    ):
        resume(script, tmp_path, {**SETTINGS, "batch": 32}, like={"others": jnp.zeros(3)})
    assert (tmp_path / "2").exists()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.uint8, jnp.int32])
def test_checksums_see_every_single_bit_and_every_exchange(script, dtype):
    array = np.asarray(jnp.arange(12).reshape(3, 4), dtype)
    sums = {int(script.checksums(array))}
    unsigned = array.view(f"uint{8 * array.dtype.itemsize}")
    for place in np.ndindex(array.shape):
        for bit in range(8 * array.dtype.itemsize):
            changed = unsigned.copy()
            changed[place] ^= unsigned.dtype.type(1 << bit)
            sums.add(int(script.checksums(changed.view(array.dtype))))
    assert len(sums) == 1 + array.size * 8 * array.dtype.itemsize
    exchanged = array[::-1]
    assert int(script.checksums(exchanged)) not in sums


def test_an_epoch_shows_every_image_at_most_once(script):
    steps = [script.batch(step, 10, 35) for step in range(6)]
    for epoch in (steps[:3], steps[3:]):
        assert len(set(np.concatenate(epoch))) == 30
    assert set(np.concatenate(steps[:3])) != set(np.concatenate(steps[3:]))


# Kills


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """In which every run after the first finds what it needs compiled."""
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("cache")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    return {**os.environ, "JAX_PLATFORMS": "cpu", **cache}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The digits without scikit-learn, which takes longest to import."""
    path = tmp_path_factory.mktemp("data") / "data.npz"
    np.savez(path, **digits()._asdict())
    return path


def finish(command, environment):
    """The digest at the end, and everything that was said."""
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return re.search(r"^digest (\w{64})$", done.stdout, re.MULTILINE)[1], done.stdout


def kill(command, environment, directory, draw):
    """Starts a run and kills it after its first checkpoint, at any moment or inside a save; whether
    it was inside one.
    """
    inside, wanted, log = draw.random() < 0.6, draw.randint(2, 4), directory.with_suffix(".log")
    with log.open("w") as out:
        run = subprocess.Popen(command, env=environment, stdout=out, stderr=subprocess.STDOUT)
    try:
        limit, ready = time.monotonic() + 300, False
        while not ready:
            assert run.poll() is None, log.read_text()
            assert time.monotonic() < limit, log.read_text()
            ready = log.read_text().count("loss") >= wanted and (
                not inside or any(directory.glob(TEMPORARY))
            )
            time.sleep(0.0005)
        time.sleep(draw.uniform(0, 0.01 if inside else 0.1))
    finally:
        run.kill()
        run.wait()
    return any(directory.glob(TEMPORARY))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_killed_again_and_again_it_ends_with_the_same_bits(case, environment, data, tmp_path):
    draw, killed = random.Random(case), tmp_path / "killed"

    def command(directory, steps):
        flags = f"--directory {directory} --data {data} --every {EVERY} --steps {steps}".split()
        return [sys.executable, str(TRAIN), *flags, *CASES[case]]

    inside = [kill(command(killed, 1_000_000), environment, killed, draw) for _ in range(KILLS)]
    assert any(inside), "none of the kills fell into a save"
    newest = max(int(path.name) for path in killed.iterdir() if path.name.isdigit())
    assert newest >= EVERY * KILLS  # each run went on from the one before
    end = newest + 2 * EVERY + 1

    digest, said = finish(command(killed, end), environment)
    assert f"processes, from step {newest}" in said
    assert "damaged" not in said
    assert not any(killed.glob(TEMPORARY))
    assert digest == finish(command(tmp_path / "whole", end), environment)[0]
