"""What an optimizer does with each parameter.

The stages that it meets, what is kept for it, whether it decays.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from adam_jax._core.configuration import scalar_fields
from adam_jax._core.errors import brief, hint_for, some
from adam_jax._core.hyperparams import Multiplied, Settable
from adam_jax._core.leaves import PyTree, arrays_of, dtype_of, takes_part
from adam_jax._core.paths import Parameters, is_scale, owner, paths
from adam_jax._core.spec import all_specs, is_transformation, show, swapped
from adam_jax._core.transformation import Transformation, abstract_state
from adam_jax.diagnostics.state_size import StateBytes, bytes_of, state_bytes
from adam_jax.diagnostics.table import plain_table, rich_table
from adam_jax.wrappers.groups import only
from adam_jax.wrappers.patterns import DEFAULT


class Leaf(NamedTuple):
    """One parameter.

    Attributes:
      path: its names joined by "/".
      shape: its shape.
      dtype: its dtype.
      group: the pattern of `by_path` that it belongs to; "default", also where there are no groups.
      stages: the names of the stages that it meets, in order; ("frozen",) where it is that.
      state: the dtypes of the arrays that are kept for it, by field.
      bytes: of the parameter, of those arrays, and of the units of codes.
      rate: its learning rate, a number, "schedule", "schedule × 0.1" or "traced"; "unknown" behind
        a whole optimizer of others.
      decay: its weight decay, likewise; 0 for none.
      why: what that follows from: "called 'bias'", "no mask". It begins with "unsure" where
        `mask="matrices"` does not know what the leaf is; "" where no stage decays.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    group: str
    stages: tuple[str, ...]
    state: dict[str, str]
    bytes: int
    rate: float | str
    decay: float | str
    why: str = ""


class Description(NamedTuple):
    """What `describe` found. Prints as plain tables; `rich.print` draws them.

    Attributes:
      leaves: the parameters.
      totals: bytes of everything together.
      labels: how the table shows the fields of states, where not by their names.
    """

    leaves: tuple[Leaf, ...]
    totals: StateBytes
    labels: Mapping[str, str] = MappingProxyType({})

    def as_dict(self) -> dict[str, Any]:
        """Strings, numbers, lists and dicts: what `json.dumps` takes."""
        leaves = [
            leaf._asdict() | {"shape": list(leaf.shape), "stages": list(leaf.stages)}
            for leaf in self.leaves
        ]
        totals = self.totals._asdict() | {"wide": [list(wide) for wide in self.totals.wide]}
        return {
            "leaves": leaves,
            "totals": totals | {"state": self.totals.state, "total": self.totals.total},
        }

    def __str__(self) -> str:
        groups = [f"{name}: {' → '.join(stages)}" for name, stages in self._groups()]
        table = plain_table(self._heads(), self._rows(), NUMBERS)
        return "\n\n".join(["\n".join(groups), table, *self._doubts(), str(self.totals)])

    def __rich__(self) -> Any:
        """The same, drawn by rich."""
        from rich.console import Group
        from rich.text import Text

        heads = [
            Text.assemble((name, "bold"), ": ", " → ".join(stages))
            for name, stages in self._groups()
        ]
        table = rich_table(self._heads(), self._rows(), NUMBERS)
        return Group(*heads, table, *map(Text, self._doubts()), Text(str(self.totals)))

    def _heads(self) -> tuple[str, ...]:
        """The columns. Without a mask there is nothing to explain."""
        explained = {leaf.why for leaf in self.leaves} - {"", NO_MASK, NO_DECAY, NOT_TRAINED}
        return (*HEADS, "why") if explained else HEADS

    def _doubts(self) -> list[str]:
        unsure = [leaf.path for leaf in self.leaves if leaf.why.startswith("unsure")]
        if not unsure:
            return []
        return [
            f'mask="matrices" is unsure of {some(unsure)}. No name says whether it is a matrix, '
            "and two axes can be those of stacked biases. Give layer_axes, or a mask of booleans."
        ]

    def _groups(self) -> list[tuple[str, tuple[str, ...]]]:
        return list({leaf.group: leaf.stages for leaf in self.leaves}.items())

    def _rows(self) -> list[tuple[str, ...]]:
        return [
            (
                leaf.path or "the only leaf",
                "×".join(map(str, leaf.shape)) or "scalar",
                leaf.dtype,
                leaf.group,
                ", ".join(
                    f"{self.labels.get(field, field)} {dtype}"
                    for field, dtype in leaf.state.items()
                )
                or "nothing",
                f"{leaf.bytes:,}",
                *(
                    value if isinstance(value, str) else f"{value:g}"
                    for value in (leaf.rate, leaf.decay)
                ),
                leaf.why,
            )[: len(self._heads())]
            for leaf in self.leaves
        ]


HEADS = ("path", "shape", "dtype", "group", "state", "bytes", "rate", "decay")

NO_MASK, NO_DECAY, NOT_TRAINED = "no mask", "weight_decay is 0", "not trained"

NUMBERS = ("bytes", "rate", "decay")


