"""What a run costs: shapes, parameter counts, memory. It is arithmetic only and imports no torch."""

from functools import partial
from typing import Any

from peftlab import catalogue
from peftlab.memory.cards import CARDS, blocks_to_recompute, fits, largest, what_fits
from peftlab.memory.counting.methods import trained_by
from peftlab.memory.counting.modules import Module
from peftlab.memory.counting.shapes import BUILT_IN, Shape, load_shape
from peftlab.memory.counting.totals import Count, count
from peftlab.memory.estimate import CUBLAS_WORKSPACE, Estimate, estimate
from peftlab.memory.measured import measured_like
from peftlab.memory.units import format_both, format_bytes, format_count, format_percent

__all__ = [
    "BUILT_IN",
    "CARDS",
    "CUBLAS_WORKSPACE",
    "METHODS",
    "Count",
    "Estimate",
    "Module",
    "Shape",
    "blocks_to_recompute",
    "count",
    "estimate",
    "fits",
    "format_both",
    "format_bytes",
    "format_count",
    "format_percent",
    "largest",
    "load_shape",
    "measured_like",
    "what_fits",
]


def __getattr__(name: str) -> Any:
    """`METHODS`: by name, what each method of the catalogue that is counted trains, (shape, options) -> `Trained`."""
    if name == "METHODS":
        return {name: partial(trained_by, name) for name, row in catalogue.METHODS.items() if row.tensors}
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
