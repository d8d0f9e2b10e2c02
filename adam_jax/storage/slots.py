"""What concerns several moments of one state, or the gradients that they can hold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from adam_jax._core.leaves import PyTree, as_wide, finfo, takes_part
from adam_jax._core.paths import names
from adam_jax.storage.format import Format
from adam_jax.storage.random_bits import StepBits
from adam_jax.storage.scales import Scales, is_code
from adam_jax.storage.slot import MomentSlot


def all_first_scales(slots: Sequence[MomentSlot], trees: dict[str, PyTree]) -> Scales:
    """The scales of several fresh moments by name."""
    return {
        name: scale for slot in slots for name, scale in slot.first_scales(trees[slot.name]).items()
    }


def all_narrow(
    slots: Sequence[MomentSlot],
    trees: dict[str, PyTree],
    before: Any,
    bits: StepBits,
    selector: Any,
) -> tuple[dict[str, PyTree], Scales]:
    """The resting forms of several moments by name, and their scales.

    `before` is the state that holds those they come from.
    """
    narrowed = {
        slot.name: slot.narrow(
            trees[slot.name], getattr(before, slot.name), before.scales, bits, selector
        )
        for slot in slots
    }
    kept = {name: tree for name, (tree, _) in narrowed.items()}
    return kept, {name: scale for _, its in narrowed.values() for name, scale in its.items()}


def tops(
    slot: MomentSlot,
    tree: PyTree,
    scales: Scales,
    mu: PyTree | None,
    mu_form: Format | None,
    grads: PyTree,
) -> list[Array | None]:
    """Returns for each trained leaf the largest number that its storage can hold now.

    It broadcasts against the leaf. It is `None` where no gradient is too large for the storage,
    or where μ saturates with ν: both are codes from zero on, and the same elements share their
    scales.

    Args:
      slot: the moment, a ν.
      tree: the moment as it is stored.
      scales: those of the state.
      mu: the first moment beside it as it is stored, if there is one.
      mu_form: its storage.
      grads: the gradients, whose dtypes say how large they can be.
    """
    leaves = [leaf for leaf in jax.tree.leaves(grads) if takes_part(leaf)]
    stored = jax.tree.leaves(tree)
    beside = [None] * len(stored) if mu is None else jax.tree.leaves(mu)
    if not len(leaves) == len(stored) == len(beside):
        return []  # other gradients: `lift` says in what they differ
    alike = mu_form is not None and slot.form.saturates_with(mu_form) and slot.start == 0
    found: list[Array | None] = []
    for path, x, m, grad in zip(names(tree), stored, beside, leaves, strict=True):
        computed = as_wide(grad).dtype
        largest = finfo(computed).maxexp // 2 * 2 - 4  # of the square of a gradient: see `widen`
        if is_code(x) and not (alike and m is not None and is_code(m)):
            found.append(slot.form.largest(slot.scale_of(path, x, scales), slot.signed))
        elif not is_code(x) and finfo(x.dtype).maxexp <= largest:
            found.append(jnp.asarray(finfo(x.dtype).max).astype(np.float32))
        else:
            found.append(None)
    return found
