"""Trains a tiny model again and again, in children that the test may kill; started by test_resume.py, once.

Importing torch takes seconds, so this process does it once and forks a child for every run. It reads one JSON line a
run, ``{"folder", "out", "die_in"}``, and writes one: the child's process id when it starts, and its exit status when it
has ended. With ``die_in`` the child sends itself SIGKILL just before the n-th call to the file system while it saves.
"""

import hashlib
import json
import os
import signal
import sys
from pathlib import Path

import tiny
import torch

import peftlab.training.files as files
from peftlab.adapters.injection import attach
from peftlab.methods.lora import LoRAConfig
from peftlab.training import train


def model_with_adapter():
    model = tiny.llama(attention_dropout=0.2)
    torch.manual_seed(7)
    attach(model, LoRAConfig(r=4, alpha=16, dropout=0.1, target_modules=["q_proj", "v_proj"]))
    return model


def run(folder, out):
    model = model_with_adapter()
    history = train(
        model,
        tiny.examples(30),
        evaluation_data=tiny.examples(4, seed=1),
        evaluate_every=4,
        steps=24,
        batch_size=3,
        accumulation=2,
        learning_rate=0.02,
        warmup=4,
        schedule="cosine",
        weight_decay=0.01,
        folder=folder,
        save_every=2,
    )
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(name.encode() + value.numpy().tobytes())
    result = {"weights": digest.hexdigest(), "steps": history.steps, "evaluations": history.evaluations}
    Path(out).write_text(json.dumps({**result, "best": history.best}))


def die_before_call(number):
    """Count every call that changes the disk while a checkpoint is written, and let the n-th one kill the process.

    Removing the checkpoint before counts too: ``shutil.rmtree`` looks ``os.unlink`` and ``os.rmdir`` up at each call.
    """
    calls = []

    def deadly(function):
        def call(*args, **kwargs):
            calls.append(function)
            if len(calls) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    files.save_file = deadly(files.save_file)
    for owner, name in [
        (os, "fsync"),
        (os, "rmdir"),
        (os, "unlink"),
        (Path, "rename"),
        (Path, "mkdir"),
        (json, "dump"),
    ]:
        setattr(owner, name, deadly(getattr(owner, name)))


def main():
    train(model_with_adapter(), tiny.examples(3), steps=1)  # whatever torch loads late is loaded once, here
    for line in sys.stdin:
        task = json.loads(line)
        child = os.fork()
        if child == 0:
            try:
                if task.get("die_in"):
                    die_before_call(task["die_in"])
                run(task["folder"], task["out"])
                os._exit(0)
            except BaseException as error:
                print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
                os._exit(1)
        print(json.dumps({"pid": child}), flush=True)
        print(json.dumps({"status": os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}), flush=True)


if __name__ == "__main__":
    main()
