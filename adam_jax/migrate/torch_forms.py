"""The forms in which the state dict of a PyTorch optimizer comes, and back into the same.

An optimizer numbers its parameters. Distributed checkpoints (`get_optimizer_state_dict`, FSDP) name
them, nested or flattened ("state.layer.weight.step").
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from adam_jax._core.errors import some
from adam_jax.migrate.torch_names import expect_table


class Form(NamedTuple):
    """A state dict by numbers, and the way back into its own form.

    Attributes:
      groups: the groups. "params" has numbers.
      entries: the states by number.
      named: whether the state dict names its parameters itself. The groups have "param_names" then.
      rebuild: makes of groups and entries by number a state dict of the form that was given.
    """

    groups: list[dict[str, Any]]
    entries: Mapping[int, Any]
    named: bool
    rebuild: Callable[[list[dict[str, Any]], Mapping[int, Any]], dict[str, Any]]


def form_of(state_dict: Any, caller: str) -> Form:
    """Returns a state dict by numbers.

    Raises:
      TypeError: for what is no state dict.
      ValueError: for one that is not of an optimizer, or not whole.
    """
    expect_table(state_dict, caller)
    flat = isinstance(state_dict, Mapping) and not {"state", "param_groups"} & state_dict.keys()
    if flat and any(_is_flat(key) for key in state_dict):
        return _named(_nested(state_dict, caller), caller, _flattened)
    groups, entries = _groups_and_entries(state_dict, caller)
    names = [name for group in groups for name in group["params"]]
    if names and all(isinstance(name, str) for name in names):
        return _named(state_dict, caller, lambda nested: nested)
    if strings := [key for key in entries if isinstance(key, str)]:
        raise ValueError(
            f"{caller}: found the parameter numbers {some(list(map(repr, strings)))}; expected "
            "integers. JSON makes strings of them: {int(i): its for i, its in state.items()}."
        )
    return Form(
        [dict(group) for group in groups],
        entries,
        named=False,
        rebuild=lambda groups, entries: {"state": dict(entries), "param_groups": groups},
    )


def _groups_and_entries(state_dict: Mapping[str, Any], caller: str) -> tuple[list[Any], Any]:
    """The groups and the entries of an optimizer's state dict."""
    if not {"state", "param_groups"} <= state_dict.keys():
        inside = next(
            (
                key
                for key, its in state_dict.items()
                if isinstance(its, Mapping)
                and ("param_groups" in its or any(_is_flat(key) for key in its))
            ),
            None,
        )
        hint = (
            "Weights are for params_from_torch."
            if inside is None
            else f"Pass what is in [{inside!r}]."
        )
        raise ValueError(
            f"{caller}: found a dict of {some(list(map(str, state_dict))) or 'nothing'}; expected "
            f"'state' and 'param_groups', as optimizer.state_dict() has them. {hint}"
        )
    groups, entries = state_dict["param_groups"], state_dict["state"]
    listed = isinstance(groups, (list, tuple)) and all(
        isinstance(its, Mapping) and "params" in its for its in groups
    )
    if (
        not listed
        or not groups
        or not isinstance(entries, Mapping)
        or not all(isinstance(e, Mapping) for e in entries.values())
    ):
        raise ValueError(
            f"{caller}: found param_groups or a state that are not PyTorch's; expected a list of "
            "dicts with 'params', and a dict of dicts by parameter number, as "
            "optimizer.state_dict() has them."
        )
    return list(groups), entries


def _is_flat(key: Any) -> bool:
    return isinstance(key, str) and key.startswith(("state.", "param_groups."))


def _named(
    nested: Mapping[str, Any], caller: str, dress: Callable[[dict[str, Any]], dict[str, Any]]
) -> Form:
    """A state dict whose parameters have names, by the numbers that an optimizer would give."""
    names = [name for group in nested["param_groups"] for name in group["params"]]
    if len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(
            f"{caller}: found {some(twice)} twice in param_groups; expected each parameter once."
        )
    if extra := [str(name) for name in nested["state"] if name not in set(names)]:
        raise ValueError(
            f"{caller}: left over the state of {some(extra)}, parameters which no group has."
        )
    number = {name: i for i, name in enumerate(names)}
    groups = [
        {**group, "params": [number[n] for n in group["params"]], "param_names": group["params"]}
        for group in nested["param_groups"]
    ]
    entries = {number[name]: entry for name, entry in nested["state"].items()}

    def rebuild(groups: list[dict[str, Any]], entries: Mapping[int, Any]) -> dict[str, Any]:
        own = [
            {key: its for key, its in group.items() if key != "param_names" or key in old}
            | {"params": old["params"]}
            for group, old in zip(groups, nested["param_groups"], strict=True)
        ]
        state = {names[i]: entry for i, entry in entries.items()}
        return dress({"state": state, "param_groups": own})

    return Form(groups, entries, named=True, rebuild=rebuild)


def _nested(flat: Mapping[str, Any], caller: str) -> dict[str, Any]:
    """The nested form of a flattened state dict, with a group for each parameter."""
    state: dict[str, dict[str, Any]] = {}
    groups: dict[str, dict[str, Any]] = {}
    for key, value in flat.items():
        kind, _, rest = key.partition(".")
        name, _, field = rest.rpartition(".")
        if not _is_flat(key) or not name:
            raise ValueError(
                f"{caller}: found {key!r} beside keys of a flattened state dict; expected "
                "'state.<name>.<field>' and 'param_groups.<name>.<setting>'."
            )
        (state if kind == "state" else groups).setdefault(name, {})[field] = value
    if extra := [name for name in state if name not in groups]:
        raise ValueError(
            f"{caller}: found no param_groups.{extra[0]}.… for the state of {some(extra)}; "
            "expected the settings of each parameter, as get_optimizer_state_dict has them."
        )
    listed = [{"params": [name], **settings} for name, settings in groups.items()]
    return {"state": state, "param_groups": listed}


def _flattened(nested: dict[str, Any]) -> dict[str, Any]:
    """The way back of `_nested`."""
    made = {
        f"state.{name}.{field}": value
        for name, entry in nested["state"].items()
        for field, value in entry.items()
    }
    for group in nested["param_groups"]:
        (name,) = group["params"]
        made |= {f"param_groups.{name}.{k}": its for k, its in group.items() if k != "params"}
    return made
