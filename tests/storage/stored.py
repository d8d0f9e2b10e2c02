"""Leaves, storages and slots that several tests of storage share."""

import jax.numpy as jnp
from helpers import normals

from adam_jax import storage
from adam_jax.storage.formats import resolve_storage
from adam_jax.storage.slot import MomentSlot

WIDE = 4096
NARROW = {
    "bfloat16": "bfloat16",
    "8bit": "8bit",
    "float16": storage.Float(jnp.float16),
    "pair": ("bfloat16", "8bit"),
}


def mixed():
    """Leaves above and below the 4096 elements from which moments are narrowed."""
    return {"w": normals(64, 72, seed=1), "b": normals(7, seed=2)}


def rests_of(how):
    mu, nu = resolve_storage(how)
    return MomentSlot("mu", mu), MomentSlot("nu", nu, signed=False, turn=16)
