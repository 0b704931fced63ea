"""The command line: light to start, one line for a mistake, JSON for programs, and a run that survives a kill."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from patience import HUNG_SECONDS

from peftlab import __version__
from peftlab.catalogue import METHODS, Method, Option
from peftlab.commands import cli, terminal
from peftlab.commands.method_options import counted, trainable
from peftlab.errors import PeftLabError
from peftlab.memory import count

HEAVY = "('torch', 'transformers', 'datasets', 'peft', 'numpy', 'bitsandbytes', 'matplotlib')"


def python(*arguments, **options):
    root = str(Path(cli.__file__).parents[2])  # the same package, wherever the process starts
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        [sys.executable, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        **options,
    )


def run(capsys, *arguments):
    """(status, stdout, stderr) of a command run in this process."""
    try:
        status = cli.main(list(map(str, arguments)))
    except SystemExit as stop:
        status = stop.code
    out, err = capsys.readouterr()
    return status, out, err


# ------------------------------------------------------------------------------------------------------ starting


@pytest.mark.parametrize(
    "command",
    [[], ["count", "llama-2-70b", "--targets", "all-linear"], ["train", "--help"], ["--version"], ["count", "nothing"]],
    ids=lambda command: " ".join(command) or "import",
)
def test_starting_loads_nothing_heavy(command):
    code = f"""
import sys, peftlab, peftlab.commands.cli
try:
    {f"peftlab.commands.cli.main({command!r})" if command else "pass"}
except SystemExit:
    pass
