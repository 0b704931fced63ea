"""What `attach` and `quantize_model` take can take a training step; what cannot is refused there, in words."""

import copy
import warnings
from typing import NamedTuple

import pytest
import torch
from encoder_configs import variant as encoder
from nets import assert_same, snapshot
from tiny import llama
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

import peftlab as pl
from peftlab.catalogue import METHODS
from peftlab.core.targets import Targets
from peftlab.quantization.model import weight_bytes

IDS = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 3]])
SIZES = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
STACKS = {
    "vocab_size": 32, "d_model": 16, "max_position_embeddings": 40, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "decoder_start_token_id": 0,
} | {f"{stack}_{name}": size for stack in ("encoder", "decoder")
     for name, size in {"layers": 2, "attention_heads": 2, "ffn_dim": 24, "layerdrop": 0.0}.items()}  # fmt: skip
T5 = {
    "vocab_size": 32, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "dropout_rate": 0.0,
    "decoder_start_token_id": 0,
}  # fmt: skip
MORE = {
    "gpt_oss": {"num_local_experts": 3, "num_experts_per_tok": 2, "head_dim": 8},
    "llama4_text": {"num_local_experts": 3, "intermediate_size_mlp": 24, "head_dim": 8, "interleave_moe_layer_step": 2},
    "opt": {"ffn_dim": 24, "word_embed_proj_dim": 16},
    "qwen2_moe": {"num_experts": 4, "moe_intermediate_size": 12, "shared_expert_intermediate_size": 12},
    "deepseek_v3": {
        "n_routed_experts": 4, "n_group": 2, "topk_group": 1, "moe_intermediate_size": 12, "kv_lora_rank": 10,
        "q_lora_rank": None, "qk_rope_head_dim": 8, "qk_nope_head_dim": 4, "v_head_dim": 6, "num_key_value_heads": 4,
    },
    "gemma3_text": {"tie_word_embeddings": False, "head_dim": 8},
    "openai-gpt": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 40},
}  # fmt: skip


def build(family, dtype=torch.float64):
    torch.manual_seed(0)
    stacks = family in ("bart", "marian", "mbart", "pegasus", "blenderbot")
    sizes = T5 if family == "t5" else STACKS if stacks else SIZES | MORE.get(family, {})
    config = AutoConfig.for_model(family, **sizes)
    auto = AutoModelForSeq2SeqLM if stacks or family == "t5" else AutoModelForCausalLM
    model = auto.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1 and parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    if family in ("gpt_oss", "qwen2_moe", "llama4_text") and dtype == torch.float64:
        model.set_experts_implementation("eager")  # the others know no double precision
    return model.to(dtype).eval()


@torch.no_grad()
def move(model, size=0.2):
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(size * torch.randn_like(parameter))
    return model


def output(model):
    return model(input_ids=IDS, labels=IDS).logits


def gradients(model):
    model.zero_grad()
    model(input_ids=IDS, labels=IDS).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}


def refused(model, config, said):
    before = snapshot(model)
    with pytest.raises(pl.PeftLabError, match=said) as error:
        pl.attach(model, config)
    assert "\n" not in str(error.value)
    assert_same(before, snapshot(model))


# ------------------------------------------------------------------------------------------------- tables of positions


POSITIONS = {
    "opt": "model.decoder.embed_positions", "bart": "model.decoder.embed_positions",
    "mbart": "model.encoder.embed_positions", "blenderbot": "model.encoder.embed_positions",
    "marian": "model.encoder.embed_positions", "pegasus": "model.decoder.embed_positions",
    "gemma3_text": "model.embed_tokens",
}  # fmt: skip


