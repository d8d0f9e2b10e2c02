"""Keras 3's optimizers (`keras.optimizers`).

Ε̂ of the paper's efficient form, decoupled decay, clipping built in.

    g ← g·clipnorm / max(‖g‖, clipnorm)   of each leaf; global_clipnorm: of all together
    g ← clip(g, −clipvalue, clipvalue)                                  at most one of the three
    params ← params − learning_rate·weight_decay·params   where weight_decay is not None

Decay and clipping are the same in all of them. Not here: `use_ema` (`average_parameters` is it with
its bias corrected), loss scaling, gradient accumulation (`optax.MultiSteps`), and Lamb's
`weight_decay`, which Keras subtracts before it takes the trust ratio.
"""

from __future__ import annotations

from adam_jax import family
from adam_jax._core.chain import chain
from adam_jax._core.decorators import recipe
from adam_jax._core.hyperparams import ScalarOrSchedule as Number
from adam_jax._core.transformation import Transformation
from adam_jax.presets._parts import (
    accumulates,
    adam_direction,
    adamax_direction,
    clips,
    decays,
    decays_by_rate,
    is_zero,
    nadam_direction,
)
from adam_jax.stages.learning_rate import scale_by_learning_rate
from adam_jax.storage.formats import Storage

__all__ = ["adam", "adamw", "adamax", "nadam", "rmsprop", "lamb", "sgd"]


# fmt: off


@recipe(rate="learning_rate")
def adam(
    learning_rate: Number = 0.001, beta_1: Number = 0.9, beta_2: Number = 0.999, epsilon: Number =
    1e-7, amsgrad: bool = False, weight_decay: Number | None = None, clipnorm: Number | None = None,
    clipvalue: Number | None = None, global_clipnorm: Number | None = None, *, storage: Storage =
    "float32"
) -> Transformation:
    """`keras.optimizers.Adam`.

        params ← params − learning_rate·√(1 − beta_2ᵗ)·mu_hat / (√nu + epsilon)

    With `amsgrad`, nu is its own maximum.

    Source: Keras 3.15, `keras/src/optimizers/adam.py`.
    """
    return chain(
        *clips(clipnorm, clipvalue, global_clipnorm),
        *adam_direction(beta_1, beta_2, epsilon, amsgrad, storage, correct_last=True),
        *decays(weight_decay),
        scale_by_learning_rate(learning_rate),
    )


@recipe(rate="learning_rate")
def adamw(
    learning_rate: Number = 0.001, weight_decay: Number = 0.004, beta_1: Number = 0.9, beta_2:
    Number = 0.999, epsilon: Number = 1e-7, amsgrad: bool = False, clipnorm: Number | None = None,
    clipvalue: Number | None = None, global_clipnorm: Number | None = None, *, storage: Storage =
    "float32"
) -> Transformation:
    """`keras.optimizers.AdamW`: its Adam with another default, `weight_decay` second.

    Source: Keras 3.15, `keras/src/optimizers/adamw.py`.
    """
    return adam(
        learning_rate, beta_1, beta_2, epsilon, amsgrad, weight_decay, clipnorm, clipvalue,
        global_clipnorm, storage=storage
    )


@recipe(rate="learning_rate")
def adamax(
    learning_rate: Number = 0.001, beta_1: Number = 0.9, beta_2: Number = 0.999, epsilon: Number =
    1e-7, weight_decay: Number | None = None, clipnorm: Number | None = None, clipvalue: Number |
    None = None, global_clipnorm: Number | None = None, *, storage: Storage = "float32"
) -> Transformation:
    """`keras.optimizers.Adamax`.

        nu ← max(beta_2·nu, |g|)
        params ← params − learning_rate·mu_hat / (nu + epsilon)

    Source: Keras 3.15, `keras/src/optimizers/adamax.py`.
    """
    return chain(
        *clips(clipnorm, clipvalue, global_clipnorm),
        *adamax_direction(beta_1, beta_2, epsilon, storage),
        *decays(weight_decay),
        scale_by_learning_rate(learning_rate),
    )


