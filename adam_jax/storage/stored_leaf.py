"""One leaf of a moment outside its state: taken out, changed, and put back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from adam_jax._core.leaves import PyTree, narrower_than_float32
from adam_jax._core.paths import names
from adam_jax.storage.codec import HALF, undifferentiable
from adam_jax.storage.scales import Scales, is_code
from adam_jax.storage.slot import MomentSlot, no_derivative


class StoredLeaf(NamedTuple):
    """One leaf of a moment, taken out of its state.

    Attributes:
      slot: the moment.
      array: what is stored.
      scale: its scale; `None` without one.
    """

    slot: MomentSlot
    array: Array
    scale: Array | None = None

    @property
    def narrowed(self) -> bool:
        """Whether it is stored in fewer bits than it is computed in."""
        return is_code(self.array) or narrower_than_float32(self.array)

    def widen(self) -> Array:
        """The moment in float32, or in what is wider."""
        if not self.narrowed:
            return self.array
        return self.slot.form.read(self.array, self.scale, self.slot.signed)

    def same_storage(self, other: StoredLeaf) -> bool:
        """Whether another leaf of the same shape is stored in the same way."""
        shared, theirs = (None if x.scale is None else x.scale.shape for x in (self, other))
        return (
            self.array.dtype == other.array.dtype
            and shared == theirs
            and (not self.narrowed or type(self.slot.form) is type(other.slot.form))
        )

    def storing(self, x: Array) -> StoredLeaf:
        """Another moment, float32 or wider, stored as this one is.

        Rounded to nearest: of one rounding no bias accumulates, and there is none to start with.
        """
        if not self.narrowed:
            return self._replace(array=x.astype(self.array.dtype))
        form, signed = self.slot.form, self.slot.signed
        x = undifferentiable(x, no_derivative("a moment")).astype(jnp.float32)
        scale = None if self.scale is None else form.fitting_scale(x, self.scale, signed)
        return self._replace(array=form.store(x, scale, HALF, signed), scale=scale)


def unpack_moment(slot: Any, tree: PyTree, scales: Scales) -> list[StoredLeaf]:
    """The leaves of a moment, a `MomentSlot`."""
    pairs = zip(names(tree), jax.tree.leaves(tree), strict=True)
    return [StoredLeaf(slot, x, slot.scale_of(path, x, scales)) for path, x in pairs]


def repack_moment(
    slot: Any, tree: PyTree, scales: Scales, leaves: Sequence[StoredLeaf]
) -> tuple[PyTree, Scales]:
    """The tree with `leaves` in the place of its own, and all scales of its state."""
    fresh = {
        path: leaf.scale
        for path, leaf in zip(names(tree), leaves, strict=True)
        if leaf.scale is not None
    }
    kept = jax.tree.unflatten(jax.tree.structure(tree), [leaf.array for leaf in leaves])
    return kept, scales | ({slot.scale_key: fresh} if fresh else {})
