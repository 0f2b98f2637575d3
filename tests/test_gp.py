"""gp.py against scikit-learn, SciPy and mpmath, sums done by hand, and on functions to optimise.

tests/golden/gp.json was made once, with scikit-learn 1.9.1, SciPy 1.17.1, NumPy 2.4.6 and mpmath
1.3.0, none of which the tests need, by this script run in the repository's root:

    import json
    import mpmath
    import numpy as np
    from scipy.stats import norm
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import ConstantKernel, Matern

    rng = np.random.default_rng(0)
    cases = []
    settings = (6, 1, 0.3, 1.0, 1e-6), (12, 3, 0.8, 2.5, 1e-3), (25, 50, 9.0, 0.7, 1e-2)
    for n, d, lengthscale, variance, noise in settings:
        x, xs = rng.standard_normal((n, d)), rng.standard_normal((4, d))
        y = 3 + 10 * np.sin(x).sum(1)
        kernel = ConstantKernel(variance) * Matern(lengthscale, nu=2.5)
        fixed = dict(alpha=noise, optimizer=None)
        gp = GaussianProcessRegressor(kernel, normalize_y=True, **fixed).fit(x, y)
        z = (y - y.mean()) / y.std()
        raw = GaussianProcessRegressor(kernel, **fixed).fit(x, z)
        mean, std = gp.predict(xs, return_std=True)
        raw_mean, raw_std = raw.predict(xs, return_std=True)
        u = (mean - y.max()) / std
        cases.append(
            dict(
                x=x, y=y, xs=xs, lengthscale=lengthscale, variance=variance, noise=noise,
                mean=mean, std=std, log_likelihood=gp.log_marginal_likelihood_value_,
                raw_y=z, raw_mean=raw_mean, raw_std=raw_std,
                raw_log_likelihood=raw.log_marginal_likelihood_value_,
                ei=std * (norm.pdf(u) + u * norm.cdf(u)), pi=norm.cdf(u),
            )
        )

    mpmath.mp.dps = 60

    def log_h(z):  # log(phi(z) + z Phi(z)); far down as phi(z) int_0^inf t exp(z t - t^2 / 2) dt
        z = mpmath.mpf(z)
        if z > -30:
            return float(mpmath.log(mpmath.npdf(z) + z * mpmath.ncdf(z)))
        tail = lambda s: s * mpmath.exp(-s - s * s / (2 * z * z))  # s = |z| t
        integral = mpmath.quad(tail, [0, 1, 10, 50, 200])
        return float(-z * z / 2 - mpmath.log(2 * mpmath.pi) / 2 + mpmath.log(integral / (z * z)))

    zs = [-1e8, -1e5, -1e3, -101, -100, -99, -38, -8, -1.001, -1]
    zs += [-0.999, -1e-9, 0, 1, 6, 39, 41, 1e6]
    golden = dict(cases=cases, log_h=[[z, log_h(z)] for z in zs])
    json.dump(golden, open("tests/golden/gp.json", "w"), default=lambda a: a.tolist())
"""

import itertools
import json
import math
import statistics
from pathlib import Path

import pytest
import torch

import gp as module
from gp import (
    GP,
    expected_improvement,
    log_expected_improvement,
    probability_of_improvement,
    suggest,
    upper_confidence_bound,
)
from lab.bench_search import CUBE, at_random, regret

GOLDEN = json.loads((Path(__file__).parent / "golden" / "gp.json").read_text())
NAN, INF = float("nan"), float("inf")


pytestmark = pytest.mark.usefixtures("one_thread")  # matrices this small are slower on two


def tensor(values):
    return torch.as_tensor(values, dtype=torch.float64)


def close(a, b, tolerance=1e-8):
    torch.testing.assert_close(tensor(a), tensor(b), rtol=tolerance, atol=tolerance)


def data(n, d, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=g, dtype=torch.float64)
    return x, x.sin().sum(1), g


