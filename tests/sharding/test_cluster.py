"""The training script of the docs as a real cluster: processes of their own, over the loopback."""

import contextlib
import importlib.util
import os
import re
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from helpers import ROOT

from adam_jax._cli.data import digits

pytestmark = pytest.mark.slow

SCRIPTS = ROOT / "docs" / "scripts"
TRAIN = str(SCRIPTS / "train.py")
STEPS, EVERY = 24, 6
# Seconds without a step after which the script gives up, for a JAX that waits longer for heartbeats
STUCK = 30
LIMIT = 60  # seconds in which survivors have to end, on a busy machine
REASON = r"another task died|stopped sending heartbeats|Connection closed by peer|Timeout \("
"""What survivors say:

JAX of a process that is gone, gloo of a connection, the script of a step that does not end.
"""


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A directory for all runs, with what makes them start sooner: the data without scikit-learn,
    and what is compiled once.
    """
    directory = tmp_path_factory.mktemp("cluster")
    np.savez(directory / "data.npz", **digits()._asdict())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(directory / "cache"))
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        yield directory


@pytest.fixture(scope="module")
def cluster():
    spec = importlib.util.spec_from_file_location("cluster", SCRIPTS / "cluster.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def flags(directory):
    data = str(directory.parent / "data.npz")
    return [
        "--directory",
        str(directory),
        "--data",
        data,
        "--steps",
        str(STEPS),
        "--every",
        str(EVERY),
        "--limit",
        str(STUCK),
    ]


def command(processes, directory):
    """The documented one."""
    launcher = [
        sys.executable,
        str(SCRIPTS / "cluster.py"),
        "--processes",
        str(processes),
        "--devices",
        "2",
    ]
    return [*launcher, "--", TRAIN, "--cluster", *flags(directory)]


def run(command):
    """What a command says that ends well."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def wait_for(text, log):
    """Until a running process has written `text` into its log."""
    limit = time.monotonic() + 300
    while text not in log.read_text():
        assert time.monotonic() < limit, log.read_text()
        time.sleep(0.01)


def losses(said):
    return {int(step): float(loss) for step, loss in re.findall(r"step (\d+): loss (\S+)", said)}


def digests(said):
    return re.findall(r"digest (\w{64})", said)


def resumed(said):
    return int(re.search(r"processes, from step (\d+)", said)[1])


def steps(directory):
    """The complete checkpoints, oldest first."""
    return sorted(int(path.name) for path in directory.iterdir() if path.name.isdigit())


def parameters(directory):
    """The final parameters, whatever the devices that had them."""
    reader, path = ocp.PyTreeCheckpointer(), directory / str(STEPS) / "arrays"
    described = reader.metadata(path)
    tree = getattr(
        described, "item_metadata", described
    ).tree  # older versions of Orbax describe nothing else
    arrays = reader.restore(
        path, restore_args=jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
    )
    return jax.tree.leaves(arrays[0][0])


@pytest.fixture(scope="module")
def alone(shared):
    return run([sys.executable, TRAIN, *flags(shared / "1")])


@pytest.fixture(scope="module")
def two(shared):
    return run(command(2, shared / "2"))


@pytest.fixture(scope="module")
def four(shared):
    return run(command(4, shared / "4"))


@pytest.mark.parametrize("processes", [2, 4])
def test_a_cluster_trains_as_one_process_does(shared, alone, two, four, processes):
    said = {2: two, 4: four}[processes]
    assert f"{2 * processes} devices of {processes} processes, from step 0" in said
    assert list(losses(said)) == list(losses(alone)) == list(range(EVERY, STEPS + 1, EVERY))
    # The mean over the batch is summed in another order: some ulps of float32, 1.2e-7, in the loss
    # and in every gradient. Adam divides by √ν, so each passes on as that part of a step, a
    # thousandth.
    np.testing.assert_allclose(list(losses(said).values()), list(losses(alone).values()), rtol=2e-6)
    for found, expected in zip(
        parameters(shared / str(processes)), parameters(shared / "1"), strict=True
    ):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
    assert len(digests(said)) == processes
    assert len(set(digests(said))) == 1


def test_survivors_end_by_themselves_and_a_restart_goes_on(shared, cluster, four):
    directory, logs = shared / "killed", [shared / f"log{i}" for i in range(4)]
    with contextlib.ExitStack() as files:
        out = [files.enter_context(log.open("w")) for log in logs]
        running = cluster.start([TRAIN, "--cluster", *flags(directory)], 4, 2, out)
        try:
            wait_for(f"step {2 * EVERY}: loss", logs[0])
            running[3].kill()
            limit = time.monotonic() + LIMIT
            status = [process.wait(max(limit - time.monotonic(), 0)) for process in running]
        finally:
            for process in running:
                process.kill()
    assert status[3] == -signal.SIGKILL
    for code, log in zip(status[:3], logs, strict=False):
        assert code not in (0, -signal.SIGKILL)
        assert re.search(REASON, log.read_text()), log.read_text()
        assert not digests(log.read_text())

    newest = steps(directory)[-1]
    assert newest in (EVERY, 2 * EVERY)
    said = run(command(4, directory))
    assert resumed(said) == newest
    assert set(digests(said)) == set(
        digests(four)
    )  # gloo sums in an order that is the same every time


def test_the_launcher_says_who_died_and_a_damaged_part_of_a_checkpoint_is_passed_over(shared, two):
    directory, log = shared / "damaged", shared / "log"
    with log.open("w") as out:
        launcher = subprocess.Popen(command(2, directory), stdout=out, stderr=subprocess.STDOUT)
        try:
            wait_for(f"step {3 * EVERY}: loss", log)
            os.kill(int(re.search(r"\[1\] is process (\d+)", log.read_text())[1]), signal.SIGKILL)
            assert launcher.wait(LIMIT) == 1
        finally:
            launcher.terminate()
    assert "cluster: process 1 was killed by SIGKILL; the others were ended." in log.read_text()

    *_, before, newest = steps(directory)
    parts = (directory / str(newest) / "arrays" / "ocdbt.process_1" / "d").iterdir()
    os.truncate(
        max(parts, key=lambda path: path.stat().st_size), 8
    )  # process 0 can read its own part well
    said = run(command(2, directory))
    assert f"checkpoint of step {newest} is damaged" in said
    assert resumed(said) == before
    assert set(digests(said)) == set(digests(two))
