"""Optax's optimizers: members of the family, whose arguments and defaults are Optax's, and `sgd`.

`nadam` and `nadamw` look ahead always, without Optax's argument `nesterov`. Not here: Optax's
`yogi`, whose μ starts at 1e-6; that of `adam_jax.yogi` starts at 0, as in the paper.
"""

from __future__ import annotations

from typing import Any

from adam_jax import family
from adam_jax._core.chain import chain
from adam_jax._core.decorators import recipe
from adam_jax._core.hyperparams import ScalarOrSchedule as Number
from adam_jax._core.transformation import Transformation
from adam_jax.family import (
    adabelief,
    adam,
    adamax,
    adamaxw,
    adamw,
    ademamix,
    adopt,
    amsgrad,
    lamb,
    nadam,
    nadamw,
    radam,
    rmsprop,
)
from adam_jax.stages.learning_rate import scale_by_learning_rate
from adam_jax.storage.formats import Storage

__all__ = [
    "adabelief",
    "adam",
    "adamax",
    "adamaxw",
    "adamw",
    "ademamix",
    "adopt",
    "amsgrad",
    "lamb",
    "nadam",
    "nadamw",
    "radam",
    "rmsprop",
    "sgd",
]


@recipe(rate="learning_rate")
def sgd(
    learning_rate: Number,
    momentum: Number | None = None,
    nesterov: bool = False,
    accumulator_dtype: Any = None,
    *,
    storage: Storage = "float32",
) -> Transformation:
    """`optax.sgd`: momentum gathers gradients, and `None` gathers none.

        buffer ← momentum·buffer + g
        params ← params − learning_rate·buffer      nesterov: learning_rate·(g + momentum·buffer)

    Source: Optax 0.2.8, `optax/_src/alias.py`.
    """
    if momentum is None:
        return chain(scale_by_learning_rate(learning_rate))
    return family.momentum(learning_rate, momentum, nesterov, accumulator_dtype, storage=storage)
