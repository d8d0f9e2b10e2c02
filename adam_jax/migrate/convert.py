"""`convert_state`: a run goes on under another configuration."""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.scipy.special import xlogy

from adam_jax._core.arithmetic import divide
from adam_jax._core.configuration import (
    Configuration,
    StageInstance,
    gathering,
    iter_stages,
    of_group,
    read_counters,
    rebuilt,
)
from adam_jax._core.errors import brief, some
from adam_jax._core.hyperparams import complement
from adam_jax._core.leaves import PyTree, scalar_dtype
from adam_jax._core.paths import is_box, paths, unboxed
from adam_jax._core.spec import is_transformation, show, swapped, wrapped
from adam_jax._core.transformation import Transformation, abstract_state
from adam_jax.stages.bias import LookAheadState, RectifyState
from adam_jax.stages.blocks import block_mean
from adam_jax.stages.moments import accumulate_weight
from adam_jax.storage.stored_leaf import StoredLeaf, narrow_to_nearest, repack_moment, unpack_moment

BOOKKEEPING = ("count", "step", "hyperparams", "scales", "weights", "inner_state", "inner_states")
"""The fields that are no memory: they follow from the run or from the fields beside them."""


class Entry(NamedTuple):
    """A memory in a state.

    Attributes:
      place: where it is, as `jax.tree_util.keystr` writes it: of what is dropped in the old state,
        else in the new one.
      what: what it remembers.
      note: what became of it, or why.
    """

    place: str
    what: str
    note: str = ""


class Converted(NamedTuple):
    """What `convert_state` returns. Prints as a table of all but the state.

    Attributes:
      state: the state of the new configuration.
      kept: what both configurations have.
      fresh: what only the new one has, and starts as in a new run.
      dropped: what only the old one had.
    """

    state: PyTree
    kept: tuple[Entry, ...]
    fresh: tuple[Entry, ...]
    dropped: tuple[Entry, ...]

    def __str__(self) -> str:
        rows = [
            (group, *entry)
            for group in ("kept", "fresh", "dropped")
            for entry in getattr(self, group)
        ]
        widths = [max((len(row[i]) for row in rows), default=0) for i in range(3)]
        lines = [
            "  ".join(
                [*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]]
            )
            for row in rows
        ]
        return "\n".join(line.rstrip() for line in lines)


def convert_state(
    state: PyTree,
    from_tx: optax.GradientTransformation,
    to_tx: optax.GradientTransformation,
    params: PyTree,
) -> Converted:
    """Carries a run over to another configuration.

    Other storage, another member of the family, other links.

        converted = convert_state(state, adam(1e-3), amsgrad(1e-3, storage="8bit"), params)
        print(converted)
        state = converted.state

    Each moment takes the weight it has gathered along, and a fresh one has none, so bias correction
    is right for both; every schedule goes on at the step that the run has reached. Moments are
    rounded to the nearest number of the new storage. Where a ν becomes that of a block it is its
    mean, and a block's is spread over its elements. A fresh ν beside a μ that is kept starts as if
    μ had come once as a gradient: a quotient of an old μ and a ν that has seen one gradient has no
    bound.

    Stages of this package are matched wherever they stand in chains of it and in its own wrappers,
    and moments leaf by leaf, so that groups of `by_path` may come, go and change: a leaf that thaws
    starts afresh beside others that go on. Where leaves of one group have then gathered different
    weights, those of its state have an entry a leaf, as after `reset`: a jitted step is compiled
    once more. Under `jax.jit`, which does not know their values, that is so wherever leaves of two
    groups come together.

    A transformation of others keeps its state where the same one stands on both sides. Works under
    `jax.jit` (return `.state`: the report is no array).

    Args:
      state: a state that `from_tx` made; the `opt_state` of an `nnx.Optimizer` comes back without
        its boxes, for `nnx.update(optimizer.opt_state, nnx.state(converted.state))`.
      from_tx: the transformation that the run had.
      to_tx: the one that it shall have.
      params: the present parameters, in the dtype that they shall have.

    Returns:
      The new state and what was kept, started afresh and dropped.

    Raises:
      TypeError: for what is no gradient transformation.
      ValueError: if the state is not one of `from_tx` for these parameters; if moments are inside a
        transformation of others, which does not show what they mean, and is not the same on both
        sides; if `from_tx` is of others and nothing is kept.
    """
    for name, tx in [("from_tx", from_tx), ("to_tx", to_tx)]:
        if not is_transformation(tx):
            hint = swapped(tx, "convert_state")
            raise TypeError(
                f"convert_state: {name}: found {brief(tx)}; expected a gradient "
                f"transformation.{hint}"
            )
    if any(type(node).__name__ == "OptArray" for node in jax.tree.leaves(state, is_leaf=is_box)):
        state, params = unboxed(state), unboxed(params)
    _expect_fit(state, from_tx, params)
    first = to_tx.init(params)
    new = Configuration(to_tx, first)
    conversion = _Conversion(from_tx, state)
    states = iter([conversion.part(part) for part in new.stages])
    converted = Converted(
        rebuilt(to_tx, states),
        tuple(conversion.kept),
        tuple(conversion.fresh),
        conversion.dropped(),
    )
    if not isinstance(from_tx, Transformation) and converted.dropped and not converted.kept:
        raise ValueError(
            f"convert_state: found from_tx of others, {show(from_tx)}, of whose state nothing can "
            "be kept; expected a transformation of adam_jax. A run of Optax goes on with "
            "from_optax."
        )
    return converted