# -------------------------------------------------------------------- against other implementations


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=["1d", "3d", "50d"])
def test_equals_scikit_learn_and_scipy(case):
    hyperparameters = case["lengthscale"], case["variance"], case["noise"]
    gp = GP(case["x"], case["y"], *hyperparameters)
    mean, std = gp.posterior(case["xs"])
    close(mean, case["mean"])
    close(std, case["std"])
    close(gp.log_marginal_likelihood(), case["log_likelihood"])
    close(expected_improvement(mean, std, max(case["y"])), case["ei"])
    close(probability_of_improvement(mean, std, max(case["y"])), case["pi"])
    # y of mean 0 and std 1 goes through unchanged: even scikit-learn without normalize_y agrees
    gp = GP(case["x"], case["raw_y"], *hyperparameters)
    mean, std = gp.posterior(case["xs"])
    close(mean, case["raw_mean"])
    close(std, case["raw_std"])
    close(gp.log_marginal_likelihood(), case["raw_log_likelihood"])


def test_log_ei_equals_sixty_digits_everywhere():
    z, log_h = tensor(GOLDEN["log_h"]).T
    ours = log_expected_improvement(z, torch.ones_like(z), 0)
    torch.testing.assert_close(ours, log_h, rtol=1e-12, atol=1e-12)


# ------------------------------------------------------------------------------------------ by hand


def test_one_point_by_hand():
    gp = GP([[0.0]], [5.0], 1.0, variance=2.0, noise=0.5)  # z = 0, y_std = 1
    mean, std = gp.posterior([[0.0], [1e6]])
    close(mean, [5.0, 5.0])
    close(std, [math.sqrt(2 - 2**2 / 2.5), math.sqrt(2)])
    close(gp.log_marginal_likelihood(), -0.5 * math.log(2.5) - 0.5 * math.log(2 * math.pi))


def test_two_points_by_hand():
    noise = 0.1  # y = 1, 3: mean 2, std 1, z = -1, 1
    gp = GP([[0.0], [1.0]], [1.0, 3.0], 1.0, noise=noise)
    # k: between the points; q: from the middle to either
    k = (1 + math.sqrt(5) + 5 / 3) * math.exp(-math.sqrt(5))
    q = (1 + math.sqrt(5) / 2 + 5 / 12) * math.exp(-math.sqrt(5) / 2)
    # K = [[1 + noise, k], [k, 1 + noise]] has the eigenvectors (1, -1) and (1, 1), with the values
    # 1 + noise - k and 1 + noise + k
    mean, std = gp.posterior([[0.5], [0.0]])
    close(mean, [2.0, 2 - (1 - k) / (1 + noise - k)])
    close(std[0], math.sqrt(1 - 2 * q * q / (1 + noise + k)))
    log_det = math.log((1 + noise - k) * (1 + noise + k))
    close(gp.log_marginal_likelihood(), -1 / (1 + noise - k) - log_det / 2 - math.log(2 * math.pi))


def test_acquisitions_by_hand():
    # z = 0, 0, 1, then certain: worse, equal, better
    mean, std = [1.0, 1.0, 3.0, 0.0, 1.0, 4.0], [1.0, 2.0, 2.0, 0.0, 0.0, 0.0]
    phi0 = 1 / math.sqrt(2 * math.pi)
    phi1, Phi1 = math.exp(-0.5) / math.sqrt(2 * math.pi), (1 + math.erf(0.5**0.5)) / 2
    close(expected_improvement(mean, std, 1.0), [phi0, 2 * phi0, 2 * (phi1 + Phi1), 0, 0, 3])
    close(log_expected_improvement(mean, std, 1.0)[3:], [-INF, -INF, math.log(3)])
    close(probability_of_improvement(mean, std, 1.0), [0.5, 0.5, Phi1, 0, 0, 1])
    close(upper_confidence_bound(mean, std, 1.5), [2.5, 4, 6, 0, 1, 4])
    close(upper_confidence_bound(mean, std), [3, 5, 7, 0, 1, 4])


def test_ei_is_its_integral():
    mean, std, best = tensor([-2.0, 0.3, 4.0]), tensor([0.5, 1.0, 2.0]), 0.5
    f = mean[:, None] + std[:, None] * torch.linspace(-12, 12, 200001, dtype=torch.float64)
    z = (f - mean[:, None]) / std[:, None]
    density = torch.exp(-(z**2) / 2) / (std[:, None] * math.sqrt(2 * math.pi))
    integral = torch.trapezoid((f - best).clamp(min=0) * density, f)
    close(expected_improvement(mean, std, best), integral, 1e-7)


# --------------------------------------------------------------------------------------- properties


