"""Adapter folders that are damaged, mixed up or meant for another model: a clear error, and a model left as it was."""

import json
import signal
import time

import peft
import pytest
import torch
from children import Child, one_worker
from nets import Net, assert_same, snapshot, tokens
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import llama
from torch import nn

import peftlab as pl

CONFIG = dict(r=3, alpha=5, target_modules=["up", "head", "embed"], init="random")
C, W = "adapter_config.json", "adapter_model.safetensors"


def attach(model, name="default", seed=1, **settings):
    torch.manual_seed(seed)
    return pl.attach(model, pl.LoRAConfig(**{**CONFIG, **settings}), name=name)


@pytest.fixture
def folder(tmp_path):
    pl.save_adapter(attach(Net()), tmp_path / "one")
    return tmp_path / "one"


def rewrite(folder, change, keep_sums=False):
    """Changes the tensors; without sums the file is as Hugging Face peft would write it."""
    with safe_open(folder / W, "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(folder / W)
    change(tensors)
    save_file(tensors, folder / W, metadata if keep_sums else {"format": "pt"})


def edit(folder, **fields):
    config = json.loads((folder / C).read_text())
    (folder / C).write_text(json.dumps({**config, **fields}))


KEY = "base_model.model.head.lora_A.weight"


def damages():
    def flip(folder):
        data = bytearray((folder / W).read_bytes())
        data[-5] ^= 1
        (folder / W).write_bytes(data)

    def cut(folder):
        data = (folder / W).read_bytes()
        (folder / W).write_bytes(data[: len(data) // 2])

    def pickled(folder):
        (folder / W).unlink()
        torch.save({}, folder / "adapter_model.bin")

    def mixed(folder):
        pl.save_adapter(attach(Net(), r=2), folder.parent / "two")
        (folder / C).write_bytes((folder.parent / "two" / C).read_bytes())

    def nan(tensors):
        tensors[KEY][0, 0] = float("nan")

    def sample(text):
        def change(folder):
            tensors = load_file(folder / W)
            save_file(tensors, folder / W, {"format": "pt", "peftlab_base": text})

        return change

    def by(change, keep_sums=False):
        return lambda folder: rewrite(folder, change, keep_sums)

    return {
        "one bit": (flip, "was changed after it was saved"),
        "cut short": (cut, "damaged or cut short"),
        "empty": (lambda f: (f / W).write_bytes(b""), "damaged or cut short"),
        "garbage": (lambda f: (f / W).write_bytes(b"\xff" * 500), "damaged or cut short"),
        "a pickle": (pickled, "a pickle, which can run code"),
        "no weights": (lambda f: (f / W).unlink(), "lacks"),
        "no config": (lambda f: (f / C).unlink(), "lacks"),
        "config no JSON": (lambda f: (f / C).write_text("{"), "cannot be read"),
        "config no text": (lambda f: (f / C).write_bytes(b"\xff\xfe\x00"), "cannot be read"),
        "config a list": (lambda f: (f / C).write_text("[]"), "holds a list"),
        "config edited": (lambda f: edit(f, lora_alpha=50), "not saved together"),
        "config of another": (mixed, "not saved together"),
        "value changed": (by(lambda t: t[KEY].add_(1), keep_sums=True), "was changed after it was saved"),
        "not a number": (by(nan), "not finite"),
        "missing key": (by(lambda t: t.pop(KEY)), f"lacks 1 of 8 keys, the first '{KEY}'"),
        "extra key": (by(lambda t: t.update(more=torch.zeros(1))), "1 keys without a place here, the first 'more'"),
        "extra layer": (by(lambda t: t.update({KEY.replace("head", "tail"): t[KEY].clone()})), "tail"),
        "wrong shape": (
            by(lambda t: t.update({KEY: torch.zeros(3, 7)})),
            r"has shape \(3, 7\); this model needs \(3, 6\)",
        ),
        "wrong rank": (by(lambda t: t.update({KEY: torch.zeros(4, 6)})), r"needs \(3, 6\)"),
        "sample no JSON": (sample("{"), "damaged"),
        "sample a list": (sample("[1]"), "damaged"),
        "sample of words": (sample('{"head": "abc"}'), "damaged"),
    }


@pytest.mark.parametrize("case", damages())
def test_damage_is_told_and_changes_nothing(case, folder):
    damage, said = damages()[case]
    damage(folder)
    model = attach(Net(), "mine")
    before, expected = snapshot(model), model(tokens())
    with pytest.raises(pl.PeftLabError, match=said):
        pl.load_adapter(model, folder)
    assert_same(before, snapshot(model))
    assert torch.equal(model(tokens()), expected)


@pytest.mark.parametrize("fields", [
    dict(peft_type="LOHA"), dict(peft_type=None), dict(r="8"), dict(r=None), dict(lora_alpha="x"),
    dict(rank_pattern=[1]),
    dict(target_modules=7), dict(target_modules=None), dict(task_type="X"), dict(use_dora=True), dict(bias="most"),
    dict(modules_to_save="head"), dict(layers_to_transform=["a"]), dict(target_modules=["nothing"]),
    dict(lora_dropout=2),
    dict(exclude_modules="(["), dict(rank_pattern={"(": 3}), dict(alpha_pattern={"head": "much"}),
    dict(target_modules="(["),
])  # fmt: skip
def test_fields_of_a_wrong_kind(fields, folder):
    rewrite(folder, lambda tensors: None)  # no sums, as in peft's own files
    edit(folder, **fields)
    model = Net()
    before = snapshot(model)
    with pytest.raises(pl.PeftLabError):
        pl.load_adapter(model, folder)
    assert_same(before, snapshot(model))


def test_a_field_that_is_missing_is_named(folder, monkeypatch):
    """`from_peft` may read a field with `fields["name"]`; a folder without it is one clear line, not a KeyError."""
    model = Net()
    before = snapshot(model)
    monkeypatch.setattr(pl.LoRAConfig, "from_peft", staticmethod(lambda fields: {"r": fields["width"]}))
    with pytest.raises(pl.PeftLabError, match="adapter_config.json lacks the field 'width', which LoRAConfig reads"):
        pl.load_adapter(model, folder)
    assert_same(before, snapshot(model))
    monkeypatch.setattr(pl.LoRAConfig, "from_peft", staticmethod(lambda fields: {"r": {}["r"]}))
    with pytest.raises(KeyError):  # not a matter of the folder
        pl.load_adapter(model, folder)


def test_another_base_is_noticed(folder):
    with pytest.raises(pl.PeftLabError, match="trained on another base: the weights of"):
        pl.load_adapter(Net(seed=7), folder)
    rewrite(folder, lambda tensors: None)
    pl.load_adapter(Net(seed=7), folder)  # peft's files say nothing about the base's weights
    with pytest.raises(pl.PeftLabError, match="'up', which matches no module"):
        pl.load_adapter(llama(), folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_same_base_in_another_dtype_is_the_same_base(dtype, folder, tmp_path):
    model = pl.load_adapter(Net(dtype=dtype), folder)
    pl.save_adapter(model, tmp_path / "back")
    pl.load_adapter(Net(), tmp_path / "back")


def test_folders_that_are_not_there(folder):
    with pytest.raises(pl.PeftLabError, match="no adapter folder .*Did you mean 'one'"):
        pl.load_adapter(Net(), folder.parent / "oen")
    with pytest.raises(pl.PeftLabError, match="'default'|lacks"):
        pl.load_adapter(Net(), folder.parent)
    (folder / "file").write_text("")
    with pytest.raises(pl.PeftLabError):
        pl.load_adapter(Net(), folder / "file")


def test_a_name_in_use_and_a_merged_model(folder):
    model = pl.load_adapter(Net(), folder)
    with pytest.raises(pl.PeftLabError, match="attached already"):
        pl.load_adapter(model, folder)
    pl.merge(model)
    with pytest.raises(pl.PeftLabError, match="unmerge"):
        pl.load_adapter(model, folder, name="b")


def test_saving_what_is_not_finite_or_not_there_writes_nothing(tmp_path):
    model = attach(Net())
    with pytest.raises(pl.PeftLabError, match="Did you mean 'default'"):
        pl.save_adapter(model, tmp_path / "x", name="defalt")
    with torch.no_grad():
        model.head.peftlab["default"]["lora"].lora_B[0, 0] = float("inf")
    with pytest.raises(pl.PeftLabError, match="head.lora_B.weight holds values that are not finite"):
        pl.save_adapter(model, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_frozen_unless_asked_and_in_the_asked_dtype(folder):
    model = pl.load_adapter(Net(), folder)
    assert pl.count_parameters(model).trainable == 0
    model = pl.load_adapter(Net(), folder, trainable=True, adapter_dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.bfloat16}


def test_what_is_saved_is_what_runs(folder):
    expected = attach(Net())(tokens())
    assert torch.equal(pl.load_adapter(Net(), folder)(tokens()), expected)
    edit(folder, base_model_name_or_path="/elsewhere", inference_mode=False, peft_version="1.0")  # free to change
    assert torch.equal(pl.load_adapter(Net(), folder)(tokens()), expected)


def test_running_averages_of_a_module_trained_in_full_are_kept(tmp_path):
    """As in peft's files, which hold the whole state of such a module."""

    def build():
        torch.manual_seed(0)
        model = nn.ModuleDict({"fc": nn.Linear(4, 4), "tail": nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 2))})
        model.forward = lambda x: model["tail"](model["fc"](x))
        return model.double()

    model, x = build(), torch.randn(8, 4).double()
    config = dict(r=2, target_modules=["fc"], modules_to_save=["tail"])
    pl.attach(model, pl.LoRAConfig(**config, init="random"))
    model(x)  # in train mode the copy's running averages move
    expected = model.eval()(x)
    pl.save_adapter(model, tmp_path / "ours")
    assert torch.equal(pl.load_adapter(build(), tmp_path / "ours").eval()(x), expected)
    theirs = peft.get_peft_model(build(), peft.LoraConfig(**config))
    theirs.save_pretrained(tmp_path / "theirs")
    assert load_file(tmp_path / "ours" / W).keys() == load_file(tmp_path / "theirs" / W).keys()


def test_a_failed_write_leaves_the_old_folder_and_no_litter(folder, monkeypatch):
    import os

    model = attach(Net(), r=2)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError):
        pl.save_adapter(model, folder)
    same = {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert same


def save_in_turn(folder, ready):
    models = [attach(Net(), seed=seed) for seed in (1, 2)]
    ready.touch()
    while True:
        for model in models:
            pl.save_adapter(model, folder)


@one_worker
def test_killed_while_saving_leaves_a_whole_adapter(tmp_path):
    """A child saves two adapters in turn, as fast as it can, and is killed: what lies there is one of them, whole."""
    for trial in range(2):
        ready = tmp_path / f"ready {trial}"
        child = Child(save_in_turn, tmp_path / "out", ready)
        while not (ready.exists() and (tmp_path / "out" / W).exists()):
            assert child.process.is_alive()
            time.sleep(0.005)
        time.sleep(0.013 * (3 * trial + 1))
        child.kill()
        assert child.status() == -signal.SIGKILL
        expected = [attach(Net(), seed=seed)(tokens()) for seed in (1, 2)]
        found = pl.load_adapter(Net(), tmp_path / "out")(tokens())
        assert any(torch.equal(found, one) for one in expected)


def test_a_reader_of_the_old_file_never_sees_the_new_one(folder):
    """Files are replaced, not rewritten: there is no moment at which half of one can be read."""
    old = (folder / W).read_bytes()
    with open(folder / W, "rb") as opened:
        pl.save_adapter(attach(Net(), seed=2), folder)
        same, changed = opened.read() == old, (folder / W).read_bytes() != old
    assert same and changed


@pytest.mark.parametrize("first", [C, W])
def test_files_of_two_adapters_are_told(folder, first):
    """The config of a new adapter beside the weights of the old one, or the reverse, must not load as either."""
    pl.save_adapter(attach(Net(), alpha=50, seed=2), folder.parent / "two")
    (folder / first).write_bytes((folder.parent / "two" / first).read_bytes())
    with pytest.raises(pl.PeftLabError, match="not saved together"):
        pl.load_adapter(Net(), folder)
