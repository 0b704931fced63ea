"""Every public function, called with one wrong argument after the other: a `PeftLabError`, or nothing wrong at all.

The functions are found by themselves. A new one needs right arguments in `RIGHT`, and the last test says so.
"""

import inspect
import json
import math
import os
import time
import warnings
from pathlib import Path

import pytest
import tiny
import torch

import peftlab as pl
from peftlab import checks
from peftlab.errors import out_of_memory

MODULES = ("exercises", "figures", "measurements", "memory", "notebook", "quantization", "support_desk", "tables",
           "training", "widgets")  # fmt: skip
# What the package makes and hands out, and what `isinstance` and `except` are for
RESULTS = {
    "Count", "Draw", "Estimate", "Exercise", "Grade", "History", "IntruderReport", "Item", "MergeReport", "Module",
    "ParameterCount", "PeftLabError", "QuantState", "Quantized", "Ratio", "Results", "Shape", "TrainingError",
}  # fmt: skip


def public() -> dict[str, object]:
    """{name as one writes it after `pl.`: the function or class}, each once."""
    found = {name: getattr(pl, name) for name in pl.__all__}
    found = {name: value for name, value in found.items() if callable(value) and not inspect.ismodule(value)}
    for module in (getattr(pl, name) for name in MODULES):
        own = [name for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__]
        for name in getattr(module, "__all__", own):
            value = getattr(module, name)
            if callable(value) and not name.startswith("_") and value not in found.values():
                found[f"{module.__name__.rsplit('.', 1)[-1]}.{name}"] = value
    return {name: value for name, value in found.items() if name.rsplit(".", 1)[-1] not in RESULTS}


PUBLIC = public()
# None of these fits where a number, a text, a flag, a model, a tokenizer, a tensor or a list is wanted, but for its own
WRONG = {
    "None": None, "number": 3, "fraction": 2.5, "text": "nonsense", "list": [], "dict": {}, "object": object(),
    "class": pl.LoRAConfig, "nan": math.nan, "infinity": math.inf, "negative": -1, "flag": True, "huge": 10**30,
    "bytes": b"x", "path": Path("no/such/place"), "empty": "", "blank": "  ", "above": "../..", "nul": "a\0b",
    "tensor": torch.ones(2), "list of None": [None], "dict of None": {"a": None},
}  # fmt: skip
LORA = pl.LoRAConfig(r=2, target_modules=["q_proj"])
EXAMPLES = [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}] * 2
ROWS = [{"a": 1, "b": 2, "c": "x"}, {"a": 2, "b": 3, "c": "x"}]


def adapted():
    return pl.attach(tiny.llama(layers=1), LORA)


def merged():
    model = adapted()
    pl.merge(model)
    return model


def classifier():
    from transformers import LlamaForSequenceClassification

    return LlamaForSequenceClassification(tiny.llama(layers=1, pad_token_id=0).config)


def four_bits():
    return pl.quantize_model(tiny.llama(layers=1))


def provenance():
    file = next((Path(pl.__file__).parent / "results").glob("*.json"))
    return json.loads(file.read_text())["provenance"]


