"""What a configuration is made of: the parts of a transformation with their states, and what their moments mean.

What two configurations share is decided by what their memories mean, not by what these are called: ν is a mean of squares in
Adam, of (g − μ)² in AdaBelief, and a maximum in AdaMax, each in a field `nu` of the same shape.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from adam_jax._bias import correct_bias
from adam_jax._moments import track_moments
from adam_jax._refine import keep_maximum, mix_slow_mean
from adam_jax._transformation import Transformation, rewrapped, show, wrapped

NU_MEANINGS = {
    "square": "the mean of squared {}",
    "yogi": "the mean of squared {}",  # by another path to it
    "belief": "the mean of squared distances of {} from μ",
    "infinity": "the decaying maximum of {}",
}


class Part(NamedTuple):
    """A stage, a wrapper or a transformation of others, in its place in a configuration.

    Attributes:
      place: in the state.
      tx: the transformation.
      state: its state; of a wrapper with what is inside.
      group: that of `by_path` it is in, "" outside.
      key: its name, and how many of that name come before in its group: what it is paired by.
      meanings: what its moments are, by field.
    """

    place: str
    tx: Any
    state: Any
    group: str
    key: tuple[str, str, int]
    meanings: dict[str, str]

    @property
    def said(self) -> dict[str, Any]:
        return dict(self.tx.init.spec.arguments.arguments) if isinstance(self.tx, Transformation) else {}


def walk(tx: Any, state: Any, place: str = "", group: str = "") -> Iterator[tuple[str, str, Any, Any]]:
    """The parts of a configuration in the order in which updates meet them, with place and group."""
    if isinstance(tx, Transformation) and tx.init.spec.stages:
        for i, (part, its) in enumerate(zip(tx.stages, state, strict=True)):
            yield from walk(part, its, f"{place}[{i}]", group)
        return
    yield place, group, tx, state
    for inside, part, its in wrapped(tx, state):
        # Groups are paired by their names, and what only guards what is inside is not one.
        yield from walk(part, its, f"{place}{inside}", group + (inside if hasattr(state, "inner_states") else ""))


def rebuilt(tx: Any, state: Any, states: Iterator[Any]) -> Any:
    """The state with that of each part, as `walk` meets them, taken from `states`."""
    if isinstance(tx, Transformation) and tx.init.spec.stages:
        return tuple(rebuilt(part, its, states) for part, its in zip(tx.stages, state, strict=True))
    own = next(states)
    inner = [rebuilt(part, its, states) for _, part, its in wrapped(tx, state)]
    return rewrapped(tx, own, inner) if inner else own


def of_group(group: str) -> str:
    return f" of {group.removeprefix('.inner_states')}" if group else ""


class Side:
    """One of the two configurations, with a state: its parts, and what their moments mean."""

    def __init__(self, tx: Any, state: Any) -> None:
        self.parts: list[Part] = []
        names: list[tuple[str, str]] = []
        source, nu, corrected, where = "gradients", "", False, ""
        for place, group, part, its in walk(tx, state):
            build, said, flow = None, {}, None
            if group != where:
                where, source, nu, corrected = group, "gradients", "", False
            if isinstance(part, Transformation):
                build, said = part.init.spec.build, part.init.spec.arguments.arguments
                # A wrapper's flow is that of what is inside, which comes next.
                flow = None if part.init.spec.inner else part.flow
            meanings = {}
            if build is track_moments:
                nu, corrected = NU_MEANINGS[said["nu_rule"]].format(source), False
                meanings = {"mu": f"the {said['mu_rule']} of {source}", "nu": nu}
            elif build is correct_bias:
                corrected |= said["nu"]
            elif build is keep_maximum:
                meanings = {"nu_max": f"the maximum of {nu}, {'corrected' if corrected else 'raw'}"}
            elif build is mix_slow_mean:
                meanings = {"mu_slow": f"the slow mean of {source}"}
            if flow and flow.takes == "moments" and flow.gives == "updates":
                source = "directions"  # what is averaged behind is no gradient
            if flow and flow.rate == "applies":
                source = "steps"
            name = build.__name__ if build else show(part), group
            meanings = {field: what for field, what in meanings.items() if hasattr(its, field)}
            self.parts.append(Part(place, part, its, group, (*name, names.count(name)), meanings))
            names.append(name)
