"""The figures of the book: one style (`style`), charts that chapters share (`charts`), pictures of methods.

Every function returns a `matplotlib.figure.Figure`. The last line of a cell shows it once, as a PNG. Its caption and
its alternative text are in the cell's metadata.
"""

from peftlab.kit.figures.adapters import adapter_places, budget
from peftlab.kit.figures.charts import bars, by_layer, curves, heatmap, histogram, spectrum, stacked_bars, sweep
from peftlab.kit.figures.choice import choice
from peftlab.kit.figures.families import families
from peftlab.kit.figures.intervals import intervals, ranking, trade_off
from peftlab.kit.figures.lora import lora_dataflow
from peftlab.kit.figures.lora_family import lora_family
from peftlab.kit.figures.memory import agreement, memory_bars, timelines
from peftlab.kit.figures.prompts import virtual_tokens
from peftlab.kit.figures.quantization import block_steps, code_books
from peftlab.kit.figures.style import (
    BLACK,
    COLOURS,
    HATCHES,
    LINES,
    MARKERS,
    ROLES,
    WIDTH,
    label,
    new,
    role,
    styled,
    use_style,
)
from peftlab.kit.figures.tokens import token_rows
from peftlab.kit.figures.transformer import block

__all__ = [
    "block",
    "adapter_places", "budget",
    "bars", "by_layer", "curves", "heatmap", "histogram", "spectrum", "stacked_bars", "sweep",
    "choice",
    "families",
    "intervals", "ranking", "trade_off",
    "lora_dataflow", "lora_family",
    "agreement", "memory_bars", "timelines",
    "virtual_tokens",
    "block_steps", "code_books",
    "token_rows",
    "BLACK", "COLOURS", "HATCHES", "LINES", "MARKERS", "ROLES", "WIDTH", "label", "new", "role", "styled", "use_style",
]  # fmt: skip
