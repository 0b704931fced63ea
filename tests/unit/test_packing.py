"""Packed rows give the losses, the gradients and the steps of the padded examples; where they could not, an error."""

import copy
import itertools

import peft
import pytest
import tiny
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OpenAIGPTConfig,
    OpenAIGPTLMHeadModel,
    OPTConfig,
    OPTForCausalLM,
)

import peftlab as pl
from peftlab.errors import PeftLabError
from peftlab.training import borders
from peftlab.training.losses import causal_lm_loss
from peftlab.training.model_facts import facts_of
from peftlab.training.packing import best_rows, first_fit, pack

SIZES = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "eos_token_id": 0,
         "pad_token_id": 0, "bos_token_id": None}  # fmt: skip


def made(kind, **settings):
    torch.manual_seed(0)
    if kind == "llama":
        return tiny.llama(dtype=torch.float64, initializer_range=0.3, **settings)
    if kind == "gpt2":
        sizes = {"vocab_size": 32, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16, "bos_token_id": None}
        off = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        return GPT2LMHeadModel(GPT2Config(**sizes, **off, eos_token_id=0, initializer_range=0.3, **settings)).double()
    if kind == "window":
        return MistralForCausalLM(
            MistralConfig(**SIZES, sliding_window=3, head_dim=4, initializer_range=0.3, **settings)
        ).double()
    if kind == "both windows":
        types = ["sliding_attention", "full_attention"]
        config = Gemma3TextConfig(**SIZES, head_dim=4, sliding_window=3, layer_types=types, **settings)
        return Gemma3ForCausalLM(config).double()
    assert kind == "experts"
    sizes = {**SIZES, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}
    model = MixtralForCausalLM(MixtralConfig(**sizes, initializer_range=0.3, **settings)).double()
    model.set_experts_implementation("eager")  # the fused kernels know no float64
    return model


def masked(**settings):
    """One that does not find borders in positions, and has two kinds of layers: it is given masks."""
    torch.manual_seed(0)
    types = ["sliding_attention", "full_attention"]
    sizes = {**SIZES, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 4, "initializer_range": 0.3}
    model = GptOssForCausalLM(GptOssConfig(**sizes, sliding_window=3, layer_types=types, **settings))
    model.set_experts_implementation("eager")
    return model.double()


def test_a_model_that_does_not_look_for_borders_is_given_masks():
    model = masked()
    assert borders.needs_masks(model, facts_of(model))
    same(trained(model, False), trained(model, True), rel=1e-6)
    same(trained(model, False), trained(model, True, checkpointing=True), rel=1e-6)
    expected = pl.mean_loss(model, ROWS, pl.Collator())
    assert pl.mean_loss(model, ROWS, pl.Collator(packing=True)) == pytest.approx(expected, rel=1e-6)
    model = OPTForCausalLM(OPTConfig(vocab_size=32, hidden_size=16, ffn_dim=16, num_hidden_layers=2, dropout=0.0,
                                     num_attention_heads=2, word_embed_proj_dim=16, init_std=0.3)).double()  # fmt: skip
    assert borders.needs_masks(model, facts_of(model))
    same(trained(model, False), trained(model, True))


EXACT = ("llama", "gpt2", "window", "both windows", "experts")
ROWS = tiny.examples(12)
for row in ROWS[::2]:
    row["labels"] = list(row["input_ids"])  # a text, of which every token is learned


def loss_and_gradients(model, batch):
    model.zero_grad()
    total, count = causal_lm_loss(model, batch)
    total.backward()
    return total.detach(), int(count), [parameter.grad.clone() for parameter in model.parameters()]


def test_first_fit_takes_the_longest_first_and_leaves_little_room():
    assert first_fit([5, 3, 2, 4], 7) == [[0, 2], [3, 1]]
    assert first_fit([2, 2, 2], 2) == [[0], [1], [2]]
    assert sorted(itertools.chain(*best_rows([9, 6, 6, 6]))) == [0, 1, 2, 3]
    # rows of 9 tokens would hold one example each; rows of 15 hold them without a blank
    rows = best_rows([9, 6, 6, 6, 6, 6])
    assert len(rows) * max(sum([9, 6, 6, 6, 6, 6][i] for i in row) for row in rows) == 45  # not one blank


