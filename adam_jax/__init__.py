"""Adam and its family for JAX: four stages, exact in every dtype, that compose with Optax.

    gradients → track_moments → correct_bias → scale_by_moments → scale_by_learning_rate → updates

The names below stand in the order in which data meets them.
"""

from adam_jax import storage
from adam_jax._moments import Moments, track_moments
from adam_jax._refine import center, keep_maximum, mix_slow_mean
from adam_jax._bias import correct_bias, look_ahead, rectify
from adam_jax._scale import clip_elements, scale_by_atan2, scale_by_moments, scale_by_trust_ratio, take_mu
from adam_jax._apply import add_decayed_weights, scale_by_learning_rate
from optax import apply_updates
from adam_jax._links import average_parameters, averaged_parameters, cautious, clip_update_rms
from adam_jax.rounding import compensate, round_stochastically
from adam_jax._chain import chain
from adam_jax.guards import expect_progress, skip_nonfinite, skip_spikes
from adam_jax.groups import by_path
from adam_jax.diagnostics import observations, observe
from adam_jax._dashboard import plot
from adam_jax._context import Context
from adam_jax._hyperparams import settable
from adam_jax._spec import Flow
from adam_jax._transformation import Transformation, recipe, stage
from adam_jax._settings import hyperparameters, set_hyperparameters, set_step
from adam_jax._audit import StateBytes, state_bytes
from adam_jax._describe import Description, Leaf, describe
from adam_jax.sharding import state_shardings
from adam_jax._convert import Converted, Entry, convert_state
from adam_jax._reset import reset
from adam_jax._from_optax import from_optax, to_optax
from adam_jax._from_torch import from_torch, to_torch
from adam_jax._params_from_torch import after_flatten, params_from_torch, params_to_torch
from adam_jax import extend, family, presets
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

__all__ = [
    "extend",
    "family",
    "presets",
    "storage",
    "Moments",
    "track_moments",
    "center",
    "keep_maximum",
    "mix_slow_mean",
    "correct_bias",
    "look_ahead",
    "rectify",
    "clip_elements",
    "scale_by_atan2",
    "scale_by_moments",
    "scale_by_trust_ratio",
    "take_mu",
    "add_decayed_weights",
    "scale_by_learning_rate",
    "apply_updates",
    "average_parameters",
    "averaged_parameters",
    "cautious",
    "clip_update_rms",
    "compensate",
    "round_stochastically",
    "chain",
    "expect_progress",
    "skip_nonfinite",
    "skip_spikes",
    "by_path",
    "observe",
    "observations",
    "plot",
    "settable",
    "hyperparameters",
    "set_hyperparameters",
    "set_step",
    "StateBytes",
    "state_bytes",
    "Description",
    "Leaf",
    "describe",
    "state_shardings",
    "Converted",
    "Entry",
    "convert_state",
    "reset",
    "from_optax",
    "to_optax",
    "from_torch",
    "to_torch",
    "params_from_torch",
    "params_to_torch",
    "after_flatten",
    "Context",
    "Flow",
    "Transformation",
    "recipe",
    "stage",
]
__all__ += family.__all__

__version__ = "0.1.0"
