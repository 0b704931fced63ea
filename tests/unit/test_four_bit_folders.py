"""4-bit folders that are damaged, malformed or mixed up: one clear error before anything is computed."""

import json
import random
import shutil
import time
import warnings

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import llama
from transformers import BitsAndBytesConfig, GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

import peftlab as pl
from peftlab.core.sums import with_sums
from peftlab.optional import available
from peftlab.quantization import serialised

C, W = "config.json", "model.safetensors"
IDS = torch.tensor([[3, 4, 5, 6]])
LAYER = "model.layers.0.mlp.up_proj.weight"
MARK = f"{LAYER}.quant_state.bitsandbytes__nf4"


@pytest.fixture(scope="module", params=[True, False], ids=["double", "single"])
def saved(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("four")
    model = pl.quantize_model(llama(hidden_size=64, intermediate_size=128, layers=1), double_quant=request.param)
    return pl.save_quantized(model, folder)


@pytest.fixture
def folder(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "four")
    return tmp_path / "four"


def rewrite(folder, change, sums):
    """Changes the tensors; with sums it is as a program of bad will writes it, without as Hugging Face's does."""
    tensors = load_file(folder / W)
    change(tensors)
    metadata = {"format": "pt"}
    if sums:
        metadata = with_sums(tensors, json.loads((folder / C).read_text()), metadata)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / W, metadata)


def facts(**changes):
    """A change of the record that lies in bytes beside a weight."""

    def change(tensors):
        fields = json.loads(bytes(tensors[MARK].tolist())) | changes
        text = json.dumps({name: value for name, value in fields.items() if value is not ...})
        tensors[MARK] = torch.tensor(list(text.encode()), dtype=torch.uint8)

    return change


def tensor(name, change):
    def changed(tensors):
        key = f"{LAYER}.{name}" if name else LAYER
        tensors[key] = change(tensors[key])

    return changed


def at(value, index=0):
    def change(tensor):
        tensor = tensor.clone()
        tensor.view(-1)[index] = value
        return tensor

    return change