@recipe(rate="learning_rate")
def nadam(
    learning_rate: Number = 0.001, beta_1: Number = 0.9, beta_2: Number = 0.999, epsilon: Number =
    1e-7, weight_decay: Number | None = None, clipnorm: Number | None = None, clipvalue: Number |
    None = None, global_clipnorm: Number | None = None, *, storage: Storage = "float32"
) -> Transformation:
    """`keras.optimizers.Nadam`.

    It is `torch.nadam` with a momentum that warms up 250 times as fast, and with ε as in Algorithm
    1.

        mₜ = beta_1·(1 − ½·0.96ᵗ)
        params ← params − learning_rate·mu_hat / (√nu_hat + epsilon)

    Source: Keras 3.15, `keras/src/optimizers/nadam.py`.
    """
    return chain(
        *clips(clipnorm, clipvalue, global_clipnorm),
        *nadam_direction(beta_1, beta_2, epsilon, 1.0, storage),
        *decays(weight_decay),
        scale_by_learning_rate(learning_rate),
    )


@recipe(rate="learning_rate")
def rmsprop(
    learning_rate: Number = 0.001, rho: Number = 0.9, momentum: Number = 0.0, epsilon: Number =
    1e-7, centered: bool = False, weight_decay: Number | None = None, clipnorm: Number | None =
    None, clipvalue: Number | None = None, global_clipnorm: Number | None = None, *, storage:
    Storage = "float32"
) -> Transformation:
    """`keras.optimizers.RMSprop`: ε inside the root; momentum gathers steps.

        buffer ← momentum·buffer + learning_rate·g / √(nu + epsilon)  centered: nu − mean(g)² for nu
        params ← params − buffer

    Source: Keras 3.15, `keras/src/optimizers/rmsprop.py`.
    """
    steps = family.rmsprop(
        learning_rate, rho, epsilon, centered=centered,
        momentum=None if is_zero(momentum) else momentum, storage=storage
    ).stages
    clipped = clips(clipnorm, clipvalue, global_clipnorm)
    return chain(*clipped, *steps, *decays_by_rate(learning_rate, weight_decay))


@recipe(rate="learning_rate")
def lamb(
    learning_rate: Number = 0.001, beta_1: Number = 0.9, beta_2: Number = 0.999, epsilon: Number =
    1e-7, *, clipnorm: Number | None = None, clipvalue: Number | None = None, global_clipnorm:
    Number | None = None, storage: Storage = "float32"
) -> Transformation:
    """`keras.optimizers.Lamb` without `weight_decay`.

    What follows that argument there is keyword-only here.

        r = mu_hat / (√nu_hat + epsilon)
        params ← params − learning_rate·r·‖params‖/‖r‖

    Source: Keras 3.15, `keras/src/optimizers/lamb.py`.
    """
    steps = family.lamb(learning_rate, beta_1, beta_2, epsilon, storage=storage).stages
    return chain(*clips(clipnorm, clipvalue, global_clipnorm), *steps)


@recipe(rate="learning_rate")
def sgd(
    learning_rate: Number = 0.01, momentum: Number = 0.0, nesterov: bool = False, weight_decay:
    Number | None = None, clipnorm: Number | None = None, clipvalue: Number | None = None,
    global_clipnorm: Number | None = None, *, storage: Storage = "float32"
) -> Transformation:
    """`keras.optimizers.SGD`: momentum gathers steps.

        buffer ← momentum·buffer + learning_rate·g
        params ← params − buffer                    nesterov: momentum·buffer + learning_rate·g

    Source: Keras 3.15, `keras/src/optimizers/sgd.py`.
    """
    return chain(
        *clips(clipnorm, clipvalue, global_clipnorm),
        scale_by_learning_rate(learning_rate),
        *accumulates(momentum, storage, nesterov),
        *decays_by_rate(learning_rate, weight_decay),
    )
