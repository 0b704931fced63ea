"""The replayed step against the real one: transformers' models under Hugging Face peft, tensor by tensor."""

from types import SimpleNamespace

import memory_oracle
import peft
import pytest
import torch
from places import has_place
from releases import skip_before
from replays import replayed_peaks
from toy_rows import TOY

import peftlab as pl
from peftlab.catalogue import METHODS
from peftlab.core.targets import Targets
from peftlab.errors import PeftLabError
from peftlab.memory.counting.methods import trained_by
from peftlab.memory.counting.options import Options
from peftlab.memory.counting.shapes import load_shape
from peftlab.memory.replay.nets import Recipe
from peftlab.memory.replay.step import Run
from peftlab.memory.replay.tape import Memory, Parameter

SMALL = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 3, "num_attention_heads": 8}
CONFIGS = {
    "llama": {"model_type": "llama", "vocab_size": 1000, "num_key_value_heads": 2, **SMALL},
    "qwen2": {"model_type": "qwen2", "vocab_size": 1000, "num_key_value_heads": 4, "tie_word_embeddings": True} | SMALL,
    "gemma": {"model_type": "gemma", "vocab_size": 1000, "num_key_value_heads": 1, "head_dim": 64, **SMALL},
    "gpt2": {"model_type": "gpt2", "vocab_size": 1000, "n_embd": 256, "n_layer": 3, "n_head": 8, "n_positions": 256},
    "bert": {"model_type": "bert", "vocab_size": 1000, **SMALL},
    "roberta": {"model_type": "roberta", "vocab_size": 1000, **SMALL},
    "t5": dict(model_type="t5", vocab_size=1000, d_model=256, d_kv=32, d_ff=704, num_layers=3, num_heads=8),
}
TASKS = {"decoder": "CAUSAL_LM", "encoder": "SEQ_CLS", "encoder-decoder": "SEQ_2_SEQ_LM"}
ALL = "all-linear"


def config_of(family, checkpointing=False):
    """Three layers with checkpointing, whose peak lies between layers; without it two show what each layer keeps."""
    config = CONFIGS[family]
    depth = {"num_hidden_layers", "n_layer", "num_layers"} & config.keys()
    return {**config, **dict.fromkeys(depth, 3 if checkpointing else 2)}


def adapter(method, shape, r, tokens):
    """The same method in peft."""
    task = TASKS[shape.kind]
    low_rank = {"r": r, "target_modules": ALL, "task_type": task}
    return {
        "full": lambda: None,
        "lora": lambda: peft.LoraConfig(**low_rank),
        "dora": lambda: peft.LoraConfig(use_dora=True, **low_rank),
        "vera": lambda: peft.VeraConfig(**low_rank),
        "adalora": lambda: peft.AdaLoraConfig(init_r=r, target_modules=ALL, task_type=task, total_step=10),
        "loha": lambda: peft.LoHaConfig(**low_rank),
        "lokr": lambda: peft.LoKrConfig(**low_rank),
        "oft": lambda: peft.OFTConfig(target_modules=ALL, task_type=task),
        "ia3": lambda: peft.IA3Config(task_type=task),
        "prompt": lambda: peft.PromptTuningConfig(num_virtual_tokens=tokens, task_type=task),
        "p-tuning": lambda: peft.PromptEncoderConfig(num_virtual_tokens=tokens, task_type=task),
    }[method]()


def replayed(shape, method, *, batch, sequence, bytes, checkpointing=False, autocast=False, fused=True, r=8, tokens=20,
             contiguous_bias=True, targets=ALL, library="peft", init=None):
    """Bytes above the parameters, at the most, of forward and of backward, in the second of two steps."""
    # some methods stand in places of their own
    targets = targets if METHODS[method].takes("r") or METHODS[method].takes("oft_block_size") else None
    trained = trained_by(method, shape, Options(r=r, targets=targets, virtual_tokens=tokens, init=init))
    run = Run(shape, method, trained, Recipe(
        batch=batch, sequence=sequence, weight_bytes=bytes, adapter_bytes=4, autocast=autocast,
        checkpointing=checkpointing, optimizer="sgd", four_bit=False, fused_attention=fused,
        contiguous_bias=contiguous_bias, library=library if init is None else "peftlab",
    ))  # fmt: skip
    return replayed_peaks(run)


