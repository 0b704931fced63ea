"""What came with a folder from somewhere: no Python of its own runs, no pickle is opened, no JSON exhausts anything."""

import json
import sys
import time
import warnings

import pytest
import torch
from releases import older
from tiny import llama, tokenizer

import peftlab as pl
from peftlab import foreign
from peftlab.assets.models import load_model

C, Q = "adapter_config.json", "config.json"


@pytest.fixture
def trap(tmp_path, monkeypatch):
    """(a function that puts Python into a folder, whether it ran); whoever asks on stdin fails the test."""
    ran = tmp_path / "RAN"

    def asked(*_):
        pytest.fail("asked whether to run code")

    monkeypatch.setattr("builtins.input", asked)

    def put(folder, *names):
        code = f"open({str(ran)!r}, 'w').write('x')\n"
        code += "from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast\n"
        code += "class Config(LlamaConfig): model_type = 'odd'\nclass Model(LlamaForCausalLM): pass\n"
        code += "class Tokens(PreTrainedTokenizerFast): pass\ndef generate(*_, **__): pass\n"
        for name in names or ("odd.py",):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(code)

    yield put
    assert not ran.exists(), "code of the folder ran"
    assert not [name for name in sys.modules if name.startswith("transformers_modules.") and "odd" in name]


def edit(file, **fields):
    content = json.loads(file.read_text()) | fields
    file.write_text(json.dumps({name: value for name, value in content.items() if value is not ...}))


def without_sums(folder):
    """As another program writes it."""
    from safetensors.torch import load_file, save_file

    for file in folder.glob("*.safetensors"):
        save_file(load_file(file), file, {"format": "pt"})


def four_bit(folder, sums=False):
    pl.save_quantized(pl.quantize_model(llama(hidden_size=64, intermediate_size=64, layers=1)), folder)
    if not sums:
        without_sums(folder)
    return folder


def plain(folder):
    llama().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


AUTO = {"AutoConfig": "odd.Config", "AutoModelForCausalLM": "odd.Model", "AutoModel": "odd.Model"}
UNKNOWN = {
    "code for an unknown type": dict(model_type="odd", auto_map=AUTO),
    "code on the hub": dict(model_type="odd", auto_map={name: "evil/repo--" + at for name, at in AUTO.items()}),
    "no type": dict(model_type=..., auto_map=AUTO),
    "a type that is no text": dict(model_type=["llama"]),
    "an unknown type": dict(model_type="lama"),
}
KERNELS = {
    "attention": dict(attn_implementation="evil/kernels"),
    "attention of one part": dict(_attn_implementation={"text_config": "evil/kernels@main:attention"}),
    "experts": dict(experts_implementation="evil/experts"),
    "inside": dict(text_config={"deep": {"_attn_implementation_internal": "evil/kernels"}}),
    "kernels": dict(use_kernels=True),
}


@pytest.mark.parametrize("case", {**UNKNOWN, **KERNELS})
def test_a_model_folders_code_is_refused(case, tmp_path, trap):
    fields = {**UNKNOWN, **KERNELS}[case]
    for folder, load in ((four_bit(tmp_path / "four"), pl.load_quantized), (plain(tmp_path / "plain"), load_model)):
        trap(folder)
        edit(folder / Q, **fields)
        with pytest.raises(pl.PeftLabError) as told:
            load(str(folder))
        assert str(told.value).count("\n") == 0 and "Traceback" not in str(told.value)
        if case in KERNELS:
            assert "never" in str(told.value)


CLASSES = (["pipeline"], ["Trainer"], ["AutoModel"], ["os.system"], ["__class__"], [], None, "x")


@pytest.mark.parametrize("classes", CLASSES, ids=str)
def test_a_class_that_is_no_model_is_refused(classes, tmp_path):
    edit(four_bit(tmp_path / "four") / Q, architectures=classes)
    with pytest.raises(pl.PeftLabError, match="holds no 4-bit model of a class that transformers has"):
        pl.load_quantized(tmp_path / "four")


@pytest.mark.parametrize("name", ["PreTrainedModel", "EncoderDecoderModel", "BertPreTrainedModel"])
def test_a_class_that_is_built_from_another_config_or_from_none_is_refused(name, tmp_path):
    edit(four_bit(tmp_path / "four") / Q, architectures=[name])
    with pytest.raises(pl.PeftLabError, match="its class .* is built from") as told:
        pl.load_quantized(tmp_path / "four")
    assert ("no whole model" in str(told.value)) == (name == "PreTrainedModel")


def test_a_model_that_transformers_knows_loads_without_the_code_beside_it(tmp_path, trap):
    """Many models on the hub name code for older versions of transformers, which have it themselves now."""
    for folder, load in ((four_bit(tmp_path / "four"), pl.load_quantized), (plain(tmp_path / "plain"), load_model)):
        trap(folder)
        edit(folder / Q, auto_map=AUTO)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            load(str(folder))
    model = pl.quantize_model(llama(hidden_size=64, intermediate_size=64, layers=1))
    model.config.auto_map = AUTO
    pl.save_quantized(model, tmp_path / "again")
    assert "auto_map" not in json.loads((tmp_path / "again" / Q).read_text())


