"""Long-double transcriptions of the papers' algorithms, written from the papers and sharing nothing
with the package.

Each takes the gradients g₁ … g_T (an array whose first axis is time), the initial parameters and
hyperparameters, and yields the parameters after every step. Decays are decimals: "0.999" is
999/1000 to the last bit of a long double."""

import numpy as np

L = np.longdouble


def dec(x):
    """The decimal that the user wrote, as a long double."""
    return L(repr(x)) if isinstance(x, float) else L(x)


def adam(gradients, theta, alpha, beta1=0.9, beta2=0.999, eps=1e-8, decay=0.0, rounded_state=False):
    """Kingma & Ba (2015), Algorithm 1;

    Loshchilov & Hutter (2019), Algorithm 2, with the decay times alpha.
    """
    alpha, beta1, beta2, eps, decay = map(dec, (alpha, beta1, beta2, eps, decay))
    theta = theta.astype(L)
    m, v = np.zeros_like(theta), np.zeros_like(theta)
    for t, g in enumerate(gradients.astype(L), 1):
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g * g
        if rounded_state:
            m, v = m.astype(np.float32).astype(L), v.astype(np.float32).astype(L)
        m_hat, v_hat = m / (1 - beta1**t), v / (1 - beta2**t)
        theta = theta - alpha * (m_hat / (np.sqrt(v_hat) + eps) + decay * theta)
        yield theta


def adam_scheduled(gradients, theta, alpha, betas1, betas2, eps=1e-8):
    """The same with β₁ and β₂ of every step given; the correction divides by 1 − ∏β."""
    theta, alpha, eps = theta.astype(L), dec(alpha), dec(eps)
    m, v, p1, p2 = np.zeros_like(theta), np.zeros_like(theta), L(1), L(1)
    for g, beta1, beta2 in zip(gradients.astype(L), map(L, betas1), map(L, betas2), strict=True):
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
        p1, p2 = p1 * beta1, p2 * beta2
        theta = theta - alpha * (m / (1 - p1)) / (np.sqrt(v / (1 - p2)) + eps)
        yield theta


def adamax(gradients, theta, alpha, beta1, beta2):
    """Kingma & Ba (2015), Algorithm 2."""
    alpha, beta1, beta2 = map(dec, (alpha, beta1, beta2))
    theta = theta.astype(L)
    m, u = np.zeros_like(theta), np.zeros_like(theta)
    for t, g in enumerate(gradients.astype(L), 1):
        m = beta1 * m + (1 - beta1) * g
        u = np.maximum(beta2 * u, np.abs(g))
        theta = theta - alpha / (1 - beta1**t) * m / u
        yield theta


def amsgrad(gradients, theta, alpha, beta1, beta2, eps):
    """Reddi, Kale & Kumar (2018), Algorithm 2: no bias is corrected; ε as their experiments have
    it.
    """
    alpha, beta1, beta2, eps = map(dec, (alpha, beta1, beta2, eps))
    theta = theta.astype(L)
    m, v, v_hat = np.zeros_like(theta), np.zeros_like(theta), np.zeros_like(theta)
    for g in gradients.astype(L):
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g**2
        v_hat = np.maximum(v_hat, v)
        theta = theta - alpha * m / (np.sqrt(v_hat) + eps)
        yield theta


def nadam(gradients, theta, alpha, mus, beta2, eps):
    """Dozat (2016), Algorithm 2, with the momentum schedule μ₁ … μ_{T+1}."""
    alpha, beta2, eps = map(dec, (alpha, beta2, eps))
    theta = theta.astype(L)
    m, n, product = np.zeros_like(theta), np.zeros_like(theta), L(1)
    for t, g in enumerate(gradients.astype(L), 1):
        now, then = L(mus[t - 1]), L(mus[t])
        product = product * now
        m, n = now * m + (1 - now) * g, beta2 * n + (1 - beta2) * g**2
        m_hat = then * m / (1 - product * then) + (1 - now) * g / (1 - product)
        theta = theta - alpha * m_hat / (np.sqrt(n / (1 - beta2**t)) + eps)
        yield theta