print([m for m in {HEAVY} if m in sys.modules], file=sys.stderr)
"""
    _, err = python("-c", code).communicate(timeout=HUNG_SECONDS)
    assert err.strip().splitlines()[-1] == "[]"


def test_the_module_and_the_version(capsys):
    out, err = python("-m", "peftlab", "--version").communicate(timeout=HUNG_SECONDS)
    assert (out, err) == (f"peftlab {__version__}\n", "")
    assert run(capsys, "--version")[:2] == (0, f"peftlab {__version__}\n")


def test_every_command_has_help_with_examples_that_parse(capsys):
    assert [row[0] for row in cli.COMMANDS] == [
        "fetch", "doctor", "count", "memory", "recommend", "train", "export", "bench",
    ]  # fmt: skip
    status, out, _ = run(capsys, "--help")
    assert status == 0 and all(name in out for name, *_ in cli.COMMANDS)
    for name, _, examples, _, _ in cli.COMMANDS:
        status, out, _ = run(capsys, name, "--help")
        assert status == 0 and "examples:" in out and "--json" in out
        for line in examples:
            assert f"peftlab {line}" in out
            assert cli.parse(line.split()).command == name


# ------------------------------------------------------------------------------------------------------ count


def test_count_prints_json_that_the_library_agrees_with(capsys):
    status, out, err = run(
        capsys, "count", "llama-3.1-8b", "--method", "lora", "--r", 16, "--targets", "all-linear", "--json"
    )
    assert (status, err) == (0, "")
    assert json.loads(out) == count("llama-3.1-8b", "lora", r=16, targets="all-linear").as_dict()
    assert list(json.loads(out)) == ["trainable", "total", "percent"]


def test_count_passes_every_option_on(capsys):
    more = ["--r", 3, "--bias", "all", "--labels", 5, "--targets", ".*(key|output.dense)", "--json"]
    _, out, _ = run(capsys, "count", "bert-base", *more)
    wanted = count("bert-base", "lora", r=3, bias="all", labels=5, targets=".*(key|output.dense)")
    assert json.loads(out) == wanted.as_dict()


def test_count_prints_a_table_for_a_person(capsys, tmp_path):
    status, out, _ = run(capsys, "count", "llama-2-7b", "--method", "qlora", "--targets", "q_proj, v_proj")
    assert status == 0
    assert re.search(r"trainable +4,194,304\n", out) and "64 (q_proj, v_proj)" in out
    assert "16.78 MB (16.00 MiB)" in out
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    status, out, err = run(capsys, "count", tmp_path)
    assert (status, out) == (2, "") and "is missing; a bert config needs it" in err


@pytest.mark.parametrize(
    ("text", "targets"),
    [
        (None, None),
        ("all-linear", "all-linear"),
        ("q_proj", ["q_proj"]),
        ("q_proj, mlp.down_proj,", ["q_proj", "mlp.down_proj"]),
        (r".*\.0\.(q|v)_proj", r".*\.0\.(q|v)_proj"),
        ("", []),
    ],
)
def test_targets_are_a_list_a_regular_expression_or_all_linear(text, targets):
    assert terminal.parse_targets(text) == targets


MISTAKES = [
    ("count lama-2-7b", "Did you mean 'llama-2-7b'"),
    ("count gpt2 --method lorra", "Did you mean 'lora'"),
    ("count gpt2 --targets c_atn", "Did you mean 'c_attn'"),
    ("count gpt2 --targets ,", "No targets are named"),
    ("count gpt2 --r 0", "r must be a positive whole number, found 0"),
    ("count gpt2 --r eight", "argument --r: invalid int value: 'eight'."),
    ("count gpt2 --rank 8", "unknown argument '--rank'"),
    ("count gpt2 --bias lora", "--bias 'lora' is none of none, all, lora_only. Did you mean 'lora_only'?"),
    ("count", "the following arguments are required: SHAPE."),
    ("count gpt2 extra", "unknown argument 'extra'"),
    (
        "cuont gpt2",
        "'cuont' is none of fetch, doctor, count, memory, recommend, train, export, bench. Did you mean 'count'?",
    ),
    ("", "COMMAND"),
    ("fetch minilmm", "Did you mean 'minilm'"),
    ("bench lorra --out x.json", "Did you mean 'lora'"),
    ("train --model m --data d", "--out"),
    ("train --model m --data d --out o --method qlra", "not 'qlra'. Did you mean 'qlora'"),
    ("train --model m --data d --out o --steps 3 --epochs 1", "not both"),
    ("train --model m --data d --out o --steps 0", "--steps must be a positive whole number, found 0"),
    ("train --model m --data d --out o --batch-size -1", "--batch-size must be a positive whole number, found -1"),
    ("train --model m --data d --out o --lr 0", "--lr must be a positive number"),
    ("train --model m --data d --out o --lr nan", "--lr must be a positive number"),
    ("train --model tiny --data support-desc --out o", "Did you mean 'support-desk'"),
]


@pytest.mark.parametrize(("command", "message"), MISTAKES)
def test_a_mistake_is_one_line_and_status_2(command, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, err = run(capsys, *command.split())
    assert (status, out) == (2, "")
    assert err.count("\n") == 1 and err.startswith("peftlab") and message in err


# ------------------------------------------------------------------------------------------------------ being stopped


def test_ctrl_c_and_a_failing_disk_are_one_line(capsys, monkeypatch):
    def raising(error):
        def stop(*_, **__):
            raise error

        return stop

    for error, expected in (
        (KeyboardInterrupt(), (130, "peftlab: interrupted\n")),
        (KeyboardInterrupt("go on later"), (130, "peftlab: go on later\n")),
        (OSError(28, "No space left on device", "x"), (1, "peftlab: No space left on device: x\n")),
    ):
        monkeypatch.setattr("peftlab.memory.counting.totals.count", raising(error))
        status, out, err = run(capsys, "count", "gpt2")
        assert (status, err) == expected and out == ""


def test_a_run_that_never_began_does_not_hold_its_folder(tmp_path):
    """A typo leaves settings behind and no state: the corrected command is not told that another run is there."""
    from peftlab.commands import run_folder

    run_folder.claim(tmp_path, {"targets": "qproj", "limit": None}, True)
    run_folder.claim(tmp_path, {"targets": "q_proj", "limit": 8}, True)
    assert json.loads((tmp_path / run_folder.SETTINGS).read_text())["targets"] == "q_proj"
    (tmp_path / run_folder.STATE / "step-00000002").mkdir(parents=True)
    with pytest.raises(PeftLabError, match="--limit was 8, now not given"):
        run_folder.claim(tmp_path, {"targets": "q_proj", "limit": None}, True)


@pytest.mark.parametrize("command", ["count gpt2", "--help"])
def test_a_reader_who_has_gone_is_no_reason_to_complain(command):
    read, write = os.pipe()
    os.close(read)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    command = [sys.executable, "-m", "peftlab", *command.split()]
    process = subprocess.Popen(command, stdout=write, stderr=subprocess.PIPE, text=True, env=environment)
    os.close(write)
    assert process.communicate(timeout=HUNG_SECONDS)[1] == ""
    assert process.returncode == 141


@pytest.mark.parametrize("command", ["count gpt2", "count gpt2 --json", "memory gpt2", "--help", "--version"])
def test_an_output_that_cannot_be_written_is_one_line(command):
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    line = f"{sys.executable} -m peftlab {command}"
    full = subprocess.run(f"{line} > /dev/full", shell=True, stderr=subprocess.PIPE, text=True)
    assert (full.returncode, full.stderr) == (1, "peftlab: No space left on device\n")
    closed = subprocess.run(f"{line} >&-", shell=True, stderr=subprocess.PIPE, text=True)
    assert closed.returncode == 2 and closed.stderr.count("\n") == 1 and "output is closed" in closed.stderr


@pytest.mark.parametrize(("place_of", "doing"), [
    ("peftlab.assets.models.load_model", "loading ./tiny"), ("peftlab.training.train", "training"),
    ("peftlab.commands.tasks.test", "testing"), ("peftlab.quantization.model.quantize_model", "quantising ./tiny"),
])  # fmt: skip
def test_memory_that_runs_out_is_one_line(place, capsys, monkeypatch, place_of, doing):
    def full(*_, **__):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096 bytes. Error 12")

    monkeypatch.setattr(place_of, full)
    status, out, err = run(capsys, *train_command("ask.jsonl", "full", "--steps", 1, "--method", "qlora"))
    assert (status, out) == (2, "")
    assert f"Out of memory while {doing} (4096 bytes were wanted). " in err.splitlines()[-1]
    assert "Traceback" not in err


# ------------------------------------------------------------------------------------------------------ fetch and bench


def test_fetch_asks_for_what_is_named_and_says_where_it_is(capsys, monkeypatch, tmp_path):
    asked = []

    def fetch(names, say):
        asked.append(names)
        say("minilm: fetching 84 MB")
        return {"minilm": tmp_path}

    monkeypatch.setattr("peftlab.assets.fetch.fetch", fetch)
    status, out, err = run(capsys, "fetch", "minilm")
    assert status == 0 and f"verified, in {tmp_path}" in out and err == "minilm: fetching 84 MB\n"
    status, out, _ = run(capsys, "fetch", "--json")
    assert json.loads(out)["assets"] == {"minilm": str(tmp_path)}
    assert asked == [["minilm"], None]


def test_bench_passes_its_options_on(capsys, monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr("peftlab.bench.run", lambda topic, out, **options: asked.append((topic, out, options)))
    status, out, _ = run(capsys, "bench", "lora", "--out", tmp_path / "x.json", "--only", "rank,where", "--jobs", 2)
    assert status == 0 and "x.json" in out
    assert asked == [("lora", str(tmp_path / "x.json"), {"only": ["rank", "where"], "jobs": 2})]


# ------------------------------------------------------------------------------------------------------ train

SUBJECTS, ENDS = ("red", "green", "blue"), ("cat", "dog", "runs", "sleeps")


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty folder with a tiny model and three small data files, as the current one."""
    from tiny import llama, tokenizer

    monkeypatch.chdir(tmp_path)
    llama().save_pretrained("tiny")
    tokenizer(pad=False).save_pretrained("tiny")
    pairs = [(a, b) for a in SUBJECTS for b in ENDS]
    rows = [{"prompt": f"the {a} {b} ?", "completion": "yes" if a == "red" else "no"} for a, b in pairs]
    (tmp_path / "ask.jsonl").write_text("\n".join(json.dumps(row) for row in rows * 3))
    (tmp_path / "sort.csv").write_text("text,label\n" + "\n".join(f"the {a} {b},{a}" for a, b in pairs * 3))
    (tmp_path / "read.txt").write_text("\n".join(f"the {a} {b} ." for a, b in pairs))
    return tmp_path