# For each name, a function that makes right arguments. It may use the folders "adapter" and "four".
SIZE, TWO = {"x_label": "x", "y_label": "y"}, {"predictions": [1], "references": [1]}
TEXTS = {"predictions": ["a"], "references": ["a"]}
RIGHT = {
    **{name: dict for name, value in PUBLIC.items() if hasattr(value, "peft_type")},
    **dict.fromkeys((
        "figures.adapter_places", "figures.choice", "figures.families", "figures.styled", "figures.use_style",
        "measurements.topics", "notebook.quiet", "quantization.dynamic_map", "show_source", "widgets.lora_stepper",
        "widgets.lora_calculator", "widgets.memory_calculator", "AdapterCallback",
    ), dict),
    **{name: lambda: TWO for name in ("accuracy", "macro_f1")},
    **{name: lambda: TEXTS for name in ("exact_match", "token_f1", "bleu", "chrf")},
    "adjust_p_values": lambda: {"p_values": [0.01, 0.5]},
    "binomial_interval": lambda: {"right": 3, "total": 4},
    "items_needed": lambda: {"share_1": 0.4, "share_2": 0.5},
    "mcnemar": lambda: {"first": [1, 0], "second": [0, 0]},
    "mean_interval": lambda: {"scores": [0.4, 0.5]},
    "paired_bootstrap": lambda: {"first": [1.0, 2.0], "second": [1.0, 3.0]},
    "position_bias": lambda: {"forward": ["first"], "swapped": ["tie"]},
    "two_proportion_test": lambda: {"right_1": 3, "total_1": 4, "right_2": 1, "total_2": 4},
    "win_rate": lambda: {"outcomes": ["win", "tie"]},
    **{name: lambda: {"model": adapted()} for name in (
        "attached", "count_parameters", "detach", "disabled", "find_intruders", "merge", "reduce_intruders")},
    "SelectiveConfig": lambda: {"target_modules": ["q_proj"]},
    "Collator": lambda: {"tokenizer": tiny.tokenizer()},
    "activate": lambda: {"model": adapted(), "which": "default"},
    "adalora_ranks": lambda: {"model": pl.attach(tiny.llama(layers=1), pl.AdaLoRAConfig())},
    "added_loss": lambda: {"model": adapted()},
    "after_step": lambda: {"model": adapted(), "step": 1},
    "add_tokens": lambda: {"model": tiny.llama(layers=1), "tokenizer": tiny.tokenizer(), "tokens": ["<new>"]},
    "attach": lambda: {"model": tiny.llama(layers=1), "config": LORA},
    "check": lambda: {"name": "lora.count", "answer": 1},
    "dequantize_model": lambda: {"model": four_bits()},
    "encode_classification": lambda: {"tokenizer": tiny.tokenizer(), "text": "the cat", "label": 1},
    "encode_chat": lambda: {"tokenizer": tiny.tokenizer(chat=True),
                            "messages": [{"role": "user", "content": "the"}, {"role": "assistant", "content": "cat"}]},
    "encode_completion": lambda: {"tokenizer": tiny.tokenizer(), "prompt": "the", "completion": "cat"},
    "encode_text": lambda: {"tokenizer": tiny.tokenizer(), "text": "the cat"},
    "exercises.choice": lambda: {"right": "a", "options": ["a", "b"], "hint": "h"},
    "exercises.exercises": lambda: {"topic": "lora"},
    "exercises.function": lambda: {"reference": abs, "cases": lambda: [(1,)], "hint": "h"},
    "exercises.grade": lambda: {"name": "lora.count", "answer": 1},
    "exercises.number": lambda: {"right": 1.0, "hint": "h"},
    "expect": lambda: {"claim": "x", "holds": True},
    "export_adapter": lambda: {"folder": "adapter", "out": "exported"},
    "fetch": lambda: {"names": []},
    "figures.agreement": lambda: {"groups": {"a": [(1e9, 2e9)]}},
    "figures.bars": lambda: {"values": {"a": 1.0}, "x_label": "x"},
    "figures.block": lambda: {"method": "lora"},
    "figures.trade_off": lambda: {"panels": {"reviews": {"a": (1.0, 0.5, 0.4, 0.6)}}, "x_label": "x"},
    "figures.intervals": lambda: {"values": {"a": (1.0, 0.5, 1.5)}, "x_label": "x"},
    "figures.ranking": lambda: {"values": {"a": (1.0, 0.5, 1.5)}, "y_label": "y"},
    "figures.lora_family": lambda: {},
    "figures.block_steps": lambda: {"weights": [0.5, -1.0], "book": [i / 8 - 1 for i in range(16)]},
    "figures.budget": lambda: {"rows": ROWS, "x": "a", "y": "b", "by": "c", **SIZE},
    "figures.by_layer": lambda: {"samples": {"a": [[1.0, 2.0]]}, "y_label": "y"},
    "figures.code_books": lambda: {"books": {"a": [0.0, 1.0]}},
    "figures.curves": lambda: {"series": {"a": [1, 2, 3]}},
    "figures.heatmap": lambda: {"matrix": torch.ones(2, 2), **SIZE},
    "figures.histogram": lambda: {"samples": {"a": [1.0, 2.0]}, "x_label": "x"},
    "figures.label": lambda: {"axes": pl.figures.new()[1]},
    "figures.lora_dataflow": lambda: {"step": 1},
    "figures.memory_bars": lambda: {"estimates": {"a": pl.memory.estimate("gpt2", sequence=16)}},
    "figures.new": dict,
    "figures.role": lambda: {"name": "weights"},
    "figures.token_rows": lambda: {"rows": {"a": [("x", "read")]}},
    "figures.spectrum": lambda: {"values": {"a": [3.0, 2.0]}},
    "figures.stacked_bars": lambda: {"parts": {"a": {"x": 1.0}}, "x_label": "x"},
    "figures.sweep": lambda: {"rows": ROWS, "x": "a", "y": "b"},
    "figures.virtual_tokens": dict,
    "figures.timelines": lambda: {"runs": {"a": {"b": [1.0, 2.0]}, "c": {"b": [1.0]}}},
    "generate_text": lambda: {"model": tiny.llama(layers=1), "tokenizer": tiny.tokenizer(), "prompts": ["the"],
                              "max_new_tokens": 1},
    "glue": lambda: {"name": "x", "value": 1},
    "load_adapter": lambda: {"model": tiny.llama(layers=1), "folder": "adapter"},
    "load_data": lambda: {"name": "support-desk", "sizes": (1, 1, 1)},
    "load_model": lambda: {"name": "base"},
    "provenance": lambda: {"source": pl.results("lora")},
    "tables.badge": lambda: {"source": pl.results("lora")},
    "load_quantized": lambda: {"folder": "four"},
    "mean_loss": lambda: {"model": tiny.llama(layers=1), "examples": EXAMPLES, "collate": pl.Collator()},
    "measurements.validate": lambda: {"content": {"topic": "x", "provenance": provenance(), "rows": []}, "name": "n"},
    "measurements.write": lambda: {"path": "w.json", "topic": "x", "provenance": provenance(), "rows": [{"a": 1}]},
    "memory.count": lambda: {"shape": "gpt2"},
    "memory.estimate": lambda: {"shape": "gpt2", "sequence": 16},
    "memory.blocks_to_recompute": lambda: {"room": 10**9, "shape": "gpt2"},
    "memory.fits": lambda: {"card": "T4", "shape": "gpt2"},
    "memory.measured_like": lambda: {"shape": "gpt2"},
    "memory.format_both": lambda: {"size": 3.0},
    "memory.format_bytes": lambda: {"size": 3.0},
    "memory.format_count": lambda: {"number": 3},
    "memory.format_percent": lambda: {"percent": 3.0},
    "memory.largest": lambda: {"what": "batch", "card": "T4", "shape": "gpt2"},
    "memory.load_shape": lambda: {"shape": "gpt2"},
    "memory.what_fits": lambda: {"shape": "gpt2"},
    "notebook.set_seed": dict,
    "notebook.start": dict,
    "perplexity": lambda: {"model": tiny.llama(layers=1), "examples": EXAMPLES},
    "predict_labels": lambda: {"model": classifier(), "examples": [{"input_ids": [1, 2]}]},
    "prepare_for_training": lambda: {"model": tiny.llama(layers=1)},
    "quantization.Linear4bit": lambda: {"quantized": pl.quantize(torch.ones(8, 64))},
    "quantization.code_book": lambda: {"name": "nf4"},
    "quantization.dequantize": lambda: dict(zip(("packed", "state"), vars(pl.quantize(torch.ones(8, 8))).values(),
                                                strict=True)),
    "quantize": lambda: {"weight": torch.ones(8, 8)},
    "quantize_model": lambda: {"model": tiny.llama(layers=1)},
    "quantize_and_attach": lambda: {
        "model": tiny.llama(layers=1), "config": pl.LoRAConfig(r=2, init="loftq", target_modules=["q_proj"])},
    "quantize_nf4": lambda: {"weight": torch.ones(8, 8)},
    "recommend": lambda: {"task": "style", "model": "smollm2-135m"},
    "results": lambda: {"topic": "lora"},
    "run_cost": lambda: {"tokens": 1e6, "tokens_per_second": 1000.0},
    "save_adapter": lambda: {"model": adapted(), "folder": "out"},
    "save_quantized": lambda: {"model": four_bits(), "folder": "out4"},
    "support_desk.generate": lambda: {"split": "train", "size": 1},
    "support_desk.message": lambda: {"split": "train", "intent": "refund", "product": "printer", "urgency": "urgent",
                                     "difficulty": 0.1, "draw": pl.support_desk.Draw("x")},
    "support_desk.parse": lambda: {"answer": "{}"},
    "support_desk.prompt": lambda: {"message": "x"},
    "support_desk.score": lambda: {"answers": ["a"],
                                   "tickets": [pl.support_desk.ticket("refund", "printer", "urgent")]},
    "support_desk.ticket": lambda: {"intent": "refund", "product": "printer", "urgency": "urgent"},
    "table": lambda: {"rows": [{"a": 1}]},
    "tables.as_html": lambda: {"headings": ["a"], "cells": [["1"]], "numeric": [True]},
    "tables.as_text": lambda: {"headings": ["a"], "cells": [["1"]]},
    "tables.lay_out": lambda: {"rows": [{"a": 1}]},
    "train": lambda: {"model": adapted(), "train_data": EXAMPLES, "steps": 1, "batch_size": 2, "progress": False},
    "unmerge": lambda: {"model": merged()},
    "widgets.cost_calculator": lambda: {"rates": {"LoRA": 1000.0}},
}  # fmt: skip


