"""The model card of an adapter folder: what it says, and whose README.md it leaves alone."""

import json

import peft
import pytest
import torch
import yaml
from nets import Net
from tiny import llama, tokenizer
from transformers import BertConfig, BertForSequenceClassification, BertModel, LlamaForCausalLM

import peftlab as pl
from peftlab.adapters.card import MARKER
from peftlab.commands import cli


def front_matter(folder):
    text = (folder / "README.md").read_text(encoding="utf-8")
    _, head, body = text.split("---\n", 2)
    return yaml.safe_load(head), body


def based(folder, name="a base: of #1"):
    """A model that was loaded from a folder whose name YAML would misread."""
    llama().save_pretrained(folder / name)
    return LlamaForCausalLM.from_pretrained(folder / name)


@pytest.mark.parametrize(
    ("config", "method", "told"),
    [
        (pl.LoRAConfig(r=3, alpha=7, use_rslora=True), "lora", ["| r | 3 |", "| lora_alpha | 7 |", "| use_rslora | "]),
        (pl.IA3Config(), "ia3", ["feedforward_modules"]),
        (pl.PrefixTuningConfig(num_virtual_tokens=4), "prefix", ["| num_virtual_tokens | 4 |"]),
        (pl.LoRAConfig(target_modules=r".*(q|v)_proj"), "lora", [r"| target_modules | .*(q\|v)_proj |"]),
    ],
)
def test_the_front_matter_and_the_settings(config, method, told, tmp_path):
    model = pl.attach(based(tmp_path), config)
    folder = pl.save_adapter(model, tmp_path / "out")
    head, body = front_matter(folder)
    base = str(tmp_path / "a base: of #1")
    assert head["base_model"] == base and head["library_name"] == "peft" and head["pipeline_tag"] == "text-generation"
    assert {method, "peftlab", f"base_model:adapter:{base}"} <= set(head["tags"]) and "license" not in head
    assert all(line in body for line in told) and "pl.load_adapter(model" in body and "AutoPeftModelForCausalLM" in body
    assert json.dumps(base) in body  # what load_model is to be given
    opened = peft.PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), folder)
    ids = torch.tensor([[3, 4, 5]])
    assert torch.allclose(opened.eval()(ids).logits, model.eval()(ids).logits, atol=1e-5)
    pl.load_adapter(LlamaForCausalLM.from_pretrained(base), folder)


def test_a_model_without_a_name_and_a_method_that_peft_lacks(tmp_path):
    folder = pl.save_adapter(pl.attach(Net(), pl.LoRAConfig(r=1, target_modules=["up"])), tmp_path / "net")
    head, body = front_matter(folder)
    assert "base_model" not in head and "a Net without a name" in body and "AutoPeft" not in body
    model = pl.attach(llama(), pl.AdapterConfig(placement="houlsby", width=2))
    folder = pl.save_adapter(model, tmp_path / "bottleneck")
    head, body = front_matter(folder)
    assert "Hugging Face peft has no such method" in body and "houlsby" in head["tags"]


def test_a_config_without_a_row_is_not_said_to_open_in_peft(tmp_path):
    """Its peft_type is not peft's, whatever it is called; the card once told people to try."""

    class Mine(pl.IA3Config):
        peft_type = "MINE"

    _, body = front_matter(pl.save_adapter(pl.attach(llama(), Mine()), tmp_path))
    assert "Hugging Face peft has no such method" in body and "AutoPeft" not in body


def test_what_load_model_knows_of_a_base(tmp_path):
    model = llama()
    hub = "HuggingFaceTB/SmolLM2-135M-Instruct"
    model.peftlab_origin = {"name": "smollm2-135m", "hub": hub, "licence": "Apache-2.0"}
    head, body = front_matter(pl.save_adapter(pl.attach(model, pl.LoRAConfig(r=1)), tmp_path))
    assert head["base_model"] == hub and head["license"] == "apache-2.0"
    assert 'pl.load_model("smollm2-135m")' in body


@pytest.mark.parametrize(
    "theirs",
    ["# mine\n", "", "---\nlibrary_name: peft\n---\n", f"# mine, about {MARKER} and more\n", b"\xff\xfe not text"],
)
def test_a_persons_readme_is_never_overwritten(theirs, tmp_path):
    content = theirs if isinstance(theirs, bytes) else theirs.encode()
    (tmp_path / "README.md").write_bytes(content)
    for r in (1, 2):
        pl.save_adapter(pl.attach(llama(), pl.LoRAConfig(r=r)), tmp_path)
        assert (tmp_path / "README.md").read_bytes() == content
    assert pl.load_adapter(llama(), tmp_path)