def train_command(data, out, *more):
    """A run of LoRA, or of the method that `more` names: it then gives no option of LoRA's own."""
    of_lora = () if "--method" in more else ("--alpha", "32")
    return ["train", "--model", "./tiny", "--data", data, "--out", out, "--lr", "0.05", *of_lora, *map(str, more)]


def tensors(folder):
    """The adapter's tensors as bytes, by name."""
    from safetensors.numpy import load_file

    return {name: value.tobytes() for name, value in load_file(folder / "adapter_model.safetensors").items()}


def test_a_4_bit_base_from_the_shell(place, capsys):
    command = train_command("ask.jsonl", "run", "--steps", 3, "--targets", "all-linear", "--method", "qlora")
    status, out, err = run(capsys, *command, "--optimizer", "adamw8bit", "--json")
    assert status == 0, err
    metrics = json.loads(out)
    counted = count("tiny", "qlora", targets="all-linear")
    assert (metrics["trainable"], metrics["total"]) == (counted.trainable, counted.total)
    assert metrics["settings"]["optimizer"] == "adamw8bit" and (place / "run" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("init, method", [("pissa", "lora"), ("eva", "lora"), ("olora", "qlora")])
def test_starts_from_the_shell(place, capsys, init, method):
    import peftlab as pl
    from peftlab.assets.models import load_model

    command = [*train_command("ask.jsonl", "run", "--steps", 4, "--init", init, "--r", 2, "--method", method), "--json"]
    status, out, err = run(capsys, *command)
    assert status == 0, err
    before = tensors(place / "run")
    status, again, err = run(capsys, *command, "--resume")
    assert status == 0 and tensors(place / "run") == before, err
    model, _ = load_model("./tiny")
    pl.load_adapter(model, place / "run", trainable=True)
    assert pl.count_parameters(model).trainable == json.loads(out)["trainable"]


def test_new_tokens_train_and_the_tokenizer_that_has_them_is_saved(place, capsys):
    from transformers import AutoTokenizer

    import peftlab as pl
    from peftlab.assets.models import load_model

    rows = [{"prompt": f"the <pet> {end} ?", "completion": "<yes>"} for end in ENDS]
    (place / "new.jsonl").write_text("\n".join(json.dumps(row) for row in rows * 3))
    command = train_command("new.jsonl", "run", "--steps", 30, "--add-tokens", "<pet>=cat dog, <yes>")
    status, _, err = run(capsys, *command)
    assert status == 0, err
    files = {name: (place / "run" / name).read_bytes() for name in ("tokenizer.json", "adapter_model.safetensors")}
    assert run(capsys, *command)[0] == 0  # it goes on, and its own files are no strangers to it
    assert all((place / "run" / name).read_bytes() == content for name, content in files.items())
    model, plain = load_model("./tiny")
    tokenizer = AutoTokenizer.from_pretrained(place / "run")
    assert len(tokenizer) == len(plain) + 2 and tokenizer.decode([18]) == "<pet>"
    pl.load_adapter(model, "run")
    assert pl.attached(model)["default"].trainable_tokens["model.embed_tokens"] == (18, 19)
    example = pl.encode_completion(tokenizer, **rows[0])
    assert pl.mean_loss(model, [example], pl.Collator(tokenizer)) < 2 < math.log(32)
    assert run(capsys, *command, "--no-resume", "--steps", "1")[0] == 0


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--add-tokens", "<a>,,<b>"], "give different tokens"),
        (["--add-tokens", "<a>,<a>=cat"], "give different tokens"),
        (["--add-tokens", "cat"], "'cat' already, with the id"),
        (["--add-tokens", "<a>=zebra"], "the tokenizer does not know"),
        (["--add-tokens", "<a>", "--method", "ia3"], "needs a method that trains new rows: .*lora.*; not ia3"),
    ],
)
def test_new_tokens_that_cannot_be_added_are_one_line(place, capsys, more, told):
    status, _, err = run(capsys, *train_command("ask.jsonl", "run", *more))
    assert status == 2 and re.search(told, err) and err.count("\n") == 1
    assert not (place / "run" / "adapter_model.safetensors").exists()


