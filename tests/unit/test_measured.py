"""How far the estimate was from what GPUs measured, in the runs that are most like one."""

import json
import re

import memory_errors
import pytest

from peftlab.commands import cli
from peftlab.errors import PeftLabError
from peftlab.memory import BUILT_IN, estimate, measured, measured_like
from peftlab.memory.estimate import OPTIMIZERS, PARALLEL, PRECISIONS

CONTENT = json.loads(measured.FILE.read_text(encoding="utf-8"))
EACH = 6  # one run in so many is estimated again here; test_estimate.py compares the largest file whole


@pytest.mark.parametrize("topic", memory_errors.TOPICS)
def test_the_file_holds_the_runs_that_were_measured(topic):
    """If it does not: python tools/memory_errors.py"""
    runs = list(memory_errors.runs(topic))
    stored = CONTENT["files"][topic]
    assert len(runs) == len(stored) > 5
    for (run, _), (*numbers, _) in zip(runs, stored, strict=True):
        assert tuple(CONTENT["words"][number] for number in numbers) == memory_errors.words_of(run)
    for (run, row), (*_, error) in list(zip(runs, stored, strict=True))[::EACH]:
        assert memory_errors.error_of(topic, run, row) == pytest.approx(error, abs=2e-4), run


def test_runs_that_are_like_one():
    """By hand: the LoRA runs of decoders in 16 bits on one GPU, with checkpointing and the plain AdamW."""
    wanted = ("one GPU", "decoders", "weights in 16 bits", "lora", "activations computed again", "torch's adamw",
              "the layers of peft")  # fmt: skip
    errors = sorted(error for rows in CONTENT["files"].values() for *numbers, error in rows
                    if tuple(CONTENT["words"][number] for number in numbers) == wanted)  # fmt: skip
    found = measured_like("llama-2-7b", "lora", r=4, batch=3, checkpointing=True)
    assert (found.runs, found.lowest, found.highest) == (len(errors), errors[0], errors[-1])
    assert errors[0] <= found.median <= errors[-1] and (found.alike, found.apart) == (wanted, ())
    assert found == measured_like("mistral-7b", checkpointing=5)


def test_what_too_few_runs_share_is_named_and_passed_over():
    with_sgd = measured_like("llama-2-7b", "lora", checkpointing=True, optimizer="sgd")
    assert with_sgd.apart == ("sgd",) and "torch's adamw" not in with_sgd.alike
    assert with_sgd.runs >= measured_like("llama-2-7b", "lora", checkpointing=True).runs
    shards = measured_like("llama-2-7b", "lora", gpus=4, parallel="fsdp")
    assert shards.alike[0] == "FSDP" and shards.runs < 10


@pytest.mark.parametrize(("alike", "runs", "apart"), [(3, 3, ()), (2, 7, ("one GPU",))])
def test_three_runs_are_enough(alike, runs, apart, monkeypatch):
    wanted = measured.described("gpt2", "lora")
    stored = [(wanted, -0.01)] * alike + [(("FSDP", *wanted[1:]), 0.02)] * 5
    monkeypatch.setattr(measured, "_runs", lambda: stored)
    found = measured_like("gpt2", "lora")
    assert (found.runs, found.apart, found.lowest) == (runs, apart, -0.01)


@pytest.mark.parametrize(("shape", "method", "run", "word"), [
    ("llama-2-7b", "lora", {"gpus": 2}, "DDP"),
    ("llama-2-7b", "lora", {"gpus": 1, "parallel": "fsdp"}, "one GPU"),
    ("llama-2-7b", "lora", {"precision": "mixed"}, "float32 weights under autocast"),
    ("llama-2-7b", "lora", {"four_bit": True}, "a base in four bits"),
    ("llama-2-7b", "qlora", {}, "a base in four bits"),
    ("llama-2-7b", "qlora", {}, "lora"),
    ("llama-2-7b", "full", {"optimizer": "paged-adamw8bit"}, "adamw8bit"),
    ("llama-2-7b", "full", {"optimizer": "adamw-fused"}, "torch's adamw"),
    ("llama-2-7b", "full", {"library": "peftlab"}, "the layers of peftlab"),
    ("mixtral-8x7b", "lora", {}, "mixtures of experts"),
    ("t5-base", "lora", {"checkpointing": 3}, "activations computed again"),
    ("t5-base", "lora", {}, "encoder-decoders"),
])  # fmt: skip
def test_a_run_in_words(shape, method, run, word):
    assert word in measured.described(shape, method, **run)


