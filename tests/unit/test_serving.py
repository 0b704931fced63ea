"""Adapters for llama.cpp, vLLM and SGLang: what they would misread is told, and the portable form computes the same."""

import json
import math
import warnings

import peft
import pytest
import torch
from nets import Net, tokens
from safetensors.torch import load_file
from tiny import llama
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForSequenceClassification

import peftlab as pl
from peftlab.commands import cli

C, W = "adapter_config.json", "adapter_model.safetensors"
IDS = torch.arange(12).view(2, 6)
NET = ["blocks.0.up", "blocks.1.up", "head", "embed"]


def attached(model, seed=1, **settings):
    torch.manual_seed(seed)
    dtype = settings.pop("adapter_dtype", None)
    return pl.attach(model, pl.LoRAConfig(**{"init": "random", **settings}), adapter_dtype=dtype)


def quietly(function, *arguments, **settings):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*arguments, **settings)


def told(function, *arguments, **settings):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        function(*arguments, **settings)
    return [str(one.message) for one in caught if "Serving programs" in str(one.message)]


def parts(folder):
    return json.loads((folder / C).read_text()), load_file(folder / W)


def scaled_by(program, folder):
    """The updates s B A by module, as a serving program scales them: see the table in `adapters/serving.py`."""
    fields, tensors = parts(folder)
    updates = {}
    for key, a in tensors.items():
        for one, other in ((".lora_A.weight", ".lora_B.weight"), (".lora_embedding_A", ".lora_embedding_B")):
            if key.endswith(one):
                rank = a.shape[0] if program == "llama.cpp" else fields["r"]
                scale = fields["lora_alpha"] / rank
                if program == "vLLM" and fields["use_rslora"]:
                    scale = fields["lora_alpha"] / math.sqrt(rank)
                assert program != "SGLang" or a.shape[0] == rank  # its buffers have no other rank
                path = key.removesuffix(one).removeprefix("base_model.model.")
                updates[path] = scale * (tensors[key.removesuffix(one) + other].double() @ a.double())
    return updates


