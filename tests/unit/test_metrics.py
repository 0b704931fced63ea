"""What a model gives on examples, against its definition, and the averages that go wrong."""

import math

import pytest
import tiny
import torch

from peftlab.errors import PeftLabError
from peftlab.training import metrics
from peftlab.training.encoding import Collator
from peftlab.training.losses import causal_lm_loss, seq2seq_loss


def test_perplexity_is_a_mean_over_tokens_whatever_the_batches():
    model, rows = tiny.llama(seed=3, initializer_range=0.5).double(), tiny.examples(11)
    nll = tokens = 0.0
    means = []
    for row in rows:
        total, count = causal_lm_loss(model, Collator()([row]))
        nll, tokens = nll + total.item(), tokens + count.item()
        means.append(math.exp(total.item() / count.item()))
    right = math.exp(nll / tokens)
    for batch_size in (1, 3, 11):
        assert metrics.perplexity(model, rows, batch_size=batch_size) == pytest.approx(right, rel=1e-12)
    # The usual mistake, the mean of the batches' perplexities, is another number.
    assert abs(sum(means) / len(means) - right) > 0.1


def test_perplexity_of_texts_predicts_every_token_but_the_first():
    tokenizer, model = tiny.tokenizer(), tiny.llama(vocab_size=18)
    model.lm_head.weight.data.zero_()  # every word equally likely
    assert metrics.perplexity(model, ["the cat runs", "no dog"], tokenizer) == pytest.approx(18)
    with pytest.raises(PeftLabError, match="list of texts"):
        metrics.perplexity(model, "the cat", tokenizer)
    with pytest.raises(PeftLabError, match="needs the tokenizer"):
        metrics.perplexity(model, ["the cat"])
    with pytest.raises(PeftLabError, match="no labelled token"):
        metrics.perplexity(model, ["cat"], tokenizer)


def test_causal_loss_equals_the_models_own_and_ignores_padding():
    model, rows = tiny.llama(seed=3), tiny.examples(5)
    batch = Collator()(rows)
    total, count = causal_lm_loss(model, batch)
    assert (total / count).item() == pytest.approx(model(**batch).loss.item(), rel=1e-6)
    wide = Collator(multiple_of=32)(rows)
    assert causal_lm_loss(model, wide)[0].item() == pytest.approx(total.item(), rel=1e-6)


def test_causal_loss_with_virtual_tokens_kept_in_the_logits():
    """Two virtual tokens in front: the second predicts the first real one, and nothing predicts them."""
    inner, rows = tiny.llama(seed=3), [{"input_ids": [4, 5, 6], "labels": [4, 5, 6]}]

    class Prompted(torch.nn.Module):
        def forward(self, input_ids, attention_mask):
            return inner(torch.cat([torch.tensor([[1, 2]]), input_ids], 1))

    total, count = causal_lm_loss(Prompted(), Collator()(rows))
    logits = inner(torch.tensor([[1, 2, 4, 5, 6]])).logits[0, 1:4]
    assert count == 3
    assert total.item() == pytest.approx(torch.nn.functional.cross_entropy(logits, torch.tensor([4, 5, 6])).item() * 3)


def test_seq2seq_loss_equals_the_models_own():
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(vocab_size=32, d_model=16, d_kv=4, d_ff=32, num_layers=1, num_heads=4, decoder_start_token_id=0)
    model = T5ForConditionalGeneration(config).eval()
    batch = Collator()([{"input_ids": [4, 5, 6], "labels": [7, 8]}, {"input_ids": [9], "labels": [3, 2, 1]}])
    total, count = seq2seq_loss(model, batch)
    assert count == 5 and (total / count).item() == pytest.approx(model(**batch).loss.item(), rel=1e-6)


def test_predict_labels_keeps_order_and_mode():
    class Sum(torch.nn.Module):
        """Says class 1 when the tokens' sum is odd."""

        def forward(self, input_ids, attention_mask):
            odd = (input_ids * attention_mask).sum(1) % 2
            return torch.stack([1.0 - odd, odd.float()], 1)

    model = Sum()
    rows = [{"input_ids": ids, "labels": 0} for ids in ([1, 2, 3, 5], [2, 5], [4], [7, 7, 7], [8, 1, 1])]
    assert metrics.predict_labels(model, rows, batch_size=2) == [1, 1, 0, 1, 0]
    assert model.training
