"""What LoHa, LoKr and OFT are held to alike, against Hugging Face peft in float64: each test file calls these."""

import json
import warnings

import torch
from pairs import base, batch, give, live, our_state, relative, same, three_steps, twin_of
from test_convolutions import Net
from test_lora_folders import output, peft_open, peft_save, shapes

import peftlab as pl


def theirs_of(model, config):
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(model, config)


def pair(kinds, kind, dtype=torch.float64, model=None, scramble=True, **settings):
    """(ours, theirs): equal bases, a model of `pairs` or one that is given, and equal adapters.

    Args:
        kinds: our config class, and peft's.
    """
    model = base(kind, dtype) if model is None else model
    twin = twin_of(model)
    pl.attach(model, kinds[0](**{"init_weights": False, **settings}))
    theirs = theirs_of(twin, kinds[1](**{"init_weights": False, **settings}))
    give(theirs, model, scramble=scramble)
    return model, theirs


def same_numbers(kinds, kind, **settings):
    """Counts, outputs and gradients, and the parameters after each of three AdamW steps."""
    ours, theirs = pair(kinds, kind, **settings)
    assert pl.count_parameters(ours)[:2] == theirs.get_nb_trainable_parameters()
    inputs = batch(kind)
    first = ours.train()(**inputs).logits
    three_steps(ours, theirs, inputs, lambda: (our_state(ours), live(theirs)))
    assert relative(ours(**inputs).logits, first) > 1e-4


def same_masks(kinds, kind, **settings):
    """With equal seeds the same rows and modules are dropped, in outputs and gradients; in evaluation none are."""
    ours, theirs = pair(kinds, kind, **settings)
    inputs, states = batch(kind), (our_state(ours), live(theirs))
    ours.train(), theirs.train()
    torch.manual_seed(3)
    found = ours(**inputs)
    torch.manual_seed(3)
    expected = theirs(**inputs)
    assert relative(found.logits, expected.logits) < 1e-9
    found.loss.backward()
    expected.loss.backward()
    mine, other = ({key: p.grad for key, p in state.items() if p.grad is not None} for state in states)
    same(mine, other)
    assert relative(ours(**inputs).logits, found.logits) > 1e-6
    ours.eval(), theirs.eval()
    assert relative(ours(**inputs).logits, theirs(**inputs).logits) < 1e-9


def folders_both_ways(kinds, kind, tmp_path, **settings):
    """What peft saves we load, what we save it loads, and the files and configs say the same."""
    ours, theirs = pair(kinds, kind, **settings)
    expected = output(theirs, kind)
    assert relative(output(base(kind), kind), expected) > 1e-3
    peft_save(theirs, tmp_path / "theirs")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = pl.load_adapter(base(kind), tmp_path / "theirs")
    assert relative(output(loaded, kind), expected) < 1e-12
    pl.save_adapter(ours, tmp_path / "ours")
    assert shapes(tmp_path / "ours") == shapes(tmp_path / "theirs")
    opened, said = peft_open(base(kind), tmp_path / "ours")
    assert relative(output(opened, kind), expected) < 1e-12
    assert said <= peft_open(base(kind), tmp_path / "theirs")[1]
    pl.save_adapter(loaded, tmp_path / "again")
    assert torch.equal(output(pl.load_adapter(base(kind), tmp_path / "again"), kind), output(loaded, kind))
    mine, other = (json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("ours", "theirs"))
    left = ("base_model_name_or_path", "target_modules", "modules_to_save", "task_type", "peft_version")
    for name in mine.keys() - set(left):
        value, meant = mine[name], other[name]
        assert (set(value) if isinstance(value, list) else value) == (set(meant) if isinstance(meant, list) else meant)


def merges_alike(kinds, kind, **settings):
    """The merged weights are peft's, and taking them back is exact."""
    ours, theirs = pair(kinds, kind, **settings)
    before = output(ours, kind)
    pl.merge(ours)
    assert relative(output(ours, kind), before) < 1e-9
    pl.unmerge(ours)
    assert torch.equal(output(ours, kind), before)
    pl.merge(ours, unload=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        same(dict(ours.state_dict()), dict(theirs.merge_and_unload().state_dict()))


def convolution(kinds, conv, steps=True, channels=6, **settings):
    """Outputs, gradients and three steps of a convolution, and its merged weight. Returns ours."""
    torch.manual_seed(0)
    model = Net(conv, conv.out_channels).double().eval()
    ours, theirs = pair(kinds, "", model=model, target_modules=["conv", "out"], **settings)
    sides = (16,) if isinstance(conv, torch.nn.Conv1d) else (8, 12)
    inputs = {"x": torch.randn(2, channels, *sides, dtype=torch.float64)}
    assert relative(ours(**inputs).logits, theirs(**inputs).logits) < 1e-9
    if steps:
        three_steps(ours, theirs, inputs, lambda: (our_state(ours), live(theirs)))
    ours.eval(), theirs.eval()
    expected = theirs(**inputs).logits
    if conv.padding_mode == "zeros":
        pl.merge(ours)
        assert relative(ours(**inputs).logits, expected) < 1e-9
        pl.unmerge(ours)
    return ours


def rows_and_mixtures(kinds, kind, **settings):
    """Each row has the adapter that is named for it; a mixture is the weighted sum of what each changes, merged too."""
    ours, _ = pair(kinds, kind, **settings)
    pl.attach(ours, kinds[0](**{"init_weights": False, **settings}), name="other")
    inputs = batch(kind, rows=3)
    del inputs["labels"]
    alone = {}
    for name in ("default", "other"):
        pl.activate(ours, name)
        alone[name] = ours(**inputs).logits
    with pl.disabled(ours):
        alone[None] = ours(**inputs).logits
    pl.activate(ours, ["other", None, "default"])
    rows = ours(**inputs).logits
    for i, name in enumerate(["other", None, "default"]):
        assert relative(rows[i], alone[name][i]) < 1e-12
    pl.activate(ours, {"default": 0.7, "other": 0.4})
    mixed = ours(**inputs).logits
    pl.merge(ours)
    assert relative(ours(**inputs).logits, mixed) < 1e-9
