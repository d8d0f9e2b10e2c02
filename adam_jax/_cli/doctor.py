"""`python -m adam_jax doctor`: what is here, and whether it works.

Needs what adam_jax needs, and nothing else.
"""

from __future__ import annotations

import os
import platform
import re
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import adam_jax
from adam_jax._cli.checks import OLDEST, all_checks, run_check, version_of
from adam_jax.diagnostics.table import write_table

OPTIONAL = {
    "flax": ("nnx.Optimizer, TrainState, and the network of the training run", '-e ".[demo]"'),
    "equinox": ("models that are pytrees", "equinox"),
    "orbax-checkpoint": ("checkpoints: --checkpoint-dir, --resume", '-e ".[scale]"'),
    "chex": ("a part of the tests", '-e ".[test]"'),
    "rich": ("tables and bars in a terminal", '-e ".[demo]"'),
    "matplotlib": ("the figure of the training run", '-e ".[demo]"'),
    "scikit-learn": ("the digits of the training run", '-e ".[demo]"'),
    "tensorboardX": ("event files: --log-dir", '-e ".[log]"'),
    "torch": ("an oracle of the tests, a column of the benchmarks", "torch"),
    "libtpu": ("compiling for a TPU, with or without one", '"jax[tpu]"'),
}
"""For each optional package: what it adds, and what to install for it."""


VARIABLES = (
    "JAX_",
    "XLA_",
    "TPU_",
    "LIBTPU_",
    "CUDA_VISIBLE_DEVICES",
    "ROCR_VISIBLE_DEVICES",
    "HIP_VISIBLE_DEVICES",
)


def examine() -> dict[str, Any]:
    """All that is found, of types that JSON has.

    The checks run: the first takes JAX's start and a few compilations.
    """
    return {
        "versions": {"python": platform.python_version(), "adam_jax": adam_jax.__version__}
        | {n: version_of(n) for n in OLDEST},
        "optional": {
            name: {"version": version_of(name), "gives": gives, "install": f"pip install {what}"}
            for name, (gives, what) in OPTIONAL.items()
        },
        "machine": _machine(),
        "jax": _jax(),
        "environment": {
            name: value for name, value in sorted(os.environ.items()) if name.startswith(VARIABLES)
        },
        "checks": [run_check(check) for check in all_checks()],
    }


def show(found: dict[str, Any]) -> None:
    """Writes it as tables."""
    versions = [
        (name, version or "not installed", "") for name, version in found["versions"].items()
    ]
    for name, its in found["optional"].items():
        missing = "" if its["version"] else f"{its['gives']}: {its['install']}"
        versions.append((name, its["version"] or "not installed", missing))
    write_table(("package", "version", "would give"), versions)
    write_table(("machine", ""), list(found["machine"].items()))
    rows = [(name, str(value)) for name, value in found["jax"].items() if name != "devices"]
    for device in found["jax"]["devices"]:
        rows.append(
            (
                device["kind"],
                ", ".join(f"{key} {value}" for key, value in device.items() if key != "kind"),
            )
        )
    write_table(("JAX", ""), rows)
    write_table(("environment", ""), list(found["environment"].items()) or [("nothing set", "")])
    write_table(
        ("check", "", "found"),
        [(its["name"], "ok" if its["ok"] else "FAILED", its["found"]) for its in found["checks"]],
    )
    failed = [its for its in found["checks"] if not its["ok"]]
    lines = [f"{its['name']}: {its['todo']}." for its in failed] or ["All is well."]
    sys.stdout.write("\n" + "\n".join(lines) + "\n")


def _machine() -> dict[str, str]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found = {"system": platform.platform(), "processor": _processor(), "cores": str(cores)}
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        found["memory"] = _gib(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return found


def _processor() -> str:
    """Linux has the name in a file; elsewhere it is what Python knows."""
    cpuinfo = Path("/proc/cpuinfo")
    named = (
        re.search(r"^model name\s*: (.+)$", cpuinfo.read_text(), re.MULTILINE)
        if cpuinfo.exists()
        else None
    )
    return named[1] if named else platform.processor() or platform.machine()


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"


def _jax() -> dict[str, Any]:
    found: dict[str, Any] = {
        "backend": None,
        "processes": None,
        "x64": jnp.result_type(float) == jnp.float64,
        "devices": [],
    }
    try:
        found |= {"backend": jax.default_backend(), "processes": jax.process_count()}
        kinds = [device.device_kind for device in jax.devices()]
        stats = {device.device_kind: device.memory_stats() or {} for device in jax.local_devices()}
    except RuntimeError:
        return found  # the check says why
    for kind in dict.fromkeys(kinds):
        memory = {"memory": "bytes_limit", "in use": "bytes_in_use"}
        its = {
            name: _gib(stats[kind][key])
            for name, key in memory.items()
            if key in stats.get(kind, {})
        }
        found["devices"].append({"kind": kind, "count": kinds.count(kind), **its})
    return found
