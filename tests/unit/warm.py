"""What the warm process of `children` imports before it forks, so that no child has to."""

import nets  # noqa: F401
import peft  # noqa: F401
import pytest  # noqa: F401
import tiny  # noqa: F401
import torch._dynamo  # noqa: F401
from torch.nn.parallel import DistributedDataParallel  # noqa: F401
from transformers import Trainer  # noqa: F401

from peftlab import AdapterCallback, load_adapter, load_quantized, save_adapter, save_quantized, train  # noqa: F401
