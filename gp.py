"""Gaussian-process regression and Bayesian optimisation of an expensive function; needs only torch.

    gp = GP.fit(x, y)               # x [n, d], y [n]: what has been evaluated
    mean, std = gp.posterior(xs)    # what that says about other points xs [m, d]
    picks, ei = suggest(gp, k=5)    # the k points to evaluate next, if y is to become large

Tensors, arrays and lists are accepted; results are float64 on the CPU, which is fastest for so few
points, and carry no gradients. A ValueError names the argument that cannot be used, and says why.
Symbols and equations: Rasmussen & Williams, Gaussian Processes for Machine Learning, 2006 (R&W).
"""

import copy
import math

import torch
from torch import Tensor

# --------------------------------------------------------------------------------- Gaussian process


def _matern(a: Tensor, b: Tensor, lengthscale: Tensor | float) -> Tensor:
    """Correlation of a [n, d] and b [m, d], [..., n, m]: Matern with nu = 5/2 (R&W eq. 4.17)."""
    # Not the RBF: its infinite smoothness suits few functions, and its matrix becomes singular much
    # sooner where points are close. Nor |a|^2 - 2ab + |b|^2, which cancels for such points.
    r = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist") / lengthscale
    t = math.sqrt(5) * r
    return (1 + t + t.square() / 3) * torch.exp(-t)


class GP:
    """Posterior of y = f(x) + noise for f ~ GP(mean of y, Matern-5/2 kernel) (R&W alg. 2.1).

    x [n, d], y [n], n and d at least 1; duplicate points and a constant y are welcome. lengthscale
    is in the units of x, one for all dimensions. variance and noise (a variance too, 0 is allowed)
    are those of z = (y - y_mean) / y_std, so that 1.0 and 1e-6 suit y of any scale. Equals
    scikit-learn's GaussianProcessRegressor(variance * Matern(lengthscale, nu=2.5), alpha=noise,
    optimizer=None, normalize_y=True). No method modifies a GP. Raises ValueError.
    """

    def __init__(
        self, x: Tensor, y: Tensor, lengthscale: float, variance: float = 1.0, noise: float = 1e-6
    ):
        self.x = _read("x", x, None, None).clone()  # must not change with the caller's array
        self.y = _read("y", y, len(self.x)).clone()
        self.lengthscale = _read_positive("lengthscale", lengthscale)
        self.variance = _read_positive("variance", variance)
        self.noise = _read("noise", noise).item()
        if self.noise < 0:
            raise ValueError(f"noise: must be at least 0, got {self.noise}")
        self.z, self.y_mean, self.y_std = _standardise(self.y)
        self.L = _cholesky(self._k(self.x, self.x), self.noise, self.variance)  # line 2: [n, n]
        self.alpha = torch.cholesky_solve(self.z[:, None], self.L)[:, 0]  # line 3: [n]

    def _k(self, a: Tensor, b: Tensor) -> Tensor:
        return self.variance * _matern(a, b, self.lengthscale)

    def posterior(self, xs: Tensor) -> tuple[Tensor, Tensor]:
        """xs [m, d] -> mean [m], std [m] of f (not of y), in y's units. Raises ValueError."""
        return self._posterior(self._k(self.x, _read("xs", xs, None, self.x.shape[1])))

    def _posterior(self, Ks: Tensor) -> tuple[Tensor, Tensor]:  # Ks = k(x, xs) [n, m]
        mean = self.alpha @ Ks  # line 4: [m]
        v = torch.linalg.solve_triangular(self.L, Ks, upper=False)  # line 5: [n, m]
        variance = (self.variance - v.square().sum(0)).clamp(min=0)  # line 6: [m]
        return self.y_mean + self.y_std * mean, self.y_std * variance.sqrt()

    def log_marginal_likelihood(self) -> float:
        """log p(z | x) (R&W eq. 2.30). That of y itself is lower by n log(y_std)."""
        return _log_likelihood(self.L, self.z).item()

    @classmethod
    def fit(cls, x: Tensor, y: Tensor, spread: float = 1.0) -> "GP":
        """GP(x, y, lengthscale, 1.0, noise) of the largest marginal likelihood times prior (grid).

        spread: standard deviation of a coordinate in the region to search: 1 for N(0, I), 1 /
        sqrt(12) for [0, 1]^d. The lengthscale's prior is log-normal: its median is half the
        distance of two random points, sqrt(2 d) spread / 2; the log's std is 0.5, since few points
        say little (Hvarfner et al. 2024: 20 times that median, std sqrt(3)). Raises ValueError.
        """
        x = _read("x", x, None, None)
        y = _read("y", y, len(x))
        centre = math.sqrt(x.shape[1] / 2) * _read_positive("spread", spread)
        lengthscale = centre * torch.logspace(-1, 1, 20, dtype=x.dtype)  # [20]
        noise = torch.logspace(-6, -1, 5, dtype=x.dtype)  # [5]
        L = _cholesky(_matern(x, x, lengthscale[:, None, None, None]), noise)  # [20, 5, n, n]
        log_prior = -((lengthscale / centre).log() / 0.5).square()[:, None] / 2  # [20, 1]
        best = int((_log_likelihood(L, _standardise(y)[0]) + log_prior).argmax())
        i, j = divmod(best, len(noise))
        return cls(x, y, lengthscale[i], 1.0, noise[j])

    def add(self, x: Tensor, y: Tensor) -> "GP":
        """A GP that also knows x [k, d], y [k], in O(n^2 k) by extending L. Raises ValueError."""
        x = _read("x", x, None, self.x.shape[1])
        y = _read("y", y, len(x))
        new = copy.copy(self)
        new.x, new.y = torch.cat([self.x, x]), torch.cat([self.y, y])
        new.z = (new.y - self.y_mean) / self.y_std  # not standardised again: the prior stays
        B = torch.linalg.solve_triangular(self.L, self._k(self.x, x), upper=False)  # [n, k]
        C = _cholesky(self._k(x, x) - B.T @ B, self.noise, self.variance)  # [k, k]
        new.L = torch.cat([torch.cat([self.L, torch.zeros_like(B)], 1), torch.cat([B.T, C], 1)])
        new.alpha = torch.cholesky_solve(new.z[:, None], new.L)[:, 0]
        return new


