"""How long a step of a `Case` of `hostile.py` may be: a bound on every element, from all gradients
so far.
"""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from hostile import WIDE, C, F, Switch
from hostile_values import is_half

from adam_jax.storage.formats import resolve_storage


def number(case, name, t, default=None):
    """What a hyperparameter is at a step."""
    value = case.numbers.get(name, default)
    if isinstance(value, Switch):
        value = value.before if t < value.step else value.after
    elif case.traced and name in case.numbers:
        value = np.float64(np.float32(value)) if not case.x64 else value
    return None if value is None else float(value)


def shares(betas):
    """The weight of each step in an average that starts at zero."""
    return np.array([(1 - b) * np.prod(betas[i + 1 :]) for i, b in enumerate(betas)])


def narrowed(case, leaf):
    """(the factor by which narrowing can lengthen a step of a quotient a step, whether the quotient
    keeps a bound of its own).

    Codes lie a factor of 2 apart where they are coarsest: μ can double and ν can halve. Two moments
    that rest alike have ranges that fit each other. Others do not: μ can be rounded up to a
    smallest number that is far above √ν, or ν saturate where μ does not."""
    forms = resolve_storage(case.storage)
    size = math.prod(leaf.shape)
    if all((isinstance(form, F) and form.dtype is None) or size < form.smallest for form in forms):
        return 1.0, True
    alike = all(isinstance(form, C) for form in forms)
    half = all(isinstance(form, F) and form.dtype == jnp.bfloat16 for form in forms)
    fits = (alike or half) and leaf.dtype not in WIDE and not leaf.dtype.startswith("complex")
    fits = (
        fits
        and case.member not in ("adam_mini", "adamax", "adamaxw")
        and forms[0].smallest == forms[1].smallest
    )
    return 8**0.5, fits


