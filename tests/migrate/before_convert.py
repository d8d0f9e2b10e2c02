"""States of optimizers after some steps on gradients that do not depend on the parameters.

Optimizers that more than one test steps are in one program.
"""

import functools

import jax
from helpers import avals, draw_tree

import adam_jax as aj

MEMBERS = aj.family.__all__
SHAPES = {"b": (3,), "w": (64, 80)}
tree = functools.partial(draw_tree, shapes=SHAPES)
PARAMS = tree(0)

FORMS = {"float32": "float32", "bfloat16": "bfloat16", "8bit": "8bit"}
STORED = {
    name: (aj.ademamix(0.1, storage=form), aj.amsgrad(0.1, storage=form))
    for name, form in FORMS.items()
}
# All of these have adam's moments.
LIKE_ADAM = {
    name: getattr(aj, name)(0.1)
    for name in ("adam", "adamw", "nadam", "nadamw", "radam", "lamb", "adam_mini", "adam_atan2")
}
SHORT = aj.adam(0.1, b2=0.9)
LIKE_ADAM["nadam_radam"] = aj.radam(0.1, b2=0.9, nesterov=True)

OFTEN = tuple(
    dict.fromkeys(
        [
            *(getattr(aj, name)(0.1) for name in MEMBERS),
            *LIKE_ADAM.values(),
            SHORT,
            *sum(STORED.values(), ()),
        ]
    )
)
"""What more than one test steps, in one program."""


@jax.jit
def step_all(states, grads):
    return [tx.update(grads, state, PARAMS) for tx, state in zip(OFTEN, states, strict=True)]


@functools.cache
def course(steps):
    """The states of all these after some steps."""
    if steps == 0:
        return jax.jit(lambda: [tx.init(PARAMS) for tx in OFTEN])()
    return [state for _, state in step_all(course(steps - 1), tree(steps))]


def go_on(states, seed):
    """A step of some of these, each from a state of its own: the updates and the state by
    transformation.
    """
    made = step_all(
        [states.get(tx, state) for tx, state in zip(OFTEN, course(0), strict=True)], tree(seed)
    )
    return {tx: its for tx, its in zip(OFTEN, made, strict=True) if tx in states}


@functools.cache
def jitted(tx):
    return jax.jit(tx.update)


def run(tx, state, steps, params=PARAMS):
    """Each step's updates, and the state after them; `steps` number the gradients."""
    updates = []
    often = tx in OFTEN and params is PARAMS and avals(state) == avals(course(0)[OFTEN.index(tx)])
    for seed in steps:
        update, state = (
            go_on({tx: state}, seed)[tx] if often else jitted(tx)(tree(seed), state, params)
        )
        updates.append(update)
    return updates, state


@functools.cache
def after(tx, steps=5):
    return (
        course(steps)[OFTEN.index(tx)]
        if tx in OFTEN
        else run(tx, tx.init(PARAMS), range(1, steps + 1))[1]
    )


def places(entries):
    return [entry.place for entry in entries]
