"""What stages have after a number of steps, whatever the gradients were."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from adam_jax._core.configuration import StageInstance
from adam_jax._core.context import Context
from adam_jax._core.leaves import PyTree, dtype_of
from adam_jax._core.transformation import Transformation, call_update


def follows_from_count(stage: StageInstance) -> set[str]:
    """Returns the fields of a stage that follow from the number of steps."""
    definition = stage.definition
    assert definition is not None
    return {"weights", *definition.follows} | (
        {definition.counter} if definition.counter else set()
    )


def after_steps(
    parts: Sequence[StageInstance], params: PyTree, count: Any
) -> dict[str, dict[str, Any]]:
    """What stages have after so many steps but for their moments, by place.

    Counted out step by step, as a run does: so it is the same to the last bit, schedules are no
    special case, and each stage is the only one to know its own rule. Moments stay as they are,
    which leaves the compiler a loop over scalars.
    """
    small = jax.tree.map(lambda p: jnp.zeros((1,) * jnp.ndim(p), dtype_of(p)), params)
    # What reads or rounds parameters starts afresh: an average of them is not known to others.
    stages = [
        part
        for part in parts
        if isinstance(part.tx, Transformation)
        and part.tx.interface.end is None
        and part.tx.init.spec.is_stage
        and hasattr(part.state, "_fields")
    ]
    first = [stage.tx.init(small) for stage in stages]
    following = [follows_from_count(stage) for stage in stages]
    context = Context(gradient=small, applied=True, inside=True)

    def kept(states: Sequence[Any]) -> list[dict[str, Any]]:
        return [
            {
                name: value
                for name, value in state._asdict().items()
                if name in names and value is not None
            }
            for state, names in zip(states, following, strict=True)
        ]

    def step(_: Any, fields: list[dict[str, Any]]) -> list[dict[str, Any]]:
        updates, states = small, []
        for stage, state, its in zip(stages, first, fields, strict=True):
            updates, after = call_update(stage.tx, updates, state._replace(**its), small, context)
            states.append(after)
        return kept(states)

    def many(count: Array) -> Any:
        return jax.lax.fori_loop(jnp.zeros((), jnp.int32), count, step, kept(first))

    made = jax.jit(many)(jnp.asarray(count, jnp.int32))
    return {stage.place: fields for stage, fields in zip(stages, made, strict=True) if fields}


def entry_per_leaf(
    field: str, value: Any, counts: Sequence[int], follows: Mapping[int, Any], stage: StageInstance
) -> Any:
    """Returns what follows from the count, with an entry per leaf if leaves took other steps."""
    assert stage.definition is not None
    if field == stage.definition.counter or len({*counts}) < 2:
        return value
    return jnp.stack([follows[count][stage.place][field] for count in counts], axis=-1)


def whole(count: Any, caller: str) -> int:
    """A number of steps.

    Raises:
      ValueError: for what is no whole number from 0 to 2³¹ − 2.
    """
    number = np.asarray(count)
    known = number.size == 1 and number.dtype.kind in "iuf"
    if not known or not 0 <= float(number.item()) < 2**31 - 1 or float(number.item()) % 1:
        raise ValueError(f"{caller}: found {count!r} steps; expected a whole number from 0 on.")
    return int(number.item())


def agreed(counts: dict[str, Any], caller: str) -> int | None:
    """The one number that several counts have; `None` if there is none.

    Raises:
      ValueError: where they differ, or are no whole numbers.
    """
    numbers = {place: whole(count, caller) for place, count in counts.items()}
    if len(set(numbers.values())) > 1:
        shown = ", ".join(f"{number} at {place}" for place, number in numbers.items())
        raise ValueError(
            f"{caller}: found the counts {shown}; expected that they agree. Give the part of the "
            "state that is of one run."
        )
    return next(iter(numbers.values()), None)