CASES = {
    "plain": {"r": 4, "alpha": 8},
    "alpha is not r": {"r": 3, "alpha": 5},
    "a fraction": {"r": 3, "alpha": 0.7},
    "rsLoRA": {"r": 3, "alpha": 5, "use_rslora": True},
    "rsLoRA of a square": {"r": 4, "alpha": 8, "use_rslora": True},
    "alphas": {"r": 3, "alpha": 5, "alpha_pattern": {"blocks.*.up": 7, "head": 2}},
    "ranks": {"r": 3, "alpha": 5, "rank_pattern": {"blocks.1.up": 5, "embed": 1}},
    "a lower rank alone": {"r": 8, "alpha": 4, "rank_pattern": {".*": 2}},
    "all three": {"r": 2, "alpha": 3, "use_rslora": True, "rank_pattern": {"up": 5}, "alpha_pattern": {"embed": 11}},
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", CASES)
def test_the_portable_form_computes_the_same_everywhere(case, dtype, tmp_path):
    model = attached(Net(dtype=dtype), target_modules=NET, **CASES[case])
    expected, base = model(tokens()), Net(dtype=dtype)(tokens())
    wanted = {
        path: part.parts_of("default")["lora"].delta().detach().double()
        for path, part in ((p, model.get_submodule(p).peftlab) for p in NET)
    }
    before = {key: value.clone() for key, value in model.state_dict().items()}
    pl.save_adapter(model, tmp_path / "plain")
    pl.save_adapter(model, tmp_path / "portable", portable=True)
    pl.export_adapter(tmp_path / "plain", tmp_path / "exported")
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    assert (expected - base).norm() > 0.1 * base.norm()
    for folder in (tmp_path / "portable", tmp_path / "exported"):
        ours = pl.load_adapter(Net(dtype=dtype), folder)(tokens())
        theirs = peft.PeftModel.from_pretrained(Net(dtype=dtype), folder)(tokens())
        for found in (ours, theirs):
            assert (found - expected).norm() <= tolerance * expected.norm()
        for program in ("llama.cpp", "vLLM", "SGLang"):
            updates = scaled_by(program, folder)
            assert updates.keys() == set(NET)
            for path, update in updates.items():
                update = update.T if path == "embed" else update
                assert (update - wanted[path]).norm() <= tolerance * wanted[path].norm(), (program, path)
        fields, _ = parts(folder)
        assert not fields["use_rslora"] and fields["rank_pattern"] == fields["alpha_pattern"] == {}
        assert isinstance(fields["target_modules"], list) and isinstance(fields["lora_alpha"], (int, float))


@pytest.mark.parametrize("settings", [
    {"r": 4, "alpha": 8, "use_rslora": True},
    {"r": 16, "alpha": 2, "use_rslora": True},
    {"r": 4, "alpha": 8, "alpha_pattern": {"head": 2, "embed": 1}},
])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_powers_of_two_are_folded_without_a_change_of_bits(settings, dtype, tmp_path):
    model = attached(Net(dtype=dtype), target_modules=NET, adapter_dtype=dtype, **settings)
    pl.save_adapter(model, tmp_path, portable=True)
    loaded = pl.load_adapter(Net(dtype=dtype), tmp_path, adapter_dtype=dtype)
    assert torch.equal(loaded(tokens()), model(tokens()))
    assert {tensor.dtype for tensor in load_file(tmp_path / W).values()} == {dtype}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_another_scaling_of_16_bits_is_folded_into_32(dtype, tmp_path):
    """In 16 bits s B would lose up to 0.4% of each update."""
    settings = {"r": 3, "alpha": 5, "use_rslora": True, "target_modules": NET}
    model = attached(Net(dtype=dtype), adapter_dtype=dtype, **settings)
    pl.save_adapter(model, tmp_path / "plain")
    pl.save_adapter(model, tmp_path / "portable", portable=True)
    assert {tensor.dtype for tensor in load_file(tmp_path / "portable" / W).values()} == {torch.float32}
    exact, found = (scaled_by("vLLM", tmp_path / name) for name in ("plain", "portable"))
    for path in NET:
        assert (exact[path] - found[path]).norm() < 1e-6 * exact[path].norm()


def test_a_plain_lora_stays_as_it_is_and_is_not_warned_of(tmp_path):
    model = attached(llama(), r=3, alpha=5, target_modules=["q_proj", "o_proj"])
    assert told(pl.save_adapter, model, tmp_path / "plain") == []
    assert told(pl.save_adapter, model, tmp_path / "portable", portable=True) == []
    (one, tensors), (other, same) = parts(tmp_path / "plain"), parts(tmp_path / "portable")
    assert all(torch.equal(tensors[key], same[key]) for key in tensors | same)
    assert {name for name in one | other if one.get(name) != other.get(name)} <= {"target_modules"}
    assert sorted(one["target_modules"]) == other["target_modules"]
    assert "vLLM and SGLang read this folder as it is" in (tmp_path / "plain" / "README.md").read_text()


@pytest.mark.parametrize(("targets", "more", "names"), [
    (r".*layers\.\d+\.self_attn\.(q|v)_proj", {}, ["q_proj", "v_proj"]),
    (r".*layers\.1\.self_attn\.q_proj", {}, ["model.layers.1.self_attn.q_proj"]),
    ("all-linear", {}, ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]),
    (["q_proj", "v_proj"], {"exclude_modules": ["v_proj"]}, ["q_proj"]),
    (["q_proj"], {"layers_to_transform": [0]}, ["model.layers.0.self_attn.q_proj"]),
    (["embed_tokens"], {}, ["embed_tokens"]),
    (None, {}, ["q_proj", "v_proj"]),
])  # fmt: skip
def test_targets_are_a_list_that_means_the_same_modules(targets, more, names, tmp_path):
    model = attached(llama(), r=3, alpha=5, use_rslora=True, target_modules=targets, **more)
    quietly(pl.save_adapter, model, tmp_path / "plain")
    pl.save_adapter(model, tmp_path / "portable", portable=True)
    assert parts(tmp_path / "portable")[0]["target_modules"] == names
    pl.export_adapter(tmp_path / "plain", tmp_path / "exported")
    for folder in (tmp_path / "portable", tmp_path / "exported"):
        fields, tensors = parts(folder)
        assert isinstance(fields["target_modules"], list) and not any("base_layer" in key for key in tensors)
        assert torch.allclose(pl.load_adapter(llama(), folder)(IDS).logits, model(IDS).logits, atol=1e-5)
        theirs = peft.PeftModel.from_pretrained(llama(), folder)
        assert torch.allclose(theirs.eval()(IDS).logits, model(IDS).logits, atol=1e-5)


