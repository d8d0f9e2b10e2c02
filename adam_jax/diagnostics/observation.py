"""What Adam is doing, as a flat dict of scalars in the state.

Taken on the device, now and then, from a sample of the elements.

A probe goes through the chain with the updates and takes a few elements of what it meets: of
moments, directions, codes. XLA computes these few a second time, in place of the arrays that would
have to be kept for a look at all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax

from adam_jax._core.context import Context
from adam_jax._core.errors import expect_integer, expect_params
from adam_jax._core.hyperparams import increment
from adam_jax._core.leaves import PyTree, find_nodes, takes_part
from adam_jax._core.spec import Spec, all_specs, bind, show, wrapped
from adam_jax._core.sums import agreeing_axes, all_reduce, optimization_barrier, vary_as
from adam_jax._core.transformation import (
    Transformation,
    call_update,
    expect_optimizer,
    transformation,
)
from adam_jax.diagnostics.eager import compiled, is_traced
from adam_jax.diagnostics.measuring import measure, sights
from adam_jax.diagnostics.metrics import METRICS
from adam_jax.diagnostics.sampling import Probe
from adam_jax.wrappers.groups import only


class ObserveState(NamedTuple):
    """State of `observe`.

    Attributes:
      inner_state: that of the observed transformation.
      step: steps taken, int32.
      observed: the metrics of the step that was looked at last, float32 scalars by "all/name" or
        "pattern/name", and its number, "step", int32, from 1; zeros before the first.
    """

    inner_state: PyTree
    step: Array
    observed: dict[str, Array]


def observe(tx: optax.GradientTransformation, *, every: int = 10, sample: int = 2**12) -> Any:
    r"""Measures the first step of an optimizer and every tenth after it, and keeps the numbers.

        tx = observe(chain(adamw(1e-3), round_stochastically()), every=10)
        ...
        history.append(observations(state))        on the host, where you read the loss
        plot(history)

    ===========================  ===============================================================
    gradient_norm                Euclidean norm of the gradient, of all elements, before any stage
                                 has changed it: of a group, too
    update_rms                   root mean square of the update
    update_ratio                 that over the root mean square of the parameters
    learning_rate_median, _p99   of the effective learning rate of an element, which is the learning
                                 rate over √ν̂ + ε and so may be much larger: the smallest that
                                 half of the elements, or 99 %, do not exceed
    eps_fraction                 fraction of elements where ε is more than √ν̂
    normalized_gradient_rms      root mean square of g/√ν̂: 1 where ν is up to date, more before
                                 a loss spike
    momentum_cosine              cosine of the gradient and μ
    signal_to_noise              median of \|μ̂\|/√ν̂, 1 for a gradient that does not change
    stalled_fraction             fraction of 16-bit parameters that the update would not move if it
                                 were rounded to nearest, also where it is rounded otherwise
    saturated_fraction           fraction of moments, stored as codes, that have the largest
                                 code or the smallest
    skipped                      steps that skip wrappers inside have skipped so far
    ===========================  ===============================================================

    Each as "all/name", and, inside `by_path`, as "pattern/name" for each group that has parameters
    and trains them; left out where there is no such thing, ν of momentum or codes of float32
    moments. Norms are of all elements, everything else of a sample of the 32 largest leaves of
    each. NaN where it has NaN. What is observed changes no update.

    Args:
      tx: the optimizer. Of transformations of others, an `optax.chain` too, gradients and updates
        are seen, moments are not. Where gradients are accumulated, observe what is inside:
        optax.MultiSteps(observe(tx), 4).
      every: look at the first step and every so many steps after it; 0 for never, which returns
        `tx` as it is.
      sample: how many elements to look at, of all leaves together; a leaf that is looked at has 16
        at least, or all it has.

    Raises:
      TypeError: if `tx` is no transformation, `every` or `sample` no integer.
      ValueError: for a negative `every`, a `sample` below 1, a `tx` that takes or gives `Moments`
        or is observed already, or has a group called "all"; in `update`, without `params`, or for
        the state of a run that is not observed.

    Source: |μ̂|/√ν̂: Kingma & Ba (2015), §2.1. g/√ν̂: Wortsman et al., "Stable and low-precision
    training for large-scale vision-language models" (2023), §3.4.
    """
    interface = expect_optimizer(tx, "observe")
    if any(spec.constructor is observe for spec in all_specs(tx)):
        raise ValueError(
            f"observe: found {show(tx)}, which is observed already; expected one observer of a run."
        )
    if "all" in _patterns(tx):
        raise ValueError(
            "observe: found a group 'all', which is the name of everything; write its pattern as "
            "'all()'."
        )
    expect_integer("observe: every", every, least=0)
    if every > np.iinfo(np.int32).max:
        raise ValueError(
            f"observe: every: found {every}; expected fewer than 2³¹ steps, or 0 for never."
        )
    expect_integer("observe: sample", sample, least=1)
    if every == 0:
        return tx
    inner = tx if isinstance(tx, Transformation) else optax.with_extra_args_support(tx)

    def init(params: PyTree) -> ObserveState:
        state = inner.init(params)
        observed = {"step": jnp.zeros((), jnp.int32)}
        for group, part, its, inside in [("all", tx, params, state), *_groups(tx, params, state)]:
            seen = sights(part, its, inside)
            observed |= {
                f"{group}/{name}": jnp.zeros((), np.float32) for name in METRICS if name in seen
            }
        return ObserveState(state, jnp.zeros((), jnp.int32), observed)

    def look(updates: Any, state: Any, params: Any, context: Context) -> dict[str, Array]:
        elements = sum(jnp.size(leaf) for leaf in jax.tree.leaves(updates) if takes_part(leaf))
        probe = Probe(lambda size: max(16, sample * size // max(elements, 1)))
        made, _ = call_update(
            inner,
            updates,
            state.inner_state,
            params,
            context._replace(selector=None, probe=probe),
        )
        raw = updates if context.gradient is None else context.gradient
        probe.end(inner, raw, made, state.inner_state, params)
        found = {
            f"{group}/{name}": x
            for group, its in measure(probe).items()
            for name, x in its.metrics().items()
        }
        # A group keeps only the metrics that it has; one without trained parameters has none.
        return {"step": increment(state.step)} | {
            name: _agreed(found[name], like)
            for name, like in state.observed.items()
            if name != "step"
        }

    look_compiled = compiled(look)

    def update(updates: Any, state: Any, params: Any, context: Context) -> tuple[Any, ObserveState]:
        params = expect_params(params, "observe()")
        if not isinstance(state, ObserveState):
            raise ValueError(
                f"observe: found a state of {type(state).__name__}; expected the one that `init` "
                "of the observed transformation made, or `update` returned. A run that is under "
                "way takes its state along: convert_state(state, tx, observe(tx), params).state."
            )
        if is_traced(updates, state, params, context.extra):
            observed = lax.cond(
                state.step % np.int32(every) == 0,
                lambda: look(updates, state, params, context),
                lambda: state.observed,
            )
            before = state.inner_state
            if any(map(_is_array, jax.tree.leaves(before))):
                before = _once(observed, before)
            else:
                updates = _once(observed, updates)
        else:
            # `lax.cond` would compile both of its branches anew at every step.
            looks = int(state.step) % every == 0
            observed = (
                look_compiled(updates, state, params, context) if looks else _copied(state.observed)
            )
            before = state.inner_state
        made, after = call_update(inner, updates, before, params, context)
        return made, ObserveState(after, increment(state.step), observed)

    bound = bind(observe, (tx,), {"every": every, "sample": sample})
    return transformation(Spec(observe, bound, init, update, interface, inner={"": tx}))


def _agreed(x: Array, like: Array) -> Array:
    """A number of a whole run: the mean of those that its devices have found."""
    agreed: Array = vary_as(all_reduce(x, lax.pmean, agreeing_axes(x, like, "observe")), like)
    return agreed


def _once(observed: dict[str, Array], tree: PyTree) -> PyTree:
    """A tree whose arrays are to be had once there are observations.

    What looks at the old state has to be done before the new one is written in its place, or XLA
    makes a copy of the old one. It keeps to an order only where a value depends on another one, so
    the arrays depend on whether a number that is never negative is not −1.
    """
    numbers = jnp.stack([value for name, value in observed.items() if name != "step"])
    bits = lax.bitcast_convert_type(numbers, np.uint32) >> np.uint32(1)
    known = jnp.max(bits).astype(np.int32) != optimization_barrier(np.int32(-1))
    return jax.tree.map(
        lambda x: jnp.where(known, x, jnp.zeros_like(x)) if _is_array(x) else x, tree
    )


def _is_array(x: Any) -> bool:
    """Whether a step reads it as an array.

    Codes it reads by their scales: one operand less on a TPU.
    """
    return jnp.ndim(x) > 0 and (takes_part(x) or x.dtype == np.int16)


def _patterns(tx: Any) -> set[str]:
    """The names of the outermost groups."""
    if not isinstance(tx, Transformation):
        return set()
    spec = tx.init.spec
    return (
        set(spec.inner)
        if spec.split is not None
        else set().union(*map(_patterns, [*spec.stages, *spec.inner.values()]))
    )


def _groups(
    tx: Any, params: PyTree, state: Any, prefix: str = ""
) -> Iterator[tuple[str, Any, PyTree, Any]]:
    """The groups inside a transformation that have parameters which train.

    Name, transformation, parameters, state.
    """
    spec = tx.init.spec if isinstance(tx, Transformation) else None
    if spec is None:
        return
    for part, its in zip(spec.stages, state if spec.stages else (), strict=True):
        yield from _groups(part, params, its, prefix)
    if spec.split is None:
        for _, _, part, its in wrapped(tx, state):
            yield from _groups(part, params, its, prefix)
        return
    belongs = spec.split(params)
    for name, part in spec.inner.items():
        inside = only(name, belongs, params)
        if any(map(takes_part, jax.tree.leaves(inside))):
            here = f"{prefix}/{name}" if prefix else name
            yield here, part, inside, state.inner_states[name]
            yield from _groups(part, inside, state.inner_states[name], here)


def observations(state: Any) -> dict[str, Array]:
    """What the last look saw, from the state of any transformation that holds an `observe`.

    Returns:
      Scalars by name: "step" is the number of the step that was looked at, from 1, and 0 before the
      first.

    Raises:
      ValueError: if the state holds no such thing, or several.
    """
    found: list[dict[str, Array]] = [node.observed for node in find_nodes(state, ObserveState)]
    if len(found) != 1:
        raise ValueError(
            f"observations: found {len(found)} observers in the state; expected one. Wrap the "
            "whole optimizer in observe(...), and pass its state; with every=0 it is not there."
        )
    copied: dict[str, Array] = _copied(found[0])
    return copied


@jax.jit
def _copied(observed: dict[str, Array]) -> Any:
    """New arrays: a step that takes the state as a donation deletes those in it."""
    return jax.tree.map(jnp.copy, observed)
