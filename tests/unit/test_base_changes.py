"""The base changes after `attach`: what was lost is named, at the next use, and nothing is saved or merged."""

import copy
import pickle
import warnings

import pytest
import torch
from tiny import llama
from torch import nn
from transformers import BertConfig, BertForMaskedLM

import peftlab as pl
from peftlab.errors import PeftLabError

USES = {
    "count": lambda m, d: pl.count_parameters(m),
    "save": lambda m, d: pl.save_adapter(m, d),
    "activate": lambda m, d: pl.activate(m, "default"),
    "merge": lambda m, d: pl.merge(m),
    "detach": lambda m, d: pl.detach(m),
    "attach": lambda m, d: pl.attach(m, pl.LoRAConfig(target_modules=["v_proj"]), "second"),
    "train": lambda m, d: pl.train(m, [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}], steps=1, progress=False),
    "call": lambda m, d: m(torch.arange(5)[None]),
    "forward": lambda m, d: m.forward(input_ids=torch.arange(5)[None]),
    "generate": lambda m, d: m.generate(torch.arange(5)[None], max_new_tokens=1),
    "copy": lambda m, d: copy.deepcopy(m)(torch.arange(5)[None]),
}


def bert() -> BertForMaskedLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return BertForMaskedLM(BertConfig(vocab_size=32, **sizes)).eval()


def replaced(model: nn.Module) -> None:
    model.model.layers[1].self_attn.q_proj = nn.Linear(16, 16, bias=False)


def cut_short(model: nn.Module) -> None:
    model.model.layers = model.model.layers[:1]


def offloaded(model: nn.Module) -> None:
    from accelerate import cpu_offload

    cpu_offload(model, execution_device="cpu")


def tied(model: nn.Module) -> None:
    model.lm_head.weight = model.model.embed_tokens.weight


CHANGES = {
    "another layer": (replaced, {"target_modules": ["q_proj"]}, r"layers\.1\.self_attn\.q_proj was replaced"),
    "fewer layers": (cut_short, {"target_modules": ["v_proj"]}, r"layers\.1\.self_attn\.v_proj was replaced"),
    "longer vocabulary": (
        lambda model: model.resize_token_embeddings(40), {"target_modules": ["embed_tokens"]}, "embed_tokens was re",
    ),
    "shorter vocabulary, copies": (
        lambda model: model.resize_token_embeddings(30), {"modules_to_save": ["lm_head"]}, "lm_head was re",
    ),
    "weights tied": (tied, {"target_modules": ["lm_head"]}, "lm_head was tied to that of model.embed_tokens"),
    "offloaded": (offloaded, {"target_modules": ["down_proj"]}, "moved to the meta device"),
}  # fmt: skip


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("change", CHANGES)
def test_each_use_names_what_was_changed(change, use, tmp_path):
    act, settings, words = CHANGES[change]
    model = pl.attach(llama(tie_word_embeddings=False).eval(), pl.LoRAConfig(r=2, **settings))
    model(torch.arange(5)[None])
    act(model)
    with pytest.raises(PeftLabError, match=words) as caught:
        USES[use](model, tmp_path / "adapter")
    assert "attach then" in str(caught.value)
    assert not (tmp_path / "adapter").exists()


def test_unmerging_after_a_resize():
    model = pl.attach(llama(tie_word_embeddings=False), pl.LoRAConfig(target_modules=["lm_head"]))
    pl.merge(model)
    model.resize_token_embeddings(40)
    with pytest.raises(PeftLabError, match="lm_head was re"):
        pl.unmerge(model)


def test_untied_weights():
    model = pl.attach(bert(), pl.LoRAConfig(target_modules=["word_embeddings"]))
    model.cls.predictions.decoder.weight = nn.Parameter(model.cls.predictions.decoder.weight.detach().clone())
    with pytest.raises(PeftLabError, match="untied from that of cls.predictions.decoder"):
        pl.count_parameters(model)


@pytest.mark.parametrize(
    "act",
    [
        copy.deepcopy,
        lambda model: pickle.loads(pickle.dumps(model)),
        lambda model: model.to(torch.float64),
        lambda model: model.bfloat16(),
        lambda model: model.load_state_dict(model.state_dict()) and model,
        lambda model: model.train(),
    ],
)
def test_what_leaves_the_adapter_whole_is_no_change(act, tmp_path):
    config = pl.LoRAConfig(r=2, target_modules=["q_proj", "lm_head"], modules_to_save=["embed_tokens"])
    model = pl.attach(llama(tie_word_embeddings=False), config)
    count = pl.count_parameters(model)
    same = act(model)
    same = model if not isinstance(same, nn.Module) else same
    assert pl.count_parameters(same) == count
    pl.save_adapter(same, tmp_path)
    pl.detach(same)


