"""What is in the state dict of a PyTorch optimizer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from adam_jax._core.errors import some
from adam_jax.migrate.counted import whole
from adam_jax.migrate.torch_names import expect_table, number_array

ADAM = {"exp_avg": "mu", "exp_avg_sq": "nu", "exp_inf": "infinity", "max_exp_avg_sq": "raw nu_max"}

RMSPROP = {"square_avg": "nu", "grad_avg": "mu", "momentum_buffer": "trace"}

SGD = {"momentum_buffer": "trace"}
"""The kinds of moments by PyTorch's names for them."""


def groups_and_entries(state_dict: Any, caller: str) -> tuple[list[Any], Mapping[int, Any]]:
    """The groups and the entries of an optimizer's state dict."""
    expect_table(state_dict, caller)
    if not {"state", "param_groups"} <= state_dict.keys():
        inside = next(
            (
                key
                for key, its in state_dict.items()
                if isinstance(its, Mapping) and "param_groups" in its
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
    if strings := [key for key in entries if isinstance(key, str)]:
        raise ValueError(
            f"{caller}: found the parameter numbers {some(list(map(repr, strings)))}; expected "
            "integers. JSON makes strings of them: {int(i): its for i, its in state.items()}."
        )
    return list(groups), entries


def fields_by_name(groups: list[Any]) -> dict[str, str]:
    """The kinds of moments by PyTorch's names, of the optimizer that has such groups."""
    return SGD if "dampening" in groups[0] else RMSPROP if "alpha" in groups[0] else ADAM


def kinds_kept(groups: list[Any], ours: Iterable[str]) -> list[str]:
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
