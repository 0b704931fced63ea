"""Loading models: the book's own ones, local folders, hub ids, and a clear word when it cannot be done."""

import json
import logging
import socket
import subprocess
import sys
import warnings

import gguf
import numpy as np
import peft
import pytest
import tiny
import torch
import transformers
from transformers.utils import logging as transformers_logging

import peftlab as pl
from peftlab.assets import convert, models
from peftlab.errors import PeftLabError

pytestmark = pytest.mark.xdist_group("models")  # fetched, read and loaded by one worker


@pytest.fixture(scope="module", autouse=True)
def brought():
    """The real models, fetched once; nothing below this line needs a network."""
    pl.fetch(["smollm2-135m", "minilm"], progress=False)


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(scope="module")
def chat():
    return pl.load_model("smollm2-135m")


def save(model, folder, tokenizer=True):
    model.save_pretrained(folder)
    if tokenizer:
        tiny.tokenizer().save_pretrained(folder)
    return str(folder)


def test_the_chat_model_answers(chat, no_network):
    model, tokenizer = chat
    assert type(model) is transformers.LlamaForCausalLM
    assert model.dtype == torch.float32 and not model.training
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    answer = pl.generate_text(model, tokenizer, "What is the capital of France?", max_new_tokens=8, progress=False)
    assert answer == ["The capital of France is Paris."]


def test_the_chat_tokenizer_pads_with_a_token_that_ends_nothing(chat):
    model, tokenizer = chat
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert model.config.pad_token_id == model.generation_config.pad_token_id == tokenizer.pad_token_id == 0
    assert model.config.eos_token_id == model.generation_config.eos_token_id == tokenizer.eos_token_id == 2
    assert tokenizer.model_max_length == model.config.max_position_embeddings == 8192
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    ids = tokenizer("Order 1205, half of ½.")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids)[:6] == ["Order", "Ġ", "1", "2", "0", "5"]
    assert tokenizer.decode(ids) == "Order 1205, half of ½."


def test_an_adapter_names_a_base_that_loads_again(no_network, tmp_path):
    model, tokenizer = pl.load_model("smollm2-135m")
    assert model.name_or_path == model.config._name_or_path == tokenizer.name_or_path
    pl.attach(model, pl.LoRAConfig(r=1, target_modules=["q_proj"]))
    folder = pl.save_adapter(model, tmp_path)
    written = json.loads((folder / "adapter_config.json").read_text())
    again, _ = pl.load_model(written["base_model_name_or_path"])
    pl.load_adapter(again, folder)
    opened = peft.AutoPeftModelForCausalLM.from_pretrained(folder)
    ids = tokenizer("The capital of France", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert torch.allclose(opened(ids).logits, model(ids).logits, atol=1e-4)


def test_the_books_encoder_names_a_base_that_transformers_loads_again(no_network):
    model, _ = pl.load_model("minilm", num_labels=2)
    for name in (model.config._name_or_path, model.name_or_path):
        assert isinstance(transformers.AutoModel.from_pretrained(name), transformers.BertModel)


def test_loading_is_quiet_and_leaves_the_users_settings(no_network, capfd):
    transformers_logging.set_verbosity_info()
    transformers_logging.enable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model, tokenizer = pl.load_model("minilm", num_labels=3)
        assert transformers_logging.get_verbosity() == logging.INFO
        assert transformers_logging.is_progress_bar_enabled()
    finally:
        transformers_logging.set_verbosity_warning()
    assert capfd.readouterr() == ("", "")
    assert type(model) is transformers.BertForSequenceClassification and not model.training
    assert model.config.num_labels == 3
    assert tokenizer("hello")["input_ids"] == [101, 7592, 102]


def test_a_fresh_process_prints_nothing():
    # In a process of its own, because transformers' logger keeps the stderr it found when it was imported.
    program = "import peftlab as pl; pl.load_model('minilm', num_labels=3)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_an_encoder_without_labels_has_no_head_and_knows_what_is_like_what():
    model, tokenizer = pl.load_model("minilm")
    assert type(model) is transformers.BertModel
    texts = ["The film was great.", "I loved this movie.", "The parliament votes on taxes."]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    with torch.no_grad():
        states = model(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    vectors = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1))
    assert vectors[0] @ vectors[1] > 0.5 > 0.3 > vectors[0] @ vectors[2]


def test_dtype_and_device():
    assert pl.load_model("minilm", dtype="bf16", device="cpu")[0].dtype == torch.bfloat16
    assert pl.load_model("minilm", dtype=torch.float64)[0].dtype == torch.float64
    with pytest.raises(PeftLabError, match="dtype must be .* not 'int8'"):
        pl.load_model("minilm", dtype="int8")
    with pytest.raises(PeftLabError, match="'gpu' is not a device"):
        pl.load_model("minilm", device="gpu")
    with pytest.raises(PeftLabError, match="no device cuda:99 here"):
        pl.load_model("minilm", device="cuda:99")
    with pytest.raises(PeftLabError, match="num_labels must be a positive whole number, found 0"):
        pl.load_model("minilm", num_labels=0)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("smollm2", "no model 'smollm2'. Did you mean 'smollm2-135m'.* Known: smollm2-135m, minilm"),
        ("minlm", "Did you mean 'minilm'"),
        ("xyzzy", r"no model 'xyzzy'\. Known: smollm2-135m, minilm"),
        ("reviews", r"'reviews' is a data set: use load_data\('reviews'\)"),
        ("./nowhere", "no folder './nowhere'"),
        ("some/path/nowhere", "no folder 'some/path/nowhere'"),
    ],
)
def test_unknown_names(name, message, monkeypatch):
    monkeypatch.setattr(models, "_on_hub", lambda name: False)
    with pytest.raises(PeftLabError, match=message):
        pl.load_model(name)


