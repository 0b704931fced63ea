"""Widgets, each with a figure that replaces it where no kernel is running.

A widget without a kernel is an empty spot on the page, and its output has another identifier at each run. So each
output here holds three things in one bundle: a figure, a line of text, and the widget. A live notebook shows the
widget. The rendered book shows the figure. A comparison of stored with fresh outputs sees the text, which never
changes. Without ipywidgets there is only the figure.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from html import escape
from typing import Any

from peftlab import memory
from peftlab.catalogue import METHODS
from peftlab.checks import checked
from peftlab.errors import PeftLabError
from peftlab.kit import figures
from peftlab.kit.figures.lora import STEPS
from peftlab.kit.figures.style import png
from peftlab.kit.tables import as_html
from peftlab.memory.costs import run_cost

VIEW = "application/vnd.jupyter.widget-view+json"
TARGETS = {
    "q, v": ("q_proj", "v_proj"),
    "q, k, v, o": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "MLP": ("gate_proj", "up_proj", "down_proj"),
    "all linear": "all-linear",
}
SHAPES = ("smollm2-135m", "llama-3.2-1b", "llama-2-7b", "llama-3.1-8b", "llama-2-70b")
RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


@checked()
def lora_stepper(d_in: int = 576, d_out: int = 576, r: int = 8) -> None:
    """Show a widget that steps through the data flow of a LoRA layer. Without a kernel, show six small pictures."""

    def build(widgets: Any) -> Any:
        pictures: dict[int, bytes] = {}  # each is drawn when it is first shown

        def picture(step: int) -> bytes:
            if step not in pictures:
                pictures[step] = png(figures.lora_dataflow(step, d_in=d_in, d_out=d_out, r=r))
            return pictures[step]

        image = widgets.Image(value=picture(1), format="png", layout={"max_width": "100%"})
        slider = widgets.IntSlider(value=1, min=1, max=len(STEPS), description="step")
        back, forward = widgets.Button(description="back"), widgets.Button(description="next")

        def show(change: Any) -> None:
            image.value = picture(slider.value)

        def move(by: int) -> Callable[[Any], None]:
            def clicked(button: Any) -> None:
                slider.value = min(max(slider.value + by, 1), len(STEPS))

            return clicked

        slider.observe(show, names="value")
        back.on_click(move(-1))
        forward.on_click(move(1))
        return widgets.VBox([widgets.HBox([back, forward, slider]), image])

    steps = "; ".join(f"{number}. {text}" for number, text in enumerate(STEPS, 1))
    _show(build, figures.lora_dataflow(d_in=d_in, d_out=d_out, r=r), f"A LoRA layer in {len(STEPS)} steps: {steps}")


@checked()
def lora_calculator(shape: str = "smollm2-135m", r: int = 8) -> None:
    """Show a widget that computes LoRA's parameters, file size and optimiser memory for a model, rank and layers.

    Without a kernel, show a chart of the trainable parameters against the rank, for each choice of layers.
    """

    def build(widgets: Any) -> Any:
        model = widgets.Dropdown(options=SHAPES, value=shape, description="model")
        rank = widgets.SelectionSlider(options=RANKS, value=r, description="r")
        layers = widgets.Dropdown(options=list(TARGETS), value="q, v", description="layers")
        answer = widgets.HTML(value=_answer(shape, r, "q, v"))

        def renew(change: Any) -> None:
            answer.value = _answer(model.value, rank.value, layers.value)

        for control in (model, rank, layers):
            control.observe(renew, names="value")
        return widgets.VBox([model, rank, layers, answer])

    rows = [{"r": rank, "trainable": memory.count(shape, "lora", r=rank, targets=targets).trainable, "layers": name}
            for name, targets in TARGETS.items() for rank in RANKS]
    figure = figures.sweep(rows, "r", "trainable", by="layers", x_label="rank r", y_label="trainable parameters",
                           log_y=True)
    _show(build, figure, f"Trainable parameters of LoRA on {shape} against r, for each choice of layers")


@checked()
def memory_calculator(shape: str = "llama-2-7b", r: int = 16) -> None:
    """Show a widget that predicts the peak of a training step for a model, a method, a length and a precision.

    Without a kernel, show the peak of four methods against the length of the sequence.
    """

    def build(widgets: Any) -> Any:
        choices = {
            "shape": widgets.Dropdown(options=list(memory.BUILT_IN), value=shape, description="model"),
            "method": widgets.Dropdown(options=list(memory.METHODS), value="lora", description="method"),
            "r": widgets.SelectionSlider(options=RANKS, value=r, description="r"),
            "batch": widgets.SelectionSlider(options=(1, 2, 4, 8, 16, 32), value=1, description="batch"),
            "sequence": widgets.SelectionSlider(options=[2**i for i in range(6, 15)], value=512, description="tokens"),
            "precision": widgets.Dropdown(options=("bf16", "mixed", "fp32"), value="bf16", description="precision"),
            "checkpointing": widgets.Checkbox(value=True, description="checkpointing"),
        }
        answer = widgets.HTML()

        def renew(change: Any = None) -> None:
            answer.value = _memory_answer({name: control.value for name, control in choices.items()})

        for control in choices.values():
            control.observe(renew, names="value")
        renew()
        return widgets.VBox([*choices.values(), answer])

    rows, methods = [], ("full", "lora", "qlora", "ia3")
    for method in methods:
        own = _of_the_method(method, r)
        for tokens in (256, 1024, 4096, 16384):
            found = memory.estimate(shape, method, sequence=tokens, checkpointing=True, **own)
            rows.append({"tokens": tokens, "GB": found.peak_bytes / 1e9, "method": method})
    figure = figures.sweep(rows, "tokens", "GB", by="method", x_label="tokens in the sequence", y_label="peak (GB)")
    text = f"Predicted peak of a step of {shape} against the length of its sequence, for {', '.join(methods)}"
    _show(build, figure, text)


@checked()
def cost_calculator(
    rates: Mapping[str, float], *, tokens: float = 10e6, watts: float = 700.0, price: float = 2.0, gpus: int = 1
) -> None:
    """Show a widget that computes what a run costs: GPU hours, energy and money. Without a kernel, show the GPU hours.

    Args:
        rates: {name: tokens per second that were measured}. Those that lack a measurement are left out by you.
        tokens: of the whole run.
        watts, price: where the sliders begin; these are examples, and the reader's own values belong there.
        gpus: how many GPUs the rates are of.

    Raises:
        PeftLabError: there is no rate, or a number is not above zero.
    """
    if not rates:
        raise PeftLabError("rates names nothing that was measured.")
    costs = {name: run_cost(tokens, rate, gpus=gpus, watts=watts, price=price) for name, rate in rates.items()}

    def build(widgets: Any) -> Any:
        choices = {
            "method": widgets.Dropdown(options=list(rates), description="run"),
            "tokens": widgets.FloatText(value=tokens / 1e6, description="Mtokens"),
            "watts": widgets.FloatText(value=watts, description="watts"),
            "price": widgets.FloatText(value=price, description="price"),
        }
        answer = widgets.HTML()

        def renew(change: Any = None) -> None:
            chosen = {name: control.value for name, control in choices.items()}
            answer.value = _cost_answer(rates[chosen.pop("method")], gpus, **chosen)

        for control in choices.values():
            control.observe(renew, names="value")
        renew()
        return widgets.VBox([*choices.values(), answer])

    hours = {name: cost.gpu_hours for name, cost in costs.items()}
    figure = figures.bars(hours, x_label=f"GPU hours for {memory.format_count(round(tokens))} tokens", fmt=".2f")
    _show(build, figure, f"GPU hours for {memory.format_count(round(tokens))} tokens: {', '.join(rates)}")


def _cost_answer(rate: float, gpus: int, tokens: float, watts: float, price: float) -> str:
    try:
        found = run_cost(tokens * 1e6, rate, gpus=gpus, watts=watts, price=price)
    except PeftLabError as error:
        return escape(str(error))
    cells = [["GPU hours", f"{found.gpu_hours:,.2f}"], ["energy (kWh)", f"{found.kwh:,.2f}"],
             ["money, in the price's currency", f"{found.money:,.2f}"]]  # fmt: skip
    return as_html(["", "cost"], cells, numeric=[False, True])


def _of_the_method(method: str, r: int | None) -> dict[str, Any]:
    """Return rank and targets for a method that takes a rank; the others stand in places of their own."""
    return {"r": r, "targets": "all-linear"} if METHODS[method].takes("r") else {}


def _memory_answer(run: dict[str, Any]) -> str:
    rest = {name: value for name, value in run.items() if name != "r"}
    try:
        found = memory.estimate(**rest, **_of_the_method(run["method"], run.get("r")))
    except PeftLabError as error:
        return escape(str(error))
    rows = [[part, memory.format_bytes(size)] for part, size in found.parts.items()]
    rows.append(["peak", memory.format_bytes(found.peak_bytes)])
    rows.append(["with the margin", memory.format_bytes(memory.cards.with_margin(found.peak_bytes))])
    rows.append(["fits on", ", ".join(memory.cards.that_hold(found.peak_bytes)) or "no card known"])
    return as_html([run["method"], run["shape"]], rows, [False, True])


def _answer(shape: str, r: int, layers: str) -> str:
    counted = memory.count(shape, "lora", r=r, targets=TARGETS[layers])
    rows = [
        ["trainable parameters", memory.format_count(counted.trainable)],
        ["share of the model", memory.format_percent(counted.percent)],
        ["adapter file, float32", memory.format_bytes(4 * counted.trainable)],
        ["adapter file, bfloat16", memory.format_bytes(2 * counted.trainable)],
        ["gradients and AdamW states, float32", memory.format_bytes(12 * counted.trainable)],
        ["the same in full fine-tuning", memory.format_bytes(12 * counted.base)],
    ]
    return as_html(["LoRA", f"{shape}, r = {r}, {layers}"], rows, [False, True])


def _show(build: Callable[[Any], Any], figure: Any, text: str) -> None:
    """Display a figure and its line of text, and with them the widget if there is a kernel for it."""
    try:
        from IPython import get_ipython
        from IPython.display import display
    except ImportError:
        get_ipython = None
    if get_ipython is None or get_ipython() is None:
        print(text)
        return
    bundle: dict[str, Any] = {"image/png": base64.b64encode(png(figure)).decode(), "text/plain": text}
    if getattr(get_ipython(), "kernel", None) is not None:
        try:
            import ipywidgets
        except ImportError:
            pass
        else:
            # The output holds no state: the widget's model lives only in the kernel.
            bundle[VIEW] = {"version_major": 2, "version_minor": 0, "model_id": build(ipywidgets).model_id}
    display(bundle, raw=True)