class _Memory(NamedTuple):
    """A moment of the old configuration.

    The part that has it, its field, its leaves by path, and those that nobody took yet.
    """

    part: StageInstance
    field: str
    leaves: dict[str, _Source]
    left: dict[str, _Source]


class _Source(NamedTuple):
    """A leaf on its way: the part that it comes from, its field, its place among the leaves.

    And its form at rest.
    """

    part: StageInstance
    field: str
    row: int
    at_rest: StoredLeaf

    def its(self, value: Array, ndim: int) -> Array:
        """Of a value of `ndim` dimensions this leaf's, where there is one a leaf."""
        return value if value.ndim == ndim else value[..., self.row]

    @property
    def weight(self) -> Array:
        """What the moment has gathered, as two floats."""
        return _weight_of(self.part, self.field, self.row)

    @property
    def divisor(self) -> Array:
        """What divides the moment to correct its bias, not 0."""
        return jnp.where(self.weight[0] > 0, self.weight[0], 1)


class _Conversion:
    """Fills the parts of the new configuration, one after the other, from the old one.

    And keeps the record.
    """

    def __init__(self, tx: Any, state: Any) -> None:
        old = Configuration(tx, state)
        self.kept: list[Entry] = []
        self.fresh: list[Entry] = []
        self.misfits: list[Entry] = []
        self.partners = {part.key: part for part in old.stages}
        self.unpaired = dict(self.partners)
        self.read: set[tuple[str, tuple[str, ...], int]] = set()
        self.memories: list[_Memory] = []
        self.made: dict[Any, Array] = {}
        self.moments: dict[str, list[_Source | None]] = {}
        for part in old.stages:
            for field in part.meanings:
                tree = getattr(part.state, field)
                at_rest = zip(
                    paths(tree), unpack_moment(field, tree, part.state.scales), strict=True
                )
                leaves = {
                    path: _Source(part, field, row, leaf)
                    for row, (path, leaf) in enumerate(at_rest)
                }
                self.memories.append(_Memory(part, field, leaves, dict(leaves)))
        # A count that serves random bits alone is not the step that schedules have reached.
        tracking = {
            part.place: "count"
            for part in old.stages
            if part.definition and part.definition.counter == "count"
        }
        reads = read_counters(tx, state) or tracking
        counts: list[Array] = [
            getattr(part.state, reads[part.place]) for part in old.stages if part.place in reads
        ]
        self.count = functools.reduce(jnp.maximum, counts) if counts else None

    def part(self, part: StageInstance) -> Any:
        """The state of a part of the new configuration."""
        partner = self.unpaired.pop(part.key, None)
        if not isinstance(part.tx, Transformation):
            return self._foreign(part, partner)
        if not hasattr(part.state, "_fields"):
            return (
                part.state
                if partner is None
                else self._alike(part, partner, "", part.state, partner.state)
            )
        if (
            partner is not None
            and wrapped(part.tx, part.state)
            and not _like(_own(partner.state), _own(part.state))
        ):
            # What a wrapper remembers belongs together: so many norms of a ring are known, and not
            # of another one.
            self.unpaired[partner.key], partner = partner, None
        new = {}
        scales = getattr(part.state, "scales", {})
        for field in part.state._fields:
            value = getattr(part.state, field)
            theirs = getattr(partner.state, field, None) if partner else None
            if field in part.meanings:
                new[field], scales = self._moment(part, field, scales)
            elif field in ("count", "step"):
                reached = self.count if theirs is None else theirs
                new[field] = value if value is None or reached is None else reached
            elif field == "hyperparams":
                kept = theirs or {}
                new[field] = {
                    name: jnp.asarray(kept.get(name, v)).astype(v.dtype)
                    for name, v in value.items()
                }
            elif field == "weights":
                new[field] = self._weights(part)
            elif isinstance(part.state, LookAheadState) and field == "weight":
                new[field] = None if value is None else self._look_ahead(part)
            elif isinstance(part.state, RectifyState) and field == "age":
                new[field] = self._age(part)
            elif field not in BOOKKEEPING:
                new[field] = self._alike(part, partner, field, value, theirs)
        if "scales" in part.state._fields:
            new["scales"] = scales
        return part.state._replace(**new)

    def dropped(self) -> tuple[Entry, ...]:
        """What of the old configuration no part of the new one took."""
        found = [
            self._entry(*memory[:2], note=_part_of(memory.left, memory.leaves))
            for memory in self.memories
            if memory.left
        ]
        for part in (part for key, part in self.unpaired.items() if key not in self.read):
            if not isinstance(part.tx, Transformation):
                if _holds_moments(part.state):
                    raise ValueError(_hidden(part, "from_tx"))
                found += (
                    [Entry(part.place, f"the state of {show(part.tx)}")]
                    if jax.tree.leaves(part.state)
                    else []
                )
                continue
            for field in getattr(part.state, "_fields", ()):
                if field not in (*BOOKKEEPING, *part.meanings) and jax.tree.leaves(
                    getattr(part.state, field)
                ):
                    found.append(self._entry(part, field))
        return tuple(found) + tuple(self.misfits)

    def _entry(self, part: StageInstance, field: str, what: str = "", note: str = "") -> Entry:
        what = (
            what
            or part.meanings.get(field)
            or f"{field or 'the state'} of {part.key[0]}{of_group(part.group)}"
        )
        return Entry(f"{part.place}.{field}" if field else part.place, what, note)

    def _moment(self, part: StageInstance, field: str, scales: Any) -> tuple[PyTree, Any]:
        """A moment at rest, each leaf from the one of the same meaning wherever that was.

        And the scales of its state.
        """
        tree = getattr(part.state, field)
        its = paths(tree)
        sources = self.moments[field] = [self._take(part.meanings[field], path) for path in its]
        leaves, notes = [], []
        for i, (source, start) in enumerate(
            zip(sources, unpack_moment(field, tree, scales), strict=True)
        ):
            if source is not None:
                leaf, said = _moved(source, start, part, field)
                notes += said
            elif self._beside_mu(part, field, i):
                leaf = self._nu_of_mu(part, i, start)
            else:
                leaf = start
            leaves.append(leaf)
        if any(sources) or not sources:
            moved = dict.fromkeys(
                source.part.place
                for source in sources
                if source and source.part.place != part.place
            )
            said = [f"from {place}.{field}" for place in moved]
            self.kept.append(self._entry(part, field, note=", ".join(dict.fromkeys(said + notes))))
        if fresh := [path for path, source in zip(its, sources, strict=True) if source is None]:
            notes = [_part_of(fresh, its)]
            for memory in self.memories:
                if (
                    memory.field == field
                    and memory.leaves.keys() & fresh
                    and memory.part.meanings[field] != part.meanings[field]
                ):
                    notes.append(f"{memory.part.place}.{field} was {memory.part.meanings[field]}")
            if any(self._beside_mu(part, field, i) for i in range(len(its))):
                notes.append("as if μ had been one gradient")
            self.fresh.append(self._entry(part, field, note="; ".join(filter(None, notes))))
        return repack_moment(field, tree, scales, leaves)

    def _take(self, what: str, path: str) -> _Source | None:
        """The leaf of a moment of that meaning, once."""
        memories = (m for m in self.memories if path in m.left and m.part.meanings[m.field] == what)
        memory = next(memories, None)
        return None if memory is None else memory.left.pop(path)

    def _beside_mu(self, part: StageInstance, field: str, i: int) -> bool:
        """Whether a leaf has a fresh ν.

        Of which the next update is already made, beside a μ that is kept.
        """
        kept = field == "nu" and "mu" in part.meanings and self.moments["mu"][i] is not None
        return kept and self.moments["nu"][i] is None and not part.slots["nu"].delayed

    def _nu_of_mu(self, part: StageInstance, i: int, start: StoredLeaf) -> StoredLeaf:
        """ν after a step whose gradient was μ, corrected for its bias.

        μ/√ν is bounded because both have seen the same gradients. A ν that has seen but the next
        one would make an update without bound where that one happens to be small.
        """
        source = self.moments["mu"][i]
        assert source is not None
        nu = start.widen()
        g = divide(source.at_rest.widen(), source.divisor)
        make = part.slots["nu"].of_gradient
        assert make is not None
        return narrow_to_nearest(
            make(g, nu, self._nu_rate(part).astype(nu.dtype)), start, signed=False
        )

    def _nu_rate(self, part: StageInstance) -> Array:
        """1 − b2 at the step that the run has reached."""
        return _rate_of(part, "nu", jnp.zeros((), jnp.int32) if self.count is None else self.count)

    def _weights(self, part: StageInstance) -> Array | None:
        """The weights of the moments that `part` has been given, in the columns of its stage.

        New ones have none.
        """
        none, names = part.state.weights, gathering(part.tx)
        both = {name: self._column(part, name) for name in ("mu", "nu")}
        self.leaves: tuple[int, ...] = max((c.shape[1:] for c in both.values()), key=len)
        self.columns = {name: self._spread(column, 1) for name, column in both.items()}
        return None if none is None else jnp.stack([self.columns[name] for name in names], axis=1)

    def _column(self, part: StageInstance, field: str) -> Array:
        """Returns the weight of one moment, for all leaves or one per leaf.

        If the stage does not keep that moment, the weight comes from the stage that its other
        moment comes from.
        """
        weight = self._gathered(part, field)
        if field not in part.meanings:
            return weight
        none, slot = jnp.zeros(2, weight.dtype), part.slots[field]
        beside = np.array(
            [self._beside_mu(part, field, i) for i in range(len(self.moments[field]))]
        )
        if beside.any():
            rate = (
                self._nu_rate(part)
                if slot.gathers or not _is_whole(part, field)
                else jnp.ones_like(none[0])
            )
            mu = self._gathered(part, "mu")
            seen = jnp.where(
                mu[0] > 0,
                accumulate_weight(none, rate).reshape(2, *[1] * (mu.ndim - 1)),
                jnp.zeros_like(mu),
            )
            each = [w if beside.all() or w.ndim > 1 else w[:, None] for w in (seen, weight)]
            weight = seen if beside.all() else jnp.where(jnp.asarray(beside), each[0], each[1])
        if slot.delayed:
            weight = jnp.stack([(weight[0] > 0).astype(none.dtype), jnp.zeros_like(weight[1])])
        return weight

    def _gathered(self, part: StageInstance, field: str) -> Array:
        """The weight that a moment has gathered, one or one a leaf.

        That of one `part` has not, where the other comes from.
        """
        none = jnp.zeros(2, _scalars_of(part))
        (sources, *_) = (self.moments[its] for its in (field, "mu", "nu") if its in part.meanings)
        weights = [none if source is None else self._weight_of(source, field) for source in sources]
        return _together(weights, none)

    def _weight_of(self, source: _Source, field: str) -> Array:
        """`_weight_of`, made once: leaves that have one weight in common get the same array."""
        weights = source.part.state.weights
        key = (
            source.part.key,
            field,
            source.row if weights is not None and weights.ndim > 2 else None,
        )
        if key not in self.made:
            self.made[key] = _weight_of(source.part, field, source.row)
        return self.made[key]

    def _spread(self, weight: Array, ndim: int) -> Array:
        """A weight of `ndim` dimensions with an entry a leaf where the moments' own have one."""
        weight = weight[..., None] if self.leaves and weight.ndim == ndim else weight
        return jnp.broadcast_to(weight, weight.shape[:ndim] + self.leaves)

    def _there(self, part: StageInstance, source: _Source) -> StageInstance | None:
        """The part that did for a leaf, where it comes from, what `part` does."""
        name, _, nth = part.key
        key = name, source.part.group, nth
        self.read.add(key)
        return self.partners.get(key)

    def _look_ahead(self, part: StageInstance) -> Array:
        """What the look ahead divides by, which has to fit the weight that μ has gathered."""
        none, weights, notes = part.state.weight, [], {}
        for i, source in enumerate(self.moments.get("mu", ())):
            there = source and self._there(part, source)
            if source is not None:
                notes[
                    ""
                    if there is not None and there.state.weight is not None
                    else "the weight of μ"
                ] = True
            column = self.columns["mu"]
            mine = column if column.ndim == 1 else column[:, i]
            own = there is not None and there.state.weight is not None
            weights.append(
                none
                if source is None
                else source.its(there.state.weight, 1)
                if own and there
                else mine
            )
        if notes:
            self.kept.append(
                self._entry(
                    part, "weight", "the weight that the look ahead divides by", "".join(notes)
                )
            )
        return self._spread(_together(weights, none), 1)

    def _age(self, part: StageInstance) -> Array:
        """The mean age of ν: recorded.

        Or what its weight says at the decay that the old configuration had.
        """
        none, ages, notes = part.state.age, [], {}
        weight = self.columns["nu"].astype(none.dtype)

        made: dict[Any, Array] = {}  # so that leaves which have one age in common have the same one
        for i, source in enumerate(self.moments.get("nu", ())):
            there = source and self._there(part, source)
            if source is not None:
                notes["from its weight" if there is None else ""] = True
            if source is not None and there is not None:
                ages.append(source.its(there.state.age, 0))
                continue
            key = source and source.part.place, i if weight.ndim > 1 else None
            if key not in made:
                high, low = weight if weight.ndim == 1 else weight[:, i]
                # Of one step, if of any.
                made[key] = (
                    (high > 0).astype(none.dtype)
                    if source is None
                    else _age_of(high, low, source.part)
                )
            ages.append(made[key])
        if notes:
            self.kept.append(self._entry(part, "age", "the mean age of ν", "".join(notes)))
        return self._spread(_together(ages, none), 0)

    def _alike(
        self,
        part: StageInstance,
        partner: StageInstance | None,
        field: str,
        value: Any,
        theirs: Any,
    ) -> Any:
        """What a stage remembers that is no moment.

        Kept where its partner has it in the same form.
        """
        if not jax.tree.leaves(value) and not jax.tree.leaves(theirs):
            return value
        if partner is not None and _like(theirs, value):
            self.kept.append(self._entry(part, field))
            return jax.tree.map(
                lambda x, like: x.astype(like.dtype) if hasattr(like, "dtype") else x, theirs, value
            )
        if partner is not None and jax.tree.leaves(theirs):
            self.misfits.append(self._entry(partner, field, note="of another form in to_tx"))
        if jax.tree.leaves(value):
            self.fresh.append(self._entry(part, field))
        return value

    def _foreign(self, part: StageInstance, partner: StageInstance | None) -> Any:
        """The state of a transformation of others."""
        same = partner is not None and part.tx == partner.tx
        if not same and (
            _holds_moments(part.state) or (partner is not None and _holds_moments(partner.state))
        ):
            raise ValueError(_hidden(part, "to_tx"))
        if not jax.tree.leaves(part.state):
            if partner is not None and jax.tree.leaves(partner.state):
                self.unpaired[partner.key] = partner
            return part.state
        what = f"the state of {show(part.tx)}"
        if partner is not None and (same or _like(partner.state, part.state)):
            self.kept.append(Entry(part.place, what))
            return partner.state
        if partner is not None:
            self.unpaired[partner.key] = partner
        self.fresh.append(Entry(part.place, what))
        return part.state


