"""Inputs that a small model of transformers can read, with real numbers, made from its config and its class."""

import torch


def real_inputs(model, tokens=6, rows=2):
    """What `model(**inputs)` takes: text, sound or images, for two examples."""
    config, name = model.config, type(model).__name__
    draw = torch.Generator().manual_seed(0)
    numbers = lambda *size: torch.randn(*size, generator=draw)  # noqa: E731
    if name.startswith("Wav2Vec2"):
        return {"input_values": numbers(rows, 800)}
    if name.startswith("Whisper") and name != "WhisperForCausalLM":
        sound = {"input_features": numbers(rows, config.num_mel_bins, 2 * config.max_source_positions)}
        return sound if "Classification" in name else {**sound, "decoder_input_ids": ids(2, config, rows, 4, draw)}
    if name.startswith(("ViT", "CLIPVision", "CLIPForImage")):
        return {"pixel_values": image(getattr(config, "vision_config", config), rows, numbers)}
    if name == "CLIPModel":
        text = ids(2, config.text_config, rows, tokens, draw)
        return {"input_ids": text, "pixel_values": image(config.vision_config, rows, numbers)}
    size = (rows, 2, tokens) if name.endswith("ForMultipleChoice") else (rows, tokens)
    inputs = {"input_ids": ids(2, config, *size, draw)}
    if getattr(config, "is_encoder_decoder", False) and not name.endswith(("ForSequenceClassification", "Answering")):
        inputs["decoder_input_ids"] = ids(2, config, rows, tokens, draw)
    if name.endswith(("ForSequenceClassification", "Answering")):
        inputs["input_ids"][:, -1] = config.eos_token_id or 0  # BART reads its answer there
    return inputs


def ids(first, config, *rest):
    *size, draw = rest
    return torch.randint(first, config.vocab_size, size, generator=draw)


def image(config, rows, numbers):
    size = config.image_size
    return numbers(rows, config.num_channels, *([size, size] if isinstance(size, int) else size))
