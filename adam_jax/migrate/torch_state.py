"""What is in the state dict of a PyTorch optimizer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from adam_jax._core.errors import some
from adam_jax.migrate.counted import whole
from adam_jax.migrate.torch_names import number_array
from adam_jax.migrate.torch_pairs import Pair, gathered
from adam_jax.migrate.torch_parts import Parts

ADAM = {"exp_avg": "mu", "exp_avg_sq": "nu", "exp_inf": "infinity", "max_exp_avg_sq": "raw nu_max"}

RMSPROP = {"square_avg": "nu", "grad_avg": "mu", "momentum_buffer": "trace"}

SGD = {"momentum_buffer": "trace"}
"""The kinds of moments by PyTorch's names for them."""


def fields_by_name(groups: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The kinds of moments by PyTorch's names, of the optimizer that has such groups."""
    return SGD if "dampening" in groups[0] else RMSPROP if "alpha" in groups[0] else ADAM


def kinds_kept(groups: Sequence[Mapping[str, Any]], ours: Iterable[str]) -> list[str]:
    """The kinds of moments that an optimizer with such groups keeps."""
    group = groups[0]
    if "betas" in group:
        # RAdam's and Adamax's groups look alike.
        return [
            "mu",
            "infinity" if "infinity" in ours else "nu",
            *(["raw nu_max"] if group.get("amsgrad") else []),
        ]
    kept = [] if "dampening" in group else ["nu", *(["mu"] if group.get("centered") else [])]
    return kept + (["trace"] if group.get("momentum") else [])


def steps_by_path(found: Mapping[str, Any], count: int | None, caller: str) -> dict[str, int]:
    """The number of steps that each parameter has taken, by path."""
    numbers = {
        path: whole(number_array(step, f"the step of {path}", caller), caller)
        for path, step in found.items()
        if step is not None
    }
    if len(numbers) not in (0, len(found)):
        raise ValueError(
            f"{caller}: found no step of {some([path for path in found if path not in numbers])}; "
            "expected one for all."
        )
    if not numbers and count is None:
        raise ValueError(
            f"{caller}: the state keeps no step. Give the number of steps taken: from_torch(…, "
            "count=1000)."
        )
    if numbers and count not in (None, *numbers.values()):
        step = next(iter(numbers.values()))
        raise ValueError(
            f"{caller}: found count={count}, and step {step} in the state; expected none where the "
            "state has one."
        )
    return numbers or dict.fromkeys(found, whole(count, caller))


def expect_known(fields: Iterable[str], known: Iterable[str], caller: str) -> None:
    """Refuses fields of a state that are no moments which we know.

    Raises:
      ValueError: for such fields. Those of bitsandbytes are named.
    """
    unknown = [field for field in fields if field not in known]
    if not unknown:
        return
    if any("qmap" in field or "absmax" in field or "bnb" in field for field in unknown):
        raise ValueError(
            f"{caller}: found {some(unknown)}, the quantized state of bitsandbytes; expected "
            f"{some(list(known))} in full precision. Decode each one with "
            "bitsandbytes.functional.dequantize_blockwise (or _dynamic_), and give state1 as "
            "exp_avg and state2 as exp_avg_sq."
        )
    if {"state1", "state2"} & {*unknown}:
        raise ValueError(
            f"{caller}: found {some(unknown)}, as bitsandbytes calls moments; expected "
            f"{some(list(known))}. Give state1 as exp_avg and state2 as exp_avg_sq."
        )
    hint = " Weights are for params_from_torch; leave them out." * ("master_param" in unknown)
    raise ValueError(
        f"{caller}: left over {some(unknown)} in the state; expected {some(list(known))}.{hint}"
    )


def step_of(name: str, entry: Mapping[str, Any], group: Mapping[str, Any], caller: str) -> Any:
    """Returns the step of a parameter: its own, or that of its group, where apex keeps it.

    Raises:
      ValueError: where both are there and differ.
    """
    own, shared = entry.get("step"), group.get("step")
    if own is None or shared is None:
        return shared if own is None else own
    both = [whole(number_array(x, f"the step of {name}", caller), caller) for x in (own, shared)]
    if both[0] != both[1]:
        raise ValueError(
            f"{caller}: found step {both[0]} of {name}, and {both[1]} in its group; expected one."
        )
    return own


def cut_entry(
    parts: Parts, name: str, entry: Mapping[str, Any], kinds: Mapping[str, str]
) -> dict[str, dict[str, Any]]:
    """The state of each part of a parameter; what is no moment each part has."""
    cut = {
        field: parts.cut(name, x) for field, x in entry.items() if field in kinds and x is not None
    }
    return {
        part: {field: cut[field][part] if field in cut else x for field, x in entry.items()}
        for part in parts(name)
    }


def moment_by_path(
    field: str,
    kind: str,
    entries: Mapping[str, Mapping[str, Any]],
    pairs: Mapping[str, Pair],
    leaves: Mapping[str, Any],
    keep: Mapping[str, Any],
    caller: str,
) -> dict[str, Any]:
    """The leaves of one moment, by path.

    Args:
      field: what PyTorch calls it.
      kind: what it is.
      entries: the states by name.
      pairs: names and leaves.
      leaves: the parameters, by path.
      keep: the leaves that have this moment, by path.
      caller: the function that the user called.

    Raises:
      ValueError: for a moment that is missing, has another shape, or cannot be one.
    """
    if lacks := [
        name
        for name, entry in entries.items()
        if entry.get(field) is None and pairs[name].path in keep
    ]:
        raise ValueError(
            f"{caller}: found no {field} of {some(lacks)}; expected one for each parameter."
        )
    made: dict[str, np.ndarray] = {}
    for name, entry in entries.items():
        if entry.get(field) is None:
            continue
        moment = pairs[name].into(entry[field], leaves[pairs[name].path], caller)
        if moment.dtype.kind in "biu" and moment.dtype.itemsize == 1:
            raise ValueError(
                f"{caller}: {name}: found {field} of {moment.dtype}, codes of a quantized "
                "state; expected numbers in full precision. Decode them first."
            )
        if kind not in ("mu", "trace") and (moment < 0).any():
            raise ValueError(
                f"{caller}: {name}: found {field} below 0, which no mean of squares is."
            )
        made[name] = moment.astype(np.float32) if moment.dtype.kind in "biu" else moment
    return {path: jnp.array(x) for path, x in gathered([pairs[n] for n in made], made).items()}


def same_steps(steps: Mapping[str, Any], pairs: Mapping[str, Pair], caller: str) -> dict[str, Any]:
    """The steps by path, of those by name.

    Raises:
      ValueError: where layers of one leaf have taken other steps.
    """
    made: dict[str, Any] = {}
    for name, step in steps.items():
        path = pairs[name].path
        known = path in made and step is not None and made[path] is not None
        first = made.setdefault(path, step)
        if known and number_array(step, name, caller) != number_array(first, name, caller):
            raise ValueError(
                f"{caller}: found that layers of {path} have taken other steps; expected as many "
                "of each. Let layers that were thawed late be a leaf of their own."
            )
    return made
