"""`cautious`: drops the elements of an update that point against the gradient."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array

from adam_jax._core.arithmetic import multiply
from adam_jax._core.context import Context
from adam_jax._core.decorators import stage, stateless
from adam_jax._core.leaves import PyTree, as_wide, as_wide_as
from adam_jax._core.lift import lift
from adam_jax._core.spec import Init, Update
from adam_jax._core.sums import mean


@stage(takes="updates", gives="updates")
def cautious(*, after_learning_rate: bool | None = None) -> tuple[Init, Update]:
    """Takes only those elements of the update that this step's gradient agrees with.

    These are scaled up to make up for the rest.

        agrees = update·gradient < 0                 (> 0 before the learning rate)
        update ← update·agrees / max(mean(agrees), 1e-3)

    The mean is over a leaf. Fits behind a finished member, `chain(adamw(1e-3), cautious())`, where
    it judges the whole step; the paper's place is before weight decay: `chain(track_moments(),
    correct_bias(), scale_by_moments(), cautious(), add_decayed_weights(0.01),
    scale_by_learning_rate(1e-3))`.

    Args:
      after_learning_rate: on which side of the learning rate it stands, which decides the sign.
        `None`: the chain knows. Has to be said behind a transformation of Optax, and outside of
        `adam_jax.chain`, where the gradient has to be passed as well: `update(grads, state, params,
        gradient=grads)`.

    Raises:
      ValueError: in `update`, where the side or the gradient is not known.

    Source: Liang et al., "Cautious Optimizers: Improving Training with One Line of Code" (2024),
    Algorithm 1; the factor is that of the authors' later code, which is 1 where all elements agree
    (the paper's has numel + 1 below).
    """

    def update(updates: Any, state: Any, params: Any, context: Context) -> tuple[PyTree, Any]:
        after = context.applied if after_learning_rate is None else after_learning_rate
        if context.gradient is None or after is None:
            lacks = (
                "the gradient"
                if context.gradient is None
                else "whether the learning rate is already in the updates"
            )
            raise ValueError(
                f"cautious() does not know {lacks}. Put it into adam_jax.chain, or say "
                "cautious(after_learning_rate=True) and pass the gradient: update(grads, state, "
                "params, gradient=grads)."
            )

        def leaf(update: Any, grad: Any) -> Array:
            update, g = as_wide(as_wide_as(update, grad)), as_wide(as_wide_as(grad, update))
            # Of the signs, where there are any: the product of two small numbers is 0.
            along = (
                update.real * g.real + update.imag * g.imag
                if jnp.iscomplexobj(g)
                else jnp.sign(update) * jnp.sign(g)
            )
            agrees = (along < 0 if after else along > 0).astype(along.dtype)
            return multiply(update, agrees / jnp.maximum(mean(agrees), 1e-3))

        return lift(leaf, updates, gradient=context.gradient), state

    return stateless, update
