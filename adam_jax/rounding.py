"""How a parameter of 16 bits receives an update that is smaller than its last bit.

`params + update` in bfloat16 loses every update below half of the parameter's last bit, 1/512 of
it, and a network stops learning long before it has learnt. The two links below come last in a
chain. They round the new parameter themselves, and emit its difference from the old one in float32:
the sum that `optax.apply_updates`, Flax's `TrainState` and `nnx.Optimizer` then form is exact, and
is the rounded parameter. Both numbers have 8 bits, so unless one is 2¹⁶ times the other their
difference fits the 24 of a float32; past that, where a parameter falls to next to nothing at once,
it is off by at most 2⁻²⁴ of what it was.

The caller has to give the sum the parameter's dtype again, as all of these and `apply_updates` of
this package do. A plain `params + update` and `eqx.apply_updates` leave it in float32. No update in
bfloat16 would do instead: where the parameter more than halves or changes its sign, no bfloat16
number is near enough to the difference.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from adam_jax._core.context import Context
from adam_jax._core.decorators import stage
from adam_jax._core.errors import expect_params
from adam_jax._core.hyperparams import increment
from adam_jax._core.layers import is_part
from adam_jax._core.leaves import PyTree, as_wide, dtype_of, full_beside, is_half, takes_part
from adam_jax._core.lift import lift
from adam_jax._core.paths import names
from adam_jax._core.spec import Definition, Init, Update
from adam_jax.storage.codec import HALF, bits_of, float_of, small_float, to_float, undifferentiable
from adam_jax.storage.random_bits import StepBits, as_seed


class RoundStochasticallyState(NamedTuple):
    """State of `round_stochastically`.

    Attributes:
      step: steps taken, int32, of which the random bits are made.
    """

    step: Array

    @property
    def rounds(self) -> bool:
        """For a chain that does not see the stage, but its state."""
        return True


@stage(
    takes="updates",
    gives="updates",
    rate="after",
    end="rounds",
    canonical={"seed": functools.partial(as_seed, "round_stochastically: seed")},
)
def round_stochastically(seed: int = 0) -> tuple[Init, Update]:
    """Rounds the new parameter up as often as keeps its mean right.

    Comes last, and keeps nothing but a count.

        params + update = round(params + update)
        up with probability (params + update − below)/(above − below)

    For bfloat16 and float16 leaves; others pass untouched, and trees may mix them. A finite sum
    saturates at the largest finite number. The random bits are a function of the seed, the step,
    the leaf's path and the position in the whole array, so they are the same however the array is
    sharded. They have nothing in common with those that round moments, whatever the seeds.

    Args:
      seed: of the random bits: an integer from 0 to 2³² − 1, or a traced integer scalar, such as
        the number of a member under `jax.vmap`.

    Raises:
      TypeError: if `seed` is no integer.
      ValueError: in `update`, without `params`, or where a derivative is taken through it, because
        rounding has none; in `chain`, where a stage follows that could change the updates.

    Source: Zamirai et al., "Revisiting BFloat16 Training" (2020), §4.
    """

    def init(params: PyTree) -> RoundStochasticallyState:
        _expect_something_to_round(params, "round_stochastically()")
        return RoundStochasticallyState(jnp.zeros((), jnp.int32))

    def update(
        updates: Any, state: Any, params: Any, context: Context
    ) -> tuple[PyTree, RoundStochasticallyState]:
        params = expect_params(params, "round_stochastically()")
        _expect_something_to_round(params, "round_stochastically()", CAST_BACK)
        low, narrow, rest = _rounded_and_rest(updates, params, "round_stochastically")
        bits = StepBits(context.stream("round_stochastically"), state.step)
        paths = iter(names(low))

        def leaf(update: Any, param: Array) -> Any:
            old = as_wide(param)
            new = old + as_wide(update).astype(old.dtype)
            random = bits.of(next(paths), new.shape, seed)
            return _step(old, new, as_wide(to_float(new, param.dtype, random)))

        moved = lift(leaf, low, params=narrow)
        return _merged(moved, rest), RoundStochasticallyState(increment(state.step))

    return init, update


class CompensateState(NamedTuple):
    """State of `compensate`.

    Attributes:
      lost: what the parameters' dtype could not hold, in units of float32's last bit: int16, `None`
        for leaves that lose nothing.
    """

    lost: PyTree

    @property
    def rounds(self) -> bool:
        """For a chain that does not see the stage, but its state."""
        return True


@stage(takes="updates", gives="updates", rate="after", end="rounds")
def compensate() -> Definition:
    """Keeps the bits that the parameters lose, and adds them to the next update. Comes last.

        exact = (params, lost) read as one float32, + update
        params + update, lost = nearest(exact), the other bits of exact

    A bfloat16 parameter and the 16 bits that are kept beside it are a float32: the parameters move
    as float32 ones do, to the last bit, for the same 4 bytes, and gradients are taken at bfloat16
    ones. Kahan's summation keeps a number of the parameters' dtype instead, which for the same
    memory loses what is smaller than 2⁻¹⁷ of the parameter. A float16 parameter keeps its other 13
    bits as well, but more is lost below 6e-5, where it has fewer.

    For bfloat16 and float16 leaves; others pass untouched and keep nothing.

    Raises:
      ValueError: in `update`, without `params`, or where a derivative is taken through it, because
        rounding has none; in `chain`, where a stage follows that could change the updates.

    Source: Zamirai et al. (2020), §4, for the place of the summation; Kahan, "Further remarks on
    reducing truncation errors" (1965).
    """

    def init(params: PyTree) -> CompensateState:
        _expect_something_to_round(params, "compensate()")
        return CompensateState(
            jax.tree.map(lambda p: full_beside(p, 0, np.int16), _split(params, params)[0])
        )

    def update(
        updates: Any, state: CompensateState, params: Any, context: Context
    ) -> tuple[PyTree, CompensateState]:
        params = expect_params(params, "compensate()")

        def leaf(update: Any, param: Array, lost: Array) -> tuple[Any, Array]:
            old = as_wide(param)
            new = float_of(bits_of(old) + lost.astype(np.int32)) + as_wide(update).astype(old.dtype)
            rounded = as_wide(to_float(new, param.dtype, HALF))
            left = small_float(
                jnp.clip(bits_of(new) - bits_of(rounded), -(2**15), 2**15 - 1) + 2**15
            ) - np.float32(2**15)
            return _step(old, new, rounded), left.astype(np.int16)

        low, narrow, rest = _rounded_and_rest(updates, params, "compensate")
        _expect_dtypes_of_init(state.lost, narrow, params)
        moved, lost = lift(leaf, low, outputs=2, params=narrow, lost=state.lost)
        return _merged(moved, rest), CompensateState(lost)

    return Definition(init, update, trees={"lost": "rounding"}, counter=None)


CAST_BACK = (
    "If they had 16 bits when the state was made, the sum was not cast back, as by "
    "eqx.apply_updates or params + updates: call adam_jax.apply_updates(params, updates)."
)


def _expect_something_to_round(params: PyTree, caller: str, cause: str = "") -> None:
    """Warns where no parameter has 16 bits.

    Of parameters it is no error: generic code puts the stage behind every optimizer. `init` warns
    of arrays alone, because `describe`, `state_bytes` and others trace it to ask for shapes. A part
    of a tree, as a group of `by_path` sees it, may be in float32 on purpose.
    """
    leaves = [leaf for leaf in jax.tree.leaves(params) if takes_part(leaf)]
    asks_for_shapes = not cause and any(isinstance(leaf, jax.core.Tracer) for leaf in leaves)
    if not leaves or any(map(is_half, leaves)) or asks_for_shapes or is_part(params):
        return
    found = sorted({str(dtype_of(leaf)) for leaf in leaves})
    warnings.warn(
        f"{caller} rounds nothing: found parameters of {', '.join(found)}; expected some of "
        f"bfloat16 or float16. {cause or 'Convert the parameters, or leave it out.'} To silence "
        f'this: warnings.filterwarnings("ignore", r".*rounds nothing").',
        stacklevel=2,
    )


def _expect_dtypes_of_init(lost: PyTree, narrow: PyTree, params: PyTree) -> None:
    """Refuses parameters that have 16 bits where they had not in `init`, or the other way round.

    Raises:
      ValueError: with the path of the first one, its dtype, and what to call.
    """
    kept, now = set(names(lost)), set(names(narrow))
    dtypes = dict(zip(names(params), map(dtype_of, jax.tree.leaves(params)), strict=True))
    changed = [path for path in dtypes if path in kept ^ now]
    if not changed or not (kept | now) <= dtypes.keys():
        return  # nothing, or another tree: `lift` says in what it differs
    path, widened = changed[0], changed[0] in kept
    before, remedy = (
        (
            "bfloat16 or float16",
            "The sum was not cast back, as by eqx.apply_updates or params + updates: call "
            "adam_jax.apply_updates(params, updates).",
        )
        if widened
        else (
            "another dtype",
            "For parameters in another dtype carry the state over with convert_state(state, tx, "
            "tx, params), or call `init` again.",
        )
    )
    raise ValueError(
        f"compensate(): at {path!r} found a parameter of {dtypes[path]}; expected {before}, which "
        f"it had when the state was made. {remedy}"
    )


def _split(tree: PyTree, params: PyTree) -> tuple[PyTree, PyTree]:
    """The leaves whose parameters have 16 bits, and the others.

    `None` in place of those that are not there.
    """
    narrow = lift(lambda x, p: is_half(p), tree, params=params)
    low = jax.tree.map(lambda x, is_low: x if is_low is True else None, tree, narrow)
    return low, jax.tree.map(lambda x, is_low: None if is_low is True else x, tree, narrow)


def _rounded_and_rest(
    updates: PyTree, params: PyTree, caller: str
) -> tuple[PyTree, PyTree, PyTree]:
    """Returns the updates and the parameters of the leaves that are rounded.

    It also returns the updates of the others.
    """
    low, rest = _split(updates, params)
    message = (
        f"{caller}: found a derivative that is taken through the parameters as they are rounded; "
        "expected none: rounding has no derivative. To differentiate through steps of the "
        f"optimizer, leave out {caller}() and use float32 parameters."
    )
    low, narrow = undifferentiable((low, _split(params, params)[0]), message)
    return low, narrow, rest


def _merged(low: PyTree, rest: PyTree) -> PyTree:
    return jax.tree.map(
        lambda x, other: other if x is None else x, low, rest, is_leaf=lambda x: x is None
    )


def _step(old: Array, new: Array, rounded: Array) -> Any:
    """Returns what has to be added to `old` for `rounded`, or what of it is finite.

    If the sum is not finite, it returns the sum.
    """
    largest = np.finfo(np.float32).max
    difference = -(old - rounded)  # −0 where they are equal, which leaves a −0 what it is
    return jnp.where(jnp.isfinite(new), lax.clamp(-largest, difference, largest), new)
