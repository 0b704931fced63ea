"""What each of two processes does that hold one model, sharded by fully_shard.

Each task returns what it saw, and leaves files in its folder.
"""

import datetime
import time
import warnings

import tiny
import torch
from torch import distributed
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import (
    LlamaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

import peftlab as pl
from peftlab.adapters import checkpoint
from peftlab.core import sharding

LORA = {"r": 3, "init": "random"}  # two processes cannot divide three rows evenly


def classifier(**settings):
    model = LlamaForSequenceClassification(tiny.llama(num_labels=3).config)
    model.config.pad_token_id = 0
    return model


def t5():
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 2, "num_heads": 4, "vocab_size": 32}
    return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0))


def ptuning():
    return pl.PTuningConfig(num_virtual_tokens=3, encoder_hidden=8)


CASES = {
    "lora": (tiny.llama, lambda: pl.LoRAConfig(**LORA)),
    "all-linear": (tiny.llama, lambda: pl.LoRAConfig(r=4, target_modules="all-linear", use_rslora=True)),
    "head": (classifier, lambda: pl.LoRAConfig(**LORA, task_type="SEQ_CLS")),
    "biases": (lambda: tiny.llama(attention_bias=True), lambda: pl.LoRAConfig(**LORA, bias="all")),
    "embedding": (tiny.llama, lambda: pl.LoRAConfig(**LORA, target_modules=["embed_tokens", "o_proj"])),
    "copies": (tiny.llama, lambda: pl.LoRAConfig(**LORA, modules_to_save=["lm_head", "layers.1.mlp"])),
    "half": (lambda: tiny.llama(dtype=torch.bfloat16), lambda: pl.LoRAConfig(**LORA)),
    "ia3": (tiny.llama, lambda: pl.IA3Config()),
    "adalora": (tiny.llama, lambda: pl.AdaLoRAConfig(init_r=3, target_r=2, total_step=5, init="random")),
    "vera": (tiny.llama, lambda: pl.VeRAConfig(r=5, init="random")),
    "bottleneck": (tiny.llama, lambda: pl.AdapterConfig(reduction_factor=4)),
    "bitfit": (lambda: tiny.llama(attention_bias=True), lambda: pl.BitFitConfig()),
    "prompt": (tiny.llama, lambda: pl.PromptTuningConfig(num_virtual_tokens=3)),
    "p-tuning": (tiny.llama, ptuning),
    "prefix": (tiny.llama, lambda: pl.PrefixTuningConfig(num_virtual_tokens=3, projection=True)),
    "head and blocks": (tiny.llama, lambda: pl.LoRAConfig(**LORA, target_modules=["q_proj", "lm_head"])),
    "t5": (t5, lambda: pl.LoRAConfig(**LORA)),
}  # fmt: skip


def built(case):
    make, config = CASES[case]
    torch.manual_seed(0)
    model = make()
    torch.manual_seed(1)
    return pl.attach(model, config())


def blocks(model):
    return [m for m in model.modules() if type(m).__name__ in ("LlamaDecoderLayer", "T5Block")]


def sharded(model):
    for block in blocks(model):
        fully_shard(block)
    return fully_shard(model)


def batch(model, rank=0):
    ids = torch.arange(1, 13).reshape(2, 6) + rank
    labels = torch.tensor([0, 2]) if "Classification" in type(model).__name__ else ids
    return {"input_ids": ids, "labels": labels}


def train(model, rank, steps=2):
    for module in model.modules():
        if isinstance(module, FSDPModule):  # an optimizer must not get what was gathered for a forward pass
            module.reshard()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(steps):
        model(**batch(model, rank)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@torch.no_grad()
def logits(model):
    model.eval()
    return model(**batch(model)).logits


def state(model):
    """All parameters in one piece, as torch gathers them; the adapters' too."""
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))


def fault(call):
    try:
        call()
    except pl.PeftLabError as error:
        return str(error)
    return None


def save(rank, folder):
    """Each case trains and is saved, sharded and then from one process with the same weights."""
    if rank == 1:
        checkpoint.write_together = None  # only the first process writes
    seen = {}
    for case in CASES:
        model = train(sharded(built(case)), rank)
        returned = pl.save_adapter(model, folder / "sharded" / case)
        assert (returned / checkpoint.CONFIG).is_file()  # in every process, when it goes on
        seen[case] = {"count": str(pl.count_parameters(model))}
        values, output = state(model), logits(model)
        with pl.disabled(model):
            base = logits(model)
        if rank == 0:
            alone = built(case)
            seen[case]["count alone"] = str(pl.count_parameters(alone))
            own = dict(alone.state_dict())
            with torch.no_grad():
                for name, value in values.items():
                    own[name].copy_(value)
            pl.save_adapter(alone, folder / "alone" / case)
            seen[case]["same keys"] = own.keys() == values.keys()
            seen[case]["same base"] = torch.equal(logits(pl.detach(alone)), base)
            torch.manual_seed(0)
            loaded = pl.load_adapter(CASES[case][0](), folder / "sharded" / case)
            seen[case]["same output"] = torch.equal(logits(loaded), output)
    return seen


