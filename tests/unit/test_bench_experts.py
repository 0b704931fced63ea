"""`peftlab bench experts`: both libraries train the same, and the model is given back as it was."""

import warnings

import pytest
import torch

import peftlab as pl
from peftlab.bench import experts, models, timing
from peftlab.errors import PeftLabError

TINY = {
    **experts.SHAPE, "vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
    "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 2,
}  # fmt: skip


@pytest.fixture(autouse=True)
def no_model_held():
    models.let_go()
    yield
    models.let_go()


def test_equally_many_parameters_train_at_the_real_sizes():
    import transformers

    with torch.device("meta"):
        config = transformers.AutoConfig.for_model(**experts.SHAPE)
        model = transformers.AutoModelForCausalLM.from_config(config)
    counts = []
    for fields, r in experts.TARGETS.values():
        counts.append(pl.count_parameters(pl.attach(model, pl.LoRAConfig(r=r, **fields))).trainable)
        pl.detach(model)
    assert max(counts) < 1.05 * min(counts)


def test_points_are_measured_and_the_model_is_as_before(monkeypatch):
    pytest.importorskip("peft")
    monkeypatch.setattr(timing, "timed", lambda step, repeats, warm_up: [step() or 1.0])
    monkeypatch.setattr(models, "release", lambda: None)
    trained, before = {}, {}
    for point in experts.points():
        small = {**point, "shape": TINY, "sequence": 8}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft names patterns that do match
            (row,) = experts.measure(small, torch.device("cpu"))
        assert row["seconds"] == 1.0 and row["layers"] == 1 and "timed" not in row
        trained.setdefault((point["targets"], point["checkpointing"]), set()).add(row["trainable"])
        (model,) = models._held.values()
        state = {name: value.clone() for name, value in model.state_dict().items()}
        same = before.setdefault(point["four_bit"], state)
        assert list(state) == list(same) and all(torch.equal(value, same[name]) for name, value in state.items())
        assert row["base_bytes"] < (0.5 if point["four_bit"] else 1.1) * sum(v.nbytes for v in before[False].values())
    assert all(len(each) == 1 for each in trained.values()) and len(trained) == 5
    if not torch.cuda.is_available():
        with pytest.raises(PeftLabError, match="measures a mixture of experts and needs a CUDA GPU"):
            experts.measure(point)
