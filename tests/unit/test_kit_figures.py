"""Figures: legible on a telephone, distinct in grey, enough contrast, no metadata, nothing left in pyplot."""

import doctest
import functools
import inspect
import itertools
import math

import matplotlib
import matplotlib.pyplot as plt
import pytest
import torch
from matplotlib.colors import to_hex, to_rgb
from matplotlib.patches import Patch, Polygon, Rectangle
from matplotlib.text import Text

import peftlab as pl
from peftlab.errors import PeftLabError
from peftlab.kit import figures
from peftlab.kit.figures import style, transformer

PHONE = 350  # pixels, the width of the text on a telephone 390 pixels wide
ROWS = [{"r": r, "score": 0.5 + r / 200 + seed / 100, "layers": layers} for r in (1, 4, 16, 64) for seed in (0, 1)
        for layers in ("q, v", "all")]
HISTORY = [*[(f"forward, layer {i}", 1e9 + i * 1e8) for i in range(10)], ("loss", 2.2e9),
           *[("backward", 2e9 - i * 5e7) for i in range(18)], *[("optimiser", 1e9)] * 3]
# Points so close together that their names do not all fit beside them
NAMES = ("LoRA", "DoRA", "PiSSA", "OFT", "prefix tuning", "a Houlsby adapter")
CROWD = {name: (4e5 + 1e3 * n, 0.9 + 0.01 * (n % 3), 0.88, 0.93) for n, name in enumerate(NAMES)}
FIGURES = {
    "sweep": lambda: figures.sweep(ROWS, "r", "score", by="layers", reference={"before": 0.1}, percent=True),
    "curves": lambda: figures.curves({"LoRA": [3, 2, 1], "full": ([1, 5, 9], [3, 1, 0.5])}, y_label="loss"),
    "bars": lambda: figures.bars({"q, v": 0.9, "all linear": 0.95}, x_label="exact match", fmt=".0%",
                                 highlight=["q, v"]),
    # LoRA on a mixture of experts, for the chapter that will show it
    "bars, experts": lambda: figures.bars(
        {
            f"{row['targets']}, {row['library']}{', 4-bit' if row['four_bit'] else ''}": row["peak_bytes"] / 1e9
            for row in pl.results("experts") if not row["checkpointing"]
        },
        x_label="peak (GB)", fmt=".1f",
    ),
    "stacked_bars": lambda: figures.stacked_bars({"full": {"weights": 13, "states": 26}, "LoRA": {"weights": 13}},
                                                 x_label="memory (GB)"),
    "spectrum": lambda: figures.spectrum({"update": torch.rand(50), "weight": [3.0, 2.0, 0.0]}, mark=8),
    "histogram": lambda: figures.histogram({"a": torch.randn(10, 10, dtype=torch.bfloat16)}, x_label="weight"),
    "histogram, log": lambda: figures.histogram({"a": [1, 2, 2, 3], "b": [2, 2, 3]}, x_label="w", log_y=True),
    "by_layer": lambda: figures.by_layer({name: [[0.9, 1.0, 1.2]] * 12 for name in ("keys", "values", "feed-forward")},
                                         y_label="learned scale", start=1),
    "code_books": lambda: figures.code_books({"NF4": [-1, 0, 1], "INT4": [-1, 0.5]}),
    "memory_bars": lambda: figures.memory_bars({m: pl.memory.estimate("llama-2-7b", m) for m in ("full", "lora")}),
    "timelines, phases": lambda: figures.timelines({"full": {"predicted": HISTORY}}),
    "heatmap": lambda: figures.heatmap([[0.1, 0.9], [0.5, 0.4]], x_label="r", y_label="alpha", x_ticks=["8", "16"],
                                       fmt=".1f", scale_label="exact match"),
    "timelines": lambda: figures.timelines({"full": {"measured": [1e9, 3e9, 2e9], "replayed": [1e9, 3e9, 2.1e9, 2e9]},
                                            "LoRA": {"measured": [1e9, 2e9], "replayed": [1e9, 2e9]}}),
    "agreement": lambda: figures.agreement({"grid": [(1e9, 1.01e9), (5e10, 5e10)], "by chance": [(2e9, 1.9e9)]}),
    "adapter_places": figures.adapter_places,
    "places of families": figures.families,
    "intervals": lambda: figures.intervals({"LoRA": (0.5, 0.45, 0.55), "DoRA": (0.6, 0.5, 0.7)}, x_label="score",
                                           reference="LoRA", repeats={"DoRA": [0.5, 0.7]}, percent=True),
    "trade_off": lambda: figures.trade_off({"desk": CROWD, "news": CROWD}, x_label="parameters", reference="LoRA"),
    "ranking": lambda: figures.ranking({f"run {i}": (0.5 - i / 100, 0.46 - i / 100, 0.55 - i / 100) for i in range(40)},
                                       y_label="right", marked={"LoRA": ["run 3", "run 9"]}, names=["run 20"],
                                       percent=True),
    "places of lora_family": figures.lora_family,
    "places of choice": figures.choice,
    "places of virtual_tokens": figures.virtual_tokens,
    "block_steps": lambda: figures.block_steps([0.5, -2.0, 0.0, 1.0], [i / 7 - 1 for i in range(16)]),
    "adapter_places, post": lambda: figures.adapter_places("post"),
    "places of token_rows": lambda: figures.token_rows({"a": [("x", "read"), ("y", "learned")],
                                                        "b": [("pad", "padding")]}),
    "budget": lambda: figures.budget(ROWS, "r", "score", "layers", x_label="parameters", y_label="score",
                                     reference={"before": 0.1}),
    # each method in one of the two forms of a block, and one in both
    **{f"block, {method}, {norm}": functools.partial(figures.block, method, norm)
       for method, norm in zip(transformer.METHODS, itertools.cycle(transformer.NORMS), strict=False)},
    "block, full, post": functools.partial(figures.block, "full", "post"),
    "lora_dataflow": figures.lora_dataflow,
    "lora_dataflow, step 4": lambda: figures.lora_dataflow(4),
}


