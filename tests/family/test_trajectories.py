"""Every member, 200 steps in float64, against its paper, PyTorch and Optax: to 1e-10.

Where the three do not define the same algorithm, the test says how they are made to, or which one
we follow."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import papers
import pytest
from helpers import paths_of
from optax import contrib
from packaging.version import Version

import adam_jax as aj

pytestmark = pytest.mark.usefixtures("x64")

STEPS = 200
SHAPE = (6, 5)


def problem(seed=0):
    """Gradients that change size and sign, so that ε, maxima and clipping all matter, and where
    they start.
    """
    rng = np.random.default_rng(seed)
    size = 10.0 ** rng.uniform(-4, 1, (STEPS, 1, 1)) * 10.0 ** rng.uniform(-2, 0, SHAPE)
    return rng.standard_normal((STEPS, *SHAPE)) * size, rng.standard_normal(SHAPE)


def all_of_ours(txs, gradients, theta):
    """Of several transformations by name: the parameters after every step, from one program in
    float64.
    """
    return paths_of(txs, jnp.asarray(gradients), jnp.asarray(theta))


def ours(tx, gradients, theta):
    """The parameters after every step of one."""
    return np.asarray(all_of_ours({"": tx}, gradients, theta)[""])


def agree(found, expected, theta, rtol=1e-10):
    """Parameters agree relative to themselves, and so does the distance moved."""
    expected = np.asarray(
        list(expected) if not isinstance(expected, np.ndarray) else expected, np.float64
    )
    np.testing.assert_allclose(found, expected, rtol=rtol, atol=rtol * 1e-3)
    moved = np.abs(expected - theta).max()
    assert moved > 1e-3
    assert np.abs(found - expected).max() <= rtol * moved


MUS = [0.9 * (1 - 0.5 * 0.96 ** (t * 0.01)) for t in range(1, STEPS + 2)]


def scheduled(values):
    return lambda count: jnp.asarray(values)[count]


PAPERS = {
    "adam": (
        lambda: aj.adam(0.03, 0.87, 0.983, 1e-5),
        lambda g, p: papers.adam(g, p, 0.03, 0.87, 0.983, 1e-5),
    ),
    "adamw": (
        lambda: aj.adamw(0.03, 0.87, 0.983, 1e-5, weight_decay=0.07),
        lambda g, p: papers.adam(g, p, 0.03, 0.87, 0.983, 1e-5, 0.07),
    ),
    # AdaMax's paper has no ε, and ν = 0 cannot occur here.
    "adamax": (
        lambda: aj.adamax(0.03, 0.87, 0.983, 0.0),
        lambda g, p: papers.adamax(g, p, 0.03, 0.87, 0.983),
    ),
    "amsgrad": (
        lambda: aj.amsgrad(
            0.03, 0.87, 0.983, 1e-5, bias_correction_mu=False, bias_correction_nu=False
        ),
        lambda g, p: papers.amsgrad(g, p, 0.03, 0.87, 0.983, 1e-5),
    ),
    "nadam": (
        lambda: aj.nadam(0.03, scheduled(MUS), 0.983, 1e-5),
        lambda g, p: papers.nadam(g, p, 0.03, MUS, 0.983, 1e-5),
    ),
    # RAdam's paper has no ε and a threshold of 4.
    "radam": (
        lambda: aj.radam(0.03, 0.87, 0.983, 0.0, threshold=4.0),
        lambda g, p: papers.radam(g, p, 0.03, 0.87, 0.983, 4),
    ),
    "adabelief": (
        lambda: aj.adabelief(0.03, 0.87, 0.983, 1e-7, 1e-7),
        lambda g, p: papers.adabelief(g, p, 0.03, 0.87, 0.983, 1e-7),
    ),
    "yogi": (
        lambda: aj.yogi(0.03, 0.87, 0.983, 1e-3, initial_accumulator_value=1e-5),
        lambda g, p: papers.yogi(g, p, 0.03, 0.87, 0.983, 1e-3, 1e-5),
    ),
    "lamb": (
        lambda: aj.lamb(0.03, 0.87, 0.983, 1e-5, weight_decay=0.07),
        lambda g, p: papers.lamb(g, p, 0.03, 0.87, 0.983, 1e-5, 0.07),
    ),
    "adopt": (
        lambda: aj.adopt(0.03, 0.87, 0.983, 1e-5),
        lambda g, p: papers.adopt(g, p, 0.03, 0.87, 0.983, 1e-5),
    ),
    "ademamix": (
        lambda: aj.ademamix(0.03, 0.87, 0.983, 0.995, 3.0, 1e-5, weight_decay=0.07),
        lambda g, p: papers.ademamix(g, p, 0.03, 0.87, 0.983, 0.995, 3.0, 1e-5, 0.07),
    ),
    "adam_mini": (
        lambda: aj.adam_mini(0.03, 0.87, 0.983, 1e-5),
        lambda g, p: papers.adam_mini(g, p, 0.03, 0.87, 0.983, 1e-5, 0),
    ),
    "adam_mini leaf": (
        lambda: aj.adam_mini(0.03, 0.87, 0.983, 1e-5, blocks="leaf"),
        lambda g, p: papers.adam_mini(g, p, 0.03, 0.87, 0.983, 1e-5, (0, 1)),
    ),
    "adam_atan2": (
        lambda: aj.adam_atan2(0.03, 0.87, 0.983),
        lambda g, p: papers.adam_atan2(g, p, 0.03, 0.87, 0.983),
    ),
    "rmsprop": (
        lambda: aj.rmsprop(0.03, 0.87, 1e-5),
        lambda g, p: papers.rmsprop(g, p, 0.03, 0.87, 1e-5, False),
    ),
    "rmsprop centered": (
        lambda: aj.rmsprop(0.03, 0.87, 1e-5, centered=True),
        lambda g, p: papers.rmsprop(g, p, 0.03, 0.87, 1e-5, True),
    ),
    "momentum": (
        lambda: aj.momentum(0.03, 0.87),
        lambda g, p: papers.momentum(g, p, 0.03, 0.87, False),
    ),
    "momentum nesterov": (
        lambda: aj.momentum(0.03, 0.87, True),
        lambda g, p: papers.momentum(g, p, 0.03, 0.87, True),
    ),
    "stable adamw": (
        lambda: aj.chain(
            aj.track_moments(0.87, 0.983),
            aj.correct_bias(),
            aj.stages.clip_update_rms(),
            aj.scale_by_moments(1e-5),
            aj.scale_by_learning_rate(0.03),
        ),
        lambda g, p: papers.stable_adamw(g, p, 0.03, 0.87, 0.983, 1e-5),
    ),
    "cautious adamw": (
        lambda: aj.chain(
            aj.track_moments(0.87, 0.983),
            aj.correct_bias(),
            aj.scale_by_moments(1e-5),
            aj.stages.cautious(),
            aj.add_decayed_weights(0.07),
            aj.scale_by_learning_rate(0.03),
        ),
        lambda g, p: papers.cautious_adamw(g, p, 0.03, 0.87, 0.983, 1e-5, 0.07),
    ),
}


@functools.cache
def paper_paths():
    return all_of_ours({name: build() for name, (build, _) in PAPERS.items()}, *problem())


@pytest.mark.parametrize("name", PAPERS)
def test_paper(name):
    gradients, theta = problem()
    agree(np.asarray(paper_paths()[name]), PAPERS[name][1](gradients, theta), theta)


def test_every_member_has_an_oracle():
    derived = {
        "adamaxw": "adamax and decay, against Optax",
        "nadamw": "nadam and decay, against Optax",
    }
    assert set(aj.family.__all__) <= {name.split()[0] for name in PAPERS} | derived.keys()


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


def optax_yogi(*args):
    """Optax starts μ at 1e-6, which the paper does not; with that undone it is the
    same algorithm.
    """
    tx = optax.yogi(*args)

    def init(params):
        first, *rest = tx.init(params)
        return first._replace(mu=jax.tree.map(jnp.zeros_like, first.mu)), *rest

    return optax.GradientTransformationExtraArgs(init, tx.update)


RATE = optax.cosine_decay_schedule(0.05, STEPS)
MASK = [True]
OPTAX = {
    "adam": (aj.adam, optax.adam, (RATE, 0.87, 0.983, 1e-5, 1e-7), {}),
    "adam nesterov": (aj.adam, optax.adam, (RATE, 0.87, 0.983, 1e-5, 1e-7), {"nesterov": True}),
    "adamw": (
        aj.adamw,
        optax.adamw,
        (RATE, 0.87, 0.983, 1e-5, 1e-7, None, 0.07, lambda p: True),
        {},
    ),
    "adamw mask": (
        aj.adamw,
        optax.adamw,
        (RATE, 0.87, 0.983, 1e-5, 1e-7, None, 0.07, lambda p: False),
        {"nesterov": True},
    ),
    "adamw decay": (
        aj.adamw,
        optax.adamw,
        (RATE, 0.87, 0.983, 1e-5, 0.0, None, lambda c: 0.1 / (1 + c)),
        {},
    ),
    "adamax": (aj.adamax, optax.adamax, (RATE, 0.87, 0.983, 1e-5), {}),
    "adamaxw": (aj.adamaxw, optax.adamaxw, (RATE, 0.87, 0.983, 1e-5, 0.07), {}),
    "amsgrad": (aj.amsgrad, optax.amsgrad, (RATE, 0.87, 0.983, 1e-5, 1e-7), {}),
    "amsgrad uncorrected": (
        aj.amsgrad,
        optax.amsgrad,
        (RATE, 0.87, 0.983, 1e-5, 1e-7, None, False, False),
        {},
    ),
    "amsgrad half": (
        aj.amsgrad,
        optax.amsgrad,
        (RATE, 0.87, 0.983, 1e-5, 1e-7, None, True, False),
        {},
    ),
    "nadam": (aj.nadam, optax.nadam, (RATE, 0.87, 0.983, 1e-5, 1e-7), {}),
    "nadamw": (aj.nadamw, optax.nadamw, (RATE, 0.87, 0.983, 1e-5, 1e-7, None, 0.07), {}),
    "radam": (aj.radam, optax.radam, (RATE, 0.87, 0.983, 1e-5, 1e-7, 5.0), {}),
    "radam nesterov": (
        aj.radam,
        optax.radam,
        (RATE, 0.87, 0.983, 1e-5, 1e-7, 7.0),
        {"nesterov": True},
    ),
    "adabelief": (aj.adabelief, optax.adabelief, (RATE, 0.87, 0.983, 1e-7, 1e-8), {}),
    "adabelief nesterov": (
        aj.adabelief,
        optax.adabelief,
        (RATE, 0.87, 0.983, 1e-7, 1e-8),
        {"nesterov": True},
    ),
    "yogi": (aj.yogi, optax_yogi, (RATE, 0.87, 0.983, 1e-3), {}),
    "lamb": (aj.lamb, optax.lamb, (RATE, 0.87, 0.983, 1e-5, 1e-7, 0.07), {}),
    "sgd": (aj.momentum, optax.sgd, (RATE, 0.87), {}),
    "sgd nesterov": (aj.momentum, optax.sgd, (RATE, 0.87, True), {}),
    "rmsprop": (aj.rmsprop, optax.rmsprop, (RATE, 0.87, 1e-5, 0.3), {}),
    "rmsprop all": (
        aj.rmsprop,
        optax.rmsprop,
        (RATE, 0.87, 1e-5, 0.3, False, True, 0.6, True, True),
        {},
    ),
    "rmsprop momentum": (aj.rmsprop, optax.rmsprop, (RATE, 0.87, 1e-5, 0.0, True, False, 0.6), {}),
    "adopt": (aj.adopt, contrib.adopt, (RATE, 0.87, 0.983, 1e-5), {}),
    "adopt unclipped": (
        aj.adopt,
        contrib.adopt,
        (RATE, 0.87, 0.983, 1e-5),
        {"use_clipping": False, "nesterov": True},
    ),
    "ademamix": (
        aj.ademamix,
        contrib.ademamix,
        (RATE, 0.87, 0.983, 0.995, 3.0, 1e-5, 1e-7, None, 0.07),
        {},
    ),
    "ademamix warm": (
        aj.ademamix,
        contrib.ademamix,
        (RATE, 0.87, 0.983, lambda c: 0.9 + 0.0005 * jnp.minimum(c, 150), lambda c: 0.01 * c, 1e-5),
        {},
    ),
}


OPTAX_0_2_8 = ("adamw decay", "amsgrad uncorrected", "amsgrad half")


@functools.cache
def optax_paths():
    """Of each name ours and theirs."""
    old = Version(optax.__version__) < Version("0.2.8")  # which does not have these arguments yet
    cases = {name: case for name, case in OPTAX.items() if not (old and name in OPTAX_0_2_8)}
    txs = {
        name: [make(*args, **options) for make in pair]
        for name, (*pair, args, options) in cases.items()
    }
    with jax.numpy_dtype_promotion("standard"):
        return [
            all_of_ours({name: pair[side] for name, pair in txs.items()}, *problem(1))
            for side in (0, 1)
        ]


@pytest.mark.parametrize("name", OPTAX)
def test_optax(name):
    if name not in optax_paths()[0]:
        pytest.skip("this Optax does not have these arguments yet")
    found, expected = (np.asarray(paths[name]) for paths in optax_paths())
    agree(found, expected, problem(1)[1])


def test_independent_decay_follows_the_schedule(standard_promotion):
    gradients, theta = problem(2)

    def independent(peak):
        before, p = theta.astype(papers.L), theta.astype(papers.L)
        start = np.zeros_like(theta)
        for t, after in enumerate(papers.adam(gradients, start, 1)):
            u, start = start - after, after
            share = papers.L(float(jnp.asarray(RATE(t)))) / papers.L(peak)
            p = before - papers.L(peak) * share * u - papers.dec(0.07) * share * before
            before = p
            yield p

    tx = aj.adamw(RATE, weight_decay=0.07, decay="independent")
    agree(ours(tx, gradients, theta), independent(0.05), theta)


@pytest.mark.parametrize("rate", [0.5, 0.0])
def test_independent_decay_ignores_a_constant_rate(rate):
    tx = aj.adamw(rate, weight_decay=0.25, decay="independent")
    params = jnp.array([2.0, -4.0])
    updates, _ = tx.update(jnp.zeros(2), tx.init(params), params)
    np.testing.assert_array_equal(updates, [-0.5, 1.0])


@pytest.mark.parametrize("traced", [False, True])
def test_independent_decay_made_inside_jit(traced, standard_promotion):
    """The peak is looked for when the transformation is made, also while something is traced, and
    for a traced schedule.
    """

    @jax.jit
    def step(rate):
        schedule = (
            (lambda c: rate * jnp.where(c < 10, 1.0, 0.5))
            if traced
            else optax.cosine_decay_schedule(0.1, 100)
        )
        tx = aj.adamw(schedule, weight_decay=0.25, decay="independent")
        params = jnp.array([2.0, -4.0])
        return tx.update(jnp.zeros(2), tx.init(params), params)[0]

    np.testing.assert_allclose(step(0.1), [-0.5, 1.0], rtol=1e-6)


def test_a_schedule_without_a_peak_is_refused(standard_promotion):
    with pytest.raises(
        ValueError, match="the peak of this schedule is 0.0; expected a positive number"
    ):
        aj.adamw(optax.constant_schedule(0.0), decay="independent")