def radam(gradients, theta, alpha, beta1, beta2, threshold):
    """Liu et al. (2020), Algorithm 2, with its threshold of 4 as an argument."""
    alpha, beta1, beta2 = map(dec, (alpha, beta1, beta2))
    theta = theta.astype(L)
    m, v = np.zeros_like(theta), np.zeros_like(theta)
    rho_inf = 2 / (1 - beta2) - 1
    for t, g in enumerate(gradients.astype(L), 1):
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g**2
        m_hat = m / (1 - beta1**t)
        rho = rho_inf - 2 * t * beta2**t / (1 - beta2**t)
        if rho > threshold:
            ell = np.sqrt((1 - beta2**t) / v)
            r = np.sqrt((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho))
            theta = theta - alpha * r * m_hat * ell
        else:
            theta = theta - alpha * m_hat
        yield theta


def adabelief(gradients, theta, alpha, beta1, beta2, eps):
    """Zhuang et al. (2020), Algorithm 2."""
    alpha, beta1, beta2, eps = map(dec, (alpha, beta1, beta2, eps))
    theta = theta.astype(L)
    m, s = np.zeros_like(theta), np.zeros_like(theta)
    for t, g in enumerate(gradients.astype(L), 1):
        m = beta1 * m + (1 - beta1) * g
        s = beta2 * s + (1 - beta2) * (g - m) ** 2 + eps
        theta = theta - alpha * (m / (1 - beta1**t)) / (np.sqrt(s / (1 - beta2**t)) + eps)
        yield theta


def yogi(gradients, theta, alpha, beta1, beta2, eps, start):
    """Zaheer et al. (2018), Algorithm 2, with the bias corrected as its authors' code does."""
    alpha, beta1, beta2, eps = map(dec, (alpha, beta1, beta2, eps))
    theta = theta.astype(L)
    m, v = np.zeros_like(theta), np.full_like(theta, dec(start))
    for t, g in enumerate(gradients.astype(L), 1):
        m = beta1 * m + (1 - beta1) * g
        v = v - (1 - beta2) * np.sign(v - g**2) * g**2
        theta = theta - alpha * (m / (1 - beta1**t)) / (np.sqrt(v / (1 - beta2**t)) + eps)
        yield theta


def lamb(gradients, theta, alpha, beta1, beta2, eps, decay):
    """You et al. (2020), Algorithm 2, φ the identity, one layer."""
    alpha, decay = dec(alpha), dec(decay)
    theta = theta.astype(L)
    before = np.zeros_like(theta)
    for after in adam(gradients, before, 1, beta1, beta2, eps):
        r = before - after + decay * theta
        before = after
        theta = theta - alpha * np.sqrt(np.sum(theta**2)) / np.sqrt(np.sum(r**2)) * r
        yield theta


def adopt(gradients, theta, alpha, beta1, beta2, eps):
    """Taniguchi et al. (2024), Algorithm 2: clipped to ±t^¼; the first gradient only sets v."""
    alpha, beta1, beta2, eps = map(dec, (alpha, beta1, beta2, eps))
    theta = theta.astype(L)
    m, v = np.zeros_like(theta), gradients[0].astype(L) ** 2
    yield theta
    for t, g in enumerate(gradients[1:].astype(L), 1):
        bound = L(t) ** L(0.25)
        m = beta1 * m + (1 - beta1) * np.clip(g / np.maximum(np.sqrt(v), eps), -bound, bound)
        v = beta2 * v + (1 - beta2) * g**2
        theta = theta - alpha * m
        yield theta


def ademamix(gradients, theta, alpha, beta1, beta2, beta3, share, eps, decay):
    """Pagliardini et al. (2024), Algorithm 1 without its schedulers."""
    alpha, beta1, beta2, beta3, share, eps, decay = map(
        dec, (alpha, beta1, beta2, beta3, share, eps, decay)
    )
    theta = theta.astype(L)
    m1, m2, v = np.zeros_like(theta), np.zeros_like(theta), np.zeros_like(theta)
    for t, g in enumerate(gradients.astype(L), 1):
        m1, m2 = beta1 * m1 + (1 - beta1) * g, beta3 * m2 + (1 - beta3) * g
        v = beta2 * v + (1 - beta2) * g**2
        step = (m1 / (1 - beta1**t) + share * m2) / (np.sqrt(v / (1 - beta2**t)) + eps)
        theta = theta - alpha * (step + decay * theta)
        yield theta


