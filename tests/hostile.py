"""Input that is legal and hostile, as hypothesis draws it: trees, members, numbers, storages,
links, gradients.

`cases` draws a `Case`, which prints as what it is and from which everything else is made; `bound`
says how long its step may be."""

import contextlib
import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from helpers import has_float16
from hypothesis import strategies as st

import adam_jax as aj
from adam_jax.storage.formats import resolve_storage

# What is drawn


class Pair(NamedTuple):
    b: Any
    a: Any


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A parameter and the course of its gradients: kinds of `SIZES`, in units of a power of two."""

    shape: tuple[int, ...]
    dtype: str
    grad: str
    power: int = 0
    start: str = "random"
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Switch:
    """A schedule: one number before a step, another from it on."""

    before: float
    after: float
    step: int

    def __call__(self, count):
        return jnp.where(
            count < self.step,
            *(np.asarray(x, jnp.result_type(float)) for x in (self.before, self.after)),
        )


@dataclasses.dataclass(frozen=True)
class Case:
    """One transformation and what it is given.

    `traced`: whether its plain numbers are arguments of the jitted step.
    """

    tree: Any
    member: str
    numbers: dict[str, float | Switch]
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    storage: Any = "float32"
    links: tuple[str, ...] = ()
    traced: bool = False
    x64: bool = False

    @property
    def plain(self):
        """The numbers that are no schedules."""
        return {name: value for name, value in self.numbers.items() if not callable(value)}

    def transformation(self, **traced):
        made = getattr(aj, self.member)(
            **{**self.numbers, **traced}, **self.options, storage=self.storage
        )
        before = [LINKS[name]() for name in self.links if name in OPTAX_LINKS]
        behind = [LINKS[name]() for name in self.links if name not in OPTAX_LINKS]
        return aj.chain(*before, made, *behind)


SHAPES = (
    (3,),
    (),
    (0,),
    (1,),
    (40,),
    (2, 3),
    (3, 0),
    (2, 1, 3),
    (1, 2, 1, 3),
    (2, 1, 1, 2, 2),
    (1, 2, 1, 2, 1, 2),
)
NARROW = ("float32", "bfloat16", *(["float16"] if has_float16() else []), "complex64", "int32")
WIDE = ("float64", "complex128")

SIZES: dict[str, Callable[..., Any]] = {
    "random": lambda info, unit, t, rng, shape: unit * rng.standard_normal(shape),
    "zero": lambda info, unit, t, rng, shape: np.zeros(shape),
    "negative zero": lambda info, unit, t, rng, shape: np.full(shape, -0.0),
    "constant": lambda info, unit, t, rng, shape: np.full(shape, unit),
    "alternating": lambda info, unit, t, rng, shape: np.full(shape, unit * (-1.0) ** t),
    "growing": lambda info, unit, t, rng, shape: np.full(shape, unit * 1e3**t),
    "falling": lambda info, unit, t, rng, shape: np.full(shape, unit * 1e-3**t),
    "spike": lambda info, unit, t, rng, shape: np.full(shape, float(info.max) if t == 1 else unit),
    "subnormal": lambda info, unit, t, rng, shape: (
        float(info.smallest_subnormal) * rng.integers(-9, 9, shape)
    ),
    "tiny": lambda info, unit, t, rng, shape: float(info.tiny) * rng.choice([-1.0, 1.0], shape),
    "huge": lambda info, unit, t, rng, shape: float(info.max) * rng.choice([-1.0, 1.0], shape),
    "large": lambda info, unit, t, rng, shape: (
        0.5 * float(info.max) * rng.choice([-1.0, 1.0], shape)
    ),
}
"""By kind: (finfo, unit, step from 0, random numbers, shape) -> what is then clipped to the dtype.
"""
KINDS = (*SIZES, "mixed")
STARTS = ("random", "zero", "constant", "subnormal", "tiny", "large")

betas = st.sampled_from([0.9, 0.0, 0.1, 0.5, 0.99, 0.999, 0.999999, 1 - 1e-9]) | st.floats(
    0, 0.9999
)
small = st.sampled_from([1e-8, 0.0, 1e-30, 1e-16, 1e-3, 1.0])
decays = st.sampled_from([0.0, 1e-4, 0.1, 1.0])
rates = st.sampled_from([0.1, 1e-3, 0.0, 1e6]) | st.floats(1e-6, 0.1)
NUMBERS = {
    "learning_rate": rates,
    **dict.fromkeys(("b1", "b2", "b3", "decay", "momentum"), betas),
    **dict.fromkeys(("eps", "eps_root"), small),
    "weight_decay": decays,
    "alpha": st.sampled_from([5.0, 0.0, 1.0]),
    "threshold": st.sampled_from([5.0, 4.0]),
}
ADAM = ("learning_rate", "b1", "b2", "eps", "eps_root")
MASK = {"mask": st.sampled_from([None, "matrices"])}
NESTEROV = {"nesterov": st.booleans()}
DECAY = {"decay": st.sampled_from(["lr", "independent", "l2"])}
MEMBERS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "adam": (ADAM, NESTEROV),
    "adamw": ((*ADAM, "weight_decay"), MASK | NESTEROV | DECAY),
    "adamax": (ADAM[:4], {}),
    "adamaxw": ((*ADAM[:4], "weight_decay"), MASK),
    "amsgrad": (
        ADAM,
        {name: st.booleans() for name in ("bias_correction_mu", "bias_correction_nu")}
        | {"maximum": st.sampled_from(["corrected", "raw"])},
    ),
    "nadam": (ADAM, {}),
    "nadamw": ((*ADAM, "weight_decay"), MASK | DECAY),
    "radam": ((*ADAM, "threshold"), NESTEROV),
    "adabelief": (ADAM, NESTEROV),
    "yogi": (ADAM[:4], {"initial_accumulator_value": st.sampled_from([1e-6, 0.0, 1.0])}),
    "lamb": ((*ADAM, "weight_decay"), MASK),
    "momentum": (("learning_rate", "momentum"), NESTEROV | {"dampened": st.booleans()}),
    "rmsprop": (
        ("learning_rate", "decay", "eps"),
        {name: st.booleans() for name in ("eps_in_sqrt", "centered", "bias_correction", "nesterov")}
        | {"momentum": st.none() | betas, "initial_scale": st.sampled_from([0.0, 1.0])},
    ),
    "adopt": (ADAM[:4], NESTEROV | {"use_clipping": st.booleans()}),
    "ademamix": ((*ADAM, "b3", "alpha", "weight_decay"), MASK),
    "adam_mini": (
        (*ADAM[:4], "weight_decay"),
        MASK | {"blocks": st.sampled_from(["output", "leaf"])},
    ),
    "adam_atan2": (
        (*ADAM[:3], "weight_decay"),
        MASK | {"a": st.sampled_from([1.0, 1.27]), "b": st.sampled_from([1.0, 0.5])},
    ),
}
"""The numbers and the options of each member."""

F, C = aj.storage.Float, aj.storage.Codes
FORMS = (
    "float32", "bfloat16", "8bit", C(smallest=0), C(rounding="nearest", smallest=0),
    F(jnp.bfloat16, smallest=0), F(jnp.bfloat16, rounding="nearest", smallest=0),
    *([F(jnp.float16, smallest=0)] if has_float16() else []),
    F(jnp.float8_e4m3fn, smallest=0),
    F(jnp.float8_e5m2, smallest=2),
)  # fmt: skip

LINKS = {
    "clip_by_global_norm": lambda: optax.clip_by_global_norm(1.0),
    "add_noise": lambda: optax.add_noise(0.01, 0.55, 0),
    "cautious": aj.stages.cautious,
    "clip_update_rms": aj.stages.clip_update_rms,
    "round_stochastically": aj.round_stochastically,
    "compensate": aj.compensate,
    "average_parameters": lambda: aj.stages.average_parameters(0.9),
}
"""In the order in which they can stand."""
OPTAX_LINKS = ("clip_by_global_norm", "add_noise")


@st.composite
def leaves(draw, dtypes, shapes):
    return Leaf(
        draw(st.sampled_from(shapes)),
        draw(st.sampled_from(dtypes)),
        draw(st.sampled_from(KINDS)),
        draw(st.just(0) | st.integers(-60, 60)),
        draw(st.sampled_from(STARTS)),
        draw(st.integers(0, 99)),
    )


def trees(leaf, most):
    empty = st.none() | st.just(optax.MaskedNode())
    return st.recursive(
        leaf | leaf | leaf | empty,
        lambda part: (
            st.lists(part, max_size=3)
            | st.lists(part, max_size=2).map(tuple)
            | st.builds(Pair, part, part)
            | st.dictionaries(st.sampled_from("zyab"), part, max_size=3)
        ),
        max_leaves=most,
    )


@st.composite
def cases(draw, shapes=SHAPES, most=3, links=tuple(LINKS), members=tuple(aj.family.__all__)):
    """Cases with at most that many leaves, some of those links, and one of those members."""
    x64 = draw(st.booleans())
    member = draw(st.sampled_from(members))
    names, options = MEMBERS[member]
    chosen = {name: draw(choice) for name, choice in options.items()}
    numbers = {name: draw(NUMBERS[name]) for name in names}
    for name in draw(st.sets(st.sampled_from(names), max_size=2)):
        # A schedule gives a float32, which has nothing between the largest of these decays and 1.
        before, after = (
            min(x, 0.999999) if NUMBERS[name] is betas else x
            for x in (numbers[name], draw(NUMBERS[name]))
        )
        numbers[name] = Switch(before, after, draw(st.integers(1, 6)))
    if chosen.get("decay") == "independent" and callable(numbers["learning_rate"]):
        numbers["learning_rate"] = Switch(
            0.01, abs(numbers["learning_rate"].after), 3
        )  # its peak has to be above 0
    if member == "momentum" or chosen.get("momentum") is None:
        chosen = {
            name: value
            for name, value in chosen.items()
            if member == "momentum" or value is not None
        }
    form = st.sampled_from(FORMS)
    storage = "float32" if chosen.get("centered") else draw(form | st.tuples(form, form))
    traced = draw(st.booleans())
    if traced:  # as in a schedule
        numbers = {
            n: min(x, 0.999999) if NUMBERS[n] is betas and not callable(x) else x
            for n, x in numbers.items()
        }
    behind = [name for name in links if draw(st.integers(0, 4)) == 4]
    behind = [
        name for name in behind if not (name == "compensate" and "round_stochastically" in behind)
    ]
    theirs = any(name in OPTAX_LINKS for name in behind)  # they know no integers
    leaf = leaves([d for d in NARROW + WIDE * x64 if not (theirs and d == "int32")], shapes)
    tree = draw(
        st.builds(Pair, leaf, trees(leaf, most - 1))
        if draw(st.integers(0, 5))
        else trees(leaf, most)
    )
    tree = (None,) if tree is None else tree  # alone it would mean that there are no parameters
    return Case(tree, member, numbers, chosen, storage, tuple(behind), traced, x64)


# What is made of it


def precision(x64):
    if not x64:
        return contextlib.nullcontext()
    return jax.enable_x64(True) if hasattr(jax, "enable_x64") else jax.experimental.enable_x64()


def is_integer(leaf):
    return leaf.dtype.startswith("int")


def values(kind, leaf, t):
    """Of a kind, at a step from 0: finite, in the leaf's dtype."""
    dtype = jnp.dtype(leaf.dtype)
    info = jnp.finfo(dtype)
    rng = np.random.default_rng([leaf.seed, t])

    def part(kind):
        if kind == "mixed":
            found = [part(each) for each in SIZES]
            choice = np.random.default_rng(leaf.seed).integers(0, len(found), leaf.shape)
            return np.choose(choice, found) if leaf.shape else found[int(choice)]
        return SIZES[kind](info, 2.0**leaf.power, t, rng, leaf.shape)

    with np.errstate(all="ignore"):
        x = part(kind)
        x = x + 1j * part(kind) if dtype.kind == "c" else x
        parts = [
            np.clip(p, -float(info.max), float(info.max))
            for p in ((x.real, x.imag) if dtype.kind == "c" else (x,))
        ]
        whole = np.asarray(parts[0] + 1j * parts[1] if dtype.kind == "c" else parts[0])
        return whole.reshape(leaf.shape).astype(dtype)


def parameters(case):
    """Where the case starts: finite, at most half of what its dtype holds."""

    def make(leaf):
        if is_integer(leaf):
            return jnp.full(leaf.shape, leaf.seed, leaf.dtype)
        return jnp.asarray(values(leaf.start, dataclasses.replace(leaf, power=0), 99))

    return jax.tree.map(make, case.tree)


def gradients(case, t):
    """Those of a step from 0, as NumPy arrays; `float0` for integers."""
    return jax.tree.map(
        lambda leaf: (
            np.zeros(leaf.shape, jax.dtypes.float0)
            if is_integer(leaf)
            else values(leaf.grad, leaf, t)
        ),
        case.tree,
    )


# How long a step may be


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


def is_half(leaf):
    return leaf.dtype in ("bfloat16", "float16")
