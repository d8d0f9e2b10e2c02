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
import inspect
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any, Literal, NamedTuple, ParamSpec, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

from adam_jax._hyperparams import expect_one_of
from adam_jax._tree import PyTree, expect_array

P = ParamSpec("P")


class Gate:
    """Whether a step is taken, and the choice between new and old arrays that follows.

    Args:
      takes: a boolean scalar.
    """

    def __init__(self, takes: jax.Array) -> None:
        self.takes = takes
        self._chosen: dict[int, Any] = {}

    def choose(self, new: Any, old: Any) -> Any:
        """The new array or the old. What was chosen before is not chosen again: a TPU would write it twice."""
        if id(new) in self._chosen:
            return new
        if jnp.issubdtype(new.dtype, jnp.floating) and new.dtype.itemsize < 4:
            # Chosen as narrow numbers they would be a second pass over memory.
            chosen = jnp.where(self.takes, new.astype(np.float32), old.astype(np.float32)).astype(new.dtype)
        else:
            chosen = jnp.where(self.takes, new, old)
        self._chosen[id(chosen)] = chosen
        return chosen

    def hold(self, after: PyTree, before: PyTree, updates: PyTree) -> tuple[PyTree, PyTree]:
        """The state after a step that may not be taken, and the updates with it.

        What is in both, a moment that flows on as it rests, is the chosen one in both. Otherwise the next stage would need a
        number that is not stored, and a CPU, which makes a loop of each array, would copy the state to compute it again.
        """
        chosen = jax.tree.map(self.choose, after, before)
        same = {id(new): its for new, its in zip(jax.tree.leaves(after), jax.tree.leaves(chosen), strict=True)}
        return chosen, jax.tree.map(lambda x: same.get(id(x), x), updates)


class Context(NamedTuple):
    """What a stage learns beyond the updates that its neighbour hands it.

    Attributes:
      gradient: the updates as they entered the outermost chain; outside of one, the extra argument `gradient`, if given.
      applied: whether the learning rate is already in the updates; `None` where that cannot be known.
      learning_rate: the rate that was applied last in this chain, a scalar array, or `None`.
      inside: whether a chain of this package is calling. It rounds the final updates itself, so a stage need not.
      extra: the extra arguments of `update`, for stages of others.
      rounded: whether the updates step from one number of the parameters' dtype to another.
      gate: what chooses between the new states of stages and the old, where a guard may skip the step.
      probe: what looks at the values between stages, for `observe`.
      earlier: how many stages of each name stand before this one, in its chain and in those around it.
    """

    gradient: PyTree | None = None
    applied: bool | None = None
    learning_rate: Any = None
    inside: bool = False
    extra: Mapping[str, Any] = {}
    rounded: bool = False
    gate: Gate | None = None
    probe: Any = None
    earlier: Mapping[str, int] = {}

    def stream(self, name: str) -> str:
        """The name of a stage's random bits: its own, and how many stages of that name come before it in the chain.

        Not the position: the same bits serve a stage whether something stands in front of it or not.
        """
        return f"{name} {self.earlier.get(name, 0)}"


class Flow(NamedTuple):
    """What a stage takes and gives, for `chain` to check.

    Attributes:
      takes: "moments", "updates" (a plain tree), or "any".
      gives: "moments", "updates", or "same" as it took.
      rate: "applies" for the stage that multiplies by the learning rate, and turns ascent into descent; "before" or "after"
        for one that is right on that side of it only.
      bias: "corrects" for the stage that divides moments by their weights, "before" for one that still needs the weights.
      end: "rounds" for the stage whose updates must reach the parameters as they are, "reads" for one that leaves them so, and
        may stand behind it.
    """

    takes: Literal["moments", "updates", "any"] = "updates"
    gives: Literal["moments", "updates", "same"] = "updates"
    rate: Literal["applies", "before", "after"] | None = None
    bias: Literal["corrects", "before"] | None = None
    end: Literal["rounds", "reads"] | None = None


Init: TypeAlias = Callable[[PyTree], PyTree]
Update: TypeAlias = Callable[[Any, Any, Any, Context], tuple[Any, Any]]


