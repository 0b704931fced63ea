"""Pictures of memory."""

from __future__ import annotations

from collections.abc import Mapping

from matplotlib.figure import Figure

from peftlab.figures.charts import stacked_bars
from peftlab.memory import Estimate


def memory_bars(estimates: Mapping[str, Estimate]) -> Figure:
    """What the peak of a step is made of, one bar an estimate, in GB. Logits and what is alive for a moment are one."""
    rows = {}
    for name, found in estimates.items():
        parts = {part: size / 1e9 for part, size in found.parts.items()}
        passing = parts.pop("logits") + parts.pop("workspace")
        rows[name] = {**parts, "logits and passing": passing}
    return stacked_bars(rows, x_label="peak (GB)", fmt=".1f")
