"""Prompts and prefixes at work: what they start from, mixtures and rows, checkpointing, caches, resuming, errors."""

import copy
import dataclasses
import types

import pytest
import tiny
import torch
from safetensors.torch import load_file
from test_transformers_trainer import trainer, weights
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    FalconConfig,
    FalconForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    modeling_layers,
)

import peftlab as pl
from peftlab.commands.cli import main
from peftlab.core.checkpointing import switch_checkpointing
from peftlab.methods.virtual import is_encoder_decoder
from peftlab.training import files

N = 5
CONFIGS = {
    "prompt": pl.PromptTuningConfig(num_virtual_tokens=N),
    "deep": pl.PromptTuningConfig(num_virtual_tokens=N, deep=True),
    "p-tuning": pl.PTuningConfig(num_virtual_tokens=N, encoder_hidden=7),
    "lstm": pl.PTuningConfig(num_virtual_tokens=N, encoder="lstm", encoder_hidden=7),
    "prefix": pl.PrefixTuningConfig(num_virtual_tokens=N),
    "projected": pl.PrefixTuningConfig(num_virtual_tokens=N, projection=True, encoder_hidden=7),
}


def gpt2():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=32, n_embd=16, n_head=2, n_layer=2, n_positions=24, resid_pdrop=0, embd_pdrop=0,
                        attn_pdrop=0, bos_token_id=0, eos_token_id=0)  # fmt: skip
    return GPT2LMHeadModel(config)


def bert(**settings):
    torch.manual_seed(0)
    config = BertConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_labels=3,
                        num_attention_heads=2, max_position_embeddings=24, **settings)  # fmt: skip
    return BertForSequenceClassification(config)


def t5():
    torch.manual_seed(0)
    return T5ForConditionalGeneration(
        T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0)
    )


MODELS = {"llama": lambda: tiny.llama(), "gpt2": gpt2, "bert": bert, "t5": t5}


def model_with(config, build=tiny.llama, seed=2, **settings):
    model = build(**settings).double().eval()
    torch.manual_seed(seed)
    return pl.attach(model, config)


