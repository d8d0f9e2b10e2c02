"""What a transformation is made of.

The call that built it, what it takes and gives, what a stage says about itself.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np
import optax

from adam_jax._core.context import Context
from adam_jax._core.errors import bound_arguments, expect_flag
from adam_jax._core.hyperparams import Hyperparameters
from adam_jax._core.interface import Interface
from adam_jax._core.leaves import PyTree
from adam_jax._core.slots import Slot

Init: TypeAlias = Callable[[PyTree], PyTree]

Update: TypeAlias = Callable[[Any, Any, Any, Context], tuple[Any, Any]]


class Follower(NamedTuple):
    """A number in a stage's state that follows from the debias factor of a moment.

    Attributes:
      moment: "mu" or "nu".
      meaning: what the number is, for reports.
      ndim: how many dimensions it has before `reset` gave some leaves a start of their own. Then it
        has one more, with an entry per leaf.
      of_factor: (debias factor as two floats, 1 − decay of the moment, steps) -> the number.
    """

    moment: str
    meaning: str
    ndim: int
    of_factor: Callable[[Any, Any, Any], Any]


class Definition(NamedTuple):
    """What a stage says about itself.

    Attributes:
      init: makes the state from the parameters.
      update: (updates, state, params, context) -> (updates, state).
      slots: the moments that it keeps, `storage.MomentSlot`s in the order of the state's fields.
      hyperparameters: its numbers, schedules and settable values.
      counter: the field of the state from which schedules are read, such as "step" or "count";
        `None` if the stage reads the count of the moments.
      follows: the fields that follow from the debias factor of a moment.
      root: of a stage that divides by ν, whether by its root.
      trees: the fields that hold something else for each parameter, by what `state_bytes` counts it
        as: "rounding" or "other".
      corrects: the moments, "mu" or "nu", that it divides by their weights.
      decays: of a stage of weight decay, a function of the parameters that returns a tree of
        booleans: which leaves decay, at the rate that is its first hyperparameter.
      decay_reasons: of a stage of weight decay, a function of the parameters that returns why each
        leaf decays or does not, in order, for `describe`.
    """

    init: Init
    update: Update
    slots: tuple[Slot, ...] = ()
    hyperparameters: Hyperparameters = Hyperparameters()
    counter: str | None = "step"
    follows: Mapping[str, Follower] = {}
    root: bool = True
    trees: Mapping[str, str] = {}
    corrects: tuple[str, ...] = ()
    decays: Callable[[PyTree], PyTree] | None = None
    decay_reasons: Callable[[PyTree], list[str]] | None = None


class Spec:
    """One call that builds a transformation.

    The function that was called, its arguments, and what came of it.

    Attributes:
      constructor: the function.
      bound: its arguments, as `inspect` has them.
      init: makes the state from the parameters.
      update: (updates, state, params, context) -> (updates, state).
      interface: what the transformation takes and gives.
      stages: of a chain, its stages.
      inner: of a wrapper, what it wraps: by name where its state has `inner_states`, else under "",
        with the state `inner_state`.
      definition: what a stage says about itself.
      split: of a wrapper with groups, a function of the parameters that returns the name of the
        group of each leaf. A name that `inner` does not have is that of a frozen group.
      freezes: of a wrapper with groups, a function of a path that says whether the leaf there would
        be frozen.
      rate: the name of the argument that is the learning rate, if a group may multiply it.
    """

    def __init__(
        self,
        constructor: Callable[..., Any],
        bound: inspect.BoundArguments,
        init: Init,
        update: Update,
        interface: Interface,
        stages: tuple[Any, ...] = (),
        inner: Mapping[str, Any] | None = None,
        definition: Definition | None = None,
        split: Callable[[PyTree], list[str]] | None = None,
        freezes: Callable[[str], bool] | None = None,
        rate: str | None = None,
    ) -> None:
        self.constructor, self.bound, self.interface, self.stages = (
            constructor,
            bound,
            interface,
            stages,
        )
        self.definition = definition or Definition(init, update)
        self.rate = rate
        self.inner = inner or {}
        self.init, self.update, self.split, self.freezes = init, update, split, freezes
        self.key: Hashable = stages or (constructor, _freeze(self.config))
        self.hash = hash(self.key)

    @property
    def config(self) -> dict[str, Any]:
        """The arguments of the call by name, those that were left out as well."""
        return self.bound.arguments

    @property
    def is_stage(self) -> bool:
        """Whether it is one stage, and neither a chain nor a wrapper."""
        return not (self.stages or self.inner)

    @functools.cached_property
    def blank(self) -> Any:
        """The shapes of a state for one parameter, which is a scalar.

        All of it but the moments is as in any other state.
        """
        return jax.eval_shape(self.init, np.zeros((), np.float32))

    def __reduce__(self) -> Any:
        return _rebuild, (self.constructor, self.bound.args, self.bound.kwargs)

    def __repr__(self) -> str:
        parameters = self.bound.signature.parameters
        shown = []
        for name, value in self.config.items():
            kind = parameters[name].kind
            if kind is inspect.Parameter.VAR_POSITIONAL:
                shown += [_in_full(part) for part in value]
                continue
            main_number = (
                isinstance(value, float) and kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
            )
            if main_number or _freeze(value) != _freeze(parameters[name].default):
                shown.append(f"{name}={_in_full(value)}")
        module = self.constructor.__module__.removeprefix("adam_jax.")
        name = (
            f"{module}.{self.constructor.__name__}"
            if module.startswith("presets.")
            else self.constructor.__name__
        )
        return f"{name}({', '.join(shown)})"


def _rebuild(build: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Spec:
    spec: Spec = build(*args, **kwargs).init.spec
    return spec


def _freeze(value: Any) -> Hashable:
    """A hashable stand-in that is equal for equal arguments; a traced value equals itself alone."""
    if isinstance(value, jax.core.Tracer):
        return "traced", id(value)
    if isinstance(value, (jax.Array, np.ndarray)):
        array = np.asarray(value)
        return array.shape, str(array.dtype), array.tobytes()
    try:
        hash(value)
    except TypeError:
        if isinstance(value, Mapping):
            return tuple(
                (name, _freeze(its)) for name, its in value.items()
            )  # in order, which can matter
        leaves, treedef = jax.tree.flatten(value)
        if len(leaves) == 1 and leaves[0] is value:
            return "object", id(value)
        return treedef, tuple(map(_freeze, leaves))
    return value  # type: ignore[no-any-return]


def spec_of(tx: Any) -> Spec | None:
    """Returns the call that built a transformation, or the call itself.

    `None` for those of other libraries.
    """
    spec = tx if isinstance(tx, Spec) else getattr(getattr(tx, "init", None), "spec", None)
    return spec if isinstance(spec, Spec) else None


def all_specs(tx: Any) -> Iterator[Spec]:
    """Yields the calls that built a transformation and everything of this package inside it.

    The outermost first.
    """
    spec = spec_of(tx)
    if spec is not None:
        yield spec
        for part in (*spec.stages, *spec.inner.values()):
            yield from all_specs(part)


def show(value: Any) -> str:
    """Returns how an error shows a transformation or an argument: as its call, if that is short."""
    text = _in_full(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} …"


_LONGEST = 200  # the call of a hundred groups has thousands of characters


def _in_full(value: Any) -> str:
    if isinstance(value, optax.GradientTransformation) and spec_of(value) is None:
        name = getattr(value.update, "__qualname__", type(value).__name__).split(".")[0]
        return f"<{name} of {value.init.__module__.split('.')[0]}>"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{name!r}: {_in_full(its)}' for name, its in value.items())}}}"
    return getattr(value, "__qualname__", None) or repr(value)


def swapped(tx: Any, caller: str) -> str:
    """Returns what an error adds where arguments of the function `caller` may be swapped."""
    if tx is not None and not jax.tree_util.all_leaves([tx]):
        return (
            " It looks like a state or parameters: are two arguments swapped? "
            f"help({caller}) shows their order."
        )
    return ""


def is_transformation(tx: Any) -> bool:
    """Whether it is a pair of `init` and `update`, of this package or of others."""
    return (
        isinstance(tx, tuple)
        and callable(getattr(tx, "init", None))
        and callable(getattr(tx, "update", None))
    )


def bind(
    constructor: Callable[..., Any],
    args: Any,
    kwargs: Any,
    canonical: Mapping[str, Callable[[Any], Any]] = {},
) -> inspect.BoundArguments:
    """Returns the arguments of a call by name, with the defaults.

    `canonical` gives each argument one spelling. Where the default is a flag, all but `True` and
    `False` are refused: Python takes the string "False" for true.
    """
    bound = bound_arguments(constructor, args, kwargs)
    bound.apply_defaults()
    for name, parameter in bound.signature.parameters.items():
        if isinstance(parameter.default, bool):
            expect_flag(f"{constructor.__name__}: {name}", bound.arguments[name])
    bound.arguments |= {name: spell(bound.arguments[name]) for name, spell in canonical.items()}
    return bound


def wrapped(tx: Any, state: Any) -> list[tuple[str, str | None, Any, Any]]:
    """What a wrapper of this package wraps.

    Its place in the wrapper's state, the name of its group, itself, and its state.
    """
    spec = spec_of(tx)
    inner = spec.inner if spec else {}
    if hasattr(state, "inner_states"):
        return [
            (f".inner_states[{name!r}]", name, part, state.inner_states[name])
            for name, part in inner.items()
        ]
    return [
        (".inner_state", None, part, state.inner_state)
        for part in inner.values()
        if hasattr(state, "inner_state")
    ]


def rewrapped(tx: Any, state: Any, states: list[Any]) -> Any:
    """A wrapper's state with other ones inside, in the order of `wrapped`."""
    if hasattr(state, "inner_states"):
        return state._replace(inner_states=dict(zip(tx.init.spec.inner, states, strict=True)))
    return state._replace(inner_state=states[0])
