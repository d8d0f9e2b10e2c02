"""What kinds of moments libraries keep."""

from __future__ import annotations

KINDS = {
    "mu": "a mean of gradients",
    "trace": "a sum of gradients",
    "trace of steps": "a sum of steps, behind the learning rate",
    "mu_slow": "a slow mean of gradients",
    "nu": "a mean of squares",
    "belief": "a mean of squared distances from the mean",
    "infinity": "a decaying maximum",
    "nu_max": "a maximum of ν that is not corrected any more",
    "raw nu_max": "a maximum of the raw ν, corrected later",
}
"""What moments can be, so far as libraries differ in it."""


def kind_of(kind: str) -> str:
    """Returns what moments of a kind are, in words."""
    return KINDS.get(kind, kind)
