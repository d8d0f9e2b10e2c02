"""Steps that would do harm are skipped.

Gradients that hold NaN or infinities, and gradients that are far too large.

A guard wraps a whole optimizer. A step that it skips changes no parameter and nothing of the
optimizer's state: no moment, no count, no random bits. Whether to skip is one number for all
devices, and every array is chosen by it, new or old, in the very pass that writes it: there is no
second copy of the state, and nothing waits for the host.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax

from adam_jax._core.errors import expect_integer
from adam_jax._core.hyperparams import Hyperparameter
from adam_jax._core.leaves import PyTree, as_wide, finfo, scalar_dtype, takes_part, wide_dtype
from adam_jax._core.sums import agreeing_axes, all_reduce, sums_of_squares
from adam_jax.wrappers.skipping import (
    SkipNonfiniteState,
    SkipSpikesState,
    SkipWrapper,
    skip_wrapper,
)


def _finite(updates: PyTree, state: Any, caller: str) -> Array:
    """Whether all elements are finite, on all devices of a run."""
    # By their sum, made so small that it cannot overflow: a sum of floats needs no array of its own
    # on any backend. The largest would tell as well, but XLA's maximum drops NaN on a CPU.
    parts = [
        jnp.sum(as_wide(leaf) * np.asarray(2.0**-64, wide_dtype(leaf)))
        for leaf in jax.tree.leaves(updates)
        if takes_part(leaf)
    ]
    finite = functools.reduce(jnp.logical_and, map(jnp.isfinite, parts), jnp.ones((), bool))
    axes = agreeing_axes(finite, state.skipped, caller)
    return all_reduce(finite.astype(jnp.int32), lax.pmin, axes) == 1


@skip_wrapper
def skip_nonfinite(
    tx: optax.GradientTransformation, *, max_consecutive: int = 10, check: bool = False
) -> SkipWrapper:
    """Skips the steps whose gradients hold NaN or an infinity.

        tx = skip_nonfinite(chain(adamw(1e-3), round_stochastically()))

    A skipped step changes no bit of the parameters and nothing in the state of `tx`. It is counted.
    Training goes on skipping for as long as gradients are poison; `too_many` in the state tells,
    and `expect_progress(state)` raises, on the host, once `max_consecutive` steps in a row have
    been. Guard all that has a state: a link outside counts steps that were skipped, and an
    accumulator of gradients keeps the poison: skip_nonfinite(optax.MultiSteps(tx,
    4).gradient_transformation()).

    Args:
      tx: the optimizer, of this package or of others.
      max_consecutive: how many steps in a row are too many, ≥ 1.
      check: raise on the device too, by `jax.experimental.checkify`. The step then has to be
        transformed by `checkify.checkify(step, errors=checkify.user_checks)`.

    Raises:
      TypeError: if `tx` is no transformation, or `max_consecutive` no integer.
      ValueError: if `max_consecutive` is below 1, or `tx` takes or gives `Moments`.
    """
    return SkipWrapper(
        tx,
        max_consecutive,
        check,
        SkipNonfiniteState,
        lambda updates, state: (_finite(updates, state, "skip_nonfinite"), {}),
    )


@skip_wrapper
def skip_spikes(
    tx: optax.GradientTransformation,
    *,
    deviations: float = 6.0,
    least_ratio: float = 2.0,
    window: int = 128,
    warmup: int | None = None,
    max_consecutive: int = 10,
    max_share: float = 0.04,
    check: bool = False,
) -> SkipWrapper:
    """Skips the steps whose gradient norm is far above its recent values.

    It also skips those that `skip_nonfinite` skips.

        skip where log(norm) > median + max(deviations·1.4826·MAD, log(least_ratio))

    Median and MAD, the median distance from the median, are of the logarithms of the last `window`
    norms above 0. Fewer than half of these can be anything without moving them far, so norms of
    skipped steps are among them: a spike does not hide the next one, and where gradients grow for
    good, steps are taken again after half a window. The norm is the Euclidean one of all leaves, a
    sum of squares in float32 whose last bit depends on the mesh; one below 1e-22 counts as 0. All
    else is as in `skip_nonfinite`.

    Args:
      tx: the optimizer, of this package or of others.
      deviations: how many robust standard deviations are far, > 0.
      least_ratio: a norm below so many medians is never far, ≥ 1: the distribution may be narrow.
      window: how many norms are kept, ≥ 2.
      warmup: before so many norms, from 1 to `window`, none is far. `None`: 32, or the window where
        that is smaller.
      max_consecutive: as in `skip_nonfinite`.
      max_share: of a full window more than this share, and more than 4 norms, are too many to be
        far: they are no spikes then but a part of the data, which would never be learned from.
        `too_many` is set, and `expect_progress` raises.
      check: as in `skip_nonfinite`.

    Raises:
      TypeError: as `skip_nonfinite`, and for what is no number.
      ValueError: as `skip_nonfinite`, and for a number outside of its range.

    Source: median and MAD as location and scale: Rousseeuw & Croux, "Alternatives to the Median
    Absolute Deviation" (1993), §1.
    """
    for name, value, within in [
        ("deviations", deviations, "(0, inf)"),
        ("least_ratio", least_ratio, "[1, inf)"),
        ("max_share", max_share, "(0, 1]"),
    ]:
        if callable(value):
            raise TypeError(
                f"skip_spikes: {name}: found the schedule {value!r}; expected a number."
            )
        Hyperparameter(f"skip_spikes: {name}", value, within)
    expect_integer("skip_spikes: window", window, least=2)
    needed = min(32, window) if warmup is None else warmup
    expect_integer("skip_spikes: warmup", needed, least=1)
    if needed > window:
        raise ValueError(
            f"skip_spikes: found warmup={warmup} with window={window}; expected no more than are "
            "kept."
        )

    def judge(updates: PyTree, state: SkipSpikesState) -> tuple[Array, dict[str, Array]]:
        norm = _norm(updates, state)
        finite = _finite(updates, state, "skip_spikes")
        logs = jnp.log(jnp.maximum(state.norms, finfo(np.float32).tiny))
        known = jnp.arange(window) < state.seen
        center = _median(logs, known)
        far = jnp.maximum(
            jnp.asarray(deviations, np.float32) * 1.4826 * _median(jnp.abs(logs - center), known),
            jnp.log(jnp.asarray(least_ratio, np.float32)),
        )
        spike = (state.seen >= needed) & (jnp.log(norm) > center + far)
        regular = jnp.sum(logs > center + far) > max(4, int(max_share * window))
        # Less a window once there have been two: the place in the ring stays, and nothing
        # overflows.
        seen = state.seen + 1
        seen = jnp.where(seen < 2 * window, seen, seen - window)
        # A norm of 0 is no measure of others: where a loss is masked out, or nothing trains yet,
        # all that follows would be far.
        notes = finite & (norm > 0)
        noted = {
            "norms": jnp.where(notes, state.norms.at[state.seen % window].set(norm), state.norms),
            "seen": jnp.where(notes, seen, state.seen),
            "too_many": (state.seen >= window) & regular,
        }
        return finite & ~spike, noted

    first = {"norms": np.zeros(window, np.float32), "seen": np.int32(0)}
    return SkipWrapper(tx, max_consecutive, check, SkipSpikesState, judge, first)


def _norm(updates: PyTree, state: SkipSpikesState) -> Array:
    """The Euclidean norm of all leaves; what is larger than float32 holds is infinite."""
    zero = jnp.zeros((), scalar_dtype(updates))
    total = functools.reduce(jnp.add, sums_of_squares(updates), zero)
    axes = agreeing_axes(total, state.skipped, "skip_spikes")
    return jnp.sqrt(all_reduce(total, lax.psum, axes)).astype(np.float32)


def _median(x: Array, known: Array) -> Array:
    """The lower median of those that are known; of none, infinity."""
    inorder = jnp.sort(jnp.where(known, x, np.float32(np.inf)))
    return inorder[jnp.maximum(jnp.sum(known) - 1, 0) // 2]
