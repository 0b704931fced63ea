"""LoRA on fused experts and routers against Hugging Face peft: forward, gradients, steps, folders; 4-bit experts."""

import json
import warnings

import bitsandbytes.functional as bnb
import peft
import pytest
import torch
import transformers as tf
from pairs import our_state, relative
from peft.utils import get_peft_model_state_dict
from releases import skip_before
from safetensors.torch import save_file

import peftlab as pl
from peftlab.core.checkpointing import switch_checkpointing
from peftlab.core.experts import OLD_NAMES
from peftlab.errors import PeftLabError
from peftlab.quantization.weights import dense

SMALL = dict(
    vocab_size=37, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
    max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0, num_experts_per_tok=2,
)  # fmt: skip
OSS = dict(
    intermediate_size=16, num_local_experts=3, layer_types=["full_attention"] * 2, rope_parameters={
        "rope_type": "default", "rope_theta": 1e4},
)  # fmt: skip
KINDS = {
    "mixtral": lambda: tf.MixtralForCausalLM(tf.MixtralConfig(**SMALL, intermediate_size=40, num_local_experts=3)),
    "qwen3": lambda: tf.Qwen3MoeForCausalLM(
        tf.Qwen3MoeConfig(**SMALL, intermediate_size=40, moe_intermediate_size=16, num_experts=5, mlp_only_layers=[])
    ),
    "gpt-oss": lambda: tf.GptOssForCausalLM(tf.GptOssConfig(**SMALL, **OSS)),
    "qwen2": lambda: tf.Qwen2MoeForCausalLM(
        tf.Qwen2MoeConfig(
            **SMALL, intermediate_size=40, moe_intermediate_size=16, shared_expert_intermediate_size=8, num_experts=3
        )
    ),
    "qwen3 with a dense block": lambda: tf.Qwen3MoeForCausalLM(
        tf.Qwen3MoeConfig(**SMALL, intermediate_size=40, moe_intermediate_size=16, num_experts=5, mlp_only_layers=[0])
    ),
}
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
ROUTERS = {"mixtral": "gate.weight", "qwen3": "gate.weight", "gpt-oss": "router.weight"}
CASES = {
    "experts": dict(target_modules=[], target_parameters=EXPERTS),
    "one of two": dict(target_modules=[], target_parameters=["experts.down_proj"]),
    "with attention": dict(target_modules=["q_proj", "o_proj"], target_parameters=EXPERTS),
    "all-linear": dict(target_modules="all-linear"),
    "rsLoRA and patterns": dict(
        target_modules=["v_proj"], target_parameters=EXPERTS, use_rslora=True,
        rank_pattern={"down_proj": 2, "layers.1.self_attn.v_proj": 7}, alpha_pattern={"gate_up_proj": 5},
    ),
    "with a module in full": dict(target_modules=[], target_parameters=EXPERTS, modules_to_save=["lm_head"]),
}  # fmt: skip


def base(kind, dtype=torch.float64, seed=0, implementation="eager"):
    torch.manual_seed(seed)
    model = KINDS[kind]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0 if parameter.dim() > 1 else 1, 0.2)
    model.set_experts_implementation(implementation)
    return model.to(dtype).eval()


def quietly(make, *arguments, **named):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make(*arguments, **named)


def pair(kind, case, dtype=torch.float64, seed=0, implementation="eager", r=3, alpha=7):
    """Our model and peft's, with equal weights and adapters."""
    settings = CASES[case] if isinstance(case, str) else case
    torch.manual_seed(seed + 100)
    ours = quietly(pl.attach, base(kind, dtype, seed, implementation), pl.LoRAConfig(r=r, alpha=alpha, **settings))
    config = peft.LoraConfig(r=r, lora_alpha=alpha, init_lora_weights=False, **json.loads(json.dumps(settings)))
    theirs = quietly(peft.get_peft_model, base(kind, dtype, seed, implementation), config)
    state, found = our_state(ours), get_peft_model_state_dict(theirs)
    assert {key: (value.shape, value.dtype) for key, value in state.items()} == {
        key: (value.shape, value.dtype) for key, value in found.items()
    }
    with torch.no_grad():
        for key, value in state.items():
            value.copy_(found[key])
    return ours.train(), theirs.train()


