"""Models that read images or sound: load_model gives the class that was saved, and adapters stand where they write."""

import pytest
import tiny
import torch
import transformers
from transformers import AutoConfig

import peftlab as pl

TEXT = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": None, "eos_token_id": 0,
}  # fmt: skip
LLAMA = {"model_type": "llama", **TEXT}
SIGHT = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 16,
    "patch_size": 8,
}  # fmt: skip
CLIP_TEXT = {name: value for name, value in TEXT.items() if name != "num_key_value_heads"}
MULTIMODAL_ROPE = {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 0], "rope_theta": 10000.0}}
QWEN_SIGHT = {"depth": 2, "hidden_size": 16, "num_heads": 4, "patch_size": 8}
SPEECH = {
    "vocab_size": 32, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip
GPT2 = {"model_type": "gpt2", "vocab_size": 32, "n_embd": 16, "n_layer": 2, "n_head": 4, "add_cross_attention": True}

# class, its config's model_type, the config's fields, where the default adapter stands and how many layers it has there
WRITING = {
    "LlavaForConditionalGeneration": (
        "llava", {"vision_config": {"model_type": "clip_vision_model", **SIGHT}, "text_config": LLAMA},
        "model.language_model.", 4,
    ),
    "Qwen2VLForConditionalGeneration": (
        "qwen2_vl", {"text_config": TEXT | MULTIMODAL_ROPE, "vision_config": QWEN_SIGHT | {"embed_dim": 16}},
        "model.language_model.", 4,
    ),
    "Qwen2_5_VLForConditionalGeneration": (
        "qwen2_5_vl",
        {"text_config": TEXT | MULTIMODAL_ROPE, "vision_config": QWEN_SIGHT | {"out_hidden_size": 16}},
        "model.language_model.", 4,
    ),
    "Gemma3ForConditionalGeneration": (
        "gemma3", {"text_config": TEXT | {"head_dim": 4}, "vision_config": SIGHT, "mm_tokens_per_image": 4},
        "model.language_model.", 4,
    ),
    "PaliGemmaForConditionalGeneration": (
        "paligemma",
        {
            "text_config": TEXT | {"model_type": "gemma", "head_dim": 4},
            "vision_config": {"model_type": "siglip_vision_model", **SIGHT},
            "projection_dim": 16,
        },
        "model.language_model.", 4,
    ),
    "Idefics3ForConditionalGeneration": (
        "idefics3", {"text_config": LLAMA, "vision_config": SIGHT}, "model.text_model.", 4,
    ),
    "MllamaForConditionalGeneration": (
        "mllama",
        {
            "text_config": TEXT | {"cross_attention_layers": [1], "pad_token_id": 0, "bos_token_id": 1},
            "vision_config": {
                "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_global_layers": 1,
                "attention_heads": 4, "image_size": 16, "patch_size": 8, "vision_output_dim": 32,
                "intermediate_layers_indices": [0],
            },
        },
        "model.language_model.", 4,
    ),
    "Blip2ForConditionalGeneration": (
        "blip-2",
        {
            "vision_config": SIGHT,
            "qformer_config": CLIP_TEXT | {"encoder_hidden_size": 16},
            "text_config": {
                "model_type": "opt", "vocab_size": 32, "hidden_size": 16, "ffn_dim": 32, "num_hidden_layers": 2,
                "num_attention_heads": 4, "word_embed_proj_dim": 16,
            },
            "num_query_tokens": 4,
        },
        "language_model.", 4,
    ),
    "GitForCausalLM": ("git", CLIP_TEXT | {"vision_config": SIGHT}, "git.encoder.", 4),
    "Qwen2AudioForConditionalGeneration": (
        "qwen2_audio",
        {
            "text_config": {"model_type": "qwen2", **TEXT},
            "audio_config": {
                "model_type": "qwen2_audio_encoder", "d_model": 16, "encoder_layers": 2, "encoder_attention_heads": 4,
                "encoder_ffn_dim": 32, "num_mel_bins": 8, "max_source_positions": 30,
            },
        },
        "model.language_model.", 4,
    ),
    "VisionEncoderDecoderModel": (
        "vision-encoder-decoder", {"encoder": {"model_type": "vit", **SIGHT}, "decoder": GPT2}, "decoder.", 4,
    ),
    # one config for both halves: all queries and values, as in Hugging Face peft
    "WhisperForConditionalGeneration": (
        "whisper", SPEECH | {"max_source_positions": 30, "max_target_positions": 32, "num_mel_bins": 8}, "model.", 12,
    ),
    "Speech2TextForConditionalGeneration": ("speech_to_text", SPEECH, "model.", 12),
}  # fmt: skip
READING = {
    "CLIPModel": ("clip", {"text_config": CLIP_TEXT, "vision_config": SIGHT, "projection_dim": 16}, "", 8),
    "ViTForImageClassification": ("vit", SIGHT, "vit.", 4),
    "BertForTokenClassification": ("bert", CLIP_TEXT, "bert.", 4),
    "BertForQuestionAnswering": ("bert", CLIP_TEXT, "bert.", 4),
    "T5EncoderModel": ("t5", {"vocab_size": 32, "d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 2}, "encoder.", 4),
}


def model_of(name):
    kind, fields, _, _ = (WRITING | READING)[name]
    torch.manual_seed(0)
    return getattr(transformers, name)(AutoConfig.for_model(kind, **fields))


@pytest.mark.parametrize("name", WRITING | READING)
def test_the_class_that_was_saved_and_where_its_default_adapter_stands(name, tmp_path):
    saved = model_of(name)
    saved.save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    model, tokenizer = pl.load_model(str(tmp_path))
    assert type(model) is type(saved) and len(tokenizer) == len(tiny.tokenizer())
    own = saved.state_dict()
    assert all(torch.equal(own[key], value) for key, value in model.state_dict().items())
    pl.attach(model, pl.LoRAConfig(r=2))
    hosts = [path for path, module in model.named_modules() if "peftlab" in module._modules]
    _, _, place, count = (WRITING | READING)[name]
    assert len(hosts) == count and all(path.startswith(place) for path in hosts), hosts


@pytest.mark.parametrize("name", ["LlavaForConditionalGeneration", "GitForCausalLM", "MllamaForConditionalGeneration"])
def test_one_may_still_name_the_part_that_reads_images(name):
    model = model_of(name)
    pl.attach(model, pl.LoRAConfig(r=2, target_modules=["q_proj"]))
    assert any("vision" in path for path, module in model.named_modules() if "peftlab" in module._modules)
    model = model_of(name)
    pl.attach(model, pl.LoRAConfig(r=2, target_modules="all-linear"))
    assert any("vision" in path for path, module in model.named_modules() if "peftlab" in module._modules)


@pytest.mark.parametrize("name", ["LlavaForConditionalGeneration", "Gemma3ForConditionalGeneration"])
def test_its_default_adapter_trains_and_comes_back(name, tmp_path):
    model = pl.attach(model_of(name), pl.LoRAConfig(r=2, init="random"))
    ids = torch.arange(1, 13).reshape(2, 6)
    model(input_ids=ids, labels=ids).loss.backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    assert gradients and all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients)
    pl.save_adapter(model, tmp_path)
    loaded = pl.load_adapter(model_of(name), tmp_path)
    assert torch.equal(loaded.eval()(input_ids=ids).logits, model.eval()(input_ids=ids).logits)


def test_a_checkpoint_that_names_no_class_is_one_for_text_and_images(tmp_path):
    saved = model_of("LlavaForConditionalGeneration")
    saved.save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    config.architectures = None
    config.save_pretrained(tmp_path)
    assert type(pl.load_model(str(tmp_path))[0]) is type(saved)


@pytest.mark.parametrize("architecture", ["ForCausalLM", "PreTrainedModel", "Trainer", "BertModel", "os.system", ""])
def test_a_foreign_name_of_a_class_is_not_believed(architecture, tmp_path):
    tiny.llama().save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    config.architectures = [architecture]
    config.save_pretrained(tmp_path)
    assert type(pl.load_model(str(tmp_path))[0]).__name__ in ("LlamaModel", "LlamaForCausalLM")


@pytest.mark.parametrize("name", ["ViTForImageClassification", "WhisperForConditionalGeneration"])
def test_a_model_without_a_tokenizer_says_how_to_go_on(name, tmp_path):
    model_of(name).save_pretrained(tmp_path)
    with pytest.raises(pl.PeftLabError, match=f"no tokenizer.*transformers.{name}.from_pretrained") as caught:
        pl.load_model(str(tmp_path))
    advice = str(caught.value).partition("Load it with transformers.")[2].partition("; attach")[0]
    kind, _, call = advice.partition(".")
    model = getattr(transformers, kind).from_pretrained(call.partition("(")[2].strip("')"))
    assert pl.attached(pl.attach(model, pl.LoRAConfig(r=2)))


@pytest.mark.parametrize("name", ["BertForTokenClassification", "T5EncoderModel", "CLIPModel"])
def test_no_tokenizer_is_made_from_nothing(name, tmp_path):
    """transformers makes one that knows no word, and says nothing."""
    model_of(name).save_pretrained(tmp_path)
    with pytest.raises(pl.PeftLabError, match=r"holds no tokenizer.*save_pretrained\(folder\)"):
        pl.load_model(str(tmp_path))
    tiny.tokenizer().save_pretrained(tmp_path)
    assert pl.load_model(str(tmp_path))


@pytest.mark.parametrize("name", ["GitForCausalLM", "WhisperForConditionalGeneration", "CLIPModel"])
def test_labels_for_a_model_that_classifies_no_text(name, tmp_path):
    model_of(name).save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    kind = (WRITING | READING)[name][0]
    config = type(AutoConfig.for_model(kind)).__name__
    with pytest.raises(pl.PeftLabError, match=f"has a {config}, for which transformers has no class of this task"):
        pl.load_model(str(tmp_path), num_labels=2)


CTC = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "conv_dim": [8, 8],
    "conv_stride": [5, 2], "conv_kernel": [10, 3], "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2, "vocab_size": 12, "pad_token_id": 0, "apply_spec_augment": False,
    "layerdrop": 0.0, "hidden_dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0,
    "feat_proj_dropout": 0.0, "final_dropout": 0.0,
}  # fmt: skip


def of(kind, **more):
    """Four examples for a model of this kind."""
    draw = torch.Generator().manual_seed(0)
    shape = {"pixel_values": (3, 16, 16), "input_features": (8, 60), "input_values": (400,)}[kind]
    return [
        {kind: torch.randn(*shape, generator=draw)} | {key: make(row) for key, make in more.items()} for row in range(4)
    ]


TRAINED = {
    "ViTForImageClassification": of("pixel_values", labels=lambda row: row % 2),
    "WhisperForConditionalGeneration": of("input_features", labels=lambda row: [3 + row, 4, 2]),
    "CLIPModel": of("pixel_values", input_ids=lambda row: [3, 4 + row, 0]),
    "Wav2Vec2ForCTC": of("input_values", labels=lambda row: [3, 4, 5][: 2 + row % 2]),
}


def trained_model(name):
    if name != "Wav2Vec2ForCTC":
        return model_of(name)
    torch.manual_seed(0)
    return transformers.Wav2Vec2ForCTC(AutoConfig.for_model("wav2vec2", **CTC))


@pytest.mark.parametrize("config", [pl.LoRAConfig(r=2), pl.IA3Config()], ids=["lora", "ia3"])
@pytest.mark.parametrize("name", TRAINED)
def test_it_trains_with_the_loss_of_its_class(name, config, tmp_path):
    model, data = pl.attach(trained_model(name), config), TRAINED[name]
    batch = pl.Collator()(data) | ({"return_loss": True} if name == "CLIPModel" else {})
    own = model(**batch).loss.item() / (len(data) if name == "Wav2Vec2ForCTC" else 1)  # there it is a sum
    history = pl.train(model, data, steps=3, batch_size=4, learning_rate=1e-2, progress=False)
    assert history.steps[0]["loss"] == pytest.approx(own, rel=1e-5)
    pl.save_adapter(model, tmp_path)
    loaded = pl.load_adapter(trained_model(name), tmp_path)
    state = loaded.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert loaded.eval()(**batch).loss.item() == model.eval()(**batch).loss.item()


def test_whispers_convolutions_carry_lora():
    """Hugging Face peft cannot: Whisper asks them for their stride."""
    model = trained_model("WhisperForConditionalGeneration").double().eval()
    batch = {"input_features": torch.randn(2, 8, 60, dtype=torch.float64), "labels": torch.tensor([[3, 4], [5, 6]])}
    before = model(**batch).logits
    pl.attach(model, pl.LoRAConfig(r=2, init="random", target_modules=["conv1", "conv2"]))
    found = model(**batch).logits
    assert not torch.allclose(found, before)
    pl.merge(model)
    assert torch.allclose(model(**batch).logits, found, atol=1e-12)


def test_a_convolution_is_a_linear_layer_on_patches():
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(3, 5, (2, 3), stride=(2, 1), padding=(0, 1)).double()
    model = pl.attach(torch.nn.Sequential(conv), pl.LoRAConfig(r=2, alpha=6, init="random", target_modules=["0"]))
    part = conv.peftlab["default"]["lora"]
    x = torch.randn(2, 3, 6, 7, dtype=torch.float64)
    patches = torch.nn.functional.unfold(x, conv.kernel_size, stride=conv.stride, padding=conv.padding)
    update = 3 * part.lora_B.flatten(1) @ (part.lora_A.flatten(1) @ patches)
    with pl.disabled(model):
        base = model(x)
    assert torch.allclose(model(x), base + update.view_as(base), atol=1e-12)
