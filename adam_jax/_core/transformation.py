"""Transformations as values.

A stage is a function of its hyperparameters, a recipe a function that returns a chain.

A stage is written as a function of its hyperparameters that returns `init` and `update`; the
decorator `stage` makes of it an `optax.GradientTransformationExtraArgs` that prints as the call
that built it, and equals and hashes like any other one built from equal arguments. A recipe is a
function that returns a chain; the decorator `recipe` lets that chain print under the recipe's name.
The identity lives in the two functions of the pair, not in the pair, so it survives whatever takes
the tuple apart and builds it again, as `jax.tree.map` and Equinox's filters do.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AbstractMesh, NamedSharding

from adam_jax._core.apply import apply_updates
from adam_jax._core.context import Context
from adam_jax._core.errors import brief, expect_array, expect_parameters, hint_for, near_argument
from adam_jax._core.identity import expect_one_member, expect_state
from adam_jax._core.interface import Interface
from adam_jax._core.leaves import PyTree, arrays_of, beside, compiled_sharding
from adam_jax._core.lift import expect_gradients
from adam_jax._core.spec import Spec, is_transformation, show, swapped


class _Function:
    """`init` or `update` of a transformation.

    Equal to that of any other transformation built from equal arguments.
    """

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.__name__ = f"{spec.constructor.__name__}_{type(self).__name__.strip('_').lower()}"

    def __eq__(self, other: object) -> bool:
        return (
            type(self) is type(other)
            and isinstance(other, _Function)
            and self.spec.key == other.spec.key
        )

    def __hash__(self) -> int:
        return self.spec.hash

    def __repr__(self) -> str:
        return f"{self.spec!r}.{type(self).__name__.strip('_').lower()}"


@contextlib.contextmanager
def _of_arrays(caller: str, *trees: PyTree) -> Iterator[None]:
    """Says which leaf it was, where something else than arrays has led to an error."""
    try:
        yield
    except TypeError:
        for tree in trees:
            for keys, leaf in jax.tree_util.tree_leaves_with_path(tree):
                expect_array(leaf, f"{caller}: at {jax.tree_util.keystr(keys)}")
        raise


class _Init(_Function):
    def __call__(self, params: PyTree) -> PyTree:
        expect_parameters(params, f"{self.spec.constructor.__name__}: init")
        params = arrays_of(params)
        with _of_arrays(f"{self.spec.constructor.__name__}: init", params):
            return _replicated_beside(params, self.spec.init(params))


def _replicated_beside(params: PyTree, state: PyTree) -> PyTree:
    """Returns a state whose counts and scalars are on all devices of the parameters.

    They are made on the first device. There, a step moves them as it is compiled, and is compiled
    once more for the state that it returned; a checkpoint restores them to one device, where they
    do not go with the parameters.
    """
    leaves = jax.tree.leaves((params, state))
    if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
        return state
    shardings = [getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(params)]
    meshes = {its.mesh for its in shardings if isinstance(its, NamedSharding)}
    if len(meshes) != 1 or isinstance(mesh := meshes.pop(), AbstractMesh):
        return state

    def leaf(x: Any) -> Any:
        if not isinstance(x, jax.Array) or getattr(x, "_committed", True):
            return x
        # Each process has the same number: `jax.device_put` would ask all others whether it is so.
        number, everywhere = np.asarray(x), compiled_sharding(mesh, [None] * x.ndim)
        return jax.make_array_from_callback(x.shape, everywhere, lambda i: np.asarray(number[i]))

    return jax.tree.map(leaf, state)


_OWN_ARGUMENTS = ("updates", "state", "params", "gradient")


class _Update(_Function):
    def __call__(
        self, updates: Any, state: Any, params: PyTree | None = None, **extra: Any
    ) -> tuple[Any, Any]:
        return self.run(updates, state, params, extra, wide=False)

    def run(
        self, updates: Any, state: Any, params: Any, extra: dict[str, Any], wide: bool
    ) -> tuple[Any, Any]:
        """Checks what `update` was called with, and computes it; `wide`: see `Context`."""
        for name in extra:
            # Any other name may be meant for a transformation of others, as `grad` is.
            near = near_argument(name, _OWN_ARGUMENTS, 0.8)
            if near and near != name:
                raise TypeError(
                    f"{self.spec.constructor.__name__}: update: found the argument {name!r}; "
                    f"did you mean {near}? Call update(grads, state, params)."
                )
        expect_state(self.spec, state, f"{self.spec.constructor.__name__}: update")
        expect_one_member(self.spec, state, f"{self.spec.constructor.__name__}: update")
        state = _of_jax(state)
        params = beside(updates, params)
        expect_gradients(updates, params, f"{self.spec.constructor.__name__}: update")
        with _of_arrays(f"{self.spec.constructor.__name__}: update", updates, params):
            context = Context(gradient=extra.get("gradient"), extra=extra, wide=wide)
            return self.spec.update(updates, state, params, context)


def _of_jax(state: Any) -> Any:
    """Returns a state of arrays of JAX, where it came back from a file as arrays of NumPy."""
    return jax.tree.map(lambda x: jnp.asarray(x) if isinstance(x, np.ndarray) else x, state)


def transformation(spec: Spec) -> Transformation:
    """The pair of functions that `spec` describes."""
    return Transformation(_Init(spec), _Update(spec))


class Transformation(optax.GradientTransformationExtraArgs):
    """An `optax.GradientTransformationExtraArgs` that is a value.

    `repr` is the call that builds it; equal arguments make equal, equally hashing transformations.
    Two chains of equal stages are equal whatever name they print under, so `adam(1e-3)` equals the
    chain it stands for.
    """

    __slots__ = ()
    init: _Init
    update: _Update

    def step(
        self, grads: PyTree, state: PyTree, params: PyTree, **extra: Any
    ) -> tuple[PyTree, PyTree]:
        """Takes a whole step: `update`, and the sum of its updates and the parameters.

            params, state = tx.step(grads, state, params)

        The sum is formed in float32, or wider where a gradient or a parameter is, and is rounded
        once to the parameter's dtype, by the nearest number or by the stage that rounds at the
        chain's end. For float32 parameters, and behind a stage that rounds, `update` and
        `apply_updates` give the same bits. For other parameters in 16 bits they round twice: the
        update, to the wider of its gradient's and its parameter's dtype, and the sum.

        It can be jitted, scanned, mapped over and differentiated as `update` can. Donate parameters
        and state in the order in which they are returned:

            step = jax.jit(lambda params, state, grads: tx.step(grads, state, params),
                           donate_argnums=(0, 1))

        JAX gives each result the first donated array of its shape. In another order, each moment
        would be put where another array was, and XLA would copy all of them.

        Args:
          grads: as for `update`, of any dtype.
          state: what `init`, `update` or `step` returned.
          params: the parameters, in their own dtypes. Those without an update stay: integers, and
            leaves of an Equinox module that are not arrays.
          **extra: as for `update`; transformations of others get them.

        Returns:
          The new parameters, of the structure, shapes and dtypes of `params`, and the new state.

        Raises:
          TypeError, ValueError: as `update`; without parameters; and if this is a part of an
            optimizer that gives `Moments`.
        """
        caller = f"{self.init.spec.constructor.__name__}: step"
        if params is None:
            raise ValueError(f"{caller}: found no parameters; call step(grads, state, params).")
        if self.interface.gives == "moments":
            raise ValueError(
                f"{caller}: found stages that give Moments; expected a whole optimizer, which ends "
                "with scale_by_learning_rate(...)."
            )
        updates, state = self.update.run(grads, state, params, extra, wide=True)
        return apply_updates(params, updates), state

    @property
    def stages(self) -> tuple[Any, ...]:
        """The parts of a chain, in order; a single stage is its own only part."""
        return self.init.spec.stages or (self,)

    @property
    def interface(self) -> Interface:
        """What it takes and what it gives."""
        return self.init.spec.interface

    def __repr__(self) -> str:
        return repr(self.init.spec)


def expect_transformation(tx: Any, caller: str) -> None:
    """Refuses what is no transformation."""
    if not is_transformation(tx):
        raise TypeError(
            f"{caller}: tx: found {brief(tx)}{hint_for(tx)}; expected a gradient transformation, "
            f"for example adam_jax.adam(1e-3).{swapped(tx, caller)}"
        )


def abstract_state(tx: Any, params: PyTree, caller: str) -> PyTree:
    """The shapes of a fresh state.

    Raises:
      TypeError: for what is no transformation, and parameters that are no arrays.
    """
    expect_transformation(tx, caller)
    expect_parameters(params, caller)
    for keys, leaf in jax.tree_util.tree_leaves_with_path(params):
        expect_array(leaf, f"{caller}: params at {jax.tree_util.keystr(keys)}")
    return jax.eval_shape(tx.init, params)


def hides_rate(tx: Any) -> bool:
    """Whether a transformation of others is in it, which may apply a learning rate unseen."""
    if not isinstance(tx, Transformation):
        return True
    return any(map(hides_rate, (*tx.init.spec.stages, *tx.init.spec.inner.values())))


def call_update(
    tx: Any, updates: Any, state: Any, params: Any, context: Context
) -> tuple[Any, Any]:
    """`update` of a part: one of this package learns the context.

    Others get the extra arguments.
    """
    if isinstance(tx, Transformation):
        return tx.update.spec.update(updates, state, params, context)
    made: tuple[Any, Any] = tx.update(updates, state, params, **context.extra)
    return made


def expect_optimizer(tx: Any, caller: str) -> Interface:
    """The flow of what is to be wrapped, if it is a whole optimizer."""
    if not is_transformation(tx):
        raise TypeError(
            f"{caller}: found {brief(tx)}{hint_for(tx)}; expected a gradient transformation, such "
            "as adam(1e-3)."
        )
    interface = tx.interface if isinstance(tx, Transformation) else Interface()
    if "moments" in (interface.takes, interface.gives):
        raise ValueError(
            f"{caller}: found {show(tx)}, which takes or gives Moments; expected a whole "
            "optimizer. Put this around the chain."
        )
    return interface