def test_ei_is_never_negative_and_log_ei_always_ranks():
    mean = torch.linspace(-1e6, 1e6, 4001, dtype=torch.float64)
    for std in 0.0, 1e-300, 1e-9, 1e-3, 1.0, 1e6:
        ei = expected_improvement(mean, torch.full_like(mean, std), 0.0)
        assert (ei >= mean.clamp(min=0) * (1 - 1e-12)).all()
        assert ei.isfinite().all() and (ei.diff() >= 0).all()
    for std in 1e-9, 1e-3, 1.0:
        log_ei = log_expected_improvement(mean, torch.full_like(mean, std), 0.0)
        assert log_ei.isfinite().all() and (log_ei.diff() > 0).all()
    z = torch.linspace(-103, 42, 145001, dtype=torch.float64)  # across every change of formula
    assert (log_expected_improvement(z, torch.ones_like(z), 0.0).diff() > 0).all()


def test_posterior_passes_through_the_points_and_returns_to_the_prior():
    x, y, _ = data(10, 3)
    gp = GP(x, y, 1.0, variance=1.5, noise=0)
    mean, std = gp.posterior(torch.cat([x, torch.full((1, 3), 1e3)]))
    close(mean[:-1], y)
    close(std[:-1], torch.zeros(10), 1e-6)
    close(mean[-1], y.mean())
    close(std[-1], math.sqrt(1.5) * y.std(correction=0))


def test_units_of_y_do_not_matter():
    x, y, _ = data(12, 4)
    a, b = GP.fit(x, y), GP.fit(x, 1e5 * y - 7e6)
    assert (a.lengthscale, a.noise) == (b.lengthscale, b.noise)
    mean, std = a.posterior(x + 0.1)
    close(b.posterior(x + 0.1)[0] / 1e5, mean - 70)
    close(b.posterior(x + 0.1)[1] / 1e5, std)
    close(b.log_marginal_likelihood(), a.log_marginal_likelihood(), 1e-6)


def test_far_from_the_origin():
    x, y, _ = data(12, 4)
    far, near = GP(x + 1e6, y, 1.0), GP(x, y, 1.0)
    close(far.posterior(x + 1e6 + 0.25)[0], near.posterior(x + 0.25)[0], 1e-6)


def test_any_array_in_float64_out_and_nothing_written_to():
    x, y, _ = data(5, 2)
    before = x.clone(), y.clone()
    with_gradient = x.clone().requires_grad_()
    forms = (x, y), (x.tolist(), y.tolist()), (x.numpy(), y.numpy()), (with_gradient, y)
    for points, values in forms:
        gp = GP(points, values, 1)
        gp.add(x[:1], y[:1]), suggest(gp, 1, x, generator=torch.Generator().manual_seed(0))
        mean, std = gp.posterior(x.float())
        assert mean.dtype == std.dtype == torch.float64 and not mean.requires_grad
        close(gp.alpha, GP(x, y, 1.0).alpha)
    assert torch.equal(x, before[0]) and torch.equal(y, before[1])
    x.zero_()
    assert torch.equal(gp.x, before[0])
    assert isinstance(gp.log_marginal_likelihood(), float)


def test_add_is_conditioning():
    x, y, _ = data(12, 3)
    gp = GP(x[:7], y[:7], 0.9, 1.3, 1e-4)
    L, one_by_one = gp.L.clone(), gp
    for i in range(7, 12):
        one_by_one = one_by_one.add(x[i : i + 1], y[i : i + 1])
    together = gp.add(x[7:], y[7:])
    assert torch.equal(gp.L, L) and len(gp.x) == 7  # the old one stays as it was
    for new in one_by_one, together:
        whole = GP(x, y, 0.9, 1.3, 1e-4)  # differs in its standardisation alone
        close(new.L, whole.L)
        close(new.alpha, torch.cholesky_solve(((y - gp.y_mean) / gp.y_std)[:, None], whole.L)[:, 0])
        close(new.posterior(x + 0.1)[1] / gp.y_std, whole.posterior(x + 0.1)[1] / whole.y_std)


def test_believing_the_mean_leaves_the_mean_and_lowers_the_std():
    x, y, g = data(8, 2)
    gp, xs = GP.fit(x, y), torch.randn(50, 2, generator=g, dtype=torch.float64)
    new = gp.add(xs[:3], gp.posterior(xs[:3])[0])
    close(new.posterior(xs)[0], gp.posterior(xs)[0])
    assert (new.posterior(xs)[1] <= gp.posterior(xs)[1] + 1e-9).all()


