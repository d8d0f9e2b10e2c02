"""Adam and its family for JAX: four stages, exact in every dtype, that compose with Optax.

    gradients → track_moments → correct_bias → scale_by_moments → scale_by_learning_rate → updates

The names below stand in the order in which data meets them. More stages are in `adam_jax.stages`,
the ways from other libraries in `adam_jax.migrate`, and what a stage of your own needs in
`adam_jax.extend`.
"""

from adam_jax import storage
from adam_jax import stages
from adam_jax.stages import (
    track_moments,
    correct_bias,
    scale_by_moments,
    add_decayed_weights,
    scale_by_learning_rate,
)
from adam_jax._core.apply import apply_updates
from adam_jax.rounding import compensate, round_stochastically
from adam_jax._core.chain import chain
from adam_jax.wrappers import by_path, expect_progress, manual_axes, skip_nonfinite, skip_spikes
from adam_jax._core.hyperparams import settable
from adam_jax._core.settings import hyperparameters, set_hyperparameters, set_step
from adam_jax import family
from adam_jax.family import (
    adam,
    adamw,
    adamax,
    adamaxw,
    amsgrad,
    nadam,
    nadamw,
    radam,
    adabelief,
    yogi,
    lamb,
    momentum,
    rmsprop,
    adopt,
    ademamix,
    adam_mini,
    adam_atan2,
)
from adam_jax.sharding import state_shardings
from adam_jax import diagnostics
from adam_jax.diagnostics import describe, observations, observe, plot, state_bytes
from adam_jax import migrate
from adam_jax.migrate import convert_state, reset
from adam_jax import extend, presets

__all__ = [
    "diagnostics",
    "extend",
    "family",
    "migrate",
    "presets",
    "stages",
    "storage",
    "track_moments",
    "correct_bias",
    "scale_by_moments",
    "add_decayed_weights",
    "scale_by_learning_rate",
    "apply_updates",
    "compensate",
    "round_stochastically",
    "chain",
    "by_path",
    "expect_progress",
    "manual_axes",
    "skip_nonfinite",
    "skip_spikes",
    "settable",
    "hyperparameters",
    "set_hyperparameters",
    "set_step",
    "state_shardings",
    "describe",
    "observe",
    "observations",
    "plot",
    "state_bytes",
    "convert_state",
    "reset",
]
__all__ += family.__all__

__version__ = "0.1.0"