def test_a_ranking_refuses_names_that_it_lacks():
    with pytest.raises(PeftLabError, match="it lacks b"):
        figures.ranking({"a": (1.0, 0.5, 1.5)}, y_label="y", names=["b"])
    with pytest.raises(PeftLabError, match="0 values"):
        figures.ranking({}, y_label="y")


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
    if name not in ("spectrum", "histogram") and not name.endswith(", post"):  # random numbers; as with "pre"
        assert data == style.png(FIGURES[name]()), "drawn the same each time"

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
            shared = axes.get_shared_x_axes().get_siblings(axes)  # panels above one another share a name
            named = any(other.get_xlabel() for other in shared)
            assert axes.get_label() == "<colorbar>" or named, "the axes are named"


def test_names_of_points_that_are_close_together_touch_neither_each_other_nor_a_point():
    points = {**CROWD, "full": (1e8, 0.7, 0.6, 0.8)}
    figure = figures.trade_off({"desk": points}, x_label="parameters", reference="LoRA")
    (axes,) = figure.axes
    figure.draw_without_rendering()
    names = {text.get_text(): text.get_window_extent() for text in axes.texts if text.get_text()}
    assert set(names) == set(points)
    for one, other in itertools.combinations(names.values(), 2):
        assert not one.overlaps(other)
    for cost, value, *_ in CROWD.values():
        assert not any(box.contains(*axes.transData.transform((cost, value))) for box in names.values())


def test_lines_and_bars_can_be_told_apart_without_colour():
    figure = FIGURES["sweep"]()
    assert not FIGURES["agreement"]().legends[0].get_frame_on(), "the style holds to the end of the function"
    looks = [(line.get_marker(), line.get_linestyle()) for line in figure.axes[0].lines if len(line.get_xdata()) > 2]
    assert len(looks) == 2 and looks[0][0] != looks[1][0] and looks[0][1] != looks[1][1]
    hatches = [container[0].get_hatch() for container in FIGURES["stacked_bars"]().axes[0].containers]
    assert len(set(hatches)) == len(hatches)


def test_colours_differ_in_lightness_and_stand_out_from_white():
    for one, other in itertools.pairwise(style.COLOURS):
        assert abs(lightness(one) - lightness(other)) > 20, (one, other)
    for colour in (*style.COLOURS, style.GREY):
        assert 1.05 / (luminance(colour) + 0.05) >= 3, colour


@pytest.mark.parametrize("one, other", [*itertools.combinations(style.ROLES, 2)])
def test_roles_differ_in_grey(one, other):
    assert abs(lightness(style.ROLES[one]) - lightness(style.ROLES[other])) > 11


