"""Which modules a config means, and what is said when it means none."""

import pytest
import torch
from nets import Net, assert_same, snapshot
from tiny import llama
from torch import nn

import peftlab as pl
from peftlab.core.targets import by_pattern, find, in_any_order, linear_shape


def paths(model, **settings):
    return list(find(model, pl.LoRAConfig(**settings)))


def test_names_endings_regex_and_all_linear():
    model = llama(layers=3)
    assert paths(model) == [f"model.layers.{i}.self_attn.{p}_proj" for i in range(3) for p in "qv"]
    assert paths(model, target_modules=["layers.1.mlp.up_proj"]) == ["model.layers.1.mlp.up_proj"]
    assert paths(model, target_modules=["mlp.up_proj"], layers_to_transform=[2]) == ["model.layers.2.mlp.up_proj"]
    assert paths(model, target_modules=r".*\.0\..*_proj", exclude_modules=r".*mlp.*") == [
        f"model.layers.0.self_attn.{p}_proj" for p in "qkvo"
    ]
    linear = paths(model, target_modules="all-linear")
    assert len(linear) == 21 and "lm_head" not in linear
    assert paths(model, target_modules="ALL-linear") == linear


def test_a_name_is_no_ending_of_another_name():
    model = nn.Module()
    model.proj, model.q_proj, model.inner = nn.Linear(2, 2), nn.Linear(2, 2), nn.Module()
    model.inner.proj = nn.Linear(2, 2)
    assert paths(model, target_modules=["proj"]) == ["proj", "inner.proj"]


def test_all_linear_takes_exact_paths():
    """The output head is left out even where its path ends like another layer's."""
    model = Net()
    model.proj = nn.Linear(6, 6)
    model.out = nn.Module()
    model.out.proj = nn.Linear(6, 5)
    model.get_output_embeddings = lambda: model.out.proj
    found = paths(model, target_modules="all-linear")
    assert "proj" in found and "out.proj" not in found
    assert {"blocks.0.up", "blocks.1.down", "head"} < set(found) and "embed" not in found


def test_layers_count_from_the_first_number_or_the_named_list():
    model = nn.Module()
    model.layers = nn.ModuleList(nn.Module() for _ in range(2))
    for layer in model.layers:
        layer.experts = nn.ModuleList(nn.Module() for _ in range(3))
        for expert in layer.experts:
            expert.up = nn.Linear(2, 2)
    assert paths(model, target_modules=["up"], layers_to_transform=[2], layers_pattern="experts") == [
        f"layers.{i}.experts.2.up" for i in range(2)
    ]
    outer = nn.Module()
    outer.net = model
    assert all(path.startswith("net.layers.1.") for path in paths(outer, target_modules=["up"], layers_to_transform=1))


@pytest.mark.parametrize("settings, said", [
    (dict(target_modules=["q_prj"]), "Did you mean 'q_proj'"),
    (dict(target_modules=["q_proj", "w_proj"]), "'w_proj', which matches no module"),
    (dict(target_modules="q_proj"), r"as a name, give it in a list: \['q_proj'\]"),
    (dict(target_modules="q_prj"), r"matches no module's whole path\. Did you mean 'q_proj'"),
    (dict(target_modules="*q_proj"), "no regular expression"),
    (dict(target_modules=["q_proj"], exclude_modules=["q_proj"]), "leave no target module"),
    (dict(target_modules=["q_proj"], exclude_modules="(["), "no regular expression"),
    (dict(target_modules=["q_proj"], layers_to_transform=[5]), "block 5; .* blocks 0 to 1"),
    (dict(target_modules=["lm_head"], layers_to_transform=[0]), "no numbered blocks"),
    (dict(target_modules=["mlp"]), "is a LlamaMLP.*Inside it: .*gate_proj"),
    (dict(target_modules=["norm"]), "is a LlamaRMSNorm"),
    (dict(modules_to_save=["lm_hat"]), "Did you mean 'lm_head'"),
    (dict(modules_to_save=["rotary_emb"]), "without parameters"),
    (dict(modules_to_save=["mlp", "up_proj"]), "which holds it"),
    (dict(target_modules=["lm_head"], modules_to_save=["layers"]), "is a list. Name model.layers.0"),
    (dict(task_type="SEQ_CLS"), "no head called classifier or score"),
    (dict(rank_pattern={"k_proj": 4}), "'k_proj' matches none"),
    (dict(bias="lora-only"), "Did you mean 'lora_only'"),
    (dict(target_modules=["embed_tokens"], lora_bias=True), "cannot be used on an embedding"),
])  # fmt: skip
def test_mistakes_are_named_and_change_nothing(settings, said):
    model = llama()
    before = snapshot(model)
    with pytest.raises(pl.PeftLabError, match=said):
        pl.attach(model, pl.LoRAConfig(**settings))
    assert_same(before, snapshot(model))


