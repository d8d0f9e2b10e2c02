"""What a transformation's state weighs, before a byte of it is allocated."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from adam_jax._core.configuration import moment_states
from adam_jax._core.errors import brief
from adam_jax._core.leaves import PyTree, arrays_of, dtype_of, finfo, takes_part
from adam_jax._core.paths import is_scale, path_of
from adam_jax._core.spec import all_specs, show, spec_of, swapped, wrapped
from adam_jax._core.transformation import abstract_state

OF_OTHERS = {"mu": "mu", "nu": "nu"}
"""Fields of states of other libraries that are moments, and what they are counted as."""


class Wide(NamedTuple):
    """A leaf of a moment that rests as it is computed.

    Attributes:
      moment: the field of the state: "mu", "nu", "nu_max" or "mu_slow".
      path: the names to the leaf joined by "/".
      elements: how many numbers it has.
      why: the reason.
    """

    moment: str
    path: str
    elements: int
    why: str


class StateBytes(NamedTuple):
    """Bytes by what they are for. Prints as a table.

    Attributes:
      elements: the number of parameters, of all dtypes.
      parameters: bytes of the parameters.
      mu: bytes of first moments, slow ones too, with the scales of their codes.
      nu: bytes of second moments, their maximum too, with the scales of their codes.
      rounding: bytes of what `compensate` keeps.
      other: bytes of all else in the state.
      wide: the leaves of moments that rest as they are computed, and why.
    """

    elements: int
    parameters: int
    mu: int
    nu: int
    rounding: int
    other: int
    wide: tuple[Wide, ...]

    @property
    def state(self) -> int:
        """Bytes of the whole state."""
        return self.mu + self.nu + self.rounding + self.other

    @property
    def total(self) -> int:
        """Bytes of parameters and state: what rests between two steps."""
        return self.parameters + self.state

    def __str__(self) -> str:
        rows = {
            "parameters": self.parameters,
            "μ": self.mu,
            "ν": self.nu,
            "rounding": self.rounding,
            "other": self.other,
        }
        lines = [f"{'':10} {'bytes':>19} {'a parameter':>12}"]
        lines += [self._row(name, size) for name, size in rows.items()]
        lines += [self._row("in all", self.total)]
        for moment in dict.fromkeys(leaf.moment for leaf in self.wide):
            reasons = dict.fromkeys(leaf.why for leaf in self.wide if leaf.moment == moment)
            # What was asked for, or is the default, is no news.
            lines += [self._stays(moment, why) for why in reasons if why != "storage is float32"]
        return "\n".join(lines)

    def _row(self, name: str, size: int) -> str:
        return f"{name:10} {size:19,} {size / max(self.elements, 1):12.3f}"

    def _stays(self, moment: str, why: str) -> str:
        leaves = [leaf for leaf in self.wide if (leaf.moment, leaf.why) == (moment, why)]
        paths = ", ".join(leaf.path or "the only leaf" for leaf in leaves[:3])
        more = f" and {len(leaves) - 3} more" if len(leaves) > 3 else ""
        elements = sum(leaf.elements for leaf in leaves)
        return f"{moment} stays wide in {paths}{more} ({elements:,} elements): {why}"


def state_bytes(tx: optax.GradientTransformation, params: PyTree) -> StateBytes:
    """Counts the bytes of parameters and state, from shapes alone: nothing is allocated.

        print(state_bytes(adam(1e-3, storage="8bit"), params))

    Args:
      tx: any gradient transformation; of those of others, too, fields called mu and nu are counted
        as moments.
      params: the parameters, or their shapes (`jax.ShapeDtypeStruct`, or what `jax.eval_shape`
        returns).

    Raises:
      TypeError: if `tx` has no `init`.
    """
    if not callable(getattr(tx, "init", None)):
        hint = swapped(tx, "state_bytes")
        raise TypeError(
            f"state_bytes: found {brief(tx)}; expected a gradient transformation, and the "
            f"parameters after it.{hint}"
        )
    params = arrays_of(params)
    state = abstract_state(tx, params, "state_bytes")
    sizes = dict.fromkeys(("mu", "nu", "rounding", "other"), 0)
    parts = OF_OTHERS | parts_of(tx)
    for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]:
        sizes[_part(path, parts)] += bytes_of(leaf)
    leaves = jax.tree.leaves(params)
    elements = sum(math.prod(np.shape(leaf)) for leaf in leaves)
    return StateBytes(elements, sum(map(bytes_of, leaves)), **sizes, wide=tuple(_wide(tx, state)))


def bytes_of(leaf: Any) -> int:
    """The size of an array, or of a shape and dtype."""
    size: int = np.dtype(dtype_of(leaf)).itemsize * math.prod(np.shape(leaf))
    return size


def parts_of(tx: Any) -> dict[str, str]:
    """Returns what `state_bytes` counts each field as that holds something for each parameter."""
    found: dict[str, str] = {}
    for spec in all_specs(tx):
        found |= spec.definition.trees
        found |= {slot.name: slot.part for slot in spec.definition.slots}
    return found


def _part(path: tuple[Any, ...], parts: Mapping[str, str]) -> str:
    fields = [key.name for key in path if isinstance(key, jax.tree_util.GetAttrKey)]
    if is_scale(path):
        fields.append(path[-2].key.removesuffix("_scale"))
    return next((parts[field] for field in fields if field in parts), "other")


def _wide(tx: Any, state: Any) -> Iterator[Wide]:
    """The wide leaves in the state of stages that were told how moments rest.

    Wherever in a chain they stand.
    """
    spec = spec_of(tx)
    if spec is None:
        for node in moment_states(state):
            fields = [
                field
                for field in node._fields
                if f"{field}_scale" in node.scales or field in OF_OTHERS
            ]
            yield from _wide_fields(
                node,
                fields,
                lambda field, leaf: f"as was asked for inside {show(tx)}, which hides why",
            )
        return
    for part, its in zip(spec.stages, state if spec.stages else (), strict=True):
        yield from _wide(part, its)
    for _, _, part, its in wrapped(tx, state):
        yield from _wide(part, its)
    slots = {slot.name: slot for slot in spec.definition.slots}
    yield from _wide_fields(
        state, slots, lambda field, leaf: slots[field].why_wide(leaf.shape, leaf.dtype)
    )


def _wide_fields(
    state: Any, fields: Iterable[str], why: Callable[[str, Any], str | None]
) -> Iterator[Wide]:
    for field in fields:
        for path, leaf in jax.tree_util.tree_flatten_with_path(getattr(state, field))[0]:
            reason = why(field, leaf) if takes_part(leaf) and finfo(leaf.dtype).bits >= 32 else None
            if reason:
                yield Wide(field, path_of(path), math.prod(leaf.shape), reason)