# Each family gets half of the settings, so that each value still meets each other one. Of two families that are built
# alike, one gets the one half and the other the other.
ODD = ("qwen2", "gemma", "bert", "gpt2")
CASES = [
    (family, method, bytes, checkpointing)
    for family in CONFIGS
    for method in ("full", "lora")
    for bytes in (2, 4)
    for checkpointing in (False, True)
    if ((method == "full") + (bytes == 2) + checkpointing + (family in ODD)) % 2
] + [
    (family, method, 2, False)
    for family in ("llama", "gpt2", "bert")
    for method in ("dora", "vera", "adalora", "ia3", "prompt", "p-tuning")
    if (family, method) != ("bert", "adalora")  # 4.4% too high: AdaLoRA's orthogonality loss is not replayed
] + [
    ("t5", "prompt", 2, False), ("t5", "vera", 2, False), ("gemma", "prompt", 2, True), ("llama", "vera", 2, True),
    ("llama", "loha", 2, False), ("bert", "loha", 4, False), ("llama", "lokr", 2, False), ("llama", "oft", 2, False),
]  # fmt: skip


@pytest.mark.parametrize(("family", "method", "bytes", "checkpointing"), CASES)
def test_the_peak_is_that_of_the_real_step(family, method, bytes, checkpointing, monkeypatch):
    """Activations, logits, gradients and what is alive for a moment, without the parameters: within 2%."""
    if family == "t5" and not checkpointing:
        skip_before("transformers", "5.20", "T5's position bias is another operation, and the replay 2 to 3% too high")
    if method == "adalora":
        skip_before("peft", "0.21", "its AdaLoRA layer keeps other tensors")
    shape = load_shape(config_of(family, checkpointing))
    size = {"batch": 3, "sequence": 160}
    found = replayed(shape, method, bytes=bytes, checkpointing=checkpointing, **size)
    expected = memory_oracle.measure(
        config_of(family, checkpointing), shape.kind, adapter(method, shape, 8, 20),
        dtype={2: torch.bfloat16, 4: torch.float32}[bytes], checkpointing=checkpointing,
        monkeypatch=monkeypatch, **size,
    )  # fmt: skip
    assert max(found) == pytest.approx(max(expected), rel=0.02)


# Every row that can be estimated and that stands on chosen modules, and the template of a method: our own layers, with
# the defaults of the config. (A prompt draws random numbers, which the meta device has not.)
OURS = {
    name: row
    for name, row in [*METHODS.items(), ("toy", TOY)]
    if row.config and row.replay and not row.four_bit and issubclass(row.config_class(), Targets)
}


# Left out, because the replay is not within 2% there of what lies above the parameters: 6% too high for houlsby; 7% (in
# float32) and 9% too low for pfeiffer, whose adapter the replay puts behind a layer of the block, not behind the block.
APART = {("houlsby", 2, True), ("pfeiffer", 2, True), ("pfeiffer", 4, True)}


@pytest.mark.parametrize(
    ("method", "bytes", "checkpointing"),
    [  # each method in both precisions, one of them with checkpointing; the next method has it in the other one. Of
        # the methods in APART all that is left.
        (method, bytes, checkpointing)
        for number, method in enumerate(OURS)
        for bytes in (2, 4)
        for checkpointing in (False, True)
        if (number + (bytes == 2) + checkpointing) % 2 or any(method == one for one, _, _ in APART)
        if (method, bytes, checkpointing) not in APART
    ],
)
def test_the_peak_with_our_own_layers(method, bytes, checkpointing, monkeypatch):
    row = OURS[method]
    monkeypatch.setitem(METHODS, method, row)
    family = next(name for name in CONFIGS if has_place(method, load_shape(CONFIGS[name])))
    config = config_of(family, checkpointing)
    shape, size = load_shape(config), {"batch": 3, "sequence": 160}
    found = replayed(
        shape, method, bytes=bytes, checkpointing=checkpointing, targets=None, r=None, library="peftlab", **size
    )
    expected = memory_oracle.measure(
        config, shape.kind, row.config_class()(**row.fixed), checkpointing=checkpointing,
        dtype={2: torch.bfloat16, 4: torch.float32}[bytes], monkeypatch=monkeypatch, **size,
    )  # fmt: skip
    assert max(found) == pytest.approx(max(expected), rel=0.02)


