"""Adam and its family for JAX: four stages, exact in every dtype, that compose with Optax.

    gradients → track_moments → correct_bias → scale_by_moments → scale_by_learning_rate → updates
"""

from adam_jax import family as family
from adam_jax._apply import add_decayed_weights as add_decayed_weights
from adam_jax._apply import apply_updates as apply_updates
from adam_jax._apply import scale_by_learning_rate as scale_by_learning_rate
from adam_jax._bias import correct_bias as correct_bias
from adam_jax._bias import look_ahead as look_ahead
from adam_jax._bias import rectify as rectify
from adam_jax._chain import Context as Context
from adam_jax._chain import Transformation as Transformation
from adam_jax._chain import chain as chain
from adam_jax._chain import recipe as recipe
from adam_jax._chain import stage as stage
from adam_jax._hyperparams import hyperparameters as hyperparameters
from adam_jax._links import average_parameters as average_parameters
from adam_jax._links import averaged_parameters as averaged_parameters
from adam_jax._links import cautious as cautious
from adam_jax._links import clip_update_rms as clip_update_rms
from adam_jax._moments import Moments as Moments
from adam_jax._moments import track_moments as track_moments
from adam_jax._refine import center as center
from adam_jax._refine import keep_maximum as keep_maximum
from adam_jax._refine import mix_slow_mean as mix_slow_mean
from adam_jax._scale import clip_elements as clip_elements
from adam_jax._scale import scale_by_atan2 as scale_by_atan2
from adam_jax._scale import scale_by_moments as scale_by_moments
from adam_jax._scale import scale_by_trust_ratio as scale_by_trust_ratio
from adam_jax._scale import take_mu as take_mu
from adam_jax.family import adabelief as adabelief
from adam_jax.family import adam as adam
from adam_jax.family import adam_atan2 as adam_atan2
from adam_jax.family import adam_mini as adam_mini
from adam_jax.family import adamax as adamax
from adam_jax.family import adamaxw as adamaxw
from adam_jax.family import adamw as adamw
from adam_jax.family import ademamix as ademamix
from adam_jax.family import adopt as adopt
from adam_jax.family import amsgrad as amsgrad
from adam_jax.family import lamb as lamb
from adam_jax.family import momentum as momentum
from adam_jax.family import nadam as nadam
from adam_jax.family import nadamw as nadamw
from adam_jax.family import radam as radam
from adam_jax.family import rmsprop as rmsprop
from adam_jax.family import yogi as yogi

__version__ = "0.1.0"
