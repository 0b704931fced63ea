"""The fast path against the plain one in float64: losses, gradients, steps; and the reasons where it cannot run."""

import math
from contextlib import contextmanager, nullcontext

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import examples, llama, tokenizer
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import peftlab as pl
from peftlab.fast import Refused
from peftlab.fast.step import Graphs, Step, read_batch, round_up
from peftlab.training.eligible import decoder_of
from peftlab.training.losses import causal_lm_loss
from peftlab.training.packing import pack

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SIZES = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": None,
}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
MODELS = {
    "one head of keys a query": (LlamaForCausalLM, LlamaConfig, {"num_key_value_heads": 4}),
    "grouped": (LlamaForCausalLM, LlamaConfig, {}),
    "wide heads": (LlamaForCausalLM, LlamaConfig, {"head_dim": 12}),
    "tied head": (LlamaForCausalLM, LlamaConfig, {"tie_word_embeddings": True}),
    "biases everywhere": (LlamaForCausalLM, LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
    "rope of Llama 3": (LlamaForCausalLM, LlamaConfig, {"rope_parameters": LLAMA3}),
    "yarn": (LlamaForCausalLM, LlamaConfig, {"rope_parameters": YARN}),
    "dynamic rope": (LlamaForCausalLM, LlamaConfig, {"rope_parameters": DYNAMIC, "max_position_embeddings": 8}),
    "mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": None}),
    "mistral, short window": (MistralForCausalLM, MistralConfig, {"sliding_window": 5}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {}),
    "qwen2, window in the upper layers": (
        Qwen2ForCausalLM, Qwen2Config, {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 10}),
}  # fmt: skip
# Each two of the seven projections occur together, without one, and each alone
SUBSETS = [[name] for name in ALL] + [
    ["q_proj", "v_proj"], ["k_proj", "o_proj"], ["gate_proj", "down_proj"], ["q_proj", "up_proj"], ["v_proj", "o_proj"],
    ["q_proj", "k_proj", "v_proj", "o_proj"], ["gate_proj", "up_proj", "down_proj"], ["k_proj", "gate_proj"],
]  # fmt: skip


def make(kind: str = "grouped", dtype: torch.dtype = torch.float64, seed: int = 0, **changes) -> nn.Module:
    cls, config, own = MODELS[kind]
    torch.manual_seed(seed)
    model = cls(config(**{**SIZES, **own, **changes})).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.3)
    model.config.use_cache = False
    return model.requires_grad_(False)


def adapt(model: nn.Module, targets: list[str] = ALL, dtype: torch.dtype | None = None, **settings) -> nn.Module:
    torch.manual_seed(1)
    config = {"r": 3, "alpha": 7, "init": "random", **settings}
    return pl.attach(model, pl.LoRAConfig(target_modules=targets, **config), adapter_dtype=dtype).train()


def padded(side: str = "right", b: int = 3, s: int = 11, seed: int = 2) -> dict:
    ids = torch.randint(0, 61, (b, s), generator=torch.Generator().manual_seed(seed))
    labels, mask = ids.clone(), torch.ones_like(ids)
    labels[0, :5] = -100
    gone = slice(s - 4, s) if side == "right" else slice(0, 4)
    mask[1, gone], labels[1, gone] = 0, -100
    labels[1, 4] = -100  # with padding on the left, the first token would be predicted from it
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def in_rows() -> dict:
    batch = padded(b=6)
    for row, length in enumerate((3, 11, 6, 2, 5, 4)):
        batch["attention_mask"][row] = (torch.arange(11) < length).long()
        batch["labels"][row, length:] = -100
    return pack(batch)


def plain_gradients(model: nn.Module, batch: dict) -> tuple[torch.Tensor, dict]:
    total, count = causal_lm_loss(model, batch)
    (total / count).backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad(set_to_none=True)
    return total.detach(), found


@contextmanager
def borrowed(model: nn.Module, recompute: bool = False, dtype: torch.dtype = torch.float64):
    step = Step(decoder_of(model), dtype, 99 * recompute)
    try:
        step.flat.begin()
        yield step
    finally:
        step.give_back()


