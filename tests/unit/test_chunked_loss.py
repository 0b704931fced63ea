"""The loss in chunks is the loss of whole logits: its value and every gradient, for each thing a model does to them."""

import copy
from importlib import import_module

import pytest
import tiny
import torch
import transformers as tf
from torch import nn
from torch.nn import functional as F

import peftlab as pl
from peftlab.errors import PeftLabError
from peftlab.training import chunked
from peftlab.training.chunked import ChunkedLoss, Form, chunked_cross_entropy, into_gradient
from peftlab.training.encoding import IGNORE
from peftlab.training.losses import causal_lm_loss

SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
GPT2 = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2}
MOE = {**SMALL, "num_key_value_heads": 2, "output_router_logits": True}
MODELS = [  # each does something else to its logits
    ("LlamaForCausalLM", SMALL),
    ("LlamaForCausalLM", {**SMALL, "tie_word_embeddings": True}),
    ("GPT2LMHeadModel", GPT2),
    ("PhiForCausalLM", SMALL),  # a head with a bias
    ("Gemma2ForCausalLM", {**SMALL, "head_dim": 8, "final_logit_softcapping": 2.0}),
    ("GraniteForCausalLM", {**SMALL, "logits_scaling": 4.0}),
    ("CohereForCausalLM", {**SMALL, "logit_scale": 0.25}),
    ("MixtralForCausalLM", MOE),  # and a balancing loss
]


def made(name, config, seed=0):
    torch.manual_seed(seed)
    kind = getattr(tf, name)
    model = kind(kind.config_class(**config, experts_implementation="eager")).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def batch(rows=3, length=7):
    ids = torch.randint(3, 60, (rows, length), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, :2], labels[1:2] = IGNORE, IGNORE
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def gradients(model, loss, batch):
    model.zero_grad()
    total, count = loss(model, batch)
    (total / count).backward()
    return total.detach(), int(count), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def close(one, other, tolerance=1e-12):
    assert one[1] == other[1] and one[2].keys() == other[2].keys()
    for mine, theirs in ((one[0], other[0]), *((one[2][name], other[2][name]) for name in one[2])):
        assert (mine - theirs).abs().max() <= tolerance * max(1.0, theirs.abs().max())


@pytest.mark.parametrize("train", ["all", "head", "adapter"])
@pytest.mark.parametrize(("name", "config"), MODELS, ids=[f"{name}{len(c)}" for name, c in MODELS])
def test_it_is_the_whole_loss_in_float64(name, config, train, monkeypatch):
    monkeypatch.setattr(chunked, "CHUNK_BYTES", 1)
    monkeypatch.setattr(chunked, "LEAST", 3)  # several chunks, the last one shorter
    model = made(name, config)
    if train == "adapter":
        targets = ["c_attn"] if name.startswith("GPT2") else ["q_proj", "v_proj"]
        pl.attach(model, pl.LoRAConfig(r=2, target_modules=targets, init="random"), adapter_dtype=torch.float64)
    elif train == "head":
        model.requires_grad_(False)
        model.get_output_embeddings().requires_grad_(True)
    loss = ChunkedLoss(model, True)
    for _ in range(2):  # the first batch also looks at what the model does to its logits
        close(gradients(model, loss, batch()), gradients(model, causal_lm_loss, batch()))
    with torch.no_grad():
        torch.testing.assert_close(loss(model, batch()), causal_lm_loss(model, batch()), rtol=1e-12, atol=0)
    assert loss.told == "in chunks"
    assert "forward" not in vars(model.get_output_embeddings())


@pytest.mark.parametrize("virtual", [0, 3])
@pytest.mark.parametrize("unlearned", [0, 1, 4])
@pytest.mark.parametrize("rows", [1, 3])
def test_the_rows_that_the_head_reads_are_found_wherever_they_are(rows, unlearned, virtual, monkeypatch):
    """The head reads a whole output or the end of one, behind a prompt or not; one row is contiguous in any case."""
    model, found = made("LlamaForCausalLM", SMALL), batch(rows)
    found["labels"] = found["input_ids"].clone()
    found["labels"][:, :unlearned] = IGNORE
    if virtual:
        pl.attach(model, pl.PromptTuningConfig(num_virtual_tokens=virtual), adapter_dtype=torch.float64)
    loss, seen = ChunkedLoss(model, True), []
    fits = chunked.Learned.rows
    monkeypatch.setattr(chunked.Learned, "rows", lambda self, values: seen.append(fits(self, values)) or seen[-1])
    for sent in (found, loss.moved(model, found, torch.device("cpu"))):
        close(gradients(model, loss, sent), gradients(model, causal_lm_loss, found))
    assert loss.told == "in chunks"
    # behind a prompt the end of an output may be as long as the batch
    assert (seen[0] is None) == (virtual > 0 and (unlearned == 0 or (unlearned == 1 and rows > 1)))


