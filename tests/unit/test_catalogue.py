"""The catalogue of methods: its rows are true, and one more row is all that a new method asks of the package."""

import ast
import dataclasses
import doctest
import inspect
import json
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
import toy_method
from places import shape_for
from tiny import llama, tokenizer
from torch import nn
from toy_method import ToyConfig
from toy_rows import TOY, TOY_START

import peftlab as pl
from peftlab import catalogue
from peftlab.assets.models import load_model
from peftlab.catalogue import METHODS, resolve
from peftlab.commands import cli
from peftlab.errors import PeftLabError
from peftlab.memory import count, estimate, load_shape
from peftlab.memory.counting.methods import trained_by
from peftlab.memory.counting.options import Options

HEAVY = ("torch", "transformers", "datasets", "peft", "numpy")
ROWS = pytest.mark.parametrize("name", METHODS)


# ------------------------------------------------------------------------------------------------------ the rows


@ROWS
def test_every_path_leads_to_what_the_row_says(name):
    row = METHODS[name]
    places = {"config": "peftlab.methods.", "tensors": "peftlab.memory.counting.", "replay": "peftlab.memory.replay."}
    for field, place in places.items():
        path = getattr(row, field)
        assert path is None or (path.startswith(place) and callable(resolve(path))), field
    assert row.config or row.tensors
    if row.config:
        config = resolve(row.config)
        assert getattr(pl, row.config_name) is config and getattr(pl.methods, row.config_name) is config
        assert row.four_bit or config(**row.fixed).method == name
    if row.tensors:
        added = trained_by(name, load_shape(shape_for(name)), Options()).added
        assert bool(added) == bool(row.replay), "what adds tensors needs a replay"


@ROWS
def test_every_option_is_a_field_of_the_config_or_an_argument_of_count(name):
    row = METHODS[name]
    fields = {field.name: field for field in dataclasses.fields(resolve(row.config))} if row.config else {}
    assert set(row.fixed) <= set(fields)
    for option in row.options:
        if row.config:
            default = fields[option.config_field].default
            assert option.default is None or option.default == default, f"--{option.name} and the config disagree"
        else:
            assert option.counted, f"{name} is only counted, and --{option.name} does not count"
        if option.counted:
            assert option.name in {field.name for field in dataclasses.fields(Options)}
            for function in (count, estimate):
                assert option.name in inspect.signature(function).parameters


def test_an_option_is_the_same_in_all_rows_but_for_its_default():
    """The command line has one option of a name, so a help of one row would stand for all."""
    for name, row in METHODS.items():
        for option in row.options:
            first = next(o for other in METHODS.values() for o in other.options if o.name == option.name)
            alike = dataclasses.replace(option, default=first.default, chosen=first.chosen, fills=first.fills)
            assert alike == first, f"the row of {name} changes more of --{option.name} than default, chosen and fills"


@ROWS
def test_the_starts_of_a_row_are_those_that_its_config_and_the_estimate_know(name):
    row = METHODS[name]
    assert bool(row.starts) == any(option.name == "init" for option in row.options)
    for start in row.starts:
        words = {"init_text": [1, 2]} if start == "text" else {}
        assert row.config_class()(init=start, **row.fixed, **words).init == start
        assert count("smollm2-135m", name, init=start).trainable
    if row.starts:
        with pytest.raises(PeftLabError, match="init must be one of .*found 'none-such'"):
            row.config_class()(init="none-such", **row.fixed)
        known = ", ".join(map(repr, row.starts))
        with pytest.raises(PeftLabError, match=re.escape(f"init must be one of {known}; found 'none-such'")):
            count("gpt2", name, init="none-such")


@ROWS
def test_the_help_says_what_a_row_chooses_for_targets(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "500")
    row = METHODS[name]
    if row.trains and row.takes("targets"):
        with pytest.raises(SystemExit):
            cli.main(["train", "--help"])
        told = " ".join(capsys.readouterr().out.split()).partition("or all-linear (default: ")[2].partition(")")[0]
        (chosen,) = [choice for choice in told.split("; ") if name in choice.rpartition(" for ")[2].split("/")]
        assert chosen.startswith(row.chosen("targets")) and row.chosen("targets")


@ROWS
def test_a_row_knows_whether_peft_has_the_method(name):
    """The card of a folder tells people to open it with peft, or not to try."""
    row = METHODS[name]
    if row.config:
        theirs = {kind.value for kind in pytest.importorskip("peft").PeftType}
        peft_type = resolve(row.config).peft_type
        told = f"{peft_type} is {'' if peft_type in theirs else 'not '}in peft.PeftType, so set in_peft in the row"
        assert row.in_peft == (peft_type in theirs), told


