"""`chain`, which checks that neighbours fit before anything is computed."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import optax

from adam_jax._core.configuration import applied_rates
from adam_jax._core.context import Context
from adam_jax._core.errors import brief, hint_for
from adam_jax._core.interface import Interface
from adam_jax._core.leaves import PyTree, all_wide
from adam_jax._core.lift import narrow
from adam_jax._core.spec import Spec, all_specs, bind, is_transformation, show
from adam_jax._core.transformation import Transformation, call_update, hides_rate, transformation


def chain(*stages: optax.GradientTransformation) -> Transformation:
    """Applies transformations in order, as `optax.chain` does.

    Before, it checks that each can take what the one before gives.

    Its state is a tuple with one entry a stage. Any Optax transformation may stand in it, where
    plain updates flow. Between two stages updates are float32 or wider. The outermost chain rounds
    them once, to the wider of the gradient's and the parameter's dtype (of bfloat16 and float16
    that is float32), or to the gradient's if `update` gets no `params`.

    Args:
      *stages: transformations of this package or of Optax, at least one.

    Raises:
      TypeError: at once, if a part is no gradient transformation.
      ValueError: at once, if the parts are in an order that cannot work, naming both neighbours and
        their positions. In `update`, if the state has another number of parts; in `init`, if a
        transformation of others holds a link that rounds.
    """
    if not stages:
        raise ValueError(
            "chain: found no stages; expected at least one, for example "
            "chain(scale_by_learning_rate(0.1))."
        )
    for position, part in enumerate(stages):
        if not is_transformation(part):
            raise TypeError(
                f"chain: found {brief(part)} at position {position}{hint_for(part)}; expected a "
                "gradient transformation, which is a pair of `init` and `update`."
            )
    parts = tuple(
        part if isinstance(part, Transformation) else optax.with_extra_args_support(part)
        for part in stages
    )
    interface = _check_order(stages)
    earlier = itertools.accumulate(map(_names_of_stages, parts), initial=Counter())
    places = [_place(parts, i, names) for i, names in enumerate(earlier) if i < len(parts)]

    def init(params: PyTree) -> tuple[PyTree, ...]:
        def fit(i: int) -> PyTree:
            # Behind a stage of ours updates are wide, and so must be what others keep of them.
            behind = any(isinstance(part, Transformation) for part in parts[:i])
            return all_wide(params) if behind and not _rounds(parts[i]) else params

        states = tuple(part.init(fit(i)) for i, part in enumerate(parts))
        for position, (part, state) in enumerate(zip(parts, states, strict=True)):
            if not _rounds(part) and any(map(_rounded, jax.tree.leaves(state, is_leaf=_rounded))):
                raise ValueError(
                    f"chain: {show(part)} at position {position} holds a link that rounds "
                    "parameters, which this chain cannot see and would round again. Put the link "
                    "itself at the end of the chain (it leaves float32 parameters alone), or use "
                    "optax.chain in place of this one."
                )
        return states

    def update(
        updates: Any, state: Any, params: Any, context: Context
    ) -> tuple[Any, tuple[Any, ...]]:
        if not isinstance(state, (tuple, list)) or len(state) != len(parts):
            found = (
                f"{len(state)} parts"
                if isinstance(state, (tuple, list))
                else f"a {type(state).__name__}"
            )
            raise ValueError(
                f"chain: found a state of {found} for {len(parts)} stages; expected the state that "
                "`init` of this very chain made, or one that its `update` returned."
            )
        incoming = updates
        inner = context
        if not context.inside:
            gradient = updates if context.gradient is None else context.gradient
            inner = context._replace(
                gradient=gradient, incoming=updates, applied=False, inside=True
            )
        around = Counter(context.earlier)
        new_state = []
        for place, before in zip(places, state, strict=True):
            part, inner = place.part, inner._replace(earlier=place.earlier + around)
            for interceptor in inner.interceptors:
                interceptor.before(part, updates, before, params, inner)
            updates, after = call_update(part, updates, before, params, inner)
            inner = place.facts_behind(inner, before)
            for interceptor in () if is_chain(part) else inner.interceptors:
                after, updates = interceptor.after(after, before, updates)
            new_state.append(after)
        if not (context.inside or context.wide) and interface.gives == "updates":
            updates = narrow(updates, incoming, params, interface.end == "rounds")
        return updates, tuple(new_state)

    spec = Spec(chain, bind(chain, stages, {}), init, update, interface, tuple(stages))
    return transformation(spec)


class _Place(NamedTuple):
    """A part of a chain, and what its place in the chain says.

    Attributes:
      part: the transformation.
      earlier: how many stages of each name stand before it.
      applies: whether it applies the learning rate.
      may_apply: whether it is of another library and may apply a learning rate unseen. It does not
        where one of ours is still to come.
      rounds: whether its updates must reach the parameters as they are.
    """

    part: Any
    earlier: Counter[str]
    applies: bool
    may_apply: bool
    rounds: bool

    def facts_behind(self, context: Context, state: Any) -> Context:
        """Returns what the parts behind this one have to know."""
        if self.applies:
            rate = _one_rate(self.part, state)
            context = context._replace(applied=True, learning_rate=rate)
        elif self.may_apply:
            context = context._replace(applied=context.applied or None)
        return context._replace(rounded=True) if self.rounds else context


def _place(parts: Sequence[Any], i: int, earlier: Counter[str]) -> _Place:
    part = parts[i]
    hidden = not _applies(part) and hides_rate(part)
    may_apply = hidden and not any(map(_applies, parts[i + 1 :]))
    return _Place(part, earlier, _applies(part), may_apply, _rounds(part))


def _one_rate(tx: Any, state: Any) -> Callable[[], Any] | None:
    """Returns a function that returns the learning rate of a step.

    `None` where groups have several rates, or unknown ones.
    """
    rates = applied_rates(tx, state)
    return rates[0][1] if len(rates) == 1 and len(tx.init.spec.inner) < 2 else None


def _check_order(parts: tuple[Any, ...]) -> Interface:
    """The flow of a chain from those of its parts; raises where two neighbours do not fit."""
    first: Any = None
    flows: Any = None
    applied: bool | None = False
    corrected = False
    side: Any = None
    rounds: str | None = None
    skips: str | None = None
    for position, part in enumerate(parts):
        interface = part.interface if isinstance(part, Transformation) else Interface()
        here = f"{show(part)} at position {position}"
        before = f"{show(parts[position - 1])} at position {position - 1}"
        if flows is not None and interface.takes not in ("any", flows):
            if interface.takes == "moments":
                raise ValueError(
                    f"chain: {here} takes Moments, but {before} gives plain updates. Put it "
                    "between track_moments(...), which makes Moments, and scale_by_moments(...), "
                    "which consumes them."
                )
            raise ValueError(
                f"chain: {here} takes plain updates, but {before} gives Moments. Put "
                "scale_by_moments(...), or another stage that consumes Moments, between them."
            )
        if interface.rate in ("applies", "before") and applied:
            why = (
                "would apply a second one, turning descent into ascent"
                if interface.rate == "applies"
                else "is right only before it"
            )
            raise ValueError(
                f"chain: {here} comes after the learning rate was applied, and {why}. Put it "
                "before scale_by_learning_rate(...); a finished member such as adam(...) ends "
                "with that stage, and its `.stages` can be chained one by one. To scale finished "
                "steps, use optax.scale(...)."
            )
        if (
            interface.rate == "after"
            and applied is False
            and any(_applies(later) for later in parts[position + 1 :])
        ):
            raise ValueError(
                f"chain: {here} is right only after the learning rate was applied, but "
                "scale_by_learning_rate(...) comes later. Move it behind."
            )
        if interface.bias == "before" and corrected:
            raise ValueError(
                f"chain: {here} needs the weight that its moments have gathered, and comes after "
                "correct_bias(), which has divided by it. Put it between track_moments(...) and "
                "correct_bias()."
            )
        if skips and interface.moves:
            raise ValueError(
                f"chain: {here} comes after {skips}, which skips its own step alone: the moments "
                "or the decay behind it would move the parameters all the same. Put the guard "
                "around the whole chain."
            )
        if rounds and interface.end != "reads":
            raise ValueError(
                f"chain: {here} comes after {rounds}, whose updates must reach the parameters as "
                "they are. Put it before."
            )
        if interface.end == "reads" and any(map(_rounds, parts[position + 1 :])):
            raise ValueError(
                f"chain: {here} reads the updates that reach the parameters, and they are rounded "
                "later. Move it last."
            )
        rounds = here if interface.end == "rounds" else rounds
        skips = here if interface.skips else skips
        corrected = (corrected or interface.bias == "corrects") and interface.gives != "updates"
        if first is None and interface.takes != "any":
            first = interface.takes
        flows = (
            flows
            if interface.gives == "same" and flows
            else (interface.gives if interface.gives != "same" else first)
        )
        if interface.rate == "applies":
            applied = True
        elif hides_rate(part):
            applied = applied or None
        side = side or interface.rate
    rate: Any = "applies" if any(_applies(part) for part in parts) else side
    reads = all(
        isinstance(part, Transformation) and part.interface.end == "reads" for part in parts
    )
    end: Any = "rounds" if rounds else "reads" if reads else None
    return Interface(
        first or "any",
        flows or "same",
        rate,
        "corrects" if corrected else None,
        end,
        moves=any(isinstance(part, Transformation) and part.interface.moves for part in parts),
        skips=bool(skips),
    )


def _names_of_stages(part: Any) -> Counter[str]:
    """Returns how many stages of each name a part of a chain consists of."""
    return Counter(spec.constructor.__name__ for spec in all_specs(part) if spec.is_stage)


def is_chain(part: Any) -> bool:
    return isinstance(part, Transformation) and bool(part.init.spec.stages)


def _rounded(node: Any) -> bool:
    """Whether it is the state of a stage that rounds."""
    return getattr(node, "rounds", False) is True


def _rounds(part: Any) -> bool:
    return isinstance(part, Transformation) and part.interface.end == "rounds"


def _applies(part: Any) -> bool:
    return isinstance(part, Transformation) and part.interface.rate == "applies"
