"""What the mechanism asks of a part, seen on parts that override one thing each."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from nets import Net, assert_same, snapshot, tokens
from torch import nn

import peftlab as pl
from peftlab.core.interface import Config, Part, Placement
from peftlab.core.targets import Targets, find


class Scaled(Part):
    """y times a learned number: the smallest part there is."""

    keys: ClassVar[dict[str, str]] = {"scale": "{path}.scale"}

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))


class Before(Scaled):
    def before(self, host, args, kwargs):
        return (args[0] * self.scale, *args[1:]), kwargs


class After(Scaled):
    def after(self, host, args, kwargs, output, base):
        return output * self.scale


class Merged(After):
    def merged(self, host):
        return {"weight": host.weight * self.scale, "bias": host.bias * self.scale}


@dataclass(frozen=True, kw_only=True)
class OneKind(Targets):
    kind: type[Part] = After

    method: ClassVar[str] = "one-kind"
    peft_type: ClassVar[str] = "ONE_KIND"

    def parts(self, model):
        for path in find(model, self):
            yield Placement(path, "scale", self.kind())

    def to_peft(self, model, hosts):
        return {}

    @staticmethod
    def from_peft(fields):
        return {}


def attached(kind, **settings):
    model = Net()
    return pl.attach(model, OneKind(kind=kind, target_modules=["head"], **settings))


@pytest.mark.parametrize("kind, pre, post", [(Scaled, 0, 0), (Before, 1, 0), (After, 0, 1), (Merged, 0, 1)])
def test_a_host_gets_hooks_only_for_what_its_parts_override(kind, pre, post):
    model = Net()
    before = snapshot(model)
    pl.attach(model, OneKind(kind=kind, target_modules=["head"]))
    assert (len(model.head._forward_pre_hooks), len(model.head._forward_hooks)) == (pre, post)
    plain = Net()(tokens())
    assert torch.equal(model(tokens()), plain) == (kind is Scaled)
    pl.detach(model)
    assert_same(before, snapshot(model))


def test_a_method_that_forgets_the_trained_copies_is_refused():
    """`Targets` has modules_to_save and task_type, and nothing would show that a head is not trained."""
    model = Net()
    before = snapshot(model)
    with pytest.raises(pl.PeftLabError, match="embed is to train.*OneKind.parts yields no copy.*trained_copies"):
        pl.attach(model, OneKind(target_modules=["head"], modules_to_save=["embed"]))
    assert_same(before, snapshot(model))


def test_a_part_without_merged_is_refused_and_the_model_is_as_it_was():
    model = attached(After)
    expected, before = model(tokens()), snapshot(model)
    with pytest.raises(pl.PeftLabError, match=r"'default' \(one-kind\) changes more than weights"):
        pl.merge(model)
    assert_same(before, snapshot(model))
    model = attached(Merged)
    pl.merge(model)
    assert torch.allclose(model(tokens()), expected, rtol=1e-12)


def test_each_row_gets_the_change_of_its_own_part_before_or_after():
    model = attached(After)
    alone = model(tokens())
    pl.attach(model, OneKind(kind=Before, target_modules=["head"]), name="other")
    other = model(tokens())
    with pl.disabled(model):
        plain = model(tokens())
    pl.activate(model, ["default", "other", None, "default"])
    assert torch.allclose(model(tokens()), torch.stack([alone[0], other[1], plain[2], alone[3]]), rtol=1e-12)


def test_what_is_no_config_is_named():
    assert isinstance(OneKind(), Config) and not isinstance(Net(), Config)
    for wrong in (OneKind, "lora", Net()):
        with pytest.raises(pl.PeftLabError, match="make one of"):
            pl.attach(Net(), wrong)
