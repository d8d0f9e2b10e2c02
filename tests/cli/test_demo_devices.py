"""On two devices the demo shares out its state and trains as on one.

The oracle is the run on one device. Each case is a process of its own, with two devices that are
this machine's CPU.
"""

import os
import subprocess
import sys

import jax
import pytest
from helpers import TESTS

from adam_jax._cli.data import read
from adam_jax._cli.setting import prepare

pytest.importorskip("rich")


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
from small_demo import Hidden, Kept

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
    """JAX makes as many devices of this CPU as it is asked for: two here."""
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
