"""Adapter folders whose keys, fields or files are in another form: read where it is certain, else the form is named."""

import copy
import json
import re
import warnings

import peft
import pytest
import torch
from nets import Net, assert_same, snapshot, tokens
from safetensors.torch import load_file, save_file
from tiny import llama
from torch import nn
from transformers import AutoModel, LlamaForSequenceClassification

import peftlab as pl
from peftlab.adapters.key_forms import plain, simpler_names

C, W = "adapter_config.json", "adapter_model.safetensors"
IDS = torch.arange(12).view(2, 6)
LORA = dict(r=3, alpha=5, init="random", target_modules=["q_proj", "v_proj", "embed_tokens"])


def build(kind=llama, seed=1, **settings):
    model = kind()
    torch.manual_seed(seed)
    return pl.attach(model, pl.LoRAConfig(**{**LORA, **settings})).eval()


def rewrite(folder, rename, more=()):
    """Renames the keys, and writes the file as another program would: without our sums."""
    tensors = {rename(key): value for key, value in load_file(folder / W).items()}
    save_file({**tensors, **dict(more)}, folder / W, {"format": "pt"})


def edit(folder, **fields):
    rewrite(folder, lambda key: key)
    config = json.loads((folder / C).read_text())
    (folder / C).write_text(json.dumps({**config, **fields}))


def caught(function, *arguments, **settings):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        result = function(*arguments, **settings)
    return result, [str(one.message) for one in found if one.category is UserWarning]


def named(adapter):
    def rename(key):
        key = re.sub(r"(lora_[AB])\.weight$", rf"\1.{adapter}.weight", key)
        return re.sub(r"(lora_embedding_[AB])$", rf"\1.{adapter}", key)

    return rename


