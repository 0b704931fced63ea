"""transformers' Trainer on an attached model: what it trains, what it saves, and that a resumed run loses nothing."""

import os

import pytest
import torch
from children import Child, one_worker
from safetensors.torch import load_file
from tiny import checkpointing_arguments, llama
from transformers import LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

import peftlab as pl
from peftlab.adapters.trainer_callback import AdapterCallback, restore_adapter

DATA = [{"input_ids": row.tolist(), "labels": row.tolist()} for row in torch.arange(1, 97).reshape(16, 6) % 30 + 1]


def model_with_adapters(dtype=torch.float32):
    model = llama(dtype=dtype)
    torch.manual_seed(1)
    pl.attach(model, pl.LoRAConfig(r=2, alpha=6, dropout=0.2, target_modules="all-linear"))
    pl.attach(model, pl.LoRAConfig(r=2, alpha=6, target_modules=["q_proj"], init="random"), name="second")
    pl.activate(model, {"default": 1.0, "second": 1.0})
    return model


def trainer(model, folder, callbacks=(), steps=6, eval_dataset=None, **settings):
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=steps, save_steps=2, per_device_train_batch_size=2, learning_rate=0.01,
        report_to=[], disable_tqdm=True, use_cpu=True, seed=3, logging_strategy="no", **settings,
    )  # fmt: skip
    return Trainer(
        model=model, args=arguments, train_dataset=DATA, eval_dataset=eval_dataset,
        callbacks=[AdapterCallback(), *callbacks],
    )  # fmt: skip


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


class Stop(TrainerCallback):
    """Ends the process as a kill would, after the checkpoint of step 4."""

    def on_save(self, args, state, control, **rest):
        if state.global_step == 4:
            os._exit(9)


def test_it_trains_the_adapter_alone_and_saves_the_base_alone(tmp_path):
    model = model_with_adapters()
    before = weights(model)
    trainer(model, tmp_path).train()
    after = weights(model)
    for name, value in before.items():
        assert torch.equal(value, after[name]) != ("peftlab" in name), name
    saved = load_file(tmp_path / "checkpoint-6" / "model.safetensors")
    assert saved and not any("peftlab" in key for key in saved)
    plain = LlamaForCausalLM.from_pretrained(tmp_path / "checkpoint-6")
    for name, value in plain.state_dict().items():
        assert torch.equal(value, before[name])
    loaded = llama()
    pl.load_adapter(loaded, tmp_path / "checkpoint-6" / "adapter")
    pl.load_adapter(loaded, tmp_path / "checkpoint-6" / "adapter", name="second")
    assert all(torch.equal(value, after[name]) for name, value in loaded.state_dict().items())


def train_until_stopped(folder):
    trainer(model_with_adapters(), folder, [Stop()]).train()


@one_worker
def test_a_killed_run_resumes_to_the_same_weights(tmp_path):
    whole = model_with_adapters()
    trainer(whole, tmp_path / "whole").train()

    assert Child(train_until_stopped, tmp_path / "killed").status() == 9

    resumed = model_with_adapters()
    with torch.no_grad():
        for name, parameter in resumed.named_parameters():
            if "peftlab" in name:
                parameter.normal_()
    trainer(resumed, tmp_path / "killed").train(resume_from_checkpoint=True)
    expected, found = weights(whole), weights(resumed)
    assert all(torch.equal(value, found[name]) for name, value in expected.items())

    elsewhere = model_with_adapters()
    again = trainer(elsewhere, tmp_path / "elsewhere")
    again.callback_handler.callbacks = [
        AdapterCallback(tmp_path / "whole" / "checkpoint-4") if isinstance(one, AdapterCallback) else one
        for one in again.callback_handler.callbacks
    ]
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert all(torch.equal(value, weights(elsewhere)[name]) for name, value in expected.items())


def test_a_checkpoint_without_an_adapter_is_refused(tmp_path):
    model = model_with_adapters()
    one = trainer(model, tmp_path, steps=2)
    one.remove_callback(AdapterCallback)
    one.train()
    with pytest.raises(pl.PeftLabError, match="checkpoint-2 holds no adapter"):
        trainer(model_with_adapters(), tmp_path).train(resume_from_checkpoint=True)


def test_the_best_adapter_comes_back_at_the_end(tmp_path):
    model = model_with_adapters()
    one = trainer(
        model, tmp_path, eval_dataset=DATA[:4], eval_strategy="steps", eval_steps=2, load_best_model_at_end=True,
        metric_for_best_model="eval_loss", greater_is_better=True,  # the first checkpoint is the worst, so the "best"
    )  # fmt: skip
    one.train()
    assert one.state.best_model_checkpoint.endswith("checkpoint-2")
    loaded = llama()
    pl.load_adapter(loaded, tmp_path / "checkpoint-2" / "adapter")
    found = weights(model)
    assert all(torch.equal(value, found[name]) for name, value in loaded.state_dict().items())


@pytest.mark.parametrize("reentrant", [False, True])
def test_with_gradient_checkpointing_every_adapter_trains(tmp_path, reentrant):
    plain, model = model_with_adapters(), model_with_adapters()
    trainer(plain, tmp_path / "a").train()
    trainer(model, tmp_path / "b", **checkpointing_arguments(reentrant)).train()
    found = weights(model)
    for name, value in weights(plain).items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("change", [dict(alpha=64), dict(use_rslora=True)])
def test_an_adapter_of_another_config_is_not_put_back(tmp_path, change):
    """Keys and shapes are alike, and yet the same weights would be another function."""
    settings = dict(r=2, alpha=16, target_modules=["q_proj", "v_proj"], init="gaussian")
    saved = pl.attach(llama(), pl.LoRAConfig(**settings))
    pl.save_adapter(saved, tmp_path)
    model = pl.attach(llama(), pl.LoRAConfig(**{**settings, **change}))
    before = weights(model)
    with pytest.raises(pl.PeftLabError, match="alpha=16|use_rslora=False"):
        restore_adapter(model, tmp_path, "default")
    assert all(torch.equal(value, before[name]) for name, value in weights(model).items())
    same = pl.attach(llama(), pl.LoRAConfig(**{**settings, "target_modules": ["v_proj", "q_proj"]}))
    restore_adapter(same, tmp_path, "default")
    assert all(torch.equal(value, weights(saved)[name]) for name, value in weights(same).items())


def adalora():
    torch.manual_seed(1)
    return pl.attach(llama(), pl.AdaLoRAConfig(init_r=4, target_r=2, tinit=1, tfinal=1))


class Interrupt(TrainerCallback):
    """Ends the run after the checkpoint of step 4."""

    def on_save(self, args, state, control, **rest):
        control.should_training_stop = state.global_step == 4


def test_adalora_prunes_and_a_resumed_run_goes_on_in_the_middle_of_it(tmp_path):
    whole = adalora()
    trainer(whole, tmp_path / "whole").train()
    assert sum(pl.adalora_ranks(whole).values()) == 8
    trainer(adalora(), tmp_path / "killed", [Interrupt()]).train()
    resumed = adalora()
    trainer(resumed, tmp_path / "killed").train(resume_from_checkpoint=True)
    assert all(torch.equal(value, weights(resumed)[name]) for name, value in weights(whole).items())
    assert pl.adalora_ranks(whole) == pl.adalora_ranks(resumed)
    other = pl.attach(llama(), pl.AdaLoRAConfig(init_r=4, target_r=1, tinit=1, tfinal=1))
    with pytest.raises(pl.PeftLabError, match="that of another run"):
        trainer(other, tmp_path / "killed").train(resume_from_checkpoint=True)