def change(rank, folder):
    """What else one does with adapters: each works on a sharded model, or one line says why not."""
    case = "head and blocks"
    plain = built(case)
    before, counted = logits(plain), str(pl.count_parameters(plain))
    pl.save_adapter(plain, folder / f"plain-{rank}")
    pl.merge(plain)
    merged = logits(plain)
    model = sharded(built(case))
    seen = {
        "attach": fault(lambda: pl.attach(model, pl.LoRAConfig(), name="second")),
        "load": fault(lambda: pl.load_adapter(model, folder / f"plain-{rank}", name="second")),
        "attached": list(pl.attached(model)),
        "train": fault(lambda: pl.train(model, tiny.examples(4), steps=1)),
        "count": str(pl.count_parameters(model)) == counted,
        "before": torch.equal(logits(model), before),
    }
    pl.merge(model)
    seen["merged"] = torch.equal(logits(model), merged)
    pl.unmerge(model)
    seen["unmerged"] = torch.equal(logits(model), before)
    pl.detach(model)
    base = tiny.llama()
    seen["detached"] = torch.equal(logits(model), logits(base))
    train(model, rank=0), train(base, rank=0)
    seen["trained after"] = torch.allclose(logits(model), logits(base), atol=1e-6)

    two = pl.attach(pl.attach(tiny.llama(), pl.LoRAConfig(**LORA), "a"), pl.LoRAConfig(**LORA), "b")
    sharded(two)
    pl.activate(two, "a")
    two(**batch(two)).loss.backward()
    seen["gradients"] = sorted({n.split(".")[-3] for n, p in two.named_parameters() if p.grad is not None})
    return seen


def callback(rank, folder):
    """AdapterCallback saves from all processes and restores into the pieces."""
    arguments = TrainingArguments(output_dir=str(folder / "trainer"), use_cpu=True, report_to=[])
    arguments.__class__ = type("Arguments", (TrainingArguments,), {"should_save": rank == 0})
    seen = {}
    for case in ("lora", "p-tuning", "copies"):
        model = train(sharded(built(case)), rank)
        history = TrainerState(global_step=3)
        rest = {"args": arguments, "state": history, "control": TrainerControl(), "model": model}
        pl.AdapterCallback().on_save(**rest)
        trained, output = state(model), logits(model)
        train(model.train(), rank)
        seen[case] = {"moved": not torch.equal(logits(model), output)}
        pl.AdapterCallback().on_train_begin(**rest)
        after = state(model)
        seen[case]["same output"] = torch.equal(logits(model), output)
        seen[case]["same parameters"] = rank != 0 or all(torch.equal(after[name], trained[name]) for name in trained)
    return seen


def copies_of_the_model(rank, folder):
    """Under DistributedDataParallel each process has the whole model: one of them may save, or all at once."""
    model = DistributedDataParallel(built("lora"))
    model(**batch(model, rank)).loss.backward()
    if rank == 1:
        pl.save_adapter(model, folder / "one")
    for _ in range(20):
        pl.save_adapter(model, folder / "all")
    return {}


def wrong(rank, folder):
    """One process stays away; files cannot be written; a value is not finite."""
    sharding.PATIENT_SECONDS = 0.5
    model, seen = sharded(built("lora")), {}
    if rank == 0:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            seen["alone"] = fault(lambda: pl.save_adapter(model, folder / "never"))
        seen["merge alone"] = fault(lambda: pl.merge(model))
        seen["told"] = [str(warning.message) for warning in told]
        (folder / "told").touch()
    while not (folder / "told").exists():  # a barrier would give up as early
        time.sleep(0.1)
    pl.save_adapter(model, folder / "together")  # the meeting that failed is forgotten
    if rank == 0:
        (folder / "file").write_text("not a folder")
    seen["file"] = fault(lambda: pl.save_adapter(model, folder / "file"))
    seen["name"] = fault(lambda: pl.save_adapter(model, folder / "together", "defualt"))
    time.sleep(rank)  # a process that comes later is waited for
    pl.save_adapter(model, folder / "late")
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "lora_A" in n).fill_(float("nan"))
    seen["nan"] = fault(lambda: pl.save_adapter(model, folder / "never"))
    seen["written"] = (folder / "never").exists()
    return seen


def run(task, rank, folder):
    limit = datetime.timedelta(seconds=8 if task == "wrong" else 600)
    meeting = f"file://{folder}/meet-{task}"
    distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2, timeout=limit)
    return globals()[task](rank, folder)