def test_a_run_learns_saves_and_reports(place, capsys, monkeypatch):
    monkeypatch.setattr("peftlab.commands.train.LOG_SECONDS", 0.0)
    command = train_command("ask.jsonl", "run", "--steps", 120, "--targets", "all-linear", "--eval-every", 60)
    status, out, err = run(capsys, *command)
    assert status == 0, err
    assert re.search(r"^step 120: loss \d\.\d{4}$", err, re.MULTILINE)
    for label in ("trainable", "steps", "final loss", "validation loss", "exact match", "saved", "seconds"):
        assert re.search(rf"^{label} ", out, re.MULTILINE), out
    assert "saved; testing on 3 examples\n" in err and "adapter in run, " in out
    metrics = json.loads((place / "run" / "metrics.json").read_text())
    assert metrics["test"] == {"examples": 3, "exact_match": 1.0}
    assert metrics["steps"] == 120
    assert [row["step"] for row in metrics["evaluations"]] == [60, 120]
    assert 0 < metrics["final_loss"] < metrics["evaluations"][0]["loss"] < math.log(32)
    assert metrics["trainable"] == count("tiny", "lora", targets="all-linear").trainable
    assert metrics["saved_bytes"] == (place / "run" / "adapter_model.safetensors").stat().st_size

    # What was saved is what was trained, and Hugging Face peft opens it.
    import torch
    from peft import PeftModel

    import peftlab as pl
    from peftlab.assets.models import load_model

    model, tokenizer = load_model("./tiny")
    other = PeftModel.from_pretrained(load_model("./tiny")[0], "run")
    pl.load_adapter(model, "run")
    ids = tokenizer("the red cat ?", return_tensors="pt").input_ids
    assert torch.allclose(model(ids).logits, other(ids).logits, atol=1e-5)

    # The same command again finds the work done; --json says the same as metrics.json.
    before = tensors(place / "run")
    status, out, _ = run(capsys, *command, "--json")
    assert status == 0 and tensors(place / "run") == before
    again = json.loads(out)
    assert {**again, "seconds": 0} == {**json.loads((place / "run" / "metrics.json").read_text()), "seconds": 0}
    assert again["steps"] == 120 and again["test"] == metrics["test"]


