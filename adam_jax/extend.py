"""What a stage, a wrapper or an optimizer of your own is written with. CONTRIBUTING walks through each of them.

@stage(takes="updates", gives="updates", rate="before")
def scale_by_sign(strength=1.0):
def update(updates, state, params, context):
return lift(lambda u: strength * jnp.sign(u), updates), state

return Definition(stateless, update)
"""

from adam_jax._chain import chain
from adam_jax._context import Context
from adam_jax._hyperparams import Hyperparameter, Hyperparameters, Settable, cast, complement, increment
from adam_jax._moments import Moments, expect_moments
from adam_jax._spec import Definition, Flow
from adam_jax._transformation import Transformation, recipe, stage, stateless, take_step, wrapper
from adam_jax._tree import as_wide, lift, scalar_dtype, takes_part
from adam_jax.storage import MomentSlot
from adam_jax.storage import forms as resolve_storage

call_update = take_step

__all__ = [
    "Context",
    "Definition",
    "Flow",
    "Hyperparameter",
    "Hyperparameters",
    "MomentSlot",
    "Moments",
    "Settable",
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