@pytest.mark.parametrize("family", POSITIONS)
@pytest.mark.parametrize("config", [pl.LoRAConfig, pl.DoRAConfig])
def test_a_table_with_a_forward_of_its_own_is_adapted_as_its_weight_would_be(family, config):
    """OPT's is called with a mask, BART's with the tokens, Marian's with their shape. Gemma scales what it finds."""
    model = build(family)
    plain = output(model)
    move(pl.attach(model, config(r=3, target_modules=[POSITIONS[family]])))
    adapted = output(model)
    assert (adapted - plain).abs().max() > 1e-4
    found = gradients(model)
    assert len(found) == sum(p.requires_grad for p in model.parameters()) and all(g.any() for g in found.values())
    pl.merge(model)
    torch.testing.assert_close(output(model), adapted, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("family", ["opt", "bart"])
def test_its_gradients_are_those_of_the_weight(family):
    """W' = W + s (B A)^T, so dL/dB = s (A dL/dW')^T and dL/dA = s (dL/dW' B)^T."""
    model = build(family)
    path = POSITIONS[family]
    move(pl.attach(model, pl.LoRAConfig(r=3, alpha=6, target_modules=[path])))
    found = {name.rpartition(".")[2]: g for name, g in gradients(model).items()}
    part = {n.rpartition(".")[2]: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    pl.merge(model, unload=True)
    weight = model.get_submodule(path).weight.requires_grad_()
    model(input_ids=IDS, labels=IDS).loss.backward()
    torch.testing.assert_close(found["lora_B"], 2 * (part["lora_A"] @ weight.grad).T)
    torch.testing.assert_close(found["lora_A"], 2 * (weight.grad @ part["lora_B"]).T)


def test_rows_of_a_table_of_positions_train():
    model = build("opt")
    table = model.model.decoder.embed_positions.weight
    pl.attach(model, pl.LoRAConfig(target_modules=["q_proj"], trainable_tokens={"embed_positions": [2, 4]}))
    rows = next(p for name, p in model.named_parameters() if name.endswith("rows"))
    with torch.no_grad():
        rows.add_(1)
    adapted = output(model)
    pl.detach(model)
    with torch.no_grad():
        table[[2, 4]] += 1
    torch.testing.assert_close(output(model), adapted)


# ------------------------------------------------------------------------------ biases and other parameters of modules


@pytest.mark.parametrize("config, unfrozen", [
    (pl.SelectiveConfig(target_modules=["self_attn"]), lambda name: ".self_attn." in name),
    (pl.SelectiveConfig(last_layers=1), lambda name: ".layers.1." in name),
    (pl.SelectiveConfig(modules_to_save=["layers.1.self_attn"]), lambda name: ".layers.1.self_attn." in name),
])  # fmt: skip
def test_gpt_oss_trains_as_if_its_own_parameters_were_unfrozen(config, unfrozen, tmp_path):
    """Its router returns a choice, not logits and a bias; its attention has sinks of its own, and a cache."""
    model = build("gpt_oss")
    plain = copy.deepcopy(model)
    for name, parameter in plain.named_parameters():
        parameter.requires_grad_(unfrozen(name))
    pl.attach(model, config)
    optimizers = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.5) for m in (model, plain)]
    for _ in range(3):
        for one, optimizer in zip((model, plain), optimizers, strict=True):
            one.zero_grad()
            one(input_ids=IDS, labels=IDS).loss.backward()
            assert all(p.grad is not None for p in one.parameters() if p.requires_grad)
            optimizer.step()
    expected = output(plain)
    torch.testing.assert_close(output(model), expected, rtol=1e-9, atol=1e-11)
    pl.save_adapter(model, tmp_path)
    again = pl.load_adapter(build("gpt_oss"), tmp_path)
    assert torch.equal(output(again), output(model))
    pl.merge(model, unload=True)
    for (name, one), (_, other) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11, msg=name)



# --------------------------------------------------------------------------------------------- modules of another kind


@pytest.mark.parametrize("config", [pl.LoRAConfig, pl.DoRAConfig, pl.IA3Config, pl.VeRAConfig, pl.LoHaConfig])
def test_a_linear_layer_that_returns_a_choice_is_left_out_or_refused(config):
    """Llama 4's router is an nn.Linear that returns scores and logits. Hugging Face peft fails in the step."""
    model = build("llama4_text")
    refused(model, config(target_modules=["router"]), "cannot stand on .*router.*Llama4Router.*exclude_modules")
    with pytest.warns(UserWarning, match="Llama4Router.*They are left out"):
        pl.attach(model, config(target_modules="all-linear"))
    assert not any("router" in name for name, p in model.named_parameters() if p.requires_grad)
    assert gradients(model)