def adam_mini(gradients, theta, alpha, beta1, beta2, eps, axes):
    """Zhang et al. (2024), Algorithm 1: one v for all elements along `axes`."""
    alpha, beta1, beta2, eps = map(dec, (alpha, beta1, beta2, eps))
    theta = theta.astype(L)
    m, v = np.zeros_like(theta), L(0)
    for t, g in enumerate(gradients.astype(L), 1):
        m, v = (
            beta1 * m + (1 - beta1) * g,
            beta2 * v + (1 - beta2) * np.mean(g**2, axes, keepdims=True),
        )
        theta = theta - alpha * (m / (1 - beta1**t)) / (np.sqrt(v / (1 - beta2**t)) + eps)
        yield theta


def adam_atan2(gradients, theta, alpha, beta1, beta2):
    """Everett et al. (2024): atan2 in place of the quotient."""
    alpha, beta1, beta2 = map(dec, (alpha, beta1, beta2))
    theta = theta.astype(L)
    m, v = np.zeros_like(theta), np.zeros_like(theta)
    for t, g in enumerate(gradients.astype(L), 1):
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g**2
        theta = theta - alpha * np.arctan2(m / (1 - beta1**t), np.sqrt(v / (1 - beta2**t)))
        yield theta


def rmsprop(gradients, theta, alpha, decay, eps, centered):
    """Graves (2013), §4.2, equations 38 to 40, without its momentum; ε inside the root."""
    alpha, decay, eps = map(dec, (alpha, decay, eps))
    theta = theta.astype(L)
    n, mean = np.zeros_like(theta), np.zeros_like(theta)
    for g in gradients.astype(L):
        n, mean = decay * n + (1 - decay) * g**2, decay * mean + (1 - decay) * g
        theta = theta - alpha * g / np.sqrt(n - (mean**2 if centered else 0) + eps)
        yield theta


def momentum(gradients, theta, alpha, mu, nesterov):
    """Sutskever et al. (2013), §2, in the form v ← μv + g, θ ← θ − αv."""
    alpha, mu = dec(alpha), dec(mu)
    theta = theta.astype(L)
    v = np.zeros_like(theta)
    for g in gradients.astype(L):
        v = mu * v + g
        theta = theta - alpha * (mu * v + g if nesterov else v)
        yield theta


def stable_adamw(gradients, theta, alpha, beta1, beta2, eps):
    """Wortsman et al. (2023), Algorithm 2, without decay, and with its threshold of 1."""
    alpha, beta1, beta2, eps = map(dec, (alpha, beta1, beta2, eps))
    theta = theta.astype(L)
    v, u = np.zeros_like(theta), np.zeros_like(theta)
    for t, g in enumerate(gradients.astype(L), 1):
        v, u = beta1 * v + (1 - beta1) * g, beta2 * u + (1 - beta2) * g**2
        v_hat, u_hat = v / (1 - beta1**t), u / (1 - beta2**t)
        rms = np.sqrt(np.mean(g**2 / u_hat))
        theta = theta - alpha / max(1, rms) * v_hat / (np.sqrt(u_hat) + eps)
        yield theta


def cautious_adamw(gradients, theta, alpha, beta1, beta2, eps, decay):
    """Liang et al. (2024), Algorithm 1, with the factor of their later code: 1/max(mean(mask),
    1e-3).
    """
    alpha, decay = dec(alpha), dec(decay)
    theta = theta.astype(L)
    before = np.zeros_like(theta)
    for g, after in zip(
        gradients.astype(L), adam(gradients, before, 1, beta1, beta2, eps), strict=True
    ):
        u = before - after
        before = after
        mask = (u * g > 0).astype(L)
        theta = theta - alpha * (u * mask / max(np.mean(mask), L("1e-3")) + decay * theta)
        yield theta
