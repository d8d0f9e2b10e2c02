"""PyTorch's optimizers (`torch.optim`).

Ε as in Algorithm 1, and `weight_decay` in the gradient except where its name says not.

`maximize` negates the gradient as it comes in. (`cautious()` behind it judges by the one before
that; negate in front instead.) Complex leaves are refused but by `sgd`, whose steps are linear:
PyTorch gives each of their parts a ν. Not here: SGD's `dampening`, whose mean starts at the first
gradient, and what chooses how to compute and not what.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from adam_jax import family
from adam_jax._core.chain import chain
from adam_jax._core.context import Context
from adam_jax._core.decorators import recipe, stage, stateless
from adam_jax._core.hyperparams import ScalarOrSchedule as Number
from adam_jax._core.leaves import PyTree, as_wide, dtype_of
from adam_jax._core.lift import lift
from adam_jax._core.paths import path_of
from adam_jax._core.spec import Init, Update
from adam_jax._core.transformation import Transformation
from adam_jax.presets._parts import (
    Stages,
    accumulates,
    adam_direction,
    decays,
    is_zero,
    nadam_direction,
)
from adam_jax.stages.bias import correct_bias, rectify
from adam_jax.stages.learning_rate import scale_by_learning_rate
from adam_jax.stages.scale import scale_by_moments
from adam_jax.stages.track import track_moments
from adam_jax.storage.formats import Storage

__all__ = ["adam", "adamw", "adamax", "nadam", "radam", "rmsprop", "sgd"]

Betas = tuple[Number, Number]


@stage(takes="updates", gives="updates", rate="before")
def negate() -> tuple[Init, Update]:
    """What goes uphill goes downhill."""

    def update(updates: Any, state: Any, params: Any, context: Context) -> tuple[PyTree, Any]:
        return lift(lambda update: -as_wide(update), updates), state

    return stateless, update


@stage(takes="updates", gives="same")
def expect_real() -> tuple[Init, Update]:
    """Refuses complex leaves, of which PyTorch gives the real and the imaginary part a ν each.

    Ours have one ν, the mean of |g|², so a step would be another one than PyTorch's.
    """

    def check(tree: Any) -> None:
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            if jnp.issubdtype(dtype_of(leaf), jnp.complexfloating):
                raise TypeError(
                    f"presets.torch: found {dtype_of(leaf)} at {path_of(path) or 'the only leaf'}; "
                    "expected real leaves, because PyTorch gives each part of a complex number its "
                    "own ν. Keep the parts as a real leaf of shape (…, 2), as torch.view_as_real "
                    "makes it, and use lax.complex(w[..., 0], w[..., 1]) in the model; "
                    "migrate.as_real() moves it. Or take adam_jax.adam, which has one ν for both."
                )

    def init(params: PyTree) -> Any:
        check(params)
        return stateless(params)

    def update(updates: Any, state: Any, params: Any, context: Context) -> tuple[PyTree, Any]:
        check(updates)
        return updates, state

    return init, update


def _pair(betas: Any) -> Betas:
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise ValueError(
            f"betas: found {betas!r}; expected a pair, as in betas=(0.9, 0.999). Parameters are no "
            "argument: `init` takes them."
        )
    return betas[0], betas[1]


def _chain(
    direction: Stages,
    lr: Number,
    weight_decay: Number,
    decoupled: bool,
    maximize: bool,
    linear: bool = False,
) -> Transformation:
    before, after = ((), decays(weight_decay)) if decoupled else (decays(weight_decay), ())
    return chain(
        *((negate(),) if maximize else ()),
        *before,
        *direction,
        *after,
        scale_by_learning_rate(lr),
        *(() if linear else (expect_real(),)),  # last, so that places in the state stay
    )


# fmt: off


@recipe(rate="lr")
def adam(
    lr: Number = 1e-3, betas: Betas = (0.9, 0.999), eps: Number = 1e-8, weight_decay: Number = 0.0,
    amsgrad: bool = False, *, maximize: bool = False, decoupled_weight_decay: bool = False, storage:
    Storage = "float32"
) -> Transformation:
    """`torch.optim.Adam`.

        g ← g + weight_decay·params
        params ← params − lr·mu_hat / (√nu_hat + eps)

    With `amsgrad`, nu_hat is the maximum of the raw nu, corrected by the present weight.

    Source: PyTorch 2.13, `torch/optim/adam.py`.
    """
    direction = adam_direction(*_pair(betas), eps, amsgrad, storage, correct_last=False)
    return _chain(direction, lr, weight_decay, decoupled_weight_decay, maximize)


@recipe(rate="lr")
def adamw(
    lr: Number = 1e-3, betas: Betas = (0.9, 0.999), eps: Number = 1e-8, weight_decay: Number = 1e-2,
    amsgrad: bool = False, *, maximize: bool = False, storage: Storage = "float32"
) -> Transformation:
    """`torch.optim.AdamW`.

        params ← params − lr·(mu_hat / (√nu_hat + eps) + weight_decay·params)

    Source: PyTorch 2.13, `torch/optim/adamw.py`.
    """
    return adam(
        lr, betas, eps, weight_decay, amsgrad, maximize=maximize, decoupled_weight_decay=True,
        storage=storage,
    )


@recipe(rate="lr")
def adamax(
    lr: Number = 2e-3, betas: Betas = (0.9, 0.999), eps: Number = 1e-8, weight_decay: Number = 0.0,
    *, maximize: bool = False, storage: Storage = "float32"
) -> Transformation:
    """`torch.optim.Adamax`.

        g ← g + weight_decay·params
        nu ← max(b2·nu, |g| + eps)
        params ← params − lr·mu_hat / nu

    Source: PyTorch 2.13, `torch/optim/adamax.py`.
    """
    *direction, _ = family.adamax(lr, *_pair(betas), eps, storage=storage).stages
    return _chain(tuple(direction), lr, weight_decay, False, maximize)


@recipe(rate="lr")
def nadam(
    lr: Number = 2e-3, betas: Betas = (0.9, 0.999), eps: Number = 1e-8, weight_decay: Number = 0.0,
    momentum_decay: Number = 4e-3, decoupled_weight_decay: bool = False, *,
    maximize: bool = False, storage: Storage = "float32"
) -> Transformation:
    """`torch.optim.NAdam`: averages with b1, looks ahead with m.

        g ← g + weight_decay·params
        mₜ = b1·(1 − ½·0.96^(t·momentum_decay))
        mu_hat = mₜ₊₁·mu / (1 − ∏mᵢ₊₁) + (1 − mₜ)·g / (1 − ∏mᵢ)     products over i = 1 … t
        params ← params − lr·mu_hat / (√nu_hat + eps)

    Source: PyTorch 2.13, `torch/optim/nadam.py`.
    """
    direction = nadam_direction(*_pair(betas), eps, momentum_decay, storage)
    return _chain(direction, lr, weight_decay, decoupled_weight_decay, maximize)


@recipe(rate="lr")
def radam(
    lr: Number = 1e-3, betas: Betas = (0.9, 0.999), eps: Number = 1e-8, weight_decay: Number = 0.0,
    decoupled_weight_decay: bool = False, *, maximize: bool = False, storage: Storage = "float32"
) -> Transformation:
    """`torch.optim.RAdam`: the one of PyTorch's that adds ε to the uncorrected root.

        g ← g + weight_decay·params
        params ← params − lr·r·mu_hat·√(1 − b2ᵗ) / (√nu + eps)          if rho > 5, else − lr·mu_hat

    Source: PyTorch 2.13, `torch/optim/radam.py`.
    """
    direction = (
        track_moments(*_pair(betas), storage=storage),
        rectify(5.0),
        correct_bias(nu=False),
        scale_by_moments(eps, correct_last=True),
    )
    return _chain(direction, lr, weight_decay, decoupled_weight_decay, maximize)


@recipe(rate="lr")
def rmsprop(
    lr: Number = 1e-2, alpha: Number = 0.99, eps: Number = 1e-8, weight_decay: Number = 0.0,
    momentum: Number = 0.0, centered: bool = False, *, maximize: bool = False, storage: Storage =
    "float32"
) -> Transformation:
    """`torch.optim.RMSprop`: momentum gathers directions.

    The learning rate of the day multiplies their sum.

        g ← g + weight_decay·params
        buffer ← momentum·buffer + g / (√nu + eps)         centered: nu − mean(g)² for nu
        params ← params − lr·buffer

    Source: PyTorch 2.13, `torch/optim/rmsprop.py`.
    """
    whole = family.rmsprop(lr, alpha, eps, eps_in_sqrt=False, centered=centered, storage=storage)
    *direction, _ = whole.stages
    return _chain((*direction, *accumulates(momentum, storage)), lr, weight_decay, False, maximize)


@recipe(rate="lr")
def sgd(
    lr: Number = 1e-3, momentum: Number = 0.0, *, weight_decay: Number = 0.0, nesterov: bool =
    False, maximize: bool = False, storage: Storage = "float32"
) -> Transformation:
    """`torch.optim.SGD` without `dampening`; what follows that argument there is keyword-only here.

        g ← g + weight_decay·params
        buffer ← momentum·buffer + g
        params ← params − lr·buffer                 nesterov: lr·(g + momentum·buffer)

    Raises:
      ValueError: for `nesterov` without momentum, as there.

    Source: PyTorch 2.13, `torch/optim/sgd.py`.
    """
    if nesterov and is_zero(momentum):
        raise ValueError(f"sgd: found nesterov=True with momentum={momentum!r}; expected a "
                         "momentum above 0 to look ahead by.")
    direction = accumulates(momentum, storage, nesterov)
    return _chain(direction, lr, weight_decay, False, maximize, linear=True)
