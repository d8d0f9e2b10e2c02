"""Optimizers that PyTorch has too, 200 steps in float64, against PyTorch: to 1e-10.

Where the two do not define the same algorithm, the test says how they are made to, or which one we
follow.
"""

import numpy as np
import pytest
from trajectories import agree, ours, problem

import adam_jax as aj

pytestmark = pytest.mark.usefixtures("x64")


# Torch's RAdam adds ε to an uncorrected √ν, so the two agree at ε = 0. Its NAdam averages with β₁
# and looks ahead with a schedule; `look_ahead` takes that schedule. Its Adam with weight_decay is
# decay="l2", and so are Adamax, RMSprop and SGD.
def torch_nadam(count):
    return 0.87 * (1 - 0.5 * 0.96 ** ((count + 1).astype(float) * 0.02))


def l2(tx):
    return aj.chain(aj.add_decayed_weights(0.07), tx)


TORCH = {
    "Adam": (lambda: aj.adamw(0.03, 0.87, 0.983, 1e-5, weight_decay=0.07, decay="l2"), {}),
    "AdamW": (lambda: aj.adamw(0.03, 0.87, 0.983, 1e-5, weight_decay=0.07), {}),
    "Adam amsgrad": (
        lambda: l2(aj.amsgrad(0.03, 0.87, 0.983, 1e-5, maximum="raw")),
        {"amsgrad": True},
    ),
    "Adamax": (lambda: l2(aj.adamax(0.03, 0.87, 0.983, 1e-5)), {}),
    "NAdam": (
        lambda: l2(
            aj.chain(
                aj.track_moments(0.87, 0.983),
                aj.stages.look_ahead(torch_nadam),
                aj.correct_bias(),
                aj.scale_by_moments(1e-5),
                aj.scale_by_learning_rate(0.03),
            )
        ),
        {"momentum_decay": 0.02},
    ),
    "NAdam constant": (lambda: l2(aj.nadam(0.03, 0.87, 0.983, 1e-5)), {"momentum_decay": 1e6}),
    "RAdam": (lambda: l2(aj.radam(0.03, 0.87, 0.983, 0.0)), {"eps": 0.0}),
    "RMSprop": (
        lambda: l2(aj.rmsprop(0.03, 0.87, 1e-5, eps_in_sqrt=False, momentum=0.6)),
        {"alpha": 0.87, "momentum": 0.6},
    ),
    "RMSprop centered": (
        lambda: l2(aj.rmsprop(0.03, 0.87, 1e-5, eps_in_sqrt=False, centered=True)),
        {"alpha": 0.87, "centered": True},
    ),
    "SGD": (lambda: l2(aj.momentum(0.03, 0.87)), {"momentum": 0.87}),
    "SGD nesterov": (
        lambda: l2(aj.momentum(0.03, 0.87, True)),
        {"momentum": 0.87, "nesterov": True},
    ),
}


@pytest.mark.parametrize("name", TORCH)
def test_torch(name, request):
    torch = pytest.importorskip("torch", reason="PyTorch is an optional oracle: pip install torch")
    build, options = TORCH[name]
    gradients, theta = problem()
    common = {"lr": 0.03, "weight_decay": 0.07}
    if "SGD" not in name:
        common["eps"] = 1e-5
    if "SGD" not in name and "RMSprop" not in name:
        common["betas"] = (0.87, 0.983)
    param = torch.tensor(theta, dtype=torch.float64, requires_grad=True)
    # NAdam keeps the product of its momenta in the default dtype, whatever the parameters have.
    torch.set_default_dtype(torch.float64)
    request.addfinalizer(lambda: torch.set_default_dtype(torch.float32))
    optimizer = getattr(torch.optim, name.split()[0])([param], **common | options)
    expected = []
    for g in gradients:
        param.grad = torch.tensor(g)
        optimizer.step()
        expected.append(param.detach().numpy().copy())
    agree(ours(build(), gradients, theta), np.asarray(expected), theta)
