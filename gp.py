"""Gaussian-process regression and Bayesian optimisation of an expensive function, in one file that needs only torch.

    gp = GP.fit(x, y)               # x [n, d], y [n]: what has been evaluated; hyperparameters by marginal likelihood
    mean, std = gp.posterior(xs)    # what that says about xs [m, d]
    picks, ei = suggest(gp, k=5)    # the k points worth evaluating next, if y is to become large

Tensors, arrays and lists are accepted. Everything is computed, and returned, in float64 on the CPU, where points this
few are quicker than anywhere else; no gradients flow through. Whatever is random takes a torch.Generator. Unusable
input raises a ValueError that names the argument and says what is wrong with it.

Symbols, equations and algorithms: Rasmussen & Williams, Gaussian Processes for Machine Learning, 2006 (R&W).
"""

import math

import torch


def _read(name, value, *shape):
    """value as a finite float64 CPU tensor of this shape; None in the shape allows any length from 1."""
    try:
        value = value.detach().cpu() if isinstance(value, torch.Tensor) else value
        value = torch.as_tensor(value, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name}: cannot be read as an array of numbers ({error})") from None
    if value.ndim != len(shape) or any(n != want if want else n == 0 for n, want in zip(value.shape, shape)):
        wanted = ", ".join(str(want or "at least 1") for want in shape)
        raise ValueError(f"{name}: expected shape [{wanted}], got {list(value.shape)}")
    if not value.isfinite().all():
        raise ValueError(f"{name}: contains NaN or infinity")
    return value


def _read_points(x, y):
    x = _read("x", x, None, None)
    return x.clone(), _read("y", y, len(x)).clone()         # a GP must not change with its caller's arrays


def _standardise(y):
    """(y - mean) / std, mean, std: the population's std (over n, not n - 1), or 1 where y is constant."""
    mean, std = y.mean(), y.std(correction=0)
    if not std.isfinite():
        raise ValueError("y: values too large to be standardised in float64")
    if std <= 1e-12 * y.abs().max():        # constant up to rounding
        std = torch.ones_like(std)
    return (y - mean) / std, mean, std


def _distance(a, b):
    """a [n, d], b [m, d] -> [n, m]. Not by |a|^2 - 2ab + |b|^2, which cancels for points close together."""
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


def _matern(r):
    """Correlation at distance r, in lengthscales, any shape: Matern with nu = 5/2 (R&W eq. 4.17).

    Not the RBF, which supposes infinite smoothness: scores of generated text have little, and where the search closes
    in on a point the RBF's matrix becomes singular long before this one does.
    """
    t = math.sqrt(5) * r
    return (1 + t + t.square() / 3) * torch.exp(-t)


def _cholesky(K, noise, scale=1.0):
    """K [..., n, n] with entries of that scale, noise [...] -> lower L [..., n, n] with L L^T = K + noise I.

    A factorisation fails if a pivot is negative or lost in rounding. Jitter goes only to the matrices that fail: 1e-10
    of the scale, tenfold at each new attempt.
    """
    eye = torch.eye(K.shape[-1], dtype=K.dtype)
    K = K + torch.as_tensor(noise, dtype=K.dtype)[..., None, None] * eye
    jitter = torch.zeros(K.shape[:-2], dtype=K.dtype)
    while True:
        L, info = torch.linalg.cholesky_ex(K + jitter[..., None, None] * eye)
        failed = (info > 0) | (L.diagonal(dim1=-2, dim2=-1).square().amin(-1) < len(eye) * 1e-15 * scale)
        if not failed.any():
            return L
        if jitter.max() > scale:
            raise ValueError("x: kernel matrix not positive definite; are the coordinates too large for float64?")
        jitter = torch.where(failed, (10 * jitter).clamp(min=1e-10 * scale), jitter)


def _log_likelihood(L, z):
    """L [..., n, n], z [n] -> log p(z) [...] under N(0, L L^T) (R&W eq. 2.30, alg. 2.1 line 7)."""
    v = torch.linalg.solve_triangular(L, z[:, None].expand(*L.shape[:-1], 1), upper=False)  # v^T v = z^T K^-1 z
    log_det = 2 * L.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return -(v.square().sum((-2, -1)) + log_det + len(z) * math.log(2 * math.pi)) / 2


