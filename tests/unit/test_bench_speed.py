"""The speed ladder on small models: each rung makes the same update, and the arithmetic that predicts it."""

import sys

import pytest
import tiny
import torch

import peftlab as pl
from peftlab import bench
from peftlab.bench import ladder, models, rungs, speed, timing, unsloth_step
from peftlab.kit.measurements import Results
from peftlab.memory import estimate
from peftlab.memory import speed as arithmetic

SMALL = {
    "model_type": "llama", "vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
TARGETS = ["q_proj", "v_proj", "down_proj"]


@pytest.fixture
def on_the_cpu(monkeypatch):
    """Measure a small shape here, without a compiler."""
    monkeypatch.setattr(speed, "gpu_for", lambda point, what: torch.device("cpu"))
    monkeypatch.setattr(torch, "compile", lambda forward, **options: forward)
    monkeypatch.setattr(speed, "NARROW", {"hidden_size": 64, "intermediate_size": 64})
    monkeypatch.setattr(models.gc, "collect", lambda: 0)  # it takes half a second
    monkeypatch.setattr(timing, "timed", lambda step, repeats, warm_up: [step() is not None or 1.0])
    yield
    models.let_go()


def point_of(group, method="lora", checkpointing=True):
    return {"section": "s", "timed": True, "group": group, "shape": SMALL, "method": method, "batch": 2, "sequence": 16,
            "checkpointing": checkpointing, "r": 16}  # fmt: skip


@pytest.mark.parametrize("method", ["lora", "qlora"])
@pytest.mark.parametrize("group", speed.GROUPS)
def test_each_group_of_rungs_is_measured_and_gives_the_model_back(group, method, on_the_cpu):
    rows = speed.measure(point_of(group, method))
    names = speed.GROUPS[group] if method == "qlora" else tuple(n for n in speed.GROUPS[group] if n != "triton")
    assert tuple(row["rung"] for row in rows if row["rung"] != "copy") == names
    left_out = {row["rung"] for row in rows if row.get("skipped")}
    others = {"unsloth", "unsloth, trainer", "triton", "cuda graph"}
    assert left_out <= {*others, "train compiled", "fast, pinned", "fast, 8-bit"}, [row.get("skipped") for row in rows]
    for row in rows:
        assert (row.get("seconds") is None) == (row["rung"] in left_out) and "group" not in row
    if group == "unsloth":
        return  # its processes have the machine to themselves
    (model,) = models._held.values()
    assert not pl.attached(model) and not any(p.requires_grad for p in model.parameters())
    assert not any("forward" in block.__dict__ for block in model.model.layers)
    assert {m.backend for m in model.modules() if hasattr(m, "backend")} <= {"auto"}
    assert not model.is_gradient_checkpointing


def test_train_stands_beside_a_plain_loop(on_the_cpu, monkeypatch):
    point = point_of("loop", checkpointing=False) | {"pairs": 2}
    (row,) = speed.measure(point)
    assert row["rung"] == "loop" and row["pairs"] == 2 and row["ratio_low"] <= row["ratio"] <= row["ratio_high"]
    monkeypatch.setattr(timing, "_profiles", True)
    assert speed.measure(point) == []


def test_a_rung_that_fails_says_why_and_costs_no_other(on_the_cpu, monkeypatch):
    def fails(*_):
        raise RuntimeError("no kernel at 0x7fff for 3 rows\nand more")

    monkeypatch.setattr(rungs, "chunked_loss", fails)
    rows = {row["rung"]: row for row in speed.measure(point_of("compiled"))}
    assert rows["chunked loss"]["skipped"] == "RuntimeError: no kernel at N for N rows"
    assert rows["compiled layers"]["seconds"] > 0 and "seconds" not in rows["chunked loss"]


UNSLOTH = """
import os, sys

early = [name for name in ("transformers", "peft", "trl") if name in sys.modules]
assert not early, f"{early} were imported before Unsloth"
assert os.environ["HF_HUB_OFFLINE"] == "1" and "UNSLOTH_DISABLE_STATISTICS" in os.environ
import peft, transformers

class FastLanguageModel:
    def from_pretrained(folder, max_seq_length, dtype, load_in_4bit, use_gradient_checkpointing, local_files_only):
        assert (max_seq_length, use_gradient_checkpointing) == (16, "unsloth")
        open("compiled.py", "w").close()
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        return model, transformers.AutoTokenizer.from_pretrained(folder)

    def get_peft_model(model, use_gradient_checkpointing, **config):
        print("Unsloth patched 2 layers.")
        return peft.get_peft_model(model, peft.LoraConfig(**config))

    def for_training(model):
        model.train()
"""


def test_unsloth_is_imported_first_in_a_process_of_its_own(on_the_cpu, monkeypatch, tmp_path):
    """A stand-in for Unsloth looks at the order of imports, loads the saved model, and is not loaded here."""
    (tmp_path / "unsloth.py").write_text(UNSLOTH)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    loop, trainer = speed.measure(point_of("unsloth"))
    assert (loop["rung"], loop["skipped"], loop["notes"]) == ("unsloth", None, "Unsloth patched 2 layers.")
    per_block = 2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 128)  # q and o; k and v; the three of the MLP
    assert loop["trainable"] == 2 * 16 * per_block and 0 < loop["seconds"] < 60
    assert trainer["rung"] == "unsloth, trainer" and "trl" in trainer["skipped"]  # which is not installed here
    assert "unsloth" not in sys.modules and [path.name for path in tmp_path.iterdir()] == ["unsloth.py"]


