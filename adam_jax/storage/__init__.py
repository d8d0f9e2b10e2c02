"""How a moment is stored between two steps.

It is stored as it is computed, as a narrower float, or as codes of eight bits.

A stored moment has the shape of its parameter, and each of its elements depends on that element
alone. So the moment is sharded as its parameter is, and a step stays one pass over memory. Rounding
is unbiased: with β₂ = 0.999 a moment moves by 0.1 % per step, far less than the last bit of a
narrow number. Rounded to nearest it would never move.
"""

from adam_jax.storage.formats import Codes, Float

__all__ = ["Codes", "Float"]
