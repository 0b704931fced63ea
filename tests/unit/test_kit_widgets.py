"""The widgets, driven as a reader would drive them."""

import ipywidgets
import pytest

from peftlab import memory
from peftlab.errors import PeftLabError
from peftlab.kit import widgets


@pytest.fixture
def shown(monkeypatch):
    """Calls a widget function; returns (the widget, its figure, its line of text)."""

    def call(function, **options):
        kept = []
        monkeypatch.setattr(widgets, "_show", lambda build, figure, text: kept.append((build, figure, text)))
        function(**options)
        [(build, figure, text)] = kept
        return build(ipywidgets), figure, text

    return call


def test_stepper(shown):
    widget, figure, text = shown(widgets.lora_stepper, r=4)
    controls, image = widget.children
    back, forward, slider = controls.children
    first = bytes(image.value)
    assert first.startswith(b"\x89PNG") and len(figure.axes) == 6 and "6. Add the two paths" in text
    back.click()
    assert slider.value == 1 and bytes(image.value) == first
    for _ in range(9):
        forward.click()
    assert slider.value == 6 and bytes(image.value) != first
    slider.value = 1
    assert bytes(image.value) == first


def test_calculator(shown):
    widget, figure, _ = shown(widgets.lora_calculator)
    model, rank, layers, answer = widget.children
    assert "460,800" in answer.value  # 30 layers x 8 x (576 + 576 + 576 + 192)
    model.value, rank.value, layers.value = "llama-2-7b", 16, "all linear"
    counted = memory.count("llama-2-7b", "lora", r=16, targets="all-linear").trainable
    assert f"{counted:,}" in answer.value and memory.format_bytes(4 * counted) in answer.value
    for shape in widgets.SHAPES:
        for name in widgets.TARGETS:
            model.value, layers.value = shape, name  # every choice has an answer
    assert [line.get_label() for line in figure.axes[0].lines] == list(widgets.TARGETS)


@pytest.mark.parametrize("method", ["lora", "ia3", "houlsby", "bitfit"])
def test_the_calculator_gives_targets_to_the_low_rank_methods_alone(method):
    """The others stand in places of their own, which targets would move."""
    run = dict(shape="bert-base", method=method, sequence=128)
    usual = memory.estimate(**run, targets="all-linear" if method == "lora" else None)
    assert memory.format_bytes(usual.peak_bytes) in widgets._memory_answer(run)


def test_what_a_run_costs(shown):
    widget, figure, text = shown(widgets.cost_calculator, rates={"LoRA": 5000.0, "full": 2500.0}, tokens=9e6)
    method, tokens, watts, price, answer = widget.children
    assert "0.50" in answer.value and "1.00" in answer.value  # 9e6 / 5000 / 3600 hours, at 2 an hour
    method.value, tokens.value, watts.value, price.value = "full", 90, 500, 3
    assert all(wanted in answer.value for wanted in ("10.00", "5.00", "30.00"))
    price.value = -1
    assert "price must be" in answer.value
    assert "LoRA, full" in text and [bar.get_width() for bar in figure.axes[0].patches][:2] == [0.5, 1.0]
    with pytest.raises(PeftLabError, match="rates names nothing"):
        widgets.cost_calculator({})
