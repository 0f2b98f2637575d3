"""SoftCoT's thoughts, looked at: measured for a record, said in the terminal, drawn on the page."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lab.charts import Axis, Chart, around
from lab.pictures import colour
from model import Transformer

NEAREST = 3  # tokens that are named for each thought


@torch.no_grad()
def measured(model: Transformer, thoughts: Tensor) -> dict[str, list]:
    """What a record keeps of soft thoughts [n, d], rounded to two decimals.

    norms [n], in mean norms of the embeddings; cosines between thoughts, row i to the thoughts
    before it; nearest: for each thought [id, cosine] of the tokens nearest by angle.
    """
    E, T = model.embed.weight, thoughts.float()
    lengths = torch.linalg.vector_norm(E, dim=-1, dtype=torch.float32)  # [V]
    # Found in the weights' own dtype, which a float32 copy of the matrix would double; then exact.
    cosines = (T.to(E) @ E.T).float() / lengths.clamp(min=1e-12)  # of an unused token it is 0
    ids = cosines.topk(NEAREST).indices
    near = F.cosine_similarity(T[:, None], E[ids].float(), dim=-1)  # [n, NEAREST]
    unit = F.normalize(T, dim=-1)
    between = rounded(unit @ unit.T)
    return {
        "norms": rounded(T.norm(dim=-1) / lengths.mean()),
        "cosines": [row[:i] for i, row in enumerate(between)],
        "nearest": [list(map(list, zip(*pair))) for pair in zip(ids.tolist(), rounded(near))],
    }


def rounded(x: Tensor) -> Any:
    """Nested lists of numbers with two decimals."""
    return [rounded(row) for row in x] if x.ndim > 1 else [round(v, 2) for v in x.tolist()]


def lines(found: dict[str, list], name: Callable[[int], str]) -> list[str]:
    """One for each thought: its norm, its nearest tokens by name."""
    said = []
    for i, (norm, near) in enumerate(zip(found["norms"], found["nearest"]), 1):
        tokens = "  ".join(f"{name(token)!r} {cosine:+.2f}" for token, cosine in near)
        said.append(f"{i:3}  norm {norm:7.2f}  {tokens}")
    return said


# ---------------------------------------------------------------------------------------- pictures


def charts(number: int, found: dict[str, list]) -> list[Chart]:
    """The norms; and, of several thoughts, the cosines between them as a heat map."""
    norms, n = found["norms"], len(found["norms"])
    x = Axis(0.5, n + 0.5, "thought", "{:.0f}")
    y = around(norms, "norm", low=0)
    about = f"Norms of {n} soft thoughts, in mean norms of the embeddings."
    first = Chart(f"norms-{number}", "Norms, in mean norms of the embeddings", about, x, y, 220)
    for i, norm in enumerate(norms, 1):
        first.line([(i, 0), (i, norm)], "thin c0")
        first.mark(i, norm, "dot c0", f"thought {i}: norm {norm:.2f}")
    return [first, heat_map(number, found["cosines"])] if n > 1 else [first]


def heat_map(number: int, cosines: Sequence[Sequence[float]]) -> Chart:
    """Cosines between thoughts, the deeper the colour the farther from 0."""
    n, values = len(cosines), [cosine for row in cosines for cosine in row]
    mean = sum(values) / len(values)
    title = f"Cosines between thoughts: {min(values):+.2f} to {max(values):+.2f}, mean {mean:+.2f}"
    axis = Axis(0.5, n + 0.5, "thought", "{:.0f}")
    about = "A cell for each two thoughts; where all are as deep as the diagonal, all are the same."
    chart = Chart(f"cosines-{number}", title, about, axis, axis, 380)
    chart.legend([("towards 1", colour(1)), ("towards -1", colour(0))])
    levels: dict[tuple[str, float], list] = {}
    for i in range(n):
        for j in range(n):
            cosine = cosines[max(i, j)][min(i, j)] if i != j else 1.0
            level = colour(0 if cosine < 0 else 1), round(abs(cosine), 1)
            levels.setdefault(level, []).append((i + 1, j + 1))
    for (look, depth), places in levels.items():
        chart.cells(places, look, depth)
    return chart
