"""What a run costs, by arithmetic alone: shapes, parameter counts, memory. Imports neither torch nor transformers."""

from peftlab.memory.cards import CARDS, fits, largest, what_fits
from peftlab.memory.counting.families import Module
from peftlab.memory.counting.shapes import BUILT_IN, Shape, load_shape
from peftlab.memory.counting.totals import METHODS, Count, count
from peftlab.memory.estimate import CUBLAS_WORKSPACE, Estimate, estimate
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
    "count",
    "estimate",
    "fits",
    "format_both",
    "format_bytes",
    "format_count",
    "format_percent",
    "largest",
    "load_shape",
    "what_fits",
]
