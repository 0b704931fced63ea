"""An attached model with its adapters disabled is its own reference for DPO, as the page on other tools shows."""

import functools
import re
from pathlib import Path
from types import MethodType

import pytest
import tiny
import torch

import peftlab as pl

PAGE = Path(__file__).resolve().parents[2] / "book" / "appendix_other_tools.md"
CONFIGS = {
    "lora": lambda: pl.LoRAConfig(r=4, init="random"),
    "dropout": lambda: pl.LoRAConfig(r=4, init="random", dropout=0.5),
    "ia3": lambda: pl.IA3Config(),
    "prompt": lambda: pl.PromptTuningConfig(num_virtual_tokens=3),
    "prefix": lambda: pl.PrefixTuningConfig(num_virtual_tokens=3),
    "bottleneck": lambda: pl.AdapterConfig(reduction_factor=4, init="random"),
    "copies": lambda: pl.LoRAConfig(r=4, init="random", modules_to_save=["layers.1.mlp"]),
}


@pytest.fixture(scope="module")
def recipe():
    """What the page's sections on DPO define."""
    section = PAGE.read_text(encoding="utf-8").partition("\n## DPO without")[2]
    names = {"torch": torch, "pl": pl}
    blocks = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        exec(block, names)
    return names


def pairs(seed=0):
    generator = torch.Generator().manual_seed(seed)
    prompt = torch.randint(1, 32, (3, 4), generator=generator)
    answers = [torch.cat([prompt, torch.randint(1, 32, (3, 5), generator=generator)], 1) for _ in range(2)]
    counts = torch.cat([torch.zeros(3, 4), torch.ones(3, 5)], 1)
    return [(answer, counts) for answer in answers]


def attached(name, model=None):
    model = tiny.llama() if model is None else model
    torch.manual_seed(1)
    pl.attach(model, CONFIGS[name]())
    with torch.no_grad():  # as after some training
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("name", CONFIGS)
def test_the_reference_is_the_base_before_attach_to_the_bit(name, recipe):
    base, (chosen, _) = tiny.llama().eval(), pairs()
    expected = recipe["log_probability"](base, *chosen)
    logits = base(input_ids=chosen[0]).logits
    model = attached(name).train()
    adapted = model(input_ids=chosen[0]).logits[:, -9:]
    with pl.disabled(model):
        assert torch.equal(recipe["log_probability"](model, *chosen), expected)
    assert torch.equal(recipe["Reference"](model)(input_ids=chosen[0]).logits, logits)
    if name != "dropout":
        assert torch.equal(model(input_ids=chosen[0]).logits[:, -9:], adapted)  # the adapter runs again
    assert not torch.equal(adapted, logits)


@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in ("dropout", "prefix")])
def test_loss_and_gradients_are_those_with_a_second_model(name, recipe):
    chosen, rejected = pairs()
    model = attached(name)
    loss = recipe["dpo_loss"](model, chosen, rejected)
    loss.backward()
    other, base = attached(name), tiny.llama()
    with torch.no_grad():
        reference = [recipe["log_probability"](base, *one) for one in (chosen, rejected)]
    policy = [recipe["log_probability"](other, *one) for one in (chosen, rejected)]
    margin = policy[0] - policy[1] - (reference[0] - reference[1])
    expected = -torch.nn.functional.logsigmoid(0.1 * margin).mean()
    expected.backward()
    assert torch.equal(loss, expected)
    assert any(parameter.grad is not None for parameter in model.parameters())
    for (path, parameter), second in zip(model.named_parameters(), other.parameters(), strict=True):
        assert (parameter.grad is None) == (second.grad is None) == (not parameter.requires_grad), path
        assert parameter.grad is None or torch.equal(parameter.grad, second.grad), path


def test_training_lowers_the_loss_and_leaves_the_reference(recipe):
    chosen, rejected = pairs()
    model = attached("lora")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for _ in range(10):
        loss = recipe["dpo_loss"](model, chosen, rejected)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    with torch.no_grad(), pl.disabled(model):
        expected = recipe["log_probability"](tiny.llama(), *chosen)
        assert torch.equal(recipe["log_probability"](model, *chosen), expected)


def test_what_a_trainer_does_to_its_reference(recipe):
    """TRL gives both models another forward, switches dropout off in the reference and looks for its parameters."""
    model, (chosen, _) = attached("dropout"), pairs()
    reference = recipe["Reference"](model)
    assert list(reference.parameters()) == [] and [*reference.modules()] == [reference]
    for one in (model, reference):
        original = one.forward

        @functools.wraps(type(one).forward)
        def forward(self, *args, fused=False, original=original, **kwargs):
            output = original(*args, **kwargs)
            return output.logits if fused else output

        one.forward = MethodType(forward, one)
    expected = tiny.llama()(input_ids=chosen[0]).logits
    with torch.no_grad():
        assert torch.equal(reference.eval()(input_ids=chosen[0], fused=True), expected)
    assert model.training


@pytest.mark.parametrize("config", [
    pl.LoRAConfig(r=4, target_modules=["lm_head"]),
    pl.LoRAConfig(r=4, modules_to_save=["lm_head"]),
])  # fmt: skip
def test_an_adapter_on_the_head_is_refused(config, recipe):
    with pytest.raises(ValueError, match="leave the head out"):
        recipe["Reference"](pl.attach(tiny.llama(), config))