class Trunk(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Sequential(nn.Linear(4, 4)))
        self.heads = nn.ModuleDict({"one": nn.Linear(4, 2)})

    def forward(self, x):
        return self.heads["one"](self.layers(x))


def set_item(model: nn.Module) -> None:
    model.layers[0] = nn.Linear(4, 4)


def parent(model: nn.Module) -> None:
    model.layers = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Sequential(nn.Linear(4, 4)))


def in_the_table(model: nn.Module) -> None:
    model.layers[2]._modules["0"] = nn.Linear(4, 4)


def updated(model: nn.Module) -> None:
    model.heads.update({"one": nn.Linear(4, 2)})


def without_hooks(model: nn.Module) -> None:
    model.layers[0]._forward_hooks.clear()


def without_child(model: nn.Module) -> None:
    del model.layers[0].peftlab


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("act", [set_item, parent, in_the_table, updated, without_hooks, without_child])
def test_a_forward_pass_notices_that_parts_are_gone(act, direct):
    model = pl.attach(Trunk(), pl.LoRAConfig(r=2, target_modules="all-linear"))
    run = model.forward if direct else model
    run(torch.ones(1, 4))
    act(model)
    with pytest.raises(PeftLabError, match="changed after the adapter was attached"):
        run(torch.ones(1, 4))
    with pytest.raises(PeftLabError, match="changed after"):
        run(torch.ones(1, 4))  # and again


def test_a_forward_pass_goes_on_where_the_parts_are_still_there():
    model = pl.attach(Trunk().eval(), pl.LoRAConfig(r=2, target_modules="all-linear", init="random"))
    x = torch.ones(1, 4)
    expected = model(x)
    model.layers = nn.Sequential(*model.layers)  # another list of the same layers
    assert torch.equal(model(x), expected)
    model.layers[0] = torch.compile(model.layers[0], backend="eager")
    assert torch.allclose(model(x), expected)
    with pl.disabled(model):
        assert not torch.allclose(model(x), expected)
    pl.attach(model, pl.LoRAConfig(r=2, target_modules=["one"]), "second")
    model(x)
    pl.detach(model, "second")
    pl.activate(model, "default")
    assert torch.allclose(model(x), expected)
    pl.detach(model)
    model.layers[0] = nn.Linear(4, 4)
    model(x)


def test_a_model_without_numbers_takes_an_adapter():
    with torch.device("meta"):
        model = llama()
    pl.attach(model, pl.LoRAConfig())
    assert pl.count_parameters(model).trainable


def test_resizing_first_is_what_the_error_advises(tmp_path):
    config = pl.LoRAConfig(target_modules=["embed_tokens", "lm_head"])
    model, other = llama(tie_word_embeddings=False), llama(tie_word_embeddings=False)
    torch.manual_seed(0)
    model.resize_token_embeddings(40)
    other.resize_token_embeddings(40)
    other.load_state_dict(model.state_dict())
    pl.save_adapter(pl.attach(model, config), tmp_path)
    pl.load_adapter(other, tmp_path)
    assert torch.equal(model(torch.arange(5)[None]).logits, other(torch.arange(5)[None]).logits)


@pytest.mark.parametrize("build", [llama, bert])
def test_saving_the_model_names_what_saves_the_adapter_once(build, tmp_path):
    model = pl.attach(build(), pl.LoRAConfig(r=2))
    same = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    with pytest.warns(UserWarning, match=r"pl\.save_adapter.*AdapterCallback"):
        model.save_pretrained(tmp_path / "one")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path / "two")
        pl.detach(model).save_pretrained(tmp_path / "three")
    assert "save_pretrained" not in vars(model)
    same.save_pretrained(tmp_path / "four")
    assert (tmp_path / "one" / "model.safetensors").stat().st_size == (
        tmp_path / "three" / "model.safetensors"
    ).stat().st_size


@pytest.mark.parametrize("settings", [{"modules_to_save": ["lm_head"]}, {"target_modules": ["embed_tokens"]}])
def test_the_advice_for_tied_weights_keeps_the_models_answers(settings, tmp_path):
    model = pl.attach(llama(tie_word_embeddings=True).eval(), pl.LoRAConfig(r=2, init="random", **settings))
    tokens = torch.arange(1, 6)[None]
    answer = model(tokens).logits
    with pytest.raises(PeftLabError, match="tied weights.*save it with save_adapter and load it beside") as caught:
        pl.merge(model)
    assert "tie_word_embeddings" not in str(caught.value)
    pl.save_adapter(model, tmp_path)
    other = pl.load_adapter(llama(tie_word_embeddings=True).eval(), tmp_path)
    assert torch.equal(other(tokens).logits, answer)
