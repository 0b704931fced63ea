"""A folder's config is judged before anything is built from it: sizes by the tensors, patterns by the clock."""

import json
import time

import peft
import pytest
import torch
from nets import Net, assert_same, snapshot, tokens
from safetensors.torch import load_file, save_file
from tiny import llama

import peftlab as pl
from peftlab import patterns
from peftlab.adapters.trainer_callback import restore_adapter
from peftlab.memory import count

C, W, E = "adapter_config.json", "adapter_model.safetensors", "adapter_encoder.safetensors"
LARGE = (10**9, 2**62, 4097, 10**30)
ODD = (0, -1, -(10**9), 8.0, 2.5, "8", "a billion", True, None, [8], {"r": 8})

METHODS = {
    "lora": pl.LoRAConfig(r=4, target_modules=["q_proj", "up_proj"], rank_pattern={"up_proj": 2}),
    "ia3": pl.IA3Config(),
    "prompt": pl.PromptTuningConfig(num_virtual_tokens=3),
    "p-tuning": pl.PTuningConfig(num_virtual_tokens=3, encoder_hidden=8),
    "lstm": pl.PTuningConfig(num_virtual_tokens=3, encoder="lstm", encoder_hidden=8),
    "prefix": pl.PrefixTuningConfig(num_virtual_tokens=3),
    "projection": pl.PrefixTuningConfig(num_virtual_tokens=3, projection=True, encoder_hidden=8),
    "houlsby": pl.AdapterConfig(placement="houlsby", width=4),
    "selective": pl.SelectiveConfig(last_layers=1),
}


@pytest.fixture
def folder(request, tmp_path):
    """A folder of a method, without the sums that would tell an edited config at once."""
    pl.save_adapter(pl.attach(llama(), METHODS[getattr(request, "param", "lora")]), tmp_path / "one")
    tensors = load_file(tmp_path / "one" / W)
    from safetensors import safe_open

    with safe_open(tmp_path / "one" / W, "pt") as opened:
        kept = {name: text for name, text in opened.metadata().items() if name in ("format", "peftlab_encoder")}
    save_file(tensors, tmp_path / "one" / W, kept)
    return tmp_path / "one"


def edit(folder, **fields):
    content = json.loads((folder / C).read_text())
    (folder / C).write_text(json.dumps(content | fields))


def refused(folder, trainable=False, seconds=3.0):
    """Requires one clear error, soon, without memory, and a model left as it was."""
    model = llama()
    before, began = snapshot(model), time.thread_time()
    with pytest.raises(pl.PeftLabError) as told:
        pl.load_adapter(model, folder, trainable=trainable)
    assert time.thread_time() - began < seconds
    assert len(str(told.value)) < 2000 and "\n" not in str(told.value)
    assert_same(before, snapshot(model))


SIZES = [
    ("lora", "r"), ("prompt", "num_virtual_tokens"), ("p-tuning", "num_virtual_tokens"),
    ("lstm", "encoder_hidden_size"), ("prefix", "num_virtual_tokens"), ("projection", "encoder_hidden_size"),
    ("p-tuning", "encoder_hidden_size"),
    ("lstm", "encoder_num_layers"), ("houlsby", "width"), ("selective", "last_layers"),
]  # fmt: skip


@pytest.mark.parametrize(("folder", "field"), SIZES, indirect=["folder"], ids="-".join)
def test_sizes_that_no_tensor_has(folder, field):
    edit(folder)
    pl.load_adapter(llama(), folder, trainable=True)  # the folder itself is good
    for value in LARGE:
        edit(folder, **{field: value})
        refused(folder, trainable=True)
    for value in ODD:
        if value is True or value is None or (field == "last_layers" and value == 0):
            continue
        edit(folder, **{field: value})
        refused(folder, trainable=True)


@pytest.mark.parametrize("value", [*LARGE, *(odd for odd in ODD)], ids=str)
def test_a_rank_for_chosen_modules(folder, value):
    edit(folder, rank_pattern={"up_proj": value})
    refused(folder)
    edit(folder, rank_pattern=value)
    if value:  # 0 and None are no pattern
        refused(folder)


def test_ranks_that_the_tensors_bear_out_load(tmp_path):
    """Hugging Face's own folders, with a rank for some modules and a default that none has."""
    ranks = {r"blocks\.1\.up": 5, "up": 9}
    config = peft.LoraConfig(r=2, target_modules=["up", "head"], rank_pattern=ranks, init_lora_weights=False)
    model = peft.get_peft_model(Net(), config)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(pl.load_adapter(Net(), tmp_path)(tokens()), model(tokens()))


def test_a_rank_for_no_target_may_be_any(tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["up"], rank_pattern={"head": 10**9, "nowhere": 64})
    model = peft.get_peft_model(Net(), config)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(pl.load_adapter(Net(), tmp_path)(tokens()), model(tokens()))