def fast_gradients(model: nn.Module, batch: dict, recompute: bool = False, rounded: bool = False, dtype=torch.float64):
    with borrowed(model, recompute, dtype) as step:
        read = read_batch(batch, rounded)
        total = step.gradients(read, step.rows(read), 1 / read.learned.to(total_dtype(dtype)))
        return total, {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def total_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def check(model: nn.Module, batch: dict, share: float = 1e-9, **how) -> None:
    wanted, gradients = plain_gradients(model, batch)
    total, found = fast_gradients(model, batch, **how)
    assert float(total) == pytest.approx(float(wanted), rel=share)
    assert gradients.keys() == found.keys() and gradients
    for name, gradient in gradients.items():
        assert gradient.norm() > 0
        assert (found[name] - gradient).norm() < share * gradient.norm(), name


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("kind", MODELS)
def test_loss_and_gradients(kind, recompute):
    check(adapt(make(kind)), padded(), recompute=recompute)


@pytest.mark.parametrize("kind", ["grouped", "mistral, short window", "qwen2, window in the upper layers", "qwen3"])
def test_packed_rows(kind):
    check(adapt(make(kind)), in_rows())
    check(adapt(make(kind)), in_rows(), recompute=True, rounded=True)


@pytest.mark.parametrize("targets", SUBSETS, ids="+".join)
def test_any_of_the_projections(targets):
    for layers in (None, [1, 2]):
        model = adapt(make("qwen2"), targets, layers_to_transform=layers)
        check(model, padded(), recompute=layers is None)


def test_eager_attention_rounds_its_softmax_to_float32():
    model = adapt(make())
    model.set_attn_implementation("eager")
    check(model, padded(), share=1e-5)


def test_ranks_and_scalings_of_their_own():
    patterns = {"rank_pattern": {"k_proj": 5, "layers.1.mlp.*": 1}, "alpha_pattern": {"o_proj": 2, "layers.0.*": 11}}
    check(adapt(make(), **patterns), padded())
    check(adapt(make(), use_rslora=True, **patterns), padded(), recompute=True)


def test_sizes_rounded_up_change_nothing():
    check(adapt(make("dynamic rope")), padded(), rounded=True)


def test_a_base_in_four_bits():
    model = pl.quantize_model(make(hidden_size=64, intermediate_size=64).float())
    adapt(model)
    want = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    total, want = plain_gradients(model, padded())
    for recompute in (False, True):
        found_total, found = fast_gradients(model, padded(), recompute, dtype=torch.float32)
        assert float(found_total) == pytest.approx(float(total), rel=1e-5)
        for name, gradient in want.items():
            assert (found[name] - gradient).norm() < 1e-4 * gradient.norm(), name


def test_bfloat16_is_as_near_to_float32_as_autocast_is():
    """Of a bfloat16 base, the median error of a gradient, and of a float32 base, whose stream stays in float32."""
    for base in (torch.bfloat16, torch.float32):
        model = adapt(make("qwen3", num_hidden_layers=4).to(base), dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(0.3 if parameter.ndim > 1 else 1)
        with torch.autocast("cpu", torch.bfloat16):
            _, autocast = plain_gradients(model, padded())
        _, fast = fast_gradients(model, padded(), dtype=torch.bfloat16)
        _, exact = plain_gradients(model.float(), padded())

        def error(found: dict, exact: dict = exact) -> float:
            return float(torch.stack([(found[name] - g).norm() / g.norm() for name, g in exact.items()]).median())

        assert 0 < error(fast) < 1.1 * error(autocast)


# ------------------------------------------------------------------------------------------------------------- a run


def trained(fast, steps: int = 10, kind=None, **settings):
    model = llama(dtype=torch.float64) if kind is None else make(kind)
    adapt(model, r=2, init="kaiming")
    given = {"steps": steps, "batch_size": 4, "learning_rate": 1e-2, "progress": False, "fast": fast, **settings}
    history = pl.train(model, examples(), tokenizer=tokenizer(), **given)
    return history, model


def assert_equal_runs(one, other):
    (history, model), (wanted, plain) = one, other
    for row, want in zip(history.steps, wanted.steps, strict=True):
        for key, value in want.items():
            assert row[key] == pytest.approx(value, rel=1e-9), key
    for row, want in zip(history.evaluations, wanted.evaluations, strict=True):
        assert row == pytest.approx(want, rel=1e-9)
    for (name, p), (_, q) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        assert (p - q).norm() <= 1e-9 * q.norm(), name


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"accumulation": 3, "batch_size": 3},
        {"packing": True, "batch_size": 6},
        {"weight_decay": 0.1, "warmup": 3, "schedule": "cosine"},
        {"max_grad_norm": 0.05, "checkpointing": True},
        {"checkpointing": "pinned"},
        {"checkpointing": 1},
        {"evaluation_data": examples(5, seed=1), "evaluate_every": 3, "restore_best": True, "group_by_length": True},
        {"optimizer": "sgd", "learning_rate": 1.0},
        {"collate": pl.Collator(tokenizer(), side="left")},
    ],
    ids=lambda settings: "+".join(settings) or "plain",
)
def test_ten_steps(settings):
    fast, plain = trained(True, **settings), trained(False, **{**settings, "checkpointing": False})
    assert fast[0].path.startswith("fast") and plain[0].path == "plain: fast=False"
    assert_equal_runs(fast, plain)


