"""The family: each member is its stages, nothing else.

Positional arguments, their order and their defaults are those of the Optax function of the same
name, where there is one; what only this package has is keyword-only. The arguments themselves are
explained at the stages that take them. Every number may be a Python number, a traced scalar or a
schedule. `learning_rate` has no default anywhere. `storage` says how the moments rest between two
steps: "float32", "bfloat16", "8bit", an object of `adam_jax.storage`, or a pair of these for μ and
ν.

In the equations, names are those of the code, `g` is the gradient, and a hat means after
`correct_bias()`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import jax.numpy as jnp

from adam_jax._core.chain import chain
from adam_jax._core.decorators import recipe
from adam_jax._core.errors import expect_one_of
from adam_jax._core.hyperparams import ScalarOrSchedule as Number
from adam_jax._core.layers import LayerAxes
from adam_jax._core.transformation import Transformation
from adam_jax.stages.bias import correct_bias, look_ahead, rectify
from adam_jax.stages.blocks import Blocks
from adam_jax.stages.decay import Mask, add_decayed_weights
from adam_jax.stages.learning_rate import scale_by_learning_rate
from adam_jax.stages.refine import center, keep_maximum, mix_slow_mean
from adam_jax.stages.scale import (
    clip_elements,
    scale_by_atan2,
    scale_by_moments,
    scale_by_trust_ratio,
    take_mu,
)
from adam_jax.stages.track import track_moments
from adam_jax.storage.formats import Storage, resolve_storage

__all__ = [
    "adam",
    "adamw",
    "adamax",
    "adamaxw",
    "amsgrad",
    "nadam",
    "nadamw",
    "radam",
    "adabelief",
    "yogi",
    "lamb",
    "momentum",
    "rmsprop",
    "adopt",
    "ademamix",
    "adam_mini",
    "adam_atan2",
]


# A signature is read as Optax's row of arguments; one a line they would be four pages of the same
# six lines. fmt: off


def _ahead(nesterov: bool) -> tuple[Transformation, ...]:
    return (look_ahead(),) if nesterov else ()


@recipe(rate="learning_rate")
def adam(
    learning_rate: Number,
    b1: Number = 0.9,
    b2: Number = 0.999,
    eps: Number = 1e-8,
    eps_root: Number = 0.0,
    mu_dtype: Any = None,
    *,
    nesterov: bool = False,
    nu_dtype: Any = None,
    storage: Storage = "float32",
) -> Transformation:
    """Adam: momentum and RMSprop in one, right from the first step.

        mu ← b1·mu + (1 − b1)·g                    mu_hat = mu / (1 − b1ᵗ)
        nu ← b2·nu + (1 − b2)·g²                   nu_hat = nu / (1 − b2ᵗ)
        params ← params − learning_rate·mu_hat / (√(nu_hat + eps_root) + eps)

    Source: Kingma & Ba, "Adam: A Method for Stochastic Optimization" (2015), Algorithm 1.

    Elsewhere: Optax and PyTorch have the same equations. Optax rounds b2ᵗ and 1 − b2 apart, which
    for b2 close to 1 makes steps wrong by up to 0.7 %; PyTorch's nu gathers rounding errors, 4e-6
    of the step by t = 1000. TensorFlow and Keras divide `eps` by √(1 − b2ᵗ), and default to 1e-7:
    `presets.keras.adam`.
    """
    return chain(
        track_moments(b1, b2, mu_dtype=mu_dtype, nu_dtype=nu_dtype, storage=storage),
        *_ahead(nesterov),
        correct_bias(),
        scale_by_moments(eps, eps_root),
        scale_by_learning_rate(learning_rate),
    )


@recipe(rate="learning_rate")
def adamw(
    learning_rate: Number,
    b1: Number = 0.9,
    b2: Number = 0.999,
    eps: Number = 1e-8,
    eps_root: Number = 0.0,
    mu_dtype: Any = None,
    weight_decay: Number = 1e-4,
    mask: Mask | None = None,
    *,
    nesterov: bool = False,
    decay: Literal["lr", "independent", "l2"] = "lr",
    nu_dtype: Any = None,
    storage: Storage = "float32",
    layer_axes: LayerAxes | None = None,
) -> Transformation:
    """Adam with weight decay that does not pass through the moments.

        params ← params − learning_rate·(adam + weight_decay·params)             decay="lr"
        params ← params − learning_rate·adam                                   decay="independent"
                 − weight_decay·(learning_rate/peak)·params
        g ← g + weight_decay·params, then as adam                                decay="l2"

    `decay="independent"` is the paper's: a learning rate twice as large decays no faster, while the
    schedule's course, its value relative to its peak, counts for both. `mask="matrices"` spares
    biases, the scales of norms, and leaves with fewer than two axes; `layer_axes` says which axes
    count layers. Both are explained at `add_decayed_weights`.

    Source: Loshchilov & Hutter, "Decoupled Weight Decay Regularization" (2019), Algorithm 2.

    Elsewhere: Optax and PyTorch's AdamW are decay="lr" (PyTorch's default is 1e-2); PyTorch's Adam
    with weight_decay is decay="l2".
    """
    expect_one_of("decay", decay, ("lr", "independent", "l2"))
    last = scale_by_learning_rate(learning_rate)
    direction = (
        track_moments(b1, b2, mu_dtype=mu_dtype, nu_dtype=nu_dtype, storage=storage),
        *_ahead(nesterov),
        correct_bias(),
        scale_by_moments(eps, eps_root),
    )
    if decay == "independent":
        return chain(
            *direction,
            last,
            add_decayed_weights(
                weight_decay, mask, learning_rate=learning_rate, layer_axes=layer_axes
            ),
        )
    decayed = add_decayed_weights(weight_decay, mask, layer_axes=layer_axes)
    return chain(decayed, *direction, last) if decay == "l2" else chain(*direction, decayed, last)


@recipe(rate="learning_rate")
def adamax(
    learning_rate: Number,
    b1: Number = 0.9,
    b2: Number = 0.999,
    eps: Number = 1e-8,
    *,
    storage: Storage = "float32",
) -> Transformation:
    """Adam with the infinity norm: ν is the largest gradient lately.

        nu ← max(b2·nu, |g| + eps)
        params ← params − learning_rate·mu_hat / nu

    ν needs no correction: a maximum has its full weight at once.

    Source: Kingma & Ba (2015), §7.1, Algorithm 2.

    Elsewhere: the paper has no `eps`; Optax and PyTorch have it where it is here. PyTorch's
    weight_decay goes into the gradient.
    """
    return chain(
        track_moments(b1, b2, nu_rule="infinity", nu_eps=eps, storage=storage),
        correct_bias(),
        scale_by_moments(0.0, root=False),
        scale_by_learning_rate(learning_rate),
    )


@recipe(rate="learning_rate")
def adamaxw(
    learning_rate: Number,
    b1: Number = 0.9,
    b2: Number = 0.999,
    eps: Number = 1e-8,
    weight_decay: Number = 1e-4,
    mask: Mask | None = None,
    *,
    storage: Storage = "float32",
    layer_axes: LayerAxes | None = None,
) -> Transformation:
    """AdaMax with decoupled weight decay.

        nu ← max(b2·nu, |g| + eps)
        params ← params − learning_rate·(mu_hat / nu + weight_decay·params)

    Source: Kingma & Ba (2015), §7.1; Loshchilov & Hutter (2019).

    Elsewhere: Optax has the same; PyTorch's Adamax puts weight_decay into the gradient.
    """
    *direction, last = adamax(learning_rate, b1, b2, eps, storage=storage).stages
    return chain(*direction, add_decayed_weights(weight_decay, mask, layer_axes=layer_axes), last)


@recipe(rate="learning_rate")
def amsgrad(
    learning_rate: Number,
    b1: Number = 0.9,
    b2: Number = 0.999,
    eps: Number = 1e-8,
    eps_root: Number = 0.0,
    mu_dtype: Any = None,
    bias_correction_mu: bool = True,
    bias_correction_nu: bool = True,
    *,
    maximum: Literal["corrected", "raw"] = "corrected",
    nu_dtype: Any = None,
    storage: Storage = "float32",
) -> Transformation:
    """Adam with a ν that never falls.

        nu_max ← max(nu_max, nu_hat)                              maximum="corrected"
        nu_max ← max(nu_max, nu), then corrected                  maximum="raw"
        params ← params − learning_rate·mu_hat / (√(nu_max + eps_root) + eps)

    Source: Reddi, Kale & Kumar, "On the Convergence of Adam and Beyond" (2018), Algorithm 2, which
    corrects no bias (`bias_correction_mu=False, bias_correction_nu=False`).

    Elsewhere: Optax takes the maximum of corrected moments, where an early large one stays at its
    most uncertain; PyTorch takes that of the raw ones, `maximum="raw"`.
    """
    expect_one_of("maximum", maximum, ("corrected", "raw"))
    correction = correct_bias(mu=bias_correction_mu, nu=bias_correction_nu)
    kept = keep_maximum(storage=storage, nu_dtype=nu_dtype)
    return chain(
        track_moments(b1, b2, mu_dtype=mu_dtype, nu_dtype=nu_dtype, storage=storage),
        *((correction, kept) if maximum == "corrected" else (kept, correction)),
        scale_by_moments(eps, eps_root),
        scale_by_learning_rate(learning_rate),
    )


@recipe(rate="learning_rate")
def nadam(
    learning_rate: Number,
    b1: Number = 0.9,
    b2: Number = 0.999,
    eps: Number = 1e-8,
    eps_root: Number = 0.0,
    mu_dtype: Any = None,
    *,
    nu_dtype: Any = None,
    storage: Storage = "float32",
) -> Transformation:
    """Adam with Nesterov's momentum: the first moment looks one step ahead.

        mu_hat = b1·mu / (1 − b1ᵗ⁺¹) + (1 − b1)·g / (1 − b1ᵗ)
        params ← params − learning_rate·mu_hat / (√(nu_hat + eps_root) + eps)

    Source: Dozat, "Incorporating Nesterov Momentum into Adam" (2016), Algorithm 2. The paper's μₜ
    is a schedule for b1.

    Elsewhere: Optax has the constant one. PyTorch and Keras look ahead with a schedule, b1·(1 −
    ½·0.96^(0.004t)) and b1·(1 − ½·0.96ᵗ), but average with the constant b1: `presets.torch.nadam`
    and `presets.keras.nadam`.
    """
    return adam(
        learning_rate,
        b1,
        b2,
        eps,
        eps_root,
        mu_dtype,
        nesterov=True,
        nu_dtype=nu_dtype,
        storage=storage,
    )


@recipe(rate="learning_rate")
def nadamw(
    learning_rate: Number,
    b1: Number = 0.9,
    b2: Number = 0.999,
    eps: Number = 1e-8,
    eps_root: Number = 0.0,
    mu_dtype: Any = None,
    weight_decay: Number = 1e-4,
    mask: Mask | None = None,
    *,
    decay: Literal["lr", "independent", "l2"] = "lr",
    nu_dtype: Any = None,
    storage: Storage = "float32",
    layer_axes: LayerAxes | None = None,
) -> Transformation:
    """Nadam with decoupled weight decay: `adamw` with `nesterov=True`.

        params ← params − learning_rate·(nadam + weight_decay·params)

    Source: Dozat (2016), Algorithm 2; Loshchilov & Hutter (2019), Algorithm 2.

    Elsewhere: as for `nadam` and `adamw`.
    """
    return adamw(
        learning_rate,
        b1,
        b2,
        eps,
        eps_root,
        mu_dtype,
        weight_decay,
        mask,
        nesterov=True,
        decay=decay,
        nu_dtype=nu_dtype,
        storage=storage,
        layer_axes=layer_axes,
    )


@recipe(rate="learning_rate")
def radam(
    learning_rate: Number,
    b1: Number = 0.9,
    b2: Number = 0.999,
    eps: Number = 1e-8,
    eps_root: Number = 0.0,
    threshold: Number = 5.0,
    *,
    nesterov: bool = False,
    storage: Storage = "float32",
) -> Transformation:
    """Adam that warms itself up: rectified while ν is young.

        params ← params − learning_rate·r·mu_hat / (√(nu_hat + eps_root) + eps)   if rho > threshold
        params ← params − learning_rate·mu_hat                                       otherwise

    with r and rho as `rectify` defines them.

    Source: Liu et al., "On the Variance of the Adaptive Learning Rate and Beyond" (2020), Algorithm
    2, with a threshold of 4.

    Elsewhere: Optax has these equations; PyTorch adds `eps` to √nu before its correction:
    `presets.torch.radam`.
    """
    return chain(
        track_moments(b1, b2, storage=storage),
        *_ahead(nesterov),
        rectify(threshold),
        correct_bias(),
        scale_by_moments(eps, eps_root),
        scale_by_learning_rate(learning_rate),
    )


@recipe(rate="learning_rate")
def adabelief(
    learning_rate: Number,
    b1: Number = 0.9,
    b2: Number = 0.999,
    eps: Number = 1e-16,
    eps_root: Number = 1e-16,
    *,
    nesterov: bool = False,
    storage: Storage = "float32",
) -> Transformation:
    """Adam whose ν measures how far the gradient is from what μ believed.

        nu ← b2·nu + (1 − b2)·(g − mu)² + eps_root
        params ← params − learning_rate·mu_hat / (√nu_hat + eps)

    Source: Zhuang et al., "AdaBelief Optimizer: Adapting Stepsizes by the Belief in Observed
    Gradients" (2020), Algorithm 2.

    Elsewhere: Optax has the same. In the paper and its authors' code one ε stands in both places.
    """
    return chain(
        track_moments(b1, b2, nu_rule="belief", nu_eps=eps_root, storage=storage),
        *_ahead(nesterov),
        correct_bias(),
        scale_by_moments(eps),
        scale_by_learning_rate(learning_rate),
    )


@recipe(rate="learning_rate")
def yogi(
    learning_rate: Number,
    b1: Number = 0.9,
    b2: Number = 0.999,
    eps: Number = 1e-3,
    *,
    initial_accumulator_value: float = 1e-6,
    storage: Storage = "float32",
) -> Transformation:
    """Adam whose ν moves by no more than (1 − b2)·g² a step, however far it is from g².

        nu ← nu − (1 − b2)·sign(nu − g²)·g²
        params ← params − learning_rate·mu_hat / (√nu_hat + eps)

    ν starts at `initial_accumulator_value`, which keeps the first steps short.

    Source: Zaheer et al., "Adaptive Methods for Nonconvex Optimization" (2018), Algorithm 2, which
    corrects no bias; its authors' code does.

    Elsewhere: Optax starts μ at 1e-6 too. We side with the paper: μ starts at 0.
    """
    return chain(
        track_moments(b1, b2, nu_rule="yogi", nu_init=initial_accumulator_value, storage=storage),
        correct_bias(),
        scale_by_moments(eps),
        scale_by_learning_rate(learning_rate),
    )


@recipe(rate="learning_rate")
def lamb(
    learning_rate: Number,
    b1: Number = 0.9,
    b2: Number = 0.999,
    eps: Number = 1e-6,
    eps_root: Number = 0.0,
    weight_decay: Number = 0.0,
    mask: Mask | None = None,
    *,
    storage: Storage = "float32",
    layer_axes: LayerAxes | None = None,
) -> Transformation:
    """Adam for large batches: each leaf's step has the length of its parameter.

        r = mu_hat / (√(nu_hat + eps_root) + eps) + weight_decay·params
        params ← params − learning_rate·r·‖params‖/‖r‖

    Source: You et al., "Large Batch Optimization for Deep Learning: Training BERT in 76 minutes"
    (2020), Algorithm 2.

    Elsewhere: Optax has the same, its norms in the parameters' dtype; the paper may bound ‖params‖
    by a function φ, here the identity. PyTorch has no LAMB.
    """
    return chain(
        track_moments(b1, b2, storage=storage),
        correct_bias(),
        scale_by_moments(eps, eps_root),
        add_decayed_weights(weight_decay, mask, layer_axes=layer_axes),
        scale_by_trust_ratio(),
        scale_by_learning_rate(learning_rate),
    )


@recipe(rate="learning_rate")
def momentum(
    learning_rate: Number,
    momentum: Number = 0.9,
    nesterov: bool = False,
    accumulator_dtype: Any = None,
    *,
    dampened: bool = False,
    storage: Storage = "float32",
) -> Transformation:
    """Stochastic gradient descent with momentum: the first moment only.

    Arguments are those of `optax.sgd`.

        mu ← momentum·mu + g                              params ← params − learning_rate·mu
        mu ← momentum·mu + (1 − momentum)·g     params ← params − learning_rate·mu_hat dampened=True

    The sum is what other frameworks call momentum: its step grows to 1/(1 − momentum) times the
    gradient. The dampened one is Adam's own first moment, with Adam's correction and Adam's meaning
    of the learning rate.

    Source: Polyak, "Some methods of speeding up the convergence of iteration methods" (1964);
    Sutskever et al. (2013), §2.

    Elsewhere: PyTorch's SGD with dampening=0 is the sum; with dampening=momentum it is the mean,
    uncorrected.
    """
    tracked = track_moments(
        momentum,
        None,
        mu_rule="mean" if dampened else "sum",
        mu_dtype=accumulator_dtype,
        storage=storage,
    )
    direction = (
        (*_ahead(nesterov), correct_bias(), take_mu())
        if dampened
        else (take_mu(nesterov=nesterov),)
    )
    return chain(tracked, *direction, scale_by_learning_rate(learning_rate))


@recipe(rate="learning_rate")
def rmsprop(
    learning_rate: Number,
    decay: Number = 0.9,
    eps: Number = 1e-8,
    initial_scale: float = 0.0,
    eps_in_sqrt: bool = True,
    centered: bool = False,
    momentum: Number | None = None,
    nesterov: bool = False,
    bias_correction: bool = False,
    *,
    storage: Storage = "float32",
) -> Transformation:
    """The gradient in units of its root mean square: the second moment only.

        nu ← decay·nu + (1 − decay)·g²
        params ← params − learning_rate·g / √(nu + eps)      with eps_in_sqrt=False: / (√nu + eps)

    `centered` takes the variance, nu − mu², for nu. `momentum` accumulates the steps: v ←
    momentum·v + step. With `bias_correction` and eps_in_sqrt=False it is Adam with b1 = 0.

    Source: Tieleman & Hinton, "Lecture 6.5: RMSprop" (2012); Graves (2013), §4.2, for the centered
    one.

    Elsewhere: Optax and TensorFlow accumulate steps, as here; PyTorch accumulates directions and
    multiplies the sum by the learning rate, which differs while the rate changes. PyTorch has
    eps_in_sqrt=False and decay=0.99.

    Raises:
      ValueError: for `centered` with a narrow storage. The variance is a difference, and can be
        smaller than the noise of either.
    """
    if centered and resolve_storage(storage) != resolve_storage("float32"):
        raise ValueError(
            f"rmsprop: found centered=True with storage={storage!r}; expected storage='float32': "
            "nu − mu² is a difference of two averages that often agree in more digits than narrow "
            "ones have."
        )
    accumulated = (
        ()
        if momentum is None
        else (
            track_moments(momentum, None, mu_rule="sum", storage=storage),
            take_mu(nesterov=nesterov),
        )
    )
    return chain(
        track_moments(
            decay if centered else None,
            decay,
            nu_init=initial_scale,
            debias=bias_correction,
            storage=storage,
        ),
        *((correct_bias(),) if bias_correction else ()),
        *((center(),) if centered else ()),
        scale_by_moments(0.0, eps) if eps_in_sqrt else scale_by_moments(eps),
        scale_by_learning_rate(learning_rate),
        *accumulated,
    )


def _fourth_root(count: Any) -> Any:
    return jnp.sqrt(jnp.sqrt(jnp.maximum(count, 0).astype(jnp.result_type(float))))


@recipe(rate="learning_rate")
def adopt(
    learning_rate: Number,
    b1: Number = 0.9,
    b2: Number = 0.9999,
    eps: Number = 1e-6,
    mu_dtype: Any = None,
    *,
    nesterov: bool = False,
    use_clipping: bool = True,
    clip_value_fn: Callable[[Any], Any] = _fourth_root,
    nu_dtype: Any = None,
    storage: Storage = "float32",
) -> Transformation:
    """Adam that scales the gradient by the ν of the step before, and averages after.

    It converges with any b2.

        d = g / max(√nu, eps), clipped to ±t^¼
        mu ← b1·mu + (1 − b1)·d
        nu ← b2·nu + (1 − b2)·g²
        params ← params − learning_rate·mu

    The first step only sets nu = g². As stages: RMSprop with a delayed ν, then momentum.

    Source: Taniguchi et al., "ADOPT: Modified Adam Can Converge with Any β₂ with the Optimal Rate"
    (2024), Algorithm 2.

    Elsewhere: Optax has the same. The paper's Algorithm 1, without clipping, starts mu at the first
    d instead of at 0.
    """
    return chain(
        track_moments(None, b2, nu_delay=True, nu_dtype=nu_dtype, storage=storage),
        scale_by_moments(eps, floor=True),
        *((clip_elements(clip_value_fn),) if use_clipping else ()),
        track_moments(b1, None, mu_dtype=mu_dtype, storage=storage),
        take_mu(nesterov=nesterov),
        scale_by_learning_rate(learning_rate),
    )


@recipe(rate="learning_rate")
def ademamix(
    learning_rate: Number,
    b1: Number = 0.9,
    b2: Number = 0.999,
    b3: Number = 0.9999,
    alpha: Number = 5.0,
    eps: Number = 1e-8,
    eps_root: Number = 0.0,
    mu_dtype: Any = None,
    weight_decay: Number = 0.0,
    mask: Mask | None = None,
    *,
    nu_dtype: Any = None,
    storage: Storage = "float32",
    layer_axes: LayerAxes | None = None,
) -> Transformation:
    """Adam with a second first moment that remembers ten thousand steps.

        mu_slow ← b3·mu_slow + (1 − b3)·g
        params ← params − learning_rate·((mu_hat + alpha·mu_slow) / (√(nu_hat + eps_root) + eps)
                                         + weight_decay·params)

    The paper warms `alpha` and `b3` up from 0 and `b1`: give schedules.

    Source: Pagliardini, Ablin & Grangier, "The AdEMAMix Optimizer: Better, Faster, Older" (2024),
    Algorithm 1.

    Elsewhere: Optax has the same. The authors' code has both warm-ups built in, and counts them
    from its own start.
    """
    return chain(
        track_moments(b1, b2, mu_dtype=mu_dtype, nu_dtype=nu_dtype, storage=storage),
        correct_bias(),
        mix_slow_mean(b3, alpha, mu_dtype=mu_dtype, storage=storage),
        scale_by_moments(eps, eps_root),
        add_decayed_weights(weight_decay, mask, layer_axes=layer_axes),
        scale_by_learning_rate(learning_rate),
    )


@recipe(rate="learning_rate")
def adam_mini(
    learning_rate: Number,
    b1: Number = 0.9,
    b2: Number = 0.999,
    eps: Number = 1e-8,
    weight_decay: Number = 0.0,
    mask: Mask | None = None,
    *,
    blocks: Blocks = "output",
    storage: Storage = "float32",
    layer_axes: LayerAxes | None = None,
) -> Transformation:
    """Adam with one ν for a whole block of a leaf: a second moment that takes next to no memory.

        nu ← b2·nu + (1 − b2)·mean over the block(g²)
        params ← params − learning_rate·(mu_hat / (√nu_hat + eps) + weight_decay·params)

    A block should be what the Hessian has a dense block for: the weights into one output neuron
    ("output", the last axis of a Flax kernel), a head of a query or key matrix (give a function).
    `blocks="leaf"` is the coarsest.

    Source: Zhang et al., "Adam-mini: Use Fewer Learning Rates To Gain More" (2024), Algorithm 1.

    Elsewhere: the authors' code tells the blocks by the names of PyTorch's parameters. Optax and
    PyTorch have no Adam-mini.
    """
    return chain(
        track_moments(b1, b2, blocks=blocks, storage=storage),
        correct_bias(),
        scale_by_moments(eps),
        add_decayed_weights(weight_decay, mask, layer_axes=layer_axes),
        scale_by_learning_rate(learning_rate),
    )


@recipe(rate="learning_rate")
def adam_atan2(
    learning_rate: Number,
    b1: Number = 0.9,
    b2: Number = 0.999,
    weight_decay: Number = 0.0,
    mask: Mask | None = None,
    *,
    a: float = 1.0,
    b: float = 1.0,
    storage: Storage = "float32",
    layer_axes: LayerAxes | None = None,
) -> Transformation:
    """Adam without ε: the quotient is an angle, and the same at any scale of the gradients.

        params ← params − learning_rate·(a·atan2(mu_hat, b·√nu_hat) + weight_decay·params)

    Source: Everett et al., "Scaling Exponents Across Parameterizations and Optimizers" (2024), the
    section on ε.

    Elsewhere: Optax and PyTorch have no such member; others' code often has a = 4/π, which makes
    the largest step 2.
    """
    return chain(
        track_moments(b1, b2, storage=storage),
        correct_bias(),
        scale_by_atan2(a=a, b=b),
        add_decayed_weights(weight_decay, mask, layer_axes=layer_axes),
        scale_by_learning_rate(learning_rate),
    )
