"""Figures: legible on a telephone, distinct in grey, enough contrast, no metadata, nothing left in pyplot."""

import functools
import itertools
import math

import matplotlib
import matplotlib.pyplot as plt
import pytest
import torch
from matplotlib.colors import to_hex, to_rgb
from matplotlib.patches import Patch, Polygon, Rectangle
from matplotlib.text import Text

from peftlab.errors import PeftLabError
from peftlab.kit import figures
from peftlab.kit.figures import style, transformer

PHONE = 350  # pixels, the width of the text on a telephone 390 pixels wide
ROWS = [{"r": r, "score": 0.5 + r / 200 + seed / 100, "layers": layers} for r in (1, 4, 16, 64) for seed in (0, 1)
        for layers in ("q, v", "all")]
FIGURES = {
    "sweep": lambda: figures.sweep(ROWS, "r", "score", by="layers", reference={"before": 0.1}, percent=True),
    "curves": lambda: figures.curves({"LoRA": [3, 2, 1], "full": ([1, 5, 9], [3, 1, 0.5])}, y_label="loss"),
    "bars": lambda: figures.bars({"q, v": 0.9, "all linear": 0.95}, x_label="exact match", fmt=".0%",
                                 highlight=["q, v"]),
    "stacked_bars": lambda: figures.stacked_bars({"full": {"weights": 13, "states": 26}, "LoRA": {"weights": 13}},
                                                 x_label="memory (GB)"),
    "spectrum": lambda: figures.spectrum({"update": torch.rand(50), "weight": [3.0, 2.0, 0.0]}, mark=8),
    "histogram": lambda: figures.histogram({"a": torch.randn(10, 10, dtype=torch.bfloat16)}, x_label="weight"),
    "heatmap": lambda: figures.heatmap([[0.1, 0.9], [0.5, 0.4]], x_label="r", y_label="alpha", x_ticks=["8", "16"],
                                       fmt=".1f", scale_label="exact match"),
    "timelines": lambda: figures.timelines({"full": {"measured": [1e9, 3e9, 2e9], "replayed": [1e9, 3e9, 2.1e9, 2e9]},
                                            "LoRA": {"measured": [1e9, 2e9], "replayed": [1e9, 2e9]}}),
    "agreement": lambda: figures.agreement({"grid": [(1e9, 1.01e9), (5e10, 5e10)], "by chance": [(2e9, 1.9e9)]}),
    "adapter_places": figures.adapter_places,
    "budget": lambda: figures.budget(ROWS, "r", "score", "layers", x_label="parameters", y_label="score",
                                     reference={"before": 0.1}),
    **{f"block, {method}, {norm}": functools.partial(figures.block, method, norm)
       for method in transformer.METHODS for norm in transformer.NORMS},
    "lora_dataflow": figures.lora_dataflow,
    "lora_dataflow, step 4": lambda: figures.lora_dataflow(4),
}


def lightness(colour):
    """CIE L*, 0 for black and 100 for white."""
    y = luminance(colour)
    return 116 * y ** (1 / 3) - 16 if y > 0.008856 else 903.3 * y


def luminance(colour):
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("name", FIGURES)
def test_figure(name):
    before = dict(matplotlib.rcParams)
    figure = FIGURES[name]()
    assert dict(matplotlib.rcParams) == before, "the style stays inside"
    assert plt.get_fignums() == [], "pyplot knows nothing of it, so it is shown once and then freed"

    data = style.png(figure)
    assert data.startswith(b"\x89PNG")
    assert b"tEXt" not in data and b"matplotlib" not in data.lower(), "no version of matplotlib in the file"
    assert data == style.png(FIGURES[name]()) or name in ("spectrum", "histogram"), "drawn the same each time"

    assert figure.get_figwidth() <= style.WIDTH
    pixels_an_inch = PHONE / figure.get_figwidth()
    for text in figure.findobj(Text):
        if text.get_text().strip() and text.get_visible():
            assert text.get_fontsize() / 72 * pixels_an_inch >= 9, f"{text.get_text()!r} is too small for a telephone"
    ticks = {label for axes in figure.axes for axis in (axes.xaxis, axes.yaxis) for label in axis.get_ticklabels()}
    for text in figure.findobj(lambda item: isinstance(item, Text) and item not in ticks):
        if text.get_text().strip() and text.get_visible():
            box = text.get_window_extent()
            assert box.x0 > -1 and box.x1 < figure.bbox.x1 + 1, f"{text.get_text()!r} is cut off"

    if not any(drawing in name for drawing in ("block", "dataflow", "places")):
        for axes in figure.axes:
            assert axes.get_label() == "<colorbar>" or axes.get_xlabel(), "the axes are named"


