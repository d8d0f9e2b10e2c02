"""`docs/scripts/cluster.py`: how its processes find each other. What they do is in test_cluster."""

import errno
import importlib.util
import socket

import pytest
from helpers import ROOT

PROGRAM = """
import os
print(os.environ["JAX_COORDINATOR_ADDRESS"], flush=True)
import jax
number = int(os.environ["JAX_PROCESS_ID"])
jax.distributed.initialize(num_processes=2, process_id=number, initialization_timeout=60)
print(len(jax.devices()), flush=True)
"""


@pytest.mark.skipif(not hasattr(socket, "SO_REUSEPORT"), reason="no shared ports here")
def test_no_other_program_takes_the_port_in_between():
    """E11: from the moment it is chosen, before the coordinator listens."""
    spec = importlib.util.spec_from_file_location("cluster", ROOT / "docs/scripts/cluster.py")
    cluster = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(cluster)
    running = cluster.start(["-c", PROGRAM], 2, 1)
    try:
        host, port = running[0].stdout.readline().strip().split(":")
        with socket.socket() as other, pytest.raises(OSError, match=str(errno.EADDRINUSE)):
            other.bind((host, int(port)))
        said = [process.communicate(timeout=100)[0].split() for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0, 0]
    assert [words[-1] for words in said] == ["2", "2"]
