"""The patterns that choose groups: what they may be, and what may have been meant by others."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from adam_jax._core.errors import brief

DEFAULT = "default"
"""The name of the rest."""


def expect_patterns(groups: Any) -> None:
    """Refuses groups that are no mapping from regular expressions."""
    if not isinstance(groups, Mapping) or not groups:
        raise (ValueError if isinstance(groups, Mapping) else TypeError)(
            f"by_path: groups: found {brief(groups)}; expected a mapping from patterns to "
            "transformations, overrides or 'frozen'."
        )
    for pattern in groups:
        if not isinstance(pattern, str):
            raise TypeError(
                f"by_path: found the pattern {pattern!r}; expected a regular expression, a string."
            )
        if pattern == DEFAULT:
            raise ValueError(
                f"by_path: found a pattern {DEFAULT!r}, which is the name of the rest; write it as "
                f"'{DEFAULT}()'."
            )
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(
                f"by_path: found the pattern {pattern!r}; expected a regular expression: {error}."
            ) from error


def hint_to_pattern(pattern: str, paths: Sequence[str]) -> str:
    """Returns what may have been meant by a pattern that no path matches as a whole."""
    # A "*" behind "/" is a shell's, and as a part "a/*" would match every path with an "a".
    glob = re.sub(r"(?<![.)\]}\\\w])\*+", ".*", pattern)
    if glob != pattern and any(re.fullmatch(glob, path) for path in paths):
        return f"It is a regular expression: did you mean {glob!r}? "
    if len(pattern) > 100:
        return ""
    for path in paths:
        part = re.search(pattern, path)
        if part and part[0]:
            before = re.escape(path[: part.start()]).replace("\\-", "-")
            of_one = [f"{before}{pattern}", f"{before}{pattern}.*"]
            of_many = [f".*/{pattern}", f".*/{pattern}/.*", f".*{pattern}", f".*{pattern}.*"]
            likely = [] if "|" in pattern else of_one if "/" in pattern else of_many
            meant = next((each for each in likely if re.fullmatch(each, path)), None)
            meant = meant or f".*({pattern}).*"
            return f"It matches a part of {path!r}: did you mean {meant!r}? "
    return ""
