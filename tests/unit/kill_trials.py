"""Saves over a folder, is killed at a chosen moment, and looks at what lies there: children of test_saving_together.

Each seed forks a child that saves and kills itself: at a line of `peftlab/files.py` that the seed chooses, or in the
middle of writing a file. The parent then loads the folder, as a user would, and saves into it once more. It says for
each seed what lay there (old, new, or nothing where there was nothing), or what is wrong.
"""

import os
import random
import shutil
import signal
import sys
import warnings

import torch
from nets import Net, tokens
from tiny import llama

import peftlab as pl
from peftlab import files

IDS = torch.tensor([[3, 4, 5, 6]])
SHAPE = dict(hidden_size=64, intermediate_size=64, layers=1)


def adapter(seed):
    """Two adapters whose config and weights both differ, in shape too."""
    config = pl.LoRAConfig(r=2 + seed, alpha=4 * seed, target_modules=["up", "head"], init="random")
    return pl.attach(Net(), config)


def prompt(seed):
    """A prompt with an encoder in a third file, and one that has none, so that the third file goes away."""
    return pl.attach(llama(layers=1), pl.PTuningConfig(num_virtual_tokens=2 + seed, encoder=("none", "mlp")[seed % 2]))


def four_bit(seed):
    """Two models whose weights and format differ."""
    return pl.quantize_model(llama(seed, **SHAPE), format=("nf4", "fp4")[seed % 2], double_quant=False)


def load_prompt(folder):
    """With its encoder where it has one: what training would go on with."""
    return pl.load_adapter(llama(layers=1), folder, trainable=True)


KINDS = {
    "adapter": (adapter, pl.save_adapter, lambda folder: pl.load_adapter(Net(), folder), lambda m: m(tokens())),
    "prompt": (prompt, pl.save_adapter, load_prompt, lambda m: m.eval()(IDS).logits),
    "four-bit": (four_bit, pl.save_quantized, pl.load_quantized, lambda m: m.eval()(IDS).logits),
}


def lines(save, kill_at):
    """Runs a save and counts the lines of files.py that it comes to; at the line `kill_at` the process is killed."""
    count = 0

    def trace(frame, event, argument):
        nonlocal count
        if frame.f_code.co_filename != files.__file__:
            return None
        if event == "line":
            if count == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1
        return trace

    sys.settrace(trace)
    try:
        save()
    finally:
        sys.settrace(None)
    return count


def killed_while_writing(save, number):
    """Runs a save that is killed when half of one of its files is written."""
    fill, begun = files.fill, 0

    def half(path, content):
        nonlocal begun
        if begun == number:
            with open(path, "wb") as file:
                file.write(content[: len(content) // 2])
                file.flush()
                os.kill(os.getpid(), signal.SIGKILL)
        begun += 1
        fill(path, content)

    files.fill = half
    save()


def theirs(kind, folder, known):
    """What Hugging Face peft makes of the folder: the old, the new, or an error; never a mixture."""
    if kind != "adapter":
        return "fine"
    from peft import PeftModel

    try:
        found = PeftModel.from_pretrained(Net(), folder)(tokens())
    except Exception:
        return "fine"
    return "fine" if any(torch.allclose(found, value) for value in known.values()) else "peft reads a mixture"


def trial(kind, folder, seed):
    make, save, load, answer = KINDS[kind]
    draw = random.Random(f"{kind} {seed}")
    before, after = make(1), make(2)
    if draw.random() < 0.5:  # the prompt's third file then comes, and does not go
        before, after = after, before
    with torch.no_grad():
        known = {"old": answer(before), "new": answer(after)}
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    fresh = draw.random() < 0.2
    if not fresh:
        save(before, folder)
    shutil.copytree(folder, folder.with_name("copy"), dirs_exist_ok=True)
    total = lines(lambda: save(after, folder.with_name("copy")), -1)
    shutil.rmtree(folder.with_name("copy"))
    child = os.fork()
    if child == 0:
        if draw.random() < 0.2:
            killed_while_writing(lambda: save(after, folder), draw.randrange(2))
        else:
            lines(lambda: save(after, folder), draw.randrange(total))
        os._exit(0)
    if not os.WIFSIGNALED(os.waitpid(child, 0)[1]):
        return "the save was not killed"
    try:
        with torch.no_grad():
            found = answer(load(folder))
        state = next((name for name, value in known.items() if torch.equal(found, value)), "a mixture loads")
    except pl.PeftLabError as error:
        state = "nothing" if fresh else f"nothing loads: {error}"
    if (told := theirs(kind, folder, known)) != "fine":
        return told
    save(after, folder)
    with torch.no_grad():
        if not torch.equal(answer(load(folder)), known["new"]):
            return "the next save does not load"
    clean = folder.with_name("clean")
    shutil.rmtree(clean, ignore_errors=True)
    save(after, clean)
    if {path.name for path in folder.iterdir()} != {path.name for path in clean.iterdir()} | {"notes.txt"}:
        return f"litter: {sorted(path.name for path in folder.iterdir())}"
    return state


def trials(kind, folder, seeds):
    warnings.simplefilter("ignore")
    return [trial(kind, folder, seed) for seed in seeds]