def _moved(
    source: _Source, like: StoredLeaf, part: StageInstance, field: str
) -> tuple[StoredLeaf, list[str]]:
    """A leaf at rest as `part` keeps it, and what was done to it."""
    array, start = source.at_rest.array, like.array
    whole = part.slots[field].delayed and not source.part.slots[source.field].delayed
    shared, sharing = (
        None if scale is None else scale.shape for scale in (source.at_rest.scale, like.scale)
    )
    if (
        array.dtype == start.dtype
        and array.shape == start.shape
        and shared == sharing
        and not whole
    ):
        return source.at_rest, []
    x, notes = source.at_rest.widen(), []
    if whole:
        x = divide(x, source.divisor)
        notes.append("divided by the weight it had gathered")
    if x.shape != start.shape:
        block = all(size in (1, old) for size, old in zip(start.shape, x.shape, strict=True))
        notes.append("the mean over each block" if block else "spread over its block")
        x = _in_blocks(x, start.shape)
    if array.dtype != start.dtype:
        notes.append(f"{array.dtype} → {start.dtype}")
    elif array.shape == start.shape and shared != sharing:
        notes.append(f"scales of shape {shared} → {sharing}")
    return narrow_to_nearest(x, like, signed=part.slots[field].signed), notes


def _scalars_of(part: StageInstance) -> Any:
    weights = getattr(part.state, "weights", None)
    return scalar_dtype(part.state) if weights is None else weights.dtype


