"""Adapters on parameters: rows, mixtures, errors, what an interruption leaves, what the backward pass keeps."""

import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
import transformers as tf

import peftlab as pl
from peftlab.core import parameters
from peftlab.errors import PeftLabError
from peftlab.quantization.weights import dense

SMALL = dict(
    vocab_size=37, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=2, max_position_embeddings=64, num_local_experts=3, num_experts_per_tok=2,
)  # fmt: skip
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
X = torch.randint(0, 37, (3, 7), generator=torch.Generator().manual_seed(0))


def mixtral(dtype=torch.float32, **changes):
    torch.manual_seed(0)
    config = tf.MixtralConfig(**{**SMALL, **changes})
    model = tf.MixtralForCausalLM._from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0 if parameter.dim() > 1 else 1, 0.3)
    return model


def adapted(model=None, name="default", **settings):
    settings = {"r": 3, "init": "random", "target_parameters": EXPERTS, **settings}
    return pl.attach(mixtral() if model is None else model, pl.LoRAConfig(**settings), name)


def moved(a, b):
    return (a - b).abs().max().item()


@pytest.mark.parametrize("four_bit", [False, True])
@torch.no_grad()
def test_an_adapter_for_each_row_is_that_rows_adapter_alone(four_bit):
    model = mixtral()
    model = pl.quantize_model(model) if four_bit else model
    adapted(model, "a", target_parameters=[*EXPERTS, "gate.weight"])  # the router then chooses other experts
    adapted(model, "b", r=2, target_modules=["q_proj"])
    expected = {}
    for name in ("a", "b"):
        pl.activate(model, name)
        expected[name] = model(X).logits
    with pl.disabled(model):
        expected[None] = model(X).logits
    assert moved(expected["a"], expected["b"]) > 0.1 and moved(expected["a"], expected[None]) > 0.1
    for rows in (["b", None, "a"], ["a", "a", "b"]):
        pl.activate(model, rows)
        found = model(X).logits
        assert all(moved(found[i], expected[row][i]) < 1e-5 for i, row in enumerate(rows))


@torch.no_grad()
def test_a_mixture_is_the_mixture_of_the_weights():
    model = adapted(adapted(name="a"), "b")
    pl.activate(model, {"a": 0.5, "b": -2.0})
    found = model(X).logits
    pl.merge(model)
    assert moved(model(X).logits, found) < 1e-5
    pl.unmerge(model)
    assert torch.equal(model(X).logits, found)


def test_names_and_their_near_matches():
    model = mixtral()
    for names, message in {
        ("experts.gate_up",): "no parameter.* Did you mean 'experts.gate_up_proj'",
        ("mlp.experts.w2",): "experts here lie in experts.gate_up_proj, experts.down_proj",
        ("mlp.gate",): "It is a module; give it in target_modules, or 'mlp.gate.weight' here",
        "gate_up_proj": r"give a list of names, such as \['gate_up_proj'\]",
    }.items():
        with pytest.raises(PeftLabError, match=message):
            pl.attach(model, pl.LoRAConfig(target_parameters=names))
    for names, message in {
        "gate_up_proj": r"name of a parameter; LoRA adapts it by target_parameters=\['gate_up_proj'\]",
        "mlp.experts": r"is a MixtralExperts.* target_parameters=\['mlp.experts.gate_up_proj', 'mlp.experts.down_proj'",
    }.items():
        with pytest.raises(PeftLabError, match=message):
            pl.attach(model, pl.LoRAConfig(target_modules=[names]))
    assert not any("peftlab" in name for name, _ in model.named_modules())
    attached = adapted(target_parameters=["layers.1.mlp.experts.down_proj"])
    assert pl.count_parameters(attached).trainable == 3 * 3 * (16 + 24)
    assert {path for path, _ in attached.named_modules() if path.endswith("peftlab")} == {
        "model.layers.1.mlp.experts.peftlab"
    }


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(dropout=0.1), "dropout cannot be used with adapted parameters"),
        (dict(lora_bias=True), "lora_bias cannot be used"),
        (dict(fan_in_fan_out=True), "fan_in_fan_out cannot be used"),
        (dict(bias="all"), "bias='all' cannot be used"),
        (dict(layers_to_transform=0, target_modules=["q_proj"]), "Name the parameters block by block"),
        (dict(exclude_modules=["experts"]), "exclude_modules does not reach parameters"),
        (dict(modules_to_save=["mlp.experts"]), "modules_to_save trains .*mlp.experts in full"),
        (dict(target_modules=["q_proj"], target_parameters=["q_proj.weight"]), "and its module in target_modules"),
        (dict(target_parameters=["norm.weight"]), "has 1 dimensions"),
        (dict(target_modules="all-linear", dropout=0.5), "dropout cannot be used"),
        (dict(rank_pattern={"gate_up": 4}), "'gate_up' matches none of the 4 target modules and parameters"),
    ],
)
def test_what_cannot_stand_beside_it(settings, message):
    model = mixtral()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(PeftLabError, match=message):
        adapted(model, **settings)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any("forward" in vars(module) for module in model.modules())


