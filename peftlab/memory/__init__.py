"""What a run costs, by arithmetic alone: shapes and parameter counts. Imports neither torch nor transformers."""

from peftlab.memory.counting import METHODS, Count, count
from peftlab.memory.families import Module
from peftlab.memory.shapes import BUILT_IN, Shape, load_shape
from peftlab.memory.units import format_both, format_bytes, format_count, format_percent

__all__ = [
    "BUILT_IN",
    "METHODS",
    "Count",
    "Module",
    "Shape",
    "count",
    "format_both",
    "format_bytes",
    "format_count",
    "format_percent",
    "load_shape",
]
