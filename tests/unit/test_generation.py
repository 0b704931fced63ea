"""Batched greedy generation equals one prompt at a time, and leaves everything as it was."""

import copy
import warnings

import pytest
import tiny
import torch

from peftlab.errors import PeftLabError
from peftlab.training import generation
from peftlab.training.encoding import Collator, encode_completion
from peftlab.training.generation import generate_text
from peftlab.training.losses import causal_lm_loss

PROMPTS = ["the cat runs ?", "no", "red green blue the dog sleeps . the cat ?", "a dog ?", "yes yes yes"]


@pytest.mark.parametrize("chat", [False, True])
def test_batches_equal_one_at_a_time(chat):
    tokenizer, model = tiny.tokenizer(chat), tiny.llama(seed=1, vocab_size=18, initializer_range=1.0).double()
    alone = [generate_text(model, tokenizer, prompt, 12)[0] for prompt in PROMPTS]
    assert generate_text(model, tokenizer, PROMPTS, 12) == alone
    assert generate_text(model, tokenizer, PROMPTS, 12, batch_size=2) == alone, "sorted by length and put back"
    assert len(set(alone)) == len(alone), "prompts that all get one answer would prove nothing"


def test_nothing_is_left_changed_and_nothing_is_said(capfd):
    tokenizer, model = tiny.tokenizer(), tiny.llama(vocab_size=18)
    model.generation_config.update(do_sample=True, temperature=0.3, top_p=0.5, max_length=7)
    model.model.layers[0].eval()  # a mixed mode must come back mixed
    modes = [module.training for module in model.modules()]
    config, side = copy.deepcopy(model.generation_config), tokenizer.padding_side
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first = generate_text(model, tokenizer, PROMPTS, 12)
    assert first == generate_text(model, tokenizer, PROMPTS, 12), "greedy, whatever the model's own settings"
    assert [module.training for module in model.modules()] == modes
    assert model.generation_config.to_dict() == config.to_dict()
    assert tokenizer.padding_side == side
    assert capfd.readouterr() == ("", "")


def test_a_trained_model_stops_at_the_end_token():
    tokenizer, model = tiny.tokenizer(), tiny.llama(vocab_size=18)
    pairs = [("the cat ?", "yes ."), ("a dog ?", "no no .")]
    batch = Collator(tokenizer)([encode_completion(tokenizer, *pair) for pair in pairs])
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(60):
        total, count = causal_lm_loss(model, batch)
        optimizer.zero_grad()
        (total / count).backward()
        optimizer.step()
    assert generate_text(model, tokenizer, [prompt for prompt, _ in pairs], 30) == ["yes.", "nono."]
    assert generate_text(model, tokenizer, "a dog ?", 1) == ["no"]
    assert generate_text(model, tokenizer, []) == []


def test_refuses_what_cannot_generate():
    with pytest.raises(PeftLabError, match=r"Linear has no generate\(\)"):
        generate_text(torch.nn.Linear(2, 2), tiny.tokenizer(), ["no"])
    with pytest.raises(PeftLabError, match="max_new_tokens must be a positive whole number"):
        generate_text(tiny.llama(), tiny.tokenizer(), ["no"], max_new_tokens=0)


def bart():
    from transformers import MBartConfig, MBartForConditionalGeneration

    torch.manual_seed(2)
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
             "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}  # fmt: skip
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 0, "decoder_start_token_id": 0}
    places = {"max_position_embeddings": 64, "forced_eos_token_id": None}
    config = MBartConfig(vocab_size=18, init_std=1.0, **sizes, **ids, **places)
    return MBartForConditionalGeneration(config).eval()


def decoder():
    return tiny.llama(seed=1, vocab_size=18, initializer_range=1.0).eval()


SETTINGS = {
    "forced_bos_token_id": 9, "forced_eos_token_id": 0, "suppress_tokens": [4, 5, 9, 10, 11],
    "begin_suppress_tokens": [6, 7, 8, 9, 10, 11], "bad_words_ids": [[9], [10], [6, 7]], "repetition_penalty": 3.0,
    "no_repeat_ngram_size": 2, "min_new_tokens": 6, "min_length": 9, "sequence_bias": [[[9], 90.0]],
    "encoder_no_repeat_ngram_size": 1, "exponential_decay_length_penalty": (2, 9.0), "renormalize_logits": True,
    "eos_token_id": [9, 12],
}  # fmt: skip


@pytest.mark.parametrize(
    ("make", "setting"),
    [*((bart, name) for name in SETTINGS), *((decoder, name) for name in SETTINGS if not name.startswith("encoder"))],
)
def test_the_generation_config_is_kept(make, setting):
    """Word for word what transformers' greedy generate gives one prompt at a time."""
    tokenizer, model = tiny.tokenizer(), make()
    plain = generate_text(model, tokenizer, PROMPTS, 8)
    model.generation_config.update(**{setting: SETTINGS[setting]})
    before = model.generation_config.to_dict()
    ends = {0, *(SETTINGS[setting] if setting == "eos_token_id" else [])}
    right = []
    for prompt in PROMPTS:
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        row = model.generate(input_ids=ids, attention_mask=ids.new_ones(ids.shape), do_sample=False, num_beams=1,
                             max_new_tokens=8, eos_token_id=sorted(ends), pad_token_id=0)[0].tolist()  # fmt: skip
        row = row[1:] if make is bart else row[ids.shape[1] :]
        row = row[: next((at for at, token in enumerate(row) if token in ends), len(row))]
        right.append(tokenizer.decode(row, skip_special_tokens=True))
    assert generate_text(model, tokenizer, PROMPTS, 8, batch_size=2) == right
    assert model.generation_config.to_dict() == before
    if setting in ("forced_bos_token_id", "suppress_tokens", "bad_words_ids", "repetition_penalty", "sequence_bias"):
        assert right != plain, "a setting that changes nothing would prove nothing"