class GP:
    """Posterior of y = f(x) + noise for f ~ GP(mean of y, Matern-5/2 kernel) (R&W alg. 2.1). Never modified.

    x [n, d], y [n], n and d at least 1; duplicate points and a constant y are welcome. `lengthscale` is in the units
    of x, one for all dimensions. y is standardised inside, z = (y - mean) / std with the population's std (1 where y
    is constant), and the posterior is restored to y's units. `variance` and `noise` (a variance too; 0 is allowed) are
    those of z, so that 1.0 and 1e-6 suit y of any scale.
    Equals scikit-learn's GaussianProcessRegressor(variance * Matern(lengthscale, nu=2.5), alpha=noise, optimizer=None,
    normalize_y=True). Kept as attributes: the arguments, y_mean, y_std, z, L and alpha. Raises ValueError.
    """

    def __init__(self, x, y, lengthscale, variance=1.0, noise=1e-6):
        self.x, self.y = _read_points(x, y)
        for name, value in ("lengthscale", lengthscale), ("variance", variance), ("noise", noise):
            value = _read(name, value).item()
            if value < 0 or value == 0 and name != "noise":
                raise ValueError(f"{name}: must be {'at least' if name == 'noise' else 'greater than'} 0, got {value}")
            setattr(self, name, value)
        self.z, self.y_mean, self.y_std = _standardise(self.y)
        self.L = _cholesky(self._k(self.x, self.x), self.noise, self.variance)      # alg. 2.1 line 2: [n, n]
        self.alpha = torch.cholesky_solve(self.z[:, None], self.L)[:, 0]            # line 3: [n]

    @classmethod
    def fit(cls, x, y):
        """GP(x, y, lengthscale, 1.0, noise), the two chosen together by marginal likelihood times lengthscale prior.

        The prior, LogNormal(sqrt 2 + log(d) / 2, sqrt 3) (Hvarfner et al. 2024, arXiv 2402.02229), grows with sqrt(d)
        as distances between points do: at a lengthscale of 1, in 50 dimensions, all points would be unrelated. It
        expects x of about unit scale, as in [0, 1]^d or N(0, I). Tried are 20 lengthscales, 0.05 to 10 sqrt(d), times 5
        noises, 1e-6 to 1e-1, in one batched Cholesky of [20, 5, n, n]. Raises ValueError.
        """
        x, y = _read_points(x, y)
        d = x.shape[1]
        lengthscale = math.sqrt(d) * torch.logspace(math.log10(0.05), 1, 20, dtype=x.dtype)[:, None]        # [20, 1]
        noise = torch.logspace(-6, -1, 5, dtype=x.dtype)                                                    # [5]
        K = _matern(_distance(x, x) / lengthscale[..., None])                                            # [20, n, n]
        L = _cholesky(K[:, None], noise)                                                              # [20, 5, n, n]
        log_l = lengthscale.log()
        log_prior = -(log_l - math.sqrt(2) - math.log(d) / 2).square() / (2 * 3) - log_l        # up to a constant
        best = int((_log_likelihood(L, _standardise(y)[0]) + log_prior).argmax())                             # [20, 5]
        return cls(x, y, lengthscale[best // 5, 0], 1.0, noise[best % 5])

    def _k(self, a, b):
        return self.variance * _matern(_distance(a, b) / self.lengthscale)

    def posterior(self, xs):
        """xs [m, d] -> mean [m], std [m] of f(xs), in y's units; std is f's, without the noise. Raises ValueError."""
        return self._posterior(self._k(self.x, _read("xs", xs, None, self.x.shape[1])))

    def _posterior(self, Ks):                                                   # Ks = k(x, xs) [n, m]
        v = torch.linalg.solve_triangular(self.L, Ks, upper=False)              # alg. 2.1 line 5
        variance = (self.variance - v.square().sum(0)).clamp(min=0)             # line 6
        return self.y_mean + self.y_std * (self.alpha @ Ks), self.y_std * variance.sqrt()

    def log_marginal_likelihood(self):
        """log p(z | x), a float: of the standardised y, as scikit-learn's with normalize_y=True (R&W eq. 2.30).

        That of y itself is lower by n log(y_std).
        """
        return _log_likelihood(self.L, self.z).item()

    def add(self, x, y):
        """A new GP that also knows x [k, d], y [k], in O(n^2 k) by extending the factor. Raises ValueError.

        Conditioning only: hyperparameters stay, and so does the standardisation, hence the prior. A GP made from all
        points at once would standardise again.
        """
        x, y = _read_points(x, y)
        x = _read("x", x, None, self.x.shape[1])
        new = object.__new__(GP)
        new.__dict__.update(self.__dict__)
        new.x, new.y = torch.cat([self.x, x]), torch.cat([self.y, y])
        new.z = (new.y - self.y_mean) / self.y_std
        B = torch.linalg.solve_triangular(self.L, self._k(self.x, x), upper=False)              # [n, k]
        C = _cholesky(self._k(x, x) - B.T @ B, self.noise, self.variance)                       # [k, k]
        new.L = torch.cat([torch.cat([self.L, torch.zeros_like(B)], 1), torch.cat([B.T, C], 1)])
        new.alpha = torch.cholesky_solve(new.z[:, None], new.L)[:, 0]
        return new


def _read_belief(mean, std):
    mean = _read("mean", mean, None)
    std = _read("std", std, len(mean))
    if (std < 0).any():
        raise ValueError("std: must not be negative")
    return mean, std


def log_expected_improvement(mean, std, best):
    """log of expected_improvement: mean [m], std [m], best -> [m]. Raises ValueError.

    log EI = log std + log h(z), z = (mean - best) / std, h(z) = phi(z) + z Phi(z) (Ament et al. 2023, arXiv
    2310.20708). Finite where EI itself underflows to 0, so that candidates far below the best can still be ranked;
    minus infinity only where std is 0 and mean <= best.
    """
    (mean, std), best = _read_belief(mean, std), _read("best", best)
    z = (mean - best) / std
    log_phi = -z.square() / 2 - math.log(2 * math.pi) / 2
    high = (log_phi.exp() + z * torch.special.ndtr(z)).log()                        # -1 < z: nothing cancels
    t = -z.clamp(max=-1)
    mills = math.sqrt(math.pi / 2) * torch.special.erfcx(t / math.sqrt(2))          # (1 - Phi(t)) / phi(t)
    low = log_phi + torch.log1p(-t * mills)                                         # -100 < z <= -1
    lowest = log_phi - 2 * t.log() + torch.log1p(-3 / t**2 + 15 / t**4)             # as t mills -> 1: its series
    log_h = torch.where(z > -1, high, torch.where(z > -100, low, lowest))
    # beyond z = 40, and without any uncertainty, the improvement is certain
    return torch.where((std > 0) & (z < 40), std.log() + log_h, (mean - best).clamp(min=0).log())


def expected_improvement(mean, std, best):
    """E[max(f - best, 0)] for f ~ N(mean, std^2): mean [m], std [m], best -> [m], never negative. Raises ValueError.

    For maximisation (Jones et al. 1998, with the signs turned round).
    """
    return log_expected_improvement(mean, std, best).exp()


def probability_of_improvement(mean, std, best):
    """P(f > best) for f ~ N(mean, std^2): mean [m], std [m], best -> [m] (Kushner 1964). Raises ValueError."""
    (mean, std), best = _read_belief(mean, std), _read("best", best)
    return torch.where(std > 0, torch.special.ndtr((mean - best) / std), (mean > best).double())


def upper_confidence_bound(mean, std, kappa=2.0):
    """mean + kappa std: mean [m], std [m] -> [m] (Srinivas et al. 2010, whose beta is kappa^2). Raises ValueError."""
    (mean, std), kappa = _read_belief(mean, std), _read("kappa", kappa)
    return mean + kappa * std


SCORES = {                                              # what suggest ranks by: (mean, std, best) -> [m]
    "ei": log_expected_improvement,
    "pi": lambda mean, std, best: (mean - best) / std.clamp(min=1e-300),    # PI's order, where PI itself is 0 or 1 too
    "ucb": lambda mean, std, best: upper_confidence_bound(mean, std),
}


def _vary(x, candidates, reach, generator, m=256):
    """x [d] -> [m, d]: x with some coordinates moved towards those of a random candidate, by up to `reach` of the way.

    From one coordinate to all of them: in many dimensions a step in all makes every variant equally far and equally
    poor (Regis & Shoemaker 2013). Convex, so a box that holds the candidates holds these.
    """
    towards = candidates[torch.randint(len(candidates), (m,), generator=generator)]             # [m, d]
    share = torch.rand(m, 1, generator=generator, dtype=x.dtype).square().clamp(min=1 / len(x))
    moved = torch.rand(towards.shape, generator=generator, dtype=x.dtype) < share
    step = reach * torch.rand(m, 1, generator=generator, dtype=x.dtype)
    return torch.where(moved, x + step * (towards - x), x)


def suggest(gp, k=1, candidates=None, acquisition="ei", generator=None):
    """The k points to evaluate together next, to make y large, [k, d], and each one's EI when chosen, [k].

    candidates [m, d] are random points of the region to search: torch.rand(5000, d) for a box [0, 1]^d; by default
    5,000 draws from N(0, I). acquisition is "ei", "pi" or "ucb". Each point is the best of the candidates and of
    variations of the best x so far, refined by two rounds of closer variations. The next is then chosen as if
    the point's value were known to be its posterior mean (kriging believer: Ginsbourger et al. 2010). The same
    generator state gives the same points. Raises ValueError.
    """
    d = gp.x.shape[1]
    if not isinstance(k, int) or k < 1:
        raise ValueError(f"k: must be an integer of at least 1, got {k}")
    if acquisition not in SCORES:
        raise ValueError(f"acquisition: must be one of {', '.join(SCORES)}, got {acquisition}")
    if candidates is None:
        candidates = torch.randn(5000, d, generator=generator, dtype=gp.x.dtype)
    candidates = _read("candidates", candidates, None, d)
    pool = torch.cat([candidates, _vary(gp.x[gp.y.argmax()], candidates, 1.0, generator)])
    Ks = torch.cat([gp._k(gp.x, pool), pool.new_empty(k, len(pool))])       # the costly part: a pick only adds a row
    picks, values = [], []
    while len(picks) < k:
        n, best = len(gp.x), gp.y.max()
        score = SCORES[acquisition](*gp._posterior(Ks[:n]), best)
        x, top = pool[score.argmax()], score.max()
        for reach in 0.7, 0.2:
            near = _vary(x, candidates, reach, generator)
            score = SCORES[acquisition](*gp.posterior(near), best)
            if score.max() > top:
                x, top = near[score.argmax()], score.max()
        mean, std = gp.posterior(x[None])
        picks.append(x)
        values.append(expected_improvement(mean, std, best))
        gp = gp.add(x[None], mean)
        Ks[n] = gp._k(x[None], pool)[0]
    return torch.stack(picks), torch.cat(values)