def test_the_same_seed_gives_the_same_run():
    (one, model), (other, again) = trained("auto"), trained("auto")
    assert one.path.startswith("fast") and one.steps == other.steps
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))


class Killed(Exception):
    pass


def test_a_run_goes_on_with_the_other_path(tmp_path):
    def until(last):
        def callback(model, row):
            if row["step"] == last:
                raise Killed

        return callback

    run = {"folder": tmp_path, "save_every": 1}
    for fast, last in ((True, 3), (False, 6), (True, 8)):
        with pytest.raises(Killed):
            trained(fast, callback=until(last), **run)
    history, model = trained(False, **run)
    assert_equal_runs((history, model), trained(False))


def test_states_have_the_form_of_the_plain_ones(tmp_path):
    from peftlab.training import files

    found = {}
    for fast in (True, False):
        trained(fast, folder=tmp_path / str(fast))
        record, tensors = files.read(files.newest(tmp_path / str(fast)))
        found[fast] = {key: (tensor.shape, tensor.dtype) for key, tensor in tensors.items()}, record["optimizer"]
    assert found[True] == found[False] and any("exp_avg_sq" in key for key in found[True][0])


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_its_own_again(fails):
    model = adapt(make("tied head"))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    objects = list(model.parameters())

    def callback(model, row):
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        model(input_ids=torch.tensor([[1, 2]]))  # a user may look at the model
        if fails:
            raise Killed

    try:
        pl.train(model, examples(), tokenizer=tokenizer(), steps=2, fast=True, progress=False, callback=callback)
    except Killed:
        assert fails
    now = model.state_dict()
    assert [id(p) for p in model.parameters()] == [id(p) for p in objects]
    for name, tensor in state.items():
        assert torch.equal(now[name], tensor) == ("peftlab" not in name), name
        assert now[name].is_contiguous() and now[name].untyped_storage().nbytes() == now[name].nbytes
    assert all(p.grad is None for p in model.parameters())
    pl.detach(model)
    assert not any("peftlab" in name for name in model.state_dict())


def test_a_callback_may_put_other_values_in_a_parameters_place():
    def callback(model, row):
        for p in model.parameters():
            if p.requires_grad:
                p.data = p.data * 0.9

    assert_equal_runs(trained(True, callback=callback), trained(False, callback=callback))


def test_a_run_inside_a_run():
    def callback(model, row):
        if row["step"] == 2:
            pl.train(model, examples(), tokenizer=tokenizer(), steps=1, progress=False, fast=fast)

    runs = []
    for fast in (True, False):
        runs.append(trained(fast, steps=4, callback=callback))
    assert_equal_runs(*runs)


@pytest.mark.parametrize(
    "change",
    [
        pl.merge,
        pl.detach,
        lambda model: pl.activate(model, {"default": 0.5}),
        lambda model: next(p for p in model.parameters() if p.requires_grad).requires_grad_(False),
        lambda model: model.to(torch.float32),
    ],
    ids=["merge", "detach", "activate", "freeze", "to"],
)
def test_what_a_callback_may_not_change(change):
    with pytest.raises(pl.PeftLabError, match="the fast path cannot follow. Undo it before the callback ends"):
        trained("auto", steps=3, callback=lambda model, row: change(model))


@pytest.mark.filterwarnings("ignore:.*adapter")
def test_a_callback_may_save_the_base(tmp_path):
    model = adapt(make("qwen2"))
    base = {name: tensor.clone() for name, tensor in model.state_dict().items() if "peftlab" not in name}

    def callback(model, row):
        model.save_pretrained(tmp_path)
        save_file(dict(model.model.state_dict()), tmp_path / "inner")

    pl.train(model, examples(), tokenizer=tokenizer(), steps=1, fast=True, progress=False, callback=callback)
    saved = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(saved[name], tensor) for name, tensor in base.items())
    assert not any(module._state_dict_hooks for module in model.modules() if isinstance(module, nn.Linear))