def inputs(rows=3, length=6):
    ids = torch.randint(1, 32, (rows, length), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def labels_for(kind, ids):
    return ids[:, 0] % 3 if kind == "bert" else ids


# -- what they start from ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [tiny.llama, gpt2])
@pytest.mark.parametrize("config", [
    pl.PromptTuningConfig(num_virtual_tokens=N, init="text", init_text=[4, 9, 1, 7, 3]),
    pl.PromptTuningConfig(num_virtual_tokens=N, init="text", init_text=[4, 9, 1, 7, 3], deep=True),
    pl.PrefixTuningConfig(num_virtual_tokens=N, init="text", init_text=[4, 9, 1, 7, 3]),
], ids=["prompt", "deep", "prefix"])  # fmt: skip
def test_a_start_from_text_is_that_text_in_front(build, config):
    model = model_with(config, build)
    text = torch.tensor(config.init_text).expand(3, -1)
    ids = inputs()["input_ids"]
    found = model(input_ids=ids).logits[:, -ids.shape[1] :]
    with pl.disabled(model):
        expected = model(input_ids=torch.cat([text, ids], dim=1)).logits[:, N:]
    assert (found - expected).abs().max() < 1e-12
    with pl.disabled(model):
        assert (model(input_ids=ids).logits - found).abs().max() > 1e-3


def test_a_short_text_is_repeated_and_a_long_one_cut():
    tokenizer = tiny.tokenizer()
    config = pl.PromptTuningConfig(num_virtual_tokens=5, init="text", init_text="red cat", tokenizer=tokenizer)
    model = model_with(config)
    table = model.get_input_embeddings().weight
    red, cat = tokenizer("red cat")["input_ids"]
    assert torch.equal(prompt_of(model), table[[red, cat, red, cat, red]])
    long = pl.PromptTuningConfig(num_virtual_tokens=2, init="text", init_text=[3, 4, 5])
    assert torch.equal(prompt_of(model_with(long)), table[[3, 4]])


def prompt_of(model, name="default", part="prompt"):
    return model.peftlab[name][part].source.rows


def test_a_start_from_the_vocabulary_is_rows_of_it_and_random_is_not():
    table = tiny.llama().double().get_input_embeddings().weight
    rows = prompt_of(model_with(pl.PromptTuningConfig(num_virtual_tokens=9)))
    assert all((table == row).all(dim=1).any() for row in rows)
    assert 0.7 < prompt_of(model_with(pl.PromptTuningConfig(num_virtual_tokens=99, init="random"))).std() < 1.3


def test_a_prefix_of_zeros_only_takes_attention_away():
    model = model_with(pl.PrefixTuningConfig(num_virtual_tokens=N, init="zero"))
    assert not prompt_of(model, part="prefix").any()
    assert model.peftlab.default.prefix.source.rows.shape == (N, 2 * 2 * 2 * 4)  # layers, heads of keys, width


# -- mixtures and rows ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["prompt", "deep", "p-tuning", "prefix", "projected"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_rows_give_what_each_gives_alone(kind, checkpointing):
    model = model_with(CONFIGS[kind])
    torch.manual_seed(5)
    pl.attach(model, CONFIGS[kind], name="other")
    if checkpointing:
        switch_checkpointing(model, "enable", {"use_reentrant": False})
        model.train()
    batch = inputs(rows=4)
    alone = {}
    for name in ("default", "other"):
        pl.activate(model, name)
        alone[name] = model(**batch, use_cache=False).logits
    rows = ["other", "default", "default", "other"]
    pl.activate(model, rows)
    together = model(**batch, use_cache=False).logits
    for row, name in enumerate(rows):
        assert (together[row] - alone[name][row]).abs().max() < 1e-12
    assert (alone["default"] - alone["other"]).abs().max() > 1e-3


def test_rows_in_beam_search():
    model = model_with(CONFIGS["prefix"])
    pl.attach(model, CONFIGS["prefix"], name="other")
    settings = dict(max_new_tokens=4, num_beams=2, pad_token_id=0)
    batch, alone = inputs(rows=2), []
    for row, name in enumerate(("other", "default")):
        pl.activate(model, name)
        alone.append(model.generate(**{key: value[row : row + 1] for key, value in batch.items()}, **settings)[0])
    pl.activate(model, ["other", "default"])
    for found, expected in zip(model.generate(**batch, **settings), alone, strict=True):
        assert torch.equal(found[: len(expected)], expected)


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_a_mixture_is_the_weighted_sum_of_vectors(kind):
    part = "prompt" if kind == "prompt" else "prefix"
    model = model_with(CONFIGS[kind])
    pl.attach(model, CONFIGS[kind], name="other")
    pl.activate(model, {"default": 0.7, "other": 0.3})
    found = model(**inputs()).logits
    with torch.no_grad():
        mixed = 0.7 * prompt_of(model, "default", part) + 0.3 * prompt_of(model, "other", part)
        prompt_of(model, "default", part).copy_(mixed)
    pl.activate(model, "default")
    assert (model(**inputs()).logits - found).abs().max() < 1e-12


def test_beside_lora_both_run():
    model = model_with(CONFIGS["prefix"])
    pl.attach(model, pl.LoRAConfig(r=2, init="random"), name="low-rank")
    with pl.disabled(model):
        base = model(**inputs()).logits
    answers = []
    for which in ("default", "low-rank", {"default": 1.0, "low-rank": 1.0}):
        pl.activate(model, which)
        answers.append(model(**inputs()).logits)
    for one in range(3):
        assert all((answers[one] - other).abs().max() > 1e-4 for other in [base, *answers[:one]])


@pytest.mark.parametrize(("other", "which", "message"), [
    (pl.PromptTuningConfig(num_virtual_tokens=4), ["default", "other"], "5 virtual tokens.*4 virtual tokens"),
    (pl.PromptTuningConfig(num_virtual_tokens=4), {"default": 1, "other": 1}, "cannot run at once"),
    (pl.PrefixTuningConfig(num_virtual_tokens=5), {"default": 1, "other": 1}, "a prompt.*a prefix"),
    (pl.LoRAConfig(), ["default", "other"], "has none"),
    (pl.LoRAConfig(), ["default", None], "in one batch"),
])  # fmt: skip
def test_what_cannot_run_together_is_refused_and_nothing_changes(other, which, message):
    model = model_with(CONFIGS["prompt"])
    pl.attach(model, other, name="other")
    before = model(**inputs()).logits
    with pytest.raises(pl.PeftLabError, match=message):
        pl.activate(model, which)
    assert torch.equal(model(**inputs()).logits, before)


# -- gradient checkpointing ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", CONFIGS)
def test_checkpointing_gives_the_same_gradients(name, kind, monkeypatch):
    said = []
    monkeypatch.setattr(modeling_layers.logger, "warning_once", said.append)
    config = dataclasses.replace(CONFIGS[kind], task_type="SEQ_CLS" if name == "bert" else None)
    found = []
    for reentrant in (None, False, True):
        model = model_with(config, MODELS[name])
        model.config.use_cache = False
        if reentrant is not None:
            switch_checkpointing(model, "enable", {"use_reentrant": reentrant})
            if reentrant:
                model.enable_input_require_grads()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
            if hasattr(module, "dropout") and isinstance(module.dropout, float):
                module.dropout = 0.0
        model.train()
        batch = inputs()
        batch["attention_mask"][0, -2:] = 0
        loss = model(**batch, labels=labels_for(name, batch["input_ids"])).loss
        loss.backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        assert all(grad is not None for grad in grads.values())
        found.append((loss.item(), grads))
    (loss, grads), *checkpointed = found
    for again, others in checkpointed:
        assert abs(loss - again) < 1e-12
        for key, grad in grads.items():
            assert (grad - others[key]).abs().max() < 1e-12, key
    for key, grad in grads.items():
        assert grad.any() or "k_proj" in key, key
    # transformers tells when it drops a cache, and with it a prefix; before 5.18 or so it told ahead of any hook
    assert not said or "__call__" in vars(modeling_layers.GradientCheckpointingLayer)


# -- generation, caches, positions ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_a_cache_changes_nothing(name, kind):
    model = model_with(CONFIGS[kind], MODELS[name])
    batch = inputs()
    batch["attention_mask"][0, :2] = 0
    settings = dict(max_new_tokens=6, pad_token_id=0, eos_token_id=None)
    fast, slow = (model.generate(**batch, use_cache=cache, **settings) for cache in (True, False))
    assert torch.equal(fast, slow)
    # and the last of them is what the model says of the tokens before it
    if name != "t5":
        mask = torch.cat([batch["attention_mask"], torch.ones_like(fast[:, 6:])], 1)
        logits = model(input_ids=fast, attention_mask=mask).logits[:, -2]
        if "prefix" in kind or kind == "projected":  # generate tells positions that do not count padding
            assert torch.equal(logits.argmax(-1)[1:], fast[1:, -1])
        else:
            assert torch.equal(logits.argmax(-1), fast[:, -1])


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_answers_to_several_prompts_are_those_of_each_alone(name, kind):
    """Also where rows are padded, though positions that a call leaves to the model count padding."""
    tokenizer = tiny.tokenizer()
    model = model_with(CONFIGS[kind], MODELS[name], seed=4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)  # so that positions matter to what is written
    prompts = ["the cat runs", "a", "dog runs red ?", "a red dog", "the blue cat sleeps the dog runs"]
    together = pl.generate_text(model, tokenizer, prompts, max_new_tokens=5, progress=False)
    alone = [pl.generate_text(model, tokenizer, prompt, max_new_tokens=5, progress=False)[0] for prompt in prompts]
    assert together == alone and (name == "t5" or len(set(alone)) > 1)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_a_text_stands_right_behind_the_virtual_tokens(name, kind):
    """Positions 0 to N - 1 are the prompt's. A text has N, N + 1, ... in each row, whatever is padded beside it."""
    tokenizer = tiny.tokenizer()
    model = model_with(CONFIGS[kind], MODELS[name])
    prompts, seen = ["the cat runs", "a", "the blue cat sleeps the dog runs"], []

    def look(module, args, kwargs):
        lengths = kwargs["attention_mask"].sum(1) - N  # of the texts so far; the mask covers the virtual tokens, too
        seen.append((kwargs["position_ids"].tolist(), lengths.tolist()))

    with model.base_model.register_forward_pre_hook(look, with_kwargs=True):
        pl.generate_text(model, tokenizer, prompts, max_new_tokens=3, progress=False)
    (first, lengths), *later = seen
    assert sorted(lengths) == sorted(len(tokenizer(prompt)["input_ids"]) for prompt in prompts) and len(later) == 2
    in_columns = kind not in ("prefix", "projected")  # a prefix stands in the cache and has no columns
    for positions, length in zip(first, lengths, strict=True):
        assert positions[-length:] == list(range(N, N + length))
        assert not in_columns or positions[:N] == list(range(N))
    for positions, so_far in later:
        assert positions == [[N + length - 1] for length in so_far]


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_a_cache_of_fixed_length_is_refused(kind):
    model = model_with(CONFIGS[kind])
    with pytest.raises(pl.PeftLabError, match="dynamic"):
        model.generate(**inputs(), max_new_tokens=3, cache_implementation="static", pad_token_id=0)


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_a_text_past_the_last_position_is_refused(kind):
    model = model_with(CONFIGS[kind], gpt2)
    assert model(**inputs(length=19)).logits.isfinite().all()
    with pytest.raises(pl.PeftLabError, match="24 positions; cut the text to 19"):
        model(**inputs(length=20))


def test_positions_of_ones_own_are_an_error_in_training_and_move_on_with_a_prefix():
    batch = inputs()
    positions = torch.arange(6).expand(3, -1)
    model = model_with(CONFIGS["prompt"]).train()
    with pytest.raises(pl.PeftLabError, match="position_ids"):
        model(**batch, position_ids=positions)
    model = model_with(CONFIGS["prefix"])
    assert torch.equal(model(**batch, position_ids=positions).logits, model(**batch).logits)


SIZES = dict(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
             pad_token_id=0, eos_token_id=None)  # fmt: skip
OTHERS = {
    "a sliding window": lambda: MistralForCausalLM(MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=4)),
    "layers of both kinds": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(**SIZES, num_key_value_heads=1, head_dim=6, sliding_window=4, layer_types=BOTH)
    ),
    "a cache by another name": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES)),
    "one head for all": lambda: FalconForCausalLM(
        FalconConfig(vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, eos_token_id=None)
    ),
    "bart": lambda: BartForConditionalGeneration(
        BartConfig(vocab_size=32, d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
                   decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=64,
                   pad_token_id=0, bos_token_id=1, eos_token_id=None, forced_eos_token_id=None,
                   decoder_start_token_id=2)
    ),
}  # fmt: skip
BOTH = ["sliding_attention", "full_attention"]


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("kind", ["prompt", "deep", "prefix"])
def test_other_models_write_and_train(name, kind):
    torch.manual_seed(0)
    model = OTHERS[name]().double().eval()
    pl.attach(model, CONFIGS[kind])
    batch = inputs(length=7)
    settings = dict(max_new_tokens=8, pad_token_id=0)
    assert torch.equal(model.generate(**batch, **settings), model.generate(**batch, use_cache=False, **settings))
    model.config.use_cache = False
    model.train()
    for module in model.modules():
        for dropout in ("dropout", "attention_dropout", "activation_dropout"):
            if isinstance(getattr(module, dropout, None), float):
                setattr(module, dropout, 0.0)
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    found = []
    for checkpointing in (False, True):
        model.zero_grad()
        if checkpointing:
            switch_checkpointing(model, "enable", {"use_reentrant": False})
        model(**batch, labels=batch["input_ids"]).loss.backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad})
    assert all((grad - found[1][n]).abs().max() < 1e-12 for n, grad in found[0].items())
    assert all(grad.any() for grad in found[0].values())


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_autocast(kind, dtype):
    model = pl.attach(tiny.llama(dtype=dtype), CONFIGS[kind])
    batch = inputs()
    expected = model(**batch).logits.float()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**batch, labels=batch["input_ids"])
    assert (loss.logits.float() - expected).norm() < 0.05 * expected.norm()
    loss.loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_inputs_by_place_and_as_embeddings():
    for kind in ("prompt", "prefix"):
        model = model_with(CONFIGS[kind])
        batch = inputs()
        expected = model(**batch).logits
        assert torch.equal(model(batch["input_ids"], batch["attention_mask"]).logits, expected)
        embeddings = model.get_input_embeddings()(batch["input_ids"])
        assert torch.equal(model(inputs_embeds=embeddings).logits, expected)


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_copy_of_the_model_has_prompts_of_its_own(kind):
    model = model_with(CONFIGS[kind])
    twin = copy.deepcopy(model)
    expected = model(**inputs()).logits
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.zero_()
    for checkpointing in (False, True):
        if checkpointing:
            switch_checkpointing(twin, "enable", {"use_reentrant": False})
            twin.train()
        assert (twin(**inputs()).logits - expected).abs().max() < 1e-12