def test_many_middling_ranks_are_no_way_to_fill_the_memory(tmp_path):
    """Each could be a dimension of some tensor; together they are far more than the folder holds."""
    small = dict(hidden_size=2048, intermediate_size=2048, layers=2, num_attention_heads=2, num_key_value_heads=2)
    model = llama(**small)
    pl.save_adapter(pl.attach(model, pl.LoRAConfig(r=1, target_modules="all-linear")), tmp_path)
    save_file(load_file(tmp_path / W), tmp_path / W, {"format": "pt"})
    edit(tmp_path, r=2048)
    pl.detach(model)
    with pytest.raises(pl.PeftLabError, match="asks for more than"):
        pl.load_adapter(model, tmp_path)


LISTS = {
    "a million names": dict(target_modules=[f"layer{i}" for i in range(200_000)]),
    "a million layers": dict(layers_to_transform=list(range(500_000))),
    "a billionth layer": dict(layers_to_transform=[10**9]),
    "a billionth layer alone": dict(layers_to_transform=10**9),
    "a million ranks": dict(rank_pattern={f"x{i}": 4 for i in range(100_000)}),
    "a million alphas": dict(alpha_pattern={f"x{i}": 4 for i in range(100_000)}),
    "a million heads": dict(modules_to_save=[f"head{i}" for i in range(100_000)]),
    "a type without end": dict(peft_type="LORA" * 100_000),
    "a type that is no text": dict(peft_type=["LORA"]),
    "a task without end": dict(task_type="x" * 100_000),
    "names of lists": dict(target_modules=[["q_proj"]]),
    "names in a table": dict(modules_to_save={"a": {"b": 1}}),
    "alpha without end": dict(lora_alpha=10**18, r=0),
    "dropout of text": dict(lora_dropout="0"),
    "bias a list": dict(bias=["none"]),
}


@pytest.mark.parametrize("case", LISTS)
def test_lists_and_texts_that_fit_no_model(folder, case):
    edit(folder, **LISTS[case])
    refused(folder)


# ---------------------------------------------------------------------------------------------------------- patterns

# None of these can be matched in the time that the universe has, by an engine that goes back and tries again
RUNAWAY = [
    r"(?:a|[a-z_.0-9]|.)*[!?]",
    r"(?:.*\.){1,20}(?:.*){1,20}[!?]",
    r"(?:(?:.|..|...)+)+[!?]",
    r"(?P<a>.*?)(?:(?P=a).*?)*[!?]",
    r"(([a-z_.0-9])+.)+!",
    r"(.*)*(.*)*(.*)*x{3}",
    r"(?:\w|\w\w|\.)+(?:\w|\w\w|\.)+#",
    r"(?=(?:.|..)*$)(?:.|..|...)*[A-Z]",
]
BOMBS = ["((a{1000}){1000}){1000}", "(" * 3000 + ")" * 3000, "(x|y)" * 10_000, "a{99999999999}b{9}", "(?:a?){100000}"]
BROKEN = ["(", "(?P<a>", "[z-a]", "*", "a{2,1}", r"\9", "(?i", "(?<=a*)b", "(?z)"]


def places(pattern):
    """Every field that holds a pattern, with the pattern in it."""
    return {
        "target_modules": dict(target_modules=pattern),
        "exclude_modules": dict(target_modules=["q_proj"], exclude_modules=pattern),
        "rank_pattern": dict(rank_pattern={pattern: 2}),
        "alpha_pattern": dict(alpha_pattern={pattern: 2}),
        "layers_pattern": dict(target_modules=["q_proj"], layers_to_transform=[0], layers_pattern=[pattern]),
        "layers_pattern alone": dict(target_modules=["q_proj"], layers_to_transform=[0], layers_pattern=pattern),
    }


@pytest.mark.parametrize(
    ("field", "pattern"),
    # each pattern in two or three fields, each field with four of the eight patterns, or with two and three
    [(f, p) for i, f in enumerate(places("")) for j, p in enumerate(RUNAWAY) if (i + j) % 3 == 0],
)
def test_a_pattern_that_runs_away_is_stopped(folder, field, pattern, monkeypatch):
    """Stopped, or found out in time to match nothing: then an exclusion or a table of it may say nothing here."""
    monkeypatch.setattr(patterns, "SECONDS", 0.01)
    config = {"target_modules": ["q_proj"], **places(pattern)[field]}
    edit(folder, rank_pattern={})
    edit(folder, **config)
    for act in (lambda m: pl.load_adapter(m, folder), lambda m: pl.attach(m, pl.LoRAConfig(**config))):
        model = llama()
        before, began = snapshot(model), time.thread_time()
        try:
            act(model)
            assert field in ("exclude_modules", "rank_pattern", "alpha_pattern")
        except pl.PeftLabError as error:
            assert "\n" not in str(error)
            assert_same(before, snapshot(model))
        assert time.thread_time() - began < 2


