"""`convert_state`: a run goes on under another configuration.

What two configurations share is decided by what their memories mean, not by what these are called: ν is a mean of squares in
Adam, of (g − μ)² in AdaBelief, and a maximum in AdaMax, each in a field `nu` of the same shape.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.scipy.special import xlogy

from adam_jax._bias import LookAheadState, RectifyState, correct_bias
from adam_jax._hyperparams import Hyperparameter, complement
from adam_jax._moments import NU_RULES, block_mean, by_leaf, grow, track_moments
from adam_jax._paths import paths
from adam_jax._refine import keep_maximum, mix_slow_mean
from adam_jax._transformation import Transformation, is_transformation, rewrapped, show, wrapped
from adam_jax._tree import PyTree, lerp, over
from adam_jax.storage import Resting, narrow_to_nearest, put_back, take_out

BOOKKEEPING = ("count", "step", "hyperparams", "scales", "weights", "inner_state", "inner_states")
"""The fields that are no memory: they follow from the run or from the fields beside them."""

NU_MEANINGS = {
    "square": "the mean of squared {}",
    "yogi": "the mean of squared {}",  # by another path to it
    "belief": "the mean of squared distances of {} from μ",
    "infinity": "the decaying maximum of {}",
}


class Entry(NamedTuple):
    """A memory in a state.

    Attributes:
      place: where it is, as `jax.tree_util.keystr` writes it: of what is dropped in the old state, else in the new one.
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
        rows = [(group, *entry) for group in ("kept", "fresh", "dropped") for entry in getattr(self, group)]
        widths = [max((len(row[i]) for row in rows), default=0) for i in range(3)]
        lines = ["  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]]) for row in rows]
        return "\n".join(line.rstrip() for line in lines)


def convert_state(
    state: PyTree, from_tx: optax.GradientTransformation, to_tx: optax.GradientTransformation, params: PyTree
) -> Converted:
    """Carries a run over to another configuration: other storage, another member of the family, other links.

        converted = convert_state(state, adam(1e-3), amsgrad(1e-3, storage="8bit"), params)
        print(converted)
        state = converted.state

    Each moment takes the weight it has gathered along, and a fresh one has none, so bias correction is right for both; every
    schedule goes on at the step that the run has reached. Moments are rounded to the nearest number of the new storage. Where a
    ν becomes that of a block it is its mean, and a block's is spread over its elements. A fresh ν beside a μ that is kept starts
    as if μ had come once as a gradient: a quotient of an old μ and a ν that has seen one gradient has no bound.

    Stages of this package are matched wherever they stand in chains of it and in its own wrappers. A transformation of others
    keeps its state where the same one stands on both sides. Works under `jax.jit` (return `.state`: the report is no array).

    Args:
      state: a state that `from_tx` made.
      from_tx: the transformation that the run had.
      to_tx: the one that it shall have.
      params: the present parameters, in the dtype that they shall have.

    Returns:
      The new state and what was kept, started afresh and dropped.

    Raises:
      TypeError: for what is no gradient transformation.
      ValueError: if the state is not one of `from_tx` for these parameters, or if moments are inside a transformation of others,
        which does not show what they mean, and is not the same on both sides.
    """
    for name, tx in [("from_tx", from_tx), ("to_tx", to_tx)]:
        if not is_transformation(tx):
            raise TypeError(f"convert_state: {name}: found {tx!r}; expected a gradient transformation.")
    _expect_fit(state, from_tx, params)
    first = to_tx.init(params)
    old, new = Side(from_tx, state), Side(to_tx, first)
    conversion = _Conversion(old)
    states = iter([conversion.part(part) for part in new.parts])
    return Converted(rebuilt(to_tx, first, states), tuple(conversion.kept), tuple(conversion.fresh), conversion.dropped())


class Part(NamedTuple):
    """A stage, a wrapper or a transformation of others, in its place in a configuration.

    Attributes:
      place: in the state.
      tx: the transformation.
      state: its state; of a wrapper with what is inside.
      group: that of `by_path` it is in, "" outside.
      key: its name, and how many of that name come before in its group: what it is paired by.
      meanings: what its moments are, by field.
    """

    place: str
    tx: Any
    state: Any
    group: str
    key: tuple[str, str, int]
    meanings: dict[str, str]

    @property
    def said(self) -> dict[str, Any]:
        return dict(self.tx.init.spec.arguments.arguments) if isinstance(self.tx, Transformation) else {}


class _Memory(NamedTuple):
    """A moment on its way: the part that it comes from, its field, its leaves, and the weight that it has gathered, if known."""

    part: Part
    field: str
    leaves: list[Resting]
    weight: Array | None


def walk(tx: Any, state: Any, place: str = "", group: str = "") -> Iterator[tuple[str, str, Any, Any]]:
    """The parts of a configuration in the order in which updates meet them, with place and group."""
    if isinstance(tx, Transformation) and tx.init.spec.stages:
        for i, (part, its) in enumerate(zip(tx.stages, state, strict=True)):
            yield from walk(part, its, f"{place}[{i}]", group)
        return
    yield place, group, tx, state
    for inside, part, its in wrapped(tx, state):
        # Groups are paired by their names, and what only guards what is inside is not one.
        yield from walk(part, its, f"{place}{inside}", group + (inside if hasattr(state, "inner_states") else ""))


def rebuilt(tx: Any, state: Any, states: Iterator[Any]) -> Any:
    """The state with that of each part, as `walk` meets them, taken from `states`."""
    if isinstance(tx, Transformation) and tx.init.spec.stages:
        return tuple(rebuilt(part, its, states) for part, its in zip(tx.stages, state, strict=True))
    own = next(states)
    inner = [rebuilt(part, its, states) for _, part, its in wrapped(tx, state)]
    return rewrapped(tx, own, inner) if inner else own


def _of(group: str) -> str:
    return f" of {group.removeprefix('.inner_states')}" if group else ""


class Side:
    """One of the two configurations, with a state: its parts, and what their moments mean."""

    def __init__(self, tx: Any, state: Any) -> None:
        self.parts: list[Part] = []
        names: list[tuple[str, str]] = []
        source, nu, corrected, where = "gradients", "", False, ""
        for place, group, part, its in walk(tx, state):
            build, said, flow = None, {}, None
            if group != where:
                where, source, nu, corrected = group, f"gradients{_of(group)}", "", False
            if isinstance(part, Transformation):
                build, said = part.init.spec.build, part.init.spec.arguments.arguments
                # A wrapper's flow is that of what is inside, which comes next.
                flow = None if part.init.spec.inner else part.flow
            meanings = {}
            if build is track_moments:
                nu, corrected = NU_MEANINGS[said["nu_rule"]].format(source), False
                meanings = {"mu": f"the {said['mu_rule']} of {source}", "nu": nu}
            elif build is correct_bias:
                corrected |= said["nu"]
            elif build is keep_maximum:
                meanings = {"nu_max": f"the maximum of {nu}, {'corrected' if corrected else 'raw'}"}
            elif build is mix_slow_mean:
                meanings = {"mu_slow": f"the slow mean of {source}"}
            if flow and flow.takes == "moments" and flow.gives == "updates":
                source = "directions"  # what is averaged behind is no gradient
            if flow and flow.rate == "applies":
                source = "steps"
            name = build.__name__ if build else show(part), group
            meanings = {field: what for field, what in meanings.items() if hasattr(its, field)}
            self.parts.append(Part(place, part, its, group, (*name, names.count(name)), meanings))
            names.append(name)


class _Conversion:
    """Fills the parts of the new configuration, one after the other, from the old one, and keeps the record."""

    def __init__(self, old: Side) -> None:
        self.kept: list[Entry] = []
        self.fresh: list[Entry] = []
        self.misfits: list[Entry] = []
        self.partners = {part.key: part for part in old.parts}
        self.unpaired = dict(self.partners)
        self.memories: list[tuple[str, _Memory]] = []
        self.moments: dict[str, _Memory | None] = {}
        for part in old.parts:
            for field, what in part.meanings.items():
                leaves = take_out(field, getattr(part.state, field), part.state.scales)
                column = {"mu": 0, "nu": 1}.get(field)
                weight = None if column is None else part.state.weights[:, column]
                self.memories.append((what, _Memory(part, field, leaves, weight)))
        # A count that serves random bits alone is not the step that schedules have reached.
        read = [part for part in old.parts if _is_ours(part, "hyperparams")] or old.parts
        counts = [getattr(part.state, name) for part in read for name in ("count", "step") if _is_ours(part, name)]
        self.count = functools.reduce(jnp.maximum, counts) if counts else None

    def part(self, part: Part) -> Any:
        """The state of a part of the new configuration."""
        partner = self.unpaired.pop(part.key, None)
        if not isinstance(part.tx, Transformation):
            return self._foreign(part, partner)
        if not hasattr(part.state, "_fields"):
            return part.state if partner is None else self._alike(part, partner, "", part.state, partner.state)
        if partner is not None and wrapped(part.tx, part.state) and not _like(_own(partner.state), _own(part.state)):
            # What a wrapper remembers belongs together: so many norms of a ring are known, and not of another one.
            self.unpaired[partner.key], partner = partner, None
        new = {}
        scales = getattr(part.state, "scales", {})
        for field in part.state._fields:
            value = getattr(part.state, field)
            theirs = getattr(partner.state, field, None) if partner else None
            if field in part.meanings:
                new[field], scales = self._moment(part, field, scales)
            elif field in ("count", "step"):
                new[field] = value if theirs is None and self.count is None else self.count if theirs is None else theirs
            elif field == "hyperparams":
                record = {name: v for name, v in (theirs or {}).items() if name != "nu_init"}
                new[field] = {name: jnp.asarray(record.get(name, v)).astype(v.dtype) for name, v in value.items()}
            elif field == "weights":
                new[field] = self._weights(part, value if theirs is None else theirs.astype(value.dtype))
            elif isinstance(part.state, LookAheadState) and field == "weight":
                new[field] = self._look_ahead(part, theirs)
            elif isinstance(part.state, RectifyState) and field == "age":
                new[field] = self._age(part, theirs)
            elif field not in BOOKKEEPING:
                new[field] = self._alike(part, partner, field, value, theirs)
        if "scales" in part.state._fields:
            new["scales"] = scales
        return part.state._replace(**new)

    def dropped(self) -> tuple[Entry, ...]:
        """What of the old configuration no part of the new one took."""
        found = [self._entry(memory.part, memory.field, what) for what, memory in self.memories]
        for part in self.unpaired.values():
            if not isinstance(part.tx, Transformation):
                if _holds_moments(part.state):
                    raise ValueError(_hidden(part, "from_tx"))
                found += [Entry(part.place, f"the state of {show(part.tx)}")] if jax.tree.leaves(part.state) else []
                continue
            for field in getattr(part.state, "_fields", ()):
                if field not in (*BOOKKEEPING, *part.meanings) and jax.tree.leaves(getattr(part.state, field)):
                    found.append(self._entry(part, field))
        return tuple(found) + tuple(self.misfits)

    def _entry(self, part: Part, field: str, what: str = "", note: str = "") -> Entry:
        return Entry(
            f"{part.place}.{field}" if field else part.place,
            what or f"{field or 'the state'} of {part.key[0]}{_of(part.group)}",
            note,
        )

    def _moment(self, part: Part, field: str, scales: Any) -> tuple[PyTree, Any]:
        """A moment at rest, from the one of the same meaning, and the scales of its state."""
        what, tree = part.meanings[field], getattr(part.state, field)
        index = next((i for i, (other, _) in enumerate(self.memories) if other == what), None)
        self.moments[field] = None if index is None else self.memories.pop(index)[1]
        memory = self.moments[field]
        if memory is None:
            notes = [f"{p.place}.{field} was {p.meanings[field]}" for p in self.partners.values() if field in p.meanings]
            if field == "nu" and self._beside_mu(part):
                notes.append("as if μ had been one gradient")
                tree, scales = put_back(field, tree, scales, self._nu_of_mu(part))
            self.fresh.append(self._entry(part, field, what, "; ".join(notes)))
            return tree, scales
        theirs, ours = paths(getattr(memory.part.state, memory.field)), paths(tree)
        if theirs != ours:
            raise ValueError(
                f"convert_state: {memory.part.place} has {len(theirs)} leaves in from_tx, and {part.place} {len(ours)} in to_tx, "
                f"of which {sorted({*theirs} ^ {*ours})[0]!r} is in one alone; expected the same parameters in both. Leave the "
                f"groups' patterns as they were, and change what they do."
            )
        whole = part.said.get("nu_delay") and field == "nu" and not memory.part.said.get("nu_delay")
        divisor = by_leaf(jnp.where(memory.weight[0] > 0, memory.weight[0], 1)) if whole and memory.weight is not None else None
        notes = ["divided by the weight it had gathered"] if whole else []
        leaves = []
        for leaf, like in zip(memory.leaves, jax.tree.leaves(tree), strict=True):
            if leaf.array.dtype == like.dtype and leaf.array.shape == like.shape and divisor is None:
                leaves.append(leaf)
                continue
            x = leaf.widen()
            if divisor is not None:
                x = over(x, divisor())
            if x.shape != like.shape:
                block = all(size in (1, old) for size, old in zip(like.shape, x.shape, strict=True))
                notes.append("the mean over each block" if block else "spread over its block")
                x = _in_blocks(x, like.shape)
            if leaf.array.dtype != like.dtype:
                notes.append(f"{leaf.array.dtype} → {like.dtype}")
            leaves.append(narrow_to_nearest(x, like, signed=field in ("mu", "mu_slow")))
        source = f"{memory.part.place}.{memory.field}"
        moved = [f"from {source}"] if source != f"{part.place}.{field}" else []
        self.kept.append(self._entry(part, field, what, ", ".join(dict.fromkeys(moved + notes))))
        return put_back(field, tree, scales, leaves)

    def _beside_mu(self, part: Part) -> bool:
        """Whether a part has a fresh ν, of which the next update is already made, beside a μ that is kept."""
        kept = "mu" in part.meanings and self.moments["mu"] is not None
        return kept and "nu" in part.meanings and self.moments["nu"] is None and not part.said["nu_delay"]

    def _nu_of_mu(self, part: Part) -> list[Resting]:
        """ν after a step whose gradient was μ, corrected for its bias.

        μ/√ν is bounded because both have seen the same gradients. A ν that has seen but the next one would make an update without
        bound where that one happens to be small.
        """
        memory = self.moments["mu"]
        assert memory is not None
        assert memory.weight is not None
        rule, rate, weight = NU_RULES[part.said["nu_rule"]], self._nu_rate(part), memory.weight[0]
        divisor = by_leaf(jnp.where(weight > 0, weight, 1))
        starts = take_out("nu", part.state.nu, part.state.scales)
        leaves = []
        for mu, start in zip(memory.leaves, starts, strict=True):
            g, nu = over(mu.widen(), divisor()), start.widen()
            seen = _in_blocks(rule.sees(g, jnp.zeros_like(g)), nu.shape).astype(nu.dtype)
            its = rate.astype(nu.dtype)
            nu = rule.moves(nu, seen, lambda nu, seen, its=its: lerp(nu, seen, its), 1 - its, its, jnp.zeros_like(its))
            leaves.append(narrow_to_nearest(nu, start.array, signed=False))
        return leaves

    def _nu_rate(self, part: Part) -> Array:
        """1 − b2 at the step that the run has reached."""
        count = jnp.zeros((), jnp.int32) if self.count is None else self.count
        return complement(Hyperparameter("b2", part.said["b2"]).at(count), part.state.weights.dtype)

    def _weights(self, part: Part, theirs: Array) -> Array:
        """The weights of the moments that `part` has been given, in a tracking stage's two columns; new ones have none."""
        none = part.state.weights[:, 0]

        def column(field: str) -> Array:
            if field not in part.meanings:
                return theirs[:, ["mu", "nu"].index(field)]
            memory = self.moments[field]
            weight = none if memory is None or memory.weight is None else memory.weight.astype(none.dtype)
            if field == "nu" and self._beside_mu(part):
                rate = self._nu_rate(part) if NU_RULES[part.said["nu_rule"]].weighs else jnp.ones_like(none[0])
                seen = column("mu")
                weight = jnp.where(seen[:1] > 0, grow(none, rate).reshape(2, *[1] * (seen.ndim - 1)), jnp.zeros_like(seen))
            if field == "nu" and part.said["nu_delay"]:
                weight = jnp.stack([(weight[0] > 0).astype(none.dtype), jnp.zeros_like(weight[1])])
            return weight

        columns = [column("mu"), column("nu")]
        self.leaves: tuple[int, ...] = max((c.shape[1:] for c in columns), key=len)
        self.columns = [self._spread(c, 1) for c in columns]
        return jnp.stack(self.columns, axis=1)

    def _spread(self, weight: Array, ndim: int) -> Array:
        """A weight of `ndim` dimensions with an entry a leaf where the moments' own have one."""
        weight = weight[..., None] if self.leaves and weight.ndim == ndim else weight
        return jnp.broadcast_to(weight, weight.shape[:ndim] + self.leaves)

    def _look_ahead(self, part: Part, theirs: Any) -> Array:
        """What the look ahead divides by, which has to fit the weight that μ has gathered."""
        if self.moments.get("mu") is not None:
            note = "" if theirs is not None else "the weight of μ"
            self.kept.append(self._entry(part, "weight", "the weight that the look ahead divides by", note))
            return self._spread(self.columns[0] if theirs is None else theirs.astype(part.state.weight.dtype), 1)
        return self._spread(part.state.weight, 1)

    def _age(self, part: Part, theirs: Any) -> Array:
        """The mean age of ν: recorded, or what its weight says at the decay that the old configuration had.

        A ν of t steps has the weight w = 1 − b2ᵗ and the mean age 1/(1 − b2) − t·b2ᵗ/w, for a young one a difference of large
        numbers. With x = −log b2, X = t·x and 1/(1 − e⁻ˣ) = 1/x + 1/2 + x/12 − x³/720 …, these cancel.
        """
        memory, dtype = self.moments.get("nu"), part.state.age.dtype
        if memory is None:  # of one step, if of any
            return (self.columns[1][0] > 0).astype(dtype)
        self.kept.append(self._entry(part, "age", "the mean age of ν", "" if theirs is not None else "from its weight"))
        if theirs is not None:
            return self._spread(theirs.astype(dtype), 0)
        high, low = self.columns[1].astype(dtype)
        steps = memory.part.state.count
        rate = complement(Hyperparameter("b2", memory.part.said["b2"]).at(jnp.maximum(steps - 1, 0)), dtype)
        left, per_step, in_all = (1 - high) - low, -jnp.log1p(-rate), -jnp.log1p(-high)
        old = 1 / rate + xlogy(left, left) / (per_step * jnp.where(high > 0, high, 1))

        def cubic(x: Array) -> Array:
            return x / 12 - x**3 / 720

        t = in_all / per_step
        young = (t + 1) / 2 + cubic(per_step) - t * cubic(in_all)
        age = jnp.where(in_all < 0.5, young, old)
        return jnp.where(high > 0, jnp.clip(age, 1, steps.astype(dtype)), 0)

    def _alike(self, part: Part, partner: Part | None, field: str, value: Any, theirs: Any) -> Any:
        """What a stage remembers that is no moment: kept where its partner has it in the same form."""
        if not jax.tree.leaves(value) and not jax.tree.leaves(theirs):
            return value
        if partner is not None and _like(theirs, value):
            self.kept.append(self._entry(part, field))
            return jax.tree.map(lambda x, like: x.astype(like.dtype) if hasattr(like, "dtype") else x, theirs, value)
        if partner is not None and jax.tree.leaves(theirs):
            self.misfits.append(self._entry(partner, field, note="of another form in to_tx"))
        if jax.tree.leaves(value):
            self.fresh.append(self._entry(part, field))
        return value

    def _foreign(self, part: Part, partner: Part | None) -> Any:
        """The state of a transformation of others."""
        same = partner is not None and part.tx == partner.tx
        if not same and (_holds_moments(part.state) or (partner is not None and _holds_moments(partner.state))):
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


def _in_blocks(nu: Array, shape: tuple[int, ...]) -> Array:
    """A second moment in other blocks: the mean over those that grow, spread over those that shrink."""
    return jnp.broadcast_to(block_mean(nu, shape), shape)


def _own(state: Any) -> Any:
    """What a wrapper itself remembers."""
    return state._replace(**{name: None for name in ("inner_state", "inner_states") if hasattr(state, name)})


def _is_ours(part: Part, field: str) -> bool:
    return isinstance(part.tx, Transformation) and field in getattr(part.state, "_fields", ())


def _holds_moments(state: Any) -> bool:
    """Whether moments of this package are somewhere in a state."""

    def is_stage(node: Any) -> bool:
        return isinstance(getattr(node, "scales", None), dict)

    return any(map(is_stage, jax.tree.leaves(state, is_leaf=is_stage)))


def _hidden(part: Part, side: str) -> str:
    return (
        f"convert_state: {show(part.tx)}{f' at {part.place}' if part.place else ''} of {side} has moments inside and does not "
        f"show what they mean, and the other side does not have the same one. Convert the state inside it, for example "
        f"state._replace(inner_state=convert_state(state.inner_state, from_tx, to_tx, params).state) with the transformations "
        f"and the parameters that are inside, or build both with adam_jax.chain."
    )


def _like(found: Any, expected: Any) -> bool:
    structures: list[Any] = [jax.tree.structure(found), jax.tree.structure(expected)]
    alike = map(_same_form, jax.tree.leaves(found), jax.tree.leaves(expected))
    return structures[0] == structures[1] and all(alike)


def _same_form(found: Any, expected: Any) -> bool:
    """Whether two arrays have the same shape, and the same dtype or two in which the same is computed."""
    return jnp.shape(found) == jnp.shape(expected) and _same_kind(jnp.result_type(found), jnp.result_type(expected))


def _same_kind(found: Any, expected: Any) -> bool:
    wide = found.kind == expected.kind and found.kind in "fc" and min(found.itemsize, expected.itemsize) >= 4
    return bool(found == expected or wide)


def _expect_fit(state: Any, tx: Any, params: PyTree) -> None:
    """Refuses a state that is not one of `tx` for `params`."""

    def arrays(tree: Any) -> dict[str, Any]:
        # The bits that parameters lost are theirs, and these may have another dtype from now on; a record is not needed.
        located = [(jax.tree_util.keystr(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]
        return {place: leaf for place, leaf in located if ".lost" not in place and ".hyperparams[" not in place}

    remedy = "Pass a state that from_tx made, and parameters of the shapes that it was made for."
    expected_state = jax.eval_shape(tx.init, params)
    found, expected = arrays(state), arrays(expected_state)
    for place in sorted(found.keys() ^ expected.keys()):
        has, lacks = ("the state", "from_tx") if place in found else ("from_tx", "the state")
        raise ValueError(f"convert_state: {has} has {place or 'one array'}, which {lacks} does not have. {remedy}")
    for place, leaf in expected.items():
        shape, dtype = jnp.shape(found[place]), jnp.result_type(found[place])
        # After `reset` of some leaves weights and ages have an entry a leaf.
        by_leaf = place.rpartition(".")[2] in ("weights", "weight", "age") and shape[:-1] == leaf.shape
        if not (shape == leaf.shape or by_leaf) or not _same_kind(dtype, leaf.dtype):
            raise ValueError(
                f"convert_state: at {place} found {dtype}{list(shape)} in the state; expected {leaf.dtype}{list(leaf.shape)}, as "
                f"{show(tx)} makes it for these parameters. {remedy}"
            )
    try:
        list(walk(tx, state))
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"convert_state: found a state of the structure {jax.tree.structure(state)}; expected "
            f"{jax.tree.structure(expected_state)}. {remedy}"
        ) from error