def _rate_of(part: StageInstance, field: str, count: Array) -> Array:
    """1 − the decay of a moment, at the step before which `count` were taken."""
    decay = part.slots[field].decay
    assert part.definition is not None
    assert decay is not None
    rate: Array = complement(
        part.definition.hyperparameters[decay].at(count, part.state.hyperparams), _scalars_of(part)
    )
    return rate


def _is_whole(part: StageInstance, field: str) -> bool:
    """Whether a moment has all of its weight at once.

    The sum, the maximum, and a gradient that is not averaged.
    """
    slot = part.slots.get(field)
    return slot is None or slot.whole


def _weight_of(part: StageInstance, field: str, row: int) -> Array:
    """Returns the weight that a moment has gathered, as two floats.

    If the state does not keep it, the count gives it.
    """
    columns, weights = gathering(part.tx), part.state.weights
    if field in columns:
        kept: Array = weights[:, columns.index(field)]
        return kept if weights.ndim == 2 else kept[:, row]
    count, none = part.state.count, jnp.zeros(2, _scalars_of(part))
    if _is_whole(part, field):
        # Before the first step it has none, like every other moment. After `reset` of some leaves
        # the other moment says so.
        begun = (
            weights[0, 0]
            if weights is not None and weights.ndim == 2
            else weights[0, 0, row]
            if columns
            else count
        )
        whole: Array = jnp.stack([(begun > 0).astype(none.dtype), none[1]])
        return whole
    gathered: Array = jax.lax.fori_loop(
        0,
        count,
        lambda i, weight: accumulate_weight(
            weight, _rate_of(part, field, jnp.asarray(i, jnp.int32))
        ),
        none,
    )
    return gathered


