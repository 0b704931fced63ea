"""New tokens: rows that train alone, and vocabularies that grow with them."""

import copy
import json

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, LlamaModel, PhiConfig, PhiForCausalLM

import peftlab as pl

WORDS = {"<refund>": ["cat", "dog runs"], "<order>": None, "<desk>": "red"}


def pair(tied=True, **settings):
    """A model with 18 rows and the tokenizer of 18 tokens that it goes with."""
    return tiny.llama(vocab_size=18, tie_word_embeddings=tied, **settings).eval(), tiny.tokenizer()


def snapshot(model, tokenizer):
    state = {name: value.clone() for name, value in model.state_dict().items()}
    return state, model.config.vocab_size, len(tokenizer), dict(vars(model)).keys()


def unchanged(model, tokenizer, before):
    state, size, length, names = before
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert (model.config.vocab_size, len(tokenizer), dict(vars(model)).keys()) == (size, length, names)


@pytest.mark.parametrize("tied", [True, False])
def test_new_rows_start_from_their_words_and_are_marked(tied):
    model, tokenizer = pair(tied)
    model.requires_grad_(False)
    ids = pl.add_tokens(model, tokenizer, WORDS)
    assert ids == [18, 19, 20] and len(tokenizer) == 21 and model.config.vocab_size == 21
    known = tokenizer.get_vocab()
    three = [known["cat"], known["dog"], known["runs"]]
    for layer in (model.model.embed_tokens, model.lm_head):
        weight = layer.weight.detach()
        assert torch.allclose(weight[18], weight[three].mean(0), atol=1e-7)
        assert torch.allclose(weight[19], weight[:18].mean(0), atol=1e-7)
        assert torch.equal(weight[20], weight[known["red"]])
        assert not layer.weight.requires_grad
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    assert tokenizer("the <refund> <desk>")["input_ids"] == [known["the"], 18, 20]
    pl.attach(model, pl.LoRAConfig(r=2))
    config = pl.attached(model)["default"]
    named = {"model.embed_tokens": (18, 19, 20)} | ({} if tied else {"lm_head": (18, 19, 20)})
    assert config.trainable_tokens == named
    trained = [name for name, value in model.named_parameters() if value.requires_grad and "lora" not in name]
    assert len(trained) == (1 if tied else 2) and all(name.endswith("rows.rows") for name in trained)


def test_spare_rows_are_taken_first_and_random_numbers_stay():
    model, tokenizer = tiny.llama(tie_word_embeddings=False), tiny.tokenizer()  # 32 rows, 18 tokens
    before = torch.random.get_rng_state()
    assert pl.add_tokens(model, tokenizer, ["<a>"]) == [18]
    assert pl.add_tokens(model, tokenizer, ["<b>", "<c>"], special=True) == [19, 20]
    assert len(model.lm_head.weight) == 32 and torch.equal(torch.random.get_rng_state(), before)
    assert tokenizer.decode([18, 19], skip_special_tokens=True) == "<a>"
    pl.attach(model, pl.LoRAConfig(r=2))
    assert pl.attached(model)["default"].trainable_tokens["lm_head"] == (18, 19, 20)