def test_a_folder_holds_one_run(place, capsys):
    import filelock

    assert run(capsys, *train_command("ask.jsonl", "run", "--steps", 3))[0] == 0
    status, _, err = run(capsys, *train_command("ask.jsonl", "run", "--steps", 3, "--r", 4))
    assert status == 2 and "--r was 8, now 4" in err and "--no-resume" in err
    assert run(capsys, *train_command("ask.jsonl", "run", "--steps", 3, "--r", 4, "--no-resume"))[0] == 0
    assert json.loads((place / "run" / "adapter_config.json").read_text())["r"] == 4
    with filelock.FileLock(place / "run" / ".lock"):
        status, _, err = run(capsys, *train_command("ask.jsonl", "run", "--steps", 3, "--r", 4))
    assert status == 2 and "Another run is writing" in err
    (place / "file").touch()
    status, _, err = run(capsys, *train_command("ask.jsonl", "file"))
    assert status == 2 and "is a file" in err


def test_classes_are_learned_and_the_head_is_saved_with_the_adapter(place, capsys):
    status, out, err = run(capsys, *train_command("sort.csv", "run", "--epochs", 8, "--json"))
    assert status == 0, err
    result = json.loads(out)
    assert result["classes"] == sorted(SUBJECTS) and result["test"]["accuracy"] == 1.0
    assert result["trainable"] == count("tiny", "lora").trainable + 3 * 16  # Llama's head of three classes, no bias
    from safetensors import safe_open

    with safe_open(place / "run" / "adapter_model.safetensors", "pt") as file:
        assert "base_model.model.score.weight" in file.keys()


