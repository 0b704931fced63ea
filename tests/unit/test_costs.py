"""What a run costs: hours, energy and money from a measured speed."""

import pytest

import peftlab as pl
from peftlab.errors import PeftLabError


def test_hours_energy_and_money_by_hand():
    # 36 million tokens at 10,000 a second take an hour; eight GPUs of 500 W use 4 kWh, and cost 8 x 3
    assert pl.run_cost(36e6, 10_000, gpus=8, watts=500, price=3) == (1.0, 8.0, 4.0, 24.0)
    assert pl.run_cost(36_000_000, 10_000.0) == (1.0, 1.0, None, None)
    assert pl.run_cost(36e6, 10_000, price=0).money == 0


@pytest.mark.parametrize("wrong", [{"tokens": 0}, {"tokens_per_second": 0}, {"gpus": 0}, {"watts": 0}, {"price": -1}])
def test_what_is_no_cost(wrong):
    (name,) = wrong
    with pytest.raises(PeftLabError, match=f"{name} must be"):
        pl.run_cost(**{"tokens": 1e6, "tokens_per_second": 1000, **wrong})


def test_a_cost_that_is_no_number_any_more_is_refused():
    for tokens, rate, more in ((1e308, 1e-300, {}), (1e300, 1, {"watts": 1e300}), (1e300, 1, {"price": 1e300})):
        with pytest.raises(PeftLabError, match="No run costs so much"):
            pl.run_cost(tokens, rate, **more)
