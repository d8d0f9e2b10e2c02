"""How a wrapper skips a step, and how a run says that it has skipped too many."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, ParamSpec

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.experimental import checkify

from adam_jax._core.chain import is_chain
from adam_jax._core.context import Context, StepSelector
from adam_jax._core.errors import expect_integer, expect_one_of
from adam_jax._core.hyperparams import increment
from adam_jax._core.leaves import PyTree, takes_part
from adam_jax._core.spec import Spec, bind
from adam_jax._core.transformation import (
    Transformation,
    call_update,
    expect_optimizer,
    transformation,
)

P = ParamSpec("P")


class SkipNonfiniteState(NamedTuple):
    """State of `skip_nonfinite`.

    Attributes:
      inner_state: that of the guarded transformation.
      skipped: steps skipped in all, int32.
      consecutive: steps skipped since the last one taken, int32.
      too_many: whether `consecutive` has ever reached `max_consecutive`; stays true.
    """

    inner_state: PyTree
    skipped: Array
    consecutive: Array
    too_many: Array


class SkipSpikesState(NamedTuple):
    """State of `skip_spikes`.

    Attributes:
      inner_state: that of the guarded transformation.
      skipped: as in `SkipNonfiniteState`.
      consecutive: as in `SkipNonfiniteState`.
      too_many: as in `SkipNonfiniteState`.
      norms: the last finite gradient norms above 0, those of skipped steps too, float32: a ring.
      seen: how many norms there have been, int32; once there were two rings full, less a multiple
        of the ring's size.
    """

    inner_state: PyTree
    skipped: Array
    consecutive: Array
    too_many: Array
    norms: Array
    seen: Array


class SkipWrapper(NamedTuple):
    """What a guard is.

    Attributes:
      tx: the transformation that it wraps.
      max_consecutive: how many skipped steps in a row are too many.
      check: whether to raise on the device.
      state_class: the class of its state.
      judge: (updates, state) -> whether to take the step, and the fields of the state that this
        guard alone has; "too_many" among them for what else is too many.
      first: the first values of these fields.
    """

    tx: Any
    max_consecutive: int
    check: bool
    state_class: type
    judge: Callable[[PyTree, Any], tuple[Array, dict[str, Array]]]
    first: Mapping[str, Any] = MappingProxyType({})


def skip_wrapper(make: Callable[P, SkipWrapper]) -> Callable[P, Transformation]:
    """Makes a guard of a function that describes it."""
    caller: str = getattr(make, "__name__", repr(make))

    @functools.wraps(make)
    def build(*args: P.args, **kwargs: P.kwargs) -> Transformation:
        bound = bind(make, args, kwargs)
        tx, most, check, kind, judge, first = make(*args, **kwargs)
        expect_one_of(f"{caller}: check", check, (True, False))
        interface = expect_optimizer(tx, caller)
        expect_integer(f"{caller}: max_consecutive", most, least=1)
        inner = tx if isinstance(tx, Transformation) else optax.with_extra_args_support(tx)

        def init(params: PyTree) -> Any:
            # A copy is placed as what a step computes is, also in a mesh with explicit axes.
            own = {name: jnp.copy(jnp.asarray(value)) for name, value in first.items()}
            zero = jnp.zeros((), jnp.int32)
            return kind(inner.init(params), zero, jnp.zeros_like(zero), jnp.zeros((), bool), **own)

        def update(updates: Any, state: Any, params: Any, context: Context) -> tuple[Any, Any]:
            fits = type(state) is kind and all(
                jnp.shape(getattr(state, name))[-1:] == np.shape(own) for name, own in first.items()
            )
            if not fits:
                raise ValueError(
                    f"{caller}: found a state of {type(state).__name__}; expected the "
                    f"{kind.__name__} that `init` of this very guard made, or one that its "
                    "`update` returned. convert_state carries a run over from another one."
                )
            takes, own = judge(updates, state)
            alarm = own.pop("too_many", np.False_)
            selector = StepSelector(takes)
            made, after = call_update(
                inner, updates, state.inner_state, params, context._replace(selector=selector)
            )
            if not is_chain(inner):
                after, made = selector.after(after, state.inner_state, made)
            consecutive = jnp.where(takes, 0, increment(state.consecutive))
            if check:
                checkify.check(
                    consecutive < most,
                    f"{caller} has skipped {{n}} steps in a row. {_REMEDY}",
                    n=consecutive,
                )
            return jax.tree.map(lambda update: _or_still(takes, update), made), kind(
                inner_state=after,
                skipped=jnp.where(takes, state.skipped, increment(state.skipped)),
                consecutive=consecutive,
                too_many=state.too_many | (consecutive >= most) | alarm,
                **own,
            )

        skips = interface._replace(skips=True)
        return transformation(Spec(build, bound, init, update, skips, inner={"": tx}))

    return build


_REMEDY = (
    "Look at the loss and at the data of these steps, lower the learning rate, or go back to a "
    "checkpoint."
)


def _or_still(takes: Array, update: Any) -> Any:
    """The update, or −0, which changes no bit of a parameter: 0 would make +0 of a −0."""
    return jnp.where(takes, update, -jnp.zeros_like(update)) if takes_part(update) else update


def expect_progress(state: Any) -> None:
    """Raises if a guard has skipped too many steps in a row, wherever in the state it is.

    On the host: it waits for the state to be computed, so call it where you read the loss, not at
    every step.

    Args:
      state: that of any transformation, in Flax's variables too; of one that was mapped over, all
        members.

    Raises:
      RuntimeError: naming the guards, with their counts.
      ValueError: if there is no guard in the state.
    """
    found = list(_guards(state))
    if not found:
        raise ValueError(
            "expect_progress: found no guard in the state; expected that of skip_nonfinite(...) "
            "or skip_spikes(...)."
        )
    says = [
        f"{kind} at {place or 'the top'}: {skipped} steps skipped in all, {consecutive} in a row "
        "now"
        for place, kind, skipped, consecutive, too_many in found
        if np.any(too_many)
    ]
    if says:
        raise RuntimeError(f"too many steps were skipped. {'; '.join(says)}. {_REMEDY}")


def _guards(state: Any, place: str = "") -> Iterator[tuple[str, str, Any, Any, Any]]:
    """Place, name and counts of every guard, the one inside another too."""

    def is_guard(node: Any) -> bool:
        return isinstance(node, (SkipNonfiniteState, SkipSpikesState))

    for path, node in jax.tree_util.tree_flatten_with_path(state, is_leaf=is_guard)[0]:
        if is_guard(node):
            here = place + jax.tree_util.keystr(path)
            skipped, consecutive, too_many = (
                np.asarray(jax.tree.leaves(its)[0])
                for its in (node.skipped, node.consecutive, node.too_many)
            )
            yield here, type(node).__name__.removesuffix("State"), skipped, consecutive, too_many
            yield from _guards(node.inner_state, f"{here}.inner_state")