MISREAD = {
    "use_rslora": ({"use_rslora": True}, ["llama.cpp", "SGLang", "use_rslora", "portable=True"]),
    "alpha_pattern": ({"alpha_pattern": {"q_proj": 3}}, ["vLLM and SGLang", "alpha_pattern", "portable=True"]),
    "rank_pattern": ({"rank_pattern": {"q_proj": 3}}, ["vLLM", "SGLang", "rank_pattern", "portable=True"]),
    "an expression": ({"target_modules": r".*\.q_proj"}, ["SGLang refuses", "target_modules", "portable=True"]),
    "a trained copy": ({"modules_to_save": ["lm_head"]}, ["vLLM", "llama.cpp", "modules_to_save", "pl.merge"]),
    "a bias of B": ({"lora_bias": True}, ["vLLM", "llama.cpp", "lora_bias", "train without lora_bias"]),
    "two": ({"use_rslora": True, "modules_to_save": ["lm_head"]}, ["use_rslora", "modules_to_save", "pl.merge"]),
    "biases": ({"bias": "lora_only"}, ["vLLM", "llama.cpp", "trained biases", "pl.merge"]),
}  # fmt: skip


def base():
    """A Llama whose attention has biases."""
    return llama(attention_bias=True)


@pytest.mark.parametrize("case", MISREAD)
def test_what_would_be_misread_or_refused_is_told_once_and_in_the_card(case, tmp_path):
    settings, words = MISREAD[case]
    model = attached(base(), r=4, **settings)
    said = told(pl.save_adapter, model, tmp_path)
    assert len(said) == 1 and all(word in said[0] for word in words), said
    assert ("portable=True" in said[0]) == ("portable=True" in words)  # it is no advice where it would be refused
    card = (tmp_path / "README.md").read_text()
    assert "## Serving" in card and all(word in card for word in words)
    assert ("portable=True" in card) == ("portable=True" in words)


@pytest.mark.parametrize("settings", [
    {"alpha_pattern": {"q_proj": 16}},  # the alpha that all have
    {"rank_pattern": {"q_proj": 4}},
    {"r": 1, "use_rslora": True},
    {"bias": "all", "model": llama},  # this model has none
    {"target_modules": "all-linear"},
])  # fmt: skip
def test_what_changes_nothing_is_not_told(settings, tmp_path):
    settings = {"r": 4, "alpha": 16, **settings}
    model = attached(settings.pop("model", base)(), **settings)
    assert told(pl.save_adapter, model, tmp_path) == []
    pl.save_adapter(model, tmp_path, portable=True)
    assert parts(tmp_path)[0]["bias"] == "none"


def test_models_that_these_programs_do_not_serve_are_not_warned_of(tmp_path):
    model = LlamaForSequenceClassification(llama().config)
    model = attached(model, r=4, use_rslora=True, task_type="SEQ_CLS")
    assert told(pl.save_adapter, model, tmp_path / "a") == []
    assert "## Serving" not in (tmp_path / "a" / "README.md").read_text()
    assert told(pl.save_adapter, pl.attach(llama(), pl.IA3Config()), tmp_path / "b") == []
    assert "serve LoRA only, not IA3" in (tmp_path / "b" / "README.md").read_text()


@pytest.mark.parametrize("settings", [
    {"modules_to_save": ["lm_head"]}, {"modules_to_save": ["lm_head"], "bias": "all"}, {"bias": "lora_only"},
    {"lora_bias": True}, {"bias": "all", "use_rslora": True},
])  # fmt: skip
def test_what_has_no_portable_form_is_refused_and_merging_works_instead(settings, tmp_path):
    model = attached(base(), r=4, target_modules=["q_proj", "v_proj"], **settings).double()
    expected = model(IDS).logits
    quietly(pl.save_adapter, model, tmp_path / "plain")
    for write in (
        lambda: pl.save_adapter(model, tmp_path / "out", portable=True),
        lambda: pl.export_adapter(tmp_path / "plain", tmp_path / "out"),
    ):
        with pytest.raises(pl.PeftLabError, match=r"no portable form: .*vLLM.*pl\.merge\(model, unload=True\)"):
            write()
        assert not (tmp_path / "out").exists()
    pl.merge(model, unload=True)  # the advice, word by word
    model.save_pretrained(tmp_path / "merged")
    merged = type(model).from_pretrained(tmp_path / "merged", dtype=torch.float64)
    assert torch.allclose(merged(IDS).logits, expected, atol=1e-6)


