"""Which stage and which moment of an old configuration becomes which of a new one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from adam_jax._core.configuration import INSIDE, Configuration, StageInstance
from adam_jax._core.paths import names
from adam_jax._core.spec import wrapped
from adam_jax._core.transformation import Transformation
from adam_jax.migrate.factors import factor_of
from adam_jax.storage.stored_leaf import StoredLeaf, unpack_moment


class Source(NamedTuple):
    """A leaf of a moment of the old configuration.

    Attributes:
      stage: the stage that keeps it.
      field: the field of the stage's state.
      row: its place among the leaves.
      stored: the leaf as it is stored.
    """

    stage: StageInstance
    field: str
    row: int
    stored: StoredLeaf

    def own(self, value: Array, ndim: int) -> Array:
        """Returns this leaf's entry of a value that has `ndim` dimensions if leaves share it."""
        return value if value.ndim == ndim else value[..., self.row]

    @property
    def factor(self) -> Array:
        """The debias factor of the moment, as two floats."""
        return factor_of(self.stage, self.field, self.row)

    @property
    def divisor(self) -> Array:
        """What divides the moment to correct its bias, not 0."""
        return jnp.where(self.factor[0] > 0, self.factor[0], 1)


class Moment(NamedTuple):
    """A moment of the old configuration.

    Attributes:
      stage: the stage that keeps it.
      field: the field of the stage's state.
      leaves: its leaves by path.
      left: those that no stage of the new configuration took.
    """

    stage: StageInstance
    field: str
    leaves: dict[str, Source]
    left: dict[str, Source]


class Pair(NamedTuple):
    """A stage of the new configuration, and where its state comes from.

    Attributes:
      stage: the stage.
      partner: the same stage of the old configuration, if there was one and its state can be taken.
      misfit: the same stage of the old configuration, if its state cannot be taken.
      sources: for each moment and leaf where it comes from; `None` for a fresh leaf.
    """

    stage: StageInstance
    partner: StageInstance | None
    misfit: StageInstance | None
    sources: dict[str, list[Source | None]]


class Pairing(NamedTuple):
    """How two configurations belong together.

    Attributes:
      pairs: one for each stage of the new configuration, in order.
      moments: the moments of the old configuration.
      unpaired: the stages of the old configuration whose states nobody took.
      stages: all stages of the old configuration, by key.
    """

    pairs: list[Pair]
    moments: list[Moment]
    unpaired: list[StageInstance]
    stages: dict[Any, StageInstance]


def pair(old: Configuration, new: Configuration) -> Pairing:
    """Returns how two configurations belong together.

    Stages are paired by name, group and order, moments by what they mean, and each leaf is taken
    once.
    """
    moments = [_moment(stage, field) for stage in old.stages for field in stage.meanings]
    stages = {stage.key: stage for stage in old.stages}
    taken = set()
    pairs = []
    for stage in new.stages:
        same = stages.get(stage.key)
        fits = same is not None and _fits(stage, same)
        if fits:
            taken.add(stage.key)
        sources = {
            field: [_take(moments, stage.meanings[field], path) for path in names(tree)]
            for field in stage.meanings
            for tree in [getattr(stage.state, field)]
        }
        pairs.append(Pair(stage, same if fits else None, None if fits else same, sources))
    unpaired = [stage for key, stage in stages.items() if key not in taken]
    return Pairing(pairs, moments, unpaired, stages)


def _moment(stage: StageInstance, field: str) -> Moment:
    tree = getattr(stage.state, field)
    stored = unpack_moment(stage.slots[field], tree, stage.state.scales)
    rows = enumerate(zip(names(tree), stored, strict=True))
    leaves = {path: Source(stage, field, row, leaf) for row, (path, leaf) in rows}
    return Moment(stage, field, leaves, dict(leaves))


def _take(moments: Sequence[Moment], meaning: str, path: str) -> Source | None:
    """Returns the leaf of a moment of that meaning, once."""
    for moment in moments:
        if path in moment.left and moment.stage.meanings[moment.field] == meaning:
            return moment.left.pop(path)
    return None


def _fits(stage: StageInstance, same: StageInstance) -> bool:
    """Whether the state of a stage of the same name can be taken."""
    if not isinstance(stage.tx, Transformation):
        return stage.tx == same.tx or alike(same.state, stage.state)
    if not wrapped(stage.tx, stage.state):
        return True
    # What a wrapper remembers belongs together: a number of norms belongs to one ring of them.
    return alike(_without_inside(same.state), _without_inside(stage.state))


def _without_inside(state: Any) -> Any:
    return state._replace(**{name: None for name in INSIDE if hasattr(state, name)})


def alike(found: Any, expected: Any) -> bool:
    """Whether two trees have one structure, shapes, and dtypes in which the same is computed."""
    structures: list[Any] = [jax.tree.structure(found), jax.tree.structure(expected)]
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=False)
    return structures[0] == structures[1] and all(
        jnp.shape(a) == jnp.shape(b) and same_kind(jnp.result_type(a), jnp.result_type(b))
        for a, b in pairs
    )


def same_kind(found: Any, expected: Any) -> bool:
    """Whether two dtypes are the same, or both float or complex and at least 32 bits wide."""
    floating = found.kind == expected.kind and found.kind in "fc"
    return bool(found == expected or (floating and min(found.itemsize, expected.itemsize) >= 4))