# -------------------------------------------------------------------------------------- acquisition


def expected_improvement(mean: Tensor, std: Tensor, best: float) -> Tensor:
    """E[max(f - best, 0)] for f ~ N(mean, std^2): mean [m], std [m] -> [m], never negative.

    For maximisation (Jones et al. 1998, with the signs turned round). Raises ValueError.
    """
    return log_expected_improvement(mean, std, best).exp()


def log_expected_improvement(mean: Tensor, std: Tensor, best: float) -> Tensor:
    """log of expected_improvement: mean [m], std [m] -> [m]. Raises ValueError.

    log EI = log std + log h(z), z = (mean - best) / std, h(z) = phi(z) + z Phi(z) (Ament et al.
    2023, arXiv 2310.20708). Minus infinity only where std is 0, not where EI underflows to 0.
    """
    mean, std, best = *_read_belief(mean, std), _read("best", best)
    z = (mean - best) / std
    log_phi = -z.square() / 2 - math.log(2 * math.pi) / 2
    high = (log_phi.exp() + z * torch.special.ndtr(z)).log()  # -1 < z: nothing cancels
    t = -z.clamp(max=-1)
    mills = math.sqrt(math.pi / 2) * torch.special.erfcx(t / math.sqrt(2))  # (1 - Phi(t)) / phi(t)
    low = log_phi + torch.log1p(-t * mills)  # -100 < z <= -1
    lowest = log_phi - 2 * t.log() + torch.log1p(-3 / t**2 + 15 / t**4)  # z <= -100: its series
    log_h = torch.where(z > -1, high, torch.where(z > -100, low, lowest))
    # beyond z = 40, and without any uncertainty, the improvement is certain
    return torch.where((std > 0) & (z < 40), std.log() + log_h, (mean - best).clamp(min=0).log())