@pytest.mark.parametrize("family, method", [("qwen2_moe", "pfeiffer"), ("openai-gpt", "pfeiffer")])
def test_an_adapter_is_as_wide_as_what_its_block_returns(family, method):
    """The last linear layer in Qwen2-MoE's block is a gate of width 1; the block of the first GPT returns a list."""
    model = build(family)
    move(pl.attach(model, pl.AdapterConfig(placement=method, reduction_factor=2)))
    assert all(g.isfinite().all() for g in gradients(model).values())


def test_a_module_that_computes_without_gradients_cannot_train(monkeypatch):
    """In older transformers Marian's positions do. Its forward also reads numbers, which a copy on meta has not."""
    base = build("marian")
    table = type(base.model.encoder.embed_positions)
    monkeypatch.setattr(table, "forward", torch.no_grad()(table.forward))
    target = {"target_modules": ["model.encoder.embed_positions"]}
    refused(base, pl.SelectiveConfig(**target), "no gradient flows from the output .* back to .*embed_positions")
    model = move(pl.attach(base, pl.LoRAConfig(**target)))  # LoRA adds a branch of its own, outside that forward
    assert all(g.any() for g in gradients(model).values())


@pytest.mark.parametrize("family, name", [("t5", "shared"), ("bart", "model.shared")])
def test_an_embedding_that_only_lends_its_weight_is_refused(family, name):
    model = build(family)
    refused(model, pl.LoRAConfig(target_modules=[name]), "without calling these modules.*never run")
    pl.attach(model, pl.LoRAConfig(trainable_tokens=[3, 4]))  # its rows train on the embeddings that do run
    assert any(name.endswith("rows") for name in gradients(model))