@pytest.mark.parametrize("field", places(""))
def test_what_a_slow_pattern_says(folder, field, monkeypatch):
    """In every field: that it takes too long, which it is, and what to do."""
    monkeypatch.setattr(patterns, "SECONDS", 0.05)
    pattern = RUNAWAY[0]
    config = {"target_modules": ["q_proj"], **places(pattern)[field]}
    with pytest.raises(pl.PeftLabError, match=r"The regular expression .*takes too long.*name the modules in a list"):
        pl.attach(llama(), pl.LoRAConfig(**config))
    edit(folder, **config)
    with pytest.raises(pl.PeftLabError, match="takes too long"):
        pl.load_adapter(llama(), folder)


def test_other_fields_and_other_ways_in(folder, monkeypatch):
    pattern = RUNAWAY[0]
    with pytest.raises(pl.PeftLabError, match="takes too long"):
        pl.attach(llama(), pl.IA3Config(target_modules=["k_proj"], feedforward_modules=pattern))
    monkeypatch.setattr(patterns, "SECONDS", 0.05)  # the first had the whole second that users have
    with pytest.raises(pl.PeftLabError, match="takes too long"):
        count("smollm2-135m", "lora", targets=pattern)
    model = pl.attach(llama(), METHODS["lora"])
    edit(folder, rank_pattern={pattern: 2})
    before = snapshot(model)
    with pytest.raises(pl.PeftLabError, match="takes too long"):
        restore_adapter(model, folder, "default")
    assert_same(before, snapshot(model))


@pytest.mark.parametrize("pattern", [*BOMBS, *BROKEN], ids=lambda pattern: pattern[:12])
def test_patterns_that_cannot_be_compiled(folder, pattern):
    for fields in places(pattern).values():
        edit(folder, rank_pattern={}, alpha_pattern={}, exclude_modules=None, layers_to_transform=None)
        edit(folder, **fields)
        began = time.thread_time()
        with pytest.raises(pl.PeftLabError):
            pl.load_adapter(llama(), folder)
        assert time.thread_time() - began < 2


@pytest.mark.parametrize(("pattern", "matched"), [
    (r".*\.(q|v)_proj", 4), (r"model\.layers\.0\..*proj", 7), (r"(?:.+\.)?self_attn\.[qkv]_proj", 6),
    (r".*(?<!down)_proj", 12), (r"(?i).*Q_PROJ", 2), (r"model\.layers\.\d{1,2}\.mlp\.up_proj", 2),
    (r"model\.layers\.0\.mlp\.up_proj|model\.layers\.1\.mlp\.up_proj", 2),
])  # fmt: skip
def test_patterns_mean_what_they_mean_to_pythons_re(pattern, matched):
    import re

    paths = [path for path, _ in llama().named_modules() if path]
    assert [path for path in paths if patterns.fullmatch(pattern, path)] == [
        path for path in paths if re.fullmatch(pattern, path)
    ]
    model = pl.attach(llama(), pl.LoRAConfig(r=1, target_modules=pattern))
    assert sum("lora_A" in name for name, _ in model.named_parameters()) == matched


def test_long_lists_of_names_are_no_patterns():
    """As IA3 writes for a mixture of experts: too long to compile, and read as what they are."""
    import re

    names = [f"model.layers.{i}.mlp.experts.{j}.down_proj" for i in range(40) for j in range(40)]
    pattern = "|".join(map(re.escape, names))
    assert len(pattern) > patterns.LONGEST
    assert patterns.fullmatch(pattern, names[777]) and not patterns.fullmatch(pattern, "model.layers.1.mlp.down_proj")


def test_large_tables_of_plain_names_keep_their_time():
    """The budget grows with the number of matches, each of which is quick."""
    began = time.thread_time()
    with patterns.bounded():
        for i in range(300):
            for path in (f"model.layers.{j}.mlp.up_proj" for j in range(300)):
                assert patterns.ends(f"layers.{i}.mlp.(up|down)_proj", path) == (f".{i}." in path)
    assert time.thread_time() - began < 10


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64], ids=str)
def test_numbers_of_another_kind_are_not_cast_without_a_word(folder, dtype):
    """Integers without their scale, say, or the real part of complex numbers."""
    save_file({key: tensor.to(dtype) for key, tensor in load_file(folder / W).items()}, folder / W)
    with pytest.raises(pl.PeftLabError, match="holds .* values, and what an adapter adds is a floating type"):
        pl.load_adapter(llama(), folder)
    refused(folder)
