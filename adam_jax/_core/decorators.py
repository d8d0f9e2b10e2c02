"""The decorators that make transformations of functions: `stage`, `wrapper` and `recipe`."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, Concatenate, Literal, ParamSpec

import optax

from adam_jax._core.errors import expect_one_of
from adam_jax._core.interface import Interface
from adam_jax._core.leaves import PyTree
from adam_jax._core.spec import Definition, Init, Spec, Update, bind
from adam_jax._core.transformation import Transformation, expect_optimizer, transformation

P = ParamSpec("P")


def stage(
    takes: Literal["moments", "updates", "any"] = "updates",
    gives: Literal["moments", "updates", "same"] = "same",
    rate: Callable[..., Any] | str | None = None,
    bias: Literal["corrects", "before"] | None = None,
    end: Literal["rounds", "reads"] | None = None,
    moves: bool = False,
    canonical: Mapping[str, Callable[[Any], Any]] = {},
) -> Callable[[Callable[P, Definition | tuple[Init, Update]]], Callable[P, Transformation]]:
    """Makes a stage of a function of hyperparameters.

    The function returns `init` and `update`, or a whole `Definition`.

        @stage(takes="updates", gives="updates", rate="before")
        def scale_by_sign(strength=1.0):
            def init(params):
                return optax.EmptyState()

            def update(updates, state, params, context):
                return jax.tree.map(lambda u: strength * jnp.sign(u), updates), state

            return init, update

    Args:
      takes: see `Interface`.
      gives: see `Interface`.
      rate: see `Interface`; or a function of the stage's arguments that says it, where it depends
        on them.
      bias: see `Interface`.
      end: see `Interface`.
      moves: see `Interface`. A stage with slots does, unless it stands at the end.
      canonical: functions by the name of an argument. Each returns the one spelling of a value that
        can be written in several ways: transformations are equal if these are.

    Raises:
      ValueError: for an unknown `takes` or `gives`.
    """
    expect_one_of("stage: takes", takes, ("moments", "updates", "any"))
    expect_one_of("stage: gives", gives, ("moments", "updates", "same"))

    def decorate(
        make: Callable[P, Definition | tuple[Init, Update]],
    ) -> Callable[P, Transformation]:
        @functools.wraps(make)
        def build(*args: P.args, **kwargs: P.kwargs) -> Transformation:
            bound = bind(make, args, kwargs, canonical)
            side: Any = rate(**bound.arguments) if callable(rate) else rate
            definition = Definition(*make(*bound.args, **bound.kwargs))
            remembers = bool(definition.slots) and end is None
            interface = Interface(takes, gives, side, bias, end, moves or remembers)
            hypers = list(definition.hyperparameters)
            spec = Spec(
                build,
                bound,
                definition.init,
                definition.update,
                interface,
                definition=definition,
                rate=hypers[0] if side == "applies" and len(hypers) == 1 else None,
            )
            return transformation(spec)

        _show_what_it_makes(build, make)
        return build

    return decorate


def wrapper(
    make: Callable[Concatenate[Any, P], tuple[Init, Update]],
) -> Callable[..., Transformation]:
    """Makes a wrapper of a function of a transformation, and of more arguments.

    The function returns `init` and `update`.

        class CountedState(NamedTuple):
            inner_state: Any
            steps: Array

        @wrapper
        def counted(tx):
            def init(params):
                return CountedState(tx.init(params), jnp.zeros((), jnp.int32))

            def update(updates, state, params, context):
                updates, inner = call_update(tx, updates, state.inner_state, params, context)
                return updates, CountedState(inner, state.steps + 1)

            return init, update

    The state is a NamedTuple whose field `inner_state` has the state of what is wrapped.

    Raises:
      TypeError: when the wrapper is made, for what is no transformation.
      ValueError: for a transformation that takes or gives `Moments`.
    """

    @functools.wraps(make)
    def build(tx: Any, *args: P.args, **kwargs: P.kwargs) -> Transformation:
        interface = expect_optimizer(tx, make.__name__)
        inner = tx if isinstance(tx, Transformation) else optax.with_extra_args_support(tx)
        bound = bind(make, (tx, *args), kwargs)
        init, update = make(inner, *args, **kwargs)
        return transformation(Spec(build, bound, init, update, interface, inner={"": inner}))

    return build


def recipe(
    *, rate: str | None
) -> Callable[[Callable[P, Transformation]], Callable[P, Transformation]]:
    """Lets the chain that a function returns print as a call of it; it stays equal to the chain.

    Args:
      rate: the name of the argument that is the learning rate, which a group of `by_path` may
        multiply. `None` if there is none.

    Raises:
      TypeError: when the recipe is made, if the function has no such argument.
    """

    def decorate(make: Callable[P, Transformation]) -> Callable[P, Transformation]:
        if rate is not None and rate not in inspect.signature(make).parameters:
            raise TypeError(
                f"recipe: found rate={rate!r}; {make.__name__} has "
                f"{', '.join(inspect.signature(make).parameters)}."
            )

        @functools.wraps(make)
        def build(*args: P.args, **kwargs: P.kwargs) -> Transformation:
            bound = bind(make, args, kwargs)
            of = make(*args, **kwargs).init.spec
            spec = Spec(build, bound, of.init, of.update, of.interface, of.stages, rate=rate)
            return transformation(spec)

        return build

    return decorate


def _show_what_it_makes(build: Any, make: Callable[..., Any]) -> None:
    """Gives `build` the signature of `make`, but for what it returns."""
    build.__signature__ = inspect.signature(make).replace(return_annotation="Transformation")


def stateless(params: PyTree) -> optax.EmptyState:
    """The `init` of a stage that remembers nothing."""
    return optax.EmptyState()