def test_local_folders_give_the_class_that_fits(tmp_path, capfd):
    tiny_t5 = transformers.T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, vocab_size=32)
    tiny_bert = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    tiny_bert = transformers.BertConfig(vocab_size=32, num_labels=5, **tiny_bert)
    for made, expected in (
        (tiny.llama(), transformers.LlamaForCausalLM),
        (transformers.T5ForConditionalGeneration(tiny_t5), transformers.T5ForConditionalGeneration),
        (transformers.BertForMaskedLM(tiny_bert), transformers.BertModel),
        (transformers.BertForSequenceClassification(tiny_bert), transformers.BertForSequenceClassification),
    ):
        folder = save(made, tmp_path / type(made).__name__)
        capfd.readouterr()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a masked language model has no pooler; that is told, and tested below
            loaded, tokenizer = pl.load_model(folder)
        assert type(loaded) is expected and not loaded.training
        assert tokenizer.eos_token == "<|end|>"
        assert capfd.readouterr().err == ""
    assert pl.load_model(folder)[0].config.num_labels == 5
    classifier = pl.load_model(str(tmp_path / "LlamaForCausalLM"), num_labels=2)[0]
    assert type(classifier) is transformers.LlamaForSequenceClassification


def test_weights_that_a_checkpoint_lacks_are_told(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = save(tiny.llama(), tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.warns(UserWarning, match=r"has no model.layers.1.mlp.up_proj.weight; random values were put there"):
        pl.load_model(folder)


def test_no_pickle_no_foreign_code_no_adapter_in_place_of_a_model(tmp_path):
    pickled = tmp_path / "pickled"
    save(tiny.llama(), pickled)
    torch.save(tiny.llama().state_dict(), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    with pytest.raises(PeftLabError, match="has no weights as safetensors, and peftlab reads no pickled ones"):
        pl.load_model(str(pickled))

    foreign = tmp_path / "foreign"
    foreign.mkdir()
    mark = tmp_path / "ran"
    (foreign / "code.py").write_text(f"open({str(mark)!r}, 'w')\n")
    auto_map = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    (foreign / "config.json").write_text(json.dumps({"model_type": "strange", "auto_map": auto_map}))
    with pytest.raises(PeftLabError, match="needs Python code from its repository, and peftlab never runs such code"):
        pl.load_model(str(foreign))
    assert not mark.exists()

    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    with pytest.raises(PeftLabError, match="holds an adapter: load its base model"):
        pl.load_model(str(adapter))


def test_loading_from_the_cache_takes_well_under_a_second(chat):
    import time

    started = time.process_time()  # the processor's time, which a busy machine does not stretch
    pl.load_model("smollm2-135m")
    assert time.process_time() - started < 1.0


def write_gguf(path, model, vocabulary=64):
    """A small Llama in a GGUF file, by the reference writer; query and key rows in GGUF's order."""
    writer = gguf.GGUFWriter(path, "llama")
    config = model.config
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(vocabulary)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "#$", *(chr(ord("!") + i) for i in range(vocabulary - 4))]
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (vocabulary - 3))
    writer.add_token_merges(["# $"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    names = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    parts = {theirs: ours for ours, theirs in convert.LLAMA_BLOCK.items()}
    kinds = gguf.GGMLQuantizationType
    for name, parameter in model.named_parameters():
        if name not in names:
            _, _, block, *part, _ = name.split(".")
            names[name] = f"blk.{block}.{parts['.'.join(part)]}.weight"
        values = parameter.detach().numpy()
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            rows, columns = values.shape
            values = values.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)
        kind = kinds.F32 if values.ndim == 1 else kinds.Q8_0 if "embed" in name else kinds.Q4_1
        data = gguf.quantize(np.ascontiguousarray(values), kind)
        writer.add_tensor(names[name], data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_conversion_agrees_with_transformers_own_reader_to_the_bit(tmp_path):
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "tie_word_embeddings": True}
    (tmp_path / "source").mkdir()
    write_gguf(tmp_path / "source" / "small.gguf", tiny.llama(**sizes))
    (tmp_path / "target").mkdir()
    convert.llama(tmp_path / "source", tmp_path / "target")
    ours, tokenizer = pl.load_model(str(tmp_path / "target"))
    with models.quiet():
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "source", gguf_file="small.gguf")
    expected = theirs.state_dict()
    assert ours.state_dict().keys() == expected.keys()
    for key, value in ours.state_dict().items():
        assert torch.equal(value, expected[key]), key
    ids = torch.arange(12)[None]
    assert torch.equal(ours(ids).logits, theirs(ids).logits)
    assert tokenizer.decode(tokenizer("#$%")["input_ids"]) == "#$%"
    pieces = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("a12")
    assert [piece for piece, _ in pieces] == ["a", "1", "2"]
    ours.save_pretrained(tmp_path / "again")  # what a model marked as quantised would refuse


def test_a_dead_hub_does_not_hide_the_known_names(monkeypatch):
    monkeypatch.setattr(sys.modules["huggingface_hub"].HfApi, "model_info", lambda *_, **__: 1 / 0)
    with pytest.raises(PeftLabError, match="Known: smollm2-135m, minilm"):
        pl.load_model("gpt-unheard-of")