def wrong_type(parameter: inspect.Parameter, value: object) -> bool:
    """Whether a value is surely of a wrong type, by the words of the annotation."""
    hint = parameter.annotation if isinstance(parameter.annotation, str) else inspect.formatannotation(
        parameter.annotation
    )
    if "Any" in hint.split("[")[0] or value is None:
        return value is None and hint in ("str", "int", "float", "bool", "nn.Module", "Tensor", "Tokenizer")
    kinds = {"str": str, "int": int, "float": (int, float), "bool": bool, "nn.Module": torch.nn.Module,
             "Tensor": torch.Tensor, "Tokenizer": type(None)}  # fmt: skip
    return hint in kinds and (not isinstance(value, kinds[hint]) or (isinstance(value, bool) and hint != "bool"))


@pytest.fixture(scope="module", autouse=True)
def place(tmp_path_factory):
    """A folder with what `RIGHT` reads, as the current one, in which wrong names mean nothing."""
    before, top = os.getcwd(), tmp_path_factory.mktemp("wrong")
    (top / "a" / "b").mkdir(parents=True)  # a call may write to "../..", which has to lie within
    os.chdir(top / "a" / "b")
    pl.save_adapter(adapted(), "adapter")
    pl.save_quantized(four_bits(), "four")
    tiny.llama(layers=1).save_pretrained("base")
    tiny.tokenizer().save_pretrained("base")
    yield
    os.chdir(before)


