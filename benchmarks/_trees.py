"""The parameters that `benchmarks.step` updates, as shapes.

No array library, so that either process can read them.
"""

from __future__ import annotations

from typing import TypeAlias

Shapes: TypeAlias = tuple[tuple[int, ...], ...]


def _gpt2_small() -> Shapes:
    width, vocabulary, context, blocks = 768, 50257, 1024, 12
    norm = ((width,), (width,))
    attention = ((width, 3 * width), (3 * width,), (width, width), (width,))
    mlp = ((width, 4 * width), (4 * width,), (4 * width, width), (width,))
    return ((vocabulary, width), (context, width), *(norm + attention + norm + mlp) * blocks, *norm)


TREES: dict[str, Shapes] = {
    "4096x4096": ((4096, 4096),),
    "gpt2-small": _gpt2_small(),
    "500x32x32": ((32, 32),) * 500,
}
"""By name: one leaf that only memory limits, a model's usual mixture (148 leaves, 124 M), and a
tree that is all overhead."""

LEAVES: dict[str, Shapes] = {f"{count} leaves": ((32, 32),) * count for count in (10, 100, 1000)}
"""By name: trees that differ in nothing but the number of their leaves."""

WARM_UP = 3
"""Steps that are not timed: the first ones touch fresh pages, and PyTorch's makes its state."""

GRADIENT = 0.01
"""The value of every gradient; the time does not depend on it while no moment is denormal."""