def test_fit_takes_the_most_probable_of_its_grid():
    def chosen(x, y, spread, log_prior):
        """The best of the grid by this log prior of (lengthscale, its centre)."""
        centre = spread * math.sqrt(x.shape[1] / 2)
        lengthscales = [centre * 10 ** (-1 + 2 * i / 19) for i in range(20)]
        noises = [10 ** (-6 + 1.25 * j) for j in range(5)]

        def objective(at):
            prior = log_prior(at[0], centre)
            return GP(x, y, at[0], 1.0, at[1]).log_marginal_likelihood() + prior

        return max(itertools.product(lengthscales, noises), key=objective)

    def prior(lengthscale, centre):
        return -(math.log(lengthscale / centre) ** 2) / (2 * 0.5**2)

    wrong = {  # each must choose otherwise somewhere, or the test would not notice it
        "no prior": lambda l, c: 0.0,
        "a std of sqrt 3": lambda l, c: -(math.log(l / c) ** 2) / (2 * 3),
        "a variance of 0.5": lambda l, c: -(math.log(l / c) ** 2) / (2 * 0.5),
        "a density of l": lambda l, c: prior(l, c) - math.log(l),
        "a centre for sqrt d": lambda l, c: prior(l, c * math.sqrt(2)),
        "a centre for [0, 1]^d": lambda l, c: prior(l, c / math.sqrt(12)),
        "one too large": lambda l, c: prior(l, c * math.exp(math.sqrt(2))),
    }
    noticed = set()
    for seed, (n, d, spread) in enumerate([(15, 3, 1.0), (5, 50, 1.0), (20, 6, 0.29), (10, 50, 3)]):
        x, y, _ = data(n, d, seed)
        x = x * spread
        gp = GP.fit(x, y, spread)
        right = chosen(x, y, spread, prior)
        close([gp.lengthscale, gp.noise], right)
        noticed |= {name for name in wrong if chosen(x, y, spread, wrong[name]) != right}
    assert noticed == set(wrong)


def test_fit_is_told_the_scale_of_its_region():
    x, y, _ = data(12, 4)
    one, ten = GP.fit(x, y), GP.fit(10 * x, y, 10)
    close([ten.lengthscale, ten.noise], [10 * one.lengthscale, one.noise])
    alone = GP.fit([[0.0] * 50], [1.0], 0.3).lengthscale
    assert (
        0.8 < alone / (0.3 * 5) < 1.25
    )  # one point says nothing: the prior's centre, sqrt(50 / 2)


def test_fit_sees_noise_and_a_trend_in_fifty_dimensions():
    x, _, g = data(40, 50)
    trend = x[:, 0] + x[:, 1]
    gp = GP.fit(x, trend)
    assert gp.lengthscale > 0.5 * math.sqrt(50)  # a lengthscale of 1 calls all points unrelated
    test = torch.randn(500, 50, generator=g, dtype=torch.float64)
    both = torch.stack([gp.posterior(test)[0], test[:, 0] + test[:, 1]])
    assert torch.corrcoef(both)[0, 1] > 0.5
    x, y, g = data(60, 1)
    assert GP.fit(x, y).noise < 1e-3 < GP.fit(x, y + 0.3 * torch.randn(60, generator=g)).noise


# ------------------------------------------------------------------------------ awkward input works


@pytest.mark.parametrize("value", [0.0, 0.1, -3e8])
@pytest.mark.parametrize("n, d", [(1, 1), (1, 2000), (7, 1), (7, 2000)])
def test_constant_y(n, d, value):
    x, _, g = data(n, d)
    for gp in GP.fit(x, [value] * n), GP(x, [value] * n, 1.0, noise=0):
        mean, std = gp.posterior(x + 1)
        close(mean, torch.full((n,), value))
        assert (std >= 0).all() and std.isfinite().all()
        assert math.isfinite(gp.log_marginal_likelihood())
    picks, ei = suggest(gp, 3, generator=g)
    assert picks.shape == (3, d) and (ei >= 0).all() and torch.unique(picks, dim=0).shape[0] == 3