@pytest.mark.parametrize("name", sorted(RIGHT))
def test_a_wrong_argument_is_one_clear_line(name, monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("PEFTLAB_STRICT", raising=False)
    monkeypatch.setattr("peftlab.assets.models._on_hub", lambda name: False)
    function = PUBLIC[name]
    faults, right = [], None
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            continue
        for kind, value in WRONG.items():
            if any(word in str(parameter.annotation) for word in ("Callable", "Loss")) and callable(value):
                continue  # a class is a function of the user's own, and its errors are too
            right = RIGHT[name]() if right is None else right  # a refused call leaves them as they were
            arguments, began = {**right, parameter.name: value}, time.thread_time()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    function(*([pl.LoRAConfig] if name == "show_source" else []), **arguments)
                except pl.PeftLabError as error:
                    if len(str(error)) > 3000 or "\n" in str(error):
                        faults.append(f"{parameter.name}={kind}: a long message: {str(error)[:200]}")
                except BaseException as error:
                    faults.append(f"{parameter.name}={kind}: {type(error).__name__}: {str(error)[:100]}")
                    right = None
                else:
                    right = None
                    if wrong_type(parameter, value):
                        faults.append(f"{parameter.name}={kind} is accepted for {parameter.annotation}")
            if time.thread_time() - began > 3:
                faults.append(f"{parameter.name}={kind} takes {time.thread_time() - began:.1f} s")
    advice = "\nA config checks its fields in __post_init__, with check_fields." if name.endswith("Config") else ""
    assert not faults, "\n".join(faults) + advice


def test_every_public_function_is_tried():
    missing = PUBLIC.keys() - RIGHT.keys()
    assert not missing, f"Give right arguments in RIGHT for {', '.join(sorted(missing))}"


def test_a_refused_call_leaves_the_model_as_it_was():
    from nets import assert_same, snapshot

    model = tiny.llama(layers=1)
    before = snapshot(model)
    for wrong in (lambda: pl.attach(model, LORA, adapter_dtype=3), lambda: pl.quantize_model(model, device="x"),
                  lambda: pl.prepare_for_training(model, freeze="yes"), lambda: pl.train(model, EXAMPLES, loss=3)):
        with pytest.raises(pl.PeftLabError):
            wrong()
    assert_same(before, snapshot(model))


# ------------------------------------------------------------------------------------------------------- the mechanism


@checks.checked("own")
def sample(a: int, b: "str | None" = None, *, c: float = 1.0, d: list[str] = (), own: int = 0, e: "Unknown" = 0) -> str:  # noqa: F821
    """Do nothing."""
    return f"{a} {b} {c} {len(d)} {own} {e}"


def test_signature_name_and_documentation_stay():
    assert str(inspect.signature(sample)).startswith("(a: int, b: 'str | None' = None, *, c: float")
    assert (sample.__name__, sample.__doc__) == ("sample", "Do nothing.")
    assert sample(1, "x", c=2, d=["y"], own="kept", e=object)[:8] == "1 x 2 1 "


@pytest.mark.parametrize(("arguments", "message"), [
    ({"a": True}, "a must be a whole number, found True."),
    ({"a": 2.0}, "a must be a whole number, found 2.0."),
    ({"a": 1, "b": 3}, "b must be a string or None, found 3."),
    ({"a": 1, "c": math.nan}, "c must be a finite number, found nan."),
    ({"a": 1, "d": "word"}, "d must be a list, each a string, found 'word'."),
    ({"a": 1, "d": ["x", 3]}, "d must be a list, each a string, found ['x', 3]."),
    ({"a": torch.nn.Linear}, "a must be a whole number, found the class Linear itself."),
    ({"a": object()}, "a must be a whole number, found an object."),
    ({"a": "x" * 10**6}, "a must be a whole number, found 'xxx"),
])  # fmt: skip
def test_what_an_error_says(arguments, message):
    with pytest.raises(pl.PeftLabError) as told:
        sample(**arguments)
    assert str(told.value).startswith(message) and len(str(told.value)) < 200


def test_a_wrong_number_of_arguments_is_for_python_to_tell():
    with pytest.raises(TypeError, match="missing 1 required"):
        sample()
    with pytest.raises(TypeError, match="unexpected keyword"):
        sample(1, f=2)


def test_a_check_costs_a_few_microseconds():
    began = time.perf_counter()
    for _ in range(2000):
        sample(1, "x")
    assert (time.perf_counter() - began) / 2000 < 1e-4


@pytest.mark.parametrize(("error", "wanted"), [
    (MemoryError(), ""),
    (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried to allocate "
                  "4000000 bytes. Error code 12"), " (4000000 bytes were wanted)"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0"), " (20.00 GiB were wanted)"),
    (MemoryError("Unable to allocate 7.28 TiB for an array"), " (7.28 TiB were wanted)"),
    (OSError(12, "Cannot allocate memory"), ""),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED"), ""),
    (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), None),
])  # fmt: skip
def test_memory_that_ran_out_is_recognised(error, wanted):
    assert out_of_memory(error) == wanted


