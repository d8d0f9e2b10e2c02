"""A cluster on this machine: several processes with some devices each, over the loopback.

    python docs/scripts/cluster.py --processes 4 --devices 2 -- \\
        docs/scripts/train.py --cluster --directory runs/digits

If one process dies, the others are ended, and the command says which it was.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from typing import IO


def start(
    command: list[str], processes: int, devices: int, logs: Sequence[IO[str]] = ()
) -> list[subprocess.Popen[str]]:
    """The processes of a cluster, each running the same Python program; what they say goes to
    `logs`, or through pipes.
    """
    with reserved() as port:
        environment = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
            "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} "
            f"--xla_force_host_platform_device_count={devices}",
            "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port.getsockname()[1]}",
            "JAX_NUM_PROCESSES": str(processes),
        }
        return [
            subprocess.Popen(
                [sys.executable, *command],
                env={**environment, "JAX_PROCESS_ID": str(i)},
                stdout=logs[i] if logs else subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                # The first one listens there. While it lives, it holds the reservation, too.
                pass_fds=() if i else (port.fileno(),),
            )
            for i in range(processes)
        ]


def reserved() -> socket.socket:
    """A port that nobody else can take, and at which JAX's coordinator can listen.

    Between a look for a free port and the moment at which the coordinator listens there are
    seconds. Another program that took the port then made the first process crash and all others
    wait. The coordinator, which asks to share its port, shares it with this socket alone.
    """
    port = socket.socket()
    if hasattr(socket, "SO_REUSEPORT"):
        port.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    port.bind(("127.0.0.1", 0))
    return port


def echo(number: int, lines: Iterable[str]) -> None:
    """Prints what a process says, behind its number."""
    for line in lines:
        print(f"[{number}] {line}", end="", flush=True)


def cause(status: int) -> str:
    """How a process ended."""
    return (
        f"was killed by {signal.Signals(-status).name}"
        if status < 0
        else f"ended with status {status}"
    )


def positive(text: str) -> int:
    """A number from 1 on."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"found {text}; expected 1 or more")
    return int(text)


def main() -> str | None:
    """Starts the processes and waits for all, or for the first that fails."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--processes", type=positive, default=2)
    parser.add_argument("--devices", type=positive, default=2, help="of each process")
    parser.add_argument("command", nargs="+", help="a Python program and its arguments, after --")
    args = parser.parse_args()
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit("cluster: was asked to end, and ended its processes")
    )

    running = start(args.command, args.processes, args.devices)
    readers = [
        threading.Thread(target=echo, args=(i, process.stdout)) for i, process in enumerate(running)
    ]
    try:
        for i, (reader, process) in enumerate(zip(readers, running, strict=True)):
            print(f"[{i}] is process {process.pid}", flush=True)
            reader.start()
        while any(process.poll() is None for process in running) and not any(
            process.poll() for process in running
        ):
            time.sleep(0.1)
        failed = {i: process.returncode for i, process in enumerate(running) if process.returncode}
    finally:
        for process in running:
            # Not asked: JAX takes SIGTERM for a notice, and a checkpoint is complete or not there
            process.kill()
    for reader in readers:
        reader.join()
    if not failed:
        return None
    what = ", ".join(f"process {i} {cause(status)}" for i, status in failed.items())
    # A status of 2 is Python's and argparse's for a command that is wrong.
    again = (
        ""
        if 2 in failed.values()
        else " The same command resumes from the last complete checkpoint."
    )
    return f"cluster: {what}; the others were ended.{again}"


if __name__ == "__main__":
    sys.exit(main())
