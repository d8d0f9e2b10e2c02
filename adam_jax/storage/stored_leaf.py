"""One leaf of a moment outside its state: taken out, changed, and put back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from adam_jax._core.leaves import PyTree, as_wide, narrower_than_float32
from adam_jax._core.paths import names
from adam_jax.storage.codec import HALF, Codec, to_float, undifferentiable
from adam_jax.storage.scales import Scales, is_code, largest_along, pack, scale_key, unpack
from adam_jax.storage.slot import no_derivative


class StoredLeaf(NamedTuple):
    """One leaf of a moment, taken out of its state.

    An array that says by its dtype alone how it rests.

    Attributes:
      array: the moment at rest.
      scale: of codes, theirs; else `None`.
    """

    array: Array
    scale: Array | None = None

    def widen(self) -> Array:
        """The moment in float32, or in what is wider."""
        return (
            as_wide(self.array)
            if self.scale is None
            else _codec_of(self.array).widen(self.array, unpack(self.scale)[0])
        )


def narrow_to_nearest(x: Array, like: StoredLeaf, signed: bool) -> StoredLeaf:
    """A moment, float32 or wider, at rest as another one does.

    Rounded to nearest: of one rounding no bias accumulates, and there is none to start with.

    Args:
      x: the moment.
      like: a stored leaf. The result has its storage.
      signed: whether the moment can be negative.
    """
    if like.scale is not None or narrower_than_float32(like.array):
        x = undifferentiable(x, no_derivative("a moment"))
    if like.scale is not None:
        codec, x = _codec_of(like.array), x.astype(jnp.float32)
        unit = codec.exponent(largest_along(jnp.where(jnp.isnan(x), 0, jnp.abs(x)), like.scale))
        return StoredLeaf(codec.narrow(x, unit, HALF), pack(unit, unit))
    if narrower_than_float32(like.array):
        return StoredLeaf(to_float(x, like.array.dtype, HALF, positive=not signed))
    return StoredLeaf(x.astype(like.array.dtype))


def unpack_moment(name: str, tree: PyTree, scales: Scales) -> list[StoredLeaf]:
    """The leaves of the moment in the field `name`."""
    its = zip(names(tree), jax.tree.leaves(tree), strict=True)
    return [StoredLeaf(x, scales[scale_key(name)][path] if is_code(x) else None) for path, x in its]


def repack_moment(
    name: str, tree: PyTree, scales: Scales, leaves: Sequence[StoredLeaf]
) -> tuple[PyTree, Scales]:
    """The tree with `leaves` in the place of its own, and all scales of its state."""
    its = {
        path: leaf.scale
        for path, leaf in zip(names(tree), leaves, strict=True)
        if leaf.scale is not None
    }
    kept = jax.tree.unflatten(jax.tree.structure(tree), [leaf.array for leaf in leaves])
    return kept, scales | ({scale_key(name): its} if its else {})


def _codec_of(code: Array) -> Codec:
    return Codec(bool(jnp.issubdtype(code.dtype, jnp.signedinteger)))