def bound(case, leaf, t, params, grads):
    """A bound on every element of a leaf's update.

    Args:
      case: the case.
      leaf: a leaf of its tree.
      t: the step, from 0.
      params: the leaf's parameters at each step so far.
      grads: its gradients at each step so far, as they came in.
    """
    n = range(t + 1)
    real = np.finfo(np.float64 if leaf.dtype in WIDE else np.float32)
    largest, least = 2.0 ** (real.maxexp // 2 - 2), 2.0 ** (real.minexp // 2)
    sides = 2**0.5 if leaf.dtype.startswith("complex") else 1.0

    def size(x):
        return float(np.max(np.abs(np.asarray(x, np.complex128)), initial=0))

    def course(name, default=None):
        return [number(case, name, i, default) for i in n]

    option = case.options.get
    masked = option("mask") == "matrices" and len(leaf.shape) < 2
    decay = [
        0.0 if masked else x * size(p)
        for x, p in zip(course("weight_decay", 0.0), params, strict=True)
    ]
    gs = np.array([size(g) for g in grads])
    if "add_noise" in case.links:
        gs = gs + 1.0  # ten standard deviations
    if option("decay") == "l2":
        gs, decay = gs + np.array(decay), [0.0 for _ in n]
    gs = np.minimum(gs, largest * sides)
    noise, fits = narrowed(case, leaf)
    smallest = max(
        (
            float(jnp.finfo(f.dtype).smallest_subnormal)
            for f in resolve_storage(case.storage)
            if isinstance(f, F) and f.dtype
        ),
        default=0,
    )
    noise **= t
    rate = [abs(x) for x in course("learning_rate")]

    def quotient(w, v, weight, root=True, squared=True, eps="eps", eps_root="eps_root"):
        """Of a mean with weights w over the root of one with v, divided by `weight`: by ε, and by
        Cauchy and Schwarz.
        """
        inside = (number(case, eps_root, t, 0.0) or 0.0) ** (0.5 if root else 1)
        floor = max(number(case, eps, t, 0.0) if eps else 0.0, least) + inside
        by_eps = (float(np.sum(w * gs)) * noise + smallest) / floor
        if not fits or not squared or (v[w > 0] <= 0).any():
            return by_eps
        used = w > 0
        w, v = w[used], v[used]
        schwarz = np.sqrt(np.sum(w**2 / (v / weight)))
        lost = 2 * np.sum(
            w / np.sqrt(v)
        )  # of squares that underflow, over the smallest denominator
        return min(by_eps, noise * (schwarz + lost))

    def direction():
        b1, b2 = course("b1", 0.9), course("b2", 0.999)
        if case.member == "momentum":
            m = course("momentum")
            if not option("dampened"):
                mean = sum(g * np.prod(m[i + 1 :]) for i, g in enumerate(gs))
                return noise * mean + gs[-1] + smallest
            return noise * max(gs) * (3 if option("nesterov") else 1) + smallest
        if case.member == "rmsprop":
            return rmsprop()
        if case.member == "adopt":
            clipped = max(t, 1) ** 0.25
            by_eps = max(gs) / max(min(course("eps")), least)
            return noise * (clipped if option("use_clipping", True) else by_eps) * sides + smallest
        if case.member == "adam_atan2":
            return option("a", 1.0) * math.pi / 2
        w, v = shares(b1), shares(b2)
        mu_weight, nu_weight = w.sum(), v.sum()
        if case.member in ("nadam", "nadamw") or option("nesterov"):
            following = number(case, "b1", t + 1, 0.9)
            ahead = 1 - np.prod([*b1, following])
            mean = w * following / ahead
            mean[-1] += (1 - b1[-1]) / mu_weight
        elif case.member == "amsgrad" and not option("bias_correction_mu", True):
            mean = w
        else:
            mean = w / mu_weight
        if case.member == "amsgrad" and not option("bias_correction_nu", True):
            nu_weight = 1.0
        if case.member in ("adamax", "adamaxw"):
            floor = max(number(case, "eps", t), 0) + least
            kept = np.array([np.prod(b2[i + 1 :]) for i in n])
            by_eps = (np.sum(mean * gs) * noise + smallest) / floor
            return (
                min(by_eps, np.sum(mean[kept > 0] / kept[kept > 0]))
                if fits and (kept > 0).all()
                else by_eps
            )
        if case.member == "yogi":
            # ν is at least this share of each square: it falls by at most (1 − b2)ν, and rises by
            # (1 − b2)g².
            v = np.array([min(1 - b, b) * np.prod(b2[i + 1 :]) for i, b in enumerate(b2)])
            by_eps = quotient(mean, v, 1.0, squared=False)
            used = mean > 0
            least_share = v[used]
            linear = (
                np.sum(mean[used] * np.sqrt(nu_weight / least_share))
                if (least_share > 0).all()
                else np.inf
            )
            return (
                min(by_eps, noise * (linear + 2 * np.sum(mean[used] / np.sqrt(least_share))))
                if fits and linear < np.inf
                else by_eps
            )
        if case.member == "adabelief":
            return quotient(mean, v, nu_weight, squared=False)
        found = quotient(mean, v, nu_weight)
        if case.member == "adam_mini":
            found *= math.sqrt(max(math.prod(leaf.shape), 1))
        if case.member == "ademamix":
            found += number(case, "alpha", t) * quotient(shares(course("b3")), v, nu_weight)
        if case.member == "radam":
            found = max(found, (np.sum(mean * gs)) * noise + smallest)
        return found

    def rmsprop():
        b = course("decay")
        weight = shares(b).sum() if option("bias_correction") else 1.0
        inside = number(case, "eps", t) ** 0.5 if option("eps_in_sqrt", True) else 0.0
        floor = max(0.0 if option("eps_in_sqrt", True) else number(case, "eps", t), least) + inside
        by_eps = gs[-1] / floor
        if option("centered"):
            return by_eps
        share = 1 - b[-1]
        return min(by_eps, np.sqrt(weight / share) + 2 / np.sqrt(share)) if share > 0 else by_eps

    found = direction()
    if case.member == "lamb":
        norm = float(np.linalg.norm(np.asarray(params[-1], np.complex128).ravel()))
        found = max(norm, 0.0 if norm > real.tiny * 1e6 else found + decay[-1])
    else:
        found += decay[-1]
    found *= (
        rate[-1]
        if option("decay") != "independent" or not callable(case.numbers["learning_rate"])
        else max(rate)
    )
    if option("decay") == "independent":
        found += decay[-1]
    if case.member == "rmsprop" and option("momentum") is not None:
        past = [_alone(case, leaf, i, params, grads) for i in n[:-1]]
        m = option("momentum")
        found = (
            found * (2 if option("nesterov") else 1)
            + sum(noise * x * m ** (t - i) for i, x in enumerate(past))
            + smallest
        )
    if "cautious" in case.links:
        found *= min(1e3, max(math.prod(leaf.shape), 1))
    if is_half(leaf) and {"round_stochastically", "compensate"} & set(case.links):
        info = jnp.finfo(leaf.dtype)
        found += 2 * float(info.eps) * (size(params[-1]) + found) + float(info.smallest_subnormal)
    return float(found)


def _alone(case, leaf, t, params, grads):
    """The bound of an earlier step of RMSprop before its steps are accumulated."""
    options = {
        name: value for name, value in case.options.items() if name not in ("momentum", "nesterov")
    }
    links = tuple(name for name in case.links if name == "add_noise")
    return bound(
        dataclasses.replace(case, options=options, links=links),
        leaf,
        t,
        params[: t + 1],
        grads[: t + 1],
    )