def _age_of(high: Array, low: Array, old: StageInstance) -> Array:
    """The mean age of a ν of the weight high + low.

    A ν of t steps has the weight w = 1 − b2ᵗ and the mean age 1/(1 − b2) − t·b2ᵗ/w, for a young one
    a difference of large numbers. With x = −log b2, X = t·x and 1/(1 − e⁻ˣ) = 1/x + 1/2 + x/12 −
    x³/720 …, these cancel.
    """
    steps = old.state.count
    rate = _rate_of(old, "nu", jnp.maximum(steps - 1, 0)).astype(high.dtype)
    left, per_step, in_all = (1 - high) - low, -jnp.log1p(-rate), -jnp.log1p(-high)
    long = 1 / rate + xlogy(left, left) / (per_step * jnp.where(high > 0, high, 1))

    def cubic(x: Array) -> Array:
        return x / 12 - x**3 / 720

    t = in_all / per_step
    young = (t + 1) / 2 + cubic(per_step) - t * cubic(in_all)
    age = jnp.where(in_all < 0.5, young, long)
    return jnp.where(high > 0, jnp.clip(age, 1, steps.astype(high.dtype)), 0)


def _together(values: Sequence[Array], none: Array) -> Array:
    """The one value that all leaves have, or an entry a leaf; `none` where there are no leaves."""
    first = values[0] if values else none

    def same(value: Array) -> bool:
        known = not isinstance(value, jax.core.Tracer) and not isinstance(first, jax.core.Tracer)
        return value is first or (known and np.array_equal(value, first))

    return (first if all(map(same, values)) else jnp.stack(values, axis=-1)).astype(none.dtype)


