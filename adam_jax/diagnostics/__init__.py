"""What an optimizer is made of, how large its state is, and how a run is doing."""

from adam_jax.diagnostics.description import Description, Leaf, describe
from adam_jax.diagnostics.observation import observations, observe
from adam_jax.diagnostics.plots import plot
from adam_jax.diagnostics.state_size import StateBytes, state_bytes

__all__ = [
    "Description",
    "Leaf",
    "StateBytes",
    "describe",
    "observations",
    "observe",
    "plot",
    "state_bytes",
]
