"""`manual_axes`: which devices of `jax.shard_map` and `jax.pmap` are one run."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import jax
import optax

from adam_jax._core.context import Context
from adam_jax._core.decorators import wrapper
from adam_jax._core.errors import brief
from adam_jax._core.leaves import PyTree
from adam_jax._core.spec import Init, Update
from adam_jax._core.sums import ManualAxes, independent_axes, told, vary_along
from adam_jax._core.transformation import call_update

Axes: TypeAlias = str | tuple[str, ...]


class ManualAxesState(NamedTuple):
    """State of `manual_axes`.

    Attributes:
      inner_state: that of the wrapped transformation.
    """

    inner_state: PyTree


@wrapper
def manual_axes(
    tx: optax.GradientTransformation, *, shared: Axes = (), independent: Axes = ()
) -> tuple[Init, Update]:
    """Says what the manual mesh axes of `jax.shard_map` and `jax.pmap` mean.

        tx = manual_axes(skip_nonfinite(adamw(1e-3)), independent="population")

    Along a shared axis devices train the same parameters, whole or cut: whether `skip_nonfinite`
    and `skip_spikes` skip a step is one decision, parts of a row have one 8-bit scale, and
    `observe` keeps the mean of what the devices see. Along an independent axis each device trains a
    member of a population: it skips its own steps, and has its own scales and observations.

    JAX cannot tell the one from the other. Where it matters and nothing says it, `update` raises an
    error. Nothing has to be said where JAX knows that gradients are the same on all devices
    (`jax.shard_map` with its default check_vma=True, gradients averaged by `jax.lax.pmean`), nor
    where it knows that each has a state of its own (the state's counts are sharded over that axis).
    `jax.vmap` has no such axes: its members are independent.

    Args:
      tx: the optimizer, of this package or of others. Put `manual_axes` around all of it.
      shared: the name of a mesh axis, or a tuple of names.
      independent: the same. Under `jax.pmap`, the name is its `axis_name`.

    Raises:
      TypeError: if `tx` is no transformation, or a name no string.
      ValueError: if an axis is both, or `tx` takes or gives `Moments`.
    """
    axes = ManualAxes(_names("shared", shared), _names("independent", independent))
    if both := set(axes.shared) & set(axes.independent):
        raise ValueError(
            f"manual_axes: found {', '.join(map(repr, sorted(both)))} in both shared= and "
            "independent=; expected each axis in one of them."
        )

    def init(params: PyTree) -> ManualAxesState:
        state = tx.init(params)
        # Counts of members differ from their first step on. `lax.scan` wants their type at once.
        return ManualAxesState(jax.tree.map(lambda x: vary_along(x, independent_axes(axes)), state))

    def update(
        updates: Any, state: ManualAxesState, params: Any, context: Context
    ) -> tuple[Any, ManualAxesState]:
        with told(axes):
            updates, inner = call_update(tx, updates, state.inner_state, params, context)
        return updates, ManualAxesState(inner)

    return init, update


def _names(argument: str, axes: Any) -> tuple[str, ...]:
    names = axes if isinstance(axes, tuple) else (axes,)
    if not all(isinstance(name, str) for name in names):
        raise TypeError(
            f"manual_axes: {argument}: found {brief(axes)}; expected the name of a mesh axis, or a "
            "tuple of names."
        )
    return names
