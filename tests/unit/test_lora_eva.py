"""EVA's start: what its directions are, the model as it was, and what is refused."""

import pytest
import tiny
import torch
from nets import Net, assert_same, snapshot, tokens

import peftlab as pl
from peftlab.methods.lora_eva import Directions


def texts(count=2, rows=6, length=12):
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(0, 32, (rows, length), generator=generator)} for _ in range(count)]


def eva(model, data, **settings):
    return pl.attach(model, pl.LoRAConfig(**{"r": 3, "init": "eva", **settings}), data=data)


def part_of(model, path):
    return model.get_submodule(path).peftlab["default"]["lora"]


def test_directions_are_those_of_all_rows_about_their_mean():
    torch.manual_seed(0)
    x = torch.randn(90, 8) @ torch.diag(torch.tensor([9.0, 6, 4, 1, 0.5, 0.3, 0.2, 0.1])) + 3
    one = Directions(3, tau=0.99)
    for rows in (x[:20], x[20:22], x[22:50], x[50:]):  # the second batch has too few rows, and is passed over
        one.add(rows)
    rows = torch.cat([x[:20], x[22:]])
    _, s, vt = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)
    torch.testing.assert_close((one.v @ vt[:3].T.double()).abs(), torch.eye(3).double(), atol=1e-2, rtol=0)
    torch.testing.assert_close(one.s.float(), s[:3], rtol=1e-3, atol=0)
    torch.testing.assert_close(one.shares().float(), s[:3] ** 2 / (s**2).sum(), rtol=1e-3, atol=0)
    assert one.still.dtype == torch.bool and one.v.gather(1, one.v.abs().argmax(1, keepdim=True)).gt(0).all()


def test_it_starts_where_the_base_is_and_leaves_it_there():
    model = tiny.llama()
    model.model.layers[0].eval()  # modes of its own
    ids, was = torch.arange(6)[None], snapshot(model)
    before, drawn = model(ids).logits, torch.get_rng_state()
    eva(model, (batch for batch in texts()), init_options={"rho": 1.0})  # a generator is read once, and kept
    assert torch.equal(model(ids).logits, before)
    part = part_of(model, "model.layers.0.self_attn.q_proj")
    torch.testing.assert_close(part.lora_A @ part.lora_A.T, torch.eye(3), atol=1e-5, rtol=0)
    assert not part.lora_B.any()
    assert drawn.shape == torch.get_rng_state().shape
    pl.detach(model)
    assert_same(snapshot(model), was)


def test_ranks_move_and_alpha_with_them(tmp_path):
    model = eva(tiny.llama(), texts(), target_modules="all-linear", alpha=6)
    config = pl.attached(model)["default"]
    ranks = {path: len(value) for path, value in parts(model).items()}
    assert sum(ranks.values()) == 14 * 3 and len(set(ranks.values())) > 1 and max(ranks.values()) <= 6
    assert all(model.get_submodule(path).peftlab["default"]["lora"].scaling == pytest.approx(2) for path in ranks)
    assert set(config.rank_pattern.values()) >= {rank for rank in ranks.values() if rank != 3}
    pl.save_adapter(model, tmp_path, portable=True)
    again = pl.load_adapter(tiny.llama(), tmp_path)
    ids = torch.arange(6)[None]
    assert torch.equal(again(ids).logits, model(ids).logits)


def parts(model):
    return {name.partition(".peftlab")[0]: p for name, p in model.named_parameters() if name.endswith("lora_A")}


def test_padding_and_tokens_without_a_label_do_not_count():
    data = texts(1)
    data[0]["attention_mask"] = torch.ones(6, 12, dtype=torch.long)
    data[0]["attention_mask"][:, 10:] = 0
    data[0]["labels"] = data[0]["input_ids"].clone()
    data[0]["labels"][:, :2] = -100
    changed = {**data[0], "input_ids": data[0]["input_ids"].clone()}
    changed["input_ids"][:, 10:] = 5
    one, other = (eva(tiny.llama(), [d], target_modules=["q_proj"]) for d in (data[0], changed))
    assert all(map(torch.equal, parts(one).values(), parts(other).values()))
    changed["input_ids"][:, 4] = 5
    other = eva(tiny.llama(), [changed], target_modules=["q_proj"])
    assert not all(map(torch.equal, parts(one).values(), parts(other).values()))


def test_other_adapters_do_not_take_part():
    one = eva(tiny.llama(), texts())
    other = pl.attach(tiny.llama(), pl.LoRAConfig(init="random", target_modules=["o_proj"]), name="first")
    eva(other, texts())
    for path, a in parts(one).items():
        assert torch.equal(a, part_of(other, path).lora_A)
    assert set(pl.attached(other)) == {"first", "default"}


@pytest.mark.parametrize("model", [
    lambda: Net(dtype=torch.float32), lambda: pl.quantize_model(tiny.llama(), block_size=64),
    lambda: tiny.llama(dtype=torch.bfloat16),
])  # fmt: skip
def test_other_models(model):
    model = model()
    plain = isinstance(model, Net)
    data = [(tokens(20),), tokens(20, seed=1)] if plain else texts()
    eva(model, data, target_modules=["up", "down"] if plain else ["q_proj", "up_proj"])
    assert all(a.dtype == (torch.float32) or plain for a in parts(model).values())


def test_a_rank_above_the_width_takes_all_directions():
    model = eva(tiny.llama(), texts(), r=15, target_modules=["q_proj", "o_proj"])
    assert max(len(a) for a in parts(model).values()) <= 16


@pytest.mark.parametrize(
    "settings, data, message",
    [
        ({}, None, r"init='eva' starts from the inputs of the layers: pl.attach\(model, config, data=batches\)"),
        ({}, [], "data holds no batch"),
        ({}, 3, "data is 3; give a list of batches"),
        ({}, "texts", "data is 'texts'; give a list of batches"),
        ({}, [None], "data holds None; its entries are batches"),
        ({}, texts(1, rows=1, length=4), "have fewer tokens that count .the first has 4"),
        ({"target_modules": ["embed_tokens"]}, texts(), "embed_tokens is a Embedding. Leave it out"),
        ({"init": "kaiming"}, texts(), r"LoRAConfig\(init='kaiming'\) starts from no data"),
        ({"init": "pissa"}, texts(), r"LoRAConfig\(init='pissa'\) starts from no data"),
        ({"init_options": {"rho": 0.5}}, texts(), "'rho'.*at least 1"),
        ({"init_options": {"rh": 2}}, texts(), "Did you mean 'rho'"),
        ({"init_options": {"whiten": 3}}, texts(), "'whiten'.*must be one of True, False"),
        ({"init": "pissa", "init_options": {"rho": 2}}, None, "init_options are for init='eva'"),
    ],
)
def test_refused(settings, data, message):
    model = tiny.llama()
    was = snapshot(model)
    with pytest.raises(pl.PeftLabError, match=message):
        eva(model, data, **settings)
    assert_same(snapshot(model), was)


def test_other_methods_take_no_data():
    for config in (pl.IA3Config(), pl.PromptTuningConfig(num_virtual_tokens=2)):
        with pytest.raises(pl.PeftLabError, match="starts from no data"):
            pl.attach(tiny.llama(), config, data=texts())
