"""Gradients that are too large for the storage of ν saturate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from adam_jax._core.leaves import PyTree, as_wide, real_dtype
from adam_jax._core.lift import lift
from adam_jax.stages.moments import per_leaf
from adam_jax.stages.rules import NuRule
from adam_jax.storage.slot import MomentSlot
from adam_jax.storage.slots import tops


def limit_gradients(
    grads: PyTree, state: Any, slots: Sequence[MomentSlot], rule: NuRule, nu_rate: Array
) -> PyTree:
    """Returns the gradients, saturated where the storage of ν would be.

    The reason is that of `widen`: if μ took a gradient that ν cannot, the steps behind would have
    no bound. That matters where ν is stored in codes or in a narrow float beside a μ with a wider
    range, and for float64.
    """
    by_name = {slot.name: slot for slot in slots}
    if "nu" not in by_name:
        return grads
    mu, form = (state.mu, by_name["mu"].form) if "mu" in by_name else (None, None)
    limits = tops(by_name["nu"], state.nu, state.scales, mu, form, grads)
    if all(top is None for top in limits):
        return grads
    each, rates = iter(limits), per_leaf(nu_rate)

    def leaf(grad: Any) -> Array:
        top, rate, g = next(each), rates(), as_wide(grad)
        if top is None:
            return g
        real = real_dtype(g)
        bound = jnp.sqrt(top.astype(real) / rate.astype(real)) if rule.squared else top.astype(real)
        if jnp.iscomplexobj(g):
            bound = jnp.broadcast_to(bound * np.asarray(0.5**0.5, real), g.shape)
            return lax.complex(lax.clamp(-bound, g.real, bound), lax.clamp(-bound, g.imag, bound))
        bound = jnp.broadcast_to(bound, g.shape)
        return lax.clamp(-bound, g, bound)

    return lift(leaf, grads)
