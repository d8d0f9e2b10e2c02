"""What the optimizers in a transformation have been told, for each leaf."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from adam_jax._core.chain import chain
from adam_jax._core.leaves import PyTree
from adam_jax._core.transformation import Transformation
from adam_jax.migrate.foreign_state import trained
from adam_jax.wrappers.groups import only


def settings_by_path(tx: Any, params: PyTree) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the path of each leaf with the arguments of its optimizer, by name."""
    if not isinstance(tx, Transformation):
        return
    spec = tx.init.spec
    config = spec.config
    found: dict[str, dict[str, Any]] = {path: {} for path in trained(params)}
    if spec.split is not None:
        its = spec.split(params)
        inside = [(part, only(name, its, params)) for name, part in spec.inner.items()]
    else:
        inside = [
            (part, params)
            for part in (spec.inner.values() or (spec.stages if spec.constructor is chain else ()))
        ]
    for part, theirs in inside:
        for path, its_own in settings_by_path(part, theirs):
            found[path] = its_own | found[path]
    yield from found.items() if inside else ((path, config) for path in found)