@pytest.mark.parametrize(("family", "bytes", "checkpointing"), [
    ("llama", 2, False), ("llama", 2, True), ("llama", 4, True), ("gpt2", 2, False), ("bert", 2, True),
])  # fmt: skip
def test_the_norms_of_our_own_dora(family, bytes, checkpointing, monkeypatch):
    """On all layers and a short text, where the norms need more than the activations."""
    shape, size = load_shape(config_of(family, checkpointing)), {"batch": 1, "sequence": 32}
    task = "SEQ_CLS" if shape.kind == "encoder" else None
    found = replayed(shape, "dora", bytes=bytes, checkpointing=checkpointing, library="peftlab", **size)
    expected = memory_oracle.measure(
        config_of(family, checkpointing), shape.kind, pl.DoRAConfig(target_modules=ALL, task_type=task),
        checkpointing=checkpointing, dtype={2: torch.bfloat16, 4: torch.float32}[bytes],
        monkeypatch=monkeypatch, **size,
    )  # fmt: skip
    assert found == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(
    ("family", "method", "bytes"),
    [(family, method, 2 + 2 * ((method == "full") == (family in ("llama", "bert"))))
     for family in ("llama", "gemma", "gpt2", "bert") for method in ("full", "lora")],
)  # fmt: skip
def test_the_peak_of_eager_attention(family, method, bytes, monkeypatch):
    """Single operations: each architecture has its own softmax, mask and dropout."""
    shape = load_shape(config_of(family))
    size = {"batch": 2, "sequence": 192}
    found = replayed(shape, method, bytes=bytes, fused=False, **size)
    expected = memory_oracle.measure(
        config_of(family), shape.kind, adapter(method, shape, 8, 20),
        dtype={2: torch.bfloat16, 4: torch.float32}[bytes], attention="eager", monkeypatch=monkeypatch, **size,
    )  # fmt: skip
    assert max(found) == pytest.approx(max(expected), rel=0.02)


@pytest.mark.parametrize(
    ("method", "bytes", "checkpointing"),
    [(m, b, c) for m in ("full", "lora") for b in (2, 4) for c in (False, True) if (m, b, c) != ("lora", 2, True)],
)  # the one left out is 3.2% too low, of what lies above the parameters
def test_the_peak_of_t5_before_its_bias_was_fusible(method, bytes, checkpointing, monkeypatch):
    """Without dropout, whose mask has a byte an element on a GPU and four elsewhere."""
    config = {**config_of("t5", checkpointing), "dropout_rate": 0.0}
    shape, size = load_shape(config), {"batch": 2, "sequence": 192}
    found = replayed(shape, method, bytes=bytes, checkpointing=checkpointing, contiguous_bias=False, **size)
    expected = memory_oracle.measure(
        config, shape.kind, adapter(method, shape, 8, 20), dtype={2: torch.bfloat16, 4: torch.float32}[bytes],
        checkpointing=checkpointing, attention="strided_bias", monkeypatch=monkeypatch, **size,
    )  # fmt: skip
    assert max(found) == pytest.approx(max(expected), rel=0.02)


@pytest.mark.parametrize(
    ("family", "changes"),
    [("gpt2", {"activation_function": "gelu"}), ("bert", {"hidden_act": "relu"}), ("bert", {"hidden_act": "gelu_new"}),
     ("t5", {"feed_forward_proj": "gated-gelu"}), ("llama", {"hidden_act": "gelu_pytorch_tanh"})],
)  # fmt: skip
def test_the_activation_function_of_the_configuration(family, changes, monkeypatch):
    config = {**config_of(family), **changes}
    shape, size = load_shape(config), {"batch": 3, "sequence": 160}
    found = replayed(shape, "full", bytes=2, **size)
    expected = memory_oracle.measure(config, shape.kind, dtype=torch.bfloat16, monkeypatch=monkeypatch, **size)
    assert max(found) == pytest.approx(max(expected), rel=0.02)


def test_an_activation_that_is_not_known():
    with pytest.raises(PeftLabError, match="'sillu' keeps is not known. Did you mean 'silu'"):
        replayed(load_shape({**CONFIGS["llama"], "hidden_act": "sillu"}), "full", bytes=2, batch=1, sequence=8)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method", ["full", "lora", "dora", "vera", "loha", "lokr", "oft"])
def test_the_peak_under_autocast(method, checkpointing, monkeypatch):
    """float32 weights, computed in bf16: autocast keeps its copies of trained weights until the forward pass ends."""
    size = {"batch": 3, "sequence": 96}
    shape = load_shape(config_of("llama", checkpointing))
    found = replayed(shape, method, bytes=4, checkpointing=checkpointing, autocast=True, **size)
    expected = memory_oracle.measure(
        config_of("llama", checkpointing), shape.kind, adapter(method, shape, 8, 20), dtype=torch.float32,
        checkpointing=checkpointing, autocast=True, monkeypatch=monkeypatch, **size,
    )  # fmt: skip
    assert max(found) == pytest.approx(max(expected), rel=0.02)


