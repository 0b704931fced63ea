"""Merging gives the weights of peft's merge_and_unload."""

import warnings

import pytest
from pairs import batch, pair, relative, same
from releases import skip_lost_biases
from test_lora_parity import CASES

import peftlab as pl

REFUSED = {"llama tied, head adapted", "llama tied, embedding adapted", "llama lora bias", "bert mlm, shared bias",
           "gpt2 embeddings"}  # fmt: skip


@pytest.mark.parametrize("case", [case for case in CASES if case not in REFUSED])
def test_merge_and_unload(case):
    kind, settings = CASES[case]
    skip_lost_biases(settings)
    ours, theirs = pair(kind, **{"r": 5, "alpha": 12, **settings})
    expected = ours(**batch(kind)).logits
    report = pl.merge(ours, unload=True)
    assert report.relative_error < 1e-9
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged = theirs.merge_and_unload()
    same(dict(ours.state_dict()), dict(merged.state_dict()))
    assert relative(ours(**batch(kind)).logits, expected) < 1e-9


@pytest.mark.parametrize("case", sorted(REFUSED))
def test_refused_cases_are_refused_and_run_on(case):
    kind, settings = CASES[case]
    ours, _ = pair(kind, **{"r": 5, "alpha": 12, **settings})
    expected = ours(**batch(kind)).logits
    with pytest.raises(pl.PeftLabError):
        pl.merge(ours)
    assert relative(ours(**batch(kind)).logits, expected) == 0
