"""Input that is legal and hostile, as hypothesis draws it: trees, optimizers, numbers, storages,
stages, kinds of gradients.

`cases` draws a `Case`, which prints as what it is. `hostile_values.py` makes its parameters and
gradients, `hostile_bounds.py` says how long its step may be.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import optax
from helpers import has_float16
from hypothesis import strategies as st

import adam_jax as aj


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
