"""Preparing a model step by step: what each step does and costs, and what Hugging Face's function casts besides."""

import copy

import pytest
import torch
from tiny import llama
from torch import nn

import peftlab as pl
from peftlab.quantization.preparing import kbit_casts

IDS = torch.tensor([[3, 4, 5, 6, 7]])


def half():
    return llama(dtype=torch.bfloat16)


def test_freezing_is_all_that_happens_unasked():
    model = half()
    (step,) = pl.prepare_for_training(model)
    assert step.step == "freeze the base" and step.bytes == 0 and step.modules == 21
    assert not any(p.requires_grad for p in model.parameters())
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert pl.prepare_for_training(model)[0].modules == 0


def test_adapters_keep_training():
    model = pl.attach(half(), pl.LoRAConfig())
    trainable = pl.count_parameters(model).trainable
    pl.prepare_for_training(model)
    assert pl.count_parameters(model).trainable == trainable > 0


@pytest.mark.parametrize(
    "norms, count", [(True, 5), (["input_layernorm"], 2), (["model.norm", "post_attention_layernorm"], 3)]
)
def test_norms_in_float32_change_no_dtype_after_them(norms, count):
    model, twin = half(), half()
    expected = twin(IDS).logits
    _, step = pl.prepare_for_training(model, norms=norms)
    assert step.modules == count and step.bytes == count * 16 * 2
    assert sum(p.dtype == torch.float32 for p in model.parameters()) == count
    seen = set()
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda module, args: seen.add(args[0].dtype))
    found = model(IDS).logits
    assert found.dtype == torch.bfloat16 and seen == {torch.bfloat16}
    torch.testing.assert_close(found, expected)  # a bf16 weight is the same number in float32
    hooks = sum(len(module._forward_hooks) for module in model.modules())
    pl.prepare_for_training(model, norms=norms)
    assert sum(len(module._forward_hooks) for module in model.modules()) == hooks
    torch.testing.assert_close(copy.deepcopy(model)(IDS).logits, found)


@pytest.mark.parametrize("kind", [True, "reentrant"])
def test_checkpointing_reaches_every_adapter(kind):
    model = pl.attach(half(), pl.LoRAConfig(init="random"))
    model.config.use_cache = True
    steps = pl.prepare_for_training(model, checkpointing=kind)
    names = [step.step for step in steps]
    assert names[:2] == ["freeze the base", "checkpoint the blocks"] and steps[1].modules == 2
    assert ("let inputs require gradients" in names) == (kind == "reentrant") == bool(model._require_grads_hooks)
    assert model.config.use_cache is False
    model.train()(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)


def test_input_gradients_are_turned_on_once():
    model = pl.attach(half(), pl.LoRAConfig(init="random")).train()
    assert not model.get_input_embeddings()(IDS).requires_grad
    for _ in range(2):
        steps = pl.prepare_for_training(model, input_gradients=True)
        assert [step.step for step in steps] == ["freeze the base", "let inputs require gradients"]
        assert model.get_input_embeddings()(IDS).requires_grad
        assert len(model.get_input_embeddings()._forward_hooks) == 1
    model.disable_input_require_grads()
    assert not model.get_input_embeddings()(IDS).requires_grad, "all of it can be taken off again"


@pytest.mark.parametrize("mark", ["_require_grads_hooks", "_require_grads_hook"])
def test_input_gradients_are_seen_by_either_mark(mark, monkeypatch):
    """Releases of transformers write one or the other on the model, or both."""
    model, asked = half(), []
    setattr(model, mark, [7])
    for verb in ("enable", "disable"):
        monkeypatch.setattr(type(model), f"{verb}_input_require_grads", lambda self, verb=verb: asked.append(verb))
    pl.prepare_for_training(model, input_gradients=True)
    assert asked == [], "they are on"
    monkeypatch.setattr(type(model), "gradient_checkpointing_enable", lambda *args, **kwargs: None)
    pl.prepare_for_training(model, checkpointing=True)
    assert asked == ["disable"], "the newer kind needs none"
    delattr(model, mark)
    pl.prepare_for_training(model, checkpointing=True)
    pl.prepare_for_training(model, input_gradients=True)
    assert asked == ["disable", "enable"]


def test_without_input_gradients_reentrant_checkpointing_learns_nothing():
    """The mistake that the step is there for."""
    model = pl.attach(half(), pl.LoRAConfig(init="random")).train()
    pl.prepare_for_training(model, checkpointing="reentrant")
    model.disable_input_require_grads()
    with pytest.warns(UserWarning, match="None of the inputs have requires_grad=True"):
        loss = model(input_ids=IDS, labels=IDS).loss
    assert not loss.requires_grad


@pytest.mark.parametrize(
    "settings, said",
    [
        (dict(norms=["input_layrnorm"]), "no norm of this model. Did you mean 'input_layernorm'"),
        (dict(norms="norm"), "norms must be True or False"), (dict(checkpointing="yes"), "True, False, 'reentrant'"),
    ],
)  # fmt: skip
def test_mistakes_change_nothing(settings, said):
    model = half()
    with pytest.raises(pl.PeftLabError, match=said):
        pl.prepare_for_training(model, **settings)
    assert all(p.requires_grad and p.dtype == torch.bfloat16 for p in model.parameters())


def test_what_hugging_faces_function_casts():
    """Predicted here from the model; done there."""
    peft = pytest.importorskip("peft")
    model = pl.quantize_model(half())
    before = sum(p.nbytes for p in model.parameters())
    steps = kbit_casts(model)
    assert [step.step for step in steps] == ["embedding", "output head", "norms and biases"]
    assert [step.bytes for step in steps] == [32 * 16 * 2, 32 * 16 * 2, 5 * 16 * 2]
    peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    assert sum(p.nbytes for p in model.parameters()) - before == sum(step.bytes for step in steps)
    assert kbit_casts(llama(dtype=torch.bfloat16, tie_word_embeddings=True))[0].bytes == 32 * 16 * 2
    assert len(kbit_casts(llama(dtype=torch.bfloat16, tie_word_embeddings=True))) == 2