def describe(tx: optax.GradientTransformation, params: PyTree) -> Description:
    """Says what an optimizer does with each parameter and keeps for it.

    It also says how many bytes that takes. Nothing is allocated.

        print(describe(by_path({".*/bias": {"weight_decay": 0.0}}, adamw(1e-3)), params))

    Args:
      tx: any gradient transformation; one of others is named, and its arrays are listed.
      params: the parameters, or their shapes (`jax.ShapeDtypeStruct`).

    Raises:
      TypeError: if `tx` is no gradient transformation.
      ValueError: if the patterns of `by_path`, or the masks of weight decay, do not fit the
        parameters.
    """
    if not is_transformation(tx):
        hint = swapped(tx, "describe")
        raise TypeError(
            f"describe: found {brief(tx)}{hint_for(tx)}; expected a gradient transformation, and "
            f"the parameters after it.{hint}"
        )
    params = arrays_of(params)
    located = jax.tree_util.tree_flatten_with_path(params)[0]
    state = abstract_state(tx, params, "describe")
    own_shapes = {keys: np.shape(leaf) for keys, leaf in located}
    shapes = Parameters(own_shapes, scalar_fields(tx, state))
    scales = dict.fromkeys(shapes, 0)
    kept: dict[Any, dict[str, Any]] = {keys: {} for keys in shapes}
    for keys, leaf in jax.tree_util.tree_flatten_with_path(state)[0]:
        belongs = owner(keys, leaf.shape, shapes)
        if belongs is not None and is_scale(keys):
            scales[belongs] += bytes_of(leaf)
        elif belongs is not None:
            field = str(getattr(keys[len(keys) - len(belongs) - 1], "name", "state"))
            kept[belongs][field] = leaf
    met = _met(tx, params)
    leaves = []
    for path, (keys, leaf) in zip(paths(params), located, strict=True):
        its, arrays = met[path], kept[keys]
        leaves.append(
            Leaf(
                path=path,
                shape=np.shape(leaf),
                dtype=str(dtype_of(leaf)),
                group=its.group,
                stages=its.stages,
                state={field: str(array.dtype) for field, array in arrays.items()},
                bytes=sum(map(bytes_of, [leaf, *arrays.values()])) + scales[keys],
                rate=0.0 if not takes_part(leaf) else its.rate if its.known else "unknown",
                decay=0.0 if not takes_part(leaf) else its.decay if its.known else "unknown",
                why=NOT_TRAINED if not takes_part(leaf) else its.why,
            )
        )
    return Description(tuple(leaves), state_bytes(tx, params), _labels(tx))


def _labels(tx: Any) -> dict[str, str]:
    """Returns how tables show the moments of all stages, by field."""
    return {
        slot.name: slot.label
        for spec in all_specs(tx)
        for slot in spec.definition.slots
        if slot.label
    }


class _Met(NamedTuple):
    """What a leaf meets.

    `known`: whether a stage of this package is among it, which would say that it decays.
    """

    group: str = DEFAULT
    stages: tuple[str, ...] = ()
    rate: float | str = 0.0
    decay: float | str = 0.0
    known: bool = False
    why: str = ""

    def then(self, later: _Met) -> _Met:
        return _Met(
            group=self.group if later.group == DEFAULT else later.group,
            stages=self.stages + later.stages,
            rate=later.rate or self.rate,
            decay=later.decay or self.decay,
            known=self.known or later.known,
            why=later.why or self.why,
        )


def _met(tx: Any, params: PyTree) -> dict[str, _Met]:
    """What the leaves meet, by their paths."""
    found = dict.fromkeys(paths(params), _Met())
    if not isinstance(tx, Transformation):
        return dict.fromkeys(found, _Met(stages=(show(tx),)))
    spec = tx.init.spec
    for part in spec.stages:
        found = {path: found[path].then(met) for path, met in _met(part, params).items()}
    if spec.stages:
        return found
    if spec.split is not None:
        its = spec.split(params)
        found = {
            path: _Met(name, ("frozen",), known=True) for path, name in zip(found, its, strict=True)
        }
        for name, part in spec.inner.items():
            found |= {
                path: _Met(name).then(met)
                for path, met in _met(part, only(name, its, params)).items()
            }
        return found
    definition = spec.definition
    first = next((_said(number.value) for number in definition.hyperparameters.values()), 0.0)
    rate = first if spec.interface.rate == "applies" and not spec.inner else 0.0
    mask = (
        [False] * len(found)
        if definition.decays is None
        else jax.tree.leaves(definition.decays(params))
    )
    reasons = (
        [""] * len(found) if definition.decay_reasons is None else definition.decay_reasons(params)
    )
    for path, decays, why in zip(found, mask, reasons, strict=True):
        found[path] = _Met(
            stages=(spec.constructor.__name__,),
            rate=rate,
            decay=first if decays else 0.0,
            known=True,
            why=NO_DECAY if decays and first == 0.0 else why,
        )
    for part in spec.inner.values():
        found = {path: found[path].then(met) for path, met in _met(part, params).items()}
    return found


def _said(value: Any) -> float | str:
    """A hyperparameter, as far as it can be said before the run."""
    if isinstance(value, Multiplied):
        return f"{_said(value.base)} × {_said(value.factor)}"
    if isinstance(value, Settable):
        return "settable"
    return (
        "schedule"
        if callable(value)
        else "traced"
        if isinstance(value, jax.core.Tracer)
        else float(value)
    )
