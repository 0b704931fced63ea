"""A run of a tiny model that may kill itself while it saves; each run is a child of test_resume.py."""

import hashlib
import json
import os
import signal
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


def run(folder, out, die_in=None):
    """Train in `folder` and write into `out` what came of it.

    With `die_in` the process sends itself SIGKILL just before the n-th call to the file system while it saves.
    """
    if die_in:
        die_before_call(die_in)
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