@pytest.mark.parametrize("make", [decoder, bart])
def test_sampling_and_beams_are_left_out_in_silence(make, capfd):
    tokenizer, model = tiny.tokenizer(), make()
    plain = generate_text(model, tokenizer, PROMPTS, 8)
    model.generation_config.update(do_sample=True, temperature=0.1, top_k=3, top_p=0.2, min_p=0.1, typical_p=0.5,
                                   epsilon_cutoff=0.1, eta_cutoff=0.1, num_beams=4, length_penalty=3.0,
                                   early_stopping=True, num_return_sequences=2, max_length=3, output_scores=True,
                                   prompt_lookup_num_tokens=2, penalty_alpha=0.5, force_words_ids=[[9]],
                                   return_dict_in_generate=True)  # fmt: skip
    capfd.readouterr()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert generate_text(model, tokenizer, PROMPTS, 8, progress=False) == plain
    assert capfd.readouterr() == ("", "")


def test_an_answer_ends_at_the_tokenizers_end_and_at_the_configs():
    tokenizer, model = tiny.tokenizer(), decoder()
    (whole,) = generate_text(model, tokenizer, "the cat runs ?", 12)
    ids = model.generate(torch.tensor([tokenizer("the cat runs ?")["input_ids"]]), max_new_tokens=12, eos_token_id=0)[0]
    words = tokenizer.convert_ids_to_tokens(ids[4:])
    stop = next(word for word in words if word in tiny.WORDS and words.index(word) > 0)
    model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids(stop)
    (cut,) = generate_text(model, tokenizer, "the cat runs ?", 12)
    assert whole.startswith(cut) and len(cut) < len(whole)
    tokenizer.eos_token = None  # the config's alone will do
    assert generate_text(model, tokenizer, "the cat runs ?", 12) == [cut]


@pytest.mark.parametrize("make", [decoder, bart])
def test_the_configs_end_token_may_be_missing_or_a_list(make):
    tokenizer, model = tiny.tokenizer(), make()
    plain = generate_text(model, tokenizer, PROMPTS, 8)
    for end in (None, [0], 0):
        model.generation_config.eos_token_id = end
        assert generate_text(model, tokenizer, PROMPTS, 8) == plain


def test_the_bar_counts_each_answer(monkeypatch):
    bars = []

    class Seen(generation.Bar):
        def __exit__(self, *exc_info):
            bars.append((self.total, self.done))

    monkeypatch.setattr(generation, "Bar", Seen)
    generate_text(decoder(), tiny.tokenizer(), PROMPTS, 2, batch_size=2)
    assert bars == [(5, 5)]


def test_one_conversation_alone_is_one_prompt():
    tokenizer, model = tiny.tokenizer(chat=True), decoder()
    conversation = [{"role": "user", "content": "red ?"}]
    assert generate_text(model, tokenizer, conversation, 4) == generate_text(model, tokenizer, [conversation], 4)
    assert generate_text(model, tokenizer, iter([conversation]), 4) == generate_text(model, tokenizer, "red ?", 4)


def test_prompts_that_a_model_cannot_read_are_told():
    tokenizer = tiny.tokenizer()
    for wrong in (None, 3, {"role": "user"}):
        with pytest.raises(PeftLabError, match="give a list of texts or of conversations"):
            generate_text(tiny.llama(), tokenizer, wrong)
    with pytest.raises(PeftLabError, match="Prompt 1 has no token"):
        generate_text(tiny.llama(), tokenizer, ["no", ""])
    with pytest.raises(PeftLabError, match="Prompt 0 has the token 13, and the vocabulary of LlamaForCausalLM .* to 7"):
        generate_text(tiny.llama(vocab_size=8), tokenizer, ["sleeps"])


@pytest.mark.slow
def test_the_real_model_answers_in_batches_as_it_does_one_at_a_time():
    """float32, prompts of very different lengths: padding on the left changes no word."""
    import peftlab as pl

    model, tokenizer = pl.load_model("smollm2-135m")
    prompts = [
        "What is the capital of France?",
        "2 + 2 =",
        "Name three colours, separated by commas, and say why you like each of them.",
        "Write one sentence about the sea.",
    ]
    alone = [generate_text(model, tokenizer, prompt, 10)[0] for prompt in prompts]
    assert generate_text(model, tokenizer, prompts, 10, batch_size=3) == alone  # three, and one that is left
    assert alone[0] == "The capital of France is Paris.", "and it stops there"