@pytest.mark.parametrize("method", ["ia3", "houlsby", "pfeiffer", "parallel", "selective"])
def test_every_method_trains_from_the_shell_and_its_folder_loads(place, capsys, method):
    import torch

    import peftlab as pl
    from peftlab.assets.models import load_model

    more = ["--last-layers", 1] if method == "selective" else ["--reduction-factor", 4]
    command = train_command("ask.jsonl", "run", "--method", method, "--steps", 6, "--json", *more)
    status, out, err = run(capsys, *command)
    assert status == 0, err
    result = json.loads(out)
    model, _ = load_model("./tiny")
    with torch.no_grad():
        before = model(torch.tensor([[5, 6, 7]])).logits
        pl.load_adapter(model, "run", trainable=True)
        assert not torch.allclose(model(torch.tensor([[5, 6, 7]])).logits, before, atol=1e-6)
    assert pl.count_parameters(model).trainable == result["trainable"]
    if method != "selective":
        options = {} if method == "ia3" else {"reduction_factor": 4}
        assert result["trainable"] == count("tiny", method, **options).trainable


def test_the_help_names_every_method(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "500")  # argparse breaks a name at its hyphen
    for command, known in (("train", trainable()), ("count", counted()), ("memory", counted())):
        _, out, _ = run(capsys, command, "--help")
        assert f"--method M {', '.join(known)} (default: lora)" in " ".join(out.split())
    names = "full lora qlora ia3 bitfit selective prompt p-tuning prefix houlsby pfeiffer parallel"
    assert [name for name in trainable() if name in names.split()] == names.split()


def test_a_method_that_this_model_has_no_place_for_is_one_line(place, capsys):
    status, out, err = run(capsys, *train_command("ask.jsonl", "run", "--method", "bitfit", "--steps", 3))
    assert (status, out) == (2, "") and "has no biases, so BitFit has nothing to train. Use IA3Config" in err
    assert not (place / "run" / "metrics.json").exists()
    status, _, err = run(capsys, *train_command("ask.jsonl", "other", "--method", "ia3", "--bias", "all", "--steps", 1))
    assert status == 0 and "--bias: no option of the method ia3" in err
    # and the folder is free for the next try
    assert run(capsys, *train_command("ask.jsonl", "run", "--method", "ia3", "--steps", 3))[0] == 0


def test_all_weights_train_on_plain_text_and_the_model_is_saved(place, capsys):
    status, out, err = run(capsys, *train_command("read.txt", "run", "--method", "full", "--steps", 30, "--json"))
    assert status == 0, err
    result = json.loads(out)
    assert result["trainable"] == result["total"] == count("tiny", "full").total
    assert result["test"]["perplexity"] < 12  # of 32 words
    assert not (place / "run" / "adapter_config.json").exists()
    again = train_command("read.txt", "second", "--method", "full", "--steps", 1, "--json")
    again[2] = "run/model"
    assert json.loads(run(capsys, *again)[1])["final_loss"] < 2.5


