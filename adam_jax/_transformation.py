"""Transformations as values: a stage is a function of its hyperparameters, a recipe a function that returns a chain.

A stage is written as a function of its hyperparameters that returns `init` and `update`; the decorator `stage` makes of it
an `optax.GradientTransformationExtraArgs` that prints as the call that built it, and equals and hashes like any other one
built from equal arguments. A recipe is a function that returns a chain; the decorator `recipe` lets that chain print under
the recipe's name. The identity lives in the two functions of the pair, not in the pair, so it survives whatever takes the
tuple apart and builds it again, as `jax.tree.map` and Equinox's filters do.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Concatenate, Literal, ParamSpec

import jax
import optax

from adam_jax._context import Context
from adam_jax._hyperparams import expect_one_of
from adam_jax._identity import expect_state
from adam_jax._spec import Definition, Flow, Init, Spec, Update, bind, is_transformation, show, swapped
from adam_jax._tree import PyTree, brief, expect_array

P = ParamSpec("P")


class _Function:
    """`init` or `update` of a transformation; equal to that of any other transformation built from equal arguments."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.__name__ = f"{spec.build.__name__}_{type(self).__name__.strip('_').lower()}"

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and isinstance(other, _Function) and self.spec.key == other.spec.key

    def __hash__(self) -> int:
        return self.spec.hash

    def __repr__(self) -> str:
        return f"{self.spec!r}.{type(self).__name__.strip('_').lower()}"


@contextlib.contextmanager
def _of_arrays(who: str, *trees: PyTree) -> Iterator[None]:
    """Says which leaf it was, where something else than arrays has led to an error."""
    try:
        yield
    except TypeError:
        for tree in trees:
            for keys, leaf in jax.tree_util.tree_leaves_with_path(tree):
                expect_array(leaf, f"{who}: at {jax.tree_util.keystr(keys)}")
        raise


class _Init(_Function):
    def __call__(self, params: PyTree) -> PyTree:
        with _of_arrays(f"{self.spec.build.__name__}: init", params):
            return self.spec.init(params)


class _Update(_Function):
    def __call__(self, updates: Any, state: Any, params: PyTree | None = None, **extra: Any) -> tuple[Any, Any]:
        expect_state(self.spec, state, f"{self.spec.build.__name__}: update")
        with _of_arrays(f"{self.spec.build.__name__}: update", updates, params):
            return self.spec.update(updates, state, params, Context(gradient=extra.get("gradient"), extra=extra))


def transformation(spec: Spec) -> Transformation:
    """The pair of functions that `spec` describes."""
    return Transformation(_Init(spec), _Update(spec))


class Transformation(optax.GradientTransformationExtraArgs):
    """An `optax.GradientTransformationExtraArgs` that is a value.

    `repr` is the call that builds it; equal arguments make equal, equally hashing transformations. Two chains of equal
    stages are equal whatever name they print under, so `adam(1e-3)` equals the chain it stands for.
    """

    __slots__ = ()
    init: _Init
    update: _Update

    @property
    def stages(self) -> tuple[Any, ...]:
        """The parts of a chain, in order; a single stage is its own only part."""
        return self.init.spec.stages or (self,)

    @property
    def flow(self) -> Flow:
        """What it takes and what it gives."""
        return self.init.spec.flow

    def __repr__(self) -> str:
        return repr(self.init.spec)


def expect_transformation(tx: Any, who: str) -> None:
    """Refuses what is no transformation."""
    if not is_transformation(tx):
        raise TypeError(
            f"{who}: tx: found {brief(tx)}; expected a gradient transformation, for example adam_jax.adam(1e-3)."
            f"{swapped(tx, who)}"
        )


def first_state(tx: Any, params: PyTree, who: str) -> PyTree:
    """The shapes of a fresh state.

    Raises:
      TypeError: for what is no transformation, and parameters that are no arrays.
    """
    expect_transformation(tx, who)
    for keys, leaf in jax.tree_util.tree_leaves_with_path(params):
        expect_array(leaf, f"{who}: params at {jax.tree_util.keystr(keys)}")
    return jax.eval_shape(tx.init, params)


def hides_rate(tx: Any) -> bool:
    """Whether a transformation of others is in it, which may apply a learning rate unseen."""
    if not isinstance(tx, Transformation):
        return True
    return any(map(hides_rate, (*tx.init.spec.stages, *tx.init.spec.inner.values())))