def test_every_config_in_the_folder_of_methods_has_a_row():
    known = {resolve(row.config) for row in METHODS.values() if row.config}
    files = [path.stem for path in Path(pl.methods.__file__).parent.glob("*.py") if path.stem != "__init__"]
    found = {
        thing
        for file in files
        for thing in vars(import_module(f"peftlab.methods.{file}")).values()
        if getattr(thing, "peft_type", None) and getattr(thing, "__module__", None) == f"peftlab.methods.{file}"
    }
    assert found == known and len(found) >= 8


def test_the_table_of_configs_is_made_from_the_rows():
    assert pl.METHODS == {name: resolve(row.config) for name, row in METHODS.items() if row.config and name != "qlora"}
    assert list(pl.memory.METHODS) == [name for name in METHODS if name != "selective"]
    assert pl.memory.METHODS["vera"](load_shape("gpt2"), Options()) == trained_by("vera", load_shape("gpt2"), Options())
    for module in (pl.methods, pl.memory):
        with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
            module.nothing  # noqa: B018


def test_the_catalogue_imports_nothing_of_the_package():
    tree = ast.parse(Path(catalogue.__file__).read_text(encoding="utf-8"))
    imported = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    imported += [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    assert imported and not [name for name in imported if name.split(".")[0] == "peftlab"]


@pytest.mark.parametrize(
    "code",
    [
        "import peftlab.catalogue",
        "from peftlab.commands import cli; cli.build_parser()",
        "from peftlab.memory import METHODS, count, estimate; from places import shape_for; "
        "[(count(shape_for(m), m), estimate(shape_for(m), m, sequence=16)) for m in METHODS]",
    ],
    ids=["catalogue", "command line", "memory"],
)
def test_reading_the_rows_loads_no_torch_and_no_method(code):
    code = f"import sys; sys.path.append({str(Path(__file__).parent)!r}); {code}"
    code += f"; print([m for m in sys.modules if m in {HEAVY} or m.startswith('peftlab.methods')])"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


# ------------------------------------------------------------------------------------------------------ a toy method
# All that a new method needs: toy_method.py is its file in the package, toy_rows.py its row and the two functions.


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setitem(METHODS, "toy", TOY)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with a tiny model and a data file, as the current one."""
    monkeypatch.chdir(tmp_path)
    llama().save_pretrained("tiny")
    tokenizer(pad=False).save_pretrained("tiny")
    rows = [{"prompt": f"the {a} cat ?", "completion": "yes" if a == "red" else "no"} for a in ("red", "green", "blue")]
    (tmp_path / "ask.jsonl").write_text("\n".join(json.dumps(row) for row in rows * 8))
    return tmp_path


def run(capsys, *arguments):
    """What a command printed with --json."""
    status = cli.main([*map(str, arguments), "--json"])
    out, err = capsys.readouterr()
    assert status == 0, err
    return json.loads(out)


def test_a_toy_attaches_and_is_counted_and_estimated(toy, place, capsys):
    model, _ = load_model("./tiny")
    pl.attach(model, ToyConfig(start=2.0))
    counted = run(capsys, "count", "tiny", "--method", "toy")
    assert pl.count_parameters(model).trainable == counted["trainable"] == 2 * 16  # two layers, 16 wide
    assert pl.count_parameters(model).total == counted["total"]
    assert run(capsys, "count", "tiny", "--method", "toy", "--targets", "q_proj,o_proj")["trainable"] == 4 * 16

    # IA3 on the same layers computes the same, so a step of it takes as much
    told = run(capsys, "memory", "tiny", "--method", "toy", "--sequence", 32)
    twin = run(capsys, "memory", "tiny", "--method", "ia3", "--targets", "o_proj", "--sequence", 32)
    assert told == {**twin, "method": "toy"} and told["adapter"] > 0


def test_where_a_toy_has_no_place_the_message_names_what_it_takes_by_default(toy, place):
    with pytest.raises(PeftLabError, match=r"gpt2 has none of the modules .*by default \(o_proj\).*--targets.*c_attn"):
        count("gpt2", "toy")
    with pytest.raises(PeftLabError, match=r"Linear has none of the modules that ToyConfig .*\(o_proj\)"):
        pl.attach(nn.Linear(2, 2), ToyConfig())
    with pytest.raises(PeftLabError, match="Target 'o_prj' matches no module .*Did you mean 'o_proj'"):
        count("llama-2-7b", "toy", targets=["o_prj"])
    with pytest.raises(PeftLabError, match="toy adapts linear layers only; target transformer.wte of gpt2"):
        count("gpt2", "toy", targets=["wte"])


def test_a_toy_trains_from_the_command_line_and_its_folder_loads(toy, place, capsys):
    data = ("--model", "./tiny", "--data", "ask.jsonl", "--out", "run", "--steps", 12)
    result = run(capsys, "train", *data, "--method", "toy", "--toy-start", 0.5)
    assert result["trainable"] == 2 * 16 and result["settings"]["lr"] == 0.25
    settings = result["settings"].keys() & {option.name for row in METHODS.values() for option in row.options}
    assert settings == {"targets", "toy_start"}, "options of other methods are no part of the run"

    ids = torch.tensor([[5, 6, 7]])
    plain, trained = load_model("./tiny")[0], load_model("./tiny")[0]
    pl.load_adapter(trained, "run")
    scales = [p for name, p in trained.named_parameters() if name.endswith(".scale")]
    assert len(scales) == 2 and all(0 < (scale - 0.5).abs().max() < 5 for scale in scales)  # from 0.5 on
    assert not torch.allclose(trained(ids).logits, plain(ids).logits, atol=1e-3)

    pl.save_adapter(trained, "again")
    other = load_model("./tiny")[0]
    pl.load_adapter(other, "again")
    assert torch.equal(other(ids).logits, trained(ids).logits)
    assert json.loads((place / "again" / "adapter_config.json").read_text())["start"] == 0.5
    pl.merge(other)
    assert torch.allclose(other(ids).logits, trained(ids).logits, atol=1e-5)


def test_the_help_and_the_messages_name_a_toy(toy, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "500")  # no word is broken
    for command in ("train", "count", "memory"):
        with pytest.raises(SystemExit):
            cli.main([command, "--help"])
        out = " ".join(capsys.readouterr().out.split())
        assert ", toy (default: lora)" in out
        assert ("--toy-start S where the scale of toy starts (default: 1)" in out) == (command == "train")
        assert re.search(r"; the output projections of attention for (\S+/)?toy[;)]", out)
        assert ("toy 0.25; others 0.0002" in out) == (command == "train")
    with pytest.raises(PeftLabError, match=r"make one of .*, ToyConfig\."):
        pl.attach(nn.Linear(2, 2), ToyConfig)
    assert pl.METHODS["toy"] is ToyConfig and "toy" in pl.memory.METHODS


def test_the_example_of_a_toy_runs(monkeypatch):
    """The template is copied with its example, and `test_examples.py` asks for one of every public config."""
    monkeypatch.setattr(pl, "ToyConfig", ToyConfig, raising=False)
    (test,) = doctest.DocTestFinder().find(ToyConfig, "ToyConfig", globs={"pl": pl, "model": llama()})[:1]
    assert test.examples and doctest.DocTestRunner(verbose=False).run(test).failed == 0


def test_the_template_takes_the_helpers_that_contributing_lists():
    root = Path(__file__).parents[2]
    table = (root / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("| for | take |")[2].partition("\n\n")[0]
    named = {name for line in table.splitlines() for name in re.findall(r"`(?:yield from )?(\w+)[(`]", line)}
    helpers = {name for name in named if name in vars(toy_method)}
    known = {"find", "check_carrier", "shape_of", "own_tensor", "tensor_at", "widened", "is_conv1d", "trained_copies"}
    assert known | {"Targets", "check_fields", "number", "PeftLabError"} <= helpers


def test_without_its_row_a_toy_is_unknown(place):
    with pytest.raises(PeftLabError, match="Unknown method 'toy'"):
        count("tiny", "toy")
    model, _ = load_model("./tiny")
    pl.save_adapter(pl.attach(model, ToyConfig()), "toy")  # a config of one's own needs no row to attach and save
    with pytest.raises(PeftLabError, match="peft_type is 'TOY'"):
        pl.load_adapter(load_model("./tiny")[0], "toy")


def test_a_method_without_a_replay_is_counted_and_not_estimated(monkeypatch):
    monkeypatch.setitem(METHODS, "toy", dataclasses.replace(TOY, replay=None))
    assert count("llama-2-7b", "toy").trainable == 32 * 4096
    with pytest.raises(PeftLabError, match="activations of toy are not known yet.*count llama-2-7b --method toy"):
        estimate("llama-2-7b", "toy")


def test_where_defaults_differ_the_row_decides(monkeypatch, capsys):
    other = dataclasses.replace(TOY, options=(catalogue.TARGETS, dataclasses.replace(TOY_START, default=3.0)))
    monkeypatch.setitem(METHODS, "toy", TOY)
    monkeypatch.setitem(METHODS, "other", other)
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    assert "starts (default: 1 for toy, 3 for other)" in " ".join(capsys.readouterr().out.split())
    for method, start in (("toy", 1.0), ("other", 3.0), ("lora", None)):
        line = ["train", "--model", "m", "--data", "d", "--out", "o", "--method", method]
        arguments = cli.parse(line)
        cli.train.check(arguments)
        assert arguments.toy_start == start