NUMBERS = (0, -64, 3, 10**9, 2**40, 64.0, "64", None, True, [64])
MALFORMED = {
    **{f"blocksize {value!r}": facts(blocksize=value) for value in NUMBERS},
    "twice the blocksize": facts(blocksize=128),
    "no blocksize": facts(blocksize=...),
    **{
        f"dtype {value!r}": facts(dtype=value)
        for value in ("float8_e4m3fn", "int8", "quint8", "load", "__class__", "Tensor", None, 7, ...)
    },
    **{
        f"shape {value!r}": facts(shape=value)
        for value in ([], [64], [128, 63], [64, 128], [128, -64], [10**9] * 2, [0, 64], "ab", None, [128, 64.0], [[1]])
    },
    **{f"type {value!r}": facts(quant_type=value) for value in ("fp4", "int4", "nf3", None, ["nf4"], {"a": 1})},
    "the record cut": tensor("quant_state.bitsandbytes__nf4", lambda t: t[:-9].clone()),
    "the record empty": tensor("quant_state.bitsandbytes__nf4", lambda t: t[:0].clone()),
    "the record of floats": tensor("quant_state.bitsandbytes__nf4", lambda t: t.float()),
    "the record no text": tensor("quant_state.bitsandbytes__nf4", at(0xFF)),
    "the record huge": tensor("quant_state.bitsandbytes__nf4", lambda t: torch.full((100_000,), 32, dtype=torch.uint8)),
    "the record a list": tensor("quant_state.bitsandbytes__nf4", lambda t: torch.tensor([91, 93], dtype=torch.uint8)),
    "no record": lambda tensors: tensors.pop(MARK),
    "two records": lambda tensors: tensors.update({MARK[:-3] + "fp4": tensors[MARK].clone()}),
    "no scales": lambda tensors: tensors.pop(f"{LAYER}.absmax"),
    "scales cut": tensor("absmax", lambda t: t[:-1].clone()),
    "too many scales": tensor("absmax", lambda t: torch.cat([t, t])),
    "scales in two dimensions": tensor("absmax", lambda t: t.view(-1, 1).clone()),
    "scales of another type": tensor("absmax", lambda t: t.to(torch.int32)),
    "scales in 16 bits": tensor("absmax", lambda t: t.to(torch.float16)),
    "codes cut": tensor("", lambda t: t[:-1].clone()),
    "codes doubled": tensor("", lambda t: torch.cat([t, t])),
    "codes of floats": tensor("", lambda t: t.float()),
    "no codes": lambda tensors: tensors.pop(LAYER),
    "no code table": lambda tensors: tensors.pop(f"{LAYER}.quant_map"),
    "another code table": tensor("quant_map", lambda t: t.flip(0)),
    "a code table with NaN": tensor("quant_map", at(float("nan"), 3)),
    "a code table cut": tensor("quant_map", lambda t: t[:15].clone()),
    "something beside it": lambda tensors: tensors.update({f"{LAYER}.more": torch.zeros(1)}),
    "a norm with NaN": lambda tensors: tensors["model.norm.weight"].fill_(float("nan")),
    "a head with infinity": lambda tensors: tensors["lm_head.weight"].view(-1)[:1].fill_(float("inf")),
    "a norm too long": lambda tensors: tensors.update({"model.norm.weight": torch.ones(65)}),
    "an embedding of numbers": lambda tensors: tensors.update({"model.embed_tokens.weight": torch.ones(32, 64).long()}),
    "a layer of another place": lambda tensors: [
        tensors.update({key.replace("up_", "side_"): tensors.pop(key)}) for key in list(tensors) if "up_proj" in key
    ],
    "a layer missing": lambda tensors: [tensors.pop(key) for key in list(tensors) if "up_proj" in key],
    "a bias too many": lambda tensors: tensors.update({LAYER.replace("weight", "bias"): torch.ones(3)}),
}  # fmt: skip
DOUBLE = {
    **{
        f"offset {value!r}": facts(nested_offset=value)
        for value in (float("nan"), float("inf"), 1e300, 10**50, "0", None, True, ..., [0.1])
    },
    **{f"nested blocks {value!r}": facts(nested_blocksize=value) for value in (0, 64, 10**9, None, ..., "256")},
    "nested type": facts(nested_dtype="float16"),
    "nested scales negative": tensor("nested_absmax", at(-1.0)),
    "nested scales NaN": tensor("nested_absmax", at(float("nan"))),
    "nested scales infinite": tensor("nested_absmax", at(float("inf"))),
    "nested scales cut": tensor("nested_absmax", lambda t: t[:0].clone()),
    "nested scales too large together": lambda tensors: (
        tensor("nested_absmax", at(3e38))(tensors), facts(nested_offset=3e38)(tensors)),
    "no nested table": lambda tensors: tensors.pop(f"{LAYER}.nested_quant_map"),
    "no nested scales": lambda tensors: tensors.pop(f"{LAYER}.nested_absmax"),
    "another nested table": tensor("nested_quant_map", at(0.5)),
}  # fmt: skip
SINGLE = {
    "scales NaN": tensor("absmax", at(float("nan"), 5)),
    "scales infinite": tensor("absmax", at(float("inf"))),
    "scales negative": tensor("absmax", at(-0.5)),
}