def test_a_base_that_does_not_fit_twice_stays_as_it_is(monkeypatch):
    model = adapt(make())
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def full(parameters):
        raise torch.OutOfMemoryError

    monkeypatch.setattr("peftlab.fast.step.Flat", full)
    with pytest.raises(torch.OutOfMemoryError):
        Step(decoder_of(model), torch.float64, 0)
    for name, tensor in model.state_dict().items():
        assert torch.equal(state[name], tensor) and tensor.is_contiguous(), name


def test_a_run_that_has_no_room_for_its_numbers_gives_the_base_back(monkeypatch):
    model = adapt(make())

    def full(x):
        raise torch.OutOfMemoryError

    monkeypatch.setattr("peftlab.training.fast_path.wide", full)
    with pytest.raises(torch.OutOfMemoryError):
        pl.train(model, examples(), tokenizer=tokenizer(), steps=1, fast=True, progress=False)
    assert not any(module._state_dict_hooks for module in model.modules())
    for name, tensor in model.state_dict(keep_vars=True).items():
        assert tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes, name


@pytest.mark.parametrize("ends", [True, False], ids=["ends", "broken off"])
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("four_bit", [False, True], ids=["dense", "4-bit"])
def test_a_step_forgets_the_one_before(monkeypatch, ends, recompute, four_bit):
    model, how = make(hidden_size=64, intermediate_size=64).float(), {"recompute": recompute, "dtype": torch.float32}
    adapt(pl.quantize_model(model) if four_bit else model)
    wanted, gradients = fast_gradients(model, padded(), **how)
    trained = [p for p in model.parameters() if p.requires_grad]

    def broken_off(*_):
        raise Killed

    with borrowed(model, **how) as step, torch.no_grad():
        read = read_batch(padded())
        rows, scale = step.rows(read), 1 / read.learned.float()
        torch._foreach_mul_(trained, 2)
        with monkeypatch.context() as patch, nullcontext() if ends else pytest.raises(Killed):
            if not ends:
                patch.setattr(step, "_loss", broken_off)
            step.gradients(read._replace(ids=read.ids.flip(1)), rows, scale)
        torch._foreach_mul_(trained, 0.5)
        step.flat.begin()
        assert torch.equal(step.gradients(read, rows, scale), wanted)
        for name, p in model.named_parameters():
            assert not p.requires_grad or torch.equal(p.grad, gradients[name]), name


def test_weights_are_lent_and_not_copied():
    model = adapt(make())
    with borrowed(model) as step:
        block, group = model.model.layers[0], step.blocks[0].qkv
        rows = [linear.weight.data_ptr() for linear in (block.self_attn.q_proj, block.self_attn.k_proj)]
        assert rows[0] == group.whole.data_ptr()
        assert rows[1] == group.whole[block.self_attn.q_proj.out_features :].data_ptr()


def test_a_batch_that_it_cannot_read_is_computed_by_the_plain_path():
    def collate(rows):
        batch = pl.Collator(tokenizer())(rows)
        batch["attention_mask"][:, 1] = 0
        return batch

    fast, plain = trained("auto", collate=collate), trained(False, collate=collate)
    assert_equal_runs(fast, plain)
    assert "an attention mask that hides more than padding on the right" in fast[0].path
    with pytest.raises(pl.PeftLabError, match="fast=True, and .* hides more than padding"):
        trained(True, collate=collate)


def test_graphs_are_fed_with_each_batch(monkeypatch):
    """A stand-in for CUDA's graphs: what is recorded is not run, and a replay runs it on the tensors that it read."""
    calls, recording = [], []

    @contextmanager
    def record(graph, pool):
        recording.append(graph)
        yield
        recording.clear()

    class Graph:
        def replay(self):
            held, loss = self.recorded
            calls.append("replayed")
            loss.copy_(compute(*held))

    def gradients(self, *held):
        if not recording:
            calls.append("run")
            return compute(*held)
        recording[0].recorded = held, torch.zeros((), dtype=torch.float64)
        return recording[0].recorded[1]

    monkeypatch.setattr(torch.cuda, "graph", record)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    with borrowed(adapt(make("mistral, short window"))) as step:
        compute = step.gradients
        monkeypatch.setattr(Step, "gradients", gradients)
        graphs, scale = Graphs(step), torch.zeros((), dtype=torch.float64)
        batches = [padded(seed=seed) for seed in range(4)]
        for batch in [*batches, in_rows(), in_rows(), batches[0]]:
            read = read_batch(batch)
            results = []
            for how in (graphs.gradients, compute):
                step.flat.begin()
                scale.fill_(1 / read.learned)
                results.append((float(how(read, step.rows(read), scale)), step.flat.whole.grad.clone()))
            assert results[0][0] == results[1][0] and torch.equal(results[0][1], results[1][1])
    assert calls == ["run", "replayed", "replayed", "replayed", "run", "replayed", "replayed"]