def test_torchs_own_words_for_memory_are_known():
    with pytest.raises(RuntimeError) as told:
        torch.empty(10**15)
    assert "were wanted" in out_of_memory(told.value)
    with pytest.raises(pl.PeftLabError, match="too large for the memory"):
        pl.attach(tiny.llama(layers=1), pl.LoRAConfig(r=10**14))


# ------------------------------------------------------------------------------------------------ names and configs


@pytest.mark.parametrize("name", ["", " ", "\t\n", "a\0b", "org/ x", "a/../b", "//", "nó/such", "org/a/b"])
def test_names_that_name_nothing(name, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for call in (pl.load_data, pl.load_model, pl.memory.estimate, pl.memory.count, pl.load_quantized):
        with pytest.raises(pl.PeftLabError) as told:
            call(name)
        assert "\n" not in str(told.value)


@pytest.mark.parametrize("family", ["llama-3.2-1b", "gpt2", "bert-base", "t5-base"])
def test_configs_of_absurd_sizes_are_judged_soon(family):
    from peftlab.memory.counting.builtin import BUILT_IN

    config = BUILT_IN[family]
    for field, before in config.items():
        if not isinstance(before, int) or isinstance(before, bool):
            continue
        for value in (10**9, 10**12, 10**400, 0, -1, 2.5, "12", [1], {"a": 1}, math.nan):
            for call in (pl.memory.count, pl.memory.estimate):
                began = time.thread_time()
                try:
                    made = call({**config, field: value})
                except pl.PeftLabError:
                    assert value != 1
                else:
                    assert made.total > 0
                assert time.thread_time() - began < 2, (field, value)
    layers = next(field for field in config if field in ("num_hidden_layers", "n_layer", "num_layers"))
    with pytest.raises(pl.PeftLabError, match="of at most 1,000, found 1000000000"):
        pl.memory.count({**config, layers: 10**9})
