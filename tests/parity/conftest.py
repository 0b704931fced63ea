"""Small tensors run fastest on one thread; more only wait for each other."""

import os

import torch

# Odd shapes send bitsandbytes through torch.compile, which takes seconds for each; nothing here is about speed.
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
torch.set_num_threads(1)