def test_what_a_packed_batch_holds():
    examples = [{"input_ids": [5, 6, 7, 8], "labels": [5, 6, 7, 8]}, {"input_ids": [9, 4], "labels": [-100, 4]}]
    examples += [{"input_ids": [3], "labels": [3]}]
    batch = pl.Collator(packing=True)(examples)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 4, 3]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 0]]
    # no token before an example learns to predict its first one
    assert batch["labels"].tolist() == [[-100, 6, 7, 8, -100, 4, -100]]
    assert batch["use_cache"] is False and "attention_mask" not in batch
    rounded = pl.Collator(tiny.tokenizer(), packing=True, multiple_of=8)(examples)
    assert [rounded[key][0, -1].item() for key in ("input_ids", "position_ids", "labels")] == [0, 0, -100]
    assert pl.Collator(packing=True)([{"input_ids": [1] * 6}, {"input_ids": [2] * 5}])["input_ids"].shape == (1, 11)
    left = pl.Collator(packing=True, side="left")(examples)
    assert all(torch.equal(left[key], batch[key]) for key in ("input_ids", "labels", "position_ids"))
    # an example that was padded when it was encoded gives its real tokens alone
    padded = [{**one, "attention_mask": [1] * len(one["input_ids"])} for one in examples[:1]]
    padded.append({"input_ids": [0, 0, 9, 4], "labels": [-100, -100, -100, 4], "attention_mask": [0, 0, 1, 1]})
    packed = pl.Collator(packing=True)(padded)
    assert packed["input_ids"].tolist() == [[5, 6, 7, 8, 9, 4]]
    assert packed["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1]]


def same_loss_and_gradients(model, **near):
    padded, packed = pl.Collator()(ROWS), pl.Collator(packing=True)(ROWS)
    assert packed["input_ids"].numel() < padded["input_ids"].numel()
    total, count, gradients = loss_and_gradients(model, padded)
    again, counted, others = loss_and_gradients(model, packed)
    assert counted == count
    torch.testing.assert_close(again, total, **near)
    for one, other in zip(gradients, others, strict=True):
        torch.testing.assert_close(other, one, **near)
    one_row = pack(padded, one_row=True)
    assert one_row["input_ids"].shape == (1, int(padded["attention_mask"].sum()))
    torch.testing.assert_close(causal_lm_loss(model, one_row)[0], total, **near)


@pytest.mark.parametrize("kind", EXACT)
def test_loss_and_gradients_are_those_of_the_padded_batch(kind):
    # Gemma's norms compute in float32, whatever the model's dtype
    near = {"rtol": 1e-6, "atol": 1e-7} if kind == "both windows" else {"rtol": 1e-10, "atol": 1e-10}
    same_loss_and_gradients(made(kind), **near)


@pytest.mark.parametrize("kind", EXACT)
def test_the_plain_attention_of_transformers_is_exact_too(kind):
    model = made(kind, attn_implementation="eager").float()  # its softmax is in float32
    same_loss_and_gradients(model, rtol=1e-4, atol=1e-4)


def trained(model, packing, **settings):
    model = copy.deepcopy(model)
    given = {"steps": 3, "batch_size": 6, "learning_rate": 1e-2, "precision": "fp32", "progress": False,
             "tokenizer": tiny.tokenizer(), **settings}  # fmt: skip
    history = pl.train(model, ROWS, packing=packing, **given)
    return history, {name: value.detach() for name, value in model.named_parameters() if value.requires_grad}


def same(one, other, rel=1e-9):
    (history, values), (again, others) = one, other
    for row, step in zip(history.steps, again.steps, strict=True):
        assert step["tokens"] == row["tokens"]
        assert step["loss"] == pytest.approx(row["loss"], rel=rel)
    for name, value in values.items():
        torch.testing.assert_close(others[name], value, rtol=1e-6, atol=max(1e-8, 10 * rel))


@pytest.mark.parametrize("kind", EXACT)
def test_three_steps_are_those_of_the_padded_examples(kind):
    model = made(kind)
    same(trained(model, False), trained(model, True), rel=1e-7 if kind == "both windows" else 1e-9)


@pytest.mark.parametrize(
    "settings",
    [
        {"checkpointing": True},
        {"checkpointing": "reentrant"},
        {"batch_size": 3, "accumulation": 4},
        {"batch_size": 5, "accumulation": 2, "group_by_length": True},
        {"evaluation_data": ROWS[:7], "evaluate_every": 1},
    ],
    ids=str,
)
def test_with_the_other_settings(settings):
    model = made("llama")
    one, other = trained(model, False, **settings), trained(model, True, **settings)
    same(one, other)
    for row, again in zip(one[0].evaluations, other[0].evaluations, strict=True):
        assert again["loss"] == pytest.approx(row["loss"], rel=1e-9)


@pytest.mark.parametrize("config", [pl.LoRAConfig, pl.IA3Config, pl.AdapterConfig], ids=str)
def test_adapters_inside_the_layers_are_exact(config):
    more = {"target_modules": ["q_proj", "v_proj"]} if config is pl.LoRAConfig else {}
    model = pl.attach(made("llama"), config(**more))
    model.double()
    same(trained(model, False), trained(model, True))


def test_models_of_hugging_face_peft():
    model = peft.get_peft_model(made("llama"), peft.LoraConfig(target_modules=["q_proj"])).double()
    same(trained(model, False), trained(model, True))
    assert pl.mean_loss(model, ROWS, pl.Collator(packing=True)) == pytest.approx(
        pl.mean_loss(model, ROWS, pl.Collator()), rel=1e-9
    )
    prompt = peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    with pytest.raises(PeftLabError, match="packing cannot be used"):
        trained(peft.get_peft_model(tiny.llama(), prompt), True)


@pytest.mark.parametrize("config", [pl.PromptTuningConfig, pl.PTuningConfig, pl.PrefixTuningConfig], ids=str)
def test_prompts_and_prefixes_are_refused_while_they_are_active(config):
    model = pl.attach(tiny.llama(), config(num_virtual_tokens=3))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(PeftLabError, match="prompt or a prefix in front of a row"):
        pl.train(model, ROWS, packing=True, steps=1, progress=False)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pl.disabled(model):
        pl.mean_loss(model, ROWS, pl.Collator(packing=True))


def test_one_adapter_for_each_row_is_refused():
    model = pl.attach(tiny.llama(), pl.LoRAConfig(target_modules=["q_proj"]))
    pl.activate(model, ["default"] * 12)
    with pytest.raises(PeftLabError, match="adapter for each row"):
        pl.mean_loss(model, ROWS, pl.Collator(packing=True), batch_size=12)


def hybrid():
    from transformers import JambaConfig, JambaForCausalLM

    sizes = {**SIZES, "num_experts": 1, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 4,
             "mamba_dt_rank": 4, "use_mamba_kernels": False}  # fmt: skip
    return JambaForCausalLM(JambaConfig(**sizes))


class Sums(nn.Module):
    """A model of one's own, whose state runs on from token to token."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(32, 8), nn.Linear(8, 32)

    def forward(self, input_ids, attention_mask=None, position_ids=None):
        return self.head(self.embedding(input_ids).cumsum(1))


class Alone(Sums):
    """One that reads each token alone, but counts positions itself."""

    def forward(self, input_ids, attention_mask=None, position_ids=None):
        places = torch.arange(input_ids.shape[1]) % 32
        return self.head(self.embedding(input_ids) + self.embedding(places))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: MambaForCausalLM(MambaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=2, state_size=4)),
         "takes no position_ids"),
        (lambda: OpenAIGPTLMHeadModel(OpenAIGPTConfig(vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=64)),
         "changes with the example before it"),
        (hybrid, "layers of the kind [a-z_]+, whose states run on"),
        (Sums, "changes with the example before it"),
        (Alone, "does not count positions"),
        (lambda: BertForMaskedLM(BertConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, intermediate_size=16,
                                            num_attention_heads=2)), "is for masked language modelling"),
        (lambda: made("experts", output_router_logits=True), "balances its experts"),
    ],
)  # fmt: skip
def test_models_that_would_mix_the_examples_are_refused(make, message):
    model = make()
    with pytest.raises(PeftLabError, match=message):
        pl.train(model, ROWS, packing=True, steps=1, progress=False)


def test_the_trial_changes_nothing():
    model = made("llama").train()
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    assert not borders.needs_masks(model, facts_of(model))
    assert torch.equal(torch.rand(3), expected) and model.training and model.config.use_cache


def test_a_row_may_be_longer_than_the_positions_but_an_example_may_not():
    model = made("gpt2")
    rows = [{"input_ids": [1] * 9, "labels": [1] * 9}] * 3 + [{"input_ids": [2] * 16, "labels": [2] * 16}]
    assert pl.Collator(packing=True)(rows)["input_ids"].shape[1] > 16
    same(trained(model, False), trained(model, True))
    long = [*rows, {"input_ids": [2] * 17, "labels": [2] * 17}]
    with pytest.raises(PeftLabError, match="Example 4 of train_data has 17 tokens, and GPT2LMHeadModel has 16"):
        pl.train(model, long, packing=True, steps=1, batch_size=5, progress=False)


def test_what_cannot_be_packed():
    with pytest.raises(PeftLabError, match="batch_size=1 leaves nothing to share"):
        pl.train(tiny.llama(), ROWS, packing=True, batch_size=1)
    with pytest.raises(PeftLabError, match="position_ids of their own"):
        pl.Collator(packing=True)([{"input_ids": [1, 2], "position_ids": [0, 1]}])
    with pytest.raises(PeftLabError, match=r"labels \(2,\) is not one value for each token"):
        pl.Collator(packing=True)([{"input_ids": [1, 2], "labels": 1}] * 2)
    with pytest.raises(PeftLabError, match="packing must be one of True, False"):
        pl.Collator(packing="yes")


def test_a_collate_of_ones_own_is_packed_too():
    model = made("llama")
    collate = pl.Collator(tiny.tokenizer())
    same(trained(model, False), trained(model, True, collate=lambda rows: collate(rows)))
    same(trained(model, False), trained(model, False, collate=pl.Collator(tiny.tokenizer(), packing=True)))


def test_flash_attention_gets_one_row(monkeypatch):
    model = made("llama")
    seen = []

    def noted(model, batch):
        seen.append(batch)
        return causal_lm_loss(model, batch)

    monkeypatch.setattr(borders, "in_one_row", lambda model: True)
    monkeypatch.setattr("peftlab.training.inputs.in_one_row", lambda model: True)
    pl.train(model, ROWS, packing=True, steps=1, batch_size=12, loss=noted, progress=False)
    assert len(seen[0]["input_ids"]) == 1
    monkeypatch.undo()
    model.config._attn_implementation = "flash_attention_2"
    assert borders.in_one_row(model)
    model.config._attn_implementation = "sdpa"
    assert not borders.in_one_row(model)
