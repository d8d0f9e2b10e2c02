"""`python -m adam_jax doctor`: what is here, and whether it works.

Needs what adam_jax needs, and nothing else.
"""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import adam_jax
from adam_jax.diagnostics.table import write_table
from adam_jax.family import adam
from adam_jax.storage.formats import NAMED

OLDEST = {"jax": "0.6.0", "jaxlib": "0.6.0", "optax": "0.2.5"}


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
"""What each package would give, and what to install for it."""


VARIABLES = (
    "JAX_",
    "XLA_",
    "TPU_",
    "LIBTPU_",
    "CUDA_VISIBLE_DEVICES",
    "ROCR_VISIBLE_DEVICES",
    "HIP_VISIBLE_DEVICES",
)


SHAPE = (64, 128)  # enough elements that `storage` narrows the moments


STEPS = 10


RATE, B1, B2, EPS = 1e-2, 0.9, 0.999, 1e-8


CLOSE = {"float32": 1e-5, "bfloat16": 2e-2, "8bit": 0.3}
"""How far the path of `STEPS` steps may be from the exact one, root mean square, relative to its
length. What rounding does is a fifth of that, and what a wrong bit does is many times that."""


WRONG = (
    "The numbers of this backend are wrong: unset XLA_FLAGS, update jax and jaxlib, or set "
    "JAX_PLATFORMS=cpu"
)


