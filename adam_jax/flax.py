"""Flax's trainers, which take whole steps by `tx.step`.

Each is the class of Flax, but for one method. Import this module by its name: the rest of the
package works without Flax.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import optax
from flax import nnx
from flax.training import train_state

from adam_jax._core.errors import brief
from adam_jax._core.leaves import PyTree
from adam_jax._core.spec import show
from adam_jax._core.transformation import Transformation


class Optimizer(nnx.Optimizer):
    """`nnx.Optimizer` that takes whole steps: parameters in 16 bits are rounded once.

        optimizer = adam_jax.flax.Optimizer(model, adamw(1e-3), wrt=nnx.Param)
        optimizer.update(model, grads)

    Args:
      model: an NNX module.
      tx: a transformation of adam_jax.
      **settings: `wrt`, and what else `nnx.Optimizer` takes.

    Raises:
      TypeError: for a transformation that has no `step`.

    Source: `flax.nnx.Optimizer`.
    """

    def __init__(
        self, model: nnx.Module, tx: optax.GradientTransformation, **settings: Any
    ) -> None:
        _expect_step(tx, "Optimizer")
        super().__init__(model, tx, **settings)

    def update(self, model: nnx.Module, grads: PyTree, /, **extra: Any) -> None:
        """Moves the parameters of the model, the state and the count of steps, in place.

        Args:
          model: the module that the optimizer was made for.
          grads: the gradients, as `nnx.grad` returns them.
          **extra: what transformations of others in the chain take.
        """
        graph = {"graph": self.graph} if hasattr(self, "graph") else {}  # Flax 0.11 has none
        params, state = self.tx.step(
            _arrays(nnx.state(grads, self.wrt, **graph)),
            _arrays(self.opt_state),
            _arrays(nnx.state(model, self.wrt, **graph)),
            **_arrays(extra),
        )
        nnx.update(model, params)
        nnx.update(self.opt_state, nnx.state(state, **graph))
        self.step[...] += 1


def _arrays(tree: Any) -> Any:
    """A tree of Flax's variables as one of arrays, of the same kind for all."""
    if hasattr(nnx, "as_pure"):
        return nnx.as_pure(tree)
    return nnx.freeze(nnx.pure(tree))  # Flax 0.11


class TrainState(train_state.TrainState):
    """Flax's `TrainState` that takes whole steps: parameters in 16 bits are rounded once.

        state = adam_jax.flax.TrainState.create(apply_fn=model.apply, params=params, tx=adamw(1e-3))
        state = state.apply_gradients(grads=grads)

    Source: `flax.training.train_state.TrainState`.
    """

    @classmethod
    def create(cls, *, apply_fn: Any, params: PyTree, tx: Any, **fields: Any) -> Self:
        """Returns a state at step 0: see Flax's `create`.

        Raises:
          TypeError: for a transformation that has no `step`.
        """
        _expect_step(tx, "TrainState")
        made: Self = super().create(apply_fn=apply_fn, params=params, tx=tx, **fields)
        return made

    def apply_gradients(self, *, grads: PyTree, **fields: Any) -> Self:
        """Returns the state after a step.

        Args:
          grads: the gradients, of the structure of `params`.
          **fields: other fields to replace.
        """
        given = train_state.OVERWRITE_WITH_GRADIENT  # whose gradients are the next parameters
        if isinstance(grads, Mapping) and given in grads:
            trained, state = self.tx.step(grads["params"], self.opt_state, self.params["params"])
            params = {"params": trained, given: grads[given]}
        else:
            params, state = self.tx.step(grads, self.opt_state, self.params)
        made: Self = self.replace(step=self.step + 1, params=params, opt_state=state, **fields)
        return made


def _expect_step(tx: Any, caller: str) -> None:
    if not isinstance(tx, Transformation):
        found = show(tx) if isinstance(tx, optax.GradientTransformation) else brief(tx)
        raise TypeError(
            f"adam_jax.flax.{caller}: tx: found {found}; expected a transformation of adam_jax, "
            "which has `step`. Chain those of others by adam_jax.chain, in place of optax.chain."
        )
