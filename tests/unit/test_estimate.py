"""The estimator: parts that can be computed otherwise, measured peaks, mistakes, and that it is arithmetic alone."""

import functools
import gc
import json
import statistics
import subprocess
import sys
from dataclasses import replace

import family_configs
import pytest
from places import has_place
from releases import skip_lost_biases

from peftlab.bench import family_runs
from peftlab.commands import cli
from peftlab.errors import PeftLabError
from peftlab.kit import measurements
from peftlab.memory import BUILT_IN, CARDS, METHODS, cards, count, estimate, fits, largest, load_shape, what_fits
from peftlab.memory.counting.methods import trained_by
from peftlab.memory.counting.options import Options
from peftlab.memory.estimate import CUBLAS_WORKSPACE
from peftlab.memory.replay import ops, views
from peftlab.memory.replay.nets import Recipe
from peftlab.memory.replay.step import FORWARD, Run
from peftlab.memory.replay.tape import Memory, Parameter, backward, without_collector

BLOCK = 512  # the allocator's rounding, once a tensor


def near(expected, tensors):
    """At least so many bytes, and at most 511 more a tensor."""
    return pytest.approx(expected + tensors * BLOCK / 2, abs=tensors * BLOCK / 2)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", ["gpt2", "bert-base", "t5-base", "llama-3.2-1b"])
def test_the_parts_make_the_peak(method, shape):
    if not has_place(method, shape):
        pytest.skip("no place for the method")
    found = estimate(shape, method, batch=2, sequence=64)
    assert sum(found.parts.values()) == found.peak_bytes
    assert all(size >= 0 for size in found.parts.values())
    assert found.trainable == count(shape, method).trainable
    assert json.loads(json.dumps(found.as_dict()))["peak_bytes"] == found.peak_bytes


@pytest.mark.parametrize(("precision", "bytes"), [("bf16", 2), ("fp32", 4), ("mixed", 4)])
@pytest.mark.parametrize(("optimizer", "states"), [("adamw", 2), ("sgd", 0)])
def test_weights_gradients_and_states_of_full_fine_tuning(precision, bytes, optimizer, states):
    """At the end of a step all gradients are there: weights, gradients and two states, each `bytes` a parameter."""
    shape = load_shape("llama-3.2-1b")
    found = estimate(shape, "full", precision=precision, optimizer=optimizer, sequence=8)
    tensors = len([module for module in shape.modules if not module.tied])
    assert found.weights == near(bytes * shape.parameters, tensors)
    assert found.optimizer == near(states * bytes * shape.parameters, 2 * tensors)
    if optimizer == "adamw":
        assert found.moment == "optimiser" and found.gradients == near(bytes * shape.parameters, tensors)


def test_adapters_are_float32_unless_told():
    trained = count("llama-2-7b", "lora", r=16, targets="all-linear").added
    wide = estimate("llama-2-7b", "lora", r=16, targets="all-linear")
    half = estimate("llama-2-7b", "lora", r=16, targets="all-linear", adapter_precision="bf16")
    assert wide.adapter == 4 * trained and half.adapter == 2 * trained
    assert wide.optimizer == 8 * trained


def test_masters_take_four_bytes_and_make_the_states_float32():
    run = {"r": 16, "targets": "all-linear", "adapter_precision": "bf16"}
    without, with_masters = (estimate("llama-2-7b", "lora", **run, masters=masters) for masters in (False, True))
    assert without.parts["optimizer"] == pytest.approx(4 * without.trainable, rel=1e-3)
    assert with_masters.parts["optimizer"] == pytest.approx(12 * without.trainable, rel=1e-3)
    assert with_masters.parts["adapter"] == without.parts["adapter"]
    assert estimate("llama-2-7b", "full", masters=True) == estimate("llama-2-7b", "full"), "a base has none"


def test_float32_states_of_16_bit_weights():
    """bitsandbytes' AdamW: two float32 numbers for each trained parameter, whatever its own precision."""
    shape = load_shape("llama-3.2-1b")
    for precision, weight in (("bf16", 2), ("fp32", 4)):
        found = estimate(shape, "full", optimizer="adamw32bit", precision=precision, sequence=8)
        assert found.optimizer == near(8 * shape.parameters, 2 * len(shape.modules))
        assert found.weights == near(weight * shape.parameters, len(shape.modules))
    lora = {"r": 16, "adapter_precision": "bf16", "sequence": 8}
    wide, narrow = (estimate("gpt2", "lora", optimizer=name, **lora) for name in ("adamw32bit", "adamw"))
    assert wide.optimizer == near(8 * wide.trainable, 200) and narrow.optimizer == near(4 * wide.trainable, 200)


