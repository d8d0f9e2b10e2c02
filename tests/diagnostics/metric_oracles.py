"""The oracle of `observe`: every metric of a step in double precision, from whole arrays and from
the moments in the state.
"""

import jax
import numpy as np
from observed import EPS, RATE, joined, rms, wide


def quotient(mu, root, eps=EPS, **more):
    """Adam's: mean, √ν̂, the size of what divides, and where ε is more than the root."""
    return {"mean": mu, "root": root, "rate": RATE / (root + eps), "ruled": eps > root} | more


def adam(g, m, before, t):
    return quotient(m["mu"] / (1 - 0.9**t), np.sqrt(m["nu"] / (1 - 0.999**t)))


def amsgrad(g, m, before, t):
    return quotient(m["mu"] / (1 - 0.9**t), np.sqrt(m["nu_max"]))


def momentum(g, m, before, t):
    return {"mean": m["mu"], "rate": np.full(g.shape, RATE)}


NAMES = ["mu", "nu", "mu_slow", "nu_max"]
INEXACT = ["w", "b", "h", "z", "s", "empty"]


def moments_of(state, leaf):
    """By name, from anywhere in a state, in double precision."""
    found = {}
    for path, x in jax.tree_util.tree_leaves_with_path(state):
        fields = [getattr(key, "name", None) for key in path]
        if jax.tree_util.keystr(path[-1:]) == f"[{leaf!r}]":
            found |= {name: wide(x) for name in NAMES if name in fields}
    return found


def quantile(x, q):
    """The smallest number that at least such a share is not above."""
    inorder = np.sort(x)
    return inorder[int(np.ceil(q * len(x))) - 1] if len(x) else 0.0


def clipped(g, limit):
    size = np.abs(g)
    return g * np.minimum(1, limit / np.where(size > 0, size, 1))


def expected(step, t, oracle, names=INEXACT, clip=np.inf):
    """All metrics of a step, from whole arrays; `t` is its number, or one for each leaf."""
    params, before, grads, updates, after = step
    g, u, p = ({name: wide(tree[name]) for name in names} for tree in (grads, updates, params))
    per_leaf = []
    for name in names:
        seen = clipped(g[name], clip)
        its = oracle(
            seen,
            moments_of(after, name),
            moments_of(before, name),
            t[name] if isinstance(t, dict) else t,
        )
        own = {"seen": seen, "raw": seen} | its
        per_leaf.append(
            {key: np.ravel(np.broadcast_to(x, own["raw"].shape)) for key, x in own.items()}
        )
    of = {key: joined([its[key] for its in per_leaf]) for key in per_leaf[0]}
    has_nu = "root" in of
    sized = of["root"] > 0 if has_nu else np.zeros(len(of["raw"]), bool)
    root = np.where(sized, of["root"], 1) if has_nu else 1
    moved = np.abs(of["mean"]) > 0
    along = np.real(of["seen"] * np.conj(of["mean"])).mean()
    lengths = rms(of["seen"]) * rms(of["mean"])
    half = [
        (p[name], u[name], params[name].dtype) for name in names if params[name].dtype.itemsize == 2
    ]
    moves = joined([step != 0 for _, step, _ in half]).astype(bool)
    stays = joined(
        [(old + step).astype(np.float32).astype(dtype) == old for old, step, dtype in half]
    )
    size = rms(joined(list(p.values())))
    return {
        "gradient_norm": np.linalg.norm(joined(list(g.values()))),
        "update_rms": rms(joined(list(u.values()))),
        "update_ratio": rms(joined(list(u.values()))) / size
        if size
        else rms(joined(list(u.values()))),
        "learning_rate_median": quantile(of["rate"][moved], 0.5),
        "learning_rate_p99": quantile(of["rate"][moved], 0.99),
        "eps_fraction": of["ruled"].mean() if has_nu else 0.0,
        "normalized_gradient_rms": rms((np.abs(of["raw"]) / root)[sized]),
        "momentum_cosine": along / lengths if lengths else 0.0,
        "signal_to_noise": quantile(
            (of["signal"] if "signal" in of else np.abs(of["mean"]) / root)[sized], 0.5
        ),
        "stalled_fraction": stays[moves].mean() if moves.any() else 0.0,
        "saturated_fraction": 0.0,
        "skipped": 0.0,
    }


def check(found, wanted, group="all", rtol=2e-3, skip=()):
    for name, value in wanted.items():
        if name not in skip:
            its = found.get(f"{group}/{name}", 0.0)  # absent where there is no such thing
            np.testing.assert_allclose(its, value, rtol=rtol, atol=1e-7, err_msg=f"{group}/{name}")
