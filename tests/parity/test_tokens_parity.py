"""Trained rows of an embedding (`trainable_tokens`) held to Hugging Face peft: numbers, gradients, steps, folders."""

import copy
import warnings

import peft
import pytest
import torch
from pairs import base, batch, give, gradients, live, our_state, pair, peft_model, relative, same, three_steps
from transformers import (
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    T5Config,
    T5ForConditionalGeneration,
)

import peftlab as pl

CASES = {
    "untied": ("llama", [5, 3]),
    "tied": ("llama-tied", [5, 3]),
    "the padding token, which has no gradient": ("llama", [0, 7]),
    "both by hand": ("llama", {"embed_tokens": [3, 5], "lm_head": [4]}),
    "tied, both named alike": ("llama-tied", {"embed_tokens": [3, 5], "lm_head": [3, 5]}),
    "tied, named with different tokens": ("llama-tied", {"model.embed_tokens": [3, 5], "lm_head": [4]}),
    "tied, the head alone": ("llama-tied", {"lm_head": [4]}),
    "two embeddings of a GPT-2": ("gpt2", {"wte": [4, 1, 7], "wpe": [2]}),
    "an encoder": ("bert", [7, 4]),
}


def inputs(kind):
    """A batch in which the trained tokens occur, some of them twice."""
    made = batch(kind)
    made["input_ids"][:, :5] = torch.tensor([3, 4, 5, 7, 3])
    if made["labels"].dim() == 2:
        made["labels"][:, :5] = made["input_ids"][:, :5]
    return made


@pytest.mark.parametrize("case", CASES)
def test_same_numbers(case):
    kind, tokens = CASES[case]
    ours, theirs = pair(kind, r=5, alpha=12, trainable_tokens=tokens)
    assert pl.count_parameters(ours)[:2] == theirs.get_nb_trainable_parameters()
    three_steps(ours, theirs, inputs(kind), lambda: (our_state(ours), live(theirs)))


@pytest.mark.parametrize("case", ["untied", "tied", "both by hand", "two embeddings of a GPT-2", "an encoder"])
def test_same_bits_on_a_base_of_16_bits(case):
    kind, tokens = CASES[case]
    ours, theirs = pair(kind, torch.bfloat16, r=4, alpha=9, trainable_tokens=tokens)
    assert {parameter.dtype for parameter in our_state(ours).values()} == {torch.float32}
    for _ in range(3):
        found, expected = ours(**inputs(kind)), theirs(**inputs(kind))
        assert torch.equal(found.logits, expected.logits)
        found.loss.backward()
        expected.loss.backward()
        same(gradients(our_state(ours)), gradients(live(theirs)), 1e-6)
        for model in (ours, theirs):
            optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
            optimiser.step()
            optimiser.zero_grad()
    same(our_state(ours), live(theirs), 1e-6)


def test_under_autocast():
    ours, theirs = pair("llama-tied", torch.float32, r=4, alpha=9, trainable_tokens=[3, 5])
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = ours(**inputs("llama-tied")), theirs(**inputs("llama-tied"))
    assert found.logits.dtype == expected.logits.dtype and torch.equal(found.logits, expected.logits)
    found.loss.backward()
    expected.loss.backward()
    same(gradients(our_state(ours)), gradients(live(theirs)), 1e-2)