@pytest.mark.parametrize("sums", [True, False], ids=["with sums", "without"])
def test_malformed_states_are_refused_before_anything_is_computed(saved, tmp_path, sums, monkeypatch):
    single = "nested_absmax" not in " ".join(load_file(saved / W))
    monkeypatch.setattr("peftlab.quantization.blockwise.dequantize", lambda *_: pytest.fail("something was computed"))
    wrong = []
    for number, (case, change) in enumerate({**MALFORMED, **(SINGLE if single else DOUBLE)}.items()):
        folder = tmp_path / str(number)
        shutil.copytree(saved, folder)
        rewrite(folder, change, sums)
        began = time.thread_time()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                pl.load_quantized(folder)
            wrong.append(f"{case}: loaded")
        except pl.PeftLabError as error:
            if len(str(error)) > 1000 or "\n" in str(error):
                wrong.append(f"{case}: {str(error)[:200]}")
        except Exception as error:
            wrong.append(f"{case}: {type(error).__name__}: {error}")
        if time.thread_time() - began > 3:
            wrong.append(f"{case}: slow")
        shutil.rmtree(folder)
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("name", [W, C])
def test_forty_flipped_bits_are_found(folder, name):
    content, expected = (folder / name).read_bytes(), pl.load_quantized(folder).state_dict()
    draw, silent = random.Random(f"{name} {len(content)}"), []
    for _ in range(40):
        place, bit = draw.randrange(len(content)), 1 << draw.randrange(8)
        changed = bytearray(content)
        changed[place] ^= bit
        (folder / name).write_bytes(changed)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                pl.load_quantized(folder)
            silent.append((place, bytes(content[place - 20 : place + 20])))
        except pl.PeftLabError:
            pass
    assert silent == []
    (folder / name).write_bytes(content)
    again = pl.load_quantized(folder).state_dict()
    assert all(torch.equal(again[key], value) for key, value in expected.items())


def test_every_bit_of_the_header_counts(folder):
    """Keys, dtypes, shapes, places and sums: none can be changed in silence. (A changed `format` harms nobody.)"""
    content = (folder / W).read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    silent = []
    for place in range(8, end, 97):
        changed = bytearray(content)
        changed[place] ^= 1
        (folder / W).write_bytes(changed)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                pl.load_quantized(folder)
            silent.append(content[place - 20 : place + 20])
        except pl.PeftLabError:
            pass
    assert silent == []


def test_files_of_two_models_are_told(folder, tmp_path):
    pl.save_quantized(pl.quantize_model(llama(hidden_size=64, intermediate_size=128, layers=2)), tmp_path / "other")
    for name in (C, W):
        shutil.copytree(folder, tmp_path / f"mixed {name}")
        shutil.copy(tmp_path / "other" / name, tmp_path / f"mixed {name}" / name)
        with pytest.raises(pl.PeftLabError, match="not saved together"):
            pl.load_quantized(tmp_path / f"mixed {name}")


@pytest.mark.parametrize("fields", [
    dict(num_hidden_layers=10**9), dict(num_hidden_layers=2), dict(num_hidden_layers=0), dict(num_hidden_layers="1"),
    dict(num_hidden_layers=-1), dict(vocab_size=10**9), dict(hidden_size=32), dict(hidden_size="x"),
    dict(intermediate_size=10**9), dict(num_attention_heads=0), dict(num_attention_heads=7),
    dict(layer_types=[1] * 5000), dict(rope_parameters="x"), dict(dtype="nonsense"), dict(dtype="int8"),
    dict(hidden_act="os.system"), dict(model_type="gpt2"), dict(architectures=["GPT2LMHeadModel"]),
    dict(architectures=["PreTrainedModel"]), dict(architectures=[]), dict(architectures=[7]), dict(architectures=None),
    dict(architectures="LlamaForCausalLM"), dict(architectures={}), dict(architectures=[["LlamaForCausalLM"]]),
    dict(quantization_config=7),
])  # fmt: skip
def test_a_config_that_does_not_fit_is_refused_quickly(fields, folder):
    rewrite(folder, lambda tensors: None, sums=False)
    (folder / C).write_text(json.dumps(json.loads((folder / C).read_text()) | fields))
    began = time.thread_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model = pl.load_quantized(folder)
            assert set(fields) <= {"dtype", "quantization_config"}  # which say nothing about these tensors
            model(IDS)
        except pl.PeftLabError as error:
            assert "\n" not in str(error)
    assert time.thread_time() - began < 5


def test_what_has_no_sums_says_so_and_loads(folder):
    expected = pl.load_quantized(folder)(IDS).logits
    rewrite(folder, lambda tensors: None, sums=False)
    with pytest.warns(UserWarning, match="carries no sums"):
        found = pl.load_quantized(folder)(IDS).logits
    assert torch.equal(found, expected)
    pl.save_quantized(pl.load_quantized(folder), folder)  # as the warning advises
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pl.load_quantized(folder)


