"""What PyTorch's parameter groups say.

It has to be what a transformation of ours does with their leaves.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from adam_jax._core.leaves import PyTree
from adam_jax.diagnostics.description import Leaf, describe
from adam_jax.migrate.configured import settings_by_path
from adam_jax.migrate.torch_pairs import Pair

SETTINGS = (
    "eps",
    "weight_decay",
    "momentum_decay",
    "maximize",
    "amsgrad",
    "centered",
    "nesterov",
    "dampening",
)
"""What a parameter group says besides the learning rate and the decays of moments."""


Groups: TypeAlias = "Sequence[tuple[Mapping[str, Any], Sequence[Pair]]]"


def expect_decays(groups: Groups, ours: Mapping[str, Mapping[str, Any]], caller: str) -> None:
    """Refuses decays that are not those of `tx`.

    Bias would be corrected wrongly for moments that others have weighed.
    """
    for group, pairs in groups:
        betas = group.get("betas", (group.get("alpha"),) * 2)
        if not isinstance(betas, (tuple, list)) or len(betas) != 2:
            raise ValueError(f"{caller}: found betas={betas!r} in param_groups; expected a pair.")
        first, second = betas
        theirs = {"mu": first, "nu": second, "infinity": second, "trace": group.get("momentum")}
        for kind, pair in itertools.product(ours, pairs):
            value = ours[kind].get(pair.path)
            if _differ(theirs.get(kind), value):
                raise ValueError(
                    f"{caller}: found the decay {theirs[kind]} of {kind} in the param_group of "
                    f"{pair.name}, and {value} in tx; expected the same. Move with PyTorch's, and "
                    "change it with convert_state."
                )


def expect_settings(groups: Groups, tx: Any, params: PyTree, caller: str) -> None:
    """Refuses what else makes steps others than those of `tx`; a learning rate may change."""
    settings = dict(settings_by_path(tx, params))
    leaves = {leaf.path: leaf for leaf in describe(tx, params).leaves}
    _expect_rates(groups, leaves, caller)
    for group, pairs in groups:
        # What others than AdamW do with a decay that is 0 does not matter.
        decoupled = group.get("decoupled_weight_decay") if group.get("weight_decay") else None
        theirs = {key: group.get(key) for key in SETTINGS} | {"decoupled_weight_decay": decoupled}
        for pair in pairs:
            said = settings.get(pair.path, {})
            # Where a member has no such argument it does as with 0.
            ours = {
                key: said.get(key, 0 if key in ("maximize", "dampening") else None)
                for key in theirs
            }
            ours |= {
                "weight_decay": leaves[pair.path].decay,
                "decoupled_weight_decay": _decoupled(leaves[pair.path].stages),
            }
            stages = leaves[pair.path].stages
            rectifies, its = "rectify" in stages, _rectifies(group)
            if its not in (None, rectifies):
                theirs_is, ours_is = (
                    ("RAdam's", "does not rectify") if its else ("Adam's", "rectifies")
                )
                raise ValueError(
                    f"{caller}: the param_group of {pair.name} is {theirs_is}, and tx {ours_is}; "
                    "expected the same optimizer, see presets.torch."
                )
            theirs_corrects = group.get("bias_correction")
            if theirs_corrects is not None and not theirs_corrects and "correct_bias" in stages:
                raise ValueError(
                    f"{caller}: found bias_correction={theirs_corrects} in the param_group of "
                    f"{pair.name}, and tx corrects the bias; expected the same."
                )
            for key, value in ours.items():
                if _differ(theirs[key], value):
                    raise ValueError(
                        f"{caller}: found {key}={theirs[key]} in the param_group of {pair.name}, "
                        f"and {value} in tx; expected the same. See presets.torch, and by_path for "
                        "groups."
                    )


def _expect_rates(groups: Groups, leaves: Mapping[str, Leaf], caller: str) -> None:
    """Refuses learning rates of groups in other proportions; what they are in all may change."""
    rates = [
        (float(group["lr"]), leaves[pair.path].rate, pair.name)
        for group, pairs in groups
        if "lr" in group
        for pair in pairs
    ]
    known = [
        (theirs, ours, name)
        for theirs, ours, name in rates
        if isinstance(ours, float) and theirs > 0 and ours > 0
    ]
    for theirs, ours, name in known[1:]:
        first_of_theirs, first_of_ours, first = known[0]
        if _differ(theirs / first_of_theirs, ours / first_of_ours):
            raise ValueError(
                f"{caller}: found that lr is {first_of_theirs:g} for {first} and {theirs:g} for "
                f"{name}, and in tx {first_of_ours:g} and {ours:g}; expected the same proportion. "
                "Give the groups of by_path a learning_rate_multiplier."
            )


def _decoupled(stages: Sequence[str]) -> bool | None:
    """Whether weight decay comes behind the moments.

    `None` where there is none, or none to know.
    """
    if "add_decayed_weights" not in stages or "track_moments" not in stages:
        return None
    return stages.index("add_decayed_weights") > stages.index("track_moments")


def _rectifies(group: Mapping[str, Any]) -> bool | None:
    """Whether a group is RAdam's, as far as its settings say so."""
    if "amsgrad" in group or "momentum_decay" in group:
        return False
    return True if {"betas", "decoupled_weight_decay", "foreach"} <= group.keys() else None


def _differ(theirs: Any, ours: Any) -> bool:
    """Whether two settings are numbers, and not the same."""
    both = all(isinstance(value, (bool, int, float)) for value in (theirs, ours))
    return both and not math.isclose(theirs, ours, rel_tol=1e-6)
