"""A transformation that is built again with other arguments, for a group of `by_path`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

from adam_jax._core.chain import chain
from adam_jax._core.errors import meant
from adam_jax._core.hyperparams import (
    Hyperparameter,
    Multiplied,
    Scalar,
    ScalarOrSchedule,
    Settable,
)
from adam_jax._core.spec import show
from adam_jax._core.transformation import Transformation

MULTIPLIER = "learning_rate_multiplier"


def with_overrides(default: Any, changes: Mapping[str, Any], caller: str) -> Transformation:
    """`default`, built again with other arguments."""
    spec = default.init.spec if isinstance(default, Transformation) else None
    config = dict(spec.config) if spec is not None and not spec.inner else {}
    if spec is None or not config or spec.constructor is chain:
        raise TypeError(
            f"{caller}: found the overrides {show(changes)} of {show(default)}, which has no "
            "arguments by name; expected a default such as adamw(1e-3). Chain what is around it "
            "around by_path(...), or give the group a transformation."
        )
    known = [*config, *([MULTIPLIER] if spec.rate else [])]
    for name in changes:
        if name not in known:
            near = meant(spec.constructor.__name__, str(name), known)
            hint = f"did you mean {near}? " if near else ""
            raise TypeError(
                f"{caller}: found {name!r}; {hint}{spec.constructor.__name__} has "
                f"{', '.join(known)}."
            )
    config |= {name: value for name, value in changes.items() if name != MULTIPLIER}
    if MULTIPLIER in changes:
        factor = changes[MULTIPLIER]
        if callable(factor) or isinstance(factor, Settable):
            raise TypeError(
                f"{caller}: {MULTIPLIER}: found {factor!r}; expected a number. Or give a "
                "learning_rate."
            )
        Hyperparameter(f"{caller}: {MULTIPLIER}", factor, "[0, inf)")
        rate = str(spec.rate)
        config[rate] = _multiplied(config[rate], _number(factor))
    try:
        made: Transformation = spec.constructor(**config)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{caller}: {error}") from error
    return made


def _multiplied(rate: ScalarOrSchedule, factor: Any) -> Any:
    return (
        Multiplied(rate, factor)
        if callable(rate) or isinstance(rate, Settable)
        else _number(rate) * factor
    )


def _number(value: Any) -> Scalar:
    """An array, or a Python number: one of NumPy would have a dtype of its own in a product."""
    return value if isinstance(value, jax.Array) else float(value)