@pytest.mark.parametrize("d", [1, 50, 2000])
def test_duplicate_points(d):
    x, _, g = data(1, d)
    x = x.repeat(5, 1)
    y = tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    for gp in GP.fit(x, y), GP(x, y, 1.0, noise=0):
        # their average; jitter alone sets them apart: condition 5e10
        close(gp.posterior(x[:1])[0], [3.0], 1e-4)
        assert suggest(gp, 2, generator=g)[0].isfinite().all()
    exact = GP(x[:1], y[:1], 1.0, noise=0).add(x[1:], y[:1].repeat(4))
    close(exact.posterior(x[:1])[0], [1.0])


def test_jitter_only_where_the_factorisation_fails():
    x, y, _ = data(6, 2)
    gp = GP(x, y, 1.0, noise=1e-3)
    K = gp._k(gp.x, gp.x) + 1e-3 * torch.eye(6).double()
    assert torch.equal(gp.L, torch.linalg.cholesky(K))
    well, singular = torch.eye(2).double() * 2, torch.ones(2, 2).double()
    L = module._cholesky(torch.stack([well, singular]), 0.0)
    assert torch.equal(L[0], torch.linalg.cholesky(well))
    close(L[1] @ L[1].T, singular + 1e-10 * torch.eye(2), 1e-14)


# --------------------------------------------------------------------- bad input says what is wrong


def one_point():
    return GP([[1.0]], [1.0], 1.0)


@pytest.mark.parametrize(
    "message, call",
    [
        ("x: contains NaN", lambda: GP([[NAN]], [1.0], 1.0)),
        ("x: contains NaN or infinity", lambda: GP.fit([[INF]], [1.0])),
        (
            "x: expected shape .at least 1, at least 1., got .2.",
            lambda: GP([1.0, 2.0], [1.0, 2.0], 1.0),
        ),
        (
            "x: expected shape .at least 1, at least 1., got .0, 2.",
            lambda: GP(torch.zeros(0, 2), [], 1.0),
        ),
        ("x: cannot be read", lambda: GP([[1.0], [2.0, 3.0]], [1.0, 2.0], 1.0)),
        ("x: cannot be read", lambda: GP(None, [1.0], 1.0)),
        ("y: contains NaN", lambda: GP.fit([[1.0]], [NAN])),
        ("y: expected shape .2., got .1.", lambda: GP([[1.0], [2.0]], [1.0], 1.0)),
        ("y: expected shape .2., got .2, 1.", lambda: GP.fit([[1.0], [2.0]], [[1.0], [2.0]])),
        ("y: values too large", lambda: GP.fit([[1.0], [2.0]], [1e308, -1e308])),
        ("y: values .* too small", lambda: GP.fit([[1.0], [2.0]], [1e-170, 2e-170])),
        ("lengthscale: must be greater than 0, got -1", lambda: GP([[1.0]], [1.0], -1)),
        ("lengthscale: contains NaN", lambda: GP([[1.0]], [1.0], NAN)),
        ("lengthscale: expected shape .., got .2.", lambda: GP([[1.0]], [1.0], [1.0, 2.0])),
        ("variance: must be greater than 0, got 0", lambda: GP([[1.0]], [1.0], 1.0, 0.0)),
        ("spread: must be greater than 0, got 0", lambda: GP.fit([[1.0]], [1.0], 0)),
        ("spread: contains NaN", lambda: GP.fit([[1.0]], [1.0], NAN)),
        ("noise: must be at least 0, got -1", lambda: GP([[1.0]], [1.0], 1.0, 1.0, -1.0)),
        (
            "xs: expected shape .at least 1, 1., got .1, 2.",
            lambda: one_point().posterior([[1.0, 2.0]]),
        ),
        ("xs: contains NaN", lambda: one_point().posterior([[NAN]])),
        (
            "x: expected shape .at least 1, 1., got .1, 2.",
            lambda: one_point().add([[1.0, 2.0]], [1.0]),
        ),
        ("y: contains NaN", lambda: one_point().add([[1.0]], [NAN])),
        ("mean: contains NaN", lambda: expected_improvement([NAN], [1.0], 0.0)),
        ("std: must not be negative", lambda: log_expected_improvement([1.0], [-1.0], 0.0)),
        (
            "std: expected shape .1., got .2.",
            lambda: probability_of_improvement([1.0], [1.0, 2.0], 0.0),
        ),
        ("best: contains NaN", lambda: expected_improvement([1.0], [1.0], NAN)),
        ("kappa: contains NaN", lambda: upper_confidence_bound([1.0], [1.0], NAN)),
        ("k: must be an integer of at least 1, got 0", lambda: suggest(one_point(), 0)),
        (
            "candidates: expected shape .at least 1, 1.",
            lambda: suggest(one_point(), 1, [[1.0, 2.0]]),
        ),
        (
            "acquisition: must be one of ei, pi, ucb, got x",
            lambda: suggest(one_point(), 1, acquisition="x"),
        ),
    ],
)
def test_bad_input(message, call):
    with pytest.raises(ValueError, match="^" + message):
        call()


