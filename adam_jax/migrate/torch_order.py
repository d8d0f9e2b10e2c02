"""Which name belongs to which number of a PyTorch optimizer.

A state dict numbers its parameters, group by group. Where two of them have equal shapes, a wrong
order of names would put moments on another layer without a word. So an order that cannot be checked
has to be said group by group, or by number.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from adam_jax._core.errors import brief, some
from adam_jax.migrate.torch_forms import Form
from adam_jax.migrate.torch_names import TAKE_THEM
from adam_jax.migrate.torch_pairs import sizes_by_name
from adam_jax.migrate.torch_parts import Parts
from adam_jax.migrate.torch_rules import Rules

ParamNames: TypeAlias = Sequence[str] | Sequence[Sequence[str]] | Mapping[int, str]


def named_parts(
    form: Form, names: ParamNames | None, leaves: Mapping[str, Any], rules: Rules, caller: str
) -> tuple[dict[int, str], Parts]:
    """Returns the names by number, and the parts that they are cut into."""
    known: dict[str, int | None] = {}

    def size_of(name: str) -> int | None:
        if name not in known:
            parts = Parts([name], rules.split, rules.mapping, caller, whole=False)
            known[name] = sizes_by_name(leaves, rules, parts, caller)(name)
        return known[name]

    called = names_by_number(form, names, size_of, caller)
    return called, Parts(called.values(), rules.split, rules.mapping, caller)


def names_by_number(
    form: Form,
    names: ParamNames | None,
    size_of: Callable[[str], int | None],
    caller: str,
) -> dict[int, str]:
    """Returns the names by the numbers that PyTorch gives to parameters.

    Args:
      form: the state dict. Its shapes check an order; a parameter without a state may have any.
      names: what the user said; `None` if nothing.
      size_of: returns how many elements the leaf of a name has; `None` where it has no leaf.
      caller: the function that the user called.

    Raises:
      TypeError: for names that are neither lists of strings nor a table by number.
      ValueError: for names that are missing or too many, and an order that cannot be checked.
    """
    groups, entries = form.groups, form.entries
    numbers = [list(group["params"]) for group in groups]
    if form.named and names is not None:
        raise ValueError(
            f"{caller}: found names=, and a state dict whose keys are names already; expected one "
            "of them. Leave names= out. Their beginnings are cut off by mapping={'module': ''}."
        )
    if isinstance(names, Mapping):
        return _as_said(numbers, names, caller)
    own = _own_names(groups)
    listed = own if names is None else _listed(names, numbers, entries, caller)
    if listed is None:
        raise ValueError(
            f"{caller}: the state dict numbers its {sum(map(len, numbers))} parameters and does "
            "not name them. Give their names in the order of the optimizer's groups. With one "
            "group: names=[name for name, _ in model.named_parameters()]. With several: "
            f"{TAKE_THEM}."
        )
    flat = [name for its in listed for name in its]
    if names is not None and own is not None:
        _expect_own(flat, [name for its in own for name in its], caller)
    elif names is not None:
        _expect_no_alphabet(listed, numbers, entries, size_of, caller)
    return dict(zip((i for its in numbers for i in its), flat, strict=True))


def _own_names(groups: Sequence[Mapping[str, Any]]) -> list[Sequence[str]] | None:
    """The names that an optimizer keeps which was made from `model.named_parameters()`."""
    if any(len(group.get("param_names") or ()) != len(group["params"]) for group in groups):
        return None
    return [group["param_names"] for group in groups]


def _as_said(
    numbers: Sequence[Sequence[int]], names: Mapping[Any, Any], caller: str
) -> dict[int, str]:
    expected = [i for its in numbers for i in its]
    if not all(isinstance(name, str) for name in names.values()):
        raise TypeError(f"{caller}: names: found {brief(names)}; expected a string per number.")
    if names.keys() != set(expected):
        apart = sorted(map(str, names.keys() ^ set(expected)))
        raise ValueError(
            f"{caller}: names: found other numbers than the state dict has, {some(apart)}; "
            f"expected a name for each of its {len(expected)} parameters."
        )
    return {i: names[i] for i in expected}


def _listed(
    names: Any, numbers: Sequence[Sequence[int]], entries: Mapping[int, Any], caller: str
) -> list[Sequence[str]]:
    """The names of each group."""

    def strings(its: Any) -> bool:
        return isinstance(its, (list, tuple)) and all(isinstance(name, str) for name in its)

    sizes = [len(its) for its in numbers]
    if isinstance(names, (list, tuple)) and names and all(map(strings, names)):
        if [len(its) for its in names] != sizes:
            found = ", ".join(str(len(its)) for its in names)
            raise ValueError(
                f"{caller}: names: found lists of {found} names; expected one list for each group, "
                f"of {', '.join(map(str, sizes))}. The optimizer's own order: {TAKE_THEM}."
            )
        return list(names)
    if not strings(names):
        raise TypeError(
            f"{caller}: names: found {brief(names)}; expected a list of strings, a list of them "
            "for each group, or a table by number."
        )
    if len(names) != sum(sizes):
        raise ValueError(
            f"{caller}: found {len(names)} names for {sum(sizes)} parameters; expected one each, "
            "in the groups' order."
        )
    if sum(map(bool, numbers)) > 1 and (equal := _indistinct(numbers, entries)):
        raise ValueError(
            f"{caller}: found one list of names for {len(numbers)} groups, in which the shapes "
            f"of {equal} do not tell parameters apart; expected a list for each group, in "
            "their order. (The Trainer of Hugging Face has first what decays, then the rest.) The "
            f"optimizer's own order: {TAKE_THEM}."
        )
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [names[start : start + size] for start, size in zip(starts, sizes, strict=True)]


def shape_of(entry: Mapping[str, Any]) -> tuple[int, ...] | None:
    """Returns the shape of a parameter's moments; `None` if there are none."""
    shapes = (getattr(its, "shape", None) for field, its in entry.items() if field != "step")
    return next((tuple(shape) for shape in shapes if shape is not None and len(shape)), None)