def test_white_is_readable_on_the_colour_of_adapters_and_no_line_without_a_role_has_it():
    assert 1.05 / (luminance(style.ROLES["adapter"]) + 0.05) >= 4.5
    assert not set(style.ROLES.values()) & set(style.COLOURS)


@pytest.mark.parametrize("name, role", [("weights", "weights"), ("4-bit weights", "weights"),
                                        ("master copy", "weights"),
                                        ("adapter weights", "adapter"), ("LoRA adapters", "adapter"),
                                        ("gradient", "gradients"), ("optimizer", "optimiser"),
                                        ("optimiser states", "optimiser"), ("8-bit states", "optimiser"),
                                        ("Activations", "activations"), ("logits and workspace", "workspace"),
                                        ("attention", None), ("matrix products", None)])
def test_a_role_is_known_by_its_words(name, role):
    assert figures.role(name) == role


def test_a_role_has_one_colour_in_every_figure():
    def fills(figure):
        return {to_hex(patch.get_facecolor()) for patch in figure.axes[0].patches if patch.get_fill()}

    adapter, weights = style.ROLES["adapter"], style.ROLES["weights"]
    drawings = [figures.block("adapter"), figures.lora_dataflow(6), figures.adapter_places(),
                figures.stacked_bars({"LoRA": {"weights": 3, "adapter": 1}}, x_label="GB"),
                figures.bars({"weights": 3, "adapter": 1}, x_label="GB")]
    for figure in drawings:
        assert {adapter, weights} <= fills(figure)
    # whatever the order of the parts, and also if the figure has other ones
    bars = figures.stacked_bars({"a": {"gradient": 1, "states": 2}, "b": {"weight": 2}}, x_label="GB").axes[0]
    found = {bar.get_label(): to_hex(bar[0].get_facecolor()) for bar in bars.containers}
    assert found == {"gradient": style.ROLES["gradients"], "states": style.ROLES["optimiser"], "weight": weights}


def test_two_parts_of_one_role_differ_in_their_hatch():
    bars = figures.stacked_bars({"a": {"weights": 1, "master copy": 2}}, x_label="GB").axes[0].containers
    assert to_hex(bars[0][0].get_facecolor()) == to_hex(bars[1][0].get_facecolor())
    assert bars[0][0].get_hatch() != bars[1][0].get_hatch()


def test_a_part_too_thin_to_see_is_a_stroke_of_its_colour():
    bars = figures.stacked_bars({"a": {"weights": 1000, "adapter": 1}, "b": {"weights": 10}}, x_label="GB")
    thin, absent = bars.axes[0].containers[1]
    assert to_hex(thin.get_edgecolor()) == style.ROLES["adapter"] and thin.get_linewidth() > 1.5
    assert absent.get_linewidth() == 0


def test_memory_bars_show_cards_and_british_names():
    axes = FIGURES["memory_bars"]().axes[0]
    assert [text.get_text() for text in axes.texts][-3:] == ["24", "48", "80 GB"], "one unit, so that none touch"
    assert [line.get_xdata()[0] for line in axes.lines] == [24, 48, 80] and axes.get_xlim()[1] > 80
    small = figures.memory_bars({"qlora": pl.memory.estimate("llama-2-7b", "qlora")}).axes[0]
    assert not small.lines, "the bar ends at 7 GB, so all cards are far off"
    assert "optimiser" in [container.get_label() for container in axes.containers]


def test_timelines_mark_the_peak_and_the_phases():
    axes = FIGURES["timelines, phases"]().axes[0]
    texts = [text.get_text() for text in axes.texts]
    assert texts == ["peak 2.2 GB", "forward", "backward", "optimiser"], "one that is too narrow has none, but the last"
    assert axes.get_title(loc="left") == "full" and "full" not in axes.get_xlabel()
    peak = axes.lines[1]
    assert (peak.get_xdata()[0], peak.get_ydata()[0]) == pytest.approx((10 / 31, 2.2))


def test_by_layer_draws_medians_and_spread():
    axes = figures.by_layer({"keys": [torch.arange(101.0), [1, 1, 1]]}, y_label="scale").axes[0]
    assert list(axes.lines[-1].get_ydata()) == [50, 1]
    outer, inner = axes.collections
    assert outer.get_segments()[0][:, 1] == pytest.approx([5, 95])
    assert inner.get_segments()[0][:, 1] == pytest.approx([25, 75])