# ------------------------------------------------------------------------------------------------------ what is refused


def hooked(model):
    model.model.layers[1].mlp.register_forward_hook(lambda *_: None)


def replaced(model):
    model.model.layers[1].mlp.forward = lambda x: x


def wider(model):
    model.model.layers[0].self_attn.o_proj = type("Mine", (nn.Linear,), {})(32, 32, bias=False).double()


REASONS = {
    "in memory that processes share": lambda: adapt(make()).share_memory(),
    "has dropout, 0.1": lambda: adapt(make(), dropout=0.1),
    "has lora_bias": lambda: adapt(make(), lora_bias=True),
    "which is none of the seven projections": lambda: adapt(make(), [*ALL, "lm_head"]),
    "has a LoRAEmbedding on model.embed_tokens": lambda: adapt(make(), ["q_proj", "embed_tokens"]),
    "has a TrainedCopy on lm_head": lambda: adapt(make(), modules_to_save=["lm_head"]),
    "has a TrainedBias on": lambda: adapt(make("qwen2"), bias="lora_only"),
    "parameters train that are no LoRA .* the first is lm_head": lambda: _head(),
    "no adapter is attached": lambda: make().requires_grad_(True),
    "has a IA3\\w* on": lambda: pl.attach(make(), pl.IA3Config(target_modules=["q_proj"], feedforward_modules=[])),
    "has a hook, hooked": lambda: _changed(hooked),
    "has a forward of its own": lambda: _changed(replaced),
    "is a Mine": lambda: _changed(wider, before=True),
    "not one adapter of weight 1": lambda: _two(),
    "its LoRA is in torch.bfloat16": lambda: adapt(make(), dtype=torch.bfloat16),
    "attention has dropout, 0.1": lambda: adapt(make(attention_dropout=0.1)),
    "activation is gelu": lambda: adapt(make(hidden_act="gelu")),
    "matrices of its LoRA are frozen": lambda: _frozen(),
    "is none of LlamaForCausalLM": lambda: adapt(_gpt2(), ["c_attn"]),
}


def _changed(change, before=False):
    model = make()
    if before:
        change(model)
        return adapt(model)
    adapt(model)
    change(model)
    return model


def _two():
    model = adapt(make())
    pl.attach(model, pl.LoRAConfig(r=2, target_modules=["q_proj"]), name="second")
    pl.activate(model, {"default": 0.5, "second": 0.5})
    return model.requires_grad_(True)


def _head():
    model = adapt(make())
    model.lm_head.weight.requires_grad_(True)
    return model


def _frozen():
    model = adapt(make())
    next(p for p in model.parameters() if p.requires_grad).requires_grad_(False)
    return model


def _gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=32, n_positions=16)).double()


def of_my_own(path):
    """A change that lets a part's class be one derived from it, with another forward."""

    def change(model):
        part = model.get_submodule(path)
        kind = type(part)
        part.__class__ = type("Own", (kind,), {"forward": lambda self, *a, **k: kind.forward(self, *a, **k)})

    return change


