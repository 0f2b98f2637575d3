"""Concept tokens as a picture: what a thought's least sure steps were mixed of."""

from lab.charts import Axis, Chart
from lab.traces import Trace

STEPS, ROWS = 5, 6  # columns, and components in each


def concepts(trace: Trace) -> Chart | None:
    """The five steps in a row whose entropies sum to most: their components with shares.

    None for a thought without a mixture, such as a sampled one that was always sure.
    """
    steps = trace.steps
    first = max(range(max(1, len(steps) - STEPS + 1)), key=lambda t: spread(trace, t))
    shown = range(first, min(first + STEPS, len(steps)))
    if all(len(steps[t]["ids"]) < 2 for t in shown):
        return None
    x = Axis(first + 0.5, first + STEPS + 0.5, "step", "{:.0f}")
    about = "Of each step its components: a token, its share, and a bar of that length."
    title = "Concept tokens: what each step was mixed of"
    chart = Chart(f"concepts-{trace.number}", title, about, x, None, 64 + 24 * ROWS)
    for t in shown:
        pairs = list(zip(steps[t]["ids"], steps[t]["probs"]))[:ROWS]
        for row, (token, share) in enumerate(pairs):
            left, middle = t + 1 - 0.47, 1 - (row + 0.5) / ROWS
            ends = (left, left + 0.94 * share)
            chart.area([(end, middle - 0.4 / ROWS, middle + 0.4 / ROWS) for end in ends], "c0")
            name = trace.names.name(token).replace(" ", "␣").replace("\n", "⏎")
            chart.text(left, middle, name[:11], dx=3)
            chart.text(t + 1 + 0.47, middle, f"{share:.0%}", "soft", "end", -2)
    return chart


def spread(trace: Trace, first: int) -> float:
    return sum(step["entropy"] for step in trace.steps[first : first + STEPS])