def test_sweep_draws_means_and_repeats_only_where_they_were_measured():
    rows = [{"r": 8, "score": 0.4}, {"r": 8, "score": 0.8}, {"r": 8, "score": 0.5}, {"r": 16, "score": 0.5}, {"r": 32}]
    axes = figures.sweep(rows, "r", "score").axes[0]
    assert list(axes.lines[0].get_xdata()) == [8, 16]
    assert axes.lines[0].get_ydata() == pytest.approx([1.7 / 3, 0.5])
    bars, strokes = axes.collections
    assert [segment.tolist() for segment in bars.get_segments()] == [[[8, 0.4], [8, 0.8]]]
    assert strokes.get_offsets().tolist() == [[8, 0.4], [8, 0.8], [8, 0.5]]


@pytest.mark.parametrize(("heights", "side", "above"), [((0.9, 0.2), "left", True), ((0.2, 0.9), "right", True)])
def test_the_name_of_a_reference_stands_where_no_line_passes(heights, side, above):
    rows = [{"r": r, "score": score} for r, score in zip((1, 100), heights[::-1], strict=True)]
    axes = figures.sweep(rows, "r", "score", percent=True, reference={"full": 0.85}).axes[0]
    (name,) = axes.texts
    assert (name.get_ha(), name.get_va() == "bottom") == (side, above)
    assert axes.yaxis.get_major_formatter()(0.84, 0) == "84%" and axes.yaxis.get_major_formatter()(0.125, 0) == "12.5%"


@pytest.mark.parametrize("steps", [3, 20, 45])
def test_there_is_no_half_step(steps):
    ticks = figures.curves({"loss": list(range(steps))}).axes[0].get_xticks()
    assert all(float(tick).is_integer() for tick in ticks) and len(ticks) > 2
    assert any(tick % 1 for tick in figures.curves({"loss": ([0, 0.25, 0.5], [3, 2, 1])}).axes[0].get_xticks())


def test_few_points_are_marked():
    few, many = figures.curves({"few": [1, 2, 3], "many": list(range(100))}).axes[0].lines
    assert few.get_marker() == "o" and many.get_marker() == "None"


def boxes(texts):
    return [text.get_window_extent() for text in texts]


@pytest.mark.parametrize("lines", [
    {"LoRA": [3, 2, 1], "full": [3, 1, 0.5]},
    {"a name of some length": [1, 2, 3], "another such name": [3, 2, 1], "a third": [2, 2, 2]},
    {"kept": [11, 12, 14, 18, 26, 42], "eager": [12, 14, 17, 23, 36, 61], "checkpointing": [10, 10, 11, 12, 13, 16]},
])  # fmt: skip
def test_names_stand_at_their_lines_and_touch_nothing(lines):
    figure = figures.curves(lines)
    axes = figure.axes[0]
    assert not figure.legends and {text.get_text() for text in axes.texts} == set(lines)
    figure.draw_without_rendering()
    for one, other in itertools.combinations(boxes(axes.texts), 2):
        assert not one.overlaps(other)
    for box in boxes(axes.texts):
        frame = axes.get_window_extent()
        assert frame.x0 <= box.x0 and box.x1 <= frame.x1 + 1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
        for line in axes.lines:
            assert not any(box.contains(x, y) for x, y in axes.transData.transform(line.get_xydata()))
    for text, line in zip(axes.texts, axes.lines, strict=True):
        assert to_hex(text.get_color()) == to_hex(line.get_color())


def test_names_that_do_not_fit_go_into_a_legend():
    figure = figures.curves({f"a line with quite a long name, number {i}": [1, 1 + i / 1000] for i in range(5)})
    assert len(figure.legends[0].get_texts()) == 5 and not figure.axes[0].texts


@pytest.mark.parametrize("values, expected", [
    ([0.1, 0.15], ["0.1", "0.15"]), ([0.0032, 0.7], ["0.01", "0.1"]), ([3, 4_000_000], ["$10^{2}$", "$10^{4}$"]),
    ([1.2, 7], ["2", "5"]), ([0.05, 0.051], []), ([1e-9, 1e9], ["$10^{-9}$"]),
])  # fmt: skip
def test_ticks_of_a_logarithmic_axis_are_plain_numbers(values, expected):
    axis = figures.curves({"loss": [*values]}, log_y=True).axes[0].yaxis
    shown = [label.get_text() for label in axis.get_ticklabels()]
    assert set(expected) <= set(shown) and 2 <= len(shown) <= 10
    assert not any("times" in text for text in shown), "no 1.2 x 10^-1"
    assert not axis.get_minorticklocs().size


