"""Which methods have a place in which built-in shapes. This file loads no torch."""

import re

from peftlab.errors import PeftLabError
from peftlab.memory import BUILT_IN, count

# The methods that fit every built-in shape. A method that you add may be for some architectures alone.
EVERYWHERE = "full lora qlora dora adalora vera prompt p-tuning prefix".split()
NO_PLACE = (
    "has none of the modules that the method adapts by default|has no biases, so bitfit|is not simply added to"
    "|names of the keys, values and feed-forward of"
)


def has_place(method, shape) -> bool:
    """Say whether a method has a place in a shape. If it has none, `count` must say so in one line."""
    try:
        count(shape, method)
    except PeftLabError as error:
        if method in EVERYWHERE or not re.search(NO_PLACE, str(error)):
            raise
        return False
    return True


def shape_for(method) -> str:
    """The first built-in shape in which a method has a place."""
    return next(name for name in ("bert-base", "gpt2", *BUILT_IN) if has_place(method, name))