def test_every_setting_has_an_answer():
    for optimizer in OPTIMIZERS:
        for precision in PRECISIONS:
            for parallel in PARALLEL:
                run = {"optimizer": optimizer, "precision": precision, "gpus": 2, "parallel": parallel}
                found = measured_like("gpt2", "oft", **run)
                assert found.runs >= measured.FEW and -0.02 < found.lowest <= found.median <= found.highest < 0.02


def test_it_reads_as_a_line():
    text = str(measured_like("llama-2-7b", "lora", optimizer="sgd"))
    error = r"[-+]\d\.\d\d%"
    assert re.fullmatch(rf"\d+ measured runs: {error} to {error} \(one GPU, .*\); not measured with sgd", text)


@pytest.mark.parametrize(
    "wrong",
    [{"shape": "lama-2-7b"}, {"method": "lroa"}, {"optimizer": "adam"}, {"gpus": 0}, {"sequenze": 3}, {"r": "x"}],
)
def test_what_estimate_refuses_is_refused(wrong):
    with pytest.raises(PeftLabError):
        measured_like(**{"shape": "llama-2-7b", "method": "lora", **wrong})


def test_the_command_tells_it(capsys):
    assert cli.main(["memory", "smollm2-135m", "--method", "qlora", "--checkpointing"]) == 0
    like = measured_like("smollm2-135m", "qlora", checkpointing=True)
    told = " ".join(capsys.readouterr().out.split())
    errors = f"{like.lowest:+.2%} to {like.highest:+.2%}"
    assert f"in runs like it {errors}, in the {like.runs} that are most like it" in told


def test_the_file_holds_what_was_measured_at_all():
    """If it does not: python tools/memory_errors.py"""
    assert {name: CONTENT[name] for name in ("sizes", "settings")} == memory_errors.reach()


@pytest.mark.parametrize(("name", "argument"), [
    ("r", "r"), ("batch", "batch"), ("sequence", "sequence"), ("gpus", "gpus"), ("peak_bytes", "peak_bytes"),
])  # fmt: skip
def test_a_size_outside_all_measured_runs_is_told(name, argument):
    lowest, highest = CONTENT["sizes"][name]
    for size in (lowest, highest):
        assert measured_like("llama-2-7b", "lora", **{argument: size}).beyond == ()
    (told,) = measured_like("llama-2-7b", "lora", **{argument: highest + 10**9 * (name == "peak_bytes") + 1}).beyond
    assert told.startswith(measured.SIZES[name]) and "(measured: " in told
    if lowest > 1:
        assert len(measured_like("llama-2-7b", "lora", **{argument: lowest - 1}).beyond) == 1


def test_a_setting_that_no_run_had_is_told():
    run = {"chunked_loss": True, "labels": 3, "bias": "all", "masters": True}
    found = measured_like("llama-2-7b", "lora", attention="eager", autocast=True, **run)
    assert set(found.beyond) == {"bias='all'", "chunked_loss=True", "masters=True", "labels=3"}
    assert str(found).endswith(f"; beyond what was measured: {', '.join(found.beyond)}")
    assert measured_like("mistral-7b", "full").beyond == ()  # a method without a rank
    assert len(measured_like({**BUILT_IN["llama-2-7b"], "vocab_size": 10**8}, "lora").beyond) == 1


def test_the_command_tells_what_was_not_measured(capsys):
    assert cli.main(["memory", "smollm2-135m", "--r", "1000", "--masters", "--adapter-precision", "bf16"]) == 0
    told = capsys.readouterr().out
    assert "a rank of 1,000 (measured: 4 to 256); adapter_precision='bf16'; masters=True" in told


@pytest.mark.parametrize("wrong", [
    {"attention": "flash"}, {"adapter_precision": "fp16"}, {"chunked_loss": "auto"}, {"masters": None},
    {"autocast": "x"}, {"parallel": "zero"}, {"batch": 0}, {"batch": 10**18}, {"sequence": None}, {"checkpointing": -1},
    {"checkpointing": 33},
], ids=str)  # fmt: skip
def test_a_value_that_estimate_refuses_is_refused_here_too(wrong):
    for ask in (measured_like, estimate):
        with pytest.raises(PeftLabError, match=f"^{next(iter(wrong))}(=33, and .* has 32 blocks| must be)"):
            ask("llama-2-7b", **wrong)