def test_answers_that_pandas_takes_for_missing_are_learned(place, capsys):
    """ "NA" is the code of Namibia, and numbers are answers too."""
    lines = [f"the {a} {b} ?,{'NA' if a == 'red' else '007'}" for a in SUBJECTS for b in ENDS] * 4
    (place / "codes.csv").write_text("\n".join(["prompt,completion", *lines]))
    status, out, err = run(capsys, *train_command("codes.csv", "run", "--steps", 3, "--json"))
    assert status == 0, err
    assert json.loads(out)["test"]["examples"] > 0


def test_chats_from_the_shell_packed_or_not(place, capsys):
    from tiny import tokenizer

    tokenizer(chat=True).save_pretrained("tiny")
    chats = [
        [{"from": "human", "value": f"the {a} {b} ?"}, {"from": "gpt", "value": "yes"}] * (1 + len(b) % 3)
        for a in SUBJECTS
        for b in ENDS
    ]
    (place / "chat.jsonl").write_text("\n".join(json.dumps({"conversations": chat, "id": 1}) for chat in chats))
    results = []
    for more in ((), ("--packing",)):
        command = train_command("chat.jsonl", f"chat{len(more)}", "--steps", 4, "--max-length", 12, "--json", *more)
        status, out, err = run(capsys, *command)
        assert status == 0, err
        assert err.startswith("chat.jsonl holds ShareGPT conversations: the assistant's turns are learned")
        assert "(not used: id)" in err and "are longer than 12 tokens and were cut at the beginning" in err
        results.append(json.loads(out))
    padded, packed = results
    assert packed["settings"]["packing"] and not padded["settings"]["packing"]
    assert packed["final_loss"] == pytest.approx(padded["final_loss"], rel=1e-5)
    assert list(packed["test"]) == ["examples", "perplexity"]
    status, _, err = run(capsys, *train_command("chat.jsonl", "one", "--packing", "--batch-size", 1))
    assert status == 2 and "leaves nothing to share a row" in err
    status, _, err = run(capsys, *train_command("sort.csv", "two", "--packing", "--steps", 1))
    assert status == 2 and "packing is for causal language models" in err
    status, _, err = run(capsys, *train_command("sort.csv", "two", "--train-on", "last", "--steps", 1))
    assert status == 2 and "--train-on is for chats" in err


def test_data_that_cannot_be_used_is_told(place, capsys):
    hole = '{"prompt": "a", "completion": "yes"}\n{"prompt": "a", "completion": null}\n'
    bad = {
        "wrong.csv": (
            "a,b\n1,2\n3,4\n",
            "has the columns a, b; it needs prompt and completion, text and label, or text",
        ),
        "one.csv": ("text,label\n" + "the cat,x\n" * 9, "has 1 label (x)"),
        "few.txt": ("the cat", "at least two are needed"),
        "hole.jsonl": (hole * 3, "without completion"),
        "word.xyz": ("the cat", "a .xyz file is not known"),
    }
    for name, (text, message) in bad.items():
        (place / name).write_text(text)
        status, out, err = run(capsys, *train_command(name, "run-" + name))
        assert (status, out) == (2, "") and message in err and err.count("\n") == 1, err
    status, _, err = run(capsys, *train_command("ask.jsonl", "long", "--max-length", 65))
    assert status == 2 and "the model takes 64 tokens" in err
    status, _, err = run(capsys, *train_command("ask.jsonl", "other", "--targets", "q_prj"))
    assert status == 2 and "Did you mean 'q_proj'" in err.splitlines()[-1]