# With checkpointing, this small model's peak lies within a block. There the replay is 15% too low for adalora, and 2%
# too high for lokr.
@pytest.mark.parametrize(
    ("method", "checkpointing"),
    [("lora", True), ("dora", True), ("vera", True), ("loha", True)]
    + [(method, False) for method in ("lora", "dora", "adalora", "vera", "loha", "lokr")],
)
def test_the_peak_of_our_own_layers_under_autocast(method, checkpointing, monkeypatch):
    """Where they keep less than peft's: no copies of inputs in float32."""
    told = {"batch": 3, "sequence": 96, "checkpointing": checkpointing, "autocast": True}
    found = replayed(load_shape(config_of("llama", checkpointing)), method, bytes=4, r=None, library="peftlab", **told)
    config = METHODS[method].config_class()(target_modules=ALL)
    expected = memory_oracle.measure(
        config_of("llama", checkpointing), "decoder", config, dtype=torch.float32, monkeypatch=monkeypatch, **told
    )
    assert max(found) == pytest.approx(max(expected), rel=0.005)


@pytest.mark.parametrize(
    ("name", "form"),
    [("adamw", {"foreach": False}), ("adamw-foreach", {"foreach": True}), ("adamw-fused", {"fused": True})],
)
@pytest.mark.parametrize("dtypes", [(torch.float32,), (torch.bfloat16,), (torch.bfloat16, torch.float32)])
def test_an_update_allocates_what_torch_does(name, form, dtypes):
    """The second update, above weights, gradients and states. Parameters of two types are two groups to torch."""
    tracker, memory = memory_oracle.Tracker(), Memory()
    kinds = [dtypes[i % len(dtypes)] for i in range(5)]
    sizes = [(300, 70), (128,), (900, 40), (64, 640), (1000, 16)]
    real = [torch.nn.Parameter(torch.ones(size, dtype=kind)) for size, kind in zip(sizes, kinds, strict=True)]
    ours = [Parameter(memory, size, kind.itemsize, trains=True) for size, kind in zip(sizes, kinds, strict=True)]
    optimizer = torch.optim.AdamW(real, **form)
    for parameter in real:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    with tracker:
        for parameter in real:
            for tensor in (parameter, parameter.grad, *optimizer.state[parameter].values()):
                tracker.see(tensor.detach())
        start = tracker.peak = tracker.now
        optimizer.step()
    run = Run.__new__(Run)  # only what an update needs
    run.net, run.recipe = SimpleNamespace(parameters=ours), SimpleNamespace(optimizer=name, masters=False)
    run.memory, run.states = memory, None
    for parameter in ours:
        parameter.grad = parameter.new()
    run.optimize()
    before = memory.peak = memory.total
    run.optimize()
    few = 20 * memory_oracle.BLOCK  # torch's numbers of steps and scalars
    assert memory.peak - before == pytest.approx(tracker.peak - start, abs=few)
    assert (tracker.peak - start > few) == (name != "adamw-fused")


@pytest.mark.parametrize(("bytes", "checkpointing"), [(2, False), (4, False), (4, True)])
def test_the_peak_with_a_start_from_the_weight(bytes, checkpointing, monkeypatch):
    """PiSSA's start is two more products, and two buffers beside A and B."""
    config = {**CONFIGS["llama"], "vocab_size": 32, "num_hidden_layers": 1}  # nothing else is as large for a moment
    shape, size = load_shape(config), {"batch": 3, "sequence": 160}
    found = replayed(shape, "lora", bytes=bytes, checkpointing=checkpointing, init="pissa", library="peftlab", **size)
    plain = replayed(shape, "lora", bytes=bytes, checkpointing=checkpointing, library="peftlab", **size)
    expected = memory_oracle.measure(
        config, shape.kind, pl.LoRAConfig(r=8, init="pissa", target_modules=ALL),
        dtype={2: torch.bfloat16, 4: torch.float32}[bytes], checkpointing=checkpointing, monkeypatch=monkeypatch,
        **size,
    )  # fmt: skip
    assert max(found) == pytest.approx(max(expected), rel=0.02)
    assert max(found) > max(plain)


def test_a_start_from_the_weight_is_held_and_saved():
    more = {name: pl.memory.estimate("llama-2-7b", r=16, library="peftlab", init=name) for name in (None, "olora")}
    added = 4 * pl.memory.count("llama-2-7b", r=16).added
    assert more["olora"].adapter - more[None].adapter == added
    assert more["olora"].file_bytes == 2 * more[None].file_bytes
    assert more["olora"].trainable == more[None].trainable
    assert pl.memory.estimate("llama-2-7b", init="olora").peak_bytes == pl.memory.estimate("llama-2-7b").peak_bytes
    with pytest.raises(PeftLabError, match="starts linear layers, and model.embed_tokens"):
        pl.memory.estimate("llama-2-7b", init="pissa", targets=["embed_tokens"])
