"""The three checks of a value: what they let pass, what they refuse, and what they say."""

import math
from dataclasses import dataclass
from fractions import Fraction

import numpy
import pytest
import torch

import peftlab as pl
from peftlab.checks import check_fields, checked, device, number, one_of, whole
from peftlab.errors import PeftLabError


@pytest.mark.parametrize("value", [3, numpy.int64(3), numpy.uint8(3)])
def test_whole_numbers_pass_as_int(value):
    for check in (whole, number):
        found = check("r", value, least=3, most=3)
        assert found == 3 and type(found) is int


@pytest.mark.parametrize("value", [0.5, numpy.float32(0.5), numpy.float64(0.5), Fraction(1, 2)])
def test_numbers_pass_as_float(value):
    found = number("dropout", value, above=0, below=1)
    assert found == 0.5 and type(found) is float


def test_whole_numbers_of_any_size_pass():
    assert whole("seed", -(10**400)) == -(10**400)


@pytest.mark.parametrize("value", [True, numpy.True_, 2.0, 2.5, "2", None, [2], math.nan, math.inf, 0, 9])
def test_what_is_no_whole_number_within_the_limits_is_refused(value):
    with pytest.raises(PeftLabError) as caught:
        whole("r", value, least=1, most=8)
    assert str(caught.value) == f"r must be a positive whole number of at most 8, found {value!r}."


@pytest.mark.parametrize("value", [False, numpy.True_, "1", None, math.nan, -math.inf, numpy.float32("nan"), 1, -0.1])
def test_what_is_no_number_within_the_limits_is_refused(value):
    with pytest.raises(PeftLabError) as caught:
        number("p", value, least=0, below=1)
    assert str(caught.value) == f"p must be a number of at least 0 and below 1, found {value!r}."


def test_each_limit_stands_where_it_says():
    assert [value for value in range(5) if passes(value, least=1, most=3)] == [1, 2, 3]
    assert [value for value in range(5) if passes(value, above=1, below=3)] == [2]


def passes(value, **limits):
    try:
        return number("x", value, **limits) == value
    except PeftLabError:
        return False


def test_none_passes_where_it_may():
    assert whole("width", None, least=1, optional=True) is None
    with pytest.raises(PeftLabError, match="alpha must be a positive finite number .usually 16., found 0"):
        number("alpha", 0, above=0, usual="16", optional=True)


def test_one_of_returns_the_known_value():
    assert type(one_of("init", numpy.str_("zero"), ("zero", "random"))) is str
    assert one_of("checkpointing", True, (True, False, "reentrant")) is True
    assert one_of("backend", "b", {"a": 1, "b": 2}) == "b"


@pytest.mark.parametrize("value", ["radom", None, 3, ["random"], {"random": 1}])
def test_one_of_refuses_everything_else(value):
    with pytest.raises(PeftLabError) as caught:
        one_of("init", value, iter(["zero", "random"]))
    near = " Did you mean 'random'?" if "rad" in str(value) or isinstance(value, (list, dict)) else ""
    assert str(caught.value) == f"init must be one of 'zero', 'random'; found {value!r}.{near}"


def test_a_field_keeps_the_plain_value():
    @dataclass(frozen=True)
    class Config:
        r: int
        width: int

        def __post_init__(self):
            check_fields(self, whole, "r", "width", least=1)

    assert type(Config(numpy.int64(2), 3).r) is int
    with pytest.raises(PeftLabError, match="width must be"):
        Config(1, 0)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, numpy.float64("inf")])
def test_no_number_is_infinite(value):
    with pytest.raises(PeftLabError, match="weight must be a finite number, found"):
        number("weight", value)


def test_a_tensor_or_an_array_without_axes_is_its_number():
    for three in (numpy.array(3), torch.tensor(3), torch.tensor(3, requires_grad=False), numpy.int64(3)):
        found = whole("r", three, least=1)
        assert found == 3 and type(found) is int
    assert number("x", torch.tensor(0.5, dtype=torch.bfloat16)) == 0.5
    for none in (torch.tensor(True), torch.tensor(float("nan")), torch.ones(1), numpy.array("3"), numpy.array(1j),
                 torch.tensor(3, device="meta")):  # fmt: skip
        with pytest.raises(PeftLabError, match="x must be a"):
            number("x", none)


def test_a_checked_function_gets_the_number_of_a_tensor():
    assert taken(torch.tensor(4), rate=numpy.array(0.5)) == (4, 0.5, int, float)
    for wrong in ({"count": torch.tensor(0.5)}, {"count": torch.ones(2)}, {"count": 1, "rate": torch.tensor(True)}):
        with pytest.raises(PeftLabError, match="must be a"):
            taken(**wrong)


@checked()
def taken(count: int, rate: float = 1.0):
    return count, rate, type(count), type(rate)


@pytest.mark.parametrize("make", [
    lambda value: pl.LoRAConfig(alpha=value), lambda value: pl.AdaLoRAConfig(alpha=value),
    lambda value: pl.LoHaConfig(alpha=value), lambda value: pl.LoKrConfig(alpha_pattern={"q_proj": value}),
    lambda value: pl.LoRAConfig(alpha_pattern={"q_proj": value}), lambda value: pl.AdapterConfig(scaling=value),
])  # fmt: skip
def test_no_number_of_a_config_is_beyond_float32(make):
    """One that is fits no tensor: torch would raise in the middle of a step."""
    make(1e30)
    with pytest.raises(PeftLabError, match=r"must be a positive finite number of at most 1e\+30"):
        make(1e39)


@pytest.mark.parametrize("name", ["mps", "xpu", "xla"])
def test_a_device_that_is_not_here(name):
    if name == "mps" and torch.backends.mps.is_available():
        pytest.skip("this machine has one")
    with pytest.raises(PeftLabError, match=f"There is no device {name} here .*take cpu"):
        device(name, torch)
    assert device("cpu", torch).type == "cpu" and device("meta", torch).type == "meta"
