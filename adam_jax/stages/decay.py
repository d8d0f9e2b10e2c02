"""Weight decay."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import numpy as np
from jax import Array

from adam_jax._core.arithmetic import multiply
from adam_jax._core.context import Context
from adam_jax._core.decorators import stage
from adam_jax._core.errors import brief, call_user, expect_params
from adam_jax._core.hyperparams import (
    Hyperparameter,
    Hyperparameters,
    ScalarOrSchedule,
    cast,
    increment,
    peak,
)
from adam_jax._core.layers import LayerAxes, expect_layer_axes
from adam_jax._core.leaves import PyTree, as_wide, as_wide_as, scalar_dtype
from adam_jax._core.lift import lift
from adam_jax._core.spec import Definition, show
from adam_jax.stages.matrices import decide

Mask: TypeAlias = Literal["matrices"] | PyTree | Callable[[PyTree], PyTree]


class AddDecayedWeightsState(NamedTuple):
    """State of `add_decayed_weights`.

    Attributes:
      step: steps taken, int32; `None` where there is no schedule.
      hyperparams: the weight decay, and the learning rate that it follows, if they are settable.
    """

    step: Array | None
    hyperparams: dict[str, Array]


def _rate(*, learning_rate: Any, **others: Any) -> str:
    return "before" if learning_rate is None else "after"


@stage(takes="updates", gives="updates", rate=_rate, moves=True)
def add_decayed_weights(
    weight_decay: ScalarOrSchedule = 0.0,
    mask: Mask | None = None,
    *,
    learning_rate: ScalarOrSchedule | None = None,
    layer_axes: LayerAxes | None = None,
) -> Definition:
    """Lets parameters decay towards zero.

        update ← update + weight_decay·params                               before the learning rate
        update ← update − weight_decay·(learning_rate / its peak)·params    after it

    Args:
      weight_decay: ≥ 0.
      mask: which leaves decay: a tree of booleans with the structure of the parameters or a prefix
        of it, a function of the parameters that returns one, or "matrices". `None`: all.

        "matrices" spares biases, the scales of norms, and leaves with fewer than two axes. It tells
        by the names of leaves and modules ("bias", "scale", `LayerNorm`), not by shapes alone: the
        bias of attention has two axes. A leaf whose name says nothing decays if it has two axes or
        more; `describe` says for each leaf why it decays, and of which leaves the mask is unsure.
      learning_rate: `None` for a decay that the learning rate will multiply. The learning rate
        itself (a number or a schedule) for one that it does not: the stage then stands after it,
        and follows only the schedule's course relative to its peak, which is looked for once, when
        the stage is made.
      layer_axes: which axes count layers in a model of stacked layers, by patterns of paths:
        `{"layers/.*": 0}`. "matrices" does not count them. `stages.flax_layer_axes` reads them from
        Flax's boxes.

    Raises:
      TypeError: for `layer_axes` that is no mapping from patterns to axes.
      ValueError: for a negative or NaN decay, an unknown mask, and, in `update`, without `params`,
        with a mask that does not fit, or with a pattern of `layer_axes` that matches no leaf.

    Source: Loshchilov & Hutter, "Decoupled Weight Decay Regularization" (2019), Algorithm 2.
    """
    hypers = Hyperparameters(Hyperparameter("weight_decay", weight_decay, "[0, inf)"))
    if isinstance(mask, str) and mask != "matrices":
        raise ValueError(
            f"mask: found {brief(mask)}; expected 'matrices', a tree of booleans, a function that "
            "returns one, or None."
        )
    expect_layer_axes(layer_axes)
    layer_axes = None if layer_axes is None else dict(layer_axes)
    course = Hyperparameter("learning_rate", 1.0 if learning_rate is None else learning_rate)
    highest = peak(course.first if course.settable else course.value)
    follows = course.scheduled or course.settable
    read = Hyperparameters(*hypers.values(), *([course] if follows else []))

    def init(params: PyTree) -> AddDecayedWeightsState:
        return AddDecayedWeightsState(read.first_step(), read.kept(scalar_dtype(params)))

    def update(
        updates: Any, state: AddDecayedWeightsState, params: Any, context: Context
    ) -> tuple[PyTree, AddDecayedWeightsState]:
        params = expect_params(params, "add_decayed_weights()")
        scalars = scalar_dtype(params)
        values = read.at(state.step, state.hyperparams)
        factor = cast(values["weight_decay"], scalars)
        if learning_rate is not None:
            factor = -factor * (
                cast(values["learning_rate"], scalars) / cast(highest, scalars) if follows else 1
            )

        def leaf(update: Any, param: Any, decays: bool) -> Array:
            if isinstance(weight_decay, (int, float)) and weight_decay == 0:
                return as_wide(update)  # spares the reading of every parameter
            wide = as_wide(as_wide_as(update, param))
            return wide + multiply(as_wide(as_wide_as(param, update)), factor) if decays else wide

        updates = lift(leaf, updates, params=params, mask=_decaying(mask, layer_axes, params))
        return updates, state._replace(step=increment(state.step))

    return Definition(
        init,
        update,
        hyperparameters=hypers,
        decays=functools.partial(_decaying, mask, layer_axes),
        decay_reasons=functools.partial(_reasons, mask, layer_axes),
    )


def _flag(decays: Any) -> bool:
    if not isinstance(decays, (bool, np.bool_)) and decays not in (0, 1):
        raise TypeError(f"found {decays!r}")
    return bool(decays)


def _reasons(mask: Mask | None, layer_axes: LayerAxes | None, params: PyTree) -> list[str]:
    """Returns why each leaf decays or does not, in order."""
    if isinstance(mask, str):
        return [why for _, why in decide(params, layer_axes)]
    return ["no mask" if mask is None else "the mask"] * len(jax.tree.leaves(params))


def _decaying(mask: Mask | None, layer_axes: LayerAxes | None, params: PyTree) -> PyTree:
    """A tree of booleans shaped like the parameters."""
    if mask is None:
        return jax.tree.map(lambda p: True, params)
    if isinstance(mask, str):
        flags = [decays for decays, _ in decide(params, layer_axes)]
        return jax.tree.unflatten(jax.tree.structure(params), flags)
    tree = call_user("mask", mask, params, "the parameters") if callable(mask) else mask
    try:
        return jax.tree.map(
            lambda decays, part: jax.tree.map(lambda p: _flag(decays), part), tree, params
        )
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"mask: found {brief(tree)}; expected True or False in the structure of the "
            f"parameters, {show(jax.tree.structure(params))}, or in a prefix of it."
        ) from error