def tokens(rows=3, length=9):
    return torch.randint(3, 37, (rows, length), generator=torch.Generator().manual_seed(1))


def gradients(theirs):
    return {
        name.replace(".modules_to_save", "").replace(".default", ""): p.grad
        for name, p in theirs.named_parameters()
        if p.requires_grad
    }


def check_three_steps(ours, theirs, bound):
    x, pairs = tokens(), []
    for model in (ours, theirs):
        pairs.append(torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2))
    with pl.disabled(ours), torch.no_grad():
        alone = ours(x).logits
    for step in range(3):
        mine, other = ours(input_ids=x, labels=x), theirs(input_ids=x, labels=x)
        assert torch.isfinite(other.loss) and (step or relative(mine.logits, alone) > 1e-2)
        assert relative(mine.logits, other.logits) <= bound
        mine.loss.backward()
        other.loss.backward()
        expected = gradients(theirs)
        for key, parameter in our_state(ours).items():
            assert parameter.grad.abs().max() > 0
            assert relative(parameter.grad, expected[key]) <= bound, key
        for optimizer in pairs:
            optimizer.step()
            optimizer.zero_grad()
    found = get_peft_model_state_dict(theirs)
    assert all(relative(value, found[key]) <= bound for key, value in our_state(ours).items())


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", ["mixtral", "qwen3", "gpt-oss"])
def test_forward_gradients_and_three_steps(kind, case):
    for seed in (0, 1):
        check_three_steps(*pair(kind, case, seed=seed), bound=1e-12)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("kind", ["mixtral", "qwen3", "gpt-oss"])
def test_every_implementation_of_the_experts_in_16_bits(kind, implementation):
    skip_before("peft", "0.21", "in 16 bits it rounds elsewhere")
    case = "all-linear" if kind != "gpt-oss" else "with attention"
    check_three_steps(*pair(kind, case, torch.bfloat16, implementation=implementation), bound=0)


def test_under_autocast():
    skip_before("peft", "0.21", "in 16 bits it rounds elsewhere")
    for case in ("all-linear", dict(target_modules=[], target_parameters=["gate.weight"])):
        ours, theirs = pair("mixtral", case, torch.float32, implementation="grouped_mm")
        with torch.autocast("cpu", torch.bfloat16):
            mine, other = ours(tokens(), labels=tokens()), theirs(input_ids=tokens(), labels=tokens())
        assert torch.equal(mine.logits, other.logits)
        mine.loss.backward()
        other.loss.backward()
        expected = gradients(theirs)
        assert all(torch.equal(value.grad, expected[key]) for key, value in our_state(ours).items())


