"""The replayed step of ELECTRA, DistilBERT, MPNet and ModernBERT against the real one, tensor by tensor."""

import memory_oracle
import pytest
import torch
from test_memory_replay import SMALL, adapter, replayed

from peftlab.memory.counting.shapes import load_shape

CONFIGS = {
    "electra": {"model_type": "electra", "vocab_size": 1000, "embedding_size": 128, **SMALL},
    "distilbert": dict(model_type="distilbert", vocab_size=1000, dim=256, hidden_dim=704, n_layers=3, n_heads=8),
    "mpnet": {"model_type": "mpnet", "vocab_size": 1000, **SMALL},
    "modernbert": {"model_type": "modernbert", "vocab_size": 1000, "local_attention": 1024, **SMALL}
    | dict.fromkeys(("pad_token_id", "cls_token_id", "bos_token_id"), 0) | {"eos_token_id": 1, "sep_token_id": 1},
}  # fmt: skip
PEFT = {"full": {}, "lora": {}}
CASES = [
    (family, method, bytes, checkpointing)
    for family in CONFIGS
    for method in ("full", "lora")
    for bytes in (2, 4)
    for checkpointing in (False, True)
    if family != "mpnet" or not checkpointing  # which transformers cannot do
]


@pytest.mark.parametrize(("family", "method", "bytes", "checkpointing"), CASES)
def test_the_peak_is_that_of_the_real_step(family, method, bytes, checkpointing, monkeypatch):
    """Activations, logits, gradients and what is alive for a moment, without the parameters: within 2%."""
    shape = load_shape(CONFIGS[family])
    size = {"batch": 3, "sequence": 160}
    targets = [m.path for m in shape.match("all-linear")]
    found = replayed(shape, method, bytes=bytes, checkpointing=checkpointing, **size)
    chosen = adapter(method, shape, 8, 20)
    if chosen is not None:
        chosen.target_modules = set(targets)  # peft's own "all-linear" fails on DistilBERT's head
    expected = memory_oracle.measure(
        CONFIGS[family], "encoder", chosen, dtype={2: torch.bfloat16, 4: torch.float32}[bytes],
        checkpointing=checkpointing, monkeypatch=monkeypatch,
        attention="eager" if family == "mpnet" else "fused_stand_in", **size,
    )  # fmt: skip
    print(family, method, bytes, checkpointing, [f"{a / b - 1:.2%}" for a, b in zip(found, expected, strict=True)],
          f"{max(found) / max(expected) - 1:.2%}")
    assert max(found) == pytest.approx(max(expected), rel=0.02)