def test_all_that_share_a_weight_share_the_rows():
    torch.manual_seed(0)
    sizes = dict(
        vocab_size=40, d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=4, decoder_start_token_id=0, dropout_rate=0
    )
    model = T5ForConditionalGeneration(T5Config(**sizes)).double().eval()
    settings = dict(r=3, alpha=5, target_modules=["q"], trainable_tokens=[7, 4])
    theirs = peft_model(copy.deepcopy(model), **settings)
    pl.attach(model, pl.LoRAConfig(init="random", **settings))
    give(theirs, model)
    ids = torch.tensor([[4, 7, 9, 4], [1, 2, 3, 4]])
    three_steps(model, theirs, {"input_ids": ids, "labels": ids.flip(0)}, lambda: (our_state(model), live(theirs)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_an_embedding_that_scales(dtype):
    torch.manual_seed(0)
    sizes = dict(vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4)
    config = Gemma3TextConfig(**sizes, num_key_value_heads=2, head_dim=4, pad_token_id=0)
    model = Gemma3ForCausalLM(config).to(dtype).eval()
    settings = dict(r=3, alpha=5, target_modules=["q_proj"], trainable_tokens=[7, 4])
    theirs = peft_model(copy.deepcopy(model), **settings)
    pl.attach(model, pl.LoRAConfig(init="random", **settings))
    give(theirs, model)
    ids = torch.tensor([[4, 7, 9, 4], [1, 2, 3, 4]])
    assert torch.equal(model(input_ids=ids).logits, theirs(input_ids=ids).logits) or dtype == torch.float64
    if dtype == torch.float64:
        three_steps(model, theirs, {"input_ids": ids, "labels": ids}, lambda: (our_state(model), live(theirs)))


def test_a_tied_head_keeps_its_bias():
    """peft leaves the bias of such a head out, so the two are compared without one."""
    ours, theirs = pair("bert-mlm", r=3, alpha=5, trainable_tokens=[4, 7])
    bias = ours.cls.predictions.decoder.bias
    with torch.no_grad():
        before = ours(**inputs("bert-mlm")).logits
        kept = bias.clone()
        for model in (ours, theirs.base_model.model):
            model.cls.predictions.bias.zero_()
        found = ours(**inputs("bert-mlm")).logits
    assert relative(found, theirs(**inputs("bert-mlm")).logits) < 1e-9
    assert relative(before, found + kept) < 1e-12


def test_an_adapter_for_each_row():
    ours, theirs = pair("llama-tied", r=4, alpha=9, trainable_tokens=[3, 5])
    pl.attach(ours, pl.LoRAConfig(r=2, init="random", trainable_tokens=[4, 5]), name="other")
    theirs.add_adapter("other", peft.LoraConfig(r=2, lora_alpha=16, target_modules=["q_proj", "v_proj"],
                                                init_lora_weights=False, trainable_token_indices=[4, 5]))  # fmt: skip
    give(theirs, ours, "other", "other")
    three = {name: value for name, value in inputs("llama-tied").items() if name != "labels"}
    three = {name: torch.cat([value, value[:1]]) for name, value in three.items()}
    theirs.eval()
    pl.activate(ours, ["other", None, "default"])
    expected = theirs(**three, adapter_names=["other", "__base__", "default"])
    assert relative(ours(**three).logits, expected.logits) < 1e-9
    alone = []
    for name in ("other", "default"):
        pl.activate(ours, name)
        theirs.set_adapter(name)
        alone.append(ours(**three).logits)
        assert relative(alone[-1], theirs(**three).logits) < 1e-9
    pl.activate(ours, ["other", None, "default"])
    assert torch.allclose(ours(**three).logits[[0, 2]], torch.stack([alone[0][0], alone[1][2]]), atol=1e-12)
    with pl.disabled(ours), theirs.disable_adapter():
        assert relative(ours(**three).logits, theirs(**three).logits) < 1e-12


@pytest.mark.parametrize("case", ["untied", "tied", "both by hand", "two embeddings of a GPT-2"])
def test_merged_and_unmerged(case):
    kind, tokens = CASES[case]
    ours, theirs = pair(kind, r=4, alpha=9, trainable_tokens=tokens)
    before = {name: value.clone() for name, value in ours.state_dict().items()}
    expected = ours(**inputs(kind)).logits
    pl.merge(ours)
    assert relative(ours(**inputs(kind)).logits, expected) < 1e-12
    pl.unmerge(ours)
    assert all(torch.equal(value, before[name]) for name, value in ours.state_dict().items())
    pl.merge(ours, unload=True)
    if kind != "llama-tied":  # peft's merge changes a tied weight twice, and both times rightly; but it unties it
        merged = theirs.merge_and_unload()
        same(dict(ours.named_parameters()), dict(merged.named_parameters()), 1e-12)
    assert relative(ours(**inputs(kind)).logits, expected) < 1e-12


def test_a_tied_weight_is_not_merged_where_the_head_is_to_stay():
    ours, _ = pair("llama-tied", r=4, alpha=9, trainable_tokens={"lm_head": [3]})
    with pytest.raises(pl.PeftLabError, match="tied weights"):
        pl.merge(ours)


@pytest.mark.parametrize("case", ["untied", "tied", "both by hand", "tied, named with different tokens"])
def test_folders_go_both_ways(case, tmp_path):
    kind, tokens = CASES[case]
    ours, theirs = pair(kind, r=4, alpha=9, trainable_tokens=tokens)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pl.save_adapter(ours, tmp_path / "ours")
        theirs.save_pretrained(tmp_path / "theirs")
        loaded = peft.PeftModel.from_pretrained(base(kind), str(tmp_path / "ours"))
    assert relative(loaded(**inputs(kind)).logits, ours(**inputs(kind)).logits) < 1e-12
    mine = pl.load_adapter(base(kind), tmp_path / "theirs", trainable=True)
    assert relative(mine(**inputs(kind)).logits, ours(**inputs(kind)).logits) < 1e-12
    mine(**inputs(kind)).loss.backward()
    ours(**inputs(kind)).loss.backward()
    same(gradients(our_state(mine)), gradients(our_state(ours)), 1e-12)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"trainable_token_indices": [53, 54]},
        {"trainable_token_indices": {"embed_tokens": [53, 54], "lm_head": [53, 54]}},
        {"modules_to_save": ["embed_tokens", "lm_head"]},
    ],
    ids=["lora alone", "rows", "rows of both", "whole modules"],
)
@pytest.mark.parametrize("whole", [True, False], ids=["peft knows the base", "peft does not"])
def test_peft_trained_on_a_longer_vocabulary(tied, settings, whole, tmp_path):
    """peft saves the whole embedding too where it finds the base's config and sees another length in it."""
    if tied and "modules_to_save" in settings:
        settings = {"modules_to_save": ["embed_tokens"]}
    base("llama-tied" if tied else "llama", torch.float32).save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    model.resize_token_embeddings(55)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False, **settings)
        theirs = peft.get_peft_model(model, config)
        with torch.no_grad():
            for name, parameter in theirs.named_parameters():
                if "trainable_tokens" in name:
                    parameter.add_(0.1)
        if not whole:
            theirs.peft_config["default"].base_model_name_or_path = None
        theirs.save_pretrained(tmp_path / "adapter")
    fresh = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    start = {name: value.clone() for name, value in fresh.state_dict().items()}
    ids = torch.tensor([[53, 54, 3, 4, 53]])
    if not whole and not settings:
        return  # nothing in the folder says that the vocabulary was another one
    if not whole and not tied and isinstance(settings.get("trainable_token_indices"), list):
        with pytest.raises(pl.PeftLabError, match=r"lm_head.*resize_token_embeddings\(55\)"):
            pl.load_adapter(fresh, tmp_path / "adapter")
    else:
        pl.load_adapter(fresh, tmp_path / "adapter")
        assert torch.allclose(fresh(ids).logits, theirs(input_ids=ids).logits, atol=1e-6)
        pl.detach(fresh)
    assert fresh.config.vocab_size == 53 and (fresh.lm_head.weight is fresh.model.embed_tokens.weight) is tied
    assert all(torch.equal(value, start[name]) for name, value in fresh.state_dict().items())