def _part_of(some_paths: Iterable[str], of: Collection[str]) -> str:
    """Which leaves it concerns, if not all."""
    found = list(some_paths)
    return f"of {some(found)}" if len(found) < len(of) else ""


def _in_blocks(nu: Array, shape: tuple[int, ...]) -> Array:
    """A second moment in other blocks.

    The mean over those that grow, spread over those that shrink.
    """
    return jnp.broadcast_to(block_mean(nu, shape), shape)


def _own(state: Any) -> Any:
    """What a wrapper itself remembers."""
    return state._replace(
        **{name: None for name in ("inner_state", "inner_states") if hasattr(state, name)}
    )


def _holds_moments(state: Any) -> bool:
    """Whether moments of this package are somewhere in a state."""

    def is_stage(node: Any) -> bool:
        return isinstance(getattr(node, "scales", None), dict)

    return any(map(is_stage, jax.tree.leaves(state, is_leaf=is_stage)))


def _hidden(part: StageInstance, side: str) -> str:
    return (
        f"convert_state: {show(part.tx)}{f' at {part.place}' if part.place else ''} of {side} has "
        "moments inside and does not show what they mean, and the other side does not have the "
        "same one. Convert the state inside it, for example "
        "state._replace(inner_state=convert_state(state.inner_state, from_tx, to_tx, "
        "params).state) with the transformations and the parameters that are inside, or build "
        "both with adam_jax.chain."
    )