def test_eight_bit_states():
    """A byte a moment and a float32 for each block of 256; tensors below 4,096 elements keep float32."""
    tensors = [(r, m.inputs) for m in load_shape("gpt2").match() for r in (8,)]
    found = estimate("gpt2", "lora", optimizer="adamw8bit", sequence=8)
    expected = 0
    for module in load_shape("gpt2").match():
        for count_ in (8 * module.inputs, 8 * module.outputs):
            expected += 2 * (count_ + 4 * -(-count_ // 256)) if count_ >= 4096 else 8 * count_
    assert found.optimizer == near(expected, 8 * len(tensors))
    small = estimate("gpt2", "lora", r=1, optimizer="adamw8bit", sequence=8).optimizer
    assert small == near(8 * count("gpt2", "lora", r=1).added, 4 * len(tensors))
    paged = estimate("llama-3.2-1b", "full", optimizer="paged-adamw8bit", sequence=8).optimizer
    assert paged < 0.05 * load_shape("llama-3.2-1b").parameters  # the scales alone


def test_a_4_bit_base():
    """Half a byte a weight and its scales, 4.127 bits (Dettmers et al. 2023, section 3); the rest stays in bf16."""
    shape = load_shape("llama-2-7b")
    packed = sum(m.weight for m in shape.modules if m.kind == "linear" and m.role == "body")
    layers = len([m for m in shape.modules if m.kind == "linear" and m.role == "body"])
    expected = packed * (0.5 + 1 / 64 + 4 / 64 / 256) + 2 * (shape.parameters - packed)
    assert estimate(shape, "qlora", r=16).weights == near(expected + layers * 1500, 8 * layers)
    assert estimate(shape, "qlora").peak_bytes < 0.5 * estimate(shape, "lora").peak_bytes


def test_the_peaks_measured_at_full_size():
    """Hugging Face peft on the Llama-2-7B shape, in the stored measurements of the LoRA chapter: within 1%."""
    rows = measurements.results("lora").where(section="fullsize", method="lora", library="peft")
    assert len(rows) >= 4
    for row in rows:
        found = estimate(
            row["shape"], "lora", r=row["r"], targets="all-linear", batch=row["batch"], sequence=row["sequence"],
            checkpointing=row["checkpointing"], autocast=True,
        )  # fmt: skip
        assert found.peak_bytes == pytest.approx(row["peak_bytes"], rel=0.01), row


def test_what_makes_a_step_smaller():
    base = {"shape": "llama-3.2-1b", "method": "lora", "r": 16, "targets": "all-linear", "batch": 4, "sequence": 512}

    def peak(**changes):
        return estimate(**{**base, **changes}).peak_bytes

    assert peak(checkpointing=True) < 0.7 * peak()
    assert peak(attention="eager") > peak()
    assert peak(batch=8) > 1.5 * peak() and peak(sequence=1024) > 1.5 * peak()
    assert peak(method="full", r=None, targets=None, checkpointing=True) > 1.8 * peak(checkpointing=True)
    eager = [peak(attention="eager", sequence=n) for n in (512, 1024, 2048)]
    assert eager[2] - eager[1] > 2.5 * (eager[1] - eager[0])  # the scores grow with the square of the length


def test_arithmetic_of_a_step():
    """6 N a token for a full step, 4 N for LoRA's (the gradient of the frozen weights falls away), plus attention."""
    tokens, parameters = 64, load_shape("llama-2-7b").parameters - 32000 * 4096  # the embedding is looked up
    full = estimate("llama-2-7b", "full", sequence=tokens).flops / tokens
    lora = estimate("llama-2-7b", "lora", r=1, sequence=tokens).flops / tokens
    assert full == pytest.approx(6 * parameters, rel=0.01)
    assert lora == pytest.approx(4 * parameters, rel=0.01)
    again = estimate("llama-2-7b", "full", sequence=tokens, checkpointing=True).flops / tokens
    assert again == pytest.approx(8 * parameters, rel=0.03)  # but for the head, which is not computed again


def test_arithmetic_of_packed_attention():
    """A block of GPT-2 multiplies each token with 12 d^2 weights, and has two products of s^2 d (backwards five)."""
    tokens, width, layers, vocabulary = 512, 768, 12, 50257
    products = tokens * (layers * 12 * width**2 + width * vocabulary) * 2
    attention = layers * tokens**2 * width * 2
    assert estimate("gpt2", "full", sequence=tokens).flops == 3 * products + (2 + 5) * attention


def test_what_an_eager_step_writes_grows_with_its_tokens_and_with_recomputing():
    run = {"shape": "smollm2-135m", "method": "lora", "r": 8}
    one, two = (estimate(**run, sequence=tokens).written for tokens in (256, 512))
    again = estimate(**run, sequence=512, checkpointing=True).written
    assert 1.9 < two / one < 2.3  # attention's own tensors grow faster than the rest
    assert 1.2 < again / two < 1.6  # one forward pass more
    found = estimate(**run, sequence=512)
    assert found.written > found.peak_bytes - found.weights  # all that is alive at the peak was written


def test_seconds_at_a_stated_efficiency():
    found = estimate("gpt2", "lora", sequence=64)
    assert found.seconds(1e12, 0.5) == pytest.approx(2 * found.flops / 1e12)
    for peak, share, name in ((0, 0.5, "peak_flops"), (1e12, 0, "efficiency"), (1e12, 1.5, "efficiency")):
        with pytest.raises(PeftLabError, match=f"{name} must be a positive"):
            found.seconds(peak, share)


@pytest.mark.parametrize("shape", ["bert", "llama"])
@pytest.mark.parametrize(
    ("method", "make"),
    [
        ("lora", lambda peft, task: peft.LoraConfig(r=4, bias="lora_only", task_type=task)),
        ("dora", lambda peft, task: peft.LoraConfig(r=4, use_dora=True, task_type=task)),
        ("ia3", lambda peft, task: peft.IA3Config(task_type=task)),
        ("p-tuning", lambda peft, task: peft.PromptEncoderConfig(num_virtual_tokens=6, task_type=task)),
        ("prefix", lambda peft, task: peft.PrefixTuningConfig(num_virtual_tokens=6, task_type=task)),
    ],
)
def test_the_size_of_the_file(shape, method, make):
    """The tensors that Hugging Face peft would save."""
    if method == "lora":
        skip_lost_biases({"bias": "lora_only"})
    peft = pytest.importorskip("peft")
    import transformers

    config = {"model_type": shape, "vocab_size": 100, "hidden_size": 64, "intermediate_size": 96,
              "num_hidden_layers": 2, "num_attention_heads": 4}  # fmt: skip
    auto = transformers.AutoModelForSequenceClassification if shape == "bert" else transformers.AutoModelForCausalLM
    model = auto.from_config(transformers.AutoConfig.for_model(**config))
    model = peft.get_peft_model(model, make(peft, "SEQ_CLS" if shape == "bert" else "CAUSAL_LM"))
    saved = peft.get_peft_model_state_dict(model)
    options = {
        "lora": {"r": 4, "bias": "lora_only"}, "dora": {"r": 4}, "ia3": {}, "p-tuning": {"virtual_tokens": 6},
        "prefix": {"virtual_tokens": 6},
    }[method]  # fmt: skip
    found = estimate(config, method, precision="fp32", sequence=8, **options)
    assert found.file_bytes == sum(tensor.numel() * tensor.element_size() for tensor in saved.values())


@pytest.mark.parametrize(("precision", "bytes"), [("fp32", 4), ("bf16", 2), ("mixed", 4)])
def test_the_file_of_full_fine_tuning_holds_every_weight(precision, bytes):
    found = estimate("gpt2", "full", precision=precision, sequence=8)
    assert found.file_bytes == bytes * load_shape("gpt2").parameters


def test_a_t5_config_that_does_not_say_how_wide_its_heads_are():
    """transformers' default is 64."""
    config = {"model_type": "t5", "vocab_size": 100, "d_model": 48, "d_ff": 64, "num_layers": 1, "num_heads": 3}
    for method in ("full", "lora"):
        assert estimate(config, method, sequence=32) == estimate({**config, "d_kv": 64}, method, sequence=32)


def test_the_largest_that_fits():
    run = {"r": 16, "targets": "all-linear", "checkpointing": True}
    batch = largest("batch", "rtx 4090", "llama-3.1-8b", "qlora", **run)
    assert batch >= 1
    assert fits("RTX 4090", "llama-3.1-8b", "qlora", batch=batch, **run)
    assert not fits("RTX 4090", "llama-3.1-8b", "qlora", batch=batch + 1, **run)
    assert largest("sequence", "T4", "llama-2-70b", "lora") == 0
    assert largest("sequence", "H200", "gpt2", "lora") == 1024  # what it has positions for
    assert largest("sequence", "H200", "gpt2", "prefix", virtual_tokens=8) == 1024 - 8
    found = what_fits("llama-2-7b", "full", precision="mixed", checkpointing=True)
    assert found == ["H200", "B200"] and set(found) < set(CARDS)
    assert cards.card_bytes("h100") < 80e9


@pytest.mark.parametrize("last", [0, 1, 2, 37, 999, 1000])
@pytest.mark.parametrize("guess", [1, 2, 40, 1000])
def test_the_search_for_the_largest(last, guess):
    """Along a line it takes few steps. A bend, a jump or a flat piece costs more, and changes nothing."""
    tried = []
    line = lambda n: tried.append(n) or 7 * (n - last - 0.5)  # noqa: E731
    assert cards._last(line, guess, 1000) == last
    assert len(tried) <= 5
    for curve in (
        lambda n: (n - 0.5) ** 3 - last**3, lambda n: 1 if n > last else -1, lambda n: max(0, n - last),
        lambda n: min(n, 500) * 1e-3 + (1e6 if n > last else -1e6), lambda n: n**0.5 - (last + 0.5) ** 0.5,
    ):  # fmt: skip
        tried.clear()
        assert cards._last(lambda n, curve=curve: tried.append(n) or curve(n), guess, 1000) == last
        assert len(tried) <= 40


@pytest.mark.parametrize("card", CARDS)
def test_a_card_holds_an_estimate_whose_margin_it_holds_too(card):
    """There is one rule: what `with_margin` asks for must not be more than the card's memory."""
    most = cards.card_bytes(card)
    assert abs(cards.with_margin(most) - CARDS[card] * 10**9) <= 1
    assert card in cards.that_hold(most) and card not in cards.that_hold(most + 2)


def test_a_gpu_smaller_than_its_context_holds_nothing():
    assert cards.largest_estimate(cards.CONTEXT // 2) == 0 == cards.largest_estimate(cards.CONTEXT)


def test_the_margin_predicts_what_ran_on_a_card_of_48_gb():
    """All 13 trials of `peftlab bench qlora --only fits`, 70B in four bits: which trained and which did not."""
    trials = measurements.results("qlora").where(section="fits", tried=True)
    assert len(trials) == 13 and {row["fits"] for row in trials} == {True, False}
    for row in trials:
        said = estimate(
            row["shape"], "qlora", r=row["r"], targets="all-linear", batch=row["batch"], sequence=row["sequence"],
            checkpointing=row["checkpointing"], optimizer=row["optimizer"], library="peftlab",
            adapter_precision={"float32": "fp32", "bfloat16": "bf16"}[row["adapter_dtype"]],
        ).peak_bytes  # fmt: skip
        assert (cards.with_margin(said) <= 48e9) == row["fits"], row
        assert ("L40S" in cards.that_hold(said)) == row["fits"]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("llama-2-7c", "Unknown shape 'llama-2-7c'"),
        ("llama-2-7b --method lore", "Did you mean 'lora'"),
        ("llama-2-7b --targets q_prj", "Did you mean 'q_proj'"),
        ("llama-2-7b --method bitfit", "has no biases"),
        ("llama-2-7b --batch 0", "batch must be a positive whole number of at most 16,777,216, found 0"),
        ("llama-2-7b --sequence -4", "sequence must be a positive whole number"),
        ("llama-2-7b --precision fp8", "precision must be one of 'bf16', 'fp32', 'mixed'"),
        ("llama-2-7b --optimizer adamw4bit", "Did you mean 'adamw8bit'"),
        ("llama-2-7b --attention flash", "attention must be one of 'sdpa', 'eager'"),
        ("llama-2-7b --card H1000", "Did you mean 'H100'"),
        ("gpt2 --method prefix --checkpointing", "checkpointing switches off"),
        ("gpt2 --sequence 2000", "gpt2 has positions for 1,024 tokens, too few for 2,000"),
        ("bert-base --method prompt --sequence 500", "492 tokens beside 20 virtual ones, too few for 500"),
        ("llama-2-7b --sequence 99999999999999", "sequence must be a positive whole number of at most 16,777,216"),
        ("smollm2-135m --method dora --targets embed_tokens", "DoRA on the embedding model.embed_tokens"),
        ("gpt2 --method lora --r 0", "r must be a positive whole number"),
    ],
)
def test_a_mistake_is_one_line(line, told, capsys):
    assert cli.main(["memory", *line.split()]) == 2
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1 and told in err


def test_a_broken_config(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"model_type": "llama", "vocab_size": 10')
    assert cli.main(["memory", str(tmp_path)]) == 2
    assert "not valid JSON" in capsys.readouterr().err


def test_a_null_in_the_config_means_the_default():
    config = {"model_type": "gemma", "vocab_size": 100, "hidden_size": 64, "intermediate_size": 96,
              "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 16}  # fmt: skip
    assert estimate({**config, "hidden_activation": None}) == estimate(config)


def test_an_architecture_without_a_replay():
    config = {"model_type": "llama4_text", "vocab_size": 10, "hidden_size": 8, "intermediate_size": 8,
              "num_hidden_layers": 1, "num_attention_heads": 8}  # fmt: skip
    with pytest.raises(PeftLabError, match="activations of llama4_text models are not known yet; known: llama"):
        estimate(config)


@pytest.mark.parametrize(
    ("shape", "architecture"), [("bert-base", "BertModel"), ("qwen3-8b", "Qwen3Model"), ("qwen3-8b", "Qwen3ForRewards")]
)
def test_a_model_with_another_head_is_not_predicted_as_if_it_had_its_own(shape, architecture):
    with pytest.raises(PeftLabError, match=architecture):
        estimate({**BUILT_IN[shape], "architectures": [architecture]})


def test_families_without_a_fused_attention_are_replayed_in_separate_operations():
    """As transformers falls back; so both words give one answer."""
    shape = {**BUILT_IN["gpt-oss-20b"], "num_hidden_layers": 2}
    assert estimate(shape, attention="sdpa").peak_bytes == estimate(shape, attention="eager").peak_bytes


def test_a_sliding_window_costs_a_mask_from_its_width_on():
    """One more token than the window, and each sliding block keeps a mask of its own."""
    shape = {**BUILT_IN["mistral-7b"], "num_hidden_layers": 2, "sliding_window": 1024}
    wide = {**shape, "sliding_window": None}
    assert estimate(shape, sequence=1023).peak_bytes == estimate(wide, sequence=1023).peak_bytes
    more = estimate(shape, sequence=1024).peak_bytes - estimate(wide, sequence=1024).peak_bytes
    assert more > 2 * 2 * 1024 * 1024


@pytest.mark.parametrize(
    ("shape", "targets"),
    [("gpt2", ["wte"]), ("gpt2", ["wpe"]), ("gpt2", ["c_attn", "lm_head"]), ("t5-base", ["lm_head"]),
     ("bert-base", ["word_embeddings", "token_type_embeddings"]), ("t5-base", ["relative_attention_bias"])],
)  # fmt: skip
def test_adapters_on_embeddings_and_tied_heads_take_their_gradients(shape, targets):
    """Every tensor of the adapter has states in the end, so each had a gradient."""
    found = estimate(shape, "lora", targets=targets, sequence=64)
    trained = count(shape, "lora", targets=targets)
    assert found.optimizer == near(8 * trained.added + 4 * trained.head, 100)  # the head is as wide as the weights


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("precision", ["bf16", "mixed"])
@pytest.mark.parametrize("method", ["dora", "adalora", "vera", "ia3", "houlsby", "parallel", "p-tuning"])
def test_everything_that_trains_has_a_gradient(method, precision, checkpointing):
    """Two states of float32 for each trained parameter (and AdaLoRA's rank numbers, which train on a GPU)."""
    found = estimate("llama-3.2-1b", method, precision=precision, checkpointing=checkpointing, sequence=16)
    assert found.optimizer == near(8 * found.trainable, 1000)


def test_a_second_gradient_is_added_in_place_where_nothing_else_holds_the_first():
    """The replay counts references as PyTorch does; a Python that counts otherwise would be noticed here."""
    allocations = []
    for view in (False, True):
        memory = Memory()
        x = Parameter(memory, (128,), 4, trains=True)
        middle = ops.scale(x)
        a, b = ops.scale(middle), ops.scale(middle)
        output = ops.add(a, b)
        del a, b, middle
        node, gradients = output.node, [output.new()]
        if view:
            first = node.edges[1].apply
            node.edges[1].apply = lambda g, first=first: tuple(one.viewed() for one in first(g))
        memory.history = []
        backward(node, gradients)
        allocations.append(len(memory.history))
    assert allocations == [3, 4]  # of a, of b, of x; and where b's is held twice, their sum


def both_steps(run):
    """The second of two replayed steps, as `Run.second_step` returns it."""
    memory, history = run.memory, []
    run.step()
    run.net.renewed.clear()  # in PyTorch the prefix of a step is gone when its forward pass returns
    flops, written, memory.history = memory.flops, memory.written, history
    run.step()
    return memory.peak, memory.at_peak, memory.peak_moment, history, memory.flops - flops, memory.written - written


SECOND = [
    ("qwen2.5-0.5b", "full", {"optimizer": "adamw-fused"}),
    ("qwen2.5-0.5b", "full", {"optimizer": "sgd", "chunked_loss": True}),
    ("qwen2.5-0.5b", "lora", {"checkpointing": True, "masters": True, "adapter_bytes": 2}),
    ("qwen2.5-0.5b", "lora", {"optimizer": "paged-adamw8bit", "weight_bytes": 4, "autocast": True, "gpus": 2}),
    ("qwen2.5-0.5b", "qlora", {"checkpointing": 9, "autocast": True, "four_bit": True, "gpus": 3, "sharded": True}),
    ("qwen2.5-0.5b", "p-tuning", {"checkpointing": True, "optimizer": "adamw-foreach", "gpus": 2, "sharded": True}),
    ("gpt2", "prefix", {"batch": 3}),
    ("gpt2", "houlsby", {"checkpointing": True, "fused_attention": False}),
    ("bert-base", "ia3", {"optimizer": "adamw8bit"}),
    ("t5-base", "lora", {"checkpointing": True, "library": "peftlab"}),
    # blocks that are alike, and others between them
    ("llama-3.2-3b", "parallel", {}),  # attention has a gradient, and keeps the rotary tables, from block 1 on
    ("gemma-3-4b", "dora", {"sequence": 1100, "weight_bytes": 4, "autocast": True, "checkpointing": True}),
    ("qwen3-30b-a3b", "qlora", {"four_bit": True, "autocast": True, "gpus": 8, "sharded": True, "library": "peftlab"}),
    ("smollm3-3b", "lora", {"autocast": True, "checkpointing": 20, "gpus": 4}),
    ("qwen2.5-0.5b", "lora", {"targets": r".*\.\d*[02468]\..*q_proj", "weight_bytes": 4}),
    ("qwen2.5-0.5b", "lora", {"targets": r".*\.1\d\..*(q|k|v|o|up|down)_proj", "fused_attention": False}),
    ("qwen2.5-0.5b", "bitfit", {"targets": r".*\.\d*[02468]\..*(q|k)_proj", "gpus": 2, "sharded": True}),
]
USUAL = {
    "batch": 1, "sequence": 32, "weight_bytes": 2, "adapter_bytes": 4, "autocast": False, "four_bit": False,
    "checkpointing": False, "optimizer": "adamw", "fused_attention": True,
}  # fmt: skip


def both_ways(shape, method, targets=None, **settings):
    """The second step as the estimate replays it, and one after a first step, with all blocks."""
    shape = load_shape(shape)
    recipe, trained = Recipe(**{**USUAL, **settings}), trained_by(method, shape, Options(targets=targets))
    with without_collector():
        return [step(Run(shape, method, trained, recipe)) for step in (Run.second_step, both_steps)]


@pytest.mark.parametrize(("shape", "method", "settings"), SECOND)
def test_the_second_step_follows_from_the_first(shape, method, settings):
    """Every number, byte by byte. Two steps with all blocks are replayed here; the estimate replays one, with a few."""
    found, expected = both_ways(shape, method, **settings)
    for name, one, other in zip(found._fields, found, expected, strict=True):
        assert one == other, name
    assert len(found.history) > 100


@pytest.mark.parametrize("family", [name for name in family_configs.DECODERS if name in FORWARD])
def test_a_copied_block_does_what_a_replayed_one_does(family):
    """In each family of decoders, of which most of twelve blocks are copied; also where blocks differ."""
    layers = family_configs.NAMES.get(family, (0, 0, "num_hidden_layers"))[2]
    for seed, method in enumerate(("lora", "full", "dora", "ia3", "loha", "lora")):
        config = {**family_configs.variant(family, seed), layers: 12}
        config.pop("layer_types", None)
        settings = {"autocast": seed % 2 == 1, "checkpointing": seed in (2, 3), "sharded": seed > 2, "gpus": 1 + seed}
        targets = "all-linear" if method == "lora" else None
        if method == "ia3" and family in ("mixtral", "gpt_oss"):
            targets = ("k_proj", "v_proj")  # experts have no layer for its usual scale
        found, expected = both_ways(config, method, targets, **settings)
        assert found == tuple(expected), (seed, method)


def test_of_blocks_that_are_alike_few_are_replayed():
    """So a model of 80 blocks takes little longer than one of five."""
    shape, made = load_shape("llama-2-70b"), []
    recipe, trained = Recipe(**{**USUAL, "optimizer": "sgd"}), trained_by("lora", shape, Options())
    for step in (Run.second_step, Run.step):
        run = Run(shape, "lora", trained, recipe)
        before = run.memory.serial
        step(run)
        made.append(run.memory.serial - before)
        run.close()
    assert made[0] < made[1] / 10


def test_what_a_layer_norm_keeps():
    """Its input, and two float32 numbers for each row."""
    memory = Memory()
    weight, bias = (Parameter(memory, (8,), 2, trains=True) for _ in range(2))
    x = ops.scale(Parameter(memory, (4, 256, 8), 2, trains=True))
    before = memory.total
    output = ops.layer_norm(x, weight, bias)
    assert memory.total - before == 4 * 256 * 8 * 2 + 2 * (4 * 256 * 4)
    backward(output.node, [output.new()])
    assert weight.grad.shape == bias.grad.shape == (8,)


def test_an_enlarged_bias_has_a_gradient_of_its_own_size():
    memory = Memory()
    bias = Parameter(memory, (1, 2, 16, 16), 4, trains=True)
    output = views.enlarge(bias, (3, 2, 16, 24))
    assert output.shape == (3, 2, 16, 24)
    backward(output.node, [output.new()])
    assert bias.grad.shape == (1, 2, 16, 16)


def test_the_table_and_the_json(capsys):
    assert cli.main("memory gpt2 --method lora --r 4 --batch 2 --card T4".split()) == 0
    table = capsys.readouterr().out
    for word in ("peak", "activations", "optimiser states", "GiB", "fits on", "With the margin it holds batches up to"):
        assert word in table
    assert cli.main("memory gpt2 --method lora --r 4 --batch 2 --card T4 --json".split()) == 0
    found = json.loads(capsys.readouterr().out)
    expected = estimate("gpt2", "lora", r=4, batch=2)
    assert found["peak_bytes"] == expected.peak_bytes and found["largest_batch"] > 2
    assert sum(found[part] for part in expected.parts) == found["peak_bytes"]


@pytest.mark.parametrize(
    "asked, told",
    [
        ("llama-2-7b --method qlora", ["batches up to 4 of 512 tokens,", "or sequences up to 2,233 tokens"]),
        ("llama-2-7b --method full", ["no batch of 512 tokens,", "and no sequence at all in batches of 1"]),
        ("llama-2-7b --method qlora --sequence 4096", ["no batch of 4,096 tokens,", "but sequences up to 2,233 "]),
        ("gpt2 --method lora --batch 50000", ["batches up to ", "but no sequence at all in batches of 50,000"]),
    ],
)
def test_what_a_card_holds_is_told_in_words(asked, told, capsys):
    assert cli.main(f"memory {asked} --card T4".split()) == 0
    first, second = capsys.readouterr().out.splitlines()[-2:]
    assert f"With the margin it holds {told[0]}" in first and second.strip().startswith(told[1])


def test_it_needs_no_torch():
    code = """
        import sys
        from peftlab.memory import estimate
        estimate("llama-2-70b", "qlora", r=16, targets="all-linear", checkpointing=True)
        heavy = {"torch", "transformers", "numpy", "peft"} & set(sys.modules)
        sys.exit(f"imported: {heavy}" if heavy else 0)
    """
    subprocess.run([sys.executable, "-c", "\n".join(line.strip() for line in code.splitlines())], check=True)


def test_gptj_has_no_fused_attention_before_transformers_5_24():
    config = {"model_type": "gptj", "n_embd": 256, "n_head": 4, "n_layer": 2, "rotary_dim": 16, "vocab_size": 1000}

    def peak(**settings):
        return estimate(config, "lora", batch=2, sequence=1024, **settings).peak_bytes

    separate = peak(attention="eager", transformers="5.24.0")
    assert separate == peak(transformers="5.23.4") == peak(transformers="5.15") > 1.1 * peak(transformers="5.24.0")
    assert peak() in (separate, peak(transformers="5.24.0"))  # of the installed one


def test_an_estimate_reads_as_a_line():
    text = str(estimate("llama-2-7b", "lora", checkpointing=True))
    assert text.startswith("llama-2-7b, lora: peak 13.9") and "GB in backward (weights 13.48, " in text


MEASURED = measurements.results("memory")
RUNS = [row for row in MEASURED if row["section"] in ("grid", "unseen")]
SETTINGS = (
    "shape", "method", "r", "targets", "batch", "sequence", "precision", "optimizer", "checkpointing", "attention",
)  # fmt: skip


@functools.cache
def said_and_noted() -> list[tuple[int, int]]:
    """(predicted, measured) of all RUNS, in bytes; each is predicted once for all tests."""
    release = MEASURED.provenance["versions"]["transformers"]
    return [(estimate(**{name: row[name] for name in SETTINGS}, transformers=release).peak_bytes, row["peak_bytes"])
            for row in RUNS]


def differences(section: str) -> list[float]:
    """|predicted / measured - 1| of the runs of a section of `peftlab bench memory`."""
    pairs = zip(RUNS, said_and_noted(), strict=True)
    return [abs(said / noted - 1) for row, (said, noted) in pairs if row["section"] == section]


@pytest.mark.parametrize("section", ["grid", "unseen"])
def test_estimates_are_what_a_gpu_measured(section):
    """The promise is 3% in the median and 10% at most; what was reached is held, so that it stays."""
    assert MEASURED.provenance["gpu"].startswith("NVIDIA H")
    found = differences(section)
    assert len(found) >= {"grid": 40, "unseen": 25}[section]
    assert statistics.median(found) < 0.01 and max(found) < 0.03


OWN = [
    *measurements.results("lora").where(section="fullsize", library=["peft", "peftlab"], r=16, adapter_dtype="float32"),
    *measurements.results("qlora").where(section=["seven", "sixteen"], kind="step", library=["peft", "peftlab"]),
]


@pytest.mark.parametrize("row", OWN, ids=lambda row: f"{row['library']}-{row['method']}-{row['batch']}-"
                         f"{row['checkpointing']}-{row['section']}")  # fmt: skip
def test_the_layers_of_either_library_are_what_a_gpu_measured(row):
    said = estimate(
        row["shape"], row["method"], r=16, targets="all-linear", batch=row["batch"], sequence=row["sequence"],
        checkpointing=row["checkpointing"], autocast=True, library=row["library"],
    )  # fmt: skip
    assert said.peak_bytes == pytest.approx(row["peak_bytes"], rel=0.01)


@pytest.mark.parametrize("method", ["full", "lora", "qlora", "qlora, checkpointing"])
def test_a_whole_step_is_what_a_gpu_noted(method):
    """Not the peak alone: over all moments of the step the two lines lie within 5% of one another in the mean."""
    name, _, checkpointing = method.partition(", ")
    rows = MEASURED.where(section="timeline", method=name, checkpointing=bool(checkpointing)).rows
    said = [size for _, size in estimate(**{setting: rows[0][setting] for setting in SETTINGS}).history]
    noted = [row["bytes"] for row in rows]
    assert max(said) == pytest.approx(max(noted), rel=0.02)
    apart = [abs(said[i * len(said) // len(noted)] / size - 1) for i, size in enumerate(noted)]
    assert statistics.fmean(apart) < 0.05


def test_the_margin_covers_every_run_that_was_measured():
    """The documentation gives these numbers: 87 runs, 84 of them above the estimate, the worst by 1.9% of itself."""
    pairs = list(said_and_noted())
    assert len(pairs) == 87 and sum(said < noted for said, noted in pairs) == 84
    assert round(max(1 - said / noted for said, noted in pairs), 3) == 0.019
    (context,) = MEASURED.where(section="context").column("bytes")
    families = measurements.results("memory_families")
    release = families.provenance["versions"]["transformers"]
    pairs += [(estimate(**family_runs.arguments_of(row), transformers=release).peak_bytes, row["peak_bytes"])
              for row in families]
    errors = [said / noted - 1 for said, noted in pairs]
    told = cards.RUNS, cards.LOWEST, cards.HIGHEST
    assert (len(errors), round(min(errors), 3), round(max(errors), 3)) == told
    for said, noted in pairs:
        assert cards.with_margin(said) > noted + context


def test_what_the_command_tells_of_a_margin(capsys):
    assert cli.main(["memory", "smollm2-135m"]) == 0
    peak = estimate("smollm2-135m").peak_bytes
    told = " ".join(capsys.readouterr().out.split())
    assert f"with a margin {1.03 * peak / 1e9 + 0.7:.2f} GB" in told


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("--method lora", "autocast none; for Trainer(bf16=True) add --autocast"),
        ("--method lora --autocast", "autocast bf16"),
        ("--method qlora", "autocast bf16"),
        ("--method qlora --no-autocast", "autocast none; for"),
        ("--method lora --precision fp32", "autocast none reached"),
        ("--method full --precision mixed", "autocast bf16"),
    ],
)
def test_the_command_says_whether_it_counts_with_autocast(line, told, capsys):
    assert cli.main(["memory", "smollm2-135m", *line.split()]) == 0
    rows = [" ".join(row.split()) for row in capsys.readouterr().out.splitlines()]
    (row,) = [row for row in rows if row.startswith("autocast")]
    assert f"{row} reached".startswith(told)


def test_the_fused_adamw_is_what_a_gpu_measured():
    """`peftlab bench lora` trains in full with `fused=True`; the others of these runs are with `foreach=False`."""
    rows = measurements.results("lora").where(section="fullsize", method="full")
    assert len(rows) >= 4
    for row in rows:
        run = {name: row[name] for name in ("batch", "sequence", "checkpointing")}
        said = estimate(row["shape"], "full", optimizer="adamw-fused", **run).peak_bytes
        assert said == pytest.approx(row["peak_bytes"], rel=0.002)


@pytest.mark.parametrize("file", ["memory_optimizers", "circulating"])
def test_each_optimizer_is_what_a_gpu_measured(file):
    """Nine runs with torch's AdamW in its three forms, and three that hold 8, 12 and 16 bytes for each parameter."""
    found = measurements.results(file)
    for row in found:
        given = {name: row[name] for name in row if name not in ("section", "held", "bytes_each", "peak_bytes",
                                                                 "reserved_bytes", "run")}  # fmt: skip
        said = estimate(**given, transformers=found.provenance["versions"]["transformers"]).peak_bytes
        assert said == pytest.approx(row["peak_bytes"], rel=0.0003)


def test_the_temporaries_of_each_adamw():
    """One after another for each parameter, for all parameters at once, or none."""
    shape = load_shape({**BUILT_IN["llama-3.2-1b"], "tie_word_embeddings": False})
    run = {"precision": "fp32", "sequence": 8}
    peaks = {name: estimate(shape, "full", optimizer=name, **run) for name in ("adamw", "adamw-foreach", "adamw-fused")}
    tensors = len([module for module in shape.modules if not module.tied])
    largest_weight = max(module.parameters for module in shape.modules)
    there = 16 * shape.parameters + CUBLAS_WORKSPACE  # weights, gradients, two states
    assert peaks["adamw"].peak_bytes == near(there + 2 * 4 * largest_weight, 6 * tensors)
    assert peaks["adamw-foreach"].peak_bytes == near(there + 4 * shape.parameters, 6 * tensors)
    assert there <= peaks["adamw-fused"].peak_bytes < there + 2 * 4 * largest_weight  # the peak may be elsewhere
    tied = estimate("llama-3.2-1b", "full", optimizer="adamw-fused", **run).peak_bytes
    there = 16 * load_shape("llama-3.2-1b").parameters + CUBLAS_WORKSPACE
    assert tied == near(there + 2 * 4 * largest_weight, 6 * tensors)  # the embedding's gradient, and the sum of the two
    assert len({found.optimizer for found in peaks.values()}) == 1


def test_any_method_on_a_base_in_four_bits(capsys):
    """The base takes what QLoRA's does. Full fine-tuning has no codes to train, and qlora no other base."""
    assert estimate("llama-3.2-1b", "lora", four_bit=True) == replace(estimate("llama-3.2-1b", "qlora"), method="lora")
    for method in ("dora", "adalora", "vera", "loha", "ia3", "prompt"):
        told = {"library": "peftlab", "autocast": True}
        codes, plain = (estimate("llama-3.2-1b", method, four_bit=bits, **told) for bits in (True, False))
        assert codes.weights == estimate("llama-3.2-1b", "qlora").weights < plain.weights
        assert codes.peak_bytes < plain.peak_bytes
    with pytest.raises(PeftLabError, match="full trains the weights themselves; codes do not train. Use qlora"):
        estimate("llama-3.2-1b", "full", four_bit=True)
    with pytest.raises(PeftLabError, match="four_bit=False, and qlora is a method on a base in four bits. Use lora"):
        estimate("llama-3.2-1b", "qlora", four_bit=False)
    with pytest.raises(PeftLabError, match="peft's DoRA on a base in four bits is not replayed"):
        estimate("llama-3.2-1b", "dora", four_bit=True)
    assert cli.main(["memory", "llama-3.2-1b", "--method", "vera", "--four-bit"]) == 0
    assert "vera on a base in four bits, " in capsys.readouterr().out


@pytest.mark.parametrize("on", [True, False])
def test_an_estimate_runs_without_the_cycle_collector_and_leaves_it_as_it_was(on, monkeypatch):
    seen = []
    real = Run.second_step
    monkeypatch.setattr(Run, "second_step", lambda run: (seen.append(gc.isenabled()), real(run))[1])
    was = gc.isenabled()
    (gc.enable if on else gc.disable)()
    try:
        estimate("gpt2", "lora", batch=1, sequence=8)
        assert (seen, gc.isenabled()) == ([False], on)
        monkeypatch.setattr(Run, "second_step", lambda run: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            estimate("gpt2", "lora", batch=1, sequence=8)
        assert gc.isenabled() is on
    finally:
        (gc.enable if was else gc.disable)()


@pytest.mark.parametrize("name", ["r", "labels", "gpus", "batch", "sequence"])
def test_what_a_person_chooses_has_one_ceiling(name):
    with pytest.raises(PeftLabError, match="16,777,216"):
        estimate("minilm", "lora", **{name: 2**24 + 1})


def test_a_version_that_is_none_is_told_for_every_model():
    for shape in ("smollm2-135m", "t5-base"):
        with pytest.raises(PeftLabError, match="transformers must be a version"):
            estimate(shape, sequence=16, transformers="newest")


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_no_token_goes_to_more_experts_than_there_are(family):
    config = {
        "model_type": family, "hidden_size": 64, "intermediate_size": 128, "moe_intermediate_size": 32,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 100,
        "num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 4,
    }  # fmt: skip
    estimate(config, sequence=16)
    with pytest.raises(PeftLabError, match="each token goes to 5 experts, and there are 4"):
        estimate({**config, "num_experts_per_tok": 5}, sequence=16)
