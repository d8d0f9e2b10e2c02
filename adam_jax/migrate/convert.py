"""`convert_state`: a run goes on under another configuration."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from adam_jax._core.configuration import (
    Configuration,
    iter_stages,
    moment_states,
    read_counters,
    rebuilt,
)
from adam_jax._core.errors import brief
from adam_jax._core.identity import expect_state
from adam_jax._core.leaves import PyTree, arrays_of
from adam_jax._core.paths import is_box, unboxed
from adam_jax._core.spec import all_specs, is_transformation, show, swapped
from adam_jax._core.transformation import Transformation, abstract_state
from adam_jax.migrate.fill import dropped, fill_all
from adam_jax.migrate.owned import owned
from adam_jax.migrate.pairing import pair, same_kind
from adam_jax.migrate.report import Converted


def convert_state(
    state: PyTree,
    from_tx: optax.GradientTransformation,
    to_tx: optax.GradientTransformation,
    params: PyTree,
) -> Converted:
    """Carries a run over to another configuration.

    That is another storage, another optimizer, other groups or other stages.

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
      The new state, and what was kept, started afresh and dropped. The state's arrays are its own,
      and can be donated.

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
    params = arrays_of(params)
    ours = isinstance(from_tx, Transformation)
    if ours and moment_states(state) and not _has_ours(to_tx, params):
        raise ValueError(
            f"convert_state: found to_tx of others, {show(to_tx)}, which takes no moments from "
            "here; expected a transformation of adam_jax. To go back to Optax, call "
            "to_optax(state, tx, like)."
        )
    if any(type(node).__name__ == "OptArray" for node in jax.tree.leaves(state, is_leaf=is_box)):
        state, params = unboxed(state), unboxed(params)
    _expect_fit(state, from_tx, params)
    old, new = Configuration(from_tx, state), Configuration(to_tx, to_tx.init(params))
    pairing = pair(old, new)
    states, report = fill_all(pairing, _step_reached(old, from_tx, state))
    converted = Converted(
        owned(rebuilt(to_tx, iter(states)), state, params),
        report.kept,
        report.fresh,
        dropped(pairing) + report.misfits,
    )
    if not isinstance(from_tx, Transformation) and converted.dropped and not converted.kept:
        raise ValueError(
            f"convert_state: found from_tx of others, {show(from_tx)}, of whose state nothing can "
            "be kept; expected a transformation of adam_jax. A run of Optax goes on with "
            "from_optax."
        )
    return converted


def _has_ours(tx: Any, params: PyTree) -> bool:
    """Whether a transformation is of this package, or has one inside."""
    return isinstance(tx, Transformation) or bool(moment_states(tx.init(params)))


def _step_reached(old: Configuration, tx: Any, state: Any) -> Array | None:
    """Returns the step that the run has reached; `None` if nothing counts steps.

    A count that serves random bits alone is not the step that schedules have reached.
    """
    keeping = {
        stage.place: stage.definition.counter
        for stage in old.stages
        if stage.definition and stage.definition.slots and stage.definition.counter
    }
    reads = read_counters(tx, state) or keeping
    read = [getattr(s.state, reads[s.place], None) for s in old.stages if s.place in reads]
    counts: list[Array] = [count for count in read if count is not None]
    return functools.reduce(jnp.maximum, counts) if counts else None


def _expect_fit(state: Any, tx: Any, params: PyTree) -> None:
    """Refuses a state that is not one of `tx` for `params`."""

    def arrays(tree: Any) -> dict[str, Any]:
        # The bits that parameters lost are theirs, and these may have another dtype from now on.
        located = [
            (jax.tree_util.keystr(path), leaf)
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        ]
        return {place: leaf for place, leaf in located if ".lost" not in place}

    remedy = (
        "Pass a state that from_tx made, and the parameters that it was made for; of Flax NNX both "
        "pure, nnx.pure(optimizer.opt_state) and nnx.pure(nnx.state(model, nnx.Param)), or neither."
    )
    expected_state = abstract_state(tx, params, "convert_state")
    found, expected = arrays(state), arrays(expected_state)
    may_be_per_leaf = {"weights"}.union(*(spec.definition.follows for spec in all_specs(tx)))
    for place in sorted(found.keys() ^ expected.keys()):
        has, lacks = ("the state", "from_tx") if place in found else ("from_tx", "the state")
        # What `update` would say names the call that helps: from_optax, a restore with a target.
        expect_state(tx, state, "convert_state: from_tx")
        raise ValueError(
            f"convert_state: {has} has {place or 'one array'}, which {lacks} does not have. "
            f"{remedy}"
        )
    for place, leaf in expected.items():
        shape, dtype = jnp.shape(found[place]), jnp.result_type(found[place])
        # After `reset` of some leaves debias factors have an entry per leaf.
        per_leaf = place.rpartition(".")[2] in may_be_per_leaf and shape[:-1] == leaf.shape
        if not (shape == leaf.shape or per_leaf) or not same_kind(dtype, leaf.dtype):
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
