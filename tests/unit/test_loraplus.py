"""LoRA+ in whole runs: the schedule of each group, both paths, masters, resuming to the bit, and what is refused.

`tests/parity/test_loraplus_parity.py` holds the groups to Hugging Face peft.
"""

import pytest
import torch
from tiny import examples, llama, tokenizer

import peftlab as pl

PLUS = dict(steps=6, batch_size=4, learning_rate=0.01, loraplus_lr_ratio=8, weight_decay=0.1, warmup=2, progress=False)


def model(targets=("q_proj", "up_proj"), **more):
    base = llama(dtype=torch.float64)
    torch.manual_seed(7)
    return pl.attach(base, pl.LoRAConfig(r=4, target_modules=targets), **more)


def adapter(trained):
    return {name: p.detach().clone() for name, p in trained.named_parameters() if p.requires_grad}


def train(trained, **settings):
    return pl.train(trained, examples(), tokenizer=tokenizer(), **{**PLUS, **settings})


def apart(one, other):
    return max((one[name] - other[name]).abs().max().item() for name in one)


def test_each_group_follows_the_schedule():
    rates = []
    trained = model(("embed_tokens", "q_proj"))
    from peftlab.training import run

    class Watched(run.Run):
        def update(self):
            row = super().update()
            rates.append([group["lr"] for group in self.optimizer.param_groups])
            return row

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("peftlab.training.Run", Watched)
        history = train(trained, loraplus_lr_embedding=0.002)
    shares = [0, 0.5, 1, 0.75, 0.5, 0.25]
    assert rates == [pytest.approx([0.01 * s, 0.002 * s, 0.08 * s]) for s in shares]
    assert [row["lr"] for row in history.steps] == pytest.approx([0.01 * s for s in shares])


def test_the_fast_path_and_the_plain_one_agree():
    found = {}
    for fast in (True, False):
        trained = model()
        history = train(trained, fast=fast)
        assert history.path.startswith("fast" if fast else "plain")
        found[fast] = adapter(trained)
    assert apart(found[True], found[False]) < 1e-9
    alike = model()
    train(alike, loraplus_lr_ratio=1)
    assert apart(adapter(alike), found[False]) > 1e-3


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("dtype", [None, "bf16"])
def test_a_killed_run_resumes_to_the_bit(tmp_path, fast, dtype):
    if fast and dtype:
        pytest.skip("the fast path takes no adapter in bf16")
    more = {"adapter_dtype": torch.bfloat16} if dtype else {}
    expected = model(**more)
    train(expected, fast=fast)

    def stop(model, row):
        if row["step"] == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(model(**more), fast=fast, folder=tmp_path, save_every=3, callback=stop)
    with pytest.raises(pl.PeftLabError, match="loraplus_lr_ratio was 8 and is 4"):
        train(model(**more), fast=fast, folder=tmp_path, loraplus_lr_ratio=4)
    with pytest.raises(pl.PeftLabError, match="loraplus_lr_ratio was 8 and is None"):
        train(model(**more), fast=fast, folder=tmp_path, loraplus_lr_ratio=None)
    resumed = model(**more)
    train(resumed, fast=fast, folder=tmp_path, save_every=3)
    assert apart(adapter(resumed), adapter(expected)) == 0


def test_what_is_refused():
    with pytest.raises(pl.PeftLabError, match="loraplus_lr_embedding is a part of LoRA"):
        train(model(), loraplus_lr_ratio=None, loraplus_lr_embedding=1e-5)
    ia3 = pl.attach(llama(), pl.IA3Config(target_modules=["k_proj"], feedforward_modules=[]))
    with pytest.raises(pl.PeftLabError, match="none of the 2 parameters that train is LoRA's B; the first is .*ia3"):
        train(ia3)
    with pytest.raises(pl.PeftLabError, match="loraplus_lr_ratio must be a positive number"):
        train(model(), loraplus_lr_ratio=0)