WRONG = {
    "a token that is there": (["<new>", "cat"], r"'cat' already, with the id 10.*trainable_tokens=\[10\]"),
    "a token twice": (["<a>", "<a>"], "'<a>' twice"),
    "one text": ("<a>", "give a list"),
    "nothing": ([], "tokens is empty"),
    "a number": ([5], "tokens holds 5"),
    "white space": ([" "], "give texts"),
    "words that are none": ({"<a>": 5}, "words for '<a>' are 5"),
    "a word that is none": ({"<a>": ["cat", None]}, "words for '<a>' hold None"),
    "an unknown word": ({"<a>": ["cat", "zebra"]}, "'zebra', which the tokenizer does not know"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_tokens_are_refused_and_nothing_changes(case):
    tokens, message = WRONG[case]
    model, tokenizer = pair()
    before = snapshot(model, tokenizer)
    with pytest.raises(pl.PeftLabError, match=message):
        pl.add_tokens(model, tokenizer, tokens)
    unchanged(model, tokenizer, before)


def test_a_model_or_tokenizer_that_does_not_fit_is_refused_and_nothing_changes():
    model, tokenizer = pair()
    small = tiny.llama(vocab_size=12)
    large = tiny.llama(vocab_size=3000)
    for other in (small, large):
        before = snapshot(other, tokenizer)
        with pytest.raises(pl.PeftLabError, match="tokenizer does not fit the model: it has 18 tokens.*rows"):
            pl.add_tokens(other, tokenizer, ["<a>"])
        unchanged(other, tokenizer, before)
    with pytest.raises(pl.PeftLabError, match="tokenizer is None"):
        pl.add_tokens(model, None, ["<a>"])
    with pytest.raises(pl.PeftLabError, match="has no word embeddings"):
        pl.add_tokens(torch.nn.Linear(4, 4), tokenizer, ["<a>"])
    tokenizer.add_tokens(["<a>"])
    with pytest.raises(pl.PeftLabError, match=r"'<a>' already, with the id 18.*resize_token_embeddings\(19\)"):
        pl.add_tokens(model, tokenizer, ["<a>"])
    pl.attach(model, pl.LoRAConfig(r=2))
    with pytest.raises(pl.PeftLabError, match=r"Adapters are attached \(default\)"):
        pl.add_tokens(model, tokenizer, ["<b>"])


def test_a_model_that_cannot_be_lengthened_keeps_its_tokenizer(monkeypatch):
    model, tokenizer = pair()
    before = snapshot(model, tokenizer)

    def fail(*_, **__):
        raise NotImplementedError("not this one")

    with monkeypatch.context() as patched:
        patched.setattr(type(model), "resize_token_embeddings", fail)
        with pytest.raises(pl.PeftLabError, match="cannot be given 19 tokens: not this one"):
            pl.add_tokens(model, tokenizer, ["<a>"])
    unchanged(model, tokenizer, before)


def test_what_trains_them_otherwise_or_not_at_all():
    model, tokenizer = pair(tied=False)
    pl.add_tokens(model, tokenizer, ["<a>"])
    with pytest.warns(UserWarning, match="do not train with IA3Config"):
        pl.attach(model, pl.IA3Config())
    pl.detach(model)
    for settings, expected in (
        ({"modules_to_save": ["embed_tokens"]}, {"lm_head": (18,)}),
        ({"target_modules": ["embed_tokens", "q_proj"]}, {"lm_head": (18,)}),
        ({"target_modules": "all-linear"}, {"model.embed_tokens": (18,), "lm_head": (18,)}),
        ({"trainable_tokens": [3]}, (3,)),
    ):
        pl.attach(model, pl.LoRAConfig(r=2, **settings))
        assert pl.attached(model)["default"].trainable_tokens == expected
        pl.detach(model)


@pytest.mark.parametrize("tied", [True, False])
def test_trained_saved_and_loaded_into_a_fresh_model(tied, tmp_path):
    model, tokenizer = pair(tied)
    fresh, plain = copy.deepcopy(model), copy.deepcopy(model)
    before = snapshot(fresh, tokenizer)
    pl.add_tokens(model, tokenizer, WORDS)
    pl.attach(model, pl.LoRAConfig(r=2))
    data = [pl.encode_text(tokenizer, text) for text in ("the <refund> runs", "a <order> <desk>")]
    start = {name: value.clone() for name, value in model.named_parameters() if name.endswith("rows.rows")}
    pl.train(model, data, tokenizer=tokenizer, steps=4, learning_rate=1e-2, progress=False)
    assert all((model.get_parameter(name) != value).any(1).all() for name, value in start.items())
    pl.save_adapter(model, tmp_path)
    tokenizer.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    rows = [value.shape for key, value in tensors.items() if "lora" not in key]
    assert rows == [(3, 16)] * (1 if tied else 2)

    ids = torch.tensor([data[0]["input_ids"]])
    pl.load_adapter(fresh, tmp_path)
    expected = model.eval()(ids).logits
    assert torch.equal(fresh(ids).logits, expected) and fresh.config.vocab_size == 21
    assert (fresh.lm_head.weight is fresh.model.embed_tokens.weight) is tied
    pl.detach(fresh)
    unchanged(fresh, pair()[1], before)

    pl.load_adapter(fresh, tmp_path)
    pl.merge(fresh, unload=True)
    assert fresh.config.vocab_size == 21 and not pl.attached(fresh)
    assert torch.allclose(fresh(ids).logits, expected, atol=1e-5)
    fresh.save_pretrained(tmp_path / "merged")

    pl.add_tokens(plain, tiny.tokenizer(), WORDS)  # lengthened by hand, it fits as well
    pl.load_adapter(plain, tmp_path)
    assert torch.equal(plain(ids).logits, expected)
    pl.detach(plain)
    assert plain.config.vocab_size == 21


def test_a_failed_load_leaves_the_vocabulary(tmp_path):
    model, tokenizer = pair()
    fresh = copy.deepcopy(model)
    before = snapshot(fresh, pair()[1])
    pl.add_tokens(model, tokenizer, ["<a>"])
    pl.save_adapter(pl.attach(model, pl.LoRAConfig(r=2)), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors.pop(next(key for key in tensors if "lora_A" in key))
    save_file(tensors, file)
    with pytest.raises(pl.PeftLabError, match="lacks 1 of"):
        pl.load_adapter(fresh, tmp_path)
    unchanged(fresh, pair()[1], before)


def test_what_a_folder_cannot_lengthen_it_says(tmp_path):
    """A vocabulary that was lengthened past the trained rows, or without training them."""
    model, _ = pair()
    fresh = copy.deepcopy(model)
    model.resize_token_embeddings(20, mean_resizing=False)
    for name, settings in (("none", {}), ("one", {"trainable_tokens": [18]}), ("last", {"trainable_tokens": [19]})):
        pl.attach(model, pl.LoRAConfig(r=2, **settings))
        pl.save_adapter(model, tmp_path / name)
        pl.detach(model)
        with pytest.raises(pl.PeftLabError, match=r"vocabulary of 20 tokens.*has 18.*resize_token_embeddings\(20\)"):
            pl.load_adapter(fresh, tmp_path / name)
        assert not pl.attached(fresh) and fresh.config.vocab_size == 18
    fresh.resize_token_embeddings(20, mean_resizing=False)
    pl.load_adapter(fresh, tmp_path / "last")


def test_two_adapters_with_vocabularies_of_their_own(tmp_path):
    for name, tokens in (("short", ["<a>"]), ("long", ["<a>", "<b>"])):
        model, tokenizer = pair()
        pl.add_tokens(model, tokenizer, tokens)
        pl.save_adapter(pl.attach(model, pl.LoRAConfig(r=2)), tmp_path / name)
    model, _ = pair()
    pl.load_adapter(model, tmp_path / "short", name="one")
    with pytest.raises(pl.PeftLabError, match=r"Another adapter stands on model.embed_tokens.*longest vocabulary"):
        pl.load_adapter(model, tmp_path / "long", name="two")
    pl.detach(model, "one")
    pl.load_adapter(model, tmp_path / "long", name="two")
    pl.load_adapter(model, tmp_path / "short", name="one")
    pl.detach(model, "two")
    assert model.config.vocab_size == 20  # the other one still stands there
    pl.detach(model, "one")
    assert model.config.vocab_size == 18


def test_switching_mixing_and_merging():
    model, _ = pair()
    model = model.double()
    ids = torch.tensor([[3, 5, 7, 9]])
    outputs = {None: model(ids).logits}
    for name, tokens in (("one", [3, 5]), ("two", [9])):
        pl.attach(model, pl.LoRAConfig(r=2, init="random", trainable_tokens=tokens), name=name)
        with torch.no_grad():
            model.model.embed_tokens.peftlab[name]["rows"].rows.normal_()
        outputs[name] = model(ids).logits
    for name in ("one", "two"):
        pl.activate(model, name)
        assert torch.equal(model(ids).logits, outputs[name])
    pl.activate(model, ["two", None, "one"])
    rows = model(ids.expand(3, -1)).logits
    assert torch.allclose(rows, torch.cat([outputs["two"], outputs[None], outputs["one"]]), atol=1e-12)
    pl.activate(model, {"one": 0.5, "two": 0.25})
    expected = model(ids).logits
    pl.merge(model)
    assert torch.allclose(model(ids).logits, expected, atol=1e-9)
    pl.unmerge(model)
    assert torch.equal(model(ids).logits, expected)
    with pl.disabled(model):
        assert torch.equal(model(ids).logits, outputs[None])


def test_on_a_base_of_four_bits_and_without_a_head(tmp_path):
    model, tokenizer = pair()
    fresh = copy.deepcopy(model)
    pl.quantize_model(model)
    pl.add_tokens(model, tokenizer, ["<a>"])
    pl.attach(model, pl.LoRAConfig(r=2, init="random"))
    ids = torch.tensor([[3, 18, 5]])
    model(ids, labels=ids).loss.backward()
    assert model.model.embed_tokens.peftlab["default"]["rows"].rows.grad.abs().sum() > 0
    pl.save_adapter(model, tmp_path)
    fresh.save_pretrained(tmp_path / "base")
    bare = AutoModel.from_pretrained(tmp_path / "base").eval()
    assert type(bare) is LlamaModel
    with pytest.warns(UserWarning, match="another form"):
        pl.load_adapter(bare, tmp_path)
    pl.load_adapter(fresh, tmp_path)
    assert torch.equal(bare(ids).last_hidden_state, fresh.model(ids).last_hidden_state)


def test_a_head_with_a_bias(tmp_path):
    """transformers starts the bias of a new token at zero, so it is the same wherever the adapter is loaded."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=18, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    model, ids = PhiForCausalLM(PhiConfig(**sizes)).eval(), torch.tensor([[3, 18, 5]])
    with torch.no_grad():
        model.lm_head.bias.normal_()
    fresh = copy.deepcopy(model)
    pl.add_tokens(model, tiny.tokenizer(), ["<a>"])
    pl.save_adapter(pl.attach(model, pl.LoRAConfig(r=2, init="random")), tmp_path)
    pl.load_adapter(fresh, tmp_path)
    assert torch.equal(fresh(ids).logits, model(ids).logits)
    pl.merge(model)
    assert torch.allclose(fresh(ids).logits, model(ids).logits, atol=1e-6)


CONFIGS = {
    "outside": ([3, 18], "names 18, and model.embed_tokens has 18 rows, 0 to 17.*add_tokens"),
    "far outside": ([2**70], "names 1180591620717411303424"),
    "negative": ([-1], "at least 0"),
    "twice": ([3, 3], "holds 3 twice"),
    "empty": ([], "is empty"),
    "a text": ("3", "give a list of token ids"),
    "a number": (3, "give a list of token ids"),
    "no number": ([3.5], "whole number"),
    "no module": ({"embed_token": [3]}, "matches no module.*Did you mean 'embed_tokens'"),
    "no rows": ({"norm": [3]}, "a LlamaRMSNorm"),
    "a name that is none": ({5: [3]}, "names of modules"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_wrong_configs(case):
    tokens, message = CONFIGS[case]
    model, _ = pair()
    with pytest.raises(pl.PeftLabError, match=message):
        pl.attach(model, pl.LoRAConfig(r=2, trainable_tokens=tokens))
    assert not pl.attached(model)


@pytest.mark.parametrize("field", ["target_modules", "modules_to_save"])
def test_a_module_trains_in_one_way_only(field):
    model, _ = pair(tied=False)
    with pytest.raises(pl.PeftLabError, match=f"embed_tokens is in {field} and its rows are in trainable_tokens"):
        pl.attach(model, pl.LoRAConfig(r=2, trainable_tokens=[3], **{field: ["embed_tokens"]}))


def test_forms_of_the_tokens_and_the_folder(tmp_path):
    for given in ({5, 3}, (3, 5), range(3, 6, 2), torch.tensor([3, 5]).tolist()):
        assert pl.LoRAConfig(trainable_tokens=given).trainable_tokens == (3, 5)
    model, _ = pair()
    pl.save_adapter(pl.attach(model, pl.LoRAConfig(r=2, trainable_tokens=[5, 3])), tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["trainable_token_indices"] == [5, 3]
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == sorted(
        f"model.layers.{block}.self_attn.{name}" for block in (0, 1) for name in ("q_proj", "v_proj")
    )


def test_many_tokens_are_no_damaged_config(tmp_path):
    tokens = list(range(1500))
    model = tiny.llama(vocab_size=1600)
    pl.save_adapter(pl.attach(model, pl.LoRAConfig(r=2, trainable_tokens=tokens)), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    pl.load_adapter(pl.detach(model), tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"trainable_token_indices": list(range(1599))}))
    with pytest.raises(pl.PeftLabError, match=r"trainable_token_indices of length 1599|was changed"):
        pl.load_adapter(pl.detach(model), tmp_path)


def test_serving_programs_and_the_portable_form(tmp_path):
    model, _ = pair()
    pl.attach(model, pl.LoRAConfig(r=2, trainable_tokens=[3]))
    with pytest.warns(UserWarning, match="refuse trainable_token_indices") as told:
        pl.save_adapter(model, tmp_path)
    assert "modules_to_save" not in str(told[0].message)
    with pytest.raises(pl.PeftLabError, match="no portable form"):
        pl.save_adapter(model, tmp_path / "portable", portable=True)