def test_parameters_of_plain_layers_are_adapted_as_the_layers():
    a = adapted(target_modules=["q_proj"], target_parameters=None)
    b = adapted(target_parameters=["q_proj.weight"])
    mine, other = (dict(model.named_parameters()) for model in (a, b))
    with torch.no_grad():
        for name, value in mine.items():
            if "lora_" in name:
                other[name.replace(".lora.", ".lora_weight.")].copy_(value)
    assert moved(a(X).logits, b(X).logits) < 1e-5


def test_an_error_or_an_interruption_leaves_no_value_behind(monkeypatch):
    model = adapted()
    experts = model.model.layers[1].mlp.experts
    before = model(X).logits
    for error in (ValueError, KeyboardInterrupt):

        def broken(*_, error=error):
            raise error("now")

        monkeypatch.setattr(type(experts), "_apply_gate", broken)
        with pytest.raises(error):
            model(X)
        assert type(experts._parameters) is dict and "gate_up_proj" not in vars(experts)
        monkeypatch.undo()
        assert torch.equal(model(X).logits, before)
    assert torch._C._autograd._top_saved_tensors_default_hooks(False) is None


def test_two_threads_in_one_module_are_an_error():
    model = adapted()
    experts = model.model.layers[0].mlp.experts
    own, inside, go_on = experts.act_fn, threading.Event(), threading.Event()

    class Waiting(torch.nn.Module):
        def forward(self, x):
            inside.set()
            go_on.wait(10)
            return own(x)

    experts.act_fn = Waiting()
    found = []
    other = threading.Thread(target=lambda: found.append(model(X).logits))
    other.start()
    inside.wait(10)
    with pytest.raises(PeftLabError, match="running in another thread"):
        model(X)
    go_on.set()
    other.join()
    assert torch.equal(found[0], model(X).logits)


@pytest.mark.parametrize("four_bit", [False, True])
def test_no_value_is_kept_for_the_backward_pass(four_bit, monkeypatch):
    model = mixtral()
    model = adapted(pl.quantize_model(model) if four_bit else model).train()
    made, run_with = [], parameters.run_with

    def watched(values, host, forward, args, kwargs):
        def noted(*inputs, **named):
            made.extend(weakref.ref(getattr(host, name)) for name in values)
            return forward(*inputs, **named)

        return run_with(values, host, noted, args, kwargs)

    monkeypatch.setattr("peftlab.core.hooks.run_with", watched)
    loss = model(X, labels=X).loss
    gc.collect()
    assert len(made) == 4 and not any(value() is not None for value in made)
    loss.backward(retain_graph=True)
    first = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    loss.backward()  # once more, from the same notes
    assert all(torch.equal(p.grad, first[name]) for name, p in model.named_parameters() if p.requires_grad)


def test_a_parameter_written_to_before_the_backward_pass_is_an_error():
    for change in ("lora_B", "down_proj"):
        model = adapted().train()
        loss = model(X, labels=X).loss
        with torch.no_grad():
            next(p for name, p in model.named_parameters() if name.endswith(change)).mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_copies_pickles_and_casts():
    model = adapted(pl.quantize_model(mixtral(torch.bfloat16), double_quant=False))
    expected = model(X).logits
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(X).logits, expected)
        codes = other.model.layers[0].mlp.experts.down_proj
        codes.data.zero_()
        assert not torch.equal(other(X).logits, expected)
    assert torch.equal(model(X).logits, expected)
    scales = model.model.layers[0].mlp.experts.down_proj.quant_state.absmax
    model.half()
    assert torch.equal(model.model.layers[0].mlp.experts.down_proj.quant_state.absmax, scales)
    assert scales.dtype == torch.float32


@torch.no_grad()
def test_odd_sizes_have_blocks_of_their_own_in_each_expert():
    model = mixtral(hidden_size=12, intermediate_size=7)
    whole = dict(mixtral(hidden_size=12, intermediate_size=7).named_parameters())
    model.set_experts_implementation("eager")  # the grouped product takes no such sizes
    pl.quantize_model(model)
    name = "model.layers.0.mlp.experts.down_proj"
    codes = model.get_parameter(name)
    for e, expert in enumerate(whole[name]):
        alone = pl.quantize_nf4(expert)
        assert torch.equal(codes[e], alone.packed.flatten())
        assert torch.equal(dense(codes)[e], alone.dequantize())
    assert torch.isfinite(model(X).logits).all()
    assert pl.count_parameters(model).total == sum(value.numel() for value in whole.values())


