"""B15: the table of PyTorch's schedulers in docs/moving-in.md. The oracle is PyTorch."""

import re

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import ROOT

PAGE = (ROOT / "docs" / "moving-in.md").read_text()
ROWS = dict(re.findall(r"^\| `(\w+(?:LR|Restarts)\(.*\))` \| `([^`]*)`.*\|$", PAGE, re.MULTILINE))
TRAINERS = dict(re.findall(r'"(linear|cosine)" is\s+`([^`]*)`', PAGE))
VALUES = {
    "lr": 0.1, "n": 5, "a": 3, "b": 7, "gamma": 0.5, "factor": 0.25, "power": 2.0, "eta_min": 0.01,
    "total": 12, "warmup": 4,
}  # fmt: skip


def ours(text):
    """The schedule that a row of the table says, with what the page defines."""
    space = {"optax": optax, "jnp": jnp, "f": lambda step: 1 / (1 + step)} | VALUES
    block = re.search(
        r"```python\n(import jax.numpy as jnp\n\n\ndef one_cycle.*?)```", PAGE, re.DOTALL
    )
    exec(block[1], space)
    return eval(text, space)


def values(schedule, steps=12):
    return [float(schedule(jnp.float32(step))) for step in range(steps)]


def test_the_table_has_the_schedulers():
    """B15: and every schedule in it can be called."""
    assert len(ROWS) == 11
    assert len(TRAINERS) == 2
    for text in (*ROWS.values(), *TRAINERS.values()):
        assert all(np.isfinite(values(ours(text), 2)))


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.filterwarnings("ignore::UserWarning")  # there is no backward pass before the steps
@pytest.mark.parametrize("row", ROWS)
def test_a_scheduler_of_torch_is_the_schedule_in_its_row(row):
    torch = pytest.importorskip("torch", reason="PyTorch is an optional oracle: pip install torch")
    found = torch.optim.lr_scheduler
    param = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([param], lr=VALUES["lr"])

    def bound(name):
        return lambda *args, **options: getattr(found, name)(optimizer, *args, **options)

    space = {name: bound(name) for name in dir(found) if name[:1].isupper()} | VALUES
    scheduler = eval(row, space | {"f": lambda step: 1 / (1 + step)})
    rates = []
    for _ in range(12):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    np.testing.assert_allclose(values(ours(ROWS[row])), rates, rtol=1e-4, atol=1e-7)


@pytest.mark.usefixtures("standard_promotion")
def test_the_schedules_of_the_trainer():
    """B15: as `transformers` defines them."""
    warm, total, lr = 4, 12, 0.1
    share = [(step - warm) / (total - warm) for step in range(total)]
    linear = [lr * (step / warm if step < warm else 1 - share[step]) for step in range(total)]
    cosine = [
        lr * (step / warm if step < warm else (1 + np.cos(np.pi * share[step])) / 2)
        for step in range(total)
    ]
    np.testing.assert_allclose(values(ours(TRAINERS["linear"])), linear, rtol=1e-5, atol=1e-8)
    np.testing.assert_allclose(values(ours(TRAINERS["cosine"])), cosine, rtol=1e-5, atol=1e-8)