def probability_of_improvement(mean: Tensor, std: Tensor, best: float) -> Tensor:
    """P(f > best), f ~ N(mean, std^2): mean, std [m] -> [m] (Kushner 1964). Raises ValueError."""
    mean, std, best = *_read_belief(mean, std), _read("best", best)
    return torch.where(std > 0, torch.special.ndtr((mean - best) / std), (mean > best).double())


def upper_confidence_bound(mean: Tensor, std: Tensor, kappa: float = 2.0) -> Tensor:
    """mean [m] + kappa std [m] -> [m] (Srinivas et al. 2010, beta = kappa^2). Raises ValueError."""
    mean, std, kappa = *_read_belief(mean, std), _read("kappa", kappa)
    return mean + kappa * std


SCORES = {  # what suggest ranks by: (mean, std, best, kappa) -> [m]; pi: PI's order, unrounded
    "ei": lambda mean, std, best, kappa: log_expected_improvement(mean, std, best),
    "pi": lambda mean, std, best, kappa: (mean - best) / std.clamp(min=1e-300),
    "ucb": lambda mean, std, best, kappa: upper_confidence_bound(mean, std, kappa),
}


def suggest(
    gp: GP,
    k: int = 1,
    candidates: Tensor | None = None,
    acquisition: str = "ei",
    generator: torch.Generator | None = None,
    kappa: float = 2.0,
) -> tuple[Tensor, Tensor]:
    """The k points to evaluate together next, to make y large, [k, d], and EI at each choice, [k].

    candidates [m, d] are random points of the region to search: torch.rand(5000, d) for a box
    [0, 1]^d; by default 5,000 draws from N(0, I). acquisition: "ei", "pi", or "ucb" with its kappa.
    Each point is the best of the candidates and of variations of the best x so far, refined by two
    rounds of closer variations. The next is chosen as if that point's value were its posterior mean
    (kriging believer: Ginsbourger et al. 2010). Equal generators, equal points. Raises ValueError.
    """
    if not isinstance(k, int) or k < 1:
        raise ValueError(f"k: must be an integer of at least 1, got {k}")
    if acquisition not in SCORES:
        raise ValueError(f"acquisition: must be one of {', '.join(SCORES)}, got {acquisition}")
    if candidates is None:
        candidates = torch.randn(5000, gp.x.shape[1], generator=generator, dtype=gp.x.dtype)
    candidates = _read("candidates", candidates, None, gp.x.shape[1])
    pool = torch.cat([candidates, _vary(gp.x[gp.y.argmax()], candidates, 1.0, generator)])
    Ks = torch.cat([gp._k(gp.x, pool), pool.new_empty(k, len(pool))])  # costly; a pick adds a row
    picks, values = [], []
    while len(picks) < k:
        n, best = len(gp.x), gp.y.max()
        scores = SCORES[acquisition](*gp._posterior(Ks[:n]), best, kappa)
        x = pool[scores.argmax()]
        for reach in 0.7, 0.2:
            near = torch.cat([x[None], _vary(x, candidates, reach, generator)])
            x = near[SCORES[acquisition](*gp.posterior(near), best, kappa).argmax()]
        mean, std = gp.posterior(x[None])
        picks.append(x)
        values.append(expected_improvement(mean, std, best))
        gp = gp.add(x[None], mean)
        Ks[n] = gp._k(x[None], pool)[0]
    return torch.stack(picks), torch.cat(values)