def test_unsloth_is_not_measured_in_16_bits_for_4(on_the_cpu, monkeypatch, tmp_path):
    (tmp_path / "unsloth.py").write_text(UNSLOTH)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(speed.GROUPS, "unsloth", ("unsloth",))
    (row,) = speed.measure(point_of("unsloth", "qlora"))
    assert "Unsloth loaded the model in N bits, not in N" in row["skipped"] and row.get("seconds") is None


def test_a_process_of_unsloths_that_hangs_is_ended(on_the_cpu, monkeypatch, tmp_path, capsys):
    """The row says so without the command, in which there are paths of the machine. What was printed is shown."""
    (tmp_path / "unsloth.py").write_text("import time\nprint('Unsloth waits', flush=True)\ntime.sleep(60)\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(speed.GROUPS, "unsloth", ("unsloth",))
    monkeypatch.setattr(unsloth_step, "SECONDS", 3)
    (row,) = speed.measure(point_of("unsloth"))
    assert row["skipped"] == "PeftLabError: the process was ended after N seconds"
    assert "Unsloth waits" in capsys.readouterr().err


def test_the_process_of_unsloth_finds_what_lies_in_this_folder(on_the_cpu, monkeypatch, tmp_path):
    """An empty path in `sys.path`, as in a notebook, means the folder of this process, and not that of the other."""
    (tmp_path / "unsloth.py").write_text(UNSLOTH)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    monkeypatch.setitem(speed.GROUPS, "unsloth", ("unsloth",))
    (row,) = speed.measure(point_of("unsloth"))
    assert row["skipped"] is None and row["notes"] == "Unsloth patched 2 layers."


@pytest.mark.parametrize("profiles", [False, True])
def test_a_callback_times_the_steps_after_a_warm_up(monkeypatch, profiles):
    monkeypatch.setattr(timing, "_profiles", profiles)
    clock = iter((0.0, 10.0, 11.0, 13.0))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))
    between = timing.BetweenCalls(warm_up=2, repeats=2)
    for _ in range(4):
        between()
    row = between.row()
    told = (row["seconds"], row["fastest_step"], row["slowest_step"], row["repeats"])
    assert told == ((None, None, None, 2) if profiles else (1.5, 1.0, 2.0, 2))


def test_reasons_of_several_processes_are_told_together():
    rows = [
        [{"rung": "a", "skipped": reason, "seconds": None}] for reason in ("no graph", None, "no memory", "no graph")
    ]
    assert timing.together(rows) == [{"rung": "a", "skipped": "no graph; no memory", "seconds": None}]