@pytest.mark.parametrize("settings", [
    dict(target_modules=[]), dict(target_modules=[3]), dict(target_modules=7), dict(modules_to_save="lm_head"),
    dict(layers_to_transform=[-1]), dict(layers_to_transform=[True]), dict(layers_to_transform=[]),
    dict(layers_pattern="layers"), dict(layers_pattern="(", layers_to_transform=1), dict(rank_pattern={"(": 2}),
    dict(task_type="CLASSIFY"), dict(exclude_modules=[""]), dict(target_modules=b"q"),
])  # fmt: skip
def test_wrong_types_are_refused_at_once(settings):
    with pytest.raises(pl.PeftLabError):
        pl.LoRAConfig(**settings)


def test_attention_that_reads_its_weight_is_refused():
    """nn.MultiheadAttention never calls out_proj, so an adapter there would train nothing, silently."""
    model = nn.Sequential(nn.Linear(4, 4), nn.MultiheadAttention(4, 2))
    before = snapshot(model)
    for settings in (dict(target_modules=["out_proj"]), dict(target_modules="all-linear")):
        with pytest.raises(pl.PeftLabError, match="MultiheadAttention"):
            pl.attach(model, pl.LoRAConfig(**settings))
    with pytest.raises(pl.PeftLabError, match="not simply added"):
        pl.attach(model, pl.LoRAConfig(target_modules=["0"], bias="all"))
    assert_same(before, snapshot(model))
    pl.attach(model, pl.LoRAConfig(target_modules="all-linear", exclude_modules=["1.out_proj"]))


def test_the_fused_encoder_does_not_pass_an_adapter_by():
    """nn.TransformerEncoderLayer has a fused path in eval mode that calls none of its layers."""
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True, dropout=0.0).eval()
    x = torch.randn(2, 3, 4)
    with torch.no_grad():
        before = layer(x)
        pl.attach(layer, pl.LoRAConfig(target_modules=["linear1"], init="random"))
        assert not torch.allclose(layer(x), before)
        pl.detach(layer)
        assert torch.equal(layer(x), before)


def test_shapes():
    assert linear_shape(nn.Linear(3, 5)) == (3, 5)
    assert linear_shape(nn.Embedding(7, 2)) == (7, 2)
    assert linear_shape(Net().blocks[0].down) == (11, 6)
    assert linear_shape(nn.LayerNorm(3)) is None


def test_default_targets_of_an_unknown_model():
    with pytest.raises(pl.PeftLabError, match="its linear layers end in .*down"):
        pl.attach(Net(), pl.LoRAConfig())


def test_a_method_takes_the_modules_that_it_names_by_default():
    model = llama()
    assert list(find(model, pl.LoRAConfig(), ["o_proj", "c_proj"])) == [
        f"model.layers.{i}.self_attn.o_proj" for i in range(2)
    ]
    assert list(find(model, pl.LoRAConfig(target_modules=["up_proj"]), ["c_proj"]))[0].endswith("up_proj")
    for default, named in ((("c_proj", "out"), r" \(c_proj, out\)"), (lambda modules: {}, "")):
        # the message once named fields that nobody had set
        said = rf"target_modules is not set, and LlamaForCausalLM .*LoRAConfig takes by default{named}\. Name .*v_proj"
        with pytest.raises(pl.PeftLabError, match=said):
            find(model, pl.LoRAConfig(), default)


def test_a_pattern_table_means_the_same_in_any_order():
    """A file sorts its keys, and the first key that matches counts."""
    paths = ["a.up", "a.down", "b.up", "b.down", "head"]
    for table, kept in (({"up": 1, "down": 2}, True), ({"b.up": 4, "up": 1}, True), ({"up": 1, "a.*": 4}, False),
                        ({r"[ab]\.up": 1, ".*": 3}, False)):  # fmt: skip
        found = in_any_order(table, paths)
        assert (found == table) == kept, table
        for keys in (sorted(found), sorted(found, reverse=True)) if not kept else (sorted(found),):
            ordered = {key: found[key] for key in keys}
            assert [by_pattern(ordered, path, 0) for path in paths] == [by_pattern(table, path, 0) for path in paths]


def test_experts_that_all_linear_leaves_alone_are_named():
    model = Net()
    model.experts = nn.Module()
    model.experts.weight = nn.Parameter(torch.zeros(3, 6, 6))
    with pytest.warns(UserWarning, match="'all-linear' does not adapt the experts of Net .experts and 0 more"):
        paths(model, target_modules="all-linear")