def test_the_code_of_a_tokenizer_and_of_a_generation_do_not_run(tmp_path, trap):
    folder = plain(tmp_path / "plain")
    trap(folder, "odd.py", "custom_generate/generate.py", "generate.py")
    model, _ = load_model(str(folder))
    model.generate(torch.tensor([[3, 4]]), max_new_tokens=1, do_sample=False)
    edit(folder / "tokenizer_config.json", tokenizer_class="Tokens", auto_map={"AutoTokenizer": ["odd.Tokens", None]})
    (folder / Q).write_text(json.dumps({"model_type": "odd"}))
    (folder / "tokenizer.json").unlink()
    config = pl.PromptTuningConfig(num_virtual_tokens=2, init="text", init_text="red cat", tokenizer=str(folder))
    with pytest.raises(pl.PeftLabError, match="The tokenizer .* cannot be loaded"):
        pl.attach(llama(), config)
    with pytest.raises(pl.PeftLabError):
        load_model(str(folder))


class Pickled:
    """Runs code when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def alone(folder):
    """The base of a folder that holds an adapter too. Releases of transformers that cannot leave it out are told of."""
    try:
        return load_model(str(folder))[0]
    except pl.PeftLabError as error:
        assert older("transformers", "5.23") and "holds an adapter beside the model" in str(error)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "adapter_model.bin", "model.pt"])
def test_no_pickle_is_opened(name, tmp_path, trap):
    folder = plain(tmp_path / "plain")
    torch.save({"x": Pickled(tmp_path / "RAN")}, folder / name)
    if name == "pytorch_model.bin":
        (folder / "model.safetensors").unlink()
        with pytest.raises(pl.PeftLabError, match="reads no pickled ones"):
            load_model(str(folder))
    elif name == "adapter_model.bin":
        pl.save_adapter(pl.attach(llama(), pl.LoRAConfig(r=2)), tmp_path / "adapter")
        (folder / C).write_bytes((tmp_path / "adapter" / C).read_bytes())
        if (model := alone(folder)) is None:
            return
        assert not any("lora" in key for key in model.state_dict())
        with pytest.raises(pl.PeftLabError, match="a pickle, which can run code"):
            pl.load_adapter(model, folder)
    else:
        load_model(str(folder))


def test_an_adapter_beside_a_model_is_not_put_into_it(tmp_path):
    folder = plain(tmp_path / "plain")
    pl.save_adapter(pl.attach(llama(), pl.LoRAConfig(r=2, init="random")), folder)
    ids = torch.tensor([[3, 4, 5]])
    if (model := alone(folder)) is None:
        return
    assert torch.equal(model(ids).logits, llama().eval()(ids).logits)


# ------------------------------------------------------------------------------------------------------------- JSON

WRONG = {
    "not a number": (b'{"r": NaN}', "NaN"),
    "infinite": (b'{"r": -Infinity}', "Infinity"),
    "infinite in digits": (b'{"r": 1e999}', "too large"),
    "beyond 64 bits": (b'{"r": %d}' % 10**30, "too large"),
    "five thousand digits": (b'{"r": 1' + b"0" * 5000 + b"}", "too large"),
    "twice": (b'{"r": 8, "lora_alpha": 1, "r": 4}', "'r' twice"),
    "twice inside": (b'{"rank_pattern": {"a": 1, "a": 2}}', "'a' twice"),
    "deep": (b'{"a": ' + b"[" * 100 + b"]" * 100 + b"}", "nested too deeply"),
    "very deep": (b'{"a": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", "nested too deeply"),
    "deep objects": (b'{"a": ' * 3000 + b"1" + b"}" * 3000, "nested too deeply"),
    "latin-1": ('{"a": "é"}'.encode("latin-1"), "utf-8"),
    "utf-16": ('{"a": 1}'.encode("utf-16"), "utf-8"),
    "a list": (b"[1, 2]", "holds a list"),
    "a text": (b'"r"', "holds a str"),
    "nothing": (b"", "cannot be read"),
    "null": (b"null", "holds a NoneType"),
    "huge": (b'{"a": "' + b"x" * foreign.MOST_BYTES + b'"}', "larger than 8 MB"),
    "cut": (b'{"r": 8, "lora_al', "cannot be read"),
}


@pytest.mark.parametrize("case", WRONG)
def test_json_that_is_refused(case, tmp_path):
    content, said = WRONG[case]
    model = pl.attach(llama(), pl.LoRAConfig(r=2))
    pl.save_adapter(model, tmp_path / "adapter")
    four_bit(tmp_path / "four")
    (tmp_path / "adapter" / C).write_bytes(content)
    (tmp_path / "four" / Q).write_bytes(content)
    began = time.thread_time()
    with pytest.raises(pl.PeftLabError, match=said):
        pl.load_adapter(llama(), tmp_path / "adapter")
    with pytest.raises(pl.PeftLabError):
        pl.load_quantized(tmp_path / "four")
    assert time.thread_time() - began < 2


def test_json_that_is_read(tmp_path):
    (tmp_path / "a.json").write_text('{"a": [1, -2.5e3, {"b": null}], "c": "é"}', encoding="utf-8")
    assert foreign.read_fields(tmp_path / "a.json") == {"a": [1, -2500.0, {"b": None}], "c": "é"}
    (tmp_path / "b.json").write_text(f'{{"a": Infinity, "b": {10**30}}}')
    assert foreign.read_fields(tmp_path / "b.json", infinite=True) == {"a": float("inf"), "b": 10**30}