@pytest.mark.parametrize("config", [
    pl.IA3Config(), pl.PromptTuningConfig(num_virtual_tokens=4), pl.AdapterConfig(placement="houlsby", width=2),
    pl.SelectiveConfig(last_layers=1),
])  # fmt: skip
def test_other_methods_have_no_portable_form(config, tmp_path):
    model = pl.attach(llama(), config)
    pl.save_adapter(model, tmp_path / "plain")
    with pytest.raises(pl.PeftLabError, match=f"serve LoRA only, and this adapter is {config.peft_type}"):
        pl.save_adapter(model, tmp_path / "out", portable=True)
    with pytest.raises(pl.PeftLabError, match=f"serve LoRA only, and this adapter is {config.peft_type}"):
        pl.export_adapter(tmp_path / "plain", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_conv1d_layers_which_llama_cpp_would_transpose(tmp_path):
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=32, n_positions=32))
    model = attached(model, r=2)
    said = told(pl.save_adapter, model, tmp_path)
    assert len(said) == 1 and "transposes" in said[0] and "pl.merge" in said[0]
    with pytest.raises(pl.PeftLabError, match="Conv1D"):
        pl.save_adapter(model, tmp_path, portable=True)


def test_a_head_that_is_tied_is_told_even_in_the_portable_form(tmp_path):
    model = attached(llama(tie_word_embeddings=True), r=2, use_rslora=True, target_modules=["lm_head", "q_proj"])
    for portable in (False, True):
        said = told(pl.save_adapter, model, tmp_path, portable=portable)
        assert len(said) == 1 and "llama.cpp's converter refuses an update of lm_head" in said[0], said
    found = pl.load_adapter(llama(tie_word_embeddings=True), tmp_path)
    assert torch.allclose(found(IDS).logits, model(IDS).logits, atol=1e-5)


def test_a_folder_of_peft_is_exported_with_what_its_card_does_not_say(tmp_path):
    torch.manual_seed(0)
    config = peft.LoraConfig(r=3, lora_alpha=7, use_rslora=True, alpha_pattern={"v_proj": 2}, init_lora_weights=False,
                             target_modules=["q_proj", "v_proj"])  # fmt: skip
    theirs = peft.get_peft_model(llama(), config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    pl.export_adapter(tmp_path / "theirs", tmp_path / "out")
    expected = theirs(IDS).logits
    opened = peft.PeftModel.from_pretrained(llama(), tmp_path / "out").eval()
    assert torch.allclose(opened(IDS).logits, expected, atol=1e-5)
    assert torch.allclose(pl.load_adapter(llama(), tmp_path / "out")(IDS).logits, expected, atol=1e-5)
    assert parts(tmp_path / "out")[0]["target_modules"] == ["q_proj", "v_proj"]


def test_ranks_beyond_the_default_of_vllm_are_named_in_the_card(tmp_path):
    pl.save_adapter(attached(llama(), r=24), tmp_path)
    assert "--max-lora-rank 24" in (tmp_path / "README.md").read_text()


def test_the_command_exports_and_keeps_what_the_card_tells_of_the_training(tmp_path, capsys):
    model = attached(llama(), r=3, alpha=5, use_rslora=True)
    quietly(pl.save_adapter, model, tmp_path / "a")
    card = tmp_path / "a" / "README.md"
    card.write_text(card.read_text().replace("- Data: not recorded", "- Data: my reviews\n- steps: 7"))
    command = ["export", str(tmp_path / "a"), str(tmp_path / "b")]
    assert cli.main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["folder"] == str(tmp_path / "b")
    assert "- Data: my reviews\n- steps: 7\n\n## How to load it" in (tmp_path / "b" / "README.md").read_text()
    assert torch.allclose(pl.load_adapter(llama(), tmp_path / "b")(IDS).logits, model(IDS).logits, atol=1e-5)
    assert cli.main(["export", str(tmp_path / "a"), str(tmp_path / "a")]) == 2
    assert "holds the adapter itself" in capsys.readouterr().err
    assert cli.main(["export", str(tmp_path / "none"), str(tmp_path / "c")]) == 2
    with pytest.raises(pl.PeftLabError, match="trained on another base"):  # the sample of the base went along
        pl.load_adapter(llama(seed=5), tmp_path / "b")


def test_export_does_not_overwrite_what_is_no_adapter(tmp_path):
    pl.save_adapter(attached(llama(), r=2), tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / C).write_text("{}")
    with pytest.raises(pl.PeftLabError, match="something else than an adapter"):
        pl.export_adapter(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b" / C).read_text() == "{}"
