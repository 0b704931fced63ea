"""What a run costs in GPU hours, energy and money, from the tokens per second that were measured.

Nothing here knows a price, a power or a speed. The speed comes from a measurement, such as `pl.results("speed")`. The
price and the power are the reader's own.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from peftlab.checks import checked, number, whole
from peftlab.errors import PeftLabError

HOUR = 3600  # seconds


class RunCost(NamedTuple):
    """What a run costs.

    Attributes:
        hours: from its start to its end.
        gpu_hours: hours times GPUs, which is what is paid for.
        kwh: energy of the GPUs in kilowatt hours, or None where no power was given.
        money: in the currency of the price, or None where no price was given.
    """

    hours: float
    gpu_hours: float
    kwh: float | None
    money: float | None


@checked()
def run_cost(
    tokens: float,
    tokens_per_second: float,
    *,
    gpus: int = 1,
    watts: float | None = None,
    price: float | None = None,
) -> RunCost:
    """Return the hours, the energy and the money of a training run.

        hours = tokens / (3600 tokens per second)        kWh = hours GPUs watts / 1000        money = hours GPUs price

    Time for loading, evaluation and saving comes on top, and so do the runs that you throw away.

    Args:
        tokens: all tokens that pass through training: tokens of the data set, padding included, times epochs.
        tokens_per_second: of the whole run, all its GPUs together, measured with the same model, method, batch and
            length.
        gpus: how many GPUs it runs on.
        watts: the mean power of one GPU, with its share of the host and of the cooling if you want these counted.
        price: of one GPU for one hour, in any currency.

    Returns:
        `hours`, `gpu_hours`, `kwh`, `money`; the last two are None without watts and without a price.

    Raises:
        PeftLabError: an argument is not a number above zero (`price` may be zero), or the cost is no number any more.

    >>> pl.run_cost(100e6, 5000, watts=700, price=2.0)
    RunCost(hours=5.55..., gpu_hours=5.55..., kwh=3.88..., money=11.11...)
    """
    tokens = number("tokens", tokens, above=0)
    rate = number("tokens_per_second", tokens_per_second, above=0)
    gpus = whole("gpus", gpus, least=1, ceiling=10**6)
    watts = number("watts", watts, above=0, optional=True)
    price = number("price", price, least=0, optional=True)
    hours = tokens / rate / HOUR
    paid = hours * gpus
    found = RunCost(
        hours, paid, None if watts is None else paid * watts / 1000, None if price is None else paid * price
    )
    if any(value is not None and math.isinf(value) for value in found):
        raise PeftLabError(f"No run costs so much ({paid:g} GPU hours); look at tokens, their rate and the price.")
    return found