# ---------------------------------------------------------------------------------- choosing points


@pytest.mark.parametrize("acquisition", ["ei", "pi", "ucb"])
def test_suggest(acquisition):
    x, y, g = data(10, 6)
    x = torch.special.ndtr(x)
    gp, box = GP.fit(x, y), torch.rand(2000, 6, generator=g, dtype=torch.float64)
    picks, ei = suggest(gp, 5, box, acquisition, torch.Generator().manual_seed(1))
    again = suggest(gp, 5, box, acquisition, torch.Generator().manual_seed(1))
    other = suggest(gp, 5, box, acquisition, torch.Generator().manual_seed(2))
    assert torch.equal(picks, again[0]) and torch.equal(ei, again[1])
    assert not torch.equal(picks, other[0])
    assert picks.shape == (5, 6) and ei.shape == (5,) and len(gp.x) == 10
    # variations never leave the box of the candidates
    assert (picks >= 0).all() and (picks <= 1).all()
    # all are different
    distances = torch.cdist(picks, torch.cat([picks, x]))
    assert distances.topk(2, largest=False)[0][:, 1].min() > 1e-3
    # the first is at least as good as every candidate, and carries its EI under the gp itself
    scores = {
        "ei": expected_improvement,
        "pi": probability_of_improvement,
        "ucb": lambda m, s, best: m + 2 * s,
    }
    best, first = (scores[acquisition](*gp.posterior(at), y.max()).max() for at in (box, picks[:1]))
    assert first >= best - 1e-12
    close(ei[0], expected_improvement(*gp.posterior(picks[:1]), y.max())[0])
    # the second, believing the first
    mean, _ = gp.posterior(picks[:1])
    believer = gp.add(picks[:1], mean)
    close(ei[1], expected_improvement(*believer.posterior(picks[1:2]), believer.y.max())[0])


def test_the_first_choice_of_ucb_has_the_largest_mean_plus_kappa_standard_deviations():
    x, y, g = data(10, 6)
    gp, candidates = GP.fit(x, y), torch.randn(2000, 6, generator=g, dtype=torch.float64)
    found = {}
    for kappa in (0.0, 2.0, 30.0):
        options = {"acquisition": "ucb", "generator": torch.Generator().manual_seed(1)}
        picks, _ = suggest(gp, 1, candidates, kappa=kappa, **options)
        mean, std = gp.posterior(torch.cat([picks, candidates]))
        assert (mean + kappa * std).argmax() == 0
        found[kappa] = mean[0], std[0]
    assert found[0.0][0] > found[2.0][0] and found[30.0][1] > found[2.0][1] > found[0.0][1]


def test_suggest_draws_from_a_standard_normal_by_default():
    x, y, _ = data(5, 50)
    picks, _ = suggest(GP.fit(x, y), 5, generator=torch.Generator().manual_seed(0))
    assert picks.shape == (5, 50) and 0.4 < picks.std() < 1.2


@pytest.mark.parametrize(
    "name, factor", [("Branin", 0.25), ("Hartmann-6", 0.4), ("4-d bowl in 50-d", 0.4)]
)
def test_search_beats_random_search(name, factor):
    def searching(x, y, g):
        box = torch.rand(1000, x.shape[1], generator=g, dtype=torch.float64)
        return suggest(GP.fit(x, y, CUBE), 5, box, generator=g)[0]

    ours = [regret(name, seed, searching) for seed in range(5)]
    chance = [regret(name, seed, at_random) for seed in range(5)]
    assert statistics.median(ours) < factor * statistics.median(chance)