@pytest.mark.parametrize("kind", ROUTERS)
def test_a_router_that_is_named(kind):
    check_three_steps(*pair(kind, dict(target_modules=[], target_parameters=[ROUTERS[kind]])), bound=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_all_linear_trains_what_peft_trains(kind):
    ours, theirs = pair(kind, "all-linear")  # equal keys and shapes
    trained = {key.split("layers.1.")[1].split(".lora_")[0] for key in our_state(ours) if "layers.1." in key}
    fused = kind in ("mixtral", "qwen3", "qwen3 with a dense block")
    assert fused == ("mlp.experts" in trained) == ("mlp.gate" in trained)
    if fused:
        inner = next(v for k, v in our_state(ours).items() if k.endswith("experts.base_layer.lora_A.weight"))
        assert inner.shape[0] == 2 * 3 * ours.config.num_local_experts  # the fused gate and up get twice the rank
    with torch.no_grad():
        assert relative(ours(tokens()).logits, theirs(tokens()).logits) < 1e-12


@pytest.mark.parametrize("names", [["gate_proj", "up_proj"], ["gate"], ["k_proj", "down_proj"], ["mlp.gate", "q_proj"]])
def test_older_names_of_the_layers_mean_what_they_mean_in_peft(names):
    check_three_steps(*pair("qwen3", dict(target_modules=names)), bound=1e-12)
    if names == ["gate"]:
        with pytest.raises(PeftLabError, match="names gate_proj and not up_proj.*fused into gate_up_proj"):
            pl.attach(base("qwen3"), pl.LoRAConfig(target_modules=["gate_proj"]))


def test_the_models_whose_names_are_brought_to_the_new_form():
    skip_before("peft", "0.21", "it knows fewer of these models")
    conversion = pytest.importorskip("peft.utils.transformers_weight_conversion")
    known = conversion._MODEL_TO_CONVERSION_PATTERN
    theirs = {name for name, pattern in known.items() if pattern in ("mixtral", "qwen2_moe")}
    assert set(OLD_NAMES) >= {name for name in theirs if name.islower()}
    for name, old in OLD_NAMES.items():
        assert dict(old.now) == conversion._MOE_TARGET_MODULE_MAPPING[known[name]]
        assert {key: list(value) for key, value in old.fused.items()} == conversion._MOE_FUSED_TARGETS[known[name]]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", ["mixtral", "gpt-oss"])
def test_folders_both_ways(kind, case, tmp_path):
    ours, theirs = pair(kind, case)
    x = tokens()
    with torch.no_grad():
        expected = theirs.eval()(input_ids=x).logits
    quietly(theirs.save_pretrained, tmp_path / "theirs")
    loaded = quietly(pl.load_adapter, base(kind), tmp_path / "theirs")
    quietly(pl.save_adapter, ours, tmp_path / "ours")
    opened = quietly(peft.PeftModel.from_pretrained, base(kind), tmp_path / "ours")
    again = quietly(pl.load_adapter, base(kind), tmp_path / "ours")
    quietly(pl.save_adapter, loaded, tmp_path / "again")
    once_more = quietly(peft.PeftModel.from_pretrained, base(kind), tmp_path / "again")
    with torch.no_grad():
        for model in (loaded, opened, again, once_more):
            assert relative(model.eval()(input_ids=x).logits, expected) < 1e-12


OLDER = {
    "mixtral": ("block_sparse_moe", {"w1": (24, 40), "w3": (24, 40), "w2": (40, 24)}, 3),
    "qwen3": ("mlp", {"gate_proj": (24, 16), "up_proj": (24, 16), "down_proj": (16, 24)}, 5),
}


@pytest.mark.parametrize("kind", OLDER)
@pytest.mark.parametrize("left_out", [None, "down_proj"])
def test_a_folder_from_when_each_expert_had_layers_of_its_own(kind, left_out, tmp_path):
    pytest.importorskip("peft.utils.transformers_weight_conversion")
    block, layers, experts = OLDER[kind]
    if left_out:
        layers = dict(list(layers.items())[:2])
    shapes = {f"{block}.experts.{e}.{name}": sizes for e in range(experts) for name, sizes in layers.items()}
    shapes |= {f"{block}.gate": (24, experts), "self_attn.q_proj": (24, 32)}
    tensors = {}
    for path, (inside, outside) in shapes.items():
        for i in range(2):
            start = f"base_model.model.model.layers.{i}.{path}"
            tensors[f"{start}.lora_A.weight"] = torch.randn(2, inside).double()
            tensors[f"{start}.lora_B.weight"] = torch.randn(outside, 2).double()
    config = dict(peft_type="LORA", r=2, lora_alpha=6, target_modules=["q_proj", "gate", *layers])
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    ours = pl.load_adapter(base(kind), tmp_path)
    first, second, *_ = layers
    start = f"base_model.model.model.layers.1.{block}.experts.2."
    each = [tensors[f"{start}{n}.lora_B.weight"] @ tensors[f"{start}{n}.lora_A.weight"] for n in (first, second)]
    part = ours.model.layers[1].mlp.experts.peftlab["default"]["lora_gate_up_proj"]
    assert relative(part.delta()[2], torch.cat(each) * 3) < 1e-12
    if not left_out:  # peft asks for gate and up under a key that they have only beside the third
        theirs = quietly(peft.PeftModel.from_pretrained, base(kind), tmp_path)
        found = get_peft_model_state_dict(theirs)
        assert all(torch.equal(value, found[key]) for key, value in our_state(ours).items())
        with torch.no_grad():
            assert relative(ours(tokens()).logits, theirs(tokens()).logits) < 1e-12
    name = next(iter(layers))
    save_file(
        {key: value for key, value in tensors.items() if f"experts.1.{name}." not in key},
        tmp_path / "adapter_model.safetensors",
    )
    with pytest.raises(PeftLabError, match=f"lacks lora_A of .*experts.1.{name}, which is fused"):
        pl.load_adapter(base(kind), tmp_path)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3", "gpt-oss"])
def test_merging_is_that_of_peft_and_is_taken_back_bit_for_bit(kind):
    case = "all-linear" if kind != "gpt-oss" else "with attention"
    ours, theirs = pair(kind, case)
    x = tokens()
    before = {name: value.clone() for name, value in base(kind).state_dict().items()}
    with torch.no_grad():
        attached = ours(x).logits
        assert pl.merge(ours).relative_error < 1e-12
        assert relative(ours(x).logits, attached) < 1e-12
        pl.unmerge(ours)
        assert torch.equal(ours(x).logits, attached)
        merged = theirs.merge_and_unload()
        pl.merge(ours, unload=True)
    for name, value in merged.state_dict().items():
        assert relative(ours.state_dict()[name], value) < 1e-12
    ours, _ = pair(kind, case)
    pl.detach(ours)
    assert all(torch.equal(value, before[name]) for name, value in ours.state_dict().items())
    assert not any("forward" in vars(module) for module in ours.modules())


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("kind", ["mixtral", "qwen3", "gpt-oss"])
def test_four_bit_experts(kind, implementation):
    model = base(kind, torch.bfloat16, implementation=implementation)
    whole = dict(base(kind, torch.bfloat16).named_parameters())
    for double_quant in (True, False):
        held = quietly(pl.quantize_model, base(kind, torch.bfloat16), double_quant=double_quant)
        for name, codes in held.named_parameters():
            if whole[name].dim() == 3:
                for e, expert in enumerate(whole[name].detach()):
                    alone = pl.quantize_nf4(expert, double_quant=double_quant)
                    packed, state = bnb.quantize_4bit(expert, compress_statistics=double_quant, quant_type="nf4")
                    assert torch.equal(codes[e], alone.packed.flatten()) and torch.equal(codes[e], packed.flatten())
                    assert torch.equal(dense(codes)[e], alone.dequantize())
                    row = bnb.dequantize_4bit(packed.view(-1, 1), state).flatten()  # its AVX code errs within blocks
                    assert expert.shape[-1] % 64 or torch.equal(dense(codes)[e].flatten(), row)
            elif "router" in name or "gate.weight" in name:
                assert torch.equal(codes, whole[name])
    pl.quantize_model(model)
    plain = pl.dequantize_model(quietly(pl.quantize_model, base(kind, torch.bfloat16, implementation=implementation)))
    inputs = torch.randn(2, 7, 24, generator=torch.Generator().manual_seed(0)).bfloat16()
    found = []
    for one in (model, plain):
        one.requires_grad_(False)
        embedded = inputs.clone().requires_grad_()
        one(inputs_embeds=embedded, labels=tokens(2, 7)).loss.backward()
        found.append(embedded.grad)
    assert torch.equal(*found) and found[0].abs().max() > 0
    for one in (model, plain):
        torch.manual_seed(0)
        pl.attach(one, pl.LoRAConfig(r=3, alpha=7, init="random", **CASES["with attention"]))
        one(tokens(), labels=tokens()).loss.backward()
    expected = our_state(plain)
    assert all(torch.equal(value.grad, expected[key].grad) for key, value in our_state(model).items())


@pytest.mark.parametrize("four_bit", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same_gradients(reentrant, four_bit):
    found = []
    for checkpointing in (False, True):
        model = base("qwen3", torch.float32, implementation="grouped_mm")
        model = pl.quantize_model(model) if four_bit else model
        torch.manual_seed(3)
        pl.attach(model, pl.LoRAConfig(r=2, init="random", target_modules="all-linear")).train()
        if checkpointing:
            switch_checkpointing(model, "enable", {"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model(tokens(), labels=tokens(), use_cache=False).loss.backward()
        found.append({key: value.grad for key, value in our_state(model).items()})
    assert all(torch.equal(value, found[1][key]) for key, value in found[0].items())