def take_step(tx: Any, updates: Any, state: Any, params: Any, context: Context) -> tuple[Any, Any]:
    """`update` of a part: one of this package learns the context, others get the extra arguments."""
    if isinstance(tx, Transformation):
        return tx.update.spec.update(updates, state, params, context)
    made: tuple[Any, Any] = tx.update(updates, state, params, **context.extra)
    return made


def expect_optimizer(tx: Any, who: str) -> Flow:
    """The flow of what is to be wrapped, if it is a whole optimizer."""
    if not is_transformation(tx):
        called = " (a function: did you mean to call it?)" if callable(tx) else ""
        called = " (did you mean its .gradient_transformation()?)" if hasattr(tx, "gradient_transformation") else called
        raise TypeError(f"{who}: found {brief(tx)}{called}; expected a gradient transformation, such as adam(1e-3).")
    flow = tx.flow if isinstance(tx, Transformation) else Flow()
    if "moments" in (flow.takes, flow.gives):
        raise ValueError(
            f"{who}: found {show(tx)}, which takes or gives Moments; expected a whole optimizer. Put this around the chain."
        )
    return flow


def stage(
    takes: Literal["moments", "updates", "any"] = "updates",
    gives: Literal["moments", "updates", "same"] = "same",
    rate: Callable[..., Any] | str | None = None,
    bias: Literal["corrects", "before"] | None = None,
    end: Literal["rounds", "reads"] | None = None,
    canonical: Mapping[str, Callable[[Any], Any]] = {},
) -> Callable[[Callable[P, Definition | tuple[Init, Update]]], Callable[P, Transformation]]:
    """Makes a stage of a function of hyperparameters that returns `init` and `update`, or a whole `Definition`.

        @stage(takes="updates", gives="updates", rate="before")
        def scale_by_sign(strength=1.0):
            def init(params):
                return optax.EmptyState()

            def update(updates, state, params, context):
                return jax.tree.map(lambda u: strength * jnp.sign(u), updates), state

            return init, update

    Args:
      takes: see `Flow`.
      gives: see `Flow`.
      rate: see `Flow`; or a function of the stage's arguments that says it, where it depends on them.
      bias: see `Flow`.
      end: see `Flow`.
      canonical: functions by the name of an argument. Each returns the one spelling of a value that can be written in several
        ways: transformations are equal if these are.

    Raises:
      ValueError: for an unknown `takes` or `gives`.
    """
    expect_one_of("stage: takes", takes, ("moments", "updates", "any"))
    expect_one_of("stage: gives", gives, ("moments", "updates", "same"))

    def decorate(make: Callable[P, Definition | tuple[Init, Update]]) -> Callable[P, Transformation]:
        @functools.wraps(make)
        def build(*args: P.args, **kwargs: P.kwargs) -> Transformation:
            arguments = bind(make, args, kwargs)
            arguments.arguments |= {name: spell(arguments.arguments[name]) for name, spell in canonical.items()}
            side: Any = rate(**arguments.arguments) if callable(rate) else rate
            definition = Definition(*make(*arguments.args, **arguments.kwargs))
            flow = Flow(takes, gives, side, bias, end)
            return transformation(Spec(build, arguments, definition.init, definition.update, flow, definition=definition))

        return build

    return decorate


def wrapper(make: Callable[Concatenate[Any, P], tuple[Init, Update]]) -> Callable[..., Transformation]:
    """Makes a wrapper of a function of a transformation, and of more arguments, that returns `init` and `update`.

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
        flow = expect_optimizer(tx, make.__name__)
        inner = tx if isinstance(tx, Transformation) else optax.with_extra_args_support(tx)
        init, update = make(inner, *args, **kwargs)
        return transformation(Spec(build, bind(make, (tx, *args), kwargs), init, update, flow, inner={"": inner}))

    return build


def recipe(make: Callable[P, Transformation]) -> Callable[P, Transformation]:
    """Lets the chain that `make` returns print as a call of `make`; it stays equal to the chain."""

    @functools.wraps(make)
    def build(*args: P.args, **kwargs: P.kwargs) -> Transformation:
        of = make(*args, **kwargs).init.spec
        spec = Spec(build, bind(make, args, kwargs), of.init, of.update, of.flow, of.stages)
        return transformation(spec)

    return build


def stateless(params: PyTree) -> optax.EmptyState:
    """The `init` of a stage that remembers nothing."""
    return optax.EmptyState()
