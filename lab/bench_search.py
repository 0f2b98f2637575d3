"""Benches of gp.py: how long a round of Soft Reasoning takes it, and how well it searches.

python -m lab.bench --gp --against botorch
python -m lab.bench --regret --against botorch --repeats 20
"""

import math
import statistics
import sys
from collections.abc import Callable

import numpy as np
import torch
from torch import Generator, Tensor

from gp import GP, suggest
from lab import peers, timing

# --------------------------------------------------------------------------------------- functions
# To be maximised, on the unit cube.

CUBE = 1 / math.sqrt(12)  # standard deviation of each coordinate there


def branin(x: Tensor) -> Tensor:
    """[m, 2] in the unit square -> [m]; maximum -0.397887."""
    a, b = 15 * x[:, 0] - 5, 15 * x[:, 1]
    bowl = (b - 5.1 / (4 * math.pi**2) * a**2 + 5 / math.pi * a - 6) ** 2
    return -(bowl + 10 * (1 - 1 / (8 * math.pi)) * a.cos() + 10)


def hartmann6(x: Tensor) -> Tensor:
    """[m, 6] in the unit cube -> [m]; maximum 3.322368."""
    A = [[10, 3, 17, 3.5, 1.7, 8], [0.05, 10, 17, 0.1, 8, 14]]
    A += [[3, 3.5, 1.7, 10, 17, 8], [17, 8, 0.05, 10, 0.1, 14]]
    P = [[1312, 1696, 5569, 124, 8283, 5886], [2329, 4135, 8307, 3736, 1004, 9991]]
    P += [[2348, 1451, 3522, 2883, 3047, 6650], [4047, 8828, 8732, 5743, 1091, 381]]
    A, P, weights = (torch.tensor(rows).to(x) for rows in (A, P, [1.0, 1.2, 3.0, 3.2]))
    return torch.exp(-(A * (x[:, None] - P / 1e4) ** 2).sum(-1)) @ weights


def bowl50(x: Tensor) -> Tensor:
    """[m, 50] in the unit cube -> [m]; maximum 0.

    A bowl in 4 directions, none along an axis, the rest without effect.
    """
    g = Generator().manual_seed(123)
    directions = torch.linalg.qr(torch.randn(50, 4, generator=g, dtype=torch.float64))[0]
    u = (x - 0.5) * math.sqrt(12)  # of variance 1
    return -(u @ directions - torch.tensor([1.0, -1.0, 1.0, -1.0]).to(x)).square().sum(1)


FUNCTIONS = {  # function, its dimensions, its maximum
    "Branin": (branin, 2, -0.39788735772973816),
    "Hartmann-6": (hartmann6, 6, 3.32236801141551),
    "4-d bowl in 50-d": (bowl50, 50, 0.0),
}

# ------------------------------------------------------------------------------------------ regret

Propose = Callable[[Tensor, Tensor, Generator], Tensor]  # x [n, d], y [n] -> [5, d]


def regret(name: str, seed: int, propose: Propose) -> float:
    """Simple regret after 40 evaluations: 5 random ones, and 7 batches of 5 that are proposed."""
    (f, d, maximum), g = FUNCTIONS[name], Generator().manual_seed(seed)
    x = torch.rand(5, d, generator=g, dtype=torch.float64)
    while len(x) < 40:
        x = torch.cat([x, propose(x, f(x), g)])
    return maximum - f(x).max().item()


def at_random(x: Tensor, y: Tensor, g: Generator) -> Tensor:
    return torch.rand(5, x.shape[1], generator=g, dtype=torch.float64)


def by_gp(x: Tensor, y: Tensor, g: Generator) -> Tensor:
    pool = torch.rand(5000, x.shape[1], generator=g, dtype=torch.float64)
    return suggest(GP.fit(x, y, CUBE), 5, pool, generator=g)[0]


def measure_regret(against: list[str], seeds: int) -> list[str]:
    """Does the search search? Lines of Markdown: median simple regret over the seeds, quartiles."""
    torch.set_num_threads(1)
    contenders = {"random": at_random, "gp.py": by_gp}
    if "botorch" in against and (propose := peers.made("botorch", peers.botorch_batch)):
        contenders["BoTorch qLogEI"] = propose
    about = f"{seeds} seeds: median (quartiles); torch {torch.__version__}"
    lines = [f"simple regret after 40 evaluations in batches of 5, {about}", ""]
    lines += [f"| function | {' | '.join(contenders)} |", "|---" * (len(contenders) + 1) + "|"]
    for name in FUNCTIONS:
        cells = []
        for propose in contenders.values():
            found = [regret(name, seed, propose) for seed in range(seeds)]
            low, middle, high = np.quantile(found, [0.25, 0.5, 0.75])
            cells.append(f"{middle:.3g} ({low:.3g} to {high:.3g})")
        lines.append(f"| {name} | {' | '.join(cells)} |")
        print(lines[-1], file=sys.stderr)
    return lines


# -------------------------------------------------------------------------------------------- time


def measure_gp(against: list[str], repeats: int) -> list[str]:
    """What one round of Soft Reasoning asks of gp.py, on one thread, as lines of Markdown.

    Fit, EI over 5,000 candidates, five picks.
    """
    torch.set_num_threads(1)
    g, cpu = Generator().manual_seed(0), torch.device("cpu")
    x, y = torch.randn(25, 50, generator=g).double(), torch.randn(25, generator=g).double()
    pool = torch.randn(5000, 50, generator=g).double()
    contenders = {"gp.py": lambda: suggest(GP.fit(x, y), 5, pool, generator=g)}
    if "botorch" in against and (run := peers.made("botorch", peers.botorch_picks, x, y, pool)):
        contenders["botorch"] = run
    what = "GP fit, EI over 5,000 candidates and 5 picks, 25 points in 50 dimensions, one thread"
    lines = [f"{what}; torch {torch.__version__}; {timing.hardware(cpu)}", ""]
    lines += ["| | ms: median (least to most) |", "|---|---|"]
    for name, t in timing.in_turns(contenders, repeats, cpu).items():
        low, middle, high = (f(t) * 1e3 for f in (min, statistics.median, max))
        lines.append(f"| {name} | {middle:.1f} ({low:.1f} to {high:.1f}) |")
    return lines
