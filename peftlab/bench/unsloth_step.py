r"""Unsloth's own training step, for the rungs `unsloth` and `unsloth, trainer` of `peftlab bench speed`.

Unsloth changes torch, transformers and peft for the whole process, and wants to be imported before them. So each of its
rungs runs in a process of its own, in which nothing else is measured:

1. `save` writes a random model to a folder, with a tokenizer, because Unsloth loads both.
2. `measured` starts Python, which imports Unsloth first and then calls `main`.
3. `main` loads the folder as Unsloth's users do, measures the step, and leaves the row in the folder.

That process works in the folder, since Unsloth writes sources that it has compiled into the current directory. It is
told to keep off the network: Unsloth sends statistics when it loads a model. Nothing else of Unsloth is switched off,
and other variables, such as UNSLOTH_BLOCK_CUDAGRAPHS=1, are handed on.

Unsloth 2026.10.9 takes transformers up to 5.17, trl up to 1.15 and datasets below 5. On a machine without internet that
has torch 2.11 for CUDA 13, transformers 5.17 and peft 0.21, seven wheels were enough (and what this package needs). Get
them elsewhere into a folder WHEELS, for that machine's Python (here 3.12), then install them there into a folder SITE:

    pip download --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
        --platform manylinux_2_28_x86_64 --platform manylinux_2_24_x86_64 --platform manylinux2014_x86_64 \
        --dest WHEELS unsloth==2026.10.9 unsloth_zoo==2026.10.9 trl==1.15.0 datasets==4.8.5 dill==0.4.1 \
        multiprocess==0.70.19 bitsandbytes==0.50.2
    pip install --no-index --no-deps --target SITE WHEELS/*.whl

They are 76 MB. To make them 10 MB, leave out `studio/` and `unsloth_cli/` of Unsloth's wheel, and of bitsandbytes'
libraries all but `..._cpu.so` and the one of the machine's CUDA (`..._cuda130.so`). The wheel of xformers 0.0.35 needs
CUDA 12; without xformers Unsloth takes torch's own attention. Then, in this repository:

    export PYTHONPATH=$PWD:SITE TMPDIR=/dev/shm
    python -m pytest tests/gpu/test_gpu_unsloth.py -x -s
    python -m peftlab bench speed --only 7b-lora-4x512-c-unsloth,7b-qlora-4x512-c-unsloth --out speed_unsloth.json

A section took about fifteen minutes on an H200, most of them in Unsloth's own processes. Each
model is written to TMPDIR (13.5 GB at 7B), where memory is faster than a disk. `speed.BESIDE` names the steps that
have such a section.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from peftlab.bench import rungs, timing
from peftlab.bench.fullsize import peak
from peftlab.bench.models import random_model
from peftlab.errors import PeftLabError

Row = dict[str, Any]
START = "import unsloth; from peftlab.bench.unsloth_step import main; main()"
OFFLINE = {"HF_HUB_OFFLINE": "1", "UNSLOTH_DISABLE_STATISTICS": "1"}
SECONDS = 900  # after which a process that hangs is ended
COMPILING = 5  # steps in which Unsloth compiles its blocks and measures its buffers
REPEATS = 5


# ------------------------------------------------------------------------------------------- in the bench's process


def save(shape: str | dict, device: torch.device, folder: Path) -> None:
    """Write a random model of this shape in bf16, and a tokenizer that knows the four special tokens and one word."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    model: Any = random_model(shape, device)
    model.save_pretrained(folder / "model")
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    numbers = {word: number for number, word in enumerate([*special.values(), "word"])}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(numbers, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(str(folder / "model"))


def measured(rung: str, point: Row, folder: Path) -> Row:
    """Measure one rung in a process of its own, on the model that `save` wrote.

    Returns:
        the row. `notes` are the lines in which Unsloth says which layers it has patched and whose attention it uses.

    Raises:
        PeftLabError: the process failed. What it printed is printed on stderr.
    """
    (folder / "row.json").unlink(missing_ok=True)
    (folder / "job.json").write_text(json.dumps({"rung": rung, "point": point, "profiles": timing.profiling()}))
    # it works in another folder; an empty path is this one
    environment = {**os.environ, **OFFLINE, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))}
    try:
        ran = subprocess.run(
            [sys.executable, "-c", START], cwd=folder, env=environment, timeout=SECONDS, check=False, encoding="utf-8",
            errors="replace", stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
    except subprocess.TimeoutExpired as late:
        printed = late.stdout or ""
        printed = printed.decode(errors="replace") if isinstance(printed, bytes) else printed
        print(printed, file=sys.stderr, flush=True)
        raise PeftLabError(f"the process was ended after {SECONDS} seconds") from None
    row = json.loads((folder / "row.json").read_text()) if (folder / "row.json").is_file() else {}
    if "seconds" not in row:
        print(ran.stdout, file=sys.stderr, flush=True)
        last = (ran.stdout.strip() or "it printed nothing").splitlines()[-1]
        raise PeftLabError(row.get("error", f"the process ended with {ran.returncode}: {last}"))
    told = [line.strip(" \\/") for line in ran.stdout.splitlines() if " patched " in line or "FA [" in line]
    return {**row, "notes": "; ".join(told)}


# ------------------------------------------------------------------------------------------------ in its own process


def main() -> None:
    """Measure what job.json in the current directory asks for, and write row.json. Unsloth is imported already."""
    job = json.loads(Path("job.json").read_text())
    timing.begin(job["profiles"])
    try:
        row = WAYS[job["rung"]](job["point"])
    except Exception as error:
        traceback.print_exc()
        row = {"error": f"{type(error).__name__}: {error}"}
    Path("row.json").write_text(json.dumps(row))


def loaded(point: Row) -> tuple[Any, Any, Row]:
    """Load the saved model with Unsloth, with adapters on it. Its fused kernels ask for dropout 0 and no bias.

    Returns:
        the model, its tokenizer, and what the row says of them.

    Raises:
        PeftLabError: four bits were asked for, and the weights have more. Unsloth loads them so without bitsandbytes.
    """
    library = import_module("unsloth").FastLanguageModel
    recompute, four_bit = "unsloth" if point["checkpointing"] else False, point["method"] == "qlora"
    model, tokenizer = library.from_pretrained(
        str(Path("model").resolve()), max_seq_length=point["sequence"], dtype=torch.bfloat16,
        load_in_4bit=four_bit, use_gradient_checkpointing=recompute, local_files_only=True,
    )  # fmt: skip
    if four_bit and not any(type(module).__name__ == "Linear4bit" for module in model.modules()):
        raise PeftLabError("Unsloth loaded the model in 16 bits, not in 4. Is bitsandbytes installed?")
    weights = torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
    model = library.get_peft_model(
        model, r=point["r"], lora_alpha=point["alpha"], target_modules=point["targets"], lora_dropout=0, bias="none",
        use_gradient_checkpointing=recompute,
    )  # fmt: skip
    library.for_training(model)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return model, tokenizer, {"weight_bytes": weights, "trainable": trained}


def in_a_loop(point: Row) -> Row:
    """Measure a plain loop around Unsloth's model: bf16 autocast and fused AdamW, as in the rung `peft`."""
    model, _, told = loaded(point)
    device = next(model.parameters()).device
    tokens = torch.randint(model.config.vocab_size, (point["batch"], point["sequence"]), device=device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rungs.RATE, fused=True)
    step = rungs.loop(model, {"input_ids": tokens, "labels": tokens}, rungs.autocast_loss, optimizer)
    for _ in range(COMPILING):
        step()
    row = timing.clock(step, REPEATS, details=True)
    return {**told, **row, "peak_bytes": peak()}


def in_a_trainer(point: Row) -> Row:
    """Measure TRL's `SFTTrainer` with Unsloth's model, which is how Unsloth's own notebooks train.

    Returns:
        the row. A step has `batches` batches, whose gradients are added up.
    """
    datasets, transformers, trl = (import_module(name) for name in ("datasets", "transformers", "trl"))
    model, tokenizer, told = loaded(point)
    between = timing.BetweenCalls(COMPILING, REPEATS)

    class Ends(transformers.TrainerCallback):  # type: ignore[name-defined]  # imported by name
        def on_step_end(self, *_: Any, **__: Any) -> None:
            between()
            if len(between.marks) == COMPILING and torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()

    shape = (4 * point["batch"], point["sequence"])
    rows = torch.randint(model.config.vocab_size, shape, generator=torch.Generator().manual_seed(0)).tolist()
    data = {"input_ids": rows, "labels": rows, "attention_mask": [[1] * point["sequence"]] * len(rows)}
    settings = trl.SFTConfig(
        output_dir="trainer", max_steps=COMPILING + REPEATS, per_device_train_batch_size=point["batch"],
        learning_rate=rungs.RATE, optim="adamw_torch_fused", bf16=True, max_length=point["sequence"], packing=False,
        dataset_kwargs={"skip_prepare_dataset": True}, gradient_checkpointing=bool(point["checkpointing"]),
        save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=not torch.cuda.is_available(),
    )  # fmt: skip
    trainer = trl.SFTTrainer(
        model=model, processing_class=tokenizer, train_dataset=datasets.Dataset.from_dict(data), args=settings,
        callbacks=[Ends()],
    )  # fmt: skip
    trainer.train()
    # Unsloth changes the default from one batch per step to two
    return {**told, **between.row(), "batches": trainer.args.gradient_accumulation_steps, "peak_bytes": peak()}


WAYS = {"unsloth": in_a_loop, "unsloth, trainer": in_a_trainer}