P = "base_model.model."
FORMS = {
    "DDP": (lambda key: "module." + key, "'module.'"),
    "DDP inside peft": (lambda key: key.replace(P, P + "module."), "'module.'"),
    "DataParallel of DDP": (lambda key: "module.module." + key, "'module.'"),
    "compiled": (lambda key: "_orig_mod." + key, "_orig_mod"),
    "compiled before": (lambda key: key.replace(P, P + "_orig_mod."), "_orig_mod"),
    "compiled layers": (lambda key: re.sub(r"(layers\.\d+)", r"\1._orig_mod", key), "_orig_mod"),
    "FSDP": (lambda key: re.sub(r"(layers\.\d+)", r"\1._fsdp_wrapped_module", "_fsdp_wrapped_module." + key), "FSDP"),
    "checkpointing": (lambda key: re.sub(r"(layers\.\d+)", r"\1._checkpoint_wrapped_module", key), "checkpointing"),
    "compiled DDP": (lambda key: "_orig_mod.module." + key, "module"),
    "FSDP and checkpointing": (
        lambda key: re.sub(r"(layers\.\d+)", r"\1._fsdp_wrapped_module._checkpoint_wrapped_module", key), "FSDP"),
    "a name": (named("default"), "adapter names"),
    "another name": (named("my-adapter_2"), "adapter names"),
    "a name and DDP": (lambda key: "module." + named("default")(key), "adapter names"),
    "no prefix": (lambda key: key.removeprefix(P), "missing in front"),
    "no prefix, a name": (lambda key: named("french")(key.removeprefix(P)), "adapter names"),
    "half of the prefix": (lambda key: key.replace(P, "base_model."), "missing in front"),  # so 'model.' is
    "twice": (lambda key: P + key, "twice"),
    "three times": (lambda key: P + P + key, "twice"),
    "one model too many": (lambda key: key.replace(P, P + "model."), "added"),
    "one model too few": (lambda key: key.replace(P + "model.", P), "missing"),
    "loralib": (lambda key: re.sub(r"(lora_[AB])\.weight$", r"\1", key.removeprefix(P)), "without '.weight'"),
    "Lightning": (lambda key: "_forward_module." + key, "Lightning"),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_another_form_is_read_and_told(form, tmp_path):
    rename, words = FORMS[form]
    model = build()
    pl.save_adapter(model, tmp_path)
    rewrite(tmp_path, rename)
    loaded, said = caught(pl.load_adapter, llama(), tmp_path)
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    assert len(said) == 1 and words in said[0] and "pl.save_adapter" in said[0], said
    pl.save_adapter(loaded, tmp_path / "again")  # the advice: now Hugging Face peft reads it
    _, said = caught(pl.load_adapter, llama(), tmp_path / "again")
    assert said == []
    opened = peft.PeftModel.from_pretrained(llama(), tmp_path / "again").eval()
    assert torch.allclose(opened(IDS).logits, model(IDS).logits, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_a_form_that_does_not_fit_is_named_and_changes_nothing(form, tmp_path):
    rename, words = FORMS[form]
    pl.save_adapter(build(), tmp_path)
    rewrite(tmp_path, rename)
    tensors = load_file(tmp_path / W)
    gone = [key for key in tensors if "v_proj" in key][-1]
    save_file({key: value for key, value in tensors.items() if key != gone}, tmp_path / W)
    model = llama()
    before = snapshot(model)
    with pytest.raises(pl.PeftLabError) as error:
        pl.load_adapter(model, tmp_path)
    assert "another form" in str(error.value) and "trained on" not in str(error.value), error.value
    assert words in str(error.value), error.value
    assert_same(before, snapshot(model))


@pytest.mark.parametrize("form", ["DDP", "compiled before", "a name", "no prefix", "twice"])
def test_other_methods_and_trained_copies_in_another_form(form, tmp_path):
    rename = FORMS[form][0]
    for number, config in enumerate((
        pl.IA3Config(), pl.LoRAConfig(r=2, init="random", modules_to_save=["lm_head"], bias="all"),
        pl.SelectiveConfig(last_layers=1),
    )):  # fmt: skip
        model = pl.attach(llama(), config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        folder = tmp_path / str(number)
        caught(pl.save_adapter, model, folder)
        rewrite(folder, rename)
        loaded, _ = caught(pl.load_adapter, llama(), folder)
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)


def test_the_state_of_a_peft_model_with_its_base_and_its_head(tmp_path):
    """`torch.save(model.state_dict())` brought to safetensors: names, wrapped modules, the whole base."""
    base = LlamaForSequenceClassification(llama().config).eval()
    torch.manual_seed(2)
    config = peft.LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj"], task_type="SEQ_CLS")
    theirs = peft.get_peft_model(copy.deepcopy(base), config).eval()
    with torch.no_grad():
        theirs.base_model.model.score.modules_to_save["default"].weight.add_(1)
    theirs.save_pretrained(tmp_path)
    state = {key: value.clone() for key, value in theirs.state_dict().items()}
    save_file(state, tmp_path / W)
    with torch.no_grad():
        base.score.weight.add_(2)  # a head is drawn anew whenever its model is loaded
    loaded, said = caught(pl.load_adapter, base, tmp_path)
    assert len(said) == 1 and "adapter names" in said[0]
    ids = IDS[:1]
    assert torch.allclose(loaded(ids).logits, theirs(ids).logits, atol=1e-5)


def test_two_adapters_in_one_file_are_named(tmp_path):
    pl.save_adapter(build(), tmp_path)
    other = {named("english")(key): value + 1 for key, value in load_file(tmp_path / W).items()}
    rewrite(tmp_path, named("french"), other)
    with pytest.raises(pl.PeftLabError, match=r"names of 2 adapters \(french, english\)|\(english, french\)"):
        pl.load_adapter(llama(), tmp_path)


def test_two_values_for_one_key_are_refused_and_equal_ones_are_not(tmp_path):
    pl.save_adapter(build(), tmp_path / "a")
    tensors = load_file(tmp_path / "a" / W)
    more = {"_orig_mod." + key: value.clone() for key, value in tensors.items()}
    rewrite(tmp_path / "a", lambda key: "module." + key, more)
    caught(pl.load_adapter, llama(), tmp_path / "a")
    key = next(iter(more))
    rewrite(tmp_path / "a", lambda name: name, {key: more[key] + 1})
    with pytest.raises(pl.PeftLabError, match="two of them stand for"):
        pl.load_adapter(llama(), tmp_path / "a")


def test_keys_that_could_be_read_in_two_ways_are_refused(tmp_path):
    pl.save_adapter(build(), tmp_path)
    more = {key.replace(P, P + "model."): value + 1 for key, value in load_file(tmp_path / W).items()}
    rewrite(tmp_path, lambda key: "module." + key, more)
    with pytest.raises(pl.PeftLabError, match="not certain what they stand for"):
        pl.load_adapter(llama(), tmp_path)


class Wrapped(nn.Module):
    """A model that has a module called `module` itself."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.module, self.fc = nn.Sequential(nn.Linear(4, 4), nn.Tanh()), nn.Linear(4, 4)

    def forward(self, x):
        return self.fc(self.module(x))


def test_a_model_with_a_module_of_that_name(tmp_path):
    x = torch.randn(2, 4)
    model = build(Wrapped, target_modules=["module.0", "fc"])
    pl.save_adapter(model, tmp_path)
    loaded, said = caught(pl.load_adapter, Wrapped(), tmp_path)
    assert torch.equal(loaded(x), model(x)) and said == []
    rewrite(tmp_path, lambda key: "module." + key)
    loaded, said = caught(pl.load_adapter, Wrapped(), tmp_path)
    assert torch.equal(loaded(x), model(x)) and len(said) == 1


@pytest.mark.parametrize("paths", [["q_proj", "v_proj"], ["model.layers.0.self_attn.q_proj", "model.embed_tokens"]])
def test_an_adapter_moves_between_a_model_and_its_body(paths, tmp_path):
    """Trained on AutoModelForCausalLM and used on AutoModel, and the other way."""
    alphas = {re.escape("model.layers.0.self_attn.q_proj"): 50}
    whole = build(target_modules=paths, alpha_pattern=alphas)
    caught(pl.save_adapter, whole, tmp_path / "whole")
    rewrite(tmp_path / "whole", lambda key: key)
    llama().save_pretrained(tmp_path / "base")
    body, said = caught(pl.load_adapter, AutoModel.from_pretrained(tmp_path / "base"), tmp_path / "whole")
    assert any("'model.' added in front" in one for one in said)
    states = whole.model(IDS).last_hidden_state
    assert torch.allclose(body(IDS).last_hidden_state, states, atol=1e-5)  # with the alphas of its own
    pl.save_adapter(body, tmp_path / "body")
    rewrite(tmp_path / "body", lambda key: key)
    back, said = caught(pl.load_adapter, llama(), tmp_path / "body")
    assert any("'model.' missing in front" in one for one in said)
    assert torch.allclose(back(IDS).logits, whole(IDS).logits, atol=1e-5)


@pytest.mark.parametrize("front", ["module.", "_orig_mod.", "module._orig_mod."])
def test_names_in_the_config_have_wrappers_too(front, tmp_path):
    paths = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"]
    ranks = {"q_proj": 5}
    model = build(target_modules=paths, rank_pattern=ranks, alpha_pattern={re.escape(paths[0]): 40})
    caught(pl.save_adapter, model, tmp_path)
    rewrite(tmp_path, lambda key: key.replace(P, P + front))
    edit(tmp_path, target_modules=[front + path for path in paths],
         alpha_pattern={re.escape(front + paths[0]): 40})  # fmt: skip
    loaded, _ = caught(pl.load_adapter, llama(), tmp_path)
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize(("key", "library"), [
    ("lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight", "kohya-ss"),
    ("lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_up.weight", "kohya-ss"),
    ("model.layers.0.self_attn.q_proj.lora_down.weight", "kohya-ss"),
    ("unet.down_blocks.0.attentions.0.attn1.processor.to_q_lora.down.weight", "diffusers"),
    ("text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_linear_layer.up.weight", "diffusers"),
    ("transformer.blocks.0.to_q.lora.up.weight", "diffusers"),
    ("model.layers.0.self_attn.q_proj.lora_a", "mlx-lm"),
    ("layers.0.attn.q_proj.lora_b.weight", "torchtune"),
    ("blk.0.attn_q.weight.lora_a", "llama.cpp"),
    ("prompt_encoder.default.embedding.weight", "own network"),
])  # fmt: skip
def test_forms_that_have_to_be_converted_are_named(key, library, tmp_path):
    pl.save_adapter(build(), tmp_path)
    save_file({key: torch.zeros(3, 4)}, tmp_path / W)
    with pytest.raises(pl.PeftLabError, match=library) as error:
        pl.load_adapter(llama(), tmp_path)
    assert "trained on" not in str(error.value) and key in str(error.value)


def test_a_component_of_a_pipeline(tmp_path):
    model = build()
    pl.save_adapter(model, tmp_path)
    rewrite(tmp_path, lambda key: key.replace(P, "text_encoder."))
    loaded, said = caught(pl.load_adapter, llama(), tmp_path)
    assert torch.equal(loaded(IDS).logits, model(IDS).logits) and "'text_encoder.' added" in said[0]


def test_a_file_of_diffusers_alone(tmp_path):
    save_file({"unet.to_q.lora_A.weight": torch.zeros(1, 1)}, tmp_path / "pytorch_lora_weights.safetensors")
    with pytest.raises(pl.PeftLabError, match="the form of diffusers"):
        pl.load_adapter(llama(), tmp_path)


def test_keys_without_what_was_added():
    assert plain("module.base_model.model.head.lora_A.default.weight")[0] == "head.lora_A.weight"
    assert plain("base_model.model.head.lora_embedding_A.x") [0] == "head.lora_embedding_A"
    assert plain("base_model.model.score.modules_to_save.default.out.weight")[0] == "score.out.weight"
    assert plain("base_model.model.head.ia3_l.default")[0] == "head.ia3_l"
    assert plain("base_model.model.head.lora_B.bias") == ("head.lora_B.bias", [])
    assert list(simpler_names("_orig_mod.model.q")) == ["_orig_mod.model.q", "model.q", "q"]
    assert list(simpler_names(r"module\.model\.q\.v")) == [r"module\.model\.q\.v", r"model\.q\.v", r"q\.v"]
    assert list(simpler_names("mymodule.q")) == ["mymodule.q"]


# --------------------------------------------------------------------------------------------------- unknown fields


@pytest.mark.parametrize(("fields", "words"), [
    ({"lora_alhpa": 64}, ["'lora_alhpa'", "Did you mean 'lora_alpha'"]),
    ({"use_rslroa": True, "colour": "red"}, ["'use_rslroa'", "Did you mean 'use_rslora'", "'colour'"]),
    ({"new_option": False}, ["'new_option'"]),
    ({"rank_patern": {"q_proj": 4}}, ["Did you mean 'rank_pattern'"]),
])  # fmt: skip
def test_unknown_fields_are_named_in_one_warning(fields, words, tmp_path):
    model = build()
    pl.save_adapter(model, tmp_path / "a")
    edit(tmp_path / "a", **fields)
    for function, arguments in (
        (pl.load_adapter, (llama(), tmp_path / "a")), (pl.export_adapter, (tmp_path / "a", tmp_path / "b")),
    ):  # fmt: skip
        _, said = caught(function, *arguments)
        assert len(said) == 1 and all(word in said[0] for word in words), said
    assert torch.equal(pl.load_adapter(llama(), tmp_path / "a")(IDS).logits, model(IDS).logits)


CONFIGS = {
    "lora": pl.LoRAConfig(), "ia3": pl.IA3Config(), "prompt": pl.PromptTuningConfig(num_virtual_tokens=3),
    "deep": pl.PromptTuningConfig(num_virtual_tokens=3, deep=True), "p-tuning": pl.PTuningConfig(num_virtual_tokens=3),
    "prefix": pl.PrefixTuningConfig(num_virtual_tokens=3), "bottleneck": pl.AdapterConfig(placement="houlsby", width=2),
    "selective": pl.SelectiveConfig(last_layers=1),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_every_kind_of_folder_is_looked_at_and_ours_have_no_unknown_field(name, tmp_path):
    pl.save_adapter(pl.attach(llama(), CONFIGS[name]), tmp_path)
    _, said = caught(pl.load_adapter, llama(), tmp_path)
    assert said == []
    edit(tmp_path, something_else=1, nothing_at_all=None)
    _, said = caught(pl.load_adapter, llama(), tmp_path)
    assert len(said) == 1 and "'something_else'" in said[0] and "nothing_at_all" not in said[0]


def test_bitfit_is_looked_at_too(tmp_path):
    pl.save_adapter(pl.attach(Net(), pl.BitFitConfig()), tmp_path)
    edit(tmp_path, something_else=1)
    _, said = caught(pl.load_adapter, Net(), tmp_path)
    assert len(said) == 1 and "'something_else'" in said[0]


@pytest.mark.parametrize("config", [
    peft.LoraConfig(target_modules=["q_proj"]), peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[]),
    peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    peft.PromptEncoderConfig(num_virtual_tokens=3, task_type="CAUSAL_LM", encoder_hidden_size=8),
    peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
])  # fmt: skip
def test_what_peft_writes_is_known(config, tmp_path):
    peft.get_peft_model(llama(), config).save_pretrained(tmp_path)
    _, said = caught(pl.load_adapter, llama(), tmp_path)
    assert said == []


# ---------------------------------------------------------------------------------------------------------- pickles


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt"])
@pytest.mark.parametrize("kind", ["plain", "shared", "not contiguous"])
def test_the_advice_for_a_pickle_works_word_by_word(name, kind, tmp_path):
    folder = tmp_path / "it's a folder"
    model = build()
    pl.save_adapter(model, folder)
    tensors = load_file(folder / W)
    (folder / W).unlink()
    if kind == "shared":  # as torch.save keeps views of one storage, which safetensors refuses
        flat = torch.cat([tensor.flatten() for tensor in tensors.values()])
        pieces = flat.split([tensor.numel() for tensor in tensors.values()])
        tensors = {key: piece.view(tensors[key].shape) for key, piece in zip(tensors, pieces, strict=True)}
    elif kind == "not contiguous":
        tensors = {key: tensor.T.contiguous().T for key, tensor in tensors.items()}
    torch.save(tensors, folder / name)
    with pytest.raises(pl.PeftLabError, match="a pickle, which can run code") as error:
        pl.load_adapter(llama(), folder)
    code = str(error.value)[str(error.value).index("import torch") :]
    assert "weights_only=True" in code
    exec(compile(code, "advice", "exec"), {})
    assert torch.equal(pl.load_adapter(llama(), folder)(IDS).logits, model(IDS).logits)


class Evil:
    def __reduce__(self):
        return exec, ("raise SystemExit('the code of the pickle ran')",)


def test_the_advice_runs_nothing_of_a_pickle(tmp_path):
    pl.save_adapter(build(), tmp_path)
    (tmp_path / W).unlink()
    torch.save({"x": Evil()}, tmp_path / "adapter_model.bin")
    with pytest.raises(pl.PeftLabError) as error:
        pl.load_adapter(llama(), tmp_path)
    code = str(error.value)[str(error.value).index("import torch") :]
    with pytest.raises(Exception, match="[Ww]eights.only"):
        exec(compile(code, "advice", "exec"), {})
    assert not (tmp_path / W).exists()


def test_a_pickle_beside_a_safetensors_file_is_passed_over(tmp_path):
    pl.save_adapter(build(Net, target_modules=["head"]), tmp_path)
    torch.save({}, tmp_path / "adapter_model.bin")
    assert pl.load_adapter(Net(), tmp_path)(tokens()) is not None