@pytest.mark.parametrize("rows", [1, 4, 100])
@pytest.mark.parametrize("form", [Form(), Form(0.5), Form(1.0, 3.0), Form(2.0, 3.0)])
def test_the_function_has_the_gradients_of_its_formula(rows, form):
    torch.manual_seed(0)
    hidden, weight, bias = (torch.randn(*size).double().requires_grad_() for size in ((9, 8), (20, 8), (20,)))
    labels = torch.randint(0, 20, (9,))

    def whole(hidden, weight, bias):
        return F.cross_entropy(form.of(hidden @ weight.T + bias), labels, reduction="sum")

    def mine(hidden, weight, bias):
        return chunked_cross_entropy(hidden, weight, labels, bias=bias, form=form, rows=rows)

    inputs = (hidden, weight, bias)
    torch.testing.assert_close(mine(*inputs), whole(*inputs), rtol=1e-13, atol=0)
    for one, other in zip(
        torch.autograd.grad(3 * mine(*inputs), inputs), torch.autograd.grad(3 * whole(*inputs), inputs), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(mine(*inputs), whole(*inputs), rtol=1e-13, atol=0)


def test_no_label_is_no_loss():
    hidden = torch.randn(0, 8, requires_grad=True)
    total = chunked_cross_entropy(hidden, torch.randn(20, 8), torch.empty(0, dtype=torch.long))
    total.backward()
    assert total == 0 and hidden.grad.shape == (0, 8)


def test_under_autocast_it_is_as_near_to_the_truth_as_whole_logits():
    torch.manual_seed(0)
    hidden, weight, labels = torch.randn(64, 32), torch.randn(200, 32), torch.randint(0, 200, (64,))
    exact = torch.autograd.functional.jacobian(
        lambda h: F.cross_entropy(h @ weight.double().T, labels, reduction="sum"), hidden.double()
    )
    errors = []
    for rows in (None, 10):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            if rows:
                total = chunked_cross_entropy(h, w, labels, rows=rows)
            else:
                total = F.cross_entropy(F.linear(h, w).float(), labels, reduction="sum")
        total.backward()
        assert total.dtype == h.grad.dtype == w.grad.dtype == torch.float32
        errors.append(((h.grad - exact).norm() / exact.norm()).item())
    assert errors[1] < 1.1 * errors[0] < 0.02


@pytest.mark.parametrize("vocabulary", [3, 4096, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])  # it cuts bfloat16 off where a GPU rounds
def test_the_kernel_in_the_interpreter(dtype, vocabulary):
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("tests/gpu has this")
    kernel = import_module("peftlab.training.loss_kernel").into_gradient
    torch.manual_seed(0)
    z, labels = (4 * torch.randn(4, vocabulary)).to(dtype), torch.randint(vocabulary, (4,))
    z[1, labels[1]], z[2, (labels[2] + 1) % vocabulary] = 50, -torch.inf  # a certain label, and a logit of no token
    expected, log_p = z.to(torch.float32, copy=True), torch.empty(4, 1)
    into_gradient(expected, labels, wanted := torch.empty(4, 1))
    gradient = kernel(z, labels, log_p)
    assert gradient is z
    torch.testing.assert_close(log_p, wanted)
    near = {"rtol": 1e-3, "atol": 1e-7} if dtype == torch.float16 else {"rtol": 1e-5, "atol": 1e-7}
    torch.testing.assert_close(gradient.float(), expected, **near)


def plain(layers=2, **settings):
    return tiny.llama(layers=layers, **settings)


def test_training_takes_it_and_says_so():
    histories = []
    for wish in (True, False):
        model = plain()
        torch.manual_seed(7)
        pl.attach(model, pl.LoRAConfig(r=4, target_modules=["q_proj", "v_proj"]))
        histories.append(pl.train(
            model, tiny.examples(), steps=4, batch_size=2, accumulation=2, learning_rate=0.01, chunked_loss=wish,
            evaluation_data=tiny.examples(), evaluate_every=2, fast=False, progress=False,
        ))  # fmt: skip
    one, other = histories
    assert one.logits == "in chunks" and other.logits == "whole: chunked_loss=False"
    for mine, theirs in zip((*one.steps, *one.evaluations), (*other.steps, *other.evaluations), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4)


def prompt(model):
    pl.attach(model, pl.PromptTuningConfig(num_virtual_tokens=3))


def on_the_head(model):
    pl.attach(model, pl.LoRAConfig(r=2, target_modules=["lm_head"]))


def hooked(model):
    pl.attach(model, pl.LoRAConfig(r=2, target_modules=["q_proj"]))
    model.lm_head.register_forward_hook(lambda *_: None)


def of_another_class(model):
    class Mine(nn.Linear):
        pass

    pl.attach(model, pl.LoRAConfig(r=2, target_modules=["q_proj"]))
    model.lm_head.__class__ = Mine


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (prompt, "in chunks"),
        (on_the_head, "whole: its head has an adapter"),
        (hooked, "whole: its head has hooks, or is offloaded"),
        (of_another_class, "whole: its head is a Mine"),
    ],
)
def test_where_it_cannot_it_says_why(change, told, monkeypatch):
    model = plain()
    change(model)
    monkeypatch.setattr(chunked, "SMALL", 0)
    twin = copy.deepcopy(model)
    settings = dict(steps=2, batch_size=2, learning_rate=0.01, fast=False, progress=False)
    history = pl.train(model, tiny.examples(), **settings)
    expected = pl.train(twin, tiny.examples(), chunked_loss=False, **settings)
    assert history.logits == told
    assert [row["loss"] for row in history.steps] == pytest.approx([row["loss"] for row in expected.steps], rel=1e-5)
    if told != "in chunks":
        with pytest.raises(PeftLabError, match="needs whole logits"):
            pl.train(model, tiny.examples(), chunked_loss=True, **settings)