@pytest.mark.skipif(available("bitsandbytes") is None, reason="needs bitsandbytes")
@pytest.mark.parametrize("storage", ["uint8", "bfloat16"])
def test_hugging_faces_folders_are_checked_too(tmp_path, storage):
    """Its codes may lie there as another dtype; the bytes are the same."""
    llama(hidden_size=64, intermediate_size=128, layers=1).save_pretrained(tmp_path / "base")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                                bnb_4bit_compute_dtype=torch.float32, bnb_4bit_quant_storage=storage)  # fmt: skip
    theirs = LlamaForCausalLM.from_pretrained(tmp_path / "base", quantization_config=config, device_map="cpu").train()
    expected = theirs(IDS).logits
    theirs.save_pretrained(tmp_path / "four")
    with pytest.warns(UserWarning, match="carries no sums"):
        ours = pl.load_quantized(tmp_path / "four")
    torch.testing.assert_close(ours(IDS).logits, expected)
    tensors = load_file(tmp_path / "four" / W)
    tensors[f"{LAYER}.nested_absmax"][0] = float("inf")
    save_file(tensors, tmp_path / "four" / W, {"format": "pt"})
    with pytest.raises(pl.PeftLabError, match="up_proj.weight.nested_absmax in .* not finite|not finite"):
        pl.load_quantized(tmp_path / "four")


def test_layers_that_store_their_weight_the_other_way_round(tmp_path):
    model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=64, n_layer=1, n_head=2, n_positions=16)).eval()
    pl.quantize_model(model)
    pl.save_quantized(model, tmp_path)
    assert torch.equal(pl.load_quantized(tmp_path)(IDS).logits, model(IDS).logits)


def test_a_state_dict_with_another_state_is_refused(folder):
    model = pl.load_quantized(folder)
    for change, said in ((facts(blocksize=0), "blocksize"), (facts(shape=[64, 128]), r"\(64, 128\)")):
        tensors = {key: value.clone() for key, value in model.state_dict().items()}
        change(tensors)
        with pytest.raises(pl.PeftLabError, match=said):
            model.load_state_dict(tensors)


def test_the_sums_are_where_adapters_have_them(folder, tmp_path):
    pl.save_adapter(pl.attach(llama(), pl.LoRAConfig(r=2)), tmp_path / "adapter")
    for file in (folder / W, tmp_path / "adapter" / "adapter_model.safetensors"):
        with safe_open(file, "pt") as opened:
            assert {"peftlab_tensors", "peftlab_config", "peftlab_metadata"} <= opened.metadata().keys()
    assert serialised.LARGEST_BLOCK >= 4096


def test_a_config_is_written_in_order_and_one_that_names_python_says_so(folder):
    text = (folder / C).read_text()
    assert list(json.loads(text)) == sorted(json.loads(text)), "as transformers writes it"
    rewrite(folder, lambda tensors: None, sums=False)
    named = {"auto_map": {"AutoModel": "odd.Odd"}}
    for code, said in (({}, r"\['Odd'\]\.$"), (named, "auto_map.*never runs such code")):
        (folder / C).write_text(json.dumps(json.loads(text) | {"architectures": ["Odd"]} | code))
        with pytest.raises(pl.PeftLabError, match=said), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pl.load_quantized(folder)


@pytest.mark.parametrize(("field", "words"), [
    ("bnb_4bit_quant_typ", "Did you mean 'bnb_4bit_quant_type'"), ("colour", "'colour'"),
])  # fmt: skip
def test_unknown_settings_of_the_quantisation_are_named(field, words, folder):
    fields = json.loads((folder / C).read_text())
    fields["quantization_config"] |= {field: "nf4", "nothing": None}
    (folder / C).write_text(json.dumps(fields))
    rewrite(folder, lambda tensors: None, sums=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pl.load_quantized(folder)
    said = [str(one.message) for one in caught if "not known" in str(one.message)]
    assert len(said) == 1 and repr(field) in said[0] and words in said[0] and "nothing'" not in said[0]


def test_what_we_and_transformers_write_is_known(folder):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*not known.*")
        pl.load_quantized(folder)