class Spec:
    """One call that builds a transformation: the function that was called, its arguments, and what came of it.

    Of a wrapper, `inner` is what it wraps: by name where its state has `inner_states`, else its argument `tx`, whose state is its
    `inner_state`.
    """

    def __init__(
        self,
        build: Callable[..., Any],
        arguments: inspect.BoundArguments,
        init: Init,
        update: Update,
        flow: Flow,
        stages: tuple[Any, ...] = (),
        inner: Mapping[str, Any] | None = None,
    ) -> None:
        self.build, self.arguments, self.flow, self.stages = build, arguments, flow, stages
        tx = arguments.arguments.get("tx")
        self.inner = inner or ({"": tx} if is_transformation(tx) else {})
        self.init, self.update = init, update
        self.key: Hashable = stages or (build, _freeze(arguments.arguments))
        self.hash = hash(self.key)

    def __reduce__(self) -> Any:
        return _rebuild, (self.build, self.arguments.args, self.arguments.kwargs)

    def __repr__(self) -> str:
        parameters = self.arguments.signature.parameters
        shown = []
        for name, value in self.arguments.arguments.items():
            kind = parameters[name].kind
            if kind is inspect.Parameter.VAR_POSITIONAL:
                shown += [show(part) for part in value]
                continue
            main_number = isinstance(value, float) and kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
            if main_number or _freeze(value) != _freeze(parameters[name].default):
                shown.append(f"{name}={show(value)}")
        module = self.build.__module__.removeprefix("adam_jax.")
        name = f"{module}.{self.build.__name__}" if module.startswith("presets.") else self.build.__name__
        return f"{name}({', '.join(shown)})"


def _rebuild(build: Callable[..., Transformation], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Spec:
    return build(*args, **kwargs).init.spec


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
            return tuple((name, _freeze(its)) for name, its in value.items())  # in order, which can matter
        leaves, treedef = jax.tree.flatten(value)
        if len(leaves) == 1 and leaves[0] is value:
            return "object", id(value)
        return treedef, tuple(map(_freeze, leaves))
    return value  # type: ignore[no-any-return]


def show(value: Any) -> str:
    if isinstance(value, optax.GradientTransformation) and not isinstance(value, Transformation):
        name = getattr(value.update, "__qualname__", type(value).__name__).split(".")[0]
        return f"<{name} of {value.init.__module__.split('.')[0]}>"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{name!r}: {show(its)}' for name, its in value.items())}}}"
    return getattr(value, "__qualname__", None) or repr(value)


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


def is_transformation(tx: Any) -> bool:
    """Whether it is a pair of `init` and `update`, of this package or of others."""
    return isinstance(tx, tuple) and callable(getattr(tx, "init", None)) and callable(getattr(tx, "update", None))


def expect_transformation(tx: Any, who: str) -> None:
    """Refuses what is no transformation."""
    if not is_transformation(tx):
        raise TypeError(f"{who}: tx: found {tx!r}; expected a gradient transformation, for example adam_jax.adam(1e-3).")


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
        raise TypeError(f"{who}: found {show(tx)}{called}; expected a gradient transformation, such as adam(1e-3).")
    flow = tx.flow if isinstance(tx, Transformation) else Flow()
    if "moments" in (flow.takes, flow.gives):
        raise ValueError(
            f"{who}: found {show(tx)}, which takes or gives Moments; expected a whole optimizer. Put this around the chain."
        )
    return flow


def wrapped(tx: Any, state: Any) -> list[tuple[str, Any, Any]]:
    """What a wrapper of this package wraps: its place in the wrapper's state, the transformation, and its state."""
    inner = tx.init.spec.inner if isinstance(tx, Transformation) else {}
    if hasattr(state, "inner_states"):
        return [(f".inner_states[{name!r}]", part, state.inner_states[name]) for name, part in inner.items()]
    return [(".inner_state", part, state.inner_state) for part in inner.values() if hasattr(state, "inner_state")]


def rewrapped(tx: Any, state: Any, states: list[Any]) -> Any:
    """A wrapper's state with other ones inside, in the order of `wrapped`."""
    if hasattr(state, "inner_states"):
        return state._replace(inner_states=dict(zip(tx.init.spec.inner, states, strict=True)))
    return state._replace(inner_state=states[0])


def bind(build: Callable[..., Any], args: Any, kwargs: Any) -> inspect.BoundArguments:
    arguments = inspect.signature(build).bind(*args, **kwargs)
    arguments.apply_defaults()
    return arguments


def stage(
    takes: Literal["moments", "updates", "any"] = "updates",
    gives: Literal["moments", "updates", "same"] = "same",
    rate: Callable[..., Any] | str | None = None,
    bias: Literal["corrects", "before"] | None = None,
    end: Literal["rounds", "reads"] | None = None,
) -> Callable[[Callable[P, tuple[Init, Update]]], Callable[P, Transformation]]:
    """Makes a function of hyperparameters that returns `init(params)` and `update(updates, state, params, context)` a stage.

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

    Raises:
      ValueError: for an unknown `takes` or `gives`.
    """
    expect_one_of("stage: takes", takes, ("moments", "updates", "any"))
    expect_one_of("stage: gives", gives, ("moments", "updates", "same"))

    def decorate(make: Callable[P, tuple[Init, Update]]) -> Callable[P, Transformation]:
        @functools.wraps(make)
        def build(*args: P.args, **kwargs: P.kwargs) -> Transformation:
            arguments = bind(make, args, kwargs)
            side: Any = rate(**arguments.arguments) if callable(rate) else rate
            spec = Spec(build, arguments, *make(*args, **kwargs), Flow(takes, gives, side, bias, end))
            return transformation(spec)

        return build

    return decorate


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