def test_a_linked_readme_stays_and_ours_is_renewed(tmp_path):
    pl.save_adapter(pl.attach(llama(), pl.LoRAConfig(r=1)), tmp_path / "a")
    pl.save_adapter(pl.attach(llama(), pl.LoRAConfig(r=2)), tmp_path / "a")
    assert "| r | 2 |" in front_matter(tmp_path / "a")[1]
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "README.md").symlink_to(tmp_path / "a" / "README.md")
    pl.save_adapter(pl.attach(llama(), pl.LoRAConfig(r=3)), tmp_path / "b")
    assert (tmp_path / "b" / "README.md").is_symlink() and "| r | 2 |" in front_matter(tmp_path / "a")[1]
    named = pl.attach(llama(), pl.LoRAConfig(r=1), name="french")
    assert (pl.save_adapter(named, tmp_path / "c", name="french") / "README.md").is_file()


def test_a_card_that_was_edited_or_is_gone_harms_nothing(tmp_path):
    folder = pl.save_adapter(pl.attach(llama(), pl.LoRAConfig(r=1)), tmp_path)
    (folder / "README.md").write_text("other words")
    pl.load_adapter(llama(), folder)
    (folder / "README.md").unlink()
    pl.load_adapter(llama(), folder)
    pl.save_adapter(pl.attach(llama(), pl.LoRAConfig(r=1)), tmp_path)
    assert MARKER in (folder / "README.md").read_text()


def test_train_tells_its_data_and_its_metrics_and_respects_a_taken_over_card(tmp_path, capsys):
    base = tmp_path / "base"
    llama().save_pretrained(base)
    tokenizer().save_pretrained(base)
    data = tmp_path / "my.jsonl"
    data.write_text("\n".join(json.dumps({"prompt": "a b", "completion": "c"}) for _ in range(12)))
    command = ["train", "--model", str(base), "--data", str(data), "--steps", "2", "--out", str(tmp_path / "run")]
    assert cli.main([*command, "--json"]) == 0, capsys.readouterr().err
    result = json.loads(capsys.readouterr().out)
    head, body = front_matter(tmp_path / "run")
    assert head["base_model"] == str(base) and f"- Data: {data}" in body and "- steps: 2" in body
    for name, value in result["test"].items():
        if name != "examples":
            assert f"| {name} | {value:.6g} |" in body
    assert cli.main(command) == 0 and "going on from the state after step 2" in capsys.readouterr().err
    assert cli.main([*command, "--no-resume"]) == 0 and "going on" not in capsys.readouterr().err
    (tmp_path / "run" / "README.md").write_text("# my own words\n")
    assert cli.main([*command, "--no-resume"]) == 0, capsys.readouterr().err
    assert (tmp_path / "run" / "README.md").read_text() == "# my own words\n"


def test_a_classifier_is_loaded_with_its_number_of_classes(tmp_path):
    config = BertConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    BertModel(config).save_pretrained(tmp_path / "base")
    model = BertForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
    pl.attach(model, pl.LoRAConfig(r=2, task_type="SEQ_CLS"))
    _, body = front_matter(pl.save_adapter(model, tmp_path / "out"))
    assert f'pl.load_model("{tmp_path / "base"}", num_labels=3)' in body
    assert 'from_pretrained("this/folder", num_labels=3)' in body
    assert "On another machine load the base yourself" in " ".join(body.split())
    same = peft.AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "out", num_labels=3).eval()
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(same(ids).logits, model.eval()(ids).logits)


def test_an_exported_card_says_what_only_the_card_of_the_run_knew(tmp_path):
    model = llama()
    hub = "HuggingFaceTB/SmolLM2-135M-Instruct"
    model.peftlab_origin = {"name": "smollm2-135m", "hub": hub, "licence": "Apache-2.0"}
    pl.attach(model, pl.LoRAConfig(r=2))
    pl.export_adapter(pl.save_adapter(model, tmp_path / "adapter"), tmp_path / "out")
    head, body = front_matter(tmp_path / "out")
    assert head["base_model"] == hub and head["license"] == "apache-2.0"
    assert 'pl.load_model("smollm2-135m")' in body and "- Licence of the base model: Apache-2.0" in body