def test_a_folder_of_four_bit_experts(tmp_path):
    model = pl.quantize_model(mixtral(torch.bfloat16))
    expected = model(X).logits
    folder = pl.save_quantized(adapted(copy.deepcopy(model)), tmp_path / "base")
    assert torch.equal(pl.load_quantized(folder)(X).logits, expected)
    other = pl.quantize_model(mixtral(torch.bfloat16))
    with torch.no_grad():
        other.model.layers[0].mlp.experts.down_proj.zero_()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(X).logits, expected)
    for one in (model, adapted(copy.deepcopy(model))):
        with pytest.raises(PeftLabError, match="save_pretrained has no form for .*save_quantized"):
            one.save_pretrained(tmp_path / "wrong")
    assert not list((tmp_path).glob("wrong/*"))
    pl.dequantize_model(model).save_pretrained(tmp_path / "whole")
    again = tf.MixtralForCausalLM.from_pretrained(tmp_path / "whole", dtype=torch.bfloat16)
    assert torch.equal(again(X).logits, model(X).logits)


def test_skip_and_the_router():
    model = pl.quantize_model(mixtral(), skip=["layers.0.mlp.experts", "layers.1.mlp.experts.down_proj"])
    held = {name for name, p in model.named_parameters() if hasattr(p, "quant_state") and "experts" in name}
    assert held == {"model.layers.1.mlp.experts.gate_up_proj"}
    assert model.model.layers[0].mlp.gate.weight.dtype == torch.float32
    with pytest.raises(PeftLabError, match="skip names 'experts.gate_up'.*Did you mean"):
        pl.quantize_model(mixtral(), skip=["experts.gate_up"])
    pl.quantize_model(model)  # what is left is quantised, what is held stays
    assert sum(hasattr(p, "quant_state") for name, p in model.named_parameters() if "experts" in name) == 4


def test_a_model_without_numbers_runs():
    with torch.device("meta"):
        model = tf.MixtralForCausalLM(tf.MixtralConfig(**SMALL)).bfloat16()
        adapted(model, target_modules="all-linear")
        loss = model(torch.zeros(2, 5, dtype=torch.long), labels=torch.zeros(2, 5, dtype=torch.long)).loss
    loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


class Experts(torch.nn.Module):
    """Three experts of one matrix each, (in, out)."""

    is_transposed = True

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(3, 4, 4))

    def forward(self, x, chosen):
        return torch.einsum("bi,bio->bo", x, self.weight[chosen])


class Mixture(torch.nn.Module):
    """A mixture whose router is a linear layer."""

    def __init__(self):
        super().__init__()
        self.router, self.up, self.experts = torch.nn.Linear(4, 3), torch.nn.Linear(4, 4), Experts()

    def forward(self, x):
        return self.experts(self.up(x), self.router(x).argmax(-1))


def test_a_router_that_is_a_linear_layer_stays_whole():
    torch.manual_seed(0)
    model = torch.nn.Sequential(Mixture())
    x = torch.randn(5, 4)
    routed, before = model[0].router(x), model[0].router.weight.clone()
    pl.quantize_model(model)
    assert torch.equal(model[0].router(x), routed) and torch.equal(model[0].router.weight, before)
    assert {name for name, p in model.named_parameters() if hasattr(p, "quant_state")} == {
        "0.up.weight", "0.experts.weight",
    }  # fmt: skip
    adapted(model, target_parameters=["experts.weight"], r=2)
    expected = model[0].up(x)
    weight = dense(model[0].experts.weight) + model[0].experts.peftlab["default"]["lora_weight"].delta()
    expected = torch.stack([row @ weight[e] for row, e in zip(expected, routed.argmax(-1), strict=True)])
    assert moved(model(x), expected) < 1e-5
    with pytest.raises(PeftLabError, match="names 'weight', which lies on the model itself"):
        pl.attach(Experts(), pl.LoRAConfig(target_parameters=["weight"]))


def test_a_replaced_forward_or_parameter_is_found():
    model = adapted()
    experts = model.model.layers[0].mlp.experts
    del experts.__dict__["forward"]
    with pytest.raises(PeftLabError, match="mlp.experts was replaced, and what adapter 'default' had there is lost"):
        model(X)


def test_serving_programs_and_the_portable_form(tmp_path):
    model = adapted(target_modules=["q_proj"], alpha=6)
    with pytest.warns(UserWarning, match="vLLM.* merge the adapter into the base"):
        pl.save_adapter(model, tmp_path / "own")
    with pytest.raises(PeftLabError, match="no portable form"):
        pl.save_adapter(model, tmp_path / "portable", portable=True)


def test_names_that_mean_experts_leave_linear_layers_of_that_name_out():
    sizes = {name: value for name, value in SMALL.items() if "local" not in name}
    config = tf.Qwen3MoeConfig(**sizes, head_dim=8, moe_intermediate_size=8, num_experts=3, mlp_only_layers=[0])
    with pytest.warns(UserWarning, match="3 linear layers mean the experts.*layers.0.mlp.gate_proj"):
        pl.attach(tf.Qwen3MoeForCausalLM(config), pl.LoRAConfig(target_modules="all-linear"))
