"""Models of images, sound and sentences: LoRA and IA3 held to Hugging Face peft, convolutions among the targets."""

import copy
import warnings
from types import SimpleNamespace

import peft
import pytest
import test_images_and_sound as tiny_models
import torch
from pairs import give, live, our_state, peft_model, relative, three_steps
from torch import nn
from transformers import AutoConfig, BertConfig, BertModel, Wav2Vec2ForCTC

import peftlab as pl

SENTENCES = dict(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
                 hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)  # fmt: skip


class Sentences(nn.Module):
    """A sentence encoder as sentence-transformers runs it: the mean of the tokens' states, of length one."""

    def __init__(self):
        super().__init__()
        self.encoder = BertModel(BertConfig(**SENTENCES), add_pooling_layer=False)

    def forward(self, input_ids):
        states = self.encoder(input_ids=input_ids).last_hidden_state.mean(1)
        states = nn.functional.normalize(states, dim=-1)
        return SimpleNamespace(logits=states, loss=(states[0] - states[1]).square().sum())


def draw(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


IDS = torch.tensor([[3, 4, 5, 0], [7, 4, 9, 0]])
# model, its inputs, names of convolutions, those of them that IA3 takes
CASES = {
    "ViT": ("ViTForImageClassification", {"pixel_values": draw(2, 3, 16, 16), "labels": torch.tensor([0, 1])},
            ["projection"], True),
    "CLIP": ("CLIPModel", {"pixel_values": draw(2, 3, 16, 16), "input_ids": IDS, "return_loss": True},
             ["patch_embedding"], True),
    "Whisper": ("WhisperForConditionalGeneration", {"input_features": draw(2, 8, 60), "labels": IDS},
                [], False),  # peft cannot run with its convolutions: Whisper asks them for their stride
    "wav2vec2": ("Wav2Vec2ForCTC", {"input_values": draw(2, 400), "labels": torch.tensor([[3, 4], [5, 6]])},
                 ["conv_layers.0.conv", "conv_layers.1.conv"], False),
    "sentences": ("Sentences", {"input_ids": IDS}, [], False),
}  # fmt: skip


def base(case):
    torch.manual_seed(0)
    name = CASES[case][0]
    if name == "Sentences":
        model = Sentences()
    elif name == "Wav2Vec2ForCTC":
        model = Wav2Vec2ForCTC(AutoConfig.for_model("wav2vec2", **tiny_models.CTC))
    else:
        model = tiny_models.model_of(name)
    return model.double().eval()


def pair(case, method):
    """(ours, theirs), with the default targets and the convolutions."""
    model = base(case)
    _, _, convolutions, in_ia3 = CASES[case]
    names = {"sentences": ["query", "value"]}.get(case, ["q_proj", "v_proj"])
    if method == "lora":
        settings = dict(r=3, alpha=7, target_modules=[*names, *convolutions])
        theirs = peft_model(copy.deepcopy(model), **settings)
        pl.attach(model, pl.LoRAConfig(init="random", **settings))
    else:
        found = pl.attached(pl.attach(copy.deepcopy(model), pl.IA3Config()))["default"]
        assert found.target_modules is None
        ends = {"sentences": "output.dense", "wav2vec2": "output_dense"}.get(case, "fc2")
        names = ["key", "value", ends] if case == "sentences" else ["k_proj", "v_proj", ends]
        names += convolutions if in_ia3 else []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = peft.get_peft_model(copy.deepcopy(model), peft.IA3Config(
                target_modules=names, feedforward_modules=[ends], init_ia3_weights=False))  # fmt: skip
        same = {"target_modules": names, "feedforward_modules": [ends]} if in_ia3 else {}
        pl.attach(model, pl.IA3Config(init="random", **same))
    give(theirs, model)
    return model, theirs


def result(model, case):
    output = model(**CASES[case][1])
    return output.logits_per_text if case == "CLIP" else output.logits


class Answer(nn.Module):
    """A model whose output has `logits`, which CLIP's has not."""

    def __init__(self, model, case):
        super().__init__()
        self.model, self.name = model, "logits_per_text" if case == "CLIP" else "logits"

    def forward(self, **inputs):
        output = self.model(**inputs)
        return SimpleNamespace(logits=getattr(output, self.name), loss=output.loss)


@pytest.mark.parametrize("method", ["lora", "ia3"])
@pytest.mark.parametrize("case", CASES)
def test_same_numbers_and_folders_both_ways(case, method, tmp_path):
    ours, theirs = pair(case, method)
    assert pl.count_parameters(ours)[:2] == theirs.get_nb_trainable_parameters()
    before = result(ours, case).detach()
    inputs = CASES[case][1]
    three_steps(Answer(ours, case), Answer(theirs, case), inputs, lambda: (our_state(ours), live(theirs)))
    ours.eval(), theirs.eval()
    assert relative(result(ours, case), before) > 1e-6
    pl.save_adapter(ours, tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    loaded = peft.PeftModel.from_pretrained(base(case), str(tmp_path / "ours")).eval()
    assert relative(result(loaded, case), result(ours, case)) < 1e-9
    mine = pl.load_adapter(base(case), tmp_path / "theirs")
    assert relative(result(mine, case), result(ours, case)) < 1e-9
    expected = result(ours, case).detach()
    pl.merge(ours)
    assert relative(result(ours, case), expected) < 1e-9
    pl.unmerge(ours)
    assert torch.equal(result(ours, case), expected)