def test_ticks_stand_at_the_values_measured_if_they_fit():
    def ticks(places):
        axis = figures.sweep([{"r": r, "loss": r} for r in places], "r", "loss").axes[0].xaxis
        return [label.get_text() for label in axis.get_ticklabels()]

    assert ticks([1, 4, 16, 64]) == ["1", "4", "16", "64"]
    assert ticks([1e-5, 1e-3]) == ["$10^{-5}$", "$10^{-3}$"]
    assert "114688" not in "".join(ticks([100, 100_000, 114_688, 120_000])), "too close together"


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


def test_the_family_colours_what_each_method_trains():
    """A vector on a diagonal is five pieces, a rotation three blocks; VeRA's own matrices are frozen."""
    found = {axes.get_title(): len([patch for patch in axes.patches
                                    if to_hex(patch.get_facecolor()) == style.ROLES["adapter"]])
             for axes in figures.lora_family().axes}
    assert found == {"full": 1, "LoRA": 2, "rsLoRA": 2, "LoRA+": 2, "DoRA": 7, "AdaLoRA": 7, "VeRA": 10, "PiSSA": 2,
                     "EVA": 2, "LoHa": 4, "LoKr": 2, "OFT": 3}


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


def test_virtual_tokens_stand_in_front_of_the_text_or_beside_the_layers():
    prompt, deep, prefix = (trained_rectangles(axes) for axes in figures.virtual_tokens().axes)
    assert len({box.get_y() for box in prompt}) == 1 and len({box.get_y() for box in deep}) == 3
    assert len(prompt) == 2 and len(deep) == 6, "two virtual tokens, at the input or at every layer's"
    assert len(prefix) == 3 * 2 * 2, "a key and a value for each virtual token in each layer"
    assert max(box.get_x() for box in prefix) < min(box.get_x() for box in prompt) + 2 * 2.0


def trained_rectangles(axes):
    return [box for box in axes.patches if to_hex(box.get_facecolor()) == style.ROLES["adapter"]]


def test_only_the_four_bit_block_is_hatched():
    for method in transformer.METHODS:
        hatched = [patch for patch in figures.block(method).axes[0].patches if patch.get_hatch()]
        assert len(hatched) == (7 if method == "qlora" else 0), method


@pytest.mark.parametrize("wrong, near", [(("adapters",), "'adapter'"), (("LoRA",), "'lora'"), (("q-lora",), "'qlora'"),
                                         (("lora", "prenorm"), "'pre'"), (("lora", "none"), "'pre', 'post'")])
def test_an_unknown_block_is_refused(wrong, near):
    with pytest.raises(PeftLabError, match=r"must be one of .*found") as error:
        figures.block(*wrong)
    assert near in str(error.value) and "\n" not in str(error.value)


def test_every_figure_function_has_an_example_that_runs():
    functions = {name: value for name, value in vars(figures).items()
                 if name in figures.__all__ and inspect.isfunction(value)}
    for name in {"label", "new", "styled", "use_style"} & set(functions):
        del functions[name]  # tools of the style, which draw nothing
    for name, function in functions.items():
        found = [test for test in doctest.DocTestFinder().find(function, name, globs={"pl": pl, "torch": torch})
                 if test.examples]
        assert found, f"{name} has no example"
        report: list[str] = []
        runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS, verbose=False)
        runner.run(found[0], out=report.append)
        assert not report, "".join(report)


def test_steps_of_a_block_end_in_the_bytes_that_the_package_stores():
    weights = [0.3, -0.7, 0.0, 0.1, 0.25, -0.02]
    figure = figures.block_steps(weights, pl.quantization.code_book("nf4"))
    texts = [text.get_text() for text in figure.axes[0].texts]
    held = pl.quantize_nf4(torch.tensor(weights), double_quant=False)
    stored = [f"{byte:02x}" for byte in held.packed.flatten().tolist()]
    assert [text for text in texts if text in stored] == stored and texts[-1] == "0.7"
