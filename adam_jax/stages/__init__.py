"""The stages that optimizers are made of, in the order in which updates meet them."""

from adam_jax._core.layers import flax_layer_axes
from adam_jax.stages.averaging import average_parameters, averaged_parameters
from adam_jax.stages.bias import correct_bias, look_ahead, rectify
from adam_jax.stages.caution import cautious
from adam_jax.stages.decay import add_decayed_weights
from adam_jax.stages.gradient_clipping import clip_global_norm
from adam_jax.stages.learning_rate import scale_by_learning_rate
from adam_jax.stages.moments import Moments
from adam_jax.stages.refine import center, keep_maximum, mix_slow_mean
from adam_jax.stages.scale import (
    clip_elements,
    scale_by_atan2,
    scale_by_moments,
    scale_by_trust_ratio,
    take_mu,
)
from adam_jax.stages.track import track_moments
from adam_jax.stages.update_clipping import clip_update_rms

__all__ = [
    "Moments",
    "clip_global_norm",
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
    "cautious",
    "clip_update_rms",
    "average_parameters",
    "averaged_parameters",
    "flax_layer_axes",
]
