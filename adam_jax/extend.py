"""What a stage, a wrapper or an optimizer of your own is written with.

CONTRIBUTING walks through each of them.

    @stage(takes="updates", gives="updates", rate="before")
    def scale_by_sign(strength=1.0):
        def update(updates, state, params, context):
            return lift(lambda u: strength * jnp.sign(u), updates), state

        return Definition(stateless, update)

Storage, `reset`, `convert_state`, `state_bytes`, `describe`, `observe` and `state_shardings` work
with it.
"""

from adam_jax._core.chain import chain
from adam_jax._core.context import Context
from adam_jax._core.decorators import recipe, stage, stateless, wrapper
from adam_jax._core.hyperparams import (
    Hyperparameter,
    Hyperparameters,
    Settable,
    cast,
    complement,
    increment,
)
from adam_jax._core.interface import Interface
from adam_jax._core.leaves import as_wide, scalar_dtype, takes_part
from adam_jax._core.lift import lift
from adam_jax._core.spec import Definition
from adam_jax._core.transformation import Transformation, call_update
from adam_jax.stages.moments import Moments, expect_moments
from adam_jax.storage.format import Format
from adam_jax.storage.formats import resolve_storage
from adam_jax.storage.random_bits import StepBits
from adam_jax.storage.slot import MomentSlot

__all__ = [
    "Context",
    "Definition",
    "Format",
    "Hyperparameter",
    "Hyperparameters",
    "Interface",
    "MomentSlot",
    "Moments",
    "Settable",
    "StepBits",
    "Transformation",
    "as_wide",
    "call_update",
    "cast",
    "chain",
    "complement",
    "expect_moments",
    "increment",
    "lift",
    "recipe",
    "resolve_storage",
    "scalar_dtype",
    "stage",
    "stateless",
    "takes_part",
    "wrapper",
]