def test_of_what_no_pass_calls_the_first_training_step_tells():
    """BART's decoder alone has layers for an encoder's states, which it calls only if it is given some."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("bart", **STACKS))
    pl.attach(model, pl.LoRAConfig(target_modules=["encoder_attn.q_proj"]))
    model.eval()
    output(model)
    model.train()
    with pytest.raises(pl.PeftLabError, match="did not call .*encoder_attn.q_proj.* nothing .* would train"):
        output(model)
    model = pl.detach(model)
    pl.attach(model, pl.LoRAConfig(target_modules=["encoder_attn.q_proj"]))
    model(input_ids=IDS, encoder_hidden_states=torch.randn(2, 3, 16), labels=IDS).loss.backward()


def test_prompts_and_prefixes_that_a_model_cannot_take_are_refused():
    refused(build("deepseek_v3"), pl.PrefixTuningConfig(num_virtual_tokens=4), "DeepseekV3.* different (sizes|widths)")
    refused(build("opt"), pl.PrefixTuningConfig(num_virtual_tokens=40), "num_virtual_tokens is 40.* 40 positions")
    refused(build("opt"), pl.PromptTuningConfig(num_virtual_tokens=41), "num_virtual_tokens is 41.* 40 positions")
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    whisper = WhisperForConditionalGeneration(WhisperConfig(**encoder("whisper", 1)))
    refused(whisper, pl.PromptTuningConfig(num_virtual_tokens=4), "no prompt. Use lora")


# ------------------------------------------------------------------------------------------------------- in four bits


def test_a_weight_whose_dtype_the_model_asks_for_is_not_quantised():
    """T5 casts what `wo` reads to the dtype of its weight; transformers leaves it out too."""
    model = build("t5", torch.float32)
    pl.quantize_model(model, backend="reference")
    held = {path for path, module in model.named_modules() if type(module).__name__ == "Linear4bit"}
    assert any(path.endswith("wi") for path in held) and not any(path.endswith("wo") for path in held)
    plain = pl.dequantize_model(copy.deepcopy(model))
    torch.testing.assert_close(output(model), output(plain))
    move(pl.attach(model.train(), pl.LoRAConfig(target_modules="all-linear")))
    assert all(g.any() for g in gradients(model).values())


def test_the_memory_of_t5_in_four_bits_counts_that_weight_whole():
    config = {"model_type": "t5", "vocab_size": 1000, "d_model": 256, "d_kv": 32, "d_ff": 704, "num_layers": 3,
              "num_heads": 8, "decoder_start_token_id": 0}  # fmt: skip
    model = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model(**config)).to(torch.bfloat16)
    told = pl.memory.estimate(config, "qlora", batch=1, sequence=16, library="peftlab")
    # a GPU gives memory in blocks, so a little more
    assert told.weights == pytest.approx(weight_bytes(pl.quantize_model(model, backend="reference")), rel=0.03)



# ---------------------------------------------------------------------------------------------------------- the sweep


def modules_of_each_kind(model):
    """One path for each kind of module that has parameters of its own: its class and its last name."""
    found = {}
    for path, module in model.named_modules():
        if path and next(module.parameters(recurse=False), None) is not None:
            found.setdefault((type(module), path.rpartition(".")[2]), path)
    return list(found.values())


def trial(model, config, inputs):
    """None where the step does what it should, or the config is refused; else what went wrong."""
    try:
        pl.attach(model, config)
    except pl.PeftLabError:
        return None
    move(model, 0.05)
    try:
        result = model.train()(**inputs)
        sum(t.float().square().sum() for t in result.to_tuple() if isinstance(t, torch.Tensor)).backward()
    except pl.PeftLabError as error:
        return None if "did not call" in str(error) else repr(error)
    except Exception as error:
        return repr(error)
    trained = [p for p in model.parameters() if p.requires_grad]
    return None if any(p.grad is not None and p.grad.any() for p in trained) else "nothing trains"


@pytest.mark.parametrize("method", [name for name, row in METHODS.items() if row.config and not row.four_bit])
@pytest.mark.parametrize("family", ["gpt_oss", "llama4_text", "opt", "bart", "t5", "marian"])
@pytest.mark.parametrize("four_bit", [False, True])
@pytest.mark.slow
def test_whatever_is_accepted_takes_a_step(family, method, four_bit):
    row, base = METHODS[method], build(family, torch.float32)
    inputs = {"input_ids": IDS, "labels": IDS}
    if four_bit:
        pl.quantize_model(base, backend="reference")
    specs = [None]
    if issubclass(row.config_class(), Targets):
        specs += ["all-linear", *([path] for path in modules_of_each_kind(base))]
    wrong = {}
    for spec in specs:
        settings = {"selective": {"last_layers": 1}, "p-tuning": {"encoder_hidden": 8}}.get(method, {})
        settings = settings if spec is None else {"target_modules": spec}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = trial(copy.deepcopy(base), row.config_class()(**row.fixed, **settings), inputs)
        if found is not None:
            wrong[str(spec)] = found
    assert not wrong


def test_an_attach_leaves_random_numbers_where_they_were():
    torch.manual_seed(5)
    pl.attach(llama(), pl.IA3Config())
    after = torch.rand(1)
    torch.manual_seed(5)
    llama()
    assert torch.equal(after, torch.rand(1))


class Two(NamedTuple):
    """What a block may return."""

    y: torch.Tensor
    number: int


class Several(torch.nn.Module):
    """A block that returns its result and something else, in one form or another."""

    in_features = out_features = 4

    def __init__(self, form):
        super().__init__()
        self.form, self.linear = form, torch.nn.Linear(4, 4)

    def forward(self, x):
        return self.form(self.linear(x))


@pytest.mark.parametrize("placement", ["pfeiffer", "parallel"])
@pytest.mark.parametrize("form", [lambda y: (y, 7), lambda y: [y, 7], lambda y: Two(y, 7)])
def test_the_rest_of_what_a_block_returns_is_kept(form, placement):
    model, x = torch.nn.Sequential(Several(form)), torch.ones(2, 4)
    before = model(x)
    pl.attach(model, pl.AdapterConfig(placement=placement, target_modules=["0"], width=2, init="random"))
    after = model(x)
    assert not torch.equal(after[0], before[0]) and after[1] == 7 and len(after) == 2
    assert isinstance(after, list) == isinstance(before, list)
