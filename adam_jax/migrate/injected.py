"""What `optax.inject_hyperparams` recorded: compared with ours, or filled in."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import DictKey, GetAttrKey

from adam_jax._core.errors import some
from adam_jax._core.hyperparams import Settable
from adam_jax._core.leaves import PyTree, finfo
from adam_jax.diagnostics.description import describe
from adam_jax.migrate.configured import settings_by_path

KINDS = {
    "b1": ("mu",),
    "b2": ("nu", "infinity", "belief"),
    "b3": ("mu_slow",),
    "decay": ("nu",),
    "momentum": ("trace",),
}
"""The kinds of moments that an argument of Optax is the decay of."""

FREE = "learning_rate"
"""What may change when a run moves."""


class Record(NamedTuple):
    """What one `inject_hyperparams` recorded.

    Attributes:
      values: scalars by name.
      paths: the leaves whose moments are inside of it.
    """

    values: dict[str, Any]
    paths: frozenset[str]


def records(state: PyTree, paths_in: Callable[[Any], Iterable[str]]) -> Iterator[Record]:
    """Yields what a state of Optax recorded; of one inside of another both."""

    def keeps(node: Any) -> bool:
        return isinstance(getattr(node, "hyperparams", None), dict)

    for node in filter(keeps, jax.tree.leaves(state, is_leaf=keeps)):
        scalars = {name: x for name, x in node.hyperparams.items() if np.ndim(x) == 0}
        yield Record({n: np.asarray(x) for n, x in scalars.items()}, frozenset(paths_in(node)))
        yield from records(node.inner_state, paths_in)


def expect_recorded(
    found: Iterable[Record],
    tx: Any,
    params: PyTree,
    ours: Mapping[str, Mapping[str, Any]],
    step: int,
    caller: str,
) -> None:
    """Refuses recorded values that are not those of `tx`; a learning rate may change.

    Args:
      found: what was recorded.
      tx: our transformation.
      params: the parameters.
      ours: the decays of its moments, by kind and path.
      step: the steps that were taken, for schedules.
      caller: the function that the user called.

    Raises:
      ValueError: for a value that differs.
    """
    found = list(found)
    if not any(record.values for record in found):
        return
    told = dict(settings_by_path(tx, params))
    decays = {leaf.path: leaf.decay for leaf in describe(tx, params).leaves}
    unknown: dict[str, Any] = {}
    first = merged(reversed(found))
    for record in found:
        for name, value in record.values.items():
            values = [
                (path, its)
                for path in record.paths or told
                for its in _ours(name, path, told, decays, ours)
            ]
            settable = any(isinstance(its, Settable) for _, its in values)
            if settable and not np.array_equal(value, first[name]):
                raise ValueError(
                    f"{caller}: found {name}={float(first[name]):g} and {float(value):g} in two "
                    f"inject_hyperparams, and a settable {name} in tx; expected one value. Give tx "
                    "numbers, or set the groups' values with set_hyperparameters afterwards."
                )
            # A mask spares leaves, and no mask gives them another weight decay.
            if name == "weight_decay" and any(decay for _, decay in values):
                values = [(path, decay) for path, decay in values if decay]
            if not values and name != FREE:
                unknown[name] = value
            for path, its in values if name != FREE else ():
                if not _same(name, value, its, step):
                    raise ValueError(
                        f"{caller}: found {name}={float(value):g} in inject_hyperparams, and "
                        f"{its if isinstance(its, (int, float)) else 'another value'} in tx, for "
                        f"{path or 'the only leaf'}; expected the same. Move with Optax's, and "
                        "change it with convert_state."
                    )
    if unknown:
        shown = some([f"{name}={float(value):g}" for name, value in unknown.items()])
        warnings.warn(
            f"{caller}: inject_hyperparams recorded {shown}, which tx has no argument of that name "
            "to compare with. See to it that tx does the same.",
            stacklevel=3,
        )


def _ours(
    name: str,
    path: str,
    told: Mapping[str, Mapping[str, Any]],
    decays: Mapping[str, Any],
    ours: Mapping[str, Mapping[str, Any]],
) -> Iterator[Any]:
    """Yields what `tx` has under a name for a leaf, as far as it says so."""
    kinds = [kind for kind in KINDS.get(name, ()) if path in ours.get(kind, {})]
    values = [ours[kind][path] for kind in kinds]
    if not kinds and name == "weight_decay" and not isinstance(decays.get(path), str):
        values = [decays.get(path)]
    elif not kinds:
        values = [told.get(path, {}).get(name)]
    for value in values:
        if isinstance(value, (int, float, Settable, jax.Array, np.generic)) or callable(value):
            yield value


def _same(name: str, theirs: Any, ours: Any, step: int) -> bool:
    """Whether `tx` has a recorded value.

    A settable one is set to it. A schedule has it at the last step, or at the next one. Optax
    rounds the values to the dtype of its state, which does not make them others; but for decays, of
    which a rounded one is another optimizer.
    """
    if isinstance(ours, Settable):
        return True
    steps = (max(step - 1, 0), step) if callable(ours) else (0,)
    values = [ours(jnp.asarray(i, jnp.int32)) if callable(ours) else ours for i in steps]
    eps = 0.0 if name in KINDS else float(finfo(theirs.dtype).eps)
    close = [np.isclose(float(theirs), float(its), rtol=max(1e-6, eps), atol=0) for its in values]
    return any(close)


def merged(found: Iterable[Record]) -> dict[str, Any]:
    """Returns all recorded values by name."""
    return {name: value for record in found for name, value in record.values.items()}


def value_to_record(path: tuple[Any, ...], used: Mapping[str, Any]) -> Any:
    """Returns what a leaf of an Optax state becomes that records a hyperparameter.

    Args:
      path: of the leaf in the state.
      used: what the last step of ours used, by the names of `hyperparameters`.

    Returns:
      The value; `None` for another leaf, a name that we do not have, or groups that differ.
    """
    if len(path) < 2 or path[-2] != GetAttrKey("hyperparams") or not isinstance(path[-1], DictKey):
        return None
    values = [value for name, value in used.items() if name.rpartition("/")[2] == path[-1].key]
    return values[0] if values and all(bool(value == values[0]) for value in values) else None
