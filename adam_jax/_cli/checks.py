"""The checks of `python -m adam_jax doctor`: a few steps whose numbers are known."""

from __future__ import annotations

import functools
import importlib.metadata
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import adam_jax
from adam_jax.family import adam
from adam_jax.storage.formats import NAMED

OLDEST = {"jax": "0.6.0", "jaxlib": "0.6.0", "optax": "0.2.5"}

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


def version_of(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


class _Check(NamedTuple):
    """`look` returns whether all is well, and what it found; an exception is a failure too."""

    name: str
    look: Callable[[], tuple[bool, str]]
    todo: str


def all_checks() -> list[_Check]:
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


def run_check(check: _Check) -> dict[str, Any]:
    try:
        ok, found = check.look()
    except Exception as error:  # whatever it is, it is what was found
        ok, found = False, f"{type(error).__name__}: {error}".splitlines()[0][:200]
    return {"name": check.name, "ok": bool(ok), "found": found, "todo": "" if ok else check.todo}


def _new_enough() -> tuple[bool, str]:
    def numbers(version: str | None) -> list[int]:
        return [int(part) for part in re.findall(r"\d+", version or "")[:3]]

    old = [
        f"{name} {version_of(name)}"
        for name, least in OLDEST.items()
        if numbers(version_of(name)) < numbers(least)
    ]
    wanted = ", ".join(f"{name} {least}" for name, least in OLDEST.items())
    return not old, f"{', '.join(old)} is older than {wanted}" if old else f"at least {wanted}"


def _start() -> tuple[bool, str]:
    devices = jax.devices()
    return bool(devices), f"{len(devices)} x {devices[0].device_kind}"


def _gradients() -> np.ndarray:
    """Returns gradients of both signs and of sizes from 1/8 to 6. Codes hold these finely.

    Each keeps its sign: (STEPS, *SHAPE).
    """
    random = np.random.default_rng(0)
    at = random.choice([-1.0, 1.0], SHAPE) * 2.0 ** random.uniform(-2, 2, SHAPE)
    return np.asarray(at * random.uniform(0.5, 1.5, (STEPS, *SHAPE)), np.float32)


def _exact(gradients: np.ndarray) -> np.ndarray:
    """Returns the parameters after Algorithm 1 of the paper, in float64, from 0, in NumPy."""
    mu, nu, at = (np.zeros(SHAPE) for _ in range(3))
    for t, g in enumerate(gradients.astype(np.float64), 1):
        mu, nu = B1 * mu + (1 - B1) * g, B2 * nu + (1 - B2) * g * g
        at -= RATE * (mu / (1 - B1**t)) / (np.sqrt(nu / (1 - B2**t)) + EPS)
    return at


def _stepped(
    tx: Any, params: jax.Array, gradients: Any, placed: Any = None
) -> tuple[jax.Array, Any, jax.Array]:
    """Returns parameters and state after a jitted step for each gradient.

    It also returns the parameters that the last step was given.
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
