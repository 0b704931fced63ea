"""LoRA on a 4-bit base against Hugging Face peft on bitsandbytes: the same loss curve on a real model."""

import pytest
import torch

import peftlab as pl

peft = pytest.importorskip("peft")
bnb = pytest.importorskip("bitsandbytes")
STEPS = 20


def bitsandbytes_layers(model):
    """Every linear layer but the head as bitsandbytes' own, quantised by it: what transformers makes of a model."""
    head = model.get_output_embeddings()
    for path, module in list(model.named_modules()):
        if type(module) is torch.nn.Linear and module is not head:
            new = bnb.nn.Linear4bit(
                module.in_features, module.out_features, bias=module.bias is not None, quant_type="nf4",
                compute_dtype=torch.float32, device="meta",
            )  # fmt: skip
            new.weight = bnb.nn.Params4bit(module.weight.data, requires_grad=False, quant_type="nf4").to("cpu")
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, new)
    model.is_loaded_in_4bit = True  # by which peft knows its layers
    return model


def curve(model, batches):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for batch in batches:
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def give(ours, theirs):
    """peft's starting values to our adapter."""
    for name, parameter in theirs.named_parameters():
        if parameter.requires_grad:
            path, _, rest = name.removeprefix("base_model.model.").partition(".lora_")
            own = ours.get_submodule(path).peftlab["default"]["lora"]
            with torch.no_grad():
                getattr(own, f"lora_{rest[0]}").copy_(parameter)


def shortened(model, layers=6):
    """The model's first layers: `peftlab bench qlora` does this test with all thirty, on a GPU."""
    model.model.layers = model.model.layers[:layers]
    model.config.num_hidden_layers = layers
    return model


@pytest.mark.slow
def test_twenty_steps_of_smollm2():
    ours, tokenizer = pl.load_model("smollm2-135m")
    other, _ = pl.load_model("smollm2-135m")
    ours, other = shortened(ours), shortened(other)
    text = " ".join(row["text"] for row in pl.load_data("news")["train"].select(range(12)))
    tokens = torch.tensor(tokenizer(text)["input_ids"][: STEPS * 2 * 16])
    batches = list(tokens.view(STEPS, 2, 16))
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    pl.attach(pl.quantize_model(ours), pl.LoRAConfig(r=8, alpha=20, target_modules=targets))
    settings = peft.LoraConfig(r=8, lora_alpha=20, target_modules=targets)
    theirs = peft.get_peft_model(bitsandbytes_layers(other), settings)
    assert type(other.model.layers[0].mlp.up_proj).__module__ == "peft.tuners.lora.bnb"
    assert pl.count_parameters(ours)[:2] == theirs.get_nb_trainable_parameters()
    give(ours, theirs)
    ours.train(), theirs.train()
    found, expected = curve(ours, batches), curve(theirs, batches)
    assert max(abs(a - b) for a, b in zip(found, expected, strict=True)) < 1e-4
    assert found[-1] != found[0]
