"""What the user said of names and layouts, for parameters and moments alike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from adam_jax._core.errors import brief
from adam_jax.migrate.torch_layout import Layouts, expect_patterns
from adam_jax.migrate.torch_names import Names
from adam_jax.migrate.torch_parts import Heads, Splits, Stacks


class Rules(NamedTuple):
    """What the user said of names and layouts; see `from_torch`."""

    mapping: Names | None = None
    transpose: Layouts | None = None
    split: Splits | None = None
    stack: Stacks | None = None
    heads: Heads | None = None


def expect_rules(rules: Rules, caller: str) -> None:
    """Refuses what is neither a table of names nor a function."""
    for what, rule in rules._asdict().items():
        table = isinstance(rule, Mapping) and all(isinstance(name, str) for name in rule)
        function = callable(rule) and what in ("mapping", "transpose")
        if rule is not None and not table and not function:
            either = ", or a function" if what in ("mapping", "transpose") else ""
            raise TypeError(
                f"{caller}: {what}: found {brief(rule)}; expected a table by PyTorch's "
                f"names{either}."
            )
        if what in ("transpose", "split", "heads"):
            expect_patterns(rule, what, caller)
    for name, axis in (rules.stack or {}).items():
        if isinstance(axis, bool) or not isinstance(axis, int):
            raise TypeError(
                f"{caller}: stack: found {brief(axis)} for {name!r}; expected an axis, as in "
                "stack={'layers': 0}."
            )
    for name, count in (rules.heads or {}).items():
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise TypeError(
                f"{caller}: heads: found {brief(count)} for {name!r}; expected how many there are."
            )