def adapted(dtype=torch.float32):
    model = tiny.llama()
    pl.attach(model, pl.LoRAConfig(r=2, alpha=6, target_modules=TARGETS)).train()
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora" in name:
            parameter.data.normal_(std=0.1)
    return model.to(dtype)


def batch_of(rows=3, length=9):
    ids = torch.randint(32, (rows, length), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[0, :4] = -100
    return {"input_ids": ids, "labels": labels}


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("rows", [1, 5, 1000])
def test_the_loss_in_chunks_is_the_loss_with_its_gradient(rows):
    model = adapted(torch.float64)
    expected = model(**batch_of()).loss
    wanted = torch.autograd.grad(expected, trained(model))
    found = rungs.chunked_loss(model, batch_of(), rows)
    gradients = torch.autograd.grad(2 * found, trained(model))
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    for one, other in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(one, 2 * other, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("optimizer", [rungs.Masters, rungs.Flat])
def test_masters_and_the_flat_tensor_make_adamws_steps(optimizer):
    """In float32, where the masters are the parameters, three steps of all three are the same."""
    models = [adapted(), adapted()]
    steps = [
        rungs.loop(models[0], batch_of(), rungs.plain_loss, torch.optim.AdamW(trained(models[0]), lr=rungs.RATE)),
        rungs.loop(models[1], batch_of(), rungs.plain_loss, optimizer(trained(models[1]))),
    ]
    before = [p.detach().clone() for p in trained(models[0])]
    for _ in range(3):
        losses = [step().item() for step in steps]
        assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    for one, other, start in zip(trained(models[0]), trained(models[1]), before, strict=True):
        torch.testing.assert_close(one, other, atol=1e-8, rtol=1e-6)
        assert not torch.equal(one, start)


def test_small_updates_are_not_lost_in_bf16():
    parameter = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    for optimizer in (rungs.Masters([parameter]), rungs.Flat([torch.nn.Parameter(parameter.detach().clone())])):
        held = optimizer.trained[0] if isinstance(optimizer, rungs.Masters) else None
        for _ in range(400):  # each step moves by 1e-5, far below the spacing of bf16 at 1
            if held is not None:
                held.grad = torch.ones_like(held)
            else:
                optimizer.gradient.fill_(1)
            optimizer.step()
        values = held if held is not None else optimizer.values
        assert (values.float() < 1).all()


def test_sections_are_whole_and_every_point_is_its_own():
    points = speed.points()
    assert len({bench.key(point) for point in points}) == len(points)
    sections = {}
    for point in points:
        if point["group"] == "loop":
            assert point["section"] in [f"{name}-loop" for name in speed.LOOPS]
            continue
        sections.setdefault(point["section"], []).append(point["group"])
        assert point["section"].removesuffix("-unsloth").endswith("-c") == point["checkpointing"]
    beside = {f"{section}-unsloth" for section in speed.BESIDE}
    assert {*speed.MAIN, *speed.BESIDE, *beside} <= set(sections)
    assert len(sections) == 4 * 2 * 2 * 2 + len(beside)
    for section, groups in sections.items():
        if section in beside:
            assert groups == ["peft", "unsloth", "fast", "fast, pinned", "ceiling"]
            continue
        expected = [name for name in speed.GROUPS if name != "unsloth"] if section in speed.MAIN else speed.FEW
        assert groups == [name for name in expected if name not in speed.RECOMPUTING or section.endswith("-c")]
    if not torch.cuda.is_available():
        with pytest.raises(pl.PeftLabError, match="needs a CUDA GPU"):
            speed.measure(points[0])


def test_product_flops_are_those_of_the_replay():
    """The estimator counts attention and LoRA as well, which the frozen products leave out."""
    for shape in ("llama-2-7b", "llama-3.1-8b", "smollm2-135m"):
        for checkpointing in (True, False):
            ours = arithmetic.product_flops(shape, 1024, checkpointing)
            run = {"batch": 2, "sequence": 512, "checkpointing": checkpointing, "r": 1, "targets": "all-linear"}
            theirs = estimate(shape, "lora", **run).flops
            assert ours < theirs < 1.3 * ours, (shape, checkpointing)


def test_bytes_between_the_products_by_hand():
    """One block of width d, no grouping, forward only counted twice where it is recomputed."""
    shape = {**SMALL, "num_hidden_layers": 1, "num_key_value_heads": 4, "vocab_size": 1}
    d, m = 64, 128
    low_rank = 4 * (d + 2 * d) + 2 * (d + 2 * m) + (m + 2 * d)  # q, k, v, o; gate, up; down
    pointwise = 2 * d + 4 * d + 4 * d + 4 * d + 3 * m + 3 * d
    back = 4 * (d + 2 * d + 2 * d) + 2 * (d + 2 * m + 2 * d) + (m + 2 * d + 2 * m)
    for checkpointing, times in ((True, 2), (False, 1)):
        expected = 2 * 10 * (times * (pointwise + low_rank) + 2 * pointwise + back + 3)
        assert arithmetic.bytes_between(shape, 10, checkpointing) == expected
    assert arithmetic.bytes_between(shape, 10, True, by_hand=True) < arithmetic.bytes_between(shape, 10, True)


def test_each_way_is_predicted_to_be_faster_than_the_one_before():
    run = {"batch": 4, "sequence": 512, "checkpointing": True, "rate": 690e12, "bandwidth": 3e12}
    for method in ("lora", "qlora"):
        found = [arithmetic.predict("llama-2-7b", method, way=way, **run) for way in arithmetic.WAYS]
        seconds = [times.seconds for times in found]
        assert seconds == sorted(seconds, reverse=True) and len({times.products for times in found}) == 1
        assert all((times.dequantise > 0) == (method == "qlora") for times in found)
        # the prototype's kernels were busy for 140 ms (LoRA), an eager step's for 236 and 262 ms
        assert 0.8 < seconds[0] / {"lora": 0.236, "qlora": 0.262}[method] < 1.2


def test_rungs_stand_beside_their_predictions():
    """Made-up times: the rows keep the ladder's order, leave out what was skipped, and compare within a process."""
    step = {"section": "7b", "shape": "llama-2-7b", "method": "lora", "batch": 4, "sequence": 512,
            "checkpointing": True, "r": 16, "run": "r1"}  # fmt: skip

    def row(rung, milliseconds, **more):
        seconds = milliseconds / 1000
        each = {f"seconds_{n}": seconds * (1 + n / 100) for n in (1, 2, 3)}
        return {**step, "rung": rung, "seconds": seconds, **each, "seconds_least": seconds, "seconds_most": seconds,
                "processes": 3, "busy_seconds": 0.9 * seconds, "tokens_per_second": 2048 / seconds,
                "working_bytes": int(2e9), **more}  # fmt: skip

    rows = [row("fast", 140), row("ceiling", 118, flops=arithmetic.product_flops("llama-2-7b", 2048, True)),
            row("copy", 1, bytes=3_000_000_000), row("peft", 420), row("compiled layers", 160),
            {**step, "rung": "triton", "skipped": "no"}]  # fmt: skip
    found = ladder.ladder(Results("speed", {}, rows), "7b")
    assert [row["rung"] for row in found] == ["peft", "compiled layers", "fast"]
    assert found[2]["share"] == pytest.approx(118 / 140) and found[0]["busy"] == pytest.approx(378)
    assert found[0]["told"] > found[1]["told"] > found[2]["told"] > 118
    (beside,) = ladder.beside_peft(Results("speed", {}, rows))
    assert beside["times"] == pytest.approx(3) and beside["least"] == pytest.approx(3) and beside["memory"] == 1
    trainer = row("unsloth, trainer", 600, batches=2, tokens_per_second=2 * 2048 / 0.6)
    found = ladder.beside_unsloth(Results("speed", {}, [*rows, trainer]))
    assert [row["rung"] for row in found] == ["fast", "peft", "compiled layers", "unsloth, trainer"]
    assert found[3]["clock"] == pytest.approx(300) and found[3]["range"] == "300 to 300"
    assert found[3]["busy"] == pytest.approx(270) and found[3]["share"] == pytest.approx(118 / 300)
