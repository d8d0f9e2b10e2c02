"""A run that is under way goes on with another optimizer, or from another library.

Parts of it can start afresh.
"""

from adam_jax.migrate.convert import convert_state
from adam_jax.migrate.optax import from_optax, to_optax
from adam_jax.migrate.report import Converted, Entry
from adam_jax.migrate.restart import reset
from adam_jax.migrate.torch import from_torch, to_torch
from adam_jax.migrate.torch_layout import LayoutWarning, after_flatten, as_real
from adam_jax.migrate.torch_params import params_from_torch, params_to_torch
from adam_jax.migrate.torch_parts import Split

__all__ = [
    "Converted",
    "Entry",
    "LayoutWarning",
    "Split",
    "after_flatten",
    "as_real",
    "convert_state",
    "from_optax",
    "from_torch",
    "params_from_torch",
    "params_to_torch",
    "reset",
    "to_optax",
    "to_torch",
]