def set_to(path, name, value):
    return lambda model: setattr(model.get_submodule(path), name, value)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (of_my_own("model"), "model is a Own of test_fast, not of transformers"),
        (of_my_own("model.norm"), "model.norm is a Own"),
        (of_my_own("model.rotary_emb"), "model.rotary_emb is a Own"),
        (of_my_own("model.layers.1"), "model.layers.1 is a Own"),
        (of_my_own("model.layers.1.mlp"), "layers.1.mlp is a Own"),
        (of_my_own("model.layers.1.self_attn"), "layers.1.self_attn is a Own"),
        (of_my_own("model.layers.1.self_attn.k_norm"), "layers.1.self_attn.k_norm is a Own"),
        (of_my_own("model.layers.0.input_layernorm"), "layers.0.input_layernorm is a Own"),
        (set_to("model", "norm", nn.LayerNorm(32).requires_grad_(False)), "model.norm is a LayerNorm of torch"),
        (set_to("model.layers", "1", nn.Identity()), "model.layers.1 is a Identity of torch"),
        (set_to("model.layers.1", "mlp", nn.Identity()), "layers.1.mlp is a Identity of torch"),
        (set_to("model.layers.1.mlp", "act_fn", nn.GELU()), "mlp.act_fn is a GELU, not SiLU"),
        (set_to("model.layers.1.self_attn", "scaling", 0.1), "self_attn scales by 0.1"),
        (
            lambda it: setattr(it.model.layers[0], "input_layernorm", it.model.layers[1].mlp),
            "is a norm of the kind Qwen3MLP",
        ),
        (set_to("model.layers.1.input_layernorm", "variance_epsilon", 0.1), "several epsilons: 1e-06, 0.1"),
        (lambda model: setattr(model.config, "num_hidden_layers", 2), "3 blocks, of which its config lets 2 run"),
    ],
)
def test_a_part_that_computes_something_else_is_refused(change, reason):
    model = adapt(make("qwen3"))
    decoder_of(model)
    change(model)
    with pytest.raises(Refused, match=reason):
        decoder_of(model)


def test_a_model_that_was_asked_for_its_hidden_states_is_still_taken():
    """transformers leaves hooks in it that do nothing in a training step."""
    model, ids = make(), torch.tensor([[1, 2, 3]])
    model(ids, output_hidden_states=True)
    model.set_attn_implementation("eager")
    model(ids, output_attentions=True)
    decoder_of(adapt(model))
    hooked(model)
    with pytest.raises(Refused, match="has a hook, hooked"):
        decoder_of(model)


def test_a_hook_for_all_modules_is_refused():
    model = adapt(make())
    handle = nn.modules.module.register_module_forward_hook(lambda module, given, made: None)
    with pytest.raises(Refused, match="a hook is registered for all modules"):
        decoder_of(model)
    handle.remove()
    decoder_of(model)


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_without_gradients_it_leaves_the_error_to_the_plain_path(off):
    with off(), pytest.raises(pl.TrainingError, match="does not depend on any parameter"):
        trained("auto")


def test_a_forward_patched_into_a_class_is_refused(monkeypatch):
    model = adapt(make())
    monkeypatch.setattr(type(model.model.layers[0].mlp), "forward", lambda self, x: x)
    with pytest.raises(Refused, match="the forward of LlamaMLP was replaced by one of test_fast"):
        decoder_of(model)


@pytest.mark.parametrize("reason", REASONS)
def test_what_it_cannot_do_it_says(reason):
    model = REASONS[reason]()
    with pytest.raises(Refused, match=reason):
        decoder_of(model)


def test_the_reason_stands_in_the_error_and_in_the_report():
    model = adapt(llama(), dropout=0.1)
    given = {"tokenizer": tokenizer(), "steps": 1, "progress": False}
    with pytest.raises(pl.PeftLabError, match="fast=True, and the fast path cannot .* dropout, 0.1. Change that"):
        pl.train(model, examples(), fast=True, **given)
    assert pl.train(model, examples(), **given).path == "plain: 'default' has dropout, 0.1"
    with pytest.raises(pl.PeftLabError, match="checkpointing='pinned' is done by the fast path, .* dropout, 0.1. Use"):
        pl.train(model, examples(), checkpointing="pinned", **given)
    own = pl.train(model, examples(), loss=causal_lm_loss, **given)
    assert own.path == "plain: the loss is your own"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"token_type_ids": torch.zeros(3, 11)}, "the column 'token_type_ids'"),
        ({"attention_mask": torch.ones(3, 1, 11, 11)}, "an attention mask"),
        ({"attention_mask": padded("left")["attention_mask"]}, "an attention mask"),
        ({"labels": padded()["input_ids"]}, "predicted from padding"),
        ({"labels": torch.zeros(3)}, "no input_ids and labels"),
    ],
)
def test_batches_that_it_does_not_read(change, reason):
    with pytest.raises(Refused, match=reason):
        read_batch({**padded(), **change})


def test_sizes_are_rounded_up_to_a_few():
    sizes = {round_up(n) for n in range(1, 4097)}
    assert len(sizes) < 40 and all(n <= round_up(n) < max(n + 64, 1.15 * n) for n in range(1, 4097))
    assert all(math.gcd(size, 64) == 64 for size in sizes)