def test_lines_and_bars_can_be_told_apart_without_colour():
    figure = FIGURES["sweep"]()
    assert not figure.legends[0].get_frame_on(), "the style holds to the end of the function"
    looks = [(line.get_marker(), line.get_linestyle()) for line in figure.axes[0].lines if len(line.get_xdata()) > 2]
    assert len(looks) == 2 and looks[0][0] != looks[1][0] and looks[0][1] != looks[1][1]
    hatches = [container[0].get_hatch() for container in FIGURES["stacked_bars"]().axes[0].containers]
    assert len(set(hatches)) == len(hatches)


def test_colours_differ_in_lightness_and_stand_out_from_white():
    for one, other in itertools.pairwise(style.COLOURS):
        assert abs(lightness(one) - lightness(other)) > 20, (one, other)
    for colour in (*style.COLOURS, style.GREY):
        assert 1.05 / (luminance(colour) + 0.05) >= 3, colour


def test_sweep_draws_mean_and_range():
    rows = [{"r": 8, "score": 0.4}, {"r": 8, "score": 0.8}, {"r": 16, "score": 0.5}, {"r": 32}]
    axes = figures.sweep(rows, "r", "score").axes[0]
    assert list(axes.lines[0].get_xdata()) == [8, 16]
    assert axes.lines[0].get_ydata() == pytest.approx([0.6, 0.5])
    low, high = axes.collections[0].get_paths()[0].get_extents().intervaly
    assert (low, high) == pytest.approx((0.4, 0.8))


def test_spectrum_is_sorted_relative_and_positive():
    line = figures.spectrum({"s": [1.0, 4.0, 0.0, 2.0]}).axes[0].lines[0]
    assert list(line.get_ydata()) == [1.0, 0.5, 0.25]
    assert math.isclose(line.get_xdata()[-1], 3)


def test_steps_of_the_data_flow():
    assert len(figures.lora_dataflow().axes) == 6
    with pytest.raises(PeftLabError, match="positive whole number of at most 6, found 7"):
        figures.lora_dataflow(7)


def trained(figure, kind=Patch):
    """The shapes in the colour of what is trained."""
    found = [patch for patch in figure.axes[0].patches if to_hex(patch.get_facecolor()) == style.ROLES["adapter"]]
    return [patch for patch in found if isinstance(patch, kind)]


# How many shapes are coloured before and behind the norms: a LoRA pair and an adapter are two trapezoids.
COLOURED = {
    "full": (13, 12), "lora": (4, 4), "qlora": (14, 12), "adapter": (4, 4), "parallel-adapter": (2, 2), "ia3": (3, 3),
    "bitfit": (7, 8), "prefix": (6, 6), "prompt": (3, 3),
}


@pytest.mark.parametrize("method", transformer.METHODS)
def test_a_block_colours_what_the_method_trains(method):
    found = tuple(len(trained(figures.block(method, norm))) for norm in ("pre", "post"))
    assert found == COLOURED[method]


@pytest.mark.parametrize("norm", transformer.NORMS)
def test_places_in_a_block(norm):
    def middles(method, kind=Patch):
        boxes = [patch.get_path().get_extents(patch.get_patch_transform())
                 for patch in trained(figures.block(method, norm), kind)]
        return [((box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2) for box in boxes]

    at, rows = transformer.LAYOUTS[norm], transformer.ROWS
    below = {name: y - transformer.BELOW for name, y in rows.items()}
    assert all(x < 33 and y == transformer.STREAM for x, y in middles("prompt", Rectangle)), "in front of the tokens"
    assert {y for _, y in middles("prefix", Rectangle)} == {below["k"], below["v"]}
    assert {round(y) for _, y in middles("lora", Polygon)} == {below["q"], below["v"]}
    assert {round(x) for x, _ in middles("adapter", Polygon)} == {at.attention_out, at.forward_out}
    assert all(transformer.UP < y < transformer.STREAM for _, y in middles("adapter", Polygon)), "behind o and down"
    assert all(at.forward < x < at.forward_out for x, _ in middles("parallel-adapter", Polygon))
    assert sorted(y for _, y in middles("ia3")) == pytest.approx([rows["v"], rows["k"], transformer.SCALE])


def test_only_the_four_bit_block_is_hatched():
    for method in transformer.METHODS:
        hatched = [patch for patch in figures.block(method).axes[0].patches if patch.get_hatch()]
        assert len(hatched) == (7 if method == "qlora" else 0), method


@pytest.mark.parametrize("wrong, near", [(("adapters",), "'adapter'"), (("LoRA",), "'lora'"), (("q-lora",), "'qlora'"),
                                         (("lora", "prenorm"), "'pre'"), (("lora", None), "'pre', 'post'")])
def test_an_unknown_block_is_refused(wrong, near):
    with pytest.raises(PeftLabError, match=r"must be one of .*found") as error:
        figures.block(*wrong)
    assert near in str(error.value) and "\n" not in str(error.value)