def _indistinct(numbers: Sequence[Sequence[int]], entries: Mapping[int, Any]) -> str:
    """Which parameters could change places and have the same shapes; "" if none could."""
    first: dict[tuple[int, ...], int] = {}
    for i in (i for its in numbers for i in its):
        shape = shape_of(entries.get(i) or {})
        if shape is None:
            return f"parameter {i} (no state)"
        if shape in first:
            return f"parameters {first[shape]} and {i}, {shape},"
        first[shape] = i
    return ""


def _expect_own(names: Sequence[str], own: Sequence[str], caller: str) -> None:
    """Refuses an order that contradicts the names in the state dict."""
    if sorted(names) == sorted(own) and list(names) != list(own):
        place = next(i for i, (a, b) in enumerate(zip(names, own, strict=True)) if a != b)
        raise ValueError(
            f"{caller}: names: found {names[place]!r} for parameter {place}, which the state "
            f"dict itself calls {own[place]!r}; expected its order. Leave names= out."
        )


def _expect_no_alphabet(
    listed: Sequence[Sequence[str]],
    numbers: Sequence[Sequence[int]],
    entries: Mapping[int, Any],
    size_of: Callable[[str], int | None],
    caller: str,
) -> None:
    """Refuses names in alphabetical order where sizes would not show that it is not PyTorch's.

    A file of safetensors has its names in that order, as a dict in JAX does.
    """
    natural = all(list(its) == sorted(its, key=_natural) for its in listed)
    if not natural and any(list(its) != sorted(its) for its in listed):
        return
    for its, those in zip(listed, numbers, strict=True):
        by_size: dict[Any, list[str]] = {}
        for name, i in zip(its, those, strict=True):
            shape = shape_of(entries.get(i) or {})
            size = size_of(name) if shape is None else math.prod(shape)
            by_size.setdefault(size, []).append(name)
        without = by_size.pop(None, [])  # it could have any size, so it is in every class
        for same in [*(alike + without for alike in by_size.values()), without]:
            # Layers that differ in their number alone stand in the order of their numbers.
            kinds = {re.sub(r"\d+", "#", name) for name in same}
            if len(same) > 1 and (len(kinds) > 1 or not natural):
                raise ValueError(
                    f"{caller}: names: found the alphabetical order, as a file of safetensors has "
                    f"it, and equal or unknown sizes of {some(same, 2)}; expected the optimizer's "
                    f"order. Take it from there: {TAKE_THEM}. If it is this one, say so by number: "
                    "names=dict(enumerate(names))."
                )


def _natural(name: str) -> list[tuple[bool, int, str]]:
    """A key that sorts "layers.2" before "layers.10"."""
    parts = [part for part in re.split(r"(\d+)", name) if part]
    return [(not p.isdigit(), int(p), "") if p.isdigit() else (True, 0, p) for p in parts]