def examine() -> dict[str, Any]:
    """All that is found, of types that JSON has.

    The checks run: the first takes JAX's start and a few compilations.
    """
    return {
        "versions": {"python": platform.python_version(), "adam_jax": adam_jax.__version__}
        | {n: _version(n) for n in OLDEST},
        "optional": {
            name: {"version": _version(name), "gives": gives, "install": f"pip install {what}"}
            for name, (gives, what) in OPTIONAL.items()
        },
        "machine": _machine(),
        "jax": _jax(),
        "environment": {
            name: value for name, value in sorted(os.environ.items()) if name.startswith(VARIABLES)
        },
        "checks": [_run(check) for check in _checks()],
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


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


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


class _Check(NamedTuple):
    """`look` returns whether all is well, and what it found; an exception is a failure too."""

    name: str
    look: Callable[[], tuple[bool, str]]
    todo: str


def _checks() -> list[_Check]:
    return [
        _Check(
            "versions",
            _new_enough,
            "pip install -U " + " ".join(f'"{name}>={least}"' for name, least in OLDEST.items()),
        ),
        _Check(
            "devices",
            _start,
            "JAX cannot start: unset JAX_PLATFORMS, or install the jax that its devices need",
        ),
        *(_Check(f"Adam, {name} moments", functools.partial(_path, name), WRONG) for name in NAMED),
        _Check("stochastic rounding", _unbiased, WRONG),
        _Check("compensated rounding", _compensated, WRONG),
        _Check(
            "donation",
            _donates,
            "A step copies its state instead of writing over it: update jax and jaxlib",
        ),
        _Check("state cut over the devices", _cut, WRONG),
    ]


def _run(check: _Check) -> dict[str, Any]:
    try:
        ok, found = check.look()
    except Exception as error:  # whatever it is, it is what was found
        ok, found = False, f"{type(error).__name__}: {error}".splitlines()[0][:200]
    return {"name": check.name, "ok": bool(ok), "found": found, "todo": "" if ok else check.todo}


def _new_enough() -> tuple[bool, str]:
    def numbers(version: str | None) -> list[int]:
        return [int(part) for part in re.findall(r"\d+", version or "")[:3]]

    old = [
        f"{name} {_version(name)}"
        for name, least in OLDEST.items()
        if numbers(_version(name)) < numbers(least)
    ]
    wanted = ", ".join(f"{name} {least}" for name, least in OLDEST.items())
    return not old, f"{', '.join(old)} is older than {wanted}" if old else f"at least {wanted}"


def _start() -> tuple[bool, str]:
    devices = jax.devices()
    return bool(devices), f"{len(devices)} x {devices[0].device_kind}"


def _gradients() -> np.ndarray:
    """Of both signs, of sizes from 1/8 to 6, which codes of 8 bits hold finely.

    Each keeps its sign: (STEPS, *SHAPE).
    """
    random = np.random.default_rng(0)
    at = random.choice([-1.0, 1.0], SHAPE) * 2.0 ** random.uniform(-2, 2, SHAPE)
    return np.asarray(at * random.uniform(0.5, 1.5, (STEPS, *SHAPE)), np.float32)


def _exact(gradients: np.ndarray) -> np.ndarray:
    """Where Adam is after those steps from 0: the paper's Algorithm 1 in float64, in NumPy."""
    mu, nu, at = (np.zeros(SHAPE) for _ in range(3))
    for t, g in enumerate(gradients.astype(np.float64), 1):
        mu, nu = B1 * mu + (1 - B1) * g, B2 * nu + (1 - B2) * g * g
        at -= RATE * (mu / (1 - B1**t)) / (np.sqrt(nu / (1 - B2**t)) + EPS)
    return at


def _stepped(
    tx: Any, params: jax.Array, gradients: Any, placed: Any = None
) -> tuple[jax.Array, Any, jax.Array]:
    """Parameters and state after a jitted step for each gradient.

    And the parameters that the last one was given.
    """

    def step(params: Any, state: Any, grads: Any) -> Any:
        updates, state = tx.update(grads, state, params)
        with jax.numpy_dtype_promotion(
            "standard"
        ):  # a bfloat16 parameter's update may be float32, and Optax adds them
            return adam_jax.apply_updates(params, updates), state

    compiled = jax.jit(step, donate_argnums=(0, 1), out_shardings=placed)
    state, given = jax.jit(tx.init, out_shardings=placed and placed[1])(params), params
    for grads in gradients:
        given = params
        params, state = compiled(params, state, jnp.asarray(grads, params.dtype))
    return params, state, given


def _path(storage: Any) -> tuple[bool, str]:
    gradients = _gradients()
    tx = adam(RATE, B1, B2, EPS, storage=storage)
    params, _, _ = _stepped(tx, jnp.zeros(SHAPE, jnp.float32), gradients)
    exact = _exact(gradients)
    error = float(np.sqrt(np.mean((np.asarray(params) - exact) ** 2) / np.mean(exact**2)))
    return error < CLOSE[
        storage
    ], f"{STEPS} steps are {error:.1e} from the exact ones; expected less than {CLOSE[storage]:g}"


def _moved(link: Any, fraction: float, steps: int) -> np.ndarray:
    """How far bfloat16 parameters of 1 get by steps of a fraction of their last bit, 2⁻⁷.

    In such fractions.
    """
    tx = adam_jax.chain(adam_jax.scale_by_learning_rate(fraction * 2.0**-7), link)
    params, _, _ = _stepped(tx, jnp.ones((256, 256), jnp.bfloat16), [-np.ones((256, 256))] * steps)
    return (np.asarray(params, np.float64) - 1) * 2**7 / fraction


def _unbiased() -> tuple[bool, str]:
    mean = float(_moved(adam_jax.round_stochastically(), 0.125, 1).mean())
    # 1/8 of 65,536 elements go up, give or take √(1/8·7/8·65,536) = 85 of them, 0.01 of the mean:
    # five times that.
    return (
        abs(mean - 1) < 0.05,
        f"steps of 1/8 of a bfloat16's last bit move it by {mean:.3f} of that, on average; "
        "expected 1",
    )


def _compensated() -> tuple[bool, str]:
    moved = _moved(adam_jax.compensate(), 0.125, 16)
    return bool((moved == 16).all()), f"16 such steps move it by {moved.mean():g}; expected 16"


def _donates() -> tuple[bool, str]:
    _, _, given = _stepped(adam(RATE), jnp.zeros(SHAPE, jnp.float32), np.ones((2, *SHAPE)))
    return (
        given.is_deleted(),
        "a step writes over its state"
        if given.is_deleted()
        else "a step leaves its old state behind",
    )


def _cut() -> tuple[bool, str]:
    """On one device too: the path is the same, and it must not fail."""
    devices = jax.local_devices()
    most = max(n for n in range(1, len(devices) + 1) if SHAPE[0] % n == 0)
    mesh, spec = Mesh(np.array(devices[:most]), ("data",)), PartitionSpec()  # type: ignore[no-untyped-call, unused-ignore]
    everywhere = NamedSharding(mesh, spec)
    tx, params, gradients = (
        adam(RATE, storage="8bit"),
        jnp.zeros(SHAPE, jnp.float32),
        _gradients()[:3],
    )
    placed = everywhere, adam_jax.state_shardings(tx, params, everywhere, zero="data")
    whole, _, _ = _stepped(tx, params, gradients)
    cut, _, _ = _stepped(
        tx, jax.device_put(jnp.zeros(SHAPE, jnp.float32), everywhere), gradients, placed
    )
    same = np.asarray(cut).tobytes() == np.asarray(whole).tobytes()
    return same, f"{most} of them give {'the bits' if same else 'other numbers than those'} of one"