def test_a_method_is_given_the_options_that_it_has_fields_for(monkeypatch):
    import dataclasses

    from peftlab.commands import train

    config = dataclasses.make_dataclass("Config", [("dropout", float), ("target_modules", object), ("width", int, 3)])
    monkeypatch.setattr("test_cli.Narrow", config, raising=False)
    options = (Option(name="dropout", help=""), Option(name="targets", fills="target_modules", help=""))
    monkeypatch.setitem(METHODS, "narrow", Method(config="test_cli:Narrow", options=options))
    given = cli.argparse.Namespace(method="narrow", r=8, alpha=16.0, dropout=0.5, bias="none", targets="q", lr=1.0)
    assert train._config(given, ["q"], task_type="SEQ_CLS") == config(0.5, ["q"], 3)
    monkeypatch.setitem(METHODS, "counted", Method())  # a row without a config is counted only
    known = ", ".join(name for name, row in METHODS.items() if row.trains)
    assert known.startswith("full, lora, qlora, ") and known.endswith(", narrow")
    with pytest.raises(PeftLabError, match=f"train knows the methods {known}, not 'counted'"):
        train.check(cli.argparse.Namespace(method="counted"))


def test_a_killed_run_and_an_interrupted_one_go_on_to_the_same_adapter(place, capsys, monkeypatch):
    from peftlab.training.run import Run

    command = train_command("ask.jsonl", "stopped", "--steps", 100, "--save-every", 10, "--dropout", 0.1)
    states = place / "stopped" / "run"
    process = python("-m", "peftlab", *command, cwd=place)
    deadline = time.monotonic() + HUNG_SECONDS
    while not list(states.glob("step-*")) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.kill()
    _, err = process.communicate(timeout=HUNG_SECONDS)
    reached = max(states.glob("step-*"), default=None)
    assert reached is not None, err

    with monkeypatch.context() as patched:
        update = Run.update

        def interrupted(run):
            if run.step == 93:
                raise KeyboardInterrupt
            return update(run)

        patched.setattr(Run, "update", interrupted)
        status, _, err = run(capsys, *command)
    assert status == 130
    assert err.splitlines()[-1] == "peftlab: interrupted; the same command goes on from the last saved state"
    assert max(states.glob("step-*")) >= reached and not (place / "stopped" / "metrics.json").exists()

    assert run(capsys, *command)[0] == 0
    command[command.index("stopped")] = "whole"
    assert run(capsys, *command)[0] == 0
    assert tensors(place / "stopped") == tensors(place / "whole")


def test_a_real_ctrl_c_is_one_line():
    """The signal itself, sent to a process that waits in a command."""
    code = "import signal, sys, time, peftlab.memory, peftlab.commands.cli\n"
    # a shell starts background jobs with the signal ignored, and children inherit that
    code += "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    code += "peftlab.memory.counting.totals.count = lambda *_, **__: (print('ready', flush=True), time.sleep(60))\n"
    code += "sys.exit(peftlab.commands.cli.main(['count', 'gpt2']))"
    process = python("-c", code)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=HUNG_SECONDS)
    assert (process.returncode, err) == (130, "peftlab: interrupted\n")


@pytest.mark.parametrize(
    "command, told",
    [
        ("count llama-2-7b --method prefix --r 8", "--r: no option of the method prefix, so it changes nothing"),
        ("memory llama-2-7b --method PROMPT --targets q_proj", "--targets: no option of the method prompt"),
        ("memory gpt2 --method full --virtual-tokens 3 --r 4", "--r, --virtual-tokens: no .* full, .* Its own: none."),
        ("count bert-base --method lora --reduction-factor 4", "Its own: --r, --targets, --bias."),
    ],
)
def test_an_option_of_another_method_is_told(command, told, capsys):
    status, _, err = run(capsys, *command.split())
    assert status == 0 and err.count("\n") == 1 and re.search(told, err)
    assert run(capsys, *command.partition(" --")[0].split(), "--method", "lara", "--r", "8")[0] == 2


def test_the_method_decides_the_defaults_of_its_options(capsys):
    for given in ([], ["--r", "8"]):
        assert "4,194,304" in run(capsys, "count", "llama-2-7b", *given)[1]
    assert "vera, r = 256" in run(capsys, "count", "llama-2-7b", "--method", "vera")[1]