# -- saved, resumed, detached, trained by others -------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", CONFIGS)
def test_the_saved_base_is_the_base_and_detached_it_is_as_before(name, kind, tmp_path):
    build = MODELS[name]
    model = build().eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    flags = {key: value.requires_grad for key, value in model.named_parameters()}
    pl.attach(model, dataclasses.replace(CONFIGS[kind], task_type="SEQ_CLS" if name == "bert" else None))
    model.save_pretrained(tmp_path)
    assert not any("peftlab" in key or "prompt" in key for key in load_file(tmp_path / "model.safetensors"))
    pl.detach(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert set(before) == set(model.state_dict())
    assert flags == {key: value.requires_grad for key, value in model.named_parameters()}
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


@pytest.mark.parametrize(("kind", "checkpointing"), [(kind, i % 2 == 0) for i, kind in enumerate(CONFIGS)])
def test_a_run_goes_on_to_the_bit(kind, checkpointing, tmp_path):
    data = tiny.examples()
    settings = dict(tokenizer=tiny.tokenizer(), batch_size=3, learning_rate=0.05, checkpointing=checkpointing,
                    progress=False, precision="fp32", steps=6)  # fmt: skip

    def fresh():
        torch.manual_seed(8)
        return pl.attach(tiny.llama(), CONFIGS[kind])

    whole = fresh()
    history = pl.train(whole, data, **settings)
    first = fresh()
    with pytest.raises(Halt):
        pl.train(first, data, folder=tmp_path, save_every=2, callback=halt, **settings)
    assert files.newest(tmp_path).name.endswith("2")
    second = fresh()
    assert pl.train(second, data, folder=tmp_path, save_every=2, **settings) == history
    for (name, value), other in zip(whole.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(value, other), name
    start = fresh().state_dict()
    assert all(torch.equal(value, start[name]) != ("peftlab" in name) for name, value in whole.state_dict().items())


@pytest.mark.parametrize(
    ("kind", "checkpointing"), [("prompt", True), ("deep", False), ("p-tuning", False), ("prefix", True)]
)
def test_an_encoder_decoder_learns(kind, checkpointing):
    torch.manual_seed(8)
    model = pl.attach(t5(), CONFIGS[kind])
    data = [{"input_ids": [3 + i, 5, 7], "labels": [9, 11, 0]} for i in range(8)]
    history = pl.train(model, data, steps=20, batch_size=4, learning_rate=0.3, precision="fp32", progress=False,
                       checkpointing=checkpointing)  # fmt: skip
    losses = [row["loss"] for row in history.steps]
    assert sum(losses[-5:]) < 0.95 * sum(losses[:5])


class Halt(Exception):
    pass


def halt(model, row):
    if row["step"] == 3:
        raise Halt


@pytest.mark.parametrize("kind", ["prompt", "p-tuning", "projected"])
def test_trainer_resumes_to_the_same_weights(kind, tmp_path):
    """The prompt's own network comes back as well, from the file beside."""
    from transformers import TrainerCallback

    class Raise(TrainerCallback):
        def on_save(self, args, state, control, **rest):
            if state.global_step == 4:
                raise Halt

    def fresh():
        torch.manual_seed(8)
        return pl.attach(tiny.llama(), CONFIGS[kind])

    whole = fresh()
    trainer(whole, tmp_path / "whole").train()
    with pytest.raises(Halt):
        trainer(fresh(), tmp_path / "run", callbacks=[Raise()]).train()
    torch.manual_seed(99)
    resumed = pl.attach(tiny.llama(), CONFIGS[kind])
    trainer(resumed, tmp_path / "run").train(resume_from_checkpoint=True)
    after = weights(resumed)
    for name, value in weights(whole).items():
        assert torch.equal(value, after[name]), name
    saved = load_file(tmp_path / "run" / "checkpoint-6" / "model.safetensors")
    assert not any("peftlab" in key for key in saved)


def test_the_loss_of_the_loop_is_the_models_own():
    """The first word of a text is predicted from a prompt (not from a prefix, which has no position), by both."""
    from peftlab.training.losses import causal_lm_loss

    for kind in ("prompt", "prefix"):
        model = model_with(CONFIGS[kind])
        batch = {**inputs(), "labels": inputs()["input_ids"]}
        total, count = causal_lm_loss(model, batch)
        assert abs(total / count - model(**batch).loss) < 1e-6  # transformers computes its loss in float32
        assert count == (18 if kind == "prompt" else 15)


@pytest.mark.parametrize("method", ["prompt", "p-tuning", "prefix"])
def test_from_the_shell(method, tmp_path, capsys):
    import json

    tiny.llama(num_labels=2).save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    rows = [{"text": f"the {word} runs"} for word in ("cat", "dog") for _ in range(8)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    command = ["train", "--model", str(tmp_path / "model"), "--data", str(tmp_path / "data.jsonl"), "--method", method,
               "--virtual-tokens", "4", "--steps", "2", "--out", str(tmp_path / "out"), "--json"]  # fmt: skip
    assert main(command) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["settings"]["virtual_tokens"] == 4
    assert main(["count", str(tmp_path / "model"), "--method", method, "--virtual-tokens", "4", "--json"]) == 0
    counted = json.loads(capsys.readouterr().out)
    assert counted == {key: result[key] for key in ("trainable", "total", "percent")}
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


# -- mistakes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("make", "message"), [
    (
        lambda: pl.PromptTuningConfig(num_virtual_tokens=0),
        "num_virtual_tokens must be a positive whole number, found 0",
    ),
    (lambda: pl.PromptTuningConfig(init="vocabluary"), "Did you mean 'vocabulary'"),
    (lambda: pl.PromptTuningConfig(init="text"), "there is no init_text"),
    (lambda: pl.PromptTuningConfig(init="text", init_text="a cat"), "needs a tokenizer"),
    (lambda: pl.PromptTuningConfig(init_text="a cat"), "say init='text'"),
    (lambda: pl.PromptTuningConfig(task_type="CASUAL_LM"), "task_type"),
    (lambda: pl.PTuningConfig(encoder="lstn"), "Did you mean 'lstm'"),
    (lambda: pl.PTuningConfig(encoder_dropout=1.0), "encoder_dropout must be a number of at least 0 and below 1"),
    (lambda: pl.PrefixTuningConfig(projection=True, init="text", init_text=[1]), "does not work with a projection"),
])  # fmt: skip
def test_a_wrong_config_says_what_is_wrong(make, message):
    with pytest.raises(pl.PeftLabError, match=message):
        make()


def distilbert():
    config = DistilBertConfig(vocab_size=32, dim=16, hidden_dim=32, n_layers=2, n_heads=2)
    return DistilBertForSequenceClassification(config)


def uneven(field):
    """A model whose config has this field, as Gemma 4's has one or the other, by the release of transformers."""
    model = tiny.llama()
    vars(model.config)[field] = 7
    return model


@pytest.mark.parametrize(("build", "config", "message"), [
    (lambda: torch.nn.Sequential(torch.nn.Linear(2, 2)), CONFIGS["prompt"], "no input embedding"),
    (lambda: torch.nn.Sequential(torch.nn.Linear(2, 2)), CONFIGS["prefix"], "no input embedding"),
    (distilbert, CONFIGS["prefix"], "takes no past keys and values"),
    (t5, pl.PrefixTuningConfig(init="text", init_text=[3]), "layers of an encoder-decoder share them"),
    *((tiny.llama, pl.PromptTuningConfig(init="text", init_text=[4, token]), "the model's vocabulary has 32 tokens")
      for token in (99, 32, -1)),
    *((lambda name=name: uneven(name), CONFIGS["prefix"], "keys and values of different sizes")
      for name in ("per_layer_config", "global_head_dim")),
    (tiny.llama, pl.PromptTuningConfig(init="text", init_text=[]), "has no tokens"),
])  # fmt: skip
def test_a_model_that_cannot_is_told_and_left_alone(build, config, message):
    model = build()
    before = [name for name, _ in model.named_modules()]
    with pytest.raises(pl.PeftLabError, match=message):
        pl.attach(model, config)
    assert before == [name for name, _ in model.named_modules()]
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_mask_of_other_form_on_the_encoders_states_is_refused():
    model = t5().eval()
    pl.attach(model, CONFIGS["prompt"])
    states, ids = torch.randn(2, N + 4, 16), torch.ones(2, 3, dtype=torch.long)
    plain = model.decoder(input_ids=ids, encoder_hidden_states=states, encoder_attention_mask=torch.ones(2, 4).long())
    whole = model.decoder(input_ids=ids, encoder_hidden_states=states,
                          encoder_attention_mask=torch.ones(2, N + 4).long())  # fmt: skip
    assert torch.equal(plain.last_hidden_state, whole.last_hidden_state)
    with pytest.raises(pl.PeftLabError, match=r"mask is \(2, 1, 1, 4\), but virtual tokens can only lengthen"):
        model.decoder(input_ids=ids, encoder_hidden_states=states, encoder_attention_mask=torch.ones(2, 1, 1, 4).long())


def test_a_model_whose_config_says_nothing_of_an_encoder_has_none():
    model = types.SimpleNamespace(config=types.SimpleNamespace())
    assert not is_encoder_decoder(model)
    model.config.is_encoder_decoder = True
    assert is_encoder_decoder(model)


def test_a_prefix_that_checkpointing_would_lose_is_refused():
    model = tiny.llama()
    for layer in model.model.layers:
        del layer.self_attn.layer_idx  # as in models whose attention does not know its place
    pl.attach(model, pl.PrefixTuningConfig(num_virtual_tokens=N, init="random"))
    model.config.use_cache = False
    switch_checkpointing(model, "enable", {"use_reentrant": False})
    with pytest.raises(pl.PeftLabError, match="drops its cache"):
        model.train()(**inputs())


def test_a_prompt_cannot_be_merged():
    with pytest.raises(pl.PeftLabError, match="cannot be merged"):
        pl.merge(model_with(CONFIGS["prompt"]))


# -- counts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "method"),
    [  # every shape, and every method on a decoder, on one with grouped heads, on an encoder and on both in one
        ("gpt2", "prompt"), ("gpt2", "p-tuning"), ("gpt2", "prefix"), ("bert-base", "prompt"),
        ("bert-base", "p-tuning"), ("minilm", "prefix"), ("smollm2-135m", "p-tuning"), ("llama-3.1-8b", "prefix"),
        ("qwen2.5-0.5b", "prompt"), ("t5-base", "prompt"), ("t5-base", "p-tuning"), ("t5-base", "prefix"),
    ],
)  # fmt: skip
def test_counts_are_those_of_the_arithmetic(shape, method):
    """Attached to the real shape, without numbers."""
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForSeq2SeqLM,
        AutoModelForSequenceClassification,
    )

    from peftlab.memory.counting.shapes import load_shape
    from peftlab.methods import METHODS

    known = load_shape(shape)
    config = AutoConfig.for_model(**known.config)
    kinds = {"decoder": AutoModelForCausalLM, "encoder": AutoModelForSequenceClassification}
    with torch.device("meta"):
        model = kinds.get(known.kind, AutoModelForSeq2SeqLM).from_config(config)
    task = {"task_type": "SEQ_CLS"} if known.kind == "encoder" else {}
    pl.attach(model, METHODS[method](num_virtual_tokens=7, **task))
    counted = pl.memory.count(shape, method, virtual_tokens=7)
    assert pl.count_parameters(model)[:2] == (counted.trainable, counted.total)
