"""Parameter counts by arithmetic: published totals, the LoRA formula, and what a mistake gets to hear."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from places import has_place

from peftlab.commands import cli
from peftlab.errors import PeftLabError, near_matches
from peftlab.memory import BUILT_IN, METHODS, count, estimate, format_both, format_bytes, format_percent, load_shape
from peftlab.memory.counting.options import Options

# Published parameter counts (models' cards and papers), encoders with their two-label head.
PUBLISHED = {
    "llama-2-7b": 6_738_415_616,
    "llama-2-70b": 68_976_648_192,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "mistral-7b": 7_241_732_096,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-7b": 7_615_616_512,
    "gpt2": 124_439_808,
    "bert-base": 109_482_240 + 2 * 769,
    "roberta-base": 124_055_040 + 768 * 769 + 2 * 769,
    "roberta-large": 354_310_144 + 1024 * 1025 + 2 * 1025,
    "t5-base": 222_903_552,
    "smollm2-135m": 134_515_008,
    "minilm": 22_713_216 + 2 * 385,
}


def test_every_built_in_shape_has_its_published_size():
    assert {name: load_shape(name).parameters for name in PUBLISHED} == PUBLISHED


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_module_knows_the_block_that_it_lies_in(name):
    for module in load_shape(name).modules:
        numbers = [int(part) for part in module.path.split(".") if part.isdigit()]
        assert module.layer == (numbers[0] if numbers else None), module.path


def test_lora_numbers_that_circulate():
    assert count("llama-2-7b", "lora", r=8).trainable == 4_194_304
    assert count("llama-3.2-3b", "lora", r=32).trainable == 9_175_040  # peft's own method comparison
    assert count("llama-2-7b", "lora", r=16, targets="all-linear").trainable == 39_976_960
    one = count("llama-2-7b", "lora", r=16, targets=["layers.0.self_attn.q_proj"])
    assert one.trainable == 131_072 and one.adapted[0].parameters == 16_777_216


def test_the_formulas_of_the_papers():
    """Worked by hand: 12 layers of width 768 for BERT, 32 of 4096 for Llama 2, 32 of 4096 and 1024 for Llama 3.1."""
    bert = {m: count("bert-base", m).trainable - 1538 for m in ("houlsby", "pfeiffer", "parallel", "bitfit", "ia3")}
    assert bert["houlsby"] == 2 * bert["pfeiffer"] == 2 * bert["parallel"] == 24 * (2 * 768 * 48 + 48 + 768)
    assert bert["bitfit"] == 12 * (7 * 768 + 3072) + 768 + 768  # the embeddings' norm, the pooler
    assert bert["ia3"] == 12 * (3 * 768 + 3072)  # keys, values, what goes into both layers named output.dense
    assert count("llama-2-7b", "prompt").trainable == 20 * 4096
    assert count("llama-2-7b", "p-tuning").trainable == 20 * 4096 + 3 * (4096**2 + 4096)
    assert count("llama-2-7b", "prefix").trainable == 20 * 32 * 2 * 4096 == 5_242_880
    assert count("llama-3.1-8b", "prefix", virtual_tokens=10).trainable == 10 * 32 * 2 * 1024
    # The MLP that makes the prefix during training is larger than everything else: millions, not thousands.
    made = count("llama-2-7b", "prefix", projection=True).trainable
    assert made == 20 * 4096 + 4096 * 4097 + 32 * 2 * 4096 * 4097 == 1_090_867_200
    assert count("llama-2-7b", "ia3").trainable == 32 * (2 * 4096 + 11008)  # the paper's k, v and feed-forward
    assert count("llama-2-7b", "dora").trainable == 4_194_304 + 64 * 4096
    assert count("llama-2-7b", "adalora").trainable == 64 * 12 * (2 * 4096 + 1)
    assert count("llama-2-7b", "vera").trainable == 64 * (4096 + 256)
    assert count("t5-base", "prompt").trainable == 2 * 20 * 768  # one for the encoder and one for the decoder
    assert count("gpt2", "houlsby", reduction_factor=1000).added == 24 * (2 * 768 + 1 + 768)  # a bottleneck of one


def test_what_is_added_is_a_list_of_tensors_and_a_frozen_pair_is_not_counted():
    shape = load_shape("llama-3.1-8b")
    trained = METHODS["vera"](shape, Options(r=16))
    assert [(t.path, t.name, t.size, t.elements) for t in trained.added if t.buffer] == [
        ("", "vera_A", (16, 4096), 65_536),
        ("", "vera_B", (4096, 16), 65_536),
    ]
    assert sum(t.elements for t in trained.added if not t.buffer) == count(shape, "vera", r=16).added
    # peft keeps AdaLoRA's current ranks as parameters: in the total, and never trained
    adalora = count(shape, "adalora")
    assert adalora.added == adalora.trainable + 64 and adalora.total == shape.parameters + adalora.added
    full = METHODS["full"](load_shape("gpt2"), Options())
    assert full.whole and not full.added and "lm_head" not in {module.path for module, _ in full.own}  # tied


def test_count_takes_the_methods_options_on_the_command_line(capsys):
    for line, wanted in (
        ("--method vera", count("gpt2", "vera", r=256)),
        ("--method adalora --r 4", count("gpt2", "adalora", r=4)),
        ("--method prefix --virtual-tokens 7", count("gpt2", "prefix", virtual_tokens=7)),
        ("--method pfeiffer --reduction-factor 2", count("gpt2", "pfeiffer", reduction_factor=2)),
        ("--method IA3 --targets c_fc", count("gpt2", "ia3", targets=["c_fc"])),
    ):
        assert cli.main(["count", "gpt2", *line.split(), "--json"]) == 0
        assert json.loads(capsys.readouterr().out) == wanted.as_dict()
    assert cli.main(["count", "gpt2", "--method", "vera"]) == cli.main(["count", "gpt2", "--method", "prompt"]) == 0
    out = capsys.readouterr().out
    assert "vera, r = 256\n" in out and out.count("r = ") == 1
    for line, message in (
        ("gpt2 --method prompt --virtual-tokens 0", "virtual_tokens must be a positive whole number, found 0"),
        ("llama-2-7b --method bitfit", "llama-2-7b has no biases, so bitfit has nothing to train. Use ia3"),
    ):
        assert cli.main(["count", *line.split()]) == 2
        out, err = capsys.readouterr()
        assert out == "" and message in err and err.count("\n") == 1
    with pytest.raises(SystemExit):
        cli.main(["count", "--help"])
    out = " ".join(capsys.readouterr().out.split())
    assert ", ".join(METHODS) in out and "8 for lora/qlora/dora/" in out
    assert ", 12 for adalora, 256 for vera" in out


@settings(max_examples=40, deadline=None)
@given(name=st.sampled_from(sorted(BUILT_IN)), r=st.integers(1, 512), everywhere=st.booleans())
def test_lora_is_linear_in_r_and_the_total_adds_up(name, r, everywhere):
    targets = "all-linear" if everywhere else None
    one, many = count(name, "lora", r=1, targets=targets), count(name, "lora", r=r, targets=targets)
    assert many.added == r * one.added > 0
    assert many.trainable == many.added + many.head
    assert many.total == load_shape(name).parameters + many.trainable
    assert not any(module.role == "output" for module in many.adapted)


def test_the_classification_head_trains_beside_an_adapter():
    shape = load_shape("bert-base")
    assert count(shape, "lora").head == 2 * 768 + 2
    assert count(shape, "full").total == shape.parameters
    five = load_shape("roberta-base", labels=5)
    assert count(five, "lora").head == count("roberta-base", "lora", labels=5).head == 768 * 769 + 5 * 769
    assert count("gpt2", "lora").head == count("t5-base", "lora").head == 0


def test_a_config_may_be_a_file_a_folder_a_dict_or_a_shape(tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(BUILT_IN["minilm"]))
    counts = {count(given, "lora").total for given in ("minilm", "MiniLM", str(file), file, tmp_path, str(tmp_path))}
    counts |= {count(BUILT_IN["minilm"], "lora").total, count(load_shape("minilm"), "lora").total}
    assert len(counts) == 1


MISTAKES = [
    ({"shape": "lama-2-7b"}, "Unknown shape 'lama-2-7b'", "'llama-2-7b'"),
    ({"shape": "meta-llama/Llama-2-7b-hf"}, "Unknown shape", "'llama-2-7b'"),
    ({"shape": "zzz"}, "Unknown shape 'zzz'", "Known: llama-2-7b"),
    ({"shape": "nowhere/config.json"}, "No file 'nowhere/config.json'", "built-in name"),
    ({"shape": "gpt2", "method": "lroa"}, "Unknown method 'lroa'", "'lora'"),
    ({"shape": "gpt2", "method": "x"}, "Unknown method 'x'", "Known: full, lora, qlora"),
    ({"shape": "gpt2", "r": 0}, "r must be a positive whole number, found 0", ""),
    ({"shape": "gpt2", "r": -4}, "found -4", ""),
    ({"shape": "gpt2", "r": 2.0}, "found 2.0", ""),
    ({"shape": "gpt2", "r": True}, "found True", ""),
    ({"shape": "llama-2-7b", "targets": ["q_prj"]}, "Target 'q_prj' matches no module of llama-2-7b", "'q_proj'"),
    ({"shape": "llama-2-7b", "targets": ["q_proj", "vproj"]}, "Target 'vproj' matches no module", "'v_proj'"),
    ({"shape": "gpt2", "targets": ["q_proj"]}, "Its linear layers are c_attn, c_proj, c_fc", ""),
    ({"shape": "gpt2", "targets": []}, "No targets are named", "c_attn"),
    ({"shape": "gpt2", "targets": "c_attn"}, "The expression 'c_attn' matches no module", "c_attn, c_proj"),
    ({"shape": "gpt2", "targets": "(c_attn"}, "not a valid regular expression", "("),
    ({"shape": "gpt2", "targets": ["ln_1"]}, "is a norm, not a linear layer", "c_attn"),
    ({"shape": "bert-base", "targets": ["classifier"]}, "classification head", "trains as a whole"),
    ({"shape": "gpt2", "bias": "everything"}, "bias must be one of 'none', 'all', 'lora_only'", "everything"),
    ({"shape": "gpt2", "bias": "lora"}, "found 'lora'. Did you mean 'lora_only'", ""),
    ({"shape": "gpt2", "method": "bit-fit"}, "Unknown method 'bit-fit'", "'bitfit'"),
    ({"shape": "gpt2", "method": "prefix_tuning"}, "Unknown method 'prefix_tuning'", "'prefix'"),
    ({"shape": "gpt2", "method": "prompt", "virtual_tokens": 0}, "virtual_tokens must be a positive", "found 0"),
    ({"shape": "gpt2", "method": "prefix", "virtual_tokens": 2.5}, "virtual_tokens must be a positive", "found 2.5"),
    ({"shape": "gpt2", "method": "houlsby", "reduction_factor": -1}, "reduction_factor must be a positive", "-1"),
    ({"shape": "gpt2", "method": "p-tuning", "encoder": "lsmt"}, "encoder must be one of 'mlp', 'lstm'",
     "Did you mean 'lstm'"),
    ({"shape": "gpt2", "method": "p-tuning", "encoder_hidden": 0}, "encoder_hidden must be a positive", "found 0"),
    ({"shape": "gpt2", "method": "ia3", "targets": ["wte"]}, "target transformer.wte of gpt2 is an embedding", "lora"),
    ({"shape": "gpt2", "method": "vera", "targets": ["c_fcc"]}, "Target 'c_fcc' matches no module", "'c_fc'"),
    ({"shape": "gpt2", "method": "ia3", "bias": "all"}, "bias='all' is no option of ia3", "Methods with bias: lora"),
    ({"shape": "llama-2-7b", "method": "bitfit"}, "llama-2-7b has no biases", "Use ia3"),
    ({"shape": "bert-base", "labels": 0}, "labels must be a positive whole number", "0"),
]


@pytest.mark.parametrize(("arguments", "message", "hint"), MISTAKES)
def test_a_mistake_is_named_with_what_was_found_and_the_near_matches(arguments, message, hint):
    with pytest.raises(PeftLabError) as caught:
        count(**{"method": "lora", **arguments})
    text = str(caught.value)
    assert message in text and hint in text and "\n" not in text
    assert isinstance(caught.value, ValueError)


LLAMA = BUILT_IN["llama-3.2-1b"]
BROKEN = [
    ("{", "is not valid JSON"),
    ("[1, 2]", "holds a list"),
    ("{}", "model_type is missing"),
    (json.dumps({"hidden_size": 8}), "model_type is missing"),
    (json.dumps({"model_type": "llma"}), "model_type 'llma' is not known. Did you mean 'llama'?"),
    (json.dumps({"model_type": "mamba"}), "Known: llama, mistral"),
    (json.dumps({"model_type": "llama"}), "vocab_size is missing"),
    (json.dumps({**LLAMA, "hidden_size": "2048"}), "hidden_size must be a positive whole number, found '2048'"),
    (json.dumps({**LLAMA, "num_hidden_layers": 0}), "num_hidden_layers must be a positive whole number, found 0"),
    (json.dumps({**LLAMA, "vocab_size": True}), "found True"),
    (json.dumps({**LLAMA, "tie_word_embeddings": "yes"}), "tie_word_embeddings must be true or false"),
    (json.dumps({**LLAMA, "num_key_value_heads": 7}), "32 attention heads cannot share 7 key/value heads"),
    (json.dumps({**LLAMA, "hidden_size": 2050, "head_dim": None}), "not a multiple of the 32 attention heads"),
    (json.dumps({**BUILT_IN["gpt2"], "n_embd": 770}), "no multiple of the 12 attention heads"),
    (json.dumps({**BUILT_IN["minilm"], "hidden_size": 385}), "no multiple of the 12 attention heads"),
    (json.dumps({**BUILT_IN["gpt2"], "add_cross_attention": True}), "add_cross_attention is set"),
    (json.dumps({**BUILT_IN["t5-base"], "feed_forward_proj": 3}), "feed_forward_proj must be a string"),
]


@pytest.mark.parametrize(("text", "message"), BROKEN)
def test_a_broken_config_is_refused_with_the_file_named(text, message, tmp_path):
    file = tmp_path / "config.json"
    file.write_text(text)
    with pytest.raises(PeftLabError) as caught:
        load_shape(file)
    assert message in str(caught.value) and str(file) in str(caught.value) and "\n" not in str(caught.value)


def test_a_folder_without_a_config_and_a_file_that_is_no_text(tmp_path):
    with pytest.raises(PeftLabError, match="holds no config.json"):
        load_shape(tmp_path)
    (tmp_path / "config.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PeftLabError, match="cannot be read"):
        load_shape(tmp_path)


def test_counting_loads_neither_torch_nor_transformers():
    code = (
        f"import sys; sys.path.append({str(Path(__file__).parent)!r}); "
        "from peftlab.memory import METHODS, count; from places import shape_for; "
        "[count(shape_for(method), method) for method in METHODS]; "
        "count('llama-2-70b', 'lora', targets='all-linear'); "
        "print([m for m in ('torch', 'transformers', 'numpy', 'datasets', 'peft') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("method", "options", "told"),
    [("bitfit", {"r": 8}, "r=8 is no option of bitfit.*Options of bitfit: targets. Methods with r: lora, qlora, dora"),
     ("full", {"targets": ["q_proj"]}, "is no option of full.*Options of full: none. Methods with targets: lora"),
     ("prompt", {"bias": "all"}, "bias='all' is no option of prompt.*Options of prompt: virtual_tokens"),
     ("lora", {"virtual_tokens": 5}, "Methods with virtual_tokens: prompt, p-tuning, prefix"),
     ("houlsby", {"encoder_hidden": 8}, "Methods with encoder_hidden: p-tuning, prefix"),
     ("vera", {"target_parameters": ["gate.weight"]}, "Methods with target_parameters: lora, qlora")],
)  # fmt: skip
def test_an_option_that_the_method_does_not_take_is_refused(method, options, told):
    """It would change nothing, without a word."""
    with pytest.raises(PeftLabError, match=told):
        count("bert-base", method, **options)
    if "encoder_hidden" not in options:
        with pytest.raises(PeftLabError, match=told):
            estimate("bert-base", method, **options)


def test_bitfit_on_norms():
    """As `attach` takes them; LoRA stands on no norm."""
    assert count("bert-base", "bitfit", targets=["LayerNorm"]).trainable == 25 * 768 + 2 * 769
    with pytest.raises(PeftLabError, match="is a norm, not a linear layer"):
        count("bert-base", "lora", targets=["LayerNorm"])
    with pytest.raises(PeftLabError, match="'layer_norm' matches no module"):
        count("bert-base", "bitfit", targets=["layer_norm"])


def test_every_method_of_the_table_counts_every_built_in_shape():
    for method in METHODS:
        for name in BUILT_IN:
            if method == "bitfit" and not any(module.bias for module in load_shape(name).modules):
                with pytest.raises(PeftLabError, match=f"{name} has no biases.*Use ia3"):
                    count(name, method)
                continue
            if not has_place(method, name):
                continue
            result = count(name, method)
            assert 0 < result.trainable <= result.total
            assert result.percent == pytest.approx(100 * result.trainable / result.total)


def test_gigabytes_and_gibibytes_are_told_apart():
    assert format_bytes(14.4e9) == "14.40 GB"
    assert format_bytes(14.4e9, binary=True) == "13.41 GiB"
    assert format_both(1e9) == "1.00 GB (953.67 MiB)"
    assert format_bytes(999) == format_bytes(999, binary=True) == "999 bytes"
    assert format_bytes(2**30, binary=True) == "1.00 GiB"
    assert [format_percent(p) for p in (100, 1.0694, 0.0622, 0.00001, 0)] == [
        "100 %", "1.07 %", "0.0622 %", "1.0e-05 %", "0 %",
    ]  # fmt: skip


def test_near_matches_are_spellings_and_parts():
    assert near_matches("lroa", ["lora", "qlora", "full"])[0] == "lora"
    assert near_matches("llama", ["llama-2-7b", "gpt2"]) == ["llama-2-7b"]
    assert near_matches("zzzz", ["lora"]) == []


@pytest.mark.parametrize("method", ["bitfit", "houlsby", "pfeiffer", "parallel"])
@pytest.mark.parametrize("targets", [["query"], ["attention.output.dense", "value"]], ids=["query", "two"])
def test_targets_count_as_what_is_attached(method, targets):
    """A method whose usual places are its own stands on the named modules instead."""
    from transformers import BertConfig, BertModel

    import peftlab as pl
    from peftlab.catalogue import METHODS

    settings = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, vocab_size=50)
    config = BertConfig(**settings)
    model = BertModel(config)
    row = METHODS[method]
    pl.attach(model, row.config_class()(**row.fixed, target_modules=targets))
    counted = count({**config.to_dict(), "architectures": ["BertModel"]}, method, targets=targets)
    assert counted.trainable - counted.head == pl.count_parameters(model).trainable


def test_targets_that_a_method_cannot_use_are_refused():
    with pytest.raises(PeftLabError, match="reads 768 features and returns 3072 features.*both must be equally wide"):
        count("bert-base", "parallel", targets=["intermediate.dense"])
    with pytest.raises(PeftLabError, match=r"self_attn.q_proj of llama-2-7b has no bias, so bitfit has nothing"):
        count("llama-2-7b", "bitfit", targets=["q_proj"])
    with pytest.raises(PeftLabError, match=r"layers.0.self_attn.o_proj of qwen2.5-0.5b has no bias"):
        count("qwen2.5-0.5b", "bitfit", targets="all-linear")
