"""The replay of a loss in chunks, and of some blocks computed again, against the real step, tensor by tensor."""

import memory_oracle
import pytest
import torch
from on_meta import on_meta
from test_memory_replay import CONFIGS
from transformers import AutoConfig, AutoModelForCausalLM

import peftlab as pl
from peftlab.core.checkpointing import memory_settings
from peftlab.errors import PeftLabError
from peftlab.memory.counting.methods import trained_by
from peftlab.memory.counting.options import Options
from peftlab.memory.counting.shapes import load_shape
from peftlab.memory.replay import chunked as replayed
from peftlab.memory.replay.nets import Recipe
from peftlab.memory.replay.step import Run
from peftlab.memory.replay.tape import backward
from peftlab.training import chunked
from peftlab.training.chunked import ChunkedLoss

GEMMA3 = {
    **CONFIGS["gemma"], "model_type": "gemma3_text", "vocab_size": 4000, "final_logit_softcapping": 30.0,
    "sliding_window": 4096,
}  # fmt: skip
FAMILIES = {"llama": CONFIGS["llama"], "qwen2": CONFIGS["qwen2"], "gemma3": GEMMA3, "gpt2": CONFIGS["gpt2"]}
SIZE = {"batch": 3, "sequence": 128}
# Without whole logits the peak of so small a model may lie inside a block, where the replay leaves out up to four
# tensors of the hidden size (of 2 bytes for each number): 0.3% of a step of Llama 2 7B.
NEAR = dict(rel=0.01, abs=4 * 2 * 3 * 128 * 256)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    for module in (chunked, replayed):
        monkeypatch.setattr(module, "LEAST", 100)
        monkeypatch.setattr(module, "CHUNK_BYTES", 1)


def measured(config, method, dtype, blocks, in_chunks, monkeypatch):
    """Bytes above the parameters, at the most, of forward and of backward, in the second of two steps."""
    masks = memory_oracle.masks
    monkeypatch.setattr(masks, "find_packed_sequence_indices", lambda *args, **options: None)
    monkeypatch.setattr(torch.nn.functional, "dropout", memory_oracle.dropout)
    monkeypatch.setattr(torch, "autocast", memory_oracle.autocast_anywhere)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)  # the meta device has none
    config = AutoConfig.for_model(**{**config, "use_cache": False})
    config._attn_implementation = "fused_stand_in"
    with on_meta():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    if method == "lora":
        pl.attach(model, pl.LoRAConfig(r=8, target_modules="all-linear"))
    model.train()
    ids = torch.zeros(SIZE["batch"], SIZE["sequence"], dtype=torch.long, device="meta")
    labels = torch.ones(ids.shape, dtype=torch.long)  # on the CPU, where they are read
    loss = ChunkedLoss(model, in_chunks)
    loss.seen = True  # on the meta device there is nothing to compare
    monkeypatch.setattr(chunked, "kernel_on", lambda device: lambda z, labels, log_p: z)  # it allocates nothing
    tracker, peaks = memory_oracle.Tracker(), []
    with memory_settings(model, blocks), tracker:
        if blocks:  # as under peft, whose steps are replayed
            model.enable_input_require_grads()
        for tensor in [*model.parameters(), *model.buffers(), ids]:
            tracker.see(tensor.detach())
        start, total = tracker.now, None
        for _ in range(2):
            tracker.peak = tracker.now
            if in_chunks:
                total, _ = loss(model, {"input_ids": ids, "labels": labels})
            else:
                total = model(input_ids=ids, labels=ids).loss
            forward, tracker.peak = tracker.peak - start, tracker.now
            total.backward()
            peaks = [forward, tracker.peak - start]
            model.zero_grad(set_to_none=True)
    return peaks


def replay(config, method, bytes, blocks, in_chunks):
    shape = load_shape(config)
    trained = trained_by(method, shape, Options(r=8, targets="all-linear" if method == "lora" else None))
    run = Run(shape, method, trained, Recipe(
        **SIZE, weight_bytes=bytes, adapter_bytes=4, autocast=False, checkpointing=blocks, optimizer="sgd",
        four_bit=False, fused_attention=True, library="peftlab", chunked_loss=in_chunks,
    ))  # fmt: skip
    start = run.memory.total
    run.step()
    memory, peaks = run.memory, []
    memory.peak = memory.total
    run.loss = run.forward()
    peaks.append(memory.peak - start)
    memory.peak = memory.total
    backward(run.loss.node, [run.loss.new()])
    return [*peaks, memory.peak - start]


@pytest.mark.parametrize("bytes", [2, 4])
@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_peak_of_a_loss_in_chunks(family, method, bytes, monkeypatch):
    dtype = {2: torch.bfloat16, 4: torch.float32}[bytes]
    expected = measured(FAMILIES[family], method, dtype, False, True, monkeypatch)
    assert max(replay(FAMILIES[family], method, bytes, False, True)) == pytest.approx(max(expected), **NEAR)


@pytest.mark.parametrize("blocks", [1, 2, 3])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_peak_with_some_blocks_computed_again(family, blocks, monkeypatch):
    expected = measured(FAMILIES[family], "lora", torch.bfloat16, blocks, True, monkeypatch)
    assert max(replay(FAMILIES[family], "lora", 2, blocks, True)) == pytest.approx(max(expected), **NEAR)


def test_as_many_blocks_as_needed():
    shape, run = load_shape(CONFIGS["llama"]), dict(method="lora", batch=8, sequence=256)
    peaks = [pl.memory.estimate(shape, checkpointing=k, **run).peak_bytes for k in range(4)]
    assert sorted(peaks, reverse=True) == peaks and len(set(peaks)) == 4
    assert peaks[3] == pl.memory.estimate(shape, checkpointing=True, **run).peak_bytes
    for k in range(4):
        assert pl.memory.blocks_to_recompute(peaks[k], shape, **run) == k
    assert pl.memory.blocks_to_recompute(peaks[3] - 1, shape, **run) is None
    for wrong in (4, -1, 1.5, "all"):
        with pytest.raises(PeftLabError, match="checkpointing"):
            pl.memory.estimate(shape, checkpointing=wrong, **run)
    with pytest.raises(PeftLabError, match="next token"):
        pl.memory.estimate("bert-base", chunked_loss=True)
    with pytest.raises(PeftLabError, match="changes the head"):
        pl.memory.estimate(shape, "lora", targets="lm_head", chunked_loss=True)


def test_both_cut_the_positions_alike():
    assert chunked.chunk_rows(381, 1000, 2) == replayed.chunk_rows(381, 1000, 2) == 96


def test_both_have_chunks_of_one_size(monkeypatch):
    monkeypatch.undo()
    assert (chunked.CHUNK_BYTES, chunked.LEAST) == (replayed.CHUNK_BYTES, replayed.LEAST)