def _like(found: Any, expected: Any) -> bool:
    structures: list[Any] = [jax.tree.structure(found), jax.tree.structure(expected)]
    alike = map(_same_form, jax.tree.leaves(found), jax.tree.leaves(expected))
    return structures[0] == structures[1] and all(alike)


def _same_form(found: Any, expected: Any) -> bool:
    """Whether two arrays have the same shape.

    And the same dtype or two in which the same is computed.
    """
    return jnp.shape(found) == jnp.shape(expected) and _same_kind(
        jnp.result_type(found), jnp.result_type(expected)
    )


def _same_kind(found: Any, expected: Any) -> bool:
    wide = (
        found.kind == expected.kind
        and found.kind in "fc"
        and min(found.itemsize, expected.itemsize) >= 4
    )
    return bool(found == expected or wide)


def _expect_fit(state: Any, tx: Any, params: PyTree) -> None:
    """Refuses a state that is not one of `tx` for `params`."""

    def arrays(tree: Any) -> dict[str, Any]:
        # The bits that parameters lost are theirs, and these may have another dtype from now on.
        located = [
            (jax.tree_util.keystr(path), leaf)
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        ]
        return {place: leaf for place, leaf in located if ".lost" not in place}

    remedy = "Pass a state that from_tx made, and parameters of the shapes that it was made for."
    expected_state = abstract_state(tx, params, "convert_state")
    found, expected = arrays(state), arrays(expected_state)
    for place in sorted(found.keys() ^ expected.keys()):
        has, lacks = ("the state", "from_tx") if place in found else ("from_tx", "the state")
        raise ValueError(
            f"convert_state: {has} has {place or 'one array'}, which {lacks} does not have. "
            f"{remedy}"
        )
    for place, leaf in expected.items():
        shape, dtype = jnp.shape(found[place]), jnp.result_type(found[place])
        # After `reset` of some leaves weights and ages have an entry a leaf.
        per_leaf = (
            place.rpartition(".")[2] in ("weights", "weight", "age") and shape[:-1] == leaf.shape
        )
        if not (shape == leaf.shape or per_leaf) or not _same_kind(dtype, leaf.dtype):
            raise ValueError(
                f"convert_state: at {place} found {dtype}{list(shape)} in the state; expected "
                f"{leaf.dtype}{list(leaf.shape)}, as {show(tx)} makes it for these parameters. "
                f"{remedy}"
            )
    try:
        list(iter_stages(tx, state))
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"convert_state: found a state of the structure {jax.tree.structure(state)}; expected "
            f"{jax.tree.structure(expected_state)}. {remedy}"
        ) from error