class Shifted(tf.LlamaForCausalLM):
    """A model that does to its logits what no config tells."""

    def forward(self, *arguments, **named):
        output = super().forward(*arguments, **named)
        output.logits = output.logits + torch.arange(output.logits.shape[-1])
        return output


def test_a_model_that_does_more_to_its_logits_is_found_out(monkeypatch):
    monkeypatch.setattr(chunked, "SMALL", 0)
    model = plain(attention_dropout=0.5)
    model.__class__ = Shifted
    torch.manual_seed(7)
    pl.attach(model, pl.LoRAConfig(r=4, dropout=0.5, target_modules=["q_proj", "v_proj"]))
    twin = copy.deepcopy(model)
    settings = dict(steps=2, batch_size=2, learning_rate=0.01, fast=False, progress=False)
    history = pl.train(model, tiny.examples(), **settings)
    assert history.logits == "whole: its logits are more than what its head gives, scaled and capped"
    # the pass that was made again drew the same random numbers
    assert history.steps == pl.train(twin, tiny.examples(), chunked_loss=False, **settings).steps


def test_a_batch_whose_labels_were_read_before_the_logits_were_found_to_stay_whole():
    """The next batch is made ahead, and an evaluation in between may find that."""
    model, given = made("LlamaForCausalLM", SMALL), batch()
    loss = ChunkedLoss(model)
    loss.wish = True
    read = loss.moved(model, given, torch.device("cpu"))
    loss.wish = "auto"
    loss._whole("a test")
    assert read.learned is not None
    torch.testing.assert_close(loss(model, read), causal_lm_loss(model, given), rtol=0, atol=0)


def test_small_logits_stay_whole_to_the_last_bit(monkeypatch):
    histories = []
    for wish in ("auto", False):
        model = plain()
        torch.manual_seed(7)
        pl.attach(model, pl.LoRAConfig(r=4, target_modules=["q_proj", "v_proj"]))
        settings = dict(steps=2, batch_size=2, learning_rate=0.01, fast=False, progress=False, chunked_loss=wish)
        histories.append(pl.train(model, tiny.examples(), **settings))
    assert histories[0].steps == histories[1].steps and histories[0].logits == "whole: they are small"
    loss = ChunkedLoss(model)
    assert loss.pays(500_001) and not loss.pays(500_000)  # of 32 tokens in float32: 64 MB


def test_other_tasks_have_their_own_loss():
    config = tf.BertConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4
    )
    model = tf.BertForSequenceClassification(config)
    pl.attach(model, pl.LoRAConfig(r=2, target_modules=["query"]))
    data = [{"input_ids": [1, 2, 3], "labels": 0}, {"input_ids": [1, 2, 3], "labels": 1}]
    assert pl.train(model, data, steps=1, progress=False).logits == "whole: the model names no head"