def _vary(x: Tensor, candidates: Tensor, reach: float, generator: torch.Generator | None) -> Tensor:
    """256 variations of x [d]: some coordinates moved towards those of random candidates."""
    # From one coordinate to all: in many dimensions a step in all makes every variation equally far
    # and equally poor (Regis & Shoemaker 2013). Convex: a box around the candidates is never left.
    towards = candidates[torch.randint(len(candidates), (256,), generator=generator)]  # [256, d]
    share = torch.rand(256, 1, generator=generator, dtype=x.dtype).square().clamp(min=1 / len(x))
    moved = torch.rand(towards.shape, generator=generator, dtype=x.dtype) < share  # [256, d]
    step = reach * torch.rand(256, 1, generator=generator, dtype=x.dtype)
    return torch.where(moved, x + step * (towards - x), x)


# ------------------------------------------------------------------------------ numerics and checks


def _standardise(y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(y - mean) / std, mean, std: the std over n, not n - 1, and 1 where y is constant."""
    mean, std = y.mean(), y.std(correction=0)
    if not std.isfinite() or 0 < y.abs().max() < 1e-150:  # their squares would be 0
        raise ValueError("y: values too large or too small to be standardised in float64")
    if std <= 1e-12 * y.abs().max():  # constant up to rounding
        std = torch.ones_like(std)
    return (y - mean) / std, mean, std


def _cholesky(K: Tensor, noise: Tensor | float, scale: float = 1.0) -> Tensor:
    """K [..., n, n] with entries of that scale, noise [...] -> lower L, L L^T = K + noise I."""
    # jitter only where a pivot is negative or lost in rounding: 1e-10 of the scale, then tenfold
    eye = torch.eye(K.shape[-1], dtype=K.dtype)
    K = K + torch.as_tensor(noise, dtype=K.dtype)[..., None, None] * eye
    jitter = torch.zeros(K.shape[:-2], dtype=K.dtype)
    while True:
        L, info = torch.linalg.cholesky_ex(K + jitter[..., None, None] * eye)
        smallest_pivot = L.diagonal(dim1=-2, dim2=-1).square().amin(-1)
        failed = (info > 0) | (smallest_pivot < len(eye) * 1e-15 * scale)
        if not failed.any():
            return L
        if jitter.max() > scale:
            raise ValueError("x: kernel matrix not positive definite; coordinates too large?")
        jitter = torch.where(failed, (10 * jitter).clamp(min=1e-10 * scale), jitter)


def _log_likelihood(L: Tensor, z: Tensor) -> Tensor:
    """L [..., n, n], z [n] -> log p(z) [...] under N(0, L L^T) (R&W eq. 2.30, alg. 2.1 line 7)."""
    v = torch.linalg.solve_triangular(L, z[:, None], upper=False)  # v^T v = z^T K^-1 z
    log_det = 2 * L.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return -(v.square().sum((-2, -1)) + log_det + len(z) * math.log(2 * math.pi)) / 2


def _read(name: str, value: Tensor, *shape: int | None) -> Tensor:
    """value as a finite float64 CPU tensor of this shape, where None allows any length from 1."""
    try:
        value = value.detach().cpu() if isinstance(value, Tensor) else value
        value = torch.as_tensor(value, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name}: cannot be read as an array of numbers ({error})") from None
    fits = [n == want or (want is None and n > 0) for n, want in zip(value.shape, shape)]
    if value.ndim != len(shape) or not all(fits):
        wanted = ", ".join(str(want or "at least 1") for want in shape)
        raise ValueError(f"{name}: expected shape [{wanted}], got {list(value.shape)}")
    if not value.isfinite().all():
        raise ValueError(f"{name}: contains NaN or infinity")
    return value


def _read_positive(name: str, value: float) -> float:
    if (number := _read(name, value).item()) <= 0:
        raise ValueError(f"{name}: must be greater than 0, got {number}")
    return number


def _read_belief(mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
    mean = _read("mean", mean, None)
    std = _read("std", std, len(mean))
    if (std < 0).any():
        raise ValueError("std: must not be negative")
    return mean, std
