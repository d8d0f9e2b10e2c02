"""Each framework's own Adam: its argument names, their order, their defaults, and where it puts ε.

    presets.torch.adamw(lr=1e-3)
    presets.keras.adam(learning_rate=1e-3)
    presets.optax.lamb(1e-3)

For a training that moves to JAX and should take the same steps. An argument that is not supported
is not there, so that passing it is an error. As in the family, any number may be a schedule or a
traced scalar, and `storage` says how the moments rest.
"""

from adam_jax.presets import keras, optax, torch

__all__ = ["torch", "keras", "optax"]
